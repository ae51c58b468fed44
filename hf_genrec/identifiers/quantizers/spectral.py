"""Collaborative indexing: recursive spectral clustering of the item co-occurrence graph (CID, arXiv 2305.06569).

No item vectors: items that are consumed together share the first codes. A cluster is cut by the leading eigenvectors of
its normalised graph and cut again while it holds more than `max_cluster` items; the last code numbers its items.

Shape suffixes: N items, M new items, R items of one node, C clusters of one cut, L levels, V nodes.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ...errors import ArtifactError, IncompatibleComponentsError, TrainingError
from .code_tree import CODE_STYLES, CodeTree, rank_within, read_tree, write_tree
from .graph_spectrum import leading_eigenvectors, qr_affinity, row_unit
from .kmeans import kmeans
from .tree import quota_assignment

logger = logging.getLogger(__name__)

ASSIGNMENTS = ("qr", "kmeans")
_FORMAT = "hf_genrec.spectral_indexer.1"


class SpectralIndexer:
    """Recursive spectral partition of the co-occurrence graph: codes of a catalogue, and of items that come later.

    Args:
        num_clusters: C, clusters of one cut.
        max_cluster: a cluster with more items is cut again; also the numbers a leaf cluster has.
        eigengap: cut into fewer clusters where the largest gap between neighbouring eigenvalues says so.
        assign: `"qr"` (see `qr_affinity`), or `"kmeans"` on the eigenvectors scaled to row length 1.
        max_load: no cluster of a cut holds more than this multiple of the mean (rounded up). Real graphs have dangling
            bits that cost almost nothing to cut off; without a limit every cut may take off just those.
        smoothing: multiple of the mean degree added to all degrees, against the same (1.0 is a good value); see
            `leading_eigenvectors`.
        code_style: see `CodeTree`; `"node"` is the paper's: no child code is shared between parents.
        seed: for `assign="kmeans"`.

    What is not connected is separated first: every component gets clusters of its own, larger ones more, where there
    are at most C of them (items without links count as one component); with more, the small ones are packed together.

    Relations: one cut with one cluster per component is `connected_components`; `TreeIndexer` is the same recursion over
    vectors; CID's random, sequential and title indexing are other identifiers altogether.

    Example:
        >>> import numpy as np, scipy.sparse as sp
        >>> graph = sp.csr_matrix(np.kron(np.eye(2), np.ones((3, 3))))  # two groups that are bought together
        >>> indexer = SpectralIndexer(2, max_cluster=3).fit(graph)
        >>> indexer.codes_NL.tolist(), indexer.codebook_sizes
        ([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]], (2, 3))
    """

    def __init__(
        self,
        num_clusters: int = 16,
        *,
        max_cluster: int = 64,
        eigengap: bool = False,
        assign: str = "qr",
        max_load: float | None = None,
        smoothing: float = 0.0,
        code_style: str = "node",
        seed: int = 0,
    ) -> None:
        if num_clusters < 2 or max_cluster < 1:
            raise IncompatibleComponentsError(
                f"num_clusters must be at least 2 and max_cluster at least 1, got {num_clusters} and {max_cluster}"
            )
        if assign not in ASSIGNMENTS:
            raise IncompatibleComponentsError(f"assign must be one of {ASSIGNMENTS}, got {assign!r}")
        if code_style not in CODE_STYLES:
            raise IncompatibleComponentsError(f"code_style must be one of {CODE_STYLES}, got {code_style!r}")
        if max_load is not None and max_load < 1:
            raise IncompatibleComponentsError(f"max_load is a multiple of the mean size, at least 1, got {max_load}")
        if smoothing < 0:
            raise IncompatibleComponentsError(f"smoothing must not be negative, got {smoothing}")
        self.num_clusters, self.max_cluster, self.eigengap = int(num_clusters), int(max_cluster), eigengap
        self.assign, self.max_load, self.smoothing = assign, max_load, smoothing
        self.code_style, self.seed = code_style, seed
        self.tree: CodeTree | None = None
        self.codes_NL = torch.zeros(0, dtype=torch.int64)

    @property
    def num_levels(self) -> int:
        """L of the fitted tree."""
        return self._fitted().num_levels

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per level of the fitted tree; `encode` never leaves them."""
        return self._fitted().codebook_sizes

    def fit(self, graph_NN: Any) -> SpectralIndexer:
        """Build the tree over co-occurrence weights (N, N) and return self; `codes_NL` holds the codes of the items.

        Build the graph from the training part alone (`hf_genrec.data.cooccurrence`), or the identifiers leak. Both
        directions are added, the diagonal is ignored. Clusters come largest first, then by their first item; numbers in
        a cluster follow the catalogue.

        Raises:
            TrainingError: not a square matrix, no items, or weights that are negative or not finite (names the row).
        """
        graph = _checked(graph_NN)
        if graph.shape[0] != graph.shape[1] or graph.shape[0] == 0:
            raise TrainingError(f"the graph must be a non-empty square matrix over the items, got {graph.shape}")
        graph = (graph + graph.T).tocsr()
        graph.setdiag(0)
        graph.eliminate_zeros()
        graph.sort_indices()
        num_items = graph.shape[0]

        def split(rows_R: np.ndarray, depth: int) -> np.ndarray | None:
            if len(rows_R) <= self.max_cluster:
                return None
            code_R = _largest_first(self._split(graph[rows_R][:, rows_R]))
            if depth == 0 and self.num_clusters >= 4 and 2 * (code_R == 0).sum() > num_items:
                logger.warning(
                    f"spectral clustering: one of {code_R.max() + 1} first codes holds {(code_R == 0).sum()} of "
                    f"{num_items} items; smoothing=1.0 and max_load=2.0 spread them"
                )
            return code_R

        self.tree, leaf_N = CodeTree.grow(num_items, self.max_cluster, split, self.code_style)
        self.codes_NL = torch.from_numpy(self.tree.codes(leaf_N, rank_within(leaf_N)))
        return self

    def encode(self, links_MN: Any, taken_NL: Any = None) -> Tensor:
        """Codes (M, L) int64 for new items by their links to the N fitted items, unlike each other and `taken_NL`.

        Every item goes down to the child it has most weight to (without links: to the largest) and takes the lowest free
        number; out of a full leaf it moves to the next best cluster with room. Changes nothing here: for the next batch
        pass all codes in use by then.

        Raises:
            TrainingError: weights that are negative or not finite.
            IncompatibleComponentsError: another number of columns, `taken_NL` of another tree, no room left.
        """
        tree = self._fitted()
        links = _checked(links_MN)
        if links.shape[1] != len(self.codes_NL):
            raise IncompatibleComponentsError(
                f"links must be (new items, {len(self.codes_NL)} fitted items), got {links.shape}"
            )
        node_N, _ = tree.locate(self.codes_NL)
        weight_at = {}  # depth -> (M, clusters of that depth)
        for depth in range(tree.num_levels - 1, 0, -1):
            start, end = tree.start_of_depth[depth], tree.start_of_depth[depth + 1]
            deep_N = np.flatnonzero(tree.depth_V[node_N] == depth)
            member = sp.csr_matrix(
                (np.ones(len(deep_N)), (deep_N, node_N[deep_N] - start)), shape=(len(node_N), end - start)
            )
            weight_at[depth] = (links @ member).tocsr()
            node_N[deep_N] = tree.parent_V[node_N[deep_N]]

        def choose(node: int, rows_R: np.ndarray) -> np.ndarray:
            depth, first = int(tree.depth_V[node]) + 1, int(tree.first_child_V[node])
            column = first - int(tree.start_of_depth[depth])
            return weight_at[depth][rows_R][:, column : column + int(tree.num_children_V[node])].toarray()

        leaf_M, number_M = tree.place(links.shape[0], choose, self.codes_NL if taken_NL is None else taken_NL)
        return torch.from_numpy(tree.codes(leaf_M, number_M))

    def save(self, path: str | Path) -> None:
        """Write the fitted tree as one safetensors file (settings in its header, no pickle)."""
        tree = self._fitted()
        names = (
            "num_clusters", "max_cluster", "eigengap", "assign", "max_load", "smoothing", "code_style", "seed",
        )  # fmt: skip
        write_tree(path, _FORMAT, {name: getattr(self, name) for name in names}, tree, {"codes": self.codes_NL})

    @classmethod
    def load(cls, path: str | Path) -> SpectralIndexer:
        """Read a file written by `save`; codes of the same links are identical.

        Raises:
            ArtifactError: not a file of `save`, or its tensors do not fit each other.
        """
        settings, children_V, tensors = read_tree(path, _FORMAT)
        try:
            indexer = cls(**settings)
            indexer.tree = CodeTree(children_V, indexer.max_cluster, indexer.code_style)
            indexer.codes_NL = tensors["codes"]
            indexer.tree.locate(indexer.codes_NL)
        except (KeyError, TypeError, IncompatibleComponentsError) as error:
            raise ArtifactError(f"{path}: its parts do not fit each other ({error}); save the tree again") from error
        return indexer

    def _split(self, graph_RR: sp.csr_matrix) -> np.ndarray:
        """Cluster (R,) of every item of one node, at least two of them used."""
        num_items = graph_RR.shape[0]
        width = min(self.num_clusters, num_items)
        _, part_R = connected_components(graph_RR, directed=False)
        alone_R = np.diff(graph_RR.indptr) == 0
        part_R = np.unique(np.where(alone_R, len(part_R), part_R), return_inverse=True)[1]
        group_R, share_G = _apportion(part_R, width)
        code_R = np.empty(num_items, dtype=np.int64)
        first = 0
        for group, share in enumerate(share_G.tolist()):
            rows = np.flatnonzero(group_R == group)
            if share == 1 or len(rows) == 1:
                code_R[rows] = first
            elif alone_R[rows].all() or len(np.unique(part_R[rows])) > 1:
                code_R[rows] = first + np.arange(len(rows)) * share // len(rows)  # nothing to go by: even pieces
            else:
                code_R[rows] = first + self._cut(graph_RR[rows][:, rows], min(share, len(rows)))
            first += share
        return code_R

    def _cut(self, graph_RR: sp.csr_matrix, width: int) -> np.ndarray:
        """Spectral clusters (R,) of one connected component, at most `width` and at least two."""
        num_items = graph_RR.shape[0]
        values, vectors_RC = leading_eigenvectors(graph_RR, min(width + self.eigengap, num_items), self.smoothing)
        fiedler_R = vectors_RC[:, 1]
        if self.eigengap and len(values) > width:
            width = 2 + int((values[1:-1] - values[2:]).argmax())
        high = num_items if self.max_load is None else math.ceil(self.max_load * num_items / width)
        if self.assign == "qr":
            cost_RC = -qr_affinity(vectors_RC[:, :width])
        else:
            rows_RC = torch.from_numpy(row_unit(vectors_RC[:, :width])).float()
            generator = torch.Generator().manual_seed(self.seed)
            load = None if self.max_load is None else max(1.0, high * width / num_items)
            result = kmeans(rows_RC, width, generator=generator, max_load=load)
            cost_RC = (torch.cdist(rows_RC, result.centroids_CD).square() + result.price_C).numpy()
        code_R = quota_assignment(cost_RC, np.full(width, high))
        if code_R.min() == code_R.max():
            code_R = np.argsort(np.argsort(fiedler_R, kind="stable")) * width // num_items
        return code_R

    def _fitted(self) -> CodeTree:
        if self.tree is None:
            raise TrainingError("the tree is not fitted: call fit(graph) or load(path) first")
        return self.tree


