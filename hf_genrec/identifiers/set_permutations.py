"""Random orders of feature sets that depend on a seed and a row of items, and on nothing else.

For set permutation regularisation (ActionPiece, arXiv 2502.13581): the same row gets the same orders in every batch,
process and machine, and another seed (epoch) or draw (segmentation of an ensemble) gives others.

Shape legend: B rows, n items of all rows, L features of an item.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Seed = int | Sequence[int]


def set_orders(
    lengths_B: np.ndarray, index_n: np.ndarray, num_levels: int, seed: Seed, draw_B: np.ndarray | None = None
) -> np.ndarray:
    """A random order of the L features of every item of every row, int64 (n, L).

    Args:
        lengths_B: items of each row; they sum to n.
        index_n: catalogue rows of all items, row after row.
        seed: an integer or several, as `numpy.random.SeedSequence` takes them.
        draw_B: number of the draw for each row, default 0.

    Example:
        >>> set_orders(np.array([1, 1]), np.array([7, 7]), 3, seed=1).tolist()  # equal rows, equal orders
        [[1, 0, 2], [1, 0, 2]]
    """
    row_n = np.repeat(np.arange(len(lengths_B)), lengths_B)
    place_n = (np.arange(len(index_n)) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)).astype(np.uint64)
    key_B = np.zeros(len(lengths_B), np.uint64)
    np.add.at(key_B, row_n, _mixed(_mixed(place_n) ^ index_n.astype(np.uint64)))
    key_B = _mixed(key_B ^ np.random.SeedSequence(seed).generate_state(1, np.uint64))
    key_B = _mixed(key_B if draw_B is None else key_B + draw_B.astype(np.uint64))
    feature_nL = place_n[:, None] * np.uint64(num_levels) + np.arange(num_levels, dtype=np.uint64)
    return np.argsort(_mixed(key_B[row_n][:, None] + _mixed(feature_nL)), axis=1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 noise that depends on the value alone: the splitmix64 finaliser."""
    noise = values + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        noise = (noise ^ (noise >> np.uint64(shift))) * np.uint64(factor)
    return noise ^ (noise >> np.uint64(31))
