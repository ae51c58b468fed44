"""The decoder-only engine: one new token per beam and level gives what `generate` and full passes give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from hf_genrec.generation.decoding import causal_head, causal_lm, tree_attention
from hf_genrec.generation.decoding.beam import trie_beam_search
from hf_genrec.generation.decoding.beam_cache import StatelessBeams
from hf_genrec.generation.decoding.causal_head import LinearHead, OwnLogits, is_plain_linear
from hf_genrec.generation.decoding.causal_lm import CausalLMScorer
from hf_genrec.generation.decoding.tree_attention import TreeBeams
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.trie import ItemTrie

SIZES = (6, 5, 4, 3)
OFFSETS = (4, 10, 15, 19)
VOCABULARY = 30
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3, "tie_word_embeddings": False}
LAYERS = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
}
STOCK = {
    "Llama": LAYERS,
    "Qwen3": {**LAYERS, "head_dim": 8},
    "Mistral": {**LAYERS, "sliding_window": 12},
    "GPT2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.4},
    "Phi": {**LAYERS, "partial_rotary_factor": 1.0},  # a head with a bias
    "Cohere": {**LAYERS, "logit_scale": 0.25},
    "Granite": {**LAYERS, "logits_scaling": 3.0},
    "Gemma2": {**LAYERS, "head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
}
PROMPTS = torch.tensor([[0, 0, 0, 0, 3, 7], [3, 5, 11, 16, 20, 29], [0, 0, 0, 9, 12, 15]])
MASK = (PROMPTS != 0).long()


def build(name, **changes):
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **{**SPECIAL, **STOCK[name], **changes})
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def scorer(model, **options):
    return CausalLMScorer(model, OFFSETS, SIZES, **options)


@pytest.fixture(scope="module")
def trie():
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(360, 60, replace=False), SIZES), axis=1)
    return ItemTrie.from_codes(codes, SIZES)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def search(decoder, trie, num_beams=60, ids=PROMPTS, mask=MASK, **options):
    """Codes and scores of the best leaves, best first."""
    state = decoder.start_decoding(ids, mask)
    leaves, scores = trie_beam_search(decoder, state, trie, num_beams, batch_size=len(ids), **options)
    return trie.node_prefixes(len(SIZES))[leaves], scores


class BlockOnly(LogitsProcessor):
    """log_softmax over the level's block of tokens."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores):
        level = input_ids.shape[1] - self.length
        if level >= len(SIZES):
            return scores
        masked = torch.full_like(scores, -torch.inf)
        block = slice(OFFSETS[level], OFFSETS[level] + SIZES[level])
        masked[:, block] = scores[:, block].log_softmax(-1)
        return masked


def by_generate(model, trie, num_beams=60, ids=PROMPTS, mask=MASK, before=(), **options):
    length = ids.shape[1]
    processor = ItemTrieLogitsProcessor(trie, length, level_offsets=OFFSETS, eos_token_id=1, **options)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=len(SIZES),
        length_penalty=0.0,
        do_sample=False,
        early_stopping=False,
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=LogitsProcessorList([*before, processor]),
    )
    codes = output.sequences[:, length : length + len(SIZES)].view(len(ids), num_beams, -1) - torch.tensor(OFFSETS)
    return codes, output.sequences_scores.view(len(ids), num_beams)


def assert_same(result, expected, atol=1e-4):
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], atol=atol, rtol=0)


# ------------------------------------------------------------- the same as generate


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2"])
def test_same_as_generate(name, implementation, trie):
    model = build(name)
    model.set_attn_implementation(implementation)
    decoder = scorer(model)
    assert isinstance(decoder.start_beams(decoder.start_decoding(PROMPTS, MASK)), TreeBeams)
    for num_beams in (60, 9):
        assert_same(search(decoder, trie, num_beams), by_generate(model, trie, num_beams))


