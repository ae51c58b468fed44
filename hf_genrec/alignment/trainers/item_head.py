"""The head of a language model on targets that are item tokens: only the rows that compete are multiplied.

After "item tokens only" prompts the next token is one of a few hundred codes, yet a full softmax multiplies the hidden
state with every row of a vocabulary of 50,000 to 150,000. `add_item_head` gives a model a second way through its head:

* "full": every target against the whole vocabulary, as TRL trains;
* "items": a target that is an item token against all item tokens;
* "level": against the tokens of its own level.

Text targets are always scored against the whole vocabulary. Only positions that have a label are scored.

*Relations*: on text, and for "full", the log-probabilities are those of TRL's fused head (`add_fused_lm_head`), whose
kernel does the arithmetic here too. A model trained with "items" or "level" is to be searched with `restrict_to_level`.

Shape legend: B rows, T tokens, D width, V vocabulary, n labelled positions of the batch, row after row.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction

from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.decoding.causal_lm import additive_mask

ITEM_HEADS = ("full", "items", "level")
ANSWERS = ("answer_rows", "answer_places", "answer_tokens")

_COLUMNS = 32768  # of the vocabulary at a time, as TRL does
_OUTPUTS = ("log_probs", "is_top1")
# configuration fields of models that bend or scale their logits (Gemma, Cohere, Granite, Falcon-H1 ...)
_BENT = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass
class ItemHeadOutput(ModelOutput):
    """What `model(..., labels=labels, item_head=True)` gives.

    Attributes:
        log_probs: (n,) of each label.
        is_top1: (n,) whether the label is the likeliest of those it competed with.
    """

    log_probs: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def has_plain_head(model: Any) -> bool:
    """Are the logits the head's matrix times the last hidden states, and nothing more? (For "items" and "level" they must.)"""
    config = model.config.get_text_config()
    bent = any(getattr(config, name, None) not in (None, 1, 1.0) for name in _BENT)
    head = model.get_output_embeddings()
    return not bent and head is not None and hasattr(head, "weight") and model.base_model is not model


