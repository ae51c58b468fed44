"""Which nodes of a trie still lead to an item that this request may return (seen items out, allow-lists in).

A request lists its items once; the listed slots are carried up the tree level by level. For an allow-list a level keeps
the nodes above a listed item, for an exclusion list the nodes all of whose children are dead. These lists are short
(never longer than the request's own), so that asking costs two binary searches per beam, whatever the catalogue's size:
no beam can walk into a dead end, and codes shared by several items lose exactly the items that are excluded.

Shape legend: B requests, K beams, W children, N items, S listed items of the longest request, X nodes or slots asked
for per request, E nodes of a level kept for all requests together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import RequestError
from .trie import ItemTrie


class _LevelNodes(NamedTuple):
    """The kept nodes of one level, ascending by (request, node).

    Attributes:
        node_keys_E: request * (n_l + 1) + node + 1.
        parent_keys_E: the same with the parent, a node of the level above; node -1 (key + 0) is nobody's parent.
        ranks_E: which child of its parent each node is.
    """

    node_keys_E: Any
    parent_keys_E: Any
    ranks_E: Any


class ItemFilter:
    """Per-request item sets over one trie: either the items to leave out or the only items to keep.

    Args:
        trie: the catalogue.
        slots_BS: sorted slots of the listed items, padded with N (sorts last, lies in no node's range).
        keep_listed: True = an allow-list (only listed items), False = an exclusion list.
    """

    def __init__(self, trie: ItemTrie, slots_BS: torch.Tensor, keep_listed: bool):
        self.trie = trie
        self.keep_listed = keep_listed
        self._listed_RS = slots_BS
        self._rows_B: torch.Tensor | None = None  # row of `_listed_RS` of each request, when they differ (`take`)
        self._levels: dict[int, _LevelNodes] = {}  # shared by the filters that `take` makes

    @property
    def slots_BS(self) -> torch.Tensor:
        """Sorted slots of the listed items of each request, padded with N."""
        return self._listed_RS if self._rows_B is None else self._listed_RS[self._rows_B]

    @classmethod
    def from_rows(
        cls,
        trie: ItemTrie,
        excluded: Sequence[Any] | None = None,
        allowed: Sequence[Any] | None = None,
    ) -> ItemFilter | None:
        """Build from item indices per request, in any order, repeats allowed. With both given, a request may return
        `allowed` minus `excluded`. Nothing excluded is no filter (None).

        Raises:
            RequestError: an index outside the catalogue (row named), or as many lists of one kind as not of the other.
        """
        if allowed is None:
            if excluded is None or not any(len(row) for row in excluded):
                return None
            return cls._from_keys(trie, _keys(trie, excluded), len(excluded), keep_listed=False)
        keys = _keys(trie, allowed)
        if excluded is not None:
            if len(excluded) != len(allowed):
                raise RequestError(f"{len(allowed)} allow-lists for {len(excluded)} lists of excluded items.")
            keys = np.setdiff1d(keys, _keys(trie, excluded), assume_unique=True)
        return cls._from_keys(trie, keys, len(allowed), keep_listed=True)

    @classmethod
    def from_mask(cls, trie: ItemTrie, allowed_BN: torch.Tensor, excluded: Sequence[Any] | None = None) -> ItemFilter:
        """Build from a bool table of allowed items (B, N); lists whichever side is shorter.

        Raises:
            RequestError: an index outside the catalogue (row named).
        """
        table = allowed_BN.cpu().numpy().astype(bool)
        if excluded is not None:
            table = table.copy()
            table.reshape(-1)[_keys(trie, excluded)] = False
        keep_listed = bool(np.count_nonzero(table) * 2 <= table.size)
        return cls._from_keys(trie, np.flatnonzero(table if keep_listed else ~table), len(table), keep_listed)

    @classmethod
    def _from_keys(cls, trie: ItemTrie, keys: np.ndarray, rows: int, keep_listed: bool) -> ItemFilter:
        """From distinct row * N + item."""
        row, item = np.divmod(keys, trie.num_items)
        slots = trie.to("cpu").slots_of(torch.from_numpy(item)).numpy()
        keys = row * trie.num_items + slots
        keys.sort()
        counts = np.bincount(row, minlength=rows)
        listed = np.full((rows, max(1, int(counts.max(initial=0)))), trie.num_items)
        listed[np.arange(listed.shape[1]) < counts[:, None]] = keys % trie.num_items
        return cls(trie, torch.from_numpy(listed).to(trie.device), keep_listed)

    # ---------------------------------------------------------------- ask

    def alive_children(self, level: int, nodes_BK: torch.Tensor, legal_BKW: torch.Tensor) -> torch.Tensor:
        """Which children of nodes of `level` lead to an item that may be returned.

        The same as `legal & alive(level + 1, children)`, in time that does not depend on W.

        Args:
            level: 0..L-1, the level of `nodes_BK`.
            nodes_BK: (B, ...) nodes, -1 = none; first axis = request.
            legal_BKW: (B, ..., W) the children to judge, in the order of `ItemTrie.expand`.

        Returns:
            (B, ..., W) bool; `legal_BKW` is not changed.
        """
        kept, asked = self._level(level + 1), self._node_keys(level, nodes_BK)
        if isinstance(asked, np.ndarray):
            flat = legal_BKW.numpy().reshape(-1)
            place = _places(kept, asked, legal_BKW.shape[-1])
            if self.keep_listed:
                alive = np.zeros(flat.shape, dtype=bool)
                alive[place] = flat[place]
            else:
                alive = flat.copy()
                alive[place] = False
            return torch.from_numpy(alive.reshape(legal_BKW.shape))
        flat_tensor = legal_BKW.reshape(-1)
        index = _places_tensor(kept, asked, legal_BKW.shape[-1])
        if self.keep_listed:
            found = torch.zeros_like(flat_tensor).index_copy_(0, index, flat_tensor[index])
        else:
            found = flat_tensor.index_fill(0, index, False)
        return found.view(legal_BKW.shape)

    def alive(self, level: int, nodes_BX: torch.Tensor) -> torch.Tensor:
        """Does each node of a level lead to an item that may be returned? (B, ...) bool, first axis = request; False
        for node -1.
        """
        keys, asked = self._level(level).node_keys_E, self._node_keys(level, nodes_BX)
        if not len(keys):
            return torch.zeros_like(nodes_BX, dtype=torch.bool) if self.keep_listed else nodes_BX >= 0
        if isinstance(asked, np.ndarray):
            listed = torch.from_numpy(keys.take(keys.searchsorted(asked), mode="clip") == asked)
        else:
            listed = keys[torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)] == asked
        listed = listed.view(nodes_BX.shape)
        return listed if self.keep_listed else ~listed & (nodes_BX >= 0)

    def alive_slots(self, slots_BX: torch.Tensor) -> torch.Tensor:
        """May the item of each slot be returned? (B, ...) bool."""
        shape = slots_BX.shape
        listed_BS, slots = self.slots_BS, slots_BX.reshape(shape[0], -1).contiguous()
        place = torch.searchsorted(listed_BS, slots).clamp_(max=listed_BS.shape[1] - 1)
        listed = (listed_BS.gather(1, place) == slots).view(shape)
        return listed if self.keep_listed else ~listed

    def count_alive(self, start_BX: torch.Tensor, end_BX: torch.Tensor) -> torch.Tensor:
        """Items with slots in [start, end) that may be returned: (B, X) int64."""
        slots_BS = self.slots_BS
        listed = torch.searchsorted(slots_BS, end_BX.contiguous())
        listed = listed - torch.searchsorted(slots_BS, start_BX.contiguous())
        return listed if self.keep_listed else end_BX - start_BX - listed

    def num_alive(self) -> torch.Tensor:
        """Items each request may return: (B,) int64."""
        listed = (self.slots_BS < self.trie.num_items).sum(-1)
        return listed if self.keep_listed else self.trie.num_items - listed

    def take(self, rows: torch.Tensor) -> ItemFilter:
        """The filter of some requests, in the given order (repeats allowed). Shares what was worked out so far."""
        taken = ItemFilter(self.trie, self._listed_RS, self.keep_listed)
        taken._rows_B = rows if self._rows_B is None else self._rows_B[rows]
        taken._levels = self._levels
        return taken

    # ---------------------------------------------------------------- levels

    def _node_keys(self, level: int, nodes_BX: torch.Tensor) -> Any:
        """request * (n_l + 1) + node + 1, flat; numpy on the CPU."""
        stride = self.trie.num_nodes(level) + 1
        if nodes_BX.device.type == "cpu":
            nodes = nodes_BX.numpy().reshape(nodes_BX.shape[0], -1)
            rows = np.arange(len(nodes)) if self._rows_B is None else self._rows_B.numpy()
            return (nodes + (rows * stride + 1)[:, None]).reshape(-1)
        rows_B = torch.arange(nodes_BX.shape[0], device=nodes_BX.device) if self._rows_B is None else self._rows_B
        return (nodes_BX.reshape(len(rows_B), -1) + (rows_B * stride + 1).unsqueeze(1)).reshape(-1)

    def _level(self, level: int) -> _LevelNodes:
        if level not in self._levels:
            self._carry_up()
        return self._levels[level]

    def _carry_up(self) -> None:
        """From the listed slots to the kept nodes of every level, leaves first."""
        trie = self.trie.to("cpu")
        listed = self._listed_RS.cpu().numpy()
        row, column = np.nonzero(listed < trie.num_items)
        node = listed[row, column]
        repeated = np.zeros(len(node), dtype=bool)
        repeated[1:] = (node[1:] == node[:-1]) & (row[1:] == row[:-1])
        row, node = row[~repeated], node[~repeated]
        nothing = np.zeros(0, dtype=np.int64)
        for level in range(trie.num_levels, -1, -1):
            if not len(node):  # so it stays, up to the root
                self._levels[level + 1] = self._on_device(nothing, nothing, nothing)
                continue
            parent = trie.node_parents(level, node)
            if level < trie.num_levels:
                first_child = trie.child_range(level, torch.from_numpy(parent))[0].numpy()
                self._levels[level + 1] = self._on_device(
                    row * (trie.num_nodes(level + 1) + 1) + node + 1,
                    row * (trie.num_nodes(level) + 1) + parent + 1,
                    node - first_child,
                )
            opens = np.ones(len(node), dtype=bool)
            opens[1:] = (parent[1:] != parent[:-1]) | (row[1:] != row[:-1])
            first = np.flatnonzero(opens)
            if not self.keep_listed:  # a node is dead when all its children are
                start, end = trie.child_range(level, torch.from_numpy(parent[first]))
                first = first[np.diff(first, append=len(node)) == (end - start).numpy()]
            row, node = row[first], parent[first]
        self._levels[0] = self._on_device(row * 2 + node + 1, nothing, nothing)

    def _on_device(self, *arrays: np.ndarray) -> _LevelNodes:
        device = self.trie.device
        return _LevelNodes(*(a if device.type == "cpu" else torch.from_numpy(a).to(device) for a in arrays))


def _places(kept: _LevelNodes, asked_X: np.ndarray, width: int) -> np.ndarray:
    """Where the kept children of the nodes with the asked keys stand in a flat (X, width) table of children."""
    first = kept.parent_keys_E.searchsorted(asked_X)
    count = kept.parent_keys_E.searchsorted(asked_X, side="right") - first
    node = np.arange(len(asked_X)).repeat(count)
    entry = np.arange(len(node)) + (first - (count.cumsum() - count))[node]
    return node * width + kept.ranks_E[entry]


def _places_tensor(kept: _LevelNodes, asked_X: torch.Tensor, width: int) -> torch.Tensor:
    first = torch.searchsorted(kept.parent_keys_E, asked_X)
    count = torch.searchsorted(kept.parent_keys_E, asked_X, right=True) - first
    node = torch.arange(len(asked_X), device=asked_X.device).repeat_interleave(count)
    entry = torch.arange(len(node), device=asked_X.device) + (first - (count.cumsum(0) - count))[node]
    return node * width + kept.ranks_E[entry]


def _keys(trie: ItemTrie, rows: Sequence[Any]) -> np.ndarray:
    """Distinct row * N + item of lists of items, ascending."""
    lists = [np.asarray(row, dtype=np.int64).reshape(-1) for row in rows]
    lengths = [len(row) for row in lists]
    items = np.concatenate(lists) if lists else np.zeros(0, dtype=np.int64)
    if items.size and (items.min() < 0 or items.max() >= trie.num_items):
        outside = int(((items < 0) | (items >= trie.num_items)).argmax())
        row = int(np.searchsorted(np.cumsum(lengths), outside, side="right"))
        raise RequestError(
            f"row {row}: item {int(items[outside])} is not in the catalogue of {trie.num_items} items; pass indices "
            f"0..{trie.num_items - 1}."
        )
    return np.unique(items + np.repeat(np.arange(len(lists)) * trie.num_items, lengths))
