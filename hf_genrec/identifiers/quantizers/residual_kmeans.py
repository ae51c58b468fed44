"""Residual k-means: semantic IDs by clustering what the levels above left over (as in OneRec, arXiv 2502.18965).

Shape suffixes: N items, D feature dimensions, P projected dimensions (P = D without `pca_dim`), L levels, C codes.

Level 1 clusters the features, level l the residuals of level l - 1; an item's codes are its L cluster numbers. Features
are centred and, with `pca_dim`, projected first: in the 384 dimensions of a text encoder plain k-means spends codes on
outliers (one item each) and leaves one crowded cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import ArtifactError, IncompatibleComponentsError, TrainingError
from ..features import PrincipalComponents
from .kmeans import DEFAULT_CHUNK, FEW_POINTS, check_features, kmeans, nearest
from .quantizer_file import read_quantizer, write_quantizer

logger = logging.getLogger(__name__)

_FORMAT = "hf_genrec.residual_kmeans.1"


class ResidualKMeans:
    """Residual k-means quantizer: fitted once, then a pure function from features to codes.

    Args:
        codebook_sizes: codes per level, e.g. `(256, 256, 256)`.
        seed: all draws come from an own generator; torch's global random state is never read or changed.
        iterations: largest number of k-means rounds per level.
        subsample: points used for the k-means++ seeding.
        chunk_size: points whose distances are held at once (memory: chunk_size x C floats).
        pca_dim: project the features onto this many principal components first (None: only centre them).
        whiten: also scale the components to unit variance; needs `pca_dim`.
        max_load: price the codes so that none holds more than about this multiple of the mean (size-balanced codes; the
            prices are stored, so `encode` stays a function of the features alone). None: plain nearest centroid.
        few_points: fewer items than codes of a level: `"error"`, or `"duplicate"` (surplus codes stay unused copies).

    Relations: one level is plain k-means; `max_load=None` and `pca_dim=None` is the textbook method; RQ-VAE learns the
    space in which it does the same.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> quantizer = ResidualKMeans([2, 2]).fit(x)
        >>> codes = quantizer.encode(x)
        >>> codes.shape, len(set(map(tuple, codes.tolist())))
        (torch.Size([4, 2]), 4)
        >>> torch.allclose(quantizer.decode(codes), x)
        True
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        *,
        seed: int = 0,
        iterations: int = 25,
        subsample: int = 16384,
        chunk_size: int = DEFAULT_CHUNK,
        pca_dim: int | None = None,
        whiten: bool = False,
        max_load: float | None = None,
        few_points: str = "error",
    ) -> None:
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise IncompatibleComponentsError(f"codebook_sizes must be positive, one per level, got {codebook_sizes}")
        if few_points not in FEW_POINTS:
            raise IncompatibleComponentsError(f"few_points must be one of {FEW_POINTS}, got {few_points!r}")
        if whiten and pca_dim is None:
            raise IncompatibleComponentsError("whiten=True needs pca_dim: whitening keeps only the leading components")
        self.seed, self.iterations, self.subsample, self.chunk_size = seed, iterations, subsample, chunk_size
        self.pca_dim, self.whiten, self.max_load, self.few_points = pca_dim, whiten, max_load, few_points
        self.codebooks: list[Tensor] = []
        self.prices: list[Tensor] = []
        self.projection: PrincipalComponents | None = None

    @property
    def num_levels(self) -> int:
        """L, the number of codes of an item."""
        return len(self.codebook_sizes)

    def fit(self, x_ND: Tensor | np.ndarray) -> ResidualKMeans:
        """Learn the codebooks from features (N, D) and return self.

        Raises:
            TrainingError: not a matrix, NaN or infinite values (names the row), or fewer items than codes while
                `few_points="error"`.
        """
        x_ND = check_features(x_ND)
        if self.few_points == "error" and len(x_ND) < max(self.codebook_sizes):
            raise TrainingError(
                f"residual k-means: {len(x_ND)} items cannot fill a codebook of {max(self.codebook_sizes)} codes; use "
                f"codebook_sizes of at most {len(x_ND)}, or few_points='duplicate' to leave the surplus codes unused"
            )
        self.projection = PrincipalComponents.fit(x_ND, self.pca_dim, whiten=self.whiten)
        residual_NP = self.projection.apply(x_ND)
        generator = torch.Generator().manual_seed(self.seed)
        self.codebooks, self.prices = [], []
        for size in self.codebook_sizes:
            level = kmeans(
                residual_NP,
                size,
                generator=generator,
                iterations=self.iterations,
                subsample=self.subsample,
                chunk_size=self.chunk_size,
                max_load=self.max_load,
            )
            largest = int(torch.bincount(level.codes_N).max())
            if size >= 4 and 2 * largest > len(x_ND) > size:
                # in many dimensions a point is nearer to the mean than to any other point: seeds stay alone there
                logger.warning(
                    f"residual k-means: one of {size} codes of level {len(self.codebooks) + 1} holds {largest} of "
                    f"{len(x_ND)} items; max_load=2.0 and pca_dim=32 spread them"
                )
            self.codebooks.append(level.centroids_CD)
            self.prices.append(level.price_C)
            residual_NP = residual_NP - level.centroids_CD[level.codes_N]
        return self

    def transform(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Features in the space of the codebooks, (N, P): centred, and projected when `pca_dim` is set."""
        return self._fitted().apply(check_features(x_ND))

    def encode(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Codes (N, L) int64 of features (N, D); works for items that were not in `fit`."""
        residual_NP = self.transform(x_ND)
        codes = []
        for codebook_CP, price_C in zip(self.codebooks, self.prices):
            codes_N = nearest(residual_NP, codebook_CP.to(residual_NP), price_C.to(residual_NP), self.chunk_size)
            residual_NP = residual_NP - codebook_CP.to(residual_NP)[codes_N]
            codes.append(codes_N)
        return torch.stack(codes, 1)

    def decode(self, codes_NL: Tensor | np.ndarray) -> Tensor:
        """Features (N, D) that codes (N, l <= L) stand for: the mean plus the sum of the codes' centroids."""
        projection = self._fitted()
        codes_NL = torch.as_tensor(codes_NL).long()
        if codes_NL.dim() != 2 or codes_NL.shape[1] > self.num_levels:
            raise IncompatibleComponentsError(
                f"codes must be (N, up to {self.num_levels}), got {tuple(codes_NL.shape)}"
            )
        x_NP = torch.zeros(len(codes_NL), self.codebooks[0].shape[1])
        for level in range(codes_NL.shape[1]):
            x_NP = x_NP + self.codebooks[level][codes_NL[:, level]]
        return projection.invert(x_NP)

    def save(self, path: str | Path) -> None:
        """Write the fitted quantizer as one safetensors file (settings in its header, no pickle)."""
        tensors = {f"projection.{name}": value for name, value in self._fitted().tensors().items()}
        for level, (codebook_CP, price_C) in enumerate(zip(self.codebooks, self.prices)):
            tensors[f"codebook.{level}"], tensors[f"price.{level}"] = codebook_CP, price_C
        settings = {
            "codebook_sizes": self.codebook_sizes,
            "seed": self.seed,
            "iterations": self.iterations,
            "subsample": self.subsample,
            "chunk_size": self.chunk_size,
            "pca_dim": self.pca_dim,
            "whiten": self.whiten,
            "max_load": self.max_load,
            "few_points": self.few_points,
        }
        write_quantizer(path, _FORMAT, settings, tensors)

    @classmethod
    def load(cls, path: str | Path) -> ResidualKMeans:
        """Read a file written by `save`; codes of the same features are identical.

        Raises:
            ArtifactError: not a file of `save`, or its tensors do not match its settings.
        """
        settings, tensors = read_quantizer(path, _FORMAT, "residual k-means")
        quantizer = cls(**settings)
        try:
            quantizer.codebooks = [tensors[f"codebook.{level}"] for level in range(quantizer.num_levels)]
            quantizer.prices = [tensors[f"price.{level}"] for level in range(quantizer.num_levels)]
            quantizer.projection = PrincipalComponents.from_tensors(
                {name.removeprefix("projection."): t for name, t in tensors.items() if name.startswith("projection.")}
            )
        except KeyError as error:
            raise ArtifactError(f"{path}: tensor {error} is missing; save the quantizer again") from error
        found = tuple(len(codebook_CP) for codebook_CP in quantizer.codebooks)
        if found != quantizer.codebook_sizes:
            raise ArtifactError(f"{path}: codebooks of {found} codes, settings say {quantizer.codebook_sizes}")
        return quantizer

    def _fitted(self) -> PrincipalComponents:
        if self.projection is None:
            raise TrainingError("residual k-means is not fitted: call fit(features) or load(path) first")
        return self.projection
