"""Beam search and exhaustive scoring over a trie, against a brute force over every item."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import GenRecError, IncompatibleComponentsError
from hf_genrec.generation.decoding.beam import leaves_to_items, trie_beam_search
from hf_genrec.generation.decoding.exhaustive import score_all_leaves
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.trie import ItemTrie

SIZES = (6, 5, 4)


def users(model, count=5):
    return model.start_decoding(torch.arange(count).unsqueeze(1), None)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_items", [1, 7, 60, 300])
def test_wide_beam_is_exact(num_items, renormalize, table_model, brute_force, random_codes):
    codes = random_codes(num_items, SIZES)
    model, trie = table_model(SIZES), ItemTrie.from_codes(codes, SIZES)
    state = users(model)
    exact = brute_force(model, state, codes, renormalize)
    leaves, scores = trie_beam_search(model, state, trie, 1000, batch_size=5, renormalize=renormalize)
    assert leaves.shape[1] == trie.num_leaves
    for user in range(5):
        assert sorted(leaves[user].tolist()) == list(range(trie.num_leaves))
        assert np.all(np.diff(scores[user].numpy()) <= 0)
        by_item = torch.empty(trie.num_leaves)
        by_item[leaves[user]] = scores[user]
        np.testing.assert_allclose(by_item[trie.item_leaf_N].numpy(), exact[user], atol=1e-4)
    if renormalize:  # a distribution over the legal codes
        np.testing.assert_allclose(scores.double().exp().sum(-1).numpy(), 1.0, atol=1e-5)


@pytest.mark.parametrize("renormalize", [False, True])
def test_exhaustive_scores_in_any_chunking(renormalize, table_model, brute_force, random_codes):
    codes = random_codes(120, SIZES)
    model, trie = table_model(SIZES), ItemTrie.from_codes(codes, SIZES)
    state = users(model)
    exact = brute_force(model, state, codes, renormalize)
    for chunk in (1, 100, 10**6):
        leaves = score_all_leaves(model, state, trie, batch_size=5, renormalize=renormalize, chunk_elements=chunk)
        np.testing.assert_allclose(leaves[:, trie.item_leaf_N].numpy(), exact, atol=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3, 10])
def test_narrow_beam_is_the_textbook_beam(num_beams, table_model, random_codes):
    """The same search in Python lists: extend, sort, keep."""
    codes = random_codes(200, SIZES, seed=2)
    model, trie = table_model(SIZES, seed=2), ItemTrie.from_codes(codes, SIZES)
    state = users(model)
    legal = {tuple(row[:n]) for row in codes.tolist() for n in range(1, 4)}
    leaves, scores = trie_beam_search(model, state, trie, num_beams, batch_size=5)
    for user in range(5):
        beams = [((), 0.0)]
        for level in range(3):
            grown = []
            for prefix, score in beams:
                logp = model.score_codes(
                    state[user : user + 1], torch.tensor(prefix, dtype=torch.long).view(1, 1, level), level
                )[0, 0]
                grown += [((*prefix, c), score + float(logp[c])) for c in range(SIZES[level]) if (*prefix, c) in legal]
            beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
        assert trie.node_prefixes(3)[leaves[user]].tolist() == [list(prefix) for prefix, _ in beams]
        np.testing.assert_allclose(scores[user].numpy(), [score for _, score in beams], atol=1e-4)


@pytest.mark.parametrize("renormalize", [False, True])
def test_masks_equal_a_smaller_catalogue(renormalize, table_model, brute_force, random_codes):
    codes = random_codes(80, SIZES, seed=4, unique=True)
    model, trie = table_model(SIZES), ItemTrie.from_codes(codes, SIZES)
    state = users(model)
    allowed = torch.from_numpy(np.random.default_rng(0).random((5, 80)) < 0.2)
    exact = brute_force(model, state, codes, renormalize, allowed)
    rows = [np.flatnonzero(row) for row in allowed.numpy()]
    out = [np.flatnonzero(~row) for row in allowed.numpy()]
    for masks in (
        ItemFilter.from_rows(trie, None, rows),
        ItemFilter.from_rows(trie, out),
        ItemFilter.from_mask(trie, allowed),
    ):
        leaves, scores = trie_beam_search(model, state, trie, 80, masks, batch_size=5, renormalize=renormalize)
        for user in range(5):
            live = leaves[user] >= 0
            items = trie.items_at(leaves[user][live]).numpy()
            assert sorted(items) == sorted(rows[user])
            np.testing.assert_allclose(scores[user][live].numpy(), exact[user][items], atol=1e-4)
            assert torch.isneginf(scores[user][~live]).all()


@pytest.mark.parametrize("num_beams", [1, 2, 5, 17])
def test_no_beam_walks_into_a_dead_end(num_beams, table_model, random_codes):
    """With k beams, k legal items come out where k exist, however thin the allow-list is."""
    codes = random_codes(400, SIZES, seed=5)
    model, trie = table_model(SIZES, seed=5), ItemTrie.from_codes(codes, SIZES)
    rng = np.random.default_rng(0)
    rows = [rng.choice(400, size, replace=False) for size in (1, 2, 5, 16, 18)]
    leaves, _ = trie_beam_search(
        model, users(model), trie, num_beams, ItemFilter.from_rows(trie, None, rows), batch_size=5
    )
    for user, row in enumerate(rows):
        distinct = len({tuple(codes[item]) for item in row})
        found = leaves[user][leaves[user] >= 0].tolist()
        assert len(found) == len(set(found)) == min(num_beams, distinct)
        assert set(found) <= set(trie.item_leaf_N[row].tolist())


@pytest.mark.parametrize("num_beams", [1, 3, 4, 11, 40])
def test_equal_scores_fall_to_the_lower_leaf(num_beams, random_codes):
    class Flat:
        def score_codes(self, state, prefix_BKl, level):
            return torch.full((*prefix_BKl.shape[:2], 8), -1.0)

    trie = ItemTrie.from_codes(random_codes(100, (8, 8), seed=1), (8, 8))
    leaves, _ = trie_beam_search(Flat(), None, trie, num_beams, batch_size=2)
    assert leaves.tolist() == [list(range(min(num_beams, trie.num_leaves)))] * 2


def test_probability_zero_is_last_but_legal():
    class Certain:
        def score_codes(self, state, prefix_BKl, level):
            logp = torch.full((*prefix_BKl.shape[:2], 3), -torch.inf)
            logp[..., 1] = 0.0
            return logp

    trie = ItemTrie.from_codes([[0, 0], [0, 1], [1, 1], [2, 2]], (3, 3))
    leaves, scores = trie_beam_search(Certain(), None, trie, 4, batch_size=1)
    assert leaves.tolist() == [[2, 1, 0, 3]]  # one impossible code is better than two
    assert scores.tolist() == [[0.0] + [-float("inf")] * 3]
    leaves, _ = trie_beam_search(Certain(), None, trie, 4, batch_size=1, renormalize=True)
    assert sorted(leaves[0].tolist()) == [0, 1, 2, 3]


def test_nan_names_the_row():
    class Broken:
        def score_codes(self, state, prefix_BKl, level):
            logp = torch.zeros(*prefix_BKl.shape[:2], 3)
            logp[1] = torch.nan
            return logp

    trie = ItemTrie.from_codes([[0], [1]], (3,))
    with pytest.raises(GenRecError, match="row 1: the model returned NaN"):
        trie_beam_search(Broken(), None, trie, 2, batch_size=2)


def test_small_head_is_refused(table_model):
    trie = ItemTrie.from_codes([[0, 7]], (4, 8))
    for search in (
        lambda model: trie_beam_search(model, users(model), trie, 2, batch_size=5),
        lambda model: score_all_leaves(model, users(model), trie, batch_size=5),
    ):
        with pytest.raises(IncompatibleComponentsError, match="level 1: the model scores 4 codes"):
            search(table_model((4, 4)))


def test_first_step_runs_on_one_beam_and_dead_beams_are_dropped(table_model):
    sizes = (4, 4, 4)
    trie = ItemTrie.from_codes([[0, 0, 0], [0, 1, 0], [3, 1, 1]], sizes)
    model = table_model(sizes)
    trie_beam_search(model, users(model), trie, 50, batch_size=5)
    assert model.calls == [(5, 1), (5, 2), (5, 3)]


def test_leaves_to_items_expands_and_filters_shared_codes():
    trie = ItemTrie.from_codes([[1], [0], [1], [1], [2]], (3,))
    leaves, scores = torch.tensor([[1, 0, -1], [2, 1, 0]]), torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -2.0, -3.0]])
    items, values = leaves_to_items(trie, leaves, scores, 10)
    assert items[0][:4].tolist() == [0, 2, 3, 1] and (items[0][4:] == -1).all()
    assert items[1][:5].tolist() == [4, 0, 2, 3, 1]
    assert values[0][:4].tolist() == [-1.0, -1.0, -1.0, -2.0] and torch.isneginf(values[0][4:]).all()
    items, values = leaves_to_items(trie, leaves, scores, 2, ItemFilter.from_rows(trie, [[0, 3], [2]]))
    assert items.tolist() == [[2, 1], [4, 0]]
    assert values.tolist() == [[-1.0, -2.0], [-1.0, -2.0]]