@pytest.mark.parametrize("name", ["Phi", "Cohere", "Granite", "Gemma2"])
def test_heads_with_a_bias_a_scale_or_a_cap(name, trie):
    model = build(name)
    model.set_attn_implementation("eager")
    assert is_plain_linear(model) == (name == "Phi")
    expected = by_generate(model, trie)
    state = scorer(model).start_decoding(PROMPTS, MASK)
    assert isinstance(state.head, LinearHead if name == "Phi" else OwnLogits) and state.prompt is not None
    assert_same(search(scorer(model), trie), expected)
    assert_same(search(scorer(model), trie, renormalize=True), by_generate(model, trie, renormalize=True))
    assert_same(
        search(scorer(model, restrict_to_level=True), trie),
        by_generate(model, trie, before=[BlockOnly(PROMPTS.shape[1])]),
    )


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_distributions_over_the_level_only(name, trie):
    model = build(name)
    restricted = scorer(model, restrict_to_level=True)
    expected = by_generate(model, trie, before=[BlockOnly(PROMPTS.shape[1])])
    assert_same(search(restricted, trie), expected)
    state = restricted.start_decoding(PROMPTS, MASK)
    for level in range(len(SIZES)):
        prefix = torch.zeros(3, 2, level, dtype=torch.long)
        probabilities = restricted.score_codes(state, prefix, level).exp()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 2))
    # renormalised over the children, the total cancels
    both = [search(scorer(model, restrict_to_level=flag), trie, renormalize=True) for flag in (False, True)]
    assert_same(both[0], both[1])
    assert_same(both[0], by_generate(model, trie, renormalize=True))


def test_without_a_total_only_the_blocks_rows_are_multiplied(trie):
    model = build("Llama")
    expected = search(scorer(model), trie, renormalize=True)
    state = scorer(model).start_decoding(PROMPTS, MASK)  # tries the head out before it is spoiled
    outside = torch.ones(VOCABULARY, dtype=torch.bool)
    for start, size in zip(OFFSETS, SIZES):
        outside[start : start + size] = False
    model.lm_head.weight[outside] = torch.nan
    assert_same(search(scorer(model), trie, renormalize=True), expected, atol=1e-6)
    assert_same(search(scorer(model, restrict_to_level=True), trie, renormalize=True), expected, atol=1e-5)
    assert state.head.scores(state.first_B1x, 0, total=True).log_probs().isnan().all()


def test_totals_tile_by_tile(trie, monkeypatch):
    for name in ("Llama", "Phi", "Granite"):
        model = build(name)
        whole = search(scorer(model), trie)
        with monkeypatch.context() as patch:
            patch.setattr(causal_head, "_ROWS_CPU", 7)
            patch.setattr(causal_head, "_TOKENS_CPU", 4)
            assert_same(search(scorer(model), trie), whole, atol=1e-5)


def test_log_total_whatever_the_first_logit():
    torch.manual_seed(0)
    logits = 5 * torch.randn(200, 50)
    logits[::4, 0] = -1e9
    logits[1::4, 0] = -torch.inf
    logits[2::4, 0] = 300.0
    for rows in (logits, logits[3::4]):
        expected = rows.double().logsumexp(-1).float()
        torch.testing.assert_close(causal_head.log_total(rows), expected, atol=1e-5, rtol=1e-6)


# ------------------------------------------------------------- one new token per beam


def random_search(decoder, state, seed, steps=4, widths=(1, 7, 12, 3), sizes=SIZES):
    """Beams chosen at random (repeated, dropped, ended); yields (level, prefixes, scores of the cache)."""
    generator = torch.Generator().manual_seed(seed)
    beams, batch = decoder.start_beams(state), len(state.prompt_ids)
    prefix = torch.zeros(batch, 1, 0, dtype=torch.long)
    for level in range(steps):
        yield level, prefix, beams.score(level).log_probs()
        width = widths[(level + 1) % len(widths)]
        parents = torch.randint(0, prefix.shape[1], (batch, width), generator=generator)
        codes = torch.randint(0, sizes[level], (batch, width), generator=generator)
        beams.reorder(parents, codes, level)
        prefix = torch.cat([prefix.gather(1, parents.unsqueeze(-1).expand(-1, -1, level)), codes.unsqueeze(-1)], -1)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
@pytest.mark.parametrize("parts", ["whole", "beams in parts", "users in parts", "both in parts"])
def test_incremental_equals_stateless_and_plain_passes(name, parts, monkeypatch):
    model = build(name)
    model.set_attn_implementation("eager" if name == "Gemma2" else "sdpa")
    decoder = scorer(model)
    state = decoder.start_decoding(PROMPTS, MASK)
    if parts in ("beams in parts", "both in parts"):
        monkeypatch.setattr(causal_lm, "_BEAMS_PER_CALL", 5)
    if parts in ("users in parts", "both in parts"):
        monkeypatch.setattr(causal_lm, "_TOKENS_CPU", 10)
    for seed in range(2):
        for level, prefix, logp in random_search(decoder, state, seed):
            torch.testing.assert_close(logp, decoder.score_codes(state, prefix, level), atol=2e-5, rtol=0)
            for row in range(3):  # one beam, no padding, no cache
                tokens = PROMPTS[row][MASK[row] == 1].tolist()
                tokens += (prefix[row, -1] + torch.tensor(OFFSETS[:level])).long().tolist()
                plain = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
                block = plain[OFFSETS[level] : OFFSETS[level] + SIZES[level]]
                torch.testing.assert_close(logp[row, -1], block, atol=2e-5, rtol=0)


