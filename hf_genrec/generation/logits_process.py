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

Shape legend: B requests, R = B * beams rows, T tokens, V vocabulary, L levels, W children, P items already in the
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from ..errors import IncompatibleComponentsError, RequestError
from .item_filter import ItemFilter
from .requests import item_rows
from .trie import ItemTrie

_DUPLICATE_SCORE = -1e6  # beams that never existed start at -1e9; no sum of real log-probabilities comes near this


class ItemTrieLogitsProcessor(LogitsProcessor):
    """Allows only tokens that continue the code of a catalogue item, and the end token after the last item.

    Args:
        trie_or_tokenizer: an ItemTokenizer (or an extended text tokenizer), or an ItemTrie with `level_offsets`.
        prompt_length: tokens before the answer in every row: `input_ids.shape[1]` for a decoder-only model (padding
            included), 1 for an encoder-decoder (its start token), the default.
        level_offsets: (L,) token id of code 0 of each level; taken from the tokenizer.
        eos_token_id: token that ends an answer; the tokenizer's end token, else its padding token. It is the only legal
            token after the last item, so it costs nothing (score 0): sums stay log-probabilities of items. After a
            prefix that is no catalogue item it is the only legal token too, at its own score.
        num_items: items per answer, one after the other.
        distinct: an answer of several items never repeats a code.
        allowed_items: the only items that may be generated: one list for all requests, or one list per request. Ids
            need a tokenizer; with a trie, give item indices.
        excluded_items: items that may not be generated (the seen ones, say): one list per request.
        renormalize: renormalise log-probabilities over the legal tokens.

    Requests are the rows of the batch; `generate` repeats each for its beams, so row r belongs to request r // beams.

    Raises:
        RequestError: no end token known, numbers below 1, an empty allow-list, or nothing left for a request.
        UnknownItemError: an id that is not in the catalogue.
        IncompatibleComponentsError: a trie without `level_offsets`; at the first call, rows that are no multiple of
        the requests.

    Example:
        processor = ItemTrieLogitsProcessor(tokenizer, prompt_length=inputs["input_ids"].shape[1])
        model.generate(**inputs, num_beams=20, num_return_sequences=10, length_penalty=0.0,
                       max_new_tokens=tokenizer.num_levels, logits_processor=[processor])
    """

    def __init__(
        self,
        trie_or_tokenizer: Any,
        prompt_length: int = 1,
        *,
        level_offsets: Sequence[int] | None = None,
        eos_token_id: int | None = None,
        num_items: int = 1,
        distinct: bool = True,
        allowed_items: Sequence[Any] | None = None,
        excluded_items: Sequence[Sequence[Any]] | None = None,
        renormalize: bool = False,
    ):
        tokenizer = None if isinstance(trie_or_tokenizer, ItemTrie) else trie_or_tokenizer
        self.trie = trie_or_tokenizer if tokenizer is None else ItemTrie.from_tokenizer(tokenizer)
        if level_offsets is None:
            if tokenizer is None:
                raise IncompatibleComponentsError(
                    "an ItemTrie knows codes, not tokens: pass level_offsets=tokenizer.level_offsets, or the "
                    "tokenizer itself."
                )
            level_offsets = tokenizer.level_offsets
        self.level_offsets = torch.as_tensor(np.asarray(level_offsets, dtype=np.int64))
        if eos_token_id is None and tokenizer is not None:
            eos_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
        if eos_token_id is None:
            raise RequestError("no end token is known: pass eos_token_id=....")
        if prompt_length < 0 or num_items < 1:
            raise RequestError(f"prompt_length must be >= 0 and num_items >= 1, got {prompt_length} and {num_items}.")
        self.prompt_length = int(prompt_length)
        self.eos_token_id = int(eos_token_id)
        self.num_items = int(num_items)
        self.distinct = bool(distinct)
        self.renormalize = bool(renormalize)
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

    def _filter_for(self, rows: int, device: torch.device) -> ItemFilter | None:
        """The filter with one row per row of `input_ids`."""
        if self.item_filter is None:
            return None
        requests = self.item_filter.slots_BS.shape[0]
        if rows % requests:
            raise IncompatibleComponentsError(
                f"{rows} rows for item lists of {requests} requests; make the processor with one list per row of "
                "the batch."
            )
        return self.item_filter.take(torch.arange(rows, device=device) // (rows // requests))

    def _to(self, device: torch.device) -> None:
        if self.trie.device != device:
            self.trie = self.trie.to(device)
            if self.item_filter is not None:
                self.item_filter = ItemFilter(
                    self.trie, self.item_filter.slots_BS.to(device), self.item_filter.keep_listed
                )
        self.level_offsets = self.level_offsets.to(device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Masks scores (R, V) with -inf outside the legal tokens of each row of input_ids (R, T)."""
        self._to(scores.device)
        levels = self.trie.num_levels
        rows, generated = input_ids.shape[0], input_ids.shape[1] - self.prompt_length
        if generated < 0:
            raise RequestError(
                f"prompt_length is {self.prompt_length}, but the sequences hold {input_ids.shape[1]} tokens; "
                "it is input_ids.shape[1] for a decoder-only model and 1 for an encoder-decoder."
            )
        needed = int(self.level_offsets[-1]) + self.trie.codebook_sizes[-1]
        if scores.shape[1] < needed:
            raise IncompatibleComponentsError(
                f"the model scores {scores.shape[1]} tokens, the item tokens need {needed}; "
                "call model.resize_token_embeddings(len(tokenizer)) and train it."
            )
        done, level = divmod(generated, levels)
        answer = input_ids[:, self.prompt_length :]
        finished = min(done, self.num_items) * levels
        if finished:
            leaves_RP = self.trie.lookup(answer[:, :finished].reshape(rows, -1, levels) - self.level_offsets)
        else:
            leaves_RP = answer.new_zeros(rows, 0)
        valid = (leaves_RP >= 0).all(-1)
        masked = torch.full_like(scores, -torch.inf)
        if done >= self.num_items:
            masked[:, self.eos_token_id] = torch.where(valid, 0.0, scores[:, self.eos_token_id])
            return masked  # type: ignore[return-value]

        partial = answer[:, finished:] - self.level_offsets[:level]
        nodes = torch.where(valid, self.trie.lookup(partial), -1)
        codes_RW, children_RW, legal_RW = self.trie.expand(level, nodes)
        padding = ~legal_RW
        legal_RW = legal_RW & self._alive(level + 1, children_RW, leaves_RP, self._filter_for(rows, scores.device))
        # padded entries repeat the first child, so that the scatter writes one value per token whatever its order
        codes_RW = torch.where(padding, codes_RW[:, :1], codes_RW)
        legal_RW = torch.where(padding, legal_RW[:, :1], legal_RW)
        tokens = codes_RW + self.level_offsets[level]
        masked.scatter_(1, tokens, scores.gather(1, tokens).masked_fill(~legal_RW, -torch.inf))
        stuck = ~legal_RW.any(-1)
        complete = stuck & valid & (level == 0)  # an answer that has used up all its items ends early, at no cost
        ending = torch.where(complete, 0.0, scores[:, self.eos_token_id])
        masked[:, self.eos_token_id] = torch.where(stuck, ending, masked[:, self.eos_token_id])
        if self.renormalize:
            masked = torch.where(stuck.unsqueeze(-1), masked, masked.log_softmax(-1))
        return masked  # type: ignore[return-value]

    def _alive(
        self, level: int, nodes_RW: torch.Tensor, leaves_RP: torch.Tensor, item_filter: ItemFilter | None
    ) -> torch.Tensor:
        """Does each node lead to an item that is allowed and, if answers are distinct, not yet in the answer?"""
        if leaves_RP.shape[1] == 0 or not self.distinct:
            return (
                torch.ones_like(nodes_RW, dtype=torch.bool)
                if item_filter is None
                else item_filter.alive(level, nodes_RW)
            )
        start, end = self.trie.slot_range(level, nodes_RW)
        used_start, used_end = self.trie.slot_range(self.trie.num_levels, leaves_RP)
        if item_filter is None:
            left, used = end - start, used_end - used_start
        else:
            left, used = item_filter.count_alive(start, end), item_filter.count_alive(used_start, used_end)
        inside = (used_start.unsqueeze(1) >= start.unsqueeze(2)) & (used_end.unsqueeze(1) <= end.unsqueeze(2))
        return left - (inside * used.unsqueeze(1)).sum(-1) > 0


def real_beams(sequences_scores: torch.Tensor) -> torch.Tensor:
    """Which results of `generate(num_beams=...)` are real: False for the duplicates that fill up a short beam.

    Give it `output.sequences_scores`; works for any length penalty up to 1.
    """
    return sequences_scores > _DUPLICATE_SCORE
