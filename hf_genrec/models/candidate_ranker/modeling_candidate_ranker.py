"""Candidate ranker: a language model re-ranks what a retriever found, reading titles and, where given, soft tokens.

The retriever scores the catalogue; its best m items are written into a prompt as text, and the language model's answer
becomes one score each: by the logits of their letters (LlamaRec, arXiv 2311.02089), by yes or no about every one of them
(TALLRec, 2305.00447), by the likelihood of their titles (LLaRA, 2312.02445), or by the order in which a model that was never
trained for it writes them down (LLMRank, 2305.08845). Behind a title may stand a soft token, the
projected vector of the item (CoLLM 2310.19488, LLaRA, A-LLMRec 2404.11343), and in the prompt one for the user. An item
outside the m candidates keeps the retriever's order behind them, so a target that the retriever misses stays missed.

Relations: a language model that scores all candidates alike leaves the retriever's ranking as it is; no slots, or a prompt
written as text only, is the ranker without soft tokens.

Shapes: B or M users, N items, C candidates of a list, m candidates of the retriever, K items of a search, T tokens,
S slots of a row, X slots of a batch, D and U widths of item and user vectors, H width of the language model, L code levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import CausalLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.ranking.prompts import written_title
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.search import evaluating
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.catalogue import catalogue_values
from hf_genrec.models.item_scores import ItemCodesMixin
from hf_genrec.models.item_timeline import newest_items, whole_items
from hf_genrec.models.language_parts import LanguageEmbeddingsMixin

from .configuration_candidate_ranker import CandidateRankerConfig
from .injection import EmbeddingInjector, embed_text
from .prompts import PromptWriter, item_token_table, prompt_values
from .ranking import CandidateScoresMixin
from .reading import LanguageReader

_IGNORED = -100


@dataclass
class RankerState:
    """What decoding keeps of B users: the retriever's log-probabilities, the items of each history, user vectors."""

    logp_BN: Tensor
    histories: list[np.ndarray]
    user_BU: Tensor | None


