"""Where an item is and when it is used: coordinates, regions, histograms of the hour and the weekday of its interactions.

Features of places as in GNPR-SID (arXiv 2506.01375), whose identifiers are made of category, region and time.

Shape legend: N items, H hours (24), W weekdays (7), n interactions.
"""

from __future__ import annotations

import numpy as np

from ..errors import ItemTableError


def on_the_sphere(latitude_N: np.ndarray, longitude_N: np.ndarray) -> np.ndarray:
    """Coordinates in degrees as points of the unit sphere, float32 (N, 3): near places are near, also across 180 degrees.

    Items without coordinates (NaN) get the mean of the others.

    Raises:
        ItemTableError: a coordinate out of range (row named), or none at all.

    Example:
        >>> on_the_sphere(np.array([0.0, 90.0]), np.array([0.0, 0.0])).round(3).tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    latitude_N, longitude_N = np.asarray(latitude_N, np.float64), np.asarray(longitude_N, np.float64)
    known_N = np.isfinite(latitude_N) & np.isfinite(longitude_N)
    bad_N = known_N & ((np.abs(latitude_N) > 90) | (np.abs(longitude_N) > 360))
    if bad_N.any():
        row = int(bad_N.argmax())
        raise ItemTableError(
            f"item row {row}: latitude {latitude_N[row]:g}, longitude {longitude_N[row]:g} is no place in degrees; fix it"
        )
    if not known_N.any():
        raise ItemTableError("no item has a latitude and a longitude; leave the columns out")
    across, along = np.radians(latitude_N), np.radians(longitude_N)
    points_N3 = np.stack([np.cos(across) * np.cos(along), np.cos(across) * np.sin(along), np.sin(across)], axis=1)
    points_N3[~known_N] = points_N3[known_N].mean(axis=0)
    return points_N3.astype(np.float32)


def time_histograms(items_n: np.ndarray, seconds_n: np.ndarray, num_items: int, *, prior: float = 5.0) -> np.ndarray:
    """Share of an item's interactions in every hour of the day and on every weekday (UTC), float32 (N, 24 + 7).

    Args:
        items_n, seconds_n: item and unix seconds of the *training* interactions.
        prior: interactions, spread as those of all items, that every item is given on top: items without any get the
            overall histogram.

    Example:
        >>> time_histograms(np.array([0]), np.array([3600 * 5]), 1, prior=0.0)[0].nonzero()[0].tolist()  # a Thursday
        [5, 27]
    """
    hour_n = (seconds_n // 3600) % 24
    weekday_n = (seconds_n // 86400 + 3) % 7  # 1970-01-01 was a Thursday; 0 = Monday
    parts = []
    for value_n, size in ((hour_n, 24), (weekday_n, 7)):
        counts = np.bincount(items_n * size + value_n, minlength=num_items * size).reshape(num_items, size)
        overall = counts.sum(axis=0) / max(counts.sum(), 1)
        smoothed = counts + prior * overall
        parts.append(smoothed / np.maximum(smoothed.sum(axis=1, keepdims=True), 1e-12))
    return np.concatenate(parts, axis=1).astype(np.float32)