def test_dead_columns_are_dropped_without_a_trace(monkeypatch):
    model = build("Llama")
    levels = 12
    decoder = CausalLMScorer(model, [0] * levels, [VOCABULARY] * levels)
    state = decoder.start_decoding(PROMPTS, MASK)
    options = {"steps": levels, "widths": (3, 9, 2, 4), "sizes": [VOCABULARY] * levels}
    plain = [logp for _, _, logp in random_search(decoder, state, 5, **options)]
    dropped = []
    compact = tree_attention.TreeLayer.compact
    monkeypatch.setattr(tree_attention, "_COMPACT_FROM", 8)
    monkeypatch.setattr(
        tree_attention.TreeLayer,
        "compact",
        lambda layer, columns: (dropped.append(columns.shape[1]), compact(layer, columns)),
    )
    for level, prefix, logp in random_search(decoder, state, 5, **options):
        torch.testing.assert_close(logp, plain[level], atol=1e-5, rtol=0)
        torch.testing.assert_close(logp, decoder.score_codes(state, prefix, level), atol=2e-5, rtol=0)
    assert len(dropped) >= 2 * 3  # several times, in each of 3 layers


def test_ended_beams_take_any_code():
    decoder = scorer(build("Llama"))
    state = decoder.start_decoding(PROMPTS, MASK)
    scores = {}
    for last in (SIZES[0], SIZES[0] + 1000):  # past the end of the codebook
        beams = decoder.start_beams(state)
        beams.reorder(torch.zeros(3, 2, dtype=torch.long), torch.tensor([[2, last]] * 3), 0)
        scores[last] = beams.score(1).log_probs()
        assert scores[last].isfinite().all()
        stateless = decoder.score_codes(state, torch.tensor([[[2], [last]]] * 3), 1)
        torch.testing.assert_close(scores[last], stateless, atol=2e-5, rtol=0)
    alone = decoder.score_codes(state, torch.tensor([[[2]]] * 3), 1)
    torch.testing.assert_close(scores[SIZES[0]][:, :1], alone, atol=2e-5, rtol=0)


def test_searches_of_one_state_do_not_see_each_other(trie):
    decoder = scorer(build("Llama"))
    state = decoder.start_decoding(PROMPTS, MASK)
    before = [tensor.clone() for layer in state.prompt.layers for tensor in layer]
    alone = [[logp for _, _, logp in random_search(decoder, state, seed)] for seed in (1, 2)]
    together = list(zip(random_search(decoder, state, 1), random_search(decoder, state, 2)))
    for level, pair in enumerate(together):
        for number, (_, _, logp) in enumerate(pair):
            assert torch.equal(logp, alone[number][level])
    fresh = decoder.start_decoding(PROMPTS, MASK)
    assert torch.equal(list(random_search(decoder, fresh, 1))[-1][2], alone[0][-1])
    after = [tensor for layer in state.prompt.layers for tensor in layer]
    assert all(torch.equal(one, two) for one, two in zip(before, after))


def test_a_failed_pass_leaves_the_search_as_it_was():
    model = build("Llama")
    decoder = scorer(model)
    state = decoder.start_decoding(PROMPTS, MASK)
    codes = torch.tensor([[0, 1, 2]] * 3)

    def run(fail):
        beams = decoder.start_beams(state)
        beams.reorder(torch.zeros_like(codes), codes, 0)
        if fail:
            handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                beams.score(1)
            handle.remove()
        first = beams.score(1).log_probs()
        assert torch.equal(first, beams.score(1).log_probs())  # asked again, nothing runs again
        beams.reorder(codes, codes, 1)
        return torch.stack([first[..., : SIZES[2]], beams.score(2).log_probs()])

    assert torch.equal(run(fail=True), run(fail=False))


# ------------------------------------------------------------- memory


