"""Which codes are hidden in training, and what each hidden code weighs (LLaDA-Rec, arXiv 2511.06254).

A weight of 0 marks a code that is shown. A hidden code weighs one over the rate at which codes of its item are hidden, so
that no rate counts more than another: the expected weight of a target code is exactly 1 whatever its neighbours, that of
a history code is M / (M + 1), since an item from which nothing is hidden (one draw in M + 1) teaches nothing.

Draws are made on the CPU, from torch's global generator unless another is given, so a seeded or resumed run of `Trainer`
repeats them on every device.

Shapes: G items (any leading dimensions), M codes of an item.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_history_weights(shape: Sequence[int], num_codes: int, generator: torch.Generator | None = None) -> Tensor:
    """Per item a rate m / M with m uniform on 0..M; each code is hidden at that rate on its own. (*shape, M) float32."""
    hidden_G1 = torch.randint(0, num_codes + 1, (*shape, 1), generator=generator)
    hide_GM = torch.rand(*shape, num_codes, generator=generator) * num_codes < hidden_G1
    return hide_GM * (num_codes / hidden_G1.clamp(min=1))


def draw_target_weights(shape: Sequence[int], num_codes: int, generator: torch.Generator | None = None) -> Tensor:
    """Per item m uniform on 1..M; exactly m random codes are hidden and weigh M / m each. (*shape, M) float32.

    Example:
        >>> weights = draw_target_weights((100,), 4)
        >>> bool((weights.sum(-1) == 4).all())
        True
    """
    hidden_G1 = torch.randint(1, num_codes + 1, (*shape, 1), generator=generator)
    rank_GM = torch.rand(*shape, num_codes, generator=generator).argsort(-1)  # a random permutation of 0..M-1
    return (rank_GM < hidden_G1) * (num_codes / hidden_G1)
