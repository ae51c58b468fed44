"""Paths as item names: new tokens that carry their ancestors, `<CI1><CI1-4><A3>` (CID, arXiv 2305.06569).

A path comes from a tree over the items: spectral clusters of the co-occurrence graph (collaborative), columns of the item
table (semantic), or nothing at all (independent). A token of an inner node is prefixed by its ancestors, so no two parents
share a child token. What tells the items of one leaf apart is a counter `<A3>`, shared by all leaves, or one token of its
own for every item `<I17>` (hybrid; alone: independent). Every name is unique.

Shape suffixes: N items, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ItemTableError

LEAVES = ("counter", "atomic")


def column_paths(columns: Sequence[Sequence[Any]]) -> list[tuple[str, ...]]:
    """The category path of every item from columns of the item table, the widest category first.

    A value that is a list gives one step per entry; empty values give none, and a path ends where the table does.

    Args:
        columns: one or more columns of N values.

    Raises:
        ItemTableError: no column, or columns of different length.

    Example:
        >>> column_paths([["Toys", "Toys", None], [["Dolls", "Baby"], [], ["x"]]])
        [('Toys', 'Dolls', 'Baby'), ('Toys',), ('x',)]
    """
    if not columns or len({len(column) for column in columns}) != 1:
        raise ItemTableError("a category path needs columns of the item table, all of one length: name at least one")

    def steps(value: Any) -> list[str]:
        if value is None or value == "":
            return []
        if isinstance(value, (list, tuple)):
            return [step for entry in value for step in steps(entry)]
        return [str(value)]

    return [tuple(step for value in row for step in steps(value)) for row in zip(*columns)]


def path_codes(paths: Sequence[Sequence[str]], max_depth: int | None = None) -> np.ndarray:
    """Paths of words as codes: a step's number among the children of its node, in order of first appearance.

    The last code of every item numbers the items of its node, so no two items have the same codes.

    Args:
        max_depth: steps kept of each path.

    Returns:
        codes (N, L) from 0, -1 behind an item's last code.

    Example:
        >>> path_codes([("Toys", "Dolls"), ("Toys", "Cars"), ("Toys", "Dolls"), ("Books",)]).tolist()
        [[0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, -1]]
    """
    children: dict[tuple[int, ...], dict[str, int]] = {}
    counts: dict[tuple[int, ...], int] = {}
    rows = []
    for path in paths:
        node: tuple[int, ...] = ()
        for step in list(path)[:max_depth]:
            siblings = children.setdefault(node, {})
            node = (*node, siblings.setdefault(step, len(siblings)))
        counts[node] = counts.get(node, -1) + 1
        rows.append([*node, counts[node]])
    codes_NL = np.full((len(rows), max(map(len, rows), default=1)), -1, np.int64)
    for item, row in enumerate(rows):
        codes_NL[item, : len(row)] = row
    return codes_NL


def path_tokens(codes_NL: np.ndarray, prefix: str = "CI", leaf: str = "counter") -> list[list[str]]:
    """The tokens that name every item.

    Args:
        codes_NL: (N, L) codes from 0, each a number among the children of its node; an item's last code numbers it in
            its leaf, -1 behind it (`path_codes`, or a tree's codes in the style "local").
        prefix: of the tokens of inner nodes.
        leaf: "counter" = one token per number in the leaf, shared by all leaves; "atomic" = one token per item.

    Example:
        >>> path_tokens(np.array([[0, 3, 2], [1, 0, -1]]))
        [['<CI1>', '<CI1-4>', '<A3>'], ['<CI2>', '<A1>']]
        >>> path_tokens(np.array([[0, 3, 2], [1, 0, -1]]), leaf="atomic")[1]
        ['<CI2>', '<I2>']
    """
    if leaf not in LEAVES:
        raise ItemTableError(f"leaf is {leaf!r}: choose one of {', '.join(LEAVES)}")
    names = []
    for item, row in enumerate(np.asarray(codes_NL).tolist()):
        *inner, number = [code + 1 for code in row if code >= 0]
        steps = [f"<{prefix}{'-'.join(map(str, inner[: depth + 1]))}>" for depth in range(len(inner))]
        names.append([*steps, f"<A{number}>" if leaf == "counter" else f"<I{item + 1}>"])
    return names


def atomic_tokens(num_items: int) -> list[list[str]]:
    """One new token per item (CID's independent indexing).

    Example:
        >>> atomic_tokens(2)
        [['<I1>'], ['<I2>']]
    """
    return [[f"<I{item + 1}>"] for item in range(num_items)]
