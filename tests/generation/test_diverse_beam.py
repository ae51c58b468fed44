"""Diverse beam search: off it is plain beam search, on it spreads over first codes; always distinct and legal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding.beam import beam
from hf_genrec.generation.decoding.diverse_beam import diverse_beam
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.trie import ItemTrie

SIZES = (6, 5, 4)


def search(function, model, trie, width, item_filter=None, users=(3, 8, 50), **options):
    state = model.start_decoding(torch.tensor(users).view(-1, 1), None)
    config = RecommendationConfig(k=width, num_beams=width)
    return function(model, state, trie, config, item_filter, batch_size=len(users), **options)


def test_one_group_is_beam_search(table_model, random_codes):
    codes = random_codes(90, SIZES, seed=1)
    model, trie = table_model(SIZES), ItemTrie.from_codes(codes, SIZES)
    expected = search(beam, model, trie, 8)
    found = search(diverse_beam, model, trie, 8, num_groups=1, diversity_penalty=3.0)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_textbook_groups(table_model, random_codes):
    """Two groups of two beams, in Python: later beams pay for codes that earlier ones took at the same level."""
    codes = random_codes(60, SIZES, seed=2, unique=True)
    model, trie = table_model(SIZES, seed=4), ItemTrie.from_codes(codes, SIZES)
    penalty = 1.5
    items, scores = search(diverse_beam, model, trie, 4, num_groups=2, diversity_penalty=penalty)
    rows = [tuple(row) for row in codes.tolist()]
    for number, user in enumerate((3, 8, 50)):
        state = model.start_decoding(torch.tensor([[user]]), None)
        used = [dict.fromkeys(range(size), 0) for size in SIZES]
        found: dict[tuple, float] = {}
        for _ in range(2):
            legal_rows = [row for row in rows if row not in found]
            beams = [((), 0.0)]
            for level in range(3):
                legal = {row[: level + 1] for row in legal_rows}
                grown = []
                for prefix, score in beams:
                    logp = model.score_codes(state, torch.tensor(prefix, dtype=torch.long).view(1, 1, level), level)
                    for code in range(SIZES[level]):
                        if (*prefix, code) in legal:
                            true = score + float(logp[0, 0, code])
                            grown.append((true - penalty * used[level][code], true, (*prefix, code)))
                kept = sorted(grown, key=lambda entry: -entry[0])[:2]
                beams = [(prefix, true) for _, true, prefix in kept]
                for prefix, _ in beams:
                    used[level][prefix[-1]] += 1
            found.update(beams)
        ranked = sorted(found.items(), key=lambda entry: -entry[1])
        assert [rows[item] for item in items[number].tolist()] == [row for row, _ in ranked]
        np.testing.assert_allclose(scores[number].numpy(), [score for _, score in ranked], atol=1e-4)


def test_penalty_spreads_the_first_code(table_model, random_codes):
    codes = random_codes(400, (8, 8, 8), seed=3, unique=True)
    model, trie = table_model((8, 8, 8), sharpness=4.0), ItemTrie.from_codes(codes, (8, 8, 8))
    spread = []
    for penalty in (0.0, 5.0, 1e4):
        items, _ = search(diverse_beam, model, trie, 8, num_groups=8, diversity_penalty=penalty)
        spread.append(np.mean([len(set(codes[row, 0].tolist())) for row in items.numpy()]))
    assert spread[0] < spread[1] <= spread[2] == 8


@pytest.mark.parametrize("num_items", [1, 2, 7, 100])
def test_distinct_legal_and_complete(num_items, table_model, random_codes):
    codes = random_codes(num_items, SIZES, seed=num_items)
    model, trie = table_model(SIZES), ItemTrie.from_codes(codes, SIZES)
    excluded = [np.arange(0, num_items, 3)] * 3 if num_items > 2 else None
    item_filter = None if excluded is None else ItemFilter.from_rows(trie, excluded)
    items, scores = search(diverse_beam, model, trie, 9, item_filter, num_groups=3, diversity_penalty=1.0)
    allowed = set(range(num_items)) - set([] if excluded is None else excluded[0].tolist())
    for row, row_scores in zip(items.tolist(), scores, strict=True):
        found = [item for item in row if item >= 0]
        assert len(found) == len(set(found)) and set(found) <= allowed
        assert len(found) >= min(3, len(allowed)), "each group brings at least one new item while there are any"
        assert (row_scores[: len(found)].diff() <= 0).all() and (row_scores[len(found) :] == -torch.inf).all()
    for number, user in enumerate((3, 8, 50)):
        one_filter = None if excluded is None else ItemFilter.from_rows(trie, excluded[:1])
        alone = search(diverse_beam, model, trie, 9, one_filter, (user,), num_groups=3, diversity_penalty=1.0)
        found = alone[0][0][alone[0][0] >= 0].tolist()
        assert items[number].tolist()[: len(found)] == found


@pytest.mark.parametrize("options", [{"num_groups": 0}, {"num_groups": 5}, {"diversity_penalty": -1.0}])
def test_bad_options(options, table_model, random_codes):
    model, trie = table_model(SIZES), ItemTrie.from_codes(random_codes(20, SIZES), SIZES)
    with pytest.raises(RequestError, match=next(iter(options))):
        search(diverse_beam, model, trie, 4, **options)
