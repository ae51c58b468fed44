"""Ragged rows against plain lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.data.sequences import Sequences, ragged_positions

ROWS = st.lists(st.lists(st.integers(0, 50), max_size=7), max_size=8)


def as_lists(sequences: Sequences) -> list[list[int]]:
    return [row.tolist() for row in sequences]


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, n=st.integers(0, 9), data=st.data())
def test_rows_behave_like_lists(rows, n, data):
    sequences = Sequences.from_rows(rows)
    assert as_lists(sequences) == rows
    assert [sequences[r].tolist() for r in range(len(sequences))] == rows
    assert sequences.lengths.tolist() == [len(row) for row in rows]
    assert as_lists(sequences.last(n)) == [row[-n:] if n else [] for row in rows]
    assert as_lists(sequences.truncate_tail(n)) == [row[: max(len(row) - n, 0)] for row in rows]
    assert sequences.row_index().tolist() == [r for r, row in enumerate(rows) for _ in row]
    if rows:
        picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10))
        assert as_lists(sequences.take(np.array(picked, np.int64))) == [rows[r] for r in picked]
        mask = np.array([len(row) > 2 for row in rows])
        assert as_lists(sequences.take(mask)) == [row for row in rows if len(row) > 2]


def test_timestamps_travel_with_their_items():
    sequences = Sequences.from_rows([[1, 2, 3], [4]], timestamps=[[10, 20, 30], [40]])
    assert sequences.last(2).timestamps.tolist() == [20, 30, 40]
    assert sequences.take(np.array([1, 0])).timestamps.tolist() == [40, 10, 20, 30]
    assert sequences.truncate_tail(1).timestamps.tolist() == [10, 20]


def test_types_and_views():
    sequences = Sequences(np.array([0, 2]), np.array([5, 6], np.int64))
    assert sequences.offsets.dtype == np.int64 and sequences.items.dtype == np.int32
    assert np.shares_memory(sequences[0], sequences.items)
    assert sequences[-1].tolist() == [5, 6]


def test_bad_arrays_are_refused():
    with pytest.raises(ValueError, match="offsets"):
        Sequences(np.array([0, 3]), np.array([1, 2]))
    with pytest.raises(ValueError, match="timestamps"):
        Sequences(np.array([0, 2]), np.array([1, 2]), np.array([1]))
    with pytest.raises(ValueError, match="row lengths"):
        Sequences.from_rows([[1, 2]], timestamps=[[1]])
    with pytest.raises(IndexError):
        Sequences.from_rows([[1]])[1]


def test_no_rows():
    sequences = Sequences.from_rows([])
    assert len(sequences) == 0 and as_lists(sequences.last(3)) == []
    assert ragged_positions(np.empty(0), np.empty(0, np.int64)).tolist() == []
