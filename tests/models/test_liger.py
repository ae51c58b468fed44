"""LIGER: TIGER when switched off, the dense loss by hand, packed like alone, and candidates ranked by the dense score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hf_genrec.data.collators import PackedPrefixCollator, PrefixCollator
from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.decoding.t5_layers import runs_as_written
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.auto import AutoModelForRecommendation, register_auto_classes
from hf_genrec.models.liger.configuration_liger import LigerConfig
from hf_genrec.models.liger.modeling_liger import LigerForConditionalGeneration, LigerModel
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

SIZES = (5, 4, 6)
N, F = 40, 7
TINY = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 2}
HISTORIES = [[3, 1, 4, 1, 5], [9], [6, 5, 30]]
COLD = [2, 17, 31]


def catalogue(**kwargs) -> ItemTokenizer:
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, SIZES), indexing="ij"), -1).reshape(-1, 3)
    return ItemTokenizer.from_codes([f"i{n}" for n in range(N)], generator.permutation(grid)[:N], SIZES, **kwargs)


TOKENIZER = catalogue(num_user_tokens=3)
TRIE = ItemTrie.from_tokenizer(TOKENIZER)


def small_model(**kwargs) -> LigerForConditionalGeneration:
    torch.manual_seed(0)
    options = {**TINY, "item_feature_dim": F, "projection_sizes": [12], "dropout_rate": 0.0, **kwargs}
    model = LigerForConditionalGeneration(LigerConfig.from_tokenizer(TOKENIZER, **options)).eval()
    features = np.random.default_rng(1).normal(size=(N, options["item_feature_dim"]))
    model.set_catalogue(TOKENIZER.codes, features)
    counts = np.ones(N)
    counts[COLD] = 0
    if model.config.has_dense_head:
        model.prepare_training(counts)
    return model


def encoded(rows=HISTORIES) -> dict:
    return dict(TOKENIZER.encode_item_indices(rows, return_tensors="pt"))


def state_of(model, rows=HISTORIES):
    with torch.no_grad():
        return model.start_decoding(**encoded(rows))


def test_switched_off_it_is_tiger() -> None:
    model = small_model(item_inputs=False, dense_loss_weight=0.0)
    tiger = TigerForConditionalGeneration(TigerConfig.from_tokenizer(TOKENIZER, dropout_rate=0.0, **TINY)).eval()
    tiger.load_state_dict(model.state_dict(), strict=False)
    batch = encoded() | {"labels": torch.tensor(TOKENIZER.item_token_table[[2, 3, 4]])}
    one, other = model(**batch), tiger(**batch)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.loss, other.loss)
    found = [m.recommend_indices(**encoded(), trie=TRIE, k=5, num_beams=20) for m in (model, tiger)]
    assert torch.equal(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1])


def test_dense_weight_0_is_the_generator_alone() -> None:
    model = small_model()
    config = model.recommendation_config
    items, scores = model.recommend_indices(**encoded(), trie=TRIE, k=N, num_beams=200, config=config)
    exact = model.score_all(**encoded(), trie=TRIE)
    assert torch.allclose(scores, exact.gather(1, items), atol=1e-4)
    dense = model.score_dense(state_of(model))
    mixed_items, mixed = model.recommend_indices(
        **encoded(), trie=TRIE, k=N, num_beams=200, config=config.merged(dense_weight=0.25)
    )
    assert torch.allclose(mixed, (0.75 * exact + 0.25 * dense).gather(1, mixed_items), atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_input_of_the_encoder_by_hand(causal: bool) -> None:
    model = small_model(causal_encoder=causal, max_item_positions=2)
    ids = torch.tensor([[0, 5, *TOKENIZER.item_token_table[3], *TOKENIZER.item_token_table[9]]])  # pad, user, two items
    items, stack = model.items, model.encoder
    expected = []
    for place, token in enumerate(ids[0]):
        number = 0 if place < 2 else 1 + (place - 2) // 3
        x = model.shared.weight[token] + items.positions.weight[number]
        x = x + items.slots.weight[0 if place < 2 else 1 + (place - 2) % 3]
        if number:
            x = x + items.projection(items.item_features[[3, 9][number - 1]])
        expected.append(items.norm(x))
    assert torch.allclose(stack.embed_inputs(ids)[0], torch.stack(expected), atol=1e-6)
    assert runs_as_written(model)
    with torch.no_grad():
        fast = model.start_decoding(ids, (ids > 0).long())
        handle = model.encoder.register_forward_hook(lambda *_: None)
        slow = model.start_decoding(ids, (ids > 0).long())
        handle.remove()
    assert torch.allclose(fast.query_BM, slow.query_BM, atol=1e-5)
    assert torch.allclose(fast.generator.keys[0], slow.generator.keys[0], atol=1e-4)


def test_more_items_than_positions_share_the_last() -> None:
    model = small_model(max_item_positions=2)
    ids = encoded([[3, 4, 5, 6]])["input_ids"]
    assert torch.isfinite(model.encoder.embed_inputs(ids)).all()


def test_dense_loss_by_hand_with_unseen_items_masked() -> None:
    model = small_model()
    targets = [7, 2, 8]  # the second is a cold item: it is its own row's target, and in no other row
    labels = torch.tensor(TOKENIZER.item_token_table[targets])
    outputs = model(**encoded(), labels=labels)
    query = nn.functional.normalize(outputs.encoder_last_hidden_state[:, -1], dim=-1)  # left padded
    table = nn.functional.normalize(model.items.projection(model.items.item_features), dim=-1)
    logits = query @ table.T / 0.07
    losses = []
    for row, target in enumerate(targets):
        seen = [n for n in range(N) if n not in COLD or n == target]
        losses.append(-logits[row, seen].log_softmax(-1)[seen.index(target)])
    codes = model(**encoded(), labels=labels).logits
    generated = nn.functional.cross_entropy(codes.flatten(0, 1), labels.flatten())
    assert torch.allclose(outputs.loss, generated + torch.stack(losses).mean(), atol=1e-5)
    halves = [
        model(**{k: v[part] for k, v in (encoded() | {"labels": labels}).items()}, num_items_in_batch=9).loss
        for part in (slice(0, 1), slice(1, 3))
    ]
    assert torch.allclose(sum(halves), outputs.loss, atol=1e-5)


def test_unseen_items_get_no_gradient_in_training() -> None:
    model = small_model()
    model.items.item_features.requires_grad_(True)
    model(**encoded([[9], [5]]), labels=torch.tensor(TOKENIZER.item_token_table[[7, 8]])).loss.backward()
    reached = model.items.item_features.grad.abs().sum(-1) > 0
    assert not reached[COLD].any() and reached.sum() == N - len(COLD)


@pytest.mark.parametrize("users", [False, True])
def test_packed_equals_one_prefix_per_sample(users: bool) -> None:
    model = small_model(causal_encoder=True)
    windows = [{"items": np.array(row)} for row in ([3, 1, 4, 1, 5], [9, 8], [6, 5, 30])]
    if users:
        windows = [{**window, "user_id": f"u{n}"} for n, window in enumerate(windows)]
    prefixes = [
        {**window, "items": window["items"][:end], "target": int(window["items"][end])}
        for window in windows
        for end in range(1, len(window["items"]))
    ]
    packed = PackedPrefixCollator(TOKENIZER)(windows)
    gradients = []
    for batches in ([packed], [PrefixCollator(TOKENIZER)([prefix]) for prefix in prefixes]):
        model.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = model(**batch, num_items_in_batch=21).loss
            loss.backward()
            total += loss.detach()
        gradients.append([total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)
    assert torch.allclose(model(**packed).loss, gradients[0][0], atol=1e-5)  # 7 targets of 3 codes: the mean
    alone = small_model()
    with pytest.raises(IncompatibleComponentsError, match="causal_encoder"):
        alone(**packed)


def _search(model, decoding: str, options: dict | None = None, k: int = 10, seen=None, **more):
    config = model.recommendation_config.merged(decoding=decoding, decoding_options=options, k=k, **more)
    return model.recommend_indices(**encoded(), trie=TRIE, config=config, seen=seen)


def test_no_candidates_is_dense_over_the_cold_items() -> None:
    model = small_model()
    items, scores = _search(model, "generate_then_dense", {"num_candidates": 0}, num_beams=1)
    dense = model.score_dense(state_of(model))
    for row in range(3):
        order = sorted(COLD, key=lambda item: -dense[row, item])
        assert items[row, :3].tolist() == order and items[row, 3:].eq(-1).all()
        assert torch.allclose(scores[row, :3], dense[row, order], atol=1e-5)


def test_all_candidates_is_dense_retrieval() -> None:
    model = small_model()
    seen = [np.array([3, 1]), np.array([9]), np.array([2, 6])]
    for given in (None, seen):
        found = _search(model, "generate_then_dense", {"num_candidates": 5 * 4 * 6}, seen=given)
        wanted = _search(model, "dense", seen=given)
        assert torch.equal(found[0], wanted[0]) and torch.allclose(found[1], wanted[1])
    assert not (found[0][2] == 2).any()  # a cold item that was seen


def test_candidates_are_the_beams_and_the_cold_items_only() -> None:
    model = small_model()
    dense = model.score_dense(state_of(model))
    beams, _ = _search(model, "beam", k=4, num_beams=4)
    items, scores = _search(model, "generate_then_dense", {"num_candidates": 4}, k=7)
    for row in range(3):
        wanted = sorted({*beams[row].tolist(), *COLD}, key=lambda item: -dense[row, item])
        assert items[row, : len(wanted)].tolist() == wanted[:7]
    none, _ = _search(model, "generate_then_dense", {"num_candidates": 4, "cold_items": []}, k=4)
    assert [set(row) for row in none.tolist()] == [set(row) for row in beams.tolist()]
    assert torch.allclose(scores[:, 0], torch.stack([dense[n, items[n, 0]] for n in range(3)]), atol=1e-5)


def test_a_user_alone_gets_what_the_batch_gave() -> None:
    model = small_model()
    model.recommendation_config = model.recommendation_config.merged(decoding="generate_then_dense", num_beams=5)
    together = model.recommend([[f"i{n}" for n in row] for row in HISTORIES], tokenizer=TOKENIZER, k=5)
    for row, found in zip(HISTORIES, together):
        alone = model.recommend([[f"i{n}" for n in row]], tokenizer=TOKENIZER, k=5)[0]
        assert [one.item_id for one in alone] == [one.item_id for one in found]
    assert len(model.recommend([[]], tokenizer=TOKENIZER, k=5)[0]) == 5


def test_errors_name_the_fix() -> None:
    model = small_model()
    with pytest.raises(RequestError, match="num_candidates"):
        _search(model, "generate_then_dense", {"num_candidates": -1})
    with pytest.raises(RequestError, match="dense_weight"):
        _search(model, "generate_then_dense", dense_weight=0.5)
    with pytest.raises(IncompatibleComponentsError, match="item_features has shape"):
        model.set_catalogue(TOKENIZER.codes, np.zeros((N, F + 1)))
    with pytest.raises(IncompatibleComponentsError, match="dense_temperature"):
        LigerConfig(codebook_sizes=[4], dense_temperature=0.0)
    without = small_model(item_feature_dim=0)
    with pytest.raises(IncompatibleComponentsError, match=r"model\.features"):
        without.prepare_training(np.ones(N))
    with pytest.raises(IncompatibleComponentsError, match="no item scores"):
        _search(without, "generate_then_dense")


def test_saved_with_its_catalogue(tmp_path) -> None:
    model = small_model(causal_encoder=True)
    model.save_pretrained(tmp_path)
    register_auto_classes()
    again = AutoModelForRecommendation.from_pretrained(tmp_path)
    assert torch.equal(again.cold_items, model.cold_items)
    assert torch.equal(again.score_dense(state_of(again)), model.score_dense(state_of(model)))
    body = LigerModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = body.encoder(**encoded()).last_hidden_state[:, -1]
    assert torch.allclose(states, state_of(model).query_BM, atol=1e-5)


def test_codes_of_several_lengths() -> None:
    codes = np.array([[0, 0, 0], [0, 0, 1], [1, -1, -1], [2, 3, -1]])
    tokenizer = ItemTokenizer.from_codes(["a", "b", "c", "d"], codes, SIZES)
    config = LigerConfig.from_tokenizer(tokenizer, item_feature_dim=F, projection_sizes=[], dropout_rate=0.0, **TINY)
    model = LigerForConditionalGeneration(config).eval()
    model.set_catalogue(tokenizer.codes, np.eye(4, F))
    assert model.items.rows(torch.tensor(tokenizer.item_token_table)).tolist() == [0, 1, 2, 3]
    ids = tokenizer.encode_item_indices([[2, 3, 1]], return_tensors="pt")["input_ids"]
    numbers = model.encoder.item_numbers(ids)
    assert model.items._rows_of_history(ids, numbers, model.items._levels(ids)).tolist() == [[2, 3, 1]]
