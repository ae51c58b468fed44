"""Loss terms that tie a quantizer to other vectors: collaborative ones, its own input, items that co-occur.

Shape suffixes: N items, B items of a batch, D and Q dimensions, L levels.

Each picks views of `pair_nce` (see the table in `losses`), or a divergence of `losses_distribution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import IncompatibleComponentsError
from ..features import pca
from ..losses import pair_nce, prefix_sums
from ..losses_distribution import code_divergence, mmd
from .terms import ItemPairs, LossTerm, Step
from .vq_layer import VQAutoencoder, VQOutput

VIEWS = ("quantized", "codes", "reconstruction", "input", "own_input")


class VectorTerm(LossTerm):
    """Base of the terms that compare the quantized latents with given vectors (N, D) of the items."""

    vectors: Tensor

    def __init__(self, weight: float, vectors_ND: np.ndarray | Tensor) -> None:
        super().__init__(weight)
        self.register_buffer("vectors", torch.as_tensor(vectors_ND).float(), persistent=False)

    def match_width(self, quantizer: VQAutoencoder) -> None:
        """Reduce the vectors to the width of the latents, by principal components.

        Raises:
            IncompatibleComponentsError: fewer dimensions than the latents have.
        """
        width, given = quantizer.latent_width, self.vectors.shape[1]
        if given < width:
            raise IncompatibleComponentsError(
                f"the vectors have {given} dimensions and the latents {width}: give wider vectors or a smaller latent_size"
            )
        if given > width:
            self.vectors = torch.as_tensor(pca(self.vectors.cpu().numpy(), width))


class Collaborative(VectorTerm):
    """Contrast of quantized latents with collaborative vectors (LETTER's L_cf, arXiv 2405.07314).

    The item's own vector has to be found among those of the batch. LETTER takes inner products without a temperature
    ("dot", 1) and vectors of SASRec as wide as the latent; wider ones are reduced to their principal components.
    PRORec's alignment (2502.06269) is the symmetric form.
    """

    def __init__(
        self,
        weight: float,
        vectors_ND: np.ndarray | Tensor,
        *,
        temperature: float = 1.0,
        similarity: str = "dot",
        symmetric: bool = False,
    ) -> None:
        super().__init__(weight, vectors_ND)
        self.temperature, self.similarity, self.symmetric = temperature, similarity, symmetric

    def prepare(self, quantizer: VQAutoencoder, steps_per_epoch: int) -> None:
        self.match_width(quantizer)

    def forward(self, step: Step) -> Tensor:
        return pair_nce(
            step.quantized_BQ,
            self.vectors[step.items_B],
            temperature=self.temperature,
            similarity=self.similarity,
            symmetric=self.symmetric,
        )


class ReconstructionContrast(LossTerm):
    """A reconstruction has to find its own input among those of the batch (CoST, arXiv 2404.14774).

    Cosines of standardised features. Beside the squared error, or instead of it with `reconstruction_weight=0` in the
    quantizer's configuration (the sources disagree).
    """

    def __init__(self, weight: float, *, temperature: float = 0.1) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def forward(self, step: Step) -> Tensor:
        scaler = step.quantizer.scaler
        assert step.output.reconstruction is not None
        found_BE, wanted_BE = scaler(step.output.reconstruction), scaler(step.features_BE)
        return pair_nce(found_BE, wanted_BE, temperature=self.temperature)


class CooccurrenceContrast(LossTerm):
    """Items that co-occur have to find each other among the batch's partners (COSETTE 2508.14910, PLUM, FORGE, UTGRec).

    One partner is drawn per item and passed through the quantizer without updating its codebooks. The mean of a
    symmetric contrast per view is taken:

        quantized       quantized latents of item and partner (COSETTE, PLUM 2510.07784)
        codes           the code vectors level by level (UTGRec 2504.04405)
        reconstruction  reconstructions of both           \\
        input           reconstruction and partner's input | the three of FORGE 2509.20904
        own_input       reconstruction and own input      /

    Args:
        learn_temperature: one learned scale per view, from 1 / temperature on, as FORGE has it.
    """

    def __init__(
        self,
        weight: float,
        pairs: ItemPairs,
        *,
        temperature: float = 0.07,
        views: Sequence[str] = ("quantized",),
        learn_temperature: bool = False,
    ) -> None:
        super().__init__(weight)
        if not views or set(views) - set(VIEWS):
            raise IncompatibleComponentsError(f"cooccurrence_contrast views must be of {VIEWS}, got {list(views)}")
        self.pairs, self.views = pairs, tuple(views)
        start = torch.full((len(self.views),), float(np.log(temperature)))
        self.log_temperature = nn.Parameter(start, requires_grad=learn_temperature)

    def forward(self, step: Step) -> Tensor:
        partners_B, known_B, partner, inputs_BE = pass_partners(step, self.pairs)
        terms = []
        for view, temperature in zip(self.views, self.log_temperature.exp()):
            for a_BD, b_BD in self._views(view, step, partner, inputs_BE):
                own = view == "own_input"
                terms.append(
                    pair_nce(
                        a_BD,
                        b_BD,
                        temperature=temperature,
                        symmetric=True,
                        targets=step.items_B if own else partners_B,
                        weight=None if own else known_B.float(),
                    )
                )
        return torch.stack(terms).mean()

    @staticmethod
    def _views(view: str, step: Step, partner: VQOutput, inputs_BE: Tensor) -> list[tuple[Tensor, Tensor]]:
        scaler = step.quantizer.scaler
        assert step.output.reconstruction is not None and partner.reconstruction is not None
        found_BE = scaler(step.output.reconstruction)
        if view == "quantized":
            assert partner.quantized is not None
            return [(step.quantized_BQ, partner.quantized)]
        if view == "codes":
            passed = step.quantizer.passed_vectors
            return list(zip(passed(step.output), passed(partner)))
        if view == "reconstruction":
            return [(found_BE, scaler(partner.reconstruction))]
        return [(found_BE, scaler(inputs_BE if view == "input" else step.features_BE))]


class PrefixContrast(LossTerm):
    """Items that co-occur share prefixes: a contrast of the sums of the first 1..L-1 codes (HiGR, arXiv 2512.24787).

    The last level is left free to tell items apart. Form unverified: our choice.

    Raises:
        IncompatibleComponentsError: codes that have no prefixes, or one level.
    """

    def __init__(self, weight: float, pairs: ItemPairs, *, temperature: float = 0.07) -> None:
        super().__init__(weight)
        self.pairs, self.temperature = pairs, temperature

    def prepare(self, quantizer: VQAutoencoder, steps_per_epoch: int) -> None:
        if not quantizer.ordered_codes or quantizer.config.num_levels < 2:
            raise IncompatibleComponentsError(
                f"a contrast of prefixes needs ordered codes of two or more levels, which {quantizer.label} of "
                f"{quantizer.config.num_levels} levels has not; use cooccurrence_contrast"
            )

    def forward(self, step: Step) -> Tensor:
        partners_B, known_B, partner, _ = pass_partners(step, self.pairs)
        passed = step.quantizer.passed_vectors
        terms = [
            pair_nce(
                a_BP,
                b_BP,
                temperature=self.temperature,
                symmetric=True,
                targets=partners_B,
                weight=known_B.float(),
            )
            for a_BP, b_BP in list(zip(prefix_sums(passed(step.output)), prefix_sums(passed(partner))))[:-1]
        ]
        return torch.stack(terms).mean()


def pass_partners(step: Step, pairs: ItemPairs) -> tuple[Tensor, Tensor, VQOutput, Tensor]:
    """`(partners_B, known_B, output, features_BE)`: a partner of every item through the quantizer, codebooks as they are."""
    partners_B, known_B = pairs.draw(step.items_B)
    inputs_BE = step.features_NE[partners_B]
    return partners_B, known_B, step.quantizer(features=inputs_BE, update_codebooks=False), inputs_BE


class Distillation(VectorTerm):
    """Neighbourhoods of the quantized latents follow those of given vectors: KL of in-batch similarities.

    PRORec's in-modality distillation for a tokenizer (arXiv 2502.06269; form unverified: our choice). Any widths fit.
    """

    def __init__(self, weight: float, vectors_ND: np.ndarray | Tensor, *, temperature: float = 0.1) -> None:
        super().__init__(weight, vectors_ND)
        self.temperature = temperature

    def forward(self, step: Step) -> Tensor:
        logits, target = self._others(step.quantized_BQ), self._others(self.vectors[step.items_B])
        return code_divergence(logits, target, temperature=self.temperature, symmetric=False)

    @staticmethod
    def _others(x_BD: Tensor) -> Tensor:
        """Cosines of every row with the others, (B, B - 1)."""
        unit_BD = nn.functional.normalize(x_BD, dim=1)
        cosine_BB = unit_BD @ unit_BD.t()
        other_BB = ~torch.eye(len(x_BD), dtype=torch.bool, device=x_BD.device)
        return cosine_BB[other_BB].view(len(x_BD), -1)


class DistributionMatch(VectorTerm):
    """The quantized latents as a cloud look like given vectors as a cloud: maximum mean discrepancy (as IDLE-Adapter).

    Both clouds are centred and scaled to unit variance together, so the term acts on their shape. Unlike a contrast it
    does not tell which vector belongs to which item.
    """

    def __init__(
        self, weight: float, vectors_ND: np.ndarray | Tensor, *, side: Literal["quantized", "latents"] = "quantized"
    ) -> None:
        super().__init__(weight, vectors_ND)
        self.side = side

    def prepare(self, quantizer: VQAutoencoder, steps_per_epoch: int) -> None:
        self.match_width(quantizer)

    def forward(self, step: Step) -> Tensor:
        x_BQ = step.quantized_BQ if self.side == "quantized" else step.latents_BQ
        return mmd(_unit_variance(x_BQ), _unit_variance(self.vectors[step.items_B]))


def _unit_variance(x_BD: Tensor) -> Tensor:
    centred_BD = x_BD - x_BD.mean(0)
    return centred_BD / centred_BD.pow(2).mean().sqrt().clamp_min(1e-8)
