"""ItemFilter (listed slots carried up the tree) against ItemTrie.prune (dense tables)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.errors import RequestError
from hf_genrec.generation.item_filter import ItemFilter, _LevelNodes, _places, _places_tensor
from hf_genrec.generation.trie import ItemTrie

SIZES = (3, 4, 2)


def as_mask(rows, num_items, value):
    mask = torch.full((len(rows), num_items), not value)
    for number, row in enumerate(rows):
        mask[number, torch.as_tensor(np.asarray(row, dtype=np.int64))] = value
    return mask


def assert_same(trie, item_filter, allowed_BN):
    masks = trie.prune(allowed_BN)
    batch = len(allowed_BN)
    for level, mask in enumerate(masks):
        nodes = torch.arange(trie.num_nodes(level)).expand(batch, -1)
        assert torch.equal(item_filter.alive(level, nodes), mask)
        assert not item_filter.alive(level, torch.full((batch, 1, 2), -1)).any()
        if level < trie.num_levels:
            nodes = torch.cat([nodes, torch.full((batch, 1), -1)], dim=1)
            _, children, legal = trie.expand(level, nodes)
            alive = torch.stack([row[child] for row, child in zip(masks[level + 1], children)]) & legal
            before = legal.clone()
            assert torch.equal(item_filter.alive_children(level, nodes, legal), alive)
            assert torch.equal(legal, before)
            some = legal & (torch.arange(legal.shape[-1]) % 2 == 0)  # what is not legal before stays so
            assert torch.equal(item_filter.alive_children(level, nodes, some), alive & some)
    slots = torch.arange(trie.num_items).expand(batch, -1)
    by_slot = allowed_BN[:, trie.items_at(torch.arange(trie.num_items))]
    assert torch.equal(item_filter.alive_slots(slots), by_slot)
    assert item_filter.num_alive().tolist() == allowed_BN.sum(-1).tolist()
    for level in range(trie.num_levels + 1):
        start, end = trie.slot_range(level, torch.arange(trie.num_nodes(level)).expand(batch, -1))
        counts = torch.nn.functional.pad(by_slot.long().cumsum(-1), (1, 0))
        assert torch.equal(item_filter.count_alive(start, end), counts.gather(1, end) - counts.gather(1, start))


@st.composite
def requests(draw):
    levels = draw(st.integers(1, 5))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=levels, max_size=levels)))
    codes = st.tuples(*[st.integers(0, size - 1) for size in sizes])
    lengths = st.integers(1, levels) if draw(st.booleans()) else st.just(levels)
    rows = draw(st.lists(st.tuples(codes, lengths), min_size=1, max_size=25))
    table = np.array([[*code[:length], *[-1] * (levels - length)] for code, length in rows], dtype=np.int64)
    batch = draw(st.integers(1, 4))
    lists = st.lists(st.lists(st.integers(0, len(rows) - 1), max_size=30), min_size=batch, max_size=batch)
    return ItemTrie.from_codes(table, sizes), draw(lists), draw(lists)


@settings(max_examples=60, deadline=None)
@given(requests())
def test_filters_agree_with_prune(case):
    """Repeats, empty lists and lists of the whole catalogue included."""
    trie, excluded, allowed = case
    out, keep = as_mask(excluded, trie.num_items, False), as_mask(allowed, trie.num_items, True)
    if any(excluded):
        assert_same(trie, ItemFilter.from_rows(trie, excluded), out)
    assert_same(trie, ItemFilter.from_rows(trie, None, allowed), keep)
    assert_same(trie, ItemFilter.from_rows(trie, excluded, allowed), out & keep)
    assert_same(trie, ItemFilter.from_mask(trie, keep, excluded), out & keep)
    assert_same(trie, ItemFilter.from_mask(trie, ~keep), ~keep)


@settings(max_examples=40, deadline=None)
@given(requests(), st.data())
def test_take_is_the_filter_of_the_taken_requests(case, data):
    trie, excluded, allowed = case
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(allowed) - 1), min_size=1, max_size=6)))
    item_filter = ItemFilter.from_rows(trie, excluded, allowed)
    mask = (as_mask(excluded, trie.num_items, False) & as_mask(allowed, trie.num_items, True))[rows]
    assert_same(trie, item_filter.take(rows), mask)
    last = torch.tensor([len(rows) - 1])
    assert_same(trie, item_filter.take(rows).take(last), mask[last])


def test_a_large_catalogue(random_codes):
    """100 seen items per user; the items they share a parent with stay within reach."""
    codes = random_codes(70_000, (32,) * 4, seed=1)
    trie = ItemTrie.from_codes(codes, (32,) * 4)
    rng = np.random.default_rng(0)
    seen = [rng.choice(70_000, 100, replace=False) for _ in range(3)]
    assert_same(trie, ItemFilter.from_rows(trie, seen), as_mask(seen, 70_000, False))
    assert_same(trie, ItemFilter.from_rows(trie, None, seen), as_mask(seen, 70_000, True))


def test_other_devices_find_the_same_children():
    keys = np.array([3, 3, 4, 9, 9, 9])
    ranks = np.array([0, 2, 1, 0, 1, 4])
    asked = np.array([9, 0, 3, 4, 5, 9, 10])
    here = _places(_LevelNodes(keys, keys, ranks), asked, 5)
    there = _places_tensor(_LevelNodes(*map(torch.from_numpy, (keys, keys, ranks))), torch.from_numpy(asked), 5)
    assert here.tolist() == there.tolist() == [0, 1, 4, 10, 12, 16, 25, 26, 29]


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


def test_slots_given_twice_count_once():
    trie = ItemTrie.from_codes([[0, 0], [0, 1], [1, 0]])
    twice = ItemFilter(trie, torch.tensor([[0, 0, 3]]), keep_listed=False)
    assert twice.alive(1, torch.tensor([[0, 1]])).tolist() == [[True, True]]
    assert twice.alive(2, torch.tensor([[0, 1, 2]])).tolist() == [[False, True, True]]


@pytest.mark.parametrize("item", [-1, 10])
def test_unknown_items_are_named(item, random_codes):
    trie = ItemTrie.from_codes(random_codes(10, SIZES), SIZES)
    for lists in ({"excluded": [[1], [], [2, item]]}, {"allowed": [[1], [], [2, item]]}):
        with pytest.raises(RequestError, match=f"row 2: item {item} is not in the catalogue of 10 items"):
            ItemFilter.from_rows(trie, **lists)
    with pytest.raises(RequestError, match="row 0: item"):
        ItemFilter.from_mask(trie, torch.ones(1, 10, dtype=torch.bool), [[item]])
    with pytest.raises(RequestError, match="2 allow-lists for 1 lists"):
        ItemFilter.from_rows(trie, [[1]], [[1], [2]])
