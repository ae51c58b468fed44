"""Token sequences of any length as one flat prefix tree: titles of a closed set, or item codes of different lengths.

ItemTrie numbers the nodes of each level from 0, which is what a search needs whose beams are all at the same level. A
logits processor meets rows at different depths (one is inside a title, one has just finished an item): here all nodes
share one numbering, so that one step of the walk is one lookup for all rows, whatever their depths.

Layout. Nodes are numbered level by level, in lexicographic order inside a level; the root is 0 and edge e leads to
node e + 1. Edges are kept as sorted keys `parent * stride + token`, so that a step is one binary search. Sequences are
sorted ("slots"), shorter first: the sequences under a node are a range of slots, and those that end there come first.
40 bytes per node and 16 per sequence.

Shape legend: N sequences, L tokens of the longest, E edges, W children of the widest node of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import IncompatibleComponentsError, RequestError
from .trie import ItemTrie


class TokenTrie:
    """Prefix tree over N token sequences; sequences may be prefixes of each other, or equal.

    Args:
        keys_E: ascending int64 keys of the edges.
        slot_ranges: (3, E + 1) int64: first slot under each node, past the last slot under it, past the last slot of
            the sequences that end at it.
        slot_items: (N,) int64 sequence number of each slot.
        stride: larger than every token.

    Example:
        >>> trie = TokenTrie.from_sequences([[5, 6], [5, 6, 7], [8]])
        >>> node = trie.step(trie.step(torch.zeros(2, dtype=torch.long), torch.tensor([5, 8])), torch.tensor([6, 6]))
        >>> node.tolist(), trie.num_ending(node).tolist(), trie.expand(node)[0].tolist()
        ([3, -1], [1, 0], [[7], [0]])
    """

    def __init__(self, keys_E: torch.Tensor, slot_ranges: torch.Tensor, slot_items: torch.Tensor, stride: int):
        self.keys_E = keys_E
        self.slot_ranges = slot_ranges
        self.slot_items = slot_items
        self.stride = int(stride)
        nodes = torch.arange(slot_ranges.shape[1] + 1, device=keys_E.device)
        self.child_offsets = torch.searchsorted(keys_E, nodes * self.stride)
        self.item_slots = torch.empty_like(slot_items)
        self.item_slots[slot_items] = torch.arange(slot_items.shape[0], device=slot_items.device)
        self._copies: dict[torch.device, TokenTrie] = {}

    # ---------------------------------------------------------------- build

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> TokenTrie:
        """Build from lists of token ids.

        Raises:
            RequestError: no sequences, an empty one, or a negative token (row named).
        """
        if len(sequences) == 0:
            raise RequestError("there are no token sequences to choose from; give at least one.")
        lengths = np.fromiter((len(row) for row in sequences), dtype=np.int64, count=len(sequences))
        if (lengths == 0).any():
            raise RequestError(f"row {int(lengths.argmin())} has no tokens; leave empty texts out.")
        table = np.full((len(sequences), int(lengths.max())), -1, dtype=np.int64)
        table[np.arange(table.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(row) for row in sequences])
        return cls.from_table(table, lengths)

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Sequence[str]) -> TokenTrie:
        """Build from texts, tokenised as they are, without special tokens: write the leading space that a text needs
        after your prompt.

        Raises:
            RequestError: an empty text (row named).
        """
        return cls.from_sequences([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])

    @classmethod
    def from_item_trie(cls, trie: ItemTrie, level_offsets: Sequence[int] | np.ndarray) -> TokenTrie:
        """The items of an ItemTrie as token sequences (sequence n = item n), without the codes that mark an end."""
        offsets = np.asarray(level_offsets, dtype=np.int64)
        codes = trie.node_prefixes(trie.num_levels)[trie.item_leaf_N].cpu().numpy()
        spoken = codes < np.asarray(trie.codebook_sizes)
        return cls.from_table(np.where(spoken, codes + offsets, -1), spoken.sum(-1))

    @classmethod
    def from_table(cls, tokens_NL: np.ndarray, lengths_N: np.ndarray) -> TokenTrie:
        """Build from a table padded at the end with -1."""
        spoken = np.arange(tokens_NL.shape[1]) < lengths_N[:, None]
        if (tokens_NL[spoken] < 0).any():
            row = int(np.argwhere(spoken & (tokens_NL < 0))[0, 0])
            raise RequestError(f"row {row} holds a negative token id; token ids start at 0.")
        stride = int(tokens_NL.max()) + 1
        order = np.lexsort(tokens_NL.T[::-1])  # stable: equal sequences stay in the given order
        table, lengths, count = tokens_NL[order], lengths_N[order], tokens_NL.shape[0]
        keys, ranges = [], [np.asarray([[0], [count], [0]])]
        opens = np.zeros(count, dtype=bool)  # does this sorted row open a new node of the current level?
        opens[0] = True
        parent = np.zeros(count, dtype=np.int64)  # node of each sorted row at the level above
        first_node = 1
        for level in range(table.shape[1]):
            column, inside = table[:, level], lengths > level
            opens[1:] |= column[1:] != column[:-1]
            rows = np.flatnonzero(opens & inside)
            # rows of one node are adjacent; a row that ended above closes it, because it opens a (padding) group itself
            groups = np.flatnonzero(opens)
            ends = np.append(groups[1:], count)[np.searchsorted(groups, rows)]
            short = np.concatenate([[0], np.cumsum(lengths == level + 1)])
            keys.append(parent[rows] * stride + column[rows])
            ranges.append(np.stack([rows, ends, rows + short[ends] - short[rows]]))
            parent = first_node + np.cumsum(opens & inside) - 1
            first_node += len(rows)
        return cls(
            torch.from_numpy(np.concatenate(keys)),
            torch.from_numpy(np.concatenate(ranges, axis=1)),
            torch.from_numpy(order),
            stride,
        )

    # ---------------------------------------------------------------- size

    @property
    def num_items(self) -> int:
        """Number of sequences N."""
        return self.slot_items.shape[0]

    @property
    def num_nodes(self) -> int:
        return self.slot_ranges.shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys_E.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        tensors = (self.keys_E, self.slot_ranges, self.slot_items, self.child_offsets, self.item_slots)
        return sum(t.numel() * t.element_size() for t in tensors)

    def __repr__(self) -> str:
        return f"TokenTrie(num_items={self.num_items}, nodes={self.num_nodes})"

    # ---------------------------------------------------------------- walk

    def step(self, nodes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Child of each node that carries the given token (same shapes), -1 where there is none or the node is -1."""
        keys = nodes * self.stride + tokens
        edges = torch.searchsorted(self.keys_E, keys).clamp_(max=self.keys_E.shape[0] - 1)
        found = (self.keys_E[edges] == keys) & (nodes >= 0) & (tokens >= 0) & (tokens < self.stride)
        return torch.where(found, edges + 1, -1)

    def expand(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, nodes and validity of the children (..., W) of nodes (...); 0 where padded; none below node -1."""
        known = nodes.clamp(min=0)
        start = self.child_offsets[known]
        degree = (self.child_offsets[known + 1] - start).masked_fill_(nodes < 0, 0)
        width = max(1, int(degree.max())) if degree.numel() else 1
        steps = torch.arange(width, device=nodes.device)
        valid = steps < degree.unsqueeze(-1)
        edges = (start.unsqueeze(-1) + steps).masked_fill_(~valid, 0)
        return (self.keys_E[edges] % self.stride).masked_fill_(~valid, 0), (edges + 1).masked_fill_(~valid, 0), valid

    def slot_range(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and past-the-last slot of the sequences under nodes; an empty range for node -1."""
        known = nodes.clamp(min=0)
        start = self.slot_ranges[0][known]
        return start, torch.where(nodes < 0, start, self.slot_ranges[1][known])

    def end_range(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and past-the-last slot of the sequences that end at nodes; an empty range for node -1."""
        known = nodes.clamp(min=0)
        start = self.slot_ranges[0][known]
        return start, torch.where(nodes < 0, start, self.slot_ranges[2][known])

    def num_ending(self, nodes: torch.Tensor) -> torch.Tensor:
        """How many sequences end at each node."""
        start, end = self.end_range(nodes)
        return end - start

    def items_at(self, slots: torch.Tensor) -> torch.Tensor:
        """Sequence number of each slot."""
        return self.slot_items[slots]

    def slots_of(self, items: torch.Tensor) -> torch.Tensor:
        """Slot of each sequence number."""
        return self.item_slots[items]

    def tokens_after_ends(self) -> torch.Tensor:
        """Tokens that may continue a sequence which is itself complete, ascending."""
        parents, tokens = self.keys_E // self.stride, self.keys_E % self.stride
        return tokens[self.num_ending(parents) > 0].unique()

    def first_tokens(self) -> torch.Tensor:
        """Tokens that begin a sequence, ascending."""
        return self.keys_E[self.keys_E < self.stride]

    def to(self, device: torch.device | str) -> TokenTrie:
        """The same trie on another device (itself when it is there already); each copy is made once."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._copies:
            self._copies[device] = TokenTrie(
                self.keys_E.to(device), self.slot_ranges.to(device), self.slot_items.to(device), self.stride
            )
        return self._copies[device]


def check_unambiguous(trie: TokenTrie, separator_token_id: int | None) -> None:
    """Several sequences in one answer must be readable: what follows a complete sequence has one meaning only.

    Raises:
        IncompatibleComponentsError: a token that may continue a complete sequence also separates or begins sequences.
    """
    after = trie.tokens_after_ends()
    if separator_token_id is not None:
        if bool((after == separator_token_id).any()):
            raise IncompatibleComponentsError(
                f"token {separator_token_id} separates items and also continues one of them; choose another separator."
            )
    elif bool(torch.isin(after, trie.first_tokens()).any()):
        raise IncompatibleComponentsError(
            "after a complete item, a token could continue it or begin the next one; pass separator_token_id."
        )
