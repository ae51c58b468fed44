"""`genrec evaluate DIR [--dataset ...]`: full ranking on the artefact's own protocol, beside the untrained baselines."""

from __future__ import annotations

import argparse
from typing import Any

from hf_genrec.errors import RequestError
from hf_genrec.evaluation.catalogue import align_to_catalogue
from hf_genrec.evaluation.report import comparison_table, results_table
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.hub import load_artifact
from hf_genrec.recipes.baselines import evaluate_simple
from hf_genrec.recipes.pipeline import KS, evaluate_model, load_data_section


def run_evaluate(options: argparse.Namespace) -> tuple[Any, str]:
    """JSON value and text to print."""
    artifact = load_artifact(options.folder)
    dataset = options.dataset or (artifact.metrics or {}).get("dataset")
    if dataset is None:
        raise RequestError(f"{options.folder}: the artefact does not say what it was trained on; give --dataset.")
    section = (artifact.recipe or {}).get("data", {})
    data, split = load_data_section(
        section,
        dataset,
        items=options.items,
        data_dir=options.data_dir,
        align=lambda d: align_to_catalogue(d, artifact.tokenizer.item_ids),
    )
    if options.num_beams is not None:
        config = recommendation_config_of(artifact.model)
        artifact.model.recommendation_config = config.merged(num_beams=options.num_beams)
    progress = not (options.quiet or options.json)
    name = (artifact.recipe or {}).get("name", "model")
    report, variants = evaluate_model(artifact.model, artifact.tokenizer, data, split, name, progress)
    names = [] if options.baselines == "none" else options.baselines.split(",")
    baselines = evaluate_simple(names, data, split, ks=KS, progress=progress)
    text = results_table([report, *variants.values(), *baselines.values()], buckets=True)
    if baselines:
        text += "\n\n" + comparison_table(report, list(baselines.values()))
    blocks = {key: value.to_dict() for key, value in (variants | baselines).items()}
    return {"dataset": data.name, "protocol": split.protocol, "test": report.to_dict(), "baselines": blocks}, text
