"""Item scoring with any Hugging Face causal language model whose vocabulary holds the item tokens (GPT-2, Llama,
Qwen3 ...).

The prompt is read once per user. A search (`start_beams`) then runs one new token per beam and level on top of that
prompt, see tree_attention; scores come out of causal_head.

Shape legend: B users, T prompt tokens, V vocabulary, K beams, l codes so far, C codes of the level, S keys.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from ...errors import RequestError
from .beam_cache import BeamCache, StatelessBeams
from .causal_head import CausalHead, LinearHead, OwnLogits, is_plain_linear
from .tree_attention import Prompt, PromptCache, PromptRead, TreeBeams, TreeLayer, joined

_BEAMS_PER_CALL = 128  # beams run as one row; attention among them grows with the square of this
# Tokens (users * beams, or of prompts) in one pass. On a CPU, activations that stay in its cache are 10 % faster.
_TOKENS_CPU, _TOKENS_DEVICE = 512, 2**15
_ROWS_PER_CALL = 1024  # B * K rows when prompts cannot be shared and are repeated
_SHARED_IMPLEMENTATIONS = ("eager", "sdpa")  # attention functions that take a 4-D additive mask


@dataclass(frozen=True)
class PromptState:
    """A batch of prompts, read once. Any number of searches may use it, one after the other or at the same time.

    Attributes:
        prompt_ids, prompt_mask: (B, T), left-padded.
        first_B1x: what the head keeps of the last prompt token.
        head: makes scores of it.
        prompt: keys and values of the prompt, B rows; None where the model cannot share them.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    first_B1x: torch.Tensor
    head: CausalHead
    prompt: Prompt | None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        layers = () if self.prompt is None else self.prompt.layers
        return sum(t.numel() * t.element_size() for layer in layers for t in layer)


