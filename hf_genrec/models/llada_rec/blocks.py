"""The Transformer layer of LLaDA-Rec: tokens of a history, and groups of codes that read it (arXiv 2511.06254, 2502.09992).

A *group* is the M codes of one item to be filled in: a target of training or a beam of a search. Its codes see each
other in both directions and the history items that its mask shows, never another group. All groups of a user share the
history's keys and values, which exist once. How near an item is to a group moves the attention by a learned amount per
head and distance: positions counted from the first item, as the keys have them, do not tell a group which item is newest.

Shapes: B users, T history items, S = T * M history tokens, G groups, M codes of an item, H heads, D width of a head, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_genrec.models.dropout import PooledDropout

from .configuration_llada_rec import LLaDARecConfig

KeyValue = tuple[Tensor, Tensor]
# Adam moves a parameter by about its learning rate per step; a logit has to travel several units, so it is scaled.
DISTANCE_GAIN = 10.0


def attend_groups(
    query_BHGMD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, bias_BHGS: Tensor, own_key: Tensor, own_value: Tensor
) -> Tensor:
    """One softmax over the history and the group's own codes.

    Args:
        bias_BHGS: added to the history's logits, -inf where a group does not see a token (any axis but S may be 1).
        own_key, own_value: (B, H, G, M, D) of the groups themselves.

    Returns:
        (B, H, G, M, D)
    """
    batch, heads, groups, codes, width = query_BHGMD.shape
    query_BHGMD = query_BHGMD * width**-0.5
    flat_BHQD = query_BHGMD.reshape(batch, heads, groups * codes, width)
    far = (flat_BHQD @ key_BHSD.transpose(-1, -2)).view(batch, heads, groups, codes, -1) + bias_BHGS.unsqueeze(-2)
    own = query_BHGMD @ own_key.transpose(-1, -2)
    weights = torch.cat([far, own], dim=-1).softmax(-1, dtype=torch.float32).to(value_BHSD.dtype)
    far, own = weights.split([key_BHSD.shape[2], codes], dim=-1)
    return (far.flatten(2, 3) @ value_BHSD).view_as(query_BHGMD) + own @ own_value


class LLaDARecLayer(GradientCheckpointingLayer):
    """Self-attention and gated SiLU feed-forward, RMS norm before each, no biases."""

    def __init__(self, config: LLaDARecConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.attention_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.dropout = PooledDropout(config.dropout)
        # by distance 1, 2, ... from a group to an item; zero at the start
        distances = config.max_position_embeddings + 1
        causal = config.history_attention == "causal"
        self.distance_bias = nn.Parameter(torch.zeros(self.num_heads, distances)) if causal else None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value (B, H, ..., D) of x (B, ..., d)."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.unbind(-3)
        return query.movedim(-2, 1), key.movedim(-2, 1), value.movedim(-2, 1)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Residuals and feed-forward; `mixed` (B, H, ..., D) comes from the attention."""
        x = x + self.dropout(self.out(mixed.movedim(1, -2).flatten(-2)))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * up))

    def forward(
        self,
        x_BSd: Tensor,
        mask_B1SS: Tensor,
        groups_BGMd: Tensor | None = None,
        seen_BGT: Tensor | None = None,
        distance_GT: Tensor | None = None,
        need_states: bool = True,
    ) -> tuple[Tensor, Tensor | None, KeyValue]:
        """History tokens and the groups that read them.

        Args:
            x_BSd: history tokens.
            mask_B1SS: True where a token sees another; every token must see one.
            groups_BGMd, seen_BGT, distance_GT: groups, as in `forward_groups`; None = no groups.
            need_states: False leaves the history tokens unchanged: only their keys and values are wanted (last layer).

        Returns:
            The history tokens, the groups, and the history's keys and values (B, H, S, D).
        """
        query, key, value = self._project(x_BSd)
        if groups_BGMd is not None:
            assert seen_BGT is not None and distance_GT is not None
            groups_BGMd = self.forward_groups(groups_BGMd, (key, value), seen_BGT, distance_GT)
        if need_states:
            x_BSd = self._finish(x_BSd, F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1SS))
        return x_BSd, groups_BGMd, (key, value)

    def forward_groups(self, groups_BGMd: Tensor, history: KeyValue, seen_BGT: Tensor, distance_GT: Tensor) -> Tensor:
        """The groups alone, over keys and values that exist already.

        Args:
            seen_BGT: which history items a group sees (G or 1 groups).
            distance_GT: how many items back each item is, 1 = newest (G or 1 groups).
        """
        assert self.distance_bias is not None
        query, key, value = self._project(groups_BGMd)
        farthest = self.distance_bias.shape[1] - 1
        near_HGT = DISTANCE_GAIN * self.distance_bias[:, distance_GT.clamp(0, farthest)]
        bias_BHGT = near_HGT.masked_fill(~seen_BGT.unsqueeze(1), -torch.inf)
        bias_BHGS = bias_BHGT.repeat_interleave(groups_BGMd.shape[2], dim=-1)
        return self._finish(groups_BGMd, attend_groups(query, *history, bias_BHGS, key, value))
