"""Item scoring with any Hugging Face encoder-decoder (T5, BART ...) whose vocabulary holds the item tokens.

The encoder, the decoder's first step and the cross-attention keys are computed once per user. The generic decoder step
cannot share those keys between the beams of a user (decoders differ in how they place positions), so they are copied
per beam, once per request; they are never recomputed or reordered. Models of this library bring their own `score_codes`
and do not pay for that copy.

Shape legend: B users, T history tokens, D width, V vocabulary, K beams, l codes so far, C codes of the level.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ...errors import IncompatibleComponentsError

_ROWS_PER_CALL = 2048  # B * K rows of the decoder run together; bounds memory, changes nothing else


@dataclass
class EncodedState:
    """A batch of encoded histories.

    Attributes:
        hidden, mask: (B, T, D) and (B, T).
        first_logp: (B, V) log-probabilities after the start token, float32.
        cache: keys and values of the start token and of the encoder output, B rows; None for models without a cache.
        per_beam: copies of `cache` with B * K rows, by K (the last one only).
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    first_logp: torch.Tensor
    cache: EncoderDecoderCache | None
    per_beam: dict[int, EncoderDecoderCache] = field(default_factory=dict)

    def cache_for(self, beams: int) -> EncoderDecoderCache:
        if beams not in self.per_beam:
            self.per_beam.clear()
            self.per_beam[beams] = copy.deepcopy(self.cache)  # type: ignore[assignment]
            self.per_beam[beams].batch_repeat_interleave(beams)
        return self.per_beam[beams]


class EncoderDecoderScorer:
    """`start_decoding` and `score_codes` for an encoder-decoder of any architecture.

    Args:
        model: an encoder-decoder with a language-model head. Put it in evaluation mode first.
        level_offsets: (L,) token id of code 0 of each level.
        codebook_sizes: codes per level.

    Raises:
        IncompatibleComponentsError: the model names no decoder start token.
    """

    def __init__(self, model: Any, level_offsets: Sequence[int], codebook_sizes: Sequence[int]):
        self.model = model
        self.level_offsets = [int(offset) for offset in level_offsets]
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        self.start_token = decoder_start_token(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes_cache = "past_key_values" in inspect.signature(base.forward).parameters

    @property
    def device(self) -> torch.device:
        return self.model.device

    def start_decoding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> EncodedState:
        """Encode the histories (B, T) and take the decoder's first step, once."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
        start = input_ids.new_full((input_ids.shape[0], 1), self.start_token)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if self._takes_cache else None
        logp = self._run(hidden, mask, start, cache)
        if cache is not None and (cache.get_seq_length() != 1 or not all(cache.is_updated.values())):
            cache = None  # the model keeps its keys elsewhere
        return EncodedState(hidden, mask, logp, cache)

    def score_codes(self, state: EncodedState, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor:
        """Log-probabilities (B, K, C) of the level's codes after the partial codes of each beam."""
        batch, beams, length = prefix_BKl.shape
        first, size = self.level_offsets[level], self.codebook_sizes[level]
        if length == 0:
            return state.first_logp[:, None, first : first + size].expand(-1, beams, -1)
        offsets = torch.tensor(self.level_offsets[:length], device=prefix_BKl.device)
        parts = []
        for tokens in (prefix_BKl + offsets).split(max(1, _ROWS_PER_CALL // batch), dim=1):
            count = tokens.shape[1]
            hidden, mask = (t.repeat_interleave(count, 0) for t in (state.hidden, state.mask))
            ids = tokens.reshape(batch * count, length)
            if state.cache is None:
                start = ids.new_full((ids.shape[0], 1), self.start_token)
                logp = self._run(hidden, mask, torch.cat([start, ids], dim=-1), None)
            else:
                cache = state.cache_for(count)
                try:
                    logp = self._run(hidden, mask, ids, cache)
                finally:  # back to the start token alone
                    cache.crop(1 - cache.get_seq_length())
            parts.append(logp[:, first : first + size].view(batch, count, size))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run(
        self, hidden: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, cache: EncoderDecoderCache | None
    ) -> torch.Tensor:
        """Log-probabilities (rows, V) after the last token, float32."""
        options = {} if cache is None else {"past_key_values": cache}
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),  # type: ignore[arg-type]
            attention_mask=mask,
            decoder_input_ids=ids,
            use_cache=cache is not None,
            **options,
        )
        return output.logits[:, -1].float().log_softmax(-1)


def decoder_start_token(model: Any) -> int:
    """Token that opens the decoder's sequence, as `generate` picks it."""
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token[0] if isinstance(token, list) else token)
    raise IncompatibleComponentsError(
        f"{type(model).__name__} names no decoder start token; set model.generation_config.decoder_start_token_id."
    )
