"""repeat_weight: the exact ranking with a weight on the scores of items that the user had, by every way of asking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import RequestError
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommend
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.recipes.weights import REPEAT_WEIGHTS, choose_repeat_weight, choose_weights

SIZES = (6, 5, 4)


@pytest.fixture
def histories(histories):
    return [*histories, ["item-10", "item-20"]]


def number(item_id: str) -> int:
    return int(item_id.split("-")[1])


def small_llama(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, initializer_range=0.5, **sizes)
    ).eval()


@pytest.mark.parametrize("weight", [-1.5, 0.7, -30.0])
def test_seen_items_stand_where_score_plus_weight_puts_them(weight, table_model, tokenizer, histories):
    model = table_model(SIZES)
    exact = model.score_all(histories, tokenizer=tokenizer).numpy()
    options = {"num_beams": 60, "exclude_seen": False, "repeat_weight": weight}
    found = model.recommend(histories, tokenizer=tokenizer, k=60, **options)
    for row, history, scores in zip(found, histories, exact):
        wanted = scores.copy()
        wanted[[number(item) for item in set(history)]] += weight
        assert sorted(number(entry.item_id) for entry in row) == list(range(60))
        np.testing.assert_allclose([entry.score for entry in row], np.sort(wanted)[::-1], atol=1e-4)
        np.testing.assert_allclose([entry.score for entry in row], wanted[[number(e.item_id) for e in row]], atol=1e-4)
    shorter = model.recommend(histories, tokenizer=tokenizer, k=7, **options)
    assert [[e.item_id for e in row] for row in shorter] == [[e.item_id for e in row[:7]] for row in found]


def test_off_and_excluded_are_what_they_were(table_model, tokenizer, histories):
    model = table_model(SIZES)
    options = {"tokenizer": tokenizer, "k": 9, "num_beams": 60}
    kept = model.recommend(histories, exclude_seen=False, **options)
    assert model.recommend(histories, exclude_seen=False, repeat_weight=0.0, **options) == kept
    removed = model.recommend(histories, **options)
    assert model.recommend(histories, repeat_weight=5.0, **options) == removed  # nothing seen is there to be weighted
    never = model.recommend(histories, exclude_seen=False, repeat_weight=-1000.0, **options)
    assert [[e.item_id for e in row] for row in never] == [[e.item_id for e in row] for row in removed]
    first = model.recommend(histories, exclude_seen=False, repeat_weight=1000.0, **options)
    assert all(row[0].item_id in history for row, history in zip(first, histories))


def test_allow_lists_bind_both_parts(table_model, tokenizer, histories):
    model = table_model(SIZES)
    exact = model.score_all(histories, tokenizer=tokenizer).numpy()
    allowed = [[f"item-{i}" for i in range(start, 60, 7)] for start in range(len(histories))]
    options = {"exclude_seen": False, "repeat_weight": -1.0, "allowed_items": allowed, "k": 5, "num_beams": 60}
    for row, history, keep, scores in zip(
        model.recommend(histories, tokenizer=tokenizer, **options), histories, allowed, exact
    ):
        wanted = {item: scores[number(item)] - (item in history) for item in keep}
        np.testing.assert_allclose([e.score for e in row], sorted(wanted.values(), reverse=True)[:5], atol=1e-4)
        assert {e.item_id for e in row} <= set(keep)
    only_seen = model.recommend(
        [["item-3", "item-4"]],
        tokenizer=tokenizer,
        exclude_seen=False,
        repeat_weight=-1.0,
        allowed_items=["item-4"],
        k=5,
    )
    assert [e.item_id for e in only_seen[0]] == ["item-4"]


def test_tensors_prompts_and_evaluator_rank_alike(tokenizer, histories):
    model = small_llama(tokenizer)
    config = RecommendationConfig(num_beams=60, batch_size=4, exclude_seen=False, repeat_weight=-0.8)
    by_history = recommend(model, histories, tokenizer=tokenizer, k=10, recommendation_config=config)
    numbers = [[number(entry.item_id) for entry in row] for row in by_history]
    prompts = tokenizer.encode_histories(histories, return_tensors="pt")
    by_prompt = recommend(model, histories, **prompts, tokenizer=tokenizer, k=10, recommendation_config=config)
    assert [[number(e.item_id) for e in row] for row in by_prompt] == numbers
    lists = Sequences.from_rows([[number(item) for item in row] for row in histories])
    recommender = ModelRecommender(model, tokenizer, config)
    assert recommender.recommend_topk(lists, 10, False).tolist() == numbers
    removed, kept = recommender.recommend_topk_both(lists, 10)
    assert kept.tolist() == numbers
    plain = recommend(model, histories, tokenizer=tokenizer, k=10, num_beams=60)
    assert removed.tolist() == [[number(e.item_id) for e in row] for row in plain]


def test_our_own_models_in_the_evaluator(table_model, tokenizer, histories):
    model = table_model(SIZES)
    config = RecommendationConfig(num_beams=60, exclude_seen=False, repeat_weight=-0.8)
    found = model.recommend(histories, tokenizer=tokenizer, k=10, num_beams=60, exclude_seen=False, repeat_weight=-0.8)
    rows = [[number(item) for item in row] for row in histories]
    trie, encoded = ItemTrie.from_tokenizer(tokenizer), tokenizer.encode_histories(histories, return_tensors="pt")
    again = [np.unique(row) for row in rows]
    items, _ = model.recommend_indices(**encoded, trie=trie, k=10, repeats=again, config=config)
    assert items.tolist() == [[number(e.item_id) for e in row] for row in found]
    table = torch.zeros(len(rows), 60, dtype=torch.bool)
    table[:, 30:] = True
    left_out = [np.array([59])] * len(rows)
    items, scores = model.recommend_indices(
        **encoded, trie=trie, k=29, repeats=again, seen=left_out, allowed_BN=table, config=config
    )
    exact = model.score_all(histories, tokenizer=tokenizer).numpy()
    for row, values, had, truth in zip(items.tolist(), scores.tolist(), rows, exact):
        assert sorted(row) == list(range(30, 59))
        np.testing.assert_allclose(values, [truth[item] - 0.8 * (item in had) for item in row], atol=1e-4)


def test_searches_that_draw_are_refused(table_model, tokenizer, histories):
    options = {"exclude_seen": False, "repeat_weight": -1.0, "decoding": "sample"}
    with pytest.raises(RequestError, match="'sample' draws items"):
        table_model(SIZES).recommend(histories, tokenizer=tokenizer, k=5, **options)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), True, "high"])
def test_bad_weights_are_named(value):
    with pytest.raises(RequestError, match="repeat_weight must be a finite number, got"):
        RecommendationConfig(repeat_weight=value)


class ValidationPart:
    def __init__(self, histories, targets):
        rows = Sequences.from_rows(histories)
        self.validation = EvaluationSet(np.arange(len(rows)), rows, np.asarray(targets))


@pytest.mark.parametrize("returning", [True, False])
def test_the_weight_is_chosen_by_what_users_did(returning, tokenizer):
    """Users who always return to an item against users who never do."""
    model, rng = small_llama(tokenizer), np.random.default_rng(0)
    model.recommendation_config = RecommendationConfig(num_beams=60, batch_size=16)
    histories = [rng.permutation(60)[:12] for _ in range(40)]
    lists = ModelRecommender(model, tokenizer).recommend_topk(Sequences.from_rows(histories), 60, False)
    place = [int(np.flatnonzero(np.isin(row, had) == returning)[2]) for row, had in zip(lists, histories)]
    split = ValidationPart(histories, [row[at] for row, at in zip(lists, place)])
    reached = choose_weights(model, tokenizer, split, ["repeat_weight"], progress=False)["repeat_weight"]
    assert list(reached) == [f"{weight:g}" for weight in REPEAT_WEIGHTS]
    chosen = model.recommendation_config.repeat_weight
    assert (chosen > 0) == returning and chosen != 0
    best = max(reached.values())
    assert reached[f"{chosen:g}"] == best > reached["0"]
    # each value of the grid is what the recommender reaches with it
    for weight in (-2.0, 1.0):
        config = model.recommendation_config.merged(repeat_weight=weight)
        kept = ModelRecommender(model, tokenizer, config).recommend_topk(split.validation.histories, 10, False)
        gains = [1 / np.log2(2 + row.index(t)) for row, t in zip(kept.tolist(), split.validation.targets) if t in row]
        assert reached[f"{weight:g}"] == pytest.approx(sum(gains) / len(histories), abs=1e-9)


def test_equal_weights_leave_it_at_zero(tokenizer):
    model = small_llama(tokenizer)
    model.recommendation_config = RecommendationConfig(num_beams=60)
    histories = [[3], [4]]
    worst = ModelRecommender(model, tokenizer).recommend_topk(Sequences.from_rows(histories), 59, True)[:, -1]
    reached = choose_repeat_weight(model, tokenizer, ValidationPart(histories, worst), progress=False)
    assert set(reached.values()) == {0.0} and max(reached, key=lambda weight: reached[weight]) == "0"
