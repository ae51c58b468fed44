"""Running the language model of a ranker over embeddings: prompts once, continuations behind their shared cache.

Where the model is a backbone followed by one plain linear head, only the rows and tokens that are asked for are multiplied
(`has_plain_head` tries that out); every other model gives its own logits.

Shapes: B rows, T tokens, C continuations per row, Q tokens of a continuation, H width, V vocabulary, R chosen places,
A chosen tokens, x = H or V.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_genrec.generation.decoding.causal_head import is_plain_linear
from hf_genrec.generation.search import evaluating

_tried: weakref.WeakSet[Any] = weakref.WeakSet()


def has_plain_head(model: Any) -> bool:
    """`is_plain_linear`, tried out without dropout and without a trace in the random state (a resumed run tries anew)."""
    if model in _tried:
        return is_plain_linear(model)
    with torch.random.fork_rng(), evaluating(model):
        found = is_plain_linear(model)
    _tried.add(model)
    return found


class LanguageReader:
    """A causal language model, read by embeddings.

    Args:
        model: of transformers; adapters inside its layers are fine.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.plain = model, has_plain_head(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def outputs(
        self, embeds_BTH: Tensor, mask_BS: Tensor, cache: Any = None, use_cache: bool = False
    ) -> tuple[Tensor, Any]:
        """Hidden states or logits (B, T, x) of the given embeddings, and the cache.

        Args:
            mask_BS: 1 = real; of the cached tokens and the given ones, S >= T. Padding may be on either side.
        """
        inputs: dict[str, Any] = {"inputs_embeds": embeds_BTH, "attention_mask": mask_BS, "use_cache": use_cache}
        if cache is not None:
            inputs["past_key_values"] = cache
        if self._takes_positions:
            inputs["position_ids"] = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -embeds_BTH.shape[1] :]
        if self.plain:
            output = getattr(self.model, self.model.base_model_prefix)(**inputs)
            return output.last_hidden_state, getattr(output, "past_key_values", None)
        output = self.model(**inputs)
        return output.logits, getattr(output, "past_key_values", None)

    def logits(self, chosen_Rx: Tensor, tokens_A: Tensor | None = None) -> Tensor:
        """Logits (R, A) float32 of some tokens, or (R, V) of all, of places chosen from `outputs`."""
        if not self.plain:
            return (chosen_Rx if tokens_A is None else chosen_Rx[:, tokens_A]).float()
        head = self.model.get_output_embeddings()
        if tokens_A is None:
            return head(chosen_Rx).float()
        bias = None if head.bias is None else head.bias[tokens_A]
        return F.linear(chosen_Rx, head.weight[tokens_A], bias).float()

    def read(self, embeds_BTH: Tensor, mask_BT: Tensor) -> tuple[Tensor, Any]:
        """Left-padded prompts: outputs (B, x) of the last token, and the cache."""
        output, cache = self.outputs(embeds_BTH, mask_BT, use_cache=True)
        return output[:, -1], cache

    def read_on(self, prompt_BTH: Tensor, mask_BT: Tensor, cache: Any, embeds_BCQH: Tensor, mask_BCQ: Tensor) -> Tensor:
        """Outputs (B, C, Q, x) of right-padded continuations, each behind the prompt of its row.

        The prompt's keys and values are reused, C times; a model whose state is no such cache reads the prompt again.
        The cache is used up.
        """
        count, length = embeds_BCQH.shape[1:3]
        mask = torch.cat([mask_BT.repeat_interleave(count, 0), mask_BCQ.flatten(0, 1)], dim=1)
        embeds = embeds_BCQH.flatten(0, 1)
        if cache is None or getattr(self.model, "_is_stateful", False):
            whole = torch.cat([prompt_BTH.repeat_interleave(count, 0), embeds], dim=1)
            output = self.outputs(whole, mask)[0][:, -length:]
        else:
            cache.batch_repeat_interleave(count)
            output, _ = self.outputs(embeds, mask, cache, use_cache=True)
        return output.unflatten(0, (len(prompt_BTH), count))
