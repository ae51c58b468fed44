"""How a residual gets its code: balanced transport (Sinkhorn), soft and Gumbel weights, and the rotation trick.

Shape suffixes: B points of a batch, P dimensions, C codes, N points of a catalogue.

Plain functions of distances and vectors; `codebook_level` picks one by `assignment`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...errors import TrainingError

KERNEL_RANGE = 600.0  # exp(-range) still is a normal float64: below it the fast form of Sinkhorn is exact enough


def code_distances(x_BP: Tensor, codebook_CP: Tensor) -> Tensor:
    """Squared distances (B, C) of every point to every code, with gradients into both."""
    product_BC = x_BP @ codebook_CP.t()
    return (x_BP.pow(2).sum(1, keepdim=True) - 2 * product_BC + codebook_CP.pow(2).sum(1)).clamp_min(0)


def relative_distances(distance_BC: Tensor) -> Tensor:
    """Distances divided by their mean (a constant to the gradient), so that one temperature fits every level."""
    return distance_BC / distance_BC.detach().mean().clamp_min(torch.finfo(distance_BC.dtype).tiny)


def sinkhorn(cost_BC: Tensor, epsilon: float, iterations: int = 50) -> Tensor:
    """Entropic optimal transport between the points and the codes, both with equal shares (arXiv 1306.0895).

    Args:
        cost_BC: any cost, for example squared distances.
        epsilon: weight of the entropy, in the units of the cost. Large = every point is spread evenly over the codes;
            towards 0 = the cheapest balanced assignment.
        iterations: rounds of column and row scaling.

    Returns:
        The plan (B, C) in float64: rows sum to exactly 1 / B, columns to 1 / C in the limit of many iterations.

    Raises:
        TrainingError: epsilon not positive, or a cost that is not finite.

    Example:
        >>> plan = sinkhorn(torch.tensor([[0.0, 1.0], [0.1, 3.0]]), epsilon=0.5)
        >>> plan.argmax(1).tolist(), [round(float(share), 3) for share in plan.sum(0)]
        ([1, 0], [0.5, 0.5])
    """
    if epsilon <= 0:
        raise TrainingError(f"sinkhorn epsilon must be positive, got {epsilon}")
    cost_BC = cost_BC.detach().double()
    cost_BC = (cost_BC - cost_BC.min(1, keepdim=True).values) / epsilon  # a shift per row changes nothing
    if not bool(torch.isfinite(cost_BC).all()):
        raise TrainingError("sinkhorn got a cost that is NaN or infinite: check the features for outliers")
    log_b, log_c = -math.log(len(cost_BC)), -math.log(cost_BC.shape[1])
    if float(cost_BC.max()) < KERNEL_RANGE:  # two matrix-vector products a round
        kernel_BC = torch.exp(-cost_BC)
        row_B = kernel_BC.new_ones(len(cost_BC))
        for _ in range(iterations):
            column_C = math.exp(log_c) / (row_B @ kernel_BC)
            row_B = math.exp(log_b) / (kernel_BC @ column_C)
        return row_B[:, None] * kernel_BC * column_C
    row_log_B = cost_BC.new_zeros(len(cost_BC))
    for _ in range(iterations):
        column_log_C = log_c - torch.logsumexp(row_log_B[:, None] - cost_BC, 0)
        row_log_B = log_b - torch.logsumexp(column_log_C - cost_BC, 1)
    return torch.exp(row_log_B[:, None] + column_log_C - cost_BC)


def sinkhorn_codes(x_BP: Tensor, codebook_CP: Tensor, epsilon: float, iterations: int = 50) -> Tensor:
    """Code (B,) with the largest share of each point in the balanced plan.

    Squared distances are scaled to a width of 2 before `epsilon` counts, so that LC-Rec's and LETTER's .003 on distances
    in [-1, 1] means the same here (arXiv 2311.09049, 2405.07314).
    """
    distance_BC = code_distances(x_BP.detach(), codebook_CP.detach())
    width = (distance_BC.max() - distance_BC.min()).clamp_min(torch.finfo(distance_BC.dtype).tiny)
    return sinkhorn(distance_BC * (2 / width), epsilon, iterations).argmax(1)


def soft_weights(distance_BC: Tensor, temperature: float, gumbel: bool = False) -> Tensor:
    """Weights (B, C) of the codes: softmax(-d / (mean d * temperature)), plus Gumbel noise when `gumbel`.

    The largest weight of the noisy form is an exact sample of the noise-free distribution, and the noise cools with the
    temperature: towards 0 both forms become the nearest code.
    """
    logits_BC = -relative_distances(distance_BC) / temperature
    if gumbel:
        tiny = torch.finfo(logits_BC.dtype).tiny
        logits_BC = logits_BC - torch.empty_like(logits_BC).exponential_().clamp_min(tiny).log()
    return logits_BC.softmax(1)


def harden(weight_BC: Tensor) -> tuple[Tensor, Tensor]:
    """`(codes_B, weight_BC)`: the largest weight as a one-hot whose gradient is that of the weights."""
    codes_B = weight_BC.detach().argmax(1)
    hard_BC = nn.functional.one_hot(codes_B, weight_BC.shape[1]).to(weight_BC.dtype)
    return codes_B, hard_BC + (weight_BC - weight_BC.detach())


def straight_through(value: Tensor, through: Tensor) -> Tensor:
    """`value` going forward, the gradient of `through` going back (arXiv 1308.3432)."""
    return through + (value - through).detach()


def rotate_through(value_BQ: Tensor, through_BQ: Tensor) -> Tensor:
    """`value` going forward; back, the gradient turned and scaled as `through` is onto `value` (arXiv 2410.06424).

    value = s R through with the rotation R in the plane of the two vectors and the scale s held constant, so that the
    angle between gradient and vector survives. For equal vectors R = 1 and s = 1: the straight-through estimator.
    """
    tiny = torch.finfo(through_BQ.dtype).eps
    with torch.no_grad():
        norm_B1 = through_BQ.norm(dim=1, keepdim=True).clamp_min(tiny)
        scale_B1 = value_BQ.norm(dim=1, keepdim=True) / norm_B1
        from_BQ = through_BQ / norm_B1
        to_BQ = value_BQ / value_BQ.norm(dim=1, keepdim=True).clamp_min(tiny)
        middle_BQ = from_BQ + to_BQ
        middle_BQ = middle_BQ / middle_BQ.norm(dim=1, keepdim=True).clamp_min(tiny)
    along_B1 = (through_BQ * middle_BQ).sum(1, keepdim=True)
    rotated_BQ = through_BQ - 2 * along_B1 * middle_BQ + 2 * (through_BQ * from_BQ).sum(1, keepdim=True) * to_BQ
    return scale_B1 * rotated_BQ


GRADIENT_PATHS = {"straight_through": straight_through, "rotation": rotate_through}
