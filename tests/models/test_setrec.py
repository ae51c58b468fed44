"""SETRec: sets have no order, queries do not see each other, one pass whatever the size of a set, scores as the paper says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForCausalLM

from hf_genrec import AutoModelForRecommendation, ItemTokenizer, ItemTrie
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.setrec.configuration_setrec import SETRecConfig
from hf_genrec.models.setrec.modeling_setrec import SETRecForCausalLM, SETRecModel

N, HISTORIES = 12, [["i3", "i1", "i4", "i1", "i5"], ["i9"], ["i2", "i2"], ["i6", "i5", "i3", "i5"]]
WIDTHS = [5, 7]


def _tokenizer() -> ItemTokenizer:
    return ItemTokenizer.from_codes([f"i{n}" for n in range(N)], np.arange(N)[:, None])


def _features(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, sum(WIDTHS))).astype(np.float32)


def _model(features: np.ndarray | None = None, **options) -> SETRecForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "autoencoder_sizes": [9], "item_feature_dims": WIDTHS}
    torch.manual_seed(0)
    config = SETRecConfig.from_tokenizer(_tokenizer(), **(sizes | {"dropout": 0.0, "num_semantic_tokens": 3} | options))
    model = SETRecForCausalLM(config).eval()
    with torch.no_grad():  # large random weights, so that nothing agrees by being small
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.set_catalogue(np.arange(N)[:, None], _features() if features is None else features)
    return model


def _batch(histories=HISTORIES) -> dict[str, torch.Tensor]:
    return dict(_tokenizer().encode_histories(histories, return_tensors="pt"))


def _labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[torch.arange(len(labels)), batch["attention_mask"].argmax(1)] = -100
    return labels


# ------------------------------------------------------------------------------------------------ CHECKs of the card


def test_the_order_of_tokens_inside_items_and_of_their_queries_changes_nothing() -> None:
    model, batch = _model().model, _batch()
    table_Nnd, _ = model.tokens(model.item_features)
    plain = model.run(table_Nnd, model.queries.weight, batch["input_ids"], batch["attention_mask"])
    order = torch.tensor([2, 0, 3, 1])
    moved = model.run(table_Nnd[:, order], model.queries.weight[order], batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(moved, plain[:, :, order], atol=1e-5)
    # and they are tokens of different meaning: exchanging the queries alone gives other states
    assert (plain - plain[:, :, order]).abs().max() > 0.1


def test_without_semantic_tokens_only_the_collaborative_block_matters() -> None:
    features = _features()
    changed = features.copy()
    changed[:, WIDTHS[0] :] += 1.0
    batch = _batch()
    one, other = _model(features, num_semantic_tokens=0), _model(changed, num_semantic_tokens=0)
    alone = _model(features[:, : WIDTHS[0]], num_semantic_tokens=0, item_feature_dims=WIDTHS[:1])
    losses = [model(**batch, labels=_labels(batch)).loss for model in (one, other, alone)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    scores = [model.item_scores(model.start_decoding(**batch)) for model in (one, other, alone)]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    assert torch.equal(one.start_decoding(**batch).products_nBN[0], scores[0])  # whatever the weight b
    semantic = _model(features), _model(changed)
    assert not torch.allclose(*(model(**batch, labels=_labels(batch)).loss for model in semantic))


def test_scores_are_the_weighted_sum_and_weight_zero_ignores_semantics() -> None:
    model, batch = _model(), _batch()
    state = model.start_decoding(**batch)
    first, rest = state.products_nBN[0], state.products_nBN[1:]
    for weight in (0.0, 0.3, 1.0):
        model.config.semantic_weight = weight
        assert torch.allclose(model.item_scores(state), (1 - weight) * first + weight * rest.sum(0), atol=1e-5)
    model.config.semantic_weight = 0.0
    assert torch.equal(model.item_scores(state), first)
    tokenizer = _tokenizer()
    ranked = [[r.item_id for r in row] for row in model.recommend(HISTORIES, tokenizer=tokenizer, exclude_seen=False)]
    assert ranked == [[f"i{n}" for n in row] for row in first.argsort(-1, descending=True)[:, :10].tolist()]


@pytest.mark.parametrize("num_semantic_tokens", [0, 1, 5])
def test_one_pass_through_the_layers_however_many_tokens(num_semantic_tokens: int) -> None:
    model = _model(num_semantic_tokens=num_semantic_tokens)
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model.recommend(HISTORIES, tokenizer=_tokenizer(), k=5)
    assert len(calls) == len(model.model.layers)


# ------------------------------------------------------------------------------------------------ who sees what


def test_tokens_of_an_item_do_not_see_each_other_and_queries_see_the_history_alone() -> None:
    model, batch = _model().model, _batch([["i3", "i1", "i4"]])
    table = model.tokens(model.item_features)[0].detach().requires_grad_()
    queries = model.queries.weight.detach().clone().requires_grad_()
    states = model.run(table, queries, batch["input_ids"], None)  # places 0..3
    assert states.shape == (1, 4, 4, 16)
    states[0, 2, 1].square().sum().backward()  # the query of token 1 at place 2 has read items 3 and 1, not 4
    assert [bool(table.grad[item].any()) for item in (3, 1, 4)] == [True, True, False]
    assert [bool(row.any()) for row in queries.grad] == [False, True, False, False]


def test_states_equal_a_dense_mask_of_all_pairs() -> None:
    """Brute force: one softmax over all tokens and queries, with the mask written out pair by pair."""
    model = _model().model
    ids = torch.tensor([[7, 5, 9]])
    table, _ = model.tokens(model.item_features)
    n, length = table.shape[1], ids.shape[1]
    places = [(t, j, False) for t in range(length) for j in range(n)] + [
        (t, j, True) for t in range(length + 1) for j in range(n)
    ]
    x = torch.stack(
        [
            (model.queries.weight[j] if query else table[ids[0, t] - 4, j]) + model.position_embedding.weight[t]
            for t, j, query in places
        ]
    )
    mask = torch.tensor([[a == b or (b[0] < a[0] and not b[2]) for b in places] for a in places])
    for layer in model.layers:
        q, k, v = layer.qkv(x).view(len(places), 3, layer.num_heads, -1).permute(1, 2, 0, 3)
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        x = layer.attention_norm(x + layer.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1)))
        x = layer.mlp_norm(x + layer.down(F.gelu(layer.up(x))))
    expected = x[length * n :].view(length + 1, n, -1)
    assert torch.allclose(model.run(table, model.queries.weight, ids, None)[0], expected, atol=1e-4)
    last = model.run(table, model.queries.weight, ids, None, last_only=True)
    assert torch.allclose(last[0, 0], expected[-1], atol=1e-4)


@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_on_either_side_and_batch_mates_change_nothing(norm_first: bool) -> None:
    model, batch = _model(norm_first=norm_first), _batch()
    ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["attention_mask"])
    for row, real in enumerate(batch["attention_mask"].bool()):
        ids[row, : int(real.sum())], mask[row, : int(real.sum())] = batch["input_ids"][row, real], 1
    together = model.item_scores(model.start_decoding(**batch))
    assert torch.allclose(model.item_scores(model.start_decoding(ids, mask)), together, atol=1e-4)
    for row, history in enumerate(HISTORIES):
        alone = model.item_scores(model.start_decoding(**_batch([history])))
        assert torch.allclose(alone[0], together[row], atol=1e-4)
    losses = [model(**one, labels=_labels(one)).loss for one in (batch, {"input_ids": ids, "attention_mask": mask})]
    assert torch.allclose(*losses, atol=1e-5)


def test_histories_longer_than_the_model_are_cut_and_none_at_all_is_welcome() -> None:
    model = _model(max_position_embeddings=3)
    long, short = _batch([["i1", "i2", "i3", "i4", "i5"]]), _batch([["i3", "i4", "i5"]])
    scores = [model.item_scores(model.start_decoding(**one)) for one in (long, short)]
    assert torch.allclose(*scores, atol=1e-5)
    with pytest.raises(IncompatibleComponentsError, match="max_position_embeddings=3"):
        model(**long)
    answers = model.recommend([[], ["i1"]], tokenizer=_tokenizer(), k=N)
    assert len(answers[0]) == N and len(answers[1]) == N - 1


# ------------------------------------------------------------------------------------------------ loss and scores


def test_loss_is_the_mean_over_queries_plus_the_reconstruction() -> None:
    model, batch = _model(), _batch()
    _, error = model.model.tokens(model.model.item_features)
    semantic = model.model.item_features[:, WIDTHS[0] :]
    code = model.model.tokens.encoder(semantic)
    assert torch.allclose(error, (model.model.tokens.decoder(code) - semantic).square().mean())
    terms = []
    for history in HISTORIES:
        for length in range(1, len(history)):
            products = model.start_decoding(**_batch([history[:length]])).products_nBN[:, 0]
            terms.append(-products.log_softmax(-1)[:, int(history[length][1:])].mean())
    loss = model(**batch, labels=_labels(batch)).loss
    assert torch.allclose(loss, torch.stack(terms).mean() + 0.7 * error, atol=1e-4)
    # parts of one optimiser step add up to the whole
    targets = len(terms)
    parts = []
    for row in range(len(HISTORIES)):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        parts.append(model(**one, labels=_labels(batch)[row : row + 1], num_items_in_batch=targets).loss)
    assert torch.allclose(torch.stack(parts).sum(), loss, atol=1e-4)


def test_logits_are_the_scores_of_every_prefix() -> None:
    model, batch = _model(), _batch(HISTORIES[:1])
    logits = model(**batch).logits
    assert logits.shape == (1, 5, N + 4) and bool((logits[..., :4] == torch.finfo(torch.float32).min).all())
    for length in range(1, 6):
        expected = model.item_scores(model.start_decoding(**_batch([HISTORIES[0][:length]])))
        assert torch.allclose(logits[:, length - 1, 4:], expected, atol=1e-4)
    assert torch.allclose(model(**batch, logits_to_keep=1).logits, logits[:, -1:], atol=1e-5)


def test_recommend_equals_brute_force_with_exclusions_and_allow_lists() -> None:
    model, tokenizer = _model(), _tokenizer()
    scores = model.item_scores(model.start_decoding(**_batch())).log_softmax(-1)
    assert torch.allclose(model.score_all(HISTORIES, tokenizer=tokenizer), scores, atol=1e-5)
    allowed = ["i0", "i5", "i7", "i9", "i11"]
    for options in ({}, {"allowed_items": allowed}, {"exclude_seen": False}, {"allowed_items": allowed, "k": 3}):
        answers = model.recommend(HISTORIES, tokenizer=tokenizer, **({"k": 6} | options))
        for row, history in enumerate(HISTORIES):
            possible = options.get("allowed_items") or tokenizer.item_ids
            seen = set(history) if options.get("exclude_seen", True) else set()
            ranked = sorted((one for one in possible if one not in seen), key=lambda i: -scores[row, int(i[1:])])
            assert [r.item_id for r in answers[row]] == ranked[: options.get("k", 6)]


def test_codes_in_another_order_carry_the_same_items() -> None:
    """Codes only say which item it is: another numbering gives the same answers."""
    order = np.random.default_rng(1).permutation(N)
    model, other = _model(), _model()
    other.set_catalogue(order[:, None], _features())
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in range(N)], order[:, None])
    other.config.catalogue_fingerprint = tokenizer.catalogue_fingerprint
    ours = other.recommend(HISTORIES, tokenizer=tokenizer, k=4)
    theirs = model.recommend(HISTORIES, tokenizer=_tokenizer(), k=4)
    assert [[r.item_id for r in row] for row in ours] == [[r.item_id for r in row] for row in theirs]


# ------------------------------------------------------------------------------------------------ files and errors


def test_save_and_load_through_the_auto_classes(tmp_path) -> None:
    model, tokenizer = _model(semantic_weight=0.2), _tokenizer()
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModelForCausalLM, AutoModelForRecommendation):
        again = auto_class.from_pretrained(tmp_path)
        assert type(again) is SETRecForCausalLM and again.config.semantic_weight == 0.2
        weights = model.state_dict()
        assert again.state_dict().keys() == weights.keys() and "model.item_features" in weights
        assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
        answers = [one.recommend(HISTORIES, tokenizer=tokenizer, k=4) for one in (again, model)]
        assert [[r.item_id for r in row] for row in answers[0]] == [[r.item_id for r in row] for row in answers[1]]
    assert type(AutoModel.from_pretrained(tmp_path)) is SETRecModel


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"item_feature_dims": [5]}, "semantic block"),
        ({"item_feature_dim": 9}, "add up"),
        ({"semantic_weight": 1.5}, "between 0 and 1"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"codebook_sizes": [4, 4], "level_offsets": [4, 8]}, "atomic"),
    ],
)
def test_impossible_configurations_say_what_to_do(options, hint) -> None:
    with pytest.raises((IncompatibleComponentsError, StrictDataclassError), match=hint):
        _model(**options)


def test_catalogues_that_do_not_fit_are_refused() -> None:
    model = _model()
    with pytest.raises(IncompatibleComponentsError, match="code of its own"):
        model.set_catalogue(np.zeros((N, 1), int), _features())
    with pytest.raises(IncompatibleComponentsError, match=r"vectors \(12, 3\)"):
        model.set_catalogue(np.arange(N)[:, None], _features()[:, :3])
    with pytest.raises(IncompatibleComponentsError, match=r"model\.features"):
        model.set_catalogue(np.arange(N)[:, None], None)
    empty = SETRecForCausalLM(model.config)
    with pytest.raises(IncompatibleComponentsError, match="set_catalogue"):
        empty.prepare_training(np.ones(N))
    batch = _batch()
    with pytest.raises(IncompatibleComponentsError, match="token 2"):
        model(**batch, labels=torch.full_like(batch["input_ids"], 2))


def test_trie_and_scores_agree_in_the_search() -> None:
    model, tokenizer = _model(), _tokenizer()
    batch = _batch()
    items, scores = model.recommend_indices(**batch, trie=ItemTrie.from_tokenizer(tokenizer), k=3, num_beams=3)
    best = model.item_scores(model.start_decoding(**batch)).log_softmax(-1).topk(3)
    assert torch.equal(items, best.indices) and torch.allclose(scores, best.values, atol=1e-5)
