"""Collision policies that change or add the last digit: nearest free code, random code, an id of the item's own.

Shape suffixes: N items, L levels, C codes of a level, P dimensions of the codebook space.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import IncompatibleComponentsError
from .collision_groups import append_digit, as_array, colliding_groups, full_length, rank_in_group

logger = logging.getLogger(__name__)


def quantizer_space(
    codes_NL: np.ndarray, codebook_sizes: tuple[int, ...], codebooks: Sequence[Any], features: Any, policy: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Codebooks (C, P) in float64 and features (N, P), checked against the codes.

    Raises:
        IncompatibleComponentsError: codes of several lengths, codebooks or features of other codes.
    """
    full_length(codes_NL, policy)
    books = [as_array(book).astype(np.float64) for book in codebooks]
    x_NP = as_array(features)
    if tuple(map(len, books)) != codebook_sizes or len(x_NP) != len(codes_NL):
        raise IncompatibleComponentsError(
            f"{policy}: codes are {codes_NL.shape} with sizes {codebook_sizes}, codebooks have sizes "
            f"{tuple(map(len, books))} and features {x_NP.shape}; pass the codebooks and transformed features of the "
            "quantizer that made the codes"
        )
    return books, x_NP


def quantization_errors(
    codes_NL: np.ndarray, books: Sequence[np.ndarray], x_NP: np.ndarray, chunk_size: int = 4096
) -> np.ndarray:
    """Squared distance (N,) of every item to what its code stands for."""
    error_N = np.empty(len(codes_NL))
    for start in range(0, len(codes_NL), chunk_size):
        rows = slice(start, start + chunk_size)
        decoded = sum(book[codes_NL[rows, level]] for level, book in enumerate(books))
        error_N[rows] = ((x_NP[rows] - decoded) ** 2).sum(1)
    return error_N


