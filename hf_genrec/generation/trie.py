"""The catalogue as a prefix tree of codes, held in a few flat tensors.

Constrained decoding over item identifiers as in TIGER (arXiv 2305.05065) needs one question answered fast: which
codes may follow this prefix? Here every level is a table of contiguous ranges (Compressed Sparse Row), so that the
answer is one gather.

Shape legend: N items, M items added or removed, L levels, B batch, K beams, W children (padded to the widest node of
the call), n_l nodes of level l.

Layout. Nodes of one level are numbered in lexicographic order of their prefixes. Three things follow:
the children of a node are a contiguous range of the next level; the leaves under any node are a contiguous range; and
so are its items, once items are listed leaf by leaf ("slots"). Filters (see item_filter.py) list the slots of a request
and so decide whether a node still leads anywhere. trie_storage.py packs the tables, trie_build.py sorts, trie_update.py
merges, trie_file.py reads and writes.

Codes of different length. -1 at the end of a row makes a shorter code. The tree keeps all leaves at level L: after its
last code such an item has an *end* child, and below that only end children. The end code of a level is its codebook's
size, one past the last code, so an end sorts after every longer code with the same beginning.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import IncompatibleComponentsError, UnknownItemError
from .trie_build import TrieTables, as_code_table, build_tables, check_codes
from .trie_file import read_tables, write_tables
from .trie_storage import ChildCodes, ItemOrder, Offsets
from .trie_update import merged_tables, pruned_tables

_CACHE_LIMIT = 8  # tries kept by from_tokenizer; an evaluation uses one or two catalogues
_cache: OrderedDict[str, ItemTrie] = OrderedDict()
_cache_lock = threading.Lock()


class ItemTrie:
    """Prefix tree over the codes of a catalogue: which codes may follow a prefix, and which items a full code names.

    Level 0 is the root (one node), level L holds the leaves. A leaf may name several items (shared codes). A trie never
    changes; `add_items` and `remove_items` return new ones. Make one with `from_codes`, `from_tokenizer` or `load`.

    Attributes:
        codebook_sizes: number of codes of each level.
        max_children: L numbers, the children of the widest node of each level 0..L-1.
        max_items_per_leaf: items of the fullest leaf.
        has_ends: whether some item ends before the last level.

    Example:
        >>> trie = ItemTrie.from_codes([[0, 1], [2, 0], [0, 1], [0, 3]], codebook_sizes=(4, 4))
        >>> trie.num_items, [trie.num_nodes(level) for level in range(3)]
        (4, [1, 2, 3])
        >>> trie.lookup(torch.tensor([[0, 1], [2, 0], [2, 2]])).tolist()
        [0, 2, -1]
        >>> trie.items_of_leaf(0).tolist()
        [0, 2]
        >>> ItemTrie.from_codes([[0, 1], [0, -1]], codebook_sizes=(4, 4)).node_prefixes(2).tolist()  # 4 is the end
        [[0, 1], [0, 4]]
    """

    def __init__(self, offsets: list[Offsets], codes: list[ChildCodes], order: ItemOrder, sizes: tuple[int, ...]):
        self._offsets, self._codes, self._order = offsets, codes, order
        self.codebook_sizes = sizes
        self.max_children = [table.widest for table in codes]
        self.max_items_per_leaf = 1
        self.has_ends = False
        self._item_slots: torch.Tensor | None = None
        self._item_leaves: torch.Tensor | None = None
        self._copies: dict[torch.device, ItemTrie] = {self.device: self}

    # ---------------------------------------------------------------- build

    @classmethod
    def _pack(
        cls, tables: TrieTables, sizes: tuple[int, ...], former: ItemTrie | None = None, changed: Sequence[bool] = ()
    ) -> ItemTrie:
        """Tables -> trie; levels that did not change are taken over from `former`."""
        offsets, codes = [], []
        for level, array in enumerate(tables.offsets):
            if former is not None and not changed[level]:
                offsets.append(former._offsets[level])
                if level < len(sizes):
                    codes.append(former._codes[level])
                continue
            offsets.append(Offsets.pack(array))
            if level < len(sizes):
                codes.append(ChildCodes.pack(tables.codes[level], sizes[level], offsets[-1].widest))
        trie = cls(offsets, codes, ItemOrder.pack(tables.items), sizes)
        trie.max_items_per_leaf = offsets[-1].widest
        trie.has_ends = codes[-1].has_end
        return trie

    def _tables(self) -> TrieTables:
        return TrieTables(
            [table.unpack() for table in self._offsets], [t.unpack() for t in self._codes], self._order.unpack()
        )

    @classmethod
    def from_codes(cls, codes_NL: Any, codebook_sizes: Sequence[int] | None = None) -> ItemTrie:
        """Build from an integer table of codes (N, L): numpy, torch or nested lists, any order, duplicates welcome.

        Sorts 64 bit keys of as many levels as fit, so neither L nor the codebook sizes can overflow. About 0.1 s for
        a million items of 4 x 256 codes.

        Args:
            codes_NL: codes, -1 where a code has ended; item titles as token ids make a trie of texts.
            codebook_sizes: codes of each level; default: the largest code of the level + 1.

        Raises:
            IncompatibleComponentsError: no items, not a table of integers, a code outside its codebook, a -1 before a
                code or a row of -1 only (row and level named).
        """
        codes = as_code_table(codes_NL)
        sizes, has_ends = check_codes(codes, codebook_sizes)
        return cls._pack(build_tables(codes, sizes, has_ends), sizes)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, device: torch.device | str = "cpu") -> ItemTrie:
        """The trie of a tokenizer's catalogue, built once per catalogue fingerprint."""
        fingerprint = getattr(tokenizer, "catalogue_fingerprint", None)
        if fingerprint is None or not hasattr(tokenizer, "codes"):
            raise IncompatibleComponentsError(
                f"{type(tokenizer).__name__} carries no item catalogue; use an ItemTokenizer, or "
                "extend_tokenizer(base, item_tokenizer)."
            )
        with _cache_lock:
            trie = _cache.get(fingerprint)
        if trie is None:
            trie = cls.from_codes(tokenizer.codes, tokenizer.codebook_sizes)
        with _cache_lock:
            _cache[fingerprint] = trie
            _cache.move_to_end(fingerprint)
            while len(_cache) > _CACHE_LIMIT:
                _cache.popitem(last=False)
        return trie.to(device)

    def add_items(self, codes_ML: Any) -> ItemTrie:
        """A trie with more items, which get the indices N..N+M-1: equal to `from_codes` of the longer table, by merging.

        Raises:
            IncompatibleComponentsError: not a table of L levels, or codes that `from_codes` refuses (row of `codes_ML`
                named).
        """
        codes = as_code_table(codes_ML)
        sizes, has_ends = check_codes(codes, self.codebook_sizes)
        here = self.to("cpu")
        tables, changed = merged_tables(here._tables(), codes, sizes, has_ends)
        return self._pack(tables, sizes, here, changed).to(self.device)

    def remove_items(self, items_M: Any) -> ItemTrie:
        """A trie without some items; the others are renumbered as by `np.delete`: equal to `from_codes` of what is left.

        Raises:
            UnknownItemError: an index outside 0..N-1 (position named).
            IncompatibleComponentsError: no list of integers, an index named twice (position named), or nothing left.
        """
        items = np.asarray(items_M.cpu() if isinstance(items_M, torch.Tensor) else items_M)
        if items.ndim != 1 or (items.size and not np.issubdtype(items.dtype, np.integer)):
            raise IncompatibleComponentsError("remove_items needs a list of item indices.")
        if items.size == 0:
            return self
        outside = (items < 0) | (items >= self.num_items)
        if outside.any():
            place = int(outside.argmax())
            raise UnknownItemError(
                f"position {place}: item {int(items[place])} is not in the catalogue of {self.num_items} items; pass "
                f"indices 0..{self.num_items - 1}."
            )
        items = items.astype(np.int64)
        distinct, first = np.unique(items, return_index=True)
        if len(distinct) < len(items):
            place = int(np.setdiff1d(np.arange(len(items)), first)[0])
            raise IncompatibleComponentsError(
                f"position {place}: item {int(items[place])} is named twice; pass each index once."
            )
        if len(items) == self.num_items:
            raise IncompatibleComponentsError("removing all items leaves no catalogue; keep at least one.")
        here = self.to("cpu")
        tables, changed = pruned_tables(here._tables(), np.sort(here._order.find(items)))
        return self._pack(tables, self.codebook_sizes, here, changed).to(self.device)

    # ---------------------------------------------------------------- size

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def num_items(self) -> int:
        return self._order.num_items

    @property
    def num_leaves(self) -> int:
        return self._codes[-1].num_children

    @property
    def device(self) -> torch.device:
        return self._order.low.device

    def num_nodes(self, level: int) -> int:
        """Nodes of a level: 1 at level 0 (the root), the number of distinct full codes at level L."""
        return 1 if level == 0 else self._codes[level - 1].num_children

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, those built on first use included once they are built."""
        held = [*self._tensors().values(), self._order.blocks, self._item_slots, self._item_leaves]
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def __repr__(self) -> str:
        nodes = " / ".join(str(self.num_nodes(level)) for level in range(1, self.num_levels + 1))
        return f"ItemTrie(num_items={self.num_items}, codebook_sizes={self.codebook_sizes}, nodes={nodes})"

    # ---------------------------------------------------------------- walk

    def expand(self, level: int, nodes_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Children of nodes of a level.

        Args:
            level: 0..L-1, the level of `nodes_BK`.
            nodes_BK: node numbers, any shape; -1 has no children.

        Returns:
            codes_BKW (codes of the children, ascending; the codebook's size = an end), child_nodes_BKW (their numbers
            at level + 1) and valid_BKW (False where padded; there code and node are 0), fresh tensors. W is the largest
            number of children in the call, on accelerators (where that would wait for the device) in the level.
        """
        return (self._expand_arrays if nodes_BK.device.type == "cpu" else self._expand_tensors)(level, nodes_BK)

    def _expand_arrays(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        start, end = self._offsets[level].range(nodes.numpy())
        degree = end - start
        width = max(1, int(degree.max())) if degree.size else 1
        codes = self._codes[level].windows(start, width)
        child_nodes = start[..., None] + np.arange(width)
        if degree.size and int(degree.min()) == width:  # nothing padded, as at the root
            valid = np.ones(codes.shape, dtype=bool)
        else:
            small = np.int16 if width < 2**15 else np.int64  # a quarter of the bytes to compare
            valid = np.arange(width, dtype=small) < degree.astype(small)[..., None]
            child_nodes *= valid
            codes *= valid
        return torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(child_nodes), torch.from_numpy(valid)

    def _expand_tensors(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        start, end = self._offsets[level].range(nodes)
        steps = torch.arange(self.max_children[level], device=nodes.device)
        valid = steps < (end - start).unsqueeze(-1)
        child_nodes = (start.unsqueeze(-1) + steps).masked_fill_(~valid, 0)
        codes = self._codes[level].padded[child_nodes].long().masked_fill_(~valid, 0)
        return codes, child_nodes, valid

    def child_range(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and past-the-last child (int64) of nodes of any shape; an empty range for node -1."""
        if nodes.device.type == "cpu":
            start, end = self._offsets[level].range(nodes.numpy())
            return torch.from_numpy(np.asarray(start)), torch.from_numpy(np.asarray(end))
        return self._offsets[level].range(nodes)

    def slot_range(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and past-the-last slot (position in the list of items) under nodes of a level; an empty range for node
        -1.
        """
        on_cpu = nodes.device.type == "cpu"
        known = nodes.clamp(min=0)
        start: Any = known.numpy() if on_cpu else known
        end: Any = start + 1
        for offsets in self._offsets[level:]:
            start, end = offsets.at(start), offsets.at(end)
        if on_cpu:
            start, end = torch.from_numpy(np.asarray(start)), torch.from_numpy(np.asarray(end))
        return start, torch.where(nodes < 0, start, end)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Node reached by prefixes of codes (..., l), at level l <= L: (...,) int64, -1 where the catalogue has no
        such prefix. An ended item is spelled with end codes (the codebook's size), see `end_filled`.
        """
        node = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        for level in range(codes.shape[-1]):
            node = self.step(level, node, codes[..., level])
        return node

    def step(self, level: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Child of each node that carries the given code (same shapes), -1 where there is none."""
        return (self._step_arrays if nodes.device.type == "cpu" else self._step_tensors)(level, nodes, codes)

    def _step_arrays(self, level: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        node, wanted = nodes.numpy(), codes.numpy()
        if level == 0:
            place, found = self._codes[0].find_all(wanted)
            return torch.from_numpy(np.where(found & (node >= 0), place, -1))
        place, found = self._codes[level].find(*self._offsets[level].range(node), wanted)
        return torch.from_numpy(np.where(found, place, -1))

    def _step_tensors(self, level: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        table = self._codes[level].padded
        low, end = self._offsets[level].range(nodes)
        high = end
        for _ in range(self.max_children[level].bit_length()):
            middle = (low + high) >> 1
            right = (low < high) & (table[middle].long() < codes)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, torch.maximum(middle, low))
        return torch.where((low < end) & (table[low].long() == codes), low, -1)

    def end_filled(self, codes_XL: torch.Tensor) -> torch.Tensor:
        """Rows of a code table as `lookup` wants them: -1 (ended) becomes the end code of its level."""
        return torch.where(codes_XL < 0, torch.tensor(self.codebook_sizes, device=codes_XL.device), codes_XL)

    def parents(self, level: int) -> torch.Tensor:
        """Parent (a node of level - 1) of every node of a level >= 1: (n_level,) int64, ascending."""
        nodes = torch.arange(self.num_nodes(level - 1), device=self.device)
        start, end = self.child_range(level - 1, nodes)
        return nodes.repeat_interleave(end - start)

    def node_parents(self, level: int, children_X: np.ndarray) -> np.ndarray:
        """The node of `level` above each of some nodes of level + 1 (for level L: above each of some slots). On the CPU."""
        return self._offsets[level].parents(children_X)

    def node_prefixes(self, level: int) -> torch.Tensor:
        """Codes on the path to every node of a level: (n_level, level) int64, in lexicographic order."""
        prefixes = torch.zeros(1, 0, dtype=torch.long, device=self.device)
        for below in range(level):
            codes = self._codes[below].codes.long().unsqueeze(-1)
            prefixes = torch.cat([prefixes[self.parents(below + 1)], codes], dim=-1)
        return prefixes

    # ---------------------------------------------------------------- items

    def items_at(self, slots: torch.Tensor) -> torch.Tensor:
        """Item index (int64) of each slot, any shape."""
        if slots.device.type == "cpu":
            return torch.from_numpy(np.asarray(self._order.take(slots.numpy())))
        return self._order.take(slots)

    def slots_of(self, items: torch.Tensor) -> torch.Tensor:
        """Slot (int64) of each item, any shape: the inverse of `items_at`."""
        if items.device.type == "cpu":
            return torch.from_numpy(self._order.find(items.numpy().reshape(-1))).view(items.shape)
        return self.item_slots[items]

    def leaf_slots(self, leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and past-the-last slot of leaves of any shape; an empty range for leaf -1."""
        return self.child_range(self.num_levels, leaves)

    def first_items(self, leaves: torch.Tensor) -> torch.Tensor:
        """Lowest item index of each leaf, -1 for leaf -1; any shape, int64."""
        start, _ = self.leaf_slots(leaves.clamp(min=0))
        return self.items_at(start).masked_fill_(leaves < 0, -1)

    @property
    def item_slots(self) -> torch.Tensor:
        """Slot of every item: (N,) int64. Built on first use and kept; `slots_of` answers for a few items without."""
        if self._item_slots is None:
            places = torch.arange(self.num_items, device=self.device)
            slots = torch.empty_like(places)
            slots[self.items_at(places)] = places
            self._item_slots = slots
        return self._item_slots

    @property
    def item_leaf_N(self) -> torch.Tensor:
        """Leaf of every item: (N,) int64. Built on first use and kept."""
        if self._item_leaves is None:
            start, end = self.leaf_slots(torch.arange(self.num_leaves, device=self.device))
            leaf_of_slot = torch.arange(self.num_leaves, device=self.device).repeat_interleave(end - start)
            self._item_leaves = leaf_of_slot[self.item_slots]
        return self._item_leaves

    def items_of_leaf(self, leaf: int) -> torch.Tensor:
        """Item indices of one leaf, ascending."""
        start, end = self.leaf_slots(torch.tensor(int(leaf), device=self.device))
        return self.items_at(torch.arange(int(start), int(end), device=self.device))

    def prune(self, allowed_BN: torch.Tensor) -> list[torch.Tensor]:
        """Which nodes lead to an allowed item: L + 1 bool tensors (B, n_l), from the root to the leaves.

        The dense form, good for small catalogues and for checks; decoding uses ItemFilter, which needs no table per
        level.
        """
        allowed_by_slot = allowed_BN[:, self.items_at(torch.arange(self.num_items, device=self.device))]
        counts = torch.nn.functional.pad(allowed_by_slot.long().cumsum(-1), (1, 0))
        masks = []
        for level in range(self.num_levels + 1):
            start, end = self.slot_range(level, torch.arange(self.num_nodes(level), device=self.device))
            masks.append(counts[:, end] > counts[:, start])
        return masks

    # ---------------------------------------------------------------- move and store

    def _tensors(self) -> dict[str, torch.Tensor]:
        parts: list[tuple[str, Any]] = [(f"offsets.{level}", table) for level, table in enumerate(self._offsets)]
        parts += [(f"codes.{level}", table) for level, table in enumerate(self._codes)] + [("items", self._order)]
        return {f"{name}.{part}": tensor for name, table in parts for part, tensor in table.tensors()}

    def to(self, device: torch.device | str) -> ItemTrie:
        """The same trie on another device (itself when it is there already); each copy is made once."""
        device = torch.device(device)
        if device.type != "cpu" and device.index is None and device.type == self.device.type:
            return self
        if device not in self._copies:
            copy = ItemTrie(
                [table.to(device) for table in self._offsets],
                [table.to(device) for table in self._codes],
                self._order.to(device),
                self.codebook_sizes,
            )
            copy.max_items_per_leaf, copy.has_ends = self.max_items_per_leaf, self.has_ends
            self._copies[device] = self._copies[copy.device] = copy
            copy._copies = self._copies
        return self._copies[device]

    def __deepcopy__(self, memo: dict[int, Any]) -> ItemTrie:
        return self  # never changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (tuple(self.to("cpu")._tables()), self.codebook_sizes, str(self.device))

    def save(self, file: str | Path) -> None:
        """Write to a safetensors file."""
        write_tables(file, self.to("cpu")._tables(), self.codebook_sizes)

    @classmethod
    def load(cls, file: str | Path) -> ItemTrie:
        """Read a file written by `save`.

        Raises:
            ArtifactError: no such file, not an item trie, one of an earlier version, or a damaged one (what is wrong is
                named).
        """
        return cls._pack(*read_tables(file))


def _unpickled(tables: Any, sizes: tuple[int, ...], device: str) -> ItemTrie:
    return ItemTrie._pack(TrieTables(*tables), sizes).to(device)
