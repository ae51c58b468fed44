"""ItemTrieLogitsProcessor: keeps plain `model.generate` inside the catalogue, for encoder-decoder and decoder-only
models.

A pure function of `input_ids`: it re-walks the few generated codes of every row at each step, all rows at once, so that
batches, beam reordering and repeated calls cannot confuse it.

Notes on transformers' search (5.23)
    - Beam search applies log_softmax over the full vocabulary before processors, so masking leaves true joint
      log-probabilities; sampling masks logits first and so renormalises over the legal tokens. `renormalize=True` makes
      beam search do the same.
    - With fewer items than beams, `generate` fills the tail with duplicates of real items at a score of -1e9 divided
      by the length penalty. `real_beams(sequences_scores)` tells which results are real.
    - The library's own `recommend` gives the same items and scores, several times faster, and has no such tail.

Shape legend: B requests, R = B * beams rows, T tokens, A answer tokens, V vocabulary, L levels, W children, P items
already in the answer, X choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import IncompatibleComponentsError, RequestError
from .answer_grammar import AnswerGrammar
from .answer_processor import AnswerProcessor, check_vocabulary, end_token, rows_per_request
from .item_filter import ItemFilter
from .requests import item_rows
from .token_trie import TokenTrie
from .trie import ItemTrie

_DUPLICATE_SCORE = -1e6  # beams that never existed start at -1e9; no sum of real log-probabilities comes near this
_MODES = ("items", "mixed")


class ItemTrieLogitsProcessor(AnswerProcessor):
    """Allows only tokens that continue the code of a catalogue item, and the end token after the last item.

    Args:
        trie_or_tokenizer: an ItemTokenizer (or an extended text tokenizer), an ItemTrie with `level_offsets`, or a
            TokenTrie (titles).
        prompt_length: tokens before the answer in every row: `input_ids.shape[1]` for a decoder-only model (padding
            included), 1 for an encoder-decoder (its start token), the default.
        level_offsets: (L,) token id of code 0 of each level; taken from the tokenizer.
        eos_token_id: token that ends an answer; the tokenizer's end token, else its padding token. After a prefix that
            is no catalogue item it is the only legal token, at its own score.
        mode: "items" = the answer is nothing but items; "mixed" = free text in which an item, once begun by a first
            item token (or by `begin_token_id`), must be finished. Item tokens are legal nowhere else; texts and items
            may alternate, and the end token is legal wherever text is.
        num_items: items per answer, one after the other (default 1); in mixed mode the most an answer may hold
            (default: any number).
        distinct: an answer of several items never repeats a code.
        allowed_items: the only items that may be generated: one list for all requests, or one list per request. Ids
            need a tokenizer; with a trie, give item indices.
        excluded_items: items that may not be generated (the seen ones, say): one list per request.
        renormalize: renormalise log-probabilities over the legal tokens.
        free_end: the end of an answer costs nothing (score 0), so that sums stay log-probabilities of items; where a
            code is complete and can also go on, the end competes at cost 0. False gives the end token the model's own
            score, as for titles (the default of a TokenTrie), or for models trained to end items of different length.
        separator_token_id: token between two items ("items" mode); needed where an item can be the beginning of
            another one and both begin with the same kind of token.
        begin_token_id: mixed mode: the token that announces an item.

    Requests are the rows of the batch; `generate` repeats each for its beams, so row r belongs to request r // beams.

    Relations: `mode="mixed"` without text, and `num_items=1` of several, reduce to the plain processor;
    CandidateTrieLogitsProcessor is this one with `allowed_items` as the closed set, PrefixMarginalLogitsProcessor adds a
    second opinion to its scores.

    Raises:
        RequestError: no end token known, numbers below 1, an empty allow-list, or nothing left for a request.
        UnknownItemError: an id that is not in the catalogue.
        IncompatibleComponentsError: a trie without `level_offsets`, answers that could be read in two ways; at the
        first call, rows that are no multiple of the requests.

    Example:
        processor = ItemTrieLogitsProcessor(tokenizer, prompt_length=inputs["input_ids"].shape[1])
        model.generate(**inputs, num_beams=20, num_return_sequences=10, length_penalty=0.0,
                       max_new_tokens=tokenizer.num_levels, logits_processor=[processor])
    """

    _adjusts = False  # does `adjust_choices` change anything?

    def __init__(
        self,
        trie_or_tokenizer: Any,
        prompt_length: int = 1,
        *,
        level_offsets: Sequence[int] | None = None,
        eos_token_id: int | None = None,
        mode: str = "items",
        num_items: int | None = None,
        distinct: bool = True,
        allowed_items: Sequence[Any] | None = None,
        excluded_items: Sequence[Sequence[Any]] | None = None,
        renormalize: bool = False,
        free_end: bool | None = None,
        separator_token_id: int | None = None,
        begin_token_id: int | None = None,
    ):
        tokenizer = None if isinstance(trie_or_tokenizer, ItemTrie | TokenTrie) else trie_or_tokenizer
        trie: Any = trie_or_tokenizer if tokenizer is None else ItemTrie.from_tokenizer(tokenizer)
        if isinstance(trie, ItemTrie) and level_offsets is None:
            if tokenizer is None:
                raise IncompatibleComponentsError(
                    "an ItemTrie knows codes, not tokens: pass level_offsets=tokenizer.level_offsets, or the "
                    "tokenizer itself."
                )
            level_offsets = tokenizer.level_offsets
        super().__init__(prompt_length, end_token(tokenizer, eos_token_id))
        if mode not in _MODES:
            raise RequestError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}.")
        if num_items is not None and num_items < 1:
            raise RequestError(f"prompt_length must be >= 0 and num_items >= 1, got {prompt_length} and {num_items}.")
        if mode == "items" and begin_token_id is not None:
            raise RequestError('begin_token_id announces an item in free text; pass mode="mixed".')
        if mode == "mixed" and separator_token_id is not None:
            raise RequestError("separator_token_id stands between items; in mixed mode any text does.")
        self.catalogue_fingerprint = getattr(tokenizer, "catalogue_fingerprint", None)
        self.distinct = bool(distinct)
        self.renormalize = bool(renormalize)
        self.free_end = isinstance(trie, ItemTrie) if free_end is None else bool(free_end)
        offsets = np.asarray([] if level_offsets is None else level_offsets, dtype=np.int64)
        self.level_offsets = torch.from_numpy(offsets)
        blocks: list[tuple[int, int]] = []
        if isinstance(trie, ItemTrie):
            blocks = [(int(first), int(first) + size) for first, size in zip(offsets, trie.codebook_sizes, strict=True)]
        if any(first <= self.eos_token_id < end for first, end in blocks):
            raise IncompatibleComponentsError(
                f"the end token {self.eos_token_id} is an item token; pass the eos_token_id of the text vocabulary."
            )
        self._blocks = blocks
        self._vocabulary = max(end for _, end in blocks) if blocks else trie.stride
        self.num_items = 1 if num_items is None else int(num_items)
        self._grammar: AnswerGrammar | None = None
        if mode == "mixed" or isinstance(trie, TokenTrie) or trie.has_ends or separator_token_id is not None:
            self._grammar = AnswerGrammar(
                trie if isinstance(trie, TokenTrie) else TokenTrie.from_item_trie(trie, offsets),
                self.eos_token_id,
                mixed=mode == "mixed",
                num_items=num_items if mode == "mixed" else self.num_items,
                distinct=self.distinct,
                separator_token_id=separator_token_id,
                begin_token_id=begin_token_id,
                reserved=blocks,
                free_end=self.free_end,
                renormalize=self.renormalize,
            )
        self.trie: Any = trie if self._grammar is None else self._grammar.trie
        self.item_filter = self._build_filter(tokenizer, allowed_items, excluded_items)

    def _build_filter(self, tokenizer: Any, allowed_items: Any, excluded_items: Any) -> ItemFilter | None:
        excluded = None if excluded_items is None else item_rows(tokenizer, excluded_items, "excluded_items", self.trie)
        allowed = None if allowed_items is None else item_rows(tokenizer, allowed_items, "allowed_items", self.trie)
        if allowed is not None and any(len(row) == 0 for row in allowed):
            raise RequestError("allowed_items is empty for a request, which leaves nothing to generate.")
        if allowed is not None and excluded is not None and len(allowed) != len(excluded):
            if len(allowed) != 1:
                raise RequestError(
                    f"{len(allowed)} allow-lists for {len(excluded)} lists of excluded items; pass as many."
                )
            allowed = allowed * len(excluded)
        item_filter = ItemFilter.from_rows(self.trie, excluded, allowed)
        if item_filter is not None and bool((item_filter.num_alive() == 0).any()):
            row = int((item_filter.num_alive() == 0).nonzero()[0])
            raise RequestError(
                f"row {row}: the item lists leave nothing to generate; widen allowed_items or exclude fewer."
            )
        return item_filter

    def _to(self, device: torch.device) -> None:
        """Move the tables; from then on they stay there."""
        self.level_offsets = self.level_offsets.to(device)
        if self.trie.device == device:
            return
        self.trie = self.trie.to(device)
        if self.item_filter is not None:
            slots = self.item_filter.slots_BS.to(device)
            self.item_filter = ItemFilter(self.trie, slots, self.item_filter.keep_listed)
        if self._grammar is not None:
            self._grammar.trie = self.trie

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Masks scores (R, V) with -inf outside the legal tokens of each row of input_ids (R, T)."""
        self._to(scores.device)
        answer_RA = self.answers(input_ids)
        check_vocabulary(scores, self._vocabulary)
        if self.item_filter is not None:
            rows_per_request(input_ids.shape[0], self.item_filter.slots_BS.shape[0])
        if self._grammar is not None:
            adjust = self.adjust_choices if self._adjusts else None
            return self._grammar.mask(answer_RA, scores, self.item_filter, adjust)  # type: ignore[return-value]
        return self._mask_codes(answer_RA, scores)  # type: ignore[return-value]

    def adjust_choices(
        self, start_RX: torch.Tensor, end_RX: torch.Tensor, legal_RX: torch.Tensor, values_RX: torch.Tensor
    ) -> torch.Tensor:
        """Scores of the choices of each row, for subclasses that have more to say about the items below each choice.

        Args:
            start_RX, end_RX: slots of the items below each choice.
            legal_RX: False where padded or not legal.
            values_RX: the model's scores.
        """
        return values_RX

    def _mask_codes(self, answer_RA: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Codes of one length: all rows are at the same level."""
        levels, rows = self.trie.num_levels, answer_RA.shape[0]
        done, level = divmod(answer_RA.shape[1], levels)
        if answer_RA.shape[1] == 0 and self.item_filter is None and not self._adjusts:
            return self._first_codes(scores)
        finished = min(done, self.num_items) * levels
        leaves_RP, known_R = None, None
        if finished:
            leaves_RP = self.trie.lookup(answer_RA[:, :finished].reshape(rows, -1, levels) - self.level_offsets)
            known_R = (leaves_RP >= 0).all(-1)
        if known_R is not None and done >= self.num_items:
            masked = torch.full_like(scores, -torch.inf)
            own = scores[:, self.eos_token_id]
            masked[:, self.eos_token_id] = torch.where(known_R, 0.0, own) if self.free_end else own
            return masked

        nodes_R = self.trie.lookup(answer_RA[:, finished:] - self.level_offsets[:level])
        if known_R is not None:
            nodes_R = torch.where(known_R, nodes_R, -1)
        codes_RW, children_RW, legal_RW = self.trie.expand(level, nodes_R)
        stuck_R = nodes_R < 0
        if leaves_RP is not None and self.distinct:
            legal_RW = legal_RW & self._alive(level + 1, children_RW, leaves_RP)
            stuck_R = ~legal_RW.any(-1)
        elif self.item_filter is not None:
            requests = self.item_filter.slots_BS.shape[0]  # the rows of a request are adjacent
            shape = (requests, -1, legal_RW.shape[-1])
            legal_RW = self.item_filter.alive_children(level, nodes_R.view(requests, -1), legal_RW.view(shape))
            legal_RW = legal_RW.view(children_RW.shape)
            stuck_R = ~legal_RW.any(-1)
        # what is not legal is written to the end token's column, which gets its own value last
        tokens_RW = codes_RW.add_(self._blocks[level][0]).masked_fill_(~legal_RW, self.eos_token_id)
        values_RW = scores.gather(1, tokens_RW)
        if self.renormalize or self._adjusts:
            values_RW = self._rescored(level, children_RW, legal_RW, values_RW.masked_fill_(~legal_RW, -torch.inf))
        masked = torch.full_like(scores, -torch.inf).scatter_(1, tokens_RW, values_RW)
        masked[:, self.eos_token_id] = -torch.inf
        if bool(stuck_R.any()):
            ending = scores[:, self.eos_token_id]
            if level == 0 and known_R is not None and self.free_end:  # the answer has used up all its items
                ending = torch.where(known_R, 0.0, ending)
            masked[:, self.eos_token_id] = ending.masked_fill(~stuck_R, -torch.inf)
        return masked

    def _rescored(
        self, level: int, children_RW: torch.Tensor, legal_RW: torch.Tensor, values_RW: torch.Tensor
    ) -> torch.Tensor:
        if self.renormalize:
            values_RW = values_RW.log_softmax(-1).masked_fill(~legal_RW, -torch.inf)
        if self._adjusts:
            start_RW, end_RW = self.trie.slot_range(level + 1, children_RW)
            values_RW = self.adjust_choices(start_RW, end_RW, legal_RW, values_RW).masked_fill(~legal_RW, -torch.inf)
        return values_RW

    def _first_codes(self, scores: torch.Tensor) -> torch.Tensor:
        """At the beginning all rows have the same choice."""
        codes_W, _, _ = self.trie.expand(0, torch.zeros((), dtype=torch.long, device=scores.device))
        first, end = self._blocks[0]
        closed_C = scores.new_full((end - first,), -torch.inf)
        closed_C[codes_W] = 0.0
        block = scores[:, first:end] + closed_C
        masked = torch.full_like(scores, -torch.inf)
        masked[:, first:end] = block.log_softmax(-1) if self.renormalize else block
        return masked

    def _alive(self, level: int, nodes_RW: torch.Tensor, leaves_RP: torch.Tensor) -> torch.Tensor:
        """Does each node lead to an item that is allowed and not yet in the answer?"""
        start, end = self.trie.slot_range(level, nodes_RW)
        used_start, used_end = self.trie.leaf_slots(leaves_RP)
        used = self._count(used_start, used_end)
        inside = (used_start.unsqueeze(1) >= start.unsqueeze(2)) & (used_end.unsqueeze(1) <= end.unsqueeze(2))
        return self._count(start, end) - (inside * used.unsqueeze(1)).sum(-1) > 0

    def _count(self, start_RX: torch.Tensor, end_RX: torch.Tensor) -> torch.Tensor:
        if self.item_filter is None:
            return end_RX - start_RX
        requests = self.item_filter.slots_BS.shape[0]
        counts = self.item_filter.count_alive(start_RX.reshape(requests, -1), end_RX.reshape(requests, -1))
        return counts.view(start_RX.shape)


def real_beams(sequences_scores: torch.Tensor) -> torch.Tensor:
    """Which results of `generate(num_beams=...)` are real: False for the duplicates that fill up a short beam.

    Give it `output.sequences_scores`; works for any length penalty up to 1.
    """
    return sequences_scores > _DUPLICATE_SCORE
