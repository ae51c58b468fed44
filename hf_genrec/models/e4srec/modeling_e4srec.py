"""E4SRec: item vectors -> linear -> language model -> linear over the catalogue (arXiv 2312.02443).

An item is a frozen vector of a collaborative model (a SASRec's, say), which a linear map makes one input vector of a
language model: [instruction | items | response]. The last hidden state, through a linear head with one row per item (and
one for padding, as in the paper, which no target ever asks for), gives the scores of the whole catalogue at once. Items
have no text, nothing is spelled out, decoding "dense" ranks the catalogue in one forward pass whatever k is. With `lora`
the language model is frozen but for adapters.

An item more is a row more in both tables (`add_items`); the language model does not notice.

Relations: the language model replaced by a small causal Transformer trained from scratch, with `prefix_training=False`, is a
SASRec with frozen input vectors and an untied head.

Shapes: B users, T items of a window, I instruction tokens, R response tokens, L codes, N items, D width of item vectors, H
hidden size, P positions with a target, X new items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.segments import encode_segments
from hf_genrec.models.catalogue import catalogue_values
from hf_genrec.models.item_scores import ItemCodesMixin
from hf_genrec.models.item_timeline import newest_items, whole_items
from hf_genrec.models.lora import AdaptedLanguageModel, language_model_values

from .configuration_e4srec import E4SRecConfig


@dataclass
class E4SRecOutput(ModelOutput):
    """`loss` over the targets; or, without labels, `logits` (B, T + 1, N) of all items at all positions ((B, 1, N) with
    `prefix_training`).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class E4SRecState:
    """What `start_decoding` keeps per user: log-probabilities of all items, float32, in order of item index."""

    logp_BN: Tensor


