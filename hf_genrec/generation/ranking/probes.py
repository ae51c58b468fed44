"""Two probes of a ranker: does the place of an item in the list decide its rank, and does its popularity (2305.08845)?

Shape legend: M users, C candidates, N items, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import RequestError


def mean_ranks_by_slot(
    ranker: Any, histories: Sequence[Any], candidates_MC: Any, targets_M: Sequence[int], slots: Sequence[int]
) -> dict[int, float]:
    """Mean rank of the target (from 1) when it stands at each of some places of the candidate list.

    Without position bias all values are alike; the spread between them is the bias. Authors: slots 0, 5, 10, 15, 19 of 20.

    Args:
        ranker: has `rank(histories, candidates) -> scores`.
        candidates_MC: lists that hold the target somewhere; the others keep their order.

    Raises:
        RequestError: a list without its target (row named), or a slot outside the lists.
    """
    lists = np.asarray(candidates_MC, dtype=np.int64)
    targets = np.asarray(targets_M, dtype=np.int64)
    missing = np.flatnonzero((lists == targets[:, None]).sum(axis=1) != 1)
    if len(missing):
        raise RequestError(f"row {int(missing[0])}: the candidates must hold the target once.")
    if not len(slots) or not all(0 <= slot < lists.shape[1] for slot in slots):
        raise RequestError(f"slots must be places 0..{lists.shape[1] - 1} of the candidate lists, got {list(slots)}.")
    others = lists[lists != targets[:, None]].reshape(len(lists), -1)
    result = {}
    for slot in slots:
        shown = np.insert(others, slot, targets, axis=1)
        result[int(slot)] = float(_ranks(ranker.rank(histories, shown))[:, slot].mean())
    return result


@dataclass(frozen=True)
class PopularityBias:
    """`popularity` (C,): mean popularity of the items at each rank, as the share of items that are less popular (0 to 1).
    `correlation`: of popularity and goodness of rank inside the lists (Kendall's tau, mean over users); 0 = no bias.
    """

    popularity: np.ndarray
    correlation: float


def popularity_bias(
    ranker: Any, histories: Sequence[Any], candidates_MC: Any, counts_N: Sequence[int] | np.ndarray
) -> PopularityBias:
    """How popular the items at each rank are. Give lists in an order that does not depend on popularity.

    Args:
        counts_N: training interactions of every item.

    Raises:
        RequestError: fewer than two candidates per list.
    """
    lists = np.asarray(candidates_MC, dtype=np.int64)
    if lists.ndim != 2 or lists.shape[1] < 2 or (lists < 0).any():
        raise RequestError("popularity bias needs lists of the same length, of two or more candidates.")
    counts = np.asarray(counts_N)
    share_N = np.searchsorted(np.sort(counts), counts) / max(len(counts) - 1, 1)
    ranks_MC = _ranks(ranker.rank(histories, lists))
    popularity_MC = np.take_along_axis(share_N[lists], np.argsort(ranks_MC, axis=1, kind="stable"), axis=1)
    taus = [_kendall_tau(share, -ranks) for share, ranks in zip(share_N[lists], ranks_MC)]
    return PopularityBias(popularity_MC.mean(axis=0), float(np.mean(taus)))


def _ranks(scores_MC: np.ndarray) -> np.ndarray:
    """Rank (from 1) of each candidate; equal scores share the mean of their ranks, so that no place is preferred."""
    scores = np.asarray(scores_MC)
    better = (scores[:, None, :] > scores[:, :, None]).sum(axis=2)
    equal = (scores[:, None, :] == scores[:, :, None]).sum(axis=2)
    return 1.0 + better + (equal - 1) / 2.0


def _kendall_tau(first_C: np.ndarray, second_C: np.ndarray) -> float:
    """Tau-b: (concordant - discordant) pairs over the pairs untied in each; 0 where all are tied."""
    one = np.sign(np.subtract.outer(first_C, first_C))
    two = np.sign(np.subtract.outer(second_C, second_C))
    scale = float(np.sqrt((one != 0).sum() * (two != 0).sum()))
    return float((one * two).sum()) / scale if scale else 0.0
