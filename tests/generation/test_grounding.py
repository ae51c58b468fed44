"""Grounding of vectors, texts, n-grams and titles: always catalogue items, against definitions and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.fm_index import FMIndex
from hf_genrec.generation.grounding import GAMMA_GRID, EmbeddingGrounder
from hf_genrec.generation.ngram_grounding import Ngram, NgramGrounder
from hf_genrec.generation.text_encoding import encode_texts
from hf_genrec.generation.title_matching import TitleMatcher, _CharacterTable, normalise_title

WORDS = ["the", "red", "blue", "shoe", "hat", "of", "night", "day", "moon", "sun", "river", "king", "queen", "cat"]


@pytest.fixture(scope="module")
def words():
    """A word-level tokenizer."""
    vocabulary = {"[pad]": 0, "[unk]": 1, **{word: i for i, word in enumerate(WORDS, start=2)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[pad]", unk_token="[unk]")


@pytest.fixture(scope="module")
def titles():
    rng = np.random.default_rng(0)
    return list(dict.fromkeys(" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(60)))


def language_model(kind):
    torch.manual_seed(0)
    size = len(WORDS) + 2
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
            )
        )
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        )
    return BertModel(
        BertConfig(vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


def definition(vectors, query, metric, prior=None, gamma=0.0):
    x, q = np.asarray(vectors, dtype=np.float64), np.asarray(query, dtype=np.float64)
    if metric == "l2":
        distance = np.sqrt(((x - q) ** 2).sum(-1))
    elif metric == "cosine":
        distance = 1 - (x @ q) / np.linalg.norm(x, axis=-1) / np.linalg.norm(q)
    else:
        distance = -(x @ q)
    if gamma == 0:
        return distance
    scale = lambda v: (v - v.min()) / (v.max() - v.min())
    return scale(distance) * (1 + scale(np.asarray(prior, dtype=np.float64))) ** -gamma


# ------------------------------------------------------------------------------------------------- nearest vectors


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 7.0])
def test_ranking_equals_the_definition(metric, gamma):
    rng = np.random.default_rng(0)
    vectors, queries, prior = rng.standard_normal((200, 9)), rng.standard_normal((5, 9)), rng.random(200) * 50
    grounder = EmbeddingGrounder(vectors.astype(np.float32), metric=metric, prior=torch.from_numpy(prior), gamma=gamma)
    items, scores = grounder.ground(queries.astype(np.float32), k=200)
    for row in range(5):
        exact = definition(vectors.astype(np.float32), queries[row].astype(np.float32), metric, prior, gamma)
        assert items[row].tolist() == np.argsort(exact, kind="stable").tolist()
        np.testing.assert_allclose(-scores[row].numpy(), np.sort(exact), atol=1e-5)
    short, _ = grounder.ground(queries[:2].astype(np.float32), k=7)
    assert short.tolist() == items[:2, :7].tolist()


def test_gamma_zero_is_pure_l2_ranking():
    """CHECK of BIGRec: without the prior, and with one whose strength is 0, the order is that of the distances."""
    rng = np.random.default_rng(1)
    vectors, queries = rng.standard_normal((50, 4)).astype(np.float32), rng.standard_normal((3, 4)).astype(np.float32)
    plain = EmbeddingGrounder(vectors).ground(queries, 50)[0]
    with_prior = EmbeddingGrounder(vectors, prior=torch.rand(50), gamma=5.0)
    assert with_prior.ground(queries, 50, gamma=0.0)[0].tolist() == plain.tolist()
    assert with_prior.ground(queries, 50)[0].tolist() != plain.tolist()
    flat = EmbeddingGrounder(vectors, prior=torch.ones(50), gamma=5.0)  # a prior without differences changes nothing
    assert flat.ground(queries, 50)[0].tolist() == plain.tolist()


def test_chunks_and_batches_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    vectors, queries = rng.standard_normal((70, 5)).astype(np.float32), rng.standard_normal((9, 5)).astype(np.float32)
    grounder = EmbeddingGrounder(vectors, prior=torch.rand(70), gamma=2.0)
    whole = grounder.ground(queries, 20)
    for row in range(9):
        alone = grounder.ground(queries[row : row + 1], 20)
        assert alone[0][0].tolist() == whole[0][row].tolist() and alone[1][0].tolist() == whole[1][row].tolist()
    monkeypatch.setattr("hf_genrec.generation.grounding._CELLS", 150)
    monkeypatch.setattr("hf_genrec.generation.grounding._ITEMS_PER_PRODUCT", 16)
    again = grounder.ground(queries, 20)
    assert again[0].tolist() == whole[0].tolist() and again[1].tolist() == whole[1].tolist()


def test_distances_of_far_and_near_vectors_stay_exact():
    """A large common part of all vectors, as hidden states have, does not drown the differences."""
    rng = np.random.default_rng(3)
    vectors = (1000.0 + rng.standard_normal((300, 16))).astype(np.float32)
    items, scores = EmbeddingGrounder(vectors).ground(vectors[:40], 300)
    for row in range(40):
        exact = definition(vectors, vectors[row], "l2")
        assert sorted(items[row].tolist()) == list(range(300))
        np.testing.assert_allclose(exact[items[row].numpy()], np.sort(exact), rtol=2e-7)
        np.testing.assert_allclose(-scores[row].numpy(), np.sort(exact), rtol=2e-7)
        assert items[row, 0] == row and scores[row, 0] == 0.0


def test_filters_keep_the_order_and_never_leak():
    rng = np.random.default_rng(4)
    vectors, queries = rng.standard_normal((40, 4)).astype(np.float32), rng.standard_normal((3, 4)).astype(np.float32)
    grounder = EmbeddingGrounder(vectors, prior=torch.rand(40), gamma=1.0)
    order = grounder.ground(queries, 40)[0].numpy()
    seen = [rng.choice(40, 15, replace=False) for _ in range(3)]
    allowed = [np.setdiff1d(rng.choice(40, 20, replace=False), []) for _ in range(3)]
    for options in ({"excluded": seen}, {"allowed": allowed}, {"excluded": seen, "allowed": allowed}):
        items, scores = grounder.ground(queries, 40, **options)
        for row in range(3):
            legal = set(range(40)) if "allowed" not in options else set(allowed[row].tolist())
            legal -= set(seen[row].tolist()) if "excluded" in options else set()
            found = [item for item in items[row].tolist() if item >= 0]
            assert found == [item for item in order[row].tolist() if item in legal]
            assert torch.isneginf(scores[row, len(found) :]).all()
    everything = [np.arange(40)] * 3
    assert (grounder.ground(queries, 5, excluded=everything)[0] == -1).all()


def test_duplicates_share_the_best_value_by_index():
    vectors = np.array([[5.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], dtype=np.float32)
    prior = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0])  # item 4 is popular, and lifts its twins 1 and 3
    for texts in (None, ["a", "b", "c", "b", "b"]):
        grounder = EmbeddingGrounder(vectors, item_texts=texts, prior=prior)
        for gamma in (0.0, 3.0):
            items, scores = grounder.ground(np.array([[0.1, 0.0]], dtype=np.float32), 5, gamma=gamma)
            assert items.tolist() == [[2, 1, 3, 4, 0]]
            assert scores[0, 1] == scores[0, 2] == scores[0, 3]
    # the same text with different vectors (a sloppy encoder) is still one title
    grounder = EmbeddingGrounder(
        np.array([[5.0, 0.0], [0.0, 0.0], [5.0, 0.1], [3.0, 0.0]], dtype=np.float32), item_texts=["a", "b", "b", "c"]
    )
    assert grounder.ground(["b"], 4)[0].tolist() == [[1, 2, 3, 0]]


# ------------------------------------------------------------------------------------------------------ from texts


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_exact_title_puts_its_item_first(kind, pooling, words, titles):
    """CHECK of BIGRec, for every strength of the prior; and whatever is written, catalogue items come out."""
    model = language_model(kind).train()
    for metric in ("l2", "cosine"):
        grounder = EmbeddingGrounder.from_language_model(
            model, words, titles, pooling=pooling, metric=metric, prior=torch.rand(len(titles))
        )
        for gamma in (0.0, 1.0, 99.0):
            items, _ = grounder.ground([f" {title} " for title in titles], 3, gamma=gamma)
            assert items[:, 0].tolist() == list(range(len(titles)))
        free, _ = grounder.ground(["zebra zebra", "the the the the the the the", "moon king river"], len(titles))
        assert all(sorted(row) == list(range(len(titles))) for row in free.tolist())
    assert model.training


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_encoding_is_the_models_hidden_state(kind, words, titles):
    model = language_model(kind).eval()
    backbone = model.get_encoder() if kind == "t5" else model.base_model
    vectors = {p: encode_texts(model, words, titles, pooling=p, batch_size=7) for p in ("last", "mean")}
    with torch.no_grad():
        for row, title in enumerate(titles[:20]):
            hidden = backbone(input_ids=torch.tensor([words(title)["input_ids"]])).last_hidden_state[0]
            torch.testing.assert_close(vectors["last"][row], hidden[-1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(vectors["mean"][row], hidden.mean(0), atol=1e-5, rtol=1e-5)
    short = encode_texts(model, words, ["the red blue"], max_length=2)
    torch.testing.assert_close(short, encode_texts(model, words, ["the red"]), atol=1e-5, rtol=1e-5)
    assert encode_texts(model, words, []).shape == (0, 16)


def test_catalogue_texts_are_not_encoded_again(words, titles):
    asked = []

    def encode(texts):
        asked.extend(texts)
        return torch.ones(len(texts), 3)

    vectors = torch.randn(len(titles), 3, generator=torch.Generator().manual_seed(0))
    grounder = EmbeddingGrounder(vectors, item_texts=titles, encode=encode)
    items, _ = grounder.ground([titles[3], "something else", titles[5]], 1)
    assert asked == ["something else"] and items[[0, 2], 0].tolist() == [3, 5]
    assert items[1, 0] == int((vectors - 1.0).norm(dim=-1).argmin())


# ---------------------------------------------------------------------------------------------------- choose_gamma


@pytest.mark.parametrize("metric", ["ndcg", "recall"])
def test_choice_of_gamma_equals_grounding_with_every_value(metric):
    rng = np.random.default_rng(6)
    vectors = rng.standard_normal((60, 3)).round(1).astype(np.float32)
    vectors[40:50] = vectors[:10]
    prior = torch.from_numpy(rng.integers(0, 5, 60).astype(np.float32))
    queries, targets = rng.standard_normal((25, 3)).astype(np.float32), rng.integers(0, 60, 25)
    excluded = [np.setdiff1d(rng.choice(60, 6), [target]) for target in targets]
    grounder = EmbeddingGrounder(vectors, prior=prior)
    grid = [0.0, 0.25, 1.0, 4.0, 50.0]
    choice = grounder.choose_gamma(queries, targets, excluded=excluded, k=8, metric=metric, grid=grid)
    for gamma in grid:
        items, _ = grounder.ground(queries, 60, gamma=gamma, excluded=excluded)
        total = 0.0
        for row, target in enumerate(targets):
            twins = np.flatnonzero((vectors == vectors[target]).all(-1))
            rank = min(items[row].tolist().index(twin) for twin in twins if twin in items[row].tolist())
            total += (rank < 8) * (1.0 if metric == "recall" else 1 / math.log2(rank + 2))
        assert choice.grid[gamma] == pytest.approx(total / 25)
    best = max(choice.grid.values())
    assert choice.value == pytest.approx(best)
    assert choice.gamma == min(gamma for gamma, value in choice.grid.items() if value == pytest.approx(best))


def test_gamma_finds_a_prior_that_helps_and_leaves_one_that_does_not():
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((80, 4)).astype(np.float32)
    targets = rng.integers(0, 20, 60)  # only the first 20 items are ever bought
    queries = vectors[targets] + 1.2 * rng.standard_normal((60, 4)).astype(np.float32)
    helpful, harmful = torch.zeros(80), torch.zeros(80)
    helpful[:20], harmful[20:] = 1.0, 1.0
    grounder = EmbeddingGrounder(vectors)
    good = grounder.choose_gamma(queries, targets, prior=helpful)
    bad = grounder.choose_gamma(queries, targets, prior=harmful)
    assert good.gamma > 0 and good.value > good.grid[0.0] + 0.05
    assert bad.gamma == 0.0 and bad.value == bad.grid[0.0] == good.grid[0.0]
    assert len(GAMMA_GRID) == len(set(GAMMA_GRID)) == 199 and list(good.grid) == list(GAMMA_GRID)


def test_bad_grounding_requests():
    vectors = torch.eye(3)
    grounder = EmbeddingGrounder(vectors, item_texts=["a", "b", "c"])
    one = np.zeros((1, 3), dtype=np.float32)
    cases = [
        (IncompatibleComponentsError, lambda: EmbeddingGrounder(torch.zeros(0, 3)), "must be a table"),
        (IncompatibleComponentsError, lambda: EmbeddingGrounder(torch.tensor([[1.0], [math.nan]])), "item 1: its vec"),
        (IncompatibleComponentsError, lambda: EmbeddingGrounder(vectors, item_texts=["a"]), "1 item texts for 3"),
        (RequestError, lambda: EmbeddingGrounder(vectors, metric="l3"), "unknown metric 'l3'"),
        (RequestError, lambda: EmbeddingGrounder(vectors, gamma=-1.0), "gamma must be"),
        (RequestError, lambda: EmbeddingGrounder(vectors, prior=torch.ones(2)), "the prior must have shape"),
        (RequestError, lambda: grounder.ground(one, 0), "k must be"),
        (RequestError, lambda: grounder.ground(one, gamma=1.0), "gamma above 0 needs a prior"),
        (RequestError, lambda: grounder.ground(one, gamma=1.0, prior=torch.ones(4)), "4 columns for 3 items"),
        (RequestError, lambda: grounder.ground("a"), "one string"),
        (RequestError, lambda: grounder.ground(["a", "d"]), "row 1: 'd' is no item text"),
        (RequestError, lambda: grounder.ground(np.zeros((1, 2), dtype=np.float32)), "item vectors are 3 wide"),
        (RequestError, lambda: grounder.ground(one * math.nan), "row 0: its vector is not finite"),
        (RequestError, lambda: grounder.ground(one, excluded=[[3]]), "excluded row 0 holds an item index outside 0..2"),
        (RequestError, lambda: grounder.ground(one, allowed=[[0], [1]]), "allowed holds 2 lists for 1"),
        (RequestError, lambda: grounder.ground(one, allowed=[[0]], excluded=[[0]]), "row 0: the allow-list leaves"),
        (RequestError, lambda: grounder.choose_gamma(one, [0, 1]), "2 targets for 1"),
        (RequestError, lambda: grounder.choose_gamma(one, [5]), "outside the catalogue"),
        (RequestError, lambda: grounder.choose_gamma(one, [0], metric="mrr"), "metric must be"),
    ]
    for error, call, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_bad_encodings(words):
    model = language_model("bert")
    with pytest.raises(RequestError, match="unknown pooling"):
        encode_texts(model, words, ["the"], pooling="max")
    with pytest.raises(RequestError, match="row 1: '' has no tokens"):
        encode_texts(model, words, ["the", ""])


# --------------------------------------------------------------------------------------------------------- n-grams


DOCUMENTS = [[1, 2, 3, 4], [2, 3, 5], [9, 1, 2], [7, 7, 8], [1, 6, 1, 1]]


def facets():
    return {"title": FMIndex.from_sequences(DOCUMENTS), "code": FMIndex.from_sequences([[i + 20] for i in range(5)])}


def test_ngram_weights_equal_the_formula_and_rare_ones_weigh_more():
    index = facets()["title"]
    total = sum(map(len, DOCUMENTS))
    assert index.num_tokens == total
    for alpha in (1.0, 2.0):
        grounder = NgramGrounder({"title": index}, 5, alpha=alpha, biases={"title": 0.25})
        for tokens, log_prob in (((1,), -1.5), ((2, 3), -1.4), ((7, 7, 8), -2.0), ((1,), -0.1)):
            p, f = math.exp(min(log_prob + 0.25, -1.0)), index.count(tokens) / total
            expected = max(0.0, math.log(p * (1 - f) / (f * (1 - p)))) ** alpha
            assert grounder.weight(Ngram("title", tokens, log_prob)) == pytest.approx(expected)
    plain = NgramGrounder({"title": index}, 5)
    assert index.count((4,)) < index.count((2,)) < index.count((1,))
    weights = [plain.weight(Ngram("title", (token,), -1.2)) for token in (4, 2, 1)]
    assert weights[0] > weights[1] > weights[2] > 0
    assert plain.weight(Ngram("title", (1,), -9.0)) == 0.0  # rarer said than written
    assert NgramGrounder({"title": FMIndex.from_sequences([[3]])}, 1).weight(Ngram("title", (3,), -1.0)) == 0.0


def test_ngrams_outside_the_corpus_are_dropped():
    grounder = NgramGrounder(facets(), 5)
    assert grounder.weight(Ngram("title", (2, 1), -1.0)) == 0.0
    assert grounder.ground([[Ngram("title", (2, 1), -1.0), Ngram("title", (99,), -1.0)], []], 2)[0].tolist() == [
        [-1, -1],
        [-1, -1],
    ]


def test_item_scores_add_pieces_with_the_discount_of_repeated_tokens():
    grounder = NgramGrounder(facets(), 5, beta=0.8)
    pieces = [Ngram("title", (2, 3), -1.2), Ngram("title", (1, 2), -1.2), Ngram("title", (3, 4), -1.3)]
    weights = {piece.tokens: grounder.weight(piece) for piece in pieces}
    heaviest = weights[(3, 4)]  # occurs once; the others twice
    assert heaviest > weights[(2, 3)] == weights[(1, 2)]
    found = grounder.scores(pieces)
    half = 1 - 0.8 + 0.8 * 0.5
    # item 0 holds all three: (3, 4) in full, then (1, 2) in full, then (2, 3) with both tokens covered
    assert found[0] == pytest.approx(heaviest + weights[(1, 2)] + 0.2 * weights[(2, 3)])
    assert found[1] == pytest.approx(weights[(2, 3)]) and found[2] == pytest.approx(weights[(1, 2)])
    assert half * weights[(2, 3)] != 0.2 * weights[(2, 3)] and set(found) == {0, 1, 2}
    full = NgramGrounder(facets(), 5, beta=0.0).scores(pieces)
    assert full[0] == pytest.approx(sum(weights.values()))
    assert grounder.scores(pieces[::-1]) == found and grounder.scores(pieces * 2) == found
    worse = [*pieces, Ngram("title", (3, 4), -4.0)]  # the same piece, less likely: no change
    assert grounder.scores(worse) == found


def test_facets():
    """Zero-weighting a facet leaves the other; a hit in two facets outranks one of them alone."""
    title, code = Ngram("title", (2, 3), -1.2), Ngram("code", (21,), -1.2)
    both = NgramGrounder(facets(), 5)
    items, scores = both.ground([[title, code]], 5)
    assert items.tolist() == [[1, 0, -1, -1, -1]] and scores[0, 0] > scores[0, 1] > 0
    for off, alone in (("code", "title"), ("title", "code")):
        switched = NgramGrounder(facets(), 5, facet_weights={off: 0.0}).ground([[title, code]], 5)
        single = NgramGrounder({alone: facets()[alone]}, 5).ground([[title if alone == "title" else code]], 5)
        assert switched[0].tolist() == single[0].tolist() and switched[1].tolist() == single[1].tolist()
    squared = NgramGrounder(facets(), 5, gamma=0.5, facet_weights={"code": 3.0}).scores([title, code])
    assert squared[1] == pytest.approx(both.weight(title) ** 0.5 + 3.0 * both.weight(code) ** 0.5)


def test_ngram_filters_and_ties():
    grounder = NgramGrounder(facets(), 5)
    pieces = [Ngram("title", (2, 3), -1.2)]
    assert grounder.ground([pieces] * 3, 2, excluded=[[0], [], [0, 1]])[0].tolist() == [[1, -1], [0, 1], [-1, -1]]
    assert grounder.ground([pieces] * 2, 2, allowed=[[1, 4], [0]])[0].tolist() == [[1, -1], [0, -1]]


def test_bad_ngrams():
    grounder = NgramGrounder(facets(), 5)
    for call, message in (
        (lambda: NgramGrounder({}, 5), "at least one facet"),
        (lambda: NgramGrounder(facets(), 0), "num_items"),
        (lambda: NgramGrounder(facets(), 5, beta=1.5), "beta must be"),
        (lambda: NgramGrounder(facets(), 5, ceiling=0.0), "ceiling must be"),
        (lambda: NgramGrounder(facets(), 5, biases={"tag": 1.0}), "biases names the facet 'tag'"),
        (lambda: NgramGrounder(facets(), 5, facet_weights={"title": -1.0}), "facet weights: >= 0"),
        (lambda: grounder.ground([[Ngram("tag", (1,), -1.0)]]), "n-gram of facet 'tag'"),
        (lambda: grounder.ground([[Ngram("title", (), -1.0)]]), "without tokens"),
        (lambda: grounder.ground([[Ngram("title", (1,), 0.5)]]), "log-probability 0.5"),
        (lambda: grounder.ground([[]], 0), "k must be"),
        (lambda: grounder.ground([[]], excluded=[[], []]), "excluded holds 2 lists for 1"),
        (lambda: NgramGrounder(facets(), 2).ground([[Ngram("title", (7, 7), -1.0)]]), "has a document 3, the catal"),
    ):
        with pytest.raises(RequestError, match=message):
            call()


# ---------------------------------------------------------------------------------------------------------- titles


MOVIES = [
    "Toy Story (1995)",
    "Matrix, The (1999)",
    "Heat (1995)",
    "Heat (1986)",
    "Am\u00e9lie (2001)",
    "Up",
    "",
    "Toy Story 2 (1999)",
]


@pytest.mark.parametrize(
    ("text", "item", "kind"),
    [
        ("Toy Story (1995)", 0, "exact"),
        ("toy story", 0, "normalised"),
        ("The Matrix", 1, "normalised"),
        ("the matrix (1999)", 1, "normalised"),
        ("HEAT", 2, "normalised"),
        ("heat (1986)", 3, "normalised"),
        ("Amelie", 4, "normalised"),
        ("Toy Stroy", 0, "edit"),
        ("Toy Stroy (1995)", 0, "edit"),
        ("The Matrx (1999)", 1, "edit"),
        ("Toy Story 3", -1, "none"),
        ("Toy Story 2", 7, "normalised"),
        ("Us", -1, "none"),
        ("Heat (1972)", -1, "none"),
        ("", -1, "none"),
        ("!!!", -1, "none"),
    ],
)
def test_titles(text, item, kind):
    found = TitleMatcher(MOVIES).match(text)
    assert (found.item, found.kind) == (item, kind)


def test_edit_distance_two_is_matched_and_three_is_not():
    """CHECK of the zero-shot conversational recommenders."""
    matcher = TitleMatcher(["Casablanca", "Vertigo"])
    assert [matcher.match(text).edits for text in ("Casablanka", "Casablankaa")] == [1, 2]
    assert matcher.match("Casaxxxnca").item == -1
    assert TitleMatcher(["Casablanca"], max_edits=0).match("Casablanka").item == -1
    assert TitleMatcher(["Casablanca"], max_edits=3).match("Casaxxxnca").edits == 3


def test_ratio_accepts_shortened_titles_when_asked():
    titles = ["Dr. Strangelove or: How I Learned to Stop Worrying", "Alien"]
    text = "Dr Strangelove or How I Learned to Stop"
    assert TitleMatcher(titles).match(text).item == -1
    found = TitleMatcher(titles, min_ratio=0.8).match(text)
    assert (found.item, found.kind) == (0, "ratio")
    assert TitleMatcher(titles, min_ratio=0.8).match("Predator").item == -1


def test_shared_titles_name_all_their_items():
    found = TitleMatcher(["Hamlet", "Emma", "hamlet", "Hamlet"]).match("Hamlet")
    assert (found.item, found.kind, found.items) == (0, "exact", (0, 3))
    assert TitleMatcher(["Hamlet", "Emma", "hamlet"]).match("HAMLET").items == (0, 2)


def test_lines_of_an_answer():
    answer = '1. "Toy Story (1995)"\n2) **The Matrix**\n\n- Heat (1995)\n* Cars 2\n3: toy story\n'
    assert TitleMatcher(MOVIES).match_lines(answer) == ([0, 1, 2], ["Cars 2"])


def test_normal_form_is_stable():
    for title in MOVIES:
        assert normalise_title(normalise_title(title)) == normalise_title(title)


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        new = [i]
        for j, y in enumerate(b, start=1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def test_banded_distances_equal_the_whole_table():
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("abc"), rng.integers(1, 9))) for _ in range(80)]
    table = _CharacterTable(names)
    for query in (*names[:30], "a", "abcabcabcabcabc"):
        for limit in (1, 2, 4):
            expected = [min(levenshtein(query, name), limit + 1) for name in names]
            assert table.edit_distances(query, limit).tolist() == expected


def test_bad_title_matchers():
    for call, message in (
        (lambda: TitleMatcher([]), "at least one title"),
        (lambda: TitleMatcher(["a"], max_edits=-1), "max_edits"),
        (lambda: TitleMatcher(["a"], min_ratio=0.0), "min_ratio"),
    ):
        with pytest.raises(RequestError, match=message):
            call()
