"""SVD bins: one code per singular direction, the quantile an item falls into (GPTRec, arXiv 2306.11114).

    x ~ U S V^T;  y_l = x V_l, scaled to [0, 1], plus a little noise against ties;  code_l = quantile of y_l among C

Every level uses all its codes equally often, whatever the vectors: there is no codebook that could collapse.

Shape suffixes: N items, E feature dimensions, L levels, C codes of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import ArtifactError, IncompatibleComponentsError, TrainingError
from .kmeans import check_features
from .quantizer_file import read_quantizer, write_quantizer

_FORMAT = "hf_genrec.svd_bins.1"
_NOISE = 1e-5  # of the range of a direction: parts equal items, leaves the others in their order


class SvdBins:
    """Quantile bins along the leading singular directions, largest first.

    Args:
        codebook_sizes: bins per direction, e.g. `[256] * 8`.
        seed: of the noise that parts items with equal values.

    `fitted_codes_NL` are the codes of the fit: bins of one level hold equally many items, give or take one. `encode`
    adds no noise: it gives the same codes where no two items have (almost) the same value.

    Example:
        >>> line = torch.arange(8.0)[:, None]
        >>> SvdBins([4]).fit(line).encode(line).flatten().tolist()
        [0, 0, 1, 1, 2, 2, 3, 3]
    """

    def __init__(self, codebook_sizes: Sequence[int], *, seed: int = 0) -> None:
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        if not self.codebook_sizes or min(self.codebook_sizes) < 2:
            raise IncompatibleComponentsError(f"codebook_sizes must be 2 or more, one per level, got {codebook_sizes}")
        self.seed = seed
        self.directions_LE: Tensor | None = None
        self.range_L2: Tensor | None = None
        self.edges: list[Tensor] = []  # L arrays (C - 1,)
        self.centres: list[Tensor] = []  # L arrays (C,)
        self.fitted_codes_NL: Tensor | None = None

    @property
    def num_levels(self) -> int:
        """L, the number of codes of an item."""
        return len(self.codebook_sizes)

    def fit(self, x_NE: Tensor | np.ndarray) -> SvdBins:
        """Learn directions and bins from features (N, E) and return self.

        Raises:
            TrainingError: not a matrix, NaN or infinite values (names the row), fewer dimensions than levels, or fewer
                items than bins.
        """
        x_NE = check_features(x_NE)
        if min(x_NE.shape[1], len(x_NE)) < self.num_levels:
            raise TrainingError(
                f"SVD bins: {len(x_NE)} items of {x_NE.shape[1]} dimensions have no {self.num_levels} singular "
                "directions; use fewer codebooks or wider features"
            )
        if len(x_NE) < max(self.codebook_sizes):
            raise TrainingError(
                f"SVD bins: {len(x_NE)} items cannot fill {max(self.codebook_sizes)} bins; use codebook_sizes of at "
                f"most {len(x_NE)}"
            )
        gram_EE = x_NE.double().t() @ x_NE.double()
        directions_LE = torch.linalg.eigh(gram_EE).eigenvectors[:, -self.num_levels :].flip(1).t()
        peak_L1 = directions_LE.gather(1, directions_LE.abs().argmax(1, keepdim=True))
        self.directions_LE = (directions_LE * torch.where(peak_L1 < 0, -1.0, 1.0)).float().contiguous()
        y_NL = x_NE @ self.directions_LE.t()
        self.range_L2 = torch.stack([y_NL.min(0).values, y_NL.max(0).values], 1)
        exact_NL = self.transform(x_NE)
        noise = torch.randn(exact_NL.shape, generator=torch.Generator().manual_seed(self.seed))
        noisy_NL = exact_NL + _NOISE * noise
        self.edges, self.centres, codes = [], [], []
        for level, size in enumerate(self.codebook_sizes):
            order_N = noisy_NL[:, level].argsort(stable=True)
            code_N = torch.empty(len(x_NE), dtype=torch.long)
            code_N[order_N] = torch.arange(len(x_NE)) * size // len(x_NE)
            value_N, binned_N = exact_NL[order_N, level], code_N[order_N]
            first_C = torch.searchsorted(binned_N, torch.arange(1, size))  # where the bins 1 to C - 1 begin
            self.edges.append((value_N[first_C - 1] + value_N[first_C]) / 2)
            count_C = torch.bincount(binned_N, minlength=size)
            self.centres.append(torch.zeros(size).index_add_(0, binned_N, value_N) / count_C)
            codes.append(code_N)
        self.fitted_codes_NL = torch.stack(codes, 1)
        return self

    def transform(self, x_NE: Tensor | np.ndarray) -> Tensor:
        """Places (N, L) along the directions; 0 to 1 is the range of the fit.

        Raises:
            TrainingError: not fitted.
            IncompatibleComponentsError: features of another width than those of the fit.
        """
        if self.directions_LE is None or self.range_L2 is None:
            raise TrainingError("the SVD bins are not fitted: call fit(features) or load(path) first")
        x_NE = check_features(x_NE)
        if x_NE.shape[1] != self.directions_LE.shape[1]:
            raise IncompatibleComponentsError(
                f"features have {x_NE.shape[1]} dimensions, the quantizer was fitted on {self.directions_LE.shape[1]}"
            )
        low_L, high_L = self.range_L2.unbind(1)
        return (x_NE @ self.directions_LE.t() - low_L) / (high_L - low_L).clamp_min(1e-12)

    def encode(self, x_NE: Tensor | np.ndarray) -> Tensor:
        """Codes (N, L) int64 of features (N, E); works for items that were not in `fit`."""
        y_NL = self.transform(x_NE)
        return torch.stack(
            [
                torch.searchsorted(edges, y_NL[:, level].contiguous(), right=True)
                for level, edges in enumerate(self.edges)
            ],
            1,
        )

    @property
    def codebooks(self) -> list[Tensor]:
        """L arrays (C, L), zero outside their own direction: their sum is the place an item's codes stand for."""
        return [
            torch.nn.functional.pad(centre_C[:, None], (level, self.num_levels - level - 1))
            for level, centre_C in enumerate(self.centres)
        ]

    def save(self, path: str | Path) -> None:
        """Write the fitted quantizer as one safetensors file (settings in its header, no pickle)."""
        if self.directions_LE is None or self.range_L2 is None:
            raise TrainingError("the SVD bins are not fitted: nothing to save")
        tensors = {"directions": self.directions_LE, "range": self.range_L2}
        tensors |= {f"edges.{level}": edges for level, edges in enumerate(self.edges)}
        tensors |= {f"centres.{level}": centres for level, centres in enumerate(self.centres)}
        write_quantizer(path, _FORMAT, {"codebook_sizes": self.codebook_sizes, "seed": self.seed}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> SvdBins:
        """Read a file written by `save`; `encode` gives identical codes.

        Raises:
            ArtifactError: not a file of `save`, or its tensors do not match its settings.
        """
        settings, tensors = read_quantizer(path, _FORMAT, "SVD bins")
        quantizer = cls(**settings)
        try:
            quantizer.directions_LE, quantizer.range_L2 = tensors["directions"], tensors["range"]
            quantizer.edges = [tensors[f"edges.{level}"] for level in range(quantizer.num_levels)]
            quantizer.centres = [tensors[f"centres.{level}"] for level in range(quantizer.num_levels)]
        except KeyError as error:
            raise ArtifactError(f"{path}: tensor {error} is missing; save the quantizer again") from error
        found = tuple(len(centre_C) for centre_C in quantizer.centres)
        if found != quantizer.codebook_sizes or len(quantizer.directions_LE) != quantizer.num_levels:
            raise ArtifactError(f"{path}: bins {found}, the settings say {quantizer.codebook_sizes}")
        return quantizer
