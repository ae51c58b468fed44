"""Vector-quantized autoencoders of item features: scaler, codebook with its update rule, and the model around them.

Shape suffixes: N items, B items of a batch, E feature dimensions, Q latent dimensions, P dimensions of a codebook, L
levels (codes per item), C codes of a level.

    features_BE -> standardise -> encoder -> latents_BQ -> L codes -> their vectors_BQ -> decoder -> reconstruction_BE

A subclass says what each codebook quantizes (`_level_input`) and how the code vectors form a latent (`_join`): residuals
that add up (RQ-VAE) or sub-vectors side by side (multi-head VQ). Gradients pass the codes straight through.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from ...errors import IncompatibleComponentsError, TrainingError
from .configuration_vq import VQConfig
from .kmeans import chunks, kmeans, nearest

Self = TypeVar("Self", bound="VQAutoencoder")


@dataclass
class VQOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: reconstruction_loss + quantization_weight * quantization_loss.
        reconstruction: (B, E) in the units of the input features.
        codes: (B, L) int64.
        reconstruction_loss: mean squared error of the standardised features.
        quantization_loss: sum over levels of the (codebook and) weighted commitment terms, divided by E. Both losses
            are thus sums over dimensions divided by E, in the proportion of the RQ-VAE paper.
        latents: (B, Q) encoder outputs before quantization.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    quantization_loss: Tensor | None = None
    latents: Tensor | None = None


class FeatureScaler(nn.Module):
    """Standardisation of the input with statistics of the training items (persistent buffers, sized by the config)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.mode = config.standardise
        self.register_buffer("mean", torch.zeros(config.input_size))
        self.register_buffer("scale", torch.ones(config.input_size))

    @torch.no_grad()
    def fit(self, features_NE: Tensor) -> None:
        if self.mode == "none":
            return
        x_NE = features_NE.double()
        mean_E = x_NE.mean(0)
        deviation_E = (x_NE - mean_E).pow(2).mean(0).sqrt()
        if self.mode == "global":
            deviation_E = deviation_E.pow(2).mean().sqrt().expand_as(deviation_E)
        self.mean.copy_(mean_E)
        self.scale.copy_(torch.where(deviation_E > 1e-8, deviation_E, torch.ones_like(deviation_E)))

    def forward(self, features_BE: Tensor) -> Tensor:
        return (features_BE - self.mean) / self.scale

    def invert(self, x_BE: Tensor) -> Tensor:
        return x_BE * self.scale + self.mean


