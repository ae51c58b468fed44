"""Encoder-decoder engines: beams that move score as the model's own forward, `recommend` answers as `generate` does."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
import transformers
from transformers import LogitsProcessorList
from transformers.models.t5.modeling_t5 import T5Attention

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding import encoder_decoder, t5, t5_layers
from hf_genrec.generation.decoding.beam_cache import StatelessBeams
from hf_genrec.generation.decoding.encoder_decoder import EncodedState, EncoderDecoderBeams, EncoderDecoderScorer
from hf_genrec.generation.decoding.t5 import T5Beams, T5State, fits
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor, real_beams
from hf_genrec.generation.recommend import recommend
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES = (6, 5, 4)
LEVELS = len(SIZES)
HISTORIES = [["item-3"], ["item-5", "item-6", "item-7", "item-1"], ["item-9", "item-0"]]
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3, "decoder_start_token_id": 0}
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
T5 |= {"initializer_factor": 2.0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
TIED = {**T5, "feed_forward_proj": "gated-gelu"}
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
FAMILY = {
    "T5": ("T5Config", "T5ForConditionalGeneration", T5),
    "T5 v1.1": ("T5Config", "T5ForConditionalGeneration", GATED),
    "mT5": ("MT5Config", "MT5ForConditionalGeneration", GATED),
    "umT5": ("UMT5Config", "UMT5ForConditionalGeneration", TIED),
}
OTHERS = {
    "BART": ("BartConfig", "BartForConditionalGeneration", BART),
    "mBART": ("MBartConfig", "MBartForConditionalGeneration", BART),
    "Marian": ("MarianConfig", "MarianMTModel", BART),
    "Pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", BART),
}
MODELS = {**FAMILY, **OTHERS}


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(120, 40, replace=False), SIZES), axis=1)
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(40)], codes, SIZES)


def build(name, tokenizer, seed=1):
    torch.manual_seed(seed)
    config, model, sizes = MODELS[name]
    config = getattr(transformers, config)(vocab_size=len(tokenizer) + 7, **SPECIAL, **sizes)
    config.tie_word_embeddings = sizes is not GATED  # the family's configurations ignore it as an argument
    model = getattr(transformers, model)(config).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "relative_attention_bias" in weight_name or "layer_norm" in weight_name:
                weight.copy_(torch.randn_like(weight) * 0.5 + 1)  # else nothing would notice that they are left out
        if name in FAMILY and not model.config.tie_word_embeddings:
            model.lm_head.weight.mul_(0.1)  # log-probabilities of a few units, as those of the others
    return model


def scorer_of(model, tokenizer):
    return EncoderDecoderScorer(model, tokenizer.level_offsets, SIZES)


def encoded(tokenizer, histories=HISTORIES):
    """Histories with the padding at the end, where absolute positions want it."""
    inputs = dict(tokenizer.encode_histories(histories, return_tensors="pt"))
    order = inputs["attention_mask"].sort(dim=-1, descending=True, stable=True).indices
    return {name: value.gather(1, order) for name, value in inputs.items()}


def forward_scores(model, tokenizer, inputs, prefix_BKl):
    """Log-probabilities (B, K, C) of the next codes from the model's ordinary forward pass, every row on its own."""
    batch, beams, level = prefix_BKl.shape
    offsets = torch.tensor(tokenizer.level_offsets)
    ids = torch.nn.functional.pad(prefix_BKl + offsets[:level], (1, 0)).view(batch * beams, level + 1)
    rows = {name: value.repeat_interleave(beams, 0) for name, value in inputs.items()}
    logits = model(**rows, decoder_input_ids=ids).logits[:, -1].float()
    return logits.log_softmax(-1)[:, offsets[level] :][:, : SIZES[level]].view(batch, beams, -1)


def by_generate(model, tokenizer, inputs, num_beams, k):
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
        logits_processor=LogitsProcessorList([ItemTrieLogitsProcessor(tokenizer, 1)]),
    )
    batch = len(inputs["input_ids"])
    scores = output.sequences_scores.view(batch, k)
    real = real_beams(output.sequences_scores).view(batch, k)
    answers = output.sequences[:, 1 : 1 + LEVELS].reshape(batch, k, LEVELS)
    return [
        ([item[0] for item in tokenizer.token_ids_to_items(row[mask].flatten().tolist())], values[mask].tolist())
        for row, values, mask in zip(answers, scores, real)
    ]


def assert_same(result, expected, atol=1e-4):
    for row, (items, scores) in zip(result, expected, strict=True):
        assert [entry.item_id for entry in row] == items
        np.testing.assert_allclose([entry.score for entry in row], scores, atol=atol)