def _stay_and_move(
    codes_NL: np.ndarray, codebook_sizes: tuple[int, ...], error_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether an item keeps its code (the nearest of its group does), and the others, nearest first."""
    rank_N = rank_in_group(codes_NL, codebook_sizes, -error_N)
    moving = np.flatnonzero(rank_N > 0)
    return rank_N == 0, moving[np.argsort(error_N[moving], kind="stable")]


def next_nearest(
    codes_NL: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    codebooks: Sequence[Any],
    features: Any,
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
        IncompatibleComponentsError: more items than full codes, codes of several lengths, or features and codebooks
            that do not fit the codes.

    Relations: `next_tail` where every prefix has room.
    """
    books, x_NP = quantizer_space(codes_NL, codebook_sizes, codebooks, features, "next_nearest")
    num_items, num_levels = codes_NL.shape
    room = [1] * (num_levels + 1)  # full codes below a node of each level
    for level in reversed(range(num_levels)):
        room[level] = room[level + 1] * codebook_sizes[level]
    if num_items > room[0]:
        raise IncompatibleComponentsError(f"{num_items} items do not fit into {room[0]} full codes: use more codes")
    stays_N, moving = _stay_and_move(codes_NL, codebook_sizes, quantization_errors(codes_NL, books, x_NP))

    # number of taken full codes below every prefix that has one; a prefix is free while that is less than its room
    taken: dict[tuple[int, ...], int] = {}
    for row in codes_NL[stays_N].tolist():
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


def _taken_tails(codes_NL: np.ndarray) -> dict[tuple[int, ...], set[int]]:
    taken: dict[tuple[int, ...], set[int]] = {}
    for row in codes_NL.tolist():
        taken.setdefault(tuple(row[:-1]), set()).add(row[-1])
    return taken


def next_tail(
    codes_NL: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    codebooks: Sequence[Any],
    features: Any,
    when_full: str = "error",
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Colliding items take the k-th nearest code of the last level that nobody uses (UTGRec, arXiv 2504.04405).

    Guarantee: only last codes change, only those of colliding items, and of the items of a code the one nearest to what
    it stands for keeps it. No two items share a full code, unless `when_full="keep"` left some under a prefix that more
    items have than the last level has codes.

    Args:
        codebooks, features: as for `next_nearest`.
        when_full: a prefix with more items than last codes: `"error"`, or `"keep"` (the rest share their code as before;
            a warning says how many).

    Raises:
        IncompatibleComponentsError: a full prefix (names the item row) and `when_full="error"`, codes of several
            lengths, or features and codebooks that do not fit the codes.

    Relations: `next_nearest` goes up a level where a prefix is full; without full prefixes both give the same codes.
    """
    if when_full not in ("error", "keep"):
        raise IncompatibleComponentsError(f"next_tail: when_full must be 'error' or 'keep', got {when_full!r}")
    books, x_NP = quantizer_space(codes_NL, codebook_sizes, codebooks, features, "next_tail")
    stays_N, moving = _stay_and_move(codes_NL, codebook_sizes, quantization_errors(codes_NL, books, x_NP))
    taken = _taken_tails(codes_NL[stays_N])
    result_NL, left = codes_NL.copy(), 0
    for item in moving.tolist():
        prefix = tuple(codes_NL[item, :-1].tolist())
        used = taken[prefix]
        if len(used) == codebook_sizes[-1]:
            if when_full == "error":
                raise IncompatibleComponentsError(
                    f"item row {item}: all {codebook_sizes[-1]} last codes under its prefix {list(prefix)} are taken; "
                    "use more codes, the policy 'next_nearest', or when_full='keep'"
                )
            left += 1
            continue
        residual_P = x_NP[item] - sum((books[level][code] for level, code in enumerate(prefix)), np.zeros(1))
        distance_C = ((residual_P - books[-1]) ** 2).sum(1)
        tail = next(code for code in np.argsort(distance_C, kind="stable").tolist() if code not in used)
        used.add(tail)
        result_NL[item, -1] = tail
    if left:
        logger.warning(f"next_tail: {left} of {len(codes_NL)} items still share a code (their prefixes are full)")
    return result_NL, codebook_sizes


def random_tail(
    codes_NL: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    seed: int = 0,
    size: int = 128,
    redraw: bool = False,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """A random digit: one more for every item (ActionPiece, arXiv 2502.13581), or the last code drawn again (GR2).

    Guarantee: no two items share a full code; the same seed gives the same codes. An added digit is uniform over `size`
    values, drawn without replacement among the items of one code. With `redraw` (the random last level of GR2, arXiv
    2602.07774) no digit is added: only last codes change, and of the items of a code the first in the catalogue keeps
    it while the others draw uniformly from the last codes that nobody uses under their prefix.

    Args:
        seed: of the draws.
        size: number of random buckets (128 in ActionPiece); not used with `redraw`.
        redraw: draw the last code of colliding items again instead of adding a digit.

    Raises:
        IncompatibleComponentsError: more items of one code than buckets, or of one prefix than last codes (names the
            item row).
    """
    rng = np.random.default_rng(seed)
    groups = colliding_groups(codes_NL, codebook_sizes)
    if not redraw:
        largest = max(map(len, groups), default=1)
        if size < largest:
            raise IncompatibleComponentsError(
                f"random_tail: {largest} items share one code and cannot get different digits of {size}; use a size of "
                f"at least {largest}"
            )
        digit_N = rng.integers(0, size, len(codes_NL))
        for items in groups:
            digit_N[items] = rng.permutation(size)[: len(items)]
        return append_digit(codes_NL, codebook_sizes, digit_N, size)
    full_length(codes_NL, "random_tail with redraw")
    result_NL = codes_NL.copy()
    moving = np.concatenate([items[1:] for items in groups]) if groups else np.zeros(0, np.int64)
    taken = _taken_tails(codes_NL)
    for item in rng.permutation(moving).tolist():
        prefix = tuple(codes_NL[item, :-1].tolist())
        free = np.setdiff1d(np.arange(codebook_sizes[-1]), list(taken[prefix]))
        if len(free) == 0:
            raise IncompatibleComponentsError(
                f"item row {item}: all {codebook_sizes[-1]} last codes under its prefix {list(prefix)} are taken; use "
                "more codes, or add a digit (redraw=False)"
            )
        result_NL[item, -1] = rng.choice(free)
        taken[prefix].add(int(result_NL[item, -1]))
    return result_NL, codebook_sizes


def extra_id(codes_NL: np.ndarray, codebook_sizes: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """One more code per item that is the item's own, with an embedding of its own (BBQRec, arXiv 2504.06636).

    Guarantee: no two items share a full code; the given digits are unchanged; the last digit is the item's row number,
    so its codebook has N codes: exact, and as large as a table of atomic ids. For models that score items; a generator
    wants the smaller codebook of `counter`.
    """
    return append_digit(codes_NL, codebook_sizes, np.arange(len(codes_NL)), len(codes_NL))
