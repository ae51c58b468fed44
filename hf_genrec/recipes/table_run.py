"""One run of a recipe table in a process of its own: `python -m hf_genrec.recipes.table_run JOB FILE`, the job as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, TypedDict


class TableJob(TypedDict):
    """What one run is asked for: also how a later call of the table knows that a finished run is its own."""

    name: str
    seed: int
    dataset: str
    train_seconds: float
    items: str | None
    data_dir: str | None
    base: str | None


def run(job: TableJob, file: Path) -> None:
    """Train and test one recipe with one seed and write metrics and the rank of every test row to `file`."""
    import hf_genrec  # noqa: F401  (registers the Auto classes)
    from hf_genrec.recipes.pipeline import train_recipe
    from hf_genrec.recipes.resolver import resolve_recipe

    name, base = job["name"], job["base"]
    schedule = resolve_recipe(name).training.get("lr_scheduler_type", "linear")
    overrides: dict[str, Any] = {"training.max_train_seconds": job["train_seconds"], "training.train_clock": "cpu"}
    if schedule == "inverse_sqrt":  # has no end that a budget could move
        overrides["training.lr_scheduler_type"] = "linear"
    if base is not None and "base" in resolve_recipe(name).model:
        overrides["model.base"] = base
    recipe = resolve_recipe(name, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        trained = train_recipe(
            recipe,
            job["dataset"],
            Path(scratch) / name,
            items=job["items"],
            data_dir=job["data_dir"],
            seed=job["seed"],
            baselines=["popularity"],
            progress=False,
        )

    def places(report: Any) -> list[int | None]:
        return [int(rank) if math.isfinite(rank) else None for rank in report.removed.ranks_M]

    result = {
        "job": job,
        "recipe": name,
        "title": recipe.title,
        "seed": job["seed"],
        "metrics": trained.metrics,
        "popularity": {metric: trained.baselines["popularity"].removed[metric] for metric in ("recall@10", "ndcg@10")},
        "train_processor_seconds": trained.metrics["training"]["train_processor_seconds"],
        "ranks": places(trained.report),
        "popularity_ranks": places(trained.baselines["popularity"]),
    }
    half = file.with_suffix(".half")  # renamed when whole: a file that exists is a finished run
    half.write_text(json.dumps(result) + "\n", encoding="utf-8")
    os.replace(half, file)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), Path(sys.argv[2]))
