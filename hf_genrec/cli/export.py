"""`genrec export DIR --output_dir OUT`: the catalogue as JSON, for serving the model with vLLM, SGLang or plain code."""

from __future__ import annotations

import argparse
from typing import Any


def add_export_parser(commands: Any) -> None:
    """The command's arguments."""
    export = commands.add_parser(
        "export",
        help="write the catalogue as JSON for serving elsewhere: spellings, prefix tree, prompt",
        description="Write what a server without hf_genrec needs to decode items: semantic_ids.json, item_tokens.json, "
        "allowed_prefixes.json, prompt.json, a plain tokenizer and a README with the limits. The model stays where it is.",
    )
    export.add_argument("folder", help="artefact folder or Hub id")
    export.add_argument("--output_dir", required=True, help="folder to write; an earlier export there is replaced")


def run_export(options: argparse.Namespace) -> tuple[Any, str]:
    """JSON value (the files) and text to print."""
    from hf_genrec.hub.serving import export_catalogue

    folder = export_catalogue(options.folder, options.output_dir)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    text = "\n".join(f"{(folder / name).stat().st_size:>12,} {name}" for name in files)
    return {"folder": str(folder), "files": files}, f"{text}\n\nwritten: {folder}"
