"""A counter of fixed size: unique codes whose layout does not change when the items are coded anew.

Shape suffixes: N items, L levels, C codes of a level, P dimensions of the codebook space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import IncompatibleComponentsError
from .collision_groups import rank_in_group
from .collision_tails import quantization_errors, quantizer_space


def fixed_counter(
    codes_NL: np.ndarray,
    codebook_sizes: Sequence[int],
    size: int,
    *,
    codebooks: Sequence[Any],
    features: Any,
    priority: np.ndarray | None = None,
) -> np.ndarray:
    """Codes (N, L + 1) with a running number among the items of one code, below `size` whatever the codes are.

    Guarantee: no two items share a full code. Where more than `size` items have one code, those with the smallest
    `priority` go to the nearest last code that has room, the nearest of them first; all others keep their codes.

    Args:
        size: codebook of the running number, fixed by a model that exists already.
        codebooks, features: of the quantizer, as for `next_nearest`.
        priority: (N,) larger gets the smaller number.

    Raises:
        IncompatibleComponentsError: all codes of a prefix are full (names the item row).

    Relations: the policy `counter` while no group is larger than `size`.

    Example:
        >>> books, x = [np.array([[0.0], [1.0]])], np.array([[0.0], [0.1], [0.2]])
        >>> fixed_counter(np.array([[0], [0], [0]]), (2,), 2, codebooks=books, features=x).tolist()
        [[0, 0], [0, 1], [1, 0]]
    """
    sizes = tuple(int(codes) for codes in codebook_sizes)
    codes_NL = np.asarray(codes_NL)
    books, x_NP = quantizer_space(codes_NL, sizes, codebooks, features, "fixed_counter")
    number_N = rank_in_group(codes_NL, sizes, priority)
    result_NL = codes_NL.copy()
    moving = np.flatnonzero(number_N >= size)
    if len(moving):
        held = np.ones(len(codes_NL), bool)
        held[moving] = False
        used: dict[tuple[int, ...], int] = {}
        for row in codes_NL[held].tolist():
            used[tuple(row)] = used.get(tuple(row), 0) + 1
        error_N = quantization_errors(codes_NL, books, x_NP)
        for item in moving[np.argsort(error_N[moving], kind="stable")].tolist():
            prefix = tuple(codes_NL[item, :-1].tolist())
            residual_P = x_NP[item] - sum((books[level][code] for level, code in enumerate(prefix)), np.zeros(1))
            order = np.argsort(((residual_P - books[-1]) ** 2).sum(1), kind="stable").tolist()
            code = next((one for one in order if used.get((*prefix, one), 0) < size), None)
            if code is None:
                raise IncompatibleComponentsError(
                    f"item row {item}: all {sizes[-1]} last codes under its prefix {list(prefix)} hold {size} items; use "
                    "more codes, or a larger counter"
                )
            result_NL[item, -1] = code
            number_N[item] = used.get((*prefix, code), 0)
            used[(*prefix, code)] = int(number_N[item]) + 1
    return np.concatenate([result_NL, number_N[:, None]], axis=1)
