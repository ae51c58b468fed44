"""ItemTrieLogitsProcessor with codes of several lengths, several items per answer, and items inside free text."""

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
)

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor, real_beams
from hf_genrec.generation.token_trie import TokenTrie
from hf_genrec.generation.trie import ItemTrie

OFFSETS, SIZES = (8, 12, 15), (4, 3, 3)
VOCAB = 20  # 0..7: special and text, 8..17 item tokens, 18 and 19 text
PROMPTS = [[4, 5], [6, 9, 13, 7], [19]]


def variable_codes(seed=0, items=24):
    rng = np.random.default_rng(seed)
    rows = set()
    while len(rows) < items:
        length = int(rng.integers(1, 4))
        rows.add(tuple(int(rng.integers(size)) for size in SIZES[:length]) + (-1,) * (3 - length))
    return np.array(sorted(rows))


def spoken(codes):
    return [tuple((row + OFFSETS)[row >= 0].tolist()) for row in codes]


def processor_for(codes, length=1, **options):
    return ItemTrieLogitsProcessor(
        ItemTrie.from_codes(codes, SIZES), length, level_offsets=OFFSETS, eos_token_id=EOS, **options
    )


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_codes_of_several_lengths_are_ranked_exactly(kind):
    """As many beams as items: the ranking of all items by the log-probability of their codes, end tokens free."""
    model, inputs, codes = tiny_model(kind, VOCAB), left_padded(PROMPTS), variable_codes()
    names = spoken(codes)
    length = prompt_length(model, inputs)
    output = generate(
        model, inputs, processor_for(codes, length), num_beams=24, num_return_sequences=24, max_new_tokens=4
    )
    assert real_beams(output.sequences_scores).all()
    got = answers(model, inputs, output)
    for row, prompt in enumerate(PROMPTS):
        exact = {name: float(log_probs(model, prompt, name).sum()) for name in names}
        part = slice(24 * row, 24 * (row + 1))
        assert got[part] == sorted(names, key=lambda name: -exact[name])
        expected = torch.tensor([exact[name] for name in got[part]])
        torch.testing.assert_close(output.sequences_scores[part], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("free_end", [True, False])
def test_greedy_and_sampling_stay_inside_too(kind, free_end):
    model, inputs, codes = tiny_model(kind, VOCAB, seed=3), left_padded(PROMPTS), variable_codes(1)
    processor = processor_for(codes, prompt_length(model, inputs), free_end=free_end)
    torch.manual_seed(0)
    for options in ({}, {"do_sample": True, "num_return_sequences": 30}, {"do_sample": True, "num_beams": 4}):
        output = generate(model, inputs, processor, **options)
        assert set(answers(model, inputs, output)) <= set(spoken(codes))


def test_a_free_end_means_the_same_for_logits_and_log_probabilities():
    """Sampling hands over logits, beam search log-probabilities; the choice must not depend on which."""
    codes = variable_codes()
    processor = processor_for(codes)
    logits = 3.0 * torch.randn(24, VOCAB)
    ids = torch.tensor([[0, code[0] + OFFSETS[0]] for code in codes])
    one, two = processor(ids, logits), processor(ids, logits.log_softmax(-1))
    torch.testing.assert_close(one.log_softmax(-1), two.log_softmax(-1))
    competing = torch.isfinite(two[:, EOS]) & (torch.isfinite(two).sum(-1) > 1)
    assert competing.any() and two[competing, EOS].abs().max() < 1e-5


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_items", [1, 2])
@pytest.mark.parametrize("separator", [None, 5])
def test_every_next_token_against_all_legal_answers(num_items, separator, renormalize):
    codes = variable_codes(2, items=7)
    names, pause = spoken(codes), () if separator is None else (separator,)
    pairs = [(*one, *pause, *two) for one in names for two in names if one != two]
    strings = {(*name, EOS) for name in (names if num_items == 1 else pairs)}
    processor = processor_for(codes, num_items=num_items, separator_token_id=separator, renormalize=renormalize)
    prefixes = sorted({string[:n] for string in strings for n in range(len(string))})
    for length in range(max(map(len, prefixes)) + 1):
        rows = [prefix for prefix in prefixes if len(prefix) == length]
        scores = torch.randn(len(rows), VOCAB).log_softmax(-1)
        masked = processor(torch.tensor([[0, *prefix] for prefix in rows]), scores)
        for prefix, values, original in zip(rows, masked, scores):
            options = next_tokens(strings, prefix)
            assert legal_tokens(values) == options, prefix
            said = [token for token in options if token != EOS]
            if said:
                expected = original[said] - (original[said].logsumexp(0) if renormalize else 0)
                torch.testing.assert_close(values[said], expected)
            if EOS in options:
                assert values[EOS].abs() < 1e-5


def mixed_answers(names, begin, most, length):
    """All complete answers of the text token 4 and different items, up to a length: written down from the definition."""
    found, growing = set(), [((), frozenset())]
    while growing:
        string, used = growing.pop()
        found.add((*string, EOS))
        steps = [((4,), used)]
        if len(used) < most:
            steps += [
                (((begin,) if begin is not None else ()) + name, used | {name}) for name in names if name not in used
            ]
        growing += [((*string, *step), now) for step, now in steps if len(string) + len(step) <= length]
    return found


@pytest.mark.parametrize("most", [1, 2, None])
@pytest.mark.parametrize("begin", [None, 6])
def test_every_next_token_of_mixed_text_and_items(begin, most):
    codes = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 2], [3, 2, 0]])
    names = spoken(codes)
    strings = mixed_answers(names, begin, 4 if most is None else most, 9)
    trie = ItemTrie.from_codes(codes, SIZES)
    processor = ItemTrieLogitsProcessor(
        trie, 2, level_offsets=OFFSETS, eos_token_id=EOS, mode="mixed", num_items=most, begin_token_id=begin
    )
    closed = {0, 2, 3, 5, 7, 18, 19} | ({6} if begin is None else set())  # text as well, but not in the strings
    checked = 0
    for length in range(5):
        rows = sorted({string[:length] for string in strings if len(string) > length})
        scores = torch.randn(len(rows), VOCAB)
        masked = processor(torch.tensor([[9, 9, *prefix] for prefix in rows]), scores)
        for prefix, values, original in zip(rows, masked, scores):
            options = legal_tokens(values)
            assert [token for token in options if token not in closed] == next_tokens(strings, prefix), prefix
            assert (closed <= set(options)) == (4 in options)
            assert torch.equal(values[options], original[options])
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "num_return_sequences": 40, "temperature": 6.0}, {"num_beams": 6}]
)
@pytest.mark.parametrize("begin", [None, 6])
def test_generated_text_holds_whole_items_only(begin, options, kind):
    model, inputs, codes = tiny_model(kind, VOCAB, seed=1), left_padded(PROMPTS), variable_codes(4)
    names = set(spoken(codes))
    processor = processor_for(
        codes, prompt_length(model, inputs), mode="mixed", begin_token_id=begin, allowed_items=[list(range(12))]
    )
    allowed = set(spoken(codes)[:12])
    torch.manual_seed(0)
    output = generate(model, inputs, processor, max_new_tokens=25, **options)
    items = 0
    for answer in answers(model, inputs, output):
        run, runs = (), []
        for token in (*answer, 4):
            if run and not OFFSETS[1] <= token < 18:  # anything but a later code ends an item
                runs.append(run)
                run = ()
            if OFFSETS[0] <= token < 18:
                run = (*run, token)
        cut = len(answer) == 25 and OFFSETS[0] <= answer[-1] < 18  # generation stopped in the middle of the last item
        assert set(runs[: len(runs) - cut]) <= allowed & names
        assert len(set(runs[: len(runs) - cut])) == len(runs) - cut
        items += len(runs)
    assert items > 0 or "do_sample" not in options


