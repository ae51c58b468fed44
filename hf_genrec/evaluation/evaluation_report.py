"""What an evaluation found: metrics with intervals per setting, and the ranks of every row for paired tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genrec.errors import RequestError
from hf_genrec.evaluation.bootstrap import PairedDifference, paired_difference
from hf_genrec.evaluation.metrics import values_from_ranks

REMOVED, KEPT = "removed", "kept"


@dataclass(frozen=True)
class RankingResult:
    """Result of one setting (seen items removed, or kept).

    Args:
        ranks_M: `(M,)` 1-based rank of each target, `inf` where it is not in the list.
        metrics: `{"recall@10": ..., "ndcg@10": ..., "mrr@10": ...}` for every K.
        intervals: The same keys, `(low, high)`; empty without a bootstrap.
        coverage: `{"coverage@10": ...}`: distinct items recommended / catalogue.
        buckets: `{"head" | "tail" | "cold": {"items", "targets", metrics...}}`; empty without training counts.
        seconds: Wall time of the recommending.
    """

    ranks_M: np.ndarray
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    coverage: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def __getitem__(self, key: str) -> float:
        if key in self.metrics:
            return self.metrics[key]
        if key in self.coverage:
            return self.coverage[key]
        raise RequestError(f"no metric {key!r}: choose one of {', '.join([*self.metrics, *self.coverage])}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: flat metrics and coverage, `intervals`, `buckets`, `seconds`."""
        flat: dict[str, Any] = self.metrics | self.coverage
        flat["intervals"] = {name: [low, high] for name, (low, high) in self.intervals.items()}
        if self.buckets:
            flat["buckets"] = {name: dict(values) for name, values in self.buckets.items()}
        return flat | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class EvaluationReport:
    """Everything `evaluate` found. Indexing gives headline metrics: `report["ndcg@10"]`.

    Args:
        name: Of the recommender.
        headline: `"removed"` or `"kept"`: the setting that the data set declares.
        results: Setting -> `RankingResult`.
        ks: Cut-offs, ascending.
        num_items: Catalogue size.
        users_M: `(M,)` user row of each evaluation row.
        targets_M: `(M,)` target item of each row.
        targets_seen: Rows whose target is in their own history; with seen items removed they cannot be hit.
        bootstrap: Resamples, level and seed of the intervals.
        buckets_M: `{"head" | "tail" | "cold": (M,) bool}`: rows whose target is in the bucket; empty without counts.
    """

    name: str
    headline: str
    results: dict[str, RankingResult]
    ks: tuple[int, ...]
    num_items: int
    users_M: np.ndarray
    targets_M: np.ndarray
    targets_seen: int = 0
    bootstrap: dict[str, Any] = field(default_factory=dict)
    buckets_M: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, key: str) -> float:
        return self.results[self.headline][key]

    @property
    def removed(self) -> RankingResult:
        """Result with seen items removed."""
        return self.setting(REMOVED)

    @property
    def kept(self) -> RankingResult:
        """Result with seen items kept."""
        return self.setting(KEPT)

    def setting(self, setting: str | None = None) -> RankingResult:
        """Result of one setting, default the headline.

        Raises:
            RequestError: That setting was not evaluated.
        """
        setting = setting or self.headline
        if setting not in self.results:
            raise RequestError(
                f"{self.name} was not evaluated with seen items {setting}: call evaluate(..., exclude_seen='both')"
            )
        return self.results[setting]

    @property
    def num_rows(self) -> int:
        """Evaluation rows M."""
        return len(self.targets_M)

    def values(self, metric: str, setting: str | None = None) -> np.ndarray:
        """Per-row values `(M,)` of e.g. `"ndcg@10"`, for paired tests."""
        _, _, k = metric.partition("@")
        if not k.isdigit() or int(k) > self.ks[-1]:
            raise RequestError(f"no metric {metric!r}: use recall, ndcg or mrr @K with K up to {self.ks[-1]}")
        columns = values_from_ranks(self.setting(setting).ranks_M, [int(k)])
        if metric not in columns:
            raise RequestError(f"no metric {metric!r}: choose one of {', '.join(columns)}")
        return columns[metric]

    def compare(
        self,
        other: EvaluationReport,
        metric: str = "ndcg@10",
        *,
        setting: str | None = None,
        resamples: int = 1000,
        level: float = 0.95,
        seed: int = 0,
    ) -> PairedDifference:
        """Paired bootstrap of `self - other` over the same users (`setting` defaults to the headline of `self`).

        Raises:
            RequestError: The two reports are not about the same rows.
        """
        if not (np.array_equal(self.users_M, other.users_M) and np.array_equal(self.targets_M, other.targets_M)):
            raise RequestError(
                f"{self.name} and {other.name} were evaluated on different rows: a paired comparison "
                "needs the same split"
            )
        setting = setting or self.headline
        return paired_difference(
            self.values(metric, setting),
            other.values(metric, setting),
            users=self.users_M,
            level=level,
            resamples=resamples,
            seed=seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """The `test` block of metrics.json: headline metrics flat, their `intervals`, and each setting in full.

        Keys: `recall@K`, `ndcg@K`, `mrr@K`, `coverage@K`, `intervals`, `buckets`, `seconds`, `seen_items`
        ("removed" or "kept": what the flat numbers mean), `seen_removed` / `seen_kept` (the same block per setting),
        `users`, `rows`, `items`, `targets_seen`, `bootstrap`. Plain JSON values; ranks are not included.
        """
        return {
            **self.results[self.headline].to_dict(),
            "seen_items": self.headline,
            **{f"seen_{setting}": result.to_dict() for setting, result in self.results.items()},
            "users": len(np.unique(self.users_M)),
            "rows": self.num_rows,
            "items": self.num_items,
            "targets_seen": int(self.targets_seen),
            "bootstrap": dict(self.bootstrap),
        }

    def __str__(self) -> str:
        from hf_genrec.evaluation.report import results_table

        return results_table([self])
