"""The catalogue as a prefix tree of codes, held in a few flat tensors.

Constrained decoding over item identifiers as in TIGER (arXiv 2305.05065) needs one question answered fast: which
codes may follow this prefix? Here every level is a CSR table (Compressed Sparse Row), so that the answer is one gather.

Shape legend: N items, L levels, B batch, K beams, W children (padded to the widest node of the call), n_l nodes of
level l.

Layout. Nodes of one level are numbered in lexicographic order of their prefixes. Three things follow:
the children of a node are a contiguous range of the next level; the leaves under any node are a contiguous range; and
so are its items, once items are listed leaf by leaf ("slots"). Filters (see item_filter.py) count slots in such a range
and so decide whether a node still leads anywhere, at any level, with no mask per level.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import safe_open, save_file

from ..errors import ArtifactError, IncompatibleComponentsError

_CACHE_LIMIT = 8  # tries kept by from_tokenizer; an evaluation uses one or two catalogues
_cache: OrderedDict[str, ItemTrie] = OrderedDict()
_cache_lock = threading.Lock()


def _code_dtype(size: int) -> torch.dtype:
    """Smallest dtype that torch can index with codes 0..size-1 (unsigned 16 bit has poor operator support)."""
    if size <= 256:
        return torch.uint8
    return torch.int16 if size <= 2**15 else torch.int32


def _offset_dtype(largest: int) -> np.dtype:
    return np.dtype(np.int32 if largest < 2**31 else np.int64)


class ItemTrie:
    """Prefix tree over the codes of a catalogue: which codes may follow a prefix, and which items a full code names.

    Level 0 is the root (one node), level L holds the leaves. A leaf may name several items (shared codes).

    Args:
        child_offsets: L tensors; `child_offsets[l]` (n_l + 1,) says where the children of each node of level l start.
        child_codes: L tensors; `child_codes[l]` (n_{l+1},) is the code of each node of level l + 1, ascending inside
            a parent.
        leaf_offsets: (n_L + 1,) where the items of each leaf start in `leaf_items`.
        leaf_items: (N,) item indices listed leaf by leaf, ascending inside a leaf. A position in this list is a *slot*.
        codebook_sizes: number of codes of each level.

    Example:
        >>> trie = ItemTrie.from_codes([[0, 1], [2, 0], [0, 1], [0, 3]], codebook_sizes=(4, 4))
        >>> trie.num_items, [trie.num_nodes(level) for level in range(3)]
        (4, [1, 2, 3])
        >>> trie.lookup(torch.tensor([[0, 1], [2, 0], [2, 2]])).tolist()
        [0, 2, -1]
        >>> trie.items_of_leaf(0).tolist()
        [0, 2]
    """

    def __init__(
        self,
        child_offsets: Sequence[torch.Tensor],
        child_codes: Sequence[torch.Tensor],
        leaf_offsets: torch.Tensor,
        leaf_items: torch.Tensor,
        codebook_sizes: Sequence[int],
    ):
        self.child_offsets = list(child_offsets)
        self.child_codes = list(child_codes)
        self.leaf_offsets = leaf_offsets
        self.leaf_items = leaf_items
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        self.max_children = [int((offsets[1:] - offsets[:-1]).max()) for offsets in self.child_offsets]
        self.max_items_per_leaf = int((leaf_offsets[1:] - leaf_offsets[:-1]).max())
        self._item_slots: torch.Tensor | None = None
        self._item_leaves: torch.Tensor | None = None
        self._copies: dict[torch.device, ItemTrie] = {}

    # ---------------------------------------------------------------- build

    @classmethod
    def from_codes(cls, codes_NL: Any, codebook_sizes: Sequence[int] | None = None) -> ItemTrie:
        """Build from an integer table of codes (N, L): numpy, torch or nested lists, any order, duplicates welcome.

        Sorts level by level with a stable radix sort, so neither L nor the codebook sizes can overflow a packed key.

        Raises:
            IncompatibleComponentsError: no items, not a table of integers, or a code outside its codebook (row and
            level named).
        """
        if isinstance(codes_NL, torch.Tensor):
            codes_NL = codes_NL.detach().cpu().numpy()
        codes = np.asarray(codes_NL)
        if codes.ndim != 2 or 0 in codes.shape:
            raise IncompatibleComponentsError(
                f"item codes must be a non-empty table (items, levels), got shape {codes.shape}; give one row of "
                "codes per item."
            )
        if not np.issubdtype(codes.dtype, np.integer):
            raise IncompatibleComponentsError(f"item codes must be integers, got {codes.dtype}; cast them first.")
        sizes = cls._checked_sizes(codes, codebook_sizes)
        num_items = codes.shape[0]
        columns = [np.ascontiguousarray(codes[:, level]).astype(_sort_dtype(size)) for level, size in enumerate(sizes)]

        # Least significant level first; each pass is stable, so ties end up in item order and rows in
        # lexicographic order.
        order = np.argsort(columns[-1], kind="stable")
        for column in columns[-2::-1]:
            order = order[np.argsort(column[order], kind="stable")]

        child_offsets, child_codes = [], []
        starts_node = np.zeros(num_items, dtype=bool)  # does this sorted row open a new node of the current level?
        starts_node[0] = True
        first_rows = np.zeros(1, dtype=np.int64)  # sorted row where each node of the level above begins
        for level, size in enumerate(sizes):
            column = columns[level][order]
            starts_node[1:] |= column[1:] != column[:-1]
            rows = np.flatnonzero(starts_node)
            # a node's children begin where its own first row begins: rank of that row among the rows that open a child
            offsets = np.append(np.searchsorted(rows, first_rows), len(rows))
            child_offsets.append(torch.from_numpy(offsets.astype(_offset_dtype(len(rows)))))
            child_codes.append(torch.from_numpy(column[rows].astype(np.int32)).to(_code_dtype(size)))
            first_rows = rows
        leaf_offsets = np.append(first_rows, num_items).astype(_offset_dtype(num_items))
        leaf_items = order.astype(_offset_dtype(num_items))
        return cls(child_offsets, child_codes, torch.from_numpy(leaf_offsets), torch.from_numpy(leaf_items), sizes)

    @staticmethod
    def _checked_sizes(codes: np.ndarray, codebook_sizes: Sequence[int] | None) -> tuple[int, ...]:
        largest = codes.max(axis=0)
        sizes = tuple(int(s) for s in (codebook_sizes if codebook_sizes is not None else largest + 1))
        if len(sizes) != codes.shape[1]:
            raise IncompatibleComponentsError(
                f"{len(sizes)} codebook sizes for codes of {codes.shape[1]} levels; give one size per level."
            )
        if codes.min() < 0 or (largest >= np.asarray(sizes)).any():
            outside = (codes < 0) | (codes >= np.asarray(sizes))
            row, level = (int(i) for i in np.argwhere(outside)[0])
            raise IncompatibleComponentsError(
                f"item row {row}, level {level}: code {int(codes[row, level])} is outside its codebook of "
                f"{sizes[level]} codes; "
                "re-encode the catalogue or pass the right codebook_sizes."
            )
        return sizes

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

    # ---------------------------------------------------------------- size

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def num_items(self) -> int:
        return self.leaf_items.shape[0]

    @property
    def num_leaves(self) -> int:
        return self.child_codes[-1].shape[0]

    @property
    def device(self) -> torch.device:
        return self.leaf_items.device

    def num_nodes(self, level: int) -> int:
        """Nodes of a level: 1 at level 0 (the root), the number of distinct full codes at level L."""
        return 1 if level == 0 else self.child_codes[level - 1].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

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
            codes_BKW (codes of the children, ascending), child_nodes_BKW (their numbers at level + 1) and
            valid_BKW (False where padded; there code and node are 0). W is the largest number of children in the call.
        """
        start, end = self.child_range(level, nodes_BK)
        degree = end - start
        width = self.max_children[level]
        if degree.device.type == "cpu":  # reading the true maximum costs a synchronisation on accelerators
            width = max(1, int(degree.max())) if degree.numel() else 1
        steps = torch.arange(width, device=degree.device)
        valid = steps < degree.unsqueeze(-1)
        child_nodes = (start.unsqueeze(-1) + steps).masked_fill_(~valid, 0)
        codes = self.child_codes[level][child_nodes].long().masked_fill_(~valid, 0)
        return codes, child_nodes, valid

    def child_range(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and past-the-last child (int64) of nodes of any shape; an empty range for node -1."""
        offsets = self.child_offsets[level]
        known = nodes.clamp(min=0)
        start, end = offsets[known].long(), offsets[known + 1].long()
        return start, torch.where(nodes < 0, start, end)

    def slot_range(self, level: int, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and past-the-last slot (position in `leaf_items`) under nodes of a level; an empty range for node
        -1.
        """
        absent = nodes < 0
        start = nodes.clamp(min=0)
        end = start + 1
        for offsets in [*self.child_offsets[level:], self.leaf_offsets]:
            start, end = offsets[start].long(), offsets[end].long()
        return start, torch.where(absent, start, end)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Node reached by prefixes of codes (..., l), at level l <= L: (...,) int64, -1 where the catalogue has no
        such prefix.
        """
        level_count = codes.shape[-1]
        node = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        for level in range(level_count):
            node = self.step(level, node, codes[..., level])
        return node

    def step(self, level: int, nodes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Child of each node that carries the given code (same shapes), -1 where there is none. Binary search in the
        range.
        """
        table = self.child_codes[level]
        low, end = self.child_range(level, nodes)
        high = end
        last = table.shape[0] - 1
        for _ in range(self.max_children[level].bit_length()):
            middle = (low + high) >> 1
            right = (low < high) & (table[middle.clamp(max=last)].long() < codes)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, torch.maximum(middle, low))
        found = (low < end) & (table[low.clamp(max=last)].long() == codes)
        return torch.where(found, low, -1)

    def parents(self, level: int) -> torch.Tensor:
        """Parent (a node of level - 1) of every node of a level >= 1: (n_level,) int64, ascending."""
        offsets = self.child_offsets[level - 1].long()
        return torch.repeat_interleave(
            torch.arange(offsets.shape[0] - 1, device=offsets.device), offsets[1:] - offsets[:-1]
        )

    def node_prefixes(self, level: int) -> torch.Tensor:
        """Codes on the path to every node of a level: (n_level, level) int64, in lexicographic order."""
        prefixes = torch.zeros(1, 0, dtype=torch.long, device=self.device)
        for below in range(level):
            codes = self.child_codes[below].long().unsqueeze(-1)
            prefixes = torch.cat([prefixes[self.parents(below + 1)], codes], dim=-1)
        return prefixes

    # ---------------------------------------------------------------- items

    @property
    def item_slots(self) -> torch.Tensor:
        """Slot of every item: (N,) int64, the inverse of `leaf_items`. Built on first use."""
        if self._item_slots is None:
            slots = torch.empty(self.num_items, dtype=torch.long, device=self.device)
            slots[self.leaf_items.long()] = torch.arange(self.num_items, device=self.device)
            self._item_slots = slots
        return self._item_slots

    @property
    def item_leaf_N(self) -> torch.Tensor:
        """Leaf of every item: (N,) int64. Built on first use."""
        if self._item_leaves is None:
            offsets = self.leaf_offsets.long()
            leaf_of_slot = torch.repeat_interleave(
                torch.arange(self.num_leaves, device=self.device), offsets[1:] - offsets[:-1]
            )
            self._item_leaves = leaf_of_slot[self.item_slots]
        return self._item_leaves

    @property
    def has_ends(self) -> bool:
        """Does some item end before the last level (variable length codes)?"""
        return False

    def items_at(self, slots: torch.Tensor) -> torch.Tensor:
        """Item index (int64) of each slot, any shape."""
        return self.leaf_items[slots].long()

    def leaf_slots(self, leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and past-the-last slot of leaves; an empty range for leaf -1."""
        return self.slot_range(self.num_levels, leaves)

    def first_items(self, leaves: torch.Tensor) -> torch.Tensor:
        """Lowest item index of each leaf, -1 for leaf -1; any shape, int64."""
        items = self.items_at(self.leaf_offsets[leaves.clamp(min=0)].long())
        return items.masked_fill_(leaves < 0, -1)

    def items_of_leaf(self, leaf: int) -> torch.Tensor:
        """Item indices of one leaf, ascending."""
        return self.leaf_items[int(self.leaf_offsets[leaf]) : int(self.leaf_offsets[leaf + 1])].long()

    def prune(self, allowed_BN: torch.Tensor) -> list[torch.Tensor]:
        """Which nodes lead to an allowed item: L + 1 bool tensors (B, n_l), from the root to the leaves.

        The dense form, good for small catalogues and for checks; decoding uses ItemFilter, which needs no table per
        level.
        """
        allowed_by_slot = allowed_BN[:, self.leaf_items.long()]
        counts = torch.nn.functional.pad(allowed_by_slot.long().cumsum(-1), (1, 0))
        masks = []
        for level in range(self.num_levels + 1):
            start, end = self.slot_range(level, torch.arange(self.num_nodes(level), device=self.device))
            masks.append(counts[:, end] > counts[:, start])
        return masks

    # ---------------------------------------------------------------- move and store

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"leaf_offsets": self.leaf_offsets, "leaf_items": self.leaf_items}
        for level in range(self.num_levels):
            tensors[f"child_offsets.{level}"] = self.child_offsets[level]
            tensors[f"child_codes.{level}"] = self.child_codes[level]
        return tensors

    def to(self, device: torch.device | str) -> ItemTrie:
        """The same trie on another device (itself when it is there already); each copy is made once."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._copies:
            self._copies[device] = ItemTrie(
                [t.to(device) for t in self.child_offsets],
                [t.to(device) for t in self.child_codes],
                self.leaf_offsets.to(device),
                self.leaf_items.to(device),
                self.codebook_sizes,
            )
        return self._copies[device]

    def save(self, file: str | Path) -> None:
        """Write to a safetensors file."""
        sizes = ",".join(map(str, self.codebook_sizes))
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, str(file), metadata={"format": "hf_genrec.item_trie.1", "codebook_sizes": sizes})

    @classmethod
    def load(cls, file: str | Path) -> ItemTrie:
        """Read a file written by `save`.

        Raises:
            ArtifactError: the file is no item trie.
        """
        with safe_open(str(file), framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != "hf_genrec.item_trie.1":
                raise ArtifactError(f"{file} is not an item trie; write it with ItemTrie.save.")
            sizes = tuple(int(size) for size in metadata["codebook_sizes"].split(","))
            levels = range(len(sizes))
            offsets = [stored.get_tensor(f"child_offsets.{level}") for level in levels]
            codes = [stored.get_tensor(f"child_codes.{level}") for level in levels]
            return cls(offsets, codes, stored.get_tensor("leaf_offsets"), stored.get_tensor("leaf_items"), sizes)


def _sort_dtype(size: int) -> np.dtype:
    """numpy sorts 8 and 16 bit integers by radix, which is what makes the build fast."""
    if size <= 2**8:
        return np.dtype(np.uint8)
    return np.dtype(np.uint16 if size <= 2**16 else np.int64)
