"""k-core, order and id order against brute force."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.data import filtering
from hf_genrec.data.filtering import core_filter, natural_order, sort_by_user_and_time, stable_order


def brute_core(pairs, min_user, min_item):
    alive = [True] * len(pairs)
    changed = True
    while changed:
        changed = False
        for side, bound in ((0, min_user), (1, min_item)):
            counts: dict[int, int] = {}
            for keep, pair in zip(alive, pairs):
                counts[pair[side]] = counts.get(pair[side], 0) + keep
            for row, pair in enumerate(pairs):
                if alive[row] and counts[pair[side]] < bound:
                    alive[row], changed = False, True
    return alive


PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=60)


@pytest.mark.parametrize("full_scans", [0, 1, 12])
@settings(max_examples=120, deadline=None)
@given(pairs=PAIRS, min_user=st.integers(0, 5), min_item=st.integers(0, 5))
def test_core_filter_is_the_fixed_point(full_scans, pairs, min_user, min_item):
    users, items = np.array(pairs).T
    before = filtering.FULL_SCANS
    filtering.FULL_SCANS = full_scans  # 0: only the part that follows changes
    try:
        keep = core_filter(users, items, 8, 8, min_user=min_user, min_item=min_item)
    finally:
        filtering.FULL_SCANS = before
    assert keep.tolist() == brute_core(pairs, min_user, min_item)


def test_a_chain_that_collapses_end_by_end_takes_linear_time():
    n = 20_000  # user i has items i and i + 1: both ends fall, then their neighbours, ...
    users = np.repeat(np.arange(n), 2)
    items = users + np.tile([0, 1], n)
    start = time.perf_counter()
    keep = core_filter(users, items, n, n + 1, min_user=2, min_item=2)
    assert not keep.any()
    assert time.perf_counter() - start < 20  # a rescan of everything each round would take minutes


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3)), max_size=50), far=st.booleans())
def test_order_is_stable_by_user_then_time(rows, far):
    users = np.array([row[0] for row in rows], np.int32)
    times = np.array([row[1] for row in rows], np.int64) * (2**58 if far else 1)  # far: too wide to pack
    expected = sorted(range(len(rows)), key=lambda r: (users[r], times[r], r))
    assert sort_by_user_and_time(users, times).tolist() == expected
    assert stable_order(times).tolist() == np.argsort(times, kind="stable").tolist()
    assert sort_by_user_and_time(users, None).tolist() == sorted(range(len(rows)), key=lambda r: (users[r], r))


def test_natural_order():
    def ordered(ids):
        return [ids[i] for i in natural_order(pa.array(ids))]

    assert ordered(["10", "9", "2"]) == ["2", "9", "10"]
    assert ordered(["10", "9", "02"]) == ["02", "10", "9"]  # 02 is no number but a name
    assert ordered(["b", "10", "a"]) == ["10", "a", "b"]
