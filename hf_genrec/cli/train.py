"""`genrec train RECIPE --dataset ... --output_dir ...`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_genrec.recipes.resolver import resolve_recipe


def run_train(options: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Any, str]:
    """JSON value (metrics.json) and text to print."""
    recipe = resolve_recipe(options.recipe, overrides)
    import hf_genrec  # noqa: F401  (registers the Auto classes)

    if options.dry_run:
        from hf_genrec.recipes.dry_run import dry_run

        found = dry_run(recipe)
        text = f"{recipe.name} resolves, builds, takes a step and recommends on a generated catalogue: {recipe.title}"
        return recipe.to_dict() | {"dry_run": found}, text
    from hf_genrec.evaluation.report import comparison_table, results_table
    from hf_genrec.recipes.pipeline import train_recipe

    baselines = [] if options.baselines == "none" else [name for name in options.baselines.split(",") if name]
    trained = train_recipe(
        recipe,
        options.dataset,
        options.output_dir,
        items=options.items,
        data_dir=options.data_dir,
        seed=options.seed,
        baselines=baselines,
        resume=options.resume,
        keep_checkpoints=options.keep_checkpoints,
        test_users=options.test_users,
        progress=not (options.quiet or options.json),
    )
    reports = [trained.report, *trained.variants.values(), *trained.baselines.values()]
    text = results_table(reports)
    if trained.baselines:
        text += "\n\n" + comparison_table(trained.report, list(trained.baselines.values()))
    return trained.metrics, f"{text}\n\nwritten: {trained.folder}"
