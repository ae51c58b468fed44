"""Several ranked lists into one: reciprocal ranks, log-probabilities, votes, stream sums, softmax products, a prior.

What recommenders disagree on is the scale of their scores, so each rule says what it reads: ranks (`reciprocal_rank`,
`votes`), log-probabilities (`log_linear`, `stream_sum`) or any scores with a temperature each (`softmax_product`).
All take `(items_BK, scores_BK)` per stream, best first, -1 padded, as searches and recommenders return them, and give
the same form back.

Shape legend: S streams, B users, K items of one list, U distinct items of all lists (padded), X items returned,
N catalogue items.

Rules that hold for every method
    - Equal fused scores: the item with the better best rank comes first, then the one of the earlier stream.
    - One list alone keeps its order (score rules: where its scores descend).
    - A weight or temperature of 0 drops the stream: its items are no candidates any more.
    - Padding never comes before an item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from ..errors import RequestError

RankedList = tuple[torch.Tensor, torch.Tensor]
ItemScorer = Callable[[torch.Tensor], torch.Tensor]

_RANK_OFFSET = 60.0  # Cormack, Clarke and Buettcher, SIGIR 2009


def reciprocal_rank(
    lists: Sequence[RankedList],
    weights: Sequence[float] | None = None,
    *,
    k: int | None = None,
    rank_offset: float = _RANK_OFFSET,
) -> RankedList:
    """Sum over the streams of `weight / (rank_offset + rank)`, rank from 1; scores are not read.

    Args:
        lists: per stream `(items_BK, scores_BK)`, K may differ.
        weights: one per stream, >= 0; default all 1.
        k: items returned per user; default all.
        rank_offset: > 0; the larger, the less the first places stand out.

    Raises:
        RequestError: no list, lists of different batches, an item twice in a list, a negative or all-zero weight.

    Example:
        >>> a = (torch.tensor([[7, 3, 5]]), torch.tensor([[-1.0, -2.0, -3.0]]))
        >>> b = (torch.tensor([[3, 9]]), torch.tensor([[0.9, 0.1]]))
        >>> reciprocal_rank([a, b])[0].tolist()
        [[3, 7, 9, 5]]
    """
    if not rank_offset > -1 or not math.isfinite(rank_offset):
        raise RequestError(f"rank_offset must be above -1 (ranks start at 1), got {rank_offset}")
    table = _FusionTable(lists, weights)
    fused = _total(weight / (rank_offset + rank) * listed for weight, rank, listed in table.ranks())
    return table.ranked(fused, k)


def discounted_rank(
    lists: Sequence[RankedList], weights: Sequence[float] | None = None, *, k: int | None = None
) -> RankedList:
    """Sum over the streams of `weight / log2(rank + 1)`, rank from 1; scores are not read.

    How ActionPiece joins the lists of several segmentations of one history (arXiv 2502.13581, as in the authors' code).

    Example:
        >>> a = (torch.tensor([[7, 3]]), torch.tensor([[-1.0, -2.0]]))
        >>> b = (torch.tensor([[3, 9]]), torch.tensor([[0.9, 0.1]]))
        >>> discounted_rank([a, b])[0].tolist()
        [[3, 7, 9]]
    """
    table = _FusionTable(lists, weights)
    return table.ranked(_total(weight * listed / (rank + 1.0).log2() for weight, rank, listed in table.ranks()), k)


def votes(
    lists: Sequence[RankedList], weights: Sequence[float] | None = None, *, k: int | None = None, top: int | None = None
) -> RankedList:
    """Number (sum of weights) of the streams that list an item among their first `top`; scores are not read.

    Self-consistency across prompts or identifiers (SC-Rec, arXiv 2408.08686, whose exact weights are not published).

    Args:
        top: a stream votes for its first `top` items only; default all it lists.
    """
    if top is not None and top < 1:
        raise RequestError(f"top must be at least 1, got {top}: a stream has to vote for something")
    table = _FusionTable(lists, weights)
    limit = math.inf if top is None else top
    fused = _total(weight * (listed & (rank <= limit)) for weight, rank, listed in table.ranks())
    return table.ranked(fused, k)


def log_linear(
    lists: Sequence[RankedList],
    weights: Sequence[float] | None = None,
    *,
    k: int | None = None,
    missing_margin: float = 1.0,
    score_missing: Sequence[ItemScorer | None] | None = None,
) -> RankedList:
    """Weighted sum of log-probabilities, as D3 mixes a language model and a recommender (arXiv 2406.14900): with two
    streams, `weights=[a, 1 - a]`.

    A stream says nothing about items outside its list, except that they score no more than its last one. Where
    `score_missing` cannot tell, such an item gets the stream's lowest finite score minus `missing_margin`; a stream
    that lists nothing for a user has no influence on that user.

    Args:
        missing_margin: >= 0, in nats; 0 puts unlisted items level with the last listed one.
        score_missing: per stream, a function from items (B, U) (padding repeats a real item) to scores (B, U), for
            example a gather from `score_all`; None = the floor above.

    Relations: `stream_sum` is all weights 1 with `score_missing` given.
    """
    table = _FusionTable(lists, weights)
    scores = table.complete_scores(missing_margin, score_missing)
    fused = _total(weight * score for weight, score in zip(table.weights, scores))
    return table.ranked(fused, k)


def stream_sum(
    lists: Sequence[RankedList],
    score_missing: Sequence[ItemScorer | None] | None = None,
    *,
    k: int | None = None,
    missing_margin: float = 1.0,
) -> RankedList:
    """Confidence of all streams together: the union of the streams' items, ranked by the sum of their log-probabilities.

    The fusion of EAGER's behaviour and semantic decoders (arXiv 2406.14017, as in the authors' code), where each
    decoder scores the other's items too: pass `score_missing`.
    """
    return log_linear(lists, k=k, missing_margin=missing_margin, score_missing=score_missing)


def softmax_product(
    lists: Sequence[RankedList],
    temperatures: Sequence[float],
    *,
    k: int | None = None,
    missing_margin: float = 1.0,
    score_missing: Sequence[ItemScorer | None] | None = None,
) -> RankedList:
    """Product over the streams of `softmax(temperature * score)`, each softmax over the user's candidates.

    COBRA's BeamFusion (arXiv 2503.02453; its product form is reported by third parties): the beam's log-probability
    with tau and the dense cosine with psi. Returned scores are the products, in (0, 1].

    Args:
        temperatures: one per stream, >= 0; they multiply the scores.
        missing_margin, score_missing: as in `log_linear`, the margin in units of the scores.

    Relations: ranks like `log_linear` with the temperatures as weights.
    """
    table = _FusionTable(lists, temperatures)
    scores = table.complete_scores(missing_margin, score_missing)
    fused = torch.zeros_like(table.items_BU, dtype=torch.float64)
    for temperature, score in zip(table.weights, scores):
        fused += (temperature * score).masked_fill(table.items_BU < 0, -torch.inf).log_softmax(-1).nan_to_num(0.0)
    # the sort sees logarithms: products of small probabilities would all round to 0
    items, logs = table.ranked(fused, k)
    return items, torch.where(items >= 0, logs.exp(), -torch.inf)


def gamma_prior(distances_BX: torch.Tensor, prior_BX: torch.Tensor, gamma: float) -> torch.Tensor:
    """BIGRec's prior (arXiv 2308.08434): `minmax(distance) * (1 + minmax(prior)) ** -gamma`, lower is better.

    Minima and maxima are those of each row; a row of equal values becomes 0. The nearest item of a row has distance 0
    after scaling, so it stays first under every gamma: the prior orders the others.

    Args:
        distances_BX: >= 0, any scale.
        prior_BX: popularity or another recommender's scores; broadcasts against the distances.
        gamma: >= 0; 0 leaves the order of the distances.

    Raises:
        RequestError: gamma is negative or not finite.

    Example:
        >>> gamma_prior(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 9.0]]), gamma=2.0).tolist()
        [[0.0, 0.5, 0.25]]
    """
    check_gamma(gamma)
    return minmax(distances_BX) * (1.0 + minmax(prior_BX)).pow(-gamma)


def fuse_prior(ranked: RankedList, prior: torch.Tensor, gamma: float, *, k: int | None = None) -> RankedList:
    """One list re-ranked by a catalogue-wide prior: `gamma_prior` on the gaps to the list's best score.

    Args:
        ranked: `(items_BK, scores_BK)`, higher scores are better.
        prior: (N,) or (B, N), finite; scaled over the whole catalogue.
        gamma: as in `gamma_prior`; 0 = identity order.

    Returns:
        Items and scores (the negated product, so that higher is better).

    Raises:
        RequestError: the prior does not cover an item of the list, or is not finite.
    """
    check_gamma(gamma)
    table = _FusionTable([ranked], None)
    scaled_BN = minmax(check_prior(prior, table.items_BU.shape[0], int(table.items_BU.max()) + 1))
    scores = table.complete_scores(0.0, None)[0]
    possible = (table.items_BU >= 0) & (scores > -torch.inf)
    best = scores.masked_fill(~possible, -torch.inf).amax(-1, keepdim=True)
    gaps = torch.where(possible, best - scores, 0.0)  # the smallest gap is 0 anyway
    scaled_BN = scaled_BN.expand(table.items_BU.shape[0], -1).to(gaps.device)
    boost = (1.0 + scaled_BN.gather(1, table.items_BU.clamp(min=0))).pow(-gamma)
    return table.ranked((-(minmax(gaps) * boost)).masked_fill(~possible, -torch.inf), k)


# ---------------------------------------------------------------------------------------------------- shared parts


def _total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(parts)).double().sum(0)


def minmax(values_BX: torch.Tensor) -> torch.Tensor:
    """Each row scaled to [0, 1] (float64); a row of equal values becomes 0."""
    values = values_BX.double()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low).masked_fill(high == low, 1.0)


def check_gamma(gamma: float) -> None:
    """
    Raises:
        RequestError: gamma is negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise RequestError(f"gamma must be a finite number >= 0, got {gamma}; 0 switches the prior off")


