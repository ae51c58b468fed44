"""Vector-quantized autoencoders of item features: the scaler and the model around the codebooks of `codebook_level`.

Shape suffixes: N items, B items of a batch, E feature dimensions, Q latent dimensions, P dimensions of a codebook, L
levels (codes per item), C codes of a level.

    features_BE -> standardise -> encoder -> latents_BQ -> L codes -> their vectors_BQ -> decoder -> reconstruction_BE

A subclass says what each codebook quantizes (`_level_input`) and how the code vectors form a latent (`_join`): residuals
that add up (RQ-VAE) or sub-vectors side by side (multi-head VQ). Gradients pass the codes straight through, by rotation,
or through soft weights, as the configuration says.
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
from .assignment import GRADIENT_PATHS, code_distances, sinkhorn_codes
from .codebook_level import LEVELS, QuantizerLevel
from .configuration_vq import VQConfig
from .kmeans import chunks, kmeans

Self = TypeVar("Self", bound="VQAutoencoder")


@dataclass
class VQOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        loss: reconstruction_weight * reconstruction_loss + quantization_weight * quantization_loss.
        reconstruction: (B, E) in the units of the input features.
        codes: (B, L) int64.
        reconstruction_loss: mean squared error of the standardised features.
        quantization_loss: sum over levels of the (codebook and) weighted commitment terms, divided by E. Both losses
            are thus sums over dimensions divided by E, in the proportion of the RQ-VAE paper.
        latents: (B, Q) encoder outputs before quantization.
        quantized: (B, Q) what the codes of all levels stand for; gradients pass into the encoder.
        code_vectors: L tensors (B, P), the chosen codes; gradients pass into trained codebooks, not into the encoder
            (unless the assignment is soft).
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    quantization_loss: Tensor | None = None
    latents: Tensor | None = None
    quantized: Tensor | None = None
    code_vectors: tuple[Tensor, ...] | None = None


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
    ordered_codes = False  # does a code refine the codes before it?

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.scaler = FeatureScaler(config)
        self.encoder = self._make_encoder(config)
        self.decoder = self._make_decoder(config)
        self.levels = nn.ModuleList(self._make_levels(config))
        self.post_init()

    # ---------------------------------------------------------------------------------------- what a subclass decides

    @staticmethod
    def _latent_width(config: VQConfig) -> int:
        """Q, width of the encoder's output."""
        raise NotImplementedError

    @classmethod
    def _make_encoder(cls, config: VQConfig) -> nn.Module:
        """Features (B, E) to latents (B, Q)."""
        return mlp([config.input_size, *config.hidden_sizes, cls._latent_width(config)], config.dropout)

    @classmethod
    def _make_decoder(cls, config: VQConfig) -> nn.Module:
        """Quantized latents (B, Q) to features (B, E)."""
        sizes = [cls._latent_width(config), *reversed(config.hidden_sizes), config.input_size]
        return mlp(sizes, config.dropout)

    def _level_input(self, latents_BQ: Tensor, chosen: list[Tensor]) -> Tensor:
        """What the next codebook quantizes (B, P), given the code vectors (B, P) of the levels before it."""
        raise NotImplementedError

    def _join(self, chosen: list[Tensor]) -> Tensor:
        """The latent (B, Q) that the code vectors of all levels stand for."""
        raise NotImplementedError

    @staticmethod
    def _make_levels(config: VQConfig) -> list[QuantizerLevel]:
        """One module per codebook; levels that share a codebook share its module."""
        first = [config.codebook_of_level.index(book) for book in sorted(set(config.codebook_of_level))]
        return [LEVELS[config.codebook_update](config, level) for level in first]

    def _prefix_lengths(self, given_B: Tensor | None, batch: int) -> Tensor | None:
        """How many codes of each item (B,) the decoder sees; None = all."""
        if given_B is not None:
            raise IncompatibleComponentsError(f"{self.label}: the codes are not ordered, they have no prefixes")
        return None

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
            module.init_weights()

    @property
    def codebooks(self) -> list[Tensor]:
        """The L codebooks, (C_l, P) each, detached."""
        return [level.codebook.detach() for level in self._quantizer_levels()]

    def _quantizer_levels(self) -> list[QuantizerLevel]:
        modules = cast("list[QuantizerLevel]", list(self.levels))
        return [modules[book] for book in self.config.codebook_of_level]

    @property
    def latent_width(self) -> int:
        """Q, dimensions of the latents."""
        return self._latent_width(self.config)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return tuple(self.config.codebook_sizes)

    @torch.no_grad()
    def initialise_codebooks(
        self: Self, features: Tensor | np.ndarray, *, seed: int = 0, iterations: int = 25, kmeans_init: bool = True
    ) -> Self:
        """Take the standardisation from the features (N, E), then the codebooks by k-means on their latents.

        `kmeans_init=False` leaves the codebooks random.

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
        if not kmeans_init:
            return self
        latents_NQ = self.transform(features_NE)
        chosen: list[Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        done: set[int] = set()
        for position, level in enumerate(self._quantizer_levels()):
            x_NP = self._level_input(latents_NQ, chosen)
            book = self.config.codebook_of_level[position]
            if book not in done:
                done.add(book)
                sharing = self.config.codebook_of_level.count(book)
                pool_MP = x_NP if sharing == 1 else self._pool(latents_NQ, chosen, sharing, generator, iterations)
                result = kmeans(pool_MP.float(), len(level.codebook), generator=generator, iterations=iterations)
                count_C = torch.bincount(result.codes_N, minlength=len(level.codebook))
                level.load_codebook(result.centroids_CD, count_C / len(pool_MP))
                codes_N = result.codes_N if sharing == 1 else level.assign(x_NP)
            else:
                codes_N = level.assign(x_NP)
            chosen.append(level.codebook[codes_N])
        return self

    def _pool(
        self, latents_NQ: Tensor, chosen: list[Tensor], sharing: int, generator: torch.Generator, iterations: int
    ) -> Tensor:
        """What the `sharing` levels of one codebook will see (sharing * N, P), with k-means of its own for each."""
        chosen, inputs = list(chosen), []
        for _ in range(sharing):
            x_NP = self._level_input(latents_NQ, chosen).float()
            size = self.codebook_sizes[len(chosen)]
            result = kmeans(x_NP, size, generator=generator, iterations=iterations)
            chosen.append(result.centroids_CD[result.codes_N].to(latents_NQ.dtype))
            inputs.append(x_NP)
        return torch.cat(inputs)

    def forward(
        self,
        features: Tensor,
        return_loss: bool = True,
        return_dict: bool | None = None,
        prefix_lengths: Tensor | None = None,
        update_codebooks: bool = True,
    ) -> VQOutput | tuple[Tensor, ...]:
        """Reconstruct features (B, E) through their codes. In training mode the codebooks update themselves, unless
        `update_codebooks` is False (a second view of the same step).

        `prefix_lengths` (B,), 1..L: reconstruct each item from its first codes only (ordered codes, see RQVAEModel).
        The loss is a mean over the batch, so that Trainer's division by gradient accumulation steps is right.
        """
        x_BE = self.scaler(features.to(self.dtype))
        latents_BQ = self.encoder(x_BE)
        levels = self._quantizer_levels()
        inputs: list[Tensor] = []
        codes: list[Tensor] = []
        vectors: list[Tensor] = []
        quantization_loss = latents_BQ.new_zeros(())
        for level in levels:
            inputs.append(self._level_input(latents_BQ, [level_BP.detach() for level_BP in vectors]))
            codes_B, level_BP, level_loss = level(inputs[-1])
            quantization_loss = quantization_loss + level_loss
            codes.append(codes_B)
            vectors.append(level_BP)
        quantized_BQ = decoder_input_BQ = self._pass_gradient(latents_BQ, vectors)
        lengths_B = self._prefix_lengths(prefix_lengths, len(latents_BQ))
        if lengths_B is not None:
            seen = [level_BP * (lengths_B > level)[:, None] for level, level_BP in enumerate(vectors)]
            decoder_input_BQ = self._pass_gradient(latents_BQ, seen)
        if self.training and update_codebooks:
            self._update_codebooks(inputs, codes)
        decoded_BE = self.decoder(decoder_input_BQ)
        quantization_loss = quantization_loss / self.config.input_size
        reconstruction_loss = (decoded_BE - x_BE).pow(2).mean()
        loss = None
        if return_loss:
            loss = self.config.reconstruction_weight * reconstruction_loss
            loss = loss + self.config.quantization_weight * quantization_loss
        output = VQOutput(
            loss=loss,
            reconstruction=self.scaler.invert(decoded_BE),
            codes=torch.stack(codes, 1),
            reconstruction_loss=reconstruction_loss,
            quantization_loss=quantization_loss,
            latents=latents_BQ,
            quantized=quantized_BQ,
            code_vectors=tuple(vectors),
        )
        return output.to_tuple() if return_dict is False else output

    def _pass_gradient(self, latents_BQ: Tensor, vectors: list[Tensor]) -> Tensor:
        """The joined code vectors (B, Q); backwards into the latents for hard codes, into the weights for soft ones."""
        soft = [level.is_soft for level in self._quantizer_levels()]
        if all(soft):
            return self._join(vectors)
        hard_BQ = self._join([level_BP.detach() for level_BP in vectors])
        passed_BQ = GRADIENT_PATHS[self.config.gradient_path](hard_BQ, latents_BQ)
        if not any(soft):
            return passed_BQ
        parts = [level_BP if own else level_BP.detach() for level_BP, own in zip(vectors, soft)]
        soft_BQ = self._join(parts)
        return passed_BQ + (soft_BQ - soft_BQ.detach())

    def _update_codebooks(self, inputs: list[Tensor], codes: list[Tensor]) -> None:
        """One update per codebook, with the points of all levels that share it."""
        books = self.config.codebook_of_level
        for book, level in enumerate(cast("list[QuantizerLevel]", list(self.levels))):
            own = [index for index, other in enumerate(books) if other == book]
            points_MP, codes_M = inputs[own[0]].detach(), codes[own[0]]
            if len(own) > 1:
                points_MP = torch.cat([inputs[index].detach() for index in own])
                codes_M = torch.cat([codes[index] for index in own])
            level.update(points_MP, codes_M)

    def passed_vectors(self, output: VQOutput) -> list[Tensor]:
        """The L chosen code vectors (B, P) of a forward pass, for losses on them.

        Their gradient goes into trained codebooks and straight through to the encoder: the encoder's part is that of what
        the level quantized, with the codes of the levels before held constant.
        """
        assert output.latents is not None and output.code_vectors is not None
        passed: list[Tensor] = []
        chosen: list[Tensor] = []
        for level, vectors_BP in zip(self._quantizer_levels(), output.code_vectors):
            if not level.is_soft:
                x_BP = self._level_input(output.latents, chosen)
                passed.append(vectors_BP + (x_BP - x_BP.detach()))
            else:
                passed.append(vectors_BP)
            chosen.append(vectors_BP.detach())
        return passed

    def level_distances(self, latents: Tensor) -> list[Tensor]:
        """Squared distances (B, C_l) of latents (B, Q) to the codes of every level, with gradients.

        Minus these are the code logits that ETEGRec's alignment and the usage balance are made of. The residual of a
        level is taken after the nearest codes of the levels before it.
        """
        chosen: list[Tensor] = []
        distances: list[Tensor] = []
        for level in self._quantizer_levels():
            x_BP, codebook_CP = self._level_input(latents, chosen), level.codebook
            distances.append(code_distances(x_BP, codebook_CP))
            chosen.append(codebook_CP.detach()[level.assign(x_BP.detach())])
        return distances

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
    def encode(self, features: Tensor | np.ndarray, batch_size: int = 8192, *, last_level: str = "nearest") -> Tensor:
        """Codes (N, L) int64 of features (N, E); works for items that were not trained on. Changes nothing.

        `last_level="sinkhorn"` spreads the items evenly over the last codebook (`sinkhorn_epsilon` of the
        configuration): their codes then depend on each other, and memory grows by 16 N C bytes.

        Raises:
            IncompatibleComponentsError: features of another width, or an unknown `last_level`.
        """
        if last_level not in ("nearest", "sinkhorn"):
            raise IncompatibleComponentsError(f"last_level must be 'nearest' or 'sinkhorn', got {last_level!r}")
        latents_NQ = self.transform(features, batch_size)
        codes: list[Tensor] = []
        chosen: list[Tensor] = []
        for level in self._quantizer_levels():
            x_NP, codebook_CP = self._level_input(latents_NQ, chosen), level.codebook
            if last_level == "sinkhorn" and len(codes) == self.config.num_levels - 1:
                epsilon, iterations = self.config.sinkhorn_epsilon, self.config.sinkhorn_iterations
                codes_N = sinkhorn_codes(x_NP, codebook_CP, epsilon, iterations)
            else:
                codes_N = level.assign(x_NP, batch_size)
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
