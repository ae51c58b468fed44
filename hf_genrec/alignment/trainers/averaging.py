"""WeightAverage: exponential moving average of the weights, used for validation and as the model that is kept.

Averaging (Polyak) removes much of the noise that a large learning rate leaves in the last weights. Off
(`ema_decay=None`) is plain training; with decay 0 the average *is* the newest weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Average of a model's trainable parameters: `average = d * average + (1 - d) * weights` after each step.

    `d = min(decay, (1 + t) / (10 + t))` at optimiser step t, so that the random start is soon forgotten.

    Args:
        model: The model whose parameters are followed (shared parameters once). Buffers are not averaged.
        decay: 0 <= decay < 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = float(decay)
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = list(self.averages.values()), [p.detach() for p in self.weights.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    def swap(self) -> None:
        """Exchange the model's weights and the averages (storage only: the optimiser keeps its parameters)."""
        for name, parameter in self.weights.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
