"""ItemTrie against Python dictionaries of prefixes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie


@st.composite
def catalogues(draw):
    """Codes (-1 padded), sizes: few codes per level, so that duplicates and codes that begin others are common."""
    levels = draw(st.integers(1, 8))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=levels, max_size=levels)))
    codes = st.tuples(*[st.integers(0, size - 1) for size in sizes])
    lengths = st.integers(1, levels) if draw(st.booleans()) else st.just(levels)
    rows = draw(st.lists(st.tuples(codes, lengths), min_size=1, max_size=30))
    table = np.array([[*code[:length], *[-1] * (levels - length)] for code, length in rows], dtype=np.int64)
    return table, sizes


def spelled(codes, sizes):
    """Rows as tuples of L codes, the end code in place of -1."""
    return [tuple(size if code < 0 else int(code) for code, size in zip(row, sizes)) for row in codes]


def prefixes(rows, level):
    """Distinct prefixes of a level in lexicographic order: what node numbers must mean."""
    return sorted({row[:level] for row in rows})


def children_by_prefix(rows):
    children: dict[tuple, set] = {}
    for row in rows:
        for level, code in enumerate(row):
            children.setdefault(row[:level], set()).add(code)
    return children


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_nodes_are_the_sorted_prefixes(catalogue):
    codes, sizes = catalogue
    rows, trie = spelled(codes, sizes), ItemTrie.from_codes(codes, sizes)
    assert trie.has_ends == (codes < 0).any()
    for level in range(trie.num_levels + 1):
        expected = prefixes(rows, level)
        assert trie.num_nodes(level) == len(expected)
        assert [tuple(row) for row in trie.node_prefixes(level).tolist()] == expected


def check_expand(trie, rows, expand):
    children = children_by_prefix(rows)
    for level in range(trie.num_levels):
        nodes = torch.arange(-1, trie.num_nodes(level))
        codes, below, valid = expand(level, nodes)
        assert codes.dtype == below.dtype == torch.int64 and valid.dtype == torch.bool
        assert not codes[~valid].any() and not below[~valid].any()
        assert not valid[0].any()
        number = {prefix: i for i, prefix in enumerate(prefixes(rows, level + 1))}
        for node, prefix in enumerate(prefixes(rows, level), start=1):
            expected = sorted(children[prefix])  # ascending and complete
            assert codes[node][valid[node]].tolist() == expected
            assert valid[node].tolist() == [True] * len(expected) + [False] * (valid.shape[1] - len(expected))
            assert below[node][valid[node]].tolist() == [number[(*prefix, code)] for code in expected]
        assert trie.max_children[level] == max(len(children[prefix]) for prefix in prefixes(rows, level))
        assert valid.shape[1] == trie.max_children[level]


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_expand_gives_exactly_the_children(catalogue):
    codes, sizes = catalogue
    rows, trie = spelled(codes, sizes), ItemTrie.from_codes(codes, sizes)
    check_expand(trie, rows, trie.expand)
    check_expand(trie, rows, trie._expand_tensors)  # what other devices run
    for level in range(trie.num_levels):
        above = prefixes(rows, level)
        assert trie.parents(level + 1).tolist() == [above.index(p[:-1]) for p in prefixes(rows, level + 1)]


@pytest.mark.parametrize("levels", range(1, 9))
@pytest.mark.parametrize("num_items", [1, 2, 3, 100])
@pytest.mark.parametrize("ends", [False, True])
def test_random_catalogues(num_items, levels, ends, random_codes):
    sizes = tuple(np.random.default_rng(levels).integers(1, 9, levels))
    codes = random_codes(num_items, sizes, seed=num_items)
    if ends:
        codes[np.arange(levels) >= np.random.default_rng(0).integers(1, levels + 1, (num_items, 1))] = -1
    rows, trie = spelled(codes, sizes), ItemTrie.from_codes(codes, sizes)
    check_expand(trie, rows, trie.expand)
    check_expand(trie, rows, trie._expand_tensors)
    assert [tuple(row) for row in trie.node_prefixes(levels)[trie.item_leaf_N].tolist()] == rows


def test_expand_is_as_wide_as_the_call():
    trie = ItemTrie.from_codes([[0, 0], [0, 1], [0, 2], [1, 0]])
    assert trie.expand(1, torch.tensor([1]))[0].shape == (1, 1)
    assert trie.expand(1, torch.tensor([[0, 1]]))[0].shape == (1, 2, 3)
    assert trie.expand(1, torch.tensor([-1]))[2].tolist() == [[False]]
    assert trie.expand(1, torch.zeros(0, 4, dtype=torch.long))[0].shape == (0, 4, 1)


@settings(max_examples=150, deadline=None)
@given(catalogues(), st.data())
def test_lookup_finds_prefixes_and_nothing_else(catalogue, data):
    codes, sizes = catalogue
    rows, trie = spelled(codes, sizes), ItemTrie.from_codes(codes, sizes)
    level = data.draw(st.integers(0, trie.num_levels))
    guess = st.tuples(*[st.integers(-2, size + 1) for size in sizes[:level]])
    real = st.sampled_from([row[:level] for row in rows])
    asked = data.draw(st.lists(guess | real, min_size=1, max_size=9))
    expected = prefixes(rows, level)
    table = torch.tensor(asked, dtype=torch.long).reshape(len(asked), level)
    assert trie.lookup(table).tolist() == [expected.index(a) if a in expected else -1 for a in asked]
    node = torch.zeros(len(asked), dtype=torch.long)
    for depth in range(level):
        stepped = trie.step(depth, node, table[:, depth])
        assert torch.equal(stepped, trie._step_tensors(depth, node, table[:, depth]))
        node = stepped


@pytest.mark.parametrize("width", [1, 2, 255, 256, 257, 258, 600, 5000])
def test_lookup_in_wide_nodes(width):
    """Every code of a wide node and every gap beside it, on both sides of the limit where the search is halved."""
    codes = np.stack([np.repeat([0, 1], width), np.tile(2 * np.arange(width) + 1, 2)], axis=1)
    trie = ItemTrie.from_codes(codes[np.random.default_rng(0).permutation(len(codes))], (2, 2 * width + 2))
    below = np.arange(2 * width + 2)
    for first in (0, 1):
        asked = torch.from_numpy(np.stack([np.full(len(below), first), below], axis=1))
        expected = np.where((below % 2 == 1) & (below < 2 * width), first * width + below // 2, -1)
        assert np.array_equal(trie.lookup(asked).numpy(), expected)


@settings(max_examples=100, deadline=None)
@given(catalogues())
def test_items_round_trip_through_their_leaf(catalogue):
    codes, sizes = catalogue
    rows, trie = spelled(codes, sizes), ItemTrie.from_codes(codes, sizes)
    leaves = prefixes(rows, trie.num_levels)
    assert trie.item_leaf_N.tolist() == [leaves.index(row) for row in rows]
    assert torch.equal(trie.lookup(trie.end_filled(torch.from_numpy(codes))), trie.item_leaf_N)
    assert trie.items_at(trie.item_slots).tolist() == list(range(len(codes)))
    assert torch.equal(trie.slots_of(torch.arange(len(codes))), trie.item_slots)
    twins = [[i for i, row in enumerate(rows) if row == leaf] for leaf in leaves]
    assert [trie.items_of_leaf(leaf).tolist() for leaf in range(trie.num_leaves)] == twins
    assert trie.first_items(torch.arange(-1, trie.num_leaves)).tolist() == [-1, *[items[0] for items in twins]]
    assert trie.max_items_per_leaf == max(map(len, twins))
    start, end = trie.leaf_slots(torch.arange(-1, trie.num_leaves))
    assert (end - start).tolist() == [0, *map(len, twins)]
    assert trie.items_at(torch.arange(len(codes))).tolist() == [item for items in twins for item in items]


@settings(max_examples=100, deadline=None)
@given(catalogues())
def test_items_below_a_node_are_a_range_of_slots(catalogue):
    codes, sizes = catalogue
    rows, trie = spelled(codes, sizes), ItemTrie.from_codes(codes, sizes)
    for level in range(trie.num_levels + 1):
        start, end = trie.slot_range(level, torch.arange(-1, trie.num_nodes(level)))
        assert start[0] == end[0]
        for prefix, first, last in zip(prefixes(rows, level), start[1:].tolist(), end[1:].tolist()):
            below = trie.items_at(torch.arange(first, last)).tolist()
            assert sorted(below) == [i for i, row in enumerate(rows) if row[:level] == prefix]


@settings(max_examples=150, deadline=None)
@given(catalogues(), st.data())
def test_prune_keeps_the_ancestors_of_allowed_items_only(catalogue, data):
    codes, sizes = catalogue
    names, trie = spelled(codes, sizes), ItemTrie.from_codes(codes, sizes)
    rows = data.draw(
        st.lists(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes)), min_size=1, max_size=3)
    )
    masks = trie.prune(torch.tensor(rows))
    for level, mask in enumerate(masks):
        for row, allowed in enumerate(rows):
            alive = {name[:level] for name, keep in zip(names, allowed) if keep}
            assert mask[row].tolist() == [p in alive for p in prefixes(names, level)]


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
    shared = [name for name in one._tensors() if not name.startswith("items")]
    assert shared and all(torch.equal(one._tensors()[name], two._tensors()[name]) for name in shared)
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
        ([[0, 1], [0, -2]], (4, 4), "row 1, level 1: code -2"),
        ([[0, 1, 1], [0, -1, 2]], (4, 4, 4), "row 1, level 1: -1 stands before a code"),
        ([[0, 1], [-1, -1]], (4, 4), "row 1, level 0: the code begins with -1"),
        ([[0, 1]], (4, 0), "level 1: a codebook of 0 codes"),
        ([[0, 1]], (4, 2**40), "level 1: a codebook of 1099511627776 codes"),
        (np.array([[0, 2**63]], dtype=np.uint64), (4, 4), "row 0, level 1: code 9223372036854775808"),
        ([[0, 1]], (4,), "1 codebook sizes for codes of 2 levels"),
        ([[0.5, 1.0]], None, "integers"),
        (np.zeros((0, 2), dtype=int), None, "non-empty"),
        ([1, 2], None, "non-empty table"),
    ],
)
def test_bad_codes_are_named(codes, sizes, words):
    with pytest.raises(IncompatibleComponentsError, match=words):
        ItemTrie.from_codes(codes, sizes)


@pytest.mark.parametrize("num_items", [100_000, 1_000_000])
def test_bytes_per_item(num_items):
    """4 x 256 random distinct codes, the hardest shape: at most 8 bytes per item, filters included."""
    numbers = np.unique(np.random.default_rng(0).integers(0, 256**4, num_items + num_items // 50))
    numbers = np.random.default_rng(1).permutation(numbers)[:num_items]
    codes = np.stack(np.unravel_index(numbers, (256,) * 4), axis=1)
    trie = ItemTrie.from_codes(codes, (256,) * 4)
    assert trie.nbytes <= 6.7 * num_items
    some = torch.arange(0, num_items, 997)
    slots = trie.slots_of(some)  # builds what filters need
    assert torch.equal(trie.items_at(slots), some)
    assert trie.nbytes <= (8 if num_items == 1_000_000 else 8.7) * num_items
    assert torch.equal(trie.lookup(torch.from_numpy(codes[::997])), slots)  # one item per leaf: slots are leaves


def test_titles_as_token_ids():
    """64 levels of a vocabulary of 150,000, titles of 1 to 64 tokens, some the beginning of others."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 300)
    codes = rng.integers(0, 150_000, (300, 64))
    codes[100:200] = codes[:100]  # the same words, cut at other places
    codes[np.arange(64) >= lengths[:, None]] = -1
    trie = ItemTrie.from_codes(codes, (150_000,) * 64)
    rows = spelled(codes, (150_000,) * 64)
    leaves = prefixes(rows, 64)
    assert trie.has_ends and trie.num_leaves == len(leaves)
    assert trie.item_leaf_N.tolist() == [leaves.index(row) for row in rows]
    assert trie.lookup(trie.end_filled(torch.from_numpy(codes))).tolist() == trie.item_leaf_N.tolist()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_any_integer_table(dtype):
    codes = np.array([[1, 3], [0, 2], [1, 0]])
    sizes = (300, 70_000)
    assert ItemTrie.from_codes(codes.astype(dtype), sizes).node_prefixes(2).tolist() == sorted(codes.tolist())
    if np.issubdtype(dtype, np.signedinteger):
        codes[0, 1] = -1
        trie = ItemTrie.from_codes(torch.from_numpy(codes.astype(dtype)), sizes)
        assert trie.node_prefixes(2).tolist() == [[0, 2], [1, 0], [1, 70_000]]


def test_copies_hold_the_same_trie(random_codes):
    trie = ItemTrie.from_codes(random_codes(60, (5, 5, 5)), (5, 5, 5))
    assert copy.deepcopy(trie) is trie
    again = copy.copy(trie)  # through __reduce__, as worker processes do
    assert again is not trie
    assert trie._tensors().keys() == again._tensors().keys()
    assert all(torch.equal(tensor, again._tensors()[name]) for name, tensor in trie._tensors().items())
    assert torch.equal(again.lookup(again.node_prefixes(3)), torch.arange(trie.num_leaves))


def test_from_tokenizer_is_built_once_per_catalogue(random_codes):
    class Tokenizer:
        catalogue_fingerprint = "test-from-tokenizer"
        codes = random_codes(10, (4, 4))
        codebook_sizes = (4, 4)

    assert ItemTrie.from_tokenizer(Tokenizer()) is ItemTrie.from_tokenizer(Tokenizer())
    with pytest.raises(IncompatibleComponentsError, match="carries no item catalogue"):
        ItemTrie.from_tokenizer(object())
