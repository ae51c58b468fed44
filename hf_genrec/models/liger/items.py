"""The items of LIGER: fixed vectors, their projection, and what the encoder reads of an item (arXiv 2411.18814).

Shapes: B users, T items of a history, L levels, S encoder positions, N items, F width of the fixed vectors, M width of
the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.dropout import PooledDropout
from hf_genrec.models.t5_packed import ItemCausalStack

from .configuration_liger import LigerConfig


class Projection(nn.Module):
    """Item vectors (..., F) into the width of the model: hidden layers of Linear, LayerNorm, ReLU, then a linear map."""

    def __init__(self, config: LigerConfig) -> None:
        super().__init__()
        widths = [config.item_feature_dim, *config.projection_sizes]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in zip(widths, config.projection_sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in config.projection_sizes)
        self.out = nn.Linear(widths[-1], config.d_model)
        self.dropout = PooledDropout(config.projection_dropout)

    def forward(self, features: Tensor) -> Tensor:
        x = self.dropout(features)
        for linear, norm in zip(self.hidden, self.norms):
            x = self.dropout(F.relu(norm(linear(x))))
        return self.out(x)

    def init_weights(self) -> None:
        for linear in (*self.hidden, self.out):
            init.normal_(linear.weight, std=linear.in_features**-0.5)
            init.zeros_(linear.bias)
        for norm in self.norms:
            init.ones_(norm.weight)
            init.zeros_(norm.bias)


class Items(nn.Module):
    """The catalogue that travels with the weights, and the vectors of its items."""

    item_codes: Tensor
    item_features: Tensor
    cold_items: Tensor

    def __init__(self, config: LigerConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = Projection(config) if config.item_feature_dim else None
        self.feature_dropout = PooledDropout(config.feature_dropout)
        if config.item_inputs:
            self.slots = nn.Embedding(config.num_levels + 1, config.d_model)
            self.positions = nn.Embedding(config.max_item_positions + 1, config.d_model)
            self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self.register_buffer("item_features", torch.zeros(config.num_items, config.item_feature_dim))
        self.register_buffer("cold_items", torch.zeros(config.num_items, dtype=torch.bool))
        self._trie: ItemTrie | None = None

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights, an empty catalogue."""
        for buffer in (self.item_codes, self.item_features, self.cold_items):
            init.zeros_(buffer)
        if self.projection is not None:
            self.projection.init_weights()
        if self.config.item_inputs:
            init.normal_(self.slots.weight, std=self.config.initializer_factor)
            init.normal_(self.positions.weight, std=self.config.initializer_factor)
            init.ones_(self.norm.weight)
            init.zeros_(self.norm.bias)

    def set_catalogue(self, item_codes: Any, item_features: Any | None = None) -> None:
        """Store codes (N, L), -1 behind the end of a shorter one, and fixed vectors (N, F)."""
        features = torch.zeros(self.item_features.shape) if item_features is None else np.asarray(item_features)
        for name, values in (("item_codes", item_codes), ("item_features", features)):
            buffer = getattr(self, name)
            if tuple(np.shape(values)) != tuple(buffer.shape):
                raise IncompatibleComponentsError(
                    f"set_catalogue: {name} has shape {tuple(np.shape(values))}, the configuration says "
                    f"{tuple(buffer.shape)}; build it with from_tokenizer of the same catalogue, item_feature_dim = the "
                    "width of the vectors."
                )
            buffer.copy_(torch.tensor(np.asarray(values)).to(buffer))
        self.cold_items.zero_()
        self._trie = None

    @property
    def trie(self) -> ItemTrie:
        """The catalogue as a trie, rebuilt after `set_catalogue`, loading or a move."""
        device = self.item_codes.device
        if self._trie is None or self._trie.device != device:
            self._trie = ItemTrie.from_codes(self.item_codes.cpu(), list(self.config.codebook_sizes)).to(device)
        return self._trie

    def rows(self, tokens_XL: Tensor) -> Tensor:
        """Catalogue row of each item (..., L) of token ids (negative = not there); -1 for none, the first of several."""
        offsets = torch.tensor(self.config.level_offsets, device=tokens_XL.device)
        sizes = torch.tensor(self.config.codebook_sizes, device=tokens_XL.device)  # an ended item's code, in a trie
        tokens_XL = F.pad(tokens_XL, (0, len(sizes) - tokens_XL.shape[-1]), value=-1)
        trie = self.trie
        return trie.first_items(trie.lookup(torch.where(tokens_XL < 0, sizes, tokens_XL - offsets)))

    def table(self) -> Tensor:
        """Vectors (N, M) of all items, of length 1."""
        assert self.projection is not None
        return F.normalize(self.projection(self.item_features).float(), dim=-1)

    def embed(self, codes_BSM: Tensor, input_ids_BS: Tensor, numbers_BS: Tensor) -> Tensor:
        """What the encoder reads (B, S, M): code + item vector + item position + slot of the code, normalised."""
        levels_BS = self._levels(input_ids_BS)
        positions_BS = numbers_BS.clamp(max=self.config.max_item_positions)
        x = codes_BSM + self.slots(levels_BS + 1) + self.positions(positions_BS)
        if self.projection is not None and self.config.num_items:
            rows_BT = self._rows_of_history(input_ids_BS, numbers_BS, levels_BS)
            known_BT = rows_BT >= 0
            vectors_PM = self.feature_dropout(self.projection(self.item_features[rows_BT[known_BT]]))
            shape = (*rows_BT.shape, x.shape[-1])
            vectors_BTM = x.new_zeros(shape).masked_scatter(known_BT.unsqueeze(-1), vectors_PM.to(x.dtype))
            vectors_BTM = F.pad(vectors_BTM, (0, 0, 1, 0))  # number 0 is no item
            x = x + vectors_BTM.gather(1, numbers_BS.unsqueeze(-1).expand_as(x))
        return self.norm(x)

    def _levels(self, input_ids_BS: Tensor) -> Tensor:
        """Level of each token, -1 for those that are no codes."""
        levels_BS = torch.full_like(input_ids_BS, -1)
        for level, (offset, size) in enumerate(zip(self.config.level_offsets, self.config.codebook_sizes)):
            levels_BS[(input_ids_BS >= offset) & (input_ids_BS < offset + size)] = level
        return levels_BS

    def _rows_of_history(self, input_ids_BS: Tensor, numbers_BS: Tensor, levels_BS: Tensor) -> Tensor:
        """Catalogue rows (B, T) of the items 1..T of each history, -1 where there is none."""
        items = int(numbers_BS.max()) if numbers_BS.numel() else 0
        tokens_BTL = input_ids_BS.new_full((len(input_ids_BS), items, self.config.num_levels), -1)
        batch, place = ((levels_BS >= 0) & (numbers_BS > 0)).nonzero(as_tuple=True)
        found = (batch, numbers_BS[batch, place] - 1, levels_BS[batch, place])
        tokens_BTL[found] = input_ids_BS[batch, place]
        return self.rows(tokens_BTL).masked_fill(tokens_BTL[..., 0] < 0, -1)


class LigerStack(ItemCausalStack):
    """T5's encoder over item inputs; item-causal with `causal_encoder`, else all tokens see each other."""

    items: Items

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Items):
            module.init_weights()

    @property
    def packs_prefixes(self) -> bool:  # type: ignore[override]
        return self.config.causal_encoder

    def embed_inputs(self, input_ids_BS: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        codes_BSM = self.embed_tokens(input_ids_BS)
        if not self.config.item_inputs:
            return codes_BSM
        return self.items.embed(codes_BSM, input_ids_BS, self.item_numbers(input_ids_BS))

    def visible_tokens(
        self, input_ids_BS: Tensor | None, attention_mask: Tensor | None, item_numbers: Tensor | None = None
    ) -> Tensor | None:
        if not self.config.causal_encoder:
            return None
        return super().visible_tokens(input_ids_BS, attention_mask, item_numbers)
