"""Item-level Recall, NDCG and MRR at any K, from ranks, from top-K lists or from scores, under a declared tie policy.

Everything counts *items*: a code shared by several items is expanded before it gets here, so it is never a free hit.

Two families:

* one target per row (next-item protocols): `ranks_M` is the 1-based rank of the target, `inf` when it was not
  retrieved. Recall@K is then the hit rate HR@K, and MRR@K is 1 / rank inside the first K.
* several targets per row: `hits_MK` says which positions of a top-K list are relevant; Recall divides by the number of
  targets, NDCG by the ideal DCG of min(K, number of targets) targets (binary gains, log2 discount, as in trec_eval).

Tie policy. Equal scores are ordered by item index, smaller first (`ties="index"`, deterministic, the policy of
`topk_from_scores`). `"optimistic"` and `"pessimistic"` give the best and the worst rank that any tie order could yield,
`"average"` their mean. `rank_bounds` reports how many targets tie at all.

Legend: M rows (users), N catalogue items, K list length, R relevant items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from hf_genrec.errors import RequestError

TIE_POLICIES = ("index", "optimistic", "pessimistic", "average")


# ---------------------------------------------------------------------------------------------- one target: ranks


def ranks_from_topk(items_MK: np.ndarray, targets_M: np.ndarray) -> np.ndarray:
    """1-based rank of each row's target in its recommendation list, `inf` when absent.

    Args:
        items_MK: `(M, K)` item indices, best first, `-1` where the list is shorter than K.
        targets_M: `(M,)` item indices, none negative.

    Returns:
        `(M,)` float64. A target listed twice counts at its first place.

    Example:
        >>> ranks_from_topk(np.array([[4, 2, -1], [1, 0, 3]]), np.array([2, 5]))
        array([ 2., inf])
    """
    items_MK, targets_M = np.asarray(items_MK), np.asarray(targets_M)
    if items_MK.ndim != 2 or targets_M.shape != items_MK.shape[:1]:
        raise RequestError(
            f"ranks_from_topk needs lists (M, K) and targets (M,), got {items_MK.shape} and {targets_M.shape}"
        )
    if targets_M.size and targets_M.min() < 0:
        raise RequestError(
            f"target of row {int(np.argmin(targets_M))} is {int(targets_M.min())}: targets are item indices 0..N-1 "
            "(-1 marks the empty places of a list); drop the row"
        )
    ranks_M = np.full(len(targets_M), np.inf)
    hit_MK = items_MK == targets_M[:, None]
    if hit_MK.shape[1]:
        first_M = hit_MK.argmax(axis=1)
        found_M = hit_MK[np.arange(len(targets_M)), first_M]
        ranks_M[found_M] = first_M[found_M] + 1.0
    return ranks_M


def _check_k(k: int) -> int:
    if int(k) != k or k < 1:
        raise RequestError(f"K must be a whole number of at least 1, got {k!r}")
    return int(k)


def recall_values(ranks_M: np.ndarray, k: int) -> np.ndarray:
    """Per-row Recall@K (= hit rate) `(M,)` of one target each."""
    return (np.asarray(ranks_M, dtype=np.float64) <= _check_k(k)).astype(np.float64)


def ndcg_values(ranks_M: np.ndarray, k: int) -> np.ndarray:
    """Per-row NDCG@K `(M,)` of one target each: 1 / log2(rank + 1) inside the first K, else 0."""
    ranks_M = np.asarray(ranks_M, dtype=np.float64)
    return np.where(ranks_M <= _check_k(k), 1.0 / np.log2(ranks_M + 1.0), 0.0)


def mrr_values(ranks_M: np.ndarray, k: int) -> np.ndarray:
    """Per-row MRR@K `(M,)` of one target each: 1 / rank inside the first K, else 0."""
    ranks_M = np.asarray(ranks_M, dtype=np.float64)
    return np.where(ranks_M <= _check_k(k), 1.0 / ranks_M, 0.0)


METRICS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "recall": recall_values,
    "ndcg": ndcg_values,
    "mrr": mrr_values,
}


def recall_at_k(ranks_M: np.ndarray, k: int) -> float:
    """Mean Recall@K (= HR@K) over rows with one target each; see `recall_values` for the per-row values.

    Example:
        >>> recall_at_k(np.array([1, 3, np.inf, 11]), 10)
        0.5
    """
    return _mean(recall_values(ranks_M, k))


def ndcg_at_k(ranks_M: np.ndarray, k: int) -> float:
    """Mean NDCG@K over rows with one target each."""
    return _mean(ndcg_values(ranks_M, k))


def mrr_at_k(ranks_M: np.ndarray, k: int) -> float:
    """Mean MRR@K over rows with one target each."""
    return _mean(mrr_values(ranks_M, k))


hit_rate_at_k = recall_at_k


def _mean(values_M: np.ndarray) -> float:
    if not len(values_M):
        raise RequestError("no rows to average: the evaluation set is empty")
    return float(values_M.mean())


def metrics_from_ranks(ranks_M: np.ndarray, ks: Iterable[int] = (1, 5, 10, 20, 50)) -> dict[str, float]:
    """Flat means `{"recall@10": ..., "ndcg@10": ..., "mrr@10": ...}` for every K, in the order of `METRICS`."""
    values = values_from_ranks(ranks_M, ks)
    return {name: _mean(column) for name, column in values.items()}


def values_from_ranks(ranks_M: np.ndarray, ks: Iterable[int]) -> dict[str, np.ndarray]:
    """Per-row values of every metric at every K: `{"recall@10": (M,), ...}`, the input of the bootstrap."""
    ks = sorted({_check_k(k) for k in ks})
    return {f"{name}@{k}": metric(ranks_M, k) for name, metric in METRICS.items() for k in ks}


# ------------------------------------------------------------------------------------- several targets: hit matrices


def hits_from_topk(items_MK: np.ndarray, targets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which places of each list hold one of the row's relevant items.

    Args:
        items_MK: `(M, K)` item indices, `-1` padded. A repeated item counts at its first place only.
        targets: M arrays of relevant item indices (a `Sequences` works); repeated targets count once.

    Returns:
        `hits_MK` bool and `relevant_M` int64, the number of distinct relevant items of each row.

    Raises:
        RequestError: A row has no relevant item (no metric is defined for it: drop the row).
    """
    items_MK = np.asarray(items_MK, dtype=np.int64)
    if len(items_MK) != len(targets):
        raise RequestError(f"{len(items_MK)} lists for {len(targets)} rows of targets")
    unique = [np.unique(np.asarray(row, dtype=np.int64)) for row in targets]
    relevant_M = np.array([len(row) for row in unique], dtype=np.int64)
    if len(relevant_M) and relevant_M.min() == 0:
        raise RequestError(f"row {int(relevant_M.argmin())} has no relevant item: drop rows without targets")
    hits_MK = np.zeros(items_MK.shape, dtype=bool)
    if not hits_MK.size:
        return hits_MK, relevant_M
    # One key per (row, item) makes the membership test of all rows a single sorted lookup.
    span = 1 + max(int(items_MK.max()), max(int(row.max()) for row in unique))
    keys_MK = np.arange(len(items_MK))[:, None] * span + items_MK
    wanted = np.concatenate([row + m * span for m, row in enumerate(unique)])
    hits_MK = np.isin(keys_MK, wanted) & (items_MK >= 0)
    rows, places = np.nonzero(hits_MK)
    _, first = np.unique(keys_MK[rows, places], return_index=True)
    repeated = np.ones(len(rows), dtype=bool)
    repeated[first] = False
    hits_MK[rows[repeated], places[repeated]] = False
    return hits_MK, relevant_M


