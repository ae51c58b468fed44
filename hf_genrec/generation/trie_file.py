"""ItemTrie files: safetensors holding codes, counts and items, checked in full when read.

The file knows nothing of the layout in memory: per level the number of children of each node and their codes, per leaf
the number of items, and the items leaf by leaf. Offsets are sums of these counts, so no number in a file can point
outside a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ArtifactError
from .trie_build import TrieTables
from .trie_storage import index_dtype

FORMAT = "hf_genrec.item_trie.2"
_OLD_FORMAT = "hf_genrec.item_trie.1"
_MOST_LEVELS = 4096


def write_tables(file: str | Path, tables: TrieTables, sizes: tuple[int, ...]) -> None:
    tensors = {"items": torch.from_numpy(np.ascontiguousarray(tables.items))}
    for level, codes in enumerate(tables.codes):
        tensors[f"codes.{level}"] = torch.from_numpy(np.ascontiguousarray(codes))
    for level, offsets in enumerate(tables.offsets):
        counts = np.diff(offsets)
        small = np.uint8 if counts.max() < 256 else np.int64
        tensors[f"counts.{level}"] = torch.from_numpy(counts.astype(small))
    metadata = {"format": FORMAT, "codebook_sizes": ",".join(map(str, sizes))}
    save_file(tensors, str(file), metadata=metadata)


def read_tables(file: str | Path) -> tuple[TrieTables, tuple[int, ...]]:
    """Tables and codebook sizes of a file.

    Raises:
        ArtifactError: no such file, no item trie, one of an earlier version, or a damaged one (what is wrong is named).
    """
    try:
        with safe_open(str(file), framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") == _OLD_FORMAT:
                raise ArtifactError(
                    f"{file} was written by an earlier version of hf_genrec; build the trie again from the codes "
                    "(ItemTrie.from_codes or from_tokenizer) and save it."
                )
            if metadata.get("format") != FORMAT:
                raise ArtifactError(f"{file} is not an item trie; write it with ItemTrie.save.")
            sizes = _sizes(file, metadata)
            names = set(stored.keys())
            return _checked(file, {name: stored.get_tensor(name) for name in names}, sizes), sizes
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read as an item trie ({error}); write it with ItemTrie.save.") from error


def _damaged(file: str | Path, what: str) -> ArtifactError:
    return ArtifactError(f"{file} is damaged: {what}; build the trie again and write it with ItemTrie.save.")


def _sizes(file: str | Path, metadata: dict[str, str]) -> tuple[int, ...]:
    words = metadata.get("codebook_sizes", "").split(",")
    if len(words) > _MOST_LEVELS or not all(word.isascii() and word.isdigit() and len(word) < 11 for word in words):
        raise _damaged(file, "its codebook sizes are no list of numbers")
    sizes = tuple(int(word) for word in words)
    if not all(1 <= size < 2**31 for size in sizes):
        raise _damaged(file, "a codebook size is out of range")
    return sizes


def _checked(file: str | Path, tensors: dict[str, torch.Tensor], sizes: tuple[int, ...]) -> TrieTables:
    arrays = {name: _integers(file, name, tensor) for name, tensor in tensors.items()}

    def get(name: str, length: int) -> np.ndarray:
        if name not in arrays:
            raise _damaged(file, f"tensor {name} is missing")
        if len(arrays[name]) != length:
            raise _damaged(file, f"tensor {name} holds {len(arrays[name])} numbers, not {length}")
        return arrays[name]

    num_items = len(arrays["items"]) if "items" in arrays else 0
    if not num_items:
        raise _damaged(file, "it names no items")
    nodes, offsets, codes = 1, [], []
    ended = np.zeros(1, dtype=bool)
    for level in range(len(sizes) + 1):
        counts = get(f"counts.{level}", nodes)
        if counts.min() < 1 or counts.max() > num_items or int(counts.sum(dtype=np.int64)) > num_items:
            raise _damaged(file, f"the counts of level {level} are impossible")
        offsets.append(np.append(0, np.cumsum(counts, dtype=index_dtype(num_items))).astype(index_dtype(num_items)))
        nodes = int(offsets[-1][-1])
        if level < len(sizes):
            codes.append(get(f"codes.{level}", nodes))
            _check_level(file, level, sizes[level], offsets[-1], codes[-1])
            is_end = codes[-1] == sizes[level]
            if level == 0 and is_end.any():
                raise _damaged(file, "an item has no codes")
            if (np.repeat(ended, counts) & ~is_end).any():
                raise _damaged(file, f"level {level} goes on after the end of an item")
            ended = is_end
    items = get("items", nodes)
    if items.min() < 0 or items.max() >= num_items or (np.bincount(items, minlength=num_items) != 1).any():
        raise _damaged(file, "its items are not the numbers 0..N-1, each once")
    if not _ascending(items, offsets[-1]):
        raise _damaged(file, "the items of a leaf are not in order")
    return TrieTables(offsets, codes, items)


def _check_level(file: str | Path, level: int, size: int, offsets: np.ndarray, codes: np.ndarray) -> None:
    if codes.min() < 0 or codes.max() > size:
        raise _damaged(file, f"level {level} holds a code outside its codebook of {size} codes")
    if not _ascending(codes, offsets):
        raise _damaged(file, f"the codes of level {level} are not in order")


def _ascending(values: np.ndarray, offsets: np.ndarray) -> bool:
    rises = np.ones(len(values), dtype=bool)
    rises[1:] = values[1:] > values[:-1]
    rises[offsets[:-1]] = True  # the first of a range may be anything
    return bool(rises.all())


def _integers(file: str | Path, name: str, tensor: torch.Tensor) -> np.ndarray:
    kinds: Any = (torch.uint8, torch.int16, torch.int32, torch.int64)
    if tensor.ndim != 1 or tensor.dtype not in kinds:
        raise _damaged(file, f"tensor {name} is no list of integers")
    return tensor.numpy()
