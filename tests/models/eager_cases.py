"""A small catalogue with two balanced trees, and EAGER models over it."""

from __future__ import annotations

import numpy as np
import torch

from hf_genrec.identifiers.quantizers.tree import TreeIndexer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.eager.configuration_eager import EagerConfig
from hf_genrec.models.eager.modeling_eager import EagerForCausalLM

ITEMS, WIDTHS = 30, (5, 7)


def vectors(stream: int, items: int = ITEMS) -> np.ndarray:
    return np.random.default_rng(stream).standard_normal((items, WIDTHS[stream])).astype(np.float32)


def trees(items: int = ITEMS, branching: int = 6) -> list[TreeIndexer]:
    """A balanced tree of depth 2 over each stream's vectors, item numbers belonging to one leaf alone."""
    return [
        TreeIndexer(branching, depth=2, balanced=True, code_style="prefix", seed=stream).fit(vectors(stream, items))
        for stream in range(2)
    ]


def make_tokenizer(parts: list[TreeIndexer], items: int = ITEMS) -> ItemTokenizer:
    codes = np.concatenate([tree.codes_NL.numpy() for tree in parts], axis=1)
    sizes = [size for tree in parts for size in tree.codebook_sizes]
    return ItemTokenizer.from_codes([f"i{row}" for row in range(items)], codes, codebook_sizes=sizes)


def make_model(tokenizer: ItemTokenizer, seed: int = 0, streams: int = 2, **options) -> EagerForCausalLM:
    """Random weights large enough that scores differ; in evaluation mode."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 12, "dropout": 0.0}
    scales = {"initializer_range": 0.5, "embedding_std": 1.0}
    values = sizes | scales | {"stream_levels": [2] * streams, "item_feature_dims": WIDTHS[:streams]} | options
    torch.manual_seed(seed)
    model = EagerForCausalLM(EagerConfig.from_tokenizer(tokenizer, **values)).eval()
    blocks = [vectors(stream) for stream in range(streams)]
    model.set_catalogue(tokenizer.codes, np.concatenate(blocks, axis=1) if values["item_feature_dims"] else None)
    return model


def batch(tokenizer: ItemTokenizer, rows: list[list[int]], first_is_target: bool = False) -> dict[str, torch.Tensor]:
    """Windows as the sequence collator makes them."""
    encoded = tokenizer.encode_item_indices([np.array(row) for row in rows], return_tensors="pt")
    labels = (
        encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100).view(len(rows), -1, tokenizer.num_levels)
    )
    for row in range(len(rows) if not first_is_target else 0):
        real = (labels[row, :, 0] >= 0).nonzero()
        labels[row, real[0]] = -100
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels.flatten(1)}
