"""Prefix marginals (D3): a second opinion on items, mixed in at every token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from logits_cases import EOS, answers, generate, left_padded, log_probs, prompt_length, tiny_model, word_tokenizer

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.decoding.beam_cache import start_beams
from hf_genrec.generation.decoding.kernel import beam_step
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor, real_beams
from hf_genrec.generation.logits_process_prefix_marginal import PrefixMarginal, PrefixMarginalLogitsProcessor
from hf_genrec.generation.token_trie import TokenTrie
from hf_genrec.generation.trie import ItemTrie

SIZES, OFFSETS, VOCAB, ITEMS = (4, 5, 6), (8, 12, 17), 25, 30
PROMPTS = [[4, 5], [6, 9, 13, 7], [24]]


@pytest.fixture(scope="module")
def codes():
    rng = np.random.default_rng(0)
    return np.stack(np.unravel_index(rng.choice(120, ITEMS, replace=False), SIZES), axis=1)


@pytest.fixture(scope="module")
def trie(codes):
    return ItemTrie.from_codes(codes, SIZES)


def item_probs(rows=3, seed=0, items=ITEMS):
    generator = torch.Generator().manual_seed(seed)
    return (4.0 * torch.randn(rows, items, generator=generator)).softmax(-1)


def ranked(model, trie, probs, alpha, beams=ITEMS, prompts=PROMPTS, **options):
    inputs = left_padded(prompts)
    processor = PrefixMarginalLogitsProcessor(
        trie, probs, alpha, prompt_length(model, inputs), level_offsets=OFFSETS, eos_token_id=EOS, **options
    )
    output = generate(model, inputs, processor, num_beams=beams, num_return_sequences=beams, max_new_tokens=4)
    return answers(model, inputs, output), output.sequences_scores.view(len(prompts), beams)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_alpha_1_is_the_plain_processor(kind, trie):
    model, inputs = tiny_model(kind, VOCAB), left_padded(PROMPTS)
    plain = ItemTrieLogitsProcessor(trie, prompt_length(model, inputs), level_offsets=OFFSETS, eos_token_id=EOS)
    output = generate(model, inputs, plain, num_beams=10, num_return_sequences=10, max_new_tokens=4)
    names, scores = ranked(model, trie, item_probs(), 1.0, beams=10)
    assert names == answers(model, inputs, output) and torch.equal(scores.flatten(), output.sequences_scores)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_alpha_0_ranks_as_the_item_probabilities(kind, trie, codes):
    """The shares along an item's path multiply to its probability, whatever the model thinks."""
    probs = item_probs()
    names, scores = ranked(tiny_model(kind, VOCAB), trie, probs, 0.0)
    tokens = [tuple(row) for row in (codes + OFFSETS).tolist()]
    for row in range(3):
        order = probs[row].argsort(descending=True).tolist()
        assert names[ITEMS * row : ITEMS * (row + 1)] == [tokens[item] for item in order]
        torch.testing.assert_close(scores[row], probs[row, order].log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.3, 0.8])
def test_the_mixture_is_that_of_whole_items(alpha, trie, codes):
    model, probs = tiny_model("t5", VOCAB), item_probs(seed=1)
    names, scores = ranked(model, trie, probs, alpha)
    tokens = [tuple(row) for row in (codes + OFFSETS).tolist()]
    for row, prompt in enumerate(PROMPTS):
        exact = {
            name: alpha * float(log_probs(model, prompt, name).sum()) + (1 - alpha) * float(probs[row, item].log())
            for item, name in enumerate(tokens)
        }
        got = names[ITEMS * row : ITEMS * (row + 1)]
        assert got == sorted(tokens, key=lambda name: -exact[name])
        torch.testing.assert_close(scores[row], torch.tensor([exact[name] for name in got]), rtol=1e-4, atol=1e-4)


def test_each_request_has_its_own_probabilities(trie):
    model, probs = tiny_model("llama", VOCAB), item_probs(seed=2)
    together, _ = ranked(model, trie, probs, 0.5, beams=6)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = ranked(model, trie, probs[row], 0.5, beams=6, prompts=[prompt])
        assert alone == together[6 * row : 6 * row + 6]


