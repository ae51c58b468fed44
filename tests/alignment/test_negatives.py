"""Samplers of rejected items: exclusion, determinism, distributions, prefix ranges, beams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preference_cases import catalogue, histories, tiger
from transformers import LlamaConfig, LlamaForCausalLM

from hf_genrec.alignment.negatives import (
    BeamNegatives,
    FeedbackNegatives,
    PopularityNegatives,
    PrefixNegatives,
    RandomNegatives,
    code_groups,
    named_sampler,
    shared_prefix,
)
from hf_genrec.alignment.self_preference import RewardPairs
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import RequestError, TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommend
from hf_genrec.identifiers.tokenization_item import ItemTokenizer


def samplers(tokenizer):
    user_rows, _ = histories(30, seed=9, longest=20)
    return {
        "random": RandomNegatives(64, seed=1),
        "popularity": PopularityNegatives(np.arange(64), seed=1),
        "feedback": FeedbackNegatives(user_rows, 64, seed=1),
        "prefix": PrefixNegatives(tokenizer, (1, 2), seed=1),
        "beam": BeamNegatives(tiger(tokenizer), tokenizer, num_beams=20, batch_size=7),
    }


@pytest.mark.parametrize("block", [1, 16, 1 << 20])
@pytest.mark.parametrize("name", ["random", "popularity", "feedback", "prefix", "beam"])
def test_distinct_items_outside_history_and_chosen_and_a_function_of_the_seed(name, block, monkeypatch):
    monkeypatch.setattr("hf_genrec.alignment.negatives._BLOCK", block)
    sampler = samplers(catalogue())[name]
    rows, chosen = histories(30)
    users = np.arange(30)
    rejected = sampler(rows, chosen, 5, users=users)
    assert rejected.shape == (30, 5)
    for row in range(30):
        found = rejected[row][rejected[row] >= 0].tolist()
        assert len(set(found)) == len(found)
        assert not set(found) & {*rows[row].tolist(), int(chosen[row])}
        assert (rejected[row][len(found) :] == -1).all()
    assert np.array_equal(rejected, sampler(rows, chosen, 5, users=users))
    if name != "beam":
        assert not np.array_equal(rejected, sampler(rows, chosen, 5, users=users, round=1))


def test_a_whole_catalogue_is_exhausted():
    """K above what is left: every allowed item exactly once, then -1."""
    rejected = RandomNegatives(10)(Sequences.from_rows([[0, 1], [2]]), np.array([2, 3]), 9)
    assert sorted(rejected[0].tolist()) == [-1, -1, 3, 4, 5, 6, 7, 8, 9]
    assert sorted(rejected[1].tolist()) == [-1, -1, 0, 1, 4, 5, 6, 7, 8, 9][1:]


def test_popularity_draws_in_proportion_without_replacement():
    """Two of three items with weights 1, 2, 4: all six ordered outcomes have the probabilities of successive draws."""
    counts = np.array([1.0, 2.0, 4.0, 0.0, 5.0])  # item 3 never occurs, item 4 is the chosen one
    rows = 20_000
    one = Sequences(np.zeros(rows + 1, np.int64), np.zeros(0, np.int32))
    rejected = PopularityNegatives(counts, seed=3)(one, np.full(rows, 4), 2)
    weights = counts[:3] / counts[:3].sum()
    for first in range(3):
        for second in set(range(3)) - {first}:
            expected = weights[first] * weights[second] / (1 - weights[first])
            share = ((rejected[:, 0] == first) & (rejected[:, 1] == second)).mean()
            assert share == pytest.approx(expected, abs=0.015)
    flat = PopularityNegatives(counts, power=0.5, seed=3)(one, np.full(rows, 4), 1)[:, 0]
    assert (flat == 2).mean() == pytest.approx(2 / (1 + 2**0.5 + 2), abs=0.015)


def test_the_exact_rest_has_the_same_distribution(monkeypatch):
    """With no rounds of proposals everything comes from the list of candidates."""
    monkeypatch.setattr("hf_genrec.alignment.negatives._ROUNDS", 0)
    test_popularity_draws_in_proportion_without_replacement()
    test_a_whole_catalogue_is_exhausted()
    test_prefix_range_is_exact((1, 1))


@pytest.mark.parametrize("shared", [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)])
def test_prefix_range_is_exact(shared):
    """Drawn often enough, exactly the items whose common prefix has a length in the range appear."""
    tokenizer = catalogue(num_items=50)
    rows, chosen = histories(6, num_items=50)
    found = [set() for _ in range(6)]
    for round in range(25):
        rejected = PrefixNegatives(tokenizer, shared)(rows, chosen, 12, round=round)
        for row in range(6):
            found[row] |= set(rejected[row].tolist()) - {-1}
    everything = np.arange(50)
    for row in range(6):
        lengths = shared_prefix(tokenizer.codes, np.tile(tokenizer.codes[chosen[row]], (50, 1)))
        expected = set(everything[(lengths >= shared[0]) & (lengths <= shared[1])].tolist())
        assert found[row] == expected - {*rows[row].tolist(), int(chosen[row])}


def test_items_of_one_code_count_as_one():
    tokenizer = catalogue(num_items=20, shared=8)  # items 12..19 have the codes of 0..7
    groups = code_groups(tokenizer)
    rows, chosen = histories(40, num_items=20)
    for sampler in (
        RandomNegatives(20, groups=groups),
        PrefixNegatives(tokenizer, (0, 2)),
        BeamNegatives(tiger(tokenizer), tokenizer),
    ):
        rejected = sampler(rows, chosen, 4)
        for row in range(40):
            kinds = groups[rejected[row][rejected[row] >= 0]].tolist()
            assert len(set(kinds)) == len(kinds) > 0
            assert not set(kinds) & set(groups[[*rows[row].tolist(), chosen[row]]].tolist())


def test_beam_negatives_are_the_best_scored_items():
    tokenizer = catalogue()
    model = tiger(tokenizer).eval()
    rows, chosen = histories(10)
    rejected = BeamNegatives(model, tokenizer, num_beams=64)(rows, chosen, 5)
    scores = model.score_all([[f"i{item}" for item in row] for row in rows], tokenizer=tokenizer)
    for row in range(10):
        scores[row, torch.tensor([*rows[row].tolist(), int(chosen[row])])] = -torch.inf
        assert rejected[row].tolist() == scores[row].topk(5).indices.tolist()


def test_rows_filled_in_blocks_are_not_rows_of_one_draw_again(monkeypatch):
    """Beams and whole feedback rows do not see the blocks; draws differ from block to block."""
    rows, chosen = histories(30)
    whole = {name: sampler(rows, chosen, 5, users=np.arange(30)) for name, sampler in samplers(catalogue()).items()}
    monkeypatch.setattr("hf_genrec.alignment.negatives._BLOCK", 10)
    parts = {name: sampler(rows, chosen, 5, users=np.arange(30)) for name, sampler in samplers(catalogue()).items()}
    assert np.array_equal(whole["beam"], parts["beam"])
    for one, other in zip(whole["feedback"], parts["feedback"]):
        assert len(set(one) ^ set(other)) == 0 or (one >= 0).all()  # the user's row, unless it has more than 5
    same = Sequences.from_rows([[0, 1, 2]] * 8)
    draws = RandomNegatives(64)(same, np.full(8, 3), 5)
    assert len({tuple(sorted(row)) for row in draws.tolist()}) == 8


def test_self_play_at_a_prefix_length():
    """Best-scored items among those that share exactly one code; where there are none, the fallback."""
    tokenizer = catalogue(num_items=50)
    model = tiger(tokenizer).eval()
    rows, chosen = histories(10, num_items=50)
    fallback = PrefixNegatives(tokenizer, (0, 0), seed=2)
    rejected = BeamNegatives(model, tokenizer, num_beams=64, shared=(2, 2), fallback=fallback)(rows, chosen, 4)
    assert (rejected >= 0).all()
    scores = model.score_all([[f"i{item}" for item in row] for row in rows], tokenizer=tokenizer)
    for row in range(10):
        lengths = shared_prefix(tokenizer.codes, np.tile(tokenizer.codes[chosen[row]], (50, 1)))
        own = (lengths == 2) & ~np.isin(np.arange(50), [*rows[row].tolist(), chosen[row]])
        best = scores[row].masked_fill(~torch.from_numpy(own), -torch.inf).topk(int(own.sum())).indices.tolist()
        assert rejected[row, : len(best)].tolist() == best
        assert (lengths[rejected[row, len(best) :]] == 0).all()


def test_beam_of_a_model_that_is_not_ours():
    tokenizer = catalogue()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).train()
    rows, chosen = histories(5)
    rejected = BeamNegatives(model, tokenizer, num_beams=10)(rows, chosen, 3)
    assert (rejected >= 0).all()
    assert model.training  # left as it was


def level_wins() -> tuple[ItemTokenizer, LlamaForCausalLM, np.ndarray]:
    """Two levels of two codes, a Llama whose logits follow from the last token alone, and its orders of all four items:
    by the whole vocabulary (a word leads behind `a_0`, so that items 3 and 2 come first), and by each level (1 and 0).
    """
    tokenizer = ItemTokenizer.from_codes([f"i{i}" for i in range(4)], [[0, 0], [0, 1], [1, 0], [1, 1]], (2, 2))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 1, tie_word_embeddings=False, **sizes)).eval()
    first, second = (int(offset) for offset in tokenizer.level_offsets)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        # every token is a direction of its own: the block adds nothing, the norm makes its length sqrt(8)
        for place, token in enumerate((first, first + 1, second, second + 1)):
            model.model.embed_tokens.weight[token, place] = 1.0
        head = model.lm_head.weight
        head[first, 2:4] = 0.5  # behind an item: a_0 before a_1
        head[second, :2] = -0.2  # b_0 behind b_1
        head[len(tokenizer), 0] = 3.0  # behind a_0 a word takes nearly everything
    orders = {}
    for restrict in (False, True):
        found = recommend(
            model, [["i1"]], tokenizer=tokenizer, k=4, num_beams=4, exclude_seen=False, restrict_to_level=restrict
        )
        orders[restrict] = [int(one.item_id[1:]) for one in found[0]]
    return tokenizer, model, np.array([orders[False], orders[True]])


@pytest.mark.parametrize("restrict", [False, True])
def test_the_models_own_answers_are_those_it_is_served_with(restrict):
    """Beams and candidates of a stock model follow its recommendation_config, unless told otherwise."""
    tokenizer, model, orders = level_wins()
    assert orders.tolist() == [[3, 2, 1, 0], [1, 0, 3, 2]]
    model.recommendation_config = RecommendationConfig(restrict_to_level=restrict)
    rows = EvaluationSet(np.arange(1), Sequences.from_rows([[1]]), np.array([2]))
    left = [item for item in orders[int(restrict)] if item not in (1, 2)]
    assert BeamNegatives(model, tokenizer, num_beams=4)(rows.histories, rows.targets, 2).tolist() == [left]
    forced = BeamNegatives(model, tokenizer, num_beams=4, restrict_to_level=not restrict)
    assert forced(rows.histories, rows.targets, 2).tolist() == [[i for i in orders[int(not restrict)] if i in left]]
    made = named_sampler("beam", tokenizer, np.ones(4), model=model, num_negatives=2)
    assert made(rows.histories, rows.targets, 1).tolist() == [left[:1]]
    model.recommendation_config = RecommendationConfig(renormalize=True)  # here every code is legal behind every other
    legal = [item for item in orders[1] if item not in (1, 2)]
    assert BeamNegatives(model, tokenizer, num_beams=4)(rows.histories, rows.targets, 2).tolist() == [legal]
    seen = []
    reward = lambda past, items_BN: seen.append(items_BN.tolist()) or items_BN * 1.0
    RewardPairs(reward, num_candidates=2, share=1.0)(model, tokenizer, rows)
    model.recommendation_config = RecommendationConfig(restrict_to_level=restrict)
    RewardPairs(reward, num_candidates=2, share=1.0)(model, tokenizer, rows)
    assert seen == [[[item for item in order if item != 1][:2]] for order in (orders[1], orders[int(restrict)])]


def test_feedback_takes_all_of_the_users_row():
    disliked = Sequences.from_rows([[1, 2, 3], [], [5]])
    rows, chosen = Sequences.from_rows([[2], [0], [0], [0]]), np.array([9, 9, 5, 9])
    sampler = FeedbackNegatives(disliked, 10)
    rejected = sampler(rows, chosen, 3, users=np.array([0, 1, 2, 2]))
    assert [sorted(set(row.tolist()) - {-1}) for row in rejected] == [[1, 3], [], [], [5]]
    filled = FeedbackNegatives(disliked, 10, fallback=RandomNegatives(10))(
        rows, chosen, 3, users=np.array([0, 1, 2, 2])
    )
    assert (filled >= 0).all() and set(filled[0, :2].tolist()) == {1, 3} and filled[3, 0] == 5
    with pytest.raises(TrainingError, match="users="):
        sampler(rows, chosen, 3)


def test_self_play_by_name_fills_up_in_its_range_and_then_anywhere():
    tokenizer = catalogue(num_items=50)
    model = tiger(tokenizer).eval()
    rows, chosen = histories(10, num_items=50)
    lengths_of = lambda row: shared_prefix(
        tokenizer.codes[rejected[row]], np.tile(tokenizer.codes[chosen[row]], (4, 1))
    ).tolist()
    rejected = named_sampler("self_play", tokenizer, np.ones(50), model=model, shared=[2, 2])(rows, chosen, 4)
    for row in range(10):  # at most three others share two codes
        lengths = lengths_of(row)
        near = sum(
            shared_prefix(tokenizer.codes[[item]], tokenizer.codes[[chosen[row]]])[0] == 2
            for item in set(range(50)) - {*rows[row].tolist(), int(chosen[row])}
        )
        assert lengths[:near] == [2] * near and near < 4 and all(length != 2 for length in lengths[near:])
    rejected = named_sampler("self_play", tokenizer, np.ones(50), model=model)(rows, chosen, 4)
    assert all(1 <= length <= 2 for row in range(10) for length in lengths_of(row))


def test_what_a_name_would_ignore_is_refused():
    tokenizer, counts = catalogue(), np.ones(64)
    for name in ("random", "popularity", "feedback"):
        with pytest.raises(RequestError, match=rf"shared \[1, 2\] has no effect on {name} negatives"):
            named_sampler(name, tokenizer, counts, shared=[1, 2], rejected_by_user=Sequences.from_rows([[1]]))
    for name in ("prefix", "beam", "self_play"):
        named_sampler(name, tokenizer, counts, shared=[1, 2], model=tiger(tokenizer))
    with pytest.raises(RequestError, match="rejected_by_user"):
        named_sampler("feedback", tokenizer, counts)
    low = Sequences.from_rows([[1, 2, 3], []])
    rejected = named_sampler("feedback", tokenizer, counts, rejected_by_user=low)(
        Sequences.from_rows([[2], [0]]), np.array([9, 9]), 3, users=np.array([0, 1])
    )
    assert [sorted(set(row.tolist()) - {-1}) for row in rejected] == [[1, 3], []]


def test_bad_input():
    tokenizer, rows, chosen = catalogue(), Sequences.from_rows([[0], [1]]), np.array([2, 64])
    with pytest.raises(TrainingError, match=r"row 1: item 64 is outside 0\.\.63"):
        RandomNegatives(64)(rows, chosen, 2)
    with pytest.raises(TrainingError, match="at least 1"):
        RandomNegatives(64)(rows, chosen, 0)
    with pytest.raises(TrainingError, match="2 histories for 1 chosen"):
        RandomNegatives(64)(rows, chosen[:1], 1)
    with pytest.raises(TrainingError, match="from 0 to 2"):
        PrefixNegatives(tokenizer, (1, 3))
    with pytest.raises(TrainingError, match="counts"):
        PopularityNegatives(np.zeros(4))
    assert RandomNegatives(4)(Sequences.from_rows([]), np.zeros(0, int), 2).shape == (0, 2)
