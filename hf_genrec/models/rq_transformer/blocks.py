"""Parts of the RQ-Transformer: depth decoder (arXiv 2203.01941), dense head (2411.18814).

Shapes: B batch, T positions, d width, P positions with a target, l codes chosen so far, L levels, C codes of a level,
N items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_genrec.models.layers import TransformerBlock

from .configuration_rq_transformer import RQTransformerConfig


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
    """Scores the whole catalogue from a state, plus a bias per item (unless `inductive_dense_head`).

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
        self.item_bias = nn.Parameter(torch.zeros(config.num_items)) if not config.inductive_dense_head else None
        self.log_scale = nn.Parameter(torch.zeros(())) if self.cosine else None
        self.repeat_weight = nn.Parameter(torch.zeros(()))

    def forward(self, states_Pd: Tensor, item_vectors_Nd: Tensor) -> Tensor:
        if not self.cosine:
            return F.linear(states_Pd, item_vectors_Nd, self.item_bias)
        query = F.normalize(self.query(states_Pd), dim=-1)
        return F.linear(query * self.log_scale.exp(), F.normalize(item_vectors_Nd, dim=-1), self.item_bias)
