"""Preference pairs from interactions: what a user chose next, against items that he did not.

`next_items`, `feedback_rows` or `Feedback.positives` say what was chosen after which history, a sampler of `negatives.py`
gives the rejected items, `make_pairs` puts them together, `pair_datasets.py` writes them as TRL datasets. S-DPO's pairs
(arXiv 2406.09215); feedback tiers as in Align3GR (arXiv 2511.11255).

Shape legend: M pairs, K rejected items of a pair, U users, N items, n interactions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hf_genrec.alignment.negatives import NegativeSampler
from hf_genrec.data.interactions import RecommendationData
from hf_genrec.data.sequences import Sequences, offsets_from_lengths, ragged_positions
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import TrainingError


def next_items(sequences: Sequences, *, targets: Literal["last", "all"] = "all", min_history: int = 1) -> EvaluationSet:
    """What each row chose next: its last item only, or every item that has a history.

    Args:
        sequences: training rows, one per user.
        targets: "all" gives one row per item behind the first `min_history`.
        min_history: least items before a target.

    Raises:
        TrainingError: nothing has a history of that length.

    Example:
        >>> rows = next_items(Sequences.from_rows([[3, 1, 2], [5]]))
        >>> [row.tolist() for row in rows.histories], rows.targets.tolist(), rows.users.tolist()
        ([[3], [3, 1]], [1, 2], [0, 0])
    """
    if targets not in ("last", "all") or min_history < 1:
        raise TrainingError(f"targets={targets!r}, min_history={min_history}: use 'last' or 'all', and at least 1.")
    lengths = sequences.lengths
    counts = np.maximum(lengths - min_history, 0)
    if targets == "last":
        counts = np.minimum(counts, 1)
    users = np.repeat(np.arange(len(sequences)), counts)
    positions = ragged_positions(sequences.offsets[1:] - counts, counts)
    if not len(users):
        raise TrainingError(
            f"no row has more than min_history={min_history} items: bring longer histories or lower it."
        )
    starts = sequences.offsets[:-1][users]
    return EvaluationSet(users, sequences.select(starts, positions - starts), sequences.items[positions])


@dataclass(frozen=True, eq=False)
class Feedback:
    """Interactions with a value: ratings, dwell times, or explicit likes and dislikes as 1 and 0.

    Args:
        sequences: U rows of item indices, oldest first.
        values: (n,) float, aligned to `sequences.items`.

    Raises:
        TrainingError: another number of values, or one that is no number (row named).
    """

    sequences: Sequences
    values: np.ndarray

    def __post_init__(self) -> None:
        values = np.asarray(self.values, np.float64)
        object.__setattr__(self, "values", values)
        if values.shape != self.sequences.items.shape:
            raise TrainingError(f"{len(values)} values for {self.sequences.num_items} interactions: give one per item.")
        if np.isnan(values).any():
            place = int(np.isnan(values).argmax())
            raise TrainingError(
                f"row {int(self.sequences.row_index()[place])}: item {int(self.sequences.items[place])} has no value "
                "(NaN); leave such interactions out."
            )

    @classmethod
    def from_table(
        cls,
        users: Sequence[str],
        items: Sequence[str],
        values: Sequence[float],
        timestamps: Sequence[int] | None,
        *,
        user_ids: Sequence[str],
        item_ids: Sequence[str],
    ) -> Feedback:
        """From parallel columns (n,) of any log, in the indices of a catalogue; unknown users and items are left out.

        Rows are ordered by (user, time, input order). Disliked interactions that `load_data(min_rating=...)` dropped
        come back this way.

        Raises:
            TrainingError: columns of different lengths, or nothing that is known.
        """
        columns = [users, items, values, *([] if timestamps is None else [timestamps])]
        if len({len(column) for column in columns}) > 1:
            raise TrainingError(f"columns have {[len(column) for column in columns]} rows: give parallel columns.")
        user_rows = {user: row for row, user in enumerate(user_ids)}
        item_rows = {item: row for row, item in enumerate(item_ids)}
        user_n = np.array([user_rows.get(str(user), -1) for user in users], np.int64)
        item_n = np.array([item_rows.get(str(item), -1) for item in items], np.int64)
        known = np.flatnonzero((user_n >= 0) & (item_n >= 0))
        if not len(known):
            raise TrainingError(
                "no interaction names a user and an item of this catalogue; pass its user_ids, item_ids."
            )
        time_n = None if timestamps is None else np.asarray(timestamps, np.int64)
        keys = (user_n[known],) if time_n is None else (time_n[known], user_n[known])
        order = known[np.lexsort(keys)]
        lengths = np.bincount(user_n[order], minlength=len(user_ids))
        times = None if time_n is None else time_n[order]
        sequences = Sequences(offsets_from_lengths(lengths), item_n[order], times)
        return cls(sequences, np.asarray(values, np.float64)[order])

    @classmethod
    def from_data(cls, data: RecommendationData, column: str, train: Sequences) -> Feedback:
        """What a column of the data says about the training interactions; those without a value are left out.

        Args:
            data: loaded with the column (`load_data(extra_columns=...)`).
            train: U rows, each the beginning of a row of the data (`split.train`).

        Raises:
            TrainingError: no such column, or one that holds no numbers.
        """
        values_n = training_values(data, column, train)
        return cls(train, np.nan_to_num(values_n))._where(~np.isnan(values_n))

    def _where(self, keep_n: np.ndarray) -> Feedback:
        rows = self.sequences.row_index()[keep_n]
        times = self.sequences.timestamps
        kept = Sequences(
            offsets_from_lengths(np.bincount(rows, minlength=len(self.sequences))),
            self.sequences.items[keep_n],
            None if times is None else times[keep_n],
        )
        return Feedback(kept, self.values[keep_n])

    def before_held_out(self, whole: Sequences, train: Sequences) -> Feedback:
        """Only what happened before the first held-out interaction of each user, so that no pair knows the test.

        Args:
            whole: U rows of the data with times (`data.sequences`).
            train: U rows, each the beginning of a row of `whole` (`split.train`).

        Raises:
            TrainingError: no times, or other rows.
        """
        if whole.timestamps is None or self.sequences.timestamps is None:
            raise TrainingError("what lies before the held-out interactions needs timestamps; load the data with them.")
        if not len(whole) == len(train) == len(self.sequences):
            raise TrainingError(
                f"{len(self.sequences)} rows of feedback, {len(whole)} of data, {len(train)} of training."
            )
        held_out = train.lengths < whole.lengths
        limit_U = np.full(len(whole), np.iinfo(np.int64).max)
        limit_U[held_out] = whole.timestamps[(whole.offsets[:-1] + train.lengths)[held_out]]
        return self._where(self.sequences.timestamps < limit_U[self.sequences.row_index()])

    def tier(self, at_least: float = -np.inf, below: float = np.inf) -> Sequences:
        """Items with `at_least <= value < below`, U rows: negatives for FeedbackNegatives."""
        return self._where((self.values >= at_least) & (self.values < below)).sequences

    def positives(
        self, at_least: float, *, targets: Literal["last", "all"] = "all", min_history: int = 1
    ) -> EvaluationSet:
        """Rows whose chosen item has a value of `at_least`; histories hold such items only.

        Raises:
            TrainingError: no user has enough of them.
        """
        return next_items(self.tier(at_least), targets=targets, min_history=min_history)


def training_values(data: RecommendationData, column: str, train: Sequences) -> np.ndarray:
    """A column of the data for the interactions of `train`: (n,) float64, NaN where there is none.

    Raises:
        TrainingError: no such column, or one that holds no numbers.
    """
    if column not in data.extra:
        there = ", ".join(data.extra) or "none"
        raise TrainingError(
            f"feedback: {data.name} has no column {column!r} beside its interactions (kept columns: {there}); name it in "
            "extra_columns (`data: {extra_columns: [...]}` of a recipe) and check that the log has it."
        )
    values = np.asarray(data.extra[column])
    if values.dtype.kind not in "fiub" or not np.isfinite(values.astype(np.float64)).any():
        raise TrainingError(
            f"feedback: column {column!r} of {data.name} holds no numbers; name a rating or dwell time."
        )
    return values.astype(np.float64)[ragged_positions(data.sequences.offsets[:-1], train.lengths)]


def feedback_rows(
    data: RecommendationData,
    split: Split,
    *,
    column: str = "rating",
    liked: float = 4.0,
    disliked: float | None = None,
    targets: Literal["last", "all"] = "all",
) -> tuple[EvaluationSet, EvaluationSet, Sequences]:
    """What users liked, and what they did not, by a column of the data (ratings, dwell times, 1 and 0).

    Args:
        column: name in `data.extra`.
        liked: chosen items have a value of at least so much; histories hold such items only.
        disliked: rejected items have a value below; default `liked`.
        targets: as for `next_items`.

    Returns:
        Training rows, validation rows (those whose target was liked; maybe none), and the rejected items of every user in
        the training part: (U rows), for FeedbackNegatives.

    Raises:
        TrainingError: no such column, or nothing that is liked or disliked.
    """
    feedback = Feedback.from_data(data, column, split.train)
    rejected = feedback.tier(below=liked if disliked is None else disliked)
    kept = feedback.tier(liked)
    for name, bound, found in (("liked", liked, kept), ("disliked", disliked, rejected)):
        if not found.num_items:
            values = feedback.values
            raise TrainingError(
                f"feedback: {name}={bound}, but column {column!r} goes from {values.min():g} to {values.max():g}: no training "
                "interaction counts."
            )
    held_out = split.validation
    values_M = np.asarray(data.extra[column], np.float64)[
        data.sequences.offsets[held_out.users] + held_out.histories.lengths
    ]
    good = (values_M >= liked) & (kept.lengths[held_out.users] > 0)
    users = held_out.users[good]
    validation = EvaluationSet(users, kept.take(users), held_out.targets[good])
    return next_items(kept, targets=targets), validation, rejected


@dataclass(frozen=True, eq=False)
class PreferencePairs:
    """M preferences between items.

    Args:
        histories: M rows of item indices, oldest first, none empty.
        chosen: (M,) item index.
        rejected: (M, K) item indices, -1 behind the last of a row.
        users: (M,) row of each user, or None.
        left_out: rows that had no rejected item at all.

    Raises:
        TrainingError: an empty history, no rejected item, one named twice, or the chosen one among them (row named).
    """

    histories: Sequences
    chosen: np.ndarray
    rejected: np.ndarray
    users: np.ndarray | None = None
    left_out: int = 0

    def __post_init__(self) -> None:
        chosen, rejected = np.asarray(self.chosen, np.int64), np.asarray(self.rejected, np.int64)
        object.__setattr__(self, "chosen", chosen)
        object.__setattr__(self, "rejected", rejected)
        if rejected.ndim != 2 or not len(self.histories) == len(chosen) == len(rejected):
            raise TrainingError(
                f"{len(self.histories)} histories, {len(chosen)} chosen items and rejected items of shape "
                f"{rejected.shape}: give M, M and (M, K)."
            )
        ordered = np.sort(rejected, axis=1)
        gap = (rejected[:, :-1] < 0) & (rejected[:, 1:] >= 0)
        for wrong, what in (
            (self.histories.lengths == 0, "the history is empty; leave the row out"),
            (chosen < 0, "there is no chosen item"),
            ((rejected < 0).all(axis=1), "there is no rejected item; leave the row out or ask for more negatives"),
            (gap.any(axis=1), "-1 stands before a rejected item; move it to the end"),
            ((rejected == chosen[:, None]).any(axis=1), "the chosen item is among the rejected; remove it there"),
            (((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1), "a rejected item comes twice"),
        ):
            if wrong.any():
                row = int(wrong.argmax())
                raise TrainingError(
                    f"row {row}: {what} (chosen {int(chosen[row])}, rejected {rejected[row].tolist()})."
                )

    def __len__(self) -> int:
        return len(self.chosen)

    def one_by_one(self) -> PreferencePairs:
        """A row per rejected item, K = 1: for DPO."""
        row_n, column_n = np.nonzero(self.rejected >= 0)
        users = None if self.users is None else self.users[row_n]
        rejected = self.rejected[row_n, column_n][:, None]
        return replace(
            self, histories=self.histories.take(row_n), chosen=self.chosen[row_n], rejected=rejected, users=users
        )


def make_pairs(
    rows: EvaluationSet, sampler: NegativeSampler, num_negatives: int, *, allow_fewer: bool = False, round: int = 0
) -> PreferencePairs:
    """Add rejected items to what was chosen.

    Args:
        rows: histories and targets, from `next_items`, `Feedback.positives` or a split.
        sampler: of negatives.py.
        num_negatives: K.
        allow_fewer: keep rows with fewer than K and leave out those with none; False: both are errors.
        round: of the sampler's draws.

    Raises:
        TrainingError: too few items for a row (row named).
    """
    rejected_MK = sampler(rows.histories, rows.targets, num_negatives, users=rows.users, round=round)
    found_M = (rejected_MK >= 0).sum(axis=1)
    if not allow_fewer and (found_M < num_negatives).any():
        row = int((found_M < num_negatives).argmax())
        raise TrainingError(
            f"row {row}: only {found_M[row]} of {num_negatives} rejected items could be found ("
            f"{len(rows.histories[row])} items in the history, {sampler.num_items} in the catalogue); lower "
            "num_negatives, give the sampler a fallback, or set allow_fewer=True."
        )
    keep = np.flatnonzero(found_M)
    if not len(keep):
        raise TrainingError("no row has a rejected item; give the sampler a fallback, or take other negatives.")
    kept = rows.take(keep)
    return PreferencePairs(
        kept.histories, kept.targets, rejected_MK[keep], kept.users, left_out=len(found_M) - len(keep)
    )
