"""Certified top k: a beam search that knows when its list is the exact one, and searches on until it is.

This search is this library's own design, not a published method. It rests on one fact: the log-probability of a code is
at most 0, so nothing below a trie node can score more than the node itself. A beam search that remembers what it pruned
therefore has an upper bound for everything it has not seen:

1. Search with a beam, and put every pruned child, with its score, into a pool.
2. The k-th best finished item is a threshold. A pooled node below it can never matter and is forgotten. When no node
   is left, the list is *certified*: it equals a ranking of the whole catalogue.
3. Otherwise take the best pooled nodes, twice as many as last time, and search on from them; only children above the
   threshold are followed. Back to 2.

No node is scored twice for its own sake: a decoder with a BeamCache runs the ancestors of the nodes it goes on from once
more (one code each), which is never more than a wider beam search from the start would cost. At the last level the
children of every scored node are finished items, also those a beam would drop.

Ties: items of equal score stand in the order of the exhaustive search (lower leaf, then lower item index), so a node is
pruned at the threshold itself only if all its leaves come after the k-th. With `item_filter`, only nodes that lead to an
item the request may return exist. `renormalize` changes the scores and not the argument.

Relations: the first walk is the beam search of that width, so `max_beams=num_beams` finds at least what it finds; without
`max_beams` the result is that of `exhaustive`, for a fraction of the rows where the model is sure of itself, and for more
than its rows (ancestors again) where it is as good as indifferent.

Shape legend: B users, K beams, W children, X = K * W, P pooled nodes, F finished leaves, l codes so far, L levels,
k items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...errors import IncompatibleComponentsError, RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items
from .beam_cache import start_beams
from .kernel import IMPOSSIBLE, best_children, check_scores, score_children

_BEAMS_PER_WALK = 128  # beams of one walk, unless it starts wider: a user who needs many does not stretch the batch
_ROUNDING = 1e-3  # a log-probability may exceed 0 by rounding, not by more
_NO_NODE = 2**62  # sorts behind every node


@dataclass(frozen=True)
class CertifiedResult:
    """Result of `certified_top_k`.

    Attributes:
        items_BX, scores_BX: best first, -1 and -inf where a request has fewer items; X <= k.
        certified_B: the list of this request is provably the exact top k.
        beams_B: nodes expanded on the widest level; what a beam search would call its width.
        rows_B: codes run through the model for this request, ancestors that had to be run again included.
        walks: times the trie was walked down.
        model_rows: rows the model computed for the whole batch; above `rows_B.sum()` by the padding of the batch.
    """

    items_BX: torch.Tensor
    scores_BX: torch.Tensor
    certified_B: torch.Tensor
    beams_B: torch.Tensor
    rows_B: torch.Tensor
    walks: int
    model_rows: int


def certified_top_k(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    k: int,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    num_beams: int | None = None,
    max_beams: int | None = None,
    max_rows: int | None = None,
    renormalize: bool = False,
) -> CertifiedResult:
    """The k best items of each request, and whether that is proven.

    Args:
        decoder: has `start_beams(state) -> BeamCache`, or `score_codes(state, prefix_BKl, level) -> logp_BKC`; its
            scores are log-probabilities.
        state: of `decoder`, `batch_size` rows.
        k: items per request.
        item_filter: items that may be returned.
        num_beams: width of the first walk; default k.
        max_beams: nodes expanded per level and request at most, None = as many as it takes. A request that would need
            more is returned uncertified, with the best items found.
        max_rows: no further walk for a request that has used this many rows; None = no limit.
        renormalize: see `kernel`.

    Raises:
        RequestError: k, num_beams, max_beams or max_rows below 1, or max_beams below num_beams.
        IncompatibleComponentsError: scores above 0, so no log-probabilities, and nothing could be certified.
        GenRecError: the model returned NaN.
    """
    num_beams = k if num_beams is None else num_beams
    for name, value in (("k", k), ("num_beams", num_beams), ("max_beams", max_beams), ("max_rows", max_rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise RequestError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if max_beams is not None and max_beams < num_beams:
        raise RequestError(
            f"max_beams is {max_beams}, the search starts with {num_beams} beams; raise max_beams or lower num_beams."
        )
    search = _Search(decoder, state, trie, k, item_filter, batch_size, renormalize, max_beams)
    width, walks = num_beams, 0
    while batch_size:
        picked = search.pick(width, max_rows)
        if not any(nodes.scores_BP.numel() and bool((nodes.scores_BP > -torch.inf).any()) for nodes in picked):
            break
        search.walk(picked, width)
        walks += 1
        width = max(num_beams, min(2 * width, _BEAMS_PER_WALK))
    items, scores = leaves_to_items(
        trie,
        search.leaves_BF.masked_fill(search.scores_BF == -torch.inf, -1),
        search.scores_BF.masked_fill(search.scores_BF <= IMPOSSIBLE / 2, -torch.inf),
        k,
        item_filter,
    )
    return CertifiedResult(
        items,
        scores,
        search.certified(),
        search.expanded_BL.amax(-1),
        search.rows_B,
        walks,
        search.model_rows,
    )


def certified(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    max_beams: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "certified": the exact best `config.k` items, or `config.search_width` where a dense head re-ranks
    them. The search starts with as many beams as it returns items; `config.num_beams` is no width here.

    Lossless without `max_beams`. With it, a request that would need more beams gets the best items found; call
    `certified_top_k` to learn which ones those are.

    Args:
        max_beams: as in `certified_top_k`; a value below the number of items means that number.
    """
    if max_beams is not None and (isinstance(max_beams, bool) or not isinstance(max_beams, int) or max_beams < 1):
        raise RequestError(f"decoding_options max_beams must be a whole number of at least 1, got {max_beams!r}.")
    wanted = config.search_width if config.dense_weight > 0 else config.k
    result = certified_top_k(
        decoder,
        state,
        trie,
        wanted,
        item_filter,
        batch_size=batch_size,
        max_beams=None if max_beams is None else max(max_beams, wanted),
        renormalize=config.renormalize,
    )
    return result.items_BX, result.scores_BX


