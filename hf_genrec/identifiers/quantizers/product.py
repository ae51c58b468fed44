"""Product quantization: long unordered codes, one digit per slice of the feature space (as in RPG, arXiv 2506.05781).

PQ (Jegou et al., 2011) cuts a vector into L slices and clusters each on its own, so an item's L digits are independent
of each other and none is "above" another. OPQ (Ge et al., arXiv 1312.4132) first turns the space by a rotation fitted to
the codebooks, so that slices carry equal shares of the information and depend less on each other.

Shape suffixes: N items, D feature dimensions, P projected dimensions (P = D without `pca_dim`), S dimensions of a slice,
L levels (slices, digits), C codes of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import ArtifactError, IncompatibleComponentsError, TrainingError
from ..features import PrincipalComponents
from .kmeans import (
    DEFAULT_CHUNK,
    FEW_POINTS,
    assign,
    check_features,
    cluster_sums,
    kmeans,
    nearest,
    restart_dead_codes,
)
from .quantizer_file import read_quantizer, write_quantizer

_FORMAT = "hf_genrec.product_quantizer.1"


class ProductQuantizer:
    """Product quantizer, with or without a fitted rotation: fitted once, then a pure function from features to codes.

    Args:
        codebook_sizes: codes per digit, e.g. `[256] * 32`; as many slices of the (projected) space are cut.
        rotate: fit a rotation before the cut (OPQ). False is plain PQ.
        rounds: alternations of rotation (orthogonal Procrustes) and codebooks (k-means steps); only with `rotate`.
        seed: all draws come from an own generator; torch's global random state is never read or changed.
        iterations: largest number of k-means rounds per slice.
        subsample: points used for the k-means++ seeding.
        chunk_size: points whose distances are held at once (memory: chunk_size x C floats).
        pca_dim: project the features onto this many principal components first (None: only centre them).
        whiten: also scale the components to unit variance (RPG whitens its text vectors); needs `pca_dim`.
        few_points: fewer items than codes of a level: `"error"`, or `"duplicate"` (surplus codes stay unused copies).

    Where P is no multiple of L the first slices are one dimension wider.

    Relations: one level is plain k-means; `rotate=False` is k-means in each slice on its own; `rounds=0` with `rotate`
    keeps the first rotation (principal components dealt out so that slices have equal products of variances).

    Example:
        >>> import torch
        >>> corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> quantizer = ProductQuantizer([2, 2], rotate=False).fit(corners)
        >>> codes = quantizer.encode(corners)
        >>> codes.shape, len(set(map(tuple, codes.tolist())))
        (torch.Size([4, 2]), 4)
        >>> torch.allclose(quantizer.decode(codes), corners)
        True
    """

    def __init__(
        self,
        codebook_sizes: Sequence[int],
        *,
        rotate: bool = True,
        rounds: int = 20,
        seed: int = 0,
        iterations: int = 25,
        subsample: int = 16384,
        chunk_size: int = DEFAULT_CHUNK,
        pca_dim: int | None = None,
        whiten: bool = False,
        few_points: str = "error",
    ) -> None:
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        if not self.codebook_sizes or min(self.codebook_sizes) < 1:
            raise IncompatibleComponentsError(f"codebook_sizes must be positive, one per level, got {codebook_sizes}")
        if few_points not in FEW_POINTS:
            raise IncompatibleComponentsError(f"few_points must be one of {FEW_POINTS}, got {few_points!r}")
        if whiten and pca_dim is None:
            raise IncompatibleComponentsError("whiten=True needs pca_dim: whitening keeps only the leading components")
        if rounds < 0:
            raise IncompatibleComponentsError(f"rounds must be 0 or more, got {rounds}")
        self.rotate, self.rounds, self.seed, self.iterations = rotate, rounds, seed, iterations
        self.subsample, self.chunk_size = subsample, chunk_size
        self.pca_dim, self.whiten, self.few_points = pca_dim, whiten, few_points
        self.codebooks: list[Tensor] = []
        self.rotation_PP: Tensor | None = None
        self.projection: PrincipalComponents | None = None

    @property
    def num_levels(self) -> int:
        """L, the number of digits of an item."""
        return len(self.codebook_sizes)

    def fit(self, x_ND: Tensor | np.ndarray) -> ProductQuantizer:
        """Learn rotation and codebooks from features (N, D) and return self.

        Raises:
            TrainingError: not a matrix, NaN or infinite values (names the row), fewer dimensions than levels, or fewer
                items than codes while `few_points="error"`.
        """
        x_ND = check_features(x_ND)
        if self.few_points == "error" and len(x_ND) < max(self.codebook_sizes):
            raise TrainingError(
                f"product quantizer: {len(x_ND)} items cannot fill a codebook of {max(self.codebook_sizes)} codes; use "
                f"codebook_sizes of at most {len(x_ND)}, or few_points='duplicate' to leave the surplus codes unused"
            )
        self.projection = PrincipalComponents.fit(x_ND, self.pca_dim, whiten=self.whiten)
        x_NP = self.projection.apply(x_ND)
        if x_NP.shape[1] < self.num_levels:
            raise TrainingError(
                f"product quantizer: {x_NP.shape[1]} dimensions cannot be cut into {self.num_levels} slices; use at "
                f"most {x_NP.shape[1]} codebooks, or features of more dimensions (pca_dim is {self.pca_dim})"
            )
        generator = torch.Generator().manual_seed(self.seed)
        self.rotation_PP = balanced_rotation(x_NP, self.num_levels) if self.rotate else None
        rotated_NP = x_NP if self.rotation_PP is None else x_NP @ self.rotation_PP
        self.codebooks = [
            kmeans(
                slice_NS,
                size,
                generator=generator,
                iterations=self.iterations,
                subsample=self.subsample,
                chunk_size=self.chunk_size,
            ).centroids_CD
            for slice_NS, size in zip(self._slices(rotated_NP), self.codebook_sizes, strict=True)
        ]
        if self.rotation_PP is not None and self.rounds:
            for _ in range(self.rounds):
                self.rotation_PP = procrustes(x_NP, self._look_up(self._assign(rotated_NP)))
                rotated_NP = x_NP @ self.rotation_PP
                self._improve(rotated_NP, 1)
            self._improve(rotated_NP, self.iterations)
        return self

    def _improve(self, rotated_NP: Tensor, iterations: int) -> None:
        """At most so many k-means rounds per slice, from the codebooks as they are; unused codes are moved."""
        for level, slice_NS in enumerate(self._slices(rotated_NP)):
            centroids_CS = self.codebooks[level].clone()
            codes_N, error_N = assign(slice_NS, centroids_CS, None, self.chunk_size)
            for _ in range(iterations):
                if restart_dead_codes(slice_NS, centroids_CS, codes_N, error_N):
                    codes_N = nearest(slice_NS, centroids_CS, None, self.chunk_size)
                count_C = torch.bincount(codes_N, minlength=len(centroids_CS))
                mean_CS = cluster_sums(slice_NS, codes_N, len(centroids_CS), self.chunk_size)
                mean_CS = mean_CS / count_C.clamp_min(1)[:, None]
                centroids_CS = torch.where(count_C[:, None] > 0, mean_CS, centroids_CS)
                before_N, (codes_N, error_N) = codes_N, assign(slice_NS, centroids_CS, None, self.chunk_size)
                if torch.equal(before_N, codes_N):
                    break
            self.codebooks[level] = centroids_CS

    def _slices(self, x_NP: Tensor) -> tuple[Tensor, ...]:
        return torch.tensor_split(x_NP, self.num_levels, dim=1)

    def _assign(self, rotated_NP: Tensor) -> Tensor:
        codes = [
            nearest(slice_NS.contiguous(), codebook_CS.to(rotated_NP), None, self.chunk_size)
            for slice_NS, codebook_CS in zip(self._slices(rotated_NP), self.codebooks, strict=True)
        ]
        return torch.stack(codes, 1)

    def _look_up(self, codes_NL: Tensor) -> Tensor:
        return torch.cat([book_CS[codes_NL[:, level]] for level, book_CS in enumerate(self.codebooks)], dim=1)

    def transform(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Features in the space of the codebooks, (N, P): centred, projected with `pca_dim`, rotated with `rotate`."""
        x_NP = self._fitted().apply(check_features(x_ND))
        return x_NP if self.rotation_PP is None else x_NP @ self.rotation_PP.to(x_NP)

    def encode(self, x_ND: Tensor | np.ndarray) -> Tensor:
        """Codes (N, L) int64 of features (N, D); works for items that were not in `fit`."""
        return self._assign(self.transform(x_ND))

    def decode(self, codes_NL: Tensor | np.ndarray) -> Tensor:
        """Features (N, D) that full codes (N, L) stand for."""
        projection = self._fitted()
        codes_NL = torch.as_tensor(codes_NL).long()
        if codes_NL.dim() != 2 or codes_NL.shape[1] != self.num_levels:
            raise IncompatibleComponentsError(f"codes must be (N, {self.num_levels}), got {tuple(codes_NL.shape)}")
        x_NP = self._look_up(codes_NL)
        return projection.invert(x_NP if self.rotation_PP is None else x_NP @ self.rotation_PP.t())

    def padded_codebooks(self) -> list[Tensor]:
        """Codebooks (C, P) that are zero outside their own slice: the sum over the levels is the quantized vector.

        What additive code (`resolve_collisions(..., "next_nearest")`) expects; memory L times that of `codebooks`.
        """
        width = sum(book_CS.shape[1] for book_CS in self.codebooks)
        padded, first = [], 0
        for book_CS in self.codebooks:
            last = first + book_CS.shape[1]
            padded.append(torch.nn.functional.pad(book_CS, (first, width - last)))
            first = last
        return padded

    def save(self, path: str | Path) -> None:
        """Write the fitted quantizer as one safetensors file (settings in its header, no pickle)."""
        tensors = {f"projection.{name}": value for name, value in self._fitted().tensors().items()}
        for level, codebook_CS in enumerate(self.codebooks):
            tensors[f"codebook.{level}"] = codebook_CS
        if self.rotation_PP is not None:
            tensors["rotation"] = self.rotation_PP
        settings = {
            "codebook_sizes": self.codebook_sizes,
            "rotate": self.rotate,
            "rounds": self.rounds,
            "seed": self.seed,
            "iterations": self.iterations,
            "subsample": self.subsample,
            "chunk_size": self.chunk_size,
            "pca_dim": self.pca_dim,
            "whiten": self.whiten,
            "few_points": self.few_points,
        }
        write_quantizer(path, _FORMAT, settings, tensors)

    @classmethod
    def load(cls, path: str | Path) -> ProductQuantizer:
        """Read a file written by `save`; codes of the same features are identical.

        Raises:
            ArtifactError: not a file of `save`, or its tensors do not match its settings.
        """
        settings, tensors = read_quantizer(path, _FORMAT, "product quantizer")
        quantizer = cls(**settings)
        try:
            quantizer.codebooks = [tensors[f"codebook.{level}"] for level in range(quantizer.num_levels)]
            quantizer.rotation_PP = tensors["rotation"] if quantizer.rotate else None
            quantizer.projection = PrincipalComponents.from_tensors(
                {name.removeprefix("projection."): t for name, t in tensors.items() if name.startswith("projection.")}
            )
        except KeyError as error:
            raise ArtifactError(f"{path}: tensor {error} is missing; save the quantizer again") from error
        found = tuple(len(codebook_CS) for codebook_CS in quantizer.codebooks)
        if found != quantizer.codebook_sizes:
            raise ArtifactError(f"{path}: codebooks of {found} codes, settings say {quantizer.codebook_sizes}")
        width = sum(codebook_CS.shape[1] for codebook_CS in quantizer.codebooks)
        if quantizer.rotation_PP is not None and quantizer.rotation_PP.shape != (width, width):
            raise ArtifactError(
                f"{path}: rotation of shape {tuple(quantizer.rotation_PP.shape)}, the codebooks have {width} dimensions"
            )
        return quantizer

    def _fitted(self) -> PrincipalComponents:
        if self.projection is None:
            raise TrainingError("the product quantizer is not fitted: call fit(features) or load(path) first")
        return self.projection


