"""Sampling without replacement: the right distribution, distinct legal items, independent of batch and order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from hf_genrec.errors import RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding.sampling import conditional_gumbels, gumbel_noise, sample
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.trie import ItemTrie

SIZES = (4, 3, 5)


def draw(model, trie, users, k, seeds, **options):
    state = model.start_decoding(torch.as_tensor(users).view(-1, 1), None)
    item_filter = options.pop("item_filter", None)
    config = RecommendationConfig(k=k, num_beams=k)
    return sample(model, state, trie, config, item_filter, batch_size=len(users), seeds=seeds, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_pairs_follow_the_exact_distribution(temperature, table_model, random_codes):
    """The ordered first two items of many draws against p(i) p(j) / (1 - p(i)), by a chi-square statistic."""
    codes = random_codes(7, SIZES, seed=3, unique=True)
    model, trie = table_model(SIZES, seed=1, sharpness=0.6), ItemTrie.from_codes(codes, SIZES)
    draws = 6000
    state = model.start_decoding(torch.tensor([[5]]), None)
    # exact probabilities, renormalised level by level at this temperature
    p = np.zeros(7)
    for item, row in enumerate(codes.tolist()):
        logp = 0.0
        for level in range(3):
            scores = model.score_codes(state, torch.tensor(row[:level]).view(1, 1, level), level)[0, 0].double()
            legal = sorted({other[level] for other in codes.tolist() if other[:level] == row[:level]})
            scaled = scores[legal] / temperature
            logp += float(scaled[legal.index(row[level])] - scaled.logsumexp(0))
        p[item] = math.exp(logp)
    assert p.sum() == pytest.approx(1)
    items, scores = draw(model, trie, [5] * draws, 2, range(draws), temperature=temperature)
    np.testing.assert_allclose(scores.exp().numpy(), p[items.numpy()], rtol=1e-4)
    pairs = dict.fromkeys(itertools.permutations(range(7), 2), 0)
    for first, second in items.tolist():
        pairs[first, second] += 1
    expected = {(i, j): draws * p[i] * p[j] / (1 - p[i]) for i, j in pairs}
    statistic = sum((pairs[pair] - expected[pair]) ** 2 / expected[pair] for pair in pairs)
    assert statistic < 41 + 5 * math.sqrt(2 * 41), "42 cells: mean 41, standard deviation 9.1"


def test_all_items_come_in_a_full_draw(table_model, random_codes):
    codes = random_codes(30, SIZES, seed=5)
    model, trie = table_model(SIZES), ItemTrie.from_codes(codes, SIZES)
    items, scores = draw(model, trie, [1, 2, 3], 30, [7, 8, 9])
    assert all(sorted(row) == list(range(30)) for row in items.tolist()) and scores.isfinite().all()
    assert items[0].tolist() != items[1].tolist()


def test_draws_depend_on_the_seed_and_not_on_the_batch(table_model, random_codes):
    codes = random_codes(60, SIZES, seed=6)
    model, trie = table_model(SIZES), ItemTrie.from_codes(codes, SIZES)
    users, seeds = [4, 9, 4, 30], [1, 2, 3, 1]
    allowed = [np.arange(0, 60, 2), np.arange(5), np.arange(60), np.arange(0, 60, 2)]
    both = draw(model, trie, users, 8, seeds, item_filter=ItemFilter.from_rows(trie, None, allowed))
    assert not torch.equal(both[0][0], both[0][2])
    for row, (user, seed) in enumerate(zip(users, seeds, strict=True)):
        one = ItemFilter.from_rows(trie, None, allowed[row : row + 1])
        items, scores = draw(model, trie, [user], 8, [seed], item_filter=one)
        found = items[0][items[0] >= 0]
        assert both[0][row][: len(found)].tolist() == found.tolist()
        assert set(found.tolist()) <= set(allowed[row].tolist()) and len(set(found.tolist())) == len(found)
        torch.testing.assert_close(both[1][row][: len(found)], scores[0][: len(found)], atol=1e-4, rtol=0)
    assert len(both[0][1][both[0][1] >= 0]) == 5


@pytest.mark.parametrize("num_items", [1, 2, 4, 100])
def test_small_catalogues(num_items, table_model, random_codes):
    codes = random_codes(num_items, SIZES, seed=8)
    model, trie = table_model(SIZES), ItemTrie.from_codes(codes, SIZES)
    items, _ = draw(model, trie, [3], 5, [0])
    found = items[items >= 0].tolist()
    assert len(found) == len(set(found)) == min(5, num_items)


def test_conditional_gumbels_have_the_given_maximum_and_order():
    free = torch.randn(3, 4, 6, dtype=torch.float64) * 5
    free[0, 0, 2:] = -torch.inf
    maximum = free.amax(-1) + torch.randn(3, 4, dtype=torch.float64)
    shifted = conditional_gumbels(free, maximum)
    torch.testing.assert_close(shifted.amax(-1), maximum)
    assert torch.equal(shifted.argsort(-1), free.argsort(-1))
    assert (shifted[0, 0, 2:] == -torch.inf).all() and not shifted.isnan().any()
    # the closed form where nothing can overflow
    mild = torch.randn(1, 1, 5, dtype=torch.float64)
    top = torch.tensor([[0.3]], dtype=torch.float64)
    direct = -torch.log(torch.exp(-top.unsqueeze(-1)) - torch.exp(-mild.amax(-1, keepdim=True)) + torch.exp(-mild))
    torch.testing.assert_close(conditional_gumbels(mild, top), direct)


def test_noise_is_gumbel_and_reproducible():
    nodes = torch.arange(200_000).view(1, 1, -1)
    noise = gumbel_noise(torch.tensor([3]), 1, nodes).flatten()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01) and noise.var() == pytest.approx(math.pi**2 / 6, rel=0.02)
    for q in (0.01, 0.25, 0.5, 0.9, 0.999):
        assert noise.quantile(q) == pytest.approx(-math.log(-math.log(q)), abs=0.08)
    other = gumbel_noise(torch.tensor([4]), 1, nodes).flatten()
    deeper = gumbel_noise(torch.tensor([3]), 2, nodes).flatten()
    for unrelated in (other, deeper, noise.roll(1)):
        assert abs(torch.corrcoef(torch.stack([noise, unrelated]))[0, 1]) < 0.01
    assert torch.equal(noise, gumbel_noise(torch.tensor([3]), 1, nodes).flatten())


def test_temperature_must_be_positive(table_model, random_codes):
    model, trie = table_model(SIZES), ItemTrie.from_codes(random_codes(9, SIZES), SIZES)
    with pytest.raises(RequestError, match="temperature must be above 0, got 0"):
        draw(model, trie, [1], 3, [0], temperature=0)
