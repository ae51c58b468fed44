"""`genrec plots DIR`: pictures of an artefact's identifiers, saved into it and shown in its card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_genrec.errors import ArtifactError, RequestError


def add_plots_parser(commands: Any) -> None:
    """The command's arguments."""
    plots = commands.add_parser(
        "plots", help="pictures of the identifiers: codebook usage, prefix tree, map of the items (needs matplotlib)"
    )
    plots.add_argument("folder", help="artefact folder; the pictures go to its plots/ and its card")
    plots.add_argument("--output_dir", help="write the pictures there and leave the artefact as it is")


def run_plots(options: argparse.Namespace) -> tuple[Any, str]:
    """JSON value (the files) and text to print."""
    from hf_genrec.hub import load_artifact, save_artifact
    from hf_genrec.hub.artifact_files import PLOTS_FOLDER, QUANTIZER_FOLDER
    from hf_genrec.hub.identifier_plots import identifier_pictures
    from hf_genrec.hub.markdown import slug
    from hf_genrec.identifiers.feature_transforms import FEATURES_FILE, ItemFeatures

    if options.output_dir is None and not Path(options.folder).is_dir():
        raise ArtifactError(f"{options.folder} is not a folder: pull the artefact first, or give --output_dir.")
    artifact = load_artifact(options.folder)
    features = artifact.folder / QUANTIZER_FOLDER / FEATURES_FILE
    vectors = ItemFeatures.load(features).identifier_vectors() if features.is_file() else None
    pictures = identifier_pictures(artifact.tokenizer, vectors, required=True)
    if not pictures:
        raise RequestError(
            f"{options.folder}: identifiers of one code per item, or of texts, have no codebooks and no tree to show."
        )
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            (folder / f"{slug(name, 'plot')}.png").write_bytes(content)
    else:
        folder = artifact.folder / PLOTS_FOLDER
        others = {path.stem.replace("-", " "): path.read_bytes() for path in sorted(folder.glob("*.png"))}
        save_artifact(artifact.folder, plots=others | pictures)
    written = [str(folder / f"{slug(name, 'plot')}.png") for name in pictures]
    return {"pictures": written}, "\n".join(f"written: {path}" for path in written)
