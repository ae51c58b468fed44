"""Configuration of the RQ-VAE quantizer (TIGER, arXiv 2305.05065)."""

# No `from __future__ import annotations` here: string annotations silently switch the strict type checks off.

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_vq import VQConfig


@strict
class RQVAEConfig(VQConfig):
    r"""
    Sizes and losses of an `RQVAEModel`. Defaults: three codebooks of 256 over a 32-dimensional latent (TIGER sec 4),
    with the encoder shortened to what a sentence vector of 384 needs.

    Args:
        input_size: feature dimensions E.
        hidden_sizes: widths of the encoder's hidden layers; the decoder mirrors them. Empty = linear.
        latent_size: dimensions P of the quantized space.
        codebook_sizes: codes per level.
        codebook_update: `"ema"` (moving averages of the assigned residuals) or `"gradient"` (codebook loss).
        commitment_weight: beta, weight of the pull of the encoder towards its codes.
        quantization_weight: weight of the whole quantization loss against the reconstruction loss.
        ema_decay: decay of the moving averages; 0 = the means of the last batch.
        dead_code_interval: training steps between looking for unused codes; 0 never resets any.
        dead_code_share: a code is dead when it got less than this fraction of an equal share of the points since then.
        standardise: `"column"` (each feature mean 0, variance 1), `"global"` (centre, one scale: keeps the weights of
            joined feature blocks) or `"none"`.
        dropout: dropout in the hidden layers.
        initializer_range: standard deviation of codebooks that were not initialised from data.

    Example:
        >>> RQVAEConfig(input_size=64, codebook_sizes=[32, 32]).num_levels
        2
    """

    model_type = "rq_vae"
    auto_map: ClassVar[dict] = {}
