"""Beam search steered by item probabilities: D3's text-free assistance (arXiv 2406.14900).

At each step the log-probability of a token is mixed with that of the items below it:
`alpha * log p_model + (1 - alpha) * log(mass of the items below the child / mass below the parent)`, where the mass comes
from a model that knows items and no words (`score_dense`). Scores are sums without length normalisation.

Lossy, like `beam`. Relations: alpha = 1 is `beam`; alpha = 0 ranks by the item probabilities alone.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import IncompatibleComponentsError, RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..logits_process_prefix_marginal import PrefixMarginal
from ..trie import ItemTrie
from .beam import leaves_to_items, trie_beam_search


def prefix_marginal(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    alpha: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "prefix_marginal".

    Args:
        alpha: weight of the generative model, 0 to 1.

    Raises:
        RequestError: alpha outside 0 to 1.
        IncompatibleComponentsError: the model has no item scores (`score_dense` gives None).
    """
    if not 0 <= alpha <= 1:
        raise RequestError(f"alpha must be between 0 and 1, got {alpha!r}.")
    scores_BN = decoder.score_dense(state)
    if scores_BN is None:
        raise IncompatibleComponentsError(
            f"{type(decoder).__name__} has no item scores here; give the model an assistant, or use decoding='beam'."
        )
    scores_BN = scores_BN.float()
    if item_filter is not None:  # mass of items that may not be returned must not draw a beam
        legal = item_filter.alive_slots(trie.item_slots.expand(batch_size, -1))
        scores_BN = scores_BN.masked_fill(~legal & legal.any(-1, keepdim=True), -torch.inf)
    marginal = PrefixMarginal(trie, scores_BN.softmax(-1), alpha)
    width = config.search_width
    leaves, scores = trie_beam_search(
        decoder,
        state,
        trie,
        width,
        item_filter,
        batch_size=batch_size,
        renormalize=config.renormalize,
        adjust=marginal,
    )
    return leaves_to_items(trie, leaves, scores, width, item_filter)
