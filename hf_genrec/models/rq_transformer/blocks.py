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
    """Causal self-attention and a GELU feed-forward, normalised after each (or before), for timeline and depth decoder."""

    def __init__(self, config: RQTransformerConfig, intermediate_size: int) -> None:
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
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
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
    """Scores the whole catalogue from a state, plus a bias per item.

    `dense_similarity="dot"`: inner product with the very vectors that the timeline reads, as SASRec ties input and output;
    `"cosine"`: scaled cosine of a projected state with item vectors of an own feature projection (2411.18814).
    """

    def __init__(self, config: RQTransformerConfig) -> None:
        super().__init__()
        self.cosine = config.dense_similarity == "cosine"
        width = config.hidden_size
        self.query = nn.Linear(width, width) if self.cosine else None
        own = self.cosine and config.item_feature_dim > 0
        self.feature_projection = nn.Linear(config.item_feature_dim, width) if own else None
        self.item_bias = nn.Parameter(torch.zeros(config.num_items))
        self.log_scale = nn.Parameter(torch.zeros(())) if self.cosine else None
        self.repeat_weight = nn.Parameter(torch.zeros(()))

    def forward(self, states_Pd: Tensor, item_vectors_Nd: Tensor) -> Tensor:
        if not self.cosine:
            return F.linear(states_Pd, item_vectors_Nd, self.item_bias)
        query = F.normalize(self.query(states_Pd), dim=-1)
        return F.linear(query * self.log_scale.exp(), F.normalize(item_vectors_Nd, dim=-1), self.item_bias)