def test_rows_do_not_know_each_other():
    """Any order of the rows, any company, any order of calls: the same scores."""
    codes = variable_codes(3)
    for processor in (processor_for(codes, 1, num_items=3), processor_for(codes, 1, mode="mixed")):
        ids = torch.randint(4, VOCAB, (40, 6))
        ids[20:, 1:] = torch.tensor((*next(name for name in spoken(codes) if len(name) == 3), 4, 4))
        scores = torch.randn(40, VOCAB)
        masked = processor(ids, scores)
        order = torch.randperm(40)
        assert torch.equal(processor(ids[order], scores[order]), masked[order])
        processor(ids[:, :3], scores)
        for row in range(0, 40, 7):
            assert torch.equal(processor(ids[row : row + 1], scores[row : row + 1])[0], masked[row])


def test_prompts_of_a_batch_are_generated_as_if_alone():
    model, codes = tiny_model("llama", VOCAB), variable_codes(5)
    together = left_padded(PROMPTS)
    for options in ({"num_items": 2}, {"mode": "mixed"}):
        both = generate(model, together, processor_for(codes, 4, **options), num_beams=5, num_return_sequences=5)
        for row, prompt in enumerate(PROMPTS):
            alone = left_padded([prompt])
            processor = processor_for(codes, len(prompt), **options)
            one = generate(model, alone, processor, num_beams=5, num_return_sequences=5)
            part = slice(5 * row, 5 * (row + 1))
            assert answers(model, together, both)[part] == answers(model, alone, one)
            torch.testing.assert_close(both.sequences_scores[part], one.sequences_scores, rtol=1e-4, atol=1e-4)