def add_item_head(model: Any, kind: str, tokenizer: Any = None) -> None:
    """Let `model(..., labels=labels, item_head=True)` return an ItemHeadOutput; without `item_head` nothing changes.

    Labels (B, T) are shifted here: the label at place t is predicted from the tokens before it; -100 is left out. Instead
    of labels, `answer_rows` (A,) and `answer_places`, `answer_tokens` (A, Q) name tokens (-100: none) and the input places
    behind which they are scored, any number at one place; a bool attention mask (B, 1, T, T) says what a place sees. Call
    it with the model itself, before or after PEFT wraps it.

    Args:
        model: causal LM with a plain head.
        kind: "full", "items" or "level".
        tokenizer: carries the catalogue; "full" needs none.

    Raises:
        TrainingError: an unknown kind.
        IncompatibleComponentsError: no catalogue, or a model that bends its logits.
    """
    if kind not in ITEM_HEADS:
        raise TrainingError(f"item_head is {kind!r}: choose one of {', '.join(ITEM_HEADS)}.")
    if not has_plain_head(model):
        raise IncompatibleComponentsError(
            f"{type(model).__name__} bends or scales its logits behind the head: train it with item_head='full'."
        )
    levels: list[tuple[int, int]] = []
    if kind != "full":
        if (
            not hasattr(tokenizer, "level_offsets")
            or not len(np.unique(tokenizer.level_offsets)) == tokenizer.num_levels
        ):
            raise IncompatibleComponentsError(
                f"item_head={kind!r} needs a tokenizer with item tokens of its own at each level: make one with "
                "extend_tokenizer, or use item_head='full'."
            )
        starts = [int(offset) for offset in tokenizer.level_offsets]
        levels = [(start, start + int(size)) for start, size in zip(starts, tokenizer.codebook_sizes)]
    if kind == "items":
        levels = [(levels[0][0], levels[-1][1])]
    previous = model.forward

    def forward(self: Any, *args: Any, item_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4 and mask.dtype == torch.bool:  # eager attention adds it to the scores
            kwargs["attention_mask"] = additive_mask(mask, self.get_input_embeddings().weight.dtype)
        if not item_head:
            return previous(*args, **kwargs) if labels is None else previous(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        rows_A, places_AQ, tokens_AQ = (kwargs.pop(name, None) for name in ANSWERS)
        hidden_BTD = self.base_model(*args, **kwargs).last_hidden_state
        if tokens_AQ is not None:
            there_AQ = tokens_AQ >= 0
            hidden_nD = hidden_BTD[rows_A.unsqueeze(1).expand_as(there_AQ)[there_AQ], places_AQ[there_AQ]]
            return item_log_probs(hidden_nD, tokens_AQ[there_AQ], self.get_output_embeddings(), levels)
        labels = labels[:, 1:]
        there = labels != -100
        return item_log_probs(hidden_BTD[:, :-1][there], labels[there], self.get_output_embeddings(), levels)

    forward.__wrapped__ = getattr(previous, "__wrapped__", type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def use_item_head_as_fused(model: Any, kind: str, tokenizer: Any) -> None:
    """Let TRL's call of its fused head, `model(..., labels=labels, fused_lm_head=True)`, go through `add_item_head`.

    For trainers that compare log-probabilities of whole answers (DPO): with "items" or "level" these are the ones that a
    search with `restrict_to_level` adds up. Call it after TRL's `add_fused_lm_head`. Batches with `answer_tokens`
    (`shared_prompts.py`) get log_probs and is_top1 as (A, Q), 0 where there is no token.

    Args:
        model, kind, tokenizer: as for `add_item_head`; `kind` "full" leaves labels to TRL's head.
    """
    fused = model.forward
    add_item_head(model, kind, tokenizer)
    previous = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return previous(*args, labels=labels, **kwargs)
        tokens_AQ = kwargs.get(ANSWERS[-1])
        if kind == "full" and tokens_AQ is None:
            return fused(*args, labels=labels, fused_lm_head=True, **kwargs)
        found = previous(*args, labels=labels, item_head=True, **kwargs)
        there_BT = labels[:, 1:] != -100 if tokens_AQ is None else tokens_AQ >= 0
        log_probs_BT = found.log_probs.new_zeros(there_BT.shape).masked_scatter(there_BT, found.log_probs)
        is_top1_BT = torch.zeros_like(there_BT).masked_scatter(there_BT, found.is_top1)
        return ItemHeadOutput(log_probs=log_probs_BT, is_top1=is_top1_BT)

    forward.__wrapped__ = previous.__wrapped__  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def item_log_probs(
    hidden_nD: torch.Tensor, targets_n: torch.Tensor, head: Any, blocks: Sequence[tuple[int, int]]
) -> ItemHeadOutput:
    """Log-probabilities of the targets: inside the block of rows `[start, stop)` that holds them, else over all rows.

    Args:
        hidden_nD: what the head is applied to.
        targets_n: token ids.
        head: the output layer, one that PEFT trains rows of included.
        blocks: ranges of token ids that compete among themselves, ascending, side by side or apart.
    """
    hidden_nD = hidden_nD.to(head.weight.device) if not isinstance(head, TrainableTokensWrapper) else hidden_nD
    places, log_probs, is_top1 = [], [], []
    rest_n = torch.ones_like(targets_n, dtype=torch.bool)
    if blocks:
        first, last = blocks[0][0], blocks[-1][1]
        inside_n = (targets_n >= first) & (targets_n < last)
        competing = list(blocks) if bool(inside_n.any()) else []
        weight, bias = head_rows(head, first, last) if competing else (hidden_nD, None)
        for start, stop in competing:
            in_block_n = (targets_n >= start) & (targets_n < stop)
            place = in_block_n.nonzero().squeeze(1)
            if not len(place):
                continue
            rest_n &= ~in_block_n
            rows = slice(start - first, stop - first)
            block_bias = None if bias is None else bias[rows]
            scored = _scored(hidden_nD[place], weight[rows], block_bias, targets_n[place] - start)
            places.append(place)
            log_probs.append(scored[0])
            is_top1.append(scored[1])
    place = rest_n.nonzero().squeeze(1)
    if len(place) or not places:
        bias = getattr(head, "bias", None)
        weight = head.weight
        if isinstance(weight, DTensor):  # FSDP shards it
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        scored = _scored(hidden_nD[place], weight, bias, targets_n[place])
        places.append(place)
        log_probs.append(scored[0])
        is_top1.append(scored[1])
    order = torch.cat(places).argsort()
    return ItemHeadOutput(log_probs=torch.cat(log_probs)[order], is_top1=torch.cat(is_top1)[order])


def head_rows(head: Any, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the output layer for the tokens `[start, stop)`.

    Where PEFT trains exactly such rows they are taken from where it keeps them: its merged weight is a copy of the whole
    table in every pass.
    """
    if isinstance(head, TrainableTokensWrapper):
        layer = head.token_adapter
        active = layer.active_adapters
        if (
            len(active) == 1
            and active[0] in layer.trainable_tokens_delta
            and not (layer.merged or layer.disable_adapters)
        ):
            indices = layer.token_indices[active[0]]
            first, last = indices[0], indices[-1]
            if last - first + 1 == len(indices) and first <= start and stop <= last + 1:
                return layer.trainable_tokens_delta[active[0]][start - first : stop - first], None
    weight, bias = head.weight, getattr(head, "bias", None)
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    return weight[start:stop], None if bias is None else bias[start:stop]


def _scored(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor) -> tuple[Any, Any]:
    columns = min(_COLUMNS, len(weight))
    scored = ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, columns, None, 1.0, _OUTPUTS)
    return scored[0], scored[4]
