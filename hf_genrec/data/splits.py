"""Evaluation protocols: leave-one-out and global-time splits, with their ties and leakage counted.

Shapes: U users (rows), M evaluation rows, nnz interactions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_genrec.data.sequences import Sequences, ragged_positions
from hf_genrec.errors import InteractionTableError

if TYPE_CHECKING:
    from hf_genrec.data.interactions import RecommendationData


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Rows to predict: a history and the one item that came next.

    Args:
        users: (M,) int64 row of each user in `data.sequences`.
        histories: M rows, everything the user did before the target, oldest first.
        targets: (M,) int32 item index.
    """

    users: np.ndarray
    histories: Sequences
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: np.ndarray) -> EvaluationSet:
        """The given evaluation rows (indices or a bool mask), in the given order."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return EvaluationSet(self.users[rows], self.histories.take(rows), self.targets[rows])


@dataclass(frozen=True, eq=False)
class Split:
    """A protocol applied to one data set: training rows (one per user, may be empty), validation and test.

    `report` holds the counts that a reader of the numbers needs: evaluated users, dropped users, targets that depend on
    the tie policy, leakage.
    """

    protocol: Literal["leave_one_out", "global_time"]
    train: Sequences
    validation: EvaluationSet
    test: EvaluationSet
    report: dict[str, Any]


def _evaluation_set(sequences: Sequences, users: np.ndarray, positions: np.ndarray) -> EvaluationSet:
    """Targets at flat `positions` of the rows `users`; the history is the row up to the target."""
    starts = sequences.offsets[:-1][users]
    histories = sequences.select(starts, positions - starts)
    return EvaluationSet(users.astype(np.int64), histories, sequences.items[positions])


def _latest_training_time(train: Sequences, num_items: int) -> np.ndarray:
    """(N,) int64 newest training time of each item; the smallest int64 for items never trained on."""
    assert train.timestamps is not None
    latest = np.full(num_items, np.iinfo(np.int64).min)
    np.maximum.at(latest, train.items, train.timestamps)
    return latest


def _leakage(train: Sequences, test: EvaluationSet, times: np.ndarray, num_items: int) -> dict[str, int]:
    """Test targets (at `times`) that training knows more of than was known then."""
    assert train.timestamps is not None
    return {
        "test_targets_trained_later": int((_latest_training_time(train, num_items)[test.targets] > times).sum()),
        "test_targets_before_end_of_training": int((times < train.timestamps.max()).sum()),
    }


def _target_report(train: Sequences, evaluation: EvaluationSet, num_items: int) -> dict[str, int]:
    trained = np.bincount(train.items, minlength=num_items) > 0
    histories = evaluation.histories
    repeated = histories.items == np.repeat(evaluation.targets, histories.lengths)
    return {
        "rows": len(evaluation),
        "targets_never_in_training": int((~trained[evaluation.targets]).sum()),
        "targets_already_in_history": len(np.unique(histories.row_index()[repeated])),
    }


def leave_one_out(data: RecommendationData) -> Split:
    """Last item of each user = test, last but one = validation, the rest = training.

    The test history includes the validation item. Users with fewer than three interactions keep all of them in training
    and are not evaluated (counted). The protocol leaks: while the target of one user lies in the past, interactions
    of others are trained on that happened later; `report["leakage"]` counts it (arXiv 2010.11060).

    Report keys: `validation` / `test` (rows, cold targets, targets already in the history), `users_not_evaluated`,
    `ties` (`test_targets_tied`: the last two interactions share a timestamp, so the held-out item depends on the tie
    policy; `validation_targets_tied`: the validation item ties either neighbour), `leakage` (None without timestamps).
    """
    sequences, num_items = data.sequences, len(data.item_ids)
    lengths = sequences.lengths
    users = np.flatnonzero(lengths >= 3)
    train_lengths = np.where(lengths >= 3, lengths - 2, lengths)
    train = sequences.select(sequences.offsets[:-1], train_lengths)
    last = sequences.offsets[1:][users] - 1
    validation = _evaluation_set(sequences, users, last - 1)
    test = _evaluation_set(sequences, users, last)
    if not len(users):
        raise InteractionTableError(
            f"{data.name}: no user has the three interactions that leave-one-out needs (longest row: "
            f"{int(lengths.max()) if len(lengths) else 0}). Bring a longer log or use protocol='global_time'."
        )
    ties = leakage = None
    if data.tied is not None:
        tied_last, tied_before = data.tied[last], data.tied[last - 1]
        ties = {
            "test_targets_tied": int(tied_last.sum()),
            "validation_targets_tied": int((tied_last | tied_before).sum()),
        }
    if sequences.timestamps is not None:
        leakage = _leakage(train, test, sequences.timestamps[last], num_items)
    report = {
        "protocol": "leave_one_out",
        "train_interactions": train.num_items,
        "validation": _target_report(train, validation, num_items),
        "test": _target_report(train, test, num_items),
        "users_not_evaluated": len(sequences) - len(users),
        "ties": ties,
        "leakage": leakage,
    }
    return Split("leave_one_out", train, validation, test, report)


def global_time(
    data: RecommendationData,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    *,
    target: Literal["last", "first", "all"] = "last",
) -> Split:
    """Cut everybody's interactions at two moments: train before, validation between, test after. Nothing leaks.

    The moments are timestamps, so rows that share the boundary second all go to the later side (`ties` counts them). A
    user is evaluated in a window on his `last` (default), `first` or `all` interactions inside it that have a history;
    the history is everything before the target, also inside the window. `last` keeps users who arrive in the window
    (most, in logs where a user rates everything in one sitting); `first` is what a system trained at the boundary and
    never fed again would serve.

    Raises:
        InteractionTableError: no timestamps, or a window that is empty.
        ValueError: fractions outside 0..1 or an unknown `target`.
    """
    if target not in ("last", "first", "all"):
        raise ValueError(f"target={target!r}: use 'last', 'first' or 'all'")
    if not (0 < validation_fraction < 1 and 0 < test_fraction < 1 and validation_fraction + test_fraction < 1):
        raise ValueError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction}: use two fractions above 0 "
            "whose sum is below 1"
        )
    sequences, num_items = data.sequences, len(data.item_ids)
    times = sequences.timestamps
    if times is None:
        raise InteractionTableError(
            f"{data.name} has no timestamps, which the global-time split needs. Use protocol='leave_one_out', or name "
            "the time column with timestamp_column=."
        )
    ordered, count = np.sort(times), len(times)
    if not count:
        raise InteractionTableError(f"{data.name} has no interactions to split.")
    cut_validation = ordered[min(int(count * (1 - validation_fraction - test_fraction)), count - 1)]
    cut_test = ordered[min(int(count * (1 - test_fraction)), count - 1)]
    rows = sequences.row_index()
    before_validation = np.bincount(rows[times < cut_validation], minlength=len(sequences))
    before_test = np.bincount(rows[times < cut_test], minlength=len(sequences))
    train = sequences.select(sequences.offsets[:-1], before_validation)
    users, positions, skipped_validation = _window(sequences, before_validation, before_test, target)
    validation = _evaluation_set(sequences, users, positions)
    users, positions, skipped_test = _window(sequences, before_test, sequences.lengths, target)
    test = _evaluation_set(sequences, users, positions)
    for name, size in (("training", train.num_items), ("validation", len(validation)), ("test", len(test))):
        if not size:
            raise InteractionTableError(
                f"{data.name}: the {name} window of the global-time split is empty (boundaries {cut_validation} and "
                f"{cut_test}, times {ordered[0]} to {ordered[-1]}). Change validation_fraction/test_fraction, or use "
                "protocol='leave_one_out'."
            )
    report = {
        "protocol": "global_time",
        "target": target,
        "validation_from": int(cut_validation),
        "test_from": int(cut_test),
        "train_interactions": train.num_items,
        "validation": _target_report(train, validation, num_items) | {"users_without_history": skipped_validation},
        "test": _target_report(train, test, num_items) | {"users_without_history": skipped_test},
        "users_not_evaluated": len(sequences) - len(np.union1d(validation.users, test.users)),
        "ties": {
            "rows_at_validation_boundary": int((times == cut_validation).sum()),
            "rows_at_test_boundary": int((times == cut_test).sum()),
        },
        "leakage": _leakage(train, test, times[positions], num_items),
    }
    return Split("global_time", train, validation, test, report)


def _window(
    sequences: Sequences, begin: np.ndarray, end: np.ndarray, target: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Targets among the places begin[u] .. end[u] - 1 of each row that have a history.

    Returns:
        users and flat positions (M,) of the targets; how many users act in the window but have no history there.
    """
    first = np.maximum(begin, 1)
    users = np.flatnonzero(end > first)
    skipped = int((end > begin).sum()) - len(users)
    starts = sequences.offsets[:-1]
    if target == "last":
        return users, starts[users] + end[users] - 1, skipped
    if target == "first":
        return users, starts[users] + first[users], skipped
    counts = (end - first)[users]
    return np.repeat(users, counts), ragged_positions(starts[users] + first[users], counts), skipped


def make_split(data: RecommendationData, protocol: str = "leave_one_out", **options: Any) -> Split:
    """Apply a protocol by name: "leave_one_out" or "global_time" (options: see `global_time`)."""
    if protocol == "leave_one_out":
        return leave_one_out(data, **options)
    if protocol == "global_time":
        return global_time(data, **options)
    raise ValueError(f"protocol={protocol!r}: use 'leave_one_out' or 'global_time'")