def balanced_rotation(x_NP: Tensor, num_slices: int) -> Tensor:
    """Principal components (P, P) dealt out to the slices so that the products of their variances are about equal.

    The best rotation for Gaussian data (eigenvalue allocation of arXiv 1312.4132): largest variance first, each to the
    slice that has room and the smallest product so far. Columns are orthonormal; rotate with `x @ result`.
    """
    x_NP = x_NP.double() - x_NP.double().mean(0)
    values_P, vectors_PP = torch.linalg.eigh(x_NP.t() @ x_NP / max(len(x_NP) - 1, 1))
    peak_P = vectors_PP.gather(0, vectors_PP.abs().argmax(0, keepdim=True))
    vectors_PP = vectors_PP * torch.where(peak_P < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    logs = values_P.clamp_min(float(values_P.max()) * 1e-12 + 1e-30).log()
    logs = logs - logs.min()  # factors below one would make a slice look emptier for getting a component
    room = [len(part) for part in np.array_split(np.arange(len(values_P)), num_slices)]
    chosen: list[list[int]] = [[] for _ in room]
    load = [0.0] * num_slices
    for component in reversed(range(len(values_P))):
        free = [part for part in range(num_slices) if len(chosen[part]) < room[part]]
        part = min(free, key=lambda one: (load[one], one))
        chosen[part].append(component)
        load[part] += float(logs[component])
    return vectors_PP[:, [component for part in chosen for component in part]].float().contiguous()


def procrustes(x_NP: Tensor, target_NP: Tensor) -> Tensor:
    """The orthogonal R (P, P) that minimises ||x R - target||: U V^T of the singular vectors of x^T target."""
    left_PP, _, right_PP = torch.linalg.svd(x_NP.double().t() @ target_NP.double())
    return (left_PP @ right_PP).float().contiguous()