def test_shares_of_the_legal_children_sum_to_one(trie):
    marginal = PrefixMarginal(trie, item_probs(), 0.0)
    item_filter = ItemFilter.from_rows(trie, excluded=[np.arange(0, ITEMS, 2), np.arange(5), np.array([7])])
    for one, kept in ((marginal, None), (PrefixMarginal(trie, item_probs(), 0.0, item_filter), item_filter)):
        for level in range(3):
            nodes = torch.arange(trie.num_nodes(level)).expand(3, -1)
            _, children, legal = trie.expand(level, nodes)
            legal = legal if kept is None else legal & kept.alive(level + 1, children)
            shares = one.log_shares(*trie.slot_range(level + 1, children), legal).exp()
            some = legal.any(-1)
            torch.testing.assert_close(shares.masked_fill(~legal, 0).sum(-1)[some], torch.ones(int(some.sum())))


def test_only_items_allowed_count(trie, codes):
    probs = item_probs()
    excluded = [[int(item) for item in probs[row].topk(3).indices] for row in range(3)]
    names, scores = ranked(tiny_model("t5", VOCAB), trie, probs, 0.0, excluded_items=excluded)
    tokens = [tuple(row) for row in (codes + OFFSETS).tolist()]
    for row in range(3):
        left = probs[row].clone()
        left[excluded[row]] = 0.0
        left /= left.sum()
        order = left.argsort(descending=True)[: ITEMS - 3]
        assert names[ITEMS * row : ITEMS * (row + 1) - 3] == [tokens[item] for item in order]
        torch.testing.assert_close(scores[row, : ITEMS - 3], left[order].log(), rtol=1e-4, atol=1e-4)
        assert real_beams(scores[row]).sum() == ITEMS - 3


def test_items_without_probability_come_last_and_stay_real(trie, codes):
    probs = torch.zeros(ITEMS)
    probs[[3, 11, 20]] = torch.tensor([0.5, 0.3, 0.2])
    names, scores = ranked(tiny_model("t5", VOCAB), trie, probs, 0.0, prompts=PROMPTS[:1])
    assert names[:3] == [tuple((codes[item] + OFFSETS).tolist()) for item in (3, 11, 20)]
    assert len(set(names)) == ITEMS and real_beams(scores).all()


def test_hook_of_the_kernel_gives_the_same_search(trie, codes, table_model):
    """Beam search on the shared kernel with the hook: brute force over the catalogue."""
    model, probs, alpha = table_model(SIZES), item_probs(), 0.4
    state = model.start_decoding(torch.tensor([[1], [2], [3]]), None)
    beams = start_beams(model, state, 3, torch.device("cpu"))
    marginal = PrefixMarginal(trie, probs, alpha)
    nodes, scores = torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1)
    for level in range(3):
        step = beam_step(trie, level, nodes, scores, beams.score(level), ITEMS, adjust=marginal)
        nodes, scores = step.nodes_BK, step.scores_BK
        if level < 2:
            beams.reorder(step.parents_BK, step.codes_BK, level)
    for row, leaf in itertools.product(range(3), range(ITEMS)):
        item = int(trie.first_items(nodes[row, leaf]))
        own = sum(
            float(
                model.score_codes(state[row : row + 1], torch.tensor(codes[item][:level]).view(1, 1, level), level)[
                    0, 0, code
                ]
            )
            for level, code in enumerate(codes[item])
        )
        expected = alpha * own + (1 - alpha) * float(probs[row, item].log())
        assert abs(float(scores[row, leaf]) - expected) < 1e-4


def test_titles_and_codes_of_several_lengths():
    """`alpha=0` on titles that are prefixes of each other: the end token carries the share of the shorter one."""
    words = word_tokenizer(["Star", "Wars", "Trek", "Alien", "Return"])
    titles = ["Star", "Star Wars", "Star Wars Return", "Alien", "Star Trek"]
    probs = torch.tensor([[0.3, 0.1, 0.35, 0.05, 0.2], [0.05, 0.4, 0.1, 0.25, 0.2]])
    model, inputs = tiny_model("llama", len(words)), left_padded([[4], [5, 6]])
    processor = PrefixMarginalLogitsProcessor(TokenTrie.from_texts(words, titles), probs, 0.0, 2, eos_token_id=EOS)
    output = generate(model, inputs, processor, num_beams=5, num_return_sequences=5)
    got = [words.decode(answer) for answer in answers(model, inputs, output)]
    for row in range(2):
        order = probs[row].argsort(descending=True).tolist()
        assert got[5 * row : 5 * row + 5] == [titles[item] for item in order]
        torch.testing.assert_close(
            output.sequences_scores.view(2, 5)[row], probs[row, order].log(), rtol=1e-4, atol=1e-4
        )


