"""Both protocols on small logs whose answers are worked out by hand, and as properties on random ones."""

from __future__ import annotations

import numpy as np
import pytest

from hf_genrec.data.interactions import load_data
from hf_genrec.data.splits import global_time, leave_one_out, make_split
from hf_genrec.errors import InteractionTableError

LOG = [  # user, item, time
    ("u", "a", 1), ("u", "b", 2), ("u", "c", 3), ("u", "d", 4),
    ("v", "b", 5), ("v", "d", 9), ("v", "a", 9),
    ("w", "c", 10), ("w", "a", 11),
]  # fmt: skip


def load(rows, **options):
    columns = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*rows))))
    return load_data(columns, **({"min_user": 0, "min_item": 0} | options))


def as_lists(sequences):
    return [row.tolist() for row in sequences]


def test_leave_one_out_by_hand():
    data = load(LOG)
    a, b, c, d = range(4)
    split = leave_one_out(data)
    assert as_lists(split.train) == [[a, b], [b], [c, a]]  # w has two interactions: all of them are trained on
    assert split.validation.users.tolist() == split.test.users.tolist() == [0, 1]
    assert as_lists(split.validation.histories) == [[a, b], [b]] and split.validation.targets.tolist() == [c, d]
    assert as_lists(split.test.histories) == [[a, b, c], [b, d]] and split.test.targets.tolist() == [d, a]
    assert split.test.targets.dtype == np.int32 and split.test.users.dtype == np.int64
    assert split.report["users_not_evaluated"] == 1
    assert split.report["ties"] == {"test_targets_tied": 1, "validation_targets_tied": 1}  # v: d and a both at 9
    # u's target d (time 4) is trained on by nobody later; v's target a (time 9) is trained on by w at 11
    assert split.report["leakage"] == {"test_targets_trained_later": 1, "test_targets_before_end_of_training": 2}
    assert split.report["test"]["targets_never_in_training"] == 1  # d occurs in no training row
    assert split.train.timestamps.tolist() == [1, 2, 5, 10, 11]


def test_global_time_by_hand():
    data = load(LOG)
    a, b, c, d = range(4)
    split = global_time(data, validation_fraction=0.3, test_fraction=0.3)
    # 9 times: positions 3 (of 1 2 3 [4] 5 9 9 10 11) and 6 (9): the two rows at 9 stay together on the test side
    assert (split.report["validation_from"], split.report["test_from"]) == (4, 9)
    assert as_lists(split.train) == [[a, b, c], [], []]
    assert split.validation.users.tolist() == [0] and split.validation.targets.tolist() == [d]
    assert as_lists(split.validation.histories) == [[a, b, c]]
    assert split.report["validation"]["users_without_history"] == 1  # v begins at 5
    assert split.test.users.tolist() == [1, 2] and split.test.targets.tolist() == [a, a]
    assert as_lists(split.test.histories) == [[b, d], [c]]
    assert split.report["ties"]["rows_at_test_boundary"] == 2
    assert split.report["leakage"] == {"test_targets_trained_later": 0, "test_targets_before_end_of_training": 0}
    first = global_time(data, 0.3, 0.3, target="first").test
    assert first.targets.tolist() == [d, a] and as_lists(first.histories) == [[b], [c]]
    every = global_time(data, 0.3, 0.3, target="all").test
    assert every.users.tolist() == [1, 1, 2] and every.targets.tolist() == [d, a, a]
    assert as_lists(every.histories) == [[b], [b, d], [c]]


@pytest.mark.parametrize("target", ["last", "first", "all"])
def test_global_time_never_looks_ahead(target):
    random = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in random.integers(0, [30, 40, 500], (2000, 3))]
    data = load(rows)
    split = global_time(data, target=target)
    boundary = split.report["validation_from"], split.report["test_from"]
    assert split.train.timestamps.max() < boundary[0]
    total = 0
    for window, low, high in ((split.validation, *boundary), (split.test, boundary[1], np.inf)):
        for user, history, item in zip(window.users, window.histories, window.targets):
            row, times = data.sequences[user], data.sequences.timestamps[data.sequences.offsets[user] :]
            assert row[: len(history)].tolist() == history.tolist() and row[len(history)] == item
            assert low <= times[len(history)] < high
        total += len(window)
    if target == "all":  # all 30 users train, so every later interaction has a history
        assert total == data.sequences.num_items - split.train.num_items


def test_leave_one_out_covers_every_interaction_once():
    random = np.random.default_rng(1)
    data = load([(f"u{u}", f"i{i}", int(t)) for u, i, t in random.integers(0, [200, 20, 9], (900, 3))])
    split = leave_one_out(data)
    for user, history, item in zip(split.test.users, split.test.histories, split.test.targets):
        assert [*history.tolist(), item] == data.sequences[user].tolist()
    assert split.train.num_items + 2 * len(split.test) == data.sequences.num_items
    tied = sum(
        (lambda t: t[-1] == t[-2])(data.sequences.timestamps[start:stop])
        for start, stop in zip(data.sequences.offsets, data.sequences.offsets[1:])
        if stop - start >= 3
    )
    assert split.report["ties"]["test_targets_tied"] == tied > 0


def test_take_picks_evaluation_rows():
    split = leave_one_out(load(LOG))
    some = split.test.take(np.array([False, True]))
    assert some.users.tolist() == [1] and as_lists(some.histories) == [split.test.histories[1].tolist()]


def test_what_cannot_be_split():
    with pytest.raises(InteractionTableError, match="three interactions"):
        leave_one_out(load([("u", "a", 1), ("u", "b", 2)]))
    with pytest.raises(InteractionTableError, match="timestamps"):
        global_time(load([("u", "a", 1), ("u", "b", 2)], timestamp_column=None))
    with pytest.raises(InteractionTableError, match="training window"):
        global_time(load([("u", "a", 1), ("u", "b", 1), ("u", "c", 1)]))
    with pytest.raises(ValueError, match="fraction"):
        global_time(load(LOG), 0.6, 0.4)
    with pytest.raises(ValueError, match="protocol"):
        make_split(load(LOG), "random")
    with pytest.raises(ValueError, match="target"):
        make_split(load(LOG), "global_time", target="middle")


def test_without_timestamps_ties_and_leakage_are_unknown_not_zero():
    report = leave_one_out(load(LOG, timestamp_column=None)).report
    assert report["ties"] is None and report["leakage"] is None


def test_leakage_counts_only_what_was_trained_later():
    later = [("u", "x", 1), ("u", "y", 2), ("u", "a", 5), ("v", "a", 5), ("v", "y", 6), ("v", "z", 7)]
    assert (
        leave_one_out(load(later)).report["leakage"]["test_targets_trained_later"] == 0
    )  # v trains on a at 5, not later
    later[3] = ("v", "a", 6)
    assert leave_one_out(load(later)).report["leakage"]["test_targets_trained_later"] == 1
