"""`metrics.json`: the numbers of one artefact in one layout, built and checked here, read by the model card.

Required keys: `dataset`, `protocol`, `seed`, `test`, `baselines`, `identifiers`, `wall_seconds` (the last three may be
empty). `test` and every entry of `baselines` are *result blocks*, what `EvaluationReport.to_dict()` gives:

- flat headline metrics `"recall@10": 0.213, ...`, so that any reader gets a number without knowing more;
- optional `intervals` `{metric: [low, high]}` (bootstrapped over users), `seen_items` ("removed" or "kept": what the
  headline ranking does with items of the user's own history), and `seen_removed` / `seen_kept`, a block per setting;
- anything else (`buckets`, `rows`, `seconds`, ...).

Optional keys of the file: `differences` `{baseline: {metric: {"difference", "low", "high", ...}}}` (paired over users,
ours minus the baseline; `PairedDifference.to_dict()`), `variants` (result blocks of other settings of the same model),
`data` (`DataReport.to_dict()`), `ties`, `split`, `notes` (list of sentences). With several seeds, `seed` is the list of
them and `test` the block of a `SeedSummary`. Unknown keys are kept.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_genrec.errors import ArtifactError

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.json"
SEEN_ITEMS = ("removed", "kept")
REQUIRED = ("dataset", "protocol", "seed", "test", "baselines", "identifiers", "wall_seconds")
_METRIC_NAME = re.compile(r"[a-z][a-z0-9_]*@[1-9][0-9]*")


def build_metrics(
    *,
    dataset: str,
    protocol: str,
    seed: int | Sequence[int],
    test: Any,
    baselines: Mapping[str, Any] | None = None,
    identifiers: Mapping[str, Any] | None = None,
    wall_seconds: Mapping[str, float] | None = None,
    **optional: Any,
) -> dict[str, Any]:
    """The dictionary that `save_artifact(metrics=...)` writes, checked; numpy values become plain ones.

    Args:
        dataset, protocol, seed: what was evaluated and how; `seed` may list several.
        test, baselines: result blocks, or reports that have `to_dict()`.
        identifiers: health of the identifiers, flat.
        wall_seconds: stage -> seconds.
        optional: further keys of the layout; None leaves one out.

    Raises:
        ArtifactError: a key or value that does not fit the layout, named with the fix.

    Example:
        >>> build_metrics(dataset="shop", protocol="leave_one_out", seed=0, test={"recall@10": 0.25})["test"]
        {'recall@10': 0.25}
    """
    metrics = {
        "dataset": dataset,
        "protocol": protocol,
        "seed": seed,
        "test": test,
        "baselines": baselines or {},
        "identifiers": identifiers or {},
        "wall_seconds": wall_seconds or {},
        **optional,
    }
    metrics = check_metrics({key: value for key, value in metrics.items() if value is not None})
    if isinstance(metrics.get("data"), dict) and isinstance(metrics["data"].get("source"), str):
        # Metrics are published; whose home folder the file was in is nobody's business.
        metrics["data"]["source"] = re.split(r"[/\\]", metrics["data"]["source"].rstrip("/\\"))[-1]
    return metrics


def check_metrics(metrics: Any, where: str = METRICS_NAME) -> dict[str, Any]:
    """`metrics` as plain JSON values, or ArtifactError naming the field that does not fit the layout."""
    if not isinstance(metrics, Mapping):
        raise ArtifactError(
            f"{where}: must be one table of keys, got {type(metrics).__name__}. Use build_metrics(...)."
        )
    plain = plain_json(metrics, where)
    for key in REQUIRED:
        if key not in plain:
            raise ArtifactError(
                f"{where}: key {key!r} is missing; it needs {', '.join(REQUIRED)}. Use build_metrics(...)."
            )
    for key in ("dataset", "protocol"):
        if not isinstance(plain[key], str) or not plain[key]:
            raise ArtifactError(f"{where}: {key!r} must be a text, got {plain[key]!r}.")
    seeds = plain["seed"] if isinstance(plain["seed"], list) else [plain["seed"]]
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise ArtifactError(f"{where}: 'seed' must be a whole number or a list of them, got {plain['seed']!r}.")
    for key in ("identifiers", "wall_seconds", "baselines"):
        if not isinstance(plain[key], dict):
            raise ArtifactError(f"{where}: {key!r} must be a table, got {plain[key]!r}.")
    _check_block(plain["test"], f"{where} test")
    for name, block in plain["baselines"].items():
        _check_block(block, f"{where} baselines[{name!r}]")
    for name, block in (plain.get("variants") or {}).items():
        _check_block(block, f"{where} variants[{name!r}]")
    for name, table in (plain.get("differences") or {}).items():
        if name not in plain["baselines"]:
            raise ArtifactError(f"{where}: differences[{name!r}] is about a row that is not in 'baselines'.")
        for metric, entry in table.items():
            place = f"{where} differences[{name!r}][{metric!r}]"
            if not isinstance(entry, dict) or not all(_is_number(entry.get(k)) for k in ("difference", "low", "high")):
                raise ArtifactError(f"{place}: must be a table with 'difference', 'low' and 'high', got {entry!r}.")
    return plain


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_block(block: Any, where: str) -> None:
    if not isinstance(block, dict) or not metric_names(block):
        raise ArtifactError(f"{where}: must be a table with metrics like {{'recall@10': 0.213}}, got {block!r}.")
    for name in metric_names(block):
        if not _is_number(block[name]):
            raise ArtifactError(f"{where}: {name!r} must be a number, got {block[name]!r}.")
    for name, bounds in (block.get("intervals") or {}).items():
        if not isinstance(bounds, list) or len(bounds) != 2 or not all(map(_is_number, bounds)):
            raise ArtifactError(f"{where}: intervals[{name!r}] must be [low, high], got {bounds!r}.")
    if block.get("seen_items") not in (None, *SEEN_ITEMS):
        raise ArtifactError(f"{where}: 'seen_items' must be 'removed' or 'kept', got {block['seen_items']!r}.")
    for setting in SEEN_ITEMS:
        if f"seen_{setting}" in block:
            _check_block(block[f"seen_{setting}"], f"{where} seen_{setting}")


def metric_names(block: Mapping[str, Any]) -> list[str]:
    """The metrics of a result block, in its order: every key like `name@K`."""
    return [name for name in block if isinstance(name, str) and _METRIC_NAME.fullmatch(name)]


def plain_json(value: Any, where: str) -> Any:
    """`value` with numpy scalars and arrays, tuples and tables of any kind as JSON values; NaN and infinity as null.

    Raises:
        ArtifactError: an object JSON has no form for, named by its place.
    """
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry, f"{where} {key}") for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_json(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain_json(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no NaN. A side figure must not cost a trained model its save; a metric is refused by check_metrics.
        logger.warning("%s is %s: written as null", where, value)
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ArtifactError(
        f"{where}: a {type(value).__name__} cannot be written to JSON: give numbers, texts, lists, tables."
    )


def read_metrics(path: Path) -> dict[str, Any]:
    """Read and check a metrics file. Raises ArtifactError naming the file and the field."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON ({error}): save the artefact again.") from error
    return check_metrics(metrics, str(path))


def seeds_of(metrics: Mapping[str, Any]) -> list[int]:
    """Every seed that the numbers come from."""
    return list(metrics["seed"]) if isinstance(metrics["seed"], list) else [metrics["seed"]]
