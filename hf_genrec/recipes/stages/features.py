"""Feature blocks: where the item vectors of a recipe come from."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RecipeError
from hf_genrec.identifiers.features import cooccurrence_svd, pca, text_features
from hf_genrec.recipes.stages.context import FeatureBlock, StageContext

logger = logging.getLogger(__name__)


def _unit_scale(features_NE: np.ndarray) -> np.ndarray:
    """Centred, with one common scale: keeps the spectrum, so large directions stay large."""
    centred = features_NE - features_NE.mean(0)
    return (centred / max(float(centred.std()), 1e-8)).astype(np.float32)


def text_block(
    context: StageContext,
    *,
    encoder: str | None = None,
    fields: list[str] | None = None,
    dim: int | None = None,
    when_missing: str = "error",
) -> FeatureBlock | None:
    """Vectors of the item texts; with `when_missing="skip"` None where there is no text or no encoder."""
    if when_missing not in ("error", "skip"):
        raise RecipeError(f"features.text.when_missing must be 'error' or 'skip', got {when_missing!r}.")
    data = context.data
    if data.items is None:
        if when_missing == "skip":
            logger.warning("no item table: the recipe goes on without text features")
            return None
        raise ItemTableError(f"{data.name}: the recipe needs item texts; give an item table with --items FILE.")
    texts = data.items.texts(fields)
    empty = [item for item, text in zip(data.item_ids, texts, strict=True) if not text.strip()]
    if empty and when_missing == "error":
        raise ItemTableError(
            f"{data.name}: {len(empty)} items have no text (first: {empty[:3]}), which the recipe needs; add titles or "
            "set --features.text.when_missing skip."
        )
    try:
        vectors = text_features(texts, encoder, progress=context.progress)
    except IncompatibleComponentsError as error:
        if when_missing == "error" or encoder is not None:
            raise
        logger.warning("the recipe goes on without text features: %s", error)
        return None
    if dim is not None and dim < vectors.shape[1]:
        vectors = pca(vectors, dim)
    vectors = _unit_scale(vectors)
    return FeatureBlock(vectors, vectors)


def cooccurrence_block(
    context: StageContext,
    *,
    dim: int = 64,
    window: int = 10,
    damping: str = "log",
) -> FeatureBlock:
    """Truncated SVD of the training co-occurrence: undirected for identifiers, predecessor and successor for the model."""
    options: dict[str, Any] = {"window": window, "damping": damping}
    symmetric = cooccurrence_svd(context.split.train, context.num_items, dim, directed=False, **options)
    source, target = cooccurrence_svd(context.split.train, context.num_items, dim, directed=True, **options)
    assert isinstance(symmetric, np.ndarray)  # a pair only when directed
    return FeatureBlock(
        _unit_scale(symmetric), np.concatenate([_unit_scale(source), _unit_scale(target)], axis=1).astype(np.float32)
    )
