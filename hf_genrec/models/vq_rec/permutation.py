"""One permutation per digit that carries code vectors from an old domain to a new one (VQ-Rec, arXiv 2210.12316).

Two domains have codebooks of equal sizes but of different meaning: code 7 of a digit stands for other texts there. The
vectors of the old codes are used again in another order, which is learned: logits (L, C, C) with Gumbel noise are made doubly
stochastic by Sinkhorn's normalisation (arXiv 1802.08665), and every row is then cut to its largest entry, 0/1 with one 1
per row. The gradient goes straight through the cut.

A row is a new code, a column an old one. Two new codes may take the same old vector: only rows are kept exact, as in the
authors' code.

Shapes: L digits, C codes of a digit, d width of the code vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinkhorn(logits_LCC: Tensor, iterations: int = 8) -> Tensor:
    """Matrices whose rows and columns sum to 1, the nearer the more iterations; computed with logarithms.

    Example:
        >>> doubly = sinkhorn(torch.tensor([[[0.0, 3.0], [1.0, 0.0]]]), iterations=50)
        >>> doubly.sum(-1), doubly.sum(-2)
        (tensor([[1., 1.]]), tensor([[1., 1.]]))
    """
    for _ in range(iterations):
        logits_LCC = logits_LCC.log_softmax(dim=2)
        logits_LCC = logits_LCC.log_softmax(dim=1)
    return logits_LCC.exp()


def gumbel_noise(like: Tensor) -> Tensor:
    """Independent draws of the standard Gumbel distribution, from torch's global generator."""
    return -torch.empty_like(like).exponential_().log()


def largest_per_row(soft_LCC: Tensor) -> Tensor:
    """0/1 matrices with a 1 at the largest entry of every row; the gradient is that of `soft_LCC` (straight-through)."""
    hard_LCC = torch.zeros_like(soft_LCC).scatter_(-1, soft_LCC.argmax(-1, keepdim=True), 1.0)
    return hard_LCC + soft_LCC - soft_LCC.detach()


class CodePermutation(nn.Module):
    """Learned choice of an old code for every new code, digit by digit.

    Args:
        levels, codes: L and C.
        iterations: of Sinkhorn's normalisation.
        temperature: divides logits and noise; lower is nearer to 0/1.

    Relations: with `eval()` no noise is drawn, and the choice is the same at every call.
    """

    def __init__(self, levels: int, codes: int, *, iterations: int = 8, temperature: float = 0.7) -> None:
        super().__init__()
        self.iterations, self.temperature = iterations, temperature
        self.logits = nn.Parameter(torch.randn(levels, codes, codes))

    def forward(self) -> Tensor:
        """0/1 matrices (L, C, C), one 1 per row, with the gradient of the doubly stochastic ones."""
        logits = self.logits + gumbel_noise(self.logits) if self.training else self.logits
        return largest_per_row(sinkhorn(logits / self.temperature, self.iterations))

    @torch.no_grad()
    def old_codes(self) -> Tensor:
        """The old code (L, C) whose vector each new code takes, without noise."""
        return sinkhorn(self.logits / self.temperature, self.iterations).argmax(-1)
