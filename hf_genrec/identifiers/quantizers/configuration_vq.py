"""What the configurations of all vector-quantized autoencoders have in common."""

# No `from __future__ import annotations` here: string annotations silently switch the strict type checks off.

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

CODEBOOK_UPDATES = ("ema", "gradient")
STANDARDISATIONS = ("column", "global", "none")


@strict
class VQConfig(PreTrainedConfig):
    r"""
    Sizes and losses of a `VQAutoencoder`: the fields that `RQVAEConfig` and `MultiHeadVQConfig` share, described there.
    """

    model_type = "vq_autoencoder"
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

    def __post_init__(self, **kwargs: Any) -> None:
        """Sizes become lists, as they are after a trip through JSON."""
        self.hidden_sizes, self.codebook_sizes = list(self.hidden_sizes), list(self.codebook_sizes)
        super().__post_init__(**kwargs)

    @property
    def num_levels(self) -> int:
        """L, codes per item."""
        return len(self.codebook_sizes)

    def validate_architecture(self) -> None:
        """Part of the strict validation: sizes are positive, choices are known, weights are in range."""
        own = type(self).__name__
        for name in ("hidden_sizes", "codebook_sizes"):
            if any(size < 1 for size in getattr(self, name)):
                raise ValueError(f"{own}.{name} must hold positive sizes, got {getattr(self, name)}")
        if not self.codebook_sizes or self.input_size < 1 or self.latent_size < 1:
            raise ValueError(f"{own} needs input_size >= 1, latent_size >= 1 and one or more codebook_sizes")
        if self.codebook_update not in CODEBOOK_UPDATES:
            raise ValueError(f"{own}.codebook_update must be in {CODEBOOK_UPDATES}, got {self.codebook_update!r}")
        if self.standardise not in STANDARDISATIONS:
            raise ValueError(f"{own}.standardise must be in {STANDARDISATIONS}, got {self.standardise!r}")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"{own}.ema_decay and .dropout must be in [0, 1)")
        for name in ("commitment_weight", "quantization_weight", "dead_code_share", "dead_code_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"{own}.{name} must not be negative, got {getattr(self, name)}")