def as_lists(result):
    return [([entry.item_id for entry in row], [entry.score for entry in row]) for row in result]


def random_moves(batch, widths, generator):
    """Parents and codes of beams that move, one pair per level but the last; some beams meet in one parent."""
    moves, beams = [], 1
    for level, width in enumerate(widths):
        parents = torch.randint(beams, (batch, width), generator=generator)
        moves.append((parents, torch.randint(SIZES[level], (batch, width), generator=generator)))
        beams = width
    return moves


def follow(prefix_BKl, parents, codes):
    kept = prefix_BKl.gather(1, parents.unsqueeze(-1).expand(-1, -1, prefix_BKl.shape[-1]))
    return torch.cat([kept, codes.unsqueeze(-1)], dim=-1)


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_moving_beams_score_as_the_forward_pass(name, tokenizer):
    model, inputs = build(name, tokenizer), encoded(tokenizer)
    scorer = scorer_of(model, tokenizer)
    state = scorer.start_decoding(**inputs)
    generator = torch.Generator().manual_seed(0)
    for widths in [(1, 1), (7, 3), (3, 11)]:
        beams, prefix = scorer.start_beams(state), torch.zeros(3, 1, 0, dtype=torch.long)
        assert isinstance(beams, T5Beams if name in FAMILY else EncoderDecoderBeams)
        moves = random_moves(3, widths, generator)
        for level in range(LEVELS):
            expected = forward_scores(model, tokenizer, inputs, prefix)
            scores = beams.score(level)
            torch.testing.assert_close(scores.log_probs(), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(scorer.score_codes(state, prefix, level), expected, atol=1e-5, rtol=0)
            unscaled = beams.score(level, False).log_probs()
            torch.testing.assert_close(unscaled.log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=0)
            if level + 1 < LEVELS:
                beams.reorder(*moves[level], level)
                prefix = follow(prefix, *moves[level])


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("num_beams", "k"), [(40, 40), (7, 5)])
def test_same_items_and_scores_as_generate(name, num_beams, k, tokenizer):
    model = build(name, tokenizer)
    expected = by_generate(model, tokenizer, encoded(tokenizer), num_beams, k)
    assert expected[0] != expected[1] != expected[2]  # the histories matter
    result = recommend(model, HISTORIES, tokenizer=tokenizer, k=k, num_beams=num_beams, exclude_seen=False)
    assert_same(result, expected)


@pytest.mark.parametrize("name", list(MODELS))
def test_alone_as_in_a_batch_on_either_side_of_the_padding(name, tokenizer):
    model = build(name, tokenizer)
    together = as_lists(recommend(model, HISTORIES, tokenizer=tokenizer, k=30, num_beams=40))
    for batch_size in (1, 2):
        alone = recommend(model, HISTORIES, tokenizer=tokenizer, k=30, num_beams=40, batch_size=batch_size)
        assert_same(alone, together)
    left = dict(tokenizer.encode_histories(HISTORIES, return_tensors="pt"))
    assert left["attention_mask"][0].tolist() != encoded(tokenizer)["attention_mask"][0].tolist()
    for inputs in (left, encoded(tokenizer)):
        assert_same(recommend(model, **inputs, tokenizer=tokenizer, k=30, num_beams=40), together)


