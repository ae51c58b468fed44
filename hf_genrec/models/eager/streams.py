"""One stream's codes as a tree: which codes may follow which, and how states score them.

Shapes: N items, L levels of the stream, X anything, W children of the widest node asked for, V vocabulary, d width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_genrec.generation.trie import ItemTrie


class Children(NamedTuple):
    """The codes that may come next: `codes_XW`, and False in `valid_XW` where a node has fewer than W."""

    codes_XW: Tensor
    valid_XW: Tensor


class StreamTree:
    """The codes (N, L) of one stream as a trie, with the way of every item through it.

    Example:
        >>> tree = StreamTree([[0, 0], [0, 1], [1, 3]], (2, 4), (10, 12))
        >>> tree.children(1, torch.tensor([0, 1])).codes_XW.tolist(), tree.ranks(1, torch.tensor([1, 2])).tolist()
        ([[0, 1], [3, 0]], [1, 0])
    """

    def __init__(self, codes_NL: Any, codebook_sizes: Any, level_offsets: Any, device: Any = "cpu") -> None:
        codes_NL = torch.as_tensor(codes_NL).long().cpu()
        self.offsets = tuple(int(offset) for offset in level_offsets)
        self.trie = ItemTrie.from_codes(codes_NL, tuple(int(size) for size in codebook_sizes)).to(device)
        codes_NL = codes_NL.to(device)
        nodes = [torch.zeros(len(codes_NL), dtype=torch.long, device=device)]
        for level in range(codes_NL.shape[1]):
            nodes.append(self.trie.step(level, nodes[-1], codes_NL[:, level].contiguous()))
        self.nodes_NL1 = torch.stack(nodes, dim=1)  # of every item at levels 0 (the root) to L

    def children(self, level: int, nodes_X: Tensor) -> Children:
        """Codes that may follow nodes of a level, ascending."""
        codes, _, valid = self.trie.expand(level, nodes_X.contiguous())
        return Children(codes, valid)

    def ranks(self, level: int, rows_P: Tensor) -> Tensor:
        """Which child of its node at `level` each item (by row) goes on with."""
        first, _ = self.trie.child_range(level, self.nodes_NL1[rows_P, level].contiguous())
        return self.nodes_NL1[rows_P, level + 1] - first

    def logits(self, level: int, states_Xd: Tensor, children: Children, weight_Vd: Tensor) -> Tensor:
        """Inner products (X, W) of states and the vectors of the children's codes, float32."""
        if level == 0:  # one root: everybody has the same children
            codes_W = children.codes_XW.flatten(0, -2)[0]
            return (states_Xd @ weight_Vd[codes_W + self.offsets[0]].T).float()
        vectors_XWd = torch.nn.functional.embedding(children.codes_XW + self.offsets[level], weight_Vd)
        return (vectors_XWd @ states_Xd.unsqueeze(-1)).squeeze(-1).float()

    def cross_entropy(self, level: int, states_Pd: Tensor, rows_P: Tensor, weight_Vd: Tensor) -> Tensor:
        """Summed over P: -log p(the item's code of `level` | its codes before), among the codes that may follow them."""
        children = self.children(level, self.nodes_NL1[rows_P, level])
        logits = self.logits(level, states_Pd, children, weight_Vd).masked_fill(~children.valid_XW, -torch.inf)
        return torch.nn.functional.cross_entropy(logits, self.ranks(level, rows_P), reduction="sum")
