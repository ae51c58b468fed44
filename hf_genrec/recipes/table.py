"""Tables of recipes on one data set and one training budget: run, aggregate over seeds, render.

    genrec recipes --table identifiers                                      # the committed table
    genrec recipes --table identifiers --run --dataset movielens-100k --output_dir runs/table   # made anew

Every (recipe, seed) is one process of one thread with the same processor seconds of training; a finished one is kept, so an
interrupted run goes on. Intervals pool seeds and users; differences to the reference recipe are paired over users.

Shape suffixes: S seeds, M test rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_genrec.errors import RecipeError, TrainingError
from hf_genrec.evaluation.bootstrap import paired_difference, pooled_means, quantile_bounds
from hf_genrec.evaluation.metrics import values_from_ranks
from hf_genrec.recipes.resolver import FOLDER, nearest, recipe_names, resolve_recipe
from hf_genrec.recipes.table_run import TableJob

METRICS = ("recall@10", "ndcg@10")


@dataclass(frozen=True)
class Table:
    """What a table compares.

    Attributes:
        reference: recipe that the others are compared with.
        others: further recipes.
        stage: all recipes of this stage, too.
    """

    reference: str
    others: tuple[str, ...]
    stage: str | None = None


TABLES = {
    "identifiers": Table("tiger_packed", ("liger", "p5", "rpg", "tandem", "sasrec"), stage="creation"),
    # the reference is trained without preferences for as long as the others with all their stages
    "alignment": Table("tiger_packed", ("tiger_s_dpo", "tiger_grpo", "onerec")),
    "language": Table("sasrec", ("item_lm", "s_dpo", "lc_rec", "minionerec", "e4srec")),
}


def table_recipes(table: str) -> list[str]:
    """Recipes of a table.

    Raises:
        RecipeError: no such table.
    """
    if table not in TABLES:
        raise RecipeError(f"unknown table {table!r}: {nearest(table, TABLES)}")
    kind = TABLES[table]
    names = [name for name in recipe_names() if kind.stage is not None and resolve_recipe(name).stage == kind.stage]
    return [*names, kind.reference, *kind.others]


def read_table(table: str) -> dict[str, Any]:
    """The committed table.

    Raises:
        RecipeError: no such table, or none was committed.
    """
    table_recipes(table)
    path = FOLDER / f"table.{table}.json"
    if not path.is_file():
        raise RecipeError(
            f"{path.name} is not there; make it with `genrec recipes --table {table} --run --dataset ...`."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def run_table(
    table: str,
    dataset: str,
    output_dir: str | Path,
    *,
    recipes: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    train_seconds: float = 120.0,
    processes: int = 1,
    items: str | None = None,
    data_dir: str | None = None,
    base: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train and test every recipe of a table and write `table.json` and `table.md` to `output_dir`.

    Args:
        table: one of `TABLES`.
        dataset: anything `load_data` takes.
        recipes: only these; default all of the table.
        train_seconds: processor seconds of training of each run, all stages together, the identifiers not counted.
        processes: runs at the same time.
        base: the language model of recipes that have one (`model.base`).

    Raises:
        RecipeError: an unknown table or recipe, or `output_dir` has a result of other data, seconds or language model.
        TrainingError: a run failed (naming its log); the others are finished first.
    """
    known = table_recipes(table)
    chosen = list(recipes or known)
    for name in chosen:
        if name not in recipe_names():
            raise RecipeError(f"unknown recipe {name!r}: {nearest(name, recipe_names())}")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"dataset": dataset, "train_seconds": train_seconds, "items": items, "data_dir": data_dir, "base": base}
    jobs = [TableJob(name=name, seed=seed, **shared) for seed in seeds for name in chosen]  # type: ignore[typeddict-item]
    waiting = _unfinished(folder, jobs)
    running: list[tuple[subprocess.Popen[bytes], TableJob]] = []
    failed = []
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop(0)
            running.append((_start(folder, job), job))
            if progress:
                print(f"started {job['name']}, seed {job['seed']}; {len(waiting)} waiting", flush=True)
        for entry in list(running):
            process, job = entry
            if process.poll() is None:
                continue
            running.remove(entry)
            name, seed = job["name"], job["seed"]
            if not _result_file(folder, name, seed).is_file():
                failed.append(f"{name} seed {seed} ({_result_file(folder, name, seed).with_suffix('.log')})")
            elif progress:
                test = json.loads(_result_file(folder, name, seed).read_text())["metrics"]["test"]
                print(f"{name}, seed {seed}: " + ", ".join(f"{m} {test[m]:.4f}" for m in METRICS), flush=True)
        time.sleep(0.2)
    result = collect_table(table, folder, chosen, seeds, train_seconds)
    (folder / "table.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(render_table(result), encoding="utf-8")
    if failed:
        raise TrainingError(f"{len(failed)} runs failed: {'; '.join(failed)}. The table holds the others.")
    return result


def _result_file(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-{seed}.json"


def _unfinished(folder: Path, jobs: list[TableJob]) -> list[TableJob]:
    """The jobs without a result; a result of another job (data, seconds, language model) is an error, not an answer."""
    left = []
    for job in jobs:
        file = _result_file(folder, job["name"], job["seed"])
        if not file.is_file():
            left.append(job)
            continue
        found = json.loads(file.read_text()).get("job") or {}
        other = [f"{key} {found.get(key)!r}" for key in job if found.get(key) != job[key]]  # type: ignore[literal-required]
        if other:
            raise RecipeError(
                f"{file} is the result of another run ({', '.join(other)}); choose another output_dir or delete the file"
            )
    return left


def _start(folder: Path, job: TableJob) -> subprocess.Popen[bytes]:
    file = _result_file(folder, job["name"], job["seed"])
    command = [sys.executable, "-m", "hf_genrec.recipes.table_run", json.dumps(job), str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(file.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def collect_table(
    table: str, folder: Path, recipes: Sequence[str], seeds: Sequence[int], train_seconds: float
) -> dict[str, Any]:
    """The finished runs below `folder` as one table (plain data)."""
    compared_with = TABLES[table].reference
    rows, values = [], {}
    shared: dict[str, Any] = {}
    for name in recipes:
        runs = [json.loads(path.read_text()) for seed in seeds if (path := _result_file(folder, name, seed)).is_file()]
        if not runs:
            continue
        ranks_SM = np.array([_ranks(run["ranks"]) for run in runs])
        columns = [values_from_ranks(ranks_M, [10]) for ranks_M in ranks_SM]
        values[name] = {metric: np.array([column[metric] for column in columns]) for metric in METRICS}
        popular = values_from_ranks(_ranks(runs[0]["popularity_ranks"]), [10])
        rows.append(_row(name, runs, values[name]))
        stages = [stage for run in runs if (stage := _last_stage(run)) is not None]
        if stages:
            rows[-1]["last_stage"] = stages
        rows[-1]["difference_to_popularity"] = {
            metric: paired_difference(values[name][metric].mean(0), popular[metric]).to_dict() for metric in METRICS
        }
        metrics = runs[0]["metrics"]
        shared = {"dataset": metrics["dataset"], "protocol": metrics["protocol"], "popularity": runs[0]["popularity"]}
    for row in rows:
        reference = values.get(compared_with)
        if reference is not None and row["recipe"] != compared_with:
            row["difference_to_reference"] = {
                metric: paired_difference(values[row["recipe"]][metric].mean(0), reference[metric].mean(0)).to_dict()
                for metric in METRICS
            }
    rows.sort(key=lambda row: -row["ndcg@10"]["mean"])
    budget = {"train_processor_seconds": train_seconds, "threads": 1, "seen_items": "removed"}
    return {"table": table, **shared, "budget": budget, "reference": compared_with, "seeds": list(seeds), "rows": rows}


def _ranks(places: Sequence[int | None]) -> np.ndarray:
    return np.array([np.inf if place is None else place for place in places])


def _last_stage(run: dict[str, Any]) -> dict[str, Any] | None:
    """What the last of several training stages changed on validation, over all targets and by bucket; of one seed."""
    stages = run["metrics"].get("training", {}).get("stages")
    compared = stages[-1].get("buckets") if isinstance(stages, list) and stages else None
    if compared is None:
        return None
    parts = {"all": compared["all"], **compared["buckets"]}
    return {"seed": run["seed"], "method": stages[-1]["method"], "metric": compared["metric"], "buckets": parts}


def _row(name: str, runs: list[dict[str, Any]], values: dict[str, np.ndarray]) -> dict[str, Any]:
    def mean(*path: str) -> float | None:
        found = []
        for run in runs:
            value: Any = run["metrics"]
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, list):
                value = min(value) if value else None
            if value is not None:
                found.append(float(value))
        return round(float(np.mean(found)), 4) if found else None

    row: dict[str, Any] = {
        "recipe": name,
        "title": runs[0]["title"],
        "status": resolve_recipe(name).status,
        "collision_rate": mean("identifiers", "collision_rate"),
        "collision_rate_before_policy": mean("identifiers", "before_policy", "collision_rate"),
        "utilisation": mean("identifiers", "before_policy", "utilisation"),
        "neighbour_hit_rate": mean("identifiers", "before_policy", "neighbour_hit_rate"),
        "identifier_seconds": mean("wall_seconds", "identifiers"),
        "train_seconds": round(float(np.mean([run["train_processor_seconds"] for run in runs])), 1),
        "seeds": len(runs),
    }
    for metric in METRICS:
        low, high = quantile_bounds(pooled_means(values[metric][:, :, None]), 0.95)
        row[metric] = {
            "mean": round(float(values[metric].mean()), 4),
            "interval": [round(float(low[0]), 4), round(float(high[0]), 4)],
            "seed_values": [round(float(value), 4) for value in values[metric].mean(1)],
        }
    return row


def render_table(table: dict[str, Any]) -> str:
    """Markdown: one line per recipe, best NDCG@10 first, with the difference to the reference."""
    number = lambda value, form=".3f": "" if value is None else format(value, form)
    budget = table["budget"]
    lines = [
        f"{table['dataset']}, {table['protocol'].replace('_', ' ')}, full ranking at item level, seen items removed; "
        f"{len(table['seeds'])} seeds, {budget['train_processor_seconds']:g} processor seconds of training on one thread "
        f"each. Intervals: 95 % bootstrap over seeds and users. Popularity: {table['popularity']['recall@10']:.4f} / "
        f"{table['popularity']['ndcg@10']:.4f}; rows marked with a dagger are not clearly above it.",
        "",
        "| recipe | collisions | utilisation | neighbours | Recall@10 | NDCG@10 | NDCG@10 - "
        f"{table['reference']} | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        above = row["difference_to_popularity"]["ndcg@10"]["low"] > 0
        cells = [
            f"`{row['recipe']}`{'' if above else ' †'}",
            number(row["collision_rate"]),
            number(row["utilisation"], ".2f"),
        ]
        cells.append(number(row["neighbour_hit_rate"], ".2f"))
        for metric in METRICS:
            low, high = row[metric]["interval"]
            cells.append(f"{row[metric]['mean']:.4f} [{low:.4f}, {high:.4f}]")
        difference = (row.get("difference_to_reference") or {}).get("ndcg@10")
        cells.append(
            f"{difference['difference']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
            if difference
            else ""
        )
        cells.append(f"{row['train_seconds']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "*collisions*: share of items whose full code another item has too, after the collision policy. *utilisation*: the "
        "worst level's share of codes in use; *neighbours*: share of the 10 nearest items (by the vectors that were "
        "quantized) with the same first code; both before the policy. *seconds*: processor seconds of training, without "
        "the identifiers.",
    ]
    return "\n".join([*lines, *_stage_lines(table)]) + "\n"


def _stage_lines(table: dict[str, Any]) -> list[str]:
    """Before and after the last stage, one line per recipe and seed."""
    rows = [(row["recipe"], stage) for row in table["rows"] for stage in row.get("last_stage", ())]
    if not rows:
        return []
    buckets = list(dict.fromkeys(bucket for _, stage in rows for bucket in stage["buckets"]))
    lines = [
        "",
        f"What the last stage changed: {rows[0][1]['metric']} on validation users before -> after; an arrow up or down where "
        "the paired 95 % interval leaves zero out.",
        "",
        "| recipe | seed | stage | " + " | ".join(buckets) + " |",
        "|---|---|---|" + "---|" * len(buckets),
    ]
    marks = {"better": " ↑", "worse": " ↓"}
    for name, stage in rows:
        cells = []
        for bucket in buckets:
            part = stage["buckets"].get(bucket) or {}
            known = part.get("before") is not None
            cells.append(
                f"{part['before']:.4f} -> {part['after']:.4f}{marks.get(part['verdict'], '')}" if known else ""
            )
        lines.append(f"| `{name}` | {stage['seed']} | {stage['method']} | " + " | ".join(cells) + " |")
    return lines