class QuantizerLevel(nn.Module):
    """One codebook with its update rule.

    `share` (C,) and `sum` (C, P) are moving averages of each code's share of the points and of the sum of its points
    divided by the number of points; their quotient is the code. `usage` (C,) counts the points of each code since dead
    codes were last looked for. All are persistent buffers, so that a resumed run continues with the same bits.
    """

    codebook: Tensor
    share: Tensor
    sum: Tensor
    usage: Tensor
    steps: Tensor

    def __init__(self, config: VQConfig, level: int) -> None:
        super().__init__()
        size, self.update_rule = config.codebook_sizes[level], config.codebook_update
        self.decay, self.interval, self.dead_share = config.ema_decay, config.dead_code_interval, config.dead_code_share
        self.beta, self.initializer_range = config.commitment_weight, config.initializer_range
        codebook_CP = torch.zeros(size, config.latent_size)
        if self.update_rule == "ema":
            self.register_buffer("codebook", codebook_CP)
            self.register_buffer("share", torch.zeros(size))
            self.register_buffer("sum", torch.zeros(size, config.latent_size))
        else:
            self.codebook = nn.Parameter(codebook_CP)
        self.register_buffer("usage", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def load_codebook(self, codebook_CP: Tensor, share_C: Tensor) -> None:
        """Set the codes, as if they had held `share_C` of the points so far."""
        self.codebook.copy_(codebook_CP)
        self.usage.zero_()
        self.steps.zero_()
        if self.update_rule == "ema":
            self.share.copy_(share_C)
            self.sum.copy_(self.codebook * self.share[:, None])

    @torch.no_grad()
    def update(self, residual_BP: Tensor, codes_B: Tensor) -> None:
        """Moving averages (EMA only), usage counts, and the reset of dead codes."""
        one_hot_BC = nn.functional.one_hot(codes_B, len(self.codebook)).to(residual_BP.dtype)
        if self.update_rule == "ema":
            self.share.lerp_(one_hot_BC.mean(0), 1 - self.decay)
            self.sum.lerp_(one_hot_BC.t() @ residual_BP / len(residual_BP), 1 - self.decay)
            known_C1 = self.share[:, None] > 1e-8  # a code that never had points keeps its place
            self.codebook.copy_(torch.where(known_C1, self.sum / self.share[:, None].clamp_min(1e-8), self.codebook))
        self.usage.add_(torch.bincount(codes_B, minlength=len(self.codebook)))
        self.steps.add_(1)
        if self.interval and int(self.steps) % self.interval == 0:
            self.reset_dead_codes(residual_BP)

    @torch.no_grad()
    def reset_dead_codes(self, residual_BP: Tensor) -> int:
        """Put codes that (nearly) nothing uses onto random residuals of this batch; returns how many."""
        floor = self.dead_share * float(self.usage.sum()) / len(self.codebook)
        dead = (self.usage.double() <= floor).nonzero().flatten()[: len(residual_BP)]
        picked = torch.randperm(len(residual_BP), device=residual_BP.device)[: len(dead)]
        self.codebook[dead] = residual_BP[picked].to(self.codebook.dtype)
        if self.update_rule == "ema":
            self.share[dead] = 1.0 / len(self.codebook)
            self.sum[dead] = self.codebook[dead] / len(self.codebook)
        self.usage.zero_()
        return len(dead)

    def forward(self, residual_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(codes_B, code vectors_BP, loss)`; updates itself in training mode."""
        codes_B = nearest(residual_BP.detach(), self.codebook.detach())
        quantized_BP = self.codebook[codes_B]
        loss = self.beta * (residual_BP - quantized_BP.detach()).pow(2).sum(1).mean()
        if self.update_rule == "gradient":
            loss = loss + (residual_BP.detach() - quantized_BP).pow(2).sum(1).mean()
        if self.training:
            quantized_BP = quantized_BP.clone()  # the update changes the codebook in place
            self.update(residual_BP.detach(), codes_B)
        return codes_B, quantized_BP, loss


def mlp(sizes: list[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(fan_in, fan_out))
        if index < len(sizes) - 2:
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


class VQAutoencoder(PreTrainedModel):
    """Encoder, codebooks and decoder. A subclass sets `config_class` and `label` and gives the three hooks below."""

    config: Any
    label = "the quantizer"
    main_input_name = "features"

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        sizes = [config.input_size, *config.hidden_sizes, self._latent_width(config)]
        self.scaler = FeatureScaler(config)
        self.encoder = mlp(sizes, config.dropout)
        self.decoder = mlp(sizes[::-1], config.dropout)
        self.levels = nn.ModuleList(QuantizerLevel(config, level) for level in range(config.num_levels))
        self.post_init()

    # ---------------------------------------------------------------------------------------- what a subclass decides

    @staticmethod
    def _latent_width(config: VQConfig) -> int:
        """Q, width of the encoder's output."""
        raise NotImplementedError

    def _level_input(self, latents_BQ: Tensor, chosen: list[Tensor]) -> Tensor:
        """What the next codebook quantizes (B, P), given the code vectors (B, P) of the levels before it."""
        raise NotImplementedError

    def _join(self, chosen: list[Tensor]) -> Tensor:
        """The latent (B, Q) that the code vectors of all levels stand for."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------- shared by all

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            initialization.kaiming_uniform_(module.weight, nonlinearity="relu")
            initialization.zeros_(module.bias)
        elif isinstance(module, FeatureScaler):
            initialization.zeros_(module.mean)
            initialization.ones_(module.scale)
        elif isinstance(module, QuantizerLevel):
            initialization.normal_(module.codebook, std=module.initializer_range)
            initialization.zeros_(module.usage)
            initialization.zeros_(module.steps)
            if module.update_rule == "ema":
                initialization.zeros_(module.share)
                initialization.zeros_(module.sum)

    @property
    def codebooks(self) -> list[Tensor]:
        """The L codebooks, (C_l, P) each, detached."""
        return [level.codebook.detach() for level in self._quantizer_levels()]

    def _quantizer_levels(self) -> list[QuantizerLevel]:
        return cast("list[QuantizerLevel]", list(self.levels))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return tuple(self.config.codebook_sizes)

    @torch.no_grad()
    def initialise_codebooks(self: Self, features: Tensor | np.ndarray, *, seed: int = 0, iterations: int = 25) -> Self:
        """Take the standardisation from the features (N, E), then the codebooks by k-means on their latents.

        Raises:
            TrainingError: fewer items than codes of a level, NaN or infinite features.
        """
        features_NE = self._features(features)
        if len(features_NE) < max(self.codebook_sizes):
            raise TrainingError(
                f"{self.label}: {len(features_NE)} items cannot fill a codebook of {max(self.codebook_sizes)} codes; "
                f"use codebook_sizes of at most {len(features_NE)}"
            )
        self.scaler.fit(features_NE)
        latents_NQ = self.transform(features_NE)
        chosen: list[Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        for level in self._quantizer_levels():
            x_NP = self._level_input(latents_NQ, chosen)
            result = kmeans(x_NP.float(), len(level.codebook), generator=generator, iterations=iterations)
            count_C = torch.bincount(result.codes_N, minlength=len(level.codebook))
            level.load_codebook(result.centroids_CD, count_C / len(features_NE))
            chosen.append(level.codebook[result.codes_N])
        return self

    def forward(
        self, features: Tensor, return_loss: bool = True, return_dict: bool | None = None
    ) -> VQOutput | tuple[Tensor, ...]:
        """Reconstruct features (B, E) through their codes. In training mode the codebooks update themselves.

        The loss is a mean over the batch, so that Trainer's division by gradient accumulation steps is right.
        """
        x_BE = self.scaler(features.to(self.dtype))
        latents_BQ = self.encoder(x_BE)
        codes: list[Tensor] = []
        chosen: list[Tensor] = []
        quantization_loss = latents_BQ.new_zeros(())
        for level in self._quantizer_levels():
            codes_B, level_BP, level_loss = level(self._level_input(latents_BQ, chosen))
            quantization_loss = quantization_loss + level_loss
            codes.append(codes_B)
            chosen.append(level_BP.detach())
        decoded_BE = self.decoder(latents_BQ + (self._join(chosen) - latents_BQ).detach())
        quantization_loss = quantization_loss / self.config.input_size
        reconstruction_loss = (decoded_BE - x_BE).pow(2).mean()
        loss = reconstruction_loss + self.config.quantization_weight * quantization_loss if return_loss else None
        output = VQOutput(
            loss=loss,
            reconstruction=self.scaler.invert(decoded_BE),
            codes=torch.stack(codes, 1),
            reconstruction_loss=reconstruction_loss,
            quantization_loss=quantization_loss,
            latents=latents_BQ,
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def transform(self, features: Tensor | np.ndarray, batch_size: int = 8192) -> Tensor:
        """Latents (N, Q) of features (N, E). Always without dropout."""
        features_NE, was_training = self._features(features), self.training
        self.eval()
        latents_NQ = torch.cat(
            [self.encoder(self.scaler(features_NE[r])) for r in chunks(len(features_NE), batch_size)]
        )
        self.train(was_training)
        return latents_NQ

    @torch.no_grad()
    def encode(self, features: Tensor | np.ndarray, batch_size: int = 8192) -> Tensor:
        """Codes (N, L) int64 of features (N, E); works for items that were not trained on. Changes nothing."""
        latents_NQ = self.transform(features, batch_size)
        codes: list[Tensor] = []
        chosen: list[Tensor] = []
        for codebook_CP in self.codebooks:
            codes_N = nearest(self._level_input(latents_NQ, chosen), codebook_CP, chunk_size=batch_size)
            chosen.append(codebook_CP[codes_N])
            codes.append(codes_N)
        return torch.stack(codes, 1)

    def _decode_latents(self, codes_Nl: Tensor) -> Tensor:
        """Features (N, E) of codes whose number was checked."""
        chosen = [book[codes_Nl[:, level]] for level, book in zip(range(codes_Nl.shape[1]), self.codebooks)]
        was_training = self.training
        self.eval()
        features_NE = self.scaler.invert(self.decoder(self._join(chosen)))
        self.train(was_training)
        return features_NE

    def _features(self, features: Tensor | np.ndarray) -> Tensor:
        features_NE = torch.as_tensor(features).to(self.device, self.dtype)
        if features_NE.dim() != 2 or features_NE.shape[1] != self.config.input_size or len(features_NE) == 0:
            raise IncompatibleComponentsError(
                f"features must be (items, {self.config.input_size}) as in {type(self.config).__name__}.input_size, "
                f"got {tuple(features_NE.shape)}"
            )
        bad_N = ~torch.isfinite(features_NE).all(1)
        if bool(bad_N.any()):
            raise TrainingError(
                f"features hold NaN or infinity, first in row {int(bad_N.nonzero()[0])}: fill or drop it"
            )
        return features_NE
