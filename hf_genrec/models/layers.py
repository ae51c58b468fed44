"""Layers that several models are made of.

Shapes: B batch, T positions, d width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_genrec.models.dropout import PooledDropout


class TransformerBlock(GradientCheckpointingLayer):
    """Causal self-attention and a GELU feed-forward, normalised after each (or before).

    Args:
        config: has `hidden_size`, `num_attention_heads`, `norm_first`, `dropout` and `layer_norm_eps`.
        intermediate_size: width of the feed-forward.
    """

    def __init__(self, config: Any, intermediate_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.norm_first = config.norm_first
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, config.hidden_size)
        self.dropout = PooledDropout(config.dropout)

    def _attend(self, x_BTd: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        batch, length, width = x_BTd.shape
        qkv = self.qkv(x_BTd).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1TT, is_causal=mask_B1TT is None)
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))

    def _transform(self, x_BTd: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x_BTd))))

    def forward(self, x_BTd: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x_BTd = x_BTd + self._attend(self.attention_norm(x_BTd), mask_B1TT)
            return x_BTd + self._transform(self.mlp_norm(x_BTd))
        x_BTd = self.attention_norm(x_BTd + self._attend(x_BTd, mask_B1TT))
        return self.mlp_norm(x_BTd + self._transform(x_BTd))
