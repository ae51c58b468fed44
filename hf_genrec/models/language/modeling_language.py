"""Language recommender: a causal language model writes the next item's text; an assistant may know the items as such.

A history is one text, "title, end, title, end ...", and every item but the first is learned at once. The language model
is any causal LM of transformers; what it may write is bounded by the trie of the catalogue's texts, so every answer is an
item (BIGRec's training, arXiv 2308.08434, without its grounding step). The optional assistant (SASRec over atomic items)
is trained beside it on the same windows and shares no weights; the search "prefix_marginal" mixes its item probabilities
into the words (D3, arXiv 2406.14900). With `facets` the same model also writes items by further texts (id, attributes:
TransRec, arXiv 2310.06491): the history is given in the facet's own texts behind a marker, and the search
"ngram_grounding" turns pieces of all facets into items.

Relations: `assistant=None, facets=[]` is the language model alone.

Shapes: B batch, T tokens, S items of a history, N items, L tokens of the longest item text, F facets, K beams, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.beam_cache import BeamCache
from hf_genrec.generation.decoding.causal_head import is_plain_linear
from hf_genrec.generation.decoding.causal_lm import CausalLMScorer
from hf_genrec.generation.fm_index import FMIndex
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.models.language_parts import ItemTextsMixin

from .configuration_language import LanguageRecommenderConfig

_IGNORED = -100


@dataclass
class LanguageState:
    """What decoding keeps of B histories: the read prompts, and the items they name (for the assistant)."""

    scorer: CausalLMScorer
    prompt: Any
    rows_BS: Tensor


class LanguageRecommenderForCausalLM(ItemTextsMixin, RecommendationMixin, PreTrainedModel, GenerationMixin):
    """Writes items. `language_model` is the causal LM itself and can be saved and served alone."""

    config_class = LanguageRecommenderConfig  # not an annotation: see the other models
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    item_tokens: Tensor
    facet_tokens: Tensor
    facet_markers: Tensor

    def __init__(self, config: LanguageRecommenderConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(
            config.language_config(), attn_implementation=config._attn_implementation
        )
        assistant = config.assistant_config()
        self.assistant = None if assistant is None else AutoModelForCausalLM.from_config(assistant)
        # the catalogue's texts, to find the items in a history; -1 behind the end of shorter ones
        self.register_buffer("item_tokens", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        facets = len(config.facets)
        self.register_buffer(
            "facet_tokens", torch.zeros(facets, config.num_items, config.facet_levels, dtype=torch.int32)
        )
        self.register_buffer("facet_markers", torch.zeros(facets, config.marker_levels, dtype=torch.int32))
        self._hashes: tuple[Tensor, Tensor] | None = None
        self._indexes: dict[str, FMIndex] = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            for table in (self.item_tokens, self.facet_tokens, self.facet_markers):
                init.constant_(table, -1)
            return
        for part in (self.language_model, self.assistant):
            if part is not None and any(module is one for one in part.modules()):
                part._init_weights(module)
                return

    def forget_catalogue(self) -> None:
        """Hashes and indexes are made anew when they are asked for."""
        self._hashes = None
        self._indexes.clear()

    def set_facets(self, tokens_FNL: Any, markers_FM: Any) -> None:
        """Store the further texts of the items and the markers that announce them, as token ids, -1 behind the end.

        Raises:
            IncompatibleComponentsError: when a shape differs from the configuration.
        """
        for name, values in (("facet_tokens", tokens_FNL), ("facet_markers", markers_FM)):
            table, given = getattr(self, name), torch.tensor(np.asarray(values))
            if given.shape != table.shape:
                raise IncompatibleComponentsError(
                    f"set_facets: {name} has shape {tuple(given.shape)}, the configuration says {tuple(table.shape)}."
                )
            table.copy_(given)
        self._indexes.clear()

    # -- items in a text --------------------------------------------------------------------------------------------

    def _item_hashes(self) -> tuple[Tensor, Tensor]:
        """Sorted hash of every item's tokens (N,) and the item of each (first one where several share a text)."""
        if self._hashes is None or self._hashes[0].device != self.item_tokens.device:
            tokens = self.item_tokens.long()
            factors = _hash_factors(tokens.shape[1], tokens.device)
            hashes = torch.where(tokens >= 0, (tokens + 1) * factors, 0).sum(-1)
            hashes, order = hashes.sort(stable=True)
            self._hashes = hashes, order
        return self._hashes

    def history_rows(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Catalogue rows (B, S) of the items of each text, oldest first, -1 = unknown text; right-padded with -1."""
        real = attention_mask.bool() & (input_ids != self.config.bos_token_id)
        ends = real & (input_ids == self.config.item_end_token_id)
        count = int(ends.sum(-1).max()) if ends.numel() else 0
        if count == 0:
            return torch.full((input_ids.shape[0], 0), -1, dtype=torch.long, device=input_ids.device)
        place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        boundary = torch.where(ends | ~real, place, -1).cummax(-1).values
        before = torch.nn.functional.pad(boundary, (1, 0), value=-1)[:, :-1]  # last boundary before each token
        offset = place - before - 1
        levels = self.item_tokens.shape[1]
        factors = _hash_factors(levels, input_ids.device)
        inside = real & (offset < levels)
        terms = torch.where(inside, (input_ids + 1) * factors[offset.clamp(max=levels - 1)], 0)
        # a text longer than any item gets a term no item has
        terms = torch.where(real & (offset >= levels), 1 - 2**62, terms)
        segment = (ends.long().cumsum(-1) - ends.long()).clamp(max=count - 1)
        complete = ends.flip(-1).long().cumsum(-1).flip(-1) > 0  # tokens of an unfinished text at the end do not count
        hashes = torch.zeros(input_ids.shape[0], count, dtype=torch.long, device=input_ids.device)
        hashes.scatter_add_(1, segment, torch.where(complete, terms, 0))
        known, order = self._item_hashes()
        found = torch.searchsorted(known, hashes).clamp(max=len(known) - 1)
        there = torch.arange(count, device=input_ids.device) < ends.sum(-1, keepdim=True)
        return torch.where(there & (known[found] == hashes), order[found], -1)

    def _assistant_inputs(self, rows_BS: Tensor) -> dict[str, Tensor]:
        offset = int(self.assistant.config.level_offsets[0])
        known = rows_BS >= 0
        return {
            "input_ids": torch.where(known, rows_BS + offset, self.assistant.config.pad_token_id),
            "attention_mask": known.long(),
        }

    # -- training ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Loss over the labelled tokens, or next-token logits.

        Args:
            input_ids: (B, T) tokens of item texts, padded on either side.
            labels: (B, T), -100 = no target; aligned with `input_ids`, a token is predicted from those before it.
            num_items_in_batch: label tokens of the whole optimiser step, for gradient accumulation (exact for the
                language model; the assistant's mean over items is weighted by the batch's share of them).

        Returns:
            `loss` with labels; `logits` (B, T, V) without.
        """
        ids, mask, positions = self._with_start(input_ids, attention_mask)
        if labels is None:
            output = self.language_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            return CausalLMOutput(logits=output.logits[:, 1:])
        # logits at column t of `ids` predict column t of `input_ids`, which stands one to the right in `ids`
        wanted = labels != _IGNORED
        if is_plain_linear(self.language_model):
            backbone = getattr(self.language_model, self.language_model.base_model_prefix)
            hidden = backbone(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            logits = self.language_model.get_output_embeddings()(hidden.last_hidden_state[:, :-1][wanted])
        else:
            output = self.language_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            logits = output.logits[:, :-1][wanted]
        loss = fixed_cross_entropy(logits.float(), labels[wanted], num_items_in_batch)
        share = 1.0 if num_items_in_batch is None else wanted.sum() / num_items_in_batch
        if self.assistant is not None:
            loss = loss + self.config.assistant_loss_weight * share * self._assistant_loss(input_ids, mask[:, 1:])
        if self.config.facets:
            rows = self.history_rows(input_ids, mask[:, 1:])
            for facet in range(len(self.config.facets)):
                loss = loss + share * self._facet_loss(facet, rows)
        return CausalLMOutput(loss=loss)

    def _facet_loss(self, facet: int, rows_BS: Tensor) -> Tensor:
        """Mean loss per token of all items but each row's first, written in a facet's texts."""
        ids, item_place = self._facet_text(facet, rows_BS)
        if ids.shape[1] == 0 or not bool((item_place > 0).any()):
            return self.get_output_embeddings().weight.sum() * 0.0
        full, mask, positions = self._with_start(ids.clamp(min=0), (ids >= 0).long())
        wanted = item_place > 0
        output = self.language_model(input_ids=full, attention_mask=mask, position_ids=positions, use_cache=False)
        logits = output.logits[:, :-1][wanted]
        return fixed_cross_entropy(logits.float(), ids[wanted])

    def _facet_text(self, facet: int, rows_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Left-padded token ids (B, T) of marker and items, -1 = padding, and the place of the item each token belongs
        to (-1 marker or padding, 0 the first item).
        """
        batch = rows_BS.shape[0]
        known = (rows_BS >= 0).unsqueeze(-1)
        tokens = torch.where(known, self.facet_tokens[facet].long()[rows_BS.clamp(min=0)], -1)
        marker = self.facet_markers[facet].long().expand(batch, -1)
        place = ((rows_BS >= 0).long().cumsum(-1) - 1).unsqueeze(-1).expand_as(tokens)
        ids = torch.cat([marker, tokens.flatten(1)], dim=1)
        place = torch.cat([torch.full_like(marker, -1), place.flatten(1)], dim=1)
        order = (ids >= 0).to(torch.uint8).sort(dim=-1, stable=True).indices  # padding to the left
        ids, place = ids.gather(1, order), place.gather(1, order)
        used = int((ids >= 0).sum(-1).max()) if batch else 0
        ids, place = ids[:, ids.shape[1] - used :], place[:, place.shape[1] - used :]
        return ids, torch.where(ids >= 0, place, -1)

    def _assistant_loss(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = self._assistant_inputs(self.history_rows(input_ids, attention_mask))
        mask = inputs["attention_mask"].bool()
        labels = inputs["input_ids"].masked_fill(~mask | (mask.cumsum(-1) <= 1), _IGNORED)
        return self.assistant(**inputs, labels=labels).loss

    def _with_start(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Put the start token before the text (an empty history is a text too): ids, mask, position ids (B, T + 1)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        start = input_ids.new_full((input_ids.shape[0], 1), int(self.config.bos_token_id or 0))
        ids = torch.cat([start, input_ids], dim=1)
        mask = torch.cat([torch.ones_like(start), mask], dim=1)
        return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)

    # -- decoding ---------------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> LanguageState:
        """Read the histories (B, T) once."""
        ids, mask, _ = self._with_start(input_ids, attention_mask)
        scorer = CausalLMScorer(self.language_model, self.config.level_offsets, self.config.codebook_sizes)
        needed = self.assistant is not None or len(self.config.facets) > 0
        rows = self.history_rows(input_ids, mask[:, 1:]) if needed else input_ids[:, :0]
        return LanguageState(scorer, scorer.start_decoding(ids, mask), rows)

    def score_codes(self, state: LanguageState, prefix_BKl: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, V) of the next token of an item's text."""
        return state.scorer.score_codes(state.prompt, prefix_BKl, level)

    def start_beams(self, state: LanguageState) -> BeamCache:
        """Incremental scores: one new token per beam and level."""
        return state.scorer.start_beams(state.prompt)

    def score_dense(self, state: LanguageState) -> Tensor | None:
        """Log-probabilities (B, N) of all items by the assistant, None without one."""
        if self.assistant is None:
            return None
        inputs = self._assistant_inputs(state.rows_BS)
        if inputs["input_ids"].shape[1] == 0:
            empty = inputs["input_ids"].new_full((len(state.rows_BS), 1), self.assistant.config.pad_token_id)
            inputs = {"input_ids": empty, "attention_mask": torch.zeros_like(empty)}
        own = self.assistant.start_decoding(**inputs)
        first = inputs["input_ids"].new_zeros(len(state.rows_BS), 1, 0)
        return self.assistant.score_codes(own, first, 0)[:, 0]

    # -- facets: what the search "ngram_grounding" asks for ---------------------------------------------------------------

    def text_facets(self) -> list[str]:
        """Names of the texts an item can be written in; "name" is the one that names it."""
        return ["name", *self.config.facets]

    def start_facet(self, state: LanguageState, facet: str, max_tokens: int) -> tuple[CausalLMScorer, Any]:
        """A scorer of free text over the whole vocabulary, and the histories read in the facet's texts."""
        scorer = CausalLMScorer(self.language_model, [0] * max_tokens, [self.config.vocab_size] * max_tokens)
        if facet == "name":
            return scorer, state.prompt
        ids, _ = self._facet_text(list(self.config.facets).index(facet), state.rows_BS)
        full, mask, _ = self._with_start(ids.clamp(min=0), (ids >= 0).long())
        return scorer, scorer.start_decoding(full, mask)

    def facet_index(self, facet: str) -> FMIndex:
        """Substring index over the items' texts in a facet (document i = item i, end tokens left out), built once."""
        if facet not in self._indexes:
            table = self.item_tokens if facet == "name" else self.facet_tokens[list(self.config.facets).index(facet)]
            end = self.config.item_end_token_id
            rows = [[token for token in row if token >= 0 and token != end] for row in table.tolist()]
            self._indexes[facet] = FMIndex.from_sequences(rows)
        return self._indexes[facet].to(self.item_tokens.device)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any):
        """`generate` reads the whole text at every step; `recommend` is the fast way."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _hash_factors(levels: int, device: torch.device) -> Tensor:
    """Fixed odd 62-bit numbers, one per place of a text: the hash of a text is a sum of token times factor."""
    generator = torch.Generator().manual_seed(20240614)
    return (torch.randint(2**61, (levels,), generator=generator) * 2 + 1).to(device)