class _Nodes(NamedTuple):
    """Nodes of one level, each with its score (-inf = empty place, node -1) and the codes that lead to it."""

    nodes_BP: torch.Tensor
    scores_BP: torch.Tensor
    codes_BPl: torch.Tensor

    def keep(self, mask_BP: torch.Tensor) -> _Nodes:
        """Only these, moved together to the front in their order."""
        width = int(mask_BP.sum(-1).max()) if mask_BP.numel() else 0
        order = (~mask_BP).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :width]
        kept = mask_BP.gather(1, order)
        return _Nodes(
            self.nodes_BP.gather(1, order).masked_fill_(~kept, -1),
            self.scores_BP.gather(1, order).masked_fill_(~kept, -torch.inf),
            self.codes_BPl.gather(1, order.unsqueeze(-1).expand(-1, -1, self.codes_BPl.shape[-1])).masked_fill_(
                ~kept.unsqueeze(-1), 0
            ),
        )


def _join(parts: Sequence[_Nodes]) -> _Nodes:
    return _Nodes(*(torch.cat(tensors, dim=1) for tensors in zip(*parts)))


class _Search:
    """What one batch of searches has found and has still to look at.

    Attributes:
        pool: per level 0 .. L - 1, nodes that have a score and have not been expanded.
        leaves_BF, scores_BF: the best finished leaves in their final order, k of them at most.
        expanded_BL: nodes expanded per level.
    """

    def __init__(
        self,
        decoder: Any,
        state: Any,
        trie: ItemTrie,
        k: int,
        item_filter: ItemFilter | None,
        batch_size: int,
        renormalize: bool,
        max_beams: int | None,
    ):
        self.decoder, self.state, self.trie, self.k = decoder, state, trie, k
        self.item_filter, self.batch, self.renormalize = item_filter, batch_size, renormalize
        self.max_beams = trie.num_leaves if max_beams is None else max_beams
        device = trie.device
        root = _Nodes(
            torch.zeros(batch_size, 1, dtype=torch.long, device=device),
            torch.zeros(batch_size, 1, device=device),
            torch.zeros(batch_size, 1, 0, dtype=torch.long, device=device),
        )
        if item_filter is not None:
            root = root.keep(item_filter.alive(0, root.nodes_BP))
        self.pool = [root] + [self._none(level) for level in range(1, trie.num_levels)]
        self.leaves_BF = torch.zeros(batch_size, 0, dtype=torch.long, device=device)
        self.scores_BF = torch.zeros(batch_size, 0, device=device)
        self.expanded_BL = torch.zeros(batch_size, trie.num_levels, dtype=torch.long, device=device)
        self.rows_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.model_rows = 0

    def _none(self, level: int) -> _Nodes:
        empty = torch.zeros(self.batch, 0, dtype=torch.long, device=self.trie.device)
        return _Nodes(empty, empty.float(), empty.unsqueeze(-1).expand(-1, -1, level))

    # ---------------------------------------------------------------- bounds

    def _threshold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Score and leaf (B, 1) of the leaf that completes the list; -inf while it is not complete."""
        start, end = self.trie.leaf_slots(self.leaves_BF.masked_fill(self.scores_BF == -torch.inf, -1))
        items = end - start if self.item_filter is None else self.item_filter.count_alive(start, end)
        complete = items.clamp(min=0).cumsum(-1) >= self.k
        last = (~complete).sum(-1, keepdim=True)
        scores = torch.nn.functional.pad(self.scores_BF, (0, 1), value=-torch.inf)
        leaves = torch.nn.functional.pad(self.leaves_BF, (0, 1), value=0)
        return scores.gather(1, last), leaves.gather(1, last)

    def _may_matter(
        self, level: int, nodes: torch.Tensor, scores: torch.Tensor, threshold: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Could an item below these nodes (B, P) come before the last of the list?"""
        limit, last_leaf = threshold
        above, level_with = scores > limit, (scores == limit) & (scores > -torch.inf)
        if bool(level_with.any()):
            first = nodes.clamp(min=0)
            for below in range(level, self.trie.num_levels):
                first = self.trie.child_range(below, first)[0]
            above = above | (level_with & (first < last_leaf))
        return above

    def certified(self) -> torch.Tensor:
        """No node that is left could change the list: (B,) bool."""
        threshold = self._threshold()
        left = [
            self._may_matter(level, nodes.nodes_BP, nodes.scores_BP, threshold).any(-1)
            for level, nodes in enumerate(self.pool)
        ]
        return ~torch.stack(left).any(0)

    # ---------------------------------------------------------------- search

    def pick(self, width: int, max_rows: int | None) -> list[_Nodes]:
        """Take the best `width` nodes that may matter out of the pool, and forget those that do not."""
        threshold = self._threshold()
        values = []
        for level, nodes in enumerate(self.pool):
            matter = self._may_matter(level, nodes.nodes_BP, nodes.scores_BP, threshold)
            self.pool[level] = nodes = nodes.keep(matter)
            room = (self.max_beams - self.expanded_BL[:, level]).clamp(min=0)
            if max_rows is not None:
                room = room.masked_fill(self.rows_B >= max_rows, 0)
            values.append(nodes.scores_BP.masked_fill(~_first_places(nodes.scores_BP, room), -torch.inf))
        joined = torch.cat(values, dim=1)
        chosen = torch.zeros_like(joined, dtype=torch.bool)
        if joined.shape[1]:
            chosen.scatter_(1, best_children(joined, width), True)
            chosen &= joined > -torch.inf
        picked = []
        for level, mask in enumerate(chosen.split([value.shape[1] for value in values], dim=1)):
            nodes = self.pool[level]
            picked.append(nodes.keep(mask))
            self.pool[level] = nodes.keep(~mask & (nodes.scores_BP > -torch.inf))
        return picked

    def walk(self, picked: list[_Nodes], width: int) -> None:
        """From the root down: expand the picked nodes of each level and the best of their children."""
        trie = self.trie
        threshold = self._threshold()
        active = torch.stack([(nodes.scores_BP > -torch.inf).any(-1) for nodes in picked]).any(0)
        beams = start_beams(self.decoder, self.state, self.batch, trie.device)
        # places for nodes that are run again for their children's sake have score -inf, so nothing is done twice
        current = self._none(0) if picked[0].nodes_BP.shape[1] == 0 else picked[0]
        if current.nodes_BP.shape[1] == 0:
            current = _Nodes(
                torch.zeros(self.batch, 1, dtype=torch.long, device=trie.device),
                torch.full((self.batch, 1), -torch.inf, device=trie.device),
                torch.zeros(self.batch, 1, 0, dtype=torch.long, device=trie.device),
            )
        current = current._replace(nodes_BP=current.nodes_BP.clamp(min=0))
        for level in range(trie.num_levels):
            real = (current.nodes_BP >= 0) & active.unsqueeze(-1)
            self.rows_B += real.sum(-1)
            self.model_rows += real.numel()
            self.expanded_BL[:, level] += (current.scores_BP > -torch.inf).sum(-1)
            fresh = self._expand(level, current, beams.score(level, not self.renormalize))
            if level + 1 == trie.num_levels:
                break
            matter = self._may_matter(level + 1, fresh.nodes_BP, fresh.scores_BP, threshold)
            here = picked[level + 1]
            taken = (here.scores_BP > -torch.inf).sum(-1)
            room = torch.minimum(width - taken, self.max_beams - self.expanded_BL[:, level + 1] - taken).clamp(min=0)
            follow = _first_places(fresh.scores_BP.masked_fill(~matter, -torch.inf), room)
            self.pool[level + 1] = _join([self.pool[level + 1], fresh.keep(matter & ~follow)])
            following = _join([here, fresh.keep(follow), *self._ancestors(level + 1, picked)])
            following = _in_node_order(following)
            if not following.nodes_BP.shape[1]:
                break
            starts, _ = trie.child_range(level, current.nodes_BP)
            starts = starts.masked_fill(current.nodes_BP < 0, _NO_NODE)
            parents = (torch.searchsorted(starts, following.nodes_BP, right=True) - 1).clamp(min=0)
            beams.reorder(parents, following.codes_BPl[..., -1], level)
            current = following

    def _expand(self, level: int, current: _Nodes, code_scores: Any) -> _Nodes:
        """The legal children of beams; those that finish an item are kept as such and are not returned."""
        trie = self.trie
        children = score_children(
            trie,
            level,
            current.nodes_BP,
            current.scores_BP,
            code_scores,
            item_filter=self.item_filter,
            renormalize=self.renormalize,
        )
        step_BKW = children.step_BKW
        if bool((step_BKW > _ROUNDING).any()):
            raise IncompatibleComponentsError(
                f"level {level}: the model gives a code the score {float(step_BKW.max()):.3g}, above 0, so its scores "
                "are no log-probabilities and bound nothing; use decoding='exhaustive', or renormalize=True."
            )
        total = current.scores_BP.unsqueeze(-1) + step_BKW.clamp(max=0.0)
        check_scores(total.flatten(1))
        nodes, scores = children.nodes_BKW.flatten(1), total.flatten(1)
        if level + 1 == trie.num_levels:
            self._finish(nodes, scores)
            return self._none(level + 1)
        codes = torch.cat(
            [
                current.codes_BPl.unsqueeze(2).expand(-1, -1, step_BKW.shape[-1], -1),
                children.codes_BKW.unsqueeze(-1),
            ],
            dim=-1,
        ).flatten(1, 2)
        if trie.has_ends:
            ended = children.codes_BKW.flatten(1) == trie.codebook_sizes[level]
            leaves = nodes
            for below in range(level + 1, trie.num_levels):
                leaves = trie.child_range(below, leaves)[0]
            self._finish(leaves, scores.masked_fill(~ended, -torch.inf))
            scores = scores.masked_fill(ended, -torch.inf)
        return _Nodes(nodes.masked_fill(scores == -torch.inf, -1), scores, codes)

    def _finish(self, leaves: torch.Tensor, scores: torch.Tensor) -> None:
        """Add leaves; keep the k best in the order (score, then lower leaf)."""
        leaves, scores = torch.cat([self.leaves_BF, leaves], dim=1), torch.cat([self.scores_BF, scores], dim=1)
        order = leaves.masked_fill(scores == -torch.inf, _NO_NODE).sort(dim=-1).indices
        leaves, scores = leaves.gather(1, order), scores.gather(1, order)
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        self.leaves_BF, self.scores_BF = leaves.gather(1, order)[:, : self.k], scores[:, : self.k]

    def _ancestors(self, level: int, picked: list[_Nodes]) -> list[_Nodes]:
        """Nodes of `level` that picked nodes further down descend from, each once, with score -inf."""
        found = []
        for nodes in picked[level + 1 :]:
            codes = nodes.codes_BPl[..., :level]
            if codes.shape[1]:
                above = self.trie.lookup(codes).masked_fill(nodes.scores_BP == -torch.inf, -1)
                found.append(_Nodes(above, torch.full_like(nodes.scores_BP, -torch.inf), codes))
        if not found:
            return []
        joined = _in_node_order(_join(found))
        repeated = torch.zeros_like(joined.nodes_BP, dtype=torch.bool)
        repeated[:, 1:] = joined.nodes_BP[:, 1:] == joined.nodes_BP[:, :-1]
        return [joined.keep((joined.nodes_BP >= 0) & ~repeated)]


def _first_places(scores_BP: torch.Tensor, room_B: torch.Tensor) -> torch.Tensor:
    """The best `room_B` places of each row, at equal scores the earlier place: a mask (B, P) without empty places."""
    if not scores_BP.shape[1]:
        return torch.zeros_like(scores_BP, dtype=torch.bool)
    order = scores_BP.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < room_B.unsqueeze(-1)) & (scores_BP > -torch.inf)


def _in_node_order(nodes: _Nodes) -> _Nodes:
    """Ascending nodes, empty places at the end and no more of them than the longest row needs."""
    key = nodes.nodes_BP.masked_fill(nodes.nodes_BP < 0, _NO_NODE)
    order = key.sort(dim=-1, stable=True).indices
    width = int((nodes.nodes_BP >= 0).sum(-1).max()) if key.numel() else 0
    order = order[:, :width]
    return _Nodes(
        nodes.nodes_BP.gather(1, order),
        nodes.scores_BP.gather(1, order),
        nodes.codes_BPl.gather(1, order.unsqueeze(-1).expand(-1, -1, nodes.codes_BPl.shape[-1])),
    )
