"""Ties: in time (which item is held out?), in the score (which comes first?), and hidden in an order without times.

Interactions of one user at the same moment have no order; a file still lists them in one. Where that order follows the
item id (public Amazon cuts are sorted by ASIN within a day), part of the target is given away. This module counts the
ties, repeats an evaluation with ties shuffled, and measures how far an order without times follows the ids.

Legend: M evaluation rows, N items, R sequence rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_genrec.errors import RequestError
from hf_genrec.evaluation.evaluation_report import EvaluationReport
from hf_genrec.evaluation.metrics import metrics_from_ranks, rank_bounds
from hf_genrec.evaluation.recommenders import mask_seen

if TYPE_CHECKING:
    from hf_genrec.data.sequences import Sequences
    from hf_genrec.data.splits import EvaluationSet


# ------------------------------------------------------------------------------------------------------ ties in time


def tie_report(data: Any, split: Any) -> dict[str, Any]:
    """Ties in time that a reader of the numbers should know, from `data.report` and `split.report`.

    Returns:
        `policy`, `rows` and `users` with ties, `largest` group, `users_last_two`, the split's own counts under
        `boundary` and shares of the test rows where they apply; None where the data have no times.

    Example of use: `print_tie_report(tie_report(data, split))`.
    """
    found = data.report
    boundary = split.report.get("ties")
    report = {
        "policy": found.tie_policy,
        "rows": found.ties_rows,
        "row_share": None if found.ties_rows is None else found.ties_rows / max(1, found.interactions),
        "users": found.ties_users,
        "largest": found.ties_largest,
        "users_last_two": found.ties_last_two,
        "boundary": dict(boundary) if boundary else None,
        "test_rows": len(split.test.targets),
    }
    tied = (boundary or {}).get("test_targets_tied")
    report["test_target_tied_share"] = None if tied is None else tied / max(1, report["test_rows"])
    return report


def print_tie_report(report: Mapping[str, Any]) -> str:
    """The tie report in two lines of plain words."""
    if report["rows"] is None:
        return "ties: the data have no timestamps; their order is taken as given (see order_follows_ids)"
    lines = [
        f"ties: {report['rows']:,} interactions ({report['row_share']:.1%}) of {report['users']:,} users share a "
        f"timestamp, up to {report['largest']} at once; policy: {report['policy']}"
    ]
    if report["test_target_tied_share"] is not None:
        lines.append(
            f"      for {report['boundary']['test_targets_tied']:,} of {report['test_rows']:,} test rows "
            f"({report['test_target_tied_share']:.1%}) the held-out item depends on that policy"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class ShuffledTies:
    """An evaluation in the declared tie order, and repeated with ties in random orders."""

    declared: EvaluationReport
    shuffled: tuple[EvaluationReport, ...]
    seeds: tuple[int, ...]

    def spread(self, metric: str, setting: str | None = None) -> dict[str, float]:
        """`declared`, and mean, min and max over the shuffles, of one metric."""
        values = [report.setting(setting or self.declared.headline)[metric] for report in self.shuffled]
        return {
            "declared": self.declared.setting(setting)[metric],
            "shuffled_mean": float(np.mean(values)),
            "shuffled_min": min(values),
            "shuffled_max": max(values),
        }

    def to_dict(self) -> dict[str, Any]:
        """setting -> metric -> spread, and the seeds."""
        settings = {
            f"seen_{setting}": {metric: self.spread(metric, setting) for metric in result.metrics}
            for setting, result in self.declared.results.items()
        }
        return {"seeds": list(self.seeds), **settings}

    def __str__(self) -> str:
        k = 10 if 10 in self.declared.ks else self.declared.ks[-1]
        lines = [f"{self.declared.name}: ties in declared order and shuffled (seeds {', '.join(map(str, self.seeds))})"]
        for setting in self.declared.results:
            for metric in (f"recall@{k}", f"ndcg@{k}"):
                found = self.spread(metric, setting)
                lines.append(
                    f"  {metric:<10} seen {setting:<8} declared {found['declared']:.4f}  shuffled "
                    f"{found['shuffled_mean']:.4f} ({found['shuffled_min']:.4f} to {found['shuffled_max']:.4f})"
                )
        return "\n".join(lines)


def evaluate_with_shuffled_ties(
    run: Callable[[int | None], EvaluationReport], seeds: Iterable[int] = (0, 1, 2)
) -> ShuffledTies:
    """Repeat an evaluation with ties in time shuffled.

    Args:
        run: Loads, splits, fits and evaluates for one tie order: called with None for the declared order, then with
            every seed. The order changes the training part and the targets, so a trained model has to be trained again.
        seeds: Of the shuffles.

    Example of use:

        def run(shuffle_ties):
            data = load_data("movielens-100k", shuffle_ties=shuffle_ties)
            split = make_split(data)
            graph = ItemGraph().fit(split.train, data.num_items)
            return evaluate(graph, split.test, num_items=data.num_items)
        print(evaluate_with_shuffled_ties(run))
    """
    seeds = tuple(seeds)
    if not seeds:
        raise RequestError("evaluate_with_shuffled_ties needs at least one seed")
    return ShuffledTies(run(None), tuple(run(seed) for seed in seeds), seeds)


# -------------------------------------------------------------------------------------------------- ties in the score


def score_ties(recommender: Any, evaluation_set: EvaluationSet, *, exclude_seen: bool = True, k: int = 10) -> dict:
    """How much the order of equal scores matters for a recommender that scores the whole catalogue.

    A constant scorer is perfect under the optimistic order and useless under the pessimistic one: a result whose
    two bounds differ says little. Reported figures use the order by item index (`metrics.topk_from_scores`).

    Args:
        recommender: Has `score(histories) -> (M, N)`.
        k: Cut-off of the bounds.

    Returns:
        `targets`, `targets_tied` (targets that share their score with another item), `largest_tie`, `optimistic` and
        `pessimistic` metrics @k.
    """
    best, worst = [], []
    num_rows = len(evaluation_set.targets)
    for start in range(0, num_rows, 256):
        rows = np.arange(start, min(start + 256, num_rows))
        histories = evaluation_set.histories.take(rows)
        scores_MN = np.array(recommender.score(histories), dtype=np.float64)
        if exclude_seen:
            mask_seen(scores_MN, histories)
        best_M, worst_M = rank_bounds(scores_MN, np.asarray(evaluation_set.targets)[rows])
        best.append(best_M)
        worst.append(worst_M)
    best_M, worst_M = np.concatenate(best), np.concatenate(worst)
    reachable_M = np.isfinite(best_M)
    group_M = np.where(reachable_M, worst_M, 1.0) - np.where(reachable_M, best_M, 1.0) + 1.0
    return {
        "targets": num_rows,
        "targets_tied": int((group_M > 1).sum()),
        "largest_tie": int(group_M.max(initial=1.0)),
        "optimistic": metrics_from_ranks(best_M, [k]),
        "pessimistic": metrics_from_ranks(worst_M, [k]),
    }


# ------------------------------------------------------------------------------------------- order without timestamps


def _ranks_of(keys: Sequence[Any]) -> np.ndarray:
    return np.unique(np.asarray(keys), return_inverse=True)[1]


def order_follows_ids(sequences: Sequences, keys: Sequence[Any]) -> dict[str, float]:
    """Do neighbours in a history ascend in an id more often than chance? A sign that ties were sorted by that id.

    Args:
        sequences: Histories with the targets in them.
        keys: N comparable ids of the items (ASINs, say): the order suspected.

    Returns:
        `pairs` compared (equal keys left out), `ascending` share (0.5 by chance), `last_pair_ascending` share (the
        pair of the held-out item and the one before it), and `z`, standard errors of `ascending` away from 0.5.

    Example:
        >>> from hf_genrec.data.sequences import Sequences
        >>> order_follows_ids(Sequences.from_rows([[0, 1, 2], [2, 1]]), ["a", "b", "c"])["ascending"]
        0.6666666666666666
    """
    rank_N = _ranks_of(keys)
    rows = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))
    step = np.sign(np.diff(rank_N[sequences.items]))
    valid = (rows[1:] == rows[:-1]) & (step != 0)
    last = valid & (np.append(rows[1:][1:] != rows[1:][:-1], True) if len(rows) > 1 else valid)
    pairs = int(valid.sum())
    if not pairs:
        return {"pairs": 0, "ascending": 0.5, "last_pair_ascending": 0.5, "z": 0.0}
    ascending = float((step[valid] > 0).mean())
    return {
        "pairs": pairs,
        "ascending": ascending,
        "last_pair_ascending": float((step[last] > 0).mean()) if last.any() else 0.5,
        "z": float((ascending - 0.5) / np.sqrt(0.25 / pairs)),
    }


def shuffle_ascending_runs(sequences: Sequences, keys: Sequence[Any], seed: int) -> Sequences:
    """Permute every maximal ascending run of a history at random: suspected ties of an order without timestamps.

    Runs also ascend by chance, so this destroys true order as well: results on it are a lower bound of what a model can
    do without the help of the sorting, as the results in file order are an upper bound. Timestamps are dropped.

    Example:
        >>> from hf_genrec.data.sequences import Sequences
        >>> rows = shuffle_ascending_runs(Sequences.from_rows([[3, 0, 1, 2]]), [0, 1, 2, 3], seed=0)
        >>> int(rows[0][0]), sorted(rows[0][1:].tolist())
        (3, [0, 1, 2])
    """
    rank_N = _ranks_of(keys)
    items = np.asarray(sequences.items)
    if not len(items):
        return sequences
    starts = np.ones(len(items), dtype=bool)
    rows = np.repeat(np.arange(len(sequences)), np.diff(sequences.offsets))
    starts[1:] = (rows[1:] != rows[:-1]) | (rank_N[items[1:]] <= rank_N[items[:-1]])
    order = np.lexsort((np.random.default_rng(seed).random(len(items)), np.cumsum(starts)))
    return type(sequences)(sequences.offsets, items[order])
