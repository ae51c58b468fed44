"""Tables of item codes: the check they all pass, groups of items that share a full code, one more digit behind the end.

Shape suffixes: N items, L levels, G groups (distinct full codes).

A code of fewer than L levels is filled up with -1 behind its end. Two items collide when their rows are equal, ends
included: (3, 1) and (3, 1, 0) are two codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import IncompatibleComponentsError


def as_array(values: Any) -> np.ndarray:
    """Numpy view of an array-like or a tensor on any device."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def check_codes(codes_NL: Any, codebook_sizes: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes as an (N, L) int64 array and sizes as a tuple, or an error that names the first bad row.

    Raises:
        IncompatibleComponentsError: not a non-empty matrix of integers, wrong number of sizes, a code out of range, an
            item without any code, a code behind the end of its row (-1 may only fill up the end).
    """
    codes_NL = as_array(codes_NL)
    sizes = tuple(int(size) for size in codebook_sizes)
    if codes_NL.ndim != 2 or codes_NL.size == 0 or not np.issubdtype(codes_NL.dtype, np.integer):
        raise IncompatibleComponentsError(
            f"codes must be a non-empty (items, levels) matrix of integers, got {codes_NL.dtype} {codes_NL.shape}"
        )
    if codes_NL.shape[1] != len(sizes):
        raise IncompatibleComponentsError(f"codes have {codes_NL.shape[1]} levels, codebook_sizes has {len(sizes)}")
    bad_NL = (codes_NL < -1) | (codes_NL >= np.array(sizes))
    bad_NL[:, 0] |= codes_NL[:, 0] < 0
    if bad_NL.any():
        row, level = np.argwhere(bad_NL)[0]
        raise IncompatibleComponentsError(
            f"item row {row}, level {level}: code {codes_NL[row, level]} is outside 0..{sizes[level] - 1}"
        )
    resumed_NL = (codes_NL[:, :-1] < 0) & (codes_NL[:, 1:] >= 0)
    if resumed_NL.any():
        row, level = np.argwhere(resumed_NL)[0]
        raise IncompatibleComponentsError(
            f"item row {row}, level {level}: -1 stands before a code; -1 may only fill up the end of a row"
        )
    return codes_NL.astype(np.int64), sizes


def full_length(codes_NL: np.ndarray, who: str) -> None:
    """Refuse codes of several lengths where every item must have all L levels.

    Raises:
        IncompatibleComponentsError: a code that ends early (names the row).
    """
    short_N = codes_NL[:, -1] < 0
    if short_N.any():
        raise IncompatibleComponentsError(
            f"{who}: the code of item row {int(short_N.argmax())} ends before the last level; use codes of one length, "
            "or the policy 'counter', 'random_tail', 'extra_id' or 'keep'"
        )


def _sort_codes(codes_NL: np.ndarray, codebook_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Items in lexicographic order of their codes (equal codes by item index), and where a new code begins there."""
    num_items = len(codes_NL)
    ended = int(codes_NL.min() < 0)  # then "behind the end" is one more digit
    space = math.prod(int(size) + ended for size in codebook_sizes)
    if space * num_items < 2**63:
        # code and item index in one integer: sorting plain values is several times faster than a stable argsort
        key_N = np.zeros(num_items, dtype=np.int64)
        for level, size in enumerate(codebook_sizes):
            key_N = key_N * (int(size) + ended) + codes_NL[:, level] + ended
        key_N = np.sort(key_N * num_items + np.arange(num_items))
        code_N, order_N = np.divmod(key_N, num_items)
        return order_N, np.diff(code_N, prepend=-1) != 0
    order_N = np.lexsort(codes_NL.T[::-1])
    sorted_NL = codes_NL[order_N]
    first_N = np.ones(num_items, dtype=bool)
    first_N[1:] = (sorted_NL[1:] != sorted_NL[:-1]).any(1)
    return order_N, first_N


def code_groups(codes_NL: np.ndarray, codebook_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`(group_N int64, size_G int64)`: the group of every item; groups are the distinct codes, lexicographic order."""
    order_N, first_N = _sort_codes(codes_NL, codebook_sizes)
    group_N = np.empty(len(codes_NL), dtype=np.int64)
    group_N[order_N] = np.cumsum(first_N) - 1
    return group_N, np.bincount(group_N).astype(np.int64)


def rank_in_group(codes_NL: np.ndarray, sizes: Sequence[int], priority_N: np.ndarray | None = None) -> np.ndarray:
    """0, 1, 2, ... among the items of every full code: by falling priority, then by item index."""
    by_priority_N = np.argsort(-priority_N, kind="stable") if priority_N is not None else None
    order_N, first_N = _sort_codes(codes_NL if by_priority_N is None else codes_NL[by_priority_N], sizes)
    start_N = np.maximum.accumulate(np.where(first_N, np.arange(len(codes_NL)), 0))
    rank_N = np.empty(len(codes_NL), dtype=np.int64)
    rank_N[order_N if by_priority_N is None else by_priority_N[order_N]] = np.arange(len(codes_NL)) - start_N
    return rank_N


def colliding_groups(codes_NL: np.ndarray, codebook_sizes: Sequence[int]) -> list[np.ndarray]:
    """Items (ascending) of every full code that two or more have, in lexicographic order of the codes."""
    order_N, first_N = _sort_codes(codes_NL, codebook_sizes)
    bounds = np.append(np.flatnonzero(first_N), len(order_N))
    large = np.flatnonzero(np.diff(bounds) > 1)
    return [order_N[bounds[group] : bounds[group + 1]] for group in large.tolist()]


def append_digit(
    codes_NL: np.ndarray, codebook_sizes: tuple[int, ...], digit_N: np.ndarray, size: int | None = None
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Write a digit directly behind the end of every code; items with digit -1 get none.

    Behind a code of all L levels it is a code of the new level L. Behind a shorter code it is a *new* code of the level
    it stands on (numbered after the given ones), so that it can never be mistaken for one of those.

    Args:
        size: number of possible digits; default: as many as are used on each level.
    """
    num_items, num_levels = codes_NL.shape
    end_N = (codes_NL >= 0).sum(1)
    result = np.full((num_items, num_levels + 1), -1, dtype=np.int64)
    result[:, :-1] = codes_NL
    sizes = [*codebook_sizes, 0]
    for level in np.unique(end_N[digit_N >= 0]).tolist():
        rows = np.flatnonzero((end_N == level) & (digit_N >= 0))
        result[rows, level] = sizes[level] + digit_N[rows]
        sizes[level] += int(digit_N[rows].max()) + 1 if size is None else size
    width = num_levels + (sizes[-1] > 0)
    return result[:, :width], tuple(sizes[:width])
