"""TIGER: generative retrieval of semantic IDs with a T5 encoder-decoder (arXiv 2305.05065).

The encoder reads the codes of a history, the decoder writes the L codes of the next item. Everything is in
`models/t5_levels.py`, which other models are built on too.
"""

from __future__ import annotations

from transformers import T5Model

from hf_genrec.models.t5_levels import T5LevelsForConditionalGeneration, apply_options

from .configuration_tiger import TigerConfig


class TigerModel(T5Model):
    """The encoder-decoder without a head: what `AutoModel` gives for a TIGER checkpoint."""

    config_class = TigerConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: TigerConfig):
        super().__init__(config)
        apply_options(self, config)


class TigerForConditionalGeneration(T5LevelsForConditionalGeneration):
    """T5 with one distribution per code level, and the decoding interface of `RecommendationMixin`.

    Example:
        >>> import torch
        >>> config = TigerConfig(codebook_sizes=[8, 8], d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1)
        >>> model = TigerForConditionalGeneration(config)
        >>> history, target = torch.tensor([[4, 12, 5, 13]]), torch.tensor([[6, 14]])
        >>> model(input_ids=history, labels=target).logits.shape
        torch.Size([1, 2, 20])
    """

    config_class = TigerConfig  # not an annotation: postponed annotations would reach transformers as strings
