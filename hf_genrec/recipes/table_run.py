"""One run of a recipe table in a process of its own: `python -m hf_genrec.recipes.table_run NAME SEED DATASET FILE ...`."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(
    name: str,
    seed: int,
    dataset: str,
    file: Path,
    train_seconds: float,
    items: str | None,
    data_dir: str | None,
    base: str | None,
) -> None:
    """Train and test one recipe with one seed and write metrics and the rank of every test row to `file`."""
    import hf_genrec  # noqa: F401  (registers the Auto classes)
    from hf_genrec.recipes.pipeline import train_recipe
    from hf_genrec.recipes.resolver import resolve_recipe

    schedule = resolve_recipe(name).training.get("lr_scheduler_type", "linear")
    overrides: dict[str, Any] = {"training.max_train_seconds": train_seconds, "training.train_clock": "cpu"}
    if schedule == "inverse_sqrt":  # has no end that a budget could move
        overrides["training.lr_scheduler_type"] = "linear"
    if base is not None and "base" in resolve_recipe(name).model:
        overrides["model.base"] = base
    recipe = resolve_recipe(name, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        trained = train_recipe(
            recipe,
            dataset,
            Path(scratch) / name,
            items=items,
            data_dir=data_dir,
            seed=seed,
            baselines=["popularity"],
            progress=False,
        )

    def places(report: Any) -> list[int | None]:
        return [int(rank) if math.isfinite(rank) else None for rank in report.removed.ranks_M]

    result = {
        "recipe": name,
        "title": recipe.title,
        "seed": seed,
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
    _, name, seed, dataset, file, train_seconds, items, data_dir, base = sys.argv
    run(name, int(seed), dataset, Path(file), float(train_seconds), items or None, data_dir or None, base or None)
