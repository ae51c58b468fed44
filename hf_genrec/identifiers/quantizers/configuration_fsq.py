"""Configuration of the finite scalar quantizer (FSQ, arXiv 2309.15505)."""

# No `from __future__ import annotations` here: string annotations silently switch the strict type checks off.

from dataclasses import field
from math import prod
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_vq import VQConfig


@strict
class FSQConfig(VQConfig):
    r"""
    Sizes of an `FSQModel`. Defaults: three codes of 8 x 6 x 5 = 240 values each, next to the paper's table for 2^8.

    Args:
        scalar_levels: for each of the L codes, how many values each of its scalars takes (3 or more; the paper advises
            5 or more). The sizes of the codebooks are the products; a given `codebook_sizes` is overwritten by them.
        input_size, hidden_sizes, standardise, dropout: as in `RQVAEConfig`. There are no codebooks, so what updates,
            assigns or weighs them has no effect.

    Example:
        >>> FSQConfig(input_size=64, scalar_levels=[[8, 6, 5], [5, 5]]).codebook_sizes
        [240, 25]
    """

    model_type = "fsq"
    auto_map: ClassVar[dict] = {}

    scalar_levels: list[list[int]] = field(default_factory=lambda: [[8, 6, 5], [8, 6, 5], [8, 6, 5]])

    def __post_init__(self, **kwargs: Any) -> None:
        """The sizes of the codebooks follow from the scalars."""
        self.scalar_levels = [list(sizes) for sizes in self.scalar_levels]
        self.codebook_sizes = [prod(sizes) for sizes in self.scalar_levels]
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the strict validation: every code has scalars, every scalar three values or more."""
        if not self.scalar_levels or any(not sizes or min(sizes) < 3 for sizes in self.scalar_levels):
            raise ValueError(
                f"FSQConfig.scalar_levels needs one or more scalars per code, of 3 or more values each, "
                f"got {self.scalar_levels}"
            )
        super().validate_architecture()
