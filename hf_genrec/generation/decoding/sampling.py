"""Sampling of distinct items: stochastic beam search over the trie (arXiv 1903.06059).

Draws k items without replacement from the model's distribution over the legal items, in the order of the draw, at the
cost of one beam search: every node carries the largest Gumbel-perturbed log-probability below it, and a child's
perturbation is drawn given its parent's. With one item it is an ordinary sample; with k at the number of legal items the
order is a full draw without replacement.

The distribution is renormalised over the legal codes at each level, as in transformers' sampling (which masks before
softmax). Lossless in distribution, not in ranking: it is made for exploration and for training rollouts.

Noise is a function of (seed, level, node), so a user's draw depends neither on the batch nor on the device.

Shape legend: B users, K beams, W children.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items
from .beam_cache import start_beams
from .kernel import IMPOSSIBLE, best_children, check_scores, score_children


def sample(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    seeds: Sequence[int],
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "sample".

    Args:
        seeds: one per user.
        temperature: divides the log-probabilities before they are renormalised; below 1 sharpens.

    Returns:
        items_BX in the order they were drawn, and the log-probability of each under the sampled distribution (not
        descending). Items that share a code are drawn together.

    Raises:
        RequestError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise RequestError(f"temperature must be above 0, got {temperature!r}; use decoding='beam' for the best items.")
    device, width = trie.device, config.search_width
    seeds_B = torch.tensor([int(seed) for seed in seeds], dtype=torch.long, device=device)
    nodes = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    logp = torch.zeros(batch_size, 1, device=device)
    perturbed = torch.zeros(batch_size, 1, dtype=torch.float64, device=device)
    if item_filter is not None:
        logp = logp.masked_fill(~item_filter.alive(0, nodes), -torch.inf)
    beams = start_beams(decoder, state, batch_size, device)
    for level in range(trie.num_levels):
        children = score_children(
            trie, level, nodes, logp, beams.score(level, False), item_filter=item_filter, renormalize=True
        )
        step = children.step_BKW
        if temperature != 1.0:
            step = (step / temperature).clamp(min=IMPOSSIBLE).masked_fill(~children.legal_BKW, -torch.inf)
            total = step.logsumexp(-1, keepdim=True)
            step = step - total.masked_fill(total == -torch.inf, 0.0)
        child_logp = logp.unsqueeze(-1) + step
        noise = gumbel_noise(seeds_B, level, children.nodes_BKW)
        child_perturbed = conditional_gumbels(child_logp.double() + noise, perturbed)
        check_scores(child_logp.flatten(1))
        chosen = best_children(child_perturbed.flatten(1), width)
        parents = chosen // step.shape[-1]
        nodes = children.nodes_BKW.flatten(1).gather(1, chosen)
        logp = child_logp.flatten(1).gather(1, chosen)
        perturbed = child_perturbed.flatten(1).gather(1, chosen)
        if level + 1 < trie.num_levels:
            beams.reorder(parents, children.codes_BKW.flatten(1).gather(1, chosen), level)
    order = perturbed.sort(dim=-1, descending=True, stable=True).indices
    logp = logp.gather(1, order)
    leaves = nodes.gather(1, order).masked_fill_(logp == -torch.inf, -1)
    return leaves_to_items(trie, leaves, logp, width, item_filter)


def conditional_gumbels(free_BKW: torch.Tensor, maximum_BK: torch.Tensor) -> torch.Tensor:
    """Shift independent Gumbel variables so that the largest of each beam's children is the given maximum.

    Args:
        free_BKW: log-probability + standard Gumbel noise of each child, float64, -inf where not legal.
        maximum_BK: perturbed log-probability of the parent.
    """
    largest = free_BKW.amax(-1, keepdim=True)
    gap = (free_BKW - largest).clamp(max=0.0)  # <= 0, -inf where not legal
    # log(1 - exp(gap)), stable on both sides of log 2
    small = gap > -math.log(2.0)
    log1mexp = torch.where(
        small,
        torch.log((-torch.expm1(gap.clamp(min=-1.0))).clamp(min=1e-300)),
        torch.log1p(-torch.exp(gap.clamp(max=-0.5))),
    )
    maximum = maximum_BK.unsqueeze(-1)
    value = maximum - free_BKW + log1mexp
    shifted = maximum - value.clamp(min=0.0) - torch.log1p(torch.exp(-value.abs()))
    shifted = torch.where(gap == 0.0, maximum.expand_as(shifted), shifted)
    return torch.where(free_BKW == -torch.inf, free_BKW, shifted)


def gumbel_noise(seeds_B: torch.Tensor, level: int, nodes_BKW: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64, a pure function of seed, level and node (a counter-based generator).

    Mixes with the finaliser of SplitMix64 (64-bit integers wrap around).
    """
    seeds = _mix(seeds_B * -7046029254386353131 + (level + 1))
    bits = _mix(nodes_BKW * -7046029254386353131 + seeds.view(-1, 1, 1))
    uniform = ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53 + 2.0**-54
    return -torch.log(-torch.log(uniform.clamp(max=1 - 2.0**-53)))


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift(value, 30)) * -4658895280553007687
    value = (value ^ _shift(value, 27)) * -7723592293110705685
    return value ^ _shift(value, 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
