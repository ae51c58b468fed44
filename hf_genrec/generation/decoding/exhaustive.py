"""Exact scores of the whole catalogue: every shared prefix is scored once, with one new code per trie node.

The yardstick of every approximate search: a beam can be checked against it, and `score_all` is built on it.

The trie is walked depth first in chunks of neighbouring nodes of the last level but one: each chunk starts at the root,
goes down through the ancestors of its own nodes only, and ends in a contiguous range of leaves. Neighbours share their
ancestors, so no more than one node per level is visited twice at the border of two chunks, and memory is that of one
chunk however large the catalogue is. Inside a chunk a decoder's BeamCache runs one code per node.

Shape legend: B users, n_L leaves, S nodes of a chunk on one level, S' those whose items go on, W children of the widest
node, C codes of the level.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items, ranked_leaves
from .beam_cache import start_beams
from .kernel import IMPOSSIBLE, best_children, check_scores, score_children

_CHUNK_ROWS = 4096  # B * S beams run together
_CHUNK_ELEMENTS = 2**22  # B * S * C scores held at a time (16 MiB in float32)


def score_all_leaves(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    renormalize: bool = False,
    chunk_rows: int = _CHUNK_ROWS,
    chunk_elements: int = _CHUNK_ELEMENTS,
) -> torch.Tensor:
    """Log-probability of every leaf: (B, n_L) float32.

    Args:
        decoder: has `start_beams(state) -> BeamCache`, or `score_codes(state, prefix_BKl, level) -> logp_BKC`.
        item_filter: items that count; other leaves score -inf, and parts of the trie that no user may see are skipped.
        renormalize: as in `trie_beam_search`; over the codes that lead to an item of `item_filter`.
        chunk_rows, chunk_elements: rows run together and scores held at a time; they bound memory, and change nothing
            else.

    Raises:
        GenRecError: the model returned NaN.
        IncompatibleComponentsError: the model's code block is smaller than the trie's codebook.
    """
    scores = _leaf_scores(decoder, state, trie, item_filter, batch_size, renormalize, chunk_rows, chunk_elements)
    return scores.masked_fill_(scores <= IMPOSSIBLE / 2, -torch.inf)


def exhaustive(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "exhaustive": all items scored, the best `config.search_width` returned. Lossless; costs one row of
    the model per trie node.

    Equal scores fall to the lower leaf (the lexicographically smaller code), then the lower item index, as in a beam
    search.
    """
    scores = _leaf_scores(
        decoder, state, trie, item_filter, batch_size, config.renormalize, _CHUNK_ROWS, _CHUNK_ELEMENTS
    )
    best = best_children(scores, config.search_width)  # ascending positions are ascending leaves
    leaves, best_scores = ranked_leaves(best, scores.gather(1, best))
    return leaves_to_items(trie, leaves, best_scores, config.search_width, item_filter)


class _Level(NamedTuple):
    """The nodes of a chunk on one level.

    Attributes:
        nodes_S: their numbers, ascending.
        parents_S: index of each one's parent among the nodes of the level above.
    """

    nodes_S: torch.Tensor
    parents_S: torch.Tensor


def _leaf_scores(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    item_filter: ItemFilter | None,
    batch_size: int,
    renormalize: bool,
    chunk_rows: int,
    chunk_elements: int,
) -> torch.Tensor:
    """As `score_all_leaves`, with impossible items at their finite floor (they still have an order)."""
    device, last = trie.device, trie.num_levels - 1
    scores = torch.full((batch_size, trie.num_leaves), -torch.inf, device=device)
    if batch_size == 0:
        return scores
    nodes = torch.arange(trie.num_nodes(last), device=device)
    if item_filter is not None:
        nodes = nodes[item_filter.alive(last, nodes.expand(batch_size, -1)).any(0)]
    parents = {level: trie.parents(level) for level in range(1, trie.num_levels)}
    chunk = max(1, min(chunk_rows, chunk_elements // max(trie.codebook_sizes)) // batch_size)
    for part in nodes.split(chunk):
        if part.numel():
            chain = _with_ancestors(part, parents, last)
            leaves, found = _walk(decoder, state, trie, item_filter, batch_size, renormalize, chain)
            scores[:, leaves] = found
    return scores


def _with_ancestors(nodes_S: torch.Tensor, parents: dict[int, torch.Tensor], last: int) -> list[_Level]:
    """The chunk's nodes on levels 0 to `last`."""
    chain: list[_Level] = []
    for level in range(last, 0, -1):
        above, index = torch.unique_consecutive(parents[level][nodes_S], return_inverse=True)
        chain.append(_Level(nodes_S, index))
        nodes_S = above
    return [_Level(nodes_S, torch.zeros_like(nodes_S)), *reversed(chain)]


def _walk(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    item_filter: ItemFilter | None,
    batch_size: int,
    renormalize: bool,
    chain: list[_Level],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves below a chunk's nodes and their scores (B, leaves)."""
    beams = start_beams(decoder, state, batch_size, trie.device)
    scores = torch.zeros(batch_size, 1, device=trie.device)
    ended = torch.zeros(1, dtype=torch.bool, device=trie.device)  # nodes behind the end of a shorter item
    for level in range(trie.num_levels):
        nodes = chain[level].nodes_S
        start, end = trie.child_range(level, nodes)
        if level + 1 < trie.num_levels:
            below = chain[level + 1]
        else:
            count = end - start
            index = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), count)
            offset = torch.arange(len(index), device=nodes.device) - (count.cumsum(0) - count)[index]
            below = _Level(start[index] + offset, index)
        scores_below, ended_below = scores[:, below.parents_S], ended[below.parents_S]
        if not bool(ended.all()):
            going = (~ended).nonzero()[:, 0]
            children = score_children(
                trie,
                level,
                nodes[going].expand(batch_size, -1),
                scores[:, going],
                beams.score(level, not renormalize),
                item_filter=item_filter,
                renormalize=renormalize,
            )
            row = ((~ended).cumsum(0) - 1)[below.parents_S]  # of the parent among the nodes that go on
            place = row * children.codes_BKW.shape[-1] + below.nodes_S - start[below.parents_S]
            place = place.masked_fill(ended_below, 0)
            scores_below = scores_below + children.step_BKW.flatten(1)[:, place].masked_fill(ended_below, 0.0)
            if level + 1 < trie.num_levels:
                codes = children.codes_BKW[0].flatten()[place]
                if trie.has_ends:
                    ended_below = ended_below | (codes == trie.codebook_sizes[level])
                kept = (~ended_below).nonzero()[:, 0]
                if kept.numel():
                    beams.reorder(row[kept].expand(batch_size, -1), codes[kept].expand(batch_size, -1), level)
        scores, ended = scores_below, ended_below
    check_scores(scores)
    return below.nodes_S, scores
