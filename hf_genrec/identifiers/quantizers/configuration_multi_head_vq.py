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
        gate: weigh the code vectors before the decoder by a learned softmax over the heads (a mixture of quantization
            experts as MMQ's, 2508.15281; form unverified: our choice). It starts at equal weights, which is no gate.
        block_sizes: widths of the feature blocks that stand side by side in the input; None = one block.
        head_blocks: for each head the blocks it sees, as positions in `block_sizes`; every head then has an encoder of its
            own: MMQ's experts of one modality and shared experts. None = one encoder for all heads.

    Example:
        >>> MultiHeadVQConfig(input_size=64, codebook_sizes=[32, 32, 32]).num_levels
        3
    """

    model_type = "multi_head_vq"
    auto_map: ClassVar[dict] = {}

    hidden_sizes: list[int] | tuple[int, ...] = field(default_factory=lambda: [512, 256])
    codebook_sizes: list[int] | tuple[int, ...] = field(default_factory=lambda: [256, 256, 256, 256])
    gate: bool = False
    block_sizes: list[int] | None = None
    head_blocks: list[list[int]] | None = None

    def validate_architecture(self) -> None:
        """Part of the strict validation: the base's, and blocks that add up and exist."""
        super().validate_architecture()
        blocks = self.block_sizes or [self.input_size]
        if sum(blocks) != self.input_size or min(blocks) < 1:
            raise ValueError(
                f"MultiHeadVQConfig.block_sizes must be positive and add up to input_size={self.input_size}, got {blocks}"
            )
        if self.head_blocks is None:
            return
        known = set(range(len(blocks)))
        if len(self.head_blocks) != self.num_levels or any(not seen or set(seen) - known for seen in self.head_blocks):
            raise ValueError(
                f"MultiHeadVQConfig.head_blocks needs for each of {self.num_levels} heads one or more of the blocks "
                f"0..{len(blocks) - 1}, got {self.head_blocks}"
            )
