"""Generate, then retrieve: a beam's items and all cold items, ranked by the model's dense head (LIGER, arXiv 2411.18814).

A generator has learned that the codes of items outside its training never follow, so no beam finds them; a dense head that
knows items by their texts can rank them. The beam cuts a large catalogue down to K candidates, the cold items are united
with them, and the dense score alone orders the result.

Lossy. Relations: `num_candidates` = 0 is dense retrieval over the cold items only; with as many candidates as items it is
decoding "dense"; decoding "beam" is the generator alone.

Shape legend: B users, N items, K candidates of the beam, X items returned.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items, trie_beam_search
from .dense import dense
from .speculative import cold_mask


def generate_then_dense(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    num_candidates: int | None = None,
    cold_items: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "generate_then_dense".

    Args:
        decoder: scores codes, and has `score_dense(state) -> (B, N)`.
        num_candidates: beams K whose items are candidates; None = the width of the search, 0 = none.
        cold_items: items that training never saw, as indices or as a bool tensor (N,); None = `decoder.cold_items`
            where it has them, else none.

    Returns:
        items_BX (-1 padded), at most `config.search_width`, and scores_BX, those of `score_dense`.

    Raises:
        RequestError: an option out of range, or `config.dense_weight`, which would mix the generator in again.
        IncompatibleComponentsError: the model has no item scores, or scores of another catalogue.
        GenRecError: the model returned NaN.
    """
    if num_candidates is not None and (
        isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 0
    ):
        raise RequestError(f"num_candidates must be a whole number >= 0, got {num_candidates!r}.")
    if config.dense_weight:
        raise RequestError(
            f"decoding 'generate_then_dense' ranks by the dense score alone: leave dense_weight ({config.dense_weight}) at "
            "0, or use decoding='beam', whose scores it mixes."
        )
    width = config.search_width if num_candidates is None else num_candidates
    cold_N = cold_mask(decoder, cold_items, trie.num_items, trie.device)
    slots_N = torch.arange(trie.num_items, device=trie.device)
    items_N = trie.items_at(slots_N)
    candidates_BN = cold_N.repeat(batch_size, 1)
    if item_filter is not None:
        alive_BN = torch.zeros_like(candidates_BN)
        alive_BN[:, items_N] = item_filter.alive_slots(slots_N.expand(batch_size, -1))
        candidates_BN &= alive_BN
    if width:
        leaves, scores = trie_beam_search(
            decoder, state, trie, width, item_filter, batch_size=batch_size, renormalize=config.renormalize
        )
        found_BK, _ = leaves_to_items(trie, leaves, scores, width, item_filter)
        row, place = (found_BK >= 0).nonzero(as_tuple=True)
        candidates_BN[row, found_BK[row, place]] = True
    candidates = ItemFilter.from_mask(trie, candidates_BN)
    return dense(decoder, state, trie, config, candidates, batch_size=batch_size)
