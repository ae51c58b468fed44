"""Rewards: MiniOneRec's formulas, groups by place, the same numbers as tensors and in TRL's form, hostile batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from preference_cases import catalogue, histories, tiger
from trainer_cases import small_model, small_tokenizer

from hf_genrec.alignment.rewards import (
    CollaborativeReward,
    ItemGroups,
    RankReward,
    RuleReward,
    SemanticReward,
    WeightedReward,
    model_scores,
    rule_and_rank,
)
from hf_genrec.alignment.rollouts import ItemRollouts
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import TrainingError
from hf_genrec.evaluation.baselines import ItemGraph


def test_rank_reward_is_the_formula_of_minionerec():
    """Only groups with a hit; a miss at place i costs (1 / log2(i + 2)) / sum_j(1 / log2(j + 2))."""
    items = torch.tensor([[7, 3, 5, 1], [7, 3, 5, 1]])
    found = RankReward().score(ItemGroups(items, torch.tensor([5, 9])))
    total = sum(1 / math.log2(j + 2) for j in range(4))
    expected = [-(1 / math.log2(i + 2)) / total for i in range(4)]
    expected[2] = 0.0
    assert found[0].tolist() == pytest.approx(expected) and found[1].tolist() == [0.0] * 4
    misses = [found[0, place].item() for place in (0, 1, 3)]
    assert misses == sorted(misses)  # the higher a wrong item stood, the more it costs
    both = rule_and_rank().score(ItemGroups(items, torch.tensor([5, 9])))
    torch.testing.assert_close(both, found + torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0]]))


def test_places_may_come_in_another_order():
    ranks = torch.tensor([[2, 0, 1]])
    found = RankReward().score(ItemGroups(torch.tensor([[4, 8, 6]]), torch.tensor([8]), ranks_BG=ranks))
    total = sum(1 / math.log2(j + 2) for j in range(3))
    assert found[0].tolist() == pytest.approx([-(1 / math.log2(4)) / total, 0.0, -(1 / math.log2(3)) / total])


def test_equal_prompts_are_groups_of_their_own():
    """Two users with the same prompt and different targets: rewards go by place, not by text."""
    prompts = ["same"] * 4
    rewards = RuleReward()(prompts, ["x"] * 4, None, target=[3, 3, 5, 5], item=[3, 5, 3, 5], group_size=[2] * 4)
    assert rewards == [1.0, 0.0, 0.0, 1.0]
    ranked = RankReward()(prompts, ["x"] * 4, None, target=[3, 3, 5, 5], item=[3, 5, 3, 5], beam_rank=[0, 1, 0, 1],
                          group_size=[2] * 4)  # fmt: skip
    assert ranked[0] == ranked[3] == 0.0 and ranked[2] < ranked[1] < 0
    # the same group cut by the batch would mix users
    with pytest.raises(TrainingError, match="no whole groups of 2"):
        RuleReward()(prompts[:3], None, None, target=[3, 3, 5], item=[3, 5, 3], group_size=[2] * 3)
    with pytest.raises(TrainingError, match="several targets"):
        RuleReward()(prompts, None, None, target=[3, 5, 5, 3], item=[3, 5, 3, 5], group_size=[2] * 4)


def test_a_plain_trainer_s_completions_are_read_by_the_tokenizer():
    """Item tokens, the end token behind them, half an item, text, two items; shared codes are named by the target."""
    tokenizer = catalogue(64, shared=16)  # item 50 has the code of item 2
    table = tokenizer.item_token_table
    whole, eos, pad = table[2].tolist(), tokenizer.eos_token_id, tokenizer.pad_token_id
    completions = [whole, [*whole, eos, pad], whole[:2], [], [*whole, *table[3].tolist()], [whole[0], eos, *whole[1:]],
                   [3, *whole], table[3].tolist()]  # fmt: skip
    reward = RuleReward(tokenizer=tokenizer, num_generations=8)
    assert reward(None, None, completions, target=[50] * 8) == [1.0, 1.0, 0, 0, 0, 1.0, 0, 0]
    assert reward(None, None, completions, target=[2] * 8) == [1.0, 1.0, 0, 0, 0, 1.0, 0, 0]
    with pytest.raises(TrainingError, match="does not name the generated items"):
        RuleReward(num_generations=2)(None, None, [whole] * 2, target=[2] * 2)
    with pytest.raises(TrainingError, match="give the reward num_generations="):
        RuleReward(tokenizer=tokenizer)(None, None, completions, target=[2] * 8)


def test_semantic_reward_is_the_cosine():
    vectors = np.random.default_rng(0).normal(size=(6, 4)) * np.array([[1], [10], [0.1], [3], [1], [1]])
    items, target = [[0, 3, -1], [2, 2, 5]], [3, 2]
    found = SemanticReward(vectors).score(ItemGroups(torch.tensor(items), torch.tensor(target)))
    for row in range(2):
        for place, item in enumerate(items[row]):
            a, b = vectors[item], vectors[target[row]]
            expected = -1.0 if item < 0 else a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found[row, place].item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(TrainingError, match="finite numbers"):
        SemanticReward(np.array([[1.0, math.nan]]))


def test_collaborative_reward_is_the_other_recommender_s_score():
    train = Sequences.from_rows([[0, 1, 2], [0, 2, 3], [1, 2]])
    graph = ItemGraph(window=2).fit(train, num_items=5)
    past = [np.array([0]), np.array([1])]
    items = torch.tensor([[2, 4, -1], [2, 3, 0]])
    table = graph.score(Sequences.from_rows(past))
    raw = CollaborativeReward(graph, scale="raw").score(ItemGroups(items, torch.tensor([2, 2]), past))
    worst = table.min(axis=1)
    for row in range(2):
        for place, item in enumerate(items[row].tolist()):
            assert raw[row, place].item() == pytest.approx(worst[row] if item < 0 else table[row, item])
    unit = CollaborativeReward(graph).score(ItemGroups(items, torch.tensor([2, 2]), past))
    spans = table.max(axis=1) - worst
    expected = (raw.double() - torch.tensor(worst)[:, None]) / torch.tensor(spans)[:, None]
    torch.testing.assert_close(unit.double(), expected, atol=1e-6, rtol=1e-5)
    assert unit.max() <= 1 and unit.min() >= 0
    with pytest.raises(TrainingError, match="`history` column"):
        CollaborativeReward(graph).score(ItemGroups(items, torch.tensor([2, 2])))
    columns = {"target": [2] * 3, "item": items[0].tolist(), "history": [[0]] * 3, "group_size": 3}
    assert CollaborativeReward(graph)(None, None, None, **columns) == pytest.approx(unit[0].tolist())
    mixed = WeightedReward([(0.5, RuleReward()), (2.0, CollaborativeReward(graph))])
    assert mixed(None, None, None, **columns) == pytest.approx((2 * unit[0] + torch.tensor([0.5, 0, 0])).tolist())


def test_a_model_of_this_library_as_the_other_recommender():
    tokenizer = small_tokenizer("sasrec")
    model = small_model("sasrec", tokenizer).eval()
    past = [np.array([1, 2, 3]), np.array([7])]
    scores = model_scores(model, tokenizer, batch_size=1)(Sequences.from_rows(past))
    expected = model.score_all([[f"i{i}" for i in row] for row in past], tokenizer=tokenizer)
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)
    found = CollaborativeReward(model_scores(model, tokenizer)).score_items(past, np.array([[4, 5], [8, 9]]))
    order = np.take_along_axis(scores, np.array([[4, 5], [8, 9]]), axis=1)
    assert ((found[:, 0] > found[:, 1]) == (order[:, 0] > order[:, 1])).all()


def test_rollouts_take_the_target_in_and_leave_seen_items_out():
    tokenizer = catalogue()
    model = tiger(tokenizer).eval()
    past, chosen = histories(6, seed=3)
    encoded = tokenizer.encode_item_indices(past, return_tensors="pt")
    rows = list(past)
    search = ItemRollouts(tokenizer, 5, exclude_seen=True, add_target=True, num_beams=64)
    items, scores = search(model, encoded["input_ids"], encoded["attention_mask"], targets=chosen, histories=rows)
    plain = model.recommend([[f"i{i}" for i in row] for row in past], tokenizer=tokenizer, k=5, num_beams=64)
    for row, (found, ranked) in enumerate(zip(items.tolist(), plain)):
        expected = [int(r.item_id[1:]) for r in ranked]
        if chosen[row] not in expected:
            assert found == [*expected[:4], chosen[row]] and scores[row, 4] == -math.inf
        else:
            assert found == expected
    seen = [np.append(row, target) for row, target in zip(rows, chosen)]  # bought again: the target stays possible
    items, _ = search(model, encoded["input_ids"], encoded["attention_mask"], targets=chosen, histories=seen)
    assert all(target in row for target, row in zip(chosen, items.tolist()))
    with pytest.raises(TrainingError, match="`history` column"):
        search(model, encoded["input_ids"], encoded["attention_mask"])
