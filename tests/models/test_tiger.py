"""TIGER: plain T5 when switched off, one distribution per level when on, right gradients, decoding paths that agree."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.dropout import PooledDropout
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

SIZES = (5, 4, 6)
TINY = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 2}


def catalogue(num_items: int = 40, **kwargs) -> ItemTokenizer:
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), -1).reshape(-1, 3)
    codes = generator.permutation(grid)[:num_items]
    return ItemTokenizer.from_codes([f"i{index}" for index in range(num_items)], codes, SIZES, **kwargs)


TOKENIZER = catalogue()
HISTORIES = [["i3", "i1", "i4", "i1", "i5"], ["i9"], [], ["i6", "i5", "i30"]]


def small_model(seed: int = 0, **kwargs) -> TigerForConditionalGeneration:
    torch.manual_seed(seed)
    model = TigerForConditionalGeneration(TigerConfig.from_tokenizer(TOKENIZER, **{**TINY, **kwargs})).eval()
    with torch.no_grad():  # far from uniform, so that nothing agrees by being small
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0 if "relative_attention_bias" in name else 1.5)
    return model


def batch_of(histories=HISTORIES, tokenizer=TOKENIZER) -> dict:
    return dict(tokenizer.encode_histories(histories, return_tensors="pt"))


def targets_of(indices) -> torch.Tensor:
    return torch.tensor(TOKENIZER.item_token_table[list(indices)])


def exact_scores(model, histories=HISTORIES) -> torch.Tensor:
    """log P(item | history) of all items (B, N) from the ordinary forward pass, one teacher-forced row per pair."""
    batch, labels = batch_of(histories), targets_of(range(TOKENIZER.num_items))
    number = len(labels)
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"].repeat_interleave(number, 0),
            attention_mask=batch["attention_mask"].repeat_interleave(number, 0),
            labels=labels.repeat(len(histories), 1),
        ).logits
    steps = logits.log_softmax(-1).gather(2, labels.repeat(len(histories), 1)[..., None])
    return steps.sum((1, 2)).view(len(histories), number)


def test_defaults_are_the_paper_sizes():
    config = TigerConfig()
    assert (config.num_layers, config.num_decoder_layers, config.d_model, config.d_ff) == (4, 4, 128, 1024)
    assert (config.num_heads, config.d_kv, config.dropout_rate, config.dense_act_fn) == (6, 64, 0.1, "relu")
    assert (config.num_levels, config.vocab_size) == (4, 4 + 4 * 256)


@pytest.mark.parametrize("training", [False, True])
def test_unrestricted_is_t5_bit_for_bit(training):
    config = TigerConfig.from_tokenizer(TOKENIZER, restrict_to_level=False, pooled_dropout=not training, **TINY)
    stock_config = T5Config(
        vocab_size=config.vocab_size, decoder_start_token_id=0, dropout_rate=0.1, feed_forward_proj="relu", **TINY
    )
    tiger = TigerForConditionalGeneration(config).train(training)
    stock = T5ForConditionalGeneration(stock_config).train(training)
    stock.load_state_dict(tiger.state_dict())
    batch, labels = batch_of(), targets_of([0, 1, 2, 3])
    torch.manual_seed(1)
    ours = tiger(**batch, labels=labels)
    torch.manual_seed(1)
    theirs = stock(**batch, labels=labels)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, mine), (_, other) in zip(tiger.named_parameters(), stock.named_parameters()):
        assert torch.equal(mine.grad, other.grad), name
    if not training:
        options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(tiger.generate(**batch, **options), stock.generate(**batch, **options))


def test_weights_start_at_the_scale_of_t5():
    model = TigerForConditionalGeneration(TigerConfig(d_model=64, d_kv=16, d_ff=512, num_heads=4, vocab_size=2000))
    attention, feed_forward = model.decoder.block[0].layer[1].EncDecAttention, model.encoder.block[0].layer[1]
    for weight, std in (
        (model.shared.weight, 1.0),
        (attention.q.weight, (64 * 16) ** -0.5),
        (attention.k.weight, 64**-0.5),
        (feed_forward.DenseReluDense.wo.weight, 512**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.lm_head.weight is model.shared.weight and model.config.scale_decoder_outputs


def test_each_position_has_the_distribution_of_its_level():
    model, plain = small_model(), small_model(restrict_to_level=False)
    labels = torch.cat([targets_of([0, 1, 2, 3]), torch.ones(4, 1, dtype=torch.long)], dim=1)
    logits, free = model(**batch_of(), labels=labels).logits, plain(**batch_of(), labels=labels).logits
    for level, (offset, size) in enumerate(zip(TOKENIZER.level_offsets, SIZES)):
        block = slice(offset, offset + size)
        assert torch.equal(logits[:, level, block], free[:, level, block])
        probabilities = logits[:, level].softmax(-1)
        assert torch.allclose(probabilities[:, block].sum(-1), torch.ones(4), atol=1e-6)
        assert (probabilities.sum(-1) - probabilities[:, block].sum(-1)).abs().max() < 1e-6
    assert torch.equal(logits[:, 3].log_softmax(-1)[:, 1], torch.zeros(4))  # only the end token can follow


def test_loss_is_the_mean_over_codes_of_block_cross_entropy():
    model, plain = small_model(), small_model(restrict_to_level=False)
    labels = targets_of([7, 8, 9, 10])
    free = plain(**batch_of(), labels=labels).logits
    expected = [
        nn.functional.cross_entropy(free[:, level, offset : offset + size], labels[:, level] - offset)
        for level, (offset, size) in enumerate(zip(TOKENIZER.level_offsets, SIZES))
    ]
    loss = model(**batch_of(), labels=labels).loss
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-6)
    assert torch.allclose(model(**batch_of(), labels=labels, num_items_in_batch=24).loss, loss / 2, atol=1e-6)
    assert model(**batch_of(), labels=labels.t().contiguous().t()).loss == loss  # labels need not be contiguous


def test_cached_positions_have_the_right_level():
    model = small_model()
    decoder_input_ids = model._shift_right(torch.cat([targets_of([0, 1, 2, 3]), torch.ones(4, 1).long()], dim=1))
    whole = model(**batch_of(), decoder_input_ids=decoder_input_ids).logits
    cache, encoder_outputs = None, None
    for position in range(4):
        step = model(
            **batch_of(),
            decoder_input_ids=decoder_input_ids[:, position : position + 1],
            past_key_values=cache,
            encoder_outputs=encoder_outputs,
            use_cache=True,
        )
        cache, encoder_outputs = step.past_key_values, (step.encoder_last_hidden_state,)
        assert torch.allclose(step.logits[:, 0], whole[:, position], atol=1e-5)


class _Rows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for index in range(8):
            length = int(torch.randint(1, 5, (1,), generator=generator))
            items = torch.randint(0, 40, (length,), generator=generator)
            ids = targets_of(items.tolist()).reshape(-1)
            padded = torch.cat([torch.zeros(12 - len(ids), dtype=torch.long), ids])
            labels = targets_of([index])[0]
            if index % 3 == 0:
                labels = labels.masked_fill(torch.tensor([False, False, True]), -100)  # uneven counts per micro-batch
            self.rows.append({"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("restrict_to_level", [False, True])
def test_gradient_accumulation_does_not_change_the_gradient(tmp_path, restrict_to_level):
    results = {}
    for accumulation in (1, 4):
        model = small_model(restrict_to_level=restrict_to_level, dropout_rate=0.0)
        before = {name: value.clone() for name, value in model.named_parameters()}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accumulation)),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=_Rows())
        trainer.train()
        step = {name: before[name] - value.detach() for name, value in model.named_parameters()}
        results[accumulation] = step, trainer.state.log_history[0]["loss"]
    for name, gradient in results[1][0].items():
        assert torch.allclose(results[4][0][name], gradient, atol=1e-6, rtol=1e-4), name
    assert results[4][1] == pytest.approx(results[1][1], abs=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("restrict_to_level", [True, False])
def test_score_codes_equals_the_stock_forward(attention, restrict_to_level):
    model = small_model(restrict_to_level=restrict_to_level)
    model.set_attn_implementation(attention)
    codes = torch.tensor(TOKENIZER.codes, dtype=torch.long)
    labels = targets_of(range(40))
    batch = batch_of()
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"].repeat_interleave(40, 0),
            attention_mask=batch["attention_mask"].repeat_interleave(40, 0),
            labels=labels.repeat(4, 1),
        ).logits.view(4, 40, 3, -1)
        state = model.start_decoding(**batch)
        for level, (offset, size) in enumerate(zip(TOKENIZER.level_offsets, SIZES)):
            prefix = codes[None, :, :level].expand(4, -1, -1)
            scores = model.score_codes(state, prefix, level)
            expected = logits[:, :, level].log_softmax(-1)[..., offset : offset + size]
            assert torch.allclose(scores, expected, atol=1e-5), level
            if restrict_to_level:
                assert torch.allclose(scores.exp().sum(-1), torch.ones(4, 40), atol=1e-5)
        with pytest.raises(IncompatibleComponentsError, match="level 1 needs prefixes of 1"):
            model.score_codes(state, codes[None, :, :2].expand(4, -1, -1), 1)


@pytest.mark.parametrize("restrict_to_level", [True, False])
@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
@torch.no_grad()
def test_beams_that_move_score_as_score_codes(restrict_to_level, proj):
    model = small_model(restrict_to_level=restrict_to_level, feed_forward_proj=proj)
    state, generator = model.start_decoding(**batch_of()), torch.Generator().manual_seed(0)
    again = model.start_from_encoder(model.encoder(**batch_of()).last_hidden_state, batch_of()["attention_mask"])
    for widths in [(1, 1), (9, 4), (3, 50)]:
        searches, prefix = [model.start_beams(state), model.start_beams(again)], torch.zeros(4, 1, 0, dtype=torch.long)
        for level, size in enumerate(SIZES):
            expected = model.score_codes(state, prefix, level)
            for beams in searches:
                assert torch.allclose(beams.score(level).log_probs(), expected, atol=1e-5)
            if level + 1 == len(SIZES):
                break
            parents = torch.randint(prefix.shape[1], (4, widths[level]), generator=generator)
            codes = torch.randint(size, (4, widths[level]), generator=generator)
            for beams in searches:
                beams.reorder(parents, codes, level)
            kept = prefix.gather(1, parents[..., None].expand(-1, -1, level))
            prefix = torch.cat([kept, codes[..., None]], dim=-1)


def test_beams_see_an_optimizer_step():
    model = small_model()
    prefix = torch.zeros(4, 1, 0, dtype=torch.long)
    score = lambda: model.start_beams(model.start_decoding(**batch_of())).score(0).log_probs()
    with torch.no_grad():
        before = score()
    model(**batch_of(), labels=targets_of([0, 1, 2, 3])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    with torch.no_grad():
        after, expected = score(), model.score_codes(model.start_decoding(**batch_of()), prefix, 0)
    assert torch.allclose(after, expected, atol=1e-5) and not torch.allclose(after, before, atol=1e-2)


def test_encoder_and_cross_projections_run_once_per_user():
    model = small_model()
    rows = []
    attention = model.decoder.block[0].layer[1].EncDecAttention
    hooks = [
        model.encoder.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[0])),
        attention.k.register_forward_hook(lambda module, args, output: rows.append(output.shape[0])),
        attention.v.register_forward_hook(lambda module, args, output: rows.append(output.shape[0])),
    ]
    model.recommend(HISTORIES, tokenizer=TOKENIZER, k=5, num_beams=10)
    assert rows == [4, 4, 4]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("restrict_to_level", [True, False])
def test_score_all_and_a_wide_beam_equal_exhaustive_scoring(restrict_to_level):
    model = small_model(restrict_to_level=restrict_to_level)
    expected = exact_scores(model)
    scores = model.score_all(HISTORIES, tokenizer=TOKENIZER)
    assert torch.allclose(scores, expected, atol=1e-4)
    best = expected.topk(10, dim=1)
    lists = model.recommend(HISTORIES, tokenizer=TOKENIZER, k=10, num_beams=40, exclude_seen=False)
    for row, recommended in enumerate(lists):
        assert [entry.item_id for entry in recommended] == [f"i{index}" for index in best.indices[row].tolist()]
        assert [entry.score for entry in recommended] == pytest.approx(best.values[row].tolist(), abs=1e-4)


@pytest.mark.parametrize("restrict_to_level", [True, False])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_generate_with_the_trie_gives_what_recommend_gives(restrict_to_level, exclude_seen):
    model = small_model(restrict_to_level=restrict_to_level)
    lists = model.recommend(HISTORIES, tokenizer=TOKENIZER, k=6, num_beams=6, exclude_seen=exclude_seen)
    processor = ItemTrieLogitsProcessor(TOKENIZER, prompt_length=1, excluded_items=HISTORIES if exclude_seen else None)
    output = model.generate(
        **batch_of(),
        num_beams=6,
        num_return_sequences=6,
        max_new_tokens=3,
        do_sample=False,
        length_penalty=0.0,
        logits_processor=[processor],
        return_dict_in_generate=True,
        output_scores=True,
    )
    codes = output.sequences[:, 1:4] - torch.tensor(TOKENIZER.level_offsets)
    names = [items[0] for items in TOKENIZER.codes_to_items(codes.numpy())]
    scores = output.sequences_scores.tolist()
    for row, recommended in enumerate(lists):
        assert [entry.item_id for entry in recommended] == names[6 * row : 6 * row + 6]
        assert [entry.score for entry in recommended] == pytest.approx(scores[6 * row : 6 * row + 6], abs=1e-4)


def test_generate_without_any_processor_follows_the_levels():
    model = small_model()
    output = model.generate(**batch_of(), num_beams=4, num_return_sequences=4, max_new_tokens=8, do_sample=False)
    levels = output[:, 1:4] - torch.tensor(TOKENIZER.level_offsets)
    assert bool((levels >= 0).all()) and bool((levels < torch.tensor(SIZES)).all())
    assert output.shape[1] == 5 and bool((output[:, 4] == 1).all())


def test_a_user_scores_the_same_alone_and_in_any_batch():
    model = small_model()
    together = model.score_all(HISTORIES, tokenizer=TOKENIZER)
    for row, history in enumerate(HISTORIES):
        alone = model.score_all([history], tokenizer=TOKENIZER)
        assert bool(torch.isfinite(alone).all())
        assert torch.allclose(together[row], alone[0], atol=1e-4), row
    nothing = model.start_decoding(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long))
    empty = model.start_decoding(**batch_of([[]]))
    prefix = torch.zeros(1, 1, 0, dtype=torch.long)
    assert torch.allclose(model.score_codes(nothing, prefix, 0), model.score_codes(empty, prefix, 0), atol=1e-5)


def test_right_padding_equals_left_padding():
    model, batch = small_model(), batch_of()
    ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["attention_mask"])
    for row, (tokens, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
        ids[row, : int(real.sum())] = tokens[real.bool()]
        mask[row, : int(real.sum())] = 1
    prefix = torch.zeros(4, 1, 0, dtype=torch.long)
    left = model.score_codes(model.start_decoding(**batch), prefix, 0)
    assert torch.allclose(left, model.score_codes(model.start_decoding(ids, mask), prefix, 0), atol=1e-5)


def test_user_tokens_and_end_token_are_read():
    tokenizer = catalogue(num_user_tokens=7, history_eos=True)
    config = TigerConfig.from_tokenizer(tokenizer, **TINY)
    assert config.level_offsets[0] == 11 and config.vocab_size == 11 + sum(SIZES)
    model = TigerForConditionalGeneration(config).eval()
    two = model.recommend([["i1"], ["i1"]], tokenizer=tokenizer, user_ids=["ann", "bob"], k=3, num_beams=40)
    assert [entry.score for entry in two[0]] != [entry.score for entry in two[1]]


def test_pooled_dropout_replaces_all_and_only_module_dropout():
    pooled, stock = small_model(), small_model(pooled_dropout=False)
    kinds = [type(module) for module in stock.modules() if isinstance(module, nn.Dropout)]
    assert set(kinds) == {nn.Dropout}
    pooled_modules = [module for module in pooled.modules() if isinstance(module, PooledDropout)]
    assert len(pooled_modules) == len(kinds) and {module.p for module in pooled_modules} == {0.1}
    assert pooled.state_dict().keys() == stock.state_dict().keys()
    pooled.train()
    assert (
        pooled(**batch_of(), labels=targets_of([0, 1, 2, 3])).loss
        != pooled(**batch_of(), labels=targets_of([0, 1, 2, 3])).loss
    )


def test_errors_name_the_fix():
    model = small_model()
    with pytest.raises(IncompatibleComponentsError, match=r"labels\[1, 0\] = 9 is not a code of level 0"):
        model(
            **batch_of(),
            labels=targets_of([0, 1, 2, 3])
            .index_fill(1, torch.tensor([0]), 4)
            .index_put((torch.tensor([1]), torch.tensor([0])), torch.tensor(9)),
        )
    with pytest.raises(IncompatibleComponentsError, match="level 1 has 4 codes"):
        TigerConfig(codebook_sizes=[4, 4], level_offsets=[4, 6])
    with pytest.raises(IncompatibleComponentsError, match="one entry per level"):
        TigerConfig(codebook_sizes=[4, 4], level_offsets=[4])
    with pytest.raises(IncompatibleComponentsError, match="vocab_size 9"):
        TigerConfig(codebook_sizes=[4, 4], vocab_size=9)
    with pytest.raises(StrictDataclassFieldValidationError, match="d_model"):
        TigerConfig(d_model="128")
    with pytest.raises(IncompatibleComponentsError, match="catalogue"):
        model.recommend(HISTORIES, tokenizer=catalogue(39), k=2)


def test_save_and_load(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded, report = TigerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.config.codebook_sizes == list(SIZES) and loaded.config.num_levels == 3
    assert torch.equal(
        model.score_all(HISTORIES, tokenizer=TOKENIZER), loaded.score_all(HISTORIES, tokenizer=TOKENIZER)
    )
    assert isinstance(loaded.encoder.dropout, PooledDropout)


def test_successor_catalogue():
    """Item i is always followed by item i + 1: Hit@1 must be 1.0."""
    num_items = 100
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(125)[:num_items], (5, 5, 5)), 1)
    tokenizer = ItemTokenizer.from_codes([f"i{index}" for index in range(num_items)], codes, (5, 5, 5))
    torch.manual_seed(0)
    config = TigerConfig.from_tokenizer(
        tokenizer, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=1, num_decoder_layers=1, dropout_rate=0.0
    )
    model = TigerForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    table = torch.tensor(tokenizer.item_token_table)
    trie, everyone = ItemTrie.from_tokenizer(tokenizer), torch.arange(num_items)
    began, hit = time.perf_counter(), 0.0
    for step in range(1, 801):
        last = torch.randint(0, num_items, (64,))
        length = int(torch.randint(1, 3, (1,)))
        history = table[(last[:, None] + torch.arange(1 - length, 1)) % num_items].flatten(1)
        loss = model(input_ids=history, labels=table[(last + 1) % num_items]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            history = table[(everyone[:, None] + torch.arange(-1, 1)) % num_items].flatten(1)
            items, _ = model.recommend_indices(history, torch.ones_like(history), trie=trie, k=1, num_beams=5)
            hit = (items[:, 0] == (everyone + 1) % num_items).float().mean().item()
            if hit == 1.0:
                break
    assert hit == 1.0
    assert time.perf_counter() - began < 60


def test_codes_of_several_lengths() -> None:
    """A tree whose leaves lie at different depths: loss and `score_all` are one distribution over the items."""
    from hf_genrec.data.collators import PrefixCollator

    codes = [[0, 0, -1], [0, 1, 0], [0, 1, 1], [1, 0, -1], [1, 1, -1], [2, -1, -1]]
    tokenizer = ItemTokenizer.from_codes([f"i{row}" for row in range(6)], codes, codebook_sizes=[3, 2, 2])
    torch.manual_seed(0)
    config = TigerConfig.from_tokenizer(tokenizer, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1)
    model = TigerForConditionalGeneration(config).eval()
    history = ["i1", "i3", "i5"]
    scores = model.score_all([history], tokenizer=tokenizer)[0]
    collate = PrefixCollator(tokenizer)
    for item in range(6):
        batch = collate([{"items": np.array([1, 3, 5]), "target": item}])
        loss = model(**batch).loss.item() * int((batch["labels"] >= 0).sum())
        assert scores[item].item() == pytest.approx(-loss, abs=1e-5)
    found = model.recommend([history], tokenizer=tokenizer, k=6, num_beams=6, exclude_seen=False)[0]
    assert [one.item_id for one in found] == [f"i{row}" for row in scores.argsort(descending=True).tolist()]
