"""From a scored trie to ranked items: the path that every model and every kind of request goes through.

A *decoder* here is anything with `start_decoding`, `score_codes` and `device`: a model with RecommendationMixin, or an
adapter of generation/decoding/ around a stock Hugging Face model. `config.decoding` names the search (strategies.py).

Shape legend: B users, T tokens, K beams or candidates, k items returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import RequestError
from .configuration_recommendation import RecommendationConfig
from .item_filter import ItemFilter
from .requests import (
    check_histories,
    check_something_left,
    resolve_allowed,
    seen_from_histories,
    seen_from_prompts,
)
from .strategies import DECODING_STRATEGIES, resolve_strategy
from .trie import ItemTrie


@dataclass(frozen=True)
class Recommendation:
    """One recommended item: its id, its score (a log-probability, fused with a dense head where there is one), rank
    from 1.
    """

    item_id: str
    score: float
    rank: int


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every submodule is back in the mode it had."""
    training = [module for module in model.modules() if module.training] if hasattr(model, "modules") else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def search_items(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    first_row: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Search, name the items, rescore, cut to k: items_Bk (-1 padded) and scores_Bk.

    Args:
        first_row: number of the batch's first user within the whole request (random searches seed by it).
    """
    if batch_size == 0:
        empty = torch.full((0, config.k), -1, dtype=torch.long, device=trie.device)
        return empty, empty.float()
    search = resolve_strategy(decoder, config)
    items, scores = search(decoder, state, trie, config, item_filter, batch_size=batch_size, first_row=first_row)
    rescore = getattr(decoder, "rescore_items", None)
    if rescore is not None:
        new_scores = rescore(state, items, scores, config)
        if new_scores is not scores:  # the order so far (score, then code) breaks ties among the new scores
            scores, order = new_scores.masked_fill(items < 0, -torch.inf).sort(dim=-1, descending=True, stable=True)
            items = items.gather(1, order)
            padding_last = (items < 0).to(torch.uint8).sort(dim=-1, stable=True).indices
            items, scores = items.gather(1, padding_last), scores.gather(1, padding_last)
    missing = config.k - items.shape[1]
    if missing > 0:
        items = torch.nn.functional.pad(items, (0, missing), value=-1)
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    return items[:, : config.k], scores[:, : config.k]


def search_requests(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    seen: Sequence[np.ndarray] | None,
    allowed: Sequence[np.ndarray] | None,
    **rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`search_items` with the users' own items left out, or kept with `config.repeat_weight`, as configured.

    Args:
        seen: item indices of each user's history; None where nothing is known of them.
        allowed: item indices that may be returned, per user; None: all.
        rows: `batch_size` and `first_row` of `search_items`.
    """
    if config.exclude_seen or seen is None or not config.repeat_weight:
        left_out = seen if config.exclude_seen else None
        return search_items(decoder, state, trie, config, ItemFilter.from_rows(trie, left_out, allowed), **rows)
    again = seen if allowed is None else [np.intersect1d(had, keep) for had, keep in zip(seen, allowed, strict=True)]
    new_items, repeats = ItemFilter.from_rows(trie, seen, allowed), ItemFilter.from_rows(trie, None, again)
    return search_with_repeats(decoder, state, trie, config, new_items, repeats, **rows)


def search_with_repeats(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    new_items: ItemFilter | None,
    repeats: ItemFilter | None,
    **rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One search among new items and one among those the user had, whose scores get `config.repeat_weight`, merged.

    Two searches because a beam that is filled by prefixes of seen items would not reach the new ones, however low the weight.

    Args:
        new_items, repeats: the two sets of each user; None: all items.

    Raises:
        RequestError: a search that draws its items: their order is not that of their scores.
    """
    if DECODING_STRATEGIES[config.decoding].seeded:
        raise RequestError(
            f"decoding {config.decoding!r} draws items, repeat_weight ({config.repeat_weight:g}) ranks them by their scores: "
            "set repeat_weight=0 or exclude_seen=True."
        )
    new_Bk, new_scores_Bk = search_items(decoder, state, trie, config, new_items, **rows)
    again_Bk, again_scores_Bk = search_items(decoder, state, trie, config, repeats, **rows)
    return merge_repeats(new_Bk, new_scores_Bk, again_Bk, again_scores_Bk, config.repeat_weight)


def merge_repeats(
    new_Bk: torch.Tensor,
    new_scores_Bk: torch.Tensor,
    again_Bk: torch.Tensor,
    again_scores_Bk: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of two ranked lists (-1 padded), `weight` added to the scores of the second; ties: new items first.

    Example:
        >>> new, again = torch.tensor([[4, 7]]), torch.tensor([[1, -1]])
        >>> merge_repeats(new, torch.tensor([[-1.0, -3.0]]), again, torch.tensor([[-0.5, -torch.inf]]), weight=-2.0)[0]
        tensor([[4, 1]])
    """
    items = torch.cat([new_Bk, again_Bk], 1)
    scores = torch.cat([new_scores_Bk, again_scores_Bk + weight], 1)
    last = torch.where(items < 0, torch.inf, -scores)  # an item of score -inf still stands before padding
    order = last.sort(dim=1, stable=True).indices
    padding_last = (items.gather(1, order) < 0).to(torch.uint8).sort(dim=1, stable=True).indices
    order = order.gather(1, padding_last)[:, : new_Bk.shape[1]]
    return items.gather(1, order), scores.gather(1, order)


def encoded_batches(
    model: Any,
    histories: list[list[str]],
    tokenizer: Any,
    config: RecommendationConfig,
    user_ids: Sequence[str] | None,
) -> Iterator[tuple[slice, tuple[torch.Tensor, torch.Tensor]]]:
    if user_ids is not None and len(user_ids) != len(histories):
        raise RequestError(f"{len(user_ids)} user_ids for {len(histories)} histories; pass one per history.")
    for start in range(0, len(histories), config.batch_size):
        rows = slice(start, start + config.batch_size)
        users = None if user_ids is None else list(user_ids[rows])
        encoded = tokenizer.encode_histories(
            histories[rows], user_ids=users, max_items=config.max_history, return_tensors="pt"
        )
        yield rows, (encoded["input_ids"].to(model.device), encoded["attention_mask"].to(model.device))


def recommend_histories(
    decoder: Any,
    histories: Sequence[Sequence[str]],
    tokenizer: Any,
    config: RecommendationConfig,
    *,
    allowed_items: Any = None,
    user_ids: Sequence[str] | None = None,
) -> list[list[Recommendation]]:
    """The body of `recommend` for anything with `start_decoding`, `score_codes` and `device`."""
    rows = check_histories(histories)
    allowed = resolve_allowed(tokenizer, allowed_items, len(rows))
    seen = seen_from_histories(tokenizer, rows) if config.exclude_seen or config.repeat_weight else None
    check_something_left(allowed, seen if config.exclude_seen else None)
    trie = ItemTrie.from_tokenizer(tokenizer, decoder.device)
    results: list[list[Recommendation]] = []
    with evaluating(decoder):
        for part, (input_ids, attention_mask) in encoded_batches(decoder, rows, tokenizer, config, user_ids):
            state = decoder.start_decoding(input_ids, attention_mask)
            parts = None if seen is None else seen[part], None if allowed is None else allowed[part]
            items, scores = search_requests(
                decoder, state, trie, config, *parts, batch_size=input_ids.shape[0], first_row=part.start
            )
            results.extend(name_items(items, scores, tokenizer.item_ids))
    return results


def name_items(items_Bk: torch.Tensor, scores_Bk: torch.Tensor, item_ids: Sequence[str]) -> list[list[Recommendation]]:
    """Item indices and scores as lists of Recommendation; padding is dropped."""
    return [
        [
            Recommendation(str(item_ids[item]), score, rank)
            for rank, (item, score) in enumerate(zip(items, scores), start=1)
            if item >= 0
        ]
        for items, scores in zip(items_Bk.tolist(), scores_Bk.tolist())
    ]


def recommend_prompts(
    decoder: Any,
    prompts_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    histories: Sequence[Sequence[str]] | None,
    tokenizer: Any,
    config: RecommendationConfig,
    allowed_items: Any,
) -> list[list[Recommendation]]:
    batch = prompts_BT.shape[0]
    trie = ItemTrie.from_tokenizer(tokenizer, decoder.device)
    allowed = resolve_allowed(tokenizer, allowed_items, batch)
    seen = None
    if histories is not None and len(histories) != batch:
        raise RequestError(f"{len(histories)} histories for {batch} prompts; pass one per prompt.")
    if config.exclude_seen or config.repeat_weight:
        if histories is not None:
            seen = seen_from_histories(tokenizer, check_histories(histories))
        else:
            seen = seen_from_prompts(tokenizer, prompts_BT.masked_fill(mask_BT == 0, -1), trie)
    check_something_left(allowed, seen if config.exclude_seen else None)
    results: list[list[Recommendation]] = []
    for start in range(0, batch, config.batch_size):
        part = slice(start, start + config.batch_size)
        state = decoder.start_decoding(prompts_BT[part], mask_BT[part])
        parts = None if seen is None else seen[part], None if allowed is None else allowed[part]
        items, scores = search_requests(
            decoder, state, trie, config, *parts, batch_size=len(prompts_BT[part]), first_row=start
        )
        results.extend(name_items(items, scores, tokenizer.item_ids))
    return results
