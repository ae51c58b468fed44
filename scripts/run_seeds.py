"""Train a recipe over several seeds and report it honestly beside its baselines: means, intervals, paired differences.

    python scripts/run_seeds.py --recipe tandem --dataset movielens-100k --seeds 0 1 2 --output_dir runs/seeds

writes one artefact per seed (`OUTPUT_DIR/seed-N`, an existing one is evaluated again, not retrained), `summary.json`,
`summary.md` and `results.png`. The SASRec baseline gets the same seeds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_genrec.evaluation.report import comparison_table, markdown_table, plot_results, results_table
from hf_genrec.evaluation.seeds import aggregate_seeds
from hf_genrec.hub import load_artifact
from hf_genrec.recipes.baselines import evaluate_sasrec
from hf_genrec.recipes.pipeline import BASELINES, KS, evaluate_model, load_data_section, train_recipe
from hf_genrec.recipes.resolver import resolve_recipe


@dataclass
class SeedArguments:
    """What to run."""

    recipe: str = field(default="tandem", metadata={"help": "Recipe name or YAML file."})
    dataset: str = field(default="movielens-100k", metadata={"help": "Named data set or path."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds."})
    output_dir: str = field(default="runs/seeds", metadata={"help": "Where artefacts and summary go."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the named data sets."})
    baselines: list[str] = field(default_factory=lambda: list(BASELINES), metadata={"help": "Rows beside the result."})
    overrides: list[str] = field(default_factory=list, metadata={"help": "KEY=VALUE settings of the recipe."})
    json: bool = field(default=False, metadata={"help": "Print the summary as JSON."})


def main() -> None:
    (options,) = HfArgumentParser(SeedArguments).parse_args_into_dataclasses()
    from hf_genrec.cli.main import parse_overrides

    recipe = resolve_recipe(options.recipe, parse_overrides([f"--{pair}" for pair in options.overrides]))
    folder = Path(options.output_dir)
    data, split = load_data_section(recipe.data, options.dataset, data_dir=options.data_dir)
    found: dict[str, list] = {}
    for seed in options.seeds:
        target = folder / f"seed-{seed}"
        if (target / "metrics.json").is_file():
            artifact = load_artifact(target)
            report, variants = evaluate_model(artifact.model, artifact.tokenizer, data, split, recipe.name, True)
            reports = [report, *variants.values()]
            other = folder / f"seed-{seed}-sasrec_ce"
            if other.is_dir():
                reports.append(evaluate_sasrec(other, data, split, ks=KS))
        else:
            trained = train_recipe(
                recipe, options.dataset, target, data_dir=options.data_dir, seed=seed, baselines=options.baselines
            )
            reports = [trained.report, *trained.variants.values(), *trained.baselines.values()]
        for report in reports:
            found.setdefault(report.name, []).append(report)
    summaries = [aggregate_seeds(reports, name=name) for name, reports in found.items()]
    ours, others = summaries[0], [summary for summary in summaries[1:] if summary.name in BASELINES]
    result = {
        "recipe": recipe.to_dict(),
        "dataset": data.name,
        "protocol": split.protocol,
        "seeds": options.seeds,
        "models": {summary.name: summary.to_dict() for summary in summaries},
        "differences": {
            setting: {
                other.name: {m: ours.compare(other, m, setting=setting).to_dict() for m in ("recall@10", "ndcg@10")}
                for other in others
            }
            for setting in ours.results
        },
    }
    (folder / "summary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = comparison_table(ours, others) if others else ""
    (folder / "summary.md").write_text(f"{markdown_table(summaries)}\n\n```\n{text}\n```\n", encoding="utf-8")
    plot_results(summaries, folder / "results.png", required=False)
    print(json.dumps(result) if options.json else f"{results_table(summaries)}\n\n{text}")


if __name__ == "__main__":
    sys.exit(main())
