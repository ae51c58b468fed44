"""Several training seeds as one result: mean, t-interval over seeds, bootstrap pooled over seeds and users.

Two sources of luck are kept apart. The t-interval answers "what would another training seed give on these users"; the
pooled bootstrap resamples seeds and users together and answers "what would another seed give on other such users", so
it is the interval to quote. With few seeds the t-interval is wide by design: that is what three runs can support.

Legend: S seeds, M evaluation rows, F metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from hf_genrec.errors import RequestError
from hf_genrec.evaluation.bootstrap import pooled_means, quantile_bounds
from hf_genrec.evaluation.evaluation_report import EvaluationReport, RankingResult
from hf_genrec.evaluation.metrics import values_from_ranks


@dataclass(frozen=True)
class SeedSummary(EvaluationReport):
    """The mean of several reports of one recommender; reads, compares and prints like a report.

    `metrics` are means over seeds, `intervals` the pooled bootstrap, `values(metric)` the mean over seeds for every
    row, so that `summary.compare(other)` is a paired test of the seed averages (`other`: a report or a summary).

    Args:
        reports: One per seed, the same rows in the same order.
        seed_statistics: setting -> metric -> `{"values", "std", "low", "high"}`: t-interval over seeds (None with one).
    """

    reports: tuple[EvaluationReport, ...] = ()
    seed_statistics: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def values(self, metric: str, setting: str | None = None) -> np.ndarray:
        """Mean over seeds `(M,)` of the per-row values."""
        return np.mean([report.values(metric, setting or self.headline) for report in self.reports], axis=0)

    def to_dict(self) -> dict[str, Any]:
        """As `EvaluationReport.to_dict` (flat means, pooled `intervals`), plus `seeds` and `seed_intervals`."""
        headline = self.seed_statistics[self.headline]
        return super().to_dict() | {
            "seeds": len(self.reports),
            "seed_values": {name: found["values"] for name, found in headline.items()},
            "seed_std": {name: found["std"] for name, found in headline.items()},
            "seed_intervals": {
                name: None if found["low"] is None else [found["low"], found["high"]]
                for name, found in headline.items()
            },
        }


def t_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """Mean, sample standard deviation, low and high of the Student interval; the last three are NaN for one value.

    Example:
        >>> mean, std, low, high = t_interval([0.10, 0.11, 0.12])
        >>> f"{mean:.3f} {std:.3f} [{low:.3f}, {high:.3f}]"
        '0.110 0.010 [0.085, 0.135]'
    """
    values_S = np.asarray(values, dtype=np.float64)
    if not len(values_S):
        raise RequestError("no seeds to summarise")
    mean = float(values_S.mean())
    if len(values_S) == 1:
        return mean, math.nan, math.nan, math.nan
    std = float(values_S.std(ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, len(values_S) - 1)) * std / math.sqrt(len(values_S))
    return mean, std, mean - half, mean + half


def aggregate_seeds(
    reports: Sequence[EvaluationReport],
    *,
    name: str | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> SeedSummary:
    """Summarise the reports of several training seeds of one recommender.

    Args:
        reports: One per seed, made by `evaluate` on the same rows with the same settings.
        name: Default the first report's.
        resamples, level, seed: Of the pooled bootstrap.

    Raises:
        RequestError: No report, or reports about different rows, settings or cut-offs.
    """
    if not reports:
        raise RequestError("aggregate_seeds needs at least one report")
    first = reports[0]
    for report in reports[1:]:
        same_rows = np.array_equal(first.users_M, report.users_M) and np.array_equal(first.targets_M, report.targets_M)
        if not same_rows or first.ks != report.ks or set(first.results) != set(report.results):
            raise RequestError(
                f"{report.name}: seeds must be evaluated on the same rows, settings and ks as the first report"
            )
    results, statistics = {}, {}
    for setting in first.results:
        per_seed = [report.results[setting] for report in reports]
        names = list(per_seed[0].metrics)
        columns = [values_from_ranks(result.ranks_M, first.ks) for result in per_seed]
        values_SMF = np.stack([np.stack([column[key] for key in names], axis=1) for column in columns])
        low_F, high_F = quantile_bounds(
            pooled_means(values_SMF, resamples=resamples, seed=seed, users=first.users_M), level
        )
        results[setting] = RankingResult(
            ranks_M=np.full(first.num_rows, np.nan),  # a mean over seeds has no single rank: use values()
            metrics={key: float(np.mean([result.metrics[key] for result in per_seed])) for key in names},
            intervals={key: (float(low), float(high)) for key, low, high in zip(names, low_F, high_F)},
            coverage=_mean_of([result.coverage for result in per_seed]),
            buckets={
                bucket: _mean_of([result.buckets[bucket] for result in per_seed]) for bucket in per_seed[0].buckets
            },
            seconds=float(np.mean([result.seconds for result in per_seed])),
        )
        statistics[setting] = {key: _statistics([result.metrics[key] for result in per_seed], level) for key in names}
    return SeedSummary(
        name=name or first.name,
        headline=first.headline,
        results=results,
        ks=first.ks,
        num_items=first.num_items,
        users_M=first.users_M,
        targets_M=first.targets_M,
        targets_seen=first.targets_seen,
        bootstrap={"resamples": resamples, "level": level, "seed": seed, "pooled": "seeds and users"},
        reports=tuple(reports),
        seed_statistics=statistics,
    )


def _mean_of(blocks: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: value if isinstance(value, int) else float(np.mean([block[key] for block in blocks]))
        for key, value in blocks[0].items()
    }


def _statistics(values: list[float], level: float) -> dict[str, Any]:
    mean, std, low, high = t_interval(values, level)
    single = len(values) == 1
    return {
        "values": [float(value) for value in values],
        "mean": mean,
        "std": None if single else std,
        "low": None if single else low,
        "high": None if single else high,
    }
