"""Three ways to the same items: recommend, generate with custom_generate, generate with the logits processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from test_recommend_any_model import CLASSES, HISTORIES, SIZES, STOCK

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.custom_generate import ItemGeneration
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.logits_process_levels import PerLevelLogitsProcessor
from hf_genrec.generation.recommend import recommend
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

LEVELS = len(SIZES)


@pytest.fixture
def tokenizer(random_codes):
    codes = random_codes(40, SIZES, seed=5, unique=True)
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(40)], codes, codebook_sizes=SIZES)


def make(kind, tokenizer):
    torch.manual_seed(1)
    if kind == "Tiger":
        sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3}
        config = TigerConfig.from_tokenizer(tokenizer, initializer_factor=2.0, **sizes)
        return TigerForConditionalGeneration(config).eval()
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    config_class = getattr(transformers, f"{kind}Config")
    config = config_class(**{"vocab_size": len(tokenizer), **special, **STOCK[kind]})
    return getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "GPT2", "T5", "Bart", "Tiger"])
def test_three_ways_give_the_same(kind, tokenizer):
    model = make(kind, tokenizer)
    if kind == "Bart":  # counts positions from the left edge; `recommend` shifts padding to the right for it
        tokenizer.padding_side = "right"
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    prompt = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    options = {
        "num_beams": 12,
        "num_return_sequences": 12,
        "length_penalty": 0.0,
        "max_new_tokens": LEVELS,
        "return_dict_in_generate": True,
        "output_scores": False,
    }
    ours = model.generate(**inputs, custom_generate=ItemGeneration(tokenizer), **options)
    processor = ItemTrieLogitsProcessor(tokenizer, prompt_length=prompt)
    slow = model.generate(**inputs, logits_processor=[processor], **options)
    assert torch.equal(ours.sequences[:, prompt : prompt + LEVELS], slow.sequences[:, prompt : prompt + LEVELS])
    slow_scores = slow.sequences_scores
    if slow_scores is None:  # beam scores come only with output_scores in some versions
        slow_scores = model.generate(
            **inputs, logits_processor=[processor], **(options | {"output_scores": True})
        ).sequences_scores
    torch.testing.assert_close(ours.sequences_scores, slow_scores, atol=1e-4, rtol=0)
    items = recommend(model, HISTORIES, tokenizer=tokenizer, k=12, num_beams=12, exclude_seen=False)
    for row, entries in enumerate(items):
        sequences = ours.sequences[row * 12 : row * 12 + 12, prompt : prompt + LEVELS].tolist()
        assert [tokenizer.item_token_ids(entry.item_id) for entry in entries] == sequences
        expected = ours.sequences_scores[row * 12 : row * 12 + 12].tolist()
        assert [entry.score for entry in entries] == pytest.approx(expected, abs=1e-4)


def test_length_penalty_and_plain_tensor_output(tokenizer):
    model = make("Llama", tokenizer)
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    options = {"num_beams": 6, "num_return_sequences": 3, "max_new_tokens": LEVELS}
    plain = model.generate(**inputs, custom_generate=ItemGeneration(tokenizer), **options)
    full = model.generate(**inputs, custom_generate=ItemGeneration(tokenizer), return_dict_in_generate=True, **options)
    summed = model.generate(
        **inputs,
        custom_generate=ItemGeneration(tokenizer),
        return_dict_in_generate=True,
        length_penalty=0.0,
        **options,
    )
    assert isinstance(plain, torch.Tensor) and torch.equal(plain, full.sequences)
    torch.testing.assert_close(full.sequences_scores * LEVELS, summed.sequences_scores)  # the default divides by length
    assert plain.shape == (9, inputs["input_ids"].shape[1] + LEVELS)
    assert torch.equal(plain[0, : inputs["input_ids"].shape[1]], inputs["input_ids"][0])


def test_item_lists_and_rows_without_items(tokenizer):
    model = make("Llama", tokenizer)
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    allowed = [["item-1", "item-2"], ["item-3"], ["item-4", "item-5", "item-6"]]
    generate = ItemGeneration(tokenizer, allowed_items=allowed, excluded_items=[["item-2"], [], []])
    result = model.generate(
        **inputs, custom_generate=generate, num_beams=4, num_return_sequences=4, return_dict_in_generate=True,
        max_new_tokens=LEVELS,
    )  # fmt: skip
    answers = result.sequences[:, inputs["input_ids"].shape[1] :].view(3, 4, LEVELS)
    found = [[tokenizer.token_ids_to_items(row) for row in user] for user in answers]
    assert [len([1 for row in user if row]) for user in found] == [1, 1, 3]
    assert found[0][0] == [["item-1"]] and found[1][0] == [["item-3"]]
    assert {row[0][0] for row in found[2] if row} == {"item-4", "item-5", "item-6"}
    scores = result.sequences_scores.view(3, 4)
    assert torch.equal(scores == -torch.inf, (answers == 0).all(-1))


def test_sampling_draws_distinct_items(tokenizer):
    model = make("Llama", tokenizer)
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    options = {"do_sample": True, "num_return_sequences": 8, "max_new_tokens": LEVELS}
    torch.manual_seed(3)
    first = model.generate(**inputs, custom_generate=ItemGeneration(tokenizer), **options)
    second = model.generate(**inputs, custom_generate=ItemGeneration(tokenizer), **options)
    torch.manual_seed(3)
    again = model.generate(**inputs, custom_generate=ItemGeneration(tokenizer), **options)
    assert torch.equal(first, again) and not torch.equal(first, second)
    answers = first[:, inputs["input_ids"].shape[1] :].view(3, 8, LEVELS)
    for user in answers:
        items = [tokenizer.token_ids_to_items(row)[0][0] for row in user]
        assert len(set(items)) == 8


def test_typed_errors(tokenizer):
    model = make("Llama", tokenizer)
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    with pytest.raises(RequestError, match="row 1: the item lists leave nothing"):
        lists = [[], [f"item-{i}" for i in range(40)], []]
        model.generate(**inputs, custom_generate=ItemGeneration(tokenizer, excluded_items=lists), max_new_tokens=LEVELS)
    with pytest.raises(RequestError, match="allowed_items is empty"):
        ItemGeneration(tokenizer, allowed_items=[[]])
    with pytest.raises(IncompatibleComponentsError, match="2 lists for 3 prompts"):
        model.generate(
            **inputs,
            custom_generate=ItemGeneration(tokenizer, allowed_items=[["item-1"], ["item-2"]]),
            max_new_tokens=LEVELS,
        )
    other = ItemTokenizer.from_codes(["x", "y"], np.array([[0, 0, 0], [1, 1, 1]]), codebook_sizes=SIZES)
    tiger = make("Tiger", tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="the model was made for catalogue"):
        tiger.generate(**inputs, custom_generate=ItemGeneration(other), max_new_tokens=LEVELS)


@pytest.mark.parametrize("kind", ["Llama", "T5", "Bart"])
def test_restricted_to_the_level_is_generate_with_per_level_renormalisation(kind, tokenizer):
    model = make(kind, tokenizer)
    if kind == "Bart":
        tokenizer.padding_side = "right"
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    prompt = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    processors = [
        PerLevelLogitsProcessor(tokenizer, prompt_length=prompt, renormalize=True),
        ItemTrieLogitsProcessor(tokenizer, prompt_length=prompt),
    ]
    slow = model.generate(
        **inputs,
        logits_processor=processors,
        num_beams=8,
        num_return_sequences=8,
        length_penalty=0.0,
        max_new_tokens=LEVELS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = recommend(
        model, HISTORIES, tokenizer=tokenizer, k=8, num_beams=8, exclude_seen=False, restrict_to_level=True
    )
    for row, entries in enumerate(found):
        part = slice(row * 8, row * 8 + 8)
        answers = slow.sequences[part, prompt : prompt + LEVELS].tolist()
        assert [tokenizer.item_token_ids(entry.item_id) for entry in entries] == answers
        expected = slow.sequences_scores[part].tolist()
        assert [entry.score for entry in entries] == pytest.approx(expected, abs=1e-4)
