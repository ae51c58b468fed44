"""A tiny catalogue, tiny models of several kinds, and numbers for the artefact tests."""

from __future__ import annotations

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_genrec.data.items import ItemTable
from hf_genrec.hub import build_metrics
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

NUM_ITEMS = 30
TINY_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}


def make_tokenizer(num_items: int = NUM_ITEMS, prefix: str = "B") -> ItemTokenizer:
    codes = np.stack([np.arange(num_items) // 6, np.arange(num_items) % 6], axis=1)
    return ItemTokenizer.from_codes([f"{prefix}{i:04d}" for i in range(num_items)], codes)


def make_model(tokenizer: ItemTokenizer, seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=tokenizer.vocab_size, **TINY_T5, **ids)).eval()


def make_items(tokenizer: ItemTokenizer) -> ItemTable:
    titles = [f"Title {i}" for i in range(tokenizer.num_items)]
    return ItemTable.from_source({"item_id": list(tokenizer.item_ids), "title": titles})


def result_block(recall: float, ndcg: float, *, spread: float | None = 0.02, scale_kept: float = 0.6) -> dict:
    def block(factor: float) -> dict:
        values = {"recall@10": recall * factor, "ndcg@10": ndcg * factor}
        if spread is not None:
            values["intervals"] = {name: [value - spread, value + spread] for name, value in list(values.items())}
        return values

    return {
        **block(1.0),
        "seen_items": "removed",
        "seen_kept": block(scale_kept),
        "seen_removed": block(1.0),
        "rows": 943,
    }


def make_metrics(dataset: str = "movielens-100k", seed: int = 0, **changes) -> dict:
    values = {
        "dataset": dataset,
        "protocol": "leave_one_out",
        "seed": seed,
        "test": result_block(0.20, 0.105),
        "baselines": {"popularity": result_block(0.08, 0.04), "sasrec_ce": result_block(0.21, 0.11)},
        "identifiers": {"collision_rate": 0.02, "utilisation": [1.0, 0.9], "largest_group": 3},
        "wall_seconds": {"train": 12.5},
        "data": {
            "users": 943,
            "items": 1682,
            "interactions": 99000,
            "rows_read": 100000,
            "dropped": {"rating < 3": 1000},
            "density": 0.06,
            "tie_policy": "input order",
            "ties_last_two": 12,
            "min_user": 5,
            "min_item": 5,
            "ties_rows": 5,
        },
    }
    return build_metrics(**{**values, **changes})
