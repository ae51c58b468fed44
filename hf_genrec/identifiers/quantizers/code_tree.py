"""The shape of a tree of item clusters, and how a way through it is written as codes (DSI, arXiv 2202.06991).

Shared by every indexer that splits items recursively: `TreeIndexer` (k-means), `SpectralIndexer` (co-occurrence graph).

Shape suffixes: N items, M new items, R items of one node, V nodes (clusters) in breadth-first order, C children of a
node, L levels (codes of an item).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ArtifactError, IncompatibleComponentsError
from ..collisions import as_array
from .quantizer_file import read_quantizer, write_quantizer

CODE_STYLES = ("local", "node", "prefix")


class CodeTree:
    """The shape of a tree of clusters, and what it says about codes. A value: it never changes.

    Args:
        num_children_V: children of every node in breadth-first order, root first; 0 marks a leaf cluster.
        max_leaf: numbers a leaf cluster has for its items.
        code_style: how a way through the tree is written. `"local"`: a cluster is its number among its siblings and an
            item its number in the leaf, both from 0 (DSI). `"node"`: a cluster is its number among all clusters of its
            depth, so that no two parents share a child code; item numbers follow behind them and are shared by the
            leaves (CID). `"prefix"`: item numbers too belong to one leaf alone (EAGER, arXiv 2406.14017).

    Example:
        >>> tree = CodeTree([2, 0, 2, 0, 0], max_leaf=3)
        >>> tree.codes([1, 3, 4], [2, 0, 1]).tolist(), tree.codebook_sizes
        ([[0, 2, -1], [1, 0, 0], [1, 1, 1]], (2, 3, 3))
        >>> CodeTree([2, 0, 2, 0, 0], max_leaf=3, code_style="prefix").codes([1, 3, 4], [2, 0, 1]).tolist()
        [[0, 4, -1], [1, 0, 0], [1, 1, 4]]
    """

    def __init__(self, num_children_V: Any, max_leaf: int, code_style: str = "local") -> None:
        if code_style not in CODE_STYLES:
            raise IncompatibleComponentsError(f"code_style must be one of {CODE_STYLES}, got {code_style!r}")
        children_V = np.asarray(num_children_V, dtype=np.int64)
        starts, end = [0], 1
        while starts[-1] < end <= len(children_V):
            starts.append(end)
            end += int(children_V[starts[-2] : starts[-1]].sum())
        if end != len(children_V) or children_V.min() < 0:
            raise IncompatibleComponentsError(f"{len(children_V)} nodes do not make a tree of {end}: build it again")
        self.max_leaf, self.code_style, self.num_children_V = int(max_leaf), code_style, children_V
        self.start_of_depth = np.array(starts, dtype=np.int64)  # one more entry than depths: the end
        self.depth_V = np.repeat(np.arange(len(starts) - 1), np.diff(self.start_of_depth))
        self.first_child_V = np.where(children_V > 0, 1 + np.cumsum(children_V) - children_V, -1)
        self.parent_V = np.concatenate([[-1], np.repeat(np.arange(len(children_V)), children_V)])
        own = code_style != "local"
        width_L = np.append(np.diff(self.start_of_depth)[1:], 0)  # clusters below every depth
        is_leaf_V = children_V == 0
        leaf_rank_V = np.cumsum(is_leaf_V) - 1
        first_rank_L = np.append(0, np.cumsum(is_leaf_V))[self.start_of_depth[:-1]]
        self._code_V = np.arange(len(children_V)) - (
            self.start_of_depth[self.depth_V] if own else self.first_child_V[self.parent_V]
        )
        self._number_offset_V = width_L[self.depth_V] * own
        if code_style == "prefix":
            self._number_offset_V = self._number_offset_V + (leaf_rank_V - first_rank_L[self.depth_V]) * self.max_leaf
        sizes_L = np.zeros(len(starts) - 1, dtype=np.int64)
        np.maximum.at(
            sizes_L, self.depth_V, np.where(is_leaf_V, self._number_offset_V + self.max_leaf, children_V * (not own))
        )
        self.codebook_sizes = tuple(np.maximum(sizes_L, width_L * own).tolist())

    @property
    def num_levels(self) -> int:
        """L: codes of the deepest item."""
        return len(self.codebook_sizes)

    @classmethod
    def grow(
        cls,
        num_items: int,
        max_leaf: int,
        split: Callable[[np.ndarray, int], np.ndarray | None],
        code_style: str = "local",
    ) -> tuple[CodeTree, np.ndarray]:
        """Split all items from the root on; returns the tree and the leaf (N,) of every item.

        `split(rows_R, depth)` is called breadth first and returns the child (R,) of every item, numbered without gaps
        from 0, or None to leave the node as a leaf cluster.
        """
        num_children: list[int] = []
        leaf_N = np.empty(num_items, dtype=np.int64)
        queue: list[np.ndarray] = [np.arange(num_items)]
        depths = [0]
        for node, rows_R in enumerate(queue):  # the list grows while it is read
            child_R = split(rows_R, depths[node])
            if child_R is None:
                assert len(rows_R) <= max_leaf
                leaf_N[rows_R] = node
                num_children.append(0)
            else:
                order_R = np.argsort(child_R, kind="stable")
                queue.extend(np.split(rows_R[order_R], np.cumsum(np.bincount(child_R))[:-1]))
                depths += [depths[node] + 1] * (len(queue) - len(depths))
                num_children.append(int(child_R.max()) + 1)
            queue[node] = np.empty(0, dtype=np.int64)  # the items are kept once, not once per depth
        return cls(num_children, max_leaf, code_style), leaf_N

    def codes(self, leaf_N: Any, number_N: Any) -> np.ndarray:
        """Codes (N, L) int64 of items by leaf cluster and number; -1 behind the end of a shorter code."""
        node_N, row_N = np.array(leaf_N, dtype=np.int64), np.arange(len(leaf_N))
        codes_NL = np.full((len(node_N), self.num_levels), -1, dtype=np.int64)
        codes_NL[row_N, self.depth_V[node_N]] = self._number_offset_V[node_N] + np.asarray(number_N)
        for _ in range(self.num_levels - 1):
            row_N = row_N[node_N[row_N] > 0]
            codes_NL[row_N, self.depth_V[node_N[row_N]] - 1] = self._code_V[node_N[row_N]]
            node_N[row_N] = self.parent_V[node_N[row_N]]
        return codes_NL

    def locate(self, codes_NL: Any) -> tuple[np.ndarray, np.ndarray]:
        """Leaf cluster and number (N,) of codes: the inverse of `codes`.

        Raises:
            IncompatibleComponentsError: wrong shape, or codes that lead to no item (names the row).
        """
        codes_NL = as_array(codes_NL)
        if codes_NL.ndim != 2 or codes_NL.shape[1] != self.num_levels:
            raise IncompatibleComponentsError(f"codes must be (N, {self.num_levels}), got {codes_NL.shape}")
        codes_NL = codes_NL.astype(np.int64)
        leaf_N = np.zeros(len(codes_NL), dtype=np.int64)
        for level in range(self.num_levels - 1):
            inner = np.flatnonzero(self.num_children_V[leaf_N] * (self.depth_V[leaf_N] == level))
            node = leaf_N[inner]
            first = self.first_child_V[node] if self.code_style == "local" else self.start_of_depth[level + 1]
            child = np.clip(first + codes_NL[inner, level], 0, len(self.num_children_V) - 1)
            leaf_N[inner] = np.where(self.parent_V[child] == node, child, node)  # a wrong turn stays and shows below
        number_N = codes_NL[np.arange(len(leaf_N)), self.depth_V[leaf_N]] - self._number_offset_V[leaf_N]
        good_N = (self.num_children_V[leaf_N] == 0) & (number_N >= 0) & (number_N < self.max_leaf)
        good_N[good_N] = (self.codes(leaf_N[good_N], number_N[good_N]) == codes_NL[good_N]).all(1)
        if not good_N.all():
            row = int(np.flatnonzero(~good_N)[0])
            raise IncompatibleComponentsError(
                f"codes of row {row}, {codes_NL[row].tolist()}, lead to no leaf of this tree: pass codes that it made"
            )
        return leaf_N, number_N

    def place(
        self, num_new: int, choose: Callable[[int, np.ndarray], np.ndarray], taken_NL: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Leaf cluster and number (M,) for new items, none of them in `taken_NL` or given twice.

        An item goes down to the child with the best score and takes the lowest free number. Where its leaf is full it
        goes up to the first node that still has room and down again through children with room. First row first.

        Args:
            choose: `choose(node, rows_R)` -> scores (R, C) of the children of a node, the larger the better.
            taken_NL: codes in use.

        Raises:
            IncompatibleComponentsError: fewer free numbers than new items.
        """
        taken_leaf_N, taken_number_N = self.locate(taken_NL)
        key_N = np.unique(taken_leaf_N * self.max_leaf + taken_number_N)
        room_V = np.where(self.num_children_V == 0, self.max_leaf, 0)
        np.subtract.at(room_V, key_N // self.max_leaf, 1)
        for node in range(len(room_V) - 1, 0, -1):
            room_V[self.parent_V[node]] += room_V[node]
        if num_new > room_V[0]:
            raise IncompatibleComponentsError(
                f"{num_new} new items, but the leaves have only {room_V[0]} free numbers: fit again, with a larger "
                "max_leaf or more levels"
            )
        leaf_M = np.zeros(num_new, dtype=np.int64)
        for depth in range(self.num_levels - 1):
            inner = np.flatnonzero(self.num_children_V[leaf_M] * (self.depth_V[leaf_M] == depth))
            inner = inner[np.argsort(leaf_M[inner], kind="stable")]
            for rows in np.split(inner, np.flatnonzero(np.diff(leaf_M[inner])) + 1):
                if len(rows):
                    node = int(leaf_M[rows[0]])
                    leaf_M[rows] = self.first_child_V[node] + choose(node, rows).argmax(1)
        used, lowest = set(key_N.tolist()), np.zeros(len(room_V), dtype=np.int64)
        number_M = np.empty(num_new, dtype=np.int64)
        for item in range(num_new):
            node = int(leaf_M[item])
            while room_V[node] == 0:
                node = int(self.parent_V[node])
            while self.num_children_V[node]:
                first, last = self.first_child_V[node], self.first_child_V[node] + self.num_children_V[node]
                score_C = np.where(room_V[first:last] > 0, choose(node, np.array([item]))[0], -np.inf)
                node = int(first + score_C.argmax())
            while node * self.max_leaf + int(lowest[node]) in used:
                lowest[node] += 1
            leaf_M[item], number_M[item] = node, lowest[node]
            lowest[node] += 1
            while node >= 0:
                room_V[node] -= 1
                node = int(self.parent_V[node])
        return leaf_M, number_M


def rank_within(group_N: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... among the items of every group, by rising `keys` (the first one counts most), then by row."""
    order_N = np.lexsort((*reversed(keys), group_N))
    sorted_N = group_N[order_N]
    start_N = np.flatnonzero(np.diff(sorted_N, prepend=-1) != 0)
    rank_N = np.empty(len(group_N), dtype=np.int64)
    rank_N[order_N] = np.arange(len(group_N)) - np.repeat(start_N, np.diff(np.append(start_N, len(group_N))))
    return rank_N


def write_tree(path: str | Path, form: str, settings: dict[str, Any], tree: CodeTree, tensors: dict[str, Any]) -> None:
    """One safetensors file: the tree's shape, further tensors, and the settings as JSON under the key `form`."""
    tensors = {"num_children": torch.from_numpy(tree.num_children_V), **tensors}
    write_quantizer(path, form, settings, tensors)


def read_tree(path: str | Path, form: str) -> tuple[dict[str, Any], np.ndarray, dict[str, Tensor]]:
    """Settings, children of the nodes, and the other tensors of a file of `write_tree`.

    Raises:
        ArtifactError: not a file of `write_tree` with this `form`.
    """
    settings, tensors = read_quantizer(path, form, "tree")
    if "num_children" not in tensors:
        raise ArtifactError(f"{path}: tensor 'num_children' is missing; save the tree again")
    return settings, tensors.pop("num_children").numpy(), tensors