class E4SRecForRecommendation(AdaptedLanguageModel, ItemCodesMixin, RecommendationMixin, PreTrainedModel):
    """The language model between its two maps.

    Example:
        >>> language = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        ...             "num_attention_heads": 2}
        >>> config = E4SRecConfig(language_model=language, num_items=3, codebook_sizes=[3], vocab_size=7, item_feature_dim=2)
        >>> model = E4SRecForRecommendation(config).eval()
        >>> model.set_catalogue([[0], [1], [2]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> model.score_dense(model.start_decoding(torch.tensor([[4, 6]]))).shape
        torch.Size([1, 3])
    """

    config_class = E4SRecConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    item_codes: Tensor
    item_vectors: Tensor

    def __init__(self, config: E4SRecConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(
            config.language_config(), attn_implementation=config._attn_implementation
        )
        hidden = self.language_model.config.get_text_config(decoder=True).hidden_size
        self.item_projection = nn.Linear(config.item_feature_dim, hidden)
        self.item_head = nn.Linear(hidden, config.num_items + 1, bias=False)  # row 0 is padding, item n is row n + 1
        # the catalogue travels with the weights
        self.register_buffer("item_vectors", torch.zeros(config.num_items, config.item_feature_dim))
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self._trie: ItemTrie | None = None
        self.build_adapters()
        self.recommendation_config = RecommendationConfig(decoding="dense")
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.item_projection or module is self.item_head:
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif module is self:
            init.zeros_(self.item_vectors)
            init.zeros_(self.item_codes)

    @classmethod
    def from_language_model(
        cls,
        language_model: str | Path | PreTrainedModel,
        item_tokenizer: Any,
        item_vectors: Any,
        *,
        text_tokenizer: Any = None,
        instruction: str = "",
        response: str = "",
        lora: dict[str, Any] | bool = True,
        **options: Any,
    ) -> E4SRecForRecommendation:
        """E4SRec around a pretrained language model, its catalogue set.

        Args:
            language_model: folder or Hub id, or a model of transformers (with or without its head); its weights are
                copied.
            item_tokenizer: an `ItemTokenizer`.
            item_vectors: (N, D), frozen.
            text_tokenizer: of the language model; needed for `instruction` and `response`, which are your own texts.
            lora: as in the configuration; True = the paper's adapters, False = none.
            options: other fields of `E4SRecConfig`; a response makes `prefix_training` true by itself.

        Raises:
            IncompatibleComponentsError: a text without a tokenizer.
        """
        if not isinstance(language_model, PreTrainedModel):
            language_model = AutoModel.from_pretrained(language_model)
        backbone = language_model.base_model
        if (instruction or response) and text_tokenizer is None:
            raise IncompatibleComponentsError(
                "an instruction needs the language model's tokenizer: text_tokenizer=...."
            )
        begin = [] if text_tokenizer is None or text_tokenizer.bos_token_id is None else [text_tokenizer.bos_token_id]
        tokens = {
            name: encode_segments(text_tokenizer, [("template", text)]) if text else []
            for name, text in (("instruction_tokens", instruction), ("response_tokens", response))
        }
        if tokens["instruction_tokens"] and tokens["instruction_tokens"][:1] != begin:
            tokens["instruction_tokens"] = [*begin, *tokens["instruction_tokens"]]
        vectors = torch.as_tensor(np.asarray(item_vectors), dtype=torch.float32)
        config = E4SRecConfig.from_tokenizer(
            item_tokenizer,
            **{
                "language_model": language_model_values(backbone),
                "item_feature_dim": vectors.shape[1],
                "prefix_training": bool(response),
                **tokens,
                **options,
            },
        )
        model = cls(config)
        model.language_model.load_state_dict(backbone.state_dict())
        if lora is not False:
            model.add_lora({} if lora is True else lora)
        model.set_catalogue(item_tokenizer.codes, vectors)
        return model

    # -- parts ------------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def set_catalogue(self, item_codes: Any, item_features: Any = None) -> None:
        """Store the codes (N, L) and the vectors (N, D) of the catalogue.

        Raises:
            IncompatibleComponentsError: no vectors, vectors that are not finite, or a shape that differs from the
                configuration.
        """
        if item_features is None:
            raise IncompatibleComponentsError("set_catalogue: E4SRec reads item vectors; pass item_features (N, D).")
        super().set_catalogue(item_codes)
        vectors = torch.as_tensor(np.asarray(item_features), dtype=torch.float32)
        if vectors.shape != self.item_vectors.shape or not bool(torch.isfinite(vectors).all()):
            raise IncompatibleComponentsError(
                f"set_catalogue: item_features must be finite and of shape {tuple(self.item_vectors.shape)}, got "
                f"{tuple(vectors.shape)}; build the configuration with item_feature_dim of the same vectors."
            )
        self.item_vectors.copy_(vectors)

    @torch.no_grad()
    def add_items(self, tokenizer: Any, vectors_XD: Any, head_XH: Any = None) -> None:
        """Take in items that are new at the end of a catalogue; nothing else changes.

        Args:
            tokenizer: of the whole new catalogue, the old items first.
            vectors_XD: of the new items.
            head_XH: their rows of the head; default what a linear fit from item vectors to head rows, made on the old
                items, gives (ridge, so that few items are enough).

        Raises:
            IncompatibleComponentsError: a tokenizer that does not begin with this catalogue, or vectors that do not fit.
        """
        old = self.config.num_items
        vectors = torch.as_tensor(np.asarray(vectors_XD), dtype=torch.float32, device=self.item_vectors.device)
        new = int(tokenizer.num_items) - old
        codes = torch.tensor(np.asarray(tokenizer.codes))
        if (
            new < 0
            or codes.shape[1] != self.config.num_levels
            or not torch.equal(codes[:old].int(), self.item_codes.cpu())
        ):
            raise IncompatibleComponentsError(
                f"add_items: the tokenizer's first {old} items are not this model's; extend its own catalogue."
            )
        if vectors.shape != (new, self.config.item_feature_dim) or not bool(torch.isfinite(vectors).all()):
            raise IncompatibleComponentsError(
                f"add_items: {new} new items need finite vectors of width {self.config.item_feature_dim}, got "
                f"{tuple(vectors.shape)}."
            )
        weight = self.item_head.weight
        if head_XH is None:
            known = F.pad(self.item_vectors, (0, 1), value=1.0).double()
            gram = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1], device=known.device).double()
            fit = torch.linalg.solve(gram, known.T @ weight[1:].double())
            rows = F.pad(vectors, (0, 1), value=1.0).double() @ fit
        else:
            rows = torch.as_tensor(head_XH)
        head = nn.Linear(weight.shape[1], old + new + 1, bias=False, device=weight.device, dtype=weight.dtype)
        head.weight.copy_(torch.cat([weight, rows.to(weight)]))
        head.weight.requires_grad_(weight.requires_grad)
        head._is_hf_initialized = True
        self.item_head = head
        self.item_vectors = torch.cat([self.item_vectors, vectors.to(self.item_vectors)])
        self.item_codes = codes.to(self.item_codes)
        self._trie = None
        for name, value in (catalogue_values(tokenizer) | {"num_items": old + new}).items():
            setattr(self.config, name, value)

    # -- the one forward pass -----------------------------------------------------------------------------------------

    def _states(self, ids_BTL: Tensor, mask_BT: Tensor) -> Tensor:
        """Hidden states of right-aligned items: (B, T + 1, H), position t has read the items before t; with
        `prefix_training` (B, 1, H), behind the response.
        """
        batch, length = mask_BT.shape
        rows_BT = ids_BTL.new_zeros(batch, length)
        offsets = torch.tensor(self.config.level_offsets, device=ids_BTL.device)
        if length:
            rows_BT[mask_BT] = self._rows(ids_BTL[mask_BT] - offsets)
        items = self.item_projection(self.item_vectors[rows_BT].to(self.item_projection.weight.dtype))
        embed = self.get_input_embeddings()
        before, behind = (
            embed(torch.tensor(tokens, dtype=torch.long, device=items.device)).to(items.dtype).expand(batch, -1, -1)
            for tokens in (self.config.instruction_tokens, self.config.response_tokens)
        )
        inputs = torch.cat([before, items, behind], dim=1)
        mask = F.pad(mask_BT, (before.shape[1], behind.shape[1]), value=True)
        # padding to the far left, before the instruction: the language model sees an ordinary left-padded row
        order = mask.to(torch.uint8).sort(dim=-1, stable=True).indices
        mask = mask.gather(1, order).long()
        states = self.language_model(
            inputs_embeds=inputs.gather(1, order.unsqueeze(-1).expand_as(inputs)),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return states[:, -1:] if self.config.prefix_training else states[:, before.shape[1] - 1 :]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> E4SRecOutput:
        """Loss, or logits of all items.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side by whole items.
            labels: with `prefix_training` (B, L), the codes of the one target of a history; else (B, T * L), aligned with
                `input_ids` (an item is predicted from those before it), -100 = no target.
            num_items_in_batch: label tokens of the whole optimiser step, for exact gradient accumulation; None = the
                mean over this batch.

        Raises:
            IncompatibleComponentsError: tokens that are not whole items, more items than the model reads, or labels that
                are no item's codes.
        """
        levels, limit = self.config.num_levels, self.config.max_position_embeddings
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, levels)
        windows = labels is not None and not self.config.prefix_training
        if int(mask_BT.sum(-1).max()) - int(windows) > limit:
            raise IncompatibleComponentsError(
                f"a history of {int(mask_BT.sum(-1).max())} items exceeds max_position_embeddings={limit}; encode with "
                "max_items or raise the limit."
            )
        if windows:
            both, mask_BT = newest_items(torch.cat([ids_BTL, labels.reshape(ids_BTL.shape)], -1), mask_BT, limit + 1)
            ids_BTL, labels_BTL = both[:, :-1, :levels], both[..., levels:]
            states = self._states(ids_BTL, mask_BT[:, :-1])  # the last item is only a target
            target_BT = labels_BTL[..., 0] != -100
            states_PH, labels_PL = states[target_BT], labels_BTL[target_BT]
        else:
            states = self._states(*newest_items(ids_BTL, mask_BT, limit))
            if labels is None:
                return E4SRecOutput(logits=self.item_head(states)[..., 1:].float())
            labels_BL = labels.reshape(len(states), levels)
            target_B = labels_BL[:, 0] != -100
            states_PH, labels_PL = states[target_B, 0], labels_BL[target_B]
        rows_P = self._rows(labels_PL - torch.tensor(self.config.level_offsets, device=labels.device))
        loss = F.cross_entropy(self.item_head(states_PH).float(), rows_P + 1, reduction="sum")
        count: Any = max(len(rows_P), 1) if num_items_in_batch is None else num_items_in_batch / levels
        return E4SRecOutput(loss=loss / (count.to(loss.device) if torch.is_tensor(count) else count))

    # -- recommendation -----------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> E4SRecState:
        """Read the histories and score all items, in one forward pass.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side; of longer histories the newest items are read.
            attention_mask: (B, T * L); None = no padding.
        """
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        states = self._states(*newest_items(ids_BTL, mask_BT, self.config.max_position_embeddings))
        return E4SRecState(self.item_head(states[:, -1])[:, 1:].float().log_softmax(-1))

    def score_dense(self, state: E4SRecState) -> Tensor:
        """Log-probabilities (B, N) of all items, the softmax of their logits (without the padding column)."""
        return state.logp_BN
