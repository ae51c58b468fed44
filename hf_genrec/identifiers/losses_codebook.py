"""Terms on codes and codebooks: usage balance, diversity, separation, tag supervision, uniqueness.

Shape suffixes: B items of a batch, L levels (codes per item), C codes of a level, G clusters of codes, P dimensions of a
code vector, X experts (or subspaces), T tags of a level.

Every term is a scalar, 0 at its ideal unless noted, and carries gradient into what its first argument came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..errors import IncompatibleComponentsError, TrainingError
from .quantizers.assignment import soft_weights
from .quantizers.kmeans import kmeans

USAGE_FORMS = ("variation", "entropy")


# --------------------------------------------------------------------------------------------------------------- usage


def usage_balance(
    distance_BC: Tensor, *, temperature: float = 0.1, form: str = "variation", sharpness: float = 0.0
) -> Tensor:
    """How unevenly a batch uses the codes of a level, from soft counts (GNPR-SID, arXiv 2506.01375).

    n_c = sum_b softmax(-distance / (mean distance * temperature))_bc. Hard counts have no gradient: the term would be a
    constant.

    Args:
        distance_BC: squared distances with gradients, as `VQAutoencoder.level_distances` gives them.
        temperature: towards 0 the counts become the hard ones, and the gradient vanishes.
        form: `"variation"`: mean (n_c - mean n)^2 / (mean n)^2, from 0 (even) to C - 1 (one code has all);
            `"entropy"`: 1 - H(n / B) / log C, from 0 to 1.
        sharpness: weight of the items' mean entropy over log C, which is added. Soft counts are also even when every
            item is spread over all codes; without this weight it is left to the other losses to forbid that.

    Raises:
        IncompatibleComponentsError: an unknown form.
        TrainingError: a temperature that is not positive.
    """
    if form not in USAGE_FORMS:
        raise IncompatibleComponentsError(f"usage_balance form must be in {USAGE_FORMS}, got {form!r}")
    if temperature <= 0:
        raise TrainingError(f"usage_balance temperature must be positive, got {temperature}")
    weight_BC = soft_weights(distance_BC, temperature)
    share_C, codes = weight_BC.mean(0), weight_BC.shape[1]
    if codes == 1:
        return share_C.sum() * 0
    tiny = torch.finfo(weight_BC.dtype).tiny  # log 0 would make the gradient NaN
    if form == "variation":
        loss = (share_C * codes - 1).pow(2).mean()
    else:
        loss = 1 + (share_C * share_C.clamp_min(tiny).log()).sum() / math.log(codes)
    if sharpness:
        loss = loss - sharpness * (weight_BC * weight_BC.clamp_min(tiny).log()).sum(1).mean() / math.log(codes)
    return loss


# ----------------------------------------------------------------------------------------------------------- diversity


def code_clusters(codebook_CP: Tensor, num_clusters: int, *, seed: int = 0, rounds: int = 10) -> Tensor:
    """Cluster (C,) of every code, by k-means whose clusters are equal in size within 1 (the constraint of LETTER).

    Each round assigns codes to centres at the least total squared distance that the sizes allow, exactly, so its cost
    grows with C^3: meant for the hundreds of codes of one level, once an epoch.

    Raises:
        TrainingError: more clusters than codes, or none.
    """
    codebook_CP = codebook_CP.detach().float().cpu()
    codes = len(codebook_CP)
    if not 1 <= num_clusters <= codes:
        raise TrainingError(f"{codes} codes cannot form {num_clusters} clusters")
    start = kmeans(codebook_CP, num_clusters, generator=torch.Generator().manual_seed(seed))
    centres_GP, cluster_C = start.centroids_CD, start.codes_N
    largest_first = torch.bincount(cluster_C, minlength=num_clusters).argsort(descending=True, stable=True)
    size_G = torch.full((num_clusters,), codes // num_clusters)
    size_G[largest_first[: codes % num_clusters]] += 1
    seat_C = torch.arange(num_clusters).repeat_interleave(size_G)  # one seat per code
    for _ in range(rounds):
        cost_CC = torch.cdist(codebook_CP.double(), centres_GP.double()).pow(2)[:, seat_C]
        before_C, cluster_C = cluster_C, seat_C[torch.as_tensor(linear_sum_assignment(cost_CC.numpy())[1])]
        if torch.equal(before_C, cluster_C):
            break
        centres_GP = torch.stack([codebook_CP[cluster_C == group].mean(0) for group in range(num_clusters)])
    return cluster_C


def diversity(
    vectors_BP: Tensor,
    codes_B: Tensor,
    codebook_CP: Tensor,
    cluster_C: Tensor,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Diversity term of LETTER (arXiv 2405.07314): each item's code is to find a code of its own cluster.

    Cross-entropy over the products of the item's code vector with all other codes of the level; the target is another
    code of the cluster, drawn anew at each call. It draws the codes of one cluster together and pushes clusters apart,
    so that codes spread. Items whose code is alone in its cluster are left out.

    Args:
        vectors_BP: the chosen code vectors, with gradient (`VQOutput.code_vectors`). Codebooks of moving averages have
            no gradient: use `codebook_update="gradient"` or `"simvq"`.
        codes_B: their codes.
        codebook_CP: the codebook of the level, with gradient.
        cluster_C: from `code_clusters`.
        generator: of the draws; on the device of `codes_B`. None = torch's global one.

    Returns:
        Scalar >= 0, 0 when every code is alone in its cluster. Its minimum is not 0 with three or more codes.
    """
    together_BC = cluster_C.to(codes_B.device)[codes_B][:, None] == cluster_C.to(codes_B.device)[None, :]
    together_BC.scatter_(1, codes_B[:, None], False)
    kept_B = together_BC.any(1)
    if not bool(kept_B.any()):
        return vectors_BP.sum() * 0
    positive_K = torch.multinomial(together_BC[kept_B].double(), 1, generator=generator).squeeze(1)
    logits_KC = vectors_BP[kept_B] @ codebook_CP.t() / temperature
    logits_KC = logits_KC.scatter(1, codes_B[kept_B, None], -torch.inf)
    return F.cross_entropy(logits_KC, positive_K)


