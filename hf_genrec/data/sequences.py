"""Ragged rows of item indices (histories, training sequences) as two flat arrays.

Shapes: R rows, nnz items over all rows. Row r is `items[offsets[r]:offsets[r + 1]]`, oldest item first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def ragged_positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Flat positions of the ranges `starts[r] .. starts[r] + lengths[r]`, one after the other.

    Args:
        starts: (R,) first position of each range.
        lengths: (R,) length of each range, 0 allowed.

    Returns:
        (lengths.sum(),) int64.

    Example:
        >>> ragged_positions(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # position inside the whole = running number; shift each range so that it begins at its start
    return np.arange(total, dtype=np.int64) + np.repeat(np.asarray(starts, np.int64) - (ends - lengths), lengths)


def offsets_from_lengths(lengths: np.ndarray) -> np.ndarray:
    """(R,) lengths -> (R+1,) int64 offsets."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True, eq=False)
class Sequences:
    """Rows of item indices with optional times, stored flat.

    Args:
        offsets: (R+1,) int64, row r is `items[offsets[r]:offsets[r+1]]`.
        items: (nnz,) int32 item indices.
        timestamps: (nnz,) int64 unix seconds aligned to `items`, or None.

    Example:
        >>> rows = Sequences.from_rows([[3, 1, 2], [], [7, 7]])
        >>> len(rows), rows[0].tolist(), rows.lengths.tolist()
        (3, [3, 1, 2], [3, 0, 2])
        >>> [row.tolist() for row in rows.last(1)]
        [[2], [], [7]]
    """

    offsets: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", np.ascontiguousarray(self.offsets, np.int64))
        object.__setattr__(self, "items", np.ascontiguousarray(self.items, np.int32))
        if self.timestamps is not None:
            object.__setattr__(self, "timestamps", np.ascontiguousarray(self.timestamps, np.int64))
            if len(self.timestamps) != len(self.items):
                raise ValueError(f"{len(self.timestamps)} timestamps for {len(self.items)} items: pass one per item")
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.items):
            raise ValueError(f"offsets must run from 0 to {len(self.items)} (the number of items)")

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], timestamps: Sequence[Sequence[int]] | None = None) -> Sequences:
        """Build from a list of rows (lists or arrays of item indices)."""
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        flat = np.concatenate([np.asarray(row, np.int32) for row in rows]) if len(rows) else np.empty(0, np.int32)
        times = None
        if timestamps is not None:
            if [len(row) for row in timestamps] != lengths.tolist():
                raise ValueError("timestamps need the same row lengths as the items")
            times = np.concatenate([np.asarray(row, np.int64) for row in timestamps]) if len(rows) else np.empty(0)
        return cls(offsets_from_lengths(lengths), flat, times)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        row = int(row)
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, stop in itertools.pairwise(self.offsets.tolist()):
            yield self.items[start:stop]

    def __repr__(self) -> str:
        return f"Sequences(rows={len(self)}, items={len(self.items)}, timestamps={self.timestamps is not None})"

    @property
    def lengths(self) -> np.ndarray:
        """(R,) int64 items of each row."""
        return np.diff(self.offsets)

    @property
    def num_items(self) -> int:
        """Item occurrences over all rows (nnz), not the size of the catalogue."""
        return len(self.items)

    def row_index(self) -> np.ndarray:
        """(nnz,) int64: the row of each item."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def select(self, starts: np.ndarray, lengths: np.ndarray) -> Sequences:
        """Rows cut anywhere: row r of the result is `items[starts[r]:starts[r] + lengths[r]]` of the flat array."""
        positions = ragged_positions(starts, lengths)
        times = None if self.timestamps is None else self.timestamps[positions]
        return Sequences(offsets_from_lengths(lengths), self.items[positions], times)

    def take(self, rows: np.ndarray) -> Sequences:
        """The given rows, in the given order (repeats allowed)."""
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        rows = rows.astype(np.int64, copy=False)
        return self.select(self.offsets[:-1][rows], self.lengths[rows])

    def last(self, n: int) -> Sequences:
        """The newest n items of each row (all of a shorter row)."""
        keep = np.minimum(self.lengths, max(int(n), 0))
        return self.select(self.offsets[1:] - keep, keep)

    def truncate_tail(self, n: int) -> Sequences:
        """Each row without its newest n items; rows with n items or fewer become empty."""
        return self.select(self.offsets[:-1], np.maximum(self.lengths - max(int(n), 0), 0))
