"""Bootstrap intervals over users: percentile intervals of means, paired differences, and seeds pooled with users.

A resample draws M users with replacement. Instead of M draws per resample, users with equal values are grouped and one
multinomial draw counts how often each group is hit: the same distribution, and for metrics of a rank (at most K + 1
distinct values) a thousand resamples of 50,000 users cost milliseconds. Seeded: equal input, equal interval.

Method: Efron's percentile bootstrap (1979); the paired p-value uses the difference shifted to a mean of 0.

Legend: M evaluation rows, U users, F metrics, G groups of users with equal values, R resamples, S seeds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_genrec.errors import RequestError

_CHUNK_CELLS = 8_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds `level` of its bootstrap distribution."""

    mean: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class PairedDifference:
    """Mean of `a - b` over the same users, its interval, and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float
    num_users: int
    level: float = 0.95

    @property
    def verdict(self) -> str:
        """`"better"` or `"worse"` when the interval excludes 0, else `"no clear difference"`."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear difference"

    def to_dict(self) -> dict:
        """Plain numbers, with the verdict."""
        return asdict(self) | {"verdict": self.verdict}

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], p = {self.p_value:.3f}: {self.verdict}"


def _as_columns(values: np.ndarray) -> np.ndarray:
    values_MF = np.asarray(values, dtype=np.float64)
    values_MF = values_MF[:, None] if values_MF.ndim == 1 else values_MF
    if values_MF.ndim != 2 or not len(values_MF):
        raise RequestError(f"the bootstrap needs values of at least one user, (M,) or (M, F); got {values_MF.shape}")
    if not np.isfinite(values_MF).all():
        raise RequestError(
            f"value of user row {int(np.argwhere(~np.isfinite(values_MF))[0, 0])} is not finite: "
            "pass metric values (a target that was not retrieved is 0), not ranks"
        )
    return values_MF


def _sums_and_rows(values_MF: np.ndarray, users: np.ndarray | None) -> np.ndarray:
    """`(U, F + 1)`: sum of the values of each user, and his number of rows."""
    with_rows = np.concatenate([values_MF, np.ones((len(values_MF), 1))], axis=1)
    if users is None:
        return with_rows
    if len(users) != len(values_MF):
        raise RequestError(f"{len(users)} users for {len(values_MF)} rows of values")
    unique, owner_M = np.unique(users, return_inverse=True)
    if len(unique) == len(values_MF):
        return with_rows
    sums = np.zeros((len(unique), with_rows.shape[1]))
    np.add.at(sums, owner_M, with_rows)
    return sums


