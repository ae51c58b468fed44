"""Bootstrap: agreement with naive resampling, coverage of the truth, paired tests, users with several rows, speed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hf_genrec.errors import RequestError
from hf_genrec.evaluation.bootstrap import (
    bootstrap_interval,
    bootstrap_means,
    paired_difference,
    pooled_means,
)
from hf_genrec.evaluation.metrics import values_from_ranks


def _naive_means(values, resamples, seed, users=None):
    """One resample after the other, as the definition says."""
    rng = np.random.default_rng(seed)
    users = np.arange(len(values)) if users is None else np.asarray(users)
    rows_of = [np.flatnonzero(users == user) for user in np.unique(users)]
    means = []
    for _ in range(resamples):
        drawn = rng.integers(len(rows_of), size=len(rows_of))
        means.append(values[np.concatenate([rows_of[user] for user in drawn])].mean())
    return np.array(means)


@pytest.mark.parametrize("kind", ["few_values", "all_different", "several_rows"])
def test_same_distribution_as_naive_resampling(kind):
    rng = np.random.default_rng(0)
    users = None
    if kind == "few_values":
        values = (rng.random(300) < 0.2).astype(float)
    else:
        values = rng.random(300) ** 3
    if kind == "several_rows":
        users = rng.integers(0, 40, size=300)
        values = values + 0.5 * np.isin(users, np.arange(10))  # rows of a user resemble each other
    ours = bootstrap_means(values, resamples=4000, seed=1, users=users)[:, 0]
    naive = _naive_means(values, 4000, 2, users)
    spread = naive.std()
    assert ours.mean() == pytest.approx(naive.mean(), abs=0.1 * spread)
    assert ours.std() == pytest.approx(spread, rel=0.06)
    np.testing.assert_allclose(
        np.quantile(ours, [0.025, 0.975]), np.quantile(naive, [0.025, 0.975]), atol=0.25 * spread
    )


def test_rows_of_one_user_are_not_independent():
    """Ten copies of every user add nothing; treating the copies as users would shrink the interval by sqrt(10)."""
    values = np.random.default_rng(0).random(200)
    single = bootstrap_interval(values)
    copied = bootstrap_interval(np.repeat(values, 10), users=np.repeat(np.arange(200), 10))
    wrong = bootstrap_interval(np.repeat(values, 10))
    width = single.high - single.low
    assert copied.high - copied.low == pytest.approx(width, rel=0.1)
    assert wrong.high - wrong.low < 0.5 * width


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        interval = bootstrap_interval((rng.random(400) < 0.2).astype(float), resamples=400, seed=trial)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.91 <= covered / 400 <= 0.98


def test_deterministic_and_ordered():
    values = np.random.default_rng(0).random((500, 3))
    first, again = bootstrap_interval(values, seed=7), bootstrap_interval(values, seed=7)
    assert first == again and bootstrap_interval(values, seed=8) != first
    assert all(interval.low < interval.mean < interval.high for interval in first)
    constant = bootstrap_interval(np.ones(10))
    assert (constant.mean, constant.low, constant.high) == (1.0, 1.0, 1.0)


def test_wider_level_and_fewer_users_widen_the_interval():
    values = np.random.default_rng(0).random(1000)
    width = {level: (i := bootstrap_interval(values, level=level)).high - i.low for level in (0.8, 0.95, 0.99)}
    assert width[0.8] < width[0.95] < width[0.99]
    few = bootstrap_interval(values[:100])
    assert few.high - few.low > 2 * width[0.95]


@pytest.mark.parametrize("bad", [np.empty(0), np.array([1.0, np.inf]), np.array([np.nan])])
def test_bad_values(bad):
    with pytest.raises(RequestError):
        bootstrap_interval(bad)


def test_bad_options():
    with pytest.raises(RequestError, match="level"):
        bootstrap_interval(np.ones(3), level=1.0)
    with pytest.raises(RequestError, match="same rows"):
        paired_difference(np.ones(3), np.ones(4))
    with pytest.raises(RequestError, match="users"):
        bootstrap_interval(np.ones(3), users=np.arange(2))


# ------------------------------------------------------------------------------------------------------------ paired


def test_pairing_sees_what_two_intervals_cannot():
    """A small constant gain hides in the spread between users, unless the users are paired."""
    rng = np.random.default_rng(0)
    base = rng.random(300)
    better = base + 0.01 + rng.normal(0, 0.01, 300)
    found = paired_difference(better, base)
    assert found.verdict == "better" and found.low > 0 and found.p_value < 0.01
    assert paired_difference(base, better).verdict == "worse"
    a, b = bootstrap_interval(better), bootstrap_interval(base)
    assert a.low < b.mean < a.high  # unpaired: nothing to see


def test_no_difference():
    values = np.random.default_rng(0).random(50)
    same = paired_difference(values, values)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert same.verdict == "no clear difference" and same.to_dict()["verdict"] == same.verdict


def test_p_value_is_calibrated_under_the_null():
    rng = np.random.default_rng(1)
    p = np.array([paired_difference(*rng.random((2, 200)), resamples=300, seed=t).p_value for t in range(300)])
    assert 0.02 <= (p < 0.05).mean() <= 0.09
    assert 0.42 <= p.mean() <= 0.58


# -------------------------------------------------------------------------------------------------------- seeds, size


def test_pooling_adds_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    users = rng.random((1, 400, 1))
    equal_seeds = np.repeat(users, 3, axis=0)
    unequal = equal_seeds + np.array([-0.1, 0.0, 0.1])[:, None, None]
    alone = bootstrap_means(users[0], resamples=2000).std()
    assert pooled_means(equal_seeds, resamples=2000).std() == pytest.approx(alone, rel=0.1)
    pooled = pooled_means(unequal, resamples=2000)
    assert pooled.mean() == pytest.approx(users.mean(), abs=0.01)
    expected = np.sqrt(alone**2 + np.var([-0.1, 0.0, 0.1]) / 3)  # independent sources add their variances
    assert pooled.std() == pytest.approx(expected, rel=0.1)


def test_fifty_thousand_users_are_quick():
    ranks = np.random.default_rng(0).integers(1, 60, size=50_000).astype(float)
    ranks[ranks > 50] = np.inf
    values = np.stack(list(values_from_ranks(ranks, (1, 5, 10, 20, 50)).values()), axis=1)
    start = time.perf_counter()
    bootstrap_interval(values)
    assert time.perf_counter() - start < 10  # 0.1 s; a draw per user and resample would take minutes
