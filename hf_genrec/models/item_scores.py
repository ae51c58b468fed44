"""From log-probabilities of items to log-probabilities of their codes, for models that score items at once.

Shapes: B users, N items, L levels, K beams, l codes of a prefix, C codes of a level.
"""

from __future__ import annotations

import torch
from torch import Tensor


def code_log_probs(logp_BN: Tensor, codes_NL: Tensor, prefix_BKl: Tensor, level: int, num_codes: int) -> Tensor:
    """Log-probabilities (B, K, C) of the codes of `level` behind a prefix: the mass of the items below each.

    Walking down the levels adds up to the log-probability of all items of a code, which is what searches over codes and
    `score_all` need. A code without items has -inf.

    Example:
        >>> logp = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> code_log_probs(logp, torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.zeros(1, 1, 1).long(), 1, 2).exp()
        tensor([[[0.6667, 0.3333]]])
    """
    mass_BN = (logp_BN - logp_BN.amax(-1, keepdim=True)).double().exp()
    below_BKN = (prefix_BKl.unsqueeze(2) == codes_NL[:, :level]).all(-1)
    mass_BKN = mass_BN.unsqueeze(1) * below_BKN
    index = codes_NL[:, level].expand_as(mass_BKN)
    mass_BKC = mass_BKN.new_zeros(*mass_BKN.shape[:2], num_codes).scatter_add_(2, index, mass_BKN)
    whole_BK1 = mass_BKC.sum(-1, keepdim=True)
    return (mass_BKC / whole_BK1.clamp(min=torch.finfo(torch.double).tiny)).log().float()
