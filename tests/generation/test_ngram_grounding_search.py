"""TransRec's search: pieces from anywhere in any facet's texts, all of them real, grounded to items."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import RequestError
from hf_genrec.generation.decoding.ngram_grounding import generate_pieces
from hf_genrec.identifiers.segments import encode_segments
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
from hf_genrec.identifiers.tokenization_item_words import ItemWordsTokenizer
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
IDS = [f"i{number}" for number in range(12)]
BIASES = {"name": 7.0, "id": 7.0, "kind": 7.0}
HISTORIES = [["i3", "i8"], ["i5"], ["i1", "i2", "i11", "i7"]]


@pytest.fixture(scope="module")
def setting():
    rng = np.random.default_rng(0)
    titles = [" ".join([WORDS[item % 10], *rng.choice(WORDS, 1 + item // 5)]) for item in range(12)]
    assert len(set(titles)) == 12
    tokenizer = ItemWordsTokenizer.from_texts(train_text_tokenizer(titles, 280), IDS, titles)
    genres = [str(rng.choice(["drama", "comedy", "drama comedy"])) for _ in IDS]
    rows = [
        [[*encode_segments(tokenizer, [("text", text)]), tokenizer.item_end_token_id] for text in texts]
        for texts in (IDS, genres)
    ]
    width = max(len(row) for facet in rows for row in facet)
    tokens = np.full((2, 12, width), -1)
    for facet, texts in enumerate(rows):
        for item, row in enumerate(texts):
            tokens[facet, item, : len(row)] = row
    markers = [encode_segments(tokenizer, [("text", name)]) for name in ("id: ", "kind: ")]
    size = max(map(len, markers))
    markers = np.array([row + [-1] * (size - len(row)) for row in markers])
    torch.manual_seed(0)
    config = LanguageRecommenderConfig.from_tokenizer(
        tokenizer, language_model=LANGUAGE, facets=["id", "kind"], facet_levels=width, marker_levels=size
    )
    model = LanguageRecommenderForCausalLM(config)
    model.set_catalogue(tokenizer.codes)
    model.set_facets(tokens, markers)
    return model.eval(), tokenizer, tokens, markers


def find(setting, histories=HISTORIES, **options):
    model, tokenizer = setting[:2]
    options = {"k": 12, "num_beams": 12, "exclude_seen": False, "max_tokens": 4} | options
    options.setdefault("biases", BIASES)  # a random model finds no text likelier than the corpus does
    own = {name: options.pop(name) for name in ("max_tokens", "facet_weights", "biases", "gamma") if name in options}
    return model.recommend(histories, tokenizer=tokenizer, decoding="ngram_grounding", decoding_options=own, **options)


def test_with_enough_beams_all_substrings_come_with_their_probability(setting):
    model, tokenizer, tokens, markers = setting
    state = model.start_decoding(**tokenizer.encode_histories(HISTORIES, return_tensors="pt"))
    for facet, table in (("name", tokenizer.codes), ("id", tokens[0]), ("kind", tokens[1])):
        texts = [[t for t in row.tolist() if t >= 0 and t != tokenizer.item_end_token_id] for row in table]
        expected = {
            tuple(text[at : at + size]) for text in texts for size in (1, 2, 3) for at in range(len(text) - size + 1)
        }
        with torch.no_grad():
            scorer, prompt = model.start_facet(state, facet, 3)
            found = generate_pieces(scorer, prompt, model.facet_index(facet), 5000, 3, batch_size=3)
        for row, history in enumerate(HISTORIES):
            pieces = dict(found[row])
            assert set(pieces) == expected, facet
            words = [] if facet == "name" else [t for t in markers[0 if facet == "id" else 1].tolist() if t >= 0]
            for item in history:
                words += [t for t in table[int(item[1:])].tolist() if t >= 0]
            words = [tokenizer.bos_token_id, *words]
            for piece in list(expected)[:5]:
                with torch.no_grad():
                    logits = model.language_model(input_ids=torch.tensor([words + list(piece)])).logits[0]
                logp = logits.log_softmax(-1)
                by_hand = sum(float(logp[len(words) - 1 + at, token]) for at, token in enumerate(piece))
                assert pieces[piece] == pytest.approx(by_hand, abs=1e-4)


def test_one_facet_alone_is_the_others_at_weight_zero(setting):
    model, tokenizer = setting[:2]
    only = find(setting, facet_weights={"name": 0.0, "id": 0.0})
    state = model.start_decoding(**tokenizer.encode_histories(HISTORIES, return_tensors="pt"))
    with torch.no_grad():
        scorer, prompt = model.start_facet(state, "kind", 4)
        pieces = generate_pieces(scorer, prompt, model.facet_index("kind"), 12, 4, batch_size=3)
    from hf_genrec.generation.ngram_grounding import Ngram, NgramGrounder

    grounder = NgramGrounder({"kind": model.facet_index("kind")}, 12, biases={"kind": 7.0})
    items, scores = grounder.ground([[Ngram("kind", *piece) for piece in row] for row in pieces], 12)
    for row, entries in enumerate(only):
        assert [entry.item_id for entry in entries] == [IDS[item] for item in items[row].tolist() if item >= 0]
        assert [entry.score for entry in entries] == pytest.approx(scores[row][items[row] >= 0].tolist(), rel=1e-4)
    both = find(setting)
    assert [entry.score for entry in both[0]] != [entry.score for entry in only[0]]


def test_batch_filter_and_allowed(setting):
    batch = find(setting)
    assert all(len(row) >= 3 for row in batch)
    for row, history in enumerate(HISTORIES):
        alone = find(setting, [history])[0]
        assert [entry.item_id for entry in alone] == [entry.item_id for entry in batch[row]]
        assert [entry.score for entry in alone] == pytest.approx([entry.score for entry in batch[row]], rel=1e-3)
    allowed = find(setting, allowed_items=["i0", "i4", "i9"])
    assert all({entry.item_id for entry in row} <= {"i0", "i4", "i9"} and len(row) == len(set(row)) for row in allowed)
    unseen = find(setting, exclude_seen=True)
    assert all(not {entry.item_id for entry in row} & set(history) for row, history in zip(unseen, HISTORIES))


def test_training_uses_every_facet(setting):
    from hf_genrec.data.collators import SequenceCollator

    model, tokenizer, tokens, markers = setting
    samples = [{"items": np.array([3, 8, 5])}, {"items": np.array([5, 6])}]
    batch = SequenceCollator(tokenizer)(samples)
    with torch.no_grad():
        loss = model(**batch).loss.item()
        rows = model.history_rows(batch["input_ids"], batch["attention_mask"])
        parts = [float(model._facet_loss(facet, rows)) for facet in range(2)]
    expected = []
    for facet in range(2):
        total, count = 0.0, 0
        for sample in samples:
            words = [tokenizer.bos_token_id, *(t for t in markers[facet].tolist() if t >= 0)]
            texts = [[t for t in tokens[facet, item].tolist() if t >= 0] for item in sample["items"]]
            first = len(words) + len(texts[0])
            words += [t for text in texts for t in text]
            with torch.no_grad():
                logp = model.language_model(input_ids=torch.tensor([words])).logits[0].log_softmax(-1)
            for at in range(first, len(words)):
                total, count = total - float(logp[at - 1, words[at]]), count + 1
        expected.append(total / count)
    assert parts == pytest.approx(expected, abs=1e-4)
    names = model.config.facets
    try:
        model.config.facets = []
        with torch.no_grad():
            alone = model(**batch).loss.item()
    finally:
        model.config.facets = names
    assert loss == pytest.approx(alone + sum(expected), abs=1e-4)


def test_typed_errors(setting):
    with pytest.raises(RequestError, match="facet_weights names 'title'; facets are name, id, kind"):
        find(setting, facet_weights={"title": 1.0})
    with pytest.raises(RequestError, match="switches every facet off"):
        find(setting, facet_weights={"name": 0, "id": 0, "kind": 0})
    with pytest.raises(RequestError, match="max_tokens must be a whole number"):
        find(setting, max_tokens=0)
