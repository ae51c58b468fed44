"""Searches for models that predict all digits of an item at once (RPG, arXiv 2506.05781).

Given the history the digits are independent, so an item's score is the mean of its digits' log-probabilities: a gather
of L numbers. "parallel" scores every item that way; "graph" visits a part of the catalogue by walking over a graph in
which items with similar digits are neighbours.

A decoder gives `score_digits(state) -> logp_BLC`, once per request, and for "graph" `digit_vectors() -> (L, C, d)`, unit
vectors of the codes. Both searches work on *leaves* (distinct codes): items that share a code have one score.

Relations: "graph" is "parallel" once it visits everything (`num_neighbours` >= leaves and one step); "beam" adds the same
log-probabilities level by level, so a wide enough beam gives the items of "parallel" and L times its scores.

Shape legend: B users, N leaves, L levels (digits), C codes of the largest level, X leaves asked for per user, K leaves
kept per user, E neighbours per leaf, d width of the code vectors, Q leaves of a chunk.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from ...errors import IncompatibleComponentsError, RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items
from .kernel import IMPOSSIBLE, best_children, check_scores

logger = logging.getLogger(__name__)

_CHUNK_ELEMENTS = 2**20  # scores, or gathered digits, held at a time; larger temporaries cost fresh pages
_QUERIES = 64  # leaves whose neighbours are searched together
_GRAPHS_KEPT = 2  # per catalogue: a model and, say, its moving average
# Keyed by catalogue; a graph is used again only where the code vectors are equal number by number, so training on makes a
# new one. Weak: both go with their trie.
_leaf_codes: WeakKeyDictionary[ItemTrie, torch.Tensor] = WeakKeyDictionary()
_graphs: WeakKeyDictionary[ItemTrie, list[tuple[int, torch.Tensor, torch.Tensor]]] = WeakKeyDictionary()


def parallel(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "parallel": every item scored, lossless. Ties go to the lower leaf, then to the lower item.

    Time grows with items x digits. Scores are held in chunks; what grows with the catalogue is the table of leaf codes.

    Returns:
        items_BX (-1 padded) and scores_BX, the mean log-probability of an item's digits.

    Raises:
        IncompatibleComponentsError: items of different code lengths, or a model of other codebooks.
        GenRecError: the model returned NaN.
    """
    logp_BLC = _digits(decoder, state, trie, batch_size)
    leaves, scores = scan_leaves(logp_BLC, leaf_codes(trie), config.search_width, trie, item_filter)
    return leaves_to_items(trie, leaves, scores, config.search_width, item_filter)


