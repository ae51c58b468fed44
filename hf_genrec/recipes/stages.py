"""The stages before the model: feature blocks and identifiers, as a recipe names them.

Each function here is the value of one line in `components`; arrays are handed on, so no room imports its neighbour.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_genrec.data.interactions import RecommendationData
from hf_genrec.data.splits import Split
from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RecipeError
from hf_genrec.identifiers.features import cooccurrence_svd, pca, text_features
from hf_genrec.recipes.components import FEATURES, QUANTIZERS

logger = logging.getLogger(__name__)


@dataclass
class FeatureBlock:
    """One source of item vectors: `symmetric` (N, E) for identifiers, `inputs` (N, F) for the model."""

    symmetric: np.ndarray
    inputs: np.ndarray


def _unit_scale(features_NE: np.ndarray) -> np.ndarray:
    """Centred, with one common scale: keeps the spectrum, so large directions stay large."""
    centred = features_NE - features_NE.mean(0)
    return (centred / max(float(centred.std()), 1e-8)).astype(np.float32)


def text_block(
    data: RecommendationData,
    split: Split,
    *,
    encoder: str | None = None,
    fields: list[str] | None = None,
    dim: int | None = None,
    when_missing: str = "error",
    progress: bool = True,
) -> FeatureBlock | None:
    """Vectors of the item texts; with `when_missing="skip"` None where there is no text or no encoder."""
    if when_missing not in ("error", "skip"):
        raise RecipeError(f"features.text.when_missing must be 'error' or 'skip', got {when_missing!r}.")
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
        vectors = text_features(texts, encoder, progress=progress)
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
    data: RecommendationData,
    split: Split,
    *,
    dim: int = 64,
    window: int = 10,
    damping: str = "log",
    progress: bool = True,
) -> FeatureBlock:
    """Truncated SVD of the training co-occurrence: undirected for identifiers, predecessor and successor for the model."""
    options: dict[str, Any] = {"window": window, "damping": damping}
    symmetric = cooccurrence_svd(split.train, data.num_items, dim, directed=False, **options)
    source, target = cooccurrence_svd(split.train, data.num_items, dim, directed=True, **options)
    assert isinstance(symmetric, np.ndarray)  # a pair only when directed
    return FeatureBlock(
        _unit_scale(symmetric), np.concatenate([_unit_scale(source), _unit_scale(target)], axis=1).astype(np.float32)
    )


def feature_blocks(
    features: dict[str, dict[str, Any]], data: RecommendationData, split: Split, progress: bool = True
) -> dict[str, FeatureBlock]:
    """All blocks of a recipe that could be made."""
    blocks = {}
    for name, options in features.items():
        block = FEATURES[name].load()(data, split, progress=progress, **options)
        if block is not None:
            blocks[name] = block
    return blocks


def identifier_vectors(names: list[str], blocks: dict[str, FeatureBlock]) -> np.ndarray:
    """Blocks side by side, each scaled to the same total variance whatever its width. (N, E)"""
    chosen = [blocks[name].symmetric for name in names if name in blocks]
    if not chosen:
        raise IncompatibleComponentsError(
            f"identifiers.features names {names}, but none of these could be made from this data; add 'cooccurrence' "
            "or give an item table."
        )
    return np.concatenate([block / np.sqrt(block.shape[1]) for block in chosen], axis=1).astype(np.float32)


def model_vectors(blocks: dict[str, FeatureBlock], names: list[str] | None = None) -> np.ndarray | None:
    """Input features of the model: the named blocks (default all) side by side. (N, F), or None without any."""
    chosen = [block.inputs for name, block in blocks.items() if names is None or name in names]
    return np.concatenate(chosen, axis=1) if chosen else None


@dataclass
class Quantized:
    """Codes before collisions are resolved, and what a policy may need."""

    codes_NL: np.ndarray
    codebook_sizes: tuple[int, ...]
    codebooks: Any = None
    features: Any = None
    quantizer: Any = None


def atomic_codes(vectors: np.ndarray | None, num_items: int, *, seed: int = 0, progress: bool = True) -> Quantized:
    """One code per item: the identifier of SASRec and of every classic sequential recommender."""
    return Quantized(np.arange(num_items)[:, None], (num_items,))


def item_words_tokenizer(
    data: RecommendationData,
    *,
    fields: list[str] | None = None,
    vocab_size: int = 2000,
    text_tokenizer: str | None = None,
    max_tokens: int = 24,
) -> Any:
    """Items named by their texts: a tokenizer, not codes.

    Args:
        fields: columns of the item table that make the name; default: the title.
        vocab_size: of the byte-level BPE learned from these texts, where no `text_tokenizer` is given.
        text_tokenizer: folder of a pretrained text tokenizer.
    """
    from transformers import AutoTokenizer

    from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
    from hf_genrec.identifiers.tokenization_item_words import ItemWordsTokenizer

    if data.items is None:
        raise ItemTableError(
            f"{data.name}: the recipe names items by their texts; give an item table with --items FILE."
        )
    texts = data.items.titles() if fields is None else data.items.texts(fields)
    if text_tokenizer is None:
        base: Any = train_text_tokenizer(texts, vocab_size)
    else:
        base = AutoTokenizer.from_pretrained(text_tokenizer)
    return ItemWordsTokenizer.from_texts(base, data.item_ids, texts, max_tokens=max_tokens)


def facet_tables(data: RecommendationData, tokenizer: Any, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Further texts of the items for a language recommender: tokens (F, N, L) and markers (F, M), -1 behind the end.

    A facet is "id" (the item's own string) or a column of the item table. Item texts are untrusted: see `encode_segments`.
    """
    from hf_genrec.identifiers.segments import encode_segments

    tables, markers = [], []
    for name in names:
        if name != "id" and data.items is None:
            raise ItemTableError(
                f"{data.name}: facet {name!r} is a column of the item table; give one with --items FILE."
            )
        texts = data.item_ids if name == "id" else data.items.texts([name])  # type: ignore[union-attr]
        rows = [encode_segments(tokenizer, [("text", text or "unknown")]) for text in texts]
        tables.append([[*row, tokenizer.item_end_token_id] for row in rows])
        markers.append(encode_segments(tokenizer, [("text", f"{name}: ")]))
    width = max(len(row) for table in tables for row in table)
    tokens_FNL = np.full((len(names), data.num_items, width), -1, np.int32)
    markers_FM = np.full((len(names), max(map(len, markers))), -1, np.int32)
    for facet, table in enumerate(tables):
        markers_FM[facet, : len(markers[facet])] = markers[facet]
        for item, row in enumerate(table):
            tokens_FNL[facet, item, : len(row)] = row
    return tokens_FNL, markers_FM


