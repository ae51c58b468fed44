"""PooledDropout: dropout whose masks are windows of a Bernoulli pool drawn once.

Drawing one random number per activation is a large part of a training step of a small Transformer on a CPU. Here a
long row of Bernoulli draws (already divided by the keep probability) is made once per (p, device, dtype), and each
call multiplies by the window that starts at a random offset. The offset comes from torch's global CPU generator, so
seeding, activation checkpointing and an exact resume of `Trainer` work as with `torch.nn.Dropout`.

Trade-off: two calls are not independent when their windows overlap (of a call with n activations and a pool of P,
a fraction of about 2n/P), and even then one mask is the other one *shifted*, so that an activation gets the same draw
twice only when the offsets are equal (probability 1/(P - n)). Over a run an activation sees at most P - n + 1 masks.
For stochastic regularisation neither matters; do not use it where masks must be independent, such as Monte-Carlo
estimates of uncertainty.

*Relations*: p = 0 or eval mode is the identity; in distribution of a single call it equals `torch.nn.Dropout`.
"""

from __future__ import annotations

import torch
from torch import nn

MIN_POOL_SIZE = 1 << 22
_POOL_SEED = 20_240_817
# (p, device, dtype, size) -> scaled mask. Not a buffer: pools are shared by all modules and never saved.
_POOLS: dict[tuple[float, torch.device, torch.dtype, int], torch.Tensor] = {}


def pool_size(numel: int) -> int:
    """Length of the pool that serves a call of `numel` activations: a power of two, at least 4 * numel.

    It depends on nothing but `numel` (not on which calls came before), which an exact resume needs.
    """
    return max(MIN_POOL_SIZE, 1 << (4 * numel - 1).bit_length()) if numel else MIN_POOL_SIZE


def dropout_pool(p: float, device: torch.device, dtype: torch.dtype, size: int) -> torch.Tensor:
    """The pool of shape (size,) with values 0 or 1 / (1 - p); the same draws on every device."""
    key = (p, device, dtype, size)
    pool = _POOLS.get(key)
    if pool is None:
        # A tensor made under inference_mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            generator = torch.Generator(device="cpu").manual_seed(_POOL_SEED)
            keep = torch.rand(size, generator=generator, device="cpu") >= p
            pool = keep.to(device=device, dtype=dtype).mul_(1.0 / (1.0 - p))
        _POOLS[key] = pool
    return pool


def clear_dropout_pools() -> None:
    """Free all pools (they are redrawn, identically, when next needed)."""
    _POOLS.clear()


class PooledDropout(nn.Dropout):
    """Drop-in for `torch.nn.Dropout` that draws one random number per call instead of one per activation.

    It is a subclass so that code which looks for `nn.Dropout` (TRL's `disable_dropout`, say) also finds it.

    Args:
        p: probability of dropping an activation, 0 <= p < 1.

    Raises:
        ValueError: p outside [0, 1).

    Example:
        >>> drop = PooledDropout(0.5)
        >>> sorted(set(drop(torch.ones(1000)).tolist()))
        [0.0, 2.0]
        >>> drop.eval()(torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, p: float = 0.1):
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout probability must be in [0, 1), got {p}")
        super().__init__(float(p))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        numel = x.numel()
        size = pool_size(numel)
        pool = dropout_pool(self.p, x.device, x.dtype, size)
        offset = int(torch.randint(size - numel + 1, (), device="cpu"))
        return x * pool[offset : offset + numel].view(x.shape)
