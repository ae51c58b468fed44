"""Seeded, chunked k-means in plain torch: the one-level building block that the quantizers share.

Shape suffixes: N points, S points of a subsample, D dimensions, C codes (centroids), B points of a chunk.

Nothing here touches torch's global random state; the same generator state, data and thread count give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import TrainingError

DEFAULT_CHUNK = 4096
FEW_POINTS = ("error", "duplicate")  # what a quantizer does with fewer items than codes of a level


@dataclass(frozen=True)
class KMeansResult:
    """Outcome of `kmeans`: `centroids_CD`, a `price_C` per code (0 unless balanced), and the codes of the points.

    `codes_N` is exactly what `assign` returns for these points, centroids and prices.
    """

    centroids_CD: Tensor
    price_C: Tensor
    codes_N: Tensor
    error_N: Tensor
    iterations: int


def chunks(num_rows: int, chunk_size: int) -> Iterator[slice]:
    """Slices that cut `num_rows` rows into pieces of at most `chunk_size`."""
    return (slice(start, min(start + chunk_size, num_rows)) for start in range(0, num_rows, chunk_size))


def _first_largest(score_BC: Tensor) -> Tensor:
    """Column of the largest entry of every row, the first of equal ones."""
    if score_BC.device.type == "cpu" and score_BC.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(score_BC.numpy().argmax(1))  # the same answer nine times faster than torch's argmax
    return score_BC.argmax(1)


def nearest(
    x_ND: Tensor,
    centroids_CD: Tensor,
    price_C: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK,
    sums_CD: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Code of the nearest centroid of every point, (N,) int64; ties go to the lowest code.

    A code costs its squared distance plus its price (a power diagram; all prices 0 = plain nearest neighbour). With
    `sums_CD` the points are also added to the row of their code there, while they are in the cache: all of a k-means
    round but the division. Memory: chunk_size x C floats; `scratch` of at least that size is used for them.
    """
    offset_C = centroids_CD.pow(2).sum(1)
    if price_C is not None:
        offset_C = offset_C + price_C
    minus_half_C, centroids_DC = offset_C.mul(-0.5), centroids_CD.t()
    codes_N = torch.empty(len(x_ND), dtype=torch.int64, device=x_ND.device)
    # one buffer for all chunks: fresh pages cost as much as a GEMM
    shape = min(chunk_size, len(x_ND)), len(centroids_CD)
    score_BC = x_ND.new_empty(shape) if scratch is None else scratch.view(-1)[: shape[0] * shape[1]].view(shape)
    for rows in chunks(len(x_ND), chunk_size):
        # argmax(x.c - |c|^2/2) = argmin |x - c|^2: one GEMM, no (B, C, D) differences
        score = score_BC[: rows.stop - rows.start]
        torch.addmm(minus_half_C, x_ND[rows], centroids_DC, out=score)
        codes_B = _first_largest(score)
        codes_N[rows] = codes_B
        if sums_CD is not None:
            _add_points(sums_CD, x_ND[rows], codes_B)
    return codes_N


