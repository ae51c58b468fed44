"""EAGER's shared encoder: item numbers in, one state per position out; and the catalogue (arXiv 2406.14017).

Shapes: B batch, T items of a window, L levels of all streams, d width, N items, F feature width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.dropout import PooledDropout
from hf_genrec.models.layers import TransformerBlock

from .blocks import Guide, StreamDecoder
from .configuration_eager import EagerConfig
from .streams import StreamTree


class EagerPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of both classes."""

    config_class = EagerConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock", "MemoryBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.embedding_std
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, StreamDecoder | Guide | EagerModel):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=std)
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
            if isinstance(module, EagerModel):  # a position that no training history reaches then says nothing
                init.zeros_(module.position_embedding.weight)


class EagerModel(EagerPreTrainedModel):
    """The shared encoder, the tables of items and codes, and the catalogue: what `AutoModel` gives for a checkpoint."""

    item_codes: Tensor
    item_features: Tensor

    def __init__(self, config: EagerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.code_embedding = nn.Embedding(config.vocab_size, width)
        self.item_embeddings = nn.ModuleList(
            nn.Embedding(max(1, config.num_items), width) for _ in range(config.num_streams)
        )
        self.position_embedding = nn.Embedding(config.max_position_embeddings + 1, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.dropout = PooledDropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(config, config.intermediate_size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
        # the catalogue travels with the weights
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self.register_buffer("item_features", torch.zeros(config.num_items, config.item_feature_dim))
        self._tables: tuple[ItemTrie, list[StreamTree]] | None = None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.code_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.code_embedding = value

    def set_catalogue(self, item_codes: Any, item_features: Any | None = None) -> None:
        """Store the codes (N, L) and the fixed vectors (N, F) of the catalogue.

        Raises:
            IncompatibleComponentsError: a shape differs from the configuration, or codes of different lengths.
        """
        codes = torch.tensor(np.asarray(item_codes)).to(self.item_codes)
        features = self.item_features
        if item_features is not None:
            features = torch.tensor(np.asarray(item_features)).to(self.item_features)
        for name, given, own in (("codes", codes, self.item_codes), ("features", features, self.item_features)):
            if given.shape != own.shape:
                raise IncompatibleComponentsError(
                    f"set_catalogue: item {name} have shape {tuple(given.shape)}, the configuration says "
                    f"{tuple(own.shape)}; build the configuration with from_tokenizer of the same catalogue."
                )
        if bool((codes < 0).any()):
            row = int((codes < 0).any(1).nonzero()[0])
            raise IncompatibleComponentsError(
                f"set_catalogue: item row {row} has fewer than {self.config.num_levels} codes; EAGER reads a fixed number "
                "per item: build the trees with depth or balanced."
            )
        self.item_codes.copy_(codes)
        self.item_features.copy_(features)
        self._tables = None

    def tables(self) -> tuple[ItemTrie, list[StreamTree]]:
        """The catalogue as one trie of whole codes and one tree per stream; made on first use.

        Raises:
            IncompatibleComponentsError: no catalogue.
        """
        config, device = self.config, self.item_codes.device
        if not config.num_items:
            raise IncompatibleComponentsError(
                "the model holds no catalogue: build its configuration with from_tokenizer, and call "
                "set_catalogue(tokenizer.codes, features)."
            )
        if self._tables is None or self._tables[0].device != device:
            codes = self.item_codes.cpu()
            columns = [config.stream_columns(stream) for stream in range(config.num_streams)]
            self._tables = (
                ItemTrie.from_codes(codes, list(config.codebook_sizes)).to(device),
                [
                    StreamTree(codes[:, part], config.codebook_sizes[part], config.level_offsets[part], device)
                    for part in columns
                ],
            )
        return self._tables

    def items(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Catalogue row of every item (B, T), -1 where there is none, and which items are real (B, T) bool.

        Raises:
            IncompatibleComponentsError: tokens that are not whole items.
        """
        levels = self.config.num_levels
        if input_ids.shape[1] % levels:
            raise IncompatibleComponentsError(
                f"{input_ids.shape[1]} tokens are no whole items of {levels} codes: EAGER reads items only, so make the "
                "tokenizer without user tokens and history_eos, and pad by whole items."
            )
        ids_BTL = input_ids.reshape(input_ids.shape[0], input_ids.shape[1] // levels, levels)
        mask_BT = torch.ones_like(ids_BTL[..., 0], dtype=torch.bool)
        if attention_mask is not None:
            mask_BT = attention_mask.reshape(ids_BTL.shape)[..., 0].bool()
        codes_BTL = ids_BTL - torch.tensor(self.config.level_offsets, device=input_ids.device)
        sizes = torch.tensor(self.config.codebook_sizes, device=input_ids.device)
        possible_BT = mask_BT & ((codes_BTL >= 0) & (codes_BTL < sizes)).all(-1)
        trie = self.tables()[0]
        leaf_BT = trie.lookup(torch.where(possible_BT.unsqueeze(-1), codes_BTL, 0))
        return torch.where(possible_BT, trie.first_items(leaf_BT), -1), mask_BT

    def encode(self, rows_BT: Tensor, mask_BT: Tensor, stream: int) -> Tensor:
        """States (B, T + 1, d) of items by catalogue row, read through the table of a stream.

        The state at t has read a start vector and the items before t. Row -1 and padding read as the start vector.
        """
        batch, length = rows_BT.shape
        if length > self.config.max_position_embeddings:
            raise IncompatibleComponentsError(
                f"a history of {length} items exceeds max_position_embeddings={self.config.max_position_embeddings}; "
                "encode with max_items or raise the limit."
            )
        known_BT1 = (rows_BT >= 0).unsqueeze(-1)
        vectors = torch.where(known_BT1, self.item_embeddings[stream](rows_BT.clamp(min=0)), self.start)
        vectors = vectors + self.position_embedding(mask_BT.cumsum(-1))
        start = (self.start + self.position_embedding.weight[0]).expand(batch, 1, -1)
        x = self.dropout(torch.cat([start, vectors], dim=1))
        mask = None
        if length and not bool(mask_BT[:, 0].all()):  # right padding needs none: under causality nothing looks at it
            eye = torch.eye(length + 1, dtype=torch.bool, device=x.device)
            mask = visible_states(mask_BT) | eye
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, stream: int = 0, **kwargs: Any
    ) -> BaseModelOutput:
        """States (B, T + 1, d) of item tokens (B, T * L), read through the table of one stream."""
        return BaseModelOutput(last_hidden_state=self.encode(*self.items(input_ids, attention_mask), stream))


def visible_states(mask_BT: Tensor) -> Tensor:
    """Which of T + 1 states each of T + 1 positions may look at: real ones, up to its own. (B, 1, T + 1, T + 1) bool"""
    size = mask_BT.shape[1] + 1
    causal = torch.ones(size, size, dtype=torch.bool, device=mask_BT.device).tril()
    return causal & F.pad(mask_BT, (1, 0), value=True)[:, None, None, :]
