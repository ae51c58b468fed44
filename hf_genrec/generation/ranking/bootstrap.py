"""Permutation bootstrapping: the candidates are asked about several times, each time in another order (arXiv 2305.08845).

A chat model favours some places of a list. Every (user, round) draws its own permutation, so that over the rounds no item
keeps a place. (The released code uses one permutation for all users and all rounds, which leaves the bias as it is.)

Shape legend: C candidates, B rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np


def request_keys(histories: Sequence[np.ndarray], candidates: Sequence[np.ndarray]) -> list[int]:
    """A number for each request: of what it asks, and of how many like it came before.

    So a user's permutations do not depend on who else is asked about, and two users with equal requests differ.

    Example:
        >>> items = np.arange(3)
        >>> one, other, again = request_keys([items, items[:1], items], [items] * 3)
        >>> one != again != other, request_keys([items], [items]) == [one]
        (True, True)
    """
    seen: Counter[bytes] = Counter()
    keys = []
    for history, items in zip(histories, candidates):
        content = np.concatenate([history, [-1], items]).astype("<i8").tobytes()
        keys.append(
            int.from_bytes(blake2b(content + seen[content].to_bytes(8, "little"), digest_size=8).digest(), "big")
        )
        seen[content] += 1
    return keys


def draw_permutation(num_candidates: int, *, seed: int, key: int, round_number: int, attempt: int = 0) -> np.ndarray:
    """(C,) the candidate shown at each place, a pure function of its arguments.

    Args:
        key: of the user's request, see `request_keys`.
        attempt: of asking again after an answer that could not be read.

    Example:
        >>> draw_permutation(5, seed=0, key=1, round_number=0).tolist() == list(range(5))
        False
    """
    return np.random.default_rng([seed, key, round_number, attempt]).permutation(num_candidates)


def round_scores(order: Sequence[int] | np.ndarray, num_candidates: int, *, missing: float = 0.0) -> np.ndarray:
    """(C,) scores of one answer: C for the first candidate named, C - 1 for the next ...; `missing` for those not named.

    Example:
        >>> round_scores([2, 0], 3).tolist()
        [2.0, 0.0, 3.0]
    """
    scores_C = np.full(num_candidates, missing, dtype=np.float64)
    scores_C[list(order)] = num_candidates - np.arange(len(order), dtype=np.float64)
    return scores_C


def summed_scores(
    orders: Iterable[Sequence[int] | np.ndarray], num_candidates: int, *, missing: float = 0.0
) -> np.ndarray:
    """(C,) sum of `round_scores` over the rounds (without missing candidates the same order as by mean position)."""
    return np.sum([round_scores(order, num_candidates, missing=missing) for order in orders], axis=0)
