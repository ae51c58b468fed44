"""The item search inside `model.generate`: `generate(..., custom_generate=ItemGeneration(tokenizer))`.

transformers prepares the call (inputs, encoder, generation config) and hands the loop to this object, which runs the
same search as `recommend` and returns token sequences as `generate` does. Same sequences and scores as beam search with
`ItemTrieLogitsProcessor`, without repeating the prompt per beam.

Shape legend: B prompts, T prompt tokens, L levels, k sequences per prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateBeamEncoderDecoderOutput

from ..errors import IncompatibleComponentsError, RequestError
from .configuration_recommendation import RecommendationConfig
from .decoding.beam import trie_beam_search
from .item_filter import ItemFilter
from .logits_process import ItemTrieLogitsProcessor
from .requests import check_fingerprint, item_rows
from .scorers import scorer_for
from .search import evaluating
from .strategies import resolve_strategy
from .trie import ItemTrie

logger = logging.getLogger(__name__)
_KNOWN_PROCESSORS = (
    ItemTrieLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
)


class ItemGeneration:
    """A `custom_generate` callable: one catalogue item per returned sequence.

    `num_beams` and `num_return_sequences` of `generate` are the width of the search and k. With `do_sample=True` distinct
    items are drawn without replacement (`temperature` applies), seeded by torch's global generator.

    Args:
        tokenizer: an ItemTokenizer or an extended text tokenizer.
        allowed_items: the only items that may be generated: one list of ids for all prompts, or one per prompt.
        excluded_items: items that may not be generated: one list per prompt.
        renormalize: renormalise log-probabilities over the legal codes.

    Raises:
        RequestError: at the call: num_return_sequences above num_beams, a length penalty with codes of several lengths.
        IncompatibleComponentsError: at the call: a tokenizer of another catalogue than the model's, item lists for
            another number of prompts.

    Example:
        generate = ItemGeneration(tokenizer)
        model.generate(**inputs, custom_generate=generate, num_beams=50, num_return_sequences=10, max_new_tokens=4)
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        allowed_items: Sequence[Any] | None = None,
        excluded_items: Sequence[Sequence[Any]] | None = None,
        renormalize: bool = False,
    ):
        self.tokenizer = tokenizer
        self.renormalize = renormalize
        trie = ItemTrie.from_tokenizer(tokenizer)
        self._excluded = (
            None if excluded_items is None else item_rows(tokenizer, excluded_items, "excluded_items", trie)
        )
        self._allowed = None if allowed_items is None else item_rows(tokenizer, allowed_items, "allowed_items", trie)
        if self._allowed is not None and any(len(row) == 0 for row in self._allowed):
            raise RequestError("allowed_items is empty for a prompt, which leaves nothing to generate.")

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> torch.Tensor | GenerateBeamDecoderOnlyOutput | GenerateBeamEncoderDecoderOutput:
        """Called by `generate`. Returns sequences (B * k, T + L), or an output object with `sequences_scores`.

        Prompts with fewer legal items than k end in rows of padding (score -inf).
        """
        check_fingerprint(model, self.tokenizer)
        self._warn(logits_processor)
        # not named in the signature: generate would take them out of the model's own arguments
        attention_mask, encoder_outputs = model_kwargs.get("attention_mask"), model_kwargs.get("encoder_outputs")
        beams = generation_config.num_beams or 1
        k = generation_config.num_return_sequences or 1
        sampling = bool(generation_config.do_sample)
        if k > beams and not sampling:
            raise RequestError(f"num_return_sequences={k} needs num_beams >= {k}, got {beams}.")
        decoder = scorer_for(model, self.tokenizer)
        trie = ItemTrie.from_tokenizer(self.tokenizer, decoder.device)
        penalty = 1.0 if generation_config.length_penalty is None else float(generation_config.length_penalty)
        if trie.has_ends and penalty != 0.0:
            raise RequestError("codes of several lengths are ranked by log-probability: pass length_penalty=0.0.")
        # transformers has repeated each prompt for its beams already
        repeats = max(beams, k) if beams > 1 or k > 1 else 1
        prompts = input_ids[::repeats]
        mask = None if attention_mask is None else attention_mask[::repeats]
        batch = prompts.shape[0]
        item_filter = self._filter(trie, batch)
        with evaluating(model):
            if encoder_outputs is not None:
                hidden = encoder_outputs[0][::repeats]
                if not hasattr(decoder, "start_from_encoder"):
                    raise IncompatibleComponentsError(
                        f"{type(model).__name__} has no start_from_encoder, which generate needs; use model.recommend."
                    )
                state = decoder.start_from_encoder(hidden, mask)
            else:
                state = decoder.start_decoding(prompts, mask)
            leaves, scores = self._search(decoder, state, trie, item_filter, batch, max(beams, k), generation_config)
        return self._sequences(
            trie, prompts, leaves[:, :k], scores[:, :k], k, penalty, generation_config, encoder_outputs
        )

    def _search(
        self,
        decoder: Any,
        state: Any,
        trie: ItemTrie,
        item_filter: ItemFilter | None,
        batch: int,
        width: int,
        generation_config: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leaves (B, X), best first or in the order of the draw, and their scores."""
        if not generation_config.do_sample:
            return trie_beam_search(
                decoder, state, trie, width, item_filter, batch_size=batch, renormalize=self.renormalize
            )
        options = {"seed": int(torch.randint(2**31, ())), "temperature": generation_config.temperature or 1.0}
        shared = width * trie.max_items_per_leaf  # items of one leaf are drawn together and are one sequence here
        config = RecommendationConfig(k=shared, num_beams=shared, decoding="sample", decoding_options=options)
        items, scores = resolve_strategy(decoder, config)(decoder, state, trie, config, item_filter, batch_size=batch)
        leaves = torch.where(items >= 0, trie.item_leaf_N[items.clamp(min=0)], -1)
        if trie.max_items_per_leaf > 1:
            repeated = (leaves.unsqueeze(2) == leaves.unsqueeze(1)).tril(-1).any(-1)
            order = (repeated | (leaves < 0)).to(torch.uint8).sort(dim=-1, stable=True).indices
            kept = int((~repeated & (leaves >= 0)).sum(-1).max())
            leaves = leaves.masked_fill(repeated, -1).gather(1, order)[:, :kept]
            scores = scores.masked_fill(repeated, -torch.inf).gather(1, order)[:, :kept]
        return leaves, scores

    def _filter(self, trie: ItemTrie, batch: int) -> ItemFilter | None:
        lists = []
        for name, rows in (("excluded_items", self._excluded), ("allowed_items", self._allowed)):
            if rows is not None and len(rows) not in (1, batch):
                raise IncompatibleComponentsError(f"{name} holds {len(rows)} lists for {batch} prompts; pass one each.")
            lists.append(rows if rows is None or len(rows) == batch else rows * batch)
        item_filter = ItemFilter.from_rows(trie, *lists)
        if item_filter is not None and bool((item_filter.num_alive() == 0).any()):
            row = int((item_filter.num_alive() == 0).nonzero()[0])
            raise RequestError(f"row {row}: the item lists leave nothing to generate; widen them.")
        return item_filter

    def _sequences(
        self,
        trie: ItemTrie,
        prompts_BT: torch.Tensor,
        leaves_Bk: torch.Tensor,
        scores_Bk: torch.Tensor,
        k: int,
        penalty: float,
        generation_config: Any,
        encoder_outputs: Any,
    ) -> Any:
        missing = k - leaves_Bk.shape[1]
        if missing > 0:
            leaves_Bk = torch.nn.functional.pad(leaves_Bk, (0, missing), value=-1)
            scores_Bk = torch.nn.functional.pad(scores_Bk, (0, missing), value=-torch.inf)
        pad = generation_config.pad_token_id
        if pad is None:
            pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        items_Bk = trie.first_items(leaves_Bk)
        tokens_BkL = torch.as_tensor(self.tokenizer.item_token_table[items_Bk.clamp(min=0).cpu().numpy()])
        tokens_BkL = tokens_BkL.to(prompts_BT.device).masked_fill(items_Bk.unsqueeze(-1) < 0, -1)
        answers = torch.where(tokens_BkL >= 0, tokens_BkL, int(pad)).flatten(0, 1).to(prompts_BT.dtype)
        sequences = torch.cat([prompts_BT.repeat_interleave(k, 0), answers], dim=-1)
        if not generation_config.return_dict_in_generate:
            return sequences
        scores = scores_Bk.flatten() / trie.num_levels**penalty if penalty else scores_Bk.flatten()
        if encoder_outputs is not None:
            return GenerateBeamEncoderDecoderOutput(sequences=sequences, sequences_scores=scores)  # type: ignore[arg-type]
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)  # type: ignore[arg-type]

    def _warn(self, logits_processor: LogitsProcessorList | None) -> None:
        ignored = [type(p).__name__ for p in logits_processor or [] if not isinstance(p, _KNOWN_PROCESSORS)]
        if ignored:
            logger.warning("ItemGeneration scores items itself and ignores %s", ", ".join(ignored))
