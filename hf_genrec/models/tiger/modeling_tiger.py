"""TIGER: generative retrieval of semantic IDs with a T5 encoder-decoder (arXiv 2305.05065).

The encoder reads the codes of a history, the decoder writes the L codes of the next item. transformers' T5 does the
work; this module adds what recommendation needs:

- one distribution per level: at decoder position l only the codes of level l have probability, so the loss, `generate`,
  `recommend` and `score_all` all speak of the same numbers;
- a loss that stays right under gradient accumulation (T5's own ignores `num_items_in_batch`);
- decoding for `RecommendationMixin` that encodes a user once and never copies anything per beam: beams are query
  positions of the cross-attention.

*Relations*: `restrict_to_level=False` is `T5ForConditionalGeneration`, bit for bit (in eval mode, or with
`pooled_dropout=False`).

Shapes: B users, K beams, L levels, l codes of a prefix, S encoder positions, Q decoder positions, V vocabulary,
C codes of one level, H heads, D width of a head, M width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, T5ForConditionalGeneration, T5Model
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.models.dropout import PooledDropout

from .configuration_tiger import TigerConfig


def _use_pooled_dropout(module: nn.Module) -> None:
    """Swap every `nn.Dropout` below `module` for a `PooledDropout` of the same rate."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout:
            setattr(module, name, PooledDropout(child.p))
        else:
            _use_pooled_dropout(child)


