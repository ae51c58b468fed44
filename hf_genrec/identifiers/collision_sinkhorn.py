"""Collision policy of LETTER and LC-Rec: the last codes of colliding items, assigned anew by balanced transport.

Shape suffixes: N items, L levels, C codes of a level, P dimensions of the codebook space.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import IncompatibleComponentsError
from .collision_groups import colliding_groups
from .collision_tails import next_nearest, quantizer_space
from .quantizers.assignment import sinkhorn_codes

logger = logging.getLogger(__name__)

FALLBACKS = ("keep", "next_nearest")


def _sharing(groups: Sequence[np.ndarray]) -> int:
    return sum(map(len, groups))


def sinkhorn(
    codes_NL: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    codebooks: Sequence[Any],
    features: Any,
    rounds: int = 20,
    epsilon: float = 0.003,
    iterations: int = 50,
    fallback: str = "keep",
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Uniform semantic mapping: Sinkhorn over the last level for colliding items (LC-Rec, arXiv 2311.09049; LETTER).

    In each round the items of every shared code are spread over all codes of the last level by entropic transport with
    equal shares, from the residuals that the levels above leave. Items that land on a code of another item take part in
    the next round. The best round (fewest items that share) is kept.

    Guarantee: only last codes change, only those of items that shared a code in some round, and never more items share
    one than before. Uniqueness is *not* guaranteed: equal residuals stay together in every plan. What is left is said in
    a warning and either kept or, with `fallback="next_nearest"`, moved (then no two items share a full code).

    Args:
        codebooks, features: as for `next_nearest`.
        rounds: at most so many (20 in both papers' code); ends earlier without collisions or changes.
        epsilon, iterations: of Sinkhorn, on distances scaled to a width of 2 (.003 and 50 there).
        fallback: for the items left: `"keep"` or `"next_nearest"`.

    Raises:
        IncompatibleComponentsError: an unknown fallback, codes of several lengths, or features and codebooks that do not
            fit the codes; with the fallback also what `next_nearest` raises.

    Relations: `rounds=0` is `keep`, or `next_nearest` with that fallback.
    """
    if fallback not in FALLBACKS:
        raise IncompatibleComponentsError(f"sinkhorn: fallback must be one of {FALLBACKS}, got {fallback!r}")
    books, x_NP = quantizer_space(codes_NL, codebook_sizes, codebooks, features, "sinkhorn")
    last_CP = torch.as_tensor(books[-1])
    current_NL, best_NL = codes_NL.copy(), codes_NL
    groups = colliding_groups(codes_NL, codebook_sizes)
    before = best = _sharing(groups)
    answers: dict[bytes, np.ndarray] = {}  # a group's plan depends on its items alone
    for _ in range(rounds):
        changed = False
        for items in groups:
            key = items.tobytes()
            if key not in answers:
                residual_BP = x_NP[items].astype(np.float64)
                for level, book_CP in enumerate(books[:-1]):
                    residual_BP = residual_BP - book_CP[codes_NL[items, level]]
                answers[key] = sinkhorn_codes(torch.as_tensor(residual_BP), last_CP, epsilon, iterations).numpy()
            changed |= bool((current_NL[items, -1] != answers[key]).any())
            current_NL[items, -1] = answers[key]
        groups = colliding_groups(current_NL, codebook_sizes)
        if _sharing(groups) < best:
            best_NL, best = current_NL.copy(), _sharing(groups)
        if not groups or not changed:
            break
    if best:
        then = "they keep it; fallback='next_nearest' would move them" if fallback == "keep" else "they are moved"
        logger.warning(f"sinkhorn: {best} of {len(codes_NL)} items still share a code (before: {before}): {then}")
    if fallback == "next_nearest":
        return next_nearest(best_NL, codebook_sizes, codebooks=codebooks, features=features)
    return best_NL, codebook_sizes