def test_the_prompt_is_held_once_whatever_the_beams():
    model = build("Llama")
    decoder = scorer(model)
    length, users = 40, 2
    prompts = torch.randint(4, VOCABULARY, (users, length))
    state = decoder.start_decoding(prompts, None)
    per_token = 3 * 2 * 2 * 6 * 4  # layers, keys and values, heads of width 6, float32
    assert state.nbytes == users * length * per_token
    for beams in (1, 5, 50):
        cache = decoder.start_beams(state)
        codes = torch.arange(beams).remainder(3).expand(users, -1)
        for level in range(len(SIZES) - 1):
            cache.reorder(codes.remainder(1 if level == 0 else beams), codes, level)
        cache.score(len(SIZES) - 1)
        assert cache.nbytes == users * beams * (len(SIZES) - 1) * per_token
        assert all(layer.prompt is prompt for layer, prompt in zip(cache.layers, state.prompt.layers))
    assert state.nbytes == users * length * per_token


def test_thousands_of_beams_in_bounded_passes():
    model = build("Llama")
    decoder = scorer(model)
    state = decoder.start_decoding(PROMPTS, MASK)
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    cache = decoder.start_beams(state)
    generator = torch.Generator().manual_seed(0)
    prefix = torch.zeros(3, 1, 0, dtype=torch.long)
    for level, beams in enumerate((6, 300, 2000)):
        parents = torch.randint(0, prefix.shape[1], (3, beams), generator=generator)
        codes = torch.randint(0, SIZES[level], (3, beams), generator=generator)
        cache.reorder(parents, codes, level)
        prefix = torch.cat([prefix.gather(1, parents.unsqueeze(-1).expand(-1, -1, level)), codes.unsqueeze(-1)], -1)
        logp = cache.score(level + 1).log_probs()
    assert max(queries for _, _, queries, _ in shapes) <= causal_lm._BEAMS_PER_CALL
    assert max(keys for *_, keys in shapes) <= PROMPTS.shape[1] + 3 * causal_lm._BEAMS_PER_CALL
    some = torch.randint(0, 2000, (3, 40), generator=generator)
    expected = decoder.score_codes(state, prefix.gather(1, some.unsqueeze(-1).expand(-1, -1, 3)), 3)
    found = logp.gather(1, some.unsqueeze(-1).expand(-1, -1, SIZES[3]))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


# ------------------------------------------------------------- prompts


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2"])
def test_batch_single_and_padding_sides_agree(name, implementation, trie):
    model = build(name)
    model.set_attn_implementation(implementation)
    decoder = scorer(model)
    together = search(decoder, trie, 12)
    for row in range(3):
        ids = PROMPTS[row : row + 1, MASK[row] == 1]
        assert_same(search(decoder, trie, 12, ids, None), [part[row : row + 1] for part in together], atol=1e-5)
    order = MASK.sort(dim=-1, descending=True, stable=True).indices
    right = search(decoder, trie, 12, PROMPTS.gather(1, order), MASK.gather(1, order))
    assert_same(right, together, atol=1e-6)
    padded = search(decoder, trie, 12, torch.nn.functional.pad(PROMPTS, (5, 0)), torch.nn.functional.pad(MASK, (5, 0)))
    assert_same(padded, together, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 6])
def test_reading_up_to_the_last_layers_keys(length, trie, monkeypatch):
    """Stopping there changes nothing, and the last layer works on one token per user only."""
    model = build("Llama")
    ids, mask = PROMPTS[:, -length:], MASK[:, -length:]
    rows = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2].numel()))
    early = scorer(model).start_decoding(ids, mask)
    assert rows[-1] == 3  # (a first call of one token tries out the head)
    assert max(rows) == 3
    monkeypatch.setattr(causal_lm, "_may_stop_early", lambda model: False)
    whole = scorer(model).start_decoding(ids, mask)
    assert rows[-1] == 3 * length
    torch.testing.assert_close(early.first_B1x, whole.first_B1x, atol=1e-5, rtol=0)
    seen = mask.bool()[:, None, :, None]
    for one, two in zip(early.prompt.layers, whole.prompt.layers, strict=True):
        for key in (0, 1):
            torch.testing.assert_close(one[key] * seen, two[key] * seen, atol=1e-5, rtol=0)


def test_models_outside_the_scheme_take_full_passes(trie):
    model = build("Mistral")
    decoder = scorer(model)
    short, long = PROMPTS[:, -5:], torch.cat([PROMPTS, PROMPTS[:, -4:]], dim=1)  # 5 + 4 <= 12 < 10 + 4
    long[long == 0] = 8
    assert isinstance(decoder.start_beams(decoder.start_decoding(short, MASK[:, -5:])), TreeBeams)
    assert_same(
        search(decoder, trie, ids=short, mask=MASK[:, -5:]), by_generate(model, trie, ids=short, mask=MASK[:, -5:])
    )
    ones = torch.ones_like(long)
    assert isinstance(decoder.start_beams(decoder.start_decoding(long, ones)), StatelessBeams)
    assert_same(search(decoder, trie, ids=long, mask=ones), by_generate(model, trie, ids=long, mask=ones))
    restricted = scorer(model, restrict_to_level=True)
    assert_same(
        search(restricted, trie, ids=long, mask=ones),
        by_generate(model, trie, ids=long, mask=ones, before=[BlockOnly(10)]),
    )


