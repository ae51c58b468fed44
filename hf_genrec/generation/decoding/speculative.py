"""Retrieval-drafted speculation (SpecGR, arXiv 2410.02939): a retriever proposes items, the generator accepts or rejects.

Round t (of at most L): the `num_drafts` best items by draft score are drafted among the allowed items that were not
drafted yet and whose first t codes are in the beam (round 0: all items; this is the guided re-drafting). The generator
scores their codes, V(i) = mean over the levels of log p(code | codes before), and those with V > `threshold` are
accepted; then the beam goes one level down. A user is done when k items are accepted (adaptive exit). Whoever is not
done after L rounds is filled up from the finished beam (score / L), then with the best rejected drafts. The list is
ordered by V, equal ones by draft score.

Cold items (never trained on) are drafted like all others, but the beam never generates them: a generator has learned
that such codes do not follow. Of their codes only those before the last one count, since the last one is the counter
that tells apart items of one code, and a new item's counter is a number that no training row has shown. So the output
can hold items that no search over the generator alone would return.

The two means are not quite alike: a counter is nearly certain, so it lifts the mean of a trained item, and a cold item has
to be about L / (L - 1) times as good. With a threshold that cold items can reach, most trained drafts pass as well.

Lossy. Relations: threshold +inf is `beam` over the trained items (scores divided by L); threshold -inf with
`num_drafts` = k is the retriever's top list, ordered by the generator.

Any decoder can verify (`start_beams` or `score_codes`); the drafts come from its `draft_scores(state) -> (B, N)`, or from
`score_dense(state)`. The paper's code runs one user at a time; here users share rounds, and one who is done is left alone.

Shape legend: B users, N items (S = N slots, the items in the order of their codes), K beams, D drafts of a round,
L levels, X candidates, k items returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ...errors import IncompatibleComponentsError, RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items, ranked_leaves
from .beam_cache import start_beams
from .kernel import IMPOSSIBLE, beam_step, best_children, check_scores, child_log_probs


class Speculation(NamedTuple):
    """What `speculate` returns.

    Attributes:
        items_Bk: distinct allowed items, best first, -1 where a user has fewer.
        scores_Bk: their mean log-probability per code, -inf at padding.
        rounds_B: rounds each user took: below L after an early exit.
        accepted_B, drafted_B: items accepted and drafted in these rounds.
    """

    items_Bk: torch.Tensor
    scores_Bk: torch.Tensor
    rounds_B: torch.Tensor
    accepted_B: torch.Tensor
    drafted_B: torch.Tensor


def speculative(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    num_drafts: int = 20,
    threshold: float = -1.8,
    cold_items: Any = None,
    drop_last_code: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The strategy "speculative": see `speculate`, which also counts."""
    found = speculate(
        decoder,
        state,
        trie,
        config,
        item_filter,
        batch_size=batch_size,
        num_drafts=num_drafts,
        threshold=threshold,
        cold_items=cold_items,
        drop_last_code=drop_last_code,
    )
    return found.items_Bk, found.scores_Bk