def multi_recall_values(hits_MK: np.ndarray, relevant_M: np.ndarray, k: int) -> np.ndarray:
    """Per-row Recall@K `(M,)`: relevant items among the first K over all relevant items."""
    return np.divide(np.asarray(hits_MK)[:, : _check_k(k)].sum(axis=1), relevant_M)


def multi_hit_rate_values(hits_MK: np.ndarray, relevant_M: np.ndarray, k: int) -> np.ndarray:
    """Per-row hit rate `(M,)`: 1 when at least one relevant item is among the first K."""
    return np.asarray(np.any(np.asarray(hits_MK)[:, : _check_k(k)], axis=1), dtype=np.float64)


def multi_ndcg_values(hits_MK: np.ndarray, relevant_M: np.ndarray, k: int) -> np.ndarray:
    """Per-row NDCG@K `(M,)` with binary gains; the ideal list holds min(K, relevant) hits even if lists are shorter."""
    k = _check_k(k)
    hits_MK = np.asarray(hits_MK)[:, :k]
    discounts_K = 1.0 / np.log2(np.arange(2, k + 2))
    ideal_K = np.concatenate([[0.0], np.cumsum(discounts_K)])
    return hits_MK @ discounts_K[: hits_MK.shape[1]] / ideal_K[np.minimum(relevant_M, k)]