class CausalLMScorer:
    """`start_decoding`, `start_beams` and `score_codes` for a causal language model of any architecture.

    Models outside the shared-prompt scheme (no position ids, recurrent or convolutional layers, a sliding window
    shorter than the prompt, flash attention, prompt tuning) are scored by running prompt + partial codes in full, without
    a cache: same results, slower.

    Args:
        model: a causal LM; PEFT wrappers are fine. Put it in evaluation mode first.
        level_offsets: (L,) token id of code 0 of each level; all 0 where the codes are token ids themselves (titles).
        codebook_sizes: codes per level.
        restrict_to_level: False: log-probabilities over the full vocabulary, as `generate` sums them. True: over the
            level's codes only, as `generate` does with PerLevelLogitsProcessor and renormalised logits.

    Relations: with `renormalize=True` in the search, both give the same result, because every total cancels; it is then
    not computed.
    """

    def __init__(
        self,
        model: Any,
        level_offsets: Sequence[int],
        codebook_sizes: Sequence[int],
        *,
        restrict_to_level: bool = False,
    ):
        self.model = model
        self.level_offsets = [int(offset) for offset in level_offsets]
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        self.restrict_to_level = restrict_to_level
        self._inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._parameters = set(inspect.signature(self._inner.forward).parameters)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def _tokens_per_call(self) -> int:
        return _TOKENS_CPU if self.device.type == "cpu" else _TOKENS_DEVICE

    def shares_prompt(self, prompt_length: int) -> bool:
        """Can the beams of a user share one prompt cache exactly?"""
        longest = longest_packed(self.model)
        return longest is None or prompt_length + len(self.level_offsets) <= longest

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
        if not self.shares_prompt(input_ids.shape[1]):
            head: CausalHead = self._head(OwnLogits)
            return PromptState(input_ids, mask, head.keep(self._read_anew(input_ids, mask), 0), head, None)
        head = self._head(LinearHead if is_plain_linear(self._inner) else OwnLogits)
        output, layers = self._read_prompt(input_ids, mask, head)
        prompt = Prompt(layers, mask.bool(), mask.sum(-1))
        return PromptState(input_ids, mask, head.keep(output, 0), head, prompt)

    def start_beams(self, state: PromptState) -> BeamCache:
        """A search's place in the model, see `beam_cache.BeamCache`."""
        if state.prompt is None:
            return StatelessBeams(self, state, len(state.prompt_ids), state.prompt_ids.device)
        return TreeBeams(
            state.prompt,
            state.first_B1x,
            state.head,
            self._runner(state.head),
            beams_per_call=_BEAMS_PER_CALL,
            tokens_per_call=self._tokens_per_call,
        )

    def score_codes(self, state: PromptState, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor:
        """Log-probabilities (B, K, C) of the level's codes after the partial codes of each beam, all run anew."""
        batch, beams, length = prefix_BKl.shape
        if length == 0:
            return state.head.scores(state.first_B1x, level).log_probs().expand(-1, beams, -1)
        offsets = torch.tensor(self.level_offsets[:length], device=prefix_BKl.device)
        sizes = torch.tensor(self.codebook_sizes[:length], device=prefix_BKl.device)
        tokens_BKl = torch.minimum(prefix_BKl, sizes - 1) + offsets  # an ended code goes on with any token
        if state.prompt is not None:
            score, count = self._score_shared, _BEAMS_PER_CALL
        else:
            score, count = self._score_repeated, max(1, _ROWS_PER_CALL // batch)
        parts = [score(state, tokens, level) for tokens in tokens_BKl.split(count, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _score_shared(self, state: PromptState, tokens_BKl: torch.Tensor, level: int) -> torch.Tensor:
        batch, beams, length = tokens_BKl.shape
        assert state.prompt is not None
        block = beams * length
        steps = torch.arange(length, device=tokens_BKl.device)
        positions = (state.prompt.next_position_B.unsqueeze(1) + steps).repeat(1, beams)
        # inside the block a token sees the tokens of its own beam up to itself
        beam, step = torch.arange(beams, device=steps.device).repeat_interleave(length), steps.repeat(beams)
        same_beam = (beam.unsqueeze(1) == beam) & (step.unsqueeze(1) >= step)
        visible = torch.cat(
            [state.prompt.mask_BT.unsqueeze(1).expand(-1, block, -1), same_beam.expand(batch, -1, -1)], dim=-1
        )
        cache = Cache(layers=list(state.prompt.tree()))
        output = self._runner(state.head)(tokens_BKl.flatten(1), visible, positions, cache)
        last = output.unflatten(1, (beams, length))[:, :, -1]
        return state.head.scores(state.head.keep(last, level), level).log_probs()

    def _score_repeated(self, state: PromptState, tokens_BKl: torch.Tensor, level: int) -> torch.Tensor:
        batch, beams, length = tokens_BKl.shape
        ids = torch.cat(
            [state.prompt_ids.repeat_interleave(beams, 0), tokens_BKl.reshape(batch * beams, length)], dim=-1
        )
        mask = torch.nn.functional.pad(state.prompt_mask.repeat_interleave(beams, 0), (0, length), value=1)
        kept = state.head.keep(self._read_anew(ids, mask), level)
        return state.head.scores(kept, level).log_probs().view(batch, beams, -1)

    # ------------------------------------------------------------- running the model

    def _head(self, kind: type[CausalHead]) -> CausalHead:
        return kind(self._inner, self.level_offsets, self.codebook_sizes, self.restrict_to_level)

    def _forward(self, head: CausalHead, **inputs: Any) -> torch.Tensor:
        """Hidden states or logits of all given tokens, whichever `head` works on."""
        if isinstance(head, LinearHead):
            return getattr(self._inner, self._inner.base_model_prefix)(**inputs).last_hidden_state
        return self._inner(**inputs).logits

    def _runner(self, head: CausalHead) -> Any:
        """The model as tree_attention's RunTokens."""
        dtype = self._inner.dtype

        def run(tokens_BQ: torch.Tensor, mask_BQS: torch.Tensor, positions_BQ: torch.Tensor, cache: Cache) -> Any:
            return self._forward(
                head,
                input_ids=tokens_BQ,
                attention_mask=additive_mask(mask_BQS, dtype).unsqueeze(1),
                position_ids=positions_BQ,
                past_key_values=cache,
                use_cache=True,
            )

        return run

    def _read_prompt(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, head: CausalHead
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Output of the last token (B, 1, .) and the keys and values of all.

        Of all tokens but the last, the last layer's keys are needed and nothing after them: they are read up to there,
        then the last token alone goes all the way.
        """
        positions = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        whole = ids_BT.shape[1] == 1 or not _may_stop_early(self._inner)
        stop_at = None if whole else self._inner.config.get_text_config(decoder=True).num_hidden_layers - 1
        end = ids_BT.shape[1] if whole else ids_BT.shape[1] - 1
        users = max(1, self._tokens_per_call // ids_BT.shape[1])
        outputs, caches = [], []
        for rows in (slice(start, start + users) for start in range(0, len(ids_BT), users)):
            caches.append(PromptCache(stop_at))
            with contextlib.suppress(PromptRead):
                output = self._forward(
                    head,
                    input_ids=ids_BT[rows, :end],
                    attention_mask=mask_BT[rows, :end],
                    position_ids=positions[rows, :end],
                    past_key_values=caches[-1],
                    use_cache=True,
                )
                outputs.append(output[:, -1:])
        layers = [
            (joined([layer.keys for layer in parts], 1, dim=-2), joined([layer.values for layer in parts], 1, dim=-2))
            for parts in zip(*(cache.layers for cache in caches))
        ]
        if whole:
            return joined(outputs, 1, dim=1), layers
        tree = [TreeLayer(layer) for layer in layers]
        output = self._runner(head)(
            ids_BT[:, -1:], mask_BT.bool().unsqueeze(1), positions[:, -1:], Cache(layers=list(tree))
        )
        return output, [layer.with_fresh() for layer in tree]

    def _read_anew(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits (rows, 1, V) of the last token, without a cache."""
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        if "position_ids" in self._parameters:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        return self.model(input_ids=ids, **options).logits[:, -1:]


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask (True: seen) as what attention adds to its scores."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill_(~visible, torch.finfo(dtype).min)


def longest_packed(model: Any) -> int | None:
    """Tokens that may stand before a token of a row in which several continuations share a prompt (a 4-D attention mask).

    Returns:
        None: any number; 0: the model cannot be run so; else its sliding window.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" not in kinds and getattr(config, "layer_types", None) is not None:
        window = None  # a window that no layer uses
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    packs = (
        "position_ids" in inspect.signature(type(inner).forward).parameters
        and bool(getattr(model, "_supports_attention_backend", False))
        and not getattr(model, "_is_stateful", False)
        and getattr(config, "_attn_implementation", None) in _SHARED_IMPLEMENTATIONS
        and kinds <= {"full_attention", "sliding_attention"}
        and not needs_its_wrapper(model)
    )
    return window if packs else 0


def needs_its_wrapper(model: Any) -> bool:
    """A PEFT wrapper that changes the inputs (prompt tuning, activated LoRA): its inner model alone is another model."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(model, "get_base_model"):
        return False
    return any(
        getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None)
        for config in configs.values()
    )


def _may_stop_early(model: Any) -> bool:
    """Leaving a forward pass by an exception is for plain modules: not compiled, not moved about by hooks."""
    return not any(hasattr(module, "_hf_hook") or module._compiled_call_impl is not None for module in model.modules())
