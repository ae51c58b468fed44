"""Terms that bring two distributions together: divergences of code logits and the maximum mean discrepancy.

Shape suffixes: B items of a batch, C codes of a level (or classes), X and Y rows of two samples, D dimensions, K kernel
bandwidths, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import IncompatibleComponentsError, TrainingError

BANDWIDTH_STEPS = (0.25, 0.5, 1.0, 2.0, 4.0)


def code_divergence(
    logits_BC: Tensor, target_BC: Tensor, *, temperature: float = 1.0, symmetric: bool = True
) -> Tensor:
    """Mean over items of KL(target || p) + KL(p || target), or of KL(target || p) alone.

    Args:
        logits_BC: logits of p, for example minus the squared distances of `VQAutoencoder.level_distances`.
        target_BC: logits of the target. Detach it for a teacher.
        temperature: divides both logits. Gradients shrink with its square: multiply the loss by it (as distillation,
            arXiv 1503.02531, does) where that matters.
        symmetric: ETEGRec's alignment of sequence and item (SIA, arXiv 2409.05546); False is PRORec's distillation
            (arXiv 2502.06269, form unverified: our choice).

    Returns:
        Scalar >= 0, in nats; 0 exactly where the two distributions agree.

    Raises:
        IncompatibleComponentsError: shapes that differ.
        TrainingError: a temperature that is not positive.

    Example:
        >>> p = torch.tensor([[0.0, 0.0]])
        >>> q = torch.tensor([[0.0, 3.0]]).log1p()  # (1/5, 4/5)
        >>> round(float(code_divergence(p, q)), 4)  # .3 log 4
        0.4159
    """
    if logits_BC.shape != target_BC.shape:
        raise IncompatibleComponentsError(
            f"code_divergence needs logits of one shape, got {tuple(logits_BC.shape)} and {tuple(target_BC.shape)}"
        )
    if temperature <= 0:
        raise TrainingError(f"code_divergence temperature must be positive, got {temperature}")
    log_p_BC = (logits_BC / temperature).log_softmax(-1)
    log_q_BC = (target_BC / temperature).log_softmax(-1)
    gap_BC = log_q_BC - log_p_BC
    weight_BC = log_q_BC.exp() - log_p_BC.exp() if symmetric else log_q_BC.exp()
    return (weight_BC * gap_BC).sum(-1).mean()


def level_divergence(
    logits: Sequence[Tensor], targets: Sequence[Tensor], *, temperature: float = 1.0, symmetric: bool = True
) -> Tensor:
    """Sum of `code_divergence` over the levels (L tensors (B, C_l) each): the SIA term of ETEGRec.

    Raises:
        IncompatibleComponentsError: different numbers of levels, or none.
    """
    if not logits or len(logits) != len(targets):
        raise IncompatibleComponentsError(f"level_divergence got {len(logits)} and {len(targets)} levels of logits")
    terms = [
        code_divergence(logits_BC, target_BC, temperature=temperature, symmetric=symmetric)
        for logits_BC, target_BC in zip(logits, targets)
    ]
    return torch.stack(terms).sum()


def mmd(x_XD: Tensor, y_YD: Tensor, *, bandwidths: Sequence[float] | None = None, unbiased: bool = False) -> Tensor:
    """Squared maximum mean discrepancy of two samples with a mean of Gaussian kernels (Gretton et al., 2012).

        mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(u, v) = mean_h exp(-|u - v|^2 / (2 h^2))

    The distance per layer of IDLE-Adapter (arXiv 2411.18262; kernel unverified: our choice).

    Args:
        x_XD, y_YD: the samples; their sizes may differ.
        bandwidths: h. None = the median distance of the joined sample (a constant to the gradient) times
            1/4, 1/2, 1, 2, 4.
        unbiased: leave out the pairs of a row with itself. The mean over samples of equal distributions is then 0, and
            single values may be negative; the plain form is >= 0, and 0 when the samples are equal.

    Raises:
        IncompatibleComponentsError: not two matrices of one width.
        TrainingError: no rows (or one, if unbiased), or bandwidths that are not positive.
    """
    if x_XD.dim() != 2 or y_YD.dim() != 2 or x_XD.shape[1] != y_YD.shape[1]:
        raise IncompatibleComponentsError(
            f"mmd needs two matrices of one width, got {tuple(x_XD.shape)} and {tuple(y_YD.shape)}"
        )
    if min(len(x_XD), len(y_YD)) < 1 + unbiased:
        raise TrainingError(f"mmd needs {1 + unbiased} or more rows on both sides, got {len(x_XD)} and {len(y_YD)}")
    joined_ND = torch.cat([x_XD, y_YD])
    square_NN = (joined_ND[:, None] - joined_ND[None]).pow(2).sum(2)  # exact zeros for equal rows
    if bandwidths is None:
        rows, columns = torch.triu_indices(len(joined_ND), len(joined_ND), offset=1, device=joined_ND.device)
        middle = square_NN.detach()[rows, columns].median().clamp_min(torch.finfo(square_NN.dtype).eps)
        wide_K = middle * square_NN.new_tensor(BANDWIDTH_STEPS).pow(2)
    else:
        if not bandwidths or min(bandwidths) <= 0:
            raise TrainingError(f"mmd bandwidths must be positive, got {list(bandwidths)}")
        wide_K = square_NN.new_tensor(list(bandwidths)).pow(2)
    kernel_NN = torch.stack([torch.exp(-square_NN / (2 * wide)) for wide in wide_K]).mean(0)
    first, second = len(x_XD), len(y_YD)
    within_x, within_y = kernel_NN[:first, :first], kernel_NN[first:, first:]
    if unbiased:
        mean_x = (within_x.sum() - within_x.diagonal().sum()) / (first * (first - 1))
        mean_y = (within_y.sum() - within_y.diagonal().sum()) / (second * (second - 1))
    else:
        mean_x, mean_y = within_x.mean(), within_y.mean()
    return mean_x + mean_y - 2 * kernel_NN[:first, first:].mean()
