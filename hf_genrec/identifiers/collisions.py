"""What happens to items that share a full code: `COLLISION_POLICIES` names the ways, `resolve_collisions` applies one.

Shape suffixes: N items, L levels, C codes of a level, P dimensions of the codebook space.

Two items *collide* when all their codes are equal. A generative model cannot tell them apart: a shared code is either
made unique here or expanded (and ranked) at recommendation time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import IncompatibleComponentsError


def _sort_codes(codes_NL: np.ndarray, codebook_sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Items in lexicographic order of their codes (equal codes by item index), and where a new code begins there."""
    num_items = len(codes_NL)
    space = math.prod(int(size) for size in codebook_sizes)
    if space * num_items < 2**63:
        # code and item index in one integer: sorting plain values is several times faster than a stable argsort
        key_N = np.zeros(num_items, dtype=np.int64)
        for level, size in enumerate(codebook_sizes):
            key_N = key_N * int(size) + codes_NL[:, level]
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


def _rank_in_group(codes_NL: np.ndarray, sizes: Sequence[int], priority_N: np.ndarray | None = None) -> np.ndarray:
    """0, 1, 2, ... among the items of every full code: by falling priority, then by item index."""
    by_priority_N = np.argsort(-priority_N, kind="stable") if priority_N is not None else None
    order_N, first_N = _sort_codes(codes_NL if by_priority_N is None else codes_NL[by_priority_N], sizes)
    start_N = np.maximum.accumulate(np.where(first_N, np.arange(len(codes_NL)), 0))
    rank_N = np.empty(len(codes_NL), dtype=np.int64)
    rank_N[order_N if by_priority_N is None else by_priority_N[order_N]] = np.arange(len(codes_NL)) - start_N
    return rank_N


def as_array(values: Any) -> np.ndarray:
    """Numpy view of an array-like or a tensor on any device."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def counter(
    codes_NL: np.ndarray, codebook_sizes: tuple[int, ...], *, priority: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Extra level with a running number among the items of one code (TIGER, arXiv 2305.05065).

    Guarantee: no two items share a full code; the given levels are unchanged; always one level more, whose codebook is
    as large as the largest group (1 when nothing collides). Number 0 goes to the item with the largest `priority` (its
    popularity, say), by default to the one that comes first in the catalogue.
    """
    rank_N = _rank_in_group(codes_NL, codebook_sizes, priority)
    return np.concatenate([codes_NL, rank_N[:, None]], axis=1), (*codebook_sizes, int(rank_N.max()) + 1)


