"""RecommendationMixin on a model of fixed tables: what comes out is valid, exact, and a pure function of its inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError, RequestError, UnknownItemError
from hf_genrec.generation.recommend import RecommendationConfig
from hf_genrec.generation.trie import ItemTrie

SIZES = (6, 5, 4)


def ids(lists):
    return [[entry.item_id for entry in row] for row in lists]


def test_result_is_the_exact_ranking_without_seen_items(table_model, tokenizer, histories):
    model = table_model(SIZES)
    exact = model.score_all(histories, tokenizer=tokenizer)
    result = model.recommend(histories, tokenizer=tokenizer, k=60, num_beams=60)
    for row, history, scores in zip(result, histories, exact.tolist()):
        unseen = [i for i in range(60) if f"item-{i}" not in history]
        assert [entry.rank for entry in row] == list(range(1, len(unseen) + 1))
        np.testing.assert_allclose([e.score for e in row], sorted((scores[i] for i in unseen), reverse=True), atol=1e-5)
        for entry in row:
            assert entry.score == pytest.approx(scores[int(entry.item_id.split("-")[1])], abs=1e-5)
        assert {entry.item_id for entry in row} == {f"item-{i}" for i in unseen}


def test_score_all_agrees_with_brute_force(table_model, tokenizer, histories, brute_force):
    model = table_model(SIZES)
    encoded = tokenizer.encode_histories(histories, return_tensors="pt")
    exact = brute_force(model, model.start_decoding(encoded["input_ids"], None), tokenizer.codes)
    np.testing.assert_allclose(model.score_all(histories, tokenizer=tokenizer).numpy(), exact, atol=1e-4)
    by_tensor = model.score_all(**encoded, trie=ItemTrie.from_tokenizer(tokenizer))
    np.testing.assert_allclose(by_tensor.numpy(), exact, atol=1e-4)
    model.recommendation_config = RecommendationConfig(batch_size=2)
    np.testing.assert_allclose(model.score_all(histories, tokenizer=tokenizer).numpy(), exact, atol=1e-4)


def test_users_do_not_influence_each_other(table_model, tokenizer, histories):
    model = table_model(SIZES)
    together = model.recommend(histories, tokenizer=tokenizer, k=7, num_beams=9)
    for batch_size in (1, 2, 5):
        assert ids(model.recommend(histories, tokenizer=tokenizer, k=7, num_beams=9, batch_size=batch_size)) == ids(
            together
        )
    alone = [model.recommend([history], tokenizer=tokenizer, k=7, num_beams=9)[0] for history in histories]
    assert ids(alone) == ids(together)
    backwards = model.recommend(histories[::-1], tokenizer=tokenizer, k=7, num_beams=9)
    assert ids(backwards[::-1]) == ids(together)


def test_history_is_read_once_per_batch(table_model, tokenizer, histories):
    model = table_model(SIZES)
    model.recommend(histories, tokenizer=tokenizer, batch_size=2)
    assert model.starts == 3
    assert all(rows <= 2 for rows, _ in model.calls)


def test_shared_codes_give_each_item_and_drop_only_the_seen_one(table_model, tokenizer):
    model = table_model(SIZES)
    row = model.recommend([["item-11"]], tokenizer=tokenizer, k=60, num_beams=60)[0]
    shared = [entry for entry in row if entry.item_id in {"item-10", "item-11", "item-12", "item-13", "item-20"}]
    assert [entry.item_id for entry in shared] == ["item-10", "item-12", "item-13", "item-20"]
    assert len({entry.score for entry in shared}) == 1
    kept = model.recommend([["item-11"]], tokenizer=tokenizer, k=60, num_beams=60, exclude_seen=False)[0]
    assert len(kept) == 60


def test_allow_lists(table_model, tokenizer, histories):
    model = table_model(SIZES)
    exact = model.score_all(histories, tokenizer=tokenizer)
    shared = [f"item-{i}" for i in range(0, 60, 5)]
    result = model.recommend(histories, tokenizer=tokenizer, k=3, num_beams=3, allowed_items=shared, exclude_seen=False)
    for row in result:
        assert len(row) == 3 and set(ids([row])[0]) <= set(shared)
    own = [[f"item-{user}", f"item-{user + 30}"] for user in range(5)]
    result = model.recommend(histories, tokenizer=tokenizer, k=9, allowed_items=own, exclude_seen=False)
    for user, row in enumerate(result):
        best = sorted([user, user + 30], key=lambda item: -exact[user, item])
        assert ids([row])[0] == [f"item-{item}" for item in best]
    both = model.recommend([["item-1"]], tokenizer=tokenizer, allowed_items=["item-1", "item-2"])
    assert ids(both) == [["item-2"]]


def test_a_user_who_has_seen_everything_gets_nothing(table_model, tokenizer):
    assert table_model(SIZES).recommend([[f"item-{i}" for i in range(60)]], tokenizer=tokenizer) == [[]]


def test_no_histories_is_no_work(table_model, tokenizer):
    assert table_model(SIZES).recommend([], tokenizer=tokenizer) == []
    assert table_model(SIZES).score_all([], tokenizer=tokenizer).shape == (0, 60)


def test_more_items_than_there_are(table_model, tokenizer):
    with pytest.raises(RequestError, match="k=61 items were asked for, the catalogue holds 60"):
        table_model(SIZES).recommend([["item-1"]], tokenizer=tokenizer, k=61)
    assert len(table_model(SIZES).recommend([["item-1"]], tokenizer=tokenizer, k=60)[0]) == 59


def test_indices_path_agrees_and_pads(table_model, tokenizer, histories):
    model, trie = table_model(SIZES), ItemTrie.from_tokenizer(tokenizer)
    encoded = tokenizer.encode_histories(histories, return_tensors="pt")
    seen = [tokenizer.item_index(history) for history in histories]
    items, scores = model.recommend_indices(**encoded, trie=trie, k=70, num_beams=70, seen=seen)
    assert items.shape == scores.shape == (5, 70) and items.dtype == torch.int64
    assert torch.equal(items < 0, torch.isneginf(scores))
    assert model.recommend_indices(torch.zeros(0, 3, dtype=torch.long), trie=trie, k=4)[0].shape == (0, 4)
    named = model.recommend(histories, tokenizer=tokenizer, k=60, num_beams=70)
    assert [[f"item-{i}" for i in row if i >= 0] for row in items.tolist()] == ids(named)
    allowed = torch.zeros(5, 60, dtype=torch.bool)
    allowed[:, [3, 4]] = True
    items, _ = model.recommend_indices(**encoded, trie=trie, k=3, allowed_BN=allowed)
    assert [sorted(row) for row in items.tolist()] == [[-1, 3, 4]] * 5


def test_rescoring_changes_the_order_and_stays_inside_the_candidates(table_model, tokenizer, histories):
    model = table_model(SIZES)
    plain = model.recommend(histories, tokenizer=tokenizer, k=8, num_beams=8)
    seen = {}

    def rescore(state, items_BK, scores_BK, config):
        seen["shape"], seen["weight"] = items_BK.shape, config.dense_weight
        return -items_BK.float()

    model.rescore_items = rescore
    fused = model.recommend(histories, tokenizer=tokenizer, k=8, num_beams=8, dense_weight=0.5)
    assert seen["weight"] == 0.5
    for before, after in zip(plain, fused):
        numbers = [int(entry.item_id.split("-")[1]) for entry in after]
        assert numbers == sorted(numbers)
        assert set(ids([after])[0]) == set(ids([before])[0])


@pytest.mark.parametrize("num_items", [1, 2, 9, 100, 100_000])
@pytest.mark.parametrize("num_beams", [1, 10, 50])
def test_only_valid_distinct_items(num_items, num_beams, table_model, random_codes):
    """Catalogues of 1, 2, beams - 1, 100 and 100,000 items: valid, distinct, as many as asked for or as exist."""
    sizes = (64, 64, 64)
    for unique in (True, False):
        trie = ItemTrie.from_codes(random_codes(num_items, sizes, seed=num_items, unique=unique), sizes)
        model = table_model(sizes, seed=num_beams, sharpness=4.0)
        rng = np.random.default_rng(1)
        seen = [rng.integers(0, num_items, 5) for _ in range(16)]
        items, scores = model.recommend_indices(
            torch.arange(16).unsqueeze(1), trie=trie, k=10, num_beams=num_beams, seen=seen
        )
        for row, values, out in zip(items.tolist(), scores.tolist(), seen):
            found = [item for item in row if item >= 0]
            assert len(found) == len(set(found)) == min(10, num_items - len(set(out.tolist())))
            assert all(item < num_items for item in found) and not set(found) & set(out.tolist())
            assert row[len(found) :] == [-1] * (10 - len(found))
            assert np.isfinite(values[: len(found)]).all() and values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k must be a whole number >= 1, got 0"),
        ({"k": -3}, "k must be"),
        ({"k": True}, "k must be"),
        ({"num_beams": 0}, "num_beams must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"max_history": 0}, "max_history must be"),
        ({"dense_weight": float("nan")}, "dense_weight"),
        ({"nun_beams": 5}, "did you mean 'num_beams'"),
        ({"allowed_items": []}, "allowed_items is empty"),
        ({"allowed_items": "item-1"}, "not one string"),
        ({"allowed_items": [["item-1"], []]}, "row 1 is empty"),
        ({"allowed_items": [["item-1"]]}, "1 lists for 2 requests"),
        ({"allowed_items": ["item-1", ["item-2"]]}, "mixes"),
        ({"allowed_items": [[1], [2]]}, "strings"),
        ({"allowed_items": [["item-9"], ["item-2"]]}, "row 1: all 1 allowed items are in the user's history"),
        ({"user_ids": ["u"]}, "1 user_ids for 2 histories"),
    ],
)
def test_bad_requests_are_named(options, words, table_model, tokenizer):
    with pytest.raises(RequestError, match=words):
        table_model(SIZES).recommend([["item-1"], ["item-2"]], tokenizer=tokenizer, **options)


@pytest.mark.parametrize(
    ("histories", "words"),
    [
        ("item-1", "list of histories"),
        (["item-1"], "row 0 is 'item-1'"),
        ([["item-1"], [7]], "row 1 holds 7"),
        (None, "list"),
    ],
)
def test_bad_histories_are_named(histories, words, table_model, tokenizer):
    with pytest.raises(RequestError, match=words):
        table_model(SIZES).recommend(histories, tokenizer=tokenizer)


def test_unknown_items_are_named(table_model, tokenizer):
    with pytest.raises(UnknownItemError, match="allowed_items row 1: 'nope'"):
        table_model(SIZES).recommend(
            [["item-1"], ["item-2"]], tokenizer=tokenizer, allowed_items=[["item-3"], ["nope", "item-4"]]
        )
    with pytest.raises(UnknownItemError):
        table_model(SIZES).recommend([["nope"]], tokenizer=tokenizer)


def test_another_catalogue_is_refused(table_model, tokenizer):
    model = table_model(SIZES)
    model.config = type("Config", (), {"catalogue_fingerprint": "0" * 64})()
    for call in (model.recommend, model.score_all):
        with pytest.raises(IncompatibleComponentsError, match="made for catalogue 000000000000"):
            call([["item-1"]], tokenizer=tokenizer)
    model.config.catalogue_fingerprint = tokenizer.catalogue_fingerprint
    assert model.recommend([["item-1"]], tokenizer=tokenizer)


def test_score_all_says_what_it_needs(table_model, tokenizer):
    model = table_model(SIZES)
    for options, words in [
        ({"histories": [["item-1"]]}, "needs the catalogue"),
        ({"tokenizer": tokenizer}, "either histories"),
        ({"histories": [["item-1"]], "trie": ItemTrie.from_tokenizer(tokenizer)}, "needs tokenizer"),
    ]:
        with pytest.raises(RequestError, match=words):
            model.score_all(**options)


def test_unimplemented_models_say_so(tokenizer):
    from hf_genrec.generation.recommend import RecommendationMixin

    class Empty(RecommendationMixin):
        device = torch.device("cpu")

    with pytest.raises(NotImplementedError, match="Empty must implement start_decoding"):
        Empty().recommend([["item-1"]], tokenizer=tokenizer)
