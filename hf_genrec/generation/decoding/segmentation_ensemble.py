"""Inference ensemble over several token sequences of one history (ActionPiece, arXiv 2502.13581).

A tokenizer that may write a history in several ways gives q of them; each is searched by itself, and an item gets the
sum of 1 / log2(rank + 1) over the q lists (as in the published code; a note about the paper says that scores are
averaged). What only some of them find stays in the list.

Shape legend: B users, q segmentations, X items returned.

Relations: one segmentation is the strategy "beam" unchanged, scores included.
"""

from __future__ import annotations

from typing import Any

import torch

from ..configuration_recommendation import RecommendationConfig
from ..fusion import discounted_rank
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import beam


def segmentation_ensemble(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "segmentation_ensemble": beam search per segmentation, ranks added up. Lossy.

    Args:
        state: with an attribute `segmentations`, one state of B rows each; any other state is one segmentation.

    Returns:
        items_BX and scores_BX: sums of discounted ranks (log-probabilities where there is one segmentation).
    """
    states = getattr(state, "segmentations", (state,))
    lists = [beam(decoder, one, trie, config, item_filter, batch_size=batch_size) for one in states]
    if len(lists) == 1:
        return lists[0]
    return discounted_rank(lists, k=config.search_width)
