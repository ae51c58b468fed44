"""ItemTrie against Python dictionaries of prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.errors import ArtifactError, IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie


@st.composite
def catalogues(draw):
    levels = draw(st.integers(1, 4))
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=levels, max_size=levels)))
    rows = draw(st.lists(st.tuples(*[st.integers(0, size - 1) for size in sizes]), min_size=1, max_size=30))
    return np.array(rows, dtype=np.int64).reshape(len(rows), levels), sizes


def prefixes(codes, level):
    """Distinct prefixes of a level in lexicographic order: what node numbers must mean."""
    return sorted({tuple(int(c) for c in row[:level]) for row in codes})


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_nodes_are_the_sorted_prefixes(catalogue):
    codes, sizes = catalogue
    trie = ItemTrie.from_codes(codes, sizes)
    for level in range(trie.num_levels + 1):
        expected = prefixes(codes, level)
        assert trie.num_nodes(level) == len(expected)
        assert [tuple(row) for row in trie.node_prefixes(level).tolist()] == expected


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_expand_gives_exactly_the_children(catalogue):
    codes, sizes = catalogue
    trie = ItemTrie.from_codes(codes, sizes)
    for level in range(trie.num_levels):
        nodes = torch.arange(trie.num_nodes(level))
        child_codes, child_nodes, valid = trie.expand(level, nodes)
        below = prefixes(codes, level + 1)
        for node, prefix in enumerate(prefixes(codes, level)):
            found = child_codes[node][valid[node]].tolist()
            assert found == [p[-1] for p in below if p[:-1] == prefix]  # ascending, complete
            assert child_nodes[node][valid[node]].tolist() == [i for i, p in enumerate(below) if p[:-1] == prefix]
        assert trie.parents(level + 1).tolist() == [prefixes(codes, level).index(p[:-1]) for p in below]


@settings(max_examples=150, deadline=None)
@given(catalogues(), st.data())
def test_lookup_finds_prefixes_and_nothing_else(catalogue, data):
    codes, sizes = catalogue
    trie = ItemTrie.from_codes(codes, sizes)
    level = data.draw(st.integers(0, trie.num_levels))
    asked = data.draw(
        st.lists(st.tuples(*[st.integers(-2, size + 1) for size in sizes[:level]]), min_size=1, max_size=9)
    )
    expected = prefixes(codes, level)
    found = trie.lookup(torch.tensor(asked, dtype=torch.long).reshape(len(asked), level)).tolist()
    assert found == [expected.index(a) if a in expected else -1 for a in asked]


@settings(max_examples=100, deadline=None)
@given(catalogues())
def test_items_round_trip_through_their_leaf(catalogue):
    codes, sizes = catalogue
    trie = ItemTrie.from_codes(codes, sizes)
    leaf_codes = trie.node_prefixes(trie.num_levels)
    assert torch.equal(leaf_codes[trie.item_leaf_N], torch.from_numpy(codes))
    assert torch.equal(trie.lookup(torch.from_numpy(codes)), trie.item_leaf_N)
    assert trie.leaf_items.long()[trie.item_slots].tolist() == list(range(len(codes)))
    for leaf in range(trie.num_leaves):
        twins = [i for i, row in enumerate(codes.tolist()) if row == leaf_codes[leaf].tolist()]
        assert trie.items_of_leaf(leaf).tolist() == twins


@settings(max_examples=150, deadline=None)
@given(catalogues(), st.data())
def test_prune_keeps_the_ancestors_of_allowed_items_only(catalogue, data):
    codes, sizes = catalogue
    trie = ItemTrie.from_codes(codes, sizes)
    rows = data.draw(
        st.lists(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes)), min_size=1, max_size=3)
    )
    masks = trie.prune(torch.tensor(rows))
    for level, mask in enumerate(masks):
        for row, allowed in enumerate(rows):
            alive = {tuple(c[:level]) for c, keep in zip(codes.tolist(), allowed) if keep}
            assert mask[row].tolist() == [p in alive for p in prefixes(codes, level)]


@pytest.mark.parametrize("sizes", [(8192,) * 8, (256,) * 4, (3, 70000, 2), (1,), (40000, 40000)])
def test_deep_and_wide_codes_do_not_overflow(sizes, random_codes):
    codes = random_codes(2000, sizes, seed=1)
    codes[1000:] = codes[:1000]  # every code twice
    codes[0] = [size - 1 for size in sizes]
    trie = ItemTrie.from_codes(codes, sizes)
    unique, inverse = np.unique(codes, axis=0, return_inverse=True)
    assert trie.num_leaves == len(unique)
    assert trie.item_leaf_N.tolist() == inverse.reshape(-1).tolist()
    assert np.array_equal(trie.node_prefixes(len(sizes)).numpy(), unique)
    assert torch.equal(trie.lookup(torch.from_numpy(codes)), trie.item_leaf_N)


def test_order_of_items_changes_only_item_numbers(random_codes):
    codes = random_codes(500, (7, 7, 7))
    order = np.random.default_rng(3).permutation(500)
    one, two = ItemTrie.from_codes(codes, (7, 7, 7)), ItemTrie.from_codes(codes[order], (7, 7, 7))
    for a, b in zip(one.child_offsets + one.child_codes, two.child_offsets + two.child_codes, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.item_leaf_N[torch.from_numpy(order)], two.item_leaf_N)


def test_absent_nodes_have_no_children_and_no_items(random_codes):
    trie = ItemTrie.from_codes(random_codes(50, (4, 4, 4)), (4, 4, 4))
    for level in range(3):
        assert not trie.expand(level, torch.tensor([-1, -1]))[2].any()
        start, end = trie.slot_range(level, torch.tensor([-1, 0]))
        assert (end - start).tolist() == [0, int((end - start)[1])]


@pytest.mark.parametrize(
    ("codes", "sizes", "words"),
    [
        ([[0, 1], [2, 4]], (4, 4), "row 1, level 1: code 4"),
        ([[0, -1]], (4, 4), "row 0, level 1: code -1"),
        ([[0, 1]], (4,), "1 codebook sizes for codes of 2 levels"),
        ([[0.5, 1.0]], None, "integers"),
        (np.zeros((0, 2), dtype=int), None, "non-empty"),
        ([1, 2], None, "non-empty table"),
    ],
)
def test_bad_codes_are_named(codes, sizes, words):
    with pytest.raises(IncompatibleComponentsError, match=words):
        ItemTrie.from_codes(codes, sizes)


def test_save_and_load(tmp_path, random_codes):
    codes = random_codes(300, (300, 5, 9000))
    trie = ItemTrie.from_codes(codes, (300, 5, 9000))
    trie.save(tmp_path / "trie.safetensors")
    again = ItemTrie.load(tmp_path / "trie.safetensors")
    assert again.codebook_sizes == trie.codebook_sizes
    for name, tensor in trie._tensors().items():
        assert torch.equal(tensor, again._tensors()[name]) and tensor.dtype == again._tensors()[name].dtype


def test_load_refuses_other_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ArtifactError, match="not an item trie"):
        ItemTrie.load(tmp_path / "x.safetensors")


def test_tensors_are_compact(random_codes):
    trie = ItemTrie.from_codes(random_codes(20_000, (256,) * 4), (256,) * 4)
    assert {t.dtype for t in trie.child_codes} == {torch.uint8}
    assert {t.dtype for t in [*trie.child_offsets, trie.leaf_items, trie.leaf_offsets]} == {torch.int32}


def test_from_tokenizer_is_built_once_per_catalogue(random_codes):
    class Tokenizer:
        catalogue_fingerprint = "test-from-tokenizer"
        codes = random_codes(10, (4, 4))
        codebook_sizes = (4, 4)

    assert ItemTrie.from_tokenizer(Tokenizer()) is ItemTrie.from_tokenizer(Tokenizer())
    with pytest.raises(IncompatibleComponentsError, match="carries no item catalogue"):
        ItemTrie.from_tokenizer(object())