# ---------------------------------------------------------------------------------------------------------- separation


def orthogonality(experts_BXP: Tensor) -> Tensor:
    """Mean squared cosine between the outputs of different experts for the same item (MMQ, arXiv 2508.15281).

    0 when the outputs of every item are orthogonal, 1 when all experts point the same way. One expert: 0.
    """
    if experts_BXP.dim() != 3:
        raise IncompatibleComponentsError(
            f"orthogonality needs (items, experts, dimensions), got {tuple(experts_BXP.shape)}"
        )
    experts = experts_BXP.shape[1]
    if experts == 1:
        return experts_BXP.sum() * 0
    unit_BXP = F.normalize(experts_BXP, dim=2)
    cosine_BXX = unit_BXP @ unit_BXP.transpose(1, 2)
    upper = torch.triu_indices(experts, experts, offset=1, device=cosine_BXX.device)
    return cosine_BXX[:, upper[0], upper[1]].pow(2).mean()


def rotation_gap(matrix_PP: Tensor) -> Tensor:
    """|R^T R - I|^2 / P: 0 exactly for orthogonal matrices (STORE's rotation, arXiv 2511.18805)."""
    gram_PP = matrix_PP.t() @ matrix_PP
    return (gram_PP - torch.eye(len(gram_PP), dtype=gram_PP.dtype, device=gram_PP.device)).pow(2).sum() / len(gram_PP)


# ---------------------------------------------------------------------------------------------------------------- tags


def tag_supervision(
    logits_BT: Tensor, tags_B: Tensor, *, gamma: float = 0.0, label_smoothing: float = 0.0, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy, or focal loss with `gamma` > 0, of the tag that a code prefix should tell (HiD-VAE, 2508.04618).

        mean (1 - p_tag)^gamma * CE_smoothed(logits, tag)    over the items whose tag is known

    Args:
        logits_BT: a classifier's output for the first l code vectors (`losses.prefix_concats`).
        tags_B: tag of each item; `ignore_index` = unknown.

    Returns:
        Scalar; 0 when no tag of the batch is known. gamma 0 = cross-entropy.
    """
    known_B = tags_B != ignore_index
    if not bool(known_B.any()):
        return logits_BT.sum() * 0
    logits_KT, tags_K = logits_BT[known_B], tags_B[known_B]
    loss_K = F.cross_entropy(logits_KT, tags_K, reduction="none", label_smoothing=label_smoothing)
    if gamma:
        missing_K = -torch.expm1(logits_KT.log_softmax(1).gather(1, tags_K[:, None]).squeeze(1))
        loss_K = missing_K.clamp_min(torch.finfo(loss_K.dtype).tiny).pow(gamma) * loss_K
    return loss_K.mean()


def tag_hierarchy(
    logits: Sequence[Tensor],
    tags_BL: Tensor,
    *,
    weights: Sequence[float] | None = None,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum of `weights[l] * tag_supervision` over the levels of a tag hierarchy; None = all weights 1.

    Raises:
        IncompatibleComponentsError: logits, tags and weights of different numbers of levels.
    """
    weights = [1.0] * len(logits) if weights is None else weights
    if tags_BL.dim() != 2 or not len(logits) == tags_BL.shape[1] == len(weights):
        raise IncompatibleComponentsError(
            f"tag_hierarchy got {len(logits)} levels of logits, {len(weights)} weights and tags "
            f"{tuple(tags_BL.shape)}: they must agree"
        )
    terms = [
        weight * tag_supervision(level_BT, tags_BL[:, level], gamma=gamma, label_smoothing=label_smoothing)
        for level, (level_BT, weight) in enumerate(zip(logits, weights))
    ]
    return torch.stack(terms).sum()


# ---------------------------------------------------------------------------------------------------------- uniqueness


def uniqueness(latents_BQ: Tensor, codes_BL: Tensor, *, margin: float = 0.9, items_B: Tensor | None = None) -> Tensor:
    """Hinge that drives items with identical codes apart before quantization (HiD-VAE, arXiv 2508.04618).

        mean max(0, cos(z_i, z_j) - margin)    over the pairs i < j with equal codes at all levels

    Args:
        latents_BQ: latents before quantization, with gradient.
        codes_BL: their codes.
        margin: largest cosine that costs nothing (.9 in the paper's notes, .5 in the authors' code).
        items_B: item numbers; two rows of one item are no collision. None = all rows are different items.

    Returns:
        Scalar; exactly 0 when no two items of the batch collide.
    """
    pair_BB = (codes_BL[:, None] == codes_BL[None]).all(2).triu(diagonal=1)
    if items_B is not None:
        pair_BB &= items_B[:, None] != items_B[None, :]
    left, right = pair_BB.nonzero(as_tuple=True)
    if len(left) == 0:
        return latents_BQ.sum() * 0
    return (F.cosine_similarity(latents_BQ[left], latents_BQ[right], dim=1) - margin).clamp_min(0).mean()
