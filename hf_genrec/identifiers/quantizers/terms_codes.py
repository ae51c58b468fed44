"""Loss terms on codes and codebooks: diversity, usage balance, separation of heads, uniqueness.

Shape suffixes: B items of a batch, L levels, P dimensions of a codebook, C codes of a level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import IncompatibleComponentsError
from ..losses_codebook import code_clusters, diversity, orthogonality, uniqueness, usage_balance
from .terms import LossTerm, Step
from .vq_layer import VQAutoencoder


class Diversity(LossTerm):
    """LETTER's diversity term (arXiv 2405.07314): mean over levels of the contrast of a code with its cluster.

    Args:
        clusters: equal clusters of the codes of a level, by size-constrained k-means.
        every: training steps after which the clusters are made anew; None = an epoch, but at least 20 steps (an exact
            assignment of 256 codes takes some milliseconds, and small catalogues have epochs of a few steps).

    Raises:
        IncompatibleComponentsError: codebooks without gradient (moving averages, grids).
    """

    steps: Tensor

    def __init__(
        self, weight: float, *, clusters: int = 10, temperature: float = 1.0, every: int | None = None
    ) -> None:
        super().__init__(weight)
        self.clusters, self.temperature, self.every = clusters, temperature, every
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def prepare(self, quantizer: VQAutoencoder, steps_per_epoch: int) -> None:
        books = [level.codebook for level in quantizer._quantizer_levels()]
        if not all(book.requires_grad for book in books):
            raise IncompatibleComponentsError(
                f"the codebooks of {quantizer.label} have no gradient (codebook_update "
                f"{quantizer.config.codebook_update!r}): set codebook_update to 'gradient' or 'simvq'"
            )
        self.every = max(steps_per_epoch, 20) if self.every is None else self.every
        for level, book in enumerate(books):  # saved with a checkpoint, so that a resumed run goes on with the same
            self.register_buffer(f"cluster_{level}", torch.zeros(len(book), dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        levels = step.quantizer._quantizer_levels()
        assert step.output.code_vectors is not None and self.every is not None
        if int(self.steps) % self.every == 0:
            for level, book in enumerate(levels):
                groups = min(self.clusters, len(book.codebook))
                getattr(self, f"cluster_{level}").copy_(code_clusters(book.codebook, groups, seed=int(self.steps)))
        self.steps += 1
        terms = [
            diversity(
                vectors_BP,
                step.codes_BL[:, level],
                book.codebook,
                getattr(self, f"cluster_{level}"),
                temperature=self.temperature,
            )
            for level, (book, vectors_BP) in enumerate(zip(levels, step.output.code_vectors))
        ]
        return torch.stack(terms).mean()


class UsageBalance(LossTerm):
    """Soft counts of the codes are even: mean over levels of `usage_balance` (GNPR-SID, arXiv 2506.01375)."""

    def __init__(
        self, weight: float, *, temperature: float = 0.1, form: str = "variation", sharpness: float = 0.0
    ) -> None:
        super().__init__(weight)
        self.options = {"temperature": temperature, "form": form, "sharpness": sharpness}

    def forward(self, step: Step) -> Tensor:
        distances = step.quantizer.level_distances(step.latents_BQ)
        return torch.stack([usage_balance(distance_BC, **self.options) for distance_BC in distances]).mean()  # type: ignore[arg-type]


class Orthogonality(LossTerm):
    """Sub-vectors of different heads are orthogonal (MMQ, arXiv 2508.15281), before quantization.

    Raises:
        IncompatibleComponentsError: levels that refine each other, one head, or heads of different widths.
    """

    def prepare(self, quantizer: VQAutoencoder, steps_per_epoch: int) -> None:
        heads = quantizer.config.num_levels
        if quantizer.ordered_codes or heads < 2 or len({book.shape[1] for book in quantizer.codebooks}) > 1:
            raise IncompatibleComponentsError(
                f"orthogonality compares two or more parallel heads of one width, which {quantizer.label} of {heads} "
                "levels has not; use the quantizer 'multi_head_vq'"
            )

    def forward(self, step: Step) -> Tensor:
        return orthogonality(step.latents_BQ.unflatten(1, (step.codes_BL.shape[1], -1)))


class Uniqueness(LossTerm):
    """Items with identical codes are driven apart before quantization (HiD-VAE, arXiv 2508.04618)."""

    def __init__(self, weight: float, *, margin: float = 0.9) -> None:
        super().__init__(weight)
        self.margin = margin

    def forward(self, step: Step) -> Tensor:
        return uniqueness(step.latents_BQ, step.codes_BL, margin=self.margin, items_B=step.items_B)
