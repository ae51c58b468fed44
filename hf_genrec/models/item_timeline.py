"""A causal Transformer over whole items: vectors in, one state per position out, whatever an item's vector is made of.

A learned start vector stands before the first item, so the state at position t has read the start and items 0..t-1, and a
user without items has a state too. Left and right padding give the same states.

Shapes: B users, T items of a window, L tokens of an item, d width, W items kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.dropout import PooledDropout
from hf_genrec.models.layers import TransformerBlock


def whole_items(input_ids: Tensor, attention_mask: Tensor | None, levels: int) -> tuple[Tensor, Tensor]:
    """Tokens by item (B, T, L) and which items are real (B, T) bool.

    Raises:
        IncompatibleComponentsError: the tokens are not whole items.

    Example:
        >>> ids, real = whole_items(torch.tensor([[0, 0, 7, 9]]), torch.tensor([[0, 0, 1, 1]]), levels=2)
        >>> ids.tolist(), real.tolist()
        ([[[0, 0], [7, 9]]], [[False, True]])
    """
    batch, length = input_ids.shape
    if length % levels:
        raise IncompatibleComponentsError(
            f"{length} tokens are no whole items of {levels} digits: make the tokenizer without user tokens and "
            "history_eos, and pad by whole items."
        )
    ids_BTL = input_ids.reshape(batch, length // levels, levels)
    if attention_mask is None:
        return ids_BTL, torch.ones_like(ids_BTL[..., 0], dtype=torch.bool)
    return ids_BTL, attention_mask.reshape(ids_BTL.shape)[..., 0].bool()


def newest_items(ids_BTL: Tensor, mask_BT: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The newest `limit` items of each row, moved to the right end whatever the padding side: (B, W, L) and (B, W)."""
    length = mask_BT.shape[1]
    order = torch.argsort(mask_BT.int(), dim=1, stable=True)[:, max(0, length - limit) :]
    return ids_BTL.gather(1, order.unsqueeze(-1).expand(-1, -1, ids_BTL.shape[2])), mask_BT.gather(1, order)


class ItemTimeline(nn.Module):
    """The layers of such a Transformer, for a model to inherit from before `PreTrainedModel`'s own methods are used.

    `build_timeline(config)` makes them (call it in `__init__`), `run_timeline` applies them.
    """

    config: Any

    def build_timeline(self, config: Any) -> None:
        """`config` as for `TransformerBlock`, with `intermediate_size`, `num_hidden_layers`, `max_position_embeddings`."""
        self.position_embedding = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.start = nn.Parameter(torch.zeros(config.hidden_size))
        self.dropout = PooledDropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(config, config.intermediate_size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()

    def run_timeline(self, vectors_BTd: Tensor, mask_BT: Tensor) -> Tensor:
        """States (B, T + 1, d) of item vectors: position t predicts item t, position T the item after the window.

        Raises:
            IncompatibleComponentsError: more items than the model reads.
        """
        batch, length = mask_BT.shape
        if length > self.config.max_position_embeddings:
            raise IncompatibleComponentsError(
                f"a history of {length} items exceeds max_position_embeddings={self.config.max_position_embeddings}; "
                "encode with max_items or raise the limit."
            )
        # padding carries the start vector: a left-padded row predicts its first item from the same state as any other
        vectors = torch.where(mask_BT.unsqueeze(-1), vectors_BTd, self.start)
        vectors = vectors + self.position_embedding(mask_BT.cumsum(-1))
        start = (self.start + self.position_embedding.weight[0]).expand(batch, 1, -1)
        x = self.dropout(torch.cat([start, vectors], dim=1))
        mask = None
        if length and not bool(mask_BT[:, 0].all()):  # right padding needs none: under causality nothing looks at it
            visible = F.pad(mask_BT, (1, 0), value=True)
            causal = torch.ones(length + 1, length + 1, dtype=torch.bool, device=x.device).tril()
            mask = causal & visible[:, None, None, :] | torch.eye(length + 1, dtype=torch.bool, device=x.device)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)
