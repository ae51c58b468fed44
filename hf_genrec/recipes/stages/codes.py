"""Codes that are fitted, not trained: atomic, residual k-means, product quantization, SVD bins."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_genrec.recipes.stages.context import Quantized, StageContext


def atomic_codes(context: StageContext, vectors: np.ndarray | None, *, pca_dim: int | None = None) -> Quantized:
    """One code per item: the identifier of SASRec and of every classic sequential recommender.

    Item vectors, where there are any, are kept as the vectors of the codes: item tokens of a language model start there.
    """
    from hf_genrec.identifiers.features import pca

    if vectors is not None and pca_dim is not None:
        vectors = pca(vectors, min(pca_dim, vectors.shape[1]))
    codes = np.arange(context.num_items)[:, None]
    return Quantized(codes, (context.num_items,), None if vectors is None else [vectors], vectors)


def residual_kmeans_codes(
    context: StageContext,
    vectors: np.ndarray,
    *,
    codebook_sizes: list[int],
    iterations: int = 25,
    pca_dim: int | None = None,
    whiten: bool = False,
    max_load: float | None = None,
    balanced: bool = False,
    within_cluster: bool = False,
    concat_prefix: bool = False,
    prefix_weight: float = 1.0,
) -> Quantized:
    """Residual k-means on the item vectors; see `ResidualKMeans` for the options."""
    from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans

    if pca_dim is not None:
        pca_dim = min(pca_dim, vectors.shape[1])  # a recipe's default for wide features also fits narrow ones
    quantizer = ResidualKMeans(
        codebook_sizes,
        seed=context.seed,
        iterations=iterations,
        pca_dim=pca_dim,
        whiten=whiten,
        max_load=max_load,
        few_points="duplicate",
        balanced=balanced,
        within_cluster=within_cluster,
        concat_prefix=concat_prefix,
        prefix_weight=prefix_weight,
    ).fit(vectors)
    # equal sizes hold for the codes of the fit; they are what `encode` gives in all other cases
    codes = quantizer.fitted_codes_NL if balanced else quantizer.encode(vectors)
    books = None if within_cluster else quantizer.codebooks  # a codebook per prefix is none for a collision policy
    return Quantized(np.asarray(codes), tuple(codebook_sizes), books, quantizer.transform(vectors), quantizer)


def opq_codes(
    context: StageContext,
    vectors: np.ndarray,
    *,
    num_codebooks: int,
    codebook_size: int,
    pca_dim: int | None = None,
    **options: Any,
) -> Quantized:
    """Optimised product quantization on the item vectors: long codes whose digits have no order."""
    from hf_genrec.identifiers.quantizers.product import ProductQuantizer

    if pca_dim is not None:
        pca_dim = min(pca_dim, vectors.shape[1])  # a recipe's default for wide features also fits narrow ones
    sizes = [codebook_size] * num_codebooks
    quantizer = ProductQuantizer(sizes, seed=context.seed, pca_dim=pca_dim, few_points="duplicate", **options).fit(
        vectors
    )
    codes = quantizer.encode(vectors).numpy()
    return Quantized(codes, tuple(sizes), quantizer.padded_codebooks(), quantizer.transform(vectors), quantizer)


def pq_codes(context: StageContext, vectors: np.ndarray, **options: Any) -> Quantized:
    """Product quantization on the item vectors, without a rotation."""
    return opq_codes(context, vectors, rotate=False, **options)


def svd_bins_codes(context: StageContext, vectors: np.ndarray, *, num_codebooks: int, codebook_size: int) -> Quantized:
    """Quantile bins along the leading singular directions of the item vectors (GPTRec, arXiv 2306.11114)."""
    from hf_genrec.identifiers.quantizers.svd_bins import SvdBins

    size = min(codebook_size, context.num_items)  # a recipe's default for many items also fits few
    quantizer = SvdBins([size] * num_codebooks, seed=context.seed).fit(vectors)
    codes = np.asarray(quantizer.fitted_codes_NL)  # equal bins hold for the codes of the fit
    return Quantized(codes, quantizer.codebook_sizes, quantizer.codebooks, quantizer.transform(vectors), quantizer)
