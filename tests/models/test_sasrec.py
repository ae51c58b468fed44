"""SASRec: the loss is a full softmax over items, padding side and batch mates do not matter, decoding paths agree."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM


def item_tokenizer(num_items: int) -> ItemTokenizer:
    return ItemTokenizer.from_codes([f"i{index}" for index in range(num_items)], np.arange(num_items)[:, None])


def small_model(num_items: int = 12, seed: int = 0, **kwargs) -> SASRecForCausalLM:
    values = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "embedding_std": 0.7, "dropout": 0.0}
    torch.manual_seed(seed)
    model = SASRecForCausalLM(SASRecConfig.from_tokenizer(item_tokenizer(num_items), **{**values, **kwargs})).eval()
    with torch.no_grad():  # large random weights, so that nothing agrees by being small
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(std=0.4)
            elif "bias" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if model.repeat_weight is not None:
            model.repeat_weight.fill_(-1.7)
    return model


def labels_of(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[torch.arange(len(labels)), attention_mask.argmax(1)] = -100
    return labels


def right_padded(batch) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["attention_mask"])
    for row, (tokens, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
        ids[row, : int(real.sum())] = tokens[real.bool()]
        mask[row, : int(real.sum())] = 1
    return ids, mask


HISTORIES = [["i3", "i1", "i4", "i1", "i5"], ["i9"], ["i2", "i2"], ["i6", "i5", "i3", "i5"]]


@pytest.mark.parametrize("learn_repeat_weight", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_loss_is_the_mean_item_cross_entropy_of_each_prefix_alone(learn_repeat_weight, norm_first):
    model, tokenizer = small_model(learn_repeat_weight=learn_repeat_weight, norm_first=norm_first), item_tokenizer(12)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    loss = model(**batch, labels=labels_of(**batch)).loss
    expected = []
    for history in HISTORIES:
        for length in range(1, len(history)):
            prefix = tokenizer.encode_histories([history[:length]], return_tensors="pt")
            logits = model(**prefix).logits[0, -1]
            items = logits[4:] - 0  # items are the tokens 4..15
            assert torch.equal(logits[:4], torch.full((4,), torch.finfo(torch.float32).min))
            expected.append(-items.log_softmax(-1)[int(history[length][1:])])
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-5)
    assert torch.allclose(
        model(**batch, labels=labels_of(**batch), num_items_in_batch=20).loss * 20,
        torch.stack(expected).sum(),
        atol=1e-4,
    )


def test_loss_equals_cross_entropy_of_the_returned_logits():
    model, tokenizer = small_model(), item_tokenizer(12)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    labels = labels_of(**batch)
    output = model(**batch, labels=labels, return_logits=True)
    logits = output.logits[:, :-1].reshape(-1, 16)
    assert torch.allclose(output.loss, nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1)), atol=1e-6)
    assert model(**batch, labels=labels).logits is None
    assert model(**batch).loss is None


@pytest.mark.parametrize("learn_repeat_weight", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_and_right_padding_agree(attention, learn_repeat_weight):
    model, tokenizer = small_model(learn_repeat_weight=learn_repeat_weight), item_tokenizer(12)
    model.set_attn_implementation(attention)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    ids, mask = right_padded(batch)
    left, right = model(**batch).logits, model(input_ids=ids, attention_mask=mask).logits
    for row, history in enumerate(HISTORIES):
        alone = model(**tokenizer.encode_histories([history], return_tensors="pt")).logits[0]
        assert torch.allclose(left[row, -len(history) :], alone, atol=1e-5)
        assert torch.allclose(right[row, : len(history)], alone, atol=1e-5)
    losses = [
        model(**batch, labels=labels_of(**batch)).loss,
        model(input_ids=ids, attention_mask=mask, labels=labels_of(ids, mask)).loss,
    ]
    assert torch.allclose(*losses, atol=1e-6) and bool(torch.isfinite(losses[0]))


def test_causal_and_position_aware():
    model = small_model()
    ids = torch.tensor([[4, 5, 6, 7]])
    changed = model(input_ids=torch.tensor([[4, 5, 6, 9]])).logits
    assert torch.allclose(model(input_ids=ids).logits[:, :3], changed[:, :3], atol=1e-6)
    swapped = torch.tensor([[5, 4, 6, 7]])
    assert (model(input_ids=ids).logits[:, -1] - model(input_ids=swapped).logits[:, -1]).abs().max() > 1e-3
    # without positions only the set of earlier items matters to the last state of a one-layer model
    bag = small_model(position_embedding=False, num_hidden_layers=1)
    assert torch.allclose(bag(input_ids=ids).logits[:, -1], bag(input_ids=swapped).logits[:, -1], atol=1e-5)


def test_gradients_are_finite_with_padding_and_rows_without_targets():
    model, tokenizer = small_model(learn_repeat_weight=True).train(), item_tokenizer(12)
    batch = tokenizer.encode_histories([["i1", "i2", "i3"], [], ["i5"]], return_tensors="pt")
    labels = labels_of(**batch).masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())
    empty = model(**batch, labels=torch.full_like(labels, -100)).loss
    assert empty.item() == 0.0
    empty.backward()


@pytest.mark.parametrize("learn_repeat_weight", [False, True])
def test_recommend_generate_and_score_all_agree(learn_repeat_weight):
    model, tokenizer = small_model(learn_repeat_weight=learn_repeat_weight), item_tokenizer(12)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    scores = model.score_all(HISTORIES, tokenizer=tokenizer)
    expected = model(**batch).logits[:, -1, 4:].log_softmax(-1)
    assert torch.allclose(scores, expected, atol=1e-5)
    assert torch.allclose(scores.exp().sum(1), torch.ones(4), atol=1e-5)

    best = scores.topk(5, dim=1)
    lists = model.recommend(HISTORIES, tokenizer=tokenizer, k=5, num_beams=5, exclude_seen=False)
    for row, recommended in enumerate(lists):
        assert [entry.item_id for entry in recommended] == [f"i{index}" for index in best.indices[row].tolist()]
        assert [entry.score for entry in recommended] == pytest.approx(best.values[row].tolist(), abs=1e-5)

    generated = model.generate(
        **batch, num_beams=5, num_return_sequences=5, max_new_tokens=1, do_sample=False, length_penalty=0.0
    )[:, -1].view(4, 5)
    assert torch.equal(generated - 4, best.indices)


def test_generate_with_the_trie_leaves_out_what_recommend_leaves_out():
    model, tokenizer = small_model(), item_tokenizer(12)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    lists = model.recommend(HISTORIES, tokenizer=tokenizer, k=4, num_beams=4, exclude_seen=True)
    seen = [np.unique([int(item[1:]) for item in history]) for history in HISTORIES]
    processor = ItemTrieLogitsProcessor(
        tokenizer, prompt_length=batch["input_ids"].shape[1], excluded_items=[[f"i{i}" for i in row] for row in seen]
    )
    generated = model.generate(
        **batch, num_beams=4, num_return_sequences=4, max_new_tokens=1, do_sample=False, logits_processor=[processor]
    )[:, -1].view(4, 4)
    names = [[f"i{token - 4}" for token in row] for row in generated.tolist()]
    assert names == [[entry.item_id for entry in row] for row in lists]
    assert all(not set(row) & set(history) for row, history in zip(names, HISTORIES))


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_histories_are_cut_to_the_newest_window(side):
    model, tokenizer = small_model(max_position_embeddings=3), item_tokenizer(12)
    histories = [["i3", "i1", "i4", "i1", "i5"], ["i9"], ["i8", "i2", "i7", "i6"]]
    batch = tokenizer.encode_histories(histories, return_tensors="pt")
    ids, mask = right_padded(batch) if side == "right" else (batch["input_ids"], batch["attention_mask"])
    scores = model.score_codes(model.start_decoding(ids, mask), torch.zeros(3, 1, 0, dtype=torch.long), 0)[:, 0]
    newest = model.score_all([history[-3:] for history in histories], tokenizer=tokenizer)
    assert torch.allclose(scores, newest, atol=1e-5)
    with pytest.raises(IncompatibleComponentsError, match="max_position_embeddings 3"):
        model(**batch)


@pytest.mark.parametrize("learn_repeat_weight", [False, True])
def test_a_training_window_may_hold_one_item_more_than_there_are_positions(learn_repeat_weight):
    wide, tokenizer = small_model(max_position_embeddings=5), item_tokenizer(12)
    model = small_model(max_position_embeddings=4, learn_repeat_weight=learn_repeat_weight)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")  # the longest has 5 items
    expected = wide(**batch, labels=labels_of(**batch), return_logits=True).loss
    model.load_state_dict(
        {**wide.state_dict(), "model.embed_positions.weight": wide.model.embed_positions.weight[:4]}, strict=False
    )
    if learn_repeat_weight:
        torch.nn.init.zeros_(model.repeat_weight)
    for ids, mask in (batch.values(), right_padded(batch)):
        assert torch.allclose(
            model(input_ids=ids, attention_mask=mask, labels=labels_of(ids, mask)).loss, expected, atol=1e-6
        )


def test_user_without_history_gets_the_uniform_distribution():
    model, tokenizer = small_model(), item_tokenizer(12)
    alone = model.score_all([[]], tokenizer=tokenizer)
    beside = model.score_all([["i3", "i4"], []], tokenizer=tokenizer)
    assert torch.allclose(alone, torch.full((1, 12), -np.log(12.0), dtype=torch.float32), atol=1e-5)
    assert torch.allclose(beside[1:], alone, atol=1e-6)
    nothing = model.start_decoding(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long))
    assert torch.allclose(nothing.logp_BN, alone.expand(2, -1), atol=1e-6)


def test_repeat_weight_off_or_zero_is_plain_sasrec():
    plain, tokenizer = small_model(), item_tokenizer(12)
    weighted = small_model(learn_repeat_weight=True)
    missing = weighted.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["repeat_weight"] and plain.repeat_weight is None
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    labels = labels_of(**batch)
    with torch.no_grad():
        weighted.repeat_weight.zero_()
    assert torch.equal(plain(**batch).logits, weighted(**batch).logits)
    assert torch.equal(plain(**batch, labels=labels).loss, weighted(**batch, labels=labels).loss)
    fresh = SASRecForCausalLM(SASRecConfig(codebook_sizes=[5], learn_repeat_weight=True))
    assert fresh.repeat_weight.item() == 0.0


def test_repeat_weight_is_added_once_to_every_seen_item_at_every_position():
    plain, tokenizer = small_model(), item_tokenizer(12)
    weighted = small_model(learn_repeat_weight=True)
    weighted.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        weighted.repeat_weight.fill_(0.75)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    difference = (weighted(**batch).logits - plain(**batch).logits)[..., 4:]
    for row, history in enumerate(HISTORIES):
        for length in range(1, len(history) + 1):
            seen = torch.zeros(12)
            seen[[int(item[1:]) for item in history[:length]]] = 0.75
            position = batch["input_ids"].shape[1] - len(history) + length - 1
            assert torch.allclose(difference[row, position], seen, atol=1e-5)


def test_repeat_weight_learns_the_log_odds_of_repeats():
    """Items drawn uniformly, but a seen item is repeated more often: the weight must find the true log-odds."""
    generator = np.random.default_rng(0)
    model = small_model(num_items=30, learn_repeat_weight=True, num_hidden_layers=1)
    rows = []
    for _ in range(400):
        row = [int(generator.integers(30))]
        for _ in range(5):
            weights = np.ones(30)
            weights[np.unique(row)] = np.exp(2.0)
            row.append(int(generator.choice(30, p=weights / weights.sum())))
        rows.append(row)
    ids = torch.tensor(rows) + 4
    with torch.no_grad():
        model.lm_head.weight.zero_()  # nothing but the repeat weight explains the data
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "repeat_weight")
    optimizer = torch.optim.LBFGS([model.repeat_weight], max_iter=20)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels_of(ids, torch.ones_like(ids))).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert model.repeat_weight.item() == pytest.approx(2.0, abs=0.15)


def test_repeat_weight_needs_the_whole_history():
    model = small_model(learn_repeat_weight=True)
    with pytest.raises(IncompatibleComponentsError, match="use_cache=False"):
        model(inputs_embeds=torch.zeros(1, 3, 8))
    cache = model(input_ids=torch.tensor([[4, 5]]), use_cache=True).past_key_values
    with pytest.raises(IncompatibleComponentsError, match="use_cache=False"):
        model(input_ids=torch.tensor([[6]]), attention_mask=torch.ones(1, 3), past_key_values=cache)
    with pytest.raises(IncompatibleComponentsError, match="use_cache=False"):
        model(input_ids=torch.tensor([[6]]), past_key_values=cache)


def test_cached_decoding_equals_one_pass():
    model = small_model()
    ids, mask = torch.tensor([[0, 4, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    first = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
    second = model(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.allclose(second.logits[:, 0], model(input_ids=ids, attention_mask=mask).logits[:, -1], atol=1e-5)
    assert model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits.shape == (2, 1, 16)


def test_bad_labels_and_configurations_name_the_fix():
    model, tokenizer = small_model(), item_tokenizer(12)
    batch = tokenizer.encode_histories(HISTORIES, return_tensors="pt")
    with pytest.raises(IncompatibleComponentsError, match=r"token 0.*-100"):
        model(**batch, labels=batch["input_ids"])
    with pytest.raises(IncompatibleComponentsError, match="one token"):
        SASRecConfig(codebook_sizes=[4, 4], level_offsets=[4, 8])
    with pytest.raises(IncompatibleComponentsError, match="do not fit"):
        SASRecConfig(codebook_sizes=[4], vocab_size=6)
    with pytest.raises(IncompatibleComponentsError, match="multiple"):
        SASRecConfig(hidden_size=9)
    with pytest.raises(IncompatibleComponentsError, match="catalogue"):
        model.recommend(HISTORIES, tokenizer=item_tokenizer(11), k=2)


def test_save_and_load(tmp_path):
    model, tokenizer = small_model(learn_repeat_weight=True), item_tokenizer(12)
    model.save_pretrained(tmp_path)
    loaded, report = SASRecForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(
        model.score_all(HISTORIES, tokenizer=tokenizer), loaded.score_all(HISTORIES, tokenizer=tokenizer)
    )


@pytest.mark.parametrize("learn_repeat_weight", [False, True])
def test_successor_catalogue(learn_repeat_weight):
    """Item i is always followed by item i + 1: Hit@1 must be 1.0."""
    num_items = 100
    torch.manual_seed(0)
    tokenizer = item_tokenizer(num_items)
    config = SASRecConfig.from_tokenizer(
        tokenizer, hidden_size=32, intermediate_size=64, dropout=0.1, learn_repeat_weight=learn_repeat_weight
    )
    model = SASRecForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    starts = torch.arange(num_items)
    last = torch.arange(num_items)
    trie = ItemTrie.from_tokenizer(tokenizer)
    began, hit = time.perf_counter(), 0.0
    for step in range(1, 401):
        first = starts[torch.randint(0, num_items, (32, 1))]
        ids = (first + torch.arange(10)) % num_items + 4
        loss = model(input_ids=ids, labels=labels_of(ids, torch.ones_like(ids))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            history = (last[:, None] + torch.arange(-4, 1)) % num_items + 4
            items, _ = model.recommend_indices(history, torch.ones_like(history), trie=trie, k=1, num_beams=1)
            hit = (items[:, 0] == (last + 1) % num_items).float().mean().item()
            if hit == 1.0:
                break
    assert hit == 1.0
    assert time.perf_counter() - began < 60


def test_configuration_checks_types():
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        SASRecConfig(hidden_size="64")
