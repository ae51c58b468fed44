"""Loss terms of learned quantizers, as a recipe names them under `identifiers.losses`: options to terms.

Shape suffixes: N items, E feature dimensions.

Each function is the value of one line of `components.LOSSES` and returns a `LossTerm`. Co-occurrences are those of the
training part.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hf_genrec.data.cooccurrence import cooccurrence
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.features import text_features
from hf_genrec.identifiers.quantizers.terms import ItemPairs, LossTerm
from hf_genrec.identifiers.quantizers.terms_codes import Diversity, Orthogonality, Uniqueness, UsageBalance
from hf_genrec.identifiers.quantizers.terms_contrast import (
    Collaborative,
    CooccurrenceContrast,
    Distillation,
    DistributionMatch,
    PrefixContrast,
    ReconstructionContrast,
)
from hf_genrec.identifiers.quantizers.terms_tags import TagClassification, TagContrast
from hf_genrec.identifiers.tags import TagTable
from hf_genrec.recipes.components import LOSSES
from hf_genrec.recipes.stages.context import StageContext

logger = logging.getLogger(__name__)


@dataclass
class TermSources:
    """What terms may be made of: the stage's context, the quantizer's own input, and the tags of the recipe."""

    context: StageContext
    vectors_NE: np.ndarray
    tags: TagTable | None = None
    known_pairs: dict[int, ItemPairs] = field(default_factory=dict)

    def pairs(self, window: int) -> ItemPairs:
        """Pairs of items at most `window` positions apart in a training history."""
        if window not in self.known_pairs:
            counts = cooccurrence(self.context.split.train, self.context.num_items, window=window, directed=False)
            self.known_pairs[window] = ItemPairs(counts)
        return self.known_pairs[window]

    def tag_table(self, loss: str) -> TagTable:
        """The recipe's tags.

        Raises:
            IncompatibleComponentsError: it names none.
        """
        if self.tags is None:
            raise IncompatibleComponentsError(
                f"loss {loss!r} needs tags: name columns of the item table in identifiers.tags, {{columns: [genres]}}."
            )
        return self.tags


def make_terms(sources: TermSources, losses: dict[str, dict[str, Any] | None]) -> dict[str, LossTerm]:
    """The terms of a recipe whose weight is not 0."""
    terms = {}
    for name, given in losses.items():
        options = dict(given or {})
        if options.get("weight", 1.0):
            terms[name] = LOSSES[name].load()(sources, **options)
    return terms


def collaborative(
    sources: TermSources, *, weight: float = 1.0, features: str = "cooccurrence", **options: Any
) -> LossTerm:
    """LETTER's contrast with the vectors of a block."""
    return Collaborative(weight, sources.context.vectors([features]), **options)


def reconstruction_contrast(sources: TermSources, *, weight: float = 1.0, **options: Any) -> LossTerm:
    """CoST's contrast of reconstruction and input."""
    return ReconstructionContrast(weight, **options)


def cooccurrence_contrast(sources: TermSources, *, weight: float = 1.0, window: int = 10, **options: Any) -> LossTerm:
    """Contrast of items that co-occur: COSETTE, PLUM, FORGE, UTGRec by their `views`."""
    return CooccurrenceContrast(weight, sources.pairs(window), **options)


def prefix_contrast(sources: TermSources, *, weight: float = 1.0, window: int = 10, **options: Any) -> LossTerm:
    """HiGR's contrast of code prefixes."""
    return PrefixContrast(weight, sources.pairs(window), **options)


def diversity(sources: TermSources, *, weight: float = 1.0, **options: Any) -> LossTerm:
    """LETTER's diversity of codes."""
    return Diversity(weight, **options)


def usage_balance(sources: TermSources, *, weight: float = 1.0, **options: Any) -> LossTerm:
    """Even soft counts of the codes (GNPR-SID)."""
    return UsageBalance(weight, **options)


def orthogonality(sources: TermSources, *, weight: float = 1.0) -> LossTerm:
    """Orthogonal heads (MMQ)."""
    return Orthogonality(weight)


def uniqueness(sources: TermSources, *, weight: float = 1.0, **options: Any) -> LossTerm:
    """HiD-VAE's hinge on colliding items."""
    return Uniqueness(weight, **options)


def tag_contrast(
    sources: TermSources,
    *,
    weight: float = 1.0,
    tag_vectors: str = "text",
    encoder: str | None = None,
    **options: Any,
) -> LossTerm:
    """HiD-VAE's contrast of code prefixes and tags: the tags' texts encoded, or the mean vector of the tag's items.

    Raises:
        IncompatibleComponentsError: no tags in the recipe, or an unknown `tag_vectors`.
    """
    table = sources.tag_table("tag_contrast")
    if tag_vectors not in ("text", "items"):
        raise IncompatibleComponentsError(f"tag_contrast.tag_vectors must be 'text' or 'items', got {tag_vectors!r}.")
    vectors = table.centroids(sources.vectors_NE)
    if tag_vectors == "text":
        try:
            vectors = [text_features(list(names), encoder, progress=False) for names in table.names]
        except IncompatibleComponentsError as error:
            if encoder is not None:
                raise
            logger.warning("tags are told by the mean vector of their items: %s", error)
    return TagContrast(weight, table, vectors, **options)


def tag_classification(sources: TermSources, *, weight: float = 1.0, **options: Any) -> LossTerm:
    """HiD-VAE's classifiers of the tags."""
    return TagClassification(weight, sources.tag_table("tag_classification"), **options)


def kl(sources: TermSources, *, weight: float = 1.0, features: str = "cooccurrence", **options: Any) -> LossTerm:
    """Neighbourhoods as in a block (PRORec's distillation)."""
    return Distillation(weight, sources.context.vectors([features]), **options)


def mmd(
    sources: TermSources,
    *,
    weight: float = 1.0,
    features: str = "cooccurrence",
    side: Literal["quantized", "latents"] = "quantized",
) -> LossTerm:
    """A cloud of codes shaped as a block."""
    return DistributionMatch(weight, sources.context.vectors([features]), side=side)
