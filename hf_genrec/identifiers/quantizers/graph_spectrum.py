"""Eigenvectors of an item graph, and clusters read off them (spectral clustering; CID, arXiv 2305.06569).

Shape suffixes: R items of a graph, C clusters.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.linalg import polar, qr
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

_DENSE_ITEMS = 400  # up to here all eigenvectors take milliseconds


def leading_eigenvectors(graph_RR: sp.csr_matrix, count: int, smoothing: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues (C,), falling, and eigenvectors (R, C) of the normalised graph; the same bits every time.

    The matrix is D^-1/2 W D^-1/2, i.e. 1 minus the normalised Laplacian; its largest eigenvalue is 1. `smoothing` adds
    this multiple of the mean degree to all degrees (regularised spectral clustering, Qin and Rohe, arXiv 1309.4111).
    Signs: the entry of largest size is positive.
    """
    degree_R = np.asarray(graph_RR.sum(1)).ravel()
    degree_R = degree_R + smoothing * degree_R.mean()
    scale_RR = sp.diags_array(np.where(degree_R > 0, degree_R, 1.0) ** -0.5)
    matrix = (scale_RR @ graph_RR @ scale_RR).tocsr()
    num_items = len(degree_R)
    if num_items <= max(_DENSE_ITEMS, 2 * count + 2):
        values, vectors_RC = np.linalg.eigh(matrix.toarray())
    else:
        # ARPACK draws at random where it has no start vector or breaks down, so it is handed both
        options: dict[str, Any] = {"v0": np.sqrt(degree_R), "ncv": min(num_items - 1, max(20, 3 * count)), "tol": 1e-6}
        options["v0"] = options["v0"] + options["v0"].mean() * np.random.default_rng(0).uniform(-1, 1, num_items)
        if "rng" in inspect.signature(eigsh).parameters:
            options["rng"] = np.random.default_rng(1)
        try:
            values, vectors_RC = eigsh(matrix, k=count, which="LA", maxiter=300, **options)
        except ArpackNoConvergence:
            values, vectors_RC = _subspace_iteration(matrix, count)
    order = np.argsort(-values, kind="stable")[:count]
    values, vectors_RC = values[order], vectors_RC[:, order]
    peak_C = np.take_along_axis(vectors_RC, np.abs(vectors_RC).argmax(0)[None], 0)
    return values, vectors_RC * np.where(peak_C < 0, -1.0, 1.0)


def _subspace_iteration(matrix: sp.csr_matrix, count: int, steps: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Approximate leading eigenpairs where ARPACK gives up: slower to converge, never fails."""
    block = np.random.default_rng(0).standard_normal((matrix.shape[0], 2 * count))
    for _ in range(steps):
        block, _ = np.linalg.qr(block + matrix @ block)  # the shift makes every eigenvalue positive
    values, rotation = np.linalg.eigh(block.T @ (matrix @ block))
    return values, block @ rotation


def qr_affinity(vectors_RC: np.ndarray) -> np.ndarray:
    """How much (R, C) every item belongs to each of C clusters, by a pivoted QR of C orthonormal eigenvectors.

    Damle, Minden and Ying, arXiv 1609.08251 (`cluster_qr` elsewhere): the pivots are C rows that are as independent as
    possible, one per cluster; the vectors are turned until those rows lie along the axes, and an item's cluster is its
    longest axis. Nothing to draw or iterate, and no rotation or sign of the eigenvectors changes the clusters.
    """
    count = vectors_RC.shape[1]
    pivots = qr(vectors_RC.T, mode="r", pivoting=True)[-1][:count]
    rotation, _ = polar(vectors_RC[pivots].T)
    return np.abs(row_unit(vectors_RC) @ rotation)


def row_unit(x_RC: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 (zero rows stay 0)."""
    return x_RC / np.maximum(np.linalg.norm(x_RC, axis=1, keepdims=True), 1e-300)
