"""One file per fitted quantizer: tensors as safetensors, settings as JSON in its header. No pickle.

Shared by the quantizers that are fitted rather than trained (residual k-means, product quantization, trees).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import ArtifactError


def write_quantizer(path: str | Path, form: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write settings (under the header key `form`) and tensors; equal quantizers give equal bytes."""
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        str(path),
        metadata={form: json.dumps(settings)},  # one key: safetensors writes several in any order
    )


def read_quantizer(path: str | Path, form: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a file of `write_quantizer`.

    Args:
        form: the header key, which names kind and version of the file.
        name: of the quantizer, for messages.

    Raises:
        ArtifactError: not a readable safetensors file, or not one with this header key.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        raise ArtifactError(f"{path}: not a readable safetensors file ({error}); save the {name} again") from error
    if form not in metadata:
        raise ArtifactError(f"{path}: not a {name} file of this version ({form} is not in its header)")
    return json.loads(metadata[form]), tensors
