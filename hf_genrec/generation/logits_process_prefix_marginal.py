"""Prefix marginals: item probabilities of another model, summed over the items below each next token (D3, arXiv
2406.14900).

A language model that writes titles or codes hears a second opinion at every step: of the probability that a collaborative
model gives to the items which the answer can still become, which share lies below each next token? The logarithm of that
share is mixed with the language model's own score. The shares along the path of an item multiply to the probability of
the item, so the opinion alone ranks items exactly as the other model does.

Items below any node of a prefix tree are a contiguous range of slots: one cumulative sum per request answers every step.

Shape legend: B requests, K beams, W children, N items, X choices, R = B * K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import RequestError
from .answer_processor import rows_per_request
from .item_filter import ItemFilter
from .logits_process import ItemTrieLogitsProcessor
from .token_trie import TokenTrie
from .trie import ItemTrie

# Log-share of a child without any probability: the child stays legal and comes last; 64 of them stay far above the score
# of a beam that never existed (see real_beams).
_NO_SHARE = -1e4


class PrefixMarginal:
    """Mixes prefix marginals into the scores of legal children: an `adjust` of `kernel.beam_step`.

    score = alpha * (the model's log-probability) + (1 - alpha) * log(share of the child among the legal children)

    Args:
        trie: the catalogue (ItemTrie), or titles (TokenTrie).
        item_probs: probabilities of all items (B, N), or (N,) for every request; they need not sum to 1.
        alpha: 1 leaves the model's scores as they are, 0 leaves only the shares.
        item_filter: items that may be generated; only they count.

    Relations: `alpha=1` is plain constrained search; `alpha=0` ranks as `item_probs` does.

    Accuracy: sums are float64, so shares are exact to about 1e-16 divided by the probability below the parent.

    Raises:
        RequestError: alpha outside 0..1; probabilities of another number of items, negative, not finite, or without any
            mass on the items allowed (row named).

    Example:
        >>> trie = ItemTrie.from_codes([[0, 0], [0, 1], [1, 0]])
        >>> marginal = PrefixMarginal(trie, torch.tensor([0.2, 0.3, 0.5]), alpha=0.0)
        >>> codes, children, legal = trie.expand(0, torch.zeros(1, 1, dtype=torch.long))
        >>> marginal(0, torch.zeros(1, 1), children, codes, legal, torch.zeros(1, 1, 2)).exp()
        tensor([[[0.5000, 0.5000]]])
    """

    def __init__(
        self,
        trie: ItemTrie | TokenTrie,
        item_probs: torch.Tensor | np.ndarray,
        alpha: float,
        item_filter: ItemFilter | None = None,
    ):
        if not 0.0 <= alpha <= 1.0:
            raise RequestError(f"alpha must lie in 0..1, got {alpha}; 1 is the model alone, 0 the item probabilities.")
        probs_BN = torch.as_tensor(item_probs).detach().to(trie.device)
        probs_BN = probs_BN.unsqueeze(0) if probs_BN.ndim == 1 else probs_BN
        if probs_BN.ndim != 2 or probs_BN.shape[1] != trie.num_items or probs_BN.shape[0] == 0:
            raise RequestError(
                f"item_probs has shape {tuple(probs_BN.shape)}, the catalogue {trie.num_items} items; "
                "give one probability per item, (N,) or (requests, N)."
            )
        wrong = ~(probs_BN.isfinite() & (probs_BN >= 0))
        if bool(wrong.any()):
            row, item = wrong.nonzero()[0].tolist()
            raise RequestError(
                f"item_probs row {row}, item {item} is {float(probs_BN[row, item])}; probabilities are finite and not "
                "negative: apply a softmax to scores."
            )
        slots = torch.arange(trie.num_items, device=trie.device)
        self.probs_BN = probs_BN[:, trie.items_at(slots)]  # by slot
        if item_filter is not None:
            requests = item_filter.slots_BS.shape[0]
            if self.probs_BN.shape[0] not in (1, requests) and requests != 1:
                raise RequestError(
                    f"item_probs has {self.probs_BN.shape[0]} rows for item lists of {requests} requests; give as many."
                )
            alive_BN = item_filter.alive_slots(slots.expand(requests, -1))
            self.probs_BN = torch.where(alive_BN, self.probs_BN, 0)
        empty = self.probs_BN.sum(-1) == 0
        if bool(empty.any()):
            raise RequestError(
                f"item_probs row {int(empty.nonzero()[0])} has no mass on the items allowed; give them probability."
            )
        self.trie = trie
        self.alpha = float(alpha)
        self.below_BN = torch.nn.functional.pad(self.probs_BN.double().cumsum(-1), (1, 0))

    @property
    def num_requests(self) -> int:
        """Rows of the probabilities; 1 serves any number of requests."""
        return self.probs_BN.shape[0]

    def log_shares(self, start_BKW: torch.Tensor, end_BKW: torch.Tensor, legal_BKW: torch.Tensor) -> torch.Tensor:
        """Logarithm of the share of each choice in the probability of all legal choices of its beam, float32.

        Args:
            start_BKW, end_BKW: slots of the items below each choice.
            legal_BKW: choices that count. Where they have no probability at all, they share evenly.
        """
        batch = start_BKW.shape[0]
        start, end = start_BKW.flatten(1), end_BKW.flatten(1)
        below, probs = self.below_BN.expand(batch, -1), self.probs_BN.expand(batch, -1)
        mass = below.gather(1, end) - below.gather(1, start)
        # a single item's own number is exact, the difference of two sums is not
        single = probs.gather(1, start.clamp(max=probs.shape[1] - 1)).double()
        mass = torch.where(end - start == 1, single, mass).view(start_BKW.shape).masked_fill(~legal_BKW, 0.0)
        total = mass.sum(-1, keepdim=True)
        even = 1.0 / legal_BKW.sum(-1, keepdim=True).clamp(min=1)
        share = torch.where(total > 0, mass / total.clamp(min=torch.finfo(torch.float64).tiny), even)
        return share.log().clamp(min=_NO_SHARE).float()

    def mix(
        self, start_BKW: torch.Tensor, end_BKW: torch.Tensor, legal_BKW: torch.Tensor, step_BKW: torch.Tensor
    ) -> torch.Tensor:
        """The mixed scores; what is not legal, or -inf already, stays as it is."""
        if self.alpha == 1.0:
            return step_BKW
        mixed = self.alpha * step_BKW + (1.0 - self.alpha) * self.log_shares(start_BKW, end_BKW, legal_BKW)
        return torch.where(legal_BKW & (step_BKW > -torch.inf), mixed, step_BKW)

    def __call__(
        self,
        level: int,
        nodes_BK: torch.Tensor,
        children_BKW: torch.Tensor,
        codes_BKW: torch.Tensor,
        legal_BKW: torch.Tensor,
        step_BKW: torch.Tensor,
    ) -> torch.Tensor:
        """The hook of `kernel.beam_step`: one row of `item_probs` per user of the search (or one for all)."""
        if not isinstance(self.trie, ItemTrie):
            raise RequestError("a search over an ItemTrie needs a PrefixMarginal of that trie, not of a TokenTrie.")
        if self.num_requests not in (1, children_BKW.shape[0]):
            raise RequestError(
                f"item_probs has {self.num_requests} rows for {children_BKW.shape[0]} users; give one row per user."
            )
        return self.mix(*self.trie.slot_range(level + 1, children_BKW), legal_BKW, step_BKW)

    def to(self, trie: ItemTrie | TokenTrie) -> PrefixMarginal:
        """The same numbers on the device of `trie`, a copy of this one's trie."""
        twin = object.__new__(PrefixMarginal)
        twin.trie, twin.alpha = trie, self.alpha
        twin.probs_BN, twin.below_BN = self.probs_BN.to(trie.device), self.below_BN.to(trie.device)
        return twin


class PrefixMarginalLogitsProcessor(ItemTrieLogitsProcessor):
    """ItemTrieLogitsProcessor whose scores are mixed with prefix marginals of item probabilities (D3).

    One item (or title) per answer. In beam search use `length_penalty=0.0`, as the paper does: long titles are full of
    tokens with a probability near 1, which a length penalty would reward.

    Args:
        trie_or_tokenizer: an ItemTokenizer, an ItemTrie with `level_offsets`, or a TokenTrie of titles.
        item_probs: (B, N), one row per request, or (N,) for all of them; item n of the catalogue, or title n.
        alpha: weight of the language model; 1 = it alone, 0 = the item probabilities alone.
        prompt_length, level_offsets, eos_token_id, allowed_items, excluded_items, renormalize, free_end: as in
            ItemTrieLogitsProcessor.

    Relations: `alpha=1` equals ItemTrieLogitsProcessor; `alpha=0` with as many beams as items gives the ranking of
    `item_probs` (items that share a code are one sequence, with the sum of their probabilities).

    Raises:
        RequestError, UnknownItemError, IncompatibleComponentsError: as ItemTrieLogitsProcessor and PrefixMarginal.

    Example:
        probs = sasrec_scores.softmax(-1)  # (B, N)
        processor = PrefixMarginalLogitsProcessor(tokenizer, probs, 0.8, inputs["input_ids"].shape[1])
        model.generate(**inputs, num_beams=10, length_penalty=0.0, max_new_tokens=4, logits_processor=[processor])
    """

    def __init__(
        self,
        trie_or_tokenizer: Any,
        item_probs: torch.Tensor | np.ndarray,
        alpha: float,
        prompt_length: int = 1,
        *,
        level_offsets: Sequence[int] | None = None,
        eos_token_id: int | None = None,
        allowed_items: Sequence[Any] | None = None,
        excluded_items: Sequence[Sequence[Any]] | None = None,
        renormalize: bool = False,
        free_end: bool | None = None,
    ):
        super().__init__(
            trie_or_tokenizer,
            prompt_length,
            level_offsets=level_offsets,
            eos_token_id=eos_token_id,
            allowed_items=allowed_items,
            excluded_items=excluded_items,
            renormalize=renormalize,
            free_end=free_end,
        )
        self.marginal = PrefixMarginal(self.trie, item_probs, alpha, self.item_filter)
        self._adjusts = self.marginal.alpha < 1.0

    def _to(self, device: torch.device) -> None:
        super()._to(device)
        if self.marginal.trie is not self.trie:
            self.marginal = self.marginal.to(self.trie)

    def adjust_choices(
        self, start_RX: torch.Tensor, end_RX: torch.Tensor, legal_RX: torch.Tensor, values_RX: torch.Tensor
    ) -> torch.Tensor:
        """The mixed scores; rows of one request are adjacent."""
        rows = start_RX.shape[0]
        requests = self.marginal.num_requests
        beams = rows_per_request(rows, requests)
        shape = (requests, beams, start_RX.shape[1])
        views = [tensor.reshape(shape) for tensor in (start_RX, end_RX, legal_RX, values_RX)]
        return self.marginal.mix(*views).reshape(rows, -1)
