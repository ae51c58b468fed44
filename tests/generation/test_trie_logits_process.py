"""ItemTrieLogitsProcessor inside plain `generate` (stock T5, Llama, GPT-2) and on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_genrec.errors import IncompatibleComponentsError, RequestError, UnknownItemError
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor, real_beams
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES = (6, 5, 4)
LEVELS = len(SIZES)


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(120, 40, replace=False), SIZES), axis=1)
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(40)], codes, SIZES)


@pytest.fixture(scope="module")
def models(tokenizer):
    torch.manual_seed(0)
    vocab = len(tokenizer) + 7  # a vocabulary with more than item tokens
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    t5 = T5Config(
        vocab_size=vocab, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, decoder_start_token_id=0,
        initializer_factor=4.0, **special,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=vocab, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, **special,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=vocab, n_embd=24, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4, **special
    )
    return {
        "t5": T5ForConditionalGeneration(t5).eval(),
        "llama": LlamaForCausalLM(llama).eval(),
        "gpt2": GPT2LMHeadModel(gpt2).eval(),
    }


HISTORIES = [["item-3"], ["item-5", "item-6", "item-7"], ["item-9", "item-0"]]


def generate(model, inputs, processor, **options):
    options = {"max_new_tokens": LEVELS, "length_penalty": 0.0, "do_sample": False, **options}
    return model.generate(
        **inputs,
        logits_processor=LogitsProcessorList([processor]),
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def prompt_length(model, inputs):
    return 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize("new_tokens", [LEVELS, LEVELS + 4])
def test_every_sequence_is_a_catalogue_item(kind, new_tokens, models, tokenizer):
    model, inputs = models[kind], tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    length = prompt_length(model, inputs)
    processor = ItemTrieLogitsProcessor(tokenizer, length)
    output = generate(model, inputs, processor, num_beams=40, num_return_sequences=40, max_new_tokens=new_tokens)
    answers = output.sequences[:, length:].view(3, 40, -1)
    assert real_beams(output.sequences_scores).all()
    for row in answers:
        items = tokenizer.token_ids_to_items(row[:, :LEVELS].flatten().tolist())
        assert len({tuple(item) for item in items}) == 40 and all(len(item) == 1 for item in items)
        assert row.shape[1] == LEVELS + (new_tokens > LEVELS)
        assert (row[:, LEVELS:] == tokenizer.eos_token_id).all()


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_forced_end_costs_nothing(kind, models, tokenizer):
    model, inputs = models[kind], tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    processor = ItemTrieLogitsProcessor(tokenizer, prompt_length(model, inputs))
    short = generate(model, inputs, processor, num_beams=10, num_return_sequences=10)
    long = generate(model, inputs, processor, num_beams=10, num_return_sequences=10, max_new_tokens=LEVELS + 3)
    torch.testing.assert_close(short.sequences_scores, long.sequences_scores)
    assert torch.equal(short.sequences[:, -LEVELS:], long.sequences[:, -LEVELS - 1 : -1])


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_short_catalogue_leaves_a_tail_of_duplicates(kind, models, tokenizer):
    """transformers fills the beam; `real_beams` tells the filling from the items."""
    model, inputs = models[kind], tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    length = prompt_length(model, inputs)
    allowed = [["item-1", "item-2"], ["item-4"], [f"item-{i}" for i in range(10, 17)]]
    processor = ItemTrieLogitsProcessor(tokenizer, length, allowed_items=allowed)
    for penalty in (0.0, 1.0):
        output = generate(model, inputs, processor, num_beams=8, num_return_sequences=8, length_penalty=penalty)
        real = real_beams(output.sequences_scores).view(3, 8)
        assert real.sum(-1).tolist() == [2, 1, 7]
        answers = output.sequences[:, length:].view(3, 8, -1)
        for row, mask, names in zip(answers, real, allowed):
            assert sorted(item[0] for item in tokenizer.token_ids_to_items(row[mask].flatten().tolist())) == sorted(
                names
            )


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_seen_items_per_row(kind, models, tokenizer):
    model, inputs = models[kind], tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    length = prompt_length(model, inputs)
    free = generate(model, inputs, ItemTrieLogitsProcessor(tokenizer, length), num_beams=40, num_return_sequences=40)
    ranking = [
        tokenizer.token_ids_to_items(row.flatten().tolist()) for row in free.sequences[:, length:].view(3, 40, -1)
    ]
    seen = [[item[0] for item in row[:3]] for row in ranking]  # forbid each row's own best three
    processor = ItemTrieLogitsProcessor(tokenizer, length, excluded_items=seen)
    output = generate(model, inputs, processor, num_beams=40, num_return_sequences=37)
    for row, full in zip(output.sequences[:, length:].view(3, 37, -1), ranking):
        assert tokenizer.token_ids_to_items(row.flatten().tolist()) == full[3:]


@pytest.mark.parametrize("kind", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 4])
def test_several_distinct_items_in_one_answer(kind, beams, models, tokenizer):
    model, inputs = models[kind], tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    length = prompt_length(model, inputs)
    allowed = [f"item-{i}" for i in range(0, 40, 8)]  # five items
    for asked, got in ((3, 3), (5, 5), (9, 5)):
        processor = ItemTrieLogitsProcessor(tokenizer, length, num_items=asked, allowed_items=[allowed] * 3)
        output = generate(
            model, inputs, processor, num_beams=beams, num_return_sequences=beams, max_new_tokens=9 * LEVELS + 1
        )
        for answer in output.sequences[:, length:].tolist():
            end = answer.index(tokenizer.eos_token_id)
            items = [item[0] for item in tokenizer.token_ids_to_items(answer[:end])]
            assert end == got * LEVELS and len(set(items)) == got and set(items) <= set(allowed)


def test_sampling_stays_inside_too(models, tokenizer):
    inputs = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    output = generate(
        models["llama"], inputs, ItemTrieLogitsProcessor(tokenizer, length), do_sample=True, num_return_sequences=20
    )
    assert all(len(row) == 1 for row in tokenizer.token_ids_to_items(output.sequences[:, length:].flatten().tolist()))


@pytest.mark.parametrize("renormalize", [False, True])
def test_scores_against_a_set_of_prefixes(renormalize, tokenizer):
    """Every row of a mixed batch, every step, against Python sets: same legal tokens, same values."""
    rng = np.random.default_rng(5)
    table = tokenizer.item_token_table
    legal = {tuple(row[:n]) for row in table.tolist() for n in range(LEVELS + 1)}
    vocab = len(tokenizer)
    for step in range(LEVELS + 3):
        rows = [[9, 9, *table[i].tolist(), 1, 0, 0][: 2 + step] for i in range(0, 40, 3)]
        rows += [[9, 9, *rng.integers(0, vocab, step).tolist()] for _ in range(30)]  # mostly invalid prefixes
        ids = torch.tensor(rows)
        scores = torch.randn(len(rows), vocab).log_softmax(-1)
        processor = ItemTrieLogitsProcessor(tokenizer, 2, renormalize=renormalize)
        before = scores.clone()
        masked = processor(ids, scores)
        assert torch.equal(scores, before) and torch.equal(processor(ids, scores), masked)
        for row, values, original in zip(rows, masked, scores):
            prefix = tuple(row[2 : 2 + LEVELS])
            options = [t for t in range(vocab) if (*prefix, t) in legal] if prefix in legal else []
            allowed = torch.isfinite(values).nonzero().flatten().tolist()
            if not options:
                assert allowed == [tokenizer.eos_token_id]
                whole = prefix in legal and len(prefix) == LEVELS
                assert values[1] == (0.0 if whole else original[1])
            else:
                assert allowed == options
                expected = original[options] - (original[options].logsumexp(0) if renormalize else 0)
                torch.testing.assert_close(values[options], expected)


def test_rows_of_a_request_share_its_lists(tokenizer):
    processor = ItemTrieLogitsProcessor(tokenizer, 1, allowed_items=[["item-1"], ["item-2"]])
    masked = processor(torch.zeros(6, 1, dtype=torch.long), torch.zeros(6, len(tokenizer)))
    first = [tokenizer.item_token_ids(item)[0] for item in ["item-1"] * 3 + ["item-2"] * 3]
    assert [torch.isfinite(row).nonzero().flatten().tolist() for row in masked] == [[token] for token in first]
    with pytest.raises(IncompatibleComponentsError, match="5 rows for item lists of 2 requests"):
        processor(torch.zeros(5, 1, dtype=torch.long), torch.zeros(5, len(tokenizer)))


def test_trie_with_offsets_equals_tokenizer(tokenizer):
    trie = ItemTrie.from_codes(tokenizer.codes, SIZES)
    one = ItemTrieLogitsProcessor(tokenizer, 1, excluded_items=[["item-1", "item-2"]])
    two = ItemTrieLogitsProcessor(
        trie, 1, level_offsets=tokenizer.level_offsets, eos_token_id=1, excluded_items=[[1, 2]]
    )
    ids = torch.cat(
        [torch.zeros(40, 1, dtype=torch.long), torch.tensor(tokenizer.item_token_table[:, :2].copy())], dim=1
    )
    scores = torch.randn(40, len(tokenizer))
    assert torch.equal(one(ids, scores), two(ids, scores))


def test_bad_arguments_are_named(tokenizer):
    trie = ItemTrie.from_codes(tokenizer.codes, SIZES)
    cases = [
        (IncompatibleComponentsError, "pass level_offsets", lambda: ItemTrieLogitsProcessor(trie, 1)),
        (RequestError, "end token", lambda: ItemTrieLogitsProcessor(trie, 1, level_offsets=[4, 10, 15])),
        (RequestError, "num_items >= 1", lambda: ItemTrieLogitsProcessor(tokenizer, 1, num_items=0)),
        (RequestError, "prompt_length must be", lambda: ItemTrieLogitsProcessor(tokenizer, -1)),
        (RequestError, "empty", lambda: ItemTrieLogitsProcessor(tokenizer, 1, allowed_items=[[]])),
        (UnknownItemError, "'nope'", lambda: ItemTrieLogitsProcessor(tokenizer, 1, allowed_items=["nope"])),
        (RequestError, "0..39", lambda: ItemTrieLogitsProcessor(tokenizer, 1, allowed_items=[[40]])),
        (RequestError, "row 1: the item lists leave nothing", lambda: ItemTrieLogitsProcessor(
            tokenizer, 1, allowed_items=[["item-1"], ["item-2"]], excluded_items=[["item-2"], ["item-2"]])),
        (RequestError, "prompt_length is 5", lambda: ItemTrieLogitsProcessor(tokenizer, 5)(
            torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, len(tokenizer)))),
        (IncompatibleComponentsError, "scores 10 tokens, the item tokens need 19", lambda: ItemTrieLogitsProcessor(
            tokenizer, 1)(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 10))),
        (IncompatibleComponentsError, "carries no item catalogue", lambda: ItemTrieLogitsProcessor(object(), 1)),
    ]  # fmt: skip
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