def speculate(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    num_drafts: int = 20,
    threshold: float = -1.8,
    cold_items: Any = None,
    drop_last_code: bool = True,
) -> Speculation:
    """Draft, verify, accept.

    Args:
        decoder: scores codes, and has `draft_scores(state) -> (B, N)` or `score_dense(state) -> (B, N)`.
        config: k items are returned, and the beam is `search_width` wide.
        num_drafts: drafts of a round (delta).
        threshold: accept drafts whose mean log-probability per code is above it (gamma).
        cold_items: items that training never saw, as indices or as a bool tensor (N,); None = `decoder.cold_items`
            where it has them, else none.
        drop_last_code: verify cold items without their last code (a counter). Set it to False for codes without a
            counter level; items of one level keep it in any case.

    Raises:
        RequestError: an option out of range, or `config.renormalize`, which this acceptance rule does not know.
        IncompatibleComponentsError: the decoder drafts nothing, or not for this catalogue.
        GenRecError: the model returned NaN.
    """
    _check_options(config, num_drafts, threshold)
    device, levels, slots = trie.device, trie.num_levels, trie.num_items
    order_S = trie.items_at(torch.arange(slots, device=device))
    draft_BS = _draft_scores(decoder, state, batch_size, slots)[:, order_S]
    cold_S = cold_mask(decoder, cold_items, slots, device)[order_S]
    open_BS = torch.ones(batch_size, slots, dtype=torch.bool, device=device)  # allowed and not drafted yet
    if item_filter is not None:
        open_BS = item_filter.alive_slots(torch.arange(slots, device=device).expand(batch_size, -1))
    trained = _trained_only(trie, item_filter, open_BS, cold_S, order_S)
    leaf_codes = trie.node_prefixes(levels)
    sizes_L = torch.tensor(trie.codebook_sizes, device=device)

    nodes = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    totals = torch.zeros(batch_size, 1, device=device)
    if trained is not None:
        totals = totals.masked_fill(~trained.alive(0, nodes), -torch.inf)
    beams = start_beams(decoder, state, batch_size, device)
    accepted, drafted, rounds = (torch.zeros(batch_size, dtype=torch.long, device=device) for _ in range(3))
    active = open_BS.any(-1)
    found_slots, found_values, found_accepted = [], [], []
    for level in range(levels):
        eligible = open_BS & active.unsqueeze(-1)
        if level:
            eligible &= _below_beams(trie, level, nodes, totals)
        masked = draft_BS.masked_fill(~eligible, -torch.inf)
        slots_BD = best_children(masked, num_drafts)
        # best draft first: it goes first among drafts of equal V, such as cold items that differ in the last code only
        drafts_BD, order = masked.gather(1, slots_BD).sort(dim=-1, descending=True, stable=True)
        slots_BD, valid_BD = slots_BD.gather(1, order), drafts_BD > -torch.inf
        open_BS = open_BS.scatter(1, slots_BD, open_BS.gather(1, slots_BD) & ~valid_BD)
        codes_BDL = leaf_codes[trie.item_leaf_N[order_S[slots_BD]]]
        counted_BDL = codes_BDL < sizes_L  # a shorter item says nothing after its end
        if drop_last_code and levels > 1:
            counted_BDL[..., -1] &= ~cold_S[slots_BD]
        values_BD = _verify(decoder, state, trie, codes_BDL, counted_BDL)
        check_scores(values_BD.masked_fill(~valid_BD, 0.0))
        accepted_BD = valid_BD & (values_BD > threshold)
        found_slots.append(slots_BD)
        found_values.append(values_BD.masked_fill(~valid_BD, -torch.inf))
        found_accepted.append(accepted_BD)
        accepted += accepted_BD.sum(-1)
        drafted += valid_BD.sum(-1)
        rounds += active
        active = active & (accepted < config.k)
        if not bool(active.any()):
            break
        step = beam_step(trie, level, nodes, totals, beams.score(level), config.search_width, item_filter=trained)
        nodes, totals = step.nodes_BK, step.scores_BK
        if level + 1 < levels:
            beams.reorder(step.parents_BK, step.codes_BK, level)
    else:
        check_scores(totals.masked_fill(~active.unsqueeze(-1), 0.0))

    beam_items = torch.full((batch_size, 1), -1, dtype=torch.long, device=device)
    beam_values = torch.full((batch_size, 1), -torch.inf, device=device)
    if bool(active.any()):
        leaves, scores = ranked_leaves(nodes, totals)
        lengths_BK = (leaf_codes[leaves.clamp(min=0)] < sizes_L).sum(-1)
        beam_items, beam_values = leaves_to_items(trie, leaves, scores / lengths_BK, config.search_width, trained)
        beam_items = beam_items.masked_fill(~active.unsqueeze(-1), -1)
    draft_slots, draft_values = torch.cat(found_slots, dim=1), torch.cat(found_values, dim=1)
    draft_items = order_S[draft_slots].masked_fill(draft_values == -torch.inf, -1)
    items, values = _choose(
        draft_items, draft_values, torch.cat(found_accepted, dim=1), beam_items, beam_values, config.k, slots
    )
    values = values.masked_fill(values <= IMPOSSIBLE / (2 * levels), -torch.inf)  # as in a beam search
    return Speculation(items, values, rounds, accepted, drafted)


def _check_options(config: RecommendationConfig, num_drafts: int, threshold: float) -> None:
    if isinstance(num_drafts, bool) or not isinstance(num_drafts, int) or num_drafts < 1:
        raise RequestError(f"num_drafts must be a whole number >= 1, got {num_drafts!r}.")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or math.isnan(threshold):
        raise RequestError(f"threshold must be a number (a mean log-probability, such as -1.8), got {threshold!r}.")
    if config.renormalize:
        raise RequestError(
            "decoding 'speculative' compares the model's own log-probabilities: set renormalize=False, or use 'beam'."
        )


def _draft_scores(decoder: Any, state: Any, batch_size: int, num_items: int) -> torch.Tensor:
    """Scores (B, N) of the retriever, float32; -inf = never drafted."""
    own = getattr(decoder, "draft_scores", None)
    scores_BN = own(state) if own is not None else decoder.score_dense(state)
    if scores_BN is None:
        raise IncompatibleComponentsError(
            f"{type(decoder).__name__} has no dense head to draft with: train it with one, or use decoding='beam'."
        )
    if tuple(scores_BN.shape) != (batch_size, num_items):
        raise IncompatibleComponentsError(
            f"draft scores have shape {tuple(scores_BN.shape)}, {batch_size} users and {num_items} items need "
            f"{(batch_size, num_items)}; use the tokenizer the model was made for."
        )
    check_scores(scores_BN)
    return scores_BN.float()


