"""Configuration of the RQ-VAE quantizer (TIGER, arXiv 2305.05065)."""

# No `from __future__ import annotations` here: string annotations silently switch the strict type checks off.

from dataclasses import field
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CODEBOOK_UPDATES = ("ema", "gradient")
STANDARDISATIONS = ("column", "global", "none")


@strict
class RQVAEConfig(PreTrainedConfig):
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

    input_size: int = 384
    hidden_sizes: list[int] | tuple[int, ...] = field(default_factory=lambda: [256, 128])
    latent_size: int = 32
    codebook_sizes: list[int] | tuple[int, ...] = field(default_factory=lambda: [256, 256, 256])
    codebook_update: str = "ema"
    commitment_weight: float | int = 0.25
    quantization_weight: float | int = 1.0
    ema_decay: float | int = 0.99
    dead_code_interval: int = 20
    dead_code_share: float | int = 0.05
    standardise: str = "column"
    dropout: float | int = 0.0
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs) -> None:
        """Sizes become lists, as they are after a trip through JSON."""
        self.hidden_sizes, self.codebook_sizes = list(self.hidden_sizes), list(self.codebook_sizes)
        super().__post_init__(**kwargs)

    @property
    def num_levels(self) -> int:
        """L, codes per item."""
        return len(self.codebook_sizes)

    def validate_architecture(self) -> None:
        """Part of the strict validation: sizes are positive, choices are known, weights are in range."""
        for name in ("hidden_sizes", "codebook_sizes"):
            if any(size < 1 for size in getattr(self, name)):
                raise ValueError(f"RQVAEConfig.{name} must hold positive sizes, got {getattr(self, name)}")
        if not self.codebook_sizes or self.input_size < 1 or self.latent_size < 1:
            raise ValueError("RQVAEConfig needs input_size >= 1, latent_size >= 1 and one or more codebook_sizes")
        if self.codebook_update not in CODEBOOK_UPDATES:
            raise ValueError(f"RQVAEConfig.codebook_update must be in {CODEBOOK_UPDATES}, got {self.codebook_update!r}")
        if self.standardise not in STANDARDISATIONS:
            raise ValueError(f"RQVAEConfig.standardise must be in {STANDARDISATIONS}, got {self.standardise!r}")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.dropout < 1:
            raise ValueError("RQVAEConfig.ema_decay and .dropout must be in [0, 1)")
        for name in ("commitment_weight", "quantization_weight", "dead_code_share", "dead_code_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"RQVAEConfig.{name} must not be negative, got {getattr(self, name)}")
