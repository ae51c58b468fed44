"""Masked-diffusion decoding: brute force over every item, the beam as a special case, validity, filters, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import GenRecError, IncompatibleComponentsError, RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding.masked_diffusion import CompatibleLeaves, masked_diffusion, slots_per_step
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.search import search_items
from hf_genrec.generation.trie import ItemTrie

IDS = torch.tensor([[3], [8], [15], [33]])


class SlotModel(RecommendationMixin):
    """Random fixed tables: every filled slot shifts the logits of all slots. The user is the last token."""

    def __init__(self, codebook_sizes, seed=0, width=10, sharpness=2.0):
        draw = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu")
        self.sizes = tuple(codebook_sizes)
        self.users = torch.randn(97, width, generator=draw)
        self.embeddings = [torch.randn(size, width, generator=draw) for size in self.sizes]
        self.heads = [sharpness * torch.randn(width, size, generator=draw) for size in self.sizes]
        self.runs = 0

    def start_decoding(self, input_ids, attention_mask=None):
        return self.users[input_ids[:, -1] % len(self.users)]

    def score_positions(self, state, codes_BKM):
        self.runs += 1
        hidden = state.unsqueeze(1).expand(-1, codes_BKM.shape[1], -1)
        for slot, table in enumerate(self.embeddings):
            codes = codes_BKM[..., slot]
            hidden = hidden + torch.where(
                codes.unsqueeze(-1) < 0, torch.zeros(()), (slot + 1) * table[codes.clamp(min=0)]
            )
        logps = [(hidden.tanh() @ head).log_softmax(-1) for head in self.heads]
        return torch.stack(
            [torch.nn.functional.pad(x, (0, max(self.sizes) - x.shape[-1]), value=-torch.inf) for x in logps], dim=2
        )

    def score_codes(self, state, prefix_BKl, level):
        codes = torch.nn.functional.pad(prefix_BKl, (0, len(self.sizes) - level), value=-1)
        return self.score_positions(state, codes)[:, :, level, : self.sizes[level]]


def run(model, trie, ids=IDS, k=10, num_beams=20, item_filter=None, renormalize=False, **options):
    config = RecommendationConfig(
        k=k, num_beams=num_beams, renormalize=renormalize, decoding="masked_diffusion", decoding_options=options
    )
    with torch.no_grad():
        state = model.start_decoding(ids)
        return search_items(model, state, trie, config, item_filter, batch_size=len(ids))


def brute_force(model, state_1, codes_NM, fillings, order="confidence", renormalize=False):
    """Score of every item, one at a time, following the order that its own codes lead to."""
    items = [tuple(row) for row in np.asarray(codes_NM).tolist()]
    scores = []
    for item in items:
        filled: dict[int, int] = {}
        score = 0.0
        for count in fillings:
            codes = torch.tensor([[[filled.get(slot, -1) for slot in range(len(item))]]])
            logp = model.score_positions(state_1, codes)[0, 0].double()
            hidden = [slot for slot in range(len(item)) if slot not in filled]
            if order == "confidence":
                hidden.sort(key=lambda slot: (-float(logp[slot].max()), slot))
            for slot in hidden[:count]:
                legal = {other[slot] for other in items if all(other[s] == c for s, c in filled.items())}
                total = float(logp[slot, sorted(legal)].logsumexp(0)) if renormalize else 0.0
                score += float(logp[slot, item[slot]]) - total
                filled[slot] = item[slot]
        scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_steps", [None, 4, 2, 1])
@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
def test_beams_for_everything_give_every_item_its_brute_force_score(random_codes, order, num_steps, renormalize):
    sizes = (5, 3, 6, 4)
    codes = random_codes(60, sizes, seed=2, unique=True)
    model, trie = SlotModel(sizes, seed=1), ItemTrie.from_codes(codes, sizes)
    options = {"num_steps": num_steps, "order": order}
    items, scores = run(model, trie, k=60, num_beams=60, renormalize=renormalize, **options)
    for user in range(len(IDS)):
        state = model.start_decoding(IDS[user : user + 1])
        expected = brute_force(model, state, codes, slots_per_step(4, num_steps), order, renormalize)
        assert sorted(items[user].tolist()) == list(range(60))
        np.testing.assert_allclose(scores[user].numpy(), expected[items[user].numpy()], atol=1e-5)
        assert (np.diff(scores[user].numpy()) <= 0).all()
        if renormalize:
            assert float(scores[user].exp().sum()) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3, 10, 50])
@pytest.mark.parametrize("renormalize", [False, True])
def test_left_to_right_with_one_slot_a_step_is_beam_search(random_codes, num_beams, renormalize):
    sizes = (8, 4, 6)
    codes = random_codes(120, sizes, seed=5)  # some items share all their codes
    model, trie = SlotModel(sizes, seed=3), ItemTrie.from_codes(codes, sizes)
    excluded = [np.arange(user, 120, 7) for user in range(len(IDS))]
    for item_filter in (None, ItemFilter.from_rows(trie, excluded)):
        config = RecommendationConfig(k=num_beams, num_beams=num_beams, renormalize=renormalize)
        state = model.start_decoding(IDS)
        beam = search_items(model, state, trie, config, item_filter, batch_size=len(IDS))
        ours = run(model, trie, IDS, num_beams, num_beams, item_filter, renormalize, order="left_to_right")
        assert torch.equal(beam[0], ours[0])
        torch.testing.assert_close(beam[1], ours[1], atol=1e-6, rtol=0)


def test_the_order_is_the_models_and_differs_from_beam_to_beam(random_codes):
    sizes = (5, 3, 6, 4)
    codes = random_codes(60, sizes, seed=2, unique=True)
    model, trie = SlotModel(sizes, seed=1), ItemTrie.from_codes(codes, sizes)
    _, adaptive = run(model, trie, k=60, num_beams=60)
    _, fixed = run(model, trie, k=60, num_beams=60, order="left_to_right")
    assert not torch.allclose(adaptive, fixed, atol=1e-3)
    seen = []
    score_positions = model.score_positions

    def spy(state, codes_BKM):
        seen.append((codes_BKM < 0)[0].unique(dim=0).shape[0])
        return score_positions(state, codes_BKM)

    model.score_positions = spy
    run(model, trie, k=60, num_beams=60)
    assert seen[0] == 1 and max(seen) > 1, "beams of one user hide different slots"


@pytest.mark.parametrize("num_steps", [None, 1, 3])
@pytest.mark.parametrize("num_items", [1, 2, 19, 100])
def test_valid_distinct_items_of_every_catalogue_size(random_codes, num_items, num_steps):
    sizes = (7, 5, 3, 4)
    for unique in (True, False):
        codes = random_codes(num_items, sizes, seed=num_items, unique=unique)
        model, trie = SlotModel(sizes, seed=4), ItemTrie.from_codes(codes, sizes)
        items, scores = run(model, trie, k=20, num_beams=20, num_steps=num_steps)
        assert items.shape == (len(IDS), 20)
        for row, values in zip(items.tolist(), scores.tolist()):
            found = [item for item in row if item >= 0]
            assert len(found) == len(set(found)) == min(20, num_items)
            assert row == found + [-1] * (20 - len(found))
            assert all(np.isfinite(value) for value in values[: len(found)])
            assert all(value == -np.inf for value in values[len(found) :])


def test_all_slots_are_filled_after_the_steps_with_as_many_runs(random_codes):
    sizes = (5, 3, 6, 4)
    codes = random_codes(50, sizes, seed=1)
    trie = ItemTrie.from_codes(codes, sizes)
    for steps in (1, 2, 3, 4):
        model = SlotModel(sizes)
        items, _ = run(model, trie, num_steps=steps)
        assert model.runs == steps and bool((items >= 0).all())
    assert [slots_per_step(4, steps) for steps in (1, 2, 3, 4, None)] == [[4], [2, 2], [1, 1, 2], [1] * 4, [1] * 4]


def test_items_that_share_all_codes_come_out_one_by_one():
    codes = np.array([[0, 1], [1, 0], [0, 1], [1, 1], [0, 1]])
    model, trie = SlotModel((2, 2), seed=2), ItemTrie.from_codes(codes, (2, 2))
    items, scores = run(model, trie, k=5, num_beams=5)
    for row, values in zip(items.tolist(), scores.tolist()):
        at = row.index(0)
        assert row[at : at + 3] == [0, 2, 4] and len(set(values[at : at + 3])) == 1
        assert sorted(row) == [0, 1, 2, 3, 4]
    some = ItemFilter.from_rows(trie, [np.array([2])] * len(IDS))
    items, _ = run(model, trie, k=5, num_beams=5, item_filter=some)
    assert all(sorted(row) == [-1, 0, 1, 3, 4] for row in items.tolist())


@pytest.mark.parametrize("num_steps", [None, 2])
@pytest.mark.parametrize("order", ["confidence", "left_to_right"])
def test_filters_are_respected_and_fill_the_list(random_codes, order, num_steps):
    sizes = (6, 5, 4)
    codes = random_codes(80, sizes, seed=3)
    model, trie = SlotModel(sizes, seed=6), ItemTrie.from_codes(codes, sizes)
    draw = np.random.default_rng(0)
    allowed = [np.sort(draw.choice(80, size, replace=False)) for size in (1, 5, 12, 40)]
    for keep in (True, False):
        item_filter = ItemFilter.from_rows(trie, None if keep else allowed, allowed if keep else None)
        items, _ = run(model, trie, k=10, num_beams=10, item_filter=item_filter, order=order, num_steps=num_steps)
        for row, listed in zip(items.tolist(), allowed):
            legal = set(listed.tolist()) if keep else set(range(80)) - set(listed.tolist())
            found = [item for item in row if item >= 0]
            assert set(found) <= legal and len(set(found)) == len(found) == min(10, len(legal))


def test_a_batch_equals_each_user_alone(random_codes):
    sizes = (6, 5, 4)
    codes = random_codes(90, sizes, seed=8)
    model, trie = SlotModel(sizes, seed=7), ItemTrie.from_codes(codes, sizes)
    allowed = [np.arange(3), np.arange(40), np.arange(90), np.arange(7, 60)]
    item_filter = ItemFilter.from_rows(trie, allowed=allowed)
    for options in ({}, {"num_steps": 2}, {"order": "left_to_right"}, {"valid_only": False}):
        items, scores = run(model, trie, item_filter=item_filter, **options)
        again, _ = run(model, trie, item_filter=item_filter, **options)
        assert torch.equal(items, again)
        for user in range(len(IDS)):
            alone = ItemFilter.from_rows(trie, allowed=[allowed[user]])
            one, one_scores = run(model, trie, IDS[user : user + 1], item_filter=alone, **options)
            assert torch.equal(one[0], items[user])
            torch.testing.assert_close(one_scores[0], scores[user], atol=1e-4, rtol=0)


def test_any_combination_is_looked_up_and_what_names_no_item_is_dropped(random_codes):
    sizes = (6, 6, 6)
    codes = random_codes(40, sizes, seed=9, unique=True)  # 40 of 216 combinations
    model, trie = SlotModel(sizes, seed=9), ItemTrie.from_codes(codes, sizes)
    loose, loose_scores = run(model, trie, k=20, num_beams=20, valid_only=False)
    assert bool((loose == -1).any()), "some of the best combinations name no item"
    for row in loose.tolist():
        found = [item for item in row if item >= 0]
        assert len(set(found)) == len(found) and row == found + [-1] * (20 - len(found))
    # with beams for all combinations it is the strict search: the same items, the same scores
    everything, scores = run(model, trie, k=216, num_beams=216, valid_only=False)
    strict, strict_scores = run(model, trie, k=216, num_beams=216)
    assert torch.equal(everything, strict)
    torch.testing.assert_close(scores, strict_scores)
    out = ItemFilter.from_rows(trie, [np.array([int(row[0])]) for row in strict])
    filtered, _ = run(model, trie, k=20, num_beams=216, item_filter=out, valid_only=False)
    assert torch.equal(filtered, strict[:, 1:21])
    assert float(loose_scores[0, 0]) <= float(strict_scores[0, 0]) + 1e-6


def test_compatible_leaves_by_brute_force(random_codes):
    """After any sequence of fillings the legal codes are those of allowed items that agree with the beam."""
    sizes = (4, 5, 3, 4)
    codes = random_codes(70, sizes, seed=10)
    trie = ItemTrie.from_codes(codes, sizes)
    draw = np.random.default_rng(1)
    allowed = [draw.choice(70, 30, replace=False) for _ in range(3)]
    compatible = CompatibleLeaves.of_request(trie, ItemFilter.from_rows(trie, allowed=allowed), 3)
    filled: list[list[dict[int, int]]] = [[{}] for _ in range(3)]
    for _ in range(4):
        slots = [[int(draw.choice([s for s in range(4) if s not in beam])) for beam in row] for row in filled]
        legal = compatible.legal(torch.tensor(slots))
        expected = torch.zeros_like(legal)
        for user, row in enumerate(filled):
            for beam, fixed in enumerate(row):
                for item in allowed[user]:
                    if all(codes[item][slot] == code for slot, code in fixed.items()):
                        expected[user, beam, codes[item][slots[user][beam]]] = True
        assert torch.equal(legal, expected)
        children = [legal[user].nonzero().tolist() for user in range(3)]
        keep = min(4, *map(len, children))
        kept = [sorted(draw.choice(len(rows), keep, replace=False)) for rows in children]
        chosen = [[children[user][at] for at in kept[user]] for user in range(3)]
        parents = torch.tensor([[parent for parent, _ in row] for row in chosen])
        code = torch.tensor([[code for _, code in row] for row in chosen])
        filled = [
            [filled[user][parent] | {slots[user][parent]: code} for parent, code in chosen[user]] for user in range(3)
        ]
        compatible.fill(torch.tensor(slots), parents, code)
        assert len(compatible.leaf_E) <= sum(len(trie.item_leaf_N[torch.as_tensor(row)].unique()) for row in allowed)


def test_memory_stays_within_users_times_leaves():
    """10^5 items, 50 beams: the entries never exceed the allowed leaves of all users."""
    draw = np.random.default_rng(3)
    sizes = (32, 32, 32, 32)
    codes = draw.integers(0, 32, (100_000, 4))
    trie, model = ItemTrie.from_codes(codes, sizes), SlotModel(sizes, seed=2)
    largest = []
    fill = CompatibleLeaves.fill

    def spy(self, *args):
        fill(self, *args)
        largest.append(len(self.leaf_E))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompatibleLeaves, "fill", spy)
        excluded = [np.arange(50)] * 4
        items, _ = run(model, trie, k=50, num_beams=50, item_filter=ItemFilter.from_rows(trie, excluded))
    assert bool((items >= 50).all()) and all(len(set(row)) == 50 for row in items.tolist())
    assert len(largest) == 4 and max(largest) <= 4 * trie.num_leaves and largest == sorted(largest, reverse=True)


def test_bad_requests_are_named(random_codes):
    sizes = (4, 4)
    trie, model = ItemTrie.from_codes(random_codes(9, sizes), sizes), SlotModel(sizes)
    for steps in (0, 3, 1.5, True):
        with pytest.raises(RequestError, match="num_steps must be a whole number from 1 to 2"):
            run(model, trie, num_steps=steps)
    with pytest.raises(RequestError, match="confidence, left_to_right"):
        run(model, trie, order="random")
    other = ItemTrie.from_codes([[0, 5]], (4, 6))
    with pytest.raises(IncompatibleComponentsError, match="up to 4 codes, the catalogue has 2 slots of up to 6"):
        run(model, other)
    with pytest.raises(IncompatibleComponentsError, match="items with fewer codes"):
        run(model, ItemTrie.from_codes([[0, 1], [2, -1]], sizes))
    model.heads[0][:] = torch.nan
    with pytest.raises(GenRecError, match="row 0: the model returned NaN"):
        run(model, trie)


def test_impossible_codes_stay_legal_and_come_last(random_codes):
    sizes = (4, 3)
    codes = random_codes(10, sizes, seed=1, unique=True)
    trie, model = ItemTrie.from_codes(codes, sizes), SlotModel(sizes, seed=1)
    score_positions = model.score_positions

    def no_first_code(state, codes_BKM):
        logp = score_positions(state, codes_BKM)
        logp[:, :, 0, 1] = -torch.inf
        return logp

    model.score_positions = no_first_code
    items, scores = run(model, trie, k=10, num_beams=10)
    impossible = {item for item in range(10) if codes[item][0] == 1}
    assert impossible
    for row, values in zip(items.tolist(), scores.tolist()):
        assert sorted(row) == list(range(10))
        assert set(row[-len(impossible) :]) == impossible and values[-len(impossible) :] == [-np.inf] * len(impossible)


def test_strategy_function_has_the_tables_defaults():
    import inspect

    from hf_genrec.generation.strategies import DECODING_STRATEGIES

    parameters = inspect.signature(masked_diffusion).parameters
    options = DECODING_STRATEGIES["masked_diffusion"].options
    assert {name: parameters[name].default for name in options} == options