# ------------------------------------------------------------- dtypes, adapters, titles


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bf16(implementation, trie):
    model = build("Llama", initializer_range=0.1)
    model.set_attn_implementation(implementation)
    exact_codes, exact = search(scorer(model), trie)
    model = model.bfloat16()
    rounded = search(scorer(build("Llama", initializer_range=0.1).bfloat16().float()), trie)
    for codes, scores in (search(scorer(model), trie), by_generate(model, trie)):
        for row in range(3):
            found = {tuple(code): score for code, score in zip(codes[row].tolist(), scores[row].tolist())}
            for code, score in zip(rounded[0][row].tolist(), rounded[1][row].tolist()):
                assert abs(found[tuple(code)] - score) < 0.1  # four log-probabilities of 8 bits each
    assert exact.dtype == torch.float32 and search(scorer(model), trie)[1].dtype == torch.float32
    assert exact_codes.shape == rounded[0].shape


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "down_proj", "lm_head"]])
def test_lora(targets, trie):
    import peft

    model = build("Llama")
    plain = search(scorer(model), trie)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, config).eval()
    state = scorer(wrapped).start_decoding(PROMPTS, MASK)
    assert isinstance(state.head, OwnLogits if "lm_head" in targets else LinearHead)
    adapted = search(scorer(wrapped), trie)
    assert (adapted[1] - plain[1]).abs().max() > 0.1
    assert_same(adapted, by_generate(wrapped, trie))
    with wrapped.disable_adapter():
        assert_same(search(scorer(wrapped), trie), plain, atol=1e-5)
    assert_same(search(scorer(wrapped.merge_and_unload()), trie), adapted)


def test_prompt_tuning_takes_full_passes(trie):
    import peft

    model = build("Llama")
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=24)
    ).eval()
    decoder = scorer(wrapped)
    state = decoder.start_decoding(PROMPTS[1:2], MASK[1:2])
    assert state.prompt is None
    prefix = torch.tensor([[[1, 2], [0, 4]]])
    logp = decoder.score_codes(state, prefix, 2)
    virtual = wrapped.get_prompt(1)
    for beam in range(2):
        tokens = torch.cat([PROMPTS[1], prefix[0, beam] + torch.tensor(OFFSETS[:2])])
        embedded = torch.cat([virtual, model.model.embed_tokens(tokens).unsqueeze(0)], dim=1)
        expected = model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)[OFFSETS[2] : OFFSETS[2] + SIZES[2]]
        torch.testing.assert_close(logp[0, beam], expected, atol=1e-5, rtol=0)


def test_titles_of_tokens_of_any_length():
    """Codes are token ids (offsets 0, the whole vocabulary), titles end where they end."""
    rng = np.random.default_rng(3)
    titles = {tuple(rng.integers(4, VOCABULARY, rng.integers(2, 7)).tolist()) for _ in range(40)}
    titles = sorted((*title, 1) for title in titles)  # the end token is a title's last token
    table = np.full((len(titles), 7), -1)
    for row, title in enumerate(titles):
        table[row, : len(title)] = title
    trie = ItemTrie.from_codes(table, [VOCABULARY] * 7)
    assert trie.has_ends
    model = build("Llama")
    decoder = CausalLMScorer(model, [0] * 7, [VOCABULARY] * 7)
    state = decoder.start_decoding(PROMPTS, MASK)
    leaves, scores = trie_beam_search(decoder, state, trie, len(titles), batch_size=3)
    for row in range(3):
        prompt = PROMPTS[row][MASK[row] == 1].tolist()
        for leaf, score in zip(leaves[row].tolist(), scores[row].tolist()):
            title = titles[int(trie.items_of_leaf(leaf)[0])]
            logp = model(torch.tensor([[*prompt, *title]])).logits[0].log_softmax(-1)
            expected = sum(float(logp[len(prompt) - 1 + step, token]) for step, token in enumerate(title))
            assert abs(score - expected) < 1e-4
    assert (leaves >= 0).all() and all(len(set(row)) == len(titles) for row in leaves.tolist())
