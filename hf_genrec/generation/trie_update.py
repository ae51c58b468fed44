"""Adding items to a trie and removing them, by merging a few sorted rows into its tables instead of sorting all rows.

Nodes of a level are numbered in lexicographic order, so new nodes are insertions and dead nodes are deletions in each
table, and every offset moves by the number of children inserted or deleted before it. What remains is copying.

Shape legend: N items, M items added or removed, L levels, n_l nodes of level l, J nodes inserted in or deleted from the
level below.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .trie_build import SortedRows, TrieTables
from .trie_storage import index_dtype


def _steps(boundaries_J: np.ndarray, length: int, dtype: np.dtype) -> np.ndarray:
    """(length,) how many of the ascending boundaries are <= each position 0..length - 1."""
    edges = np.concatenate([[0], boundaries_J, [length]])
    return np.repeat(np.arange(len(boundaries_J) + 1, dtype=dtype), np.diff(edges))


def _lower_bound(codes: np.ndarray, low: np.ndarray, high: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bisect_left of each wanted code in its own sorted range of `codes`."""
    for _ in range(int((high - low).max()).bit_length()):
        middle = (low + high) >> 1
        right = (low < high) & (codes[np.minimum(middle, len(codes) - 1)] < wanted)
        low, high = np.where(right, middle + 1, low), np.where(right, high, np.maximum(low, middle))
    return low


def _insert(values: np.ndarray, positions_J: np.ndarray, new_J: np.ndarray) -> np.ndarray:
    """np.insert at ascending positions of `values`, in the type that holds both."""
    merged = np.empty(len(values) + len(new_J), dtype=np.promote_types(values.dtype, new_J.dtype))
    places = positions_J + np.arange(len(new_J))
    is_old = np.ones(len(merged), dtype=bool)
    is_old[places] = False
    merged[is_old] = values
    merged[places] = new_J
    return merged


def merged_tables(
    tables: TrieTables, codes_ML: np.ndarray, sizes: Sequence[int], has_ends: bool
) -> tuple[TrieTables, list[bool]]:
    """The tables with items N..N+M-1 added, and for each of the L + 1 levels whether its tables changed."""
    num_items, dtype = len(tables.items), index_dtype(len(tables.items) + len(codes_ML))
    rows = SortedRows(codes_ML, sizes, has_ends)
    offsets, codes, changed = list(tables.offsets), list(tables.codes), []

    # The distinct prefixes of the new rows at the level at hand: their first sorted row, their node if the trie has one,
    # else (known False) the old node they come just before.
    opens_node = np.zeros(len(codes_ML), dtype=bool)
    opens_node[0] = True
    first_rows, node, known = np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, bool)

    def splice(level: int, parent: np.ndarray, inserted: np.ndarray, place: np.ndarray) -> None:
        """Update offsets[level]: child j of prefix parent[j] was inserted before old child place[j] where inserted[j].
        `node` and `known` are still those of `level`.
        """
        new = np.flatnonzero(inserted)
        changed.append(len(new) > 0)
        if not len(new):
            return
        old = offsets[level]
        above = parent[new]
        # old nodes from this one on start later: the one after a known parent, the one a new parent comes before
        moved = old + _steps(node[above] + known[above], len(old), dtype)
        first_child = np.searchsorted(parent[new], np.flatnonzero(~known))  # of new parents, all of them inserted
        offsets[level] = _insert(moved, node[~known], (place[new][first_child] + first_child).astype(dtype))

    for level, column in enumerate(rows.columns()):
        opens_node[1:] |= column[1:] != column[:-1]
        prefix_of_row = np.cumsum(_marks(first_rows, len(column))) - 1
        first_rows = np.flatnonzero(opens_node)
        parent, wanted = prefix_of_row[first_rows], column[first_rows]
        old = tables.offsets[level]
        low = old[node[parent]].astype(np.int64)
        high = np.where(known[parent], old[np.minimum(node[parent] + 1, len(old) - 1)], low).astype(np.int64)
        place = _lower_bound(tables.codes[level], low, high, wanted)
        found = (place < high) & (tables.codes[level][np.minimum(place, len(tables.codes[level]) - 1)] == wanted)
        splice(level, parent, ~found, place)
        if changed[-1]:
            codes[level] = _insert(codes[level], place[~found], wanted[~found])
        node, known = place, found

    prefix_of_row = np.cumsum(_marks(first_rows, len(codes_ML))) - 1
    ends = tables.offsets[-1]
    place = ends[node + known][prefix_of_row].astype(np.int64)  # after the items of a known leaf
    splice(len(sizes), prefix_of_row, np.ones(len(codes_ML), bool), place)
    items = _insert(tables.items, place, (num_items + rows.order).astype(dtype))
    return TrieTables(offsets, codes, items), changed


def _marks(positions: np.ndarray, length: int) -> np.ndarray:
    marks = np.zeros(length, dtype=bool)
    marks[positions] = True
    return marks


def pruned_tables(tables: TrieTables, slots_M: np.ndarray) -> tuple[TrieTables, list[bool]]:
    """The tables without the items in the given (distinct, ascending, not all) slots, remaining items renumbered as by
    np.delete; and for each of the L + 1 levels whether its tables changed.
    """
    offsets, codes = list(tables.offsets), list(tables.codes)
    changed = [False] * len(offsets)
    kept = np.ones(len(tables.items), dtype=bool)
    kept[tables.items[slots_M]] = False
    new_number = np.cumsum(kept, dtype=tables.items.dtype) - 1
    items = new_number[np.delete(tables.items, slots_M)]
    dead = slots_M
    for level in range(len(codes), -1, -1):
        old = tables.offsets[level]
        changed[level] = True
        parents = np.searchsorted(old, dead, side="right") - 1
        moved = old - _steps(parents + 1, len(old), old.dtype)
        if level < len(codes):
            codes[level] = np.delete(codes[level], dead)
        candidates = np.unique(parents)
        dead = candidates[moved[candidates] == moved[candidates + 1]]
        offsets[level] = np.delete(moved, dead) if len(dead) else moved
        if not len(dead):
            break
    return TrieTables(offsets, codes, items), changed
