"""Finite scalar quantization: codes are rounded numbers, there is no codebook to learn or to collapse (arXiv 2309.15505).

Shape suffixes: N items, B items of a batch, E feature dimensions, D scalars of one code, Q scalars of all codes, C codes
(the product of the values of D scalars).

    z_d -> tanh -> [-(n_d - 1)/2, (n_d - 1)/2] -> nearest integer;  code = mixed-radix number of the D integers
"""

from __future__ import annotations

from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import IncompatibleComponentsError
from .assignment import straight_through
from .codebook_level import QuantizerLevel
from .configuration_fsq import FSQConfig
from .configuration_vq import VQConfig
from .vq_layer import VQAutoencoder

Self = TypeVar("Self", bound="FSQModel")


class FSQ(nn.Module):
    """Rounds vectors (B, D) to a grid with `sizes[d]` values along dimension d. No parameters, nothing saved.

    The first dimension is the lowest digit of the code. An odd number of values is symmetric around 0, an even one has
    the extra value on the negative side, as in the paper.

    Raises:
        IncompatibleComponentsError: no dimensions, or one of fewer than 3 values.

    Example:
        >>> grid = FSQ([5, 4])
        >>> codes, vectors = grid.quantize(torch.tensor([[-9.0, 9.0], [0.0, 0.0]]))
        >>> codes.tolist(), vectors.tolist()
        ([15, 12], [[-1.0, 0.5], [0.0, 0.0]])
        >>> torch.equal(grid.vectors(codes), vectors)
        True
    """

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        if not sizes or min(sizes) < 3:
            raise IncompatibleComponentsError(f"FSQ needs dimensions of 3 or more values each, got {sizes}")
        self.sizes = list(sizes)

    def _rows(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size_D = torch.tensor(self.sizes, device=like.device)
        radix_D = torch.tensor([prod(self.sizes[:d]) for d in range(len(self.sizes))], device=like.device)
        return size_D, size_D // 2, radix_D

    def bound(self, z_BD: Tensor) -> Tensor:
        """Squash into the range of the grid's integers; 0 stays 0."""
        size_D, _, _ = self._rows(z_BD)
        half_D = (size_D - 1).to(z_BD.dtype) * (1 - 1e-3) / 2  # short of the end: a tie cannot round out of the grid
        offset_D = (size_D % 2 == 0).to(z_BD.dtype) / 2
        return torch.tanh(z_BD + torch.atanh(offset_D / half_D)) * half_D - offset_D

    def quantize(self, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """`(codes_B, vectors_BD)` with vectors in [-1, 1]; the gradient passes the rounding straight through."""
        _, middle_D, radix_D = self._rows(z_BD)
        bounded_BD = self.bound(z_BD)
        rounded_BD = bounded_BD.detach().round()
        codes_B = ((rounded_BD.long() + middle_D) * radix_D).sum(1)
        return codes_B, straight_through(rounded_BD, bounded_BD) / middle_D

    def vectors(self, codes_B: Tensor) -> Tensor:
        """Grid vectors (B, D) float32 of codes (B,)."""
        size_D, middle_D, radix_D = self._rows(codes_B)
        return ((codes_B[:, None] // radix_D) % size_D - middle_D).float() / middle_D

    def codes(self, vectors_BD: Tensor) -> Tensor:
        """Codes (B,) of grid vectors (B, D): the inverse of `vectors`."""
        _, middle_D, radix_D = self._rows(vectors_BD)
        return (((vectors_BD * middle_D).round().long() + middle_D) * radix_D).sum(1)


class FSQLevel(QuantizerLevel):
    """One grid in the place of a codebook: nothing to update, initialise or restart."""

    def __init__(self, config: FSQConfig, level: int) -> None:
        nn.Module.__init__(self)
        self.grid = FSQ(config.scalar_levels[level])
        self.update_rule, self.assignment = "none", "nearest"

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        """All grid vectors (C, D), in the order of their codes."""
        return self.grid.vectors(torch.arange(prod(self.grid.sizes)))

    def init_weights(self) -> None:
        """Nothing to initialise."""

    def load_codebook(self, codebook_CP: Tensor, share_C: Tensor) -> None:
        """The grid is fixed: nothing to load."""

    def update(self, residual_BP: Tensor, codes_B: Tensor) -> None:
        """The grid is fixed: nothing to update."""

    def assign(self, x_NP: Tensor, chunk_size: int = 8192) -> Tensor:
        """Code (N,) of every point."""
        return self.grid.quantize(x_NP)[0]

    def forward(self, residual_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(codes_B, grid vectors_BP, 0)`."""
        codes_B, vectors_BP = self.grid.quantize(residual_BP)
        return codes_B, vectors_BP, residual_BP.new_zeros(())

    @property
    def is_soft(self) -> bool:
        """The vectors carry the gradient through the rounding themselves."""
        return True


class FSQModel(VQAutoencoder):
    """Autoencoder whose latent is rounded: L parallel codes, each of a few scalars (arXiv 2309.15505).

    The loss is the reconstruction alone. Codes are parallel, as in `MultiHeadVQModel`: none refines another.
    `codebooks` are the grids in [-1, 1]; `transform` gives the unbounded encoder outputs, so distances between the two
    mean nothing (the collision policy "next_nearest" does not apply).

    Relations: `MultiHeadVQModel` with product grids as frozen codebooks on squashed sub-vectors.

    Example:
        >>> config = FSQConfig(input_size=8, hidden_sizes=[16], scalar_levels=[[5, 3], [4, 4]])
        >>> model, x = FSQModel(config), torch.randn(64, 8)
        >>> _ = model.initialise_codebooks(x)
        >>> model.encode(x).shape, model.codebook_sizes, model.transform(x).shape
        (torch.Size([64, 2]), (15, 16), torch.Size([64, 4]))
    """

    config: FSQConfig
    config_class = FSQConfig
    base_model_prefix = "fsq"
    label = "FSQ"

    @staticmethod
    def _latent_width(config: VQConfig) -> int:
        assert isinstance(config, FSQConfig)
        return sum(len(sizes) for sizes in config.scalar_levels)

    @staticmethod
    def _make_levels(config: VQConfig) -> list[QuantizerLevel]:
        assert isinstance(config, FSQConfig)
        return [FSQLevel(config, level) for level in range(config.num_levels)]

    def _level_input(self, latents_BQ: Tensor, chosen: list[Tensor]) -> Tensor:
        widths = [len(sizes) for sizes in self.config.scalar_levels]
        left = sum(widths[: len(chosen)])
        return latents_BQ[:, left : left + widths[len(chosen)]]

    def _join(self, chosen: list[Tensor]) -> Tensor:
        return torch.cat(chosen, dim=-1)

    @property
    def codebooks(self) -> list[Tensor]:
        """The L grids, (C_l, D_l) each."""
        return [level.codebook.to(self.device, self.dtype) for level in self._quantizer_levels()]

    @torch.no_grad()
    def initialise_codebooks(self: Self, features: Tensor | np.ndarray, **options: Any) -> Self:
        """Take the standardisation from the features (N, E); `options` (seed, iterations) have nothing to act on.

        Raises:
            TrainingError: NaN or infinite features.
        """
        self.scaler.fit(self._features(features))
        return self

    def level_distances(self, latents: Tensor) -> list[Tensor]:
        """Not defined: latents are unbounded, grids are not.

        Raises:
            IncompatibleComponentsError: always.
        """
        raise IncompatibleComponentsError("FSQ has no code distances: use `MultiHeadVQModel` for losses on code logits")

    @torch.no_grad()
    def encode(self, features: Tensor | np.ndarray, batch_size: int = 8192, *, last_level: str = "nearest") -> Tensor:
        """Codes (N, L) int64 of features (N, E).

        Raises:
            IncompatibleComponentsError: a `last_level` other than "nearest".
        """
        if last_level != "nearest":
            raise IncompatibleComponentsError(f"FSQ rounds, it cannot balance: last_level={last_level!r}")
        latents_NQ = self.transform(features, batch_size)
        codes: list[Tensor] = []
        for level in self._quantizer_levels():
            codes.append(level.assign(self._level_input(latents_NQ, codes)))
        return torch.stack(codes, 1)

    @torch.no_grad()
    def decode(self, codes_NL: Tensor | np.ndarray) -> Tensor:
        """Features (N, E) that codes (N, L) stand for, in the units of the input.

        Raises:
            IncompatibleComponentsError: not one code of every position.
        """
        codes_NL = torch.as_tensor(codes_NL, device=self.device).long()
        if codes_NL.dim() != 2 or codes_NL.shape[1] != self.config.num_levels:
            raise IncompatibleComponentsError(
                f"codes must be (N, {self.config.num_levels}), got {tuple(codes_NL.shape)}"
            )
        return self._decode_latents(codes_NL)