@dataclass
class TigerDecodingState:
    """What decoding needs of B encoded users.

    Attributes:
        keys, values: per decoder layer, cross-attention keys and values (B, H, S, D).
        mask: (B, 1, 1, S) additive mask of the encoder positions, or None when all are real.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor | None


class TigerModel(T5Model):
    """The encoder-decoder without a head: what `AutoModel` gives for a TIGER checkpoint."""

    config_class = TigerConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: TigerConfig):
        super().__init__(config)
        if config.pooled_dropout:
            _use_pooled_dropout(self)


class TigerForConditionalGeneration(RecommendationMixin, T5ForConditionalGeneration, GenerationMixin):
    """T5 with one distribution per code level, and the decoding interface of `RecommendationMixin`.

    Example:
        >>> import torch
        >>> config = TigerConfig(codebook_sizes=[8, 8], d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1)
        >>> model = TigerForConditionalGeneration(config)
        >>> history, target = torch.tensor([[4, 12, 5, 13]]), torch.tensor([[6, 14]])
        >>> model(input_ids=history, labels=target).logits.shape
        torch.Size([1, 2, 20])
    """

    config_class = TigerConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: TigerConfig):
        super().__init__(config)
        if config.pooled_dropout:
            _use_pooled_dropout(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.BoolTensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """As `T5ForConditionalGeneration.forward`, with per-level logits and a normalisable loss.

        Args:
            input_ids: (B, S) tokens of the history.
            attention_mask: (B, S), 0 = padding (on either side: T5's positions are relative).
            labels: (B, L) tokens of the target item, or (B, L + 1) with the end token; -100 is ignored.
            num_items_in_batch: number of labels of the whole optimisation step; the loss is the sum of the
                cross-entropies divided by it. None = mean over this batch.

        Returns:
            `Seq2SeqLMOutput` with `loss` (scalar) and `logits` (B, Q, V); a token that is impossible at its position
            has the smallest finite number of the dtype.

        Raises:
            IncompatibleComponentsError: a label that is not a code of its level (checked on CPU tensors).
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        # Read before the decoder lengthens the cache; adding 0 detaches from a static cache's live counter.
        past_length = past_key_values.get_seq_length() + 0 if past_key_values is not None else 0

        kwargs.pop("return_dict", None)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        if self.config.restrict_to_level:
            outputs.logits = self._restrict_to_level(outputs.logits, past_length)
        if labels is not None:
            labels = labels.to(outputs.logits.device)
            if self.config.restrict_to_level and labels.device.type == "cpu":
                self._check_labels(labels)
            outputs.loss = fixed_cross_entropy(
                outputs.logits.reshape(-1, outputs.logits.shape[-1]), labels.reshape(-1), num_items_in_batch
            )
        return outputs

    def _allowed_tokens(self, device: torch.device, vocab_size: int) -> torch.Tensor:
        """(L + 1, V) boolean: the code block of each level, then the end token."""
        config = self.config
        allowed = torch.zeros(config.num_levels + 1, vocab_size, dtype=torch.bool, device=device)
        for level, (offset, size) in enumerate(zip(config.level_offsets, config.codebook_sizes)):
            allowed[level, offset : offset + size] = True
        allowed[-1, config.pad_token_id if config.eos_token_id is None else config.eos_token_id] = True
        return allowed

    def _restrict_to_level(self, logits_BQV: torch.Tensor, past_length: int | torch.Tensor) -> torch.Tensor:
        positions_Q = torch.arange(logits_BQV.shape[1], device=logits_BQV.device) + past_length
        allowed = self._allowed_tokens(logits_BQV.device, logits_BQV.shape[-1])
        allowed_QV = allowed[positions_Q.clamp(max=self.config.num_levels)]
        return logits_BQV.masked_fill(~allowed_QV, torch.finfo(logits_BQV.dtype).min)

    def _check_labels(self, labels_BQ: torch.Tensor) -> None:
        allowed = self._allowed_tokens(labels_BQ.device, self.lm_head.out_features)
        levels_Q = torch.arange(labels_BQ.shape[1]).clamp(max=self.config.num_levels)
        known_BQ = (labels_BQ >= 0) & (labels_BQ < allowed.shape[1])
        good_BQ = (known_BQ & allowed[levels_Q, labels_BQ.clamp(0, allowed.shape[1] - 1)]) | (labels_BQ == -100)
        if not bool(good_BQ.all()):
            row, position = (~good_BQ).nonzero()[0].tolist()
            raise IncompatibleComponentsError(
                f"labels[{row}, {position}] = {int(labels_BQ[row, position])} is not a code of level {position} "
                f"(blocks start at {self.config.level_offsets}, sizes {self.config.codebook_sizes}); "
                "build labels with the tokenizer the model was configured from."
            )

    # Decoding interface of RecommendationMixin

    def start_decoding(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> TigerDecodingState:
        """Encode B users once and project the encoder states to the keys and values of every cross-attention.

        Args:
            input_ids: (B, S) tokens of the histories; S = 0 (nothing known about the user) is fine.
            attention_mask: (B, S), 0 = padding; None = no padding.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.shape[1] == 0:
            input_ids = input_ids.new_full((input_ids.shape[0], 1), self.config.pad_token_id)
            attention_mask = attention_mask.new_zeros(input_ids.shape)
        states_BSM = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = create_bidirectional_mask(
            config=self.decoder.config,
            inputs_embeds=states_BSM[:, :1],
            attention_mask=attention_mask,
            encoder_hidden_states=states_BSM,
        )
        if mask is not None and mask.dtype == torch.bool:  # finite numbers: a user without history attends to padding
            mask = torch.zeros_like(mask, dtype=states_BSM.dtype).masked_fill(~mask, torch.finfo(states_BSM.dtype).min)
        keys, values = [], []
        for block in self.decoder.block:
            attention = block.layer[1].EncDecAttention
            shape = (*states_BSM.shape[:2], attention.n_heads, attention.key_value_proj_dim)
            keys.append(attention.k(states_BSM).view(shape).transpose(1, 2).contiguous())
            values.append(attention.v(states_BSM).view(shape).transpose(1, 2).contiguous())
        return TigerDecodingState(keys, values, mask)

    def score_codes(self, state: TigerDecodingState, prefix_BKl: torch.LongTensor, level: int) -> torch.Tensor:
        """Log-probabilities of the codes of `level` after each prefix.

        The self-attention runs over the l + 1 <= L positions of a prefix anew: codes are few, and no cache has to be
        reordered when beams change places.

        Args:
            state: from `start_decoding`, B users.
            prefix_BKl: codes (not token ids) of the levels before `level`; l = level.
            level: 0 to L - 1.

        Returns:
            logp_BKC over the code block of `level`; it sums to one over the block when `restrict_to_level`.
        """
        batch, beams, length = prefix_BKl.shape
        if length != level or not 0 <= level < self.config.num_levels:
            raise IncompatibleComponentsError(
                f"score_codes: level {level} needs prefixes of {level} codes, got {length}"
            )
        offsets_l = torch.tensor(self.config.level_offsets[:level], device=prefix_BKl.device, dtype=torch.long)
        start = prefix_BKl.new_full((batch * beams, 1), self.config.decoder_start_token_id)
        tokens = torch.cat([start, (prefix_BKl + offsets_l).view(batch * beams, level)], dim=1)

        hidden = self._decode_last(state, tokens, batch).view(batch, beams, -1)
        if self.config.scale_decoder_outputs:
            hidden = hidden * (self.model_dim**-0.5)
        first, size = self.config.level_offsets[level], self.config.codebook_sizes[level]
        if self.config.restrict_to_level:
            logits_BKC = nn.functional.linear(hidden, self.lm_head.weight[first : first + size])
            return logits_BKC.float().log_softmax(-1)
        return self.lm_head(hidden).float().log_softmax(-1)[..., first : first + size]

    def _decode_last(self, state: TigerDecodingState, tokens: torch.Tensor, batch: int) -> torch.Tensor:
        """Decoder state (B * K, M) at the last of the Q positions of `tokens` (B * K, Q)."""
        decoder = self.decoder
        x = decoder.dropout(decoder.embed_tokens(tokens))
        length, causal_mask, bias = tokens.shape[1], None, None
        if length > 1:
            causal_mask = x.new_full((length, length), torch.finfo(x.dtype).min).triu(1)[None, None]
        for index, block in enumerate(decoder.block):
            x, bias, _ = block.layer[0](x, attention_mask=causal_mask, position_bias=bias)
            if index == len(decoder.block) - 1:
                x = x[:, -1:]  # nothing after the last self-attention looks at the earlier positions
            # K * Q query positions of one user share the user's keys and values
            cross = block.layer[1]
            attention = cross.EncDecAttention
            query = attention.q(cross.layer_norm(x))
            query = query.view(batch, -1, attention.n_heads, attention.key_value_proj_dim).transpose(1, 2)
            mixed = nn.functional.scaled_dot_product_attention(
                query, state.keys[index], state.values[index], attn_mask=state.mask, scale=attention.scaling
            )
            x = x + cross.dropout(attention.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1)))
            x = block.layer[-1](x)
        return decoder.dropout(decoder.final_layer_norm(x))[:, -1]