def _checked(matrix: Any) -> sp.csr_matrix:
    """A float64 CSR copy, weights finite and not negative."""
    matrix = sp.csr_matrix(matrix, dtype=np.float64, copy=True)
    matrix.sum_duplicates()
    bad = ~(np.isfinite(matrix.data) & (matrix.data >= 0))
    if bad.any():
        row = int(np.searchsorted(matrix.indptr, int(np.flatnonzero(bad)[0]), side="right")) - 1
        raise TrainingError(
            f"weights of item row {row} hold a negative or non-finite value: co-occurrence counts are >= 0"
        )
    return matrix


def _apportion(part_R: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Group (R,) of every item by its connected part, and the number of clusters (at least 1) of every group.

    With at most `width` parts each is a group. With more, parts below the mean cluster size are packed, largest first
    into the emptiest of as many groups as their items are worth.
    """
    size_P = np.bincount(part_R)
    order_P = np.argsort(-size_P, kind="stable")
    group_P = np.empty(len(size_P), dtype=np.int64)
    if len(size_P) <= width:
        group_P[order_P] = np.arange(len(size_P))
        num_groups, fixed = len(size_P), 0
    else:
        mean = len(part_R) / width
        big = int((size_P > mean).sum())
        fixed = max(1, int(size_P[size_P <= mean].sum() / mean + 1e-9))
        group_P[order_P[:big]] = np.arange(big)
        filled = np.zeros(fixed)
        for part in order_P[big:]:
            group_P[part] = big + filled.argmin()
            filled[filled.argmin()] += size_P[part]
        num_groups = big + fixed
    share_G = np.ones(num_groups, dtype=np.int64)
    size_G = np.bincount(group_P[part_R], minlength=num_groups).astype(np.float64)
    if fixed and num_groups > fixed:
        size_G[-fixed:] = 0  # packed groups take one cluster each, the rest is for the big parts
    for _ in range(width - num_groups):  # one more cluster to whoever has most items per cluster
        share_G[(size_G / share_G).argmax()] += 1
    return group_P[part_R], share_G


def _largest_first(code_R: np.ndarray) -> np.ndarray:
    """Codes renumbered without gaps: most items first, then by first item."""
    _, first_C, code_R, size_C = np.unique(code_R, return_index=True, return_inverse=True, return_counts=True)
    new_C = np.empty(len(size_C), dtype=np.int64)
    new_C[np.lexsort((first_C, -size_C))] = np.arange(len(size_C))
    return new_C[code_R]
