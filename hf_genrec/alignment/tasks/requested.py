"""Families that a recipe or a script asks for by name: their weights, their columns, and which of them the data can feed.

A family that the data cannot feed is left out of a mixture with a log line; if none is left, that is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_genrec.data.columns import nearest_names
from hf_genrec.errors import TrainingError

from .families import TaskData, needs, usable
from .templates import FAMILIES, wordings
from .templates_language import LANGUAGE_FAMILIES, language_wordings

logger = logging.getLogger(__name__)


def check_family(name: str, known: Sequence[str] = FAMILIES + LANGUAGE_FAMILIES) -> None:
    """The name is one of the known families, or "family:kind" of one for language models.

    Raises:
        TrainingError: an unknown family (the nearest is named) or an unknown kind.
    """
    family, _, kind = name.partition(":")
    if (name in known and name in FAMILIES) or (family in known and language_wordings(family, kind or None)):
        return
    if family in known and family in LANGUAGE_FAMILIES:
        kinds = dict.fromkeys(wording.kind for wording in language_wordings(family))
        raise TrainingError(f"unknown task family {name!r}: its kinds are {', '.join(kinds)}.")
    near = nearest_names(name, known, [family])
    hint = f"; did you mean {near[0]!r}?" if near else "."
    other = " It is one for language models: training method sft." if family in LANGUAGE_FAMILIES else ""
    raise TrainingError(f"unknown task family {name!r}: choose of {', '.join(known)}{hint}{other}")


def family_weights(families: Mapping[str, Any], data: TaskData) -> tuple[dict[str, float], dict[str, TaskData]]:
    """Weights of families, and the data of each with the columns that it names.

    Args:
        families: family -> weight, or -> {"weight": w, field: column, ...} for texts that stand in columns of other names
            (see `TaskData.fed_by`), such as {"item_search": {"weight": 0.5, "intention": "review"}}.

    Raises:
        TrainingError: no weight, or columns that are not there (family named).
    """
    weights, fed = {}, {}
    for name, given in families.items():
        named = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = named.pop("weight", None)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TrainingError(
                f"task family {name!r}: {given!r} has no positive weight: write 1.0, or {{weight: 1.0}}."
            )
        weights[name] = float(weight)
        try:  # what no field reads would travel to every worker of a data loader
            fed[name] = replace(data.fed_by(named) if named else data, log={}, items=None)
        except TrainingError as error:
            raise TrainingError(f"task family {name!r}: {error}") from error
    return weights, fed


def usable_families(names: Sequence[str], data: TaskData | Mapping[str, TaskData]) -> list[str]:
    """Of the families asked for, those that the data can feed; the others are named in the log.

    Args:
        data: training rows, or those of each family.

    Raises:
        TrainingError: an unknown family, or none is left (what it lacks is named).
    """
    for name in names:
        check_family(name, FAMILIES)
    fed = data if isinstance(data, Mapping) else dict.fromkeys(names, data)
    missing = {name: lacking(name, fed[name]) for name in names if not usable(name, fed[name])}
    return with_reasons(names, missing)


def lacking(family: str, data: TaskData) -> list[str]:
    """Fields that the family's wordings need and the data does not have."""
    return sorted(set().union(*map(needs, wordings(family))) - data.fields())


def with_reasons(names: Sequence[str], missing: Mapping[str, Sequence[str]]) -> list[str]:
    """The names that miss nothing; the log says what the others miss.

    Raises:
        TrainingError: none is left.
    """
    reasons = {name: " and no ".join(fields) for name, fields in missing.items()}
    for name, reason in reasons.items():
        logger.warning("task family %r is left out: this data has no %s", name, reason)
    if len(reasons) == len(names):
        said = "; ".join(f"{name} has no {reason}" for name, reason in reasons.items())
        raise TrainingError(
            f"none of the task families {', '.join(names)} can be fed by this data ({said}): add its columns to the item "
            "table, or to the log and to data.extra_columns."
        )
    return [name for name in names if name not in reasons]