def keep(codes_NL: np.ndarray, codebook_sizes: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes stay as they are.

    Guarantee: nothing changes; items may share a full code, and recommending must expand a code into its items.
    """
    return codes_NL, codebook_sizes


def next_nearest(
    codes_NL: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    codebooks: Sequence[Any],
    features: Any,
    chunk_size: int = 4096,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Move colliding items to the nearest free full code (as UTGRec does with the last code, arXiv 2504.04405).

    Guarantee: no two items share a full code; no extra level; of the items of a code, the one nearest to what the code
    stands for keeps it; items without a collision are untouched. A moved item keeps the longest prefix of its codes
    under which a code is free and is quantized again below it, each level taking the nearest code with room: with L - 1
    codes kept (nearly always) that is the free last code at the smallest residual distance. Items move nearest first,
    ties by catalogue order.

    Args:
        codebooks: L arrays (C_l, P), e.g. `quantizer.codebooks`.
        features: (N, P) in the space of the codebooks, e.g. `quantizer.transform(x)`.

    Raises:
        IncompatibleComponentsError: more items than full codes, or features and codebooks that do not fit the codes.
    """
    books = [as_array(book).astype(np.float64) for book in codebooks]
    x_NP = as_array(features)
    num_items, num_levels = codes_NL.shape
    if len(books) != num_levels or tuple(map(len, books)) != codebook_sizes or len(x_NP) != num_items:
        raise IncompatibleComponentsError(
            f"next_nearest: codes are {codes_NL.shape} with sizes {codebook_sizes}, codebooks have sizes "
            f"{tuple(map(len, books))} and features {x_NP.shape}; pass the codebooks and transformed features of the "
            "quantizer that made the codes"
        )
    room = [1] * (num_levels + 1)  # full codes below a node of each level
    for level in reversed(range(num_levels)):
        room[level] = room[level + 1] * codebook_sizes[level]
    if num_items > room[0]:
        raise IncompatibleComponentsError(f"{num_items} items do not fit into {room[0]} full codes: use more codes")

    error_N = np.empty(num_items)
    for start in range(0, num_items, chunk_size):
        rows = slice(start, start + chunk_size)
        decoded = sum(book[codes_NL[rows, level]] for level, book in enumerate(books))
        error_N[rows] = ((x_NP[rows] - decoded) ** 2).sum(1)
    rank_N = _rank_in_group(codes_NL, codebook_sizes, -error_N)
    moving = np.flatnonzero(rank_N > 0)
    moving = moving[np.argsort(error_N[moving], kind="stable")]

    # number of taken full codes below every prefix that has one; a prefix is free while that is less than its room
    taken: dict[tuple[int, ...], int] = {}
    for row in codes_NL[rank_N == 0].tolist():
        for level in range(num_levels + 1):
            prefix = tuple(row[:level])
            taken[prefix] = taken.get(prefix, 0) + 1
    result_NL = codes_NL.copy()
    for item in moving.tolist():
        prefix = tuple(codes_NL[item, :-1].tolist())
        while taken.get(prefix, 0) >= room[len(prefix)]:
            prefix = prefix[:-1]
        residual_P = x_NP[item] - sum((books[level][code] for level, code in enumerate(prefix)), np.zeros(1))
        for level in range(len(prefix), num_levels):
            distance_C = ((residual_P - books[level]) ** 2).sum(1)
            for code in np.argsort(distance_C, kind="stable").tolist():
                if taken.get((*prefix, code), 0) < room[level + 1]:
                    break
            prefix, residual_P = (*prefix, code), residual_P - books[level][code]
        for level in range(num_levels + 1):
            taken[prefix[:level]] = taken.get(prefix[:level], 0) + 1
        result_NL[item] = prefix
    return result_NL, codebook_sizes


COLLISION_POLICIES: dict[str, Callable[..., tuple[np.ndarray, tuple[int, ...]]]] = {
    "counter": counter,
    "next_nearest": next_nearest,
    "keep": keep,
}


def resolve_collisions(
    codes_NL: Any,
    codebook_sizes: Sequence[int],
    policy: str = "counter",
    *,
    codebooks: Sequence[Any] | None = None,
    features: Any = None,
    priority: Any = None,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Apply a collision policy: `(codes (N, L') int64, codebook sizes)`. The guarantees stand with each policy.

    Args:
        codes_NL: integer codes, array or tensor.
        codebook_sizes: L sizes; every code of level l is below `codebook_sizes[l]`.
        policy: a key of `COLLISION_POLICIES`.
        codebooks, features: for `"next_nearest"`: `quantizer.codebooks` and `quantizer.transform(x)`.
        priority: (N,) for `"counter"`: larger gets the smaller number.

    Raises:
        IncompatibleComponentsError: unknown policy, codes outside their codebooks (names the row), missing inputs.

    Example:
        >>> codes, sizes = resolve_collisions([[0, 1], [0, 1], [1, 0]], (2, 2), "counter")
        >>> codes.tolist(), sizes
        ([[0, 1, 0], [0, 1, 1], [1, 0, 0]], (2, 2, 2))
    """
    if policy not in COLLISION_POLICIES:
        raise IncompatibleComponentsError(
            f"unknown collision policy {policy!r}: use one of {sorted(COLLISION_POLICIES)}"
        )
    codes_NL, sizes = check_codes(codes_NL, codebook_sizes)
    options: dict[str, Any] = {}
    if policy == "counter" and priority is not None:
        options["priority"] = as_array(priority)
        if options["priority"].shape != (len(codes_NL),):
            raise IncompatibleComponentsError(
                f"priority must hold one number per item, got {options['priority'].shape}"
            )
    if policy == "next_nearest":
        if codebooks is None or features is None:
            raise IncompatibleComponentsError(
                "policy 'next_nearest' needs codebooks=quantizer.codebooks and features=quantizer.transform(x)"
            )
        options = {"codebooks": codebooks, "features": features}
    return COLLISION_POLICIES[policy](codes_NL, sizes, **options)


def check_codes(codes_NL: Any, codebook_sizes: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes as an (N, L) int64 array and sizes as a tuple, or an error that names the first bad row.

    Raises:
        IncompatibleComponentsError: not a non-empty matrix of integers, wrong number of sizes, a code out of range.
    """
    codes_NL = as_array(codes_NL)
    sizes = tuple(int(size) for size in codebook_sizes)
    if codes_NL.ndim != 2 or codes_NL.size == 0 or not np.issubdtype(codes_NL.dtype, np.integer):
        raise IncompatibleComponentsError(
            f"codes must be a non-empty (items, levels) matrix of integers, got {codes_NL.dtype} {codes_NL.shape}"
        )
    if codes_NL.shape[1] != len(sizes):
        raise IncompatibleComponentsError(f"codes have {codes_NL.shape[1]} levels, codebook_sizes has {len(sizes)}")
    bad_NL = (codes_NL < 0) | (codes_NL >= np.array(sizes))
    if bad_NL.any():
        row, level = np.argwhere(bad_NL)[0]
        raise IncompatibleComponentsError(
            f"item row {row}, level {level}: code {codes_NL[row, level]} is outside 0..{sizes[level] - 1}"
        )
    return codes_NL.astype(np.int64), sizes