def squared_error(x_ND: Tensor, centroids_CD: Tensor, codes_N: Tensor, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
    """Squared distance (N,) of every point to its code, from the differences (the expanded square is wrong near 0)."""
    error_N = torch.empty(len(x_ND), dtype=x_ND.dtype, device=x_ND.device)
    for rows in chunks(len(x_ND), chunk_size):
        error_N[rows] = (x_ND[rows] - centroids_CD[codes_N[rows]]).pow(2).sum(1)
    return error_N


def assign(
    x_ND: Tensor, centroids_CD: Tensor, price_C: Tensor | None = None, chunk_size: int = DEFAULT_CHUNK
) -> tuple[Tensor, Tensor]:
    """`(nearest, squared_error)` of the points; the error does not include the price."""
    codes_N = nearest(x_ND, centroids_CD, price_C, chunk_size)
    return codes_N, squared_error(x_ND, centroids_CD, codes_N, chunk_size)


def _add_points(sums_CD: Tensor, x_BD: Tensor, codes_B: Tensor) -> None:
    if x_BD.device.type == "cpu":
        sums_CD.index_add_(0, codes_B, x_BD)
    else:  # index_add_ adds in any order on a GPU; a product does not
        sums_CD += torch.nn.functional.one_hot(codes_B, len(sums_CD)).to(x_BD.dtype).t() @ x_BD


def cluster_sums(x_ND: Tensor, codes_N: Tensor, num_codes: int, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
    """Sum of the points of each code, (C, D). Deterministic on every device."""
    sums_CD = x_ND.new_zeros(num_codes, x_ND.shape[1])
    for rows in chunks(len(x_ND), chunk_size):
        _add_points(sums_CD, x_ND[rows], codes_N[rows])
    return sums_CD


def _draw(weight_S: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices drawn with replacement in proportion to `weight_S` (uniformly when all weights are 0)."""
    cumulative_S = weight_S.double().clamp_min(0).cumsum(0).cpu()
    total = float(cumulative_S[-1])
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    if total <= 0:
        return (uniform * len(weight_S)).long()
    return torch.searchsorted(cumulative_S, uniform * total, right=True).clamp_max(len(weight_S) - 1)


def kmeans_plus_plus(x_SD: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ seeds (C, D): each is the best of 2 + ln C points drawn in proportion to their squared error."""
    trials = 2 + int(math.log(num_codes))
    norm_S = x_SD.pow(2).sum(1)
    first = int(_draw(torch.ones(len(x_SD)), 1, generator))
    chosen = [first]
    error_S = (x_SD - x_SD[first]).pow(2).sum(1)
    for _ in range(num_codes - 1):
        candidates = _draw(error_S, trials, generator).to(x_SD.device)
        distance_TS = torch.addmm(norm_S, x_SD[candidates], x_SD.t(), alpha=-2).add_(norm_S[candidates, None])
        distance_TS = torch.minimum(distance_TS.clamp_min_(0), error_S)
        best = int(distance_TS.sum(1).argmin())
        error_S = distance_TS[best]
        error_S[candidates[best]] = 0.0
        chosen.append(int(candidates[best]))
    return x_SD[torch.tensor(chosen, device=x_SD.device)].clone()


def restart_dead_codes(x_ND: Tensor, centroids_CD: Tensor, codes_N: Tensor, error_N: Tensor) -> int:
    """Move every code without points onto a point of largest error, in place; returns how many were moved.

    Farthest first: after each move the errors are lowered by the new centroid, so that equal or neighbouring points are
    not taken twice. Stops when no point has an error left (fewer distinct points than codes).
    """
    dead = (torch.bincount(codes_N, minlength=len(centroids_CD)) == 0).nonzero().flatten().tolist()
    error_N = error_N.clone()
    for moved, code in enumerate(dead):
        point = int(error_N.argmax())
        if float(error_N[point]) <= 0:
            return moved
        centroids_CD[code] = x_ND[point]
        error_N = torch.minimum(error_N, squared_error(x_ND, x_ND[point : point + 1], torch.zeros_like(codes_N)))
        error_N[point] = 0.0
    return len(dead)


def balancing_prices(
    x_ND: Tensor,
    centroids_CD: Tensor,
    price_C: Tensor,
    max_load: float,
    steps: int,
    *,
    keep_best: bool = True,
    chunk_size: int = DEFAULT_CHUNK,
) -> Tensor:
    """Prices under which no code holds more than about `max_load * N / C` points (dual ascent, growing sign steps).

    The optimal assignment under capacities is a power diagram, so the prices are all that has to be stored. The limit
    is approached, not guaranteed: far outliers that hold codes of their own can keep it out of reach. `keep_best`
    returns the prices with the smallest largest code that were met; without it the last ones, which is right between
    two rounds of k-means: prices must often rise for a while before anything moves.
    """
    limit = math.ceil(max_load * len(x_ND) / len(centroids_CD))
    codes_N, error_N = assign(x_ND, centroids_CD, price_C, chunk_size)
    step_C = torch.full_like(price_C, 0.1 * float(error_N.mean()) + 1e-12)
    last_C = torch.zeros_like(price_C)
    best_C, best_load = price_C, float("inf")
    for _ in range(steps):
        count_C = torch.bincount(codes_N, minlength=len(centroids_CD)).to(price_C.dtype)
        load = float(count_C.max())
        if load < best_load:
            best_C, best_load = price_C, load
        if load <= limit:
            return price_C
        sign_C = torch.sign(count_C - limit)
        step_C = step_C * torch.where(sign_C * last_C < 0, 0.5, torch.where(sign_C * last_C > 0, 1.2, 1.0))
        price_C = (price_C + step_C * sign_C).clamp_min(0)
        last_C = sign_C
        codes_N = nearest(x_ND, centroids_CD, price_C, chunk_size)
    return best_C if keep_best else price_C


def check_features(x_ND: Tensor | np.ndarray) -> Tensor:
    """Features as a float matrix (N, D).

    Raises:
        TrainingError: not a non-empty matrix, or NaN or infinite values (names the first row).
    """
    x_ND = torch.as_tensor(x_ND).detach().float()
    if x_ND.dim() != 2 or x_ND.shape[0] == 0 or x_ND.shape[1] == 0:
        raise TrainingError(f"features must be a non-empty (items, dimensions) matrix, got shape {tuple(x_ND.shape)}")
    # the extremes of a row are finite when all of it is; they are found several times faster than every sign of it
    bad_N = ~(torch.isfinite(x_ND.amax(1)) & torch.isfinite(x_ND.amin(1)))
    if bool(bad_N.any()):
        raise TrainingError(
            f"features of {int(bad_N.sum())} items hold NaN or infinity, first in row {int(bad_N.nonzero()[0])}; "
            "fill or drop these items"
        )
    return x_ND


def kmeans(
    x_ND: Tensor,
    num_codes: int,
    *,
    generator: torch.Generator,
    iterations: int = 25,
    subsample: int = 16384,
    chunk_size: int = DEFAULT_CHUNK,
    max_load: float | None = None,
) -> KMeansResult:
    """Lloyd's k-means from k-means++ seeds taken on a subsample, with dead codes restarted at the worst points.

    Args:
        x_ND: float points.
        num_codes: C >= 1. With fewer *distinct* points than codes the surplus codes are copies that nobody uses.
        generator: CPU generator that all draws come from.
        iterations: largest number of assignment/mean rounds; stops early when no point changes its code.
        subsample: at most this many points (but at least 16 C) for the seeding and for the prices; the rounds use all.
        max_load: when given, codes are priced so that none holds more than about this multiple of N / C points.

    Raises:
        TrainingError: no points, or no codes.
    """
    if len(x_ND) == 0 or num_codes < 1:
        raise TrainingError(f"k-means needs at least one point and one code, got {len(x_ND)} points, {num_codes} codes")
    if max_load is not None and max_load < 1:
        raise TrainingError(f"max_load is a multiple of the mean code size and must be >= 1, got {max_load}")
    seed_count = min(len(x_ND), max(subsample, 16 * num_codes))
    seeds_SD = x_ND
    if seed_count < len(x_ND):
        picked = torch.randperm(len(x_ND), generator=generator)[:seed_count].sort().values
        seeds_SD = x_ND[picked.to(x_ND.device)]
    centroids_CD = kmeans_plus_plus(seeds_SD, num_codes, generator)
    price_C = x_ND.new_zeros(num_codes)
    sums_CD = torch.zeros_like(centroids_CD)
    codes_N = nearest(x_ND, centroids_CD, None, chunk_size, sums_CD)
    done = 0
    for _ in range(iterations):
        count_C = torch.bincount(codes_N, minlength=num_codes)
        moved = 0
        if not bool(count_C.all()):
            error_N = squared_error(x_ND, centroids_CD, codes_N, chunk_size)
            moved = restart_dead_codes(x_ND, centroids_CD, codes_N, error_N)
        if max_load is not None:
            price_C = balancing_prices(
                seeds_SD, centroids_CD, price_C, max_load, 5, keep_best=False, chunk_size=chunk_size
            )
        if moved or max_load is not None:
            codes_N = nearest(x_ND, centroids_CD, price_C, chunk_size, sums_CD.zero_())
            count_C = torch.bincount(codes_N, minlength=num_codes)
        mean_CD = sums_CD / count_C.clamp_min(1)[:, None]
        centroids_CD = torch.where(count_C[:, None] > 0, mean_CD, centroids_CD)
        before_N, codes_N = codes_N, nearest(x_ND, centroids_CD, price_C, chunk_size, sums_CD.zero_())
        done += 1
        if torch.equal(before_N, codes_N):
            break
    if max_load is not None:
        price_C = balancing_prices(seeds_SD, centroids_CD, price_C, max_load, 100, chunk_size=chunk_size)
        codes_N = nearest(x_ND, centroids_CD, price_C, chunk_size)
    error_N = squared_error(x_ND, centroids_CD, codes_N, chunk_size)
    for _ in range(10):  # a move can empty a neighbour; a few rounds settle it
        if max_load is not None or restart_dead_codes(x_ND, centroids_CD, codes_N, error_N) == 0:
            break
        codes_N, error_N = assign(x_ND, centroids_CD, price_C, chunk_size)
    return KMeansResult(centroids_CD, price_C, codes_N, error_N, done)
