"""The merges of a `SetVocabulary` as one file, `set_merges.safetensors` (arrays only; no pickle, no code).

File layout (safetensors, metadata `format = hf_genrec.set_merges/1`):

- `level_sizes` int32 (L,): number of features of every level
- `merges` int32 (R, 2): the two tokens that each merged token replaces
- `weights` float64 (R,): expected count of the pair when it was merged
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import ArtifactError, IncompatibleComponentsError
from .set_vocabulary import SetVocabulary

MERGES_FILE_NAME = "set_merges.safetensors"
_FORMAT = "hf_genrec.set_merges/1"
_ARRAYS: dict[str, tuple[Any, int]] = {
    "level_sizes": (np.int32, 1),
    "merges": (np.int32, 2),
    "weights": (np.float64, 1),
}


def write_merges(vocabulary: SetVocabulary, path: str | os.PathLike) -> None:
    """Write the file. Equal vocabularies give equal bytes."""
    arrays: dict[str, np.ndarray] = {
        "level_sizes": np.asarray(vocabulary.level_sizes, np.int32),
        "merges": np.ascontiguousarray(vocabulary.merges),
        "weights": np.ascontiguousarray(vocabulary.weights),
    }
    data = save(arrays, metadata={"format": _FORMAT})
    with open(path, "wb") as file:
        file.write(data)


def read_merges(path: str | os.PathLike) -> SetVocabulary:
    """Read a merges file and check all of it. Raises ArtifactError naming the file and the field."""
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise ArtifactError(f"{path}: not a merges file (metadata 'format' is not {_FORMAT!r}): save it again")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error}): copy or save it again") from error
    for name, (dtype, dimensions) in _ARRAYS.items():
        array = arrays.get(name)
        if (
            array is None
            or array.dtype != dtype
            or array.ndim != dimensions
            or (name == "merges" and array.shape[1] != 2)
        ):
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise ArtifactError(f"{path}: field {name!r} is {found}: save the tokenizer again")
    try:
        return SetVocabulary(arrays["level_sizes"].tolist(), arrays["merges"], arrays["weights"])
    except IncompatibleComponentsError as error:
        raise ArtifactError(f"{path}: {error}") from error
