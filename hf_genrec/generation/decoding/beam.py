"""Beam search over an ItemTrie: only legal children are ever scored or kept, so every result is a catalogue item.

The search of TIGER (arXiv 2305.05065) without a vocabulary: at each level it takes the model's log-probabilities of
that level's code block, gathers those of the legal children of the live beams, and keeps the best.

Shape legend: B users, K live beams, W children of the widest live node, C codes of the level, l codes generated so far.

Guarantees
    - With K beams, min(K, legal leaves) distinct leaves come out: every kept node leads to a legal item, so the
      number of live beams never falls.
    - Equal scores are broken by the lower leaf number (the lexicographically smaller code), whatever the batch or
      device.
    - A dead beam (score -inf inside the search) is never returned: leaf -1, score -inf.
    - A legal code to which the model gives probability 0 stays legal: it comes after all others, with score -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ...errors import GenRecError, IncompatibleComponentsError
from ..item_filter import ItemFilter
from ..trie import ItemTrie

# Floor of the log-probability of one legal code. Far below any real one, and L of them still sum to a finite float32.
_IMPOSSIBLE = -1e30


class CodeScorer(Protocol):
    """What a search needs of a model: log-probabilities of the next code after partial codes."""

    def score_codes(self, state: Any, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor: ...


def trie_beam_search(
    decoder: CodeScorer,
    state: Any,
    trie: ItemTrie,
    num_beams: int,
    node_masks: ItemFilter | Sequence[torch.Tensor] | None = None,
    *,
    batch_size: int,
    renormalize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best leaves of the trie under the model, best first.

    Args:
        decoder: has `score_codes(state, prefix_BKl, level) -> logp_BKC`. It is called once per level, at level 0 with
            K = 1.
        state: whatever `decoder` needs, `batch_size` rows; passed through untouched and never repeated per beam.
        trie: the catalogue, on the device of the scores.
        num_beams: beams kept per user.
        node_masks: items that may be returned, as an ItemFilter, or as the bool tables of `ItemTrie.prune`.
        batch_size: users B.
        renormalize: False adds log-probabilities over the level's whole code block (as `generate` does, which masks
            after log_softmax); True renormalises them over the legal children first, so that scores of all legal
            leaves sum to 1.

    Returns:
        leaves_BK (int64, -1 where a user has fewer legal leaves) and scores_BK (float32, -inf there).

    Raises:
        GenRecError: the model returned NaN.
        IncompatibleComponentsError: the model's code block is smaller than the trie's codebook.
    """
    device = trie.device
    nodes = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    scores = torch.zeros(batch_size, 1, dtype=torch.float32, device=device)
    if node_masks is not None:
        scores = scores.masked_fill(~_alive(node_masks, 0, nodes), -torch.inf)
    prefix = torch.zeros(batch_size, 1, 0, dtype=torch.long, device=device)
    for level in range(trie.num_levels):
        logp_BKC = decoder.score_codes(state, prefix, level)
        if logp_BKC.shape[-1] < trie.codebook_sizes[level]:
            raise IncompatibleComponentsError(
                f"level {level}: the model scores {logp_BKC.shape[-1]} codes, the catalogue has "
                f"{trie.codebook_sizes[level]}; "
                "use the tokenizer the model was trained with."
            )
        codes_BKW, children_BKW, legal_BKW = trie.expand(level, nodes)
        legal_BKW &= (scores > -torch.inf).unsqueeze(-1)
        if node_masks is not None:
            legal_BKW &= _alive(node_masks, level + 1, children_BKW)
        step_BKW = child_log_probs(logp_BKC, codes_BKW, legal_BKW, renormalize)
        total = (scores.unsqueeze(-1) + step_BKW).flatten(1)
        chosen = _best(total, num_beams)
        beam = chosen // codes_BKW.shape[-1]
        scores = total.gather(1, chosen)
        nodes = children_BKW.flatten(1).gather(1, chosen)
        code = codes_BKW.flatten(1).gather(1, chosen)
        prefix = torch.cat([prefix.gather(1, beam.unsqueeze(-1).expand(-1, -1, level)), code.unsqueeze(-1)], dim=-1)
    # beams are in leaf order here; a stable sort keeps the lower leaf first among equals
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    leaves = nodes.gather(1, order).masked_fill_(scores == -torch.inf, -1)
    return leaves, scores.masked_fill_(scores <= _IMPOSSIBLE / 2, -torch.inf)


def child_log_probs(
    logp_BKC: torch.Tensor, codes_BKW: torch.Tensor, legal_BKW: torch.Tensor, renormalize: bool
) -> torch.Tensor:
    """Log-probability of each child (float32), -inf where it is not legal. Floors legal ones at a finite value."""
    step = logp_BKC.gather(-1, codes_BKW).float()
    if bool((step.isnan() & legal_BKW).any()):
        row = int((step.isnan() & legal_BKW).flatten(1).any(-1).nonzero()[0])
        raise GenRecError(
            f"row {row}: the model returned NaN scores; check its weights for NaN and that the row's history is "
            "not empty."
        )
    step = step.clamp(min=_IMPOSSIBLE).masked_fill(~legal_BKW, -torch.inf)
    if renormalize:
        mass = step.logsumexp(-1, keepdim=True)
        step = torch.where(legal_BKW, (step - mass).clamp(min=_IMPOSSIBLE), -torch.inf)
    return step


def _alive(node_masks: ItemFilter | Sequence[torch.Tensor], level: int, nodes: torch.Tensor) -> torch.Tensor:
    if isinstance(node_masks, ItemFilter):
        return node_masks.alive(level, nodes)
    return node_masks[level].gather(1, nodes.flatten(1)).view_as(nodes)


def _best(total_BX: torch.Tensor, num_beams: int) -> torch.Tensor:
    """Positions of the `num_beams` largest entries per row, in ascending position; lower positions win ties.

    Live beams are kept in node order and children ascend inside a beam, so ascending position is ascending node number:
    this keeps the order for the next level without sorting.
    """
    width = total_BX.shape[1]
    live = int((total_BX > -torch.inf).sum(-1).max())
    keep = max(1, min(num_beams, live))
    if keep == width:
        return torch.arange(width, device=total_BX.device).expand(total_BX.shape[0], -1)
    threshold = total_BX.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = total_BX > threshold
    equal = total_BX == threshold
    room = keep - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].view(total_BX.shape[0], keep)


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
    items = trie.leaf_items[slots].long().masked_fill_(~valid, -1).flatten(1)
    scores = scores_BK.unsqueeze(-1).expand_as(valid).masked_fill(~valid, -torch.inf).flatten(1)
    if width > 1:  # close the gaps, keep the order
        order = (items < 0).to(torch.uint8).sort(dim=-1, stable=True).indices
        items, scores = items.gather(1, order), scores.gather(1, order)
    return items[:, :limit], scores[:, :limit]
