"""Evaluate an artefact folder on a data set, full ranking and item level, beside the untrained baselines.

    python scripts/evaluate.py --artifact runs/demo --dataset movielens-100k
    python scripts/evaluate.py --artifact runs/demo --beam_widths 10 20 50 --json results.json --plot results.png
    python scripts/evaluate.py --dataset movielens-100k --shuffle_ties 0 1 2        # baselines alone, ties shuffled

Without --artifact only the baselines run. Printed: the tie report, one table with seen items removed and kept, the
popularity buckets of the targets, and where the model wins and loses (paired bootstrap over users).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HfArgumentParser

from hf_genrec.errors import GenRecError
from hf_genrec.evaluation.baselines import BASELINES
from hf_genrec.evaluation.beam_check import beam_versus_exact
from hf_genrec.evaluation.catalogue import align_to_catalogue
from hf_genrec.evaluation.evaluator import ModelRecommender, evaluate, training_counts
from hf_genrec.evaluation.report import comparison_table, differences, plot_results, results_table
from hf_genrec.evaluation.ties import evaluate_with_shuffled_ties, print_tie_report, tie_report
from hf_genrec.hub import load_artifact
from hf_genrec.recipes.pipeline import load_data_section


@dataclass
class EvaluateArguments:
    """What to evaluate, on what, and what to print."""

    artifact: str | None = field(default=None, metadata={"help": "Artefact folder; default: baselines only."})
    dataset: str | None = field(default=None, metadata={"help": "Name or path; default: the artefact's own data set."})
    items: str | None = field(default=None, metadata={"help": "Item table, when it does not lie beside the data."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the named data sets."})
    protocol: str | None = field(
        default=None, metadata={"help": "leave_one_out or global_time; default: the artefact's, else leave_one_out."}
    )
    part: str = field(default="test", metadata={"help": "test or validation."})
    baselines: list[str] = field(
        default_factory=lambda: ["popularity", "item_graph"],
        metadata={"help": f"Untrained baselines: {', '.join(BASELINES)}."},
    )
    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50], metadata={"help": "Cut-offs."})
    num_beams: int | None = field(default=None, metadata={"help": "Beam width; default: the artefact's."})
    batch_size: int | None = field(default=None, metadata={"help": "Histories per model call."})
    max_users: int | None = field(default=None, metadata={"help": "Evaluate a random sample of rows (seeded)."})
    bootstrap: int = field(default=1000, metadata={"help": "Resamples, 0 for no intervals."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap and of the sample."})
    beam_widths: list[int] = field(
        default_factory=list, metadata={"help": "Also compare beams of these widths with exact scoring."}
    )
    beam_users: int = field(default=256, metadata={"help": "Histories of the beam check."})
    shuffle_ties: list[int] = field(
        default_factory=list, metadata={"help": "Seeds: repeat the baselines with ties in time shuffled."}
    )
    json: str | None = field(default=None, metadata={"help": "Write every number to this file."})
    plot: str | None = field(default=None, metadata={"help": "Write a bar chart (PNG) to this file."})
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})


def main(arguments: EvaluateArguments) -> dict[str, Any]:
    """Run the evaluation, print it, and return what --json writes."""
    if arguments.part not in ("test", "validation"):
        raise GenRecError(f"--part must be test or validation, got {arguments.part!r}")
    for name in arguments.baselines:
        if name not in BASELINES:
            raise GenRecError(f"--baselines: unknown baseline {name!r}; choose among {', '.join(BASELINES)}")
    artifact = load_artifact(arguments.artifact) if arguments.artifact else None
    saved = (artifact.metrics if artifact is not None else None) or {}
    recipe = (artifact.recipe if artifact is not None else None) or {}
    dataset = arguments.dataset or saved.get("dataset")
    if dataset is None:
        raise GenRecError(
            "name the data: --dataset movielens-100k, or a path (the artefact does not say which it used)"
        )
    section = dict(recipe.get("data") or {})  # filters and protocol that the artefact was trained with
    if arguments.protocol:
        section["protocol"] = arguments.protocol

    def load(shuffle: int | None = None):
        align = None if artifact is None else lambda data: align_to_catalogue(data, artifact.tokenizer.item_ids)
        options = section if shuffle is None else section | {"shuffle_ties": shuffle}
        return load_data_section(options, dataset, items=arguments.items, data_dir=arguments.data_dir, align=align)

    data, split = load()
    rows = getattr(split, arguments.part)
    if arguments.max_users and arguments.max_users < len(rows):
        chosen = np.random.default_rng(arguments.seed).choice(len(rows), arguments.max_users, replace=False)
        rows = rows.take(np.sort(chosen))
    options = {
        "num_items": data.num_items,
        "ks": arguments.ks,
        "train_counts": training_counts(split.train, data.num_items),
        "repeats": data.repeats,
        "bootstrap": arguments.bootstrap,
        "seed": arguments.seed,
        "progress": arguments.progress,
    }
    print(data.report)
    ties = tie_report(data, split)
    print(print_tie_report(ties))

    baselines = []
    for name in arguments.baselines:
        fitted = BASELINES[name]().fit(split.train, data.num_items)
        baselines.append(evaluate(fitted, rows, name=name, **options))
    ours = None
    if artifact is not None:
        user_tokens = getattr(artifact.tokenizer, "num_user_tokens", 0)
        recommender = ModelRecommender(
            artifact.model,
            artifact.tokenizer,
            batch_size=arguments.batch_size,
            num_beams=arguments.num_beams,
            user_ids=data.user_ids if user_tokens else None,
        )
        ours = evaluate(recommender, rows, name=Path(arguments.artifact).resolve().name, **options)
    reports = baselines + ([ours] if ours is not None else [])
    k = 10 if 10 in arguments.ks else max(arguments.ks)
    columns = [f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr", "coverage")]
    print("\n" + results_table(reports, columns, buckets=True))

    result: dict[str, Any] = {
        "dataset": data.name,
        "protocol": split.protocol,
        "part": arguments.part,
        "seed": arguments.seed,
        "wall_seconds": {r.name: sum(found.seconds for found in r.results.values()) for r in reports},
    }
    if ours is not None:
        print("\n" + comparison_table(ours, baselines, columns[:2], seed=arguments.seed))
        result["test"] = ours.to_dict()
        result["differences"] = {
            name: {metric: found.to_dict() for metric, found in table.items()}
            for name, table in differences(ours, baselines, columns[:2], seed=arguments.seed).items()
        }
    result |= {"baselines": {report.name: report.to_dict() for report in baselines}, "ties": ties}

    if arguments.beam_widths and artifact is not None:
        sample = rows.take(np.arange(min(arguments.beam_users, len(rows))))
        check = beam_versus_exact(
            artifact.model,
            artifact.tokenizer,
            sample.histories,
            targets=sample.targets,
            widths=arguments.beam_widths,
            exclude_seen=not data.repeats,
            progress=arguments.progress,
        )
        print(f"\n{check}")
        result["beam_versus_exact"] = check.to_dict()
    if arguments.shuffle_ties:
        result["shuffled_ties"] = {}
        for name in arguments.baselines:

            def run(shuffle: int | None, name: str = name):
                shuffled, parts = load(shuffle)
                fitted = BASELINES[name]().fit(parts.train, shuffled.num_items)
                return evaluate(
                    fitted,
                    getattr(parts, arguments.part),
                    name=name,
                    num_items=shuffled.num_items,
                    ks=arguments.ks,
                    repeats=data.repeats,
                    bootstrap=0,
                    progress=False,
                )

            found = evaluate_with_shuffled_ties(run, arguments.shuffle_ties)
            print(f"\n{found}")
            result["shuffled_ties"][name] = found.to_dict()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if arguments.plot:
        plot_results(reports, arguments.plot, columns[:2], required=False)
    return result


if __name__ == "__main__":
    try:
        main(HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses()[0])
    except GenRecError as error:
        sys.exit(f"error: {error}")
