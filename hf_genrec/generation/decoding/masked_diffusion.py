"""Masked-diffusion decoding over existing items: the codes of an item in the order of the model's certainty (2511.06254).

All M codes of the next item start hidden. In each of T steps the model scores every slot of every beam once; each beam
picks its M / T most certain hidden slots (largest probability of any code) and fills them in one after the other, each
filling being one step of beam search: add the code's log-probability, keep the best beams. Which slot comes when differs
from beam to beam.

Legality. The paper allows any code that occurs at a slot, so a finished beam may name no item. Here a code is legal only
where an allowed item has it together with all codes of the beam, so every beam can always be completed. That holds for
slots in any order because each beam carries its compatible codes: the catalogue's distinct codes (trie leaves) that agree
with it so far. Filling a slot splits that set by the code of the slot. Since a beam fills one slot at a time, the sets of
a user's beams never overlap: no two beams can reach the same item, whatever their orders, and all sets together hold each
leaf at most once. Memory is therefore at most 17 bytes per user and leaf (B = 64 users, 10^5 leaves: 110 MB), whatever
the number of beams, and a step costs one pass over them.

Shape legend: B users, K beams, R = B * K, M slots, C codes of the largest codebook, n leaves, E entries (a beam, a leaf
that agrees with it), F slots filled in the current step.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ...errors import IncompatibleComponentsError, RequestError
from ..configuration_recommendation import RecommendationConfig
from ..item_filter import ItemFilter
from ..trie import ItemTrie
from .beam import leaves_to_items, ranked_leaves
from .beam_cache import CodeScores
from .kernel import IMPOSSIBLE, best_children, check_scores, child_log_probs

ORDERS = ("confidence", "left_to_right")
_FILTER_CELLS = 2**20  # leaves x users whose filter is looked up at a time


class SlotLists:
    """For each slot, the leaves that have each code there: the inverted lists of a catalogue.

    Attributes:
        codes_Mn: code of every leaf at every slot.
        leaves_Mn: leaves sorted by their code at the slot.
        offsets: M tensors (C_m + 1,), where the list of each code begins in `leaves_Mn[m]`.
        used_MC: does the code occur at the slot? Rows padded with False to the largest codebook.
    """

    def __init__(self, trie: ItemTrie) -> None:
        self.codes_Mn = trie.node_prefixes(trie.num_levels).T.contiguous()
        self.leaves_Mn = self.codes_Mn.argsort(dim=1, stable=True)
        counts = [torch.bincount(row, minlength=size) for row, size in zip(self.codes_Mn, trie.codebook_sizes)]
        self.offsets = [torch.nn.functional.pad(count.cumsum(0), (1, 0)) for count in counts]
        width = max(trie.codebook_sizes)
        self.used_MC = torch.stack([torch.nn.functional.pad(count > 0, (0, width - len(count))) for count in counts])


_lists: weakref.WeakKeyDictionary[ItemTrie, SlotLists] = weakref.WeakKeyDictionary()


def slot_lists(trie: ItemTrie) -> SlotLists:
    """The inverted lists of a trie, built once.

    Raises:
        IncompatibleComponentsError: items with different numbers of codes.
    """
    if getattr(trie, "has_ends", False):
        raise IncompatibleComponentsError(
            "masked-diffusion decoding fills a fixed number of slots, but this catalogue has items with fewer codes; "
            "give every item the same number of codes."
        )
    lists = _lists.get(trie)
    if lists is None:
        lists = _lists[trie] = SlotLists(trie)
    return lists


class CompatibleLeaves:
    """The allowed leaves that agree with each beam, as entries (row of the beam, leaf); rows are b * K + k."""

    def __init__(self, lists: SlotLists, allowed_Bn: torch.Tensor | None, num_leaves: int) -> None:
        self.lists = lists
        self.allowed_Bn = allowed_Bn
        self.num_leaves = num_leaves
        self.row_E: torch.Tensor | None = None  # None: nothing is filled in, every beam agrees with every allowed leaf
        self.leaf_E: torch.Tensor | None = None

    @classmethod
    def of_request(cls, trie: ItemTrie, item_filter: ItemFilter | None, batch_size: int) -> CompatibleLeaves:
        """All leaves that each user may get."""
        allowed = None
        if item_filter is not None:
            leaves = torch.arange(trie.num_leaves, device=trie.device)
            users = torch.arange(batch_size, device=trie.device)
            chunk = max(1, _FILTER_CELLS // trie.num_leaves)  # the filter's own tables are many times its answer
            parts = [
                item_filter.take(some).alive(trie.num_levels, leaves.expand(len(some), -1))
                for some in users.split(chunk)
            ]
            allowed = torch.cat(parts)
        return cls(slot_lists(trie), allowed, trie.num_leaves)

    def legal(self, slot_BK: torch.Tensor) -> torch.Tensor:
        """Which codes of its slot lead each beam to an allowed leaf: (B, K, C) bool."""
        shape = (*slot_BK.shape, self.lists.used_MC.shape[1])
        if self.row_E is not None and self.leaf_E is not None:
            legal = torch.zeros(shape, dtype=torch.bool, device=slot_BK.device).flatten(0, 1)
            legal[self.row_E, self._codes(slot_BK)] = True
            return legal.view(shape)
        if self.allowed_Bn is None:
            return self.lists.used_MC[slot_BK]
        legal = torch.zeros(shape, dtype=torch.bool, device=slot_BK.device)
        for user, allowed_n in enumerate(self.allowed_Bn):  # K = 1 before anything is filled in
            legal[user, 0, self.lists.codes_Mn[slot_BK[user, 0]][allowed_n]] = True
        return legal

    def _codes(self, slot_BK: torch.Tensor) -> torch.Tensor:
        """Code of each entry's leaf at the slot of its beam. (E,)"""
        return self.lists.codes_Mn[slot_BK.flatten()[self.row_E], self.leaf_E]

    def fill(self, slot_BK: torch.Tensor, parents_BJ: torch.Tensor, codes_BJ: torch.Tensor) -> None:
        """Go on with J beams per user, each the beam `parents_BJ` with a (legal) code filled in at its slot.

        Dead beams (code -1) keep nothing.
        """
        batch, beams = slot_BK.shape
        new_row_BJ = torch.arange(parents_BJ.numel(), device=slot_BK.device).view(parents_BJ.shape)
        if self.row_E is None:
            self._first_fill(slot_BK[:, 0], codes_BJ, new_row_BJ)
            return
        width = self.lists.used_MC.shape[1]
        users = torch.arange(batch, device=slot_BK.device).unsqueeze(1)
        children_RC = torch.full((batch * beams * width + 1,), -1, dtype=torch.long, device=slot_BK.device)
        key_BJ = (users * beams + parents_BJ) * width + codes_BJ
        children_RC[torch.where(codes_BJ < 0, batch * beams * width, key_BJ)] = new_row_BJ  # the last cell is a bin
        row_E = children_RC[self.row_E * width + self._codes(slot_BK)]
        kept = row_E >= 0
        assert self.leaf_E is not None
        self.row_E, self.leaf_E = row_E[kept], self.leaf_E[kept]

    def _first_fill(self, slot_B: torch.Tensor, codes_BJ: torch.Tensor, new_row_BJ: torch.Tensor) -> None:
        rows, leaves = [], []
        for user, slot in enumerate(slot_B.tolist()):
            alive = codes_BJ[user] >= 0
            codes_J, offsets = codes_BJ[user][alive], self.lists.offsets[slot]
            start_J, count_J = offsets[codes_J], offsets[codes_J + 1] - offsets[codes_J]
            ends_J = count_J.cumsum(0)
            entry = torch.arange(int(count_J.sum()), device=slot_B.device)
            place = entry + (start_J - ends_J + count_J).repeat_interleave(count_J)
            leaf_E, row_E = self.lists.leaves_Mn[slot][place], new_row_BJ[user][alive].repeat_interleave(count_J)
            if self.allowed_Bn is not None:
                kept = self.allowed_Bn[user][leaf_E]
                leaf_E, row_E = leaf_E[kept], row_E[kept]
            rows.append(row_E)
            leaves.append(leaf_E)
        self.row_E, self.leaf_E = torch.cat(rows), torch.cat(leaves)


