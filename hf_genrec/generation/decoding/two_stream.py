"""Search for models that write an item's codes in independent streams (EAGER, arXiv 2406.14017).

An item's codes are those of one tree per stream, one after the other, and given the history the streams know nothing of
each other. So each stream is searched by itself, with beams over its own trie; the items found are put together and ranked
by the sum of their log-probabilities in all streams. An item that one stream's beams missed gets its score there too.

A decoder gives `stream_levels` (codes of each stream) and `score_stream(state, stream, prefix_BKl, level) -> logp_BKC`.

Relations: with beams for every item the result is "exhaustive" on the same model, score for score. "beam" over the joined
codes adds the same log-probabilities, but has chosen its items by the first stream before it hears of the second. One
stream (`streams=[0]`) is "beam" on a model that has only that stream.

Shape legend: B users, N items, L levels of a stream, K beams, X candidates, W children, S listed items, l codes so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...errors import IncompatibleComponentsError, RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items, trie_beam_search
from .beam_cache import CodeScores
from .kernel import IMPOSSIBLE, check_scores, score_children

# The streams' tries go with the trie of the whole codes.
_tries: WeakKeyDictionary[ItemTrie, dict[tuple[int, ...], list[ItemTrie]]] = WeakKeyDictionary()


def stream_tries(trie: ItemTrie, stream_levels: Sequence[int]) -> list[ItemTrie]:
    """One trie per stream over the same items, made once per catalogue.

    Raises:
        IncompatibleComponentsError: streams that do not add up to the levels, or items of different code lengths.
    """
    levels = tuple(int(level) for level in stream_levels)
    if sum(levels) != trie.num_levels:
        raise IncompatibleComponentsError(
            f"the model writes streams of {list(levels)} codes, the catalogue has {trie.num_levels}; use the tokenizer "
            "the model was trained with."
        )
    if trie.has_ends:
        raise IncompatibleComponentsError(
            "streams are told apart by their place, so every item needs all codes: this catalogue holds codes of "
            "different lengths; use decoding='beam'."
        )
    made = _tries.setdefault(trie, {})
    if levels not in made:
        codes_NL = trie.node_prefixes(trie.num_levels)[trie.item_leaf_N]
        sizes = list(trie.codebook_sizes)
        made[levels] = []
        first = 0
        for level in levels:
            part = slice(first, first + level)
            made[levels].append(ItemTrie.from_codes(codes_NL[:, part], sizes[part]).to(trie.device))
            first += level
    return made[levels]


def filter_for(trie: ItemTrie, item_filter: ItemFilter | None) -> ItemFilter | None:
    """The same item sets over another trie of the same items."""
    if item_filter is None:
        return None
    slots_BS = item_filter.slots_BS
    padding_BS = slots_BS >= trie.num_items
    items_BS = item_filter.trie.items_at(slots_BS.masked_fill(padding_BS, 0))
    moved_BS = trie.slots_of(items_BS).masked_fill(padding_BS, trie.num_items)
    return ItemFilter(trie, moved_BS.sort(dim=-1).values.contiguous(), item_filter.keep_listed)


class _Stream:
    """One stream of a decoder, as the beam search wants a decoder."""

    def __init__(self, decoder: Any, stream: int) -> None:
        self.decoder, self.stream = decoder, stream

    def score_codes(self, state: Any, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor:
        return self.decoder.score_stream(state, self.stream, prefix_BKl, level)


def score_items(
    scorer: Any,
    state: Any,
    trie: ItemTrie,
    items_BX: torch.Tensor,
    item_filter: ItemFilter | None = None,
    renormalize: bool = False,
) -> torch.Tensor:
    """Log-probabilities (B, X) of given items, float32: what a beam that reached them would have.

    Args:
        scorer: has `score_codes(state, prefix_BKl, level)`.
        items_BX: item indices that the filter lets through.
    """
    path = [trie.item_leaf_N[items_BX]]  # nodes of the items, leaf first
    for level in range(trie.num_levels, 1, -1):
        path.insert(0, trie.parents(level)[path[0]])
    nodes = torch.zeros_like(items_BX[:, :1])  # one beam, the root, until the items part
    prefix = nodes.new_zeros(*nodes.shape, 0)
    total = torch.zeros(items_BX.shape, dtype=torch.float32, device=items_BX.device)
    for level, below in enumerate(path):
        logp = scorer.score_codes(state, prefix, level)
        alive = torch.zeros(nodes.shape, dtype=torch.float32, device=nodes.device)
        children = score_children(
            trie, level, nodes, alive, CodeScores(logp), item_filter=item_filter, renormalize=renormalize
        )
        start, _ = trie.child_range(level, nodes)
        rank = (below - start).unsqueeze(-1)
        step, codes = (part.expand(*items_BX.shape, -1) for part in (children.step_BKW, children.codes_BKW))
        total = total + step.gather(-1, rank).squeeze(-1)
        chosen = codes.gather(-1, rank)
        prefix = torch.cat([prefix.expand(*items_BX.shape, -1), chosen], dim=-1)
        nodes = below
    return total


def two_stream(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    streams: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "two_stream": beams in each stream, the union ranked by the sum over streams. Lossy.

    Args:
        streams: numbers of the streams to search and to sum over; None = all.

    Returns:
        items_BX (int64, -1 padded), best first, and scores_BX (float32, -inf there); equal scores fall to the lower leaf
        of the joined codes, then to the lower item. `config.renormalize` is taken within each stream.

    Raises:
        RequestError: no such stream.
        IncompatibleComponentsError: a catalogue with other streams than the model's.
        GenRecError: the model returned NaN.
    """
    levels = list(decoder.stream_levels)
    chosen = list(range(len(levels))) if streams is None else list(streams)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(levels))):
        raise RequestError(
            f"decoding_options streams must be different numbers from 0 to {len(levels) - 1}, got {streams!r}."
        )
    width, tries = config.search_width, stream_tries(trie, levels)
    parts = [(_Stream(decoder, stream), tries[stream], filter_for(tries[stream], item_filter)) for stream in chosen]
    found = []
    for scorer, own_trie, own_filter in parts:
        leaves, scores = trie_beam_search(
            scorer, state, own_trie, width, own_filter, batch_size=batch_size, renormalize=config.renormalize
        )
        found.append(leaves_to_items(own_trie, leaves, scores, width, own_filter)[0])
    items_BX = _union(trie, torch.cat(found, dim=1))
    known_BX = items_BX >= 0
    total = torch.zeros(items_BX.shape, dtype=torch.float32, device=items_BX.device)
    for scorer, own_trie, own_filter in parts:
        total = total + score_items(scorer, state, own_trie, items_BX.clamp(min=0), own_filter, config.renormalize)
    total = total.masked_fill(~known_BX, -torch.inf)
    check_scores(total)
    total, order = total.sort(dim=-1, descending=True, stable=True)
    items_BX = items_BX.gather(1, order)
    return items_BX[:, :width], total.masked_fill(total <= IMPOSSIBLE / 2, -torch.inf)[:, :width]


def _union(trie: ItemTrie, items_BX: torch.Tensor) -> torch.Tensor:
    """Every item once, in the order of the catalogue's leaves, -1 behind."""
    slots_BX = torch.where(items_BX < 0, trie.num_items, trie.slots_of(items_BX.clamp(min=0))).sort(dim=-1).values
    repeated = torch.zeros_like(slots_BX, dtype=torch.bool)
    repeated[:, 1:] = slots_BX[:, 1:] == slots_BX[:, :-1]
    slots_BX = slots_BX.masked_fill(repeated, trie.num_items).sort(dim=-1).values
    none_BX = slots_BX >= trie.num_items
    return trie.items_at(slots_BX.masked_fill(none_BX, 0)).masked_fill(none_BX, -1)
