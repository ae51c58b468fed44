"""CandidateTrieLogitsProcessor: closed sets of items or titles, another one for each request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from logits_cases import (
    EOS,
    answers,
    generate,
    left_padded,
    legal_tokens,
    log_probs,
    next_tokens,
    prompt_length,
    tiny_model,
    word_tokenizer,
)

from hf_genrec.errors import IncompatibleComponentsError, RequestError, UnknownItemError
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor, real_beams
from hf_genrec.generation.logits_process_candidates import CandidateTrieLogitsProcessor
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

WORDS = ["Star", "Wars", "Trek", "Alien", "Aliens", "The", "Thing", "Return", "of", "Jedi", ",", "and"]
TITLES = [
    ["Star", "Star Wars", "Star Wars Return of The Jedi", "The Thing", "Alien"],
    ["Aliens", "Alien", "Star Trek", "The"],
    ["Star Wars", "Star Trek", "Trek", "Return of The Jedi", "Return of The Thing", "Thing"],
]
PROMPTS = [[9, 10], [4, 5, 6, 7], [12]]


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(60, 20, replace=False), (5, 4, 3)), axis=1)
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(20)], codes, (5, 4, 3))


def tokens(words, title):
    return tuple(words(title, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_titles_are_ranked_by_their_probability_with_the_end_token(kind, words):
    model, inputs = tiny_model(kind, len(words) + 3), left_padded(PROMPTS)
    processor = CandidateTrieLogitsProcessor(words, TITLES, prompt_length(model, inputs), kind="texts")
    output = generate(model, inputs, processor, num_beams=8, num_return_sequences=8, max_new_tokens=9)
    real = real_beams(output.sequences_scores).view(3, 8)
    assert real.sum(-1).tolist() == [len(row) for row in TITLES]
    got = answers(model, inputs, output)
    for row, prompt in enumerate(PROMPTS):
        exact = {
            tokens(words, title): float(log_probs(model, prompt, (*tokens(words, title), EOS)).sum())
            for title in TITLES[row]
        }
        found = got[8 * row : 8 * row + len(exact)]
        assert found == sorted(exact, key=lambda title: -exact[title])
        expected = torch.tensor([exact[title] for title in found])
        torch.testing.assert_close(output.sequences_scores.view(3, 8)[row, real[row]], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("renormalize", [False, True])
def test_every_next_token_of_every_request(renormalize, words):
    processor = CandidateTrieLogitsProcessor(words, TITLES, 1, kind="texts", renormalize=renormalize)
    strings = [{(*tokens(words, title), EOS) for title in row} for row in TITLES]
    prefixes = {string[:n] for row in strings for string in row for n in range(len(string))}
    for prefix in sorted(prefixes):  # the same prefix in all requests, which do not all know it
        scores = torch.randn(3, len(words)).log_softmax(-1)
        masked = processor(torch.tensor([[0, *prefix]] * 3), scores)
        for row in range(3):
            options = next_tokens(strings[row], prefix)
            assert legal_tokens(masked[row]) == (options or [EOS])
            if options:
                expected = scores[row, options] - (scores[row, options].logsumexp(0) if renormalize else 0)
                torch.testing.assert_close(masked[row, options], expected)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 20}, {"num_beams": 3}])
def test_greedy_sampling_and_beams_give_candidates_only(options, words):
    model, inputs = tiny_model("llama", len(words), seed=2), left_padded(PROMPTS)
    processor = CandidateTrieLogitsProcessor(words, TITLES, prompt_length(model, inputs), kind="texts")
    torch.manual_seed(0)
    got = answers(model, inputs, generate(model, inputs, processor, **options))
    per_row = len(got) // 3
    for row, titles in enumerate(TITLES):
        assert set(got[per_row * row : per_row * (row + 1)]) <= {tokens(words, title) for title in titles}


def test_several_titles_of_an_answer_are_different_and_separated(words):
    model, inputs = tiny_model("llama", len(words), seed=2), left_padded(PROMPTS)
    comma = words.convert_tokens_to_ids(",")
    processor = CandidateTrieLogitsProcessor(
        words, TITLES, prompt_length(model, inputs), kind="texts", num_items=3, separator_token_id=comma
    )
    torch.manual_seed(0)
    output = generate(model, inputs, processor, do_sample=True, num_return_sequences=20, max_new_tokens=24)
    for number, answer in enumerate(answers(model, inputs, output)):
        titles = words.decode(answer).split(" , ")
        assert len(titles) == 3 == len(set(titles)) and set(titles) <= set(TITLES[number // 20])


def test_each_request_alone_equals_the_batch(words):
    model, together = tiny_model("llama", len(words)), left_padded(PROMPTS)
    both = generate(
        model,
        together,
        CandidateTrieLogitsProcessor(words, TITLES, 4, kind="texts"),
        num_beams=4,
        num_return_sequences=4,
    )
    for row, prompt in enumerate(PROMPTS):
        alone = left_padded([prompt])
        processor = CandidateTrieLogitsProcessor(words, TITLES[row], len(prompt), kind="texts")
        one = generate(model, alone, processor, num_beams=4, num_return_sequences=4)
        part = slice(4 * row, 4 * row + 4)
        assert answers(model, together, both)[part] == answers(model, alone, one)
        torch.testing.assert_close(both.sequences_scores[part], one.sequences_scores, rtol=1e-4, atol=1e-4)


def test_items_as_candidates(items):
    model, inputs = (
        tiny_model("t5", len(items)),
        items.encode_histories([["item-3"], ["item-4", "item-5"]], return_tensors="pt"),
    )
    lists = [["item-1", "item-2", "item-9"], ["item-7", "item-8"]]
    output = generate(
        model, inputs, CandidateTrieLogitsProcessor(items, lists), num_beams=3, num_return_sequences=3, max_new_tokens=4
    )
    real = real_beams(output.sequences_scores).view(2, 3)
    assert real.sum(-1).tolist() == [3, 2]
    got = answers(model, inputs, output)
    for row, names in enumerate(lists):
        found = [items.token_ids_to_items(list(answer))[0][0] for answer in got[3 * row : 3 * row + len(names)]]
        assert sorted(found) == names
    everything = CandidateTrieLogitsProcessor(items, list(items.item_ids))
    ids, scores = torch.zeros(4, 1, dtype=torch.long), torch.randn(4, len(items))
    torch.testing.assert_close(everything(ids, scores), ItemTrieLogitsProcessor(items)(ids, scores))


def test_bad_candidates_are_named(words, items):
    cases = [
        (RequestError, "kind must be one of", lambda: CandidateTrieLogitsProcessor(items, ["item-1"], kind="ids")),
        (RequestError, "not one string", lambda: CandidateTrieLogitsProcessor(words, "Star", kind="texts")),
        (RequestError, "candidates is empty", lambda: CandidateTrieLogitsProcessor(items, [])),
        (RequestError, "row 1 is empty", lambda: CandidateTrieLogitsProcessor(items, [["item-1"], []])),
        (RequestError, "row 1 is 'item-2', not a list", lambda: CandidateTrieLogitsProcessor(items, [["item-1"], "item-2"])),
        (RequestError, "row 0 holds 7", lambda: CandidateTrieLogitsProcessor(items, [[7]])),
        (RequestError, "row 0 has 2 different candidates for answers of 3", lambda: CandidateTrieLogitsProcessor(
            items, [["item-1", "item-2", "item-1"]], num_items=3)),
        (UnknownItemError, "row 1: 'nope'", lambda: CandidateTrieLogitsProcessor(items, [["item-1"], ["nope"]])),
        (RequestError, "row 1 has no tokens", lambda: CandidateTrieLogitsProcessor(words, ["Star", " "], kind="texts")),
        (IncompatibleComponentsError, "pass separator_token_id", lambda: CandidateTrieLogitsProcessor(
            words, ["Star", "Star Wars", "Wars"], kind="texts", num_items=2)),
        (IncompatibleComponentsError, "5 rows for item lists of 2", lambda: CandidateTrieLogitsProcessor(
            items, [["item-1"], ["item-2"]])(torch.zeros(5, 1, dtype=torch.long), torch.zeros(5, len(items)))),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
