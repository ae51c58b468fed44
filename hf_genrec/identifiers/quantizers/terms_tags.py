"""Loss terms that give the codes of level l the meaning of the tags of level l (HiD-VAE, arXiv 2508.04618).

Shape suffixes: B items of a batch, N items, T tag levels, P dimensions of a codebook, E dimensions of tag vectors, l
levels so far.

Both terms look at the first l code vectors side by side (B, l * P), with gradient straight through to the encoder. An item
whose tag of a level is unknown takes no part in that level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import IncompatibleComponentsError
from ..losses import pair_nce, prefix_concats
from ..losses_codebook import tag_supervision
from ..tags import UNKNOWN, TagTable
from .terms import LossTerm, Step
from .vq_layer import VQAutoencoder


class TagTerm(LossTerm):
    """Base: the tags of all items, and the width of the first l code vectors."""

    tags: Tensor

    def __init__(self, weight: float, table: TagTable) -> None:
        super().__init__(weight)
        self.table = table
        self.register_buffer("tags", torch.as_tensor(table.tags_NT), persistent=False)

    def prefix_widths(self, quantizer: VQAutoencoder) -> list[int]:
        """l * P for every tag level.

        Raises:
            IncompatibleComponentsError: more tag levels than codes.
        """
        widths = np.cumsum([book.shape[1] for book in quantizer.codebooks]).tolist()
        if self.table.num_levels > len(widths):
            raise IncompatibleComponentsError(
                f"{self.table.num_levels} tag levels need as many codes, and there are {len(widths)}: name fewer tags"
            )
        return widths[: self.table.num_levels]

    def prefixes(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """For every tag level the first code vectors (B, l * P) and the tags (B,)."""
        first = prefix_concats(step.quantizer.passed_vectors(step.output))
        return [(first[level], self.tags[step.items_B, level]) for level in range(self.table.num_levels)]


class TagContrast(TagTerm):
    """The first l codes have to find the projected vector of their tag among the batch's tags: sum_l w_l * NCE.

    w_l = .5 / (1 + .5 l) with l from 0, as in the authors' code.

    Args:
        vectors: for every tag level the vectors (number of tags, E) of its tags, for example of a text encoder.
        temperature: .1 in the authors' code, .07 in notes about the paper.
    """

    def __init__(
        self, weight: float, table: TagTable, vectors: Sequence[np.ndarray], *, temperature: float = 0.1
    ) -> None:
        super().__init__(weight, table)
        if [len(level) for level in vectors] != [len(names) for names in table.names]:
            raise IncompatibleComponentsError("tag_contrast needs one vector per tag of every level")
        self.temperature = temperature
        for level, vector_TE in enumerate(vectors):
            self.register_buffer(f"vectors_{level}", torch.as_tensor(vector_TE).float(), persistent=False)
        self.projections = nn.ModuleList()

    def prepare(self, quantizer: VQAutoencoder, steps_per_epoch: int) -> None:
        for level, width in enumerate(self.prefix_widths(quantizer)):
            self.projections.append(nn.Linear(getattr(self, f"vectors_{level}").shape[1], width))

    def forward(self, step: Step) -> Tensor:
        terms = [step.latents_BQ.sum() * 0]
        for level, (first_BD, tags_B) in enumerate(self.prefixes(step)):
            known_B = tags_B != UNKNOWN
            if bool(known_B.any()):
                tags_K = tags_B[known_B]
                tag_KD = self.projections[level](getattr(self, f"vectors_{level}")[tags_K])
                loss = pair_nce(first_BD[known_B], tag_KD, temperature=self.temperature, targets=tags_K)
                terms.append(0.5 / (1 + 0.5 * level) * loss)
        return torch.stack(terms).sum()


class TagClassification(TagTerm):
    """A linear classifier reads the tag of level l off the first l codes: sum over levels of (focal) cross-entropy.

    Args:
        gamma: of the focal loss; 0 = cross-entropy.
    """

    def __init__(self, weight: float, table: TagTable, *, gamma: float = 2.0, label_smoothing: float = 0.1) -> None:
        super().__init__(weight, table)
        self.gamma, self.label_smoothing = gamma, label_smoothing
        self.heads = nn.ModuleList()

    def prepare(self, quantizer: VQAutoencoder, steps_per_epoch: int) -> None:
        for width, names in zip(self.prefix_widths(quantizer), self.table.names):
            self.heads.append(nn.Linear(width, len(names)))

    def forward(self, step: Step) -> Tensor:
        terms = [
            tag_supervision(
                head(first_BD), tags_B, gamma=self.gamma, label_smoothing=self.label_smoothing, ignore_index=UNKNOWN
            )
            for head, (first_BD, tags_B) in zip(self.heads, self.prefixes(step))
        ]
        return torch.stack(terms).sum()
