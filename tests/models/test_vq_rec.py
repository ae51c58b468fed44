"""VQ-Rec: digits have no order, dense scores are brute force, both losses as written, code vectors move to another domain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel

from hf_genrec import AutoModelForRecommendation, ItemTokenizer, ItemTrie
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.models.vq_rec.configuration_vq_rec import VQRecConfig
from hf_genrec.models.vq_rec.modeling_vq_rec import PretrainingPhase, VQRecForRecommendation, VQRecModel
from hf_genrec.models.vq_rec.permutation import CodePermutation, largest_per_row, sinkhorn

L, C, N = 4, 5, 14
HISTORIES = [["i3", "i1", "i4", "i1", "i5"], ["i9"], ["i2", "i2"], ["i6", "i5", "i3", "i5"]]


def _codes(seed: int = 0) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, C, (N, L))
    codes[13] = codes[12]  # two items that share all codes
    return codes


def _tokenizer(codes: np.ndarray | None = None) -> ItemTokenizer:
    codes = _codes() if codes is None else codes
    return ItemTokenizer.from_codes([f"i{n}" for n in range(len(codes))], codes, [C] * codes.shape[1])


def _model(tokenizer: ItemTokenizer | None = None, seed: int = 0, **options) -> VQRecForRecommendation:
    tokenizer = tokenizer or _tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "dropout": 0.0, "temperature": 0.3}
    model = VQRecForRecommendation(VQRecConfig.from_tokenizer(tokenizer, **(sizes | options))).eval()
    with torch.no_grad():  # large random weights, so that nothing agrees by being small
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.set_catalogue(tokenizer.codes)
    return model


def _batch(histories=HISTORIES, tokenizer: ItemTokenizer | None = None) -> dict[str, torch.Tensor]:
    return dict((tokenizer or _tokenizer()).encode_histories(histories, return_tensors="pt"))


def _labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    first = batch["attention_mask"].argmax(1)
    for level in range(L):
        labels[torch.arange(len(labels)), first + level] = -100
    return labels


def _numbers(history: list[str]) -> list[int]:
    return [int(one[1:]) for one in history]


# ------------------------------------------------------------------------------------------------ CHECKs of the card


def test_the_order_of_digits_changes_nothing() -> None:
    """Digits with their tables in another order: the same item vectors, losses and answers."""
    model, order = _model(), np.array([2, 0, 3, 1])
    tokenizer = _tokenizer(_codes()[:, order])
    other = _model(tokenizer)
    other.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        old, new = model.model.code_tokens(), other.model.code_tokens()
        other.model.code_embedding.weight[new] = model.model.code_embedding.weight[old[order]]
    vectors = [one.model.item_vectors(one._item_tokens()) for one in (model, other)]
    assert torch.allclose(*vectors, atol=1e-6)
    batches = [_batch(), _batch(tokenizer=tokenizer)]
    losses = [one(**batch, labels=_labels(batch)).loss for one, batch in zip((model, other), batches)]
    assert torch.allclose(*losses, atol=1e-5)
    scores = [one.score_dense(one.start_decoding(**batch)) for one, batch in zip((model, other), batches)]
    assert torch.allclose(*scores, atol=1e-5)


def test_dense_scores_equal_brute_force() -> None:
    model, tokenizer, codes = _model(), _tokenizer(), _codes()
    table = model.model.code_embedding.weight
    vectors = torch.stack(
        [torch.stack([table[4 + level * C + codes[n, level]] for level in range(L)]).mean(0) for n in range(N)]
    )
    scores = model.score_dense(model.start_decoding(**_batch()))
    for row, history in enumerate(HISTORIES):
        alone = model.model(**_batch([history])).last_hidden_state[0, -1]
        cosine = torch.stack([F.cosine_similarity(alone, vector, dim=0) for vector in vectors])
        assert torch.allclose(scores[row], (cosine / 0.3).log_softmax(-1), atol=1e-4)
    assert torch.equal(scores[:, 12], scores[:, 13])
    for options in ({}, {"exclude_seen": False}, {"allowed_items": ["i0", "i12", "i13", "i5"], "k": 3}):
        answers = model.recommend(HISTORIES, tokenizer=tokenizer, **({"k": 6} | options))
        for row, history in enumerate(HISTORIES):
            possible = options.get("allowed_items") or tokenizer.item_ids
            seen = set(history) if options.get("exclude_seen", True) else set()
            ranked = sorted(
                (i for i in possible if i not in seen), key=lambda i: (-scores[row, int(i[1:])], int(i[1:]))
            )
            assert [r.item_id for r in answers[row]] == ranked[: options.get("k", 6)]


def test_searches_over_codes_find_the_same_distribution() -> None:
    model, tokenizer, batch = _model(), _tokenizer(), _batch()
    logp = model.score_dense(model.start_decoding(**batch))
    of_code = logp.clone()
    of_code[:, 12:] += np.log(2.0)  # two items of one code: the code has the mass of both
    assert torch.allclose(model.score_all(HISTORIES, tokenizer=tokenizer), of_code, atol=1e-5)
    dense, beam = (
        model.recommend(HISTORIES, tokenizer=tokenizer, k=5, num_beams=N, exclude_seen=False, decoding=name)
        for name in ("dense", "beam")
    )
    for one, other in zip(dense, beam, strict=True):
        alone = [r.item_id for r in one if r.item_id not in ("i12", "i13")]
        assert alone == [r.item_id for r in other if r.item_id not in ("i12", "i13")][: len(alone)]


def test_permutations_are_zero_or_one_with_one_per_row() -> None:
    torch.manual_seed(0)
    permutation = CodePermutation(3, 6)
    for training in (True, False):
        matrices = permutation.train(training)()
        # straight-through adds and takes away the same number, which rounds
        assert torch.allclose(matrices, matrices.round(), atol=1e-6)
        assert torch.equal(matrices.round().sum(-1), torch.ones(3, 6)) and matrices.round().max() == 1
    assert torch.equal(permutation().argmax(-1), permutation.old_codes())
    assert not torch.equal(permutation.train()().argmax(-1), permutation.old_codes())  # noise while training
    (permutation.eval()() * torch.randn(3, 6, 6)).sum().backward()
    assert bool(permutation.logits.grad.abs().sum() > 0)  # the cut lets the gradient through


def test_sinkhorn_is_doubly_stochastic_and_sharp_when_cold() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 6)
    doubly = sinkhorn(logits, iterations=200)
    assert torch.allclose(doubly.sum(-1), torch.ones(2, 6), atol=1e-4)
    assert torch.allclose(doubly.sum(-2), torch.ones(2, 6), atol=1e-4)
    wanted = torch.eye(6)[torch.randperm(6)]
    assert torch.equal(largest_per_row(sinkhorn((wanted * 4)[None] / 0.1, iterations=8))[0].round(), wanted)


# ------------------------------------------------------------------------------------------------ losses


def test_loss_is_cross_entropy_over_all_items() -> None:
    model, batch = _model(), _batch()
    terms = []
    for history in HISTORIES:
        for length in range(1, len(history)):
            logits = model(**_batch([history[:length]])).logits[0, -1]
            assert logits.shape == (N,)
            terms.append(-logits.log_softmax(-1)[_numbers(history)[length]])
    loss = model(**batch, labels=_labels(batch)).loss
    assert torch.allclose(loss, torch.stack(terms).mean(), atol=1e-5)
    whole = model(**batch, labels=_labels(batch), num_items_in_batch=len(terms) * L).loss
    assert torch.allclose(whole, loss, atol=1e-5)


def test_contrastive_loss_leaves_out_equal_targets_and_adds_one_fake() -> None:
    model, batch = _model(fake_code_ratio=1.0), _batch()
    model.pretraining.fill_(1)
    states, targets = [], []
    for history in HISTORIES:
        for length in range(1, len(history)):
            states.append(model.model(**_batch([history[:length]])).last_hidden_state[0, -1])
            targets.append(_numbers(history)[length])
    vectors = model.model.item_vectors(model._item_tokens())
    ids = model._item_tokens()[torch.tensor(targets)]
    torch.manual_seed(3)
    fakes = model.model.item_vectors(model.fake_items(ids))
    expected = []
    for state, target, fake in zip(states, targets, fakes, strict=True):
        others = [one for one in targets if one != target]  # equal targets are no negatives
        candidates = [vectors[target], *(vectors[one] for one in others), fake]
        logits = torch.stack([F.cosine_similarity(state, one, dim=0) for one in candidates]) / 0.3
        expected.append(-logits.log_softmax(-1)[0])
    torch.manual_seed(3)
    loss = model(**batch, labels=_labels(batch)).loss
    assert torch.allclose(loss, torch.stack(expected).mean(), atol=1e-4)


def test_fake_items_replace_digits_at_the_rate_asked_for() -> None:
    ids = _model()._item_tokens().repeat(200, 1)
    assert torch.equal(_model(fake_code_ratio=0.0).fake_items(ids), ids)
    torch.manual_seed(0)
    fakes = _model(fake_code_ratio=0.5).fake_items(ids)
    changed = (fakes != ids).float().mean()
    assert abs(float(changed) - 0.5 * (C - 1) / C) < 0.02  # one draw in C is the code itself
    offsets = torch.tensor([4 + level * C for level in range(L)])
    assert bool(((fakes >= offsets) & (fakes < offsets + C)).all())


def test_pretraining_ends_after_its_share_of_the_steps() -> None:
    class State:
        global_step, max_steps = 0, 10

    model = _model(pretrain_share=0.3)
    (phase,) = model.prepare_training(np.ones(N))
    assert isinstance(phase, PretrainingPhase) and _model().prepare_training(np.ones(N)) == []
    phases = []
    for State.global_step in range(10):
        phase.on_step_begin(None, State, None)
        phases.append(int(model.pretraining))
    assert phases == [1, 1, 1] + [0] * 7


# ------------------------------------------------------------------------------------------------ another domain


def _renamed(order_LC: np.ndarray) -> ItemTokenizer:
    """The same items, codes renamed digit by digit: `order_LC[l, new]` is the old name of a code."""
    names = np.argsort(order_LC, axis=1)
    return _tokenizer(np.stack([names[level][_codes()[:, level]] for level in range(L)], axis=1))


def _orders() -> np.ndarray:
    return np.stack([np.random.default_rng(level).permutation(C) for level in range(L)])


def test_the_right_permutation_gives_the_old_scores_back() -> None:
    source, tokenizer = _model(), _renamed(_orders())
    target = _model(tokenizer, seed=1)
    target.begin_transfer(source)
    trainable = [name for name, weight in target.named_parameters() if weight.requires_grad]
    assert trainable == ["model.permutation.logits"]
    with torch.no_grad():
        target.model.permutation.logits.copy_(8.0 * F.one_hot(torch.tensor(_orders()), C))
    target.eval()
    expected = source.score_dense(source.start_decoding(**_batch()))
    batch = _batch(tokenizer=tokenizer)
    assert torch.allclose(target.score_dense(target.start_decoding(**batch)), expected, atol=1e-5)
    target.end_transfer()
    assert target.model.permutation is None and all(weight.requires_grad for weight in target.parameters())
    assert torch.allclose(target.score_dense(target.start_decoding(**batch)), expected, atol=1e-5)


def test_learning_the_permutation_changes_nothing_but_the_code_table_and_helps() -> None:
    source, tokenizer = _model(), _renamed(_orders())
    target = _model(tokenizer, seed=1)
    target.begin_transfer(source)
    rng = np.random.default_rng(5)
    histories = [[f"i{n}" for n in rng.integers(0, 12, 6)] for _ in range(64)]
    old, new = _batch(histories), _batch(histories, tokenizer)
    wanted = source(**old).logits[:, -1].softmax(-1).detach()  # what the source says of the same histories

    def distance() -> torch.Tensor:
        return F.cross_entropy(target(**new).logits[:, -1], wanted)

    before = float(distance())
    optimizer = torch.optim.Adam([target.model.permutation.logits], lr=0.1)
    target.train()
    for _ in range(150):
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
    target.eval()
    target.end_transfer()
    after, best = float(distance()), float(F.cross_entropy(source(**old).logits[:, -1], wanted))
    assert after - best < 0.4 * (before - best), (before, after, best)
    weights = dict(source.model.named_parameters())
    for name, weight in target.model.named_parameters():
        if name != "code_embedding.weight":
            assert torch.equal(weight, weights[name]), name
    table, old_table = target.model.code_embedding.weight, source.model.code_embedding.weight
    for row in table[target.model.code_tokens().flatten()]:  # every new vector is an old one
        assert bool((old_table == row).all(-1).any())


def test_a_transfer_between_unlike_models_is_refused() -> None:
    with pytest.raises(IncompatibleComponentsError, match="hidden_size 8, the new one 16"):
        _model().begin_transfer(_model(hidden_size=8))
    codes = _codes()
    uneven = ItemTokenizer.from_codes([f"i{n}" for n in range(N)], codes, [C, C, C, C + 1])
    with pytest.raises(IncompatibleComponentsError, match="equal ones"):
        _model(uneven).begin_transfer(_model(uneven))


# ------------------------------------------------------------------------------------------------ files and the rest


@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_on_either_side_and_batch_mates_change_nothing(norm_first: bool) -> None:
    model, batch = _model(norm_first=norm_first), _batch()
    ids, mask = torch.zeros_like(batch["input_ids"]), torch.zeros_like(batch["attention_mask"])
    for row, real in enumerate(batch["attention_mask"].bool()):
        ids[row, : int(real.sum())], mask[row, : int(real.sum())] = batch["input_ids"][row, real], 1
    together = model.score_dense(model.start_decoding(**batch))
    assert torch.allclose(model.score_dense(model.start_decoding(ids, mask)), together, atol=1e-4)
    losses = [model(**one, labels=_labels(one)).loss for one in (batch, {"input_ids": ids, "attention_mask": mask})]
    assert torch.allclose(*losses, atol=1e-5)


def test_long_histories_are_cut_and_none_at_all_is_welcome() -> None:
    model = _model(max_position_embeddings=3)
    scores = [
        model.score_dense(model.start_decoding(**_batch([history])))
        for history in (["i1", "i2", "i3", "i4", "i5"], ["i3", "i4", "i5"])
    ]
    assert torch.allclose(*scores, atol=1e-5)
    answers = model.recommend([[], ["i1"]], tokenizer=_tokenizer(), k=N)
    assert len(answers[0]) == N and len(answers[1]) == N - 1


def test_save_and_load_through_the_auto_classes(tmp_path) -> None:
    model, tokenizer = _model(), _tokenizer()
    model.save_pretrained(tmp_path)
    again = AutoModelForRecommendation.from_pretrained(tmp_path)
    assert type(again) is VQRecForRecommendation and again.recommendation_config.decoding == "dense"
    weights = model.state_dict()
    assert again.state_dict().keys() == weights.keys() and "item_codes" in weights
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    answers = [one.recommend(HISTORIES, tokenizer=tokenizer, k=4) for one in (again, model)]
    assert [[r.item_id for r in row] for row in answers[0]] == [[r.item_id for r in row] for row in answers[1]]
    assert type(AutoModel.from_pretrained(tmp_path)) is VQRecModel


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"pretrain_share": 1.5}, "pretrain_share"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"level_offsets": [4]}, "level_offsets"),
    ],
)
def test_impossible_configurations_say_what_to_do(options, hint) -> None:
    with pytest.raises((IncompatibleComponentsError, StrictDataclassError), match=hint):
        _model(**options)


def test_labels_and_catalogues_that_do_not_fit_are_refused() -> None:
    model, batch = _model(), _batch()
    with pytest.raises(IncompatibleComponentsError, match="set_catalogue: item_codes has shape"):
        model.set_catalogue(_codes()[:, :2])
    with pytest.raises(IncompatibleComponentsError, match="no item of the catalogue"):
        missing = next(c for c in np.ndindex(*[C] * L) if tuple(c) not in set(map(tuple, _codes().tolist())))
        wrong = torch.tensor(missing) + torch.tensor(model.config.level_offsets)
        model(**batch, labels=wrong.repeat(len(HISTORIES), batch["input_ids"].shape[1] // L))
    with pytest.raises(IncompatibleComponentsError, match="no whole items"):
        model.start_decoding(batch["input_ids"][:, :-1])


def test_dense_search_with_a_filter_that_leaves_little() -> None:
    model, tokenizer, batch = _model(), _tokenizer(), _batch(HISTORIES[:2])
    trie = ItemTrie.from_tokenizer(tokenizer)
    allowed = torch.zeros(2, N, dtype=torch.bool)
    allowed[0, [1, 5]] = allowed[1, 12] = True
    items, scores = model.recommend_indices(**batch, trie=trie, k=4, allowed_BN=allowed)
    assert sorted(items[0, :2].tolist()) == [1, 5] and items[0, 2:].tolist() == [-1, -1]
    assert items[1].tolist() == [12, -1, -1, -1] and bool((scores[1, 1:] == -torch.inf).all())
    assert ItemFilter.from_rows(trie, [[], []]) is None