def _resampled_sums(sums_UF: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Column sums `(R, F)` over U users drawn with replacement, R times."""
    groups_GF, counts_G = np.unique(sums_UF, axis=0, return_counts=True)
    num_users, num_groups = int(counts_G.sum()), len(counts_G)
    # When nearly every user is a group of his own, drawing users is cheaper than one binomial per group.
    grouped = num_groups * 4 < num_users
    owner_M = None if grouped else np.repeat(np.arange(num_groups), counts_G)
    chunk = max(1, _CHUNK_CELLS // num_groups)
    totals = np.empty((resamples, sums_UF.shape[1]))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        if owner_M is None:
            drawn = rng.multinomial(num_users, counts_G / num_users, size=size)
        else:
            drawn = np.empty((size, num_groups), dtype=np.int64)
            for r in range(size):
                drawn[r] = np.bincount(owner_M[rng.integers(num_users, size=num_users)], minlength=num_groups)
        totals[start : start + size] = drawn @ groups_GF
    return totals


def bootstrap_means(
    values: np.ndarray, *, resamples: int = 1000, seed: int = 0, users: np.ndarray | None = None
) -> np.ndarray:
    """Means `(R, F)` over rows of `resamples` resamples of the users; `values` is `(M,)` or `(M, F)`, finite."""
    totals = _resampled_sums(_sums_and_rows(_as_columns(values), users), resamples, np.random.default_rng(seed))
    return totals[:, :-1] / totals[:, -1:]


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0, users: np.ndarray | None = None
) -> Any:
    """Percentile interval of the mean over rows, by resampling users.

    Args:
        values: `(M,)` per-row values, or `(M, F)` for F metrics of the same rows (resampled together).
        level: Share of the bootstrap distribution inside the interval.
        resamples: At least 1.
        seed: Of the resampling.
        users: `(M,)` user of each row. Rows of one user are drawn together; default every row is a user.

    Returns:
        An `Interval`, or a list of F of them for `(M, F)`.

    Raises:
        RequestError: No row, a value that is not finite, or a bad level.

    Example:
        >>> bootstrap_interval(np.repeat([0., 1.], 500)).mean
        0.5
    """
    if not 0 < level < 1 or resamples < 1:
        raise RequestError(f"need 0 < level < 1 and resamples >= 1; got level {level}, resamples {resamples}")
    values_MF = _as_columns(values)
    means_RF = bootstrap_means(values_MF, resamples=resamples, seed=seed, users=users)
    low_F, high_F = quantile_bounds(means_RF, level)
    intervals = [
        Interval(float(mean), float(low), float(high), level)
        for mean, low, high in zip(values_MF.mean(axis=0), low_F, high_F)
    ]
    return intervals[0] if np.ndim(values) == 1 else intervals


def quantile_bounds(means_RF: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The two quantiles `(F,)` that enclose `level` of the resampled means."""
    tail = (1.0 - level) / 2.0
    low_F, high_F = np.quantile(means_RF, [tail, 1.0 - tail], axis=0)
    return low_F, high_F


def paired_difference(
    values_a: np.ndarray,
    values_b: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    users: np.ndarray | None = None,
) -> PairedDifference:
    """Bootstrap of the mean difference `a - b` over the same rows, in the same order.

    The p-value is the share of resampled differences, shifted to a mean of 0, at least as far from 0 as the observed
    one (with the usual + 1 in both counts, so it is never 0).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a, b = rng.random(500) + 0.2, rng.random(500)
        >>> paired_difference(a, b).verdict, paired_difference(a, a).verdict
        ('better', 'no clear difference')
    """
    a_M, b_M = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if a_M.shape != b_M.shape or a_M.ndim != 1:
        raise RequestError(f"a paired difference needs the same rows twice; got {a_M.shape} and {b_M.shape} values")
    interval = bootstrap_interval(a_M - b_M, level=level, resamples=resamples, seed=seed, users=users)
    means_R = bootstrap_means(a_M - b_M, resamples=resamples, seed=seed, users=users)[:, 0]
    # 1e-12: a resample equal to the observed mean up to rounding counts as "at least as far".
    extreme_R = np.abs(means_R - interval.mean) >= abs(interval.mean) - 1e-12
    p_value = (1.0 + extreme_R.sum()) / (1.0 + resamples)
    return PairedDifference(interval.mean, interval.low, interval.high, float(p_value), len(a_M), level)


def pooled_means(
    values_SMF: np.ndarray, *, resamples: int = 1000, seed: int = 0, users: np.ndarray | None = None
) -> np.ndarray:
    """Means `(R, F)` when seeds *and* users are resampled: the spread that a new seed on new users would show.

    Args:
        values_SMF: `(S, M, F)` per-row values of S seeds for the same M rows in the same order.
    """
    values_SMF = np.asarray(values_SMF, dtype=np.float64)
    num_seeds, num_rows, num_metrics = values_SMF.shape
    flat = _as_columns(values_SMF.transpose(1, 0, 2).reshape(num_rows, num_seeds * num_metrics))
    rng = np.random.default_rng(seed)
    weights_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1.0 / num_seeds), size=resamples) / num_seeds
    totals = _resampled_sums(_sums_and_rows(flat, users), resamples, rng)
    means = (totals[:, :-1] / totals[:, -1:]).reshape(resamples, num_seeds, num_metrics)
    return np.einsum("rsf,rs->rf", means, weights_RS)
