"""Codes that are ways through a tree: hierarchical k-means (DSI, arXiv 2202.06991), co-occurrence partition (2305.06569).

No two items share a code, so nothing collides (`collisions: keep`). Codes are ordered: a code means something only
behind the ones before it. With `depth` or `balanced` all items of `tree` have the same number of codes; otherwise, and
always with `spectral`, crowded regions have longer ones (-1 behind the end). No code is the beginning of another, so a
model that leaves out the missing positions (T5 over codes) learns a distribution over the items all the same; models that
read a fixed number of tokens per item need `fixed_length`, which only the former trees give.

Shape suffixes: N items, E width of the item vectors, L levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_genrec.data.cooccurrence import cooccurrence
from hf_genrec.recipes.stages.context import Quantized, StageContext


def tree_codes(
    context: StageContext,
    vectors_NE: np.ndarray,
    *,
    branching: int | list[int] | None = None,
    depth: int | None = None,
    max_leaf: int | None = None,
    pca_dim: int | None = None,
    **options: Any,
) -> Quantized:
    """Hierarchical k-means on the item vectors; the fitted `TreeIndexer` places new items (`encode`).

    Args:
        branching: children of a node; None = the least number that makes room for all items in `depth` levels (16
            without `depth`).
        depth, max_leaf, pca_dim, options: see `TreeIndexer`.

    Raises:
        TrainingError: more items than the tree has room for.
    """
    from hf_genrec.identifiers.quantizers.tree import TreeIndexer

    if branching is None:
        branching = 16 if depth is None else full_branching(context.num_items, depth)
    if pca_dim is not None:
        pca_dim = min(pca_dim, vectors_NE.shape[1])  # a recipe's default for wide features also fits narrow ones
    indexer = TreeIndexer(branching, depth=depth, max_leaf=max_leaf, pca_dim=pca_dim, seed=context.seed, **options).fit(
        vectors_NE
    )
    return _quantized(indexer)


def spectral_codes(
    context: StageContext, vectors_NE: np.ndarray | None, *, window: int = 10, **options: Any
) -> Quantized:
    """Recursive spectral partition of the training part's co-occurrence graph; no item vectors.

    The fitted `SpectralIndexer` places new items by their links to the old ones (`encode`).

    Args:
        window: items further apart in a history than this do not count as consumed together.
        options: see `SpectralIndexer`.
    """
    from hf_genrec.identifiers.quantizers.spectral import SpectralIndexer

    graph_NN = cooccurrence(context.split.train, context.num_items, window=window, weight="uniform", directed=False)
    return _quantized(SpectralIndexer(seed=context.seed, **options).fit(graph_NN))


def full_branching(num_items: int, depth: int) -> int:
    """The least b >= 2 with b ** depth >= num_items.

    Example:
        >>> full_branching(1682, 2), full_branching(1681, 2), full_branching(5, 1)
        (42, 41, 5)
    """
    branching = max(2, int(num_items ** (1 / depth)))
    while branching > 2 and (branching - 1) ** depth >= num_items:
        branching -= 1
    while branching**depth < num_items:
        branching += 1
    return branching


def _quantized(indexer: Any) -> Quantized:
    # the fitted codes, not encode(the same items): encode gives new items the numbers that are left
    codes_NL = indexer.codes_NL.numpy()
    lengths_N = (codes_NL >= 0).sum(axis=1)
    record = {
        "tree": {
            "clusters": len(indexer.tree.num_children_V) - 1,
            "shortest_code": int(lengths_N.min()),
            "longest_code": int(lengths_N.max()),
        }
    }
    return Quantized(codes_NL, indexer.codebook_sizes, quantizer=indexer, record=record)
