"""Attributes of items as features: multi-hot vectors, or one feature per slot for unordered feature sets.

Attributes as facets of an identifier: ActionPiece (arXiv 2502.13581) takes them as members of an item's feature set.

Shape legend: N items, A attribute values, S slots.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ItemTableError

DEFAULT_SEPARATOR = "|"


def attribute_values(values: Sequence[Any], separator: str = DEFAULT_SEPARATOR) -> list[list[str]]:
    """The values of one column, item by item: lists as they are, text cut at the separator, None and blanks as nothing.

    Args:
        separator: a string; a blank means any white space.

    Example:
        >>> attribute_values(["Comedy|War", None, ["a", "b"], 7])
        [['Comedy', 'War'], [], ['a', 'b'], ['7']]
    """
    found = []
    for value in values:
        if value is None:
            parts: list[Any] = []
        elif isinstance(value, str):
            parts = value.split() if separator.isspace() else re.split(re.escape(separator), value)
        else:
            parts = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
        words = [str(part).strip() for part in parts if part is not None and part == part]  # NaN is not itself
        found.append(list(dict.fromkeys(word for word in words if word)))
    return found


def frequent_values(values: Sequence[Sequence[str]], min_count: int) -> list[str]:
    """Values that at least `min_count` items have, most frequent first, then by name."""
    counts = Counter(value for row in values for value in row)
    return sorted((v for v, count in counts.items() if count >= min_count), key=lambda v: (-counts[v], v))


def multi_hot(
    columns: Mapping[str, Sequence[Sequence[str]]], min_count: int = 1
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """One column per (attribute, value): float32 (N, A) of 0 and 1, and the names of the A columns.

    Args:
        columns: attribute name -> per item its values (`attribute_values`).
        min_count: rarer values are left out.

    Raises:
        ItemTableError: no value is frequent enough.

    Example:
        >>> multi_hot({"genre": [["War"], ["War", "Crime"]]}, min_count=2)
        (array([[1.],
               [1.]], dtype=float32), [('genre', 'War')])
    """
    names = [(name, value) for name, rows in columns.items() for value in frequent_values(rows, min_count)]
    if not names:
        raise ItemTableError(
            f"no value of the attributes {sorted(columns)} occurs in {min_count} items or more: name other columns, or "
            "lower min_count"
        )
    place = {key: number for number, key in enumerate(names)}
    matrix_NA = np.zeros((len(next(iter(columns.values()))), len(names)), np.float32)
    for name, rows in columns.items():
        for item, row in enumerate(rows):
            for value in row:
                if (number := place.get((name, value))) is not None:
                    matrix_NA[item, number] = 1.0
    return matrix_NA, names


def attribute_slots(
    values: Sequence[Sequence[str]], slots: int = 1, min_count: int = 1
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The values of one attribute in a fixed number of slots: integers (N, S) and the sizes of the slots.

    Slot s holds an item's s-th most frequent value, numbered from 1 among the values that occur in that slot; 0 where the
    item has fewer. Frequent values first, so that the first slot tells most items' main value alike.

    Example:
        >>> attribute_slots([["War"], ["Crime", "War"], []], slots=2)[0].tolist()
        [[1, 0], [1, 1], [0, 0]]
    """
    rank = {value: number for number, value in enumerate(frequent_values(values, min_count))}
    codes_NS = np.zeros((len(values), slots), np.int64)
    sizes = []
    ordered = [sorted((value for value in row if value in rank), key=rank.__getitem__)[:slots] for row in values]
    for slot in range(slots):
        present = sorted({row[slot] for row in ordered if len(row) > slot}, key=rank.__getitem__)
        number = {value: code for code, value in enumerate(present, start=1)}
        codes_NS[:, slot] = [number[row[slot]] if len(row) > slot else 0 for row in ordered]
        sizes.append(len(present) + 1)
    return codes_NS, tuple(sizes)
