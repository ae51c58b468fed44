"""Buckets before and after: intervals against the paired bootstrap of the bucket's rows, what is worse, what is unknown."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import RequestError
from hf_genrec.evaluation.bootstrap import paired_difference
from hf_genrec.evaluation.bucket_comparison import compare_buckets
from hf_genrec.evaluation.evaluator import evaluate, popularity_buckets
from hf_genrec.evaluation.recommenders import ScoreRecommender
from hf_genrec.evaluation.seeds import aggregate_seeds

COUNTS = np.array([50, 40, 3, 2, 2, 1, 1, 1, 0, 0])
RNG = np.random.default_rng(0)
USERS = np.repeat(np.arange(60), 2)  # two rows per user
TARGETS = np.array([RNG.choice([0, 1]) if row % 3 == 0 else 2 + row % 6 for row in range(118)] + [8, 9])
ROWS = EvaluationSet(USERS, Sequences.from_rows([[(t + 1) % 10] for t in TARGETS]), TARGETS)


def report(name: str, favourites: list[int], seed: int = 0, **options):
    """A recommender that likes some items best, with a little noise per row."""
    rng = np.random.default_rng(seed)
    likes = np.zeros(10)
    likes[favourites] = 1.0

    def score(histories):
        return likes + rng.normal(scale=0.8, size=(len(histories), 10))

    options = {"train_counts": COUNTS, **options}
    return evaluate(ScoreRecommender(score, 10), ROWS, num_items=10, ks=(1, 5, 10), name=name, progress=False, bootstrap=0,
                    **options)  # fmt: skip


def test_a_better_head_does_not_hide_a_worse_tail():
    before, after = report("sft", [2, 3, 4, 5, 6, 7]), report("dpo", [0, 1])
    found = compare_buckets(before, after, "recall@5")
    assert found["head"].verdict == "better" and found.worse() == ["tail"]
    masks = popularity_buckets(COUNTS)
    for name in ("head", "tail"):
        rows = masks[name][TARGETS]
        a, b = after.values("recall@5")[rows], before.values("recall@5")[rows]
        assert found[name].targets == rows.sum() and found[name].before == b.mean() and found[name].after == a.mean()
        assert found[name].change == paired_difference(a, b, users=USERS[rows])
        assert before.removed.buckets[name]["recall@5"] == pytest.approx(found[name].before)
    assert found["tail"].change.high < 0
    assert found.overall.targets == 120
    assert "Warning: recall@5 got worse from sft to dpo" in found.warning and "tail items -" in found.warning
    assert "head" not in found.warning
    assert str(found).endswith(found.warning) and len(str(found).splitlines()) == 2 + 4 + 1
    assert compare_buckets(after, before, "recall@5").worse() == ["head"]


def test_the_same_report_is_no_worse_anywhere():
    one = report("sft", [2, 3])
    found = compare_buckets(one, one)
    assert found.worse() == [] and found.warning == "" and "Warning" not in str(found)
    assert all(bucket.change is None or bucket.change.difference == 0 for bucket in found.buckets.values())


def test_a_handful_of_targets_is_shown_and_not_judged():
    before, after = report("a", [8, 9]), report("b", [0])
    found = compare_buckets(before, after, "mrr@5")
    assert found["cold"].targets == 2 and found["cold"].verdict == "too few targets" and found["cold"].change is None
    assert found["cold"].after < found["cold"].before and "cold" not in found.worse()
    assert compare_buckets(before, after, "mrr@5", min_targets=2)["cold"].change is not None
    none = compare_buckets(before, after, "mrr@5", buckets={"never": np.zeros(10, bool)})
    assert none["never"].targets == 0 and json.loads(json.dumps(none.to_dict()))["buckets"]["never"]["before"] is None


def test_numbers_for_files():
    found = compare_buckets(report("sft", [2, 3, 4, 5, 6, 7]), report("dpo", [0, 1]), "recall@5")
    block = json.loads(json.dumps(found.to_dict()))
    assert block["worse"] == ["tail"] and block["buckets"]["tail"]["verdict"] == "worse"
    assert block["buckets"]["tail"]["change"]["difference"] == pytest.approx(
        block["buckets"]["tail"]["after"] - block["buckets"]["tail"]["before"]
    )
    assert block["before"] == "sft" and block["seen_items"] == "removed" and block["warning"] == found.warning


def test_seeds_are_averaged_row_by_row():
    before = aggregate_seeds([report("sft", [2, 3, 4], seed) for seed in range(3)])
    after = aggregate_seeds([report("dpo", [0, 1], seed) for seed in range(3)])
    found = compare_buckets(before, after, "recall@5")
    rows = popularity_buckets(COUNTS)["tail"][TARGETS]
    expected = np.mean([one.values("recall@5")[rows].mean() for one in after.reports])
    assert found["tail"].after == pytest.approx(expected) and found.worse() == ["tail"]


def test_other_rows_and_reports_without_buckets_are_refused():
    one, plain = report("a", [0]), report("b", [1], train_counts=None)
    assert compare_buckets(plain, one)["head"].targets > 0  # the other report knows them
    with pytest.raises(RequestError, match="know no buckets"):
        compare_buckets(plain, plain)
    with pytest.raises(RequestError, match="bucket 'head' has shape"):
        compare_buckets(one, one, buckets={"head": np.ones(3, bool)})
    with pytest.raises(RequestError, match="no bucket 'top'"):
        compare_buckets(one, one)["top"]
    other = evaluate(ScoreRecommender(lambda h: np.zeros((len(h), 10)), 10), ROWS.take(np.arange(5)), num_items=10,
                     progress=False, train_counts=COUNTS)  # fmt: skip
    with pytest.raises(RequestError, match="different rows"):
        compare_buckets(one, other)
