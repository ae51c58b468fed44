"""LLaDA-Rec: losses and scores against a plain re-implementation, mask rates, both trainings, recommending, saving."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, TrainerCallback

from hf_genrec import AutoModelForRecommendation, ItemTokenizer, LLaDARecConfig, LLaDARecForMaskedLM
from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet, Split
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.llada_rec import modeling_llada_rec as modeling
from hf_genrec.models.llada_rec.masking import draw_history_weights, draw_target_weights
from hf_genrec.models.llada_rec.modeling_llada_rec import LLaDARecModel

ITEMS, SIZES = 40, (5, 4, 3)
HISTORIES = [[3, 7, 1, 3], [5], [9, 2, 30, 31, 8, 2]]
FORMS = ("bidirectional", "causal")


def _tokenizer(num_items: int = ITEMS, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> ItemTokenizer:
    flat = np.random.default_rng(seed).permutation(int(np.prod(sizes)))[:num_items]
    codes = np.stack(np.unravel_index(flat, sizes), axis=1)
    return ItemTokenizer.from_codes([f"i{n}" for n in range(num_items)], codes, codebook_sizes=sizes)


def _model(tokenizer: ItemTokenizer, form: str = "causal", seed: int = 0, **options) -> LLaDARecForMaskedLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 8}
    layers = {"num_hidden_layers": 2, "history_attention": form}
    model = LLaDARecForMaskedLM(LLaDARecConfig.from_tokenizer(tokenizer, **(sizes | layers | options))).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():  # away from the start, so that nothing is equal by accident
        parameter.data.add_(
            torch.randn(parameter.shape, generator=generator) * (0.2 if "distance" not in name else 0.05)
        )
    return model


def _batch(tokenizer: ItemTokenizer, rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    tokenizer.padding_side = side
    batch = tokenizer.encode_item_indices([np.array(row, int) for row in rows], return_tensors="pt")
    tokenizer.padding_side = "left"
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _window_labels(batch: dict[str, torch.Tensor], levels: int) -> torch.Tensor:
    real = batch["attention_mask"] > 0
    return torch.where(real & (real.cumsum(1) > levels), batch["input_ids"], -100)


def _targets(tokenizer: ItemTokenizer, items: list[int]) -> torch.Tensor:
    return torch.tensor(tokenizer.item_token_table[items].astype(np.int64))


def plain_log_probs(model, ids, hidden, positions, sees, target=None) -> list[list[torch.Tensor]]:
    """Log-probabilities of every slot of every item of ONE row, in float64, without any of the model's own forward code.

    target: number of the item that attends by distance (the target, in the causal form).

    ids, hidden: per item, M token ids and M flags; positions: per item; sees[i][j]: does item i see item j?
    """
    base, config = model.model, model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    levels, heads = config.num_levels, config.num_attention_heads
    width = config.hidden_size // heads
    x = torch.stack(
        [
            (weights["model.mask_embedding"][slot] if hide else weights["model.code_embedding.weight"][token])
            + weights["model.position_embedding.weight"][position]
            for tokens, flags, position in zip(ids, hidden, positions)
            for slot, (token, hide) in enumerate(zip(tokens, flags))
        ]
    )
    allowed = torch.tensor(sees, dtype=torch.bool).repeat_interleave(levels, 0).repeat_interleave(levels, 1)

    def norm(value, name):
        return value / (value.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    for number in range(len(base.layers)):
        name = f"model.layers.{number}."
        query, key, value = (norm(x, name + "attention_norm.weight") @ weights[name + "qkv.weight"].T).chunk(3, -1)
        mixed = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = (query[:, part] @ key[:, part].T / width**0.5).masked_fill(~allowed, -torch.inf)
            if target is not None:
                for item in range(target):
                    rows, columns = (
                        slice(target * levels, (target + 1) * levels),
                        slice(item * levels, (item + 1) * levels),
                    )
                    scores[rows, columns] += 10 * weights[name + "distance_bias"][head, target - item]
            mixed.append(scores.softmax(-1) @ value[:, part])
        x = x + torch.cat(mixed, -1) @ weights[name + "out.weight"].T
        gate, up = (norm(x, name + "mlp_norm.weight") @ weights[name + "gate_up.weight"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[name + "down.weight"].T
    logits = norm(x, "model.norm.weight") @ weights["code_head.weight"].T + weights["code_head.bias"]
    blocks = [slice(first, first + size) for first, size in zip(config.level_offsets, config.codebook_sizes)]
    rows = logits.view(len(ids), levels, -1)
    return [[rows[item, slot, block].log_softmax(-1) for slot, block in enumerate(blocks)] for item in range(len(ids))]


def plain_next_item(model, history, slots) -> list[torch.Tensor]:
    """Log-probabilities of the slots (codes, -1 = hidden) of the item after a history (token ids per item)."""
    config, length = model.config, len(history)
    tokens = [max(code, 0) + offset for code, offset in zip(slots, config.level_offsets)]
    hidden = [[False] * config.num_levels] * length + [[code < 0 for code in slots]]
    if model.model.causal:
        positions, sees = range(length + 1), np.tril(np.ones((length + 1, length + 1), bool))
    else:
        positions, sees = range(length, -1, -1), np.ones((length + 1, length + 1), bool)
    target = length if model.model.causal else None
    return plain_log_probs(model, [*history, tokens], hidden, positions, sees, target)[-1]


# --------------------------------------------------------------------------------------------------------------- masks


def test_hidden_codes_follow_the_papers_distribution_and_their_weights_are_unbiased():
    levels, draws = 3, 200_000
    patterns = list(itertools.product([0, 1], repeat=levels))
    history = {}  # rate m / M, every code on its own
    target = {}  # exactly m codes
    for pattern in patterns:
        shown, hide = pattern.count(0), pattern.count(1)
        rates = [m / levels for m in range(levels + 1)]
        history[pattern] = sum(rate**hide * (1 - rate) ** shown for rate in rates) / (levels + 1)
        equal = len([other for other in patterns if sum(other) == hide])
        target[pattern] = 1 / levels / equal if hide else 0.0
    generator = torch.Generator().manual_seed(0)
    for draw, expected in ((draw_history_weights, history), (draw_target_weights, target)):
        weights = draw((draws,), levels, generator)
        code = (weights > 0).long() @ torch.tensor([4, 2, 1])
        found = torch.bincount(code, minlength=8) / draws
        for index, pattern in enumerate(patterns):
            error = (expected[pattern] * (1 - expected[pattern]) / draws) ** 0.5
            assert abs(float(found[index]) - expected[pattern]) <= 5 * error + 1e-12, (draw.__name__, pattern)
    weights = draw_target_weights((1000,), levels, generator)
    assert torch.equal(weights, (weights > 0) * levels / (weights > 0).sum(-1, keepdim=True))  # M / m
    # exact expectation of a code's weight, given the distribution above: 1, and M / (M + 1)
    assert sum(p * levels / sum(pattern) for pattern, p in target.items() if pattern[0]) == pytest.approx(1.0)
    rates = [m / levels for m in range(1, levels + 1)]
    assert sum(rate * (1 / rate) for rate in rates) / (levels + 1) == pytest.approx(levels / (levels + 1))
    for draw, mean in ((draw_history_weights, levels / (levels + 1)), (draw_target_weights, 1.0)):
        found = draw((draws,), levels, generator).mean(0)
        assert torch.allclose(found, torch.full((levels,), mean), atol=0.01), "every slot alike"


def test_the_expected_target_loss_is_the_mean_over_mask_counts_of_the_mean_over_hidden_codes():
    """Exact enumeration over all masks of one target, weighted as drawn, on a real model."""
    tokenizer = _tokenizer()
    model = _model(tokenizer, "bidirectional", history_loss_weight=0.0)
    batch, labels = _batch(tokenizer, [[3, 7]]), _targets(tokenizer, [12])
    history = batch["input_ids"].view(2, 3).tolist()
    codes = tokenizer.codes[12].astype(int).tolist()
    expected, through_model = 0.0, 0.0
    for pattern in itertools.product([0, 1], repeat=3):
        m = sum(pattern)
        if not m:
            continue
        slots = [-1 if hide else code for hide, code in zip(pattern, codes)]
        logp = plain_next_item(model, history, slots)
        probability = 1 / 3 / len([p for p in itertools.product([0, 1], repeat=3) if sum(p) == m])
        nll = [-float(logp[slot][codes[slot]]) for slot in range(3) if pattern[slot]]
        expected += probability * sum(nll) / m
        weights = torch.tensor(pattern) * 3 / m
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                modeling, "draw_target_weights", lambda shape, levels, generator, w=weights: w.expand(*shape, 3)
            )
            through_model += probability * float(model(**batch, labels=labels).loss.detach())
    assert through_model == pytest.approx(expected, abs=1e-5)
    drawn = [
        float(model.train()(**batch, labels=labels).loss.detach()) for _ in range(250) if torch.manual_seed(_) or True
    ]
    assert np.mean(drawn) == pytest.approx(expected, abs=5 * np.std(drawn) / 250**0.5 + 0.05)  # dropout moves it a bit


# -------------------------------------------------------------------------------------------------------------- losses


def test_causal_losses_by_hand():
    tokenizer = _tokenizer()
    model = _model(tokenizer, "causal")
    rows = [[3, 7, 1, 3, 12], [5, 6], [9, 2, 30, 31, 8, 2, 4, 11, 13]]
    batch = _batch(tokenizer, rows)
    labels = _window_labels(batch, 3)
    output = model(**batch, labels=labels)
    generator, length = torch.Generator().manual_seed(0), batch["input_ids"].shape[1] // 3
    target_weights = draw_target_weights((3, length), 3, generator)
    history_weights = draw_history_weights((3, length), 3, generator)
    target = history = 0.0
    for row, items in enumerate(rows):
        tokens = tokenizer.item_token_table[items].astype(int).tolist()
        pad = length - len(items)
        for at in range(1, len(items)):
            weight = target_weights[row, pad + at]
            codes = tokenizer.codes[items[at]].astype(int).tolist()
            slots = [-1 if w > 0 else code for w, code in zip(weight, codes)]
            logp = plain_next_item(model, tokens[:at], slots)
            target -= sum(float(w) * float(logp[slot][codes[slot]]) for slot, w in enumerate(weight))
        hidden = (history_weights[row, pad:] > 0).tolist()
        sees = np.tril(np.ones((len(items), len(items)), bool))
        logp = plain_log_probs(model, tokens, hidden, range(len(items)), sees)
        share = (len(items) - 1) / len(items)
        for at, item in enumerate(items):
            for slot, weight in enumerate(history_weights[row, pad + at]):
                history -= share * float(weight) * float(logp[at][slot][int(tokenizer.codes[item][slot])])
    count = 3 * (4 + 1 + 8)
    assert float(output.target_loss) == pytest.approx(target / count, abs=1e-5)
    assert float(output.history_loss) == pytest.approx(history / count, abs=1e-5)
    model.config.history_loss_weight = 0.25
    weighted = model(**batch, labels=labels)
    assert float(weighted.loss.detach()) == pytest.approx(target / count + 0.25 * history / count, abs=1e-5)
    model.config.history_loss_weight = 0.0
    alone = model(**batch, labels=labels)
    assert float(alone.loss.detach()) == pytest.approx(target / count, abs=1e-5) and float(alone.history_loss) == 0.0


def test_bidirectional_losses_by_hand():
    tokenizer = _tokenizer()
    model = _model(tokenizer, "bidirectional")
    targets = [12, 0, 39]
    batch, labels = _batch(tokenizer, HISTORIES), _targets(tokenizer, targets)
    output = model(**batch, labels=labels)
    generator, length = torch.Generator().manual_seed(0), batch["input_ids"].shape[1] // 3
    target_weights = draw_target_weights((3, 1), 3, generator)[:, 0]
    history_weights = draw_history_weights((3, length + 1), 3, generator)
    target = history = 0.0
    for row, (items, item) in enumerate(zip(HISTORIES, targets)):
        tokens = tokenizer.item_token_table[[*items, item]].astype(int).tolist()
        codes = tokenizer.codes[item].astype(int).tolist()
        slots = [-1 if w > 0 else code for w, code in zip(target_weights[row], codes)]
        logp = plain_next_item(model, tokens[:-1], slots)
        target -= sum(float(w) * float(logp[slot][codes[slot]]) for slot, w in enumerate(target_weights[row]))
        weights = history_weights[row, length - len(items) :]
        everything = np.ones((len(items) + 1,) * 2, bool)
        logp = plain_log_probs(model, tokens, (weights > 0).tolist(), range(len(items), -1, -1), everything)
        for at, one in enumerate([*items, item]):
            for slot, weight in enumerate(weights[at]):
                history -= float(weight) * float(logp[at][slot][int(tokenizer.codes[one][slot])])
    assert float(output.target_loss) == pytest.approx(target / 9, abs=1e-5)
    assert float(output.history_loss) == pytest.approx(history / 9 / 9, abs=1e-5)  # 9 codes, 8 + 1 items
    assert float(output.loss.detach()) == pytest.approx(target / 9 + history / 81, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_losses_add_up_over_micro_batches(form, monkeypatch):
    """With num_items_in_batch the loss of a batch is the sum of the losses of its parts."""
    monkeypatch.setattr(
        modeling, "draw_target_weights", lambda shape, m, g: torch.tensor([3.0, 0, 0]).expand(*shape, m)
    )
    monkeypatch.setattr(
        modeling, "draw_history_weights", lambda shape, m, g: torch.tensor([0, 1.5, 1.5]).expand(*shape, m)
    )
    tokenizer = _tokenizer()
    model = _model(tokenizer, form)

    def batch_of(rows):
        if form == "causal":
            batch = _batch(tokenizer, rows)
            return batch | {"labels": _window_labels(batch, 3)}
        return _batch(tokenizer, [row[:-1] for row in rows]) | {
            "labels": _targets(tokenizer, [row[-1] for row in rows])
        }

    rows = [[3, 7, 1, 3, 12], [5, 6], [9, 2, 30, 31, 8, 2, 4]]
    whole = batch_of(rows)
    count = int((whole["labels"] != -100).sum())
    together = model(**whole, num_items_in_batch=torch.tensor(count)).loss
    parts = [model(**batch_of(part), num_items_in_batch=count).loss for part in (rows[:1], rows[1:])]
    torch.testing.assert_close(together, sum(parts), atol=1e-5, rtol=0)
    torch.testing.assert_close(together, model(**whole).loss)


@pytest.mark.parametrize("form", FORMS)
def test_padding_side_makes_no_difference(form):
    tokenizer = _tokenizer()
    model = _model(tokenizer, form)
    codes = torch.tensor([[[-1, -1, -1], [2, -1, 1]]]).expand(3, -1, -1)
    left, right = (
        model.score_positions(model.start_decoding(**_batch(tokenizer, HISTORIES, side)), codes)
        for side in ("left", "right")
    )
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def test_a_hidden_code_and_what_comes_later_cannot_be_seen():
    tokenizer = _tokenizer()
    model = _model(tokenizer, "causal").train()
    model.requires_grad_(True)
    batch = _batch(tokenizer, [[3, 7, 1, 3, 12]])
    model.model.code_embedding.weight.grad = None
    all_hidden = torch.full((1, 5, 3), 1.0)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 6:9] = batch["input_ids"][:, 6:9]  # only item 2 is a target
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "draw_target_weights", lambda shape, levels, generator: all_hidden)
        model.config.history_loss_weight = 0.0
        model(**batch, labels=labels).loss.backward()
    grads = model.model.code_embedding.weight.grad.abs().sum(1)
    read = set(grads.nonzero().flatten().tolist())
    assert read == set(batch["input_ids"][0, :6].tolist()), "exactly the codes of the two items before it"


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("form", FORMS)
def test_scores_by_hand_in_any_order(form):
    tokenizer = _tokenizer()
    model = _model(tokenizer, form)
    batch = _batch(tokenizer, HISTORIES)
    state = model.start_decoding(**batch)
    codes = torch.tensor([[-1, -1, -1], [2, -1, -1], [-1, -1, 1], [4, -1, 0], [0, 3, 2]])
    logp = model.score_positions(state, codes.expand(3, -1, -1))
    assert logp.shape == (3, 5, 3, 5)
    for user, items in enumerate(HISTORIES):
        history = tokenizer.item_token_table[items].astype(int).tolist()
        for beam, slots in enumerate(codes.tolist()):
            for slot, expected in enumerate(plain_next_item(model, history, slots)):
                found = logp[user, beam, slot]
                torch.testing.assert_close(found[: len(expected)].double(), expected, atol=1e-5, rtol=0)
                assert bool((found[len(expected) :] == -torch.inf).all())
    for level in range(3):
        prefix = torch.tensor([[2, 1], [0, 3]])[:, :level].expand(3, -1, -1)
        filled = torch.nn.functional.pad(prefix, (0, 3 - level), value=-1)
        expected = model.score_positions(state, filled)[:, :, level, : SIZES[level]]
        torch.testing.assert_close(model.score_codes(state, prefix, level), expected)


@pytest.mark.parametrize("form", FORMS)
def test_forward_gives_the_logits_of_the_next_item(form):
    tokenizer = _tokenizer()
    model = _model(tokenizer, form)
    batch = _batch(tokenizer, HISTORIES)
    known = torch.tensor([[-1, tokenizer.level_offsets[1] + 2, -1]]).expand(3, -1)
    for target_ids, codes in ((None, [-1, -1, -1]), (known, [-1, 2, -1])):
        logp = model(**batch, target_ids=target_ids).logits.log_softmax(-1)
        expected = model.score_positions(model.start_decoding(**batch), torch.tensor([[codes]]).expand(3, -1, -1))[:, 0]
        for slot, (first, size) in enumerate(zip(tokenizer.level_offsets, SIZES)):
            torch.testing.assert_close(logp[:, slot, first : first + size], expected[:, slot, :size])
            assert float(logp[:, slot].exp().sum(-1).min()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_recommending(form):
    tokenizer = _tokenizer()
    model = _model(tokenizer, form)
    assert model.recommendation_config.decoding == "masked_diffusion"
    histories = [[f"i{n}" for n in row] for row in HISTORIES] + [[], ["i1"] * 30]
    lists = model.recommend(histories, tokenizer=tokenizer, k=12, num_beams=12)
    for history, row in zip(histories, lists):
        ids = [one.item_id for one in row]
        assert len(set(ids)) == len(ids) == 12 and not set(ids) & set(history)
        assert [one.score for one in row] == sorted((one.score for one in row), reverse=True)
    for history, row in zip(histories, lists):
        (alone,) = model.recommend([history], tokenizer=tokenizer, k=12, num_beams=12)
        assert [one.item_id for one in alone] == [one.item_id for one in row]
        assert [one.score for one in alone] == pytest.approx([one.score for one in row], abs=1e-4)
    beam = model.recommend(histories, tokenizer=tokenizer, k=12, num_beams=12, decoding="beam")
    ordered = model.recommend(
        histories, tokenizer=tokenizer, k=12, num_beams=12, decoding_options={"order": "left_to_right"}
    )
    assert [[one.item_id for one in row] for row in beam] == [[one.item_id for one in row] for row in ordered]
    # beams for everything: the left-to-right score of an item is score_all's, item by item
    scores = model.score_all(histories, tokenizer=tokenizer)
    everything = model.recommend(histories, tokenizer=tokenizer, k=40, decoding="beam", exclude_seen=False)
    for user, row in enumerate(everything):
        found = {int(one.item_id[1:]): one.score for one in row}
        assert [found[item] for item in range(ITEMS)] == pytest.approx(scores[user].tolist(), abs=1e-4)


def test_a_history_is_encoded_once_in_the_causal_form():
    tokenizer = _tokenizer()
    model = _model(tokenizer, "causal")
    calls = []
    encode = LLaDARecModel.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LLaDARecModel, "encode", lambda self, x, *rest: calls.append(tuple(x.shape)) or encode(self, x, *rest)
        )
        model.recommend_indices(**_batch(tokenizer, HISTORIES), trie=ItemTrie.from_tokenizer(tokenizer), num_beams=20)
    assert calls == [(3, 6, 3, 16)], "three users, not sixty beams"


@pytest.mark.parametrize("form", FORMS)
def test_only_the_newest_items_are_read(form):
    tokenizer = _tokenizer()
    model = _model(tokenizer, form, max_position_embeddings=3)
    codes = torch.full((1, 1, 3), -1)
    long, short = (model.start_decoding(**_batch(tokenizer, [row])) for row in ([9, 2, 30, 31, 8], [30, 31, 8]))
    torch.testing.assert_close(model.score_positions(long, codes), model.score_positions(short, codes))


def test_many_beams_in_bounded_pieces(monkeypatch):
    tokenizer = _tokenizer()
    model = _model(tokenizer, "bidirectional")
    state = model.start_decoding(**_batch(tokenizer, HISTORIES))
    codes = torch.randint(-1, 3, (3, 7, 3), generator=torch.Generator().manual_seed(0))
    whole = model.score_positions(state, codes)
    monkeypatch.setattr(modeling, "_CHUNK_TOKENS", 50)
    torch.testing.assert_close(model.score_positions(state, codes), whole, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- random numbers, checkpoints


@pytest.mark.parametrize("form", FORMS)
def test_noise_is_torchs_in_training_and_fixed_in_evaluation(form):
    tokenizer = _tokenizer()
    model = _model(tokenizer, form)
    batch = _batch(tokenizer, HISTORIES)
    labels = _window_labels(batch, 3) if form == "causal" else _targets(tokenizer, [1, 2, 3])
    state = torch.get_rng_state()
    assert torch.equal(model(**batch, labels=labels).loss, model(**batch, labels=labels).loss)
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append([float(model(**batch, labels=labels).loss.detach()) for _ in range(2)])
    assert losses[0] == losses[1] != losses[2] and losses[0][0] != losses[0][1]


def test_gradient_checkpointing_changes_nothing():
    tokenizer = _tokenizer()
    model = _model(tokenizer, "causal", dropout=0.0).train()
    batch = _batch(tokenizer, HISTORIES)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(**batch, labels=_window_labels(batch, 3)).loss.backward()
        grads.append({name: value.grad.clone() for name, value in model.named_parameters()})
    assert all(float(grad.abs().sum()) > 0 for grad in grads[0].values())
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


@pytest.mark.parametrize("form", FORMS)
def test_save_and_load(form, tmp_path):
    tokenizer = _tokenizer()
    model = _model(tokenizer, form)
    model.recommendation_config = model.recommendation_config.merged(decoding_options={"num_steps": 2})
    model.save_pretrained(tmp_path)
    histories = [[f"i{n}" for n in row] for row in HISTORIES]
    expected = model.recommend(histories, tokenizer=tokenizer)
    for auto in (AutoModelForRecommendation, AutoModelForMaskedLM, LLaDARecForMaskedLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is LLaDARecForMaskedLM and loaded.config.to_dict() == model.config.to_dict() | {
            key: loaded.config.to_dict()[key]
            for key in ("_name_or_path", "architectures", "dtype")
            if key in loaded.config.to_dict()
        }
        assert loaded.recommendation_config == model.recommendation_config
        assert loaded.recommend(histories, tokenizer=tokenizer) == expected
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LLaDARecModel
    batch = _batch(tokenizer, HISTORIES)
    assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


def test_bad_input_is_named():
    tokenizer = _tokenizer()
    causal, paper = _model(tokenizer, "causal"), _model(tokenizer, "bidirectional")
    batch = _batch(tokenizer, HISTORIES)
    with pytest.raises(IncompatibleComponentsError, match="no whole items of 3 codes"):
        causal(batch["input_ids"][:, :-1])
    with pytest.raises(IncompatibleComponentsError, match=r"'causal' they must have the shape of input_ids"):
        causal(**batch, labels=_targets(tokenizer, [1, 2, 3]))
    with pytest.raises(IncompatibleComponentsError, match=r"'bidirectional' they must have .*\(3, 3\)"):
        paper(**batch, labels=batch["input_ids"])
    with pytest.raises(IncompatibleComponentsError, match=r"a row of 9 items exceeds what the model reads \(8\)"):
        paper(**_batch(tokenizer, [list(range(9))]), labels=_targets(tokenizer, [1]))
    with pytest.raises(IncompatibleComponentsError, match="token 5 is no code of position 1"):
        paper(**batch, labels=torch.tensor([[4, 5, 14]] * 3).index_fill(1, torch.tensor([0]), 4))
    with pytest.raises(IncompatibleComponentsError, match="level 1 needs prefixes of 1 codes, got 0"):
        causal.score_codes(causal.start_decoding(**batch), torch.zeros(3, 1, 0).long(), 1)
    for options in ({"history_attention": "both"}, {"hidden_size": 15}, {"vocab_size": 9}, {"history_loss_weight": -1}):
        with pytest.raises(IncompatibleComponentsError, match=next(iter(options))):
            LLaDARecConfig.from_tokenizer(tokenizer, **options)


# ------------------------------------------------------------------------------------------------------------ training


def _successor_split(num_items: int = 30, users: int = 120, seed: int = 0) -> Split:
    """Item i is always followed by item i + 1; rows of 4 to 14 items."""
    rng = np.random.default_rng(seed)
    rows = [
        [(start + i) % num_items for i in range(length)]
        for start, length in zip(rng.integers(0, num_items, users), rng.integers(4, 15, users))
    ]
    everything = Sequences.from_rows(rows)

    def held_out(back: int) -> EvaluationSet:
        targets = np.array([row[-back] for row in rows], np.int32)
        return EvaluationSet(np.arange(users), everything.truncate_tail(back), targets)

    return Split("leave_one_out", everything.truncate_tail(2), held_out(2), held_out(1), {})


def _arguments(folder, **options) -> RecommenderTrainingArguments:
    values = {"max_history": 10, "warmup_steps": 3, "eval_ks": [1, 5], "eval_num_beams": 10, "eval_exclude_seen": False}
    values |= {"disable_tqdm": True, "use_cpu": True, "learning_rate": 0.01}
    return RecommenderTrainingArguments(output_dir=str(folder), metric_for_best_model="recall@1", **(values | options))


def _successor_model(form: str) -> tuple[LLaDARecForMaskedLM, ItemTokenizer]:
    items = np.arange(30)
    codes = np.stack([items % 5, items // 5, (items * 7) % 4], axis=1)
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in items], codes)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = LLaDARecConfig.from_tokenizer(
        tokenizer, history_attention=form, max_position_embeddings=10, dropout=0.0, **sizes
    )
    return LLaDARecForMaskedLM(config), tokenizer


@pytest.mark.parametrize("form", FORMS)
def test_successor_catalogue_through_train_recommender(form, tmp_path):
    model, tokenizer = _successor_model(form)
    split = _successor_split()
    epochs, batch = (14, 8) if form == "causal" else (8, 16)
    args = _arguments(tmp_path, num_train_epochs=epochs, per_device_train_batch_size=batch, eval_epochs=epochs)
    result = train_recommender(model, tokenizer, split, args)
    assert result.summary["validation"]["recall@1"] == 1.0
    assert result.trainer.evaluate(split.test, metric_key_prefix="test")["test_recall@1"] == 1.0
    options = {"tokenizer": tokenizer, "k": 1, "num_beams": 10, "exclude_seen": False}
    for start in range(0, 30, 7):
        history = [f"i{(start + n) % 30}" for n in range(5)]
        for decoding in ({"num_steps": None}, {"order": "left_to_right"}):
            (row,) = model.recommend([history], decoding_options=decoding, **options)
            assert row[0].item_id == f"i{(start + 5) % 30}"


@pytest.mark.parametrize("form", FORMS)
def test_resume_is_exact(form, tmp_path):
    split = _successor_split(users=40)
    sizes = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "save_total_limit": None}
    whole, tokenizer = _successor_model(form)
    whole.model.dropout.p = 0.1
    train_recommender(whole, tokenizer, split, _arguments(tmp_path, load_best_model_at_end=False, **sizes))
    first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    again, _ = _successor_model(form)
    again.model.dropout.p = 0.1
    args = _arguments(tmp_path / "again", load_best_model_at_end=False, **sizes)
    steps = []

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    train_recommender(again, tokenizer, split, args, resume_from_checkpoint=str(first), callbacks=[Counter()])
    assert steps[0] == int(first.name.split("-")[1]) + 1, "it went on, it did not start anew"
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