def multi_mrr_values(hits_MK: np.ndarray, relevant_M: np.ndarray, k: int) -> np.ndarray:
    """Per-row MRR@K `(M,)`: 1 over the place of the first relevant item inside the first K, else 0."""
    hits_MK = np.asarray(hits_MK)[:, : _check_k(k)]
    if not hits_MK.shape[1]:
        return np.zeros(len(hits_MK))
    return np.where(hits_MK.any(axis=1), 1.0 / (hits_MK.argmax(axis=1) + 1.0), 0.0)


MULTI_METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "recall": multi_recall_values,
    "hit_rate": multi_hit_rate_values,
    "ndcg": multi_ndcg_values,
    "mrr": multi_mrr_values,
}


# -------------------------------------------------------------------------------------------------- from full scores


def topk_from_scores(scores_MN: np.ndarray, k: int) -> np.ndarray:
    """Deterministic top-K of each row: by score, equal scores by item index (smaller first).

    Args:
        scores_MN: `(M, N)` real scores; `-inf` marks items that must not be recommended.
        k: List length; where fewer items are allowed, the list ends in `-1`.

    Returns:
        `(M, k)` int64.

    Raises:
        RequestError: A score is NaN.

    Example:
        >>> topk_from_scores(np.array([[.1, .7, .7, -np.inf]]), 4)
        array([[ 1,  2,  0, -1]])
    """
    scores_MN, k = np.asarray(scores_MN), _check_k(k)
    _check_shape(scores_MN)
    num_rows, num_items = scores_MN.shape
    items_Mk = np.full((num_rows, k), -1, dtype=np.int64)
    width = min(k, num_items)
    if not num_rows or not width:
        return items_Mk
    if scores_MN.dtype.kind != "f":
        scores_MN = scores_MN.astype(np.float64)
    # torch's partial sort is several times faster than np.partition, but picks arbitrary items among equal scores: one
    # place more than asked for shows the rows where the cut falls inside a tie, and those are selected by index.
    extra = min(width + 1, num_items)
    values, indices = torch.topk(torch.from_numpy(np.require(scores_MN, requirements=["C", "W"])), extra, dim=1)
    values_Me, candidates_Mw = values.numpy(), indices.numpy()[:, :width]
    if np.isnan(values_Me).any():  # NaN counts as the largest value
        _check_finite(scores_MN)
    if extra > width:
        cut_in_tie = np.flatnonzero(values_Me[:, width - 1] == values_Me[:, width])
        candidates_Mw[cut_in_tie] = _topk_by_index(scores_MN[cut_in_tie], width)
    candidates_Mw = np.sort(candidates_Mw, axis=1)  # in index order, so that a stable sort breaks ties by index
    chosen_scores_Mw = np.take_along_axis(scores_MN, candidates_Mw, axis=1)
    order_Mw = np.argsort(-chosen_scores_Mw, axis=1, kind="stable")
    best_Mw = np.take_along_axis(candidates_Mw, order_Mw, axis=1)
    allowed_Mw = np.take_along_axis(chosen_scores_Mw, order_Mw, axis=1) > -np.inf
    items_Mk[:, :width] = np.where(allowed_Mw, best_Mw, -1)
    return items_Mk


