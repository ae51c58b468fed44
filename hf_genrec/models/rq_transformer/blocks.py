"""Parts of the RQ-Transformer: Transformer block, depth decoder (arXiv 2203.01941), dense head (2411.18814).

Shapes: B batch, T positions, d width, P positions with a target, l codes chosen so far, L levels, C codes of a level,
N items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_genrec.models.dropout import PooledDropout

from .configuration_rq_transformer import RQTransformerConfig


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm block: causal self-attention and a GELU feed-forward, used by timeline and depth decoder alike."""

    def __init__(self, config: RQTransformerConfig, intermediate_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, config.hidden_size)
        self.dropout = PooledDropout(config.dropout)

    def forward(self, x_BTd: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        batch, length, width = x_BTd.shape
        qkv = self.qkv(self.attention_norm(x_BTd)).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1TT, is_causal=mask_B1TT is None)
        x_BTd = x_BTd + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x_BTd + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x_BTd)))))


class DepthDecoder(nn.Module):
    """Causal decoder over the levels of one item: a state and the codes chosen so far give the next level's logits."""

    def __init__(self, config: RQTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.code_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.level_embedding = nn.Parameter(torch.zeros(config.num_levels, config.hidden_size))
        self.layers = nn.ModuleList(
            TransformerBlock(config, config.depth_intermediate_size) for _ in range(config.depth_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.code_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.repeat_weight = nn.Parameter(torch.zeros(config.num_levels))

    def hidden(self, states_Pd: Tensor, prefix_Pl: Tensor) -> Tensor:
        """Hidden vectors (P, l + 1, d) for codes chosen so far `prefix_Pl` (token ids, l of them)."""
        chosen = self.code_embedding(prefix_Pl).cumsum(dim=1)  # RQ: the sum of the codes is the vector so far
        x = torch.cat([torch.zeros_like(states_Pd).unsqueeze(1), chosen], dim=1) + states_Pd.unsqueeze(1)
        x = x + self.level_embedding[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def level_logits(self, hidden_Pd: Tensor, level: int) -> Tensor:
        """Logits over the code block of one level. (P, C)"""
        start = int(self.config.level_offsets[level])
        stop = start + int(self.config.codebook_sizes[level])
        return F.linear(hidden_Pd, self.code_head.weight[start:stop], self.code_head.bias[start:stop])


class DenseHead(nn.Module):
    """Scores the whole catalogue: scaled cosine of a projected state with item vectors, plus a bias per item."""

    def __init__(self, config: RQTransformerConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.feature_projection = (
            nn.Linear(config.item_feature_dim, config.hidden_size) if config.item_feature_dim else None
        )
        self.item_bias = nn.Parameter(torch.zeros(config.num_items))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.repeat_weight = nn.Parameter(torch.zeros(()))

    def forward(self, states_Pd: Tensor, item_vectors_Nd: Tensor) -> Tensor:
        query = F.normalize(self.query(states_Pd), dim=-1)
        items = F.normalize(item_vectors_Nd, dim=-1)
        return F.linear(query * self.log_scale.exp(), items, self.item_bias)