class AnyCombination:
    """The paper's looser rule: every code that occurs at a slot, whatever the other slots hold."""

    def __init__(self, lists: SlotLists) -> None:
        self.lists = lists

    def legal(self, slot_BK: torch.Tensor) -> torch.Tensor:
        """(B, K, C) bool."""
        return self.lists.used_MC[slot_BK]

    def fill(self, slot_BK: torch.Tensor, parents_BJ: torch.Tensor, codes_BJ: torch.Tensor) -> None:
        """Nothing to remember."""


def slots_per_step(num_slots: int, num_steps: int | None) -> list[int]:
    """How many slots each step fills: M // T each, the last one the rest. None = one slot a step.

    Raises:
        RequestError: steps below 1 or above the number of slots.

    Example:
        >>> slots_per_step(4, None), slots_per_step(5, 2)
        ([1, 1, 1, 1], [2, 3])
    """
    steps = num_slots if num_steps is None else num_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= num_slots:
        raise RequestError(
            f"num_steps must be a whole number from 1 to {num_slots} (codes of an item), got {num_steps!r}."
        )
    each = num_slots // steps
    return [each] * (steps - 1) + [num_slots - each * (steps - 1)]


def masked_diffusion(
    decoder: Any,
    state: Any,
    trie: ItemTrie,
    config: RecommendationConfig,
    item_filter: ItemFilter | None = None,
    *,
    batch_size: int,
    num_steps: int | None = None,
    order: str = "confidence",
    valid_only: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill in hidden codes with `config.search_width` beams (LLaDA-Rec, arXiv 2511.06254). Lossy and deterministic.

    Lossy: as in beam search an item can fall out early; besides, an item's score is that of the order its beam took,
    and slots filled in one step do not see each other.

    Relations: `order="left_to_right"` with one slot a step is the search "beam" on the same model, score for score.
    With beams for every leaf the result is exact for the chosen order.

    Args:
        decoder: has `score_positions(state, codes_BKM) -> logp_BKMC` (code -1 = hidden, -inf beyond a slot's codebook).
        num_steps: T, runs of the model; None = M, one slot a step. Fewer are faster and coarser.
        order: "confidence" (the paper) or "left_to_right".
        valid_only: True: only codes that can be completed to an allowed item. False: the paper's rule, any code that
            occurs at its slot; finished beams are looked up in the catalogue, and those that name no allowed item are
            dropped, so fewer items than asked for may come back.

    Returns:
        items_BX (int64, -1 padded), best first, and scores_BX (float32, -inf there). Equal scores: lower leaf first;
        items that share all codes follow each other.

    Raises:
        RequestError: an unknown order, or a number of steps the codes cannot be shared among.
        IncompatibleComponentsError: a catalogue with items of different length, or other codebooks than the model's.
        GenRecError: the model returned NaN.
    """
    if order not in ORDERS:
        raise RequestError(f"order must be one of {', '.join(ORDERS)}, got {order!r}.")
    fillings = slots_per_step(trie.num_levels, num_steps)
    device = trie.device
    compatible = (
        CompatibleLeaves.of_request(trie, item_filter, batch_size) if valid_only else AnyCombination(slot_lists(trie))
    )
    codes = torch.full((batch_size, 1, trie.num_levels), -1, dtype=torch.long, device=device)
    scores = torch.zeros(batch_size, 1, dtype=torch.float32, device=device)
    for count in fillings:
        logp_BKMC = decoder.score_positions(state, codes)
        _check_codebooks(logp_BKMC, trie)
        slots_BKF = _next_slots(logp_BKMC, codes, count, order)
        logp_BKFC = logp_BKMC.gather(2, slots_BKF.unsqueeze(-1).expand(-1, -1, -1, logp_BKMC.shape[-1]))
        for filling in range(count):
            slot_BK = slots_BKF[..., filling]
            legal_BKC = compatible.legal(slot_BK) & (scores > -torch.inf).unsqueeze(-1)
            width = legal_BKC.shape[-1]
            every_BKC = torch.arange(width, device=device).expand_as(legal_BKC)
            step = child_log_probs(CodeScores(logp_BKFC[:, :, filling]), every_BKC, legal_BKC, config.renormalize)
            total = (scores.unsqueeze(-1) + step).flatten(1)
            chosen = best_children(total, config.search_width)
            parents, code, scores = chosen // width, chosen % width, total.gather(1, chosen)
            alive = scores > -torch.inf
            compatible.fill(slot_BK, parents, code.masked_fill(~alive, -1))
            codes, slots_BKF, logp_BKFC = _take(codes, parents), _take(slots_BKF, parents), _take(logp_BKFC, parents)
            codes.scatter_(2, slots_BKF[..., filling : filling + 1], code.masked_fill(~alive, 0).unsqueeze(-1))
    check_scores(scores)
    leaves = torch.where(scores > -torch.inf, trie.lookup(codes), -1)
    if item_filter is not None and not valid_only:
        leaves = torch.where(item_filter.alive(trie.num_levels, leaves.clamp(min=0)), leaves, -1)
    leaves, in_order = leaves.sort(dim=1)  # ties go to the lower leaf
    leaves, scores = ranked_leaves(leaves, scores.gather(1, in_order).masked_fill(leaves < 0, -torch.inf))
    return leaves_to_items(trie, leaves, scores, config.search_width, item_filter)


def _take(values_BKx: torch.Tensor, parents_BJ: torch.Tensor) -> torch.Tensor:
    """The rows of the parents: (B, J, ...)."""
    users = torch.arange(values_BKx.shape[0], device=values_BKx.device).unsqueeze(1)
    return values_BKx[users, parents_BJ]


def _next_slots(logp_BKMC: torch.Tensor, codes_BKM: torch.Tensor, count: int, order: str) -> torch.Tensor:
    """The hidden slots to fill, first one first: (B, K, count). Equal certainty: the slot further left."""
    hidden_BKM = codes_BKM < 0
    certainty_BKM = logp_BKMC.amax(-1).float().clamp(min=IMPOSSIBLE) if order == "confidence" else hidden_BKM.float()
    rank_BKM = certainty_BKM.masked_fill(~hidden_BKM, -torch.inf)
    return rank_BKM.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _check_codebooks(logp_BKMC: torch.Tensor, trie: ItemTrie) -> None:
    if logp_BKMC.shape[2] != trie.num_levels or logp_BKMC.shape[3] < max(trie.codebook_sizes):
        raise IncompatibleComponentsError(
            f"the model scores {logp_BKMC.shape[2]} slots of up to {logp_BKMC.shape[3]} codes, the catalogue has "
            f"{trie.num_levels} slots of up to {max(trie.codebook_sizes)}; use the tokenizer the model was trained with."
        )
