"""Trie files: round trips, and files that are old, foreign or damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from hf_genrec.errors import ArtifactError
from hf_genrec.generation.trie import ItemTrie

SIZES = (4, 4, 4)
CODES = [[0, 1, 2], [0, 1, 3], [0, 1, 2], [3, 0, 0], [3, 2, 1], [2, 2, -1], [2, 2, 3], [1, -1, -1]]


@pytest.fixture
def stored(tmp_path):
    """(file, tensors, metadata) of a small trie with shared codes and ends."""
    file = tmp_path / "trie.safetensors"
    ItemTrie.from_codes(CODES, SIZES).save(file)
    with safe_open(str(file), framework="pt") as reader:
        metadata = reader.metadata()
    return file, load_file(str(file)), metadata


@pytest.mark.parametrize("sizes", [(300, 5, 9000), (256,) * 4, (40_000, 3), (2,)])
@pytest.mark.parametrize("ends", [False, True])
def test_save_and_load(sizes, ends, tmp_path, random_codes):
    codes = random_codes(700, sizes)
    if ends:
        lengths = np.random.default_rng(0).integers(1, len(sizes) + 1, 700)
        codes[np.arange(len(sizes)) >= lengths[:, None]] = -1
    trie = ItemTrie.from_codes(codes, sizes)
    trie.save(tmp_path / "trie.safetensors")
    again = ItemTrie.load(tmp_path / "trie.safetensors")
    assert again.codebook_sizes == trie.codebook_sizes and again.has_ends == trie.has_ends == (ends and len(sizes) > 1)
    assert again.max_children == trie.max_children and again.max_items_per_leaf == trie.max_items_per_leaf
    assert again._tensors().keys() == trie._tensors().keys()
    for name, tensor in trie._tensors().items():
        assert torch.equal(tensor, again._tensors()[name]) and tensor.dtype == again._tensors()[name].dtype


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        ItemTrie.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        ItemTrie.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, str(tmp_path / "x.safetensors"))
    with pytest.raises(ArtifactError, match="not an item trie"):
        ItemTrie.load(tmp_path / "x.safetensors")
    old = {"leaf_items": torch.zeros(1), "leaf_offsets": torch.zeros(2)}
    save_file(old, str(tmp_path / "old"), {"format": "hf_genrec.item_trie.1", "codebook_sizes": "4"})
    with pytest.raises(ArtifactError, match="earlier version"):
        ItemTrie.load(tmp_path / "old")


def test_truncated_files_are_refused(stored):
    file = stored[0]
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            ItemTrie.load(file)


def changed(name, index, value):
    def change(tensors, metadata):
        tensors[name] = tensors[name].long()
        tensors[name][index] = value

    return change


def shortened(name):
    def change(tensors, metadata):
        tensors[name] = tensors[name][:-1].clone()

    return change


def swapped(name, one, two):
    def change(tensors, metadata):
        tensors[name][[one, two]] = tensors[name][[two, one]]

    return change


def replaced(name, tensor):
    def change(tensors, metadata):
        tensors[name] = tensor

    return change


def sizes(words):
    def change(tensors, metadata):
        metadata["codebook_sizes"] = words

    return change


# The trie: codes.0 = 0 1 2 3, codes.1 = 1 | 4 | 2 | 0 2, codes.2 = 2 3 | 4 | 3 4 | 0 | 1; leaf 0 = items 0 and 2.
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, metadata: tensors.pop("codes.1"), "codes.1 is missing"),
        (lambda tensors, metadata: tensors.pop("items"), "names no items"),
        (lambda tensors, metadata: tensors.pop("counts.3"), "counts.3 is missing"),
        *[(shortened(f"codes.{level}"), "holds") for level in range(3)],
        *[(shortened(f"counts.{level}"), "holds") for level in range(4)],
        (shortened("items"), "impossible"),
        (replaced("items", torch.zeros(0, dtype=torch.int64)), "names no items"),
        (replaced("items", torch.zeros(8)), "no list of integers"),
        (replaced("codes.2", torch.zeros(7, 1, dtype=torch.int64)), "no list of integers"),
        (replaced("counts.0", torch.zeros(0, dtype=torch.int64)), "holds 0 numbers, not 1"),
        (changed("counts.1", 0, 0), "impossible"),
        (changed("counts.1", 0, -1), "impossible"),
        (changed("counts.1", 0, 2**62), "impossible"),
        (changed("counts.0", 0, 3), "holds"),
        (changed("counts.3", 0, 1), "holds 8 numbers, not 7"),
        (changed("codes.0", 3, 5), "outside its codebook"),
        (changed("codes.0", 0, -1), "outside its codebook"),
        (changed("codes.0", 3, 4), "an item has no codes"),
        (changed("codes.0", 1, 0), "not in order"),
        (changed("codes.1", 3, 2), "not in order"),
        (changed("codes.2", 2, 0), "goes on after the end"),
        (changed("items", 0, 8), "each once"),
        (changed("items", 0, -1), "each once"),
        (changed("items", 0, 1), "each once"),
        (swapped("items", 0, 1), "not in order"),
        (sizes(""), "no list of numbers"),
        (sizes("4,4,x"), "no list of numbers"),
        (sizes("4,4,-4"), "no list of numbers"),
        (sizes("4,4,0"), "out of range"),
        (sizes("4,4,9999999999"), "out of range"),
        (sizes("4,4," + "9" * 5000), "no list of numbers"),
        (sizes("4,4"), "holds"),
        (sizes("4,4,4,4"), "codes.3 is missing"),
        (sizes("4,4,3"), "outside its codebook"),
    ],
)
def test_damage_is_named(change, words, stored):
    file, tensors, metadata = stored
    change(tensors, metadata)
    save_file(tensors, str(file), metadata)
    with pytest.raises(ArtifactError, match=words) as caught:
        ItemTrie.load(file)
    assert str(file) in str(caught.value)


def test_random_damage_never_goes_through_as_another_trie_shape(stored):
    """Any one number overwritten gives an error, or a trie that is sound (every item at a leaf that spells a code)."""
    file, tensors, metadata = stored
    rng = np.random.default_rng(0)
    loaded = 0
    for _ in range(300):
        damaged = {name: tensor.clone() for name, tensor in tensors.items()}
        name = sorted(damaged)[rng.integers(len(damaged))]
        damaged[name][rng.integers(len(damaged[name]))] = int(rng.integers(0, 9))
        save_file(damaged, str(file), metadata)
        try:
            trie = ItemTrie.load(file)
        except ArtifactError:
            continue
        loaded += 1
        codes = trie.node_prefixes(3)[trie.item_leaf_N]
        again = ItemTrie.from_codes(torch.where(codes == 4, -1, codes), SIZES)
        assert all(torch.equal(tensor, again._tensors()[part]) for part, tensor in trie._tensors().items())
    assert loaded > 0  # some changes spell another catalogue
