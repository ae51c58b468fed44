"""T5 over item codes: what TIGER (arXiv 2305.05065) and the models built on it share.

The encoder reads the codes of a history, the decoder writes the L codes of the next item. transformers' T5 does the
work; this module adds what recommendation needs:

- one distribution per level: at decoder position l only the codes of level l have probability, so the loss, `generate`,
  `recommend` and `score_all` all speak of the same numbers;
- with `causal_encoder`, all prefixes of a window in one pass (`t5_packed.py`);
- a loss that stays right under gradient accumulation (T5's own ignores `num_items_in_batch`);
- decoding for `RecommendationMixin` that encodes a user once and never copies anything per beam (generation's `t5`).

*Relations*: `restrict_to_level=False` is `T5ForConditionalGeneration`, bit for bit (in eval mode, or with
`pooled_dropout=False`).

Shapes: B users, T targets of a window, K beams, L levels, l codes of a prefix, S encoder positions, Q decoder positions,
V vocabulary, C codes of one level, H heads, D width of a head, M width of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, T5ForConditionalGeneration
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.beam_cache import BeamCache
from hf_genrec.generation.decoding.t5 import T5Decoder, T5State
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.models.dropout import PooledDropout

from .configuration_t5_levels import T5LevelsConfig
from .t5_packed import packed_forward, use_encoder, use_recency


def use_pooled_dropout(module: nn.Module) -> None:
    """Swap every `nn.Dropout` below `module` for a `PooledDropout` of the same rate."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout:
            setattr(module, name, PooledDropout(child.p))
        else:
            use_pooled_dropout(child)


def apply_options(model: nn.Module, config: T5LevelsConfig) -> None:
    """Dropout and encoder of a new T5 as its configuration says."""
    if config.pooled_dropout:
        use_pooled_dropout(model)
    if config.causal_encoder:
        use_encoder(model)
        use_recency(model)


