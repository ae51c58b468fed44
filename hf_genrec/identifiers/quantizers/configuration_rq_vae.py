"""Configuration of the RQ-VAE quantizer (TIGER, arXiv 2305.05065)."""

# No `from __future__ import annotations` here: string annotations silently switch the strict type checks off.

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_vq import VQConfig

SHARED_CODEBOOKS = ("none", "tail", "all")


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
        codebook_update: `"ema"` (moving averages of the assigned residuals), `"gradient"` (codebook loss) or `"simvq"`
            (codebook loss on a learned map of a frozen codebook).
        commitment_weight: beta, weight of the pull of the encoder towards its codes.
        quantization_weight: weight of the whole quantization loss against the reconstruction loss.
        ema_decay: decay of the moving averages; 0 = the means of the last batch.
        dead_code_interval: training steps between looking for unused codes; 0 never resets any.
        dead_code_share: a code is dead when it got less than this fraction of an equal share of the points since then.
        standardise: `"column"` (each feature mean 0, variance 1), `"global"` (centre, one scale: keeps the weights of
            joined feature blocks) or `"none"`.
        dropout: dropout in the hidden layers.
        initializer_range: standard deviation of codebooks that were not initialised from data.
        shared_codebooks: `"none"`; `"tail"`: all levels after the first read one codebook (UTGRec, 2504.04405); `"all"`:
            one codebook for every level. Levels that share need equal codebook_sizes and assignments.
        random_prefix: share of the items of a training batch that are reconstructed from a random number of their first
            codes, drawn evenly from 1..L; 1 is PLUM's progressive masking (2510.07784).
        codebook_update, assignment, gradient_path, ...: further choices, see `VQConfig`.

    Example:
        >>> RQVAEConfig(input_size=64, codebook_sizes=[32, 32]).num_levels
        2
    """

    model_type = "rq_vae"
    auto_map: ClassVar[dict] = {}

    shared_codebooks: str = "none"
    random_prefix: float | int = 0.0

    @property
    def codebook_of_level(self) -> list[int]:
        """Which codebook each level reads."""
        levels = range(self.num_levels)
        if self.shared_codebooks == "none":
            return list(levels)
        return [0 if self.shared_codebooks == "all" else min(level, 1) for level in levels]

    def validate_architecture(self) -> None:
        """Part of the strict validation: the base's, and what sharing and prefixes need."""
        super().validate_architecture()
        if self.shared_codebooks not in SHARED_CODEBOOKS:
            raise ValueError(
                f"RQVAEConfig.shared_codebooks must be in {SHARED_CODEBOOKS}, got {self.shared_codebooks!r}"
            )
        for name, values in (("codebook_sizes", self.codebook_sizes), ("assignment", self.level_assignments)):
            if len(set(zip(self.codebook_of_level, values))) != len(set(self.codebook_of_level)):
                raise ValueError(
                    f"RQVAEConfig.{name} must be equal at the levels that share a codebook "
                    f"(shared_codebooks={self.shared_codebooks!r}), got {list(values)}"
                )
        if not 0 <= self.random_prefix <= 1:
            raise ValueError(f"RQVAEConfig.random_prefix must be in [0, 1], got {self.random_prefix}")
