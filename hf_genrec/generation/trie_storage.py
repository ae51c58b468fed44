"""The compact tables an ItemTrie is made of: ascending offsets, child codes, and the item permutation.

Three facts about catalogues keep them small. Below the first levels a node has one or two children, so offsets grow by
a few hundred per block of nodes and a difference of 8 bits is enough; a level where every node has one child needs no
offsets at all; and an item number of a catalogue of a million needs 20 bits, not 32.

Every table answers CPU questions with numpy (a small numpy call costs a third of a torch call) and questions of other
devices with torch; both give the same int64 numbers.

Shape legend: n nodes, m children of all of them, N items, X whatever is asked for, W children of the widest node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_UNSIGNED = {torch.int16: np.uint16}  # torch has few operators for unsigned 16 bits: kept as int16, read as uint16
_DENSE = 256  # ranges up to this many codes are compared whole: cheaper than the steps of a binary search


def index_dtype(largest: int) -> np.dtype:
    return np.dtype(np.int32 if largest < 2**31 else np.int64)


def code_dtype(largest: int) -> np.dtype:
    """Smallest dtype that both numpy and torch handle well for codes 0..largest."""
    if largest < 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.int16) if largest < 2**15 else index_dtype(largest)


def _view(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.numpy()
    return array.view(_UNSIGNED[tensor.dtype]) if tensor.dtype in _UNSIGNED else array


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)


class Offsets:
    """n + 1 numbers from 0 to m: the children of node i are offset[i] to offset[i + 1]. Every node has a child.

    Three layouts, the smallest that fits: nothing (one child each, offset[i] = i); plain; or one full number (`base`)
    per block of 2**shift nodes and a small difference (`delta`) per node.
    """

    def __init__(
        self, num_nodes: int, total: int, widest: int, base: torch.Tensor | None, delta: torch.Tensor | None, shift: int
    ) -> None:
        self.num_nodes, self.total, self.widest, self.shift = num_nodes, total, widest, shift
        self.base, self.delta = base, delta
        on_cpu = base is not None and base.device.type == "cpu"
        self._base = base.numpy() if on_cpu and base is not None else None
        self._delta = _view(delta) if on_cpu and delta is not None else None

    @classmethod
    def pack(cls, offsets: np.ndarray) -> Offsets:
        """From n + 1 ascending numbers."""
        num_nodes, total = len(offsets) - 1, int(offsets[-1])
        if num_nodes == total:
            return cls(num_nodes, total, 1, None, None, 0)
        widest = int((offsets[1:] - offsets[:-1]).max())
        plain = index_dtype(total)
        layouts = [(len(offsets) * plain.itemsize, 0, plain)]
        for dtype in (np.dtype(np.uint8), np.dtype(np.uint16)):
            for shift in range(2, 8):
                blocks = -(-len(offsets) >> shift)
                layouts.append((blocks * ((dtype.itemsize << shift) + plain.itemsize), shift, dtype))
        for _, shift, dtype in sorted(layouts, key=lambda layout: layout[:2]):
            if shift == 0:
                return cls(num_nodes, total, widest, torch.from_numpy(offsets.astype(plain)), None, 0)
            base = offsets[:: 1 << shift]
            last = np.append(offsets[(1 << shift) - 1 :: 1 << shift], total)[: len(base)]
            if (last - base).max() <= np.iinfo(dtype).max:
                break
        delta = np.empty((len(base), 1 << shift), dtype)
        whole = len(offsets) >> shift  # complete blocks
        delta[:whole] = offsets[: whole << shift].reshape(whole, 1 << shift) - base[:whole, None]
        if whole < len(base):  # the last block is filled up with the end, which keeps it ascending
            rest = offsets[whole << shift :] - base[whole]
            delta[whole] = rest[-1]
            delta[whole, : len(rest)] = rest
        return cls(num_nodes, total, widest, torch.from_numpy(base.astype(plain)), _tensor(delta.reshape(-1)), shift)

    def unpack(self) -> np.ndarray:
        """All n + 1 numbers, int32 or int64."""
        if self._base is None:
            return np.arange(self.num_nodes + 1, dtype=index_dtype(self.total))
        if self._delta is None:
            return self._base
        return (self._delta.reshape(-1, 1 << self.shift) + self._base[:, None]).reshape(-1)[: self.num_nodes + 1]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.base is not None:
            yield "base", self.base
        if self.delta is not None:
            yield "delta", self.delta

    def to(self, device: torch.device) -> Offsets:
        base, delta = (None if tensor is None else tensor.to(device) for tensor in (self.base, self.delta))
        return Offsets(self.num_nodes, self.total, self.widest, base, delta, self.shift)

    def range(self, nodes_X: Any) -> tuple[Any, Any]:
        """First and past-the-last child (int64) of nodes of any shape; an empty range for node -1.

        A numpy array is answered on the CPU with numpy, a tensor with torch.
        """
        if not isinstance(nodes_X, np.ndarray):
            known = nodes_X.clamp(min=0)
            start, end = self.at(known), self.at(known + 1)
            return start, torch.where(nodes_X < 0, start, end)
        if self._base is None:
            return np.maximum(nodes_X, 0), nodes_X + 1
        start, end = self.at(nodes_X), self.at(nodes_X + 1)
        # index -1 reads the last number, so that node -1 starts at m and ends at 0
        return start, np.maximum(start, end)

    def at(self, index_X: Any) -> Any:
        """The offsets (int64) with numbers 0..n of a numpy array (CPU) or a tensor of any shape."""
        if self.base is None:
            return index_X
        if isinstance(index_X, np.ndarray):
            assert self._base is not None
            if self._delta is None:
                return self._base.take(index_X).astype(np.int64)
            start = self._base.take(index_X >> self.shift).astype(np.int64)
            start += self._delta.take(index_X)
            return start
        if self.delta is None:
            return self.base[index_X].long()
        delta = self.delta[index_X].long()
        return self.base[index_X >> self.shift].long() + (delta & 0xFFFF if self.delta.dtype == torch.int16 else delta)

    def parents(self, children_X: np.ndarray) -> np.ndarray:
        """The node of each child 0..m-1, (X,) int64. CPU only."""
        if self._base is None:
            return children_X
        block = self._base.searchsorted(children_X, side="right") - 1
        if self._delta is None:
            return block
        rows = self._delta.reshape(-1, 1 << self.shift)[block]
        inside = (children_X - self._base[block]).clip(max=np.iinfo(rows.dtype).max).astype(rows.dtype)
        # node before the first offset beyond the child; if there is none (0: the first offset never is), the last
        beyond = (rows > inside[:, None]).argmax(axis=1)
        return (block << self.shift) + ((beyond - 1) & ((1 << self.shift) - 1))


class ChildCodes:
    """The codes of all nodes of a level, ascending inside a parent, padded so that any window of W can be read."""

    def __init__(self, padded: torch.Tensor, num_children: int, widest: int, has_end: bool) -> None:
        self.padded, self.num_children, self.widest, self.has_end = padded, num_children, widest, has_end
        self._padded = padded.numpy() if padded.device.type == "cpu" else None

    @classmethod
    def pack(cls, codes: np.ndarray, size: int, widest: int) -> ChildCodes:
        """From the code of every node; `size` is the code of an end."""
        has_end = bool((codes == size).any())
        padded = np.zeros(len(codes) + widest, dtype=code_dtype(size if has_end else size - 1))
        padded[: len(codes)] = codes
        return cls(torch.from_numpy(padded), len(codes), widest, has_end)

    @property
    def codes(self) -> torch.Tensor:
        return self.padded[: self.num_children]

    def unpack(self) -> np.ndarray:
        return self.padded.numpy()[: self.num_children]

    def to(self, device: torch.device) -> ChildCodes:
        return ChildCodes(self.padded.to(device), self.num_children, self.widest, self.has_end)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "padded", self.padded

    def windows(self, start_X: np.ndarray, width: int) -> np.ndarray:
        """The `width` <= W codes from each start on: (X, width), copied row by row."""
        table = self._padded
        assert table is not None
        rows = np.ndarray((len(table) - width + 1, width), table.dtype, table, 0, (table.itemsize, table.itemsize))
        return rows[start_X]

    def find_all(self, codes_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`find` in the whole table, which must be the children of one node."""
        assert self._padded is not None
        codes, known = self._cast(codes_X)
        place = self._padded[: self.num_children].searchsorted(codes)
        return place, known & (place < self.num_children) & (self._padded.take(place) == codes)

    def find(self, start_X: np.ndarray, end_X: np.ndarray, codes_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each code is among the codes of its range: position (X,) int64, and whether it is there at all.

        Binary search while ranges are wide, then the rest is compared at once.
        """
        table = self._padded
        assert table is not None
        low, high = start_X, end_X
        codes, known = self._cast(codes_X)
        width = int((high - low).max()) if low.size else 0
        while width > _DENSE:
            middle = (low + high) >> 1
            right = (low < high) & (table.take(middle) < codes)
            low, high = np.where(right, middle + 1, low), np.where(right, high, np.maximum(low, middle))
            width = int((high - low).max())
        if low is not start_X:
            width += 1  # a code may also stand at `high` itself
        if width > 1:
            # the first equal code in the window is the one in the range, if there is one in the range
            low = low + (self.windows(low, width) == codes[..., None]).argmax(axis=-1)
        return low, known & (low < end_X) & (table.take(low) == codes)

    def _cast(self, codes_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes in the table's type, and whether they fit into it."""
        assert self._padded is not None
        codes = codes_X.astype(self._padded.dtype)
        return codes, codes == codes_X


class ItemOrder:
    """The items leaf by leaf: slot -> item, and by search item -> slot.

    Up to 2**24 items a number is split into 16 low bits and 4 or 8 high bits. The way back is not a second permutation
    but 16 bits per item, the block of slots the item lies in; the low bits of that block are then compared. It is built
    at the first question.
    """

    def __init__(self, num_items: int, low: torch.Tensor, high: torch.Tensor | None) -> None:
        self.num_items, self.low, self.high = num_items, low, high
        on_cpu = low.device.type == "cpu"
        self._low = _view(low) if on_cpu else None
        self._high = high.numpy() if on_cpu and high is not None else None
        self.blocks: torch.Tensor | None = None

    @staticmethod
    def _block_shift(num_items: int) -> int:
        """Slots per block: as few as leave 16 bits for the block's number. Exact (1) when numbers are not split."""
        return max(0, (num_items - 1).bit_length() - 16) if num_items <= 2**24 else 0

    @classmethod
    def pack(cls, items: np.ndarray) -> ItemOrder:
        """From the item of every slot."""
        count = len(items)
        if count > 2**24:
            return cls(count, torch.from_numpy(items.astype(index_dtype(count))), None)
        block = 1 << cls._block_shift(count)
        # filled up to whole blocks with ones in all bits: no item, because a full last block needs no filling
        filled = np.full(-(-count // block) * block, -1, dtype=np.int32)
        filled[:count] = items
        low = filled.astype(np.uint16)
        if count <= 2**16:
            return cls(count, _tensor(low), None)
        high = (filled >> 16).astype(np.uint8)
        if count <= 2**20:
            pairs = np.append(high, np.zeros(len(high) % 2, np.uint8)).reshape(-1, 2) & 15
            return cls(count, _tensor(low), torch.from_numpy(pairs[:, 0] | pairs[:, 1] << 4))
        return cls(count, _tensor(low), torch.from_numpy(high))

    def unpack(self) -> np.ndarray:
        """The item of every slot, int32 or int64."""
        low = _view(self.low)
        if self.low.dtype != torch.int16:
            return low
        items = low[: self.num_items].astype(np.int32)
        if self.high is not None:
            high = self.high.numpy()
            if self.num_items <= 2**20:
                pairs = np.empty((len(high), 2), np.uint8)
                np.bitwise_and(high, 15, out=pairs[:, 0])
                np.right_shift(high, 4, out=pairs[:, 1])
                high = pairs.reshape(-1)
            items |= high[: self.num_items].astype(np.int32) << 16
        return items

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "low", self.low
        if self.high is not None:
            yield "high", self.high

    def to(self, device: torch.device) -> ItemOrder:
        return ItemOrder(self.num_items, self.low.to(device), None if self.high is None else self.high.to(device))

    def take(self, slots_X: Any) -> Any:
        """Item (int64) of each slot 0..N-1 of a numpy array (CPU) or a tensor of any shape."""
        on_cpu = isinstance(slots_X, np.ndarray)
        low = self._low.take(slots_X).astype(np.int64) if on_cpu else self.low[slots_X].long()  # type: ignore[union-attr]
        if self.low.dtype != torch.int16:
            return low
        if not on_cpu:
            low = low & 0xFFFF
        if self.high is None:
            return low
        packed = self.num_items <= 2**20
        where = slots_X >> 1 if packed else slots_X
        high = self._high.take(where).astype(np.int64) if on_cpu else self.high[where].long()  # type: ignore[union-attr]
        if packed:
            high = (high >> ((slots_X & 1) << 2)) & 15
        return low + (high << 16)

    def find(self, items_X: np.ndarray) -> np.ndarray:
        """Slot of each item 0..N-1: (X,) int64. CPU only."""
        shift, block = self._block_shift(self.num_items), self._blocks()
        first = block.take(items_X).astype(np.int64) << shift
        if shift == 0:
            return first
        assert self._low is not None
        rows = self._low.reshape(-1, 1 << shift)[first >> shift]
        asked, place = np.nonzero(rows == items_X.astype(np.uint16)[:, None])
        slots = first[asked] + place
        right = self.take(slots) == items_X[asked]  # low bits may agree by chance
        first[asked[right]] = slots[right]
        return first

    def _blocks(self) -> np.ndarray:
        if self.blocks is None:
            dtype = np.dtype(np.uint16) if self.num_items <= 2**24 else index_dtype(self.num_items)
            blocks = np.empty(self.num_items, dtype)
            blocks[self.unpack()] = (np.arange(self.num_items) >> self._block_shift(self.num_items)).astype(dtype)
            self.blocks = _tensor(blocks)
        return _view(self.blocks)
