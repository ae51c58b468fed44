"""What the stages of a recipe hand to each other: feature blocks, codes, and the context they are made in.

Shape suffixes: N items, L levels, E and F widths of vectors, P width of the codebook space.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genrec.data.interactions import RecommendationData
from hf_genrec.data.splits import Split
from hf_genrec.errors import IncompatibleComponentsError


@dataclass
class FeatureBlock:
    """One source of item vectors: `symmetric` (N, E) for identifiers, `inputs` (N, F) for the model.

    `transform` (a `BlockTransform`) says how to make the same vectors for items that join later; None where it cannot.
    """

    symmetric: np.ndarray
    inputs: np.ndarray
    transform: Any = None


@dataclass
class Quantized:
    """Codes before collisions are resolved, and what a policy or a later stage may need.

    Attributes:
        codes_NL: integers; -1 behind the end of an item that has fewer codes.
        codebook_sizes: L sizes.
        codebooks: L arrays (C, P), for policies that move items to another code.
        features: (N, P) in the space of the codebooks.
        quantizer: the fitted quantizer, saved with the artefact so that new items can be given codes.
        record: more entries for `identifiers` in metrics.json.
        files: file name -> object with `save(path)`, kept beside the quantizer in the artefact.
    """

    codes_NL: np.ndarray
    codebook_sizes: tuple[int, ...]
    codebooks: Any = None
    features: Any = None
    quantizer: Any = None
    record: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageContext:
    """The data a stage may read (of interactions the training part only) and the feature blocks made so far.

    `retrievers` holds the recommenders that stages trained for themselves, by options: each is trained once per run.
    """

    data: RecommendationData
    split: Split
    seed: int = 0
    progress: bool = True
    blocks: dict[str, FeatureBlock] = field(default_factory=dict)
    retrievers: MutableMapping[Any, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """N, the size of the catalogue."""
        return self.data.num_items

    def vectors(self, names: Sequence[str]) -> np.ndarray:
        """Blocks side by side, each scaled to the same total variance whatever its width. (N, E)

        Raises:
            IncompatibleComponentsError: none of the blocks could be made from this data.
        """
        chosen = [self.blocks[name].symmetric for name in names if name in self.blocks]
        if not chosen:
            raise IncompatibleComponentsError(
                f"identifiers.features names {list(names)}, but none of these could be made from this data; add "
                "'cooccurrence' or give an item table."
            )
        return np.concatenate([block / np.sqrt(block.shape[1]) for block in chosen], axis=1).astype(np.float32)


@dataclass
class TrainingJob:
    """What a training method gets: a fresh model of a catalogue, and how to train it.

    `before` is the report of that model on the validation users, where an alignment run compares itself with it.
    """

    recipe: Any
    context: StageContext
    model: Any
    tokenizer: Any
    args: Any
    quantized: Quantized | None = None
    user_ids: Sequence[str] | None = None
    resume: bool = False
    before: Any = None


@dataclass
class MethodResult:
    """What a training method returns; the tokenizer is another one where training changed the identifiers."""

    model: Any
    tokenizer: Any
    summary: dict[str, Any]
