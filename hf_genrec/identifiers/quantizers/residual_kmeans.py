"""Residual k-means: semantic IDs by clustering what the levels above left over (as in OneRec, arXiv 2502.18965).

Shape suffixes: N items, D feature dimensions, P projected dimensions (P = D without `pca_dim`), L levels, C codes.

Level 1 clusters the features, level l the residuals of level l - 1; an item's codes are its L cluster numbers. Features
are centred and, with `pca_dim`, projected first: in the 384 dimensions of a text encoder plain k-means spends codes on
outliers (one item each) and leaves one crowded cluster.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import ArtifactError, IncompatibleComponentsError, TrainingError
from ..features import PrincipalComponents
from .kmeans import DEFAULT_CHUNK, FEW_POINTS, check_features, chunks
from .quantizer_file import read_quantizer, write_quantizer
from .residual_levels import LevelSettings, ResidualLevel

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
        balanced: equal cluster sizes (within one) on every level, as in OneRec. The sizes are exact for the items of `fit`
            (`fitted_codes_NL`); `encode` is the priced rule that comes near to them. Excludes `max_load`.
        within_cluster: from level 2 on cluster the items of each prefix on their own (MBGen, arXiv 2405.16871): a codebook
            per prefix, so a code means something only below its prefix; `codebooks` are (G, C, P) there. Under a prefix
            that no item of `fit` had, `encode` gives code 0, which adds nothing.
        concat_prefix: from level 2 on cluster the residual side by side with the sum of the item's earlier centroids
            (PSRQ, arXiv 2508.20359), so that items of far prefixes do not share a deep code. What a code adds is still
            the residual part of its centroid.
        prefix_weight: factor on that sum; 0 is the plain residual. At 1 the prefix, which has few distinct values, can take
            all codes of a level for itself: deep codes then repeat the first one and tell hardly any items apart.
        few_points: fewer items than codes of a level: `"error"`, or `"duplicate"` (surplus codes stay unused copies).

    Relations: one level is plain k-means; `max_load=None` and `pca_dim=None` is the textbook method, which the other
    options, off by default, leave; RQ-VAE learns the space in which it does the same.

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
        balanced: bool = False,
        within_cluster: bool = False,
        concat_prefix: bool = False,
        prefix_weight: float = 1.0,
    ) -> None:
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise IncompatibleComponentsError(f"codebook_sizes must be positive, one per level, got {codebook_sizes}")
        if few_points not in FEW_POINTS:
            raise IncompatibleComponentsError(f"few_points must be one of {FEW_POINTS}, got {few_points!r}")
        if whiten and pca_dim is None:
            raise IncompatibleComponentsError("whiten=True needs pca_dim: whitening keeps only the leading components")
        if balanced and max_load is not None:
            raise IncompatibleComponentsError("balanced=True makes all loads equal already: leave max_load out")
        if within_cluster and concat_prefix:
            raise IncompatibleComponentsError(
                "within_cluster=True clusters items of one prefix, where concat_prefix=True adds the same vector to all of "
                "them: use one of the two"
            )
        if prefix_weight < 0 or (prefix_weight != 1 and not concat_prefix):
            raise IncompatibleComponentsError(
                f"prefix_weight must be 0 or more and needs concat_prefix=True, got {prefix_weight}"
            )
        if within_cluster and math.prod(self.codebook_sizes) >= 2**63:
            raise IncompatibleComponentsError(f"within_cluster: too many prefixes with codebook_sizes {codebook_sizes}")
        self.seed, self.iterations, self.subsample, self.chunk_size = seed, iterations, subsample, chunk_size
        self.pca_dim, self.whiten, self.max_load, self.few_points = pca_dim, whiten, max_load, few_points
        self.balanced, self.within_cluster, self.concat_prefix = balanced, within_cluster, concat_prefix
        self.prefix_weight = prefix_weight
        self.levels: list[ResidualLevel] = []
        self.fitted_codes_NL: Tensor | None = None
        self.projection: PrincipalComponents | None = None

    @property
    def num_levels(self) -> int:
        """L, the number of codes of an item."""
        return len(self.codebook_sizes)

    @property
    def codebooks(self) -> list[Tensor]:
        """What the codes of each level add: (C, P); (G, C, P), one per known prefix, below the first with `within_cluster`."""
        books = [level.books_GCQ[:, :, : level.width] for level in self.levels]
        return [book if level.keys_G is not None else book[0] for book, level in zip(books, self.levels)]

    @property
    def prices(self) -> list[Tensor]:
        """Prices of the codes of each level, shaped like `codebooks` without the last axis."""
        return [level.price_GC if level.keys_G is not None else level.price_GC[0] for level in self.levels]

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
        origin_NP = residual_NP.clone() if self.concat_prefix else None
        prefix_N = torch.zeros(len(x_ND), dtype=torch.int64) if self.within_cluster else None
        settings = LevelSettings(self.iterations, self.subsample, self.chunk_size, self.max_load, self.balanced)
        generator = torch.Generator().manual_seed(self.seed)
        self.levels, codes = [], []
        for number, size in enumerate(self.codebook_sizes):
            below = number > 0
            level, codes_N = ResidualLevel.fit(
                residual_NP,
                size,
                settings,
                generator,
                prefix_N=prefix_N if below else None,
                semantic_NP=(origin_NP - residual_NP) * self.prefix_weight if below and origin_NP is not None else None,
            )
            largest = int(torch.bincount(codes_N).max())
            if size >= 4 and 2 * largest > len(x_ND) > size:
                # in many dimensions a point is nearer to the mean than to any other point: seeds stay alone there
                logger.warning(
                    f"residual k-means: one of {size} codes of level {number + 1} holds {largest} of "
                    f"{len(x_ND)} items; max_load=2.0 and pca_dim=32 spread them"
                )
            self.levels.append(level)
            codes.append(codes_N)
            if number + 1 < self.num_levels:
                level.subtract(residual_NP, codes_N, prefix_N, self.chunk_size)
            prefix_N = None if prefix_N is None else prefix_N * size + codes_N
        self.fitted_codes_NL = torch.stack(codes, 1)
        return self

    def transform(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Features in the space of the codebooks, (N, P): centred, and projected when `pca_dim` is set."""
        return self._fitted().apply(check_features(x_ND))

    def encode(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Codes (N, L) int64 of features (N, D); works for items that were not in `fit`."""
        projection, x_ND = self._fitted(), check_features(x_ND)
        codes_NL = torch.empty(len(x_ND), self.num_levels, dtype=torch.int64)
        # buffers for all chunks: fresh pages cost as much as a GEMM
        longest = min(self.chunk_size, len(x_ND))
        scratch, (centred, added) = (
            x_ND.new_empty(longest * max(self.codebook_sizes)),
            x_ND.new_empty(2, longest, self.levels[0].width),
        )
        for rows in chunks(len(x_ND), self.chunk_size):
            size_B = rows.stop - rows.start
            origin_BP = projection.apply(x_ND[rows], out=centred[:size_B])
            residual_BP = origin_BP.clone() if self.concat_prefix else origin_BP
            prefix_B = torch.zeros(size_B, dtype=torch.int64)
            for number, (level, size) in enumerate(zip(self.levels, self.codebook_sizes, strict=True)):
                semantic_BP = (origin_BP - residual_BP) * self.prefix_weight if self.concat_prefix else None
                codes_B = level.encode(residual_BP, prefix_B, semantic_BP, self.chunk_size, scratch)
                codes_NL[rows, number] = codes_B
                if number + 1 < self.num_levels:
                    residual_BP -= level.vectors(codes_B, prefix_B, added[:size_B])
                prefix_B = prefix_B * size + codes_B
        return codes_NL

    def decode(self, codes_NL: Tensor | np.ndarray) -> Tensor:
        """Features (N, D) that codes (N, l <= L) stand for: the mean plus the sum of the codes' centroids."""
        projection = self._fitted()
        codes_NL = torch.as_tensor(codes_NL).long()
        if codes_NL.dim() != 2 or codes_NL.shape[1] > self.num_levels:
            raise IncompatibleComponentsError(
                f"codes must be (N, up to {self.num_levels}), got {tuple(codes_NL.shape)}"
            )
        x_NP = torch.zeros(len(codes_NL), self.levels[0].width)
        prefix_N = torch.zeros(len(codes_NL), dtype=torch.int64)
        for number in range(codes_NL.shape[1]):
            x_NP = x_NP + self.levels[number].vectors(codes_NL[:, number], prefix_N)
            prefix_N = prefix_N * self.codebook_sizes[number] + codes_NL[:, number]
        return projection.invert(x_NP)

    def save(self, path: str | Path) -> None:
        """Write the fitted quantizer as one safetensors file (settings in its header, no pickle)."""
        tensors = {f"projection.{name}": value for name, value in self._fitted().tensors().items()}
        for number, level in enumerate(self.levels):
            shared = level.keys_G is None
            tensors[f"codebook.{number}"] = level.books_GCQ[0] if shared else level.books_GCQ
            tensors[f"price.{number}"] = level.price_GC[0] if shared else level.price_GC
            if level.keys_G is not None:
                tensors[f"prefixes.{number}"] = level.keys_G
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
            "balanced": self.balanced,
            "within_cluster": self.within_cluster,
            "concat_prefix": self.concat_prefix,
            "prefix_weight": self.prefix_weight,
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
            books = [tensors[f"codebook.{number}"] for number in range(quantizer.num_levels)]
            for number, book in enumerate(books):
                price = tensors[f"price.{number}"]
                width = books[0].shape[-1]
                if quantizer.within_cluster and number:
                    level = ResidualLevel(book, price, tensors[f"prefixes.{number}"], width)
                else:
                    level = ResidualLevel(book[None], price[None], None, width)
                quantizer.levels.append(level)
            quantizer.projection = PrincipalComponents.from_tensors(
                {name.removeprefix("projection."): t for name, t in tensors.items() if name.startswith("projection.")}
            )
        except KeyError as error:
            raise ArtifactError(f"{path}: tensor {error} is missing; save the quantizer again") from error
        found = tuple(level.books_GCQ.shape[1] for level in quantizer.levels)
        if found != quantizer.codebook_sizes:
            raise ArtifactError(f"{path}: codebooks of {found} codes, settings say {quantizer.codebook_sizes}")
        return quantizer

    def _fitted(self) -> PrincipalComponents:
        if self.projection is None:
            raise TrainingError("residual k-means is not fitted: call fit(features) or load(path) first")
        return self.projection
