"""Item scoring with any Hugging Face causal language model whose vocabulary holds the item tokens (GPT-2, Llama,
Qwen3 ...).

The prompt is read once per user. At each level the partial codes of all beams of a user go through the model as ONE
row of tokens on top of that user's prompt cache: explicit position ids put every beam right behind the prompt, and a
4-D attention mask lets a token see the prompt and its own beam only. The prompt's keys are never repeated or reordered,
and the cache is cropped back after each step.

Scores are those of `generate`: log_softmax over the full vocabulary, then the level's block of item tokens.

Shape legend: B users, T prompt tokens, V vocabulary, K beams, l codes so far, C codes of the level.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ...errors import RequestError

_BEAMS_PER_CALL = 128  # beams flattened into one row; attention among them grows with the square of this
_ROWS_PER_CALL = 1024  # B * K rows when prompts cannot be shared and are repeated
_SHARED_IMPLEMENTATIONS = ("eager", "sdpa")  # attention functions that take a 4-D additive mask


@dataclass(frozen=True)
class PromptState:
    """A batch of prompts, read once.

    Attributes:
        prompt_ids, prompt_mask: (B, T), left-padded.
        next_position: (B,) position of the first token after the prompt.
        first_logp: (B, V) log-probabilities right after the prompt, float32.
        cache: keys and values of the prompt, B rows; None where the model cannot share it.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    next_position: torch.Tensor
    first_logp: torch.Tensor
    cache: DynamicCache | None


class CausalLMScorer:
    """`start_decoding` and `score_codes` for a causal language model of any architecture.

    Models outside the shared-prompt scheme (no position ids, recurrent or convolutional layers, a sliding window
    shorter than the prompt, flash attention) are scored by running prompt + partial codes in full, without a cache:
    same results, slower.

    Args:
        model: a causal LM; PEFT wrappers are fine. Put it in evaluation mode first.
        level_offsets: (L,) token id of code 0 of each level.
        codebook_sizes: codes per level.
    """

    def __init__(self, model: Any, level_offsets: Sequence[int], codebook_sizes: Sequence[int]):
        self.model = model
        self.level_offsets = [int(offset) for offset in level_offsets]
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._parameters = set(inspect.signature(base.forward).parameters)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def shares_prompt(self, prompt_length: int) -> bool:
        """Can the beams of a user share one prompt cache exactly?"""
        config = self.model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        if "sliding_attention" not in kinds and getattr(config, "layer_types", None) is not None:
            window = None  # a window that no layer uses
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        return (
            "position_ids" in self._parameters
            and bool(getattr(self.model, "_supports_attention_backend", False))
            and not getattr(self.model, "_is_stateful", False)
            and getattr(config, "_attn_implementation", None) in _SHARED_IMPLEMENTATIONS
            and kinds <= {"full_attention", "sliding_attention"}
            and (window is None or prompt_length + len(self.level_offsets) <= window)
        )

    def start_decoding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> PromptState:
        """Read the prompts (B, T) once.

        Padding may be on either side: rows are shifted to left padding first.

        Raises:
            RequestError: a prompt without tokens (row named).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        empty = (mask.sum(-1) == 0).nonzero()
        if len(empty):
            raise RequestError(
                f"row {int(empty[0])}: the prompt is empty; a causal language model needs at least one token."
            )
        order = mask.sort(dim=-1, stable=True).indices  # padding first, tokens in their own order
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        cache = DynamicCache() if self.shares_prompt(input_ids.shape[1]) else None
        logits = self._run(input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache, last_of=None)[:, -1]
        return PromptState(input_ids, mask, mask.sum(-1), logits.float().log_softmax(-1), cache)

    def score_codes(self, state: PromptState, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor:
        """Log-probabilities (B, K, C) of the level's codes after the partial codes of each beam."""
        batch, beams, length = prefix_BKl.shape
        if length == 0:
            return self._block(state.first_logp, level).unsqueeze(1).expand(-1, beams, -1)
        offsets = torch.tensor(self.level_offsets[:length], device=prefix_BKl.device)
        if state.cache is not None:
            score, count = self._score_shared, _BEAMS_PER_CALL
        else:
            score, count = self._score_repeated, max(1, _ROWS_PER_CALL // batch)
        parts = [score(state, tokens, level) for tokens in (prefix_BKl + offsets).split(count, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _score_shared(self, state: PromptState, tokens_BKl: torch.Tensor, level: int) -> torch.Tensor:
        batch, beams, length = tokens_BKl.shape
        block = beams * length
        steps = torch.arange(length, device=tokens_BKl.device)
        positions = (state.next_position.unsqueeze(1) + steps).repeat(1, beams)
        # inside the block a token sees the tokens of its own beam up to itself
        same_beam = torch.block_diag(*[torch.ones(length, length, device=tokens_BKl.device).tril()] * beams).bool()
        visible = torch.cat(
            [state.prompt_mask.bool().unsqueeze(1).expand(-1, block, -1), same_beam.expand(batch, -1, -1)], dim=-1
        )
        dtype = self.model.dtype
        additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        additive.masked_fill_(~visible, torch.finfo(dtype).min)
        try:
            last = torch.arange(beams, device=tokens_BKl.device) * length + length - 1
            logits = self._run(tokens_BKl.reshape(batch, block), additive.unsqueeze(1), positions, state.cache, last)
        finally:
            added = state.cache.get_seq_length() - state.prompt_ids.shape[1]  # type: ignore[union-attr]
            if added > 0:
                state.cache.crop(-added)  # type: ignore[union-attr]
        return self._block(logits.float().log_softmax(-1), level)

    def _score_repeated(self, state: PromptState, tokens_BKl: torch.Tensor, level: int) -> torch.Tensor:
        batch, beams, length = tokens_BKl.shape
        ids = torch.cat(
            [state.prompt_ids.repeat_interleave(beams, 0), tokens_BKl.reshape(batch * beams, length)], dim=-1
        )
        mask = torch.nn.functional.pad(state.prompt_mask.repeat_interleave(beams, 0), (0, length), value=1)
        logits = self._run(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None, last_of=None)[:, -1]
        return self._block(logits.float().log_softmax(-1), level).view(batch, beams, -1)

    def _run(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache | None,
        last_of: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits of the last token, or of the tokens numbered `last_of`."""
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = cache
        if "position_ids" in self._parameters:
            options["position_ids"] = positions
        trims = "logits_to_keep" in self._parameters
        if trims:
            options["logits_to_keep"] = 1 if last_of is None else last_of
        logits = self.model(input_ids=ids, **options).logits
        if trims:
            return logits
        return logits[:, -1:] if last_of is None else logits[:, last_of]

    def _block(self, logp: torch.Tensor, level: int) -> torch.Tensor:
        start = self.level_offsets[level]
        return logp[..., start : start + self.codebook_sizes[level]]
