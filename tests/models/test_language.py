"""The language recommender: items found in texts, exact item scores, D3's identities, learning a successor catalogue."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.identifiers.tokenization_item_words import ItemWordsTokenizer
from hf_genrec.models.auto import AutoModelForRecommendation
from hf_genrec.models.language.configuration_language import LanguageRecommenderConfig
from hf_genrec.models.language.modeling_language import LanguageRecommenderForCausalLM

WORDS = ["star", "war", "trek", "night", "day", "of", "the", "king", "queen", "x"]
LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
ASSISTANT = {"model_type": "sasrec", "hidden_size": 16, "dropout": 0.0, "initializer_range": 0.4, "embedding_std": 0.6}


@pytest.fixture
def tokenizer():
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(28)] + ["star", "star war"]
    return ItemWordsTokenizer.from_texts(train_text_tokenizer(titles, 300), [f"i{n}" for n in range(30)], titles)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LanguageRecommenderConfig.from_tokenizer(tokenizer, language_model=LANGUAGE, assistant=ASSISTANT)
    model = LanguageRecommenderForCausalLM(config)
    model.set_catalogue(tokenizer.codes)
    return model.eval()


HISTORIES = [["i3", "i28", "i29"], ["i5"], ["i1", "i2", "i28", "i7", "i9"], []]


@pytest.mark.parametrize("side", ["left", "right"])
def test_items_are_found_in_their_texts(side, model, tokenizer):
    tokenizer.padding_side = side
    encoded = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    rows = model.history_rows(encoded["input_ids"], encoded["attention_mask"])
    first = [int(tokenizer._catalogue.item_groups(tokenizer.codes[i : i + 1])[0][0]) for i in range(30)]
    expected = [[first[int(item[1:])] for item in history] for history in HISTORIES]
    assert [[item for item in row if item >= 0] for row in rows.tolist()] == expected
    # an unknown text and an unfinished one name nothing; the items around them are still found
    end = tokenizer.item_end_token_id
    known = tokenizer.item_token_ids("i5")
    ids = torch.tensor([[*known, *known[:-1], *known, *known, known[0]]])
    assert model.history_rows(ids, torch.ones_like(ids)).tolist() == [[first[5], -1, first[5]]]
    long = torch.tensor([[known[0]] * 60 + [end]])
    assert model.history_rows(long, torch.ones_like(long)).tolist() == [[-1]]


def test_scores_are_sums_over_the_words(model, tokenizer):
    """Exact scores of all items against the plain language model, one item at a time."""
    scores = model.score_all(HISTORIES, tokenizer=tokenizer)
    for row, history in enumerate(HISTORIES):
        prompt = [tokenizer.bos_token_id] + [t for item in history for t in tokenizer.item_token_ids(item)]
        for item in range(0, 30, 7):
            words = tokenizer.item_token_ids(f"i{item}")
            with torch.no_grad():
                logits = model.language_model(input_ids=torch.tensor([prompt + words])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(prompt) - 1 + at, word]) for at, word in enumerate(words))
            assert scores[row, item] == pytest.approx(expected, abs=1e-4)


def test_beam_is_exact_with_enough_beams_and_alpha_one_changes_nothing(model, tokenizer):
    options = {"tokenizer": tokenizer, "k": 10, "num_beams": 40, "exclude_seen": False}
    exact = model.score_all(HISTORIES, tokenizer=tokenizer)
    plain = model.recommend(HISTORIES, **options)
    mixed = model.recommend(HISTORIES, decoding="prefix_marginal", decoding_options={"alpha": 1.0}, **options)
    for row, (one, other) in enumerate(zip(plain, mixed, strict=True)):
        assert [entry.item_id for entry in one] == [entry.item_id for entry in other]
        assert [entry.score for entry in one] == pytest.approx(exact[row].topk(10).values.tolist(), abs=1e-4)


def test_alpha_zero_ranks_as_the_assistant(model, tokenizer):
    encoded = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    with torch.no_grad():
        dense = model.score_dense(model.start_decoding(**encoded))
    assert torch.allclose(dense.exp().sum(-1), torch.ones(4))
    found = model.recommend(
        HISTORIES, tokenizer=tokenizer, k=30, num_beams=40, exclude_seen=False, decoding="prefix_marginal",
        decoding_options={"alpha": 0.0},
    )  # fmt: skip
    trie = ItemTrie.from_tokenizer(tokenizer)
    for row, entries in enumerate(found):
        mass = torch.zeros(trie.num_leaves).scatter_add(0, trie.item_leaf_N, dense[row].exp())
        expected = mass.log()[trie.item_leaf_N]  # items of one title cannot be told apart: their sum
        got = {int(entry.item_id[1:]): entry.score for entry in entries}
        assert len(got) == 30
        np.testing.assert_allclose([got[item] for item in range(30)], expected.numpy(), atol=1e-4)


def test_training_loss_and_padding(model, tokenizer):
    from hf_genrec.data.collators import SequenceCollator

    samples = [{"items": np.array([3, 28, 29])}, {"items": np.array([5, 6])}, {"items": np.array([1, 2, 28, 7])}]
    tokenizer.padding_side = "left"
    left = model(**SequenceCollator(tokenizer)(samples)).loss
    tokenizer.padding_side = "right"
    right = model(**SequenceCollator(tokenizer)(samples)).loss
    assert left.item() == pytest.approx(right.item(), abs=1e-5)
    config = LanguageRecommenderConfig.from_tokenizer(tokenizer, language_model=LANGUAGE)
    alone = LanguageRecommenderForCausalLM(config).eval()
    alone.language_model.load_state_dict(model.language_model.state_dict())
    by_hand, count = 0.0, 0
    for sample in samples:
        words = [tokenizer.item_token_ids(f"i{item}") for item in sample["items"]]
        flat = [tokenizer.bos_token_id, *(t for item in words for t in item)]
        with torch.no_grad():
            logits = alone.language_model(input_ids=torch.tensor([flat])).logits[0].log_softmax(-1)
        for at in range(1 + len(words[0]), len(flat)):
            by_hand, count = by_hand - float(logits[at - 1, flat[at]]), count + 1
    batch = SequenceCollator(tokenizer)(samples)
    assert alone(**batch).loss.item() == pytest.approx(by_hand / count, abs=1e-4)
    assert (batch["labels"] != -100).sum() == count
    halves = sum(
        alone(**SequenceCollator(tokenizer)(part), num_items_in_batch=count).loss for part in (samples[:1], samples[1:])
    )
    assert halves.item() == pytest.approx(by_hand / count, abs=1e-4)


def test_round_trip(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForRecommendation.from_pretrained(tmp_path).eval()
    assert type(loaded) is LanguageRecommenderForCausalLM
    assert loaded.recommend(HISTORIES, tokenizer=tokenizer) == model.recommend(HISTORIES, tokenizer=tokenizer)
    assert torch.equal(loaded.item_tokens, model.item_tokens)


def test_typed_errors(model, tokenizer):
    codes = ItemTokenizer.from_codes(["a"], [[0]])
    with pytest.raises(IncompatibleComponentsError, match="does not name items by words"):
        LanguageRecommenderConfig.from_tokenizer(codes)
    with pytest.raises(IncompatibleComponentsError, match=r"language_model.model_type is 'lama'"):
        LanguageRecommenderConfig.from_tokenizer(tokenizer, language_model={"model_type": "lama"})
    with pytest.raises(RequestError, match="alpha must be between 0 and 1"):
        model.recommend([["i1"]], tokenizer=tokenizer, decoding="prefix_marginal", decoding_options={"alpha": 2})
    config = LanguageRecommenderConfig.from_tokenizer(tokenizer, language_model=LANGUAGE)
    with pytest.raises(IncompatibleComponentsError, match="give the model an assistant"):
        LanguageRecommenderForCausalLM(config).recommend([["i1"]], tokenizer=tokenizer, decoding="prefix_marginal")
