"""SASRec: a causal Transformer over item tokens with full softmax cross-entropy (arXiv 1808.09781, 2309.07602).

Every position of a history is trained to predict the next item among *all* items (no sampled negatives). An item is one
token (L = 1), so beam search, exact scoring and a top-k over one softmax are the same thing.

*Relations*: `learn_repeat_weight` at weight 0 (its start) is plain SASRec; `norm_first=True,
hidden_act="relu", intermediate_size=hidden_size` is the block of the paper (post-LN trained better here).

Shapes: B users, T positions, Q query positions, P positions with a target, N items, V vocabulary, M hidden size,
H heads, D width of a head, K beams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.models.dropout import PooledDropout
from hf_genrec.models.item_timeline import newest_items

from .configuration_sasrec import SASRecConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain matrix products; query, key and value are (B, H, T, D)."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SASRecAttention(nn.Module):
    """Causal multi-head self-attention with one projection for query, key and value."""

    def __init__(self, config: SASRecConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_BQM: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_BQM.shape
        qkv = self.qkv_proj(hidden_BQM).view(batch, length, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(mixed.reshape(batch, length, -1)), weights


class SASRecLayer(GradientCheckpointingLayer):
    """Self-attention and feed-forward, each with residual, dropout and layer norm before (or after) it."""

    def __init__(self, config: SASRecConfig, layer_idx: int):
        super().__init__()
        self.norm_first = config.norm_first
        self.self_attn = SASRecAttention(config, layer_idx)
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.ff_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = PooledDropout(config.dropout)

    def forward(
        self,
        hidden_BQM: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        x = hidden_BQM
        mixed, _ = self.self_attn(
            self.attn_norm(x) if self.norm_first else x, attention_mask, past_key_values=past_key_values, **kwargs
        )
        x = x + self.dropout(mixed)
        if not self.norm_first:
            x = self.attn_norm(x)
        changed = self.down_proj(self.act_fn(self.up_proj(self.ff_norm(x) if self.norm_first else x)))
        x = x + self.dropout(changed)
        return x if self.norm_first else self.ff_norm(x)


class SASRecPreTrainedModel(PreTrainedModel):
    """Weights, loading and capabilities shared by both SASRec classes."""

    config_class = SASRecConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SASRecLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SASRecLayer, "attentions": SASRecAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(
                module.weight, mean=0.0, std=std if self.config.embedding_std is None else self.config.embedding_std
            )
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SASRecForCausalLM) and module.repeat_weight is not None:
            init.zeros_(module.repeat_weight)


class SASRecModel(SASRecPreTrainedModel):
    """The Transformer without a head."""

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.position_embedding else None
        )
        self.dropout = PooledDropout(config.dropout)
        self.layers = nn.ModuleList([SASRecLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """States (B, T, M) of all positions.

        Args:
            input_ids: (B, T) item tokens, padded on either side.
            attention_mask: (B, T) or (B, past + T), 0 = padding; None = no padding.
            position_ids: (B, T); None = counted from the first real token, so both paddings give the same states.

        Raises:
            IncompatibleComponentsError: more items than `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        hidden = inputs_embeds
        if self.embed_positions is not None:
            if position_ids is None:
                past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
                position_ids = self._position_ids(inputs_embeds, attention_mask, past_length)
            hidden = hidden + self.embed_positions(position_ids)
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, causal_mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)

    def _position_ids(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int | torch.Tensor
    ) -> torch.LongTensor:
        length, limit = inputs_embeds.shape[1], self.config.max_position_embeddings
        if attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        else:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past_length
        # only a wide batch can hold too many items: the check costs nothing otherwise
        if past_length + length > limit and int(position_ids.max()) >= limit:
            raise IncompatibleComponentsError(
                f"a history of {int(position_ids.max()) + 1} items is longer than max_position_embeddings {limit}; "
                "cut it to the newest items (tokenizer.encode_histories(..., max_items=...)) or train with more."
            )
        return position_ids


@dataclass
class SASRecDecodingState:
    """Log-probabilities of the next item for B users, `logp_BN`, in order of item code."""

    logp_BN: torch.Tensor


class SASRecForCausalLM(RecommendationMixin, SASRecPreTrainedModel, GenerationMixin):
    """SASRec with a softmax over the items, tied to the item embeddings.

    Example:
        >>> import torch
        >>> model = SASRecForCausalLM(SASRecConfig(codebook_sizes=[10], hidden_size=8, num_attention_heads=1))
        >>> history = torch.tensor([[4, 5, 6]])
        >>> model(input_ids=history).logits.shape
        torch.Size([1, 3, 14])
        >>> model(input_ids=history, labels=torch.tensor([[-100, 5, 6]])).loss.shape
        torch.Size([])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.model = SASRecModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.repeat_weight = nn.Parameter(torch.zeros(())) if config.learn_repeat_weight else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        shift_labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Loss over all positions, or logits.

        Args:
            input_ids: (B, T) item tokens, padded on either side.
            attention_mask: (B, T), 0 = padding.
            labels: (B, T), `input_ids` with -100 at padding and at the first item; position t is trained on
                `labels[:, t + 1]` (the shift happens here).
            shift_labels: (B, T) labels that are shifted already; they replace `labels`.
            num_items_in_batch: number of targets of the whole optimisation step, divides the summed loss. None = mean.
            return_logits: also compute the (B, T, V) logits. None = only without labels: over a large catalogue they
                cost more than the training step itself, which scores none but the positions with a target.

        Returns:
            `CausalLMOutputWithPast` with `loss` and `logits` (B, T, V), where tokens that are no items have the
            smallest finite number of the dtype.

        Raises:
            IncompatibleComponentsError: a label that is no item token (checked on CPU tensors).
        """
        if labels is not None or shift_labels is not None:
            use_cache = False
        whole_window = labels is not None and shift_labels is None and input_ids is not None and not return_logits
        if whole_window and past_key_values is None and input_ids.shape[1] > 1:
            # the last item is only a target: a window of max_position_embeddings + 1 items trains every position
            input_ids, shift_labels = input_ids[:, :-1], labels[:, 1:]
            attention_mask = attention_mask[:, :-1] if attention_mask is not None else None
            position_ids = position_ids[:, :-1] if position_ids is not None else None
        cached = past_key_values is not None and bool(past_key_values.get_seq_length() > 0)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_BTM = outputs.last_hidden_state
        history_BT = None
        if self.repeat_weight is not None:
            history_BT = self._history_codes(input_ids, attention_mask, cached)

        loss = None
        if labels is not None or shift_labels is not None:
            if shift_labels is None:
                shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = self._loss(hidden_BTM, history_BT, shift_labels.to(hidden_BTM.device), num_items_in_batch)
        logits = None
        if return_logits or (return_logits is None and loss is None):
            positions = torch.arange(hidden_BTM.shape[1], device=hidden_BTM.device)
            positions = positions[slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
            logits = self._vocabulary_logits(hidden_BTM, history_BT, positions)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def _item_block(self) -> slice:
        first, size = self.config.level_offsets[0], self.config.codebook_sizes[0]
        return slice(first, first + size)

    def _loss(
        self,
        hidden_BTM: torch.Tensor,
        history_BT: torch.Tensor | None,
        targets_BT: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        rows_P, positions_P = (targets_BT != -100).nonzero(as_tuple=True)
        targets_P = targets_BT[rows_P, positions_P] - self._item_block.start
        num_items = self.config.codebook_sizes[0]
        if (
            targets_P.device.type == "cpu"
            and targets_P.numel()
            and not 0 <= int(targets_P.min()) <= int(targets_P.max()) < num_items
        ):
            bad = int(targets_P[(targets_P < 0) | (targets_P >= num_items)][0]) + self._item_block.start
            raise IncompatibleComponentsError(
                f"labels hold token {bad}, which is no item (items are {self._item_block.start} to "
                f"{self._item_block.stop - 1}); set labels of padding and other tokens to -100."
            )
        logits_PN = self._item_logits(hidden_BTM[rows_P, positions_P], history_BT, rows_P, positions_P).float()
        loss = nn.functional.cross_entropy(logits_PN, targets_P, reduction="sum")
        count = max(targets_P.numel(), 1) if num_items_in_batch is None else num_items_in_batch
        return loss / (count.to(loss.device) if torch.is_tensor(count) else count)

    def _item_logits(
        self,
        hidden_PM: torch.Tensor,
        history_BT: torch.Tensor | None,
        rows_P: torch.Tensor,
        positions_P: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (P, N) over the items for the states at (row, position) pairs."""
        logits_PN = nn.functional.linear(hidden_PM, self.lm_head.weight[self._item_block])
        if history_BT is not None:
            history_PT = history_BT[rows_P]
            seen_PT = (history_PT >= 0) & (
                torch.arange(history_PT.shape[1], device=history_PT.device) <= positions_P[:, None]
            )
            # in place is safe: the product above does not need its own result for the gradient
            logits_PN.scatter_add_(1, history_PT.clamp(min=0), (self.repeat_weight * seen_PT).to(logits_PN.dtype))
        return logits_PN

    def _history_codes(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, cached: bool = False
    ) -> torch.Tensor:
        """Item codes (B, T) of the history; -1 where there is no item or the item occurred before in the row."""
        if input_ids is None or cached or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            raise IncompatibleComponentsError(
                "a SASRec with learn_repeat_weight must see the whole history as input_ids: "
                "call it without inputs_embeds and without a cache (use_cache=False)."
            )
        codes_BT, length = input_ids - self._item_block.start, input_ids.shape[1]
        real_BT = (codes_BT >= 0) & (codes_BT < self.config.codebook_sizes[0])
        if attention_mask is not None:
            real_BT = real_BT & (attention_mask != 0)
        codes_BT = codes_BT.masked_fill(~real_BT, -1)
        earlier_TT = torch.ones(length, length, dtype=torch.bool, device=codes_BT.device).tril(-1)
        again_BT = ((codes_BT[:, :, None] == codes_BT[:, None, :]) & earlier_TT).any(-1)
        return codes_BT.masked_fill(again_BT, -1)

    def _vocabulary_logits(
        self, hidden_BTM: torch.Tensor, history_BT: torch.Tensor | None, positions_Q: torch.Tensor
    ) -> torch.Tensor:
        batch, kept = hidden_BTM.shape[0], len(positions_Q)
        rows_P = torch.arange(batch, device=hidden_BTM.device).repeat_interleave(kept)
        states_PM = hidden_BTM[:, positions_Q].reshape(batch * kept, -1)
        items = self._item_logits(states_PM, history_BT, rows_P, positions_Q.repeat(batch)).view(batch, kept, -1)
        first = self._item_block.start
        rest = self.lm_head.weight.shape[0] - first - items.shape[-1]
        return nn.functional.pad(items, (first, rest), value=torch.finfo(items.dtype).min)

    # Decoding interface of RecommendationMixin

    def start_decoding(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> SASRecDecodingState:
        """Read B histories and score every item once.

        Args:
            input_ids: (B, T) item tokens, padded on either side. Of a history longer than `max_position_embeddings`
                the newest items are read. A user without items gets the uniform distribution.
            attention_mask: (B, T), 0 = padding; None = no padding.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        batch, length = input_ids.shape
        seen = self._history_codes(input_ids, attention_mask) if self.repeat_weight is not None else None
        hidden_BM = self.lm_head.weight.new_zeros(batch, self.config.hidden_size)
        if length:
            limit = self.config.max_position_embeddings
            window, mask = newest_items(input_ids.unsqueeze(-1), attention_mask.bool(), limit)
            states = self.model(input_ids=window.squeeze(-1), attention_mask=mask, use_cache=False).last_hidden_state[
                :, -1
            ]
            hidden_BM = torch.where(mask[:, -1:], states, hidden_BM)
        rows = torch.arange(batch, device=input_ids.device)
        logits_BN = self._item_logits(hidden_BM, seen, rows, torch.full_like(rows, length))
        return SASRecDecodingState(logits_BN.float().log_softmax(-1))

    def score_codes(self, state: SASRecDecodingState, prefix_BKl: torch.LongTensor, level: int) -> torch.Tensor:
        """Log-probabilities (B, K, N) of all items; the only level is 0, so every beam of a user gets the same row."""
        if level != 0 or prefix_BKl.shape[2] != 0:
            raise IncompatibleComponentsError(f"score_codes: SASRec has one code per item (level 0), got level {level}")
        return state.logp_BN[:, None].expand(-1, prefix_BKl.shape[1], -1)
