"""Item-item co-occurrence inside a window of the history: the item graph.

Shapes: N items.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.sparse as sp

from hf_genrec.data.sequences import Sequences


def cooccurrence(
    train: Sequences,
    num_items: int,
    *,
    window: int = 10,
    weight: Literal["inverse_gap", "uniform"] = "inverse_gap",
    directed: bool = True,
) -> sp.csr_matrix:
    """How often (and how near) item j follows item i in the same row.

    Entry [i, j] is the sum over all pairs of positions p < q of one row with `q - p <= window`, item i at p and item j
    at q, of `1 / (q - p)` ("inverse_gap") or 1 ("uniform"). An item consumed twice within the window counts on the
    diagonal.

    Args:
        train: rows of item indices, oldest first.
        num_items: catalogue size N.
        window: largest gap in items.
        weight: what one pair adds.
        directed: False adds the transpose, so that the matrix is symmetric.

    Returns:
        (N, N) float64 CSR matrix, indices sorted.

    Raises:
        ValueError: unknown weight, window < 1, or an item index outside 0..N-1.

    Example:
        >>> cooccurrence(Sequences.from_rows([[0, 1, 2]]), 3).toarray().tolist()
        [[0.0, 1.0, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    if weight not in ("inverse_gap", "uniform"):
        raise ValueError(f"weight={weight!r}: use 'inverse_gap' or 'uniform'")
    if window < 1:
        raise ValueError(f"window={window}: use at least 1")
    items = train.items
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise ValueError(f"item indices run from {items.min()} to {items.max()}, but num_items is {num_items}")
    row = train.row_index()
    total = sp.csr_matrix((num_items, num_items), dtype=np.float64)
    longest = int(train.lengths.max()) if len(train) else 0
    for gap in range(1, min(window, longest - 1) + 1):
        same = row[gap:] == row[:-gap]
        value = 1.0 / gap if weight == "inverse_gap" else 1.0
        first, second = items[:-gap][same], items[gap:][same]
        # one matrix per gap keeps the memory at O(nnz) instead of O(nnz * window)
        total = total + sp.csr_matrix((np.full(len(first), value), (first, second)), shape=total.shape)
    if not directed:
        total = (total + total.T).tocsr()
    total.sort_indices()
    return total
