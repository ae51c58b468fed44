"""RQ-VAE: an autoencoder whose latent is quantized level by level into semantic IDs (TIGER, arXiv 2305.05065).

Shape suffixes: N items, B items of a batch, E feature dimensions, P latent dimensions, L levels, l levels so far.

    r_1 = latent_BP, c_l = nearest code of r_l, r_{l+1} = r_l - e_l;  sum_l e_l -> decoder

The residual that enters a level does not carry gradient into the codebooks of the levels above.
"""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from torch import Tensor

from ...errors import IncompatibleComponentsError
from .configuration_rq_vae import RQVAEConfig
from .configuration_vq import VQConfig
from .vq_layer import VQAutoencoder


class RQVAEModel(VQAutoencoder):
    """Residual-quantized autoencoder of item features (TIGER, arXiv 2305.05065).

    Call `initialise_codebooks(features)` once before training (`train_rq_vae` does). Codes come from `encode`, in
    evaluation mode and without gradients; they survive `save_pretrained` / `from_pretrained` exactly.

    Relations: with a frozen identity encoder and `ema_decay=0` on full batches each step is a k-means step, so it
    generalises `ResidualKMeans`. `codebook_update="gradient"` is the paper's form, `"ema"` the steadier one; `"simvq"`
    with its map held at the identity is `"gradient"` with codes that stay. Soft assignments are `"nearest"` at temperature
    0. `random_prefix=0`, or prefixes of all L codes, is the plain model. One level is `MultiHeadVQModel` with one head.

    Example:
        >>> import torch
        >>> config = RQVAEConfig(input_size=8, hidden_sizes=[16], latent_size=4, codebook_sizes=[4, 4])
        >>> model, x = RQVAEModel(config), torch.randn(64, 8)
        >>> _ = model.initialise_codebooks(x)
        >>> output = model(features=x)
        >>> output.codes.shape, output.reconstruction.shape, bool(output.loss > 0)
        (torch.Size([64, 2]), torch.Size([64, 8]), True)
    """

    config: RQVAEConfig
    config_class = RQVAEConfig
    base_model_prefix = "rq_vae"
    label = "RQ-VAE"
    ordered_codes = True

    @staticmethod
    def _latent_width(config: VQConfig) -> int:
        return config.latent_size

    def _level_input(self, latents_BQ: Tensor, chosen: list[Tensor]) -> Tensor:
        return reduce(torch.sub, chosen, latents_BQ)

    def _join(self, chosen: list[Tensor]) -> Tensor:
        return reduce(torch.add, chosen)

    def _prefix_lengths(self, given_B: Tensor | None, batch: int) -> Tensor | None:
        levels = self.config.num_levels
        if given_B is not None:
            if given_B.shape != (batch,) or bool(((given_B < 1) | (given_B > levels)).any()):
                raise IncompatibleComponentsError(f"prefix_lengths must be ({batch},) with values in 1..{levels}")
            return given_B
        if not self.training or self.config.random_prefix == 0:
            return None
        drawn_B = torch.randint(1, levels + 1, (batch,), device=self.device)
        whole_B = torch.rand(batch, device=self.device) >= self.config.random_prefix
        return drawn_B.masked_fill(whole_B, levels)

    @torch.no_grad()
    def decode(self, codes_NL: Tensor | np.ndarray) -> Tensor:
        """Features (N, E) that codes (N, l <= L) stand for, in the units of the input.

        Raises:
            IncompatibleComponentsError: more codes than levels, or none.
        """
        codes_NL = torch.as_tensor(codes_NL, device=self.device).long()
        if codes_NL.dim() != 2 or not 1 <= codes_NL.shape[1] <= self.config.num_levels:
            raise IncompatibleComponentsError(
                f"codes must be (N, 1..{self.config.num_levels}), got {tuple(codes_NL.shape)}"
            )
        return self._decode_latents(codes_NL)
