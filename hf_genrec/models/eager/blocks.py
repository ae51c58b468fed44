"""Parts of EAGER: a Transformer block that also reads a memory, a stream's decoder, the guide (arXiv 2406.14017).

Shapes: B batch, G targets of a row, Q tokens of a target, S memory positions, H heads, D width of a head, d width,
P targets, l codes of a prefix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_genrec.models.layers import TransformerBlock

from .configuration_eager import EagerConfig

KeysValues = tuple[Tensor, Tensor]


class MemoryBlock(TransformerBlock):
    """Self-attention inside each target, attention to the memory of its row, feed-forward."""

    def __init__(self, config: Any, intermediate_size: int) -> None:
        super().__init__(config, intermediate_size)
        self.memory_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.memory_query = nn.Linear(config.hidden_size, config.hidden_size)
        self.memory_keys_values = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.memory_out = nn.Linear(config.hidden_size, config.hidden_size)

    def _heads(self, x_BXd: Tensor) -> Tensor:
        return x_BXd.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def read_memory(self, memory_BSd: Tensor) -> KeysValues:
        """Keys and values (B, H, S, D) of the memory, made once however many targets read it."""
        keys, values = self.memory_keys_values(memory_BSd).chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    def _recall(self, x_BGQd: Tensor, memory: KeysValues, mask_B1GS: Tensor | None) -> Tensor:
        batch, targets, tokens, width = x_BGQd.shape
        query = self._heads(self.memory_query(x_BGQd.flatten(1, 2)))
        if mask_B1GS is not None and mask_B1GS.shape[2] > 1:  # the tokens of a target see the same memory
            mask_B1GS = mask_B1GS.repeat_interleave(tokens, dim=2)
        mixed = F.scaled_dot_product_attention(query, *memory, attn_mask=mask_B1GS)
        mixed = mixed.transpose(1, 2).reshape(batch, targets, tokens, width)
        return self.dropout(self.memory_out(mixed))

    def decode(
        self, x_BGQd: Tensor, memory: KeysValues, mask_B1GS: Tensor | None = None, own_mask: Tensor | None = None
    ) -> Tensor:
        """States (B, G, Q, d).

        Args:
            memory: of `read_memory`.
            mask_B1GS: which memory each target sees; (B, 1, 1, S) where all targets see the same, None = all.
            own_mask: of the self-attention; None = causal.
        """
        shape = x_BGQd.shape

        def attend(x: Tensor) -> Tensor:
            return self._attend(x.flatten(0, 1), own_mask).view(shape)

        if self.norm_first:
            x = x_BGQd + attend(self.attention_norm(x_BGQd))
            x = x + self._recall(self.memory_norm(x), memory, mask_B1GS)
            return x + self._transform(self.mlp_norm(x))
        x = self.attention_norm(x_BGQd + attend(x_BGQd))
        x = self.memory_norm(x + self._recall(x, memory, mask_B1GS))
        return self.mlp_norm(x + self._transform(x))


class StreamDecoder(nn.Module):
    """Decoder of one stream over [start, code 1, ..., code L, summary]: position l states the code of level l.

    The start token carries the encoder's state at the target. (Attention alone would have to find the newest state by its
    place, which histories longer than those of training do not teach.)
    """

    def __init__(self, config: EagerConfig, levels: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.start = nn.Parameter(torch.zeros(width))
        self.summary = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(levels + 2, width))
        self.layers = nn.ModuleList(
            MemoryBlock(config, config.intermediate_size) for _ in range(config.num_decoder_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()

    def read_memory(self, memory_BSd: Tensor) -> list[KeysValues]:
        """The memory as each layer reads it."""
        return [layer.read_memory(memory_BSd) for layer in self.layers]

    def forward(
        self,
        codes_BGld: Tensor,
        newest_BGd: Tensor,
        memory: list[KeysValues],
        mask_B1GS: Tensor | None,
        summary: bool = False,
    ) -> Tensor:
        """States (B, G, l + 1, d) behind code vectors (B, G, l, d); with `summary` one more, the last.

        Args:
            newest_BGd: the encoder's state at each target, (B, 1, d) where all targets of a row have the same.
        """
        shape = (*codes_BGld.shape[:2], 1, codes_BGld.shape[-1])
        start = (self.start + newest_BGd).unsqueeze(2).expand(shape)
        parts = [start, codes_BGld, *([self.summary.expand(shape)] if summary else [])]
        x = torch.cat(parts, dim=2)
        x = x + self.positions[: x.shape[2]]
        for layer, layer_memory in zip(self.layers, memory, strict=True):
            x = layer.decode(x, layer_memory, mask_B1GS)
        return self.norm(x)


class Guide(nn.Module):
    """What the summary of one stream says about the codes of the other: one bidirectional layer over [verdict, codes].

    The codes are read beside the summary (its only memory): a masked code is to be reconstructed, and a tuple of codes in
    which one was replaced to be recognised.
    """

    def __init__(self, config: EagerConfig, levels: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.verdict = nn.Parameter(torch.zeros(width))
        self.mask = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(levels + 1, width))
        self.project = nn.Linear(width, width)
        self.layer = MemoryBlock(config, config.intermediate_size)
        self.judge = nn.Linear(width, 1)

    def forward(self, codes_Pld: Tensor, summary_Pd: Tensor) -> Tensor:
        """States (P, l + 1, d) of [verdict, codes]."""
        verdict = self.verdict.expand(len(codes_Pld), 1, -1)
        x = torch.cat([verdict, codes_Pld], dim=1) + self.positions
        memory = self.layer.read_memory(self.project(summary_Pd).unsqueeze(1))
        all_see_all = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        return self.layer.decode(x.unsqueeze(1), memory, own_mask=all_see_all).squeeze(1)

    def reconstruct(self, codes_Pld: Tensor, summary_Pd: Tensor, level: int) -> Tensor:
        """States (P, d) in place of the code of one level, which is hidden."""
        hidden = torch.arange(codes_Pld.shape[1], device=codes_Pld.device) == level
        return self(torch.where(hidden[:, None], self.mask, codes_Pld), summary_Pd)[:, level + 1]

    def recognise(self, codes_Pld: Tensor, summary_Pd: Tensor) -> Tensor:
        """Logits (P,): are these the codes of the item that the summary is about?"""
        return self.judge(self(codes_Pld, summary_Pd)[:, 0]).squeeze(-1)
