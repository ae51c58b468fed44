"""Balanced k-means: clusters whose sizes differ by at most one (the codes of OneRec, arXiv 2502.18965).

Shape suffixes: N points, D dimensions, C codes, M points that may move, O codes with room.

Prices on the codes (`balancing_prices`) bring the sizes near to equal; what is left over moves to the codes with room
that cost it least. The sizes are exact for the points given; for further points the priced codes are a rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kmeans import DEFAULT_CHUNK, KMeansResult, balancing_prices, chunks, cluster_sums, kmeans, nearest, squared_error


def equal_quotas(codes_N: Tensor, num_codes: int) -> Tensor:
    """Sizes (C,) that differ by at most one and add up to N; the codes that draw most points get the one more."""
    low, extra = divmod(len(codes_N), num_codes)
    quota_C = torch.full((num_codes,), low, dtype=torch.int64, device=codes_N.device)
    drawn_C = torch.bincount(codes_N, minlength=num_codes)
    quota_C[drawn_C.argsort(descending=True, stable=True)[:extra]] += 1
    return quota_C


def _rank_in_code(code_M: Tensor, loss_M: Tensor) -> Tensor:
    """0, 1, 2, ... among the points of every code, by rising loss (then by position)."""
    order_M = loss_M.argsort(stable=True)
    order_M = order_M[code_M[order_M].argsort(stable=True)]
    sorted_M = code_M[order_M]
    position_M = torch.arange(len(code_M), device=code_M.device)
    new_M = torch.ones_like(sorted_M, dtype=torch.bool)
    new_M[1:] = sorted_M[1:] != sorted_M[:-1]
    rank_M = torch.empty_like(code_M)
    rank_M[order_M] = position_M - torch.where(new_M, position_M, 0).cummax(0).values
    return rank_M


def balanced_codes(x_ND: Tensor, centroids_CD: Tensor, price_C: Tensor, chunk_size: int = DEFAULT_CHUNK) -> Tensor:
    """Codes (N,) whose sizes are the `equal_quotas`: priced nearest codes, then the cheapest moves out of full ones.

    Every round moves the points that lose least, and ends a surplus or fills up a code, so there are at most C rounds.
    Memory: chunk_size x C floats.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
        >>> balanced_codes(x, torch.tensor([[0.0], [5.0]]), torch.zeros(2)).tolist()
        [0, 0, 1, 1]
    """
    codes_N = nearest(x_ND, centroids_CD, price_C, chunk_size)
    quota_C = equal_quotas(codes_N, len(centroids_CD))
    offset_C = centroids_CD.pow(2).sum(1) + price_C
    while True:
        surplus_C = torch.bincount(codes_N, minlength=len(centroids_CD)) - quota_C
        moving_M = (surplus_C[codes_N] > 0).nonzero().flatten()
        if len(moving_M) == 0:
            return codes_N
        open_O = (surplus_C < 0).nonzero().flatten()
        target_M, loss_M = torch.empty_like(moving_M), x_ND.new_empty(len(moving_M))
        for rows in chunks(len(moving_M), chunk_size):
            x_BD, own_B = x_ND[moving_M[rows]], codes_N[moving_M[rows]]
            cost_BO = torch.addmm(offset_C[open_O], x_BD, centroids_CD[open_O].t(), alpha=-2)
            least_B = cost_BO.min(1)
            target_M[rows] = open_O[least_B.indices]
            loss_M[rows] = least_B.values - (offset_C[own_B] - 2 * (x_BD * centroids_CD[own_B]).sum(1))
        own_M = codes_N[moving_M]
        leaves = (_rank_in_code(own_M, loss_M) < surplus_C[own_M]).nonzero().flatten()
        moving_M, target_M, loss_M = moving_M[leaves], target_M[leaves], loss_M[leaves]
        fits = _rank_in_code(target_M, loss_M) < -surplus_C[target_M]
        codes_N[moving_M[fits]] = target_M[fits]


def balanced_kmeans(
    x_ND: Tensor,
    num_codes: int,
    *,
    generator: torch.Generator,
    iterations: int = 25,
    subsample: int = 16384,
    chunk_size: int = DEFAULT_CHUNK,
) -> KMeansResult:
    """K-means whose clusters differ in size by at most one: `codes_N` holds N // C or N // C + 1 points of every code.

    Starts from k-means with prices (`max_load=1`), then alternates balanced codes and means. Unlike `kmeans`,
    `codes_N` is not quite what `assign` returns for the prices: that is the rule for points that come later, under which
    the sizes are near to equal. With fewer points than codes every point has its own code.

    Raises:
        TrainingError: no points, or no codes.
    """
    start = kmeans(
        x_ND,
        num_codes,
        generator=generator,
        iterations=iterations,
        subsample=subsample,
        chunk_size=chunk_size,
        max_load=1.0,
    )
    centroids_CD, price_C = start.centroids_CD, start.price_C
    codes_N = balanced_codes(x_ND, centroids_CD, price_C, chunk_size)
    done = start.iterations
    for _ in range(iterations):
        count_C = torch.bincount(codes_N, minlength=num_codes)
        mean_CD = cluster_sums(x_ND, codes_N, num_codes, chunk_size) / count_C.clamp_min(1)[:, None]
        centroids_CD = torch.where(count_C[:, None] > 0, mean_CD, centroids_CD)
        price_C = balancing_prices(x_ND, centroids_CD, price_C, 1.0, 5, chunk_size=chunk_size)
        before_N, codes_N = codes_N, balanced_codes(x_ND, centroids_CD, price_C, chunk_size)
        done += 1
        if torch.equal(before_N, codes_N):
            break
    error_N = squared_error(x_ND, centroids_CD, codes_N, chunk_size)
    return KMeansResult(centroids_CD, price_C, codes_N, error_N, done)