class CandidateRankerForCausalLM(
    CandidateScoresMixin, ItemCodesMixin, LanguageEmbeddingsMixin, RecommendationMixin, PreTrainedModel
):
    """The ranker. `language_model` and `retriever` are whole models and can be saved and served alone."""

    config_class = CandidateRankerConfig  # not an annotation: see the other models
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    item_tokens: Tensor
    item_codes: Tensor
    item_vectors: Tensor

    def __init__(self, config: CandidateRankerConfig) -> None:
        super().__init__(config)
        from hf_genrec.models.auto import AutoModelForRecommendation  # it imports every model, this one too

        self.language_model = AutoModelForCausalLM.from_config(
            config.language_config(), attn_implementation=config._attn_implementation
        )
        self.retriever = AutoModelForRecommendation.from_config(config.retriever_config())
        self._build_injectors()
        # texts, codes and vectors of the catalogue travel with the weights
        self.register_buffer("item_tokens", torch.zeros(config.num_items, config.item_length, dtype=torch.int32))
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        vectors = config.num_items if config.soft_items else 0
        self.register_buffer("item_vectors", torch.zeros(vectors, config.item_vector_size))
        self.text_only = False  # rank without soft tokens (not saved: training sets it for stages without them)
        self._vocab_size = config.item_placeholder_id
        self._trie: ItemTrie | None = None
        self._writer: PromptWriter | None = None
        width = max(RecommendationConfig().num_beams, config.num_candidates)
        self.recommendation_config = RecommendationConfig(decoding="dense", num_beams=width, batch_size=16)
        self.post_init()

    def _build_injectors(self) -> None:
        config = self.config
        width = self.language_model.get_input_embeddings().weight.shape[1]
        options: dict[str, Any] = {
            "projector": config.projector or "linear",
            "projector_size": config.projector_size,
            "projector_norm": config.projector_norm,
            "tokens_per_vector": config.tokens_per_item,
        }
        self.item_injector = self.user_injector = None
        if config.soft_items:
            self.item_injector = EmbeddingInjector(
                config.item_vector_size,
                width,
                config.item_placeholder_id,
                projector_act=config.projector_act,
                **options,
            )
        if "user" in config.slots:
            self.user_injector = EmbeddingInjector(
                config.user_vector_size,
                width,
                config.user_placeholder_id,
                projector_act=config.user_projector_act,
                **options,
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.constant_(self.item_tokens, -1)
            init.zeros_(self.item_codes)
            init.zeros_(self.item_vectors)
            return
        for part in (self.language_model, self.retriever):
            if any(module is one for one in part.modules()):
                part._init_weights(module)
                return
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    # -- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_language_model(
        cls,
        language_model: Any,
        tokenizer: Any = None,
        *,
        item_tokenizer: Any,
        item_texts: Sequence[str],
        retriever: Any,
        verbalizer: str = "letters",
        num_candidates: int = 20,
        max_title_tokens: int = 32,
        wording: str | None = None,
        answers: Sequence[str] | None = None,
        neutral: str = "",
        slots: Sequence[str] = (),
        item_vectors: Any = None,
        **config_fields: Any,
    ) -> CandidateRankerForCausalLM:
        """A ranker of a trained language model and a trained retriever, which become its parts (they are not copied).

        Args:
            language_model: a causal language model, or its folder.
            tokenizer: its text tokenizer; None = the one of the folder.
            item_tokenizer: the retriever's `ItemTokenizer`; histories of `recommend` go through it.
            item_texts: N titles, in the order of the catalogue.
            retriever: a recommender of this library over the same catalogue.
            verbalizer, num_candidates, slots: as in the configuration.
            max_title_tokens: tokens of an item's text that are shown.
            wording, answers, neutral: as in `prompt_values`.
            item_vectors: (N, D) for the items' soft tokens; None = the retriever's item table.
            config_fields: more fields of `CandidateRankerConfig` (`projector`, `max_history` ...).

        Raises:
            IncompatibleComponentsError: parts that do not fit (named).
            ItemTableError: an item without text (row named).
        """
        if not isinstance(language_model, nn.Module):
            tokenizer = AutoTokenizer.from_pretrained(language_model) if tokenizer is None else tokenizer
            language_model = AutoModelForCausalLM.from_pretrained(language_model)
        if tokenizer is None:
            raise IncompatibleComponentsError("from_language_model: pass the tokenizer of the language model, too.")
        if len(item_texts) != item_tokenizer.num_items:
            raise IncompatibleComponentsError(
                f"{len(item_texts)} item_texts for a catalogue of {item_tokenizer.num_items} items: give one per item, in "
                "the order of item_tokenizer.item_ids."
            )
        if verbalizer == "list":  # a title is one line of the answer
            item_texts = [written_title(str(text)) for text in item_texts]
        table = item_token_table(tokenizer, item_texts, max_title_tokens)
        codes = np.asarray(item_tokenizer.codes)
        values = prompt_values(
            tokenizer, verbalizer, num_candidates, wording=wording, answers=answers, neutral=neutral, slots=slots
        )
        if "history" in slots or "candidates" in slots:
            if item_vectors is None:
                item_vectors = retriever_item_vectors(retriever, codes)
            item_vectors = torch.as_tensor(np.asarray(item_vectors), dtype=torch.float32)
            values["item_vector_size"] = item_vectors.shape[1]
        if "user" in slots:
            values["user_vector_size"] = retriever_user_width(retriever)
        if slots:
            values["projector"] = "mlp"
        config = CandidateRankerConfig(
            language_model=_config_values(language_model),
            retriever=_config_values(retriever),
            num_items=len(table),
            item_length=table.shape[1],
            **(catalogue_values(item_tokenizer) | values | config_fields),
        )
        with torch.device("meta"):  # the parts that follow replace these
            model = cls(config)
        model.language_model, model.retriever = language_model, retriever
        for name in ("item_injector", "user_injector"):
            part = getattr(model, name)
            if part is not None:
                part.to_empty(device=language_model.device)
                part.apply(model._init_weights)
        for name in ("item_tokens", "item_codes", "item_vectors"):
            setattr(model, name, torch.zeros_like(getattr(model, name), device=language_model.device))
        model.retriever.to(language_model.device)
        model.set_item_texts(table)
        model.set_catalogue(codes)
        if item_vectors is not None and config.soft_items:
            model.set_item_vectors(item_vectors)
        return model

    def set_item_texts(self, item_tokens: Any) -> None:
        """Store the token ids (N, L) of the items' texts, -1 behind the end.

        Raises:
            IncompatibleComponentsError: another shape than the configuration says.
        """
        self._copy("item_tokens", item_tokens)

    def set_item_vectors(self, item_vectors: Any) -> None:
        """Store what the items' soft tokens are made of, (N, D).

        Raises:
            IncompatibleComponentsError: another shape than the configuration says.
        """
        self._copy("item_vectors", item_vectors)

    def _copy(self, name: str, values: Any) -> None:
        table, given = getattr(self, name), torch.as_tensor(np.asarray(values))
        if given.shape != table.shape:
            raise IncompatibleComponentsError(
                f"set_{name.replace('item_tokens', 'item_texts')}: shape {tuple(given.shape)}, the configuration says "
                f"{tuple(table.shape)}."
            )
        table.copy_(given)
        self._writer = None

    @property
    def writer(self) -> PromptWriter:
        """Writes prompts of item indices in this model's words."""
        if self._writer is None or self._writer.config is not self.config:
            self._writer = PromptWriter(self.config, self.item_tokens.cpu().numpy())
        return self._writer

    # -- training ---------------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, slot_items: Tensor | None = None, user_BU: Tensor | None = None) -> Tensor:
        """Input embeddings (B, T, H) with soft tokens.

        Args:
            input_ids: (B, T) text tokens and placeholders.
            slot_items: (B, S) items of each row's slots in order, filled up with -1.
            user_BU: a vector per row that has a user slot.
        """
        embeds = embed_text(self.get_input_embeddings(), input_ids, self._vocab_size)
        if self.item_injector is not None:
            items_X = slot_items[slot_items >= 0] if slot_items is not None else None
            vectors = self.item_vectors[items_X] if items_X is not None and len(items_X) else None
            embeds = self.item_injector(input_ids, embeds, vectors)
        if self.user_injector is not None:
            has_user = (input_ids == self.user_injector.placeholder_token_id).any(1)
            vectors = user_BU[has_user] if user_BU is not None and bool(has_user.any()) else None
            embeds = self.user_injector(input_ids, embeds, vectors)
        return embeds

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        slot_items: Tensor | None = None,
        retriever_input_ids: Tensor | None = None,
        retriever_attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        answer_loss: str | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Loss over the labelled tokens, or next-token logits.

        Args:
            input_ids: (B, T) prompts with their answers, padded on either side.
            labels: (B, T) aligned with `input_ids`, -100 = no target.
            slot_items: as in `embed`.
            retriever_input_ids, retriever_attention_mask: histories as item tokens, for user slots.
            num_items_in_batch: labels of the whole optimiser step, divides the summed loss.
            answer_loss: in place of the configuration's.

        Returns:
            `loss` with labels; `logits` (B, T, V) without.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        user_BU = None
        if self.user_injector is not None and retriever_input_ids is not None:
            user_BU = self.user_vectors(retriever_input_ids, retriever_attention_mask)
        embeds = self.embed(input_ids, slot_items, user_BU)
        reader = LanguageReader(self.language_model)
        output, _ = reader.outputs(embeds, mask)
        if labels is None:
            return CausalLMOutput(logits=reader.logits(output.flatten(0, 1)).unflatten(0, output.shape[:2]))
        following = F.pad(labels[:, 1:], (0, 1), value=_IGNORED)
        wanted = following != _IGNORED
        answers_R = following[wanted]
        if (answer_loss or self.config.answer_loss) == "yes_bce":
            yes = self._answers()[:1]
            logits_R = reader.logits(output[wanted], yes).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(logits_R, (answers_R == yes).float(), reduction="sum")
            count: Any = max(len(answers_R), 1) if num_items_in_batch is None else num_items_in_batch
            return CausalLMOutput(loss=loss / (count.to(loss.device) if torch.is_tensor(count) else count))
        return CausalLMOutput(loss=fixed_cross_entropy(reader.logits(output[wanted]), answers_R, num_items_in_batch))

    @torch.no_grad()
    def user_vectors(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The retriever's state (B, U) behind each history, 0 for a user without items. No gradient.

        Raises:
            IncompatibleComponentsError: a retriever without such states.
        """
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        width = retriever_user_width(self.retriever)
        users = torch.zeros(len(input_ids), width, device=input_ids.device)
        if not mask_BT.shape[1]:
            return users
        limit = getattr(self.retriever.config, "max_position_embeddings", mask_BT.shape[1])
        ids_BTL, mask_BT = newest_items(ids_BTL, mask_BT, limit)
        with evaluating(self.retriever):
            output = self.retriever.base_model(
                input_ids=ids_BTL.flatten(1), attention_mask=mask_BT.repeat_interleave(ids_BTL.shape[2], 1).long()
            )
        states = getattr(output, "last_hidden_state", None)
        if states is None or states.shape[-1] != width:
            raise IncompatibleComponentsError(
                f"{type(self.retriever).__name__} gives no state per position, which the slot 'user' is made of; use "
                "SASRec as the retriever, or leave the slot out."
            )
        return torch.where(mask_BT[:, -1:], states[:, -1].to(users), users)

    # -- retrieving -------------------------------------------------------------------------------------------------

    def _catalogue_trie(self) -> ItemTrie:
        if self._trie is None or self._trie.device != self.item_codes.device:
            trie = ItemTrie.from_codes(self.item_codes.cpu(), list(self.config.codebook_sizes))
            self._trie = trie.to(self.item_codes.device)
        return self._trie

    def history_items(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[np.ndarray]:
        """Item indices that each row of item tokens names, oldest first (of items that share a code the first)."""
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        offsets = torch.tensor(self.config.level_offsets, device=ids_BTL.device)
        rows, codes = [], ids_BTL - offsets
        for codes_TL, mask_T in zip(codes, mask_BT, strict=True):
            rows.append(self._rows(codes_TL[mask_T]).cpu().numpy() if bool(mask_T.any()) else np.zeros(0, np.int64))
        return rows

    def retriever_inputs(self, histories: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Item tokens and mask of histories of item indices, padded on the left."""
        tokens_NL = self._item_tokens()
        longest = max(1, max((len(row) for row in histories), default=1))
        device, levels = tokens_NL.device, tokens_NL.shape[1]
        ids = torch.full((len(histories), longest, levels), int(self.config.pad_token_id or 0), device=device)
        mask = torch.zeros(len(histories), longest, levels, dtype=torch.long, device=device)
        for place, row in enumerate(histories):
            if len(row):
                ids[place, -len(row) :] = tokens_NL[torch.as_tensor(np.asarray(row, np.int64), device=device)]
                mask[place, -len(row) :] = 1
        return ids.flatten(1), mask.flatten(1)

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> RankerState:
        """Score the catalogue by the retriever and read which items the histories (B, T) name."""
        retriever = self.retriever
        if type(retriever).score_dense is RecommendationMixin.score_dense:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            scores = retriever.score_all(input_ids=input_ids, attention_mask=mask, trie=self._catalogue_trie())
        else:
            scores = retriever.score_dense(retriever.start_decoding(input_ids, attention_mask))
        users = None
        if self.user_injector is not None:
            users = self.user_vectors(input_ids, attention_mask)
        return RankerState(scores.float(), self.history_items(input_ids, attention_mask), users)

    def score_dense(self, state: RankerState) -> Tensor:
        """The retriever's scores (B, N); `rescore_items` puts the language model's order on the best of them."""
        return state.logp_BN

    def rescore_items(
        self, state: RankerState, items_BK: Tensor, scores_BK: Tensor, config: RecommendationConfig
    ) -> Tensor:
        """Scores (B, K): those of the language model for the first m items, the retriever's shifted below them for the
        rest, so that the rest keeps its order.

        Raises:
            RequestError: a prompt that shows liked and disliked items apart.
        """
        self._check_disliked(None)
        shown_BC = items_BK[:, : self.config.num_candidates]
        ranked_BC = self._score(state.histories, shown_BC.cpu().numpy(), state.user_BU, text_only=self.text_only).to(
            scores_BK.device
        )
        rest_BR = scores_BK[:, shown_BC.shape[1] :]
        if not rest_BR.shape[1]:
            return ranked_BC
        lowest_B1 = ranked_BC.masked_fill(shown_BC < 0, torch.inf).amin(1, keepdim=True)
        shifted_BR = torch.where(rest_BR > -torch.inf, lowest_B1 + (rest_BR - rest_BR[:, :1]), -torch.inf)
        return torch.cat([ranked_BC, shifted_BR], dim=1)

    def recommend(self, histories: Any, *, num_beams: int | None = None, **options: Any) -> Any:
        """As `RecommendationMixin.recommend`; at least m items are retrieved, whatever `num_beams`."""
        return super().recommend(histories, num_beams=self._width(num_beams), **options)

    def recommend_indices(self, *args: Any, num_beams: int | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """As `RecommendationMixin.recommend_indices`; at least m items are retrieved, whatever `num_beams`."""
        return super().recommend_indices(*args, num_beams=self._width(num_beams), **options)

    def _width(self, num_beams: int | None) -> int:
        asked = self.recommendation_config.num_beams if num_beams is None else num_beams
        return max(self.config.num_candidates, asked) if asked >= 1 else asked


def retriever_user_width(retriever: Any) -> int:
    """U, the width of the states that a user's soft token is made of.

    Raises:
        IncompatibleComponentsError: a retriever that does not read a history from left to right in one backbone.
    """
    config = retriever.config
    if config.is_encoder_decoder or retriever.base_model is retriever or not getattr(config, "hidden_size", 0):
        raise IncompatibleComponentsError(
            f"{type(retriever).__name__} has no state per item of a history, which user vectors are made of; use a "
            "decoder-only retriever whose base_model gives last_hidden_state, such as SASRec or RQ-Transformer, or leave the "
            "slot 'user' out."
        )
    return int(config.hidden_size)


def retriever_item_vectors(retriever: Any, item_codes: Any) -> np.ndarray:
    """The retriever's input vectors (N, D) of the items, float32.

    Raises:
        IncompatibleComponentsError: a retriever whose items are not one token each.
    """
    codes_NL = torch.as_tensor(np.asarray(item_codes, np.int64))
    table = retriever.get_input_embeddings()
    if codes_NL.shape[1] != 1 or table is None:
        raise IncompatibleComponentsError(
            f"{type(retriever).__name__} has no single vector per item; pass item_vectors=... of shape (N, D)."
        )
    rows_N = codes_NL[:, 0] + int(retriever.config.level_offsets[0])
    return table.weight.detach()[rows_N.to(table.weight.device)].float().cpu().numpy()


def _config_values(model: Any) -> dict[str, Any]:
    """A part's configuration as plain values, without what belongs to the folder it came from."""
    left_out = ("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype")
    return {name: value for name, value in model.config.to_dict().items() if name not in left_out}