def test_length_penalty_flips_long_and_short_titles():
    """Ghost tokens: a long title whose later words are certain wins only because its score is divided by its length."""
    words = word_tokenizer(["Short", "Long", "and", "winding", "road"])
    titles = TokenTrie.from_texts(words, ["Short", "Long and winding road"])
    token = dict(zip(["<s>", "</s>", "Short", "Long", "and", "winding", "road"], [3, 1, 4, 5, 6, 7, 8]))
    chances = torch.full((len(words), len(words)), 1e-3)
    for before, after, chance in [
        ("<s>", "Short", 0.6), ("<s>", "Long", 0.4), ("Short", "</s>", 0.7), ("Short", "and", 0.3),
        ("Long", "and", 1.0), ("and", "winding", 1.0), ("winding", "road", 1.0), ("road", "</s>", 1.0),
    ]:  # fmt: skip
        chances[token[before], token[after]] = chance
    model = tiny_model("llama", len(words))

    def bigrams(module, args, kwargs, output):
        output.logits = chances[kwargs["input_ids"]].log()

    model.register_forward_hook(bigrams, with_kwargs=True)
    inputs = left_padded([[token["<s>"]]])
    processor = PrefixMarginalLogitsProcessor(titles, torch.tensor([0.5, 0.5]), 1.0, 1, eos_token_id=EOS)
    best = {}
    for penalty in (0.0, 1.0):
        output = generate(model, inputs, processor, num_beams=2, num_return_sequences=2, length_penalty=penalty)
        best[penalty] = words.decode(answers(model, inputs, output)[0])
    assert best == {0.0: "Short", 1.0: "Long and winding road"}


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 20}])
def test_greedy_and_sampling(options, trie, codes):
    model, inputs = tiny_model("llama", VOCAB), left_padded(PROMPTS)
    processor = PrefixMarginalLogitsProcessor(trie, item_probs(), 0.5, 4, level_offsets=OFFSETS, eos_token_id=EOS)
    torch.manual_seed(0)
    got = answers(model, inputs, generate(model, inputs, processor, **options))
    assert set(got) <= {tuple(row) for row in (codes + OFFSETS).tolist()}


def test_sampling_draws_from_the_item_probabilities(trie, codes):
    """`alpha=0` in ancestral sampling: item frequencies are the item probabilities."""
    probs = item_probs(1)[0]
    model, inputs = tiny_model("llama", VOCAB), left_padded(PROMPTS[:1])
    processor = PrefixMarginalLogitsProcessor(trie, probs, 0.0, 2, level_offsets=OFFSETS, eos_token_id=EOS)
    torch.manual_seed(0)
    output = generate(model, inputs, processor, do_sample=True, num_return_sequences=3000, max_new_tokens=3, top_k=0)
    drawn = trie.first_items(trie.lookup(output.sequences[:, 2:5] - torch.tensor(OFFSETS)))
    frequency = torch.bincount(drawn, minlength=ITEMS) / 3000
    assert (frequency - probs).abs().max() < 0.04


def test_bad_arguments_are_named(trie):
    probs = item_probs()
    wrong = probs.clone()
    wrong[1, 7] = -0.5
    empty = probs.clone()
    empty[2] = 0
    lists = ItemFilter.from_rows(trie, allowed=[[1], [2]])
    cases = [
        ("alpha must lie in 0..1, got 1.5", lambda: PrefixMarginal(trie, probs, 1.5)),
        (r"shape \(3, 29\), the catalogue 30 items", lambda: PrefixMarginal(trie, probs[:, :29], 0.5)),
        ("row 1, item 7 is -0.5", lambda: PrefixMarginal(trie, wrong, 0.5)),
        ("row 0, item 0 is nan", lambda: PrefixMarginal(trie, probs * float("nan"), 0.5)),
        ("row 2 has no mass", lambda: PrefixMarginal(trie, empty, 0.5)),
        ("3 rows for item lists of 2 requests", lambda: PrefixMarginal(trie, probs, 0.5, lists)),
        ("3 rows for 2 users", lambda: PrefixMarginal(trie, probs, 0.5)(0, *[torch.zeros(2, 1, 1, dtype=torch.long)] * 5)),
        ("5 rows for item lists of 3", lambda: PrefixMarginalLogitsProcessor(
            trie, probs, 0.5, level_offsets=OFFSETS, eos_token_id=EOS)(
                torch.zeros(5, 1, dtype=torch.long), torch.zeros(5, VOCAB))),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(IncompatibleComponentsError if "of 3" in message else RequestError, match=message):
            call()