def check_prior(prior: torch.Tensor, batch: int, num_items: int) -> torch.Tensor:
    """The prior as a table of one or `batch` rows.

    Raises:
        RequestError: wrong shape, fewer than `num_items` columns, or not finite (item named).
    """
    table = torch.as_tensor(prior)
    table = table.unsqueeze(0) if table.dim() == 1 else table
    if table.dim() != 2 or table.shape[0] not in (1, batch) or table.shape[1] < num_items:
        raise RequestError(
            f"the prior must have shape (items,) or (requests, items) = ({batch}, >= {num_items}), got "
            f"{tuple(torch.as_tensor(prior).shape)}"
        )
    bad = ~torch.isfinite(table)
    if bool(bad.any()):
        raise RequestError(f"item {int(bad.nonzero()[0, 1])}: the prior is not finite; give unknown items a low value")
    return table


class _FusionTable:
    """The union of the lists of each user, in the order that breaks ties: best rank first, then earlier stream.

    Attributes:
        weights: of the streams that take part.
        items_BU: distinct items, -1 padded at the end.
    """

    def __init__(self, lists: Sequence[RankedList], weights: Sequence[float] | None):
        lists = list(lists)
        if not lists:
            raise RequestError("nothing to fuse: pass at least one (items, scores) pair")
        given = [1.0] * len(lists) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(lists):
            raise RequestError(f"{len(given)} weights for {len(lists)} lists; give one per list")
        for stream, weight in enumerate(given):
            if not (math.isfinite(weight) and weight >= 0):
                raise RequestError(f"list {stream}: weight {weight} must be a finite number >= 0; 0 drops the list")
        if not any(given):
            raise RequestError("all weights are 0, so no list is left; give at least one a positive weight")
        for stream, ranked in enumerate(lists):
            _check_list(stream, ranked, lists[0][0].shape[0])
        self.streams = [stream for stream, weight in enumerate(given) if weight > 0]
        self.weights = [given[stream] for stream in self.streams]
        self.lists = [lists[stream] for stream in self.streams]
        self.items_BU = self._union()
        found = [self._positions(items) for items, _ in self.lists]
        self._position = [position for position, _ in found]
        self._listed = [listed for _, listed in found]

    def _union(self) -> torch.Tensor:
        longest = max(items.shape[1] for items, _ in self.lists)
        padded = [torch.nn.functional.pad(items, (0, longest - items.shape[1]), value=-1) for items, _ in self.lists]
        by_rank = torch.stack(padded, dim=-1).flatten(1).long()  # rank 1 of every stream, rank 2 of every stream ...
        # a stable sort by item keeps the first appearance first among equals; later ones are dropped
        ordered, order = by_rank.sort(dim=-1, stable=True)
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        items = by_rank.masked_fill(torch.zeros_like(repeated).scatter_(1, order, repeated), -1)
        first = (items < 0).to(torch.uint8).sort(dim=-1, stable=True).indices
        width = max(1, int((items >= 0).sum(-1).max())) if items.numel() else 1
        items = items.gather(1, first)[:, :width]
        return torch.nn.functional.pad(items, (0, width - items.shape[1]), value=-1)

    def _positions(self, items_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each item of the union stands in one list (B, U), and whether it is in it."""
        if items_BK.shape[1] == 0:
            return torch.zeros_like(self.items_BU), torch.zeros_like(self.items_BU, dtype=torch.bool)
        ordered, order = items_BK.long().sort(dim=-1)
        place = torch.searchsorted(ordered, self.items_BU).clamp(max=items_BK.shape[1] - 1)
        listed = (ordered.gather(1, place) == self.items_BU) & (self.items_BU >= 0)
        return order.gather(1, place), listed

    def ranks(self) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
        """Per stream its weight, ranks from 1 (B, U) float64, and whether it lists the item."""
        return [
            (weight, position.double() + 1.0, listed)
            for weight, position, listed in zip(self.weights, self._position, self._listed)
        ]

    def complete_scores(
        self, missing_margin: float, score_missing: Sequence[ItemScorer | None] | None
    ) -> list[torch.Tensor]:
        """Per stream the scores of the whole union (B, U) float64."""
        if not (math.isfinite(missing_margin) and missing_margin >= 0):
            raise RequestError(f"missing_margin must be a finite number >= 0, got {missing_margin}")
        scorers = list(score_missing) if score_missing is not None else []
        if score_missing is not None and len(scorers) <= max(self.streams):
            raise RequestError(f"{len(scorers)} score_missing functions; give one (or None) per list")
        known_items = torch.where(self.items_BU >= 0, self.items_BU, self.items_BU[:, :1].clamp(min=0))
        completed = []
        for index, (stream, (items, scores)) in enumerate(zip(self.streams, self.lists)):
            listed = self._listed[index]
            scores = scores.double()
            finite = (items >= 0) & torch.isfinite(scores)
            lowest = scores.masked_fill(~finite, torch.inf)
            floor = lowest.amin(-1, keepdim=True) if scores.shape[1] else scores.new_full((len(scores), 1), torch.inf)
            has_any = torch.isfinite(floor)
            floor = torch.where(has_any, floor - missing_margin, 0.0)
            own = scores.gather(1, self._position[index]) if scores.shape[1] else torch.zeros_like(listed).double()
            scorer = scorers[stream] if scorers else None
            if scorer is None:
                other = floor.expand_as(own)
            else:
                other = scorer(known_items).double()
                if other.shape != own.shape:
                    raise RequestError(
                        f"list {stream}: score_missing returned shape {tuple(other.shape)} for items of shape "
                        f"{tuple(own.shape)}; return one score per item"
                    )
            completed.append(torch.where(listed, own, other))
        return completed

    def ranked(self, fused_BU: torch.Tensor, k: int | None) -> RankedList:
        """Best first, padding last; equal scores keep the order of the union."""
        if k is not None and k < 1:
            raise RequestError(f"k must be at least 1, got {k}")
        padding = self.items_BU < 0
        order = fused_BU.masked_fill(padding, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        order = order.gather(1, padding.gather(1, order).to(torch.uint8).sort(dim=-1, stable=True).indices)
        items = self.items_BU.gather(1, order)
        scores = fused_BU.gather(1, order).float().masked_fill(items < 0, -torch.inf)
        return items[:, :k], scores[:, :k]


def _check_list(stream: int, ranked: RankedList, batch: int) -> None:
    items, scores = ranked
    if items.dim() != 2 or items.shape != scores.shape:
        raise RequestError(
            f"list {stream}: items {tuple(items.shape)} and scores {tuple(scores.shape)} must be two tables of the "
            "same shape (users, items)"
        )
    if items.shape[0] != batch:
        raise RequestError(f"list {stream}: {items.shape[0]} users, list 0 has {batch}; fuse lists of the same users")
    if items.is_floating_point():
        raise RequestError(f"list {stream}: items must be integer indices, got {items.dtype}")
    broken = (scores.isnan() & (items >= 0)).any(-1)
    if bool(broken.any()):
        raise RequestError(f"list {stream}, row {int(broken.nonzero()[0])}: a score is NaN")
    ordered = items.sort(dim=-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        row, place = twice.nonzero()[0].tolist()
        raise RequestError(
            f"list {stream}, row {row}: item {int(ordered[row, place])} is listed twice; pass distinct items"
        )
