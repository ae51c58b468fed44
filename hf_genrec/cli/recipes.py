"""`genrec recipes [NAME]`: the list, or one recipe resolved with the provenance of its values."""

from __future__ import annotations

from typing import Any

from hf_genrec.recipes.resolver import list_recipes, resolve_recipe


def run_recipes(name: str | None) -> tuple[Any, str]:
    """JSON value and text to print."""
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
