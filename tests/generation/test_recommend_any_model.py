"""hf_genrec.recommend on stock models: same items and scores as `generate` with the processor, one prompt per user."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers import LogitsProcessorList

from hf_genrec.errors import IncompatibleComponentsError, RequestError, UnknownItemError
from hf_genrec.generation.decoding.causal_lm import CausalLMScorer
from hf_genrec.generation.decoding.encoder_decoder import EncoderDecoderScorer, decoder_start_token
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor, real_beams
from hf_genrec.generation.recommend import recommend, scorer_for
from hf_genrec.identifiers.extend import encode_segments, extend_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES = (6, 5, 4)
LEVELS = len(SIZES)
HISTORIES = [["item-3"], ["item-5", "item-6", "item-7", "item-1"], ["item-9", "item-0"]]
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
LAYERS = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
}
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3, "initializer_factor": 2.0}
BART = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
    "init_std": 0.4,
}
OPT = {"hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
STOCK = {
    "Llama": LAYERS,
    "Qwen3": {**LAYERS, "head_dim": 8},
    "Mistral": {**LAYERS, "sliding_window": None},
    "GPT2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4},
    "GPTNeoX": {key: value for key, value in LAYERS.items() if key != "num_key_value_heads"},
    "OPT": {**OPT, "max_position_embeddings": 64, "init_std": 0.4},
    "Bloom": {"hidden_size": 24, "n_layer": 2, "n_head": 4, "initializer_range": 0.4},
    "T5": {**T5, "decoder_start_token_id": 0},
    "Bart": {**BART, "decoder_start_token_id": 0},
}
CLASSES = {"T5": "T5ForConditionalGeneration", "Bart": "BartForConditionalGeneration", "GPT2": "GPT2LMHeadModel"}
SHARED = {"Llama", "Qwen3", "Mistral", "GPT2", "GPTNeoX", "OPT"}


def build(name, vocab, **changes):
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(vocab_size=vocab, **SPECIAL, **{**STOCK[name], **changes})
    return getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(120, 40, replace=False), SIZES), axis=1)
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(40)], codes, SIZES)


def by_generate(model, tokenizer, inputs, num_beams, k, **processor_options):
    length = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        num_beams=num_beams,
        num_return_sequences=k,
        max_new_tokens=LEVELS,
        length_penalty=0.0,
        do_sample=False,
        early_stopping=False,
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=LogitsProcessorList([ItemTrieLogitsProcessor(tokenizer, length, **processor_options)]),
    )
    batch = len(inputs["input_ids"])
    real = real_beams(output.sequences_scores).view(batch, k)
    scores = output.sequences_scores.view(batch, k)
    answers = output.sequences[:, length : length + LEVELS].reshape(batch, k, LEVELS)
    return [
        ([item[0] for item in tokenizer.token_ids_to_items(row[mask].flatten().tolist())], values[mask].tolist())
        for row, values, mask in zip(answers, scores, real)
    ]


def assert_same(result, expected):
    for row, (items, scores) in zip(result, expected, strict=True):
        assert [entry.item_id for entry in row] == items
        np.testing.assert_allclose([entry.score for entry in row], scores, atol=1e-4)


@pytest.mark.parametrize("name", list(STOCK))
@pytest.mark.parametrize(("num_beams", "k"), [(40, 40), (7, 5)])
def test_same_items_and_scores_as_generate(name, num_beams, k, tokenizer):
    model = build(name, len(tokenizer) + 7)
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    if (
        name == "Bart"
    ):  # an encoder of absolute positions: generate does not move the padding to the end, recommend does
        order = inputs["attention_mask"].sort(dim=-1, descending=True, stable=True).indices
        inputs = {key: value.gather(1, order) for key, value in inputs.items()}
    expected = by_generate(model, tokenizer, inputs, num_beams, k)
    assert len({tuple(items) for items, _ in expected}) == 3  # the histories matter
    result = recommend(model, HISTORIES, tokenizer=tokenizer, k=k, num_beams=num_beams, exclude_seen=False)
    assert_same(result, expected)
    if name not in CLASSES or name == "GPT2":
        assert scorer_for(model, tokenizer).shares_prompt(16) == (name in SHARED)


@pytest.mark.parametrize("name", ["Llama", "T5", "GPT2"])
def test_seen_and_allowed_items_as_generate(name, tokenizer):
    model = build(name, len(tokenizer))
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    allowed = [["item-3", "item-4"], [f"item-{i}" for i in range(9)], [f"item-{i}" for i in range(40)]]
    expected = by_generate(model, tokenizer, inputs, 40, 40, allowed_items=allowed, excluded_items=HISTORIES)
    result = recommend(model, HISTORIES, tokenizer=tokenizer, k=40, num_beams=40, allowed_items=allowed)
    assert [len(row) for row in result] == [1, 5, 38]
    assert_same(result, expected)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bloom", "T5"])
def test_alone_as_in_a_batch_and_padding_side(name, tokenizer):
    model = build(name, len(tokenizer))
    together = recommend(model, HISTORIES, tokenizer=tokenizer, k=12)
    for batch_size in (1, 2):
        other = recommend(model, HISTORIES, tokenizer=tokenizer, k=12, batch_size=batch_size)
        assert_same(other, [([e.item_id for e in row], [e.score for e in row]) for row in together])
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    if name != "T5":  # relative positions of an encoder see no difference, but its padding is not moved by us
        order = inputs["attention_mask"].sort(dim=-1, descending=True, stable=True).indices
        right = {key: value.gather(1, order) for key, value in inputs.items()}
        assert right["attention_mask"][0, -1] == 0
        other = recommend(model, **right, tokenizer=tokenizer, k=12)
        assert_same(other, [([e.item_id for e in row], [e.score for e in row]) for row in together])


def test_prompt_is_run_once_and_its_keys_are_never_repeated(tokenizer):
    model = build("Llama", len(tokenizer))
    scorer_for(model, tokenizer).start_decoding(torch.ones(1, 2, dtype=torch.long), None)  # the head is tried out
    calls = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (tuple(kwargs["input_ids"].shape), kwargs["past_key_values"].get_seq_length())
        ),
        with_kwargs=True,
    )
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    recommend(model, **inputs, tokenizer=tokenizer, k=8, num_beams=8)
    length = inputs["input_ids"].shape[1]
    assert calls[:2] == [((3, length - 1), 0), ((3, 1), length - 1)]  # the prompts, once
    beams = [shape[1] for shape, _ in calls[2:]]
    assert len(beams) == LEVELS - 1 and max(beams) <= 8  # one new token per beam and level
    assert [shape[0] for shape, _ in calls] == [3] * len(calls)  # never B * K rows
    assert [past for _, past in calls[2:]] == [length + sum(beams[:level]) for level in range(LEVELS - 1)]


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_shared_and_repeated_prompts_agree(name, tokenizer, monkeypatch):
    model = build(name, len(tokenizer))
    shared = recommend(model, HISTORIES, tokenizer=tokenizer, k=30)
    monkeypatch.setattr(CausalLMScorer, "shares_prompt", lambda self, length: False)
    repeated = recommend(model, HISTORIES, tokenizer=tokenizer, k=30)
    assert_same(repeated, [([e.item_id for e in row], [e.score for e in row]) for row in shared])


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_runs_once_and_cross_keys_are_never_recomputed(name, tokenizer, monkeypatch):
    model = build(name, len(tokenizer))
    runs = {"encoder": 0, "cross": []}
    count = lambda *_: runs.__setitem__("encoder", runs["encoder"] + 1)
    model.get_encoder().register_forward_hook(count)
    block = model.get_decoder()
    cross = block.block[0].layer[1].EncDecAttention.k if name == "T5" else block.layers[0].encoder_attn.k_proj
    cross.register_forward_hook(lambda module, args, output: runs["cross"].append(args[0].shape[0]))
    cached = recommend(model, HISTORIES, tokenizer=tokenizer, k=30)
    assert runs == {"encoder": 1, "cross": [3]}
    plain = EncoderDecoderScorer.__init__

    def without_cache(self, *args, **options):
        plain(self, *args, **options)
        self._takes_cache = False

    monkeypatch.setattr(EncoderDecoderScorer, "__init__", without_cache)
    uncached = recommend(model, HISTORIES, tokenizer=tokenizer, k=30)
    assert_same(uncached, [([e.item_id for e in row], [e.score for e in row]) for row in cached])


@pytest.mark.parametrize("kind", ["many beams", "short calls"])
def test_beams_are_split_without_a_trace(kind, tokenizer, monkeypatch):
    from hf_genrec.generation.decoding import causal_lm, encoder_decoder

    for name in ("Llama", "T5", "Bloom"):
        model = build(name, len(tokenizer))
        whole = recommend(model, HISTORIES, tokenizer=tokenizer, k=30)
        with monkeypatch.context() as patch:
            patch.setattr(causal_lm, "_BEAMS_PER_CALL", 3 if kind == "short calls" else 29)
            patch.setattr(causal_lm, "_ROWS_PER_CALL", 7)
            patch.setattr(encoder_decoder, "_ROWS_PER_CALL", 7)
            parts = recommend(model, HISTORIES, tokenizer=tokenizer, k=30)
        assert_same(parts, [([e.item_id for e in row], [e.score for e in row]) for row in whole])


def test_window_shorter_than_the_prompt_takes_the_full_path(tokenizer):
    model = build("Mistral", len(tokenizer), sliding_window=8)
    scorer = CausalLMScorer(model, tokenizer.level_offsets, SIZES)
    assert scorer.shares_prompt(5) and not scorer.shares_prompt(6)
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 8
    expected = by_generate(model, tokenizer, inputs, 40, 40)
    assert_same(recommend(model, HISTORIES, tokenizer=tokenizer, k=40, num_beams=40, exclude_seen=False), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bf16_and_eager(implementation, tokenizer):
    model = build("Llama", len(tokenizer))
    model.set_attn_implementation(implementation)
    exact = recommend(model, HISTORIES, tokenizer=tokenizer, k=10, exclude_seen=False)
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    assert_same(exact, by_generate(model, tokenizer, inputs, 40, 10))
    half = recommend(model.bfloat16(), HISTORIES, tokenizer=tokenizer, k=10, exclude_seen=False)
    for one, two in zip(exact, half):
        assert len({e.item_id for e in one} & {e.item_id for e in two}) >= 7  # bf16 may swap neighbours
        assert abs(one[0].score - two[0].score) < 0.3


def test_prompts_name_what_was_seen(tokenizer):
    model = build("Llama", len(tokenizer))
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    from_ids = recommend(model, **inputs, tokenizer=tokenizer, k=40)
    from_histories = recommend(model, HISTORIES, tokenizer=tokenizer, k=40)
    assert from_ids == from_histories
    assert [len(row) for row in from_ids] == [39, 36, 38]
    other = recommend(model, histories=[["item-30"]] * 3, **inputs, tokenizer=tokenizer, k=40)
    assert all(len(row) == 39 and "item-30" not in {e.item_id for e in row} for row in other)
    lists = {name: value.tolist() for name, value in inputs.items()}
    as_lists = recommend(model, **lists, tokenizer=tokenizer, k=40)
    assert as_lists == from_ids


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_prompts_of_text_and_items(name, tokenizer):
    """An extended text tokenizer: words and items in one prompt, seen items found among the words."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "bought", ":", "next"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    base = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    extended = extend_tokenizer(base, tokenizer)
    model = build(name, len(extended) + 3)
    rows = [
        encode_segments(extended, [("template", "<s> bought : "), ("items", history), ("template", " next :")])
        for history in HISTORIES
    ]
    inputs = extended.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    result = recommend(model, **inputs, tokenizer=extended, k=40, num_beams=40)
    assert [len(row) for row in result] == [39, 36, 38]
    expected = by_generate(model, extended, inputs, 40, 40, excluded_items=HISTORIES)
    assert_same(result, expected)


