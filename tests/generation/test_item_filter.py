"""ItemFilter (sorted slots) against ItemTrie.prune (dense tables)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.trie import ItemTrie

SIZES = (3, 4, 2)


def as_mask(rows, num_items, value):
    mask = torch.full((len(rows), num_items), not value)
    for number, row in enumerate(rows):
        mask[number, torch.as_tensor(np.asarray(row, dtype=np.int64))] = value
    return mask


def assert_same(trie, item_filter, allowed_BN):
    masks = trie.prune(allowed_BN)
    for level, mask in enumerate(masks):
        nodes = torch.arange(trie.num_nodes(level)).expand(len(allowed_BN), -1)
        assert torch.equal(item_filter.alive(level, nodes), mask)
    slots = torch.arange(trie.num_items).expand(len(allowed_BN), -1)
    assert torch.equal(item_filter.alive_slots(slots), allowed_BN[:, trie.leaf_items.long()])
    assert item_filter.num_alive().tolist() == allowed_BN.sum(-1).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_filters_agree_with_prune(seed, random_codes):
    rng = np.random.default_rng(seed)
    trie = ItemTrie.from_codes(random_codes(40, SIZES, seed=seed), SIZES)
    draw = lambda: [rng.integers(0, 40, rng.integers(0, 40)) for _ in range(4)]  # repeats and empty rows included
    excluded, allowed = draw(), draw()
    assert_same(trie, ItemFilter.from_rows(trie, excluded), as_mask(excluded, 40, False))
    assert_same(trie, ItemFilter.from_rows(trie, None, allowed), as_mask(allowed, 40, True))
    both = as_mask(excluded, 40, False) & as_mask(allowed, 40, True)
    assert_same(trie, ItemFilter.from_rows(trie, excluded, allowed), both)
    assert_same(trie, ItemFilter.from_mask(trie, as_mask(allowed, 40, True), excluded), both)


def test_nothing_excluded_is_no_filter(random_codes):
    trie = ItemTrie.from_codes(random_codes(10, SIZES), SIZES)
    assert ItemFilter.from_rows(trie) is None
    assert ItemFilter.from_rows(trie, [np.array([], dtype=int)] * 3) is None


def test_shared_leaf_dies_with_its_last_item():
    trie = ItemTrie.from_codes([[0, 0], [0, 0], [1, 0]])
    leaves = torch.tensor([[0, 1]])
    assert ItemFilter.from_rows(trie, [[0]]).alive(2, leaves).tolist() == [[True, True]]
    assert ItemFilter.from_rows(trie, [[0, 1]]).alive(2, leaves).tolist() == [[False, True]]
    assert ItemFilter.from_rows(trie, [[1, 0]]).alive(1, leaves).tolist() == [[False, True]]


def test_take_repeats_rows(random_codes):
    trie = ItemTrie.from_codes(random_codes(10, SIZES), SIZES)
    item_filter = ItemFilter.from_rows(trie, [[1, 2], [3]])
    assert item_filter.take(torch.tensor([1, 1, 0])).num_alive().tolist() == [9, 9, 8]
