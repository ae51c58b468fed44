"""Ranking by item scores: every catalogue item scored at once by the model's dense head, no codes spelled out.

The search of models whose identifiers are an input only (VQ-Rec, arXiv 2210.12316: a cosine of user and item vector).
Lossless: all items are scored. Time and memory grow with users x items.

Relations: for a model whose `score_codes` spell out the same distribution, "exhaustive" gives the same order.

Shape legend: B users, N items, X items returned.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import IncompatibleComponentsError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .kernel import IMPOSSIBLE, best_children, check_scores


def dense(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "dense". Equal scores fall to the lower code, then to the lower item index, as in a beam search.

    Returns:
        items_BX (-1 padded) and scores_BX, those of `score_dense`.

    Raises:
        IncompatibleComponentsError: the model has no item scores, or scores of another catalogue.
        GenRecError: the model returned NaN.
    """
    scores_BN = decoder.score_dense(state)
    if scores_BN is None:
        raise IncompatibleComponentsError(
            f"{type(decoder).__name__} has no item scores here; use decoding='beam', or a model with a dense head."
        )
    if scores_BN.shape != (batch_size, trie.num_items):
        raise IncompatibleComponentsError(
            f"{type(decoder).__name__} scored {tuple(scores_BN.shape)}, expected ({batch_size}, {trie.num_items}); use "
            "the tokenizer the model was made for."
        )
    check_scores(scores_BN)
    slots_N = torch.arange(trie.num_items, device=scores_BN.device)  # in the order of codes, which breaks ties
    items_N = trie.items_at(slots_N)
    scores = scores_BN.float().index_select(1, items_N).clamp(min=IMPOSSIBLE)
    if item_filter is not None:
        scores = scores.masked_fill(~item_filter.alive_slots(slots_N.expand(batch_size, -1)), -torch.inf)
    best = best_children(scores, config.search_width)
    best_scores, order = scores.gather(1, best).sort(dim=-1, descending=True, stable=True)
    items = items_N[best.gather(1, order)].masked_fill(best_scores == -torch.inf, -1)
    return items, best_scores.masked_fill(best_scores <= IMPOSSIBLE / 2, -torch.inf)