@pytest.mark.parametrize("name", list(FAMILY))
@torch.no_grad()
def test_many_rows_go_another_way_to_the_same_numbers(name, tokenizer):
    """From 128 rows on another matrix product is used; an encoder of 12 x 17 tokens and 4 x 50 beams are past that."""
    model = build(name, tokenizer)
    ids = torch.randint(4, len(tokenizer), (12, 17), generator=torch.Generator().manual_seed(0))
    ids[3:, :5] = 0
    mask = (ids > 0).long()
    ours = t5_layers.encode(model.encoder, ids, mask)
    theirs = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    inputs = {"input_ids": ids[:4], "attention_mask": mask[:4]}
    scorer = scorer_of(model, tokenizer)
    beams, prefix = scorer.start_beams(scorer.start_decoding(**inputs)), torch.zeros(4, 1, 0, dtype=torch.long)
    for level, move in enumerate(random_moves(4, (50, 60), torch.Generator().manual_seed(1))):
        beams.reorder(*move, level)
        prefix = follow(prefix, *move)
    expected = forward_scores(model, tokenizer, inputs, prefix)
    torch.testing.assert_close(beams.score(2).log_probs(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", list(FAMILY))
@torch.no_grad()
def test_users_without_history(name, tokenizer):
    model = build(name, tokenizer)
    scorer = scorer_of(model, tokenizer)
    nothing = torch.zeros(2, 0, dtype=torch.long)
    padding = torch.zeros(2, 5, dtype=torch.long)
    one = scorer.start_beams(scorer.start_decoding(nothing, nothing)).score(0).log_probs()
    two = scorer.start_beams(scorer.start_decoding(padding, padding)).score(0).log_probs()
    expected = model(input_ids=padding, attention_mask=padding, decoder_input_ids=padding[:, :1]).logits[:, -1]
    expected = expected.log_softmax(-1)[:, None, tokenizer.level_offsets[0] :][..., : SIZES[0]]
    assert bool(one.isfinite().all())
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, expected, atol=1e-5, rtol=0)
    mixed = recommend(model, [["item-3"], []], tokenizer=tokenizer, k=20, num_beams=40)
    alone = recommend(model, [[]], tokenizer=tokenizer, k=20, num_beams=40)
    assert_same(mixed[1:], as_lists(alone))


@pytest.mark.parametrize("name", ["T5", "T5 v1.1", "BART"])
@pytest.mark.parametrize("wide_in_float32", [False, True])
def test_bfloat16(name, wide_in_float32, tokenizer):
    model = build(name, tokenizer)
    exact = recommend(model, HISTORIES, tokenizer=tokenizer, k=10, num_beams=40, exclude_seen=False)
    half = copy.deepcopy(model).bfloat16()
    if wide_in_float32:  # as transformers loads the family in half precision
        for name, module in half.named_modules():
            if name.endswith(".wo"):
                module.float()
    rough = recommend(half, HISTORIES, tokenizer=tokenizer, k=10, num_beams=40, exclude_seen=False)
    expected = by_generate(half, tokenizer, encoded(tokenizer), 40, 10)
    for one, two, (_, scores) in zip(exact, rough, expected):
        assert len({e.item_id for e in one} & {e.item_id for e in two}) >= 7  # bfloat16 may swap neighbours
        assert abs(two[0].score - one[0].score) < 0.3 and abs(two[0].score - scores[0]) < 0.3


@pytest.mark.parametrize("name", ["T5", "BART"])
@torch.no_grad()
def test_two_searches_from_one_state(name, tokenizer):
    model, inputs = build(name, tokenizer), encoded(tokenizer)
    scorer = scorer_of(model, tokenizer)
    state = scorer.start_decoding(**inputs)
    generator = torch.Generator().manual_seed(3)
    plans = [random_moves(3, widths, generator) for widths in [(4, 6), (9, 2)]]
    one_by_one = []
    for plan in plans:
        beams = scorer.start_beams(state)
        for level, move in enumerate(plan):
            beams.reorder(*move, level)
        one_by_one.append(beams.score(2).log_probs())
    searches = [scorer.start_beams(state) for _ in plans]
    for level in range(2):
        for beams, plan in zip(searches, plans):
            beams.score(level)
            beams.reorder(*plan[level], level)
    for beams, expected in zip(searches, one_by_one):
        torch.testing.assert_close(beams.score(2).log_probs(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["T5", "T5 v1.1", "BART"])
@pytest.mark.parametrize("how", ["optimizer", "data", "load_state_dict", "new parameter"])
def test_changed_weights_are_seen(name, how, tokenizer):
    model, other = build(name, tokenizer), build(name, tokenizer, seed=2)
    before = recommend(model, HISTORIES, tokenizer=tokenizer, k=30)
    if how == "optimizer":
        model(**encoded(tokenizer), labels=torch.full((3, 3), 5)).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.05).step()
    elif how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    else:
        for (owner, name), (new, _) in zip(_weights(model), _weights(other), strict=True):
            if how == "data":
                owner[name].data = new[name].detach().clone()
            else:
                owner[name] = torch.nn.Parameter(new[name].detach().clone())
    after = recommend(model, HISTORIES, tokenizer=tokenizer, k=30, num_beams=40, exclude_seen=False)
    assert as_lists(after) != as_lists(before)
    assert_same(after, by_generate(model, tokenizer, encoded(tokenizer), 40, 30))


def _weights(model):
    return [
        (module._parameters, name)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
        for name in module._parameters
        if module._parameters[name] is not None
    ]


@torch.no_grad()
def test_family_keeps_cross_keys_once_per_user(tokenizer):
    model, inputs = build("T5", tokenizer), encoded(tokenizer)
    scorer = scorer_of(model, tokenizer)
    state = scorer.start_decoding(**inputs)
    assert isinstance(state, T5State)
    length = inputs["input_ids"].shape[1]
    assert {tuple(t.shape) for t in [*state.keys, *state.values]} == {(3, 3, length, 8)}
    beams = scorer.start_beams(state)
    for level, move in enumerate(random_moves(3, (30, 30), torch.Generator().manual_seed(0))):
        beams.reorder(*move, level)
    beams.score(2)
    # own keys: of the start token once per user, of the codes once per beam, as computed
    assert [[tuple(k.shape) for k, _ in layers] for layers in beams.own] == [[(3, 24)] * 2] + [[(90, 24)] * 2] * 2
    assert all(storage.untyped_storage().nbytes() <= 90 * 24 * 4 for layers in beams.own for storage, _ in layers)


@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_others_share_cross_keys_between_beams(name, implementation, tokenizer, monkeypatch):
    model, inputs = build(name, tokenizer), encoded(tokenizer)
    model.set_attn_implementation(implementation)
    rows = []
    sdpa = encoder_decoder.sdpa_attention_forward

    def spy(module, query, key, value, *args, **options):
        rows.append((key.shape[0], key.shape[2]))
        return sdpa(module, query, key, value, *args, **options)

    monkeypatch.setattr(encoder_decoder, "sdpa_attention_forward", spy)
    scorer = scorer_of(model, tokenizer)
    state = scorer.start_decoding(**inputs)
    assert isinstance(state, EncodedState) and not rows
    beams = scorer.start_beams(state)
    for level, move in enumerate(random_moves(3, (30, 30), torch.Generator().manual_seed(0))):
        beams.reorder(*move, level)
    beams.score(2)
    length = inputs["input_ids"].shape[1]
    assert sorted(set(rows)) == [(3, length), (90, 2), (90, 3)]  # cross keys of 3 users; own keys of 90 beams
    assert scorer.shares_cross and not state.per_beam
    assert {config._attn_implementation for config in scorer._configs} == {implementation}


@torch.no_grad()
def test_attention_that_bypasses_the_interface_gets_copies(tokenizer):
    model, inputs = build("BART", tokenizer), encoded(tokenizer)
    expected = as_lists(recommend(model, HISTORIES, tokenizer=tokenizer, k=30))
    for layer in model.get_decoder().layers:
        attention = layer.encoder_attn

        def forward(x, attention=attention, key_value_states=None, past_key_values=None, attention_mask=None, **_):
            shape = (*x.shape[:2], attention.num_heads, attention.head_dim)
            cache = past_key_values.cross_attention_cache
            if not past_key_values.is_updated.get(attention.layer_idx):
                states = (attention.k_proj(key_value_states), attention.v_proj(key_value_states))
                shapes = (*key_value_states.shape[:2], *shape[2:])
                cache.update(*(s.view(shapes).transpose(1, 2) for s in states), attention.layer_idx)
                past_key_values.is_updated[attention.layer_idx] = True
            keys, values = cache.layers[attention.layer_idx].keys, cache.layers[attention.layer_idx].values
            query = attention.q_proj(x).view(shape).transpose(1, 2) * attention.scaling
            weights = (query.unsqueeze(-2) * keys.unsqueeze(2)).sum(-1)  # would broadcast one user over its beams
            weights = weights.masked_fill(~attention_mask, -torch.inf).softmax(-1)
            return attention.out_proj((weights @ values).transpose(1, 2).reshape(x.shape)), None

        attention.forward = forward
    scorer = scorer_of(model, tokenizer)
    state = scorer.start_decoding(**inputs)
    beams = scorer.start_beams(state)
    beams.reorder(*random_moves(3, (4,), torch.Generator().manual_seed(0))[0], 0)
    beams.score(1)
    assert not scorer.shares_cross and state.per_beam[4][0][0].shape[0] == 12
    assert model.config._attn_implementation == "sdpa"
    assert_same(recommend(model, HISTORIES, tokenizer=tokenizer, k=30), expected)


def test_attention_implementation_comes_back_after_an_error(tokenizer):
    model = build("BART", tokenizer)
    scorer = scorer_of(model, tokenizer)
    with pytest.raises(ZeroDivisionError), encoder_decoder._shared_attention(scorer._configs):
        assert model.config._attn_implementation == encoder_decoder._SHARED
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa" and not encoder_decoder._borrowed


def test_threads_that_share_a_model(tokenizer):
    model = build("BART", tokenizer)
    expected = as_lists(recommend(model, HISTORIES, tokenizer=tokenizer, k=30))
    results, errors = [], []

    def work():
        try:
            results.extend(recommend(model, HISTORIES, tokenizer=tokenizer, k=30) for _ in range(4))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 12
    for result in results:
        assert_same(result, expected)
    assert model.config._attn_implementation == "sdpa" and not encoder_decoder._borrowed


@torch.no_grad()
def test_who_fits_the_family_engine(tokenizer):
    model, inputs = build("T5", tokenizer), encoded(tokenizer)
    expected = as_lists(recommend(model, HISTORIES, tokenizer=tokenizer, k=30))
    assert fits(model) and not fits(build("BART", tokenizer))

    class Mine(transformers.T5ForConditionalGeneration):
        pass

    assert not fits(Mine(model.config))  # its forward may be another
    hook = model.decoder.block[1].register_forward_hook(lambda module, args, output: None)
    assert not fits(model)
    scorer = scorer_of(model, tokenizer)
    state = scorer.start_decoding(**inputs)
    assert isinstance(state, EncodedState) and scorer.start_beams(state).score(0) is state.first
    assert_same(recommend(model, HISTORIES, tokenizer=tokenizer, k=30), expected)
    hook.remove()
    assert fits(model)

    calls = []
    decoder = t5.T5Decoder(model, tokenizer.level_offsets, SIZES, 0)
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    hooked = decoder.start_beams(decoder.start_decoding(**inputs))
    assert calls == [1] and isinstance(hooked, StatelessBeams)
    hook.remove()
    plain = t5.T5Decoder(model, tokenizer.level_offsets, SIZES, 0)
    plain = plain.start_beams(plain.start_decoding(**inputs))
    torch.testing.assert_close(hooked.score(0).log_probs(), plain.score(0).log_probs(), atol=1e-5, rtol=0)


def test_lora_layers_are_run(tokenizer):
    peft = pytest.importorskip("peft")
    model = build("T5", tokenizer)
    plain = as_lists(recommend(model, HISTORIES, tokenizer=tokenizer, k=30, exclude_seen=False))
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wi"], init_lora_weights=False, r=4)
    adapted = peft.get_peft_model(model, config).eval()
    assert fits(adapted)
    result = as_lists(recommend(adapted, HISTORIES, tokenizer=tokenizer, k=30, num_beams=40, exclude_seen=False))
    assert result != plain
    merged = adapted.merge_and_unload().eval()
    expected = by_generate(merged, tokenizer, encoded(tokenizer), 40, 30)
    for (items, scores), (wanted, wanted_scores) in zip(result, expected):
        assert items == wanted
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-4)


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_blocks_of_rows_leave_no_trace(name, tokenizer, monkeypatch):
    model = build(name, tokenizer)
    whole = as_lists(recommend(model, HISTORIES, tokenizer=tokenizer, k=30, num_beams=30))
    monkeypatch.setattr(t5, "_LOGITS_PER_BLOCK", 150)
    monkeypatch.setattr(t5, "_ROWS_PER_CALL", 7)
    monkeypatch.setattr(encoder_decoder, "_ROWS_PER_CALL", 50)  # one user at a time
    assert_same(recommend(model, HISTORIES, tokenizer=tokenizer, k=30, num_beams=30), whole)