def graph(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    num_neighbours: int = 50,
    num_steps: int = 3,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "graph": lossy, see `graph_search`, of which these are the items and scores."""
    found = graph_search(
        decoder,
        state,
        trie,
        config,
        item_filter,
        batch_size=batch_size,
        num_neighbours=num_neighbours,
        num_steps=num_steps,
        seed=seed,
    )
    logger.debug("graph search visited %.2f %% of the catalogue", 100 * float(found.visited_B.mean()))
    return found.items_BX, found.scores_BX


class GraphSearch(NamedTuple):
    """What a graph search found, and the share (B,) of the catalogue's distinct codes that it scored."""

    items_BX: torch.Tensor
    scores_BX: torch.Tensor
    visited_B: torch.Tensor


def graph_search(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    num_neighbours: int = 50,
    num_steps: int = 3,
    seed: int = 0,
) -> GraphSearch:
    """Graph-constrained propagation: lossy, at a cost that does not grow with the catalogue (once the graph is made).

    The walk starts from `config.search_width` random leaves, the same for every user. Each step scores all neighbours of
    the current beam (a leaf is its own first neighbour) and keeps the best. What is returned are the best of all leaves
    ever scored, so more steps never lose an item: recall against the full scan can only rise.

    The walk goes through items that the filter forbids, but only allowed ones are returned. A user for whom fewer than
    min(k, allowed) allowed items were visited (a narrow allow-list) gets the full scan instead: exact, share 1.

    Args:
        num_neighbours: edges per leaf, by `neighbour_graph`; made once per catalogue and weights, which takes time
            quadratic in the number of leaves.
        num_steps: propagation steps; 0 returns the best of the random start.
        seed: of the start.

    Raises:
        RequestError: an option out of range.
        IncompatibleComponentsError, GenRecError: as in `parallel`.
    """
    for name, value, least in (("num_neighbours", num_neighbours, 1), ("num_steps", num_steps, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RequestError(f"decoding_options {name} must be a whole number >= {least}, got {value!r}.")
    logp_BLC = _digits(decoder, state, trie, batch_size)
    codes_NL, width = leaf_codes(trie), config.search_width
    num_leaves = len(codes_NL)
    neighbours_NE = neighbour_graph(decoder.digit_vectors(), trie, num_neighbours) if num_steps else None
    start = torch.randperm(num_leaves, generator=torch.Generator().manual_seed(seed))[:width].sort().values
    beam_BK = start.to(trie.device).expand(batch_size, -1)
    found, found_scores = [beam_BK], [score_leaves(logp_BLC, codes_NL, beam_BK)]
    for _ in range(num_steps):
        assert neighbours_NE is not None
        candidates = _distinct(neighbours_NE[beam_BK].flatten(1).long(), num_leaves)
        found.append(candidates)
        found_scores.append(score_leaves(logp_BLC, codes_NL, candidates))
        beam_BK = candidates.gather(1, best_children(found_scores[-1], width))
    visited_BX, order = torch.cat(found, dim=1).sort(dim=-1)
    new_BX = _first_of_equals(visited_BX) & (visited_BX < num_leaves)
    allowed_BX = new_BX
    if item_filter is not None:
        allowed_BX = new_BX & item_filter.alive(trie.num_levels, visited_BX.clamp(max=num_leaves - 1))
    scores = torch.cat(found_scores, dim=1).gather(1, order).masked_fill(~allowed_BX, -torch.inf)
    best = best_children(scores, width)  # in ascending order: the lower leaf stays first among equals
    scores, order = scores.gather(1, best).sort(dim=-1, descending=True, stable=True)
    leaves = visited_BX.gather(1, best).gather(1, order).masked_fill_(scores == -torch.inf, -1)
    items, scores = leaves_to_items(trie, leaves, scores, width, item_filter)
    visited_B = new_BX.sum(-1) / num_leaves
    return _scan_where_short(items, scores, visited_B, logp_BLC, trie, config, item_filter)


def _scan_where_short(
    items: torch.Tensor,
    scores: torch.Tensor,
    visited_B: torch.Tensor,
    logp_BLC: torch.Tensor,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None,
) -> GraphSearch:
    """Replace the rows that hold fewer items than they could by those of the full scan."""
    if item_filter is None:  # the start alone holds min(k, N) leaves
        return GraphSearch(items, scores, visited_B)
    short = ((items >= 0).sum(-1) < item_filter.num_alive().clamp(max=config.k)).nonzero().flatten()
    if not len(short):
        return GraphSearch(items, scores, visited_B)
    rows_filter = item_filter.take(short)
    leaves, leaf_scores = scan_leaves(logp_BLC[short], leaf_codes(trie), config.search_width, trie, rows_filter)
    exact, exact_scores = leaves_to_items(trie, leaves, leaf_scores, config.search_width, rows_filter)
    width = max(items.shape[1], exact.shape[1])
    return GraphSearch(
        _widened(items, width, -1).index_copy(0, short, _widened(exact, width, -1)),
        _widened(scores, width, -torch.inf).index_copy(0, short, _widened(exact_scores, width, -torch.inf)),
        visited_B.index_fill(0, short, 1.0),
    )


def _widened(table_BX: torch.Tensor, width: int, value: float) -> torch.Tensor:
    return F.pad(table_BX, (0, width - table_BX.shape[1]), value=value)


def _digits(decoder: Any, state: Any, trie: ItemTrie, batch_size: int) -> torch.Tensor:
    logp_BLC = decoder.score_digits(state).float()
    levels, size = logp_BLC.shape[1:]
    if levels != trie.num_levels or size < max(trie.codebook_sizes):
        raise IncompatibleComponentsError(
            f"the model scores {levels} digits of {size} codes, the catalogue has {trie.num_levels} of up to "
            f"{max(trie.codebook_sizes)}; use the tokenizer the model was trained with."
        )
    check_scores(logp_BLC.reshape(batch_size, -1))
    return logp_BLC.clamp(min=IMPOSSIBLE)


def leaf_codes(trie: ItemTrie) -> torch.Tensor:
    """Codes of every leaf (N, L) in a small dtype, made once per trie (by way of an int64 table).

    Raises:
        IncompatibleComponentsError: items of different code lengths.
    """
    codes = _leaf_codes.get(trie)
    if codes is None:
        if trie.has_ends:
            raise IncompatibleComponentsError(
                "digits are predicted in parallel, so every item needs all of them: this catalogue holds codes of "
                "different lengths; use decoding='beam'."
            )
        dtype = torch.uint8 if max(trie.codebook_sizes) <= 256 else torch.int32
        codes = trie.node_prefixes(trie.num_levels).to(dtype)
        _leaf_codes[trie] = codes
    return codes


def score_leaves(logp_BLC: torch.Tensor, codes_NL: torch.Tensor, leaves_BX: torch.Tensor) -> torch.Tensor:
    """Mean log-probability (B, X) of the digits of chosen leaves; -inf for leaf N (padding)."""
    batch, levels, size = logp_BLC.shape
    table = logp_BLC.reshape(batch, levels * size)
    offsets = torch.arange(levels, device=codes_NL.device) * size
    parts = []
    for part in leaves_BX.split(max(1, _CHUNK_ELEMENTS // max(1, batch * levels)), dim=1):
        absent = part >= len(codes_NL)
        digits = codes_NL[part.masked_fill(absent, 0)].long() + offsets
        total = table.gather(1, digits.flatten(1)).view(*part.shape, levels).sum(-1) / levels
        parts.append(total.masked_fill(absent, -torch.inf))
    return torch.cat(parts, dim=1)


def scan_leaves(
    logp_BLC: torch.Tensor,
    codes_NL: torch.Tensor,
    width: int,
    trie: ItemTrie | None = None,
    item_filter: ItemFilter | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` leaves of the largest mean over digits, best first, over the whole catalogue in chunks.

    Args:
        logp_BLC: a number per user, digit and code.
        item_filter: leaves without an allowed item are left out (needs `trie`).

    Returns:
        leaves_BK (int64, -1 where a user has fewer) and scores_BK (-inf there). Ties go to the lower leaf.
    """
    batch, levels, size = logp_BLC.shape
    table_xB = logp_BLC.permute(1, 2, 0).reshape(levels * size, batch)
    table_xB = table_xB.clone(memory_format=torch.contiguous_format)  # canonical strides: embedding_bag's fast path
    offsets = torch.arange(levels, device=codes_NL.device) * size
    best_leaves = torch.zeros(batch, 0, dtype=torch.long, device=codes_NL.device)
    best_scores = torch.zeros(batch, 0, device=codes_NL.device)
    chunk = max(1, _CHUNK_ELEMENTS // max(batch, levels))
    for first in range(0, len(codes_NL), chunk):
        codes_QL = codes_NL[first : first + chunk].long() + offsets
        # one row per leaf: the sum of L rows of the table, for all users at once
        scores = F.embedding_bag(codes_QL, table_xB, mode="sum").t() / levels
        leaves = torch.arange(first, first + len(codes_QL), device=codes_NL.device).expand(batch, -1)
        if item_filter is not None:
            assert trie is not None
            scores = scores.masked_fill(~item_filter.alive(trie.num_levels, leaves.contiguous()), -torch.inf)
        leaves, scores = torch.cat([best_leaves, leaves], dim=1), torch.cat([best_scores, scores], dim=1)
        kept = best_children(scores, width)  # in ascending order: the lower leaf stays first among equals
        best_leaves, best_scores = leaves.gather(1, kept), scores.gather(1, kept)
    best_scores, order = best_scores.sort(dim=-1, descending=True, stable=True)
    return best_leaves.gather(1, order).masked_fill_(best_scores == -torch.inf, -1), best_scores


def neighbour_graph(vectors_LCd: torch.Tensor, trie: ItemTrie, num_neighbours: int) -> torch.Tensor:
    """The most similar leaves of every leaf, itself first: (N, E) int32, E = min(num_neighbours, N).

    The weight of an edge is the mean over digits of (1 + cosine of the two code vectors) / 2. Weights are made for some
    leaves at a time, never for all pairs at once; the result is kept with the trie for as long as the vectors are the same
    (`_GRAPHS_KEPT` per catalogue). Time: N * N * L table look-ups (12,101 leaves of 32 digits: 10 s on one
    thread).
    """
    vectors = vectors_LCd.detach().float()
    kept = _graphs.setdefault(trie, [])
    for number, old_vectors, graph_NE in kept:
        if number == num_neighbours and old_vectors.shape == vectors.shape and torch.equal(old_vectors, vectors):
            return graph_NE
    codes_NL = leaf_codes(trie)
    levels = torch.arange(codes_NL.shape[1], device=codes_NL.device)
    similarity_LCC = (1 + torch.bmm(vectors, vectors.transpose(1, 2))) / 2
    parts = []
    for first in range(0, len(codes_NL), _QUERIES):
        own_QL = codes_NL[first : first + _QUERIES].long()
        # a leaf as a "user": what each code of each digit is worth to it
        near, _ = scan_leaves(similarity_LCC[levels, own_QL], codes_NL, num_neighbours)
        own = torch.arange(first, first + len(own_QL), device=near.device).unsqueeze(1)
        # rounding, or another leaf of identical code vectors, must not push a leaf out of its own neighbours
        elsewhere = (near == own).to(torch.uint8).sort(dim=1, stable=True).indices[:, : near.shape[1] - 1]
        parts.append(torch.cat([own, near.gather(1, elsewhere)], dim=1).int())
    graph_NE = torch.cat(parts)
    kept.insert(0, (num_neighbours, vectors.clone(), graph_NE))
    del kept[_GRAPHS_KEPT:]
    return graph_NE


def _first_of_equals(sorted_BX: torch.Tensor) -> torch.Tensor:
    return F.pad(sorted_BX[:, 1:] != sorted_BX[:, :-1], (1, 0), value=True)


def _distinct(leaves_BX: torch.Tensor, num_leaves: int) -> torch.Tensor:
    """Each row's distinct leaves, ascending, padded with `num_leaves` to the longest row."""
    sorted_BX = leaves_BX.sort(dim=-1).values
    place_BX = _first_of_equals(sorted_BX).cumsum(-1) - 1
    result = sorted_BX.new_full((len(sorted_BX), int(place_BX[:, -1].max()) + 1), num_leaves)
    return result.scatter_(1, place_BX, sorted_BX)  # equal leaves write the same number to the same place
