"""Multi-head VQ-VAE: an autoencoder whose latent is cut into sub-vectors, each with a codebook of its own (2511.06254).

Shape suffixes: N items, B items of a batch, E feature dimensions, P dimensions of a sub-vector, L heads (codes per
item), C codes of a head, Q = L * P.

    latent_BQ = [z_1 | ... | z_L], c_l = nearest code of z_l;  [e_1 | ... | e_L] -> decoder

The codes of an item are a set of independent facts: none is a refinement of another, so they can be predicted in any
order, which masked diffusion needs and a residual quantizer (whose later codes mean nothing without the earlier) lacks.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization

from ...errors import IncompatibleComponentsError
from .configuration_multi_head_vq import MultiHeadVQConfig
from .configuration_vq import VQConfig
from .vq_layer import VQAutoencoder, mlp


class Gate(nn.Module):
    """Weights of the heads' vectors (B, L * P): L times a softmax over the heads, so that equal weights change nothing.

    It reads the quantized vectors alone, hence codes can still be decoded without their item.
    """

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.zeros(num_heads, width))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, vectors_BQ: Tensor) -> Tensor:
        weight_BL = self.num_heads * nn.functional.linear(vectors_BQ, self.weight, self.bias).softmax(1)
        return (vectors_BQ.unflatten(1, (self.num_heads, -1)) * weight_BL[:, :, None]).flatten(1)


class HeadEncoders(nn.Module):
    """One encoder per head, each on its own columns of the features; their outputs (B, P) side by side."""

    def __init__(self, config: MultiHeadVQConfig) -> None:
        super().__init__()
        sizes = config.block_sizes or [config.input_size]
        right = list(accumulate(sizes))
        self.columns: list[list[int]] = []
        encoders = []
        for blocks in config.head_blocks or []:
            columns = [c for block in sorted(set(blocks)) for c in range(right[block] - sizes[block], right[block])]
            self.columns.append(columns)
            encoders.append(mlp([len(columns), *config.hidden_sizes, config.latent_size], config.dropout))
        self.heads = nn.ModuleList(encoders)

    def forward(self, x_BE: Tensor) -> Tensor:
        return torch.cat([head(x_BE[:, columns]) for head, columns in zip(self.heads, self.columns)], 1)


class MultiHeadVQModel(VQAutoencoder):
    """Autoencoder with parallel codes (LLaDA-Rec, arXiv 2511.06254).

    Call `initialise_codebooks(features)` once before training (`train_multi_head_vq` does). The codebooks start from
    k-means on the sub-vectors, as in the authors' code. Theirs also spreads colliding items over the last codebook by
    optimal transport; here that is the collision policy "next_nearest" on `padded_codebooks()`.

    With `gate` and `head_blocks` it is a mixture of quantization experts (MMQ, arXiv 2508.15281): heads that see one
    modality, heads that see all, a gate before the decoder, and the loss term `orthogonality` between the heads.

    Relations: a frozen identity encoder is product quantization with equal blocks; one head is an RQ-VAE of one level.
    A gate of equal weights, as it starts, is none.

    Example:
        >>> import torch
        >>> config = MultiHeadVQConfig(input_size=8, hidden_sizes=[16], latent_size=4, codebook_sizes=[4, 4])
        >>> model, x = MultiHeadVQModel(config), torch.randn(64, 8)
        >>> _ = model.initialise_codebooks(x)
        >>> model.encode(x).shape, model.transform(x).shape, [tuple(book.shape) for book in model.codebooks]
        (torch.Size([64, 2]), torch.Size([64, 8]), [(4, 4), (4, 4)])
    """

    config: MultiHeadVQConfig
    config_class = MultiHeadVQConfig
    base_model_prefix = "multi_head_vq"
    label = "multi-head VQ-VAE"

    @staticmethod
    def _latent_width(config: VQConfig) -> int:
        return config.latent_size * config.num_levels

    @classmethod
    def _make_encoder(cls, config: VQConfig) -> nn.Module:
        assert isinstance(config, MultiHeadVQConfig)
        return super()._make_encoder(config) if config.head_blocks is None else HeadEncoders(config)

    @classmethod
    def _make_decoder(cls, config: VQConfig) -> nn.Module:
        assert isinstance(config, MultiHeadVQConfig)
        decoder = super()._make_decoder(config)
        return nn.Sequential(Gate(config.num_levels, cls._latent_width(config)), decoder) if config.gate else decoder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            initialization.zeros_(module.weight)
            initialization.zeros_(module.bias)

    def _level_input(self, latents_BQ: Tensor, chosen: list[Tensor]) -> Tensor:
        width = self.config.latent_size
        return latents_BQ[:, len(chosen) * width : (len(chosen) + 1) * width]

    def _join(self, chosen: list[Tensor]) -> Tensor:
        return torch.cat(chosen, dim=-1)

    def padded_codebooks(self) -> list[Tensor]:
        """The codebooks (C_l, Q) in the space of `transform`: zero outside their own sub-vector.

        The sum of an item's code vectors is then its quantized latent, so whatever works with residual codebooks (the
        collision policy "next_nearest") works with these.
        """
        width = self.config.latent_size
        left = [level * width for level in range(self.config.num_levels)]
        right = [(self.config.num_levels - 1) * width - before for before in left]
        return [torch.nn.functional.pad(book, pad) for book, pad in zip(self.codebooks, zip(left, right), strict=True)]

    @torch.no_grad()
    def decode(self, codes_NL: Tensor | np.ndarray) -> Tensor:
        """Features (N, E) that codes (N, L) stand for, in the units of the input.

        Raises:
            IncompatibleComponentsError: not one code of every head.
        """
        codes_NL = torch.as_tensor(codes_NL, device=self.device).long()
        if codes_NL.dim() != 2 or codes_NL.shape[1] != len(self.levels):
            raise IncompatibleComponentsError(f"codes must be (N, {len(self.levels)}), got {tuple(codes_NL.shape)}")
        return self._decode_latents(codes_NL)
