"""Cross-attention of candidates over all prefixes of a history at once, by the running softmax of arXiv 1805.02867.

Shapes: B users, T items of a window, N candidates, G heads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prefix_interest(scores_TBNG: Tensor, matches_TBNG: Tensor) -> Tensor:
    """Attention-weighted matches of every prefix: row t is sum_(s < t) softmax(scores)_s * matches_s. (T + 1, B, N, G)

    A score of -inf is padding; a prefix without items gives 0. Stable for any scores: the running maximum is kept, so
    time and memory grow with T, not with its square.

    Example:
        >>> scores, matches = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        >>> prefix_interest(scores, matches).flatten().tolist()
        [0.0, 1.0, 2.0]
    """
    low = torch.finfo(scores_TBNG.dtype).min / 4
    peak = torch.full_like(scores_TBNG[0], low) if len(scores_TBNG) else scores_TBNG.new_zeros(scores_TBNG.shape[1:])
    top, weight = torch.zeros_like(peak), torch.zeros_like(peak)
    rows = [torch.zeros_like(peak)]
    for score, match in zip(scores_TBNG.unbind(0), matches_TBNG.unbind(0), strict=True):
        real = score > low
        new_peak = torch.where(real, torch.maximum(peak, score.detach()), peak)
        fade = torch.exp(peak - new_peak)
        share = torch.where(real, torch.exp(score.clamp(min=low) - new_peak), 0.0)
        top = top * fade + share * match
        weight = weight * fade + share
        peak = new_peak
        rows.append(top / torch.where(weight > 0, weight, 1.0))
    return torch.stack(rows)
