"""Items named by words: tokens of the text and an end token, round trips, hostile titles, typed errors."""

from __future__ import annotations

import numpy as np
import pytest
from hostile_strings import hostile_strings
from text_tokenizers import byte_level_bpe
from transformers import AutoTokenizer

import hf_genrec  # noqa: F401  (registers the class)
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, ItemTableError
from hf_genrec.identifiers.segments import control_token_ids
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
from hf_genrec.identifiers.tokenization_item_words import ITEM_END, ItemWordsTokenizer

TITLES = ["Star", "Star Wars", "Star Trek", "Amélie, 2001 — 七人の侍", "Star Wars"]
IDS = ["m0", "m1", "m2", "m3", "m4"]


@pytest.fixture
def tokenizer():
    return ItemWordsTokenizer.from_texts(train_text_tokenizer(TITLES * 20, 400), IDS, TITLES)


def test_an_item_is_its_text_and_an_end(tokenizer):
    for item, title in zip(IDS, TITLES, strict=True):
        tokens = tokenizer.item_token_ids(item)
        assert tokens[-1] == tokenizer.item_end_token_id and tokenizer.item_end_token_id not in tokens[:-1]
        assert tokenizer.decode(tokens[:-1]) == title
    assert tokenizer.level_offsets.tolist() == [0] * tokenizer.num_levels
    assert set(tokenizer.codebook_sizes) == {len(tokenizer)}
    assert tokenizer.codes_to_items(tokenizer.item_to_codes("m1")) == [["m1", "m4"]]


def test_histories_are_one_text(tokenizer):
    histories = [["m0", "m1", "m3"], ["m2"], []]
    encoded = tokenizer.encode_histories(histories, return_tensors="pt")
    text = tokenizer.decode(encoded["input_ids"][0])
    assert text == ITEM_END.join(["Star", "Star Wars", TITLES[3], ""])
    assert tokenizer.decode_histories(encoded["input_ids"]) == histories
    assert encoded["attention_mask"].sum(-1).tolist()[2] == 0
    assert tokenizer.token_ids_to_items(encoded["input_ids"][0]) == [["m0"], ["m1", "m4"], ["m3"]]


def test_loads_through_auto_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ItemWordsTokenizer and loaded.catalogue_fingerprint == tokenizer.catalogue_fingerprint
    assert np.array_equal(loaded.item_token_table, tokenizer.item_token_table)
    assert loaded.encode("Star Wars") == tokenizer.encode("Star Wars")
    (tmp_path / "item_codes.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"item_codes.safetensors is missing"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_titles_of_another_vocabulary_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    corpus = ["an entirely different set of words, many of them"] * 20
    other = ItemWordsTokenizer.from_texts(train_text_tokenizer(corpus, 330), IDS, TITLES)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "item_codes.safetensors").write_bytes((tmp_path / "other" / "item_codes.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match="does not belong to this catalogue"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_hostile_strings_forge_nothing():
    base = byte_level_bpe(pad="<|endoftext|>")
    plain = ItemWordsTokenizer.from_texts(base, ["x"], ["x"])
    special = [token.content for token in plain.added_tokens_decoder.values()]
    titles = [title for title in hostile_strings(special, 2000, seed=1) if title.strip()]
    titles += [ITEM_END, f"{ITEM_END}{ITEM_END}", f"Star{ITEM_END}Trek", "<|im_start|>system"]
    ids = [f"i{row}" for row in range(len(titles))]
    tokenizer = ItemWordsTokenizer.from_texts(base, ids, titles, max_tokens=200)
    control = control_token_ids(tokenizer)
    assert tokenizer.item_end_token_id in control
    for row, tokens in enumerate(tokenizer.item_token_table):
        real = tokens[tokens >= 0].tolist()
        assert not control & set(real[:-1]), titles[row]
        assert tokenizer.decode(real[:-1]) == titles[row] or len(real) == 200


def test_long_titles_are_cut_before_their_end_token(tokenizer):
    short = ItemWordsTokenizer.from_texts(train_text_tokenizer(TITLES, 300), ["a"], ["word " * 100], max_tokens=8)
    assert len(short.item_token_ids("a")) == 8 and short.item_token_ids("a")[-1] == short.item_end_token_id


def test_typed_errors(tokenizer):
    base = train_text_tokenizer(TITLES, 300)
    with pytest.raises(ItemTableError, match="item 'b': '' gives no token"):
        ItemWordsTokenizer.from_texts(base, ["a", "b"], ["x", ""])
    with pytest.raises(ItemTableError, match="1 texts for 2 items"):
        ItemWordsTokenizer.from_texts(base, ["a", "b"], ["x"])
    with pytest.raises(ItemTableError, match=r"item 'a'.*lone surrogate"):
        ItemWordsTokenizer.from_texts(base, ["a"], ["\ud800"])
    with pytest.raises(IncompatibleComponentsError, match="carries a catalogue"):
        ItemWordsTokenizer.from_texts(tokenizer, ["a"], ["x"])
    with pytest.raises(IncompatibleComponentsError, match="max_tokens is 1"):
        ItemWordsTokenizer.from_texts(base, ["a"], ["x"], max_tokens=1)
