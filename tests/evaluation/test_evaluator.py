"""The evaluator: settings, headline, coverage, buckets, promises of the lists, models, shared codes, user rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.evaluation.baselines import Popularity
from hf_genrec.evaluation.evaluator import (
    ModelRecommender,
    ScoreRecommender,
    evaluate,
    popularity_buckets,
    training_counts,
)
from hf_genrec.evaluation.metrics import metrics_from_ranks, ranks_from_scores, ranks_from_topk
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

NUM_ITEMS = 30


class Fixed:
    """Gives the same lists whatever it is asked."""

    def __init__(self, lists):
        self.lists = np.asarray(lists)

    def recommend_topk(self, histories, k, exclude_seen):
        return self.lists[: len(histories), :k]


def _random_case(seed=0, rows=60):
    rng = np.random.default_rng(seed)
    histories = Sequences.from_rows([rng.permutation(NUM_ITEMS)[: rng.integers(0, 9)] for _ in range(rows)])
    targets = rng.integers(0, NUM_ITEMS, size=rows).astype(np.int32)
    scores = rng.integers(0, 8, size=(rows, NUM_ITEMS)).astype(float)
    lookup = {tuple(row): score for row, score in zip(histories, scores)}
    recommender = ScoreRecommender(lambda h: np.stack([lookup[tuple(row)] for row in h]), NUM_ITEMS)
    scores = np.stack([lookup[tuple(row)] for row in histories])
    return EvaluationSet(np.arange(rows), histories, targets), recommender, scores


def _run(recommender, rows, **options):
    options = {"num_items": NUM_ITEMS, "progress": False, "bootstrap": 50} | options
    return evaluate(recommender, rows, **options)


# --------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_equals_ranks_of_the_full_score_table(batch_size):
    rows, recommender, scores = _random_case()
    report = _run(recommender, rows, ks=(1, 10, 50), batch_size=batch_size)
    wanted = metrics_from_ranks(ranks_from_scores(scores, rows.targets), (1, 10, 50))
    assert report.kept.metrics == pytest.approx(wanted)
    masked = scores.copy()
    for m, history in enumerate(rows.histories):
        masked[m, history] = -np.inf
    wanted = metrics_from_ranks(ranks_from_scores(masked, rows.targets), (1, 10, 50))
    assert report.removed.metrics == pytest.approx(wanted)


def test_headline_is_declared_and_not_chosen():
    rows, recommender, _ = _random_case()
    removed, kept = _run(recommender, rows), _run(recommender, rows, repeats=True)
    assert (removed.headline, kept.headline) == ("removed", "kept")
    assert removed["recall@10"] == removed.removed["recall@10"] == kept.removed["recall@10"]
    assert kept["recall@10"] == kept.kept["recall@10"]
    only = _run(recommender, rows, exclude_seen=False)
    assert only.headline == "kept" and list(only.results) == ["kept"]
    with pytest.raises(RequestError, match="both"):
        _ = only.removed


def test_seen_targets_are_counted_and_unreachable_when_removed():
    rows = EvaluationSet(np.arange(2), Sequences.from_rows([[3, 1], [2]]), np.array([1, 5]))
    report = _run(ScoreRecommender(lambda h: np.ones((len(h), NUM_ITEMS)), NUM_ITEMS), rows, ks=(30,))
    assert report.targets_seen == 1
    assert report.removed["recall@30"] == 0.5 and report.kept["recall@30"] == 1.0


def test_coverage_and_intervals():
    rows, recommender, _ = _random_case()
    report = _run(recommender, rows, ks=(1, 30))
    assert report.kept["coverage@30"] == 1.0
    best = recommender.recommend_topk(rows.histories, 1, False)
    assert report.kept["coverage@1"] == len(np.unique(best)) / NUM_ITEMS
    for name, value in report.removed.metrics.items():
        low, high = report.removed.intervals[name]
        assert low <= value <= high
    assert _run(recommender, rows, bootstrap=0).removed.intervals == {}
    with pytest.raises(RequestError, match=r"recall@1, .*coverage@30"):
        _ = report["recall@7"]


def test_buckets_partition_the_catalogue_and_the_targets():
    counts = np.array([50, 9, 9, 9, 8, 1, 1, 1, 1, 1, 1, 0, 0])
    buckets = popularity_buckets(counts)
    assert np.flatnonzero(buckets["head"]).tolist() == [0, 1, 2]  # 20 % of 11 trained items, rounded up; ties by index
    assert np.flatnonzero(buckets["cold"]).tolist() == [11, 12]
    assert (sum(mask.astype(int) for mask in buckets.values()) == 1).all()
    rows, recommender, _ = _random_case()
    train = Sequences.from_rows([np.arange(20), np.arange(5), [0, 0, 0]])
    report = _run(recommender, rows, ks=(5,), train_counts=training_counts(train, NUM_ITEMS))
    found = report.kept.buckets
    assert [found[b]["items"] for b in ("head", "tail", "cold")] == [4, 16, 10]
    assert sum(found[b]["targets"] for b in found) == len(rows)
    mean = sum(found[b]["targets"] * found[b]["recall@5"] for b in found) / len(rows)
    assert mean == pytest.approx(report.kept["recall@5"])


def test_empty_bucket_has_counts_but_no_metrics():
    rows = EvaluationSet(np.arange(1), Sequences.from_rows([[3]]), np.array([0]))
    counts = np.ones(NUM_ITEMS)
    report = _run(Popularity().fit(Sequences.from_rows([[0]]), NUM_ITEMS), rows, ks=(1,), train_counts=counts)
    assert report.removed.buckets["cold"] == {"items": 0, "targets": 0}


def test_users_with_several_rows_are_resampled_together():
    """Rows of the same user are copies: the interval must not shrink."""
    rows, recommender, _ = _random_case(rows=50)
    copies = np.repeat(np.arange(50), 20)
    many = EvaluationSet(rows.users[copies], rows.histories.take(copies), rows.targets[copies])
    one, several = _run(recommender, rows, bootstrap=2000), _run(recommender, many, bootstrap=2000)
    assert several["recall@10"] == pytest.approx(one["recall@10"])
    width = [i[1] - i[0] for i in (r.removed.intervals["recall@10"] for r in (one, several))]
    assert width[1] == pytest.approx(width[0], rel=0.2)
    assert several.to_dict()["users"] == 50 and several.to_dict()["rows"] == 1000


def test_to_dict_is_the_test_block_of_metrics_json():
    rows, recommender, _ = _random_case()
    report = _run(recommender, rows, ks=(10,), train_counts=np.ones(NUM_ITEMS), name="ours")
    block = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert block["recall@10"] == report["recall@10"] and block["seen_items"] == "removed"
    assert set(block["intervals"]) == {"recall@10", "ndcg@10", "mrr@10"}
    assert block["seen_kept"]["ndcg@10"] == report.kept["ndcg@10"]
    assert block["seen_removed"]["intervals"] == block["intervals"]
    assert block["items"] == NUM_ITEMS and block["bootstrap"]["resamples"] == 50
    from hf_genrec.hub.metrics_file import build_metrics

    built = build_metrics(dataset="d", protocol="leave_one_out", seed=0, test=report, baselines={"popularity": report})
    assert built["test"] == block


# -------------------------------------------------------------------------------------------------- refused lists


@pytest.mark.parametrize(
    "lists, message",
    [
        ([[0, 1, 2]], "must return integers of shape"),
        ([[0.0, 1.0]], "must return integers"),
        ([[0, 30]], "outside the catalogue"),
        ([[-2, 1]], "outside the catalogue"),
        ([[4, 4]], "twice"),
        ([[3, 1]], "its own history"),
    ],
)
def test_broken_lists_are_refused(lists, message):
    rows = EvaluationSet(np.arange(1), Sequences.from_rows([[3, 2]]), np.array([5]))

    class Broken(Fixed):
        def recommend_topk(self, histories, k, exclude_seen):
            return self.lists

    with pytest.raises(IncompatibleComponentsError, match=message):
        _run(Broken(lists), rows, ks=(2,))


def test_padding_may_repeat():
    rows = EvaluationSet(np.arange(1), Sequences.from_rows([[3, 2]]), np.array([5]))
    assert _run(Fixed([[5, -1, -1]]), rows, ks=(3,))["recall@3"] == 1.0


def test_bad_requests():
    rows, recommender, _ = _random_case()
    empty = EvaluationSet(np.empty(0, int), Sequences.from_rows([]), np.empty(0, int))
    with pytest.raises(RequestError, match="empty"):
        _run(recommender, empty)
    with pytest.raises(RequestError, match="the catalogue has 5"):
        evaluate(recommender, rows, num_items=5)
    with pytest.raises(RequestError, match="exclude_seen"):
        _run(recommender, rows, exclude_seen="sometimes")
    with pytest.raises(RequestError, match="ks"):
        _run(recommender, rows, ks=())
    with pytest.raises(RequestError, match="train_counts"):
        _run(recommender, rows, train_counts=np.ones(3))


# ---------------------------------------------------------------------------------------------------------- compare


def test_compare_needs_the_same_rows_and_has_the_right_sign():
    rows, recommender, _ = _random_case()
    good = ScoreRecommender(lambda h: np.eye(NUM_ITEMS)[[0] * len(h)], NUM_ITEMS)
    rows = EvaluationSet(rows.users, rows.histories, np.zeros(len(rows), int))
    ours, other = _run(good, rows, name="good"), _run(recommender, rows, name="random")
    found = ours.compare(other, "recall@1", setting="kept")
    assert found.verdict == "better" and found.difference == pytest.approx(1 - other.kept["recall@1"])
    assert other.compare(ours, "recall@1", setting="kept").difference == -found.difference
    changed = EvaluationSet(rows.users, rows.histories, np.ones(len(rows), int))
    with pytest.raises(RequestError, match="different rows"):
        ours.compare(_run(good, changed))
    for metric in ("recall@60", "hits@10", "recall"):
        with pytest.raises(RequestError, match="no metric"):
            ours.values(metric)


# ----------------------------------------------------------------------------------------------------------- models


class TableModel(RecommendationMixin):
    """Scores every code by a fixed table of the last history token; no training needed to check the plumbing."""

    def __init__(self, codebook_sizes, vocabulary, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu")
        self.tables = [torch.randn(vocabulary, size, generator=generator) for size in codebook_sizes]
        self.batches = []

    def start_decoding(self, input_ids, attention_mask):
        self.batches.append(tuple(input_ids.shape))
        return input_ids[:, -1]

    def score_codes(self, state, prefix_BKl, level):
        scores = self.tables[level][state].log_softmax(-1)
        return scores.unsqueeze(1).expand(-1, prefix_BKl.shape[1], -1)


def _model_case(codes, beams=50, seed=0):
    tokenizer = ItemTokenizer.from_codes([f"item-{i}" for i in range(len(codes))], codes)
    model = TableModel(tokenizer.codebook_sizes, tokenizer.vocab_size, seed)
    model.recommendation_config = RecommendationConfig(num_beams=beams, batch_size=8)
    return model, tokenizer


def _histories(num_items, rows=25, seed=0):
    rng = np.random.default_rng(seed)
    histories = Sequences.from_rows([rng.permutation(num_items)[: rng.integers(1, 6)] for _ in range(rows)])
    return EvaluationSet(np.arange(rows), histories, rng.integers(0, num_items, size=rows))


def _codes(num_items, sizes=(4, 5, 6), seed=1):
    every = np.stack(np.unravel_index(np.random.default_rng(seed).permutation(np.prod(sizes)), sizes), axis=1)
    return every[:num_items]


def test_model_recommender_agrees_with_recommend_and_with_exact_scores():
    codes = _codes(40)
    model, tokenizer = _model_case(codes, beams=200)  # wide enough to be exact
    rows = _histories(40)
    lists = ModelRecommender(model, tokenizer).recommend_topk(rows.histories, 10, True)
    ids = [[tokenizer.item_ids[i] for i in row] for row in rows.histories]
    theirs = model.recommend(ids, tokenizer=tokenizer, k=10, exclude_seen=True)
    assert [[tokenizer.item_ids[i] for i in row] for row in lists] == [[r.item_id for r in row] for row in theirs]
    exact = ScoreRecommender(
        lambda h: model.score_all([[tokenizer.item_ids[i] for i in row] for row in h], tokenizer=tokenizer), 40
    )
    one, other = (evaluate(r, rows, num_items=40, progress=False) for r in (ModelRecommender(model, tokenizer), exact))
    assert one.removed.metrics == pytest.approx(other.removed.metrics)
    assert one.kept.metrics == pytest.approx(other.kept.metrics)


def test_rows_of_similar_length_share_a_batch_and_come_back_in_order():
    model, tokenizer = _model_case(_codes(40))
    rows = _histories(40)
    small = ModelRecommender(model, tokenizer, batch_size=3).recommend_topk(rows.histories, 10, False)
    model.batches.clear()
    large = ModelRecommender(model, tokenizer, batch_size=25).recommend_topk(rows.histories, 10, False)
    assert model.batches == [(25, 15)]
    np.testing.assert_array_equal(small, large)


def test_the_evaluator_never_searches_wider_than_the_users_would():
    model, tokenizer = _model_case(_codes(40), beams=5)
    lists = ModelRecommender(model, tokenizer).recommend_topk(_histories(40).histories, 20, False)
    assert (lists[:, :5] >= 0).all() and (lists[:, 5:] == -1).all()
    wide = ModelRecommender(model, tokenizer, num_beams=20).recommend_topk(_histories(40).histories, 20, False)
    assert (wide >= 0).all()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_stock_models_read_a_history_once_for_both_settings(kind):
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    tokenizer = ItemTokenizer.from_codes([f"i{i}" for i in range(40)], _codes(40), codebook_sizes=(4, 5, 6))
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, pad_token_id=0, **sizes))
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes))
    model.recommendation_config = RecommendationConfig(num_beams=12, batch_size=7)
    recommender, rows = ModelRecommender(model.eval(), tokenizer), _histories(40)
    reads, start = [], recommender._decoder.start_decoding

    def counted(*args):
        reads.append(len(args[0]))
        return start(*args)

    recommender._decoder.start_decoding = counted
    report = evaluate(recommender, rows, num_items=40, progress=False, bootstrap=0)
    assert reads == [7, 7, 7, 4]
    for remove, result in ((True, report.removed), (False, report.kept)):
        alone = recommender.recommend_topk(rows.histories, 50, remove)
        assert result.metrics == metrics_from_ranks(ranks_from_topk(alone, rows.targets), report.ks)
    assert len(reads) == 12
    with pytest.raises(IncompatibleComponentsError, match="seen removed and kept: row 0 lists item index"):
        recommender.recommend_topk_both = lambda histories, k: [np.zeros((len(histories), k), int)] * 2
        evaluate(recommender, rows, num_items=40, progress=False)


def test_a_shared_code_is_no_free_hit():
    """Four items share one code and the model is sure of it: each of them is ranked apart, one in four is first."""
    codes = np.array([[0, 0]] * 4 + [[1, c] for c in range(4)])
    tokenizer = ItemTokenizer.from_codes([f"item-{i}" for i in range(8)], codes)
    model = TableModel(tokenizer.codebook_sizes, tokenizer.vocab_size)
    for table in model.tables:
        table.zero_()[:, 0] = 9.0
    rows = EvaluationSet(np.arange(4), Sequences.from_rows([[7]] * 4), np.arange(4))
    report = evaluate(ModelRecommender(model, tokenizer), rows, num_items=8, ks=(1, 2, 4), progress=False, bootstrap=0)
    assert [report[f"recall@{k}"] for k in (1, 2, 4)] == [0.25, 0.5, 1.0]


def test_models_of_another_catalogue_or_kind_are_refused():
    model, tokenizer = _model_case(_codes(40))
    model.config = SimpleNamespace(catalogue_fingerprint="0" * 64)
    with pytest.raises(IncompatibleComponentsError, match="the model was made for catalogue"):
        ModelRecommender(model, tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="ScoreRecommender"):
        ModelRecommender(torch.nn.Linear(1, 1), tokenizer)


def test_user_tokens_reach_the_tokenizer():
    class Spy:
        num_items, item_ids = 4, list("abcd")

        def __init__(self, inner):
            self.inner, self.users = inner, []

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def encode_item_indices(self, rows, user_ids=None, **options):
            self.users += user_ids or []
            return self.inner.encode_item_indices(rows, user_ids=user_ids, **options)

    tokenizer = ItemTokenizer.from_codes(list("abcd"), np.arange(4)[:, None], num_user_tokens=3)
    model = TableModel(tokenizer.codebook_sizes, tokenizer.vocab_size)
    spy = Spy(tokenizer)
    rows = EvaluationSet(np.array([2, 0, 1]), Sequences.from_rows([[0], [1, 2], [3]]), np.array([1, 3, 0]))
    recommender = ModelRecommender(model, spy, user_ids=["u0", "u1", "u2"])
    evaluate(recommender, rows, num_items=4, exclude_seen=True, progress=False, bootstrap=0)
    assert spy.users == ["u2", "u1", "u0"]  # by history length: rows 0, 2, 1
