"""Diverse beam search over the trie (arXiv 1610.02424): groups of beams that avoid each other's codes.

The groups search one after the other; at each level a group pays `diversity_penalty` for every beam of the earlier
groups that took the same code there (Hamming diversity). The penalty steers the choice only: scores stay the model's
log-probabilities. A leaf found by an earlier group is out of reach for the later ones, so the results are distinct.

Lossy. Relations: one group is `beam`; a penalty of 0 is `beam` in which each group may keep fewer beams at a time.

Shape legend: B users, K beams of one group, W children, C codes of the level.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items, ranked_leaves
from .beam_cache import start_beams
from .kernel import best_children, check_scores, score_children


class _WithoutLeaves:
    """A filter that also leaves out the items of some leaves, all of them legal under the filter it extends."""

    def __init__(self, trie: ItemTrie, base: ItemFilter | None, leaves_BK: torch.Tensor):
        start, end = trie.slot_range(trie.num_levels, leaves_BK)
        steps = torch.arange(trie.max_items_per_leaf, device=leaves_BK.device)
        inside = steps < (end - start).unsqueeze(-1)
        slots = torch.where(inside, start.unsqueeze(-1) + steps, trie.num_items).flatten(1)
        if base is not None:  # count each item out once
            slots = torch.where(base.alive_slots(slots.clamp(max=trie.num_items - 1)), slots, trie.num_items)
        self.taken = ItemFilter(trie, slots.sort(dim=-1).values, keep_listed=True)
        self.trie, self.base = trie, base

    def alive(self, level: int, nodes_BX: torch.Tensor) -> torch.Tensor:
        shape = nodes_BX.shape
        start, end = self.trie.slot_range(level, nodes_BX.reshape(shape[0], -1))
        left = end - start if self.base is None else self.base.count_alive(start, end)
        return (left - self.taken.count_alive(start, end) > 0).reshape(shape)

    def alive_children(self, level: int, nodes_BK: torch.Tensor, legal_BKW: torch.Tensor) -> torch.Tensor:
        return legal_BKW & self.alive(level + 1, self.trie.expand(level, nodes_BK)[1])


def diverse_beam(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    num_groups: int = 2,
    diversity_penalty: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "diverse_beam": `config.search_width` beams in `num_groups` groups.

    Raises:
        RequestError: num_groups below 1 or above the number of beams, or a negative penalty.
    """
    width, device = config.search_width, trie.device
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or not 1 <= num_groups <= width:
        raise RequestError(f"num_groups must be a whole number from 1 to the {width} beams, got {num_groups!r}.")
    if not diversity_penalty >= 0:
        raise RequestError(f"diversity_penalty must be >= 0, got {diversity_penalty!r}.")
    sizes = [width // num_groups + (group < width % num_groups) for group in range(num_groups)]
    used = [torch.zeros(batch_size, size + 1, device=device) for size in trie.codebook_sizes]  # beams per code
    found_leaves: list[torch.Tensor] = []
    found_scores: list[torch.Tensor] = []
    for group_size in sizes:
        legal: Any = item_filter
        if found_leaves:
            legal = _WithoutLeaves(trie, item_filter, torch.cat(found_leaves, dim=1))
        nodes = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        scores = torch.zeros(batch_size, 1, device=device)
        if legal is not None:
            scores = scores.masked_fill(~legal.alive(0, nodes), -torch.inf)
        beams = start_beams(decoder, state, batch_size, device)
        for level in range(trie.num_levels):
            children = score_children(
                trie,
                level,
                nodes,
                scores,
                beams.score(level, not config.renormalize),
                item_filter=legal,
                renormalize=config.renormalize,
            )
            total = (scores.unsqueeze(-1) + children.step_BKW).flatten(1)
            codes = children.codes_BKW.flatten(1)
            chosen = best_children(total - diversity_penalty * used[level].gather(1, codes), group_size)
            parents, codes = chosen // children.codes_BKW.shape[-1], codes.gather(1, chosen)
            nodes, scores = children.nodes_BKW.flatten(1).gather(1, chosen), total.gather(1, chosen)
            alive = (scores > -torch.inf).float()
            used[level].scatter_add_(1, codes, alive)
            if level + 1 < trie.num_levels:
                beams.reorder(parents, codes, level)
        check_scores(scores)
        found_leaves.append(nodes.masked_fill(scores == -torch.inf, -1))
        found_scores.append(scores)
    leaves, order = torch.cat(found_leaves, dim=1).sort(dim=-1, stable=True)
    leaves, scores = ranked_leaves(leaves, torch.cat(found_scores, dim=1).gather(1, order))
    return leaves_to_items(trie, leaves, scores, width, item_filter)
