"""Texts to vectors with the hidden states of any transformers model: last token or mean of the last layer.

The encoder of BIGRec's grounding (arXiv 2308.08434), where the language model that writes a title also embeds it.

Shape legend: B texts, T tokens, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import IncompatibleComponentsError, RequestError

POOLINGS = ("last", "mean")


@torch.no_grad()
def encode_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: str = "last",
    batch_size: int = 32,
    max_length: int | None = None,
) -> torch.Tensor:
    """Vectors (B, D) of texts.

    Runs in evaluation mode, in batches of similar length; padding never changes a vector by more than rounding.

    Args:
        model: a causal LM, an encoder, or an encoder-decoder (its encoder is used); PEFT wrappers too.
        tokenizer: of that model. Without a padding token, the end token pads (it is masked).
        pooling: "last" or "mean", over the text's own tokens.
        max_length: tokens read of each text; default all.

    Raises:
        RequestError: an unknown pooling, or a text that has no token (row named).
        IncompatibleComponentsError: the model gives no hidden states.
    """
    if pooling not in POOLINGS:
        raise RequestError(f"unknown pooling {pooling!r}; choose one of {', '.join(POOLINGS)}.")
    if batch_size < 1:
        raise RequestError(f"batch_size must be at least 1, got {batch_size}.")
    rows = [tokenizer(text, truncation=max_length is not None, max_length=max_length)["input_ids"] for text in texts]
    for row, ids in enumerate(rows):
        if not len(ids):
            raise RequestError(f"row {row}: {texts[row]!r} has no tokens, so it has no vector; leave it out.")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    backbone = _backbone(model)
    device = model.device
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    vectors: list[torch.Tensor | None] = [None] * len(rows)
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(rows[batch[-1]])
            ids = torch.full((len(batch), width), padding, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch):  # right padding: positions of the text start at 0
                ids[place, : len(rows[row])] = torch.tensor(rows[row])
                mask[place, : len(rows[row])] = 1
            hidden = _hidden_states(backbone, ids.to(device), mask.to(device))
            pooled = _pool(hidden, mask.to(hidden.device), pooling)
            for place, row in enumerate(batch):
                vectors[row] = pooled[place]
    finally:
        for module in training:
            module.training = True
    found = [vector for vector in vectors if vector is not None]
    return torch.stack(found) if found else torch.zeros(0, getattr(model.config, "hidden_size", 0), device=device)


def _backbone(model: Any) -> Any:
    """The part that gives hidden states: no head, no decoder, adapters included."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner.config, "is_encoder_decoder", False):
        return inner.get_encoder()
    return getattr(inner, "base_model", inner)


def _hidden_states(backbone: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    output = backbone(input_ids=ids, attention_mask=mask)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise IncompatibleComponentsError(
            f"{type(backbone).__name__} returns no last_hidden_state; pass a transformers model, or your own encode "
            "function."
        )
    return hidden


def _pool(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    hidden = hidden_BTD.float()
    if pooling == "last":
        last = mask_BT.sum(-1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    return (hidden * mask_BT.unsqueeze(-1)).sum(1) / mask_BT.sum(-1, keepdim=True)
