"""Health report of identifiers: do codes tell items apart, are codebooks used, do similar items share prefixes?

Shape suffixes: N items, L levels, C codes of a level, E feature dimensions, Q query items, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import IncompatibleComponentsError
from .collision_groups import as_array, check_codes, code_groups

_PER_LEVEL = (
    "utilisation",
    "perplexity",
    "gini",
    "largest_code",
    "nodes",
    "mean_children",
    "max_children",
    "conditional_perplexity",
)


@dataclass(frozen=True)
class IdentifierHealth:
    """Figures of one set of identifiers; lists hold one entry per level.

    Attributes:
        num_items, codebook_sizes: what was looked at.
        mean_length: codes per item (the number of levels, less where codes end early). A level's figures are about the
            items that have a code there.
        distinct_codes: number of different full codes.
        items_sharing: items whose full code another item has too; `collision_rate` is their share of all items.
        largest_group: items of the most crowded full code (1 = no collision).
        utilisation: share of a codebook's codes that at least one item uses.
        perplexity: exp of the entropy of a level's codes: the number of equally used codes with the same entropy.
        gini: inequality of code use over the whole codebook, 0 = all codes equally often, towards 1 = one code.
        largest_code: items of the most used code.
        nodes: distinct prefixes of this length = nodes of the trie at this depth.
        mean_children, max_children: codes that follow a prefix one shorter, where any does.
        conditional_perplexity: exp of the entropy of a code given the codes before it; 1 = nothing left to decide.
        neighbour_k, neighbour_queries: neighbours per query, and queries; 0 without features.
        neighbour_hit_rate: share of the nearest feature neighbours (cosine) that share the first code.
        neighbour_hit_chance: the same for two different items drawn at random.
        neighbour_prefix_rate: share of neighbours that share the first l codes, l = 1..L.
        neighbour_prefix_depth: mean length of the common prefix with a neighbour.
    """

    num_items: int
    codebook_sizes: list[int]
    mean_length: float
    distinct_codes: int
    items_sharing: int
    collision_rate: float
    largest_group: int
    utilisation: list[float]
    perplexity: list[float]
    gini: list[float]
    largest_code: list[int]
    nodes: list[int]
    mean_children: list[float]
    max_children: list[int]
    conditional_perplexity: list[float]
    neighbour_k: int = 0
    neighbour_queries: int = 0
    neighbour_hit_rate: float | None = None
    neighbour_hit_chance: float | None = None
    neighbour_prefix_rate: list[float] | None = None
    neighbour_prefix_depth: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        shorter = self.mean_length < len(self.codebook_sizes)
        length = f", {self.mean_length:.2f} codes per item" if shorter else ""
        lines = [
            f"{self.num_items} items, {self.distinct_codes} distinct codes of {len(self.codebook_sizes)} levels{length}",
            f"{self.items_sharing} items share a full code ({self.collision_rate:.2%}), largest group "
            f"{self.largest_group}",
            "level   size   used  perplexity   gini  largest   nodes  children mean/max  perplexity given prefix",
        ]
        for level, size in enumerate(self.codebook_sizes):
            lines.append(
                f"{level + 1:>5} {size:>6} {self.utilisation[level]:>6.1%} {self.perplexity[level]:>11.1f} "
                f"{self.gini[level]:>6.3f} {self.largest_code[level]:>8} {self.nodes[level]:>7} "
                f"{self.mean_children[level]:>13.1f}/{self.max_children[level]:<4}"
                f"{self.conditional_perplexity[level]:>24.2f}"
            )
        if self.neighbour_hit_rate is not None and self.neighbour_prefix_rate is not None:
            rates = " ".join(f"{rate:.3f}" for rate in self.neighbour_prefix_rate)
            lines.append(
                f"{self.neighbour_k} nearest neighbours share the first code: {self.neighbour_hit_rate:.3f} "
                f"(chance {self.neighbour_hit_chance:.3f}), the first 1..L codes: {rates}"
            )
        return "\n".join(lines)


def _entropy(count: np.ndarray) -> float:
    share = count[count > 0] / max(int(count.sum()), 1)
    return float(-(share * np.log(share)).sum())


def _gini(count_C: np.ndarray) -> float:
    if not count_C.any():
        return 0.0
    sorted_C = np.sort(count_C).astype(np.float64)
    rank_C = np.arange(1, len(sorted_C) + 1)
    return float(((2 * rank_C - len(sorted_C) - 1) * sorted_C).sum() / (len(sorted_C) * sorted_C.sum()))


def neighbour_prefix_depths(
    codes_NL: np.ndarray, features_NE: np.ndarray, *, k: int = 10, max_queries: int = 2048, chunk_size: int = 256
) -> np.ndarray:
    """Length of the common code prefix of items and their nearest feature neighbours, (Q, K) int64 in 0..L.

    Nearest by cosine, the item itself left out; that two codes end at the same level does
    not count. Above `max_queries` items, evenly spaced ones are asked. Memory: chunk_size x N floats.
    """
    features_NE = np.asarray(features_NE, dtype=np.float32)
    features_NE = features_NE / np.maximum(np.linalg.norm(features_NE, axis=1, keepdims=True), 1e-12)
    num_items = len(codes_NL)
    queries_Q = np.unique(np.linspace(0, num_items - 1, min(num_items, max_queries)).astype(np.int64))
    k = min(k, num_items - 1)
    depth_QK = np.empty((len(queries_Q), k), dtype=np.int64)
    for start in range(0, len(queries_Q), chunk_size):
        rows = queries_Q[start : start + chunk_size]
        similarity = features_NE[rows] @ features_NE.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        own = codes_NL[rows][:, None, :]
        same = (codes_NL[nearest] == own) & (own >= 0)
        depth_QK[start : start + len(rows)] = np.logical_and.accumulate(same, axis=2).sum(2)
    return depth_QK


def identifier_health(
    codes_NL: Any,
    codebook_sizes: Sequence[int],
    features: Any = None,
    *,
    neighbours: int = 10,
    max_queries: int = 2048,
) -> IdentifierHealth:
    """Look at identifiers (N, L), -1 behind the end of shorter ones, and with features (N, E) at whether near items share.

    Raises:
        IncompatibleComponentsError: codes that do not fit their codebooks, or features of another number of items.

    Example:
        >>> health = identifier_health([[0, 0], [0, 0], [1, 1]], (2, 4))
        >>> health.items_sharing, round(health.collision_rate, 3), health.largest_group, health.nodes
        (2, 0.667, 2, [2, 2])
    """
    codes_NL, sizes = check_codes(codes_NL, codebook_sizes)
    num_items = len(codes_NL)
    figures: dict[str, Any] = {name: [] for name in _PER_LEVEL}
    parent_N = np.zeros(num_items, dtype=np.int64)  # of the items that go on
    alive = np.arange(num_items)
    for level, size in enumerate(sizes):
        goes_on = codes_NL[alive, level] >= 0
        alive, parent_N = alive[goes_on], parent_N[goes_on]
        count_C = np.bincount(codes_NL[alive, level], minlength=size)
        figures["utilisation"].append(float((count_C > 0).mean()))
        figures["perplexity"].append(float(np.exp(_entropy(count_C))))
        figures["gini"].append(_gini(count_C))
        figures["largest_code"].append(int(count_C.max()))
        if len(alive) == 0:
            node_N, node_size = alive, alive
        else:
            node_N, node_size = code_groups(codes_NL[alive, : level + 1], sizes[: level + 1])
        node_parent = np.empty(len(node_size), dtype=np.int64)
        node_parent[node_N] = parent_N
        children = np.bincount(node_parent, minlength=1)
        figures["nodes"].append(len(node_size))
        figures["mean_children"].append(len(node_size) / max(int(np.count_nonzero(children)), 1))
        figures["max_children"].append(int(children.max()))
        given = _entropy(node_size) - _entropy(np.bincount(parent_N, minlength=1))
        figures["conditional_perplexity"].append(float(np.exp(given)))
        parent_N = node_N
    group_N, group_size = code_groups(codes_NL, sizes)
    sharing = int((group_size[group_N] > 1).sum())
    neighbour: dict[str, Any] = {}
    if features is not None and num_items > 1:
        neighbour = _neighbour_figures(codes_NL, features, neighbours, max_queries)
    return IdentifierHealth(
        num_items=num_items,
        codebook_sizes=list(sizes),
        mean_length=float((codes_NL >= 0).sum(1).mean()),
        distinct_codes=len(group_size),
        items_sharing=sharing,
        collision_rate=sharing / num_items,
        largest_group=int(group_size.max()),
        **figures,
        **neighbour,
    )


def _neighbour_figures(codes_NL: np.ndarray, features: Any, k: int, max_queries: int) -> dict[str, Any]:
    features_NE = as_array(features)
    if features_NE.ndim != 2 or len(features_NE) != len(codes_NL):
        raise IncompatibleComponentsError(
            f"features of shape {features_NE.shape} do not belong to {len(codes_NL)} items: pass one row per item"
        )
    depth_QK = neighbour_prefix_depths(codes_NL, features_NE, k=k, max_queries=max_queries)
    rates = [float((depth_QK >= depth).mean()) for depth in range(1, codes_NL.shape[1] + 1)]
    count_C = np.bincount(codes_NL[:, 0]).astype(np.float64)
    return {
        "neighbour_k": depth_QK.shape[1],
        "neighbour_queries": len(depth_QK),
        "neighbour_hit_rate": rates[0],
        "neighbour_hit_chance": float((count_C * (count_C - 1)).sum() / (len(codes_NL) * (len(codes_NL) - 1))),
        "neighbour_prefix_rate": rates,
        "neighbour_prefix_depth": float(depth_QK.mean()),
    }
