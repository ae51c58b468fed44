"""Grounded language recommender: it writes a title freely, and the nearest item to what it wrote is recommended (BIGRec,
arXiv 2308.08434).

Step 1, from language to the space of recommendations: a causal language model learns to write the title that comes next.
Step 2, to actual items: the same model embeds what it wrote (last layer, last token), and all items are ranked by the L2
distance of their titles' embeddings, made once and kept with the weights. A prior, popularity or the scores of an assistant
that knows items and no words, may pull items forward: `minmax(distance) * (1 + minmax(prior)) ** -gamma`. What is written
need not exist; what is recommended always does. Decoding "dense" ranks the catalogue so; decoding "beam" writes nothing but
catalogue titles with the same weights (D3's search, arXiv 2406.14900, without its assistant).

The item vectors belong to the weights: they are made anew when the weights have changed (training, merged adapters) before
they are used or saved.

Relations: `gamma=0` is the distance alone. `generation.grounding.EmbeddingGrounder` is step 2 for texts and any encoder.

Shapes: B users, T tokens, S items of a history, N items, L tokens of the longest item text, H hidden size, V vocabulary, M
validation rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers import initialization as init
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from hf_genrec.errors import RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding.beam_cache import BeamCache
from hf_genrec.generation.decoding.causal_head import is_plain_linear
from hf_genrec.generation.decoding.causal_lm import CausalLMScorer
from hf_genrec.generation.grounding import GAMMA_GRID, GammaChoice
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.search import evaluating
from hf_genrec.identifiers.segments import encode_segments
from hf_genrec.models.language_parts import ItemTextsMixin
from hf_genrec.models.lora import AdaptedLanguageModel, language_model_values

from .configuration_grounded import LORA, GroundedLanguageConfig
from .item_vectors import GroundedItems

_IGNORED = -100


class GroundedState:
    """What decoding keeps of B histories. Both ways on from here start when they are asked for: free text (`vectors_BH`)
    and the catalogue's titles (`prompt`).
    """

    def __init__(self, model: GroundedLanguageRecommender, ids_BT: Tensor, mask_BT: Tensor, rows_BS: Tensor):
        self.model, self.ids_BT, self.mask_BT, self.rows_BS = model, ids_BT, mask_BT, rows_BS
        config = model.config
        self.scorer = CausalLMScorer(model.language_model, config.level_offsets, config.codebook_sizes)

    @cached_property
    def prompt(self) -> Any:
        return self.scorer.start_decoding(self.ids_BT, self.mask_BT)

    @cached_property
    def vectors_BH(self) -> Tensor:
        return self.model.embed_texts(self.model.write_texts(self.ids_BT, self.mask_BT))


class GroundedLanguageRecommender(
    GroundedItems, AdaptedLanguageModel, ItemTextsMixin, RecommendationMixin, PreTrainedModel
):
    """Writes a title and ranks all items by their distance to it. `language_model` is the causal LM itself."""

    config_class = GroundedLanguageConfig  # not an annotation: see the other models
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    default_lora = LORA
    item_tokens: Tensor
    item_vectors: Tensor
    popularity: Tensor

    def __init__(self, config: GroundedLanguageConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(
            config.language_config(), attn_implementation=config._attn_implementation
        )
        assistant = config.assistant_config()
        self.assistant = None if assistant is None else AutoModelForCausalLM.from_config(assistant)
        hidden = self.language_model.config.get_text_config(decoder=True).hidden_size
        # the catalogue travels with the weights; texts are filled up with -1, vectors not made yet are NaN
        self.register_buffer("item_tokens", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self.register_buffer("item_vectors", torch.zeros(config.num_items, hidden))
        self.register_buffer("popularity", torch.zeros(config.num_items))
        self.forget_catalogue()
        self.build_adapters()
        self.recommendation_config = RecommendationConfig(decoding="dense")
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.constant_(self.item_tokens, -1)
            init.constant_(self.item_vectors, torch.nan)
            init.zeros_(self.popularity)

    @classmethod
    def from_language_model(
        cls,
        language_model: str | Path | PreTrainedModel,
        tokenizer: Any,
        *,
        prompt_before: str = "",
        prompt_after: str = "",
        lora: dict[str, Any] | bool = True,
        **options: Any,
    ) -> GroundedLanguageRecommender:
        """BIGRec around a pretrained language model, its catalogue set.

        Args:
            language_model: folder or Hub id, or a causal LM of transformers; its weights are copied. Tokens that the
                tokenizer added (the end of an item) begin as the language model's end token.
            tokenizer: an `ItemWordsTokenizer` made from the language model's own tokenizer. With adapters the rows of added
                tokens are frozen too: give `item_end_token=base_tokenizer.eos_token`, so that none is needed.
            prompt_before, prompt_after: your own texts around a history; a text behind it makes `prefix_training` true.
            lora: as in the configuration; True = the authors' adapters, False = none.
            options: other fields of `GroundedLanguageConfig`.
        """
        if not isinstance(language_model, PreTrainedModel):
            language_model = AutoModelForCausalLM.from_pretrained(language_model)
        prompts = {
            name: encode_segments(tokenizer, [("template", text)]) if text else []
            for name, text in (("prompt_before", prompt_before), ("prompt_after", prompt_after))
        }
        config = GroundedLanguageConfig.from_tokenizer(
            tokenizer,
            **{
                "language_model": language_model_values(language_model),
                "prefix_training": bool(prompt_after),
                **prompts,
                **options,
            },
        )
        model = cls(config)
        state, end = language_model.state_dict(), tokenizer.eos_token_id
        rows = language_model.get_input_embeddings().weight.shape[0]
        with torch.no_grad():
            for name, weight in model.language_model.state_dict().items():
                old = state[name].to(weight)
                if old.shape != weight.shape and len(old) == rows:  # a table with a row per token
                    more = old[end] if end is not None and end < rows else old.mean(0)
                    old = torch.cat([old[: len(weight)], more.expand(max(0, len(weight) - rows), *old.shape[1:])])
                weight.copy_(old)
        if lora is not False:
            model.add_lora({} if lora is True else lora)
        model.set_catalogue(tokenizer.codes)
        return model

    def prepare_training(self, train_counts_N: Any) -> list[TrainerCallback]:
        """Called by `train_recommender`: how often each item occurs, the prior "popularity"."""
        self.popularity.copy_(torch.from_numpy(np.array(train_counts_N, np.float32)))
        return []

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
            input_ids: (B, T) tokens of item texts, padded on either side; the prompt is put around them.
            labels: with `prefix_training` (B, L), the text of the one target of a history; else (B, T), aligned with
                `input_ids`, a token is predicted from those before it. -100 = no target.
            num_items_in_batch: label tokens of the whole optimiser step, for gradient accumulation (exact for the
                language model; the assistant's mean over items is weighted by the batch's share of them).

        Returns:
            `loss` with labels; `logits` (B, V) of the token that comes next without.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if labels is None:
            ids, mask, _ = self._prompted(input_ids, mask, None)
            return CausalLMOutput(logits=self._run(ids, mask).logits[:, -1])
        ids, full_mask, labels_BT = self._prompted(input_ids, mask, labels)
        # logits at column t predict column t + 1
        wanted, targets = labels_BT[:, 1:] != _IGNORED, labels_BT[:, 1:]
        if is_plain_linear(self.language_model):  # the head on the labelled places alone
            hidden = self._run(ids, full_mask, self.language_model.base_model).last_hidden_state
            logits = self.language_model.get_output_embeddings()(hidden[:, :-1][wanted])
        else:
            logits = self._run(ids, full_mask).logits[:, :-1][wanted]
        loss = fixed_cross_entropy(logits.float(), targets[wanted], num_items_in_batch)
        if self.assistant is not None:
            share = 1.0 if num_items_in_batch is None else wanted.sum() / num_items_in_batch
            loss = loss + self.config.assistant_loss_weight * share * self._assistant_loss(input_ids, mask, labels)
        return CausalLMOutput(loss=loss)

    def _prompted(self, input_ids: Tensor, mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[before | history | after (| target)], left-padded: ids, mask and labels, all (B, T'). Never empty."""
        begin = [] if self.config.bos_token_id is None else [self.config.bos_token_id]
        before = [*begin, *self.config.prompt_before] or [self.config.item_end_token_id]
        parts = [
            input_ids.new_tensor(tokens).expand(len(input_ids), -1) for tokens in (before, self.config.prompt_after)
        ]
        parts.insert(1, input_ids)
        masks = [torch.ones_like(parts[0]), mask, torch.ones_like(parts[2])]
        targets = [torch.full_like(part, _IGNORED) for part in parts]
        if labels is not None and self.config.prefix_training:
            parts.append(labels.clamp(min=0))
            masks.append((labels != _IGNORED).long())
            targets.append(labels)
        elif labels is not None:
            targets[1] = labels
        ids, full_mask, full_labels = (torch.cat(list(columns), dim=1) for columns in (parts, masks, targets))
        order = full_mask.sort(dim=-1, stable=True).indices
        return ids.gather(1, order), full_mask.gather(1, order), full_labels.gather(1, order)

    def _assistant_loss(self, input_ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        ids = input_ids
        if self.config.prefix_training:
            ids, mask = torch.cat([ids, labels.clamp(min=0)], 1), torch.cat([mask, (labels != _IGNORED).long()], 1)
        rows_BS = self.item_texts().rows(ids, mask)
        inputs = self._assistant_inputs(rows_BS)
        known = inputs["attention_mask"].bool()
        place = known.cumsum(-1)
        wanted = known & (place > 1)
        if self.config.prefix_training:  # the items of the history are the targets of other rows
            wanted &= place == known.sum(-1, keepdim=True)
        return self.assistant(**inputs, labels=inputs["input_ids"].masked_fill(~wanted, _IGNORED)).loss

    def _assistant_inputs(self, rows_BS: Tensor) -> dict[str, Tensor]:
        if rows_BS.shape[1] == 0:
            rows_BS = rows_BS.new_full((len(rows_BS), 1), -1)
        offset, known = int(self.assistant.config.level_offsets[0]), rows_BS >= 0
        return {
            "input_ids": torch.where(known, rows_BS + offset, self.assistant.config.pad_token_id),
            "attention_mask": known.long(),
        }

    # -- step 1: a text -----------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> GroundedState:
        """Put the prompt around histories (B, T)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        ids, full_mask, _ = self._prompted(input_ids, mask, None)
        rows = self.item_texts().rows(input_ids, mask) if self.assistant is not None else input_ids[:, :0]
        return GroundedState(self, ids, full_mask, rows)

    @torch.no_grad()
    def write_texts(self, ids_BT: Tensor, mask_BT: Tensor) -> list[tuple[int, ...]]:
        """The best text the language model writes behind each left-padded prompt, without its end token; never empty."""
        ends = [self.config.item_end_token_id]
        eos = self.config.eos_token_id
        ends += [
            token for token in (eos if isinstance(eos, list) else [eos]) if token is not None and token not in ends
        ]
        with evaluating(self.language_model):
            output = self.language_model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=self.config.max_new_tokens,
                min_new_tokens=1,
                num_beams=self.config.text_beams,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=self.config.pad_token_id if self.config.pad_token_id is not None else ends[0],
            )
        texts = []
        for row in output[:, ids_BT.shape[1] :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            texts.append(tuple(row[:stop]))
        return texts

    # -- step 2: the items near it ----------------------------------------------------------------------------------

    def _prior(self, rows_BS: Tensor) -> Tensor:
        if self.config.prior == "popularity":
            return self.popularity
        inputs = self._assistant_inputs(rows_BS)
        with evaluating(self.assistant):
            state = self.assistant.start_decoding(**inputs)
            return self.assistant.score_codes(state, inputs["input_ids"].new_zeros(len(rows_BS), 1, 0), 0)[:, 0]

    def score_dense(self, state: GroundedState) -> Tensor:
        """Scores (B, N) of all items: the negated distance to what was written, or its product with the prior."""
        grounder, gamma = self.grounder(), float(self.config.gamma)
        items_BN, scores_BN = grounder.ground(
            state.vectors_BH, grounder.num_items, gamma=gamma, prior=self._prior(state.rows_BS) if gamma > 0 else None
        )
        return torch.empty_like(scores_BN).scatter_(1, items_BN, scores_BN)

    def choose_gamma(
        self,
        tokenizer: Any,
        histories: Any,
        targets: Any,
        *,
        k: int = 10,
        metric: str = "ndcg",
        exclude_seen: bool | None = None,
        grid: Sequence[float] = GAMMA_GRID,
    ) -> GammaChoice:
        """Set `config.gamma` to the strength of the prior with the best validation metric (of several, the smallest).

        Args:
            tokenizer: of this model.
            histories: M rows of item indices (`EvaluationSet.histories`).
            targets: the item that came next, for each.
            k, metric: "ndcg" or "recall" at k.
            exclude_seen: default as `recommendation_config`.

        Raises:
            RequestError: no rows, or other numbers of histories and targets.
        """
        if not len(histories) or len(histories) != len(targets):
            raise RequestError(
                f"{len(targets)} targets for {len(histories)} histories; give one per history, at least one."
            )
        config = self.recommendation_config
        rows = [np.asarray(histories[row]) for row in range(len(histories))]
        vectors, priors = [], []
        for start in range(0, len(rows), config.batch_size):
            batch = tokenizer.encode_item_indices(
                rows[start : start + config.batch_size], max_items=config.max_history, return_tensors="pt"
            )
            state = self.start_decoding(*(batch[name].to(self.device) for name in ("input_ids", "attention_mask")))
            vectors.append(state.vectors_BH)
            if self.config.prior != "popularity":
                priors.append(self._prior(state.rows_BS))
        seen = config.exclude_seen if exclude_seen is None else exclude_seen
        choice = self.grounder().choose_gamma(
            torch.cat(vectors),
            np.asarray(targets),
            prior=torch.cat(priors) if priors else self.popularity,
            excluded=[np.unique(row) for row in rows] if seen else None,
            k=k,
            metric=metric,
            grid=grid,
        )
        self.config.gamma = choice.gamma
        return choice

    # -- the catalogue's titles instead of free text ---------------------------------------------------------------------

    def score_codes(self, state: GroundedState, prefix_BKl: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, V) of the next token of an item's text."""
        return state.scorer.score_codes(state.prompt, prefix_BKl, level)

    def start_beams(self, state: GroundedState) -> BeamCache:
        """Incremental scores: one new token per beam and level."""
        return state.scorer.start_beams(state.prompt)
