"""Head, tail and cold items before and after: does a better average hide a bucket that got worse?

Preference tuning and reward optimisation move probability towards items that are liked already, so a rise of the mean can
be paid for by the tail. `compare_buckets` puts two reports of the same rows side by side, bucket by bucket, with a paired
bootstrap over users (the buckets are those of `evaluator.popularity_buckets`).

Legend: M evaluation rows, N items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genrec.errors import RequestError
from hf_genrec.evaluation.bootstrap import PairedDifference, paired_difference
from hf_genrec.evaluation.evaluation_report import EvaluationReport

OVERALL = "all"


@dataclass(frozen=True)
class BucketDifference:
    """One bucket of targets.

    Args:
        targets: Rows whose target is in the bucket.
        before, after: Mean of the metric; NaN without targets.
        change: Paired difference `after - before`; None where there are too few targets to judge.
    """

    targets: int
    before: float
    after: float
    change: PairedDifference | None = None

    @property
    def verdict(self) -> str:
        """`"better"`, `"worse"`, `"no clear difference"`, or `"too few targets"`."""
        return "too few targets" if self.change is None else self.change.verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (None for a mean that does not exist)."""
        values = {name: None if np.isnan(v) else v for name, v in (("before", self.before), ("after", self.after))}
        change = {"change": None} if self.change is None else {"change": self.change.to_dict()}
        return {"targets": self.targets, **values, **change, "verdict": self.verdict}


