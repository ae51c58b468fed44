"""Beam search over an ItemTrie: only legal children are ever scored or kept, so every result is a catalogue item.

The search of TIGER (arXiv 2305.05065) without a vocabulary: a loop of `beam_step` over a model's BeamCache. Lossy: an
item whose prefix falls out of the beam is not found (`evaluation.beam_check` counts how often; `certified` search knows).

Shape legend: B users, K live beams, l codes generated so far.

Guarantees
    - With K beams, min(K, legal leaves) distinct leaves come out: every kept node leads to a legal item, so the
      number of live beams never falls.
    - Equal scores are broken by the lower leaf number (the lexicographically smaller code), whatever the batch or
      device.
    - A dead beam (score -inf inside the search) is never returned: leaf -1, score -inf.
    - A legal code to which the model gives probability 0 stays legal: it comes after all others, with score -inf.
"""

from __future__ import annotations

from typing import Any

import torch

from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam_cache import start_beams
from .kernel import IMPOSSIBLE, Adjust, beam_step, check_scores


def trie_beam_search(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    num_beams: int,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    renormalize: bool = False,
    adjust: Adjust | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best leaves of the trie under the model, best first.

    Args:
        decoder: has `start_beams(state) -> BeamCache`, or `score_codes(state, prefix_BKl, level) -> logp_BKC`.
        state: whatever `decoder` needs, `batch_size` rows; passed through untouched and never repeated per beam.
        trie: the catalogue, on the device of the scores.
        num_beams: beams kept per user.
        item_filter: items that may be returned.
        batch_size: users B.
        renormalize: see `kernel`.
        adjust: changes the scores of legal children, see `kernel.Adjust`.

    Returns:
        leaves_BK (int64, -1 where a user has fewer legal leaves) and scores_BK (float32, -inf there).

    Raises:
        GenRecError: the model returned NaN.
        IncompatibleComponentsError: the model's code block is smaller than the trie's codebook.
    """
    device = trie.device
    nodes = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    scores = torch.zeros(batch_size, 1, dtype=torch.float32, device=device)
    if item_filter is not None:
        scores = scores.masked_fill(~item_filter.alive(0, nodes), -torch.inf)
    beams = start_beams(decoder, state, batch_size, device)
    for level in range(trie.num_levels):
        step = beam_step(
            trie,
            level,
            nodes,
            scores,
            beams.score(level, not renormalize),
            num_beams,
            item_filter=item_filter,
            renormalize=renormalize,
            adjust=adjust,
        )
        nodes, scores = step.nodes_BK, step.scores_BK
        if level + 1 < trie.num_levels:
            beams.reorder(step.parents_BK, step.codes_BK, level)
    check_scores(scores)
    return ranked_leaves(nodes, scores)


def ranked_leaves(leaves_BK: torch.Tensor, scores_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves in ascending order -> best first; dead beams as leaf -1, impossible items at -inf."""
    # a stable sort keeps the lower leaf first among equals
    scores, order = scores_BK.sort(dim=-1, descending=True, stable=True)
    leaves = leaves_BK.gather(1, order).masked_fill_(scores == -torch.inf, -1)
    return leaves, scores.masked_fill_(scores <= IMPOSSIBLE / 2, -torch.inf)


def beam(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "beam": `trie_beam_search` with `config.search_width` beams, leaves named as items. Lossy."""
    width = config.search_width
    leaves, scores = trie_beam_search(
        decoder, state, trie, width, item_filter, batch_size=batch_size, renormalize=config.renormalize
    )
    return leaves_to_items(trie, leaves, scores, width, item_filter)


def leaves_to_items(
    trie: ItemTrie, leaves_BK: torch.Tensor, scores_BK: torch.Tensor, limit: int, item_filter: ItemFilter | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Name the items of leaves, best leaf first; a leaf shared by several items gives each of them (ascending index).

    Args:
        limit: items to return per user.
        item_filter: drops excluded items of a shared leaf one by one.

    Returns:
        items_BX (int64, -1 padded) and scores_BX (the leaf's score), X <= limit. Order is that of `leaves_BK`.
    """
    start, end = trie.slot_range(trie.num_levels, leaves_BK)
    width = int((end - start).max()) if leaves_BK.numel() else 1
    steps = torch.arange(max(1, width), device=leaves_BK.device)
    valid = steps < (end - start).unsqueeze(-1)
    slots = (start.unsqueeze(-1) + steps).masked_fill_(~valid, 0)
    if item_filter is not None:
        valid &= item_filter.alive_slots(slots)
    items = trie.items_at(slots).masked_fill_(~valid, -1).flatten(1)
    scores = scores_BK.unsqueeze(-1).expand_as(valid).masked_fill(~valid, -torch.inf).flatten(1)
    if width > 1:  # close the gaps, keep the order
        order = (items < 0).to(torch.uint8).sort(dim=-1, stable=True).indices
        items, scores = items.gather(1, order), scores.gather(1, order)
    return items[:, :limit], scores[:, :limit]
