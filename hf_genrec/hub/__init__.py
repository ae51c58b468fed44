"""One folder, one Hub repository: save, load, push and pull whole artefacts, with their model card."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifact import Artifact, load_artifact, save_artifact
    from .card import model_card
    from .metrics_file import build_metrics
    from .remote import pull_artifact, push_artifact
    from .serving import export_catalogue

_EXPORTS = {
    "Artifact": ".artifact",
    "build_metrics": ".metrics_file",
    "export_catalogue": ".serving",
    "load_artifact": ".artifact",
    "model_card": ".card",
    "pull_artifact": ".remote",
    "push_artifact": ".remote",
    "save_artifact": ".artifact",
}

__all__ = [
    "Artifact",
    "build_metrics",
    "export_catalogue",
    "load_artifact",
    "model_card",
    "pull_artifact",
    "push_artifact",
    "save_artifact",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
