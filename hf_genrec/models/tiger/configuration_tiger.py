"""Configuration of TIGER, the T5 encoder-decoder over semantic IDs (arXiv 2305.05065)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from hf_genrec.models.configuration_t5_levels import T5LevelsConfig


@strict
class TigerConfig(T5LevelsConfig):
    """Sizes of the paper's model, plus the layout of the item codes in the vocabulary: see `T5LevelsConfig`.

    Example:
        >>> config = TigerConfig(codebook_sizes=[16, 16, 4], d_model=32)
        >>> config.num_levels, config.level_offsets, config.vocab_size
        (3, [4, 20, 36], 40)
    """

    model_type = "tiger"
    auto_map: ClassVar[dict] = {}
