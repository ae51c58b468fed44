"""`genrec recipes [NAME]`: the list, or one recipe resolved with the provenance of its values."""

from __future__ import annotations

import argparse
from typing import Any

from hf_genrec.errors import RequestError
from hf_genrec.recipes.resolver import list_recipes, resolve_recipe


def run_recipes(options: argparse.Namespace) -> tuple[Any, str]:
    """JSON value and text to print."""
    if options.table is not None:
        return _table(options)
    if options.run:
        raise RequestError("--run makes a table anew: name it with --table.")
    name = options.name
    if name is None:
        listed = list_recipes()
        width = max(len(row["name"]) for row in listed)
        lines = [f"{row['name']:<{width}}  {row['status']:<10}  {row['stage']:<10}  {row['title']}" for row in listed]
        return listed, "\n".join([*lines, "", "genrec recipes NAME shows one; genrec train NAME runs it."])
    recipe = resolve_recipe(name)
    values = recipe.to_dict() | {"provenance": recipe.provenance}
    lines = [f"{recipe.name}: {recipe.title}", f"status {recipe.status}, stage {recipe.stage}"]
    lines.append("papers: " + ", ".join(f"arXiv {paper}" for paper in recipe.paper))
    for section in ("data", "features", "identifiers", "model", "training", "generation"):
        content = getattr(recipe, section)
        lines += [f"{section}:"] if content else []
        for key, value in content.items():
            source = recipe.provenance.get(f"{section}.{key}", "")
            lines.append(f"  {key}: {value}" + (f"   ({source})" if source else ""))
    return values, "\n".join(lines)


def _table(options: argparse.Namespace) -> tuple[Any, str]:
    """The committed table, or one made anew with `--run`."""
    from hf_genrec.recipes.table import read_table, render_table, run_table

    if not options.run:
        table = read_table(options.table)
    elif options.dataset is None or options.output_dir is None:
        raise RequestError("--run needs --dataset NAME|PATH and --output_dir DIR.")
    else:
        table = run_table(
            options.table,
            options.dataset,
            options.output_dir,
            recipes=options.recipes.split(",") if options.recipes else None,
            seeds=[int(seed) for seed in options.seeds.split(",")],
            train_seconds=options.train_seconds,
            processes=options.processes,
            items=options.items,
            data_dir=options.data_dir,
            base=options.base,
            progress=not options.json,
        )
    return table, render_table(table)