def test_training_mode_is_restored(tokenizer):
    model = build("T5", len(tokenizer)).train()
    first = recommend(model, HISTORIES, tokenizer=tokenizer)
    assert model.training and model.encoder.dropout.training
    assert recommend(model, HISTORIES, tokenizer=tokenizer) == first


def test_bad_requests_are_named(tokenizer):
    model = build("Llama", len(tokenizer))
    call = lambda **options: recommend(model, **{"histories": HISTORIES, "tokenizer": tokenizer, **options})
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    ids = torch.ones(2, 3, dtype=torch.long)
    half_empty = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
    for error, words, options in [
        (RequestError, "k must", {"k": 0}),
        (RequestError, "num_beams must", {"num_beams": 0}),
        (RequestError, "histories or input_ids", {"histories": None}),
        (RequestError, "1 histories for 3 prompts", {"histories": [["item-1"]], **inputs}),
        (RequestError, "row 0: all 1 allowed", {"allowed_items": ["item-3"]}),
        (UnknownItemError, "nope", {"allowed_items": ["nope"]}),
        (IncompatibleComponentsError, "carries no item catalogue", {"tokenizer": object()}),
        (RequestError, "row 1: the prompt is empty", {"histories": None, **half_empty}),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            call(**options)
    with pytest.raises(IncompatibleComponentsError, match="resize_token_embeddings"):
        recommend(build("Llama", len(tokenizer) - 1), HISTORIES, tokenizer=tokenizer)
    model.config.catalogue_fingerprint = "f" * 64
    with pytest.raises(IncompatibleComponentsError, match="ffffffffffff"):
        call()


def test_decoder_start_token(tokenizer):
    model = build("T5", len(tokenizer))
    assert decoder_start_token(model) == 0
    model.generation_config.decoder_start_token_id = 5
    assert EncoderDecoderScorer(model, tokenizer.level_offsets, SIZES).start_token == 5
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    model.config.decoder_start_token_id = model.config.bos_token_id = None
    with pytest.raises(IncompatibleComponentsError, match="decoder start token"):
        decoder_start_token(model)
