"""Exhaustive scoring, and the search that knows when its list is exact, against a brute force over every item."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_genrec.errors import GenRecError, IncompatibleComponentsError, RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding.beam import leaves_to_items, trie_beam_search
from hf_genrec.generation.decoding.causal_lm import CausalLMScorer
from hf_genrec.generation.decoding.certified import certified, certified_top_k
from hf_genrec.generation.decoding.encoder_decoder import EncoderDecoderScorer
from hf_genrec.generation.decoding.exhaustive import exhaustive, score_all_leaves
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.trie import ItemTrie

SIZES = (6, 5, 4)
USERS = 4


class PrefixModel:
    """A random distribution behind every prefix. `trap`: the likelier a code of level 0, the flatter all that follows."""

    device = torch.device("cpu")

    def __init__(self, sizes, seed=0, sharpness=2.0, trap=False):
        self.sizes, self.seed, self.sharpness, self.trap = sizes, seed, sharpness, trap
        self.rows = 0

    @functools.cache  # noqa: B019
    def logp(self, user, prefix):
        level = len(prefix)
        rng = np.random.default_rng([self.seed, user, *prefix, level])
        logits = rng.standard_normal(self.sizes[level])
        if not self.trap:
            logits = self.sharpness * logits
        elif level == 0:
            logits = -np.arange(self.sizes[0]) / self.sizes[0]
        else:
            logits = logits * 8.0 * prefix[0] / self.sizes[0]
        return torch.from_numpy(logits).log_softmax(-1).float()

    def score_codes(self, state, prefix_BKl, level):
        self.rows += prefix_BKl.shape[0] * prefix_BKl.shape[1]
        rows = [
            torch.stack([self.logp(user, tuple(prefix)) for prefix in prefixes])
            for user, prefixes in zip(state, prefix_BKl.tolist())
        ]
        return torch.stack(rows)


def exact_scores(model, user, codes, renormalize=False, allowed=None):
    """Score of every item from the definition, one item at a time; -inf where it is not allowed."""
    legal = [i for i in range(len(codes)) if allowed is None or i in allowed]
    followers: dict = {}
    for item in legal:
        for level, code in enumerate(codes[item]):
            followers.setdefault(codes[item][:level], set()).add(code)
    scores = np.full(len(codes), -np.inf)
    for item in legal:
        scores[item] = 0.0
        for level, code in enumerate(codes[item]):
            logp = model.logp(user, codes[item][:level]).double()
            if renormalize:
                logp = logp - logp[sorted(followers[codes[item][:level]])].logsumexp(0)
            scores[item] += float(logp[code])
    return scores


def as_table(codes, levels):
    return np.array([[*code, *[-1] * (levels - len(code))] for code in codes])


def random_items(count, sizes, seed, ragged=False):
    rng = np.random.default_rng(seed)
    codes = [tuple(int(rng.integers(size)) for size in sizes) for _ in range(count)]
    return [code[: rng.integers(1, len(sizes) + 1)] for code in codes] if ragged else codes


def ranking(scores, codes, k):
    """The k best items: by score, then lexicographically by code (an end after every code), then by index."""
    order = sorted(
        range(len(codes)), key=lambda i: (-scores[i], [*codes[i], *[10**6] * (len(SIZES) - len(codes[i]))], i)
    )
    return [i for i in order[:k] if scores[i] > -np.inf]


# ------------------------------------------------------------------------------------------------------ exhaustive


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_items", [1, 7, 90])
@pytest.mark.parametrize("chunk_rows", [1, 9, 4096])
def test_scores_of_all_items_equal_the_definition(ragged, renormalize, num_items, chunk_rows):
    codes = random_items(num_items, SIZES, seed=num_items, ragged=ragged)
    trie = ItemTrie.from_codes(as_table(codes, 3), SIZES)
    model = PrefixModel(SIZES)
    leaves = score_all_leaves(
        model, range(USERS), trie, batch_size=USERS, renormalize=renormalize, chunk_rows=chunk_rows
    )
    for user in range(USERS):
        exact = exact_scores(model, user, codes, renormalize)
        np.testing.assert_allclose(leaves[user, trie.item_leaf_N].numpy(), exact, atol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_exhaustive_ranks_what_the_filter_leaves(ragged, renormalize):
    codes = random_items(90, SIZES, seed=5, ragged=ragged)
    trie = ItemTrie.from_codes(as_table(codes, 3), SIZES)
    model = PrefixModel(SIZES)
    rng = np.random.default_rng(0)
    allowed = [np.sort(rng.choice(90, size, replace=False)) for size in (0, 1, 12, 80)]
    config = RecommendationConfig(k=20, num_beams=20, renormalize=renormalize)
    item_filter = ItemFilter.from_rows(trie, None, allowed)
    items, scores = exhaustive(model, range(USERS), trie, config, item_filter, batch_size=USERS)
    for user in range(USERS):
        exact = exact_scores(model, user, codes, renormalize, set(allowed[user].tolist()))
        expected = ranking(exact, codes, 20)
        assert items[user].tolist() == expected + [-1] * (20 - len(expected))
        np.testing.assert_allclose(scores[user, : len(expected)].numpy(), exact[expected], atol=1e-5)


def test_every_shared_prefix_is_scored_once():
    codes = random_items(300, SIZES, seed=1)
    trie = ItemTrie.from_codes(codes, SIZES)
    prefixes = {code[:level] for code in codes for level in range(3)}
    model = PrefixModel(SIZES)
    score_all_leaves(model, range(2), trie, batch_size=2)
    assert model.rows == 2 * len(prefixes)
    # borders of chunks repeat one node per level at most, whatever the chunk
    nodes, chunk = len({code[:2] for code in codes}), 5
    model.rows = 0
    score_all_leaves(model, range(1), trie, batch_size=1, chunk_rows=chunk)
    assert len(prefixes) < model.rows <= len(prefixes) + 2 * -(-nodes // chunk)


def test_parts_nobody_may_see_are_not_scored():
    codes = random_items(300, SIZES, seed=1)
    trie = ItemTrie.from_codes(codes, SIZES)
    model = PrefixModel(SIZES)
    score_all_leaves(model, range(1), trie, ItemFilter.from_rows(trie, None, [[17]]), batch_size=1)
    assert model.rows == 3


def test_nan_and_small_heads_are_refused():
    trie = ItemTrie.from_codes([[0, 3], [1, 2]], (4, 4))
    with pytest.raises(IncompatibleComponentsError, match="level 1: the model scores 2 codes"):
        score_all_leaves(PrefixModel((4, 2)), range(1), trie, batch_size=1)
    model = PrefixModel((4, 4))
    model.logp = lambda user, prefix: torch.full((4,), torch.nan if user == 1 else -1.0)
    for search in (score_all_leaves, functools.partial(certified_top_k, k=1)):
        with pytest.raises(GenRecError, match="row 1: the model returned NaN"):
            search(model, range(2), trie, batch_size=2)


@pytest.fixture(params=["t5", "llama"])
def engine(request):
    """(decoder, state, trie, plain): a transformers model, and the same one with `score_codes` only."""
    torch.manual_seed(0)
    sizes, offsets, vocabulary = [7, 6, 5], [4, 11, 17], 22
    prompt = torch.randint(4, vocabulary, (3, 9))
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    if request.param == "t5":
        config = T5Config(
            vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        decoder = EncoderDecoderScorer(T5ForConditionalGeneration(config).eval(), offsets, sizes)
    else:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.5,
        )
        decoder = CausalLMScorer(LlamaForCausalLM(config).eval(), offsets, sizes)

    class Plain:
        score_codes = staticmethod(lambda state, prefix, level: decoder.score_codes(state, prefix, level))

    codes = random_items(60, sizes, seed=2, ragged=True)
    with torch.no_grad():
        yield decoder, decoder.start_decoding(prompt, mask), ItemTrie.from_codes(as_table(codes, 3), sizes), Plain()


@pytest.mark.parametrize("renormalize", [False, True])
def test_caches_of_transformers_models_give_the_same_numbers(engine, renormalize):
    decoder, state, trie, plain = engine
    options = {"batch_size": 3, "renormalize": renormalize}
    expected = score_all_leaves(plain, state, trie, **options)
    torch.testing.assert_close(score_all_leaves(decoder, state, trie, **options), expected, atol=1e-5, rtol=0)
    small = score_all_leaves(decoder, state, trie, chunk_rows=6, **options)
    torch.testing.assert_close(small, expected, atol=1e-5, rtol=0)
    result = certified_top_k(decoder, state, trie, 12, num_beams=2, **options)
    assert bool(result.certified_B.all()) and result.walks > 1
    best = expected[:, trie.item_leaf_N].sort(dim=-1, descending=True).values[:, :12]
    torch.testing.assert_close(result.scores_BX, best, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- certified


def check_certified(model, codes, k, item_filter_rows=None, **options):
    """Run a batch; certified lists must be the exact ones, others must say so. Returns the result."""
    trie = ItemTrie.from_codes(as_table(codes, 3), SIZES)
    item_filter = None if item_filter_rows is None else ItemFilter.from_rows(trie, None, item_filter_rows)
    result = certified_top_k(model, range(USERS), trie, k, item_filter, batch_size=USERS, **options)
    for user in range(USERS):
        allowed = None if item_filter_rows is None else set(np.asarray(item_filter_rows[user]).tolist())
        exact = exact_scores(model, user, codes, options.get("renormalize", False), allowed)
        expected = ranking(exact, codes, k)
        found = [item for item in result.items_BX[user].tolist() if item >= 0]
        if result.certified_B[user]:
            assert found == expected
            np.testing.assert_allclose(result.scores_BX[user, : len(found)].numpy(), exact[expected], atol=1e-5)
        assert len(set(found)) == len(found)
        assert torch.isneginf(result.scores_BX[user, len(found) :]).all()
    return result


@pytest.mark.parametrize("trap", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_never_certifies_a_wrong_list(trap, ragged, renormalize, seed):
    codes = random_items(110, SIZES, seed=seed, ragged=ragged)
    model = PrefixModel(SIZES, seed=seed, trap=trap)
    for k in (1, 6, 20):
        result = check_certified(model, codes, k, renormalize=renormalize)
        assert bool(result.certified_B.all())
        for num_beams, max_beams in ((1, 1), (1, 4), (2, 12)):
            check_certified(model, codes, k, renormalize=renormalize, num_beams=num_beams, max_beams=max_beams)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_beams", [1, 6, 500])
def test_filters(renormalize, num_beams):
    codes = random_items(110, SIZES, seed=3, ragged=True)
    rng = np.random.default_rng(1)
    rows = [rng.choice(110, size, replace=False) for size in (0, 3, 30, 100)]
    for trap in (False, True):
        model = PrefixModel(SIZES, trap=trap)
        result = check_certified(model, codes, 8, rows, num_beams=num_beams, renormalize=renormalize)
        assert bool(result.certified_B.all())
        assert (result.items_BX[0] == -1).all()


def test_a_trap_is_seen_and_escaped():
    """The likelier first code leads to 5 items of 0.6 / 5, the other to one item of 0.4: a beam of 1 takes the bait."""

    class Trap:
        def score_codes(self, state, prefix_BKl, level):
            if level == 0:
                probabilities = torch.tensor([0.6, 0.4, 0.0, 0.0, 0.0]).expand(*prefix_BKl.shape[:2], 5)
            else:
                sure = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
                probabilities = torch.where(prefix_BKl[..., :1] == 0, torch.full((5,), 0.2), sure)
            return probabilities.log()

    trie = ItemTrie.from_codes([[0, code] for code in range(5)] + [[1, 0]], (5, 5))
    assert trie_beam_search(Trap(), None, trie, 1, batch_size=1)[0].tolist() == [[0]]
    bounded = certified_top_k(Trap(), None, trie, 1, batch_size=1, max_beams=1)
    assert bounded.items_BX.tolist() == [[0]] and bounded.certified_B.tolist() == [False]
    free = certified_top_k(Trap(), None, trie, 1, batch_size=1)
    assert free.items_BX.tolist() == [[5]] and free.certified_B.tolist() == [True]
    assert free.beams_B.tolist() == [2] and free.walks == 2
    assert free.scores_BX.item() == pytest.approx(np.log(0.4))


def test_small_budgets_are_often_too_small_and_say_so():
    """Guards the test above against a search that certifies everything, or nothing."""
    codes, shares = random_items(110, SIZES, seed=0), {}
    for max_beams in (5, 12, 30):
        results = [
            check_certified(PrefixModel(SIZES, seed, 1.0), codes, 5, max_beams=max_beams).certified_B
            for seed in range(8)
        ]
        shares[max_beams] = float(torch.cat(results).float().mean())
    assert shares[5] < shares[12] <= shares[30] == 1.0 and shares[5] < 0.5


def test_first_walk_is_the_beam_search():
    codes = random_items(110, SIZES, seed=0)
    trie, model = ItemTrie.from_codes(codes, SIZES), PrefixModel(SIZES, sharpness=0.5)
    leaves, scores = trie_beam_search(model, range(USERS), trie, 6, batch_size=USERS)
    items, scores = leaves_to_items(trie, leaves, scores, 6)
    result = certified_top_k(model, range(USERS), trie, 6, batch_size=USERS, max_beams=6)
    assert result.items_BX.tolist() == items.tolist() and result.beams_B.tolist() == [6] * USERS
    torch.testing.assert_close(result.scores_BX, scores)
    assert not bool(result.certified_B.all())


def test_a_batch_equals_each_request_alone():
    codes = random_items(110, SIZES, seed=9, ragged=True)
    trie = ItemTrie.from_codes(as_table(codes, 3), SIZES)
    rows = [np.arange(110), np.arange(0, 110, 3), np.arange(5), np.arange(40, 110)]
    for options in ({}, {"max_beams": 9}, {"max_rows": 20}):
        model = PrefixModel(SIZES, sharpness=1.0)
        item_filter = ItemFilter.from_rows(trie, None, rows)
        batch = certified_top_k(model, range(USERS), trie, 6, item_filter, batch_size=USERS, num_beams=4, **options)
        for user in range(USERS):
            one = item_filter.take(torch.tensor([user]))
            alone = certified_top_k(model, [user], trie, 6, one, batch_size=1, num_beams=4, **options)
            found = alone.items_BX[0][alone.items_BX[0] >= 0].tolist()
            assert [item for item in batch.items_BX[user].tolist() if item >= 0] == found
            torch.testing.assert_close(batch.scores_BX[user, : len(found)], alone.scores_BX[0, : len(found)])
            for name in ("certified_B", "beams_B", "rows_B"):
                assert getattr(batch, name)[user] == getattr(alone, name)[0], name
        assert batch.model_rows >= int(batch.rows_B.sum())


@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_equal_scores_stand_in_the_order_of_the_exhaustive_search(k):
    class Flat:
        def score_codes(self, state, prefix_BKl, level):
            return torch.full((*prefix_BKl.shape[:2], 6), -1.0)

    codes = random_items(60, SIZES, seed=4)
    trie = ItemTrie.from_codes(codes, SIZES)
    config = RecommendationConfig(k=k, num_beams=k)
    expected, _ = exhaustive(Flat(), None, trie, config, batch_size=1)
    result = certified_top_k(Flat(), None, trie, k, batch_size=1, num_beams=1)
    assert result.items_BX.tolist() == expected.tolist() and bool(result.certified_B.all())
    assert expected[0].tolist() == ranking(np.zeros(60), codes, k)


def test_impossible_codes_are_last_but_legal():
    class Certain:
        def score_codes(self, state, prefix_BKl, level):
            logp = torch.full((*prefix_BKl.shape[:2], 3), -torch.inf)
            logp[..., 1] = 0.0
            return logp

    trie = ItemTrie.from_codes([[0, 0], [0, 1], [1, 1], [2, 2]], (3, 3))
    result = certified_top_k(Certain(), None, trie, 4, batch_size=1, num_beams=1)
    assert result.items_BX.tolist() == [[2, 1, 0, 3]] and result.certified_B.tolist() == [True]
    assert result.scores_BX.tolist() == [[0.0] + [-float("inf")] * 3]
    one = certified_top_k(Certain(), None, trie, 1, batch_size=1)
    assert one.items_BX.tolist() == [[2]] and one.rows_B.tolist() == [2]


def test_a_sure_model_costs_a_fraction_of_the_exhaustive_search():
    sizes = (16, 16, 16)
    trie = ItemTrie.from_codes(random_items(2000, sizes, seed=0), sizes)
    sure, flat = PrefixModel(sizes, sharpness=4.0), PrefixModel(sizes, sharpness=0.05)
    cost = {}
    for name, model in (("sure", sure), ("flat", flat)):
        result = certified_top_k(model, range(USERS), trie, 10, batch_size=USERS, num_beams=10)
        assert bool(result.certified_B.all())
        assert model.rows == result.model_rows
        cost[name] = int(result.rows_B.sum())
    sure.rows = 0
    score_all_leaves(sure, range(USERS), trie, batch_size=USERS)
    assert cost["sure"] < sure.rows / 4 < cost["flat"]


def test_shared_codes_fill_the_list_with_fewer_leaves():
    codes = [(0, 0, 0)] * 5 + [(1, 1, 1)] * 2 + [(2, 2, 2), (2, 2, 3)]
    model = PrefixModel(SIZES)
    result = check_certified(model, codes, 6)
    assert bool(result.certified_B.all()) and result.items_BX.shape[1] == 6


def test_strategy_certifies_k_items_or_all_candidates_of_a_dense_head():
    codes = random_items(110, SIZES, seed=0)
    trie, model = ItemTrie.from_codes(codes, SIZES), PrefixModel(SIZES, sharpness=1.0)
    for config in (
        RecommendationConfig(k=4, num_beams=9),
        RecommendationConfig(k=4, num_beams=9, dense_weight=0.5),
        RecommendationConfig(k=4, num_beams=9, renormalize=True),
    ):
        items, _ = certified(model, range(USERS), trie, config, batch_size=USERS)
        assert items.shape[1] == (9 if config.dense_weight else 4)
        expected, _ = exhaustive(model, range(USERS), trie, config, batch_size=USERS)
        assert items.tolist() == expected[:, : items.shape[1]].tolist()


def test_bad_requests():
    trie, model = ItemTrie.from_codes([[0], [1]], (2,)), PrefixModel((2,))
    for options, message in (
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"k": 1, "num_beams": 0}, "num_beams must be"),
        ({"k": 1, "max_rows": 0.5}, "max_rows must be"),
        ({"k": 4, "max_beams": 2}, "max_beams is 2, the search starts with 4 beams"),
    ):
        with pytest.raises(RequestError, match=message):
            certified_top_k(model, range(1), trie, batch_size=1, **options)
    with pytest.raises(RequestError, match="max_beams must be a whole number"):
        certified(model, range(1), trie, RecommendationConfig(), batch_size=1, max_beams=0)

    class Logits:
        def score_codes(self, state, prefix_BKl, level):
            return torch.full((*prefix_BKl.shape[:2], 2), 1.5)

    with pytest.raises(IncompatibleComponentsError, match=r"level 0: the model gives a code the score 1.5, above 0"):
        certified_top_k(Logits(), None, trie, 1, batch_size=1)
    assert certified_top_k(Logits(), None, trie, 1, batch_size=1, renormalize=True).certified_B.tolist() == [True]
    nobody = certified_top_k(model, [], trie, 3, batch_size=0)
    assert nobody.items_BX.shape[0] == 0
