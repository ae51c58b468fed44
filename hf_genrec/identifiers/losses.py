"""Contrast between pairs of vectors: one InfoNCE whose views, negatives and masks are chosen by the caller (1807.03748).

Shape suffixes: B pairs of a batch, D dimensions, W pairs of all processes (W = B without `gather`), M further negatives,
L levels, P dimensions of a code vector.

The contrastive losses of the published tokenizers differ in their views, not in their formula:

    system (arXiv)            view_a                       view_b                               options
    LETTER (2405.07314)       quantized latent             collaborative vector                 "dot", temperature 1
    CoST (2404.14774)         reconstruction               its input
    COSETTE (2508.14910),
      PLUM (2510.07784)       quantized latent             the same of a co-occurring item      symmetric
    UTGRec (2504.04405)       code vector of one position  the same of a co-occurring item      one call per position
    FORGE (2509.20904)        reconstruction of a          reconstruction of b, input b, input a  three calls, symmetric
    HiGR (2512.24787)         sum of the first l codes     the same of a co-occurring item      one call per l < L
    HiD-VAE (2508.04618)      first l codes side by side   projected text of the level-l tag    one call per level
    ETEGRec (2409.05546)      decoder state                reconstruction of the target         symmetric
    MMQ-v2 (2510.25622)       content vector               behaviour vector                     weight by richness

`VQOutput.quantized` and `.code_vectors` are such views.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import IncompatibleComponentsError, TrainingError

SIMILARITIES = ("cosine", "dot")


def gather_rows(x_BD: Tensor) -> Tensor:
    """Rows of all processes (W, D), own process's rows at `rank * B`; gradients flow back to their own process.

    Without a process group of two or more: the rows themselves. Every process must bring the same number of rows.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x_BD
    if not x_BD.is_floating_point():
        parts = [torch.empty_like(x_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_BD.contiguous())
        return torch.cat(parts)
    from torch.distributed.nn.functional import all_gather  # the only form that sums gradients over processes

    return torch.cat(all_gather(x_BD.contiguous()))


def same_target_mask(targets_B: Tensor, others_W: Tensor | None = None) -> Tensor:
    """(B, W) bool: pairs of rows with equal targets, which are no negatives of each other (trap: false negatives)."""
    return targets_B[:, None] == (targets_B if others_W is None else others_W)[None, :]


def near_duplicate_mask(view_BD: Tensor, threshold: float = 0.99, others_WD: Tensor | None = None) -> Tensor:
    """(B, W) bool: rows whose cosine exceeds the threshold (HLLM's rule, arXiv 2409.12740)."""
    others_WD = view_BD if others_WD is None else others_WD
    return F.normalize(view_BD.detach(), dim=1) @ F.normalize(others_WD.detach(), dim=1).t() > threshold


def pair_nce(
    view_a: Tensor,
    view_b: Tensor,
    *,
    temperature: float | Tensor,
    negatives: Tensor | None = None,
    mask: Tensor | None = None,
    targets: Tensor | None = None,
    symmetric: bool = False,
    similarity: str = "cosine",
    weight: Tensor | None = None,
    in_batch: bool = True,
    gather: bool = False,
) -> Tensor:
    """InfoNCE: row i of `view_a` has to find row i of `view_b` among the rows of `view_b` and the further negatives.

        loss = mean_i w_i * -log( exp(s(a_i, b_i) / t) / sum_{j not masked} exp(s(a_i, b_j) / t) )

    Args:
        view_a, view_b: (B, D) matching rows.
        temperature: t > 0; a tensor may be learned (a scale g is t = 1 / g).
        negatives: (M, D) shared, or (B, M, D) of each row, in the space of `view_b`.
        mask: bool, (B, W) or (B, W + M): True leaves a column out of the denominator. The own pair always stays.
        targets: (B,) ids; columns with the row's target are left out as false negatives, here and across processes.
        symmetric: mean of both directions. Further negatives take part in the direction a -> b only.
        similarity: `"cosine"` or `"dot"`.
        weight: (B,) factor of each pair's term. The sum is divided by B, so small weights damp the whole loss.
        in_batch: False = only `negatives` are contrasted against.
        gather: contrast against the rows of all processes (equal B everywhere). The mean of the processes' losses, with
            the mean gradient that DistributedDataParallel takes, is that of one process with all rows.

    Returns:
        Scalar; 0 when nothing is left to contrast against (one pair without negatives, or all masked).

    Raises:
        IncompatibleComponentsError: shapes that do not fit, an unknown similarity.
        TrainingError: a temperature that is not positive.

    Relations: with `similarity="dot"`, temperature 1 and no masks it is the cross-entropy of a @ b^T against the
    diagonal. Towards temperature 0, t * loss becomes the hinge max(0, best negative - positive).

    Example:
        >>> a = torch.eye(2)
        >>> round(float(pair_nce(a, a, temperature=1.0)), 4)  # log(1 + exp(-1))
        0.3133
        >>> float(pair_nce(a, a, temperature=1.0, targets=torch.tensor([7, 7])))
        0.0
    """
    if view_a.dim() != 2 or view_a.shape != view_b.shape:
        raise IncompatibleComponentsError(
            f"pair_nce needs two views of one shape (pairs, dimensions), got {tuple(view_a.shape)} and "
            f"{tuple(view_b.shape)}: project one of them"
        )
    if similarity not in SIMILARITIES:
        raise IncompatibleComponentsError(f"pair_nce similarity must be in {SIMILARITIES}, got {similarity!r}")
    value = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
    if value <= 0:
        raise TrainingError(f"pair_nce temperature must be positive, got {value}")
    if not in_batch and negatives is None:
        raise IncompatibleComponentsError("pair_nce with in_batch=False needs negatives")
    if similarity == "cosine":
        view_a, view_b = F.normalize(view_a, dim=-1), F.normalize(view_b, dim=-1)
        negatives = None if negatives is None else F.normalize(negatives, dim=-1)
    batch = len(view_a)
    b_WD = gather_rows(view_b) if gather else view_b
    start = batch * dist.get_rank() if len(b_WD) > batch else 0
    own_B = torch.arange(start, start + batch, device=view_a.device)
    false_BW = torch.zeros(batch, len(b_WD), dtype=torch.bool, device=view_a.device)
    if targets is not None:
        if targets.shape != (batch,):
            raise IncompatibleComponentsError(f"pair_nce targets must be ({batch},), got {tuple(targets.shape)}")
        false_BW = same_target_mask(targets, gather_rows(targets) if gather else targets)
    if not in_batch:
        false_BW = torch.ones_like(false_BW)
    extra_BM = _extra_logits(view_a, negatives)
    width = len(b_WD) + extra_BM.shape[1]
    extra_mask_BM = torch.zeros(extra_BM.shape, dtype=torch.bool, device=view_a.device)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in ((batch, len(b_WD)), (batch, width)):
            raise IncompatibleComponentsError(
                f"pair_nce mask must be bool of shape ({batch}, {len(b_WD)}) or ({batch}, {width}), got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        false_BW = false_BW | mask[:, : len(b_WD)]
        if mask.shape[1] == width:
            extra_mask_BM = mask[:, len(b_WD) :]
    logits_BV = torch.cat([view_a @ b_WD.t(), extra_BM], 1) / temperature
    masked_BV = torch.cat([false_BW.scatter(1, own_B[:, None], False), extra_mask_BM], 1)
    loss_B = F.cross_entropy(logits_BV.masked_fill(masked_BV, -torch.inf), own_B, reduction="none")
    if symmetric:
        if len(b_WD) > batch and mask is not None:
            raise IncompatibleComponentsError("pair_nce: a symmetric loss over processes takes targets, not a mask")
        back_BW = view_b @ (gather_rows(view_a) if gather else view_a).t() / temperature
        back_mask_BW = (false_BW if len(b_WD) > batch else false_BW.t()).scatter(1, own_B[:, None], False)
        back_B = F.cross_entropy(back_BW.masked_fill(back_mask_BW, -torch.inf), own_B, reduction="none")
        loss_B = (loss_B + back_B) / 2
    if weight is not None:
        if weight.shape != (batch,):
            raise IncompatibleComponentsError(f"pair_nce weight must be ({batch},), got {tuple(weight.shape)}")
        loss_B = loss_B * weight
    return loss_B.mean()


def _extra_logits(view_a: Tensor, negatives: Tensor | None) -> Tensor:
    if negatives is None:
        return view_a.new_zeros(len(view_a), 0)
    if negatives.dim() == 2 and negatives.shape[1] == view_a.shape[1]:
        return view_a @ negatives.t()
    if negatives.dim() == 3 and negatives.shape[::2] == view_a.shape:
        return torch.einsum("bd,bmd->bm", view_a, negatives)
    raise IncompatibleComponentsError(
        f"pair_nce negatives must be (M, {view_a.shape[1]}) or ({len(view_a)}, M, {view_a.shape[1]}), got "
        f"{tuple(negatives.shape)}"
    )


def prefix_sums(code_vectors: Sequence[Tensor]) -> list[Tensor]:
    """The L sums (B, P) of the first 1, 2, ... L code vectors: the views of a contrast per prefix (HiGR)."""
    return list(accumulate(code_vectors))


def prefix_concats(code_vectors: Sequence[Tensor]) -> list[Tensor]:
    """The first 1, 2, ... L code vectors side by side, (B, l * P): the views of a contrast with level tags (HiD-VAE)."""
    return [torch.cat(list(code_vectors[: level + 1]), 1) for level in range(len(code_vectors))]
