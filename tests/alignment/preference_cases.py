"""Small catalogues, histories and models for the tests of preference data and trainers."""

from __future__ import annotations

import numpy as np
import torch

from hf_genrec.data.sequences import Sequences
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration


def catalogue(num_items: int = 64, shared: int = 0) -> ItemTokenizer:
    """Items of 3 levels of 4 codes, in counting order; the last `shared` items repeat the codes of the first."""
    numbers = np.arange(num_items)
    numbers[num_items - shared :] = np.arange(shared)
    codes = np.stack([numbers // 16, numbers // 4 % 4, numbers % 4], axis=1)
    return ItemTokenizer.from_codes([f"i{i}" for i in range(num_items)], codes, codebook_sizes=(4, 4, 4))


def tiger(tokenizer: ItemTokenizer, seed: int = 0, dropout: float = 0.1, **options) -> TigerForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
    config = TigerConfig.from_tokenizer(tokenizer, dropout_rate=dropout, **{**sizes, **options})
    model = TigerForConditionalGeneration(config)
    with torch.no_grad():  # far from uniform
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def histories(rows: int, num_items: int = 64, seed: int = 0, longest: int = 6) -> tuple[Sequences, np.ndarray]:
    """Random histories of 1 to `longest` distinct items, and a chosen item that is not among them."""
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(num_items)[: rng.integers(2, longest + 2)] for _ in range(rows)]
    return Sequences.from_rows([row[:-1] for row in drawn]), np.array([row[-1] for row in drawn])
