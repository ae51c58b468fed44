"""From a table of item codes to the tables of an ItemTrie: check, sort once, mark where each node begins.

Shape legend: N items, L levels, n_l nodes of level l (n_0 = 1, the root).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import IncompatibleComponentsError
from .trie_storage import code_dtype, index_dtype

_LARGEST_SIZE = 2**31 - 1  # codes are kept in 32 bits at most


class TrieTables(NamedTuple):
    """An unpacked trie.

    Attributes:
        offsets: L + 1 arrays; offsets[l] (n_l + 1,) says where the children of each node of level l begin, for l = L
            where the items of each leaf begin.
        codes: L arrays; codes[l] (n_{l+1},) is the code of each node of level l + 1. The codebook's size is the code of
            an end: the item was complete before this level.
        items: (N,) item indices leaf by leaf, ascending inside a leaf.
    """

    offsets: list[np.ndarray]
    codes: list[np.ndarray]
    items: np.ndarray


def as_code_table(codes_NL: Any) -> np.ndarray:
    """numpy, torch or nested lists as a 2-D array of integers.

    Raises:
        IncompatibleComponentsError: no items, no levels, or not integers.
    """
    if isinstance(codes_NL, torch.Tensor):
        codes_NL = codes_NL.detach().cpu().numpy()
    codes = np.asarray(codes_NL)
    if codes.ndim != 2 or 0 in codes.shape:
        raise IncompatibleComponentsError(
            f"item codes must be a non-empty table (items, levels), got shape {codes.shape}; give one row of codes "
            "per item."
        )
    if not np.issubdtype(codes.dtype, np.integer):
        raise IncompatibleComponentsError(f"item codes must be integers, got {codes.dtype}; cast them first.")
    return codes


def check_codes(codes_NL: np.ndarray, codebook_sizes: Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
    """The codebook sizes, and whether some code ends before the last level (-1 from there on).

    Raises:
        IncompatibleComponentsError: a code outside its codebook, a -1 before a code, a row of -1 only (row and level
            named), or sizes that do not fit the table.
    """
    largest = codes_NL.max(axis=0)
    if codebook_sizes is None:
        sizes = tuple(max(1, int(code) + 1) for code in largest)
    else:
        sizes = tuple(int(size) for size in codebook_sizes)
    if len(sizes) != codes_NL.shape[1]:
        raise IncompatibleComponentsError(
            f"{len(sizes)} codebook sizes for codes of {codes_NL.shape[1]} levels; give one size per level."
        )
    for level, size in enumerate(sizes):
        if not 1 <= size <= _LARGEST_SIZE:
            raise IncompatibleComponentsError(
                f"level {level}: a codebook of {size} codes; between 1 and {_LARGEST_SIZE} are possible."
            )
    smallest = int(codes_NL.min())
    if smallest < -1 or (largest >= np.asarray(sizes)).any():
        outside = (codes_NL < -1) | (codes_NL >= np.asarray(sizes))
        row, level = (int(i) for i in np.argwhere(outside)[0])
        raise IncompatibleComponentsError(
            f"item row {row}, level {level}: code {int(codes_NL[row, level])} is outside its codebook of "
            f"{sizes[level]} codes; re-encode the catalogue or pass the right codebook_sizes."
        )
    if smallest == -1:
        absent = codes_NL < 0
        if absent[:, 0].any():
            row = int(absent[:, 0].argmax())
            raise IncompatibleComponentsError(
                f"item row {row}, level 0: the code begins with -1; every item needs at least one code."
            )
        resumed = absent[:, :-1] & ~absent[:, 1:]
        if resumed.any():
            row, level = (int(i) for i in np.argwhere(resumed)[0])
            raise IncompatibleComponentsError(
                f"item row {row}, level {level}: -1 stands before a code; -1 may only fill up the end of a row."
            )
    return sizes, smallest == -1


class SortedRows:
    """The rows of a code table in lexicographic order, equal rows in item order.

    Attributes:
        order: (N,) int64, the row that comes first, second, ...
    """

    order: np.ndarray

    def __init__(self, codes_NL: np.ndarray, sizes: Sequence[int], has_ends: bool):
        self._codes, self._sizes, self._has_ends = codes_NL, sizes, has_ends
        # A 64 bit key holds the codes of as many levels as fit and, lowest, the row: keys are distinct, so any sort
        # keeps equal codes in item order. What does not fit in one key is sorted in several passes, last levels first.
        count = len(codes_NL)
        self._bits = [size.bit_length() if has_ends else (size - 1).bit_length() for size in sizes]
        self._row_bits = (count - 1).bit_length()
        last = len(sizes)
        passes = 0
        while last > 0:
            first = last - 1
            while first > 0 and sum(self._bits[first - 1 : last]) + self._row_bits <= 64:
                first -= 1
            key = np.zeros(count, dtype=np.uint64)
            for level in range(first, last):
                key <<= np.uint64(self._bits[level])
                key |= self._column(level).astype(np.uint64)
            if passes:
                key = key[self.order]
            key <<= np.uint64(self._row_bits)
            key |= np.arange(count, dtype=np.uint64)
            key.sort()
            place = (key & np.uint64((1 << self._row_bits) - 1)).astype(np.int64)
            self.order = self.order[place] if passes else place
            self._key, self._levels_in_key = key, last  # the first `last` levels can be read from the key in order
            last, passes = first, passes + 1

    def _column(self, level: int) -> np.ndarray:
        column = self._codes[:, level]
        return np.where(column < 0, self._sizes[level], column.astype(np.int64)) if self._has_ends else column

    def columns(self) -> Iterator[np.ndarray]:
        """(N,) the sorted codes of each level, from the first on; an end as the codebook's size."""
        shift = self._row_bits + sum(self._bits[: self._levels_in_key])
        for level, bits in enumerate(self._bits):
            dtype = code_dtype(self._sizes[level] - (not self._has_ends))
            if level < self._levels_in_key:
                shift -= bits
                yield (self._key >> np.uint64(shift) & np.uint64((1 << bits) - 1)).astype(dtype)
            else:
                yield self._column(level).astype(dtype)[self.order]


def build_tables(codes_NL: np.ndarray, sizes: Sequence[int], has_ends: bool) -> TrieTables:
    """Checked codes -> the tables of their trie. One sort, then a few passes per level."""
    count = len(codes_NL)
    rows = SortedRows(codes_NL, sizes, has_ends)
    opens_node = np.zeros(count, dtype=bool)  # does this sorted row begin a new node of the current level?
    opens_node[0] = True
    first_rows = np.zeros(1, dtype=np.int64)  # sorted row at which each node of the level above begins
    dtype = index_dtype(count)
    offsets, codes = [], []
    for column in rows.columns():
        opens_node[1:] |= column[1:] != column[:-1]
        begun = np.cumsum(opens_node, dtype=dtype)
        offsets.append(np.append(begun[first_rows] - 1, begun[-1]))  # a node's first row also begins its first child
        first_rows = np.flatnonzero(opens_node)
        codes.append(column[first_rows])
    offsets.append(np.append(first_rows, count).astype(dtype))
    return TrieTables(offsets, codes, rows.order)
