"""Any fitted quantizer to a folder and back: the file of a fitted one, the checkpoint of a trained one.

Which class reads a folder is decided here, by the name of the format, never by a name that a file gives for import.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import ArtifactError, IncompatibleComponentsError

QUANTIZER_FILE = "quantizer.safetensors"
_HERE = "hf_genrec.identifiers.quantizers."
_FITTED = {  # header key of the file -> class
    "hf_genrec.residual_kmeans.1": "residual_kmeans:ResidualKMeans",
    "hf_genrec.product_quantizer.1": "product:ProductQuantizer",
    "hf_genrec.tree_indexer.1": "tree:TreeIndexer",
    "hf_genrec.spectral_indexer.1": "spectral:SpectralIndexer",
    "hf_genrec.svd_bins.1": "svd_bins:SvdBins",
}
_TRAINED = {  # model type of the configuration -> class
    "rq_vae": "rq_vae:RQVAEModel",
    "multi_head_vq": "multi_head_vq:MultiHeadVQModel",
    "fsq": "fsq:FSQModel",
}


def save_quantizer(quantizer: Any, folder: str | Path) -> Path:
    """Write a quantizer into a folder (made if needed).

    Raises:
        IncompatibleComponentsError: something that is no quantizer of this library.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if can_save(quantizer):
        if hasattr(quantizer, "save_pretrained"):
            quantizer.save_pretrained(folder)
        else:
            quantizer.save(folder / QUANTIZER_FILE)
        return folder
    raise IncompatibleComponentsError(f"{type(quantizer).__name__} is no quantizer that can be saved and read back")


def can_save(quantizer: Any) -> bool:
    """Is it one of the classes that `load_quantizer` reads?"""
    return type(quantizer).__name__ in {target.partition(":")[2] for target in (*_FITTED.values(), *_TRAINED.values())}


def load_quantizer(folder: str | Path) -> Any:
    """Read what `save_quantizer` wrote.

    Raises:
        ArtifactError: no quantizer there, a damaged one, or one of a version that is not known here.
    """
    folder = Path(folder)
    file, config = folder / QUANTIZER_FILE, folder / "config.json"
    if file.is_file():
        try:
            with safe_open(str(file), framework="np") as opened:
                keys = set(opened.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{file}: not a readable safetensors file ({error}); save the quantizer again"
            ) from error
        target = next((_FITTED[key] for key in keys if key in _FITTED), None)
        if target is None:
            raise ArtifactError(
                f"{file}: no quantizer of a known kind (header {sorted(keys)}); save the quantizer again"
            )
        return _load(target).load(file)
    if config.is_file():
        try:
            model_type = json.loads(config.read_text("utf-8"))["model_type"]
            target = _TRAINED[model_type]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{config}: no quantizer of a known kind ({error}); save the quantizer again"
            ) from error
        try:
            return _load(target).from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: the quantizer cannot be built from its files: {error}") from error
    raise ArtifactError(
        f"{folder}: no quantizer there ({QUANTIZER_FILE} or config.json); train the recipe again to save it"
    )


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(_HERE + module), name)
