"""One level of residual k-means: a codebook for all items, one per prefix, or one that also sees the prefix.

Shape suffixes: N items, B items of a chunk, P dimensions, C codes, G codebooks of a level (1, or one per prefix),
Q clustered dimensions (P, or 2 P with the prefix semantics behind the residual).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .balanced import balanced_kmeans
from .kmeans import DEFAULT_CHUNK, KMeansResult, chunks, kmeans, nearest


@dataclass(frozen=True)
class LevelSettings:
    """How the codebooks of a level are fitted; see `ResidualKMeans`."""

    iterations: int
    subsample: int
    chunk_size: int
    max_load: float | None
    balanced: bool

    def cluster(self, x_NQ: Tensor, num_codes: int, generator: torch.Generator) -> KMeansResult:
        """K-means with these settings."""
        if self.balanced:
            return balanced_kmeans(
                x_NQ,
                num_codes,
                generator=generator,
                iterations=self.iterations,
                subsample=self.subsample,
                chunk_size=self.chunk_size,
            )
        return kmeans(
            x_NQ,
            num_codes,
            generator=generator,
            iterations=self.iterations,
            subsample=self.subsample,
            chunk_size=self.chunk_size,
            max_load=self.max_load,
        )


@dataclass(frozen=True)
class ResidualLevel:
    """Fitted codebooks of one level.

    Attributes:
        books_GCQ: centroids; the first P columns are what a code adds to the sum of an item.
        price_GC: price of every code (0 unless balanced).
        keys_G: the prefix numbers the codebooks belong to, ascending; None = one codebook for all items.
        width: P.
    """

    books_GCQ: Tensor
    price_GC: Tensor
    keys_G: Tensor | None
    width: int

    @classmethod
    def fit(
        cls,
        residual_NP: Tensor,
        num_codes: int,
        settings: LevelSettings,
        generator: torch.Generator,
        *,
        prefix_N: Tensor | None = None,
        semantic_NP: Tensor | None = None,
    ) -> tuple[ResidualLevel, Tensor]:
        """The level and the codes (N,) of the items.

        Args:
            prefix_N: number of each item's prefix: a codebook is fitted within each.
            semantic_NP: sum of each item's earlier centroids: clustered together with the residual.
        """
        width = residual_NP.shape[1]
        x_NQ = residual_NP if semantic_NP is None else torch.cat([residual_NP, semantic_NP], 1)
        if prefix_N is None:
            result = settings.cluster(x_NQ, num_codes, generator)
            return cls(result.centroids_CD[None], result.price_C[None], None, width), result.codes_N
        keys_G, group_N, size_G = torch.unique(prefix_N, return_inverse=True, return_counts=True)
        codes_N = torch.empty_like(prefix_N)
        books, prices = [], []
        for rows in group_N.argsort(stable=True).split(size_G.tolist()):
            result = settings.cluster(x_NQ[rows], num_codes, generator)
            books.append(result.centroids_CD)
            prices.append(result.price_C)
            codes_N[rows] = result.codes_N
        return cls(torch.stack(books), torch.stack(prices), keys_G, width), codes_N

    def _groups(self, prefix_B: Tensor) -> Tensor:
        """Codebook (B,) of every item; -1 for a prefix that no item of `fit` had."""
        assert self.keys_G is not None
        index_B = torch.searchsorted(self.keys_G, prefix_B).clamp_max(len(self.keys_G) - 1)
        return torch.where(self.keys_G[index_B] == prefix_B, index_B, -1)

    def encode(
        self,
        residual_BP: Tensor,
        prefix_B: Tensor | None = None,
        semantic_BP: Tensor | None = None,
        chunk_size: int = DEFAULT_CHUNK,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """Codes (B,) of residuals; code 0 under a prefix that no item of `fit` had."""
        x_BQ = residual_BP if self.books_GCQ.shape[2] == self.width else torch.cat([residual_BP, semantic_BP], 1)  # type: ignore[list-item]
        books_GCQ, price_GC = self.books_GCQ.to(x_BQ), self.price_GC.to(x_BQ)
        if self.keys_G is None:
            return nearest(x_BQ, books_GCQ[0], price_GC[0], chunk_size, scratch=scratch)
        assert prefix_B is not None
        group_B = self._groups(prefix_B)
        codes_B = torch.zeros_like(prefix_B)
        for group in group_B.unique().tolist():
            if group >= 0:
                rows = (group_B == group).nonzero().flatten()
                codes_B[rows] = nearest(x_BQ[rows], books_GCQ[group], price_GC[group], chunk_size)
        return codes_B

    def vectors(self, codes_B: Tensor, prefix_B: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """What the codes (B,) add, (B, P), into `out` where all items share a codebook; 0 under an unknown prefix."""
        if self.keys_G is None:
            return torch.index_select(self.books_GCQ[0, :, : self.width], 0, codes_B, out=out)
        assert prefix_B is not None
        group_B = self._groups(prefix_B)
        return self.books_GCQ[group_B, codes_B, : self.width] * (group_B >= 0)[:, None]

    def subtract(
        self, residual_NP: Tensor, codes_N: Tensor, prefix_N: Tensor | None = None, chunk_size: int = DEFAULT_CHUNK
    ) -> None:
        """Take what the codes add off the residuals, in place and chunk by chunk."""
        buffer_BP = residual_NP.new_empty(min(chunk_size, len(residual_NP)), self.width)
        for rows in chunks(len(residual_NP), chunk_size):
            prefix_B = prefix_N if prefix_N is None else prefix_N[rows]
            residual_NP[rows] -= self.vectors(codes_N[rows], prefix_B, buffer_BP[: rows.stop - rows.start])
