"""Which nodes of a trie still lead to an item that this request may return (seen items out, allow-lists in).

The items under any node are a contiguous range of slots (trie.py), so a request needs only its own items as a sorted
list
of slots: counting list entries inside the range with two binary searches tells whether the node is alive, at every
level, for a few hundred bytes per user. No beam can walk into a dead end, and codes shared by several
items lose exactly the items that are excluded.

Shape legend: B requests, N items, S listed items of the longest request, X nodes or slots asked for per request.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .trie import ItemTrie


class ItemFilter:
    """Per-request item sets over one trie: either the items to leave out or the only items to keep.

    Args:
        trie: the catalogue.
        slots_BS: sorted slots of the listed items, padded with N (sorts last, lies in no node's range).
        keep_listed: True = an allow-list (only listed items), False = an exclusion list.
    """

    def __init__(self, trie: ItemTrie, slots_BS: torch.Tensor, keep_listed: bool):
        self.trie = trie
        self.slots_BS = slots_BS
        self.keep_listed = keep_listed

    @classmethod
    def from_rows(
        cls,
        trie: ItemTrie,
        excluded: Sequence[np.ndarray] | None = None,
        allowed: Sequence[np.ndarray] | None = None,
    ) -> ItemFilter | None:
        """Build from item indices per request. With both given, a request may return `allowed` minus `excluded`."""
        if allowed is not None:
            rows = [np.unique(np.asarray(row, dtype=np.int64)) for row in allowed]
            if excluded is not None:
                rows = [
                    np.setdiff1d(row, np.asarray(out, dtype=np.int64)) for row, out in zip(rows, excluded, strict=True)
                ]
            return cls._from_item_rows(trie, rows, keep_listed=True)
        if excluded is None or not any(len(row) for row in excluded):
            return None
        rows = [np.unique(np.asarray(row, dtype=np.int64)) for row in excluded]
        return cls._from_item_rows(trie, rows, keep_listed=False)

    @classmethod
    def from_mask(
        cls, trie: ItemTrie, allowed_BN: torch.Tensor, excluded: Sequence[np.ndarray] | None = None
    ) -> ItemFilter:
        """Build from a bool table of allowed items (B, N); lists whichever side is shorter."""
        table = allowed_BN.cpu().numpy().astype(bool)
        if excluded is not None:
            table = table.copy()
            for row, out in enumerate(excluded):
                table[row, np.asarray(out, dtype=np.int64)] = False
        keep_listed = bool(table.sum() * 2 <= table.size)
        listed = table if keep_listed else ~table
        return cls._from_item_rows(trie, [np.flatnonzero(row) for row in listed], keep_listed=keep_listed)

    @classmethod
    def _from_item_rows(cls, trie: ItemTrie, rows: Sequence[np.ndarray], keep_listed: bool) -> ItemFilter:
        longest = max(1, max((len(row) for row in rows), default=1))
        items = torch.full((len(rows), longest), -1, dtype=torch.long)
        for row, listed in enumerate(rows):
            items[row, : len(listed)] = torch.from_numpy(listed)
        items = items.to(trie.device)
        slots = torch.where(items >= 0, trie.item_slots[items.clamp(min=0)], trie.num_items)
        return cls(trie, slots.sort(dim=-1).values, keep_listed)

    def _count(self, start_BX: torch.Tensor, end_BX: torch.Tensor) -> torch.Tensor:
        """Listed items with slots in [start, end)."""
        below_end = torch.searchsorted(self.slots_BS, end_BX.contiguous())
        return below_end - torch.searchsorted(self.slots_BS, start_BX.contiguous())

    def count_alive(self, start_BX: torch.Tensor, end_BX: torch.Tensor) -> torch.Tensor:
        """Items with slots in [start, end) that may be returned: (B, X) int64."""
        listed = self._count(start_BX, end_BX)
        return listed if self.keep_listed else end_BX - start_BX - listed

    def alive(self, level: int, nodes_BX: torch.Tensor) -> torch.Tensor:
        """Does each node of a level lead to an item that may be returned? (B, ...) bool, first axis = request."""
        shape = nodes_BX.shape
        start, end = self.trie.slot_range(level, nodes_BX.reshape(shape[0], -1))
        return (self.count_alive(start, end) > 0).reshape(shape)

    def alive_slots(self, slots_BX: torch.Tensor) -> torch.Tensor:
        """May the item of each slot be returned? (B, ...) bool."""
        shape = slots_BX.shape
        slots = slots_BX.reshape(shape[0], -1)
        return (self.count_alive(slots, slots + 1) > 0).reshape(shape)

    def num_alive(self) -> torch.Tensor:
        """Items each request may return: (B,) int64."""
        listed = (self.slots_BS < self.trie.num_items).sum(-1)
        return listed if self.keep_listed else self.trie.num_items - listed

    def take(self, rows: torch.Tensor) -> ItemFilter:
        """The filter of some requests, in the given order (repeats allowed)."""
        return ItemFilter(self.trie, self.slots_BS[rows], self.keep_listed)