def _topk_by_index(scores_MN: np.ndarray, width: int) -> np.ndarray:
    """`(M, width)` ascending indices of the top items, taking the smallest indices among those equal to the last."""
    kth_M1 = np.partition(scores_MN, scores_MN.shape[1] - width, axis=1)[:, [scores_MN.shape[1] - width]]
    above_MN, equal_MN = scores_MN > kth_M1, scores_MN == kth_M1
    room_M1 = width - above_MN.sum(axis=1, keepdims=True)
    chosen_MN = above_MN | (equal_MN & (np.cumsum(equal_MN, axis=1) <= room_M1))
    return np.nonzero(chosen_MN)[1].reshape(len(scores_MN), width)


def rank_bounds(scores_MN: np.ndarray, targets_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best and worst rank `(M,)`, `(M,)` that any order of equal scores could give the target (`inf` at score -inf)."""
    scores_MN, targets_M = np.asarray(scores_MN), np.asarray(targets_M)
    _check_finite(scores_MN)
    target_M1 = np.take_along_axis(scores_MN, targets_M[:, None].astype(np.int64), axis=1)
    above_M = (scores_MN > target_M1).sum(axis=1)
    equal_M = (scores_MN == target_M1).sum(axis=1)
    dead_M = np.isneginf(target_M1[:, 0])
    return np.where(dead_M, np.inf, above_M + 1.0), np.where(dead_M, np.inf, above_M + equal_M + 0.0)


def ranks_from_scores(scores_MN: np.ndarray, targets_M: np.ndarray, *, ties: str = "index") -> np.ndarray:
    """1-based rank `(M,)` of each target in the full catalogue under a tie policy (module docstring).

    Raises:
        RequestError: Unknown policy, or a score is NaN.

    Example:
        >>> scores, target = np.array([[.5, .9, .5, .5]]), np.array([2])
        >>> [float(ranks_from_scores(scores, target, ties=policy)[0]) for policy in TIE_POLICIES]
        [3.0, 2.0, 4.0, 3.0]
    """
    if ties not in TIE_POLICIES:
        raise RequestError(f"unknown tie policy {ties!r}: choose one of {', '.join(TIE_POLICIES)}")
    best_M, worst_M = rank_bounds(scores_MN, targets_M)
    if ties == "optimistic":
        return best_M
    if ties == "pessimistic":
        return worst_M
    if ties == "average":
        return (best_M + worst_M) / 2.0
    scores_MN, targets_M = np.asarray(scores_MN), np.asarray(targets_M).astype(np.int64)
    target_M1 = np.take_along_axis(scores_MN, targets_M[:, None], axis=1)
    earlier_MN = np.arange(scores_MN.shape[1])[None, :] < targets_M[:, None]
    return best_M + ((scores_MN == target_M1) & earlier_MN).sum(axis=1)


def _check_shape(scores_MN: np.ndarray) -> None:
    if scores_MN.ndim != 2:
        raise RequestError(f"scores must be (rows, items), got shape {scores_MN.shape}")


def _check_finite(scores_MN: np.ndarray) -> None:
    _check_shape(scores_MN)
    if np.isnan(scores_MN).any():
        row, item = np.argwhere(np.isnan(scores_MN))[0]
        raise RequestError(f"score of item index {item} in row {row} is NaN: the model's output is broken")
