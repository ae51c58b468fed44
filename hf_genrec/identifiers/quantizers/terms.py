"""Further terms in the loss of a vector-quantized autoencoder: the base class, pairs of items, and how terms are added.

Shape suffixes: N items, B items of a batch, E feature dimensions, Q latent dimensions, P dimensions of a codebook, L
levels.

A published tokenizer is mostly the autoencoder plus one or two such terms; the formulas are in `losses*.py`, a term says
which tensors of a training step they are taken of. Terms may have parameters of their own (projections, classifiers,
temperatures), which are trained and saved in checkpoints with the quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import IncompatibleComponentsError, TrainingError
from .vq_layer import VQAutoencoder, VQOutput


@dataclass
class Step:
    """One training step, as a term sees it.

    Attributes:
        quantizer: the autoencoder, its codebooks already updated with this batch.
        output: of its forward pass over the batch.
        features_BE, items_B: the batch and its item numbers.
        features_NE: the features of all items, to take partners from.
    """

    quantizer: VQAutoencoder
    output: VQOutput
    features_BE: Tensor
    items_B: Tensor
    features_NE: Tensor

    @property
    def quantized_BQ(self) -> Tensor:
        """What the codes of the batch stand for, with gradient into the encoder."""
        assert self.output.quantized is not None
        return self.output.quantized

    @property
    def latents_BQ(self) -> Tensor:
        """Encoder outputs before quantization."""
        assert self.output.latents is not None
        return self.output.latents

    @property
    def codes_BL(self) -> Tensor:
        """Codes of the batch."""
        assert self.output.codes is not None
        return self.output.codes


class LossTerm(nn.Module):
    """One weighted addition to the loss. `weight` 0 is the quantizer without it, to the bit: it is then left out.

    A subclass gives `forward(step)`, the unweighted scalar, and may build parameters in `prepare`.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        if weight < 0:
            raise TrainingError(f"the weight of {type(self).__name__} must not be negative, got {weight}")
        self.weight = float(weight)
        self.last: Tensor | None = None

    @property
    def last_value(self) -> float | None:
        """The unweighted value at the last training step."""
        return None if self.last is None else float(self.last)

    def prepare(self, quantizer: VQAutoencoder, steps_per_epoch: int) -> None:
        """Check that the term fits the quantizer, and build what depends on its sizes. Called once, before training.

        Raises:
            IncompatibleComponentsError: the term has nothing to act on.
        """

    def forward(self, step: Step) -> Tensor:
        raise NotImplementedError


class ItemPairs(nn.Module):
    """Partners of items, drawn in proportion to how often the two co-occur.

    Args:
        counts: (N, N) sparse matrix of co-occurrences, for example `hf_genrec.data.cooccurrence` of the training part
            only (held-out pairs would leak). The diagonal does not count.

    Raises:
        TrainingError: no two items co-occur.

    Example:
        >>> import scipy.sparse as sp
        >>> pairs = ItemPairs(sp.csr_matrix([[0, 2.0, 0], [2.0, 9.0, 0], [0, 0, 0]]))
        >>> partner, known = pairs.draw(torch.tensor([0, 1, 2]))
        >>> partner.tolist(), known.tolist()
        ([1, 0, 2], [True, True, False])
    """

    starts: Tensor
    others: Tensor
    cumulated: Tensor

    def __init__(self, counts: Any) -> None:
        super().__init__()
        counts = counts.tocoo()
        apart = (counts.row != counts.col) & (counts.data > 0)
        row, other, data = counts.row[apart], counts.col[apart], counts.data[apart].astype(np.float64)
        if len(row) == 0:
            raise TrainingError(
                "no two items co-occur in the training rows: a contrast of pairs needs longer histories"
            )
        order = np.lexsort((other, row))
        starts = np.append(0, np.cumsum(np.bincount(row, minlength=counts.shape[0])))
        self.register_buffer("starts", torch.as_tensor(starts), persistent=False)
        self.register_buffer("others", torch.as_tensor(other[order].astype(np.int64)), persistent=False)
        self.register_buffer("cumulated", torch.as_tensor(np.append(0.0, np.cumsum(data[order]))), persistent=False)

    def draw(self, items_B: Tensor) -> tuple[Tensor, Tensor]:
        """`(partners_B, known_B)`: one partner each; an item that co-occurs with none is its own, and not known.

        Draws from torch's global generator, which a resumed run restores.
        """
        first_B, behind_B = self.starts[items_B], self.starts[items_B + 1]
        known_B = behind_B > first_B
        low_B, high_B = self.cumulated[first_B], self.cumulated[behind_B]
        point_B = low_B + (high_B - low_B) * torch.rand(len(items_B), dtype=torch.float64).to(low_B)
        place_B = torch.searchsorted(self.cumulated, point_B, right=True) - 1
        place_B = torch.minimum(torch.maximum(place_B, first_B), (behind_B - 1).clamp_min(0))
        return torch.where(known_B, self.others[place_B.clamp_max(len(self.others) - 1)], items_B), known_B


class QuantizerWithTerms(nn.Module):
    """A quantizer and its terms as one module: loss = the quantizer's + sum of weight * term.

    The terms see the step after the codebooks were updated with it.

    Raises:
        IncompatibleComponentsError: a term that does not fit the quantizer.
    """

    features: Tensor

    def __init__(
        self, quantizer: VQAutoencoder, terms: Mapping[str, LossTerm], features_NE: Tensor, steps_per_epoch: int
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.terms = nn.ModuleDict(terms)
        self.register_buffer("features", features_NE, persistent=False)
        for name, term in terms.items():
            try:
                term.prepare(quantizer, steps_per_epoch)
            except IncompatibleComponentsError as error:
                raise IncompatibleComponentsError(f"loss {name!r}: {error}") from error
        self.to(features_NE.device)

    @property
    def label(self) -> str:
        """Name of the quantizer for messages."""
        return self.quantizer.label

    def forward(self, features: Tensor, items: Tensor, return_loss: bool = True) -> VQOutput:
        """Features (B, E) of the items (B,)."""
        output = self.quantizer(features=features)
        step = Step(self.quantizer, output, features, items, self.features)
        for module in self.terms.values():
            term = cast(LossTerm, module)
            value = term(step)
            term.last = value.detach()
            output.loss = output.loss + term.weight * value
        return output
