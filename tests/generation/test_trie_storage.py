"""The packed tables of the trie against the plain arrays they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.generation.trie_storage import ChildCodes, ItemOrder, Offsets


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 7, 127, 128, 129, 1000, 5000])
@pytest.mark.parametrize("most", [1, 2, 3, 50, 300, 70_000])
def test_offsets(num_nodes, most):
    rng = np.random.default_rng(num_nodes + most)
    plain = np.append(0, np.cumsum(rng.integers(1, most + 1, num_nodes)))
    packed = Offsets.pack(plain)
    assert np.array_equal(packed.unpack(), plain)
    assert packed.widest == np.diff(plain).max() and packed.total == plain[-1]
    nodes = rng.integers(-1, num_nodes, 200)
    start, end = packed.range(nodes)
    known = nodes >= 0
    assert start.dtype == end.dtype == np.int64
    assert np.array_equal(start[known], plain[nodes[known]]) and np.array_equal(end[known], plain[nodes[known] + 1])
    assert np.array_equal(start[~known], end[~known])
    for here, there in zip(packed.range(torch.from_numpy(nodes)), (start, end)):
        assert here.dtype == torch.int64 and np.array_equal(here.numpy()[known], there[known])
    index = rng.integers(0, num_nodes + 1, 50)
    assert np.array_equal(packed.at(index), plain[index])
    assert np.array_equal(packed.at(torch.from_numpy(index)).numpy(), plain[index])
    children = np.append(rng.integers(0, plain[-1], 200), [0, plain[-1] - 1])
    assert np.array_equal(packed.parents(children), np.searchsorted(plain, children, side="right") - 1)


def test_offsets_of_many_thin_nodes_take_about_a_byte():
    rng = np.random.default_rng(0)
    plain = np.append(0, np.cumsum(1 + (rng.random(100_000) < 0.05)))
    held = sum(tensor.numel() * tensor.element_size() for _, tensor in Offsets.pack(plain).tensors())
    assert held < 1.05 * len(plain)
    assert not list(Offsets.pack(np.arange(1001)).tensors())  # one child each: nothing to hold


def test_offsets_beyond_32_bits():
    plain = np.array([0, 2**31 - 5, 2**31 + 7, 2**33], dtype=np.int64)
    packed = Offsets.pack(plain)
    assert np.array_equal(packed.unpack(), plain)
    assert packed.range(np.array([1]))[1].tolist() == [2**31 + 7]
    assert packed.range(torch.tensor([2]))[1].tolist() == [2**33]
    assert packed.parents(np.array([2**31, 2**33 - 1])).tolist() == [1, 2]


@pytest.mark.parametrize("count", [1, 2, 3, 100, 2**16, 2**16 + 1, 2**16 + 2, 2**18 + 5, 2**20, 2**20 + 1, 2**21 - 3])
def test_item_order(count):
    rng = np.random.default_rng(count)
    items = rng.permutation(count)
    packed = ItemOrder.pack(items)
    assert np.array_equal(packed.unpack(), items)
    slots = np.append(rng.integers(0, count, 500), [0, count - 1])
    assert np.array_equal(packed.take(slots), items[slots])
    assert np.array_equal(packed.take(torch.from_numpy(slots)).numpy(), items[slots])
    assert np.array_equal(packed.find(items[slots]), slots)
    assert packed.find(np.zeros(0, dtype=np.int64)).tolist() == []


def test_item_order_beyond_24_bits_is_plain():
    count = 2**24 + 10
    packed = ItemOrder.pack(np.arange(count)[::-1])
    assert packed.take(np.array([0, count - 1])).tolist() == [count - 1, 0]
    assert packed.find(np.array([3])).tolist() == [count - 4]


def test_codes_are_stored_in_the_smallest_type():
    size = lambda codes, size: ChildCodes.pack(np.asarray(codes), size, 3).padded.dtype
    assert size([0, 255], 256) == torch.uint8
    assert size([0, 256], 256) == torch.int16  # an end of a codebook of 256
    assert size([0, 255], 255) == torch.uint8
    assert size([0, 2**15 - 1], 2**15) == torch.int16
    assert size([0, 2**15], 2**15) == torch.int32
    assert size([0, 149_999], 150_000) == torch.int32