def test_codes_of_one_length_do_not_depend_on_the_way_they_are_walked():
    """The level-by-level walk and the walk for any depth agree on fixed-length codes, filters and all."""
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(36, 20, replace=False), SIZES), axis=1)
    lists = [list(range(0, 20, 2)), list(range(0, 20, 3))]
    flat_trie = TokenTrie.from_item_trie(ItemTrie.from_codes(codes, SIZES), OFFSETS)
    for options in ({}, {"num_items": 2}, {"renormalize": True}, {"allowed_items": lists, "num_items": 2}):
        one = processor_for(codes, **options)
        two = ItemTrieLogitsProcessor(flat_trie, 1, eos_token_id=EOS, free_end=True, **options)
        for step in range(1 + 3 * options.get("num_items", 1)):
            ids = torch.zeros(40, 1 + step, dtype=torch.long)
            both = range(0, 20, 6) if "allowed_items" in options else range(20)  # items that either list allows
            pairs = torch.tensor(np.stack([rng.permutation(both)[:2] for _ in range(40)]))
            ids[:, 1:] = (torch.tensor(codes)[pairs] + torch.tensor(OFFSETS)).flatten(1)[:, :step]
            ids[::5, 1:] = torch.randint(0, VOCAB, (8, step))
            scores = torch.randn(40, VOCAB).log_softmax(-1)
            torch.testing.assert_close(one(ids, scores), two(ids, scores))


def test_bad_arguments_are_named():
    codes = variable_codes()
    short = TokenTrie.from_sequences([[4], [4, 5], [5]])
    cases = [
        (RequestError, "mode must be one of items, mixed", lambda: processor_for(codes, mode="text")),
        (RequestError, "num_items >= 1", lambda: processor_for(codes, mode="mixed", num_items=0)),
        (RequestError, 'pass mode="mixed"', lambda: processor_for(codes, begin_token_id=4)),
        (RequestError, "in mixed mode any text does", lambda: processor_for(codes, mode="mixed", separator_token_id=4)),
        (IncompatibleComponentsError, "separates items and also continues", lambda: processor_for(
            codes, num_items=2, separator_token_id=OFFSETS[1])),
        (IncompatibleComponentsError, "also continues a complete item", lambda: ItemTrieLogitsProcessor(
            short, 1, eos_token_id=5)),
        (IncompatibleComponentsError, "pass separator_token_id", lambda: ItemTrieLogitsProcessor(
            short, 1, eos_token_id=EOS, num_items=2)),
        (IncompatibleComponentsError, "pass begin_token_id", lambda: ItemTrieLogitsProcessor(
            short, 1, eos_token_id=EOS, mode="mixed")),
        (RequestError, "prompt_length must be", lambda: processor_for(codes).with_prompt_length(-1)),
    ]  # fmt: skip
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()


def test_titles_inside_free_text():
    """With an announcing token, ordinary words can be items: after it comes a title, whole, and then text again."""
    titles = TokenTrie.from_sequences([[4, 5], [4, 5, 7], [8]])
    processor = ItemTrieLogitsProcessor(titles, 0, eos_token_id=EOS, mode="mixed", begin_token_id=6)
    everything = list(range(VOCAB))
    expected = {
        (4, 5): everything, (6,): [4, 8], (4, 6, 4): [5], (6, 4, 5): everything, (6, 8): everything,
        (6, 4, 5, 4, 6): [4, 8], (6, 4, 5, 7): everything, (6, 8, 6): [4], (6, 5): [EOS],
    }  # fmt: skip
    for prefix, tokens in expected.items():
        ids = torch.tensor([prefix])
        assert legal_tokens(processor(ids, torch.zeros(1, VOCAB))[0]) == tokens, prefix
