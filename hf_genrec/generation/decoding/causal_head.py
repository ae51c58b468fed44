"""From a causal language model's last layer to the scores of one level's codes.

Scores are those of `generate`: log_softmax over the full vocabulary in float32, then the level's block of item tokens.
They are made some rows at a time, and only the block is kept. Where the model is a backbone followed by one plain linear
head, the head runs on the rows that are asked for, and where no full-vocabulary total is needed, on the block's rows of
its weight only. Every other model (soft-capped or scaled logits, adapters or hooks on the head) gives its own logits.

Shape legend: B users, K beams, D width, V vocabulary, C codes of the level.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .beam_cache import CodeScores

# Full-vocabulary scores held at a time: rows x tokens. On a CPU such a tile and its part of the head's weight stay in the
# cache (a quarter faster than whole rows); elsewhere 256 MiB of float32.
_ROWS_CPU, _TOKENS_CPU = 512, 1024
_ELEMENTS_DEVICE = 2**26
_FAR = 64.0  # see log_total

_plain: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # model -> logits == head(backbone(...))?


class CausalHead:
    """What is kept of a forward pass (`keep`), and the scores made of it (`scores`).

    Args:
        model: the causal LM, without a PEFT wrapper.
        level_offsets, codebook_sizes: token id of code 0, and number of codes, of each level.
        restrict_to_level: distributions over the level's codes only, instead of the full vocabulary.
    """

    def __init__(
        self, model: Any, level_offsets: Sequence[int], codebook_sizes: Sequence[int], restrict_to_level: bool
    ):
        self.model = model
        self.level_offsets = level_offsets
        self.codebook_sizes = codebook_sizes
        self.restrict_to_level = restrict_to_level

    def block(self, level: int) -> slice:
        start = self.level_offsets[level]
        return slice(start, start + self.codebook_sizes[level])

    def keep(self, output_BKx: torch.Tensor, level: int) -> torch.Tensor:
        """Of the outputs after `level` codes, what `scores` needs: (B, K, something)."""
        raise NotImplementedError

    def scores(self, kept_BKx: torch.Tensor, level: int, total: bool = True) -> CodeScores:
        """Scores of the level's codes; `total` as in `BeamCache.score`."""
        raise NotImplementedError


class OwnLogits(CausalHead):
    """For any model: its own logits, reduced to the level's log-probabilities at once."""

    def keep(self, output_BKx: torch.Tensor, level: int) -> torch.Tensor:
        block = self.block(level)
        if self.restrict_to_level:
            return output_BKx[..., block].float().log_softmax(-1)
        rows = output_BKx.flatten(0, -2)
        parts = []
        for part in rows.split(max(1, _elements(rows) // rows.shape[-1])):
            logits = part.float()
            parts.append(logits[:, block] - log_total(logits).unsqueeze(-1))
        return torch.cat(parts).unflatten(0, output_BKx.shape[:-1])

    def scores(self, kept_BKx: torch.Tensor, level: int, total: bool = True) -> CodeScores:
        return CodeScores(kept_BKx)


class LinearHead(CausalHead):
    """For backbone + linear head: keeps the hidden states (B, K, D), multiplies when the level's scores are asked for."""

    def keep(self, output_BKx: torch.Tensor, level: int) -> torch.Tensor:
        return output_BKx

    def scores(self, kept_BKx: torch.Tensor, level: int, total: bool = True) -> CodeScores:
        head, block = self.model.get_output_embeddings(), self.block(level)
        bias = None if head.bias is None else head.bias[block]
        logits = F.linear(kept_BKx, head.weight[block], bias).float()
        if not total:
            return CodeScores(logits)
        if self.restrict_to_level or logits.shape[-1] == len(head.weight):
            return CodeScores(logits, log_total(logits.flatten(0, -2)).unflatten(0, logits.shape[:-1]))
        return CodeScores(logits, self._log_total(head, kept_BKx))

    def _log_total(self, head: torch.nn.Linear, hidden_BKD: torch.Tensor) -> torch.Tensor:
        """Logarithm of the summed exponentials of all logits, (B, K) float32, tile by tile."""
        rows = hidden_BKD.flatten(0, -2)
        num_rows, num_tokens = _tile(rows, len(head.weight))
        parts = []
        for part in rows.split(num_rows):
            totals = []
            for start in range(0, len(head.weight), num_tokens):
                tokens = slice(start, start + num_tokens)
                bias = None if head.bias is None else head.bias[tokens]
                totals.append(log_total(F.linear(part, head.weight[tokens], bias).float()))
            parts.append(totals[0] if len(totals) == 1 else torch.stack(totals, dim=-1).logsumexp(-1))
        return torch.cat(parts).unflatten(0, hidden_BKD.shape[:-1])


def log_total(logits_RV: torch.Tensor) -> torch.Tensor:
    """`logits_RV.logsumexp(-1)`, (R,). On a CPU by way of log_softmax, which is fused there and takes half the time."""
    if logits_RV.device.type == "cpu" and logits_RV.shape[-1]:
        first = logits_RV.log_softmax(-1)[:, 0]
        if bool((first > -_FAR).all()):  # a first logit far below the others (a masked token) would lose digits
            return logits_RV[:, 0] - first
    return logits_RV.logsumexp(-1)


def _elements(rows: torch.Tensor) -> int:
    return _ROWS_CPU * _TOKENS_CPU if rows.device.type == "cpu" else _ELEMENTS_DEVICE


def _tile(rows: torch.Tensor, num_tokens: int) -> tuple[int, int]:
    if rows.device.type == "cpu":
        return _ROWS_CPU, _TOKENS_CPU
    return max(1, _ELEMENTS_DEVICE // num_tokens), num_tokens


def is_plain_linear(model: Any) -> bool:
    """Are the model's logits exactly `get_output_embeddings()` applied to the last hidden states of its backbone?

    Tried out once per model: its forward runs on one token, with the backbone's output replaced by a known vector long
    enough to show soft-capping, scaling, a hidden bias or a projection in between.
    """
    head, backbone = model.get_output_embeddings(), getattr(model, model.base_model_prefix, None)
    if (
        backbone is None
        or backbone is model
        or type(head) is not torch.nn.Linear  # an adapter or a quantised layer
        or head._forward_hooks
        or head._forward_pre_hooks
        or hasattr(head, "_hf_hook")
    ):
        return False
    if model not in _plain:
        _plain[model] = _try_out(model, backbone, head)
    return _plain[model]


@torch.no_grad()
def _try_out(model: Any, backbone: Any, head: torch.nn.Linear) -> bool:
    weight = head.weight
    probe = torch.linspace(-1.0, 1.0, weight.shape[1], device=weight.device).sin().to(weight.dtype).view(1, 1, -1)
    largest = head(probe).float().abs().max().clamp(min=1e-6)
    probe = probe * (100.0 / largest).to(probe.dtype)  # logits up to 100 in size
    mine = threading.get_ident()  # another thread's forward pass must not see the probe
    replaced = []

    def replace(module: Any, args: Any, output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)
        if threading.get_ident() != mine or hidden is None or hidden.shape != probe.shape:
            return None
        output["last_hidden_state"] = probe.to(hidden.dtype)
        replaced.append(True)
        return output

    handle = backbone.register_forward_hook(replace)
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    expected = head(probe)
    return (
        bool(replaced)
        and logits.shape == expected.shape
        and torch.allclose(logits.float(), expected.float(), rtol=1e-5, atol=1e-5)
    )