class T5LevelsForConditionalGeneration(RecommendationMixin, T5ForConditionalGeneration, GenerationMixin):
    """T5 with one distribution per code level, and the decoding interface of `RecommendationMixin`.

    Example:
        >>> import torch
        >>> config = T5LevelsConfig(codebook_sizes=[8, 8], d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1)
        >>> model = T5LevelsForConditionalGeneration(config)
        >>> history, target = torch.tensor([[4, 12, 5, 13]]), torch.tensor([[6, 14]])
        >>> model(input_ids=history, labels=target).logits.shape
        torch.Size([1, 2, 20])
    """

    config_class = T5LevelsConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: T5LevelsConfig):
        super().__init__(config)
        apply_options(self, config)

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
        history_lengths: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """As `T5ForConditionalGeneration.forward`, with per-level logits and a normalisable loss.

        Args:
            input_ids: (B, S) tokens of the history.
            attention_mask: (B, S), 0 = padding (on either side: T5's positions are relative).
            labels: (B, L) tokens of the target item, or (B, L + 1) with the end token; -100 is ignored. Packed: (B, T, L)
                or (B, T, L + 1).
            history_lengths: (B, T), only with `causal_encoder`: how many real tokens of the row target t may see, 0 for
                targets that are not there. `PackedPrefixCollator` makes them.
            num_items_in_batch: number of labels of the whole optimisation step; the loss is the sum of the
                cross-entropies divided by it. None = mean over this batch.

        Returns:
            `Seq2SeqLMOutput` with `loss` (scalar) and `logits` (B, Q, V), packed (B, T, Q, V); a token that is impossible
            at its position has the smallest finite number of the dtype.

        Raises:
            IncompatibleComponentsError: a label that is not a code of its level (checked on CPU tensors); packed labels
                without `history_lengths`, or for a model without `causal_encoder`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        # Read before the decoder lengthens the cache; adding 0 detaches from a static cache's live counter.
        past_length = past_key_values.get_seq_length() + 0 if past_key_values is not None else 0

        kwargs.pop("return_dict", None)
        if history_lengths is not None and decoder_input_ids is not None:
            outputs = packed_forward(
                self,
                history_lengths=history_lengths,
                decoder_input_ids=decoder_input_ids,
                attention_mask=attention_mask,
                encoder_outputs=encoder_outputs,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        elif labels is not None and labels.dim() == 3:
            raise IncompatibleComponentsError(
                f"labels have shape {tuple(labels.shape)}: packed labels need history_lengths (B, T) beside them, as "
                "PackedPrefixCollator gives them."
            )
        else:
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
            outputs.loss = self.training_loss(outputs, labels, attention_mask, num_items_in_batch)
        return outputs

    def training_loss(
        self,
        outputs: Seq2SeqLMOutput,
        labels_BQ: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Cross-entropy of the codes (`loss_temperature` applied). Models with more than that to learn extend it."""
        logits = outputs.logits
        if self.config.loss_temperature != 1:
            logits = logits / self.config.loss_temperature
        return fixed_cross_entropy(logits.reshape(-1, logits.shape[-1]), labels_BQ.reshape(-1), num_items_in_batch)

    def _allowed_tokens(self, device: torch.device, vocab_size: int) -> torch.Tensor:
        """(L + 1, V) boolean: the code block of each level, then the end token."""
        config = self.config
        allowed = torch.zeros(config.num_levels + 1, vocab_size, dtype=torch.bool, device=device)
        for level, (offset, size) in enumerate(zip(config.level_offsets, config.codebook_sizes)):
            allowed[level, offset : offset + size] = True
        allowed[-1, config.pad_token_id if config.eos_token_id is None else config.eos_token_id] = True
        return allowed

    def _restrict_to_level(self, logits_BQV: torch.Tensor, past_length: int | torch.Tensor) -> torch.Tensor:
        positions_Q = torch.arange(logits_BQV.shape[-2], device=logits_BQV.device) + past_length
        allowed = self._allowed_tokens(logits_BQV.device, logits_BQV.shape[-1])
        allowed_QV = allowed[positions_Q.clamp(max=self.config.num_levels)]
        return logits_BQV.masked_fill(~allowed_QV, torch.finfo(logits_BQV.dtype).min)

    def _check_labels(self, labels_BQ: torch.Tensor) -> None:
        allowed = self._allowed_tokens(labels_BQ.device, self.lm_head.out_features)
        levels_Q = torch.arange(labels_BQ.shape[-1]).clamp(max=self.config.num_levels)
        known_BQ = (labels_BQ >= 0) & (labels_BQ < allowed.shape[1])
        good_BQ = (known_BQ & allowed[levels_Q, labels_BQ.clamp(0, allowed.shape[1] - 1)]) | (labels_BQ == -100)
        if not bool(good_BQ.all()):
            place = (~good_BQ).nonzero()[0].tolist()
            raise IncompatibleComponentsError(
                f"labels{place} = {int(labels_BQ[tuple(place)])} is not a code of level {place[-1]} "
                f"(blocks start at {self.config.level_offsets}, sizes {self.config.codebook_sizes}); "
                "build labels with the tokenizer the model was configured from."
            )

    # Decoding interface of RecommendationMixin

    def _t5_decoder(self) -> T5Decoder:
        config = self.config
        return T5Decoder(
            self,
            config.level_offsets,
            config.codebook_sizes,
            config.decoder_start_token_id,
            restrict_to_level=config.restrict_to_level,
        )

    def start_decoding(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> T5State:
        """Encode B users once and project the encoder states to the keys and values of every cross-attention.

        Args:
            input_ids: (B, S) tokens of the histories; S = 0 (nothing known about the user) is fine.
            attention_mask: (B, S), 0 = padding; None = no padding.
        """
        return self._t5_decoder().start_decoding(input_ids, attention_mask)

    def start_from_encoder(self, states_BSM: torch.Tensor, attention_mask: torch.Tensor | None = None) -> T5State:
        """As `start_decoding`, from an encoder output (B, S, M) that is there already."""
        return self._t5_decoder().start_from_encoder(states_BSM, attention_mask)

    def start_beams(self, state: T5State) -> BeamCache:
        """A search's own place in the model: one new code per beam and level is run."""
        return self._t5_decoder().start_beams(state)

    def score_codes(self, state: T5State, prefix_BKl: torch.LongTensor, level: int) -> torch.Tensor:
        """Log-probabilities of the codes of `level` after each prefix, the stateless reference of `start_beams`.

        Args:
            state: from `start_decoding`, B users.
            prefix_BKl: codes (not token ids) of the levels before `level`; l = level.
            level: 0 to L - 1.

        Returns:
            logp_BKC over the code block of `level`; it sums to one over the block when `restrict_to_level`.
        """
        return self._t5_decoder().score_codes(state, prefix_BKl, level)
