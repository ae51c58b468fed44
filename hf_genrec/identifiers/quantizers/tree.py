"""Tree identifiers: hierarchical k-means whose leaves name single items (DSI, arXiv 2202.06991; SEATER, 2309.13375).

An item's codes are the way from the root to its leaf cluster and, last, its number there: no two items share a code, so
nothing collides. `TreeIndexer` splits feature vectors by k-means; the tree without the clustering is `CodeTree`.

Shape suffixes: N items, M new items, R items of one node, D feature dimensions, P projected dimensions (P = D without
`pca_dim`), V nodes (clusters) in breadth-first order, C children of a node, L levels (codes of an item).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...errors import ArtifactError, IncompatibleComponentsError, TrainingError
from ..features import PrincipalComponents
from .code_tree import CODE_STYLES, CodeTree, rank_within, read_tree, write_tree
from .kmeans import DEFAULT_CHUNK, check_features, cluster_sums, kmeans

logger = logging.getLogger(__name__)

_EXACT_POINTS = 256  # nodes up to this size get the optimal assignment under size limits
_DEEP = 24  # levels from which on a tree is worth a warning
_FORMAT = "hf_genrec.tree_indexer.1"


def optimal_assignment(cost_RC: np.ndarray, low: int, high: int) -> np.ndarray:
    """Codes (R,) of least total cost with between `low` and `high` points per code; cubic in R."""
    num_points, num_codes = cost_RC.shape
    high = min(high, num_points)
    slot_S = np.repeat(np.arange(num_codes), high)
    # rows behind the points fill the slots that stay empty; the first `low` slots of a code are closed to them
    empty_S = np.where(np.tile(np.arange(high), num_codes) < low, 1.0, 0.0) * (1.0 + np.ptp(cost_RC) * num_points)
    padded_SS = np.concatenate([cost_RC[:, slot_S], np.tile(empty_S, (len(slot_S) - num_points, 1))])
    return slot_S[linear_sum_assignment(padded_SS)[1][:num_points]]


def quota_assignment(cost_RC: np.ndarray, quota_C: np.ndarray) -> np.ndarray:
    """Codes (R,) with at most `quota_C` points each: the cheapest code, and the cheapest moves out of full ones.

    Greedy and vectorised: every round moves the points that lose least, and ends all surplus or fills up a code.
    """
    code_R = cost_RC.argmin(1)
    while True:
        surplus_C = np.bincount(code_R, minlength=len(quota_C)) - quota_C
        moving = np.flatnonzero(surplus_C[code_R] > 0)
        if len(moving) == 0:
            return code_R
        open_C = np.flatnonzero(surplus_C < 0)
        loss_RC = cost_RC[np.ix_(moving, open_C)] - cost_RC[moving, code_R[moving]][:, None]
        target, loss = open_C[loss_RC.argmin(1)], loss_RC.min(1)
        first = rank_within(code_R[moving], loss) < surplus_C[code_R[moving]]
        moving, target, loss = moving[first], target[first], loss[first]
        fits = rank_within(target, loss) < -surplus_C[target]
        code_R[moving[fits]] = target[fits]


class TreeIndexer:
    """Hierarchical k-means with size limits and one leaf per item: codes of a catalogue, and of items that come later.

    Args:
        branching: children of a node, one number or one per depth (the last one goes on for deeper nodes).
        depth: L, codes of every item, the item number included. None: a cluster is split while it holds more than
            `max_leaf` items (codes of several lengths, -1 behind their end); with `balanced` the least L that fits.
        max_leaf: items of a leaf cluster, at most (default: the last `branching`).
        balanced: the children of a node differ by at most one item (so do all clusters of one depth).
        max_load: no child holds more than this multiple of the mean (rounded up). Text vectors need it (2.0, say):
            plain k-means leaves one crowded cluster behind, and the tree grows deep there.
        code_style: see `CodeTree`.
        seed, iterations, subsample, chunk_size, pca_dim, whiten: see `ResidualKMeans`.

    With `depth` no cluster gets more items than fit below it. Memory under size limits: N x branching floats.

    Relations: `branching=10, max_leaf=100` is DSI, `30, 30` NCI (arXiv 2206.02743); `balanced=True` SEATER;
    `depth=3, branching=32` ColaRec (2403.18480); `depth=2, balanced=True, code_style="prefix"` a stream of EAGER. A
    tree of one split is k-means with a counter; `ResidualKMeans` clusters all residuals of a level together instead.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [0.1], [9.0], [9.1], [9.2]])
        >>> tree = TreeIndexer(2, max_leaf=3).fit(x)
        >>> tree.codes_NL[:, 0].unique_consecutive(return_counts=True)[1].tolist(), tree.codebook_sizes
        ([2, 3], (2, 3))
        >>> bool(tree.encode(torch.tensor([[0.2]]))[0, 0] == tree.codes_NL[0, 0])
        True
    """

    def __init__(
        self,
        branching: int | Sequence[int] = 16,
        *,
        depth: int | None = None,
        max_leaf: int | None = None,
        balanced: bool = False,
        max_load: float | None = None,
        code_style: str = "local",
        seed: int = 0,
        iterations: int = 25,
        subsample: int = 16384,
        chunk_size: int = DEFAULT_CHUNK,
        pca_dim: int | None = None,
        whiten: bool = False,
    ) -> None:
        self.branching = tuple(map(int, branching)) if isinstance(branching, Sequence) else (int(branching),)
        if not self.branching or min(self.branching) < 2:
            raise IncompatibleComponentsError(f"branching must be at least 2 at every depth, got {branching}")
        self.max_leaf = self.branching[-1] if max_leaf is None else int(max_leaf)
        if self.max_leaf < 1 or (depth is not None and depth < 1):
            raise IncompatibleComponentsError(f"max_leaf and depth must be at least 1, got {max_leaf} and {depth}")
        if depth is not None and len(self.branching) > max(depth - 1, 1):
            raise IncompatibleComponentsError(
                f"depth={depth} splits {depth - 1} times (the last code numbers items), branching has "
                f"{len(self.branching)} entries: give one number, or at most {max(depth - 1, 1)}"
            )
        if max_load is not None and max_load < 1:
            raise IncompatibleComponentsError(f"max_load is a multiple of the mean size, at least 1, got {max_load}")
        if code_style not in CODE_STYLES:
            raise IncompatibleComponentsError(f"code_style must be one of {CODE_STYLES}, got {code_style!r}")
        if whiten and pca_dim is None:
            raise IncompatibleComponentsError("whiten=True needs pca_dim: whitening keeps only the leading components")
        self.depth, self.balanced, self.max_load, self.code_style = depth, balanced, max_load, code_style
        self.seed, self.iterations, self.subsample, self.chunk_size = seed, iterations, subsample, chunk_size
        self.pca_dim, self.whiten = pca_dim, whiten
        self.tree: CodeTree | None = None
        self.centroids_VP = torch.zeros(0)
        self.codes_NL = torch.zeros(0, dtype=torch.int64)
        self.projection: PrincipalComponents | None = None

    @property
    def num_levels(self) -> int:
        """L of the fitted tree."""
        return self._fitted()[0].num_levels

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per level of the fitted tree; `encode` never leaves them."""
        return self._fitted()[0].codebook_sizes

    def fit(self, x_ND: Tensor | np.ndarray) -> TreeIndexer:
        """Build the tree over features (N, D) and return self; `codes_NL` then holds the codes of these items.

        The order of the rows does not matter: permuted features get permuted codes (equal rows may swap their numbers).
        In a leaf, number 0 is the item nearest to its centre.

        Raises:
            TrainingError: not a matrix, NaN or infinite values (names the row), or more items than fit into `depth`.
        """
        x_ND = check_features(x_ND).cpu()
        splits = self._num_splits(len(x_ND))
        order_N = _canonical_order(x_ND)
        x_ND = x_ND[order_N]
        self.projection = PrincipalComponents.fit(x_ND, self.pca_dim, whiten=self.whiten)
        x_NP = self.projection.apply(x_ND)
        generator = torch.Generator().manual_seed(self.seed)
        centroids = [x_NP.mean(0, keepdim=True)]

        def split(rows_R: np.ndarray, depth: int) -> np.ndarray | None:
            if depth == splits or (splits is None and len(rows_R) <= self.max_leaf):
                return None
            code_R, centroids_CP = self._split(x_NP[torch.from_numpy(rows_R)], depth, splits, generator)
            used_C, child_R = np.unique(code_R, return_inverse=True)
            centroids.append(centroids_CP[torch.from_numpy(used_C)])
            return child_R

        self.tree, leaf_N = CodeTree.grow(len(x_NP), self.max_leaf, split, self.code_style)
        if splits is None and self.tree.num_levels > _DEEP:
            logger.warning(
                f"tree of {self.tree.num_levels} levels over {len(x_NP)} items: k-means splits off few items at a "
                "time; max_load=2.0 and pca_dim=32 spread them"
            )
        self.centroids_VP = torch.cat(centroids)
        distance_N = (x_NP - self.centroids_VP[torch.from_numpy(leaf_N)]).pow(2).sum(1).numpy()
        codes_NL = torch.from_numpy(self.tree.codes(leaf_N, rank_within(leaf_N, distance_N)))
        self.codes_NL = torch.empty_like(codes_NL)
        self.codes_NL[order_N] = codes_NL
        return self

    def encode(self, x_MD: Tensor | np.ndarray, taken_NL: Any = None) -> Tensor:
        """Codes (M, L) int64 for new items, unlike each other and all of `taken_NL` (default: the fitted items).

        Every item goes down to the nearest child and takes the lowest free number; out of a full leaf it moves to the
        nearest cluster with room. Changes nothing here: for the next batch pass all codes that are in use by then.

        Raises:
            IncompatibleComponentsError: other dimensions than fitted, `taken_NL` of another tree, no room left.
        """
        tree, projection = self._fitted()
        x_MP = projection.apply(check_features(x_MD).cpu())

        def choose(node: int, rows_R: np.ndarray) -> np.ndarray:
            first = int(tree.first_child_V[node])
            book_CP = self.centroids_VP[first : first + int(tree.num_children_V[node])]
            return torch.addmm(book_CP.pow(2).sum(1).mul(-0.5), x_MP[torch.from_numpy(rows_R)], book_CP.t()).numpy()

        return torch.from_numpy(
            tree.codes(*tree.place(len(x_MP), choose, self.codes_NL if taken_NL is None else taken_NL))
        )

    def decode(self, codes_NL: Tensor | np.ndarray) -> Tensor:
        """Features (N, D) that codes (N, L) stand for: the centre of their leaf cluster."""
        tree, projection = self._fitted()
        return projection.invert(self.centroids_VP[torch.from_numpy(tree.locate(codes_NL)[0])])

    def save(self, path: str | Path) -> None:
        """Write the fitted tree as one safetensors file (settings in its header, no pickle)."""
        tree, projection = self._fitted()
        names = (
            "branching", "depth", "max_leaf", "balanced", "max_load", "code_style", "seed", "iterations", "subsample",
            "chunk_size", "pca_dim", "whiten",
        )  # fmt: skip
        tensors = {f"projection.{name}": value for name, value in projection.tensors().items()}
        tensors |= {"centroids": self.centroids_VP, "codes": self.codes_NL}
        write_tree(path, _FORMAT, {name: getattr(self, name) for name in names}, tree, tensors)

    @classmethod
    def load(cls, path: str | Path) -> TreeIndexer:
        """Read a file written by `save`; codes of the same features are identical.

        Raises:
            ArtifactError: not a file of `save`, or its tensors do not fit each other.
        """
        settings, children_V, tensors = read_tree(path, _FORMAT)
        try:
            indexer = cls(**settings)
            indexer.tree = CodeTree(children_V, indexer.max_leaf, indexer.code_style)
            indexer.centroids_VP, indexer.codes_NL = tensors["centroids"], tensors["codes"]
            indexer.projection = PrincipalComponents.from_tensors(
                {name.removeprefix("projection."): t for name, t in tensors.items() if name.startswith("projection.")}
            )
            indexer.tree.locate(indexer.codes_NL)
        except (KeyError, TypeError, IncompatibleComponentsError) as error:
            raise ArtifactError(f"{path}: its parts do not fit each other ({error}); save the tree again") from error
        if len(indexer.centroids_VP) != len(indexer.tree.num_children_V):
            raise ArtifactError(f"{path}: {len(indexer.centroids_VP)} centres for another number of nodes; save again")
        return indexer

    def _width(self, depth: int) -> int:
        return self.branching[min(depth, len(self.branching) - 1)]

    def _num_splits(self, num_items: int) -> int | None:
        """Depth of all leaf clusters; None where every cluster decides for itself."""
        if self.depth is None and not self.balanced:
            return None
        splits, room = 0, self.max_leaf
        while splits < self.depth - 1 if self.depth is not None else room < num_items:
            room *= self._width(splits)
            splits += 1
        if num_items > room:
            raise TrainingError(
                f"{num_items} items do not fit into a tree of depth={self.depth}, branching={self.branching} and "
                f"max_leaf={self.max_leaf} ({room} leaves): raise one of them"
            )
        return splits

    def _split(
        self, x_RP: Tensor, depth: int, splits: int | None, generator: torch.Generator
    ) -> tuple[np.ndarray, Tensor]:
        """Codes and centres of the children of one node, within all size limits."""
        num_points, width = len(x_RP), min(self._width(depth), len(x_RP))
        low, high = 0, num_points
        if self.balanced:
            low, high = num_points // width, -(-num_points // width)
        elif splits is not None:
            high = min(high, self.max_leaf * math.prod(self._width(below) for below in range(depth + 1, splits)))
        if self.max_load is not None:
            high = min(high, math.ceil(self.max_load * num_points / width))
        options: dict[str, Any] = {
            "generator": generator, "iterations": self.iterations, "subsample": self.subsample,
            "chunk_size": self.chunk_size,
        }  # fmt: skip
        exact = num_points <= _EXACT_POINTS and width * high <= 2 * _EXACT_POINTS
        if not self.balanced or exact:
            result = kmeans(x_RP, width, **options)
            code_R, centroids_CP = result.codes_N.numpy(), result.centroids_CD
            size_C = np.bincount(code_R, minlength=width)
            stuck = splits is None and int(size_C.max()) == num_points  # (nearly) equal vectors: cut into even pieces
            if low <= size_C.min() and size_C.max() <= high and not stuck:
                return code_R, centroids_CP
            high = -(-num_points // width) if stuck else high
        if exact:
            for _ in range(self.iterations):
                before_R = code_R
                code_R = optimal_assignment(_cost(x_RP, centroids_CP), low, high)
                centroids_CP = _centres(x_RP, code_R, centroids_CP)
                if np.array_equal(code_R, before_R):
                    break
            return code_R, centroids_CP
        result = kmeans(x_RP, width, max_load=max(1.0, high * width / num_points), **options)
        cost_RC = _cost(x_RP, result.centroids_CD) + result.price_C.numpy()
        quota_C = np.full(width, high)
        if low < high and self.balanced:  # the codes that draw most points get the one more
            most = np.argsort(-np.bincount(cost_RC.argmin(1), minlength=width), kind="stable")
            quota_C[most[num_points - low * width :]] = low
        code_R = quota_assignment(cost_RC, quota_C)
        return code_R, _centres(x_RP, code_R, result.centroids_CD)

    def _fitted(self) -> tuple[CodeTree, PrincipalComponents]:
        if self.tree is None or self.projection is None:
            raise TrainingError("the tree is not fitted: call fit(features) or load(path) first")
        return self.tree, self.projection


def _canonical_order(x_ND: Tensor) -> Tensor:
    """An order of the rows that depends on their values alone, so that clustering cannot depend on the given order."""
    rows = np.ascontiguousarray(x_ND.numpy() + np.float32(0))  # + 0 turns -0.0 into 0.0
    return torch.from_numpy(np.argsort(rows.view(f"S{rows.itemsize * rows.shape[1]}").ravel(), kind="stable"))


def _cost(x_RP: Tensor, centroids_CP: Tensor) -> np.ndarray:
    """Squared distances (R, C) up to a constant per row, float32."""
    return torch.addmm(centroids_CP.pow(2).sum(1), x_RP, centroids_CP.t(), alpha=-2).numpy()


def _centres(x_RP: Tensor, code_R: np.ndarray, centroids_CP: Tensor) -> Tensor:
    """Means of the codes; a code without points keeps its centre."""
    codes_R = torch.from_numpy(code_R)
    count_C1 = torch.bincount(codes_R, minlength=len(centroids_CP))[:, None]
    return torch.where(
        count_C1 > 0, cluster_sums(x_RP, codes_R, len(centroids_CP)) / count_C1.clamp_min(1), centroids_CP
    )
