"""Multi-head VQ-VAE: an autoencoder whose latent is cut into sub-vectors, each with a codebook of its own (2511.06254).

Shape suffixes: N items, B items of a batch, E feature dimensions, P dimensions of a sub-vector, L heads (codes per
item), C codes of a head, Q = L * P.

    latent_BQ = [z_1 | ... | z_L], c_l = nearest code of z_l;  [e_1 | ... | e_L] -> decoder

The codes of an item are a set of independent facts: none is a refinement of another, so they can be predicted in any
order, which masked diffusion needs and a residual quantizer (whose later codes mean nothing without the earlier) lacks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import IncompatibleComponentsError
from .configuration_multi_head_vq import MultiHeadVQConfig
from .configuration_vq import VQConfig
from .vq_layer import VQAutoencoder


class MultiHeadVQModel(VQAutoencoder):
    """Autoencoder with parallel codes (LLaDA-Rec, arXiv 2511.06254).

    Call `initialise_codebooks(features)` once before training (`train_multi_head_vq` does). The codebooks start from
    k-means on the sub-vectors, as in the authors' code. Theirs also spreads colliding items over the last codebook by
    optimal transport; here that is the collision policy "next_nearest" on `padded_codebooks()`.

    Relations: a frozen identity encoder is product quantization with equal blocks; one head is an RQ-VAE of one level.

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