def cold_mask(decoder: Any, cold_items: Any, num_items: int, device: torch.device) -> torch.Tensor:
    """Cold items as a bool tensor (N,)."""
    cold = cold_items if cold_items is not None else getattr(decoder, "cold_items", None)
    mask_N = torch.zeros(num_items, dtype=torch.bool, device=device)
    if cold is None or (isinstance(cold, Sequence) and not len(cold)):
        return mask_N
    listed = torch.as_tensor(np.asarray(cold) if isinstance(cold, Sequence) else cold, device=device)
    if listed.dtype == torch.bool and tuple(listed.shape) == (num_items,):
        return listed
    if listed.dtype == torch.bool or listed.is_floating_point() or listed.ndim != 1:
        raise RequestError(f"cold_items must be a list of item indices, or a bool tensor of the {num_items} items.")
    if listed.numel() and (int(listed.min()) < 0 or int(listed.max()) >= num_items):
        raise RequestError(f"cold_items holds an item index outside 0..{num_items - 1}.")
    mask_N[listed.long()] = True
    return mask_N


def _trained_only(
    trie: ItemTrie,
    item_filter: ItemFilter | None,
    allowed_BS: torch.Tensor,
    cold_S: torch.Tensor,
    order_S: torch.Tensor,
) -> ItemFilter | None:
    """What the beam may return: the allowed items without the cold ones."""
    if not bool(cold_S.any()):
        return item_filter
    table_BN = torch.zeros_like(allowed_BS)
    table_BN[:, order_S] = allowed_BS & ~cold_S
    return ItemFilter.from_mask(trie, table_BN)


def _below_beams(trie: ItemTrie, level: int, nodes_BK: torch.Tensor, totals_BK: torch.Tensor) -> torch.Tensor:
    """(B, S) does the item of each slot lie below a live beam? A beam's items are a range of slots."""
    start, end = trie.slot_range(level, nodes_BK)
    alive = (totals_BK > -torch.inf).int()
    edges = torch.zeros(nodes_BK.shape[0], trie.num_items + 1, dtype=torch.int32, device=nodes_BK.device)
    edges.scatter_add_(1, start, alive).scatter_add_(1, end, -alive)
    return edges[:, :-1].cumsum(-1) > 0


def _verify(
    decoder: Any, state: Any, trie: ItemTrie, codes_BDL: torch.Tensor, counted_BDL: torch.Tensor
) -> torch.Tensor:
    """V (B, D): mean log-probability of the counted codes of each draft, each code given the ones before it."""
    batch, drafts, levels = codes_BDL.shape
    beams = start_beams(decoder, state, batch, codes_BDL.device)
    parents = torch.zeros(batch, drafts, dtype=torch.long, device=codes_BDL.device)
    total = torch.zeros(batch, drafts, device=codes_BDL.device)
    for level in range(levels):
        scores, size = beams.score(level), trie.codebook_sizes[level]
        if scores.logits_BKC.shape[-1] < size:
            raise IncompatibleComponentsError(
                f"level {level}: the model scores {scores.logits_BKC.shape[-1]} codes, the catalogue has {size}; "
                "use the tokenizer the model was trained with."
            )
        codes = codes_BDL[..., level].clamp(max=size - 1)
        codes_BKW = codes.unsqueeze(1) if level == 0 else codes.unsqueeze(2)  # one beam, D codes; D beams, one code
        step = child_log_probs(scores, codes_BKW, torch.ones_like(codes_BKW, dtype=torch.bool), renormalize=False)
        total += step.reshape(batch, drafts).masked_fill(~counted_BDL[..., level], 0.0)
        if level + 1 < levels:
            beams.reorder(parents, codes_BDL[..., level], level)
            parents = torch.arange(drafts, device=codes_BDL.device).expand(batch, -1)
    return total / counted_BDL.sum(-1)


def _choose(
    draft_items_BX: torch.Tensor,
    draft_values_BX: torch.Tensor,
    accepted_BX: torch.Tensor,
    beam_items_BK: torch.Tensor,
    beam_values_BK: torch.Tensor,
    k: int,
    num_items: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepted drafts, then beams, then rejected drafts, k of them, ordered by V. Items count once, at their first."""

    def members(items_BX: torch.Tensor) -> torch.Tensor:
        table = items_BX.new_zeros(items_BX.shape[0], num_items + 1, dtype=torch.bool)
        return table.scatter_(1, items_BX % (num_items + 1), True)  # padding -1 goes to the last column

    def inside(table: torch.Tensor, items_BX: torch.Tensor) -> torch.Tensor:
        return table.gather(1, items_BX % (num_items + 1))

    by_beam = members(beam_items_BK)
    by_acceptance = members(draft_items_BX.masked_fill(~accepted_BX, -1))
    draft_rank = accepted_BX * 2 - (~accepted_BX & inside(by_beam, draft_items_BX)).int()
    beam_rank = torch.where(inside(by_acceptance, beam_items_BK), -1, 1)
    items = torch.cat([draft_items_BX, beam_items_BK], dim=1)
    values = torch.cat([draft_values_BX, beam_values_BK], dim=1)
    rank = torch.cat([draft_rank, beam_rank], dim=1).masked_fill(items < 0, -1)
    values, order = values.masked_fill(rank < 0, -torch.inf).sort(dim=-1, descending=True, stable=True)
    items, rank = items.masked_fill(rank < 0, -1).gather(1, order), rank.gather(1, order)
    order = rank.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    items, values = items.gather(1, order), values.gather(1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return items.gather(1, order), values
