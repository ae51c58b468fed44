"""The layers of a T5-family model (T5, mT5, umT5) as plain functions, and its encoder.

Projections are the model's own modules, or the same product with their live weights; the code between them (residual
blocks, norms, relative position bias, masks) is written out here. `runs_as_written` says whether a model's own code is
what this stands in for.

Shape legend: B users, S encoder positions, H heads, D width of a head, M width of the model, P positions so far.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

FAMILY = frozenset(f"transformers.models.{name}.modeling_{name}" for name in ("t5", "mt5", "umt5"))
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_ONEDNN_ROWS = 128  # from here on oneDNN multiplies faster than the BLAS behind torch.mm, by 5 to 20 percent


def runs_as_written(model: Any) -> bool:
    """Is the code that this engine replaces the family's own: no subclass, no hook, no patched forward?

    A subclass that says `family_engine = True` differs from the family in nothing but what `encode` asks it.
    """
    return all(
        (type(module).__module__ in FAMILY or getattr(type(module), "family_engine", False))
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        for module in _replaced_modules(model)
    )


def _replaced_modules(model: Any) -> Iterator[nn.Module]:
    for stack in (model.encoder, model.decoder):
        yield stack
        for block in stack.block:
            yield block
            for part in block.layer:
                yield part
                for name in ("SelfAttention", "EncDecAttention", "DenseReluDense"):
                    if hasattr(part, name):
                        yield getattr(part, name)


class Attention(NamedTuple):
    norm: nn.Module
    q: Callable[[torch.Tensor], torch.Tensor]
    k: Callable[[torch.Tensor], torch.Tensor]
    v: Callable[[torch.Tensor], torch.Tensor]
    o: Callable[[torch.Tensor], torch.Tensor]
    heads: int
    width: int
    bias: Any  # the attention module where the layer holds a table of relative positions


class Layer(NamedTuple):
    own: Attention
    cross: Attention | None  # of decoders
    norm: nn.Module  # before the feed-forward
    wi: Callable[[torch.Tensor], torch.Tensor]
    wi_linear: Callable[[torch.Tensor], torch.Tensor] | None  # of gated feed-forwards
    wo: Callable[[torch.Tensor], torch.Tensor]
    act: Callable[[torch.Tensor], torch.Tensor]
    wo_dtype: torch.dtype | None  # of its weights: the family may keep this product in float32 where others are not
    has_own_bias: bool  # every layer of the stack holds a table of relative positions (umT5)


def layers_of(stack: Any) -> list[Layer]:
    layers = []
    for block in stack.block:
        first, last = block.layer[0], block.layer[-1]
        cross = block.layer[1] if len(block.layer) == 3 else None
        dense = last.DenseReluDense
        gated = hasattr(dense, "wi_1")
        wi, wo_weight = dense.wi_0 if gated else dense.wi, getattr(dense.wo, "weight", None)
        plain = _linear(wi) is not wi  # nobody else holds its output
        layers.append(
            Layer(
                _attention_of(first.SelfAttention, first.layer_norm),
                None if cross is None else _attention_of(cross.EncDecAttention, cross.layer_norm),
                last.layer_norm,
                _linear(wi),
                _linear(dense.wi_1) if gated else None,
                _linear(dense.wo),
                torch.relu_ if plain and type(dense.act) is nn.ReLU else dense.act,
                wo_weight.dtype if isinstance(wo_weight, torch.Tensor) and wo_weight.dtype != torch.int8 else None,
                type(first).__name__ == "UMT5LayerSelfAttention",
            )
        )
    return layers


def _attention_of(attention: Any, norm: nn.Module) -> Attention:
    return Attention(
        norm,
        _linear(attention.q),
        _linear(attention.k),
        _linear(attention.v),
        _linear(attention.o),
        attention.n_heads,
        attention.key_value_proj_dim,
        attention if attention.has_relative_attention_bias else None,
    )


def _linear(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product with a layer's live weights: the module itself, or a shorter way to the same."""
    if (
        type(module) is not nn.Linear
        or module.bias is not None
        or module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or torch.is_grad_enabled()
    ):
        return module
    weight = module.weight
    if not _ONEDNN or weight.dtype != torch.float32 or weight.device.type != "cpu" or not weight.is_contiguous():
        return functools.partial(_times, weight)
    return functools.partial(_times_onednn, weight)


def _times(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, weight)