@dataclass(frozen=True)
class BucketComparison:
    """What `compare_buckets` found.

    Args:
        metric: Such as `"ndcg@10"`.
        setting: `"removed"` or `"kept"`: what happened to seen items.
        names: Of the two recommenders, before and after.
        overall: All rows.
        buckets: Bucket name -> its difference.
    """

    metric: str
    setting: str
    names: tuple[str, str]
    overall: BucketDifference
    buckets: dict[str, BucketDifference] = field(default_factory=dict)

    def __getitem__(self, bucket: str) -> BucketDifference:
        if bucket == OVERALL:
            return self.overall
        if bucket not in self.buckets:
            raise RequestError(f"no bucket {bucket!r}: choose one of {', '.join([OVERALL, *self.buckets])}")
        return self.buckets[bucket]

    def worse(self) -> list[str]:
        """Names of the buckets whose interval lies below zero."""
        return [name for name, bucket in self.buckets.items() if bucket.verdict == "worse"]

    @property
    def warning(self) -> str:
        """One sentence that names what got worse; empty when nothing did."""
        lost = self.worse()
        if self.overall.verdict == "worse":
            lost = [OVERALL, *lost]
        if not lost:
            return ""
        parts = []
        for name in lost:
            change = self[name].change
            assert change is not None
            parts.append(f"{name} items {change.difference:+.4f} [{change.low:+.4f}, {change.high:+.4f}]")
        hidden = "" if self.overall.verdict == "worse" else f" (all rows: {self.overall.verdict})"
        return (
            f"Warning: {self.metric} got worse from {self.names[0]} to {self.names[1]} on "
            + ", ".join(parts)
            + (f"{hidden}.")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `metric`, `seen_items`, `before`, `after`, `all`, `buckets`, `worse`, `warning`."""
        return {
            "metric": self.metric,
            "seen_items": self.setting,
            "before": self.names[0],
            "after": self.names[1],
            OVERALL: self.overall.to_dict(),
            "buckets": {name: bucket.to_dict() for name, bucket in self.buckets.items()},
            "worse": self.worse(),
            "warning": self.warning,
        }

    def __str__(self) -> str:
        header = f"{'bucket':<8} {'targets':>8} {'before':>8} {'after':>8}  change of {self.metric}"
        lines = [f"{self.names[0]} -> {self.names[1]}, seen items {self.setting}", header]
        for name, bucket in ((OVERALL, self.overall), *self.buckets.items()):
            means = " ".join(f"{'-' if np.isnan(v) else format(v, '.4f'):>8}" for v in (bucket.before, bucket.after))
            change = bucket.verdict if bucket.change is None else str(bucket.change)
            lines.append(f"{name:<8} {bucket.targets:>8} {means}  {change}")
        return "\n".join([*lines, self.warning] if self.warning else lines)


def compare_buckets(
    before: EvaluationReport,
    after: EvaluationReport,
    metric: str = "ndcg@10",
    *,
    buckets: Mapping[str, np.ndarray] | None = None,
    setting: str | None = None,
    min_targets: int = 10,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> BucketComparison:
    """Compare two recommenders on the same rows, for each bucket of targets.

    Args:
        before, after: Reports of `evaluate` (or `aggregate_seeds` summaries: means over seeds) on the same rows.
        metric: recall, ndcg or mrr @K.
        buckets: Name -> mask `(N,)` of its items; default those of the reports (`evaluate(..., train_counts=...)`).
        setting: `"removed"` or `"kept"`; default the headline of `before`.
        min_targets: Buckets with fewer are shown and not judged: a bootstrap of a handful of users is no evidence.
        resamples, level, seed: Of the bootstrap.

    Raises:
        RequestError: Reports about different rows, reports without buckets, or masks of another catalogue.

    Example:
        >>> from hf_genrec.evaluation.evaluation_report import RankingResult
        >>> def report(name, ranks):
        ...     result = RankingResult(np.asarray(ranks, float), {})
        ...     targets = np.arange(40) % 4
        ...     return EvaluationReport(name, "removed", {"removed": result}, (10,), 4, np.arange(40), targets)
        >>> head = np.array([True, True, False, False])
        >>> before, after = report("sft", np.tile([2, 2, 1, 1], 10)), report("dpo", np.tile([1, 1, 9, 9], 10))
        >>> found = compare_buckets(before, after, "mrr@10", buckets={"head": head, "tail": ~head})
        >>> found["head"].verdict, found.worse()
        ('better', ['tail'])
    """
    if not (np.array_equal(before.users_M, after.users_M) and np.array_equal(before.targets_M, after.targets_M)):
        raise RequestError(
            f"{before.name} and {after.name} were evaluated on different rows: a comparison by bucket needs the same split"
        )
    setting = setting or before.headline
    rows = _rows_of(before, after, buckets)
    values = after.values(metric, setting), before.values(metric, setting)
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}

    def difference(mask_M: np.ndarray) -> BucketDifference:
        after_m, before_m = (column[mask_M] for column in values)
        if not len(after_m):
            return BucketDifference(0, np.nan, np.nan)
        change = None
        if len(after_m) >= min_targets:
            change = paired_difference(after_m, before_m, users=before.users_M[mask_M], **options)
        return BucketDifference(len(after_m), float(before_m.mean()), float(after_m.mean()), change)

    return BucketComparison(
        metric,
        setting,
        (before.name, after.name),
        difference(np.ones(before.num_rows, bool)),
        {name: difference(mask_M) for name, mask_M in rows.items()},
    )


def _rows_of(
    before: EvaluationReport, after: EvaluationReport, buckets: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Mask (M,) of each bucket's rows."""
    if buckets is not None:
        for name, mask_N in buckets.items():
            if np.shape(mask_N) != (before.num_items,):
                raise RequestError(f"bucket {name!r} has shape {np.shape(mask_N)}, not ({before.num_items},)")
        return {name: np.asarray(mask_N, bool)[before.targets_M] for name, mask_N in buckets.items()}
    for report in (before, after):  # a summary of seeds holds its reports
        for one in (report, *getattr(report, "reports", ())[:1]):
            if one.buckets_M:
                return dict(one.buckets_M)
    raise RequestError(
        f"{before.name} and {after.name} know no buckets: pass train_counts=training_counts(...) to evaluate, or buckets="
    )
