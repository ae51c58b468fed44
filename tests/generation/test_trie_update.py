"""add_items and remove_items give, tensor by tensor, the trie that from_codes builds of the new table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.errors import IncompatibleComponentsError, UnknownItemError
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.trie import ItemTrie


def assert_equal(one, two):
    assert one.codebook_sizes == two.codebook_sizes and one.has_ends == two.has_ends
    assert one.max_children == two.max_children and one.max_items_per_leaf == two.max_items_per_leaf
    assert one._tensors().keys() == two._tensors().keys()
    for name, tensor in one._tensors().items():
        other = two._tensors()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


@st.composite
def tables(draw):
    """Two tables of the same shape of codes; few codes per level make shared prefixes, ends and duplicates common."""
    levels = draw(st.integers(1, 8))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=levels, max_size=levels)))
    codes = st.tuples(*[st.integers(0, size - 1) for size in sizes])
    lengths = st.integers(1, levels) if draw(st.booleans()) else st.just(levels)

    def table(most):
        rows = draw(st.lists(st.tuples(codes, lengths), min_size=1, max_size=most))
        return np.array([[*code[:length], *[-1] * (levels - length)] for code, length in rows], dtype=np.int64)

    return table(25), table(12), sizes


@settings(max_examples=150, deadline=None)
@given(tables())
def test_added_items_are_as_if_always_there(case):
    codes, more, sizes = case
    both = np.concatenate([codes, more])
    trie = ItemTrie.from_codes(codes, sizes)
    assert_equal(trie.add_items(more), ItemTrie.from_codes(both, sizes))
    assert_equal(trie, ItemTrie.from_codes(codes, sizes))  # not changed itself


@settings(max_examples=150, deadline=None)
@given(tables(), st.data())
def test_removed_items_are_as_if_never_there(case, data):
    codes, more, sizes = case
    both = np.concatenate([codes, more])
    out = data.draw(st.lists(st.integers(0, len(both) - 1), unique=True, max_size=len(both) - 1))
    trie = ItemTrie.from_codes(both, sizes)
    assert_equal(trie.remove_items(out), ItemTrie.from_codes(np.delete(both, out, axis=0), sizes))
    assert_equal(trie.remove_items(torch.arange(len(codes), len(both))), ItemTrie.from_codes(codes, sizes))


@pytest.mark.parametrize(("sizes", "num_items"), [((256,) * 4, 66_000), ((8192,) * 8, 3_000), ((2, 150_000), 40_000)])
def test_across_the_limits_of_packing(sizes, num_items, random_codes):
    """65,536 items and 2**15 codes change how numbers are stored."""
    codes = random_codes(num_items, sizes, seed=2)
    few = num_items - 1_000
    full, less = ItemTrie.from_codes(codes, sizes), ItemTrie.from_codes(codes[:few], sizes)
    assert_equal(less.add_items(codes[few:]), full)
    assert_equal(full.remove_items(np.arange(few, num_items)), less)
    out = np.random.default_rng(0).choice(num_items, num_items // 2, replace=False)
    assert_equal(full.remove_items(out), ItemTrie.from_codes(np.delete(codes, out, axis=0), sizes))
    assert_equal(full.remove_items(out).add_items(codes[out]).remove_items([]).remove_items(out[:0]), ItemTrie.from_codes(
        np.concatenate([np.delete(codes, out, axis=0), codes[out]]), sizes
    ))  # fmt: skip


def test_filters_of_a_new_trie_know_the_new_items(random_codes):
    trie = ItemTrie.from_codes(random_codes(50, (6, 6, 6)), (6, 6, 6))
    trie.slots_of(torch.arange(50))  # tables built for the old trie must not leak into the new one
    new = trie.add_items([[5, 5, 5]])
    only = ItemFilter.from_rows(new, None, [[50]])
    leaf = new.lookup(torch.tensor([[5, 5, 5]]))
    assert only.alive(3, torch.arange(new.num_leaves)[None]).nonzero()[:, 1].tolist() == leaf.tolist()


def test_bad_changes_are_named():
    trie = ItemTrie.from_codes([[0, 1], [2, 3]], (4, 4))
    with pytest.raises(IncompatibleComponentsError, match="row 1, level 0: code 4"):
        trie.add_items([[0, 0], [4, 0]])
    with pytest.raises(IncompatibleComponentsError, match="row 0, level 0: the code begins with -1"):
        trie.add_items([[-1, -1]])
    with pytest.raises(IncompatibleComponentsError, match="2 codebook sizes for codes of 3 levels"):
        trie.add_items([[0, 0, 0]])
    with pytest.raises(IncompatibleComponentsError, match="non-empty"):
        trie.add_items([])
    with pytest.raises(UnknownItemError, match="position 1: item 2 is not in the catalogue of 2 items"):
        trie.remove_items([0, 2])
    with pytest.raises(UnknownItemError, match="position 0: item -1"):
        trie.remove_items([-1])
    with pytest.raises(IncompatibleComponentsError, match="position 2: item 1 is named twice"):
        trie.remove_items([1, 0, 1])
    with pytest.raises(IncompatibleComponentsError, match="leaves no catalogue"):
        trie.remove_items([1, 0])
    for words in (["a"], [0.5], [[0]], [True, False]):
        with pytest.raises(IncompatibleComponentsError, match="list of item indices"):
            trie.remove_items(words)
