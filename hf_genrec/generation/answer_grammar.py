"""Which tokens may come next in an answer of token sequences from a TokenTrie: one item, several, or items inside text.

Used by the logits processors wherever rows can be at different depths: item codes of several lengths, titles, mixed text
and items. Reads the whole answer of every row anew at each call, all rows at once.

Shape legend: R rows, A answer tokens, V vocabulary, W children, P finished items, X tokens to choose from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import IncompatibleComponentsError, RequestError
from .item_filter import ItemFilter
from .token_trie import TokenTrie, check_unambiguous

# (first slots, past-the-last slots, legal, values), all (R, X) -> values
AdjustChoices = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Reading(NamedTuple):
    """What the answers say so far.

    Attributes:
        node_R: node inside the current item; 0 between items; -1 where the answer is no legal one.
        due_R: an item must begin here (node 0 only).
        count_R: items finished before the current one.
        ended_R: the end token was given after a legal answer.
        finished_RP: nodes of the finished items, -1 padded.
    """

    node_R: torch.Tensor
    due_R: torch.Tensor
    count_R: torch.Tensor
    ended_R: torch.Tensor
    finished_RP: torch.Tensor


class AnswerGrammar:
    """Answers made of sequences of a TokenTrie.

    Args:
        trie: the sequences.
        eos_token_id: ends an answer.
        mixed: free text is allowed around the items; an item once begun must be finished. A token that does not
            continue a complete item ends it.
        num_items: items per answer (mixed: at most; None = any number).
        distinct: no sequence twice in an answer.
        separator_token_id: stands between two items (not mixed).
        begin_token_id: announces an item in free text. Without it a first item token does, which must then occur at no
            other place of a sequence.
        reserved: (first, past the last) token ids that are no free text: the item tokens.
        free_end: ending a complete item costs nothing; False: the end token has the model's score.
        renormalize: over the tokens to choose from; a free end takes no part.

    Raises:
        RequestError: num_items below 1.
        IncompatibleComponentsError: answers could be read in two ways.
    """

    def __init__(
        self,
        trie: TokenTrie,
        eos_token_id: int,
        *,
        mixed: bool = False,
        num_items: int | None = 1,
        distinct: bool = True,
        separator_token_id: int | None = None,
        begin_token_id: int | None = None,
        reserved: list[tuple[int, int]] | None = None,
        free_end: bool = True,
        renormalize: bool = False,
    ):
        self.trie = trie
        self.eos_token_id = eos_token_id
        self.mixed = mixed
        self.num_items = 2**31 if num_items is None else int(num_items)
        self.distinct = distinct
        self.separator_token_id = separator_token_id
        self.begin_token_id = begin_token_id
        self.reserved = reserved or []
        self.free_end = free_end and not mixed
        self.renormalize = renormalize
        if self.num_items < 1:
            raise RequestError(f"num_items must be >= 1, got {num_items}.")
        if bool((trie.tokens_after_ends() == eos_token_id).any()):
            raise IncompatibleComponentsError(
                f"the end token {eos_token_id} also continues a complete item; give items that do not hold it."
            )
        if mixed and begin_token_id is None:
            deeper = trie.keys_E[trie.keys_E >= trie.stride] % trie.stride
            if not self.reserved or bool(torch.isin(deeper, trie.first_tokens()).any()):
                raise IncompatibleComponentsError(
                    "free text and items cannot be told apart, because items begin with ordinary tokens; pass "
                    "begin_token_id, the token that announces an item."
                )
        if not mixed and self.num_items > 1:
            check_unambiguous(trie, separator_token_id)

    # ---------------------------------------------------------------- reading

    def read(self, answer_RA: torch.Tensor) -> Reading:
        """Walk through the answers."""
        trie, rows, device = self.trie, answer_RA.shape[0], answer_RA.device
        node = torch.zeros(rows, dtype=torch.long, device=device)
        root = node.clone()
        due = torch.full((rows,), not self.mixed, dtype=torch.bool, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        count = torch.zeros(rows, dtype=torch.long, device=device)
        finished = []
        for token in self._columns(answer_RA):
            child = trie.step(node, token)
            if self.begin_token_id is not None:
                child = torch.where((node > 0) | due, child, -1)
            between = (node == 0) & ~due
            leaving = (child < 0) & (trie.num_ending(node) > 0) & (node > 0)
            ending = (token == self.eos_token_id) & (leaving | between)
            finished.append(torch.where(leaving & ~ended, node, -1))
            count = count + (leaving & ~ended)
            after, after_due = self._after_item(token, root)
            node = torch.where(child >= 0, child, torch.where(leaving | between, after, -1)).masked_fill(ended, 0)
            due = after_due & (child < 0) & (leaving | between)
            ended = ended | ending
        finished_RP = torch.stack(finished, dim=1) if finished else root.new_zeros(rows, 0)
        return Reading(node, due, count, ended, finished_RP[:, (finished_RP >= 0).any(0)])

    def _after_item(self, token: torch.Tensor, root: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Node and `due` after a token that stands between items."""
        no, yes = torch.zeros_like(token, dtype=torch.bool), torch.ones_like(token, dtype=torch.bool)
        if not self.mixed and self.separator_token_id is not None:
            return torch.where(token == self.separator_token_id, 0, -1), yes
        first = self.trie.step(root, token)
        if not self.mixed:
            return first, no
        text = torch.where(self._is_reserved(token), -1, 0)
        if self.begin_token_id is None:
            return torch.where(first >= 0, first, text), no
        announced = token == self.begin_token_id
        return text.masked_fill(announced, 0), announced

    def _is_reserved(self, tokens: torch.Tensor) -> torch.Tensor:
        reserved = torch.zeros_like(tokens, dtype=torch.bool)
        for first, end in self.reserved:
            reserved |= (tokens >= first) & (tokens < end)
        return reserved

    def _columns(self, answer_RA: torch.Tensor) -> list[torch.Tensor]:
        """Columns that matter: of a run of plain text in every row, the first one is enough."""
        if not self.mixed or answer_RA.shape[1] == 0:
            return list(answer_RA.unbind(1))
        matter = self._is_reserved(answer_RA) | (answer_RA == self.eos_token_id)
        if self.begin_token_id is not None:
            matter |= answer_RA == self.begin_token_id
        if not self.reserved:
            matter |= torch.isin(answer_RA, self.trie.keys_E % self.trie.stride)
        columns = matter.any(0)
        columns[1:] |= columns[:-1].clone()
        return list(answer_RA[:, columns].unbind(1))

    # ---------------------------------------------------------------- choosing

    def mask(
        self,
        answer_RA: torch.Tensor,
        scores_RV: torch.Tensor,
        item_filter: ItemFilter | None = None,
        adjust: AdjustChoices | None = None,
    ) -> torch.Tensor:
        """Scores (R, V) with -inf outside the legal next tokens.

        Args:
            item_filter: over `trie`, R a multiple of its requests.
            adjust: changes the scores of the choices of an answer of one item.
        """
        if answer_RA.shape[1] == 0 and adjust is None:
            return self._first_choice(answer_RA, scores_RV, item_filter)
        return self._mask(answer_RA, scores_RV, item_filter, adjust)

    def _first_choice(
        self, answer_R0: torch.Tensor, scores_RV: torch.Tensor, item_filter: ItemFilter | None
    ) -> torch.Tensor:
        """At the beginning all rows of a request have the same choice, and nothing may end."""
        requests = 1 if item_filter is None else item_filter.slots_BS.shape[0]
        closed_BV = self._mask(answer_R0[:requests], torch.zeros_like(scores_RV[:requests]), item_filter, None)
        closed_BV = torch.where(closed_BV > -torch.inf, 0.0, -torch.inf)
        masked = (scores_RV.view(requests, -1, scores_RV.shape[1]) + closed_BV.unsqueeze(1)).view(scores_RV.shape)
        return masked.log_softmax(-1) if self.renormalize else masked

    def _mask(
        self,
        answer_RA: torch.Tensor,
        scores_RV: torch.Tensor,
        item_filter: ItemFilter | None,
        adjust: AdjustChoices | None,
    ) -> torch.Tensor:
        reading = self.read(answer_RA)
        trie, node, count = self.trie, reading.node_R, reading.count_R
        used = reading.finished_RP if self.distinct else reading.finished_RP[:, :0]
        complete = (node > 0) & self._alive(trie.end_range(node), used, item_filter).squeeze(-1)
        inside = node.masked_fill((node == 0) & ~(reading.due_R | self._begins_by_itself()), -1)
        inside = inside.masked_fill((node == 0) & (count >= self.num_items), -1).masked_fill(reading.ended_R, -1)
        tokens, children, legal = trie.expand(inside)
        ranges = trie.slot_range(children)
        legal = legal & self._alive(ranges, used, item_filter)

        # what may follow once the current item is complete
        now_used = torch.cat([used, node.masked_fill(~complete, -1).unsqueeze(1)], dim=1) if self.distinct else used
        whole = trie.slot_range(torch.zeros_like(node))
        between = (node == 0) & ~reading.due_R if self.mixed else torch.zeros_like(complete)
        room = count + complete.long() < self.num_items
        more = (complete | between) & room & ~reading.ended_R
        more = more & self._alive(whole, now_used, item_filter).squeeze(-1)
        extra_tokens, extra_legal = [], []
        if self._begins_by_itself() and self.num_items > 1:
            firsts, first_children, first_legal = trie.expand(torch.where(more & (node > 0), 0, -1))
            extra_tokens.append(firsts)
            extra_legal.append(first_legal & self._alive(trie.slot_range(first_children), now_used, item_filter))
        opener = self.begin_token_id if self.mixed else self.separator_token_id
        if opener is not None and (self.mixed or self.num_items > 1):
            extra_tokens.append(torch.full_like(node, opener).unsqueeze(1))
            extra_legal.append(more.unsqueeze(1))

        tokens = torch.cat([tokens, *extra_tokens], dim=1)
        legal = torch.cat([legal, *extra_legal], dim=1)
        values = scores_RV.gather(1, tokens).masked_fill(~legal, -torch.inf)
        if self.mixed:
            return self._with_text(scores_RV, tokens, values, (complete | between) & ~reading.ended_R, reading)
        return self._with_end(scores_RV, tokens, values, legal, complete & ~more, reading, ranges, adjust)

    def _begins_by_itself(self) -> bool:
        """May a first item token follow directly, with nothing to announce it?"""
        return self.begin_token_id is None and (self.mixed or self.separator_token_id is None)

    def _with_text(
        self,
        scores_RV: torch.Tensor,
        tokens_RX: torch.Tensor,
        values_RX: torch.Tensor,
        text_R: torch.Tensor,
        reading: Reading,
    ) -> torch.Tensor:
        closed_V = torch.zeros_like(scores_RV[0])
        for first, end in self.reserved:
            closed_V[first:end] = -torch.inf
        if self.begin_token_id is not None:
            closed_V[self.begin_token_id] = -torch.inf
        masked = scores_RV + closed_V
        masked[~text_R] = -torch.inf
        masked.scatter_reduce_(1, tokens_RX, values_RX, "amax")
        stuck = ~text_R & (values_RX == -torch.inf).all(-1)
        ending = scores_RV[:, self.eos_token_id].masked_fill(reading.ended_R, 0.0)
        masked[:, self.eos_token_id] = torch.where(stuck, ending, masked[:, self.eos_token_id])
        return masked.log_softmax(-1) if self.renormalize else masked

    def _with_end(
        self,
        scores_RV: torch.Tensor,
        tokens_RX: torch.Tensor,
        values_RX: torch.Tensor,
        legal_RX: torch.Tensor,
        may_end_R: torch.Tensor,
        reading: Reading,
        ranges: tuple[torch.Tensor, torch.Tensor],
        adjust: AdjustChoices | None,
    ) -> torch.Tensor:
        lost = ~legal_RX.any(-1) & ~may_end_R  # nothing may follow: no legal answer, or one that is over
        own = scores_RV[:, self.eos_token_id]
        end = own
        if self.free_end:  # shift-invariant: 0 next to log-probabilities, and the same choice next to logits
            end = scores_RV.logsumexp(-1) if bool((may_end_R & legal_RX.any(-1)).any()) else torch.zeros_like(own)
            end = torch.where(legal_RX.any(-1), end, 0.0)
        choices = torch.cat([values_RX, end.masked_fill(~may_end_R, -torch.inf).unsqueeze(1)], dim=1)
        legal = torch.cat([legal_RX, may_end_R.unsqueeze(1)], dim=1)
        if self.renormalize:
            spoken = legal.clone()
            spoken[:, -1] &= not self.free_end
            total = choices.masked_fill(~spoken, -torch.inf).logsumexp(-1, keepdim=True)
            choices = torch.where(spoken, choices - total, choices)
            if self.free_end:
                choices[:, -1] = choices[:, -1].masked_fill(may_end_R, 0.0)
        if adjust is not None:
            ends = self.trie.end_range(reading.node_R)
            start_RX = torch.cat([ranges[0], ends[0].unsqueeze(1)], dim=1)
            end_RX = torch.cat([ranges[1], ends[1].unsqueeze(1)], dim=1)
            choices = adjust(start_RX, end_RX, legal, choices).masked_fill(~legal, -torch.inf)
        over = torch.where(reading.ended_R, 0.0, own)
        choices[:, -1] = torch.where(lost, over, choices[:, -1])
        masked = torch.full_like(scores_RV, -torch.inf)
        ending = torch.full_like(reading.node_R, self.eos_token_id).unsqueeze(1)
        return masked.scatter_reduce_(1, torch.cat([tokens_RX, ending], dim=1), choices, "amax")

    def _alive(
        self, ranges: tuple[torch.Tensor, torch.Tensor], used_RP: torch.Tensor, item_filter: ItemFilter | None
    ) -> torch.Tensor:
        """Does each range of slots (R,) or (R, X) hold a sequence that is allowed and not used yet? (R, X) bool."""
        start, end = (bound.reshape(bound.shape[0], -1) for bound in ranges)
        left = self._count(start, end, item_filter)
        if used_RP.shape[1]:
            used_start, used_end = self.trie.end_range(used_RP)
            used = self._count(used_start, used_end, item_filter)
            inside = (used_start.unsqueeze(1) >= start.unsqueeze(2)) & (used_end.unsqueeze(1) <= end.unsqueeze(2))
            left = left - (inside * used.unsqueeze(1)).sum(-1)
        return left > 0

    @staticmethod
    def _count(start_RX: torch.Tensor, end_RX: torch.Tensor, item_filter: ItemFilter | None) -> torch.Tensor:
        if item_filter is None:
            return end_RX - start_RX
        requests = item_filter.slots_BS.shape[0]  # rows of one request are adjacent
        counts = item_filter.count_alive(start_RX.reshape(requests, -1), end_RX.reshape(requests, -1))
        return counts.view(start_RX.shape)
