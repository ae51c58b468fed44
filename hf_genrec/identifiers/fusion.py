"""Gated fusion of feature blocks: how much each source counts for an item is learnt from who is consumed with whom.

Several sources describe an item (text, picture, co-occurrence). Side by side, each counts the same for every item. Here
a small gate looks at all blocks of an item and weighs them: `fused = [B g_1(i) x_1(i), .., B g_B(i) x_B(i)]`, with `g` a
softmax over the B blocks, so that equal weights are plain concatenation. The gate is trained for a few hundred steps to
make items that occur together near and others far (InfoNCE with in-batch negatives). Our own design.

Shape legend: N items, B blocks, E width of all blocks, P width of the space of the contrast, n pairs of a batch.

Relations: `weight=0`, or no step, is concatenation, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from ..errors import IncompatibleComponentsError, TrainingError


class GatedFusion(nn.Module):
    """Blocks of an item -> the blocks weighed by a gate, side by side.

    Args:
        widths: of the B blocks.
        projection_size: P, width of the space in which the contrast is taken (training only).

    Example:
        >>> fusion = GatedFusion([2, 1])
        >>> fusion([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])]).tolist()  # an untrained gate weighs all the same
        [[1.0, 2.0, 3.0]]
    """

    def __init__(self, widths: Sequence[int], projection_size: int = 64) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise IncompatibleComponentsError(
                f"gated fusion of blocks of widths {list(widths)}: give at least one block"
            )
        self.widths = tuple(int(width) for width in widths)
        self.gate = nn.Linear(sum(self.widths), len(self.widths))
        self.projection = nn.Linear(sum(self.widths), projection_size, bias=False)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def gates(self, blocks: Sequence[Tensor]) -> Tensor:
        """Weights of the blocks, (N, B), mean 1 per item."""
        return self.gate(torch.cat(list(blocks), dim=1)).softmax(dim=1) * len(self.widths)

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        """Fused vectors (N, E)."""
        gates_NB = self.gates(blocks)
        return torch.cat([gates_NB[:, [number]] * block for number, block in enumerate(blocks)], dim=1)


def fit_gated_fusion(
    blocks: Sequence[np.ndarray],
    pairs_n2: np.ndarray,
    weights_n: np.ndarray | None = None,
    *,
    weight: float = 1.0,
    steps: int = 300,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    temperature: float = 0.1,
    seed: int = 0,
) -> GatedFusion:
    """Train the gate on pairs of items that occur together in training histories.

    Args:
        blocks: B arrays (N, E_b), on comparable scales.
        pairs_n2: item indices of each pair.
        weights_n: how often a pair is drawn, relative to the others.
        weight: of the contrast; 0 = nothing is learnt.
        steps, batch_size, learning_rate, temperature: of the training; own generator, the global one is untouched.

    Raises:
        IncompatibleComponentsError: blocks of different items.
        TrainingError: no pairs, or a loss that is not finite.
    """
    if len({len(block) for block in blocks}) != 1:
        raise IncompatibleComponentsError(f"feature blocks cover different items: rows {[len(b) for b in blocks]}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fusion = GatedFusion([block.shape[1] for block in blocks])
    if weight == 0 or steps == 0:
        return fusion.eval()
    if not len(pairs_n2):
        raise TrainingError("no two items occur together in the training rows: a gate needs longer histories")
    tensors = [torch.as_tensor(np.asarray(block, np.float32)) for block in blocks]
    chance_n = torch.ones(len(pairs_n2)) if weights_n is None else torch.as_tensor(np.asarray(weights_n, np.float32))
    pairs = torch.as_tensor(np.asarray(pairs_n2, np.int64))
    drawn = torch.multinomial(chance_n, steps * batch_size, replacement=True, generator=generator)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=learning_rate)
    for rows in drawn.view(steps, batch_size):
        left_n, right_n = pairs[rows].unbind(1)
        left, right = (
            normalize(fusion.projection(fusion([block[side] for block in tensors])), dim=1)
            for side in (left_n, right_n)
        )
        logits_nn = left @ right.t() / temperature
        same_nn = right_n[:, None] == right_n[None]  # the same item twice in a batch is no negative of itself
        same_nn.fill_diagonal_(False)
        loss = weight * cross_entropy(logits_nn.masked_fill(same_nn, -torch.inf), torch.arange(len(rows)))
        if not torch.isfinite(loss):
            raise TrainingError("gated fusion: the loss is not finite; lower its learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return fusion.eval()


@torch.no_grad()
def gate_weights(fusion: GatedFusion, blocks: Sequence[Any]) -> np.ndarray:
    """Weights of the blocks, float32 (N, B), mean 1 per item."""
    return fusion.gates([torch.as_tensor(np.asarray(block, np.float32)) for block in blocks]).numpy()
