"""Configuration of the multi-head VQ-VAE, the parallel identifiers of LLaDA-Rec (arXiv 2511.06254)."""

# No `from __future__ import annotations` here: string annotations silently switch the strict type checks off.

from dataclasses import field
from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_vq import VQConfig


@strict
class MultiHeadVQConfig(VQConfig):
    r"""
    Sizes and losses of a `MultiHeadVQModel`. Defaults: four codebooks of 256 over sub-vectors of 32 dimensions and hidden
    layers of 512 and 256, as the authors' code sets them.

    Args:
        input_size: feature dimensions E.
        hidden_sizes: widths of the encoder's hidden layers; the decoder mirrors them. Empty = linear.
        latent_size: dimensions P of one sub-vector; the encoder gives L * P.
        codebook_sizes: codes of each head, L entries.
        codebook_update: `"ema"` (moving averages of the assigned sub-vectors) or `"gradient"` (codebook loss, the
            authors' form).
        commitment_weight: beta, weight of the pull of the encoder towards its codes.
        quantization_weight: weight of the whole quantization loss against the reconstruction loss.
        ema_decay: decay of the moving averages; 0 = the means of the last batch.
        dead_code_interval: training steps between looking for unused codes; 0 never resets any.
        dead_code_share: a code is dead when it got less than this fraction of an equal share of the points since then.
        standardise: `"column"`, `"global"` or `"none"`, as in `RQVAEConfig`.
        dropout: dropout in the hidden layers.
        initializer_range: standard deviation of codebooks that were not initialised from data.

    Example:
        >>> MultiHeadVQConfig(input_size=64, codebook_sizes=[32, 32, 32]).num_levels
        3
    """

    model_type = "multi_head_vq"
    auto_map: ClassVar[dict] = {}

    hidden_sizes: list[int] | tuple[int, ...] = field(default_factory=lambda: [512, 256])
    codebook_sizes: list[int] | tuple[int, ...] = field(default_factory=lambda: [256, 256, 256, 256])
