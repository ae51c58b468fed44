"""Speculative decoding: a slow reference in plain Python, the limits of the threshold, cold items, exits, filters, batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_genrec.errors import GenRecError, IncompatibleComponentsError, RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding.speculative import speculate
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.search import search_items
from hf_genrec.generation.trie import ItemTrie

SIZES = (4, 5, 6)
INF = float("inf")


@pytest.fixture
def drafting(table_model):
    """A model with a retriever of its own: a random table of user x item scores."""

    class DraftingModel(table_model):
        def __init__(self, codebook_sizes, num_items, seed=0):
            super().__init__(codebook_sizes, seed, sharpness=1.0)
            generator = torch.Generator().manual_seed(seed + 1)
            self.items = torch.randn(self.users.shape[1], num_items, generator=generator)

        def draft_scores(self, state):
            return state @ self.items

    return DraftingModel


def start(model, rows=6):
    return model.start_decoding(torch.arange(rows).unsqueeze(1) * 3 + 1, None)


def config(k=10, num_beams=10, **options):
    return RecommendationConfig(k=k, num_beams=num_beams, decoding="speculative", decoding_options=options)


def run(model, trie, k, beams, item_filter=None, rows=6, **options):
    return speculate(
        model, start(model, rows), trie, config(k, beams), item_filter, batch_size=rows, **options
    )  # fmt: skip


def reference(model, state, codes, allowed, cold, k, beams, num_drafts, threshold):
    """One user, one item at a time, prefixes as tuples: the algorithm as its paper tells it."""
    codes = [tuple(row) for row in codes.tolist()]
    levels = len(codes[0])

    def logp(prefix):
        prefix_BKl = torch.tensor([[list(prefix)]], dtype=torch.long).reshape(1, 1, len(prefix))
        return model.score_codes(state, prefix_BKl, len(prefix))[0, 0]

    def value(item):
        steps = [float(logp(codes[item][:level])[codes[item][level]]) for level in range(levels)]
        steps = steps[:-1] if item in cold else steps
        return sum(steps) / len(steps)

    draft = model.draft_scores(state)[0]
    trained = {codes[i] for i in allowed if i not in cold}
    beam = [((), 0.0)]
    values, accepted, rounds = {}, [], 0
    for level in range(levels):
        left = [i for i in allowed if i not in values and codes[i][:level] in {prefix for prefix, _ in beam}]
        left = sorted(left, key=lambda i: -float(draft[i]))[:num_drafts]
        values |= {i: value(i) for i in left}
        accepted += [i for i in left if values[i] > threshold]
        rounds += 1
        if len(accepted) >= k:
            break
        longer = {
            (*prefix, code): score + float(logp(prefix)[code])
            for prefix, score in beam
            for code in range(SIZES[level])
            if any(item[: level + 1] == (*prefix, code) for item in trained)
        }
        beam = sorted(longer.items(), key=lambda entry: -entry[1])[:beams]
    chosen = sorted(accepted, key=lambda i: -values[i])[:k]
    if len(accepted) < k:
        found = [(i, score / levels) for prefix, score in beam for i in allowed if codes[i] == prefix and i not in cold]
        for item, score in found[: k + len(accepted)]:
            if item not in chosen and len(chosen) < k:
                values[item] = score
                chosen.append(item)
        rejected = sorted((i for i in values if i not in chosen), key=lambda i: -values[i])
        chosen += rejected[: k - len(chosen)]
    return sorted(((i, values[i]) for i in chosen), key=lambda entry: -entry[1]), rounds, len(accepted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [-INF, -4.0, -3.0, -2.0, INF])
def test_equals_the_plain_reference(drafting, random_codes, seed, threshold):
    num_items, k, beams, num_drafts = 60, 5, 6, 4
    codes = random_codes(num_items, SIZES, seed, unique=True)
    model, trie = drafting(SIZES, num_items, seed), ItemTrie.from_codes(codes, SIZES)
    rng = np.random.default_rng(seed)
    cold = set(rng.choice(num_items, 15, replace=False).tolist())
    excluded = [rng.choice(num_items, 8, replace=False) for _ in range(6)]
    item_filter = ItemFilter.from_rows(trie, excluded)
    found = run(model, trie, k, beams, item_filter, num_drafts=num_drafts, threshold=threshold, cold_items=sorted(cold))
    state = start(model)
    for user in range(6):
        allowed = [i for i in range(num_items) if i not in excluded[user]]
        expected, rounds, accepted = reference(
            model, state[user : user + 1], codes, allowed, cold, k, beams, num_drafts, threshold
        )
        assert found.items_Bk[user].tolist() == [item for item, _ in expected]
        assert found.scores_Bk[user].tolist() == pytest.approx([score for _, score in expected], abs=1e-5)
        assert (int(found.rounds_B[user]), int(found.accepted_B[user])) == (rounds, accepted)


def test_without_a_bar_it_is_the_retrievers_list_in_the_generators_order(drafting, random_codes):
    codes = random_codes(80, SIZES, 1, unique=True)
    model, trie = drafting(SIZES, 80), ItemTrie.from_codes(codes, SIZES)
    found = run(model, trie, 10, 10, num_drafts=10, threshold=-INF)
    best = model.draft_scores(start(model)).topk(10).indices
    assert torch.equal(found.items_Bk.sort(-1).values, best.sort(-1).values)
    assert (found.scores_Bk.diff(dim=-1) <= 0).all()
    assert found.rounds_B.tolist() == [1] * 6 and not torch.equal(found.items_Bk, best)


@pytest.mark.parametrize("shared", [False, True])
def test_with_an_unreachable_bar_it_is_beam_search(drafting, random_codes, shared):
    """Also with several items on one code."""
    codes = random_codes(110 if shared else 70, SIZES, 2, unique=not shared)
    model, trie = drafting(SIZES, len(codes)), ItemTrie.from_codes(codes, SIZES)
    item_filter = ItemFilter.from_rows(trie, [np.arange(row, 30) for row in range(6)])
    found = run(model, trie, 10, 12, item_filter, num_drafts=7, threshold=INF)
    plain = RecommendationConfig(k=10, num_beams=12)
    items, scores = search_items(model, start(model), trie, plain, item_filter, batch_size=6)
    assert torch.equal(found.items_Bk, items)
    torch.testing.assert_close(found.scores_Bk * 3, scores)
    assert found.accepted_B.sum() == 0 and (found.rounds_B == 3).all()


def test_cold_items_come_out_of_drafts_and_never_out_of_the_beam(drafting, random_codes):
    codes = random_codes(100, SIZES, 3, unique=True)
    model, trie = drafting(SIZES, 100), ItemTrie.from_codes(codes, SIZES)
    cold = torch.zeros(100, dtype=torch.bool)
    cold[::3] = True
    drafted = run(model, trie, 10, 20, num_drafts=20, threshold=-3.0, cold_items=cold)
    assert cold[drafted.items_Bk].any(-1).all()
    beam_only = run(model, trie, 10, 20, num_drafts=20, threshold=INF, cold_items=cold)
    assert not cold[beam_only.items_Bk].any()
    model.cold_items = cold  # a model that knows its cold items needs no option
    again = run(model, trie, 10, 20, num_drafts=20, threshold=-3.0)
    assert torch.equal(again.items_Bk, drafted.items_Bk)
    whole = run(model, trie, 10, 20, num_drafts=20, threshold=-3.0, drop_last_code=False)
    assert not torch.equal(whole.scores_Bk, drafted.scores_Bk)


def test_exits_as_soon_as_enough_is_accepted(drafting, random_codes):
    codes = random_codes(90, SIZES, 3, unique=True)
    model, trie = drafting(SIZES, 90, seed=3), ItemTrie.from_codes(codes, SIZES)
    rounds = {}
    for threshold in (-INF, -3.0, -2.5, INF):
        found = run(model, trie, 10, 10, num_drafts=12, threshold=threshold)
        assert (found.rounds_B <= 3).all() and (found.drafted_B <= 12 * found.rounds_B).all()
        assert ((found.accepted_B >= 10) | (found.rounds_B == 3)).all()
        rounds[threshold] = float(found.rounds_B.float().mean())
    assert rounds[-INF] == 1.0 < rounds[-3.0] < rounds[INF] == 3.0
    model.calls.clear()
    run(model, trie, 10, 10, num_drafts=12, threshold=-INF)
    assert len(model.calls) == 3  # one pass over the drafts' codes, no beam


@pytest.mark.parametrize("num_items", [1, 2, 9, 100])
@pytest.mark.parametrize("threshold", [-INF, -3.0, INF])
def test_any_catalogue_size_gives_distinct_allowed_items(drafting, random_codes, num_items, threshold):
    codes = random_codes(num_items, SIZES, num_items)
    model, trie = drafting(SIZES, num_items), ItemTrie.from_codes(codes, SIZES)
    for cold in ([], [0], list(range(num_items))):
        found = run(model, trie, 10, 10, num_drafts=10, threshold=threshold, cold_items=cold)
        assert found.items_Bk.shape[1] <= 10
        for row, scores in zip(found.items_Bk.tolist(), found.scores_Bk.tolist()):
            named = [item for item in row if item >= 0]
            assert len(set(named)) == len(named) and all(0 <= item < num_items for item in named)
            assert row[len(named) :] == [-1] * (len(row) - len(named)), "padding comes last"
            assert scores == sorted(scores, reverse=True)
            if num_items <= 10:
                assert len(named) == num_items, "drafts that were turned down fill up the list"


@pytest.mark.parametrize("threshold", [-INF, -3.0, -2.0, INF])
def test_a_batch_equals_each_user_alone_under_filters(drafting, random_codes, threshold):
    codes = random_codes(100, SIZES, 5)
    model, trie = drafting(SIZES, 100), ItemTrie.from_codes(codes, SIZES)
    rng = np.random.default_rng(0)
    allowed = [rng.choice(100, size, replace=False) for size in (100, 40, 12, 5, 2, 1)]
    options = {"num_drafts": 6, "threshold": threshold, "cold_items": list(range(0, 100, 4))}
    item_filter = ItemFilter.from_rows(trie, allowed=allowed)
    whole = run(model, trie, 8, 10, item_filter, **options)
    state = start(model)
    for user in range(6):
        own = item_filter.take(torch.tensor([user]))
        alone = speculate(model, state[user : user + 1], trie, config(8, 10), own, batch_size=1, **options)
        width = alone.items_Bk.shape[1]
        assert torch.equal(alone.items_Bk[0], whole.items_Bk[user, :width])
        assert (whole.items_Bk[user, width:] == -1).all()
        torch.testing.assert_close(alone.scores_Bk[0], whole.scores_Bk[user, :width])
        for name in ("rounds_B", "accepted_B", "drafted_B"):
            assert getattr(alone, name)[0] == getattr(whole, name)[user]
        named = alone.items_Bk[0][alone.items_Bk[0] >= 0].tolist()
        assert set(named) <= set(allowed[user].tolist()) and len(named) == min(8, len(allowed[user]))


def test_reached_through_the_table_of_searches(drafting, random_codes):
    codes = random_codes(50, SIZES, 6, unique=True)
    model, trie = drafting(SIZES, 50), ItemTrie.from_codes(codes, SIZES)
    options = {"num_drafts": 8, "threshold": -3.0, "cold_items": [1, 2, 3]}
    items, scores = search_items(model, start(model), trie, config(**options), batch_size=6)
    found = run(model, trie, 10, 10, **options)
    assert torch.equal(items, found.items_Bk) and torch.equal(scores, found.scores_Bk)
    model.draft_scores = lambda state: None
    with pytest.raises(IncompatibleComponentsError, match="dense head"):
        search_items(model, start(model), trie, config(), batch_size=6)


def test_impossible_drafts_come_last_with_no_score(drafting, random_codes):
    codes = random_codes(20, SIZES, 7, unique=True)
    model, trie = drafting(SIZES, 20), ItemTrie.from_codes(codes, SIZES)
    scored = model.score_codes

    def score_codes(state, prefix_BKl, level):
        logp = scored(state, prefix_BKl, level).clone()
        if level == 0:
            logp[..., codes[0, 0]] = -INF
        return logp

    model.score_codes = score_codes
    found = run(model, trie, 20, 20, num_drafts=20, threshold=-INF)
    impossible = torch.tensor(codes[:, 0] == codes[0, 0])
    assert torch.equal(impossible[found.items_Bk], found.scores_Bk == -INF)
    assert found.items_Bk.sort(-1).values.tolist() == [list(range(20))] * 6


def test_bad_requests(drafting, random_codes):
    codes = random_codes(20, SIZES, 8, unique=True)
    model, trie = drafting(SIZES, 20), ItemTrie.from_codes(codes, SIZES)
    for options, words in (
        ({"num_drafts": 0}, "num_drafts"),
        ({"threshold": math.nan}, "threshold"),
        ({"cold_items": [20]}, "outside 0..19"),
        ({"cold_items": [True, False]}, "cold_items"),
    ):
        with pytest.raises(RequestError, match=words):
            run(model, trie, 5, 5, **options)
    with pytest.raises(RequestError, match="renormalize"):
        speculate(model, start(model), trie, RecommendationConfig(renormalize=True), batch_size=6)
    other = drafting(SIZES, 19)
    with pytest.raises(IncompatibleComponentsError, match="shape"):
        run(other, trie, 5, 5)
    model.items[0] = math.nan
    with pytest.raises(GenRecError, match="NaN"):
        run(model, trie, 5, 5)