def residual_kmeans_codes(
    vectors: np.ndarray,
    num_items: int,
    *,
    codebook_sizes: list[int],
    iterations: int = 25,
    pca_dim: int | None = None,
    whiten: bool = False,
    max_load: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Quantized:
    """Residual k-means on the item vectors."""
    from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans

    if pca_dim is not None:
        pca_dim = min(pca_dim, vectors.shape[1])  # a recipe's default for wide features also fits narrow ones
    quantizer = ResidualKMeans(
        codebook_sizes,
        seed=seed,
        iterations=iterations,
        pca_dim=pca_dim,
        whiten=whiten,
        max_load=max_load,
        few_points="duplicate",
    ).fit(vectors)
    codes = quantizer.encode(vectors).numpy()
    return Quantized(codes, tuple(codebook_sizes), quantizer.codebooks, quantizer.transform(vectors), quantizer)


def opq_codes(
    vectors: np.ndarray,
    num_items: int,
    *,
    num_codebooks: int,
    codebook_size: int,
    pca_dim: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Quantized:
    """Optimised product quantization on the item vectors: long codes whose digits have no order."""
    from hf_genrec.identifiers.quantizers.product import ProductQuantizer

    if pca_dim is not None:
        pca_dim = min(pca_dim, vectors.shape[1])  # a recipe's default for wide features also fits narrow ones
    sizes = [codebook_size] * num_codebooks
    quantizer = ProductQuantizer(sizes, seed=seed, pca_dim=pca_dim, few_points="duplicate", **options).fit(vectors)
    codes = quantizer.encode(vectors).numpy()
    return Quantized(codes, tuple(sizes), quantizer.padded_codebooks(), quantizer.transform(vectors), quantizer)


def pq_codes(vectors: np.ndarray, num_items: int, **options: Any) -> Quantized:
    """Product quantization on the item vectors, without a rotation."""
    return opq_codes(vectors, num_items, rotate=False, **options)


def rq_vae_codes(
    vectors: np.ndarray, num_items: int, *, seed: int = 0, progress: bool = True, **options: Any
) -> Quantized:
    """RQ-VAE on the item vectors, trained with Trainer."""
    from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
    from hf_genrec.identifiers.quantizers.training import train_rq_vae

    training = {key: options.pop(key) for key in ("max_steps", "learning_rate") if key in options}
    config = RQVAEConfig(input_size=vectors.shape[1], standardise="global", **options)  # keeps the blocks' weights
    model = train_rq_vae(vectors, config, seed=seed, progress=progress, **training)
    codes = np.asarray(model.encode(torch.as_tensor(vectors)))
    features = model.transform(torch.as_tensor(vectors))
    return Quantized(codes, tuple(config.codebook_sizes), model.codebooks, features, model)


def multi_head_vq_codes(
    vectors: np.ndarray, num_items: int, *, seed: int = 0, progress: bool = True, **options: Any
) -> Quantized:
    """Multi-head VQ-VAE on the item vectors, trained with Trainer: parallel codes."""
    from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
    from hf_genrec.identifiers.quantizers.training import train_multi_head_vq

    training = {key: options.pop(key) for key in ("max_steps", "learning_rate") if key in options}
    config = MultiHeadVQConfig(input_size=vectors.shape[1], standardise="global", **options)
    model = train_multi_head_vq(vectors, config, seed=seed, progress=progress, **training)
    codes = np.asarray(model.encode(torch.as_tensor(vectors)))
    features = model.transform(torch.as_tensor(vectors))
    return Quantized(codes, tuple(config.codebook_sizes), model.padded_codebooks(), features, model)


def quantize(
    identifiers: dict[str, Any], vectors: np.ndarray | None, num_items: int, seed: int, progress: bool
) -> Quantized:
    """Run the quantizer that a recipe names, with its own options."""
    component = QUANTIZERS[identifiers["quantizer"]]
    options = {key: identifiers[key] for key in component.options if key in identifiers}
    return component.load()(vectors, num_items, seed=seed, progress=progress, **options)


__all__ = ["FeatureBlock", "feature_blocks", "identifier_vectors", "model_vectors", "quantize"]