def _times_onednn(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if x.numel() < _ONEDNN_ROWS * weight.shape[1]:
        return nn.functional.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def encode(stack: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Encoder states (B, S, M); mask None = no padding.

    A stack may have its own `embed_inputs(input_ids, attention_mask)` -> (B, S, M), and `visible_tokens(input_ids,
    attention_mask)` -> boolean (B, S, S), who may see whom (None: everybody).
    """
    batch, length = input_ids.shape
    if hasattr(stack, "embed_inputs"):
        x = stack.embed_inputs(input_ids, attention_mask).reshape(batch * length, -1)
    else:
        x = stack.embed_tokens(input_ids).view(batch * length, -1)
    visible = attention_mask
    if hasattr(stack, "visible_tokens"):
        visible_BSS = stack.visible_tokens(input_ids, attention_mask)
        visible = attention_mask if visible_BSS is None else visible_BSS
    bias = None
    for layer in layers_of(stack):
        attention = layer.own
        shape = (batch, length, attention.heads, attention.width)
        normed = norm(attention.norm, x)
        query = attention.q(normed).view(shape).transpose(1, 2)
        key = attention.k(normed).view(shape).transpose(1, 2)
        value = attention.v(normed).view(shape).transpose(1, 2)
        if attention.bias is not None:
            bias = _encoder_bias(attention.bias, length, query, visible)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        x = clamped(x + attention.o(mixed.transpose(1, 2).reshape(batch * length, -1)))
        x = clamped(feed_forward(layer, x))
    return norm(stack.final_layer_norm, x).view(batch, length, -1)


def norm(layer_norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = layer_norm.weight
    if x.dtype == torch.float32 == weight.dtype and type(layer_norm).__module__ in FAMILY:
        return rms_norm(x, weight.shape, weight, layer_norm.variance_epsilon)  # type: ignore[arg-type]
    return layer_norm(x)  # half precision: the module knows where it rounds


def feed_forward(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """The layer's residual block, (rows, M) -> (rows, M)."""
    normed = norm(layer.norm, x)
    wide = layer.act(layer.wi(normed))
    if layer.wi_linear is not None:
        wide = wide * layer.wi_linear(normed)
    if layer.wo_dtype is not None and layer.wo_dtype != wide.dtype:
        wide = wide.to(layer.wo_dtype)
    return x + layer.wo(wide)


def clamped(x: torch.Tensor) -> torch.Tensor:
    """In float16, keep an overflow finite as the family does."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    bound = torch.where(x.isinf().any(), largest - 1000, largest)
    return x.clamp(min=-bound, max=bound)


@functools.lru_cache(maxsize=64)
def _buckets(length: int, two_sided: bool, count: int, farthest: int, device: torch.device) -> torch.Tensor:
    """Bucket of each distance (key position - query position) from 1 - length to length - 1 (one-sided: to 0).

    Near distances have a bucket each, farther ones share buckets that widen with the logarithm (arXiv 1910.10683).
    """
    distance = torch.arange(1 - length, length if two_sided else 1, device=device)
    buckets = torch.zeros_like(distance)
    if two_sided:
        count //= 2
        buckets = (distance > 0).long() * count
    distance = distance.abs()
    near = count // 2
    far = near + (torch.log(distance.float() / near) / math.log(farthest / near) * (count - near)).long()
    return buckets + torch.where(distance < near, distance, far.clamp(max=count - 1))


def _bias_by_distance(attention: Any, length: int, device: torch.device) -> torch.Tensor:
    buckets = _buckets(
        length,
        not attention.is_decoder,
        attention.relative_attention_num_buckets,
        attention.relative_attention_max_distance,
        device,
    )
    return attention.relative_attention_bias(buckets)


def _encoder_bias(attention: Any, length: int, query: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Additive mask (B, H, S, S), or (1, H, S, S) where all is visible; `visible` is (B, S) or (B, S, S)."""
    by_distance = _bias_by_distance(attention, length, query.device).to(query.dtype)
    # row i reads the window of distances -i .. S - 1 - i
    bias = by_distance.t().unfold(-1, length, 1).flip(1).unsqueeze(0)
    if visible is None:
        return bias
    hidden = ~visible.bool()
    hidden = hidden[:, None, None] if hidden.dim() == 2 else hidden.unsqueeze(1)
    return bias.masked_fill(hidden, torch.finfo(bias.dtype).min)


def decoder_bias(attention: Any, length: int, device: torch.device) -> torch.Tensor:
    """Bias of the last of `length` positions, as (P, 1, 1, H), float32."""
    return _bias_by_distance(attention, length, device).float()[:, None, None]
