"""Full-ranking evaluation of any recommender: metrics with intervals, coverage, popularity buckets, seen kept/removed.

`evaluate` asks the recommender for its top-K list of every evaluation row, with seen items removed and kept, and looks
up the rank of the target. No sampled negatives. Which of the two settings is the headline is a property of the data
set, not a choice made after the numbers are known: data with repeat consumption keeps seen items, others remove them.

The protocol is full ranking because sampled metrics reorder systems (Krichene and Rendle, KDD 2020).

Legend: M evaluation rows, N items, K list length.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.evaluation.bootstrap import bootstrap_interval
from hf_genrec.evaluation.evaluation_report import KEPT, REMOVED, EvaluationReport, RankingResult
from hf_genrec.evaluation.metrics import metrics_from_ranks, ranks_from_topk, values_from_ranks
from hf_genrec.evaluation.recommenders import ModelRecommender, ScoreRecommender

if TYPE_CHECKING:
    from hf_genrec.data.sequences import Sequences
    from hf_genrec.data.splits import EvaluationSet

__all__ = ["ModelRecommender", "ScoreRecommender", "evaluate", "popularity_buckets", "training_counts"]


_SETTINGS = {REMOVED: True, KEPT: False}  # what is asked of `exclude_seen`


def training_counts(train: Sequences, num_items: int) -> np.ndarray:
    """Training interactions `(N,)` of each item."""
    return np.bincount(train.items, minlength=num_items)


def popularity_buckets(train_counts_N: np.ndarray, head_fraction: float = 0.2) -> dict[str, np.ndarray]:
    """Split the catalogue by training popularity: bool masks `(N,)` named head, tail and cold.

    * head: the `head_fraction` (rounded up) most popular of the items that occur in training (equal counts: by index);
    * tail: all other items that occur in training;
    * cold: items with no training interaction.

    Example:
        >>> {name: mask.sum().item() for name, mask in popularity_buckets(np.array([9, 5, 4, 1, 1, 0])).items()}
        {'head': 1, 'tail': 4, 'cold': 1}
    """
    counts_N = np.asarray(train_counts_N)
    trained_N = counts_N > 0
    num_head = int(np.ceil(head_fraction * trained_N.sum()))
    head_N = np.zeros(len(counts_N), dtype=bool)
    head_N[np.argsort(-counts_N, kind="stable")[:num_head]] = True
    return {"head": head_N, "tail": trained_N & ~head_N, "cold": ~trained_N}


def evaluate(
    recommender: Any,
    evaluation_set: EvaluationSet,
    *,
    num_items: int,
    ks: Iterable[int] = (1, 5, 10, 20, 50),
    train_counts: np.ndarray | None = None,
    exclude_seen: str | bool = "both",
    repeats: bool = False,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    head_fraction: float = 0.2,
    batch_size: int = 512,
    name: str | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Rank the whole catalogue for every row and report item-level metrics with bootstrap intervals over users.

    Args:
        recommender: Anything with `recommend_topk(histories, k, exclude_seen) -> (M, k)` item indices, `-1` padded;
            wrap models in `ModelRecommender`, score functions in `ScoreRecommender`. One that has `reads_once` set gives
            both settings at once: `recommend_topk_both(histories, k) -> (removed, kept)`.
        evaluation_set: Users, histories and targets; several rows of one user are resampled together.
        num_items: Catalogue size N.
        ks: Cut-offs; lists of max(ks) items are asked for.
        train_counts: `(N,)` training interactions per item (`training_counts`), for the head / tail / cold buckets of
            the targets; without them there are no buckets.
        exclude_seen: `"both"`, True (seen items removed only) or False (kept only).
        repeats: Declared property of the data set (`data.repeats`): decides the headline, kept if True, else removed.
        bootstrap: Resamples of the intervals, 0 for none.
        level: Share of the bootstrap distribution inside the interval.
        seed: Of the bootstrap.
        head_fraction: See `popularity_buckets`.
        batch_size: Rows per call of `recommend_topk` (one step of the progress bar).
        name: Shown in tables; default the recommender's class name.
        progress: Show a bar.

    Returns:
        `EvaluationReport`; its `.to_dict()` is the `test` block of metrics.json.

    Raises:
        RequestError: Nothing to evaluate, or a bad option.
        IncompatibleComponentsError: The recommender returned lists of another shape, items outside the catalogue,
            an item twice in one list, or a seen item although they were to be removed.

    Example:
        >>> from hf_genrec.data.sequences import Sequences
        >>> from hf_genrec.data.splits import EvaluationSet
        >>> from hf_genrec.evaluation.baselines import Popularity
        >>> train = Sequences.from_rows([[0, 1], [0, 2], [0, 1]])
        >>> rows = EvaluationSet(np.arange(3), train, np.array([2, 1, 2], dtype=np.int32))
        >>> report = evaluate(Popularity().fit(train, 3), rows, num_items=3, ks=(1, 2), progress=False)
        >>> report.headline, report["recall@1"], report.kept["recall@2"]
        ('removed', 1.0, 0.3333333333333333)
    """
    ks = sorted({int(k) for k in ks})
    if not ks or ks[0] < 1:
        raise RequestError(f"ks must be whole numbers of at least 1, got {ks}")
    if exclude_seen not in ("both", True, False):
        raise RequestError(f"exclude_seen must be 'both', True or False, got {exclude_seen!r}")
    targets_M = np.asarray(evaluation_set.targets)
    if not len(targets_M):
        raise RequestError("the evaluation set is empty: no user has enough interactions to hold one out")
    if targets_M.min() < 0 or targets_M.max() >= num_items:
        raise RequestError(
            f"targets run from {targets_M.min()} to {targets_M.max()}, the catalogue has {num_items} items"
        )
    buckets = None
    if train_counts is not None:
        if np.shape(train_counts) != (num_items,):
            raise RequestError(f"train_counts must have shape ({num_items},), got {np.shape(train_counts)}")
        buckets = popularity_buckets(train_counts, head_fraction)

    name = name or type(recommender).__name__
    users_M = np.asarray(evaluation_set.users)
    results: dict[str, RankingResult] = {}
    settings = [setting for setting in _SETTINGS if exclude_seen in ("both", _SETTINGS[setting])]
    together = len(settings) > 1 and getattr(recommender, "reads_once", False)
    for group in [settings] if together else [[setting] for setting in settings]:
        start = time.perf_counter()
        label = f"{name}, seen {' and '.join(group)}"
        lists = _recommend_all(recommender, evaluation_set, ks[-1], group, num_items, batch_size, label, progress)
        seconds = (time.perf_counter() - start) / len(group)
        for setting in group:
            ranks_M = ranks_from_topk(lists[setting], targets_M)
            results[setting] = RankingResult(
                ranks_M=ranks_M,
                metrics=metrics_from_ranks(ranks_M, ks),
                intervals=_intervals(ranks_M, ks, users_M, bootstrap, level, seed),
                coverage={f"coverage@{k}": _coverage(lists[setting][:, :k], num_items) for k in ks},
                buckets={} if buckets is None else _bucket_metrics(ranks_M, targets_M, buckets, ks),
                seconds=seconds,
            )
    headline = KEPT if repeats else REMOVED
    return EvaluationReport(
        name=name,
        headline=headline if headline in results else next(iter(results)),
        results=results,
        ks=tuple(ks),
        num_items=int(num_items),
        users_M=users_M,
        targets_M=targets_M,
        targets_seen=_targets_seen(evaluation_set.histories, targets_M),
        bootstrap={"resamples": int(bootstrap), "level": level, "seed": int(seed)},
        buckets_M={} if buckets is None else {name: mask_N[targets_M] for name, mask_N in buckets.items()},
    )


