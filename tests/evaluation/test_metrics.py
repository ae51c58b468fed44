"""Metrics against brute force, known answers and the two reference implementations (ranx, pytrec_eval-terrier)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_genrec.errors import RequestError
from hf_genrec.evaluation import metrics as m

CASES = 2_400
KS = (1, 3, 10, 20)


def _random_cases(seed: int = 0, cases: int = CASES):
    """Score rows of many shapes: ties (few distinct values), short catalogues, targets that cannot be retrieved."""
    rng = np.random.default_rng(seed)
    for case in range(cases):
        num_items = int(rng.integers(1, 41))
        # few distinct integer values: exact in single precision too (trec_eval keeps scores as floats)
        scores = rng.integers(0, int(rng.integers(1, 12)) + 1, size=num_items).astype(np.float64)
        scores[rng.random(num_items) < 0.15] = -np.inf  # items that were not recommended
        num_targets = 1 if case % 2 else int(rng.integers(1, min(num_items, 30) + 1))
        targets = rng.choice(num_items, size=num_targets, replace=False)
        yield scores, targets


def _policy_order(scores: np.ndarray) -> list[int]:
    """The declared policy in the slowest clear words: higher score first, then smaller index; -inf is not listed."""
    return sorted((i for i in range(len(scores)) if scores[i] > -math.inf), key=lambda i: (-scores[i], i))


# ------------------------------------------------------------------------------------------------- known answers


def test_known_answers():
    ranks = np.array([1.0, 2.0, 10.0, 11.0, np.inf])
    assert m.recall_at_k(ranks, 10) == pytest.approx(3 / 5)
    assert m.hit_rate_at_k(ranks, 1) == pytest.approx(1 / 5)
    assert m.ndcg_at_k(ranks, 10) == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11)) / 5)
    assert m.mrr_at_k(ranks, 10) == pytest.approx((1 + 0.5 + 0.1) / 5)
    assert m.mrr_at_k(ranks, 11) == pytest.approx((1 + 0.5 + 0.1 + 1 / 11) / 5)
    flat = m.metrics_from_ranks(ranks, [10, 1, 10])
    assert list(flat) == ["recall@1", "recall@10", "ndcg@1", "ndcg@10", "mrr@1", "mrr@10"]


def test_ranks_from_topk_padding_and_repeats():
    lists = np.array([[3, 1, -1], [1, 1, 0], [2, 3, 4]])
    assert m.ranks_from_topk(lists, np.array([1, 0, 9])).tolist() == [2.0, 3.0, np.inf]
    assert m.ranks_from_topk(np.empty((2, 0), dtype=int), np.array([0, 1])).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("targets", [[-1, 0], [0]])
def test_ranks_from_topk_refuses_padding_as_target_and_wrong_shape(targets):
    # a target of -1 would match the padding of a list: a free hit
    with pytest.raises(RequestError):
        m.ranks_from_topk(np.array([[0, -1], [1, 0]]), np.array(targets))


@pytest.mark.parametrize("k", [0, -3, 1.5])
def test_bad_k(k):
    with pytest.raises(RequestError, match="at least 1"):
        m.recall_at_k(np.array([1.0]), k)


def test_empty_and_nan():
    with pytest.raises(RequestError, match="empty"):
        m.ndcg_at_k(np.empty(0), 10)
    scores = np.zeros((2, 3))
    scores[1, 2] = np.nan
    with pytest.raises(RequestError, match="item index 2 in row 1"):
        m.topk_from_scores(scores, 2)
    with pytest.raises(RequestError, match="no relevant item"):
        m.hits_from_topk(np.array([[1], [2]]), [np.array([1]), np.array([], dtype=int)])


# ------------------------------------------------------------------------------------------- ties and brute force


@pytest.mark.parametrize("k", [1, 4, 40, 60])
def test_topk_and_rank_follow_the_declared_policy(k):
    for scores, targets in _random_cases(seed=k, cases=400):
        order = _policy_order(scores)
        wanted = (order + [-1] * k)[:k]
        assert m.topk_from_scores(scores[None], k)[0].tolist() == wanted
        target = int(targets[0])
        rank = order.index(target) + 1.0 if target in order else np.inf
        assert m.ranks_from_scores(scores[None], np.array([target]))[0] == rank
        listed = m.ranks_from_topk(m.topk_from_scores(scores[None], k), np.array([target]))[0]
        assert listed == (rank if rank <= k else np.inf)


def test_topk_of_a_batch_equals_each_row_alone_and_of_float32():
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 6, size=(50, 200)).astype(np.float32)
    scores[:, 190:] = -np.inf
    batch = m.topk_from_scores(scores, 17)
    assert all((m.topk_from_scores(row[None], 17)[0] == found).all() for row, found in zip(scores, batch))
    assert (batch < 190).all()


def test_tie_policies_bound_each_other_and_every_tie_order():
    rng = np.random.default_rng(1)
    for scores, targets in _random_cases(seed=9, cases=300):
        row, target = scores[None], targets[:1]
        best, index, average, worst = (
            m.ranks_from_scores(row, target, ties=policy)[0]
            for policy in ("optimistic", "index", "average", "pessimistic")
        )
        assert best <= index <= worst and best <= average <= worst
        if np.isfinite(best):
            assert average == (best + worst) / 2
            noisy = scores + rng.random(len(scores)) * 1e-6  # one tie order, drawn at random
            assert best <= m.ranks_from_scores(noisy[None], target)[0] <= worst


def test_constant_scores_are_no_free_hit():
    """The trap of "rank = 1 + number of higher scores": a constant scorer would reach Hit@1 = 1."""
    scores, targets = np.zeros((100, 100)), np.arange(100)
    assert m.recall_at_k(m.ranks_from_scores(scores, targets, ties="optimistic"), 1) == 1.0
    assert m.recall_at_k(m.ranks_from_scores(scores, targets), 1) == 0.01
    assert m.recall_at_k(m.ranks_from_scores(scores, targets, ties="pessimistic"), 99) == 0.0
    with pytest.raises(RequestError, match="tie policy"):
        m.ranks_from_scores(scores, targets, ties="lucky")


def test_multi_target_reduces_to_single_target():
    rng = np.random.default_rng(5)
    lists = np.stack([rng.permutation(30)[:12] for _ in range(200)])
    lists[:, 9:] = np.where(rng.random((200, 3)) < 0.3, -1, lists[:, 9:])
    targets = rng.integers(0, 30, size=200)
    ranks = m.ranks_from_topk(lists, targets)
    hits, relevant = m.hits_from_topk(lists, targets[:, None])
    for k in (1, 5, 12, 20):
        for name in ("recall", "ndcg", "mrr"):
            single, several = m.METRICS[name](ranks, k), m.MULTI_METRICS[name](hits, relevant, k)
            np.testing.assert_allclose(several, single, atol=1e-12)
        np.testing.assert_array_equal(m.multi_hit_rate_values(hits, relevant, k), m.recall_values(ranks, k))


def test_multi_target_ignores_repeats_and_padding():
    hits, relevant = m.hits_from_topk(np.array([[7, 7, -1, 3]]), [np.array([7, 3, 3])])
    assert hits.tolist() == [[True, False, False, True]] and relevant.tolist() == [2]
    assert m.multi_recall_values(hits, relevant, 10)[0] == 1.0
    hits, _ = m.hits_from_topk(np.array([[0, -1], [-1, 1]]), [np.array([5]), np.array([1])])
    assert hits.tolist() == [[False, False], [False, True]]


# ---------------------------------------------------------------------------------------------- reference libraries


def _ours(scores: np.ndarray, targets: np.ndarray, k: int) -> dict[str, float]:
    lists = m.topk_from_scores(scores[None], max(KS))
    hits, relevant = m.hits_from_topk(lists, [targets])
    found = {name: float(metric(hits, relevant, k)[0]) for name, metric in m.MULTI_METRICS.items()}
    if len(targets) == 1:  # the path of the evaluator must say the same
        ranks = m.ranks_from_topk(lists, targets)
        for name in ("recall", "ndcg", "mrr"):
            assert m.METRICS[name](ranks, k)[0] == pytest.approx(found[name], abs=1e-12)
    return found


def test_agrees_with_pytrec_eval():
    """Tied scores go in as they are: trec_eval puts the lexicographically larger id first, so ids count down."""
    pytrec_eval = pytest.importorskip("pytrec_eval")

    def documents(scores, order):
        return {f"d{999 - i:03d}": float(scores[i]) for i in order} or {"none": 0.0}

    cases = {f"q{case}": found for case, found in enumerate(_random_cases(seed=0))}
    qrels = {name: {f"d{999 - i:03d}": 1 for i in targets.tolist()} for name, (_, targets) in cases.items()}
    cuts = ",".join(map(str, KS))
    measures = {f"recall.{cuts}", f"ndcg_cut.{cuts}", f"success.{cuts}"}
    whole = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(
        {name: documents(scores, _policy_order(scores)) for name, (scores, _) in cases.items()}
    )
    assert len(cases) >= 2_000
    for k in KS:
        # recip_rank has no cut-off of its own: the run is cut
        cut = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(
            {name: documents(scores, _policy_order(scores)[:k]) for name, (scores, _) in cases.items()}
        )
        for name, (scores, targets) in cases.items():
            ours = _ours(scores, targets, k)
            assert ours["recall"] == pytest.approx(whole[name][f"recall_{k}"], abs=1e-9), (name, k)
            assert ours["ndcg"] == pytest.approx(whole[name][f"ndcg_cut_{k}"], abs=1e-9), (name, k)
            assert ours["hit_rate"] == pytest.approx(whole[name][f"success_{k}"], abs=1e-9), (name, k)
            assert ours["mrr"] == pytest.approx(cut[name]["recip_rank"], abs=1e-9), (name, k)


def test_agrees_with_ranx():
    """ranx orders tied scores by an unstable sort, so it gets the declared order as distinct scores.

    Its metric functions are called on padded arrays (id, score): compiling its front end takes a minute.
    """
    pytest.importorskip("ranx")
    from ranx.metrics import hit_rate, ndcg, recall, reciprocal_rank

    cases = list(_random_cases(seed=1))
    qrels, run = np.zeros((len(cases), 40, 2)), np.zeros((len(cases), 40, 2))
    qrels[:, :, 0] = -1.0  # relevance 0: dropped by ranx
    run[:, :, 0] = 1_000.0 + np.arange(40)  # never relevant
    for case, (scores, targets) in enumerate(cases):
        qrels[case, : len(targets)] = np.stack([targets, np.ones(len(targets))], axis=1)
        order = _policy_order(scores)
        run[case, : len(order), 0] = order
        run[case, :, 1] = -np.arange(40)
    theirs = {"recall": recall, "ndcg": ndcg, "mrr": reciprocal_rank, "hit_rate": hit_rate}
    assert len(cases) >= 2_000
    for k in KS:
        ours = [_ours(scores, targets, k) for scores, targets in cases]
        for name, metric in theirs.items():
            mine = np.array([found[name] for found in ours])
            np.testing.assert_allclose(metric(qrels, run, k), mine, atol=1e-9, rtol=0, err_msg=f"{name}@{k}")
