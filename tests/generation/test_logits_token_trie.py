"""TokenTrie against Python sets of prefixes, and against the ItemTrie it can be made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.token_trie import TokenTrie, check_unambiguous
from hf_genrec.generation.trie import ItemTrie


def random_sequences(seed, count=25, symbols=4, longest=5):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, symbols, rng.integers(1, longest + 1)).tolist()) for _ in range(count)]


def walk(trie, prefix):
    node = torch.zeros(1, dtype=torch.long)
    for token in prefix:
        node = trie.step(node, torch.tensor([token]))
    return node


@pytest.mark.parametrize("seed", range(20))
def test_against_sets_of_prefixes(seed):
    sequences = random_sequences(seed, count=1 + seed)
    trie = TokenTrie.from_sequences(sequences)
    prefixes = {row[:n] for row in sequences for n in range(len(row) + 1)}
    assert trie.num_nodes == len(prefixes) and trie.num_items == len(sequences)
    for prefix in sorted(prefixes) + [(9,), (0, 7), (3, -1)]:
        node = walk(trie, prefix)
        if prefix not in prefixes:
            assert node.item() == -1 and not trie.expand(node)[2].any() and trie.num_ending(node).item() == 0
            continue
        tokens, children, valid = (row[0] for row in trie.expand(node))
        followers = sorted(
            {row[len(prefix)] for row in prefixes if len(row) > len(prefix) and row[: len(prefix)] == prefix}
        )
        assert tokens[valid].tolist() == followers
        assert children[valid].tolist() == [walk(trie, (*prefix, token)).item() for token in followers]
        below = trie.items_at(torch.arange(*(int(bound) for bound in trie.slot_range(node))))
        assert sorted(below.tolist()) == [n for n, row in enumerate(sequences) if row[: len(prefix)] == prefix]
        here = trie.items_at(torch.arange(*(int(bound) for bound in trie.end_range(node))))
        assert here.tolist() == [n for n, row in enumerate(sequences) if row == prefix]
    assert torch.equal(trie.slot_items[trie.item_slots], torch.arange(len(sequences)))


def test_of_an_item_trie_with_codes_of_several_lengths():
    codes = np.array([[0, -1, -1], [0, 1, 2], [1, 0, -1], [0, 1, 0], [0, -1, -1]])
    trie = ItemTrie.from_codes(codes, (2, 3, 4))
    offsets = [10, 20, 30]
    flat = TokenTrie.from_item_trie(trie, offsets)
    spoken = [tuple((row + offsets)[row >= 0].tolist()) for row in codes]
    same = TokenTrie.from_sequences(spoken)
    for name in ("keys_E", "slot_ranges", "slot_items"):
        assert torch.equal(getattr(flat, name), getattr(same, name)), name


def test_what_may_follow_a_complete_sequence():
    trie = TokenTrie.from_sequences([[5, 6], [5, 6, 7], [8]])
    assert trie.tokens_after_ends().tolist() == [7] and trie.first_tokens().tolist() == [5, 8]
    check_unambiguous(trie, None)
    check_unambiguous(trie, 6)
    with pytest.raises(IncompatibleComponentsError, match="choose another separator"):
        check_unambiguous(trie, 7)
    with pytest.raises(IncompatibleComponentsError, match="pass separator_token_id"):
        check_unambiguous(TokenTrie.from_sequences([[5], [5, 6], [6]]), None)


def test_bad_sequences_are_named():
    with pytest.raises(RequestError, match="at least one"):
        TokenTrie.from_sequences([])
    with pytest.raises(RequestError, match="row 1 has no tokens"):
        TokenTrie.from_sequences([[1], []])
    with pytest.raises(RequestError, match="row 1 holds a negative token"):
        TokenTrie.from_sequences([[1], [2, -1]])