def _recommend_all(
    recommender: Any,
    evaluation_set: EvaluationSet,
    k: int,
    settings: list[str],
    num_items: int,
    batch_size: int,
    label: str,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Setting -> lists (M, k); two settings from one reading of every history."""
    num_rows = len(evaluation_set.targets)
    lists = {setting: np.full((num_rows, k), -1, dtype=np.int64) for setting in settings}
    needs_users = getattr(recommender, "needs_users", False)
    users_M = np.asarray(evaluation_set.users)
    with (
        tqdm(total=num_rows, desc=label, unit="user", disable=not progress, leave=False) as bar,
        _told(recommender, bar),
    ):
        for start in range(0, num_rows, max(1, batch_size)):
            rows = np.arange(start, min(start + max(1, batch_size), num_rows))
            histories = evaluation_set.histories.take(rows)
            extra = {"users": users_M[rows]} if needs_users else {}
            if len(settings) > 1:
                found = dict(zip(_SETTINGS, recommender.recommend_topk_both(histories, k, **extra), strict=True))
            else:
                found = {s: recommender.recommend_topk(histories, k, _SETTINGS[s], **extra) for s in settings}
            for setting in settings:
                items = np.asarray(found[setting])
                _check_lists(items, histories, k, _SETTINGS[setting], num_items, start, label)
                lists[setting][rows] = items
            bar.update(start + len(rows) - bar.n)
    return lists


@contextmanager
def _told(recommender: Any, bar: Any) -> Iterator[None]:
    """Inside, a recommender that works in smaller batches moves the bar with each: a language model takes minutes for ours."""
    if not hasattr(recommender, "on_rows"):
        yield
        return
    recommender.on_rows = bar.update
    try:
        yield
    finally:
        recommender.on_rows = None


def _check_lists(
    items_MK: np.ndarray, histories: Sequences, k: int, remove: bool, num_items: int, first_row: int, label: str
) -> None:
    """The promises that make the numbers mean something; all checks are a sort and two lookups per batch."""
    if items_MK.shape != (len(histories), k) or not np.issubdtype(items_MK.dtype, np.integer):
        raise IncompatibleComponentsError(
            f"{label}: recommend_topk must return integers of shape ({len(histories)}, {k}), "
            f"got {items_MK.dtype} {items_MK.shape}"
        )
    if items_MK.size and (items_MK.min() < -1 or items_MK.max() >= num_items):
        bad = int(items_MK.min() if items_MK.min() < -1 else items_MK.max())
        raise IncompatibleComponentsError(f"{label}: item index {bad} is outside the catalogue of {num_items} items")
    ordered_MK = np.sort(items_MK, axis=1)
    twice_MK = (ordered_MK[:, 1:] == ordered_MK[:, :-1]) & (ordered_MK[:, 1:] >= 0)
    if twice_MK.any():
        row, place = np.argwhere(twice_MK)[0]
        raise IncompatibleComponentsError(
            f"{label}: row {first_row + row} lists item index {ordered_MK[row, place]} twice; "
            "lists must hold distinct items"
        )
    if remove:
        rows = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
        seen = rows * num_items + histories.items
        keys_MK = np.arange(len(histories))[:, None] * num_items + items_MK
        leaked_MK = np.isin(keys_MK, seen) & (items_MK >= 0)
        if leaked_MK.any():
            row, place = np.argwhere(leaked_MK)[0]
            raise IncompatibleComponentsError(
                f"{label}: row {first_row + row} lists item index {items_MK[row, place]} of its own history although "
                "seen items were to be removed"
            )


def _intervals(
    ranks_M: np.ndarray, ks: list[int], users_M: np.ndarray, resamples: int, level: float, seed: int
) -> dict[str, tuple[float, float]]:
    if not resamples:
        return {}
    values = values_from_ranks(ranks_M, ks)
    found = bootstrap_interval(
        np.stack(list(values.values()), axis=1), level=level, resamples=resamples, seed=seed, users=users_M
    )
    return {name: (interval.low, interval.high) for name, interval in zip(values, found)}


def _coverage(items_Mk: np.ndarray, num_items: int) -> float:
    """Distinct items recommended to anybody over the catalogue."""
    return float(len(np.unique(items_Mk[items_Mk >= 0])) / num_items)


def _bucket_metrics(
    ranks_M: np.ndarray, targets_M: np.ndarray, buckets: dict[str, np.ndarray], ks: list[int]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, mask_N in buckets.items():
        in_bucket_M = mask_N[targets_M]
        found[name] = {"items": int(mask_N.sum()), "targets": int(in_bucket_M.sum())}
        if in_bucket_M.any():
            found[name] |= metrics_from_ranks(ranks_M[in_bucket_M], ks)
    return found


def _targets_seen(histories: Sequences, targets_M: np.ndarray) -> int:
    rows = np.repeat(np.arange(len(targets_M)), np.diff(histories.offsets))
    return len(np.unique(rows[histories.items == targets_M[rows]]))