@pytest.mark.parametrize("name", ["T5", "BART"])
@torch.no_grad()
def test_levels_in_order_and_ended_beams(name, tokenizer):
    model, inputs = build(name, tokenizer), encoded(tokenizer)
    scorer = scorer_of(model, tokenizer)
    beams = scorer.start_beams(scorer.start_decoding(**inputs))
    with pytest.raises(IncompatibleComponentsError, match="hold 0 codes, level 2"):
        beams.score(2)
    codes = torch.tensor([[2, SIZES[0]]] * 3)  # the second beam has ended
    beams.reorder(torch.zeros(3, 2, dtype=torch.long), codes, 0)
    scores = beams.score(1).log_probs()
    expected = forward_scores(model, tokenizer, inputs, torch.full((3, 1, 1), 2))
    torch.testing.assert_close(scores[:, :1], expected, atol=1e-5, rtol=0)
    with pytest.raises(IncompatibleComponentsError, match="level 2"):
        beams.score(2)


@pytest.mark.parametrize("length", [1, 2, 7, 40, 300])
@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 12)])
def test_buckets_are_those_of_the_family(length, count, farthest):
    distance = torch.arange(1 - length, length)
    for two_sided in (False, True):
        expected = T5Attention._relative_position_bucket(distance, two_sided, count, farthest)
        ours = t5_layers._buckets(length, two_sided, count, farthest, torch.device("cpu"))
        assert torch.equal(ours, expected[: len(ours)]) and len(ours) == (2 * length - 1 if two_sided else length)
