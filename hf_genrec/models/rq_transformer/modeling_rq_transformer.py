"""RQ-Transformer recommender: a causal timeline over items, a small depth decoder over codes (arXiv 2203.01941, 2508.14910).

The timeline Transformer reads one vector per item (sum of its code embeddings, projected fixed features, an optional
free vector) behind a learned start vector, so its state at position t has seen items 0..t-1. The depth decoder turns a
state into the L codes of the next item, one level at a time. Every position of a window is trained at once, which makes
a step 10 to 30 times cheaper per target than one encoder-decoder sample per prefix. A dense head (2411.18814) scores the
whole catalogue from the same state; `RecommendationConfig.dense_weight` fuses both scores over the generated candidates.

Relations: depth decoder alone with one level and no features is SASRec with untied output codes; `dense_head=False,
item_embedding=False, item_feature_dim=0` is the pure semantic-ID model; `learn_repeat_weight=False` removes the
repeat-consumption term, which starts at exactly zero.

Shapes: B batch, T items of a window, S = T * L tokens, L levels, C codes of a level, d width, N items, F features,
P positions with a target, K beams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.dropout import PooledDropout

from .blocks import DenseHead, DepthDecoder, TransformerBlock
from .configuration_rq_transformer import RQTransformerConfig

# Adam moves a parameter by about its learning rate per step; a log-weight has to travel several units, so it is scaled.
REPEAT_GAIN = 10.0


class RQTransformerPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the two classes below."""

    config_class = RQTransformerConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RQTransformerModel):
            # item vectors start small and of one size, whatever they are made of: they are output vectors too
            size = self.config.embedding_std
            init.normal_(module.code_embedding.weight, std=size)
            init.normal_(module.position_embedding.weight, std=size)
            init.normal_(module.start, std=size)
            init.zeros_(module.item_codes)
            init.zeros_(module.item_features)
            init.zeros_(module.cold_items)
            if module.item_embedding is not None:
                init.normal_(module.item_embedding.weight, std=size)
            if module.feature_projection is not None:
                init.normal_(module.feature_projection.weight, std=size / self.config.item_feature_dim**0.5)
        elif isinstance(module, DepthDecoder):
            init.normal_(module.code_embedding.weight, std=0.7)
            init.normal_(module.level_embedding, std=0.02)
            init.normal_(module.code_head.weight, std=0.02)
            init.zeros_(module.code_head.bias)
            init.zeros_(module.repeat_weight)
        elif isinstance(module, DenseHead):
            if module.item_bias is not None:
                init.zeros_(module.item_bias)
            if module.log_scale is not None:
                init.constant_(module.log_scale, 2.3)
            init.zeros_(module.repeat_weight)


class RQTransformerModel(RQTransformerPreTrainedModel):
    """The timeline: item vectors in, one state per position out (the state at t has read the start and items < t)."""

    code_embedding: nn.Module
    item_codes: Tensor
    item_features: Tensor

    def __init__(self, config: RQTransformerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.code_embedding = nn.Embedding(config.vocab_size, width, padding_idx=None)
        self.position_embedding = nn.Embedding(config.max_position_embeddings + 1, width)
        self.start = nn.Parameter(torch.zeros(width))
        has_items = config.num_items > 0
        self.item_embedding = nn.Embedding(config.num_items, width) if has_items and config.item_embedding else None
        self.feature_projection = nn.Linear(config.item_feature_dim, width) if config.item_feature_dim else None
        self.feature_dropout = PooledDropout(config.feature_dropout)
        self.input_dropout = PooledDropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerBlock(config, config.intermediate_size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
        # the catalogue travels with the weights: codes to find an item's row, features as fixed inputs
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self.register_buffer("item_features", torch.zeros(config.num_items, config.item_feature_dim))
        cold = torch.zeros(config.num_items, dtype=torch.bool)
        self.register_buffer("cold_items", cold, persistent=config.inductive_dense_head)
        self._tables: tuple[ItemTrie, Tensor, Tensor] | None = None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.code_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.code_embedding = value

    def set_catalogue(self, item_codes: Any, item_features: Any | None = None) -> None:
        """Store the codes (N, L) and the fixed feature vectors (N, F) of the catalogue.

        Raises:
            IncompatibleComponentsError: when a shape differs from the configuration.
        """
        codes = torch.tensor(np.asarray(item_codes)).to(self.item_codes)
        if codes.shape != self.item_codes.shape:
            raise IncompatibleComponentsError(
                f"set_catalogue: item_codes has shape {tuple(codes.shape)}, the configuration says "
                f"{tuple(self.item_codes.shape)}; build the configuration with from_tokenizer of the same catalogue."
            )
        self.item_codes.copy_(codes)
        self._tables = None
        features = (
            torch.zeros_like(self.item_features) if item_features is None else torch.tensor(np.asarray(item_features))
        )
        if features.shape != self.item_features.shape:
            raise IncompatibleComponentsError(
                f"set_catalogue: item_features has shape {tuple(features.shape)}, the configuration says "
                f"{tuple(self.item_features.shape)}; set item_feature_dim={features.shape[-1]}."
            )
        self.item_features.copy_(features.to(self.item_features))

    @property
    def trie(self) -> ItemTrie:
        """The catalogue as a trie, rebuilt after `set_catalogue` or loading."""
        return self._catalogue_tables()[0]

    def _catalogue_tables(self) -> tuple[ItemTrie, Tensor, Tensor]:
        """The trie, the trie node (N, L) of every item at levels 1..L and 1 / (items below that node) (N, L)."""
        device = self.item_codes.device
        if self._tables is None or self._tables[1].device != device:
            trie = ItemTrie.from_codes(self.item_codes.cpu(), list(self.config.codebook_sizes)).to(device)
            node, nodes, shares = torch.zeros(self.config.num_items, dtype=torch.long, device=device), [], []
            for level in range(self.config.num_levels):
                node = trie.step(level, node, self.item_codes[:, level].long())
                nodes.append(node)
                shares.append(1.0 / torch.bincount(node)[node])
            self._tables = trie, torch.stack(nodes, dim=-1), torch.stack(shares, dim=-1)
        return self._tables

    def item_rows(self, codes_BTL: Tensor) -> Tensor:
        """Catalogue row of every item (the first one where several share a code), -1 for none. (B, T)"""
        trie = self.trie
        leaf = trie.lookup(codes_BTL)
        return trie.first_items(leaf)

    def projected_features(self) -> Tensor:
        """The catalogue's fixed features in the width of the model, with their own dropout. (N, d)"""
        return self.feature_dropout(self.feature_projection(self.item_features))

    def item_vectors(self, input_ids_BTL: Tensor, rows_BT: Tensor | None) -> Tensor:
        """One vector per item: sum of code embeddings, plus projected features, plus the free vector. (B, T, d)"""
        shape = input_ids_BTL.shape
        vectors = F.embedding_bag(input_ids_BTL.reshape(-1, shape[-1]), self.code_embedding.weight, mode="sum")
        vectors = vectors.view(*shape[:-1], self.config.hidden_size)
        if rows_BT is None:
            return vectors
        known = (rows_BT >= 0).unsqueeze(-1)
        safe = rows_BT.clamp(min=0)
        if self.feature_projection is not None:
            vectors = vectors + torch.where(known, F.embedding(safe, self.projected_features()), 0)
        if self.item_embedding is not None:
            vectors = vectors + torch.where(known, self.item_embedding(safe), 0)
        return vectors

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        item_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """States of all positions.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side by whole items.
            attention_mask: (B, T * L), 1 = token, 0 = padding.

        Returns:
            `last_hidden_state` (B, T + 1, d): position t predicts item t, position T the item after the window.
        """
        levels = self.config.num_levels
        ids_BTL = input_ids.reshape(input_ids.shape[0], input_ids.shape[1] // levels, levels)
        batch, length = ids_BTL.shape[:2]
        if length > self.config.max_position_embeddings:
            raise IncompatibleComponentsError(
                f"a history of {length} items exceeds max_position_embeddings={self.config.max_position_embeddings}; "
                "encode with max_items or raise the limit."
            )
        mask_BT = (
            torch.ones_like(ids_BTL[..., 0]) if attention_mask is None else attention_mask.view_as(ids_BTL)[..., 0]
        )
        # padding carries the start vector: a left-padded row predicts its first item from the same state as any other
        vectors = torch.where(mask_BT.bool().unsqueeze(-1), self.item_vectors(ids_BTL, item_rows), self.start)
        positions_BT = mask_BT.cumsum(-1).clamp(max=self.config.max_position_embeddings)
        vectors = vectors + self.position_embedding(positions_BT)
        start = (self.start + self.position_embedding.weight[0]).expand(batch, 1, -1)
        x = self.input_dropout(torch.cat([start, vectors], dim=1))
        left_padded = length > 0 and not bool(mask_BT[:, 0].all())
        mask = None
        if left_padded:  # right padding needs no mask: under causality nothing real looks at it
            visible = F.pad(mask_BT.bool(), (1, 0), value=True)
            causal = torch.ones(length + 1, length + 1, dtype=torch.bool, device=x.device).tril()
            mask = causal & visible[:, None, None, :] | torch.eye(length + 1, dtype=torch.bool, device=x.device)
        for layer in self.layers:
            x = layer(x, mask)
        return BaseModelOutput(last_hidden_state=self.norm(x))


@dataclass
class RQTransformerOutput(CausalLMOutput):
    """Output of [`RQTransformerForCausalLM`]: `loss` = code loss + weighted dense loss, both per target item.

    `logits` (B, S, V) are full-vocabulary next-token logits (codes outside the level at finfo.min); only without labels.
    """

    code_loss: Tensor | None = None
    dense_loss: Tensor | None = None


@dataclass
class TimelineState:
    """What `start_decoding` keeps per user: the newest state and the history for the repeat term."""

    state_Bd: Tensor
    rows_BT: Tensor  # catalogue row of every history item, -1 = padding or unknown
    first_BT: Tensor  # True at the first occurrence of a known item


class RQTransformerForCausalLM(RecommendationMixin, RQTransformerPreTrainedModel, GenerationMixin):
    """Generative recommender: timeline + depth decoder, with an optional dense head over the catalogue."""

    def __init__(self, config: RQTransformerConfig) -> None:
        super().__init__(config)
        self.model = RQTransformerModel(config)
        self.depth = DepthDecoder(config)
        self.dense = DenseHead(config) if config.dense_head and config.num_items else None
        self.post_init()

    @property
    def codes_trie(self) -> ItemTrie:
        return self.model.trie

    def set_catalogue(self, item_codes: Any, item_features: Any | None = None) -> None:
        """See [`RQTransformerModel.set_catalogue`]."""
        self.model.set_catalogue(item_codes, item_features)

    @property
    def cold_items(self) -> Tensor | None:
        """Items (N,) that training never saw, where the model keeps account of them (`inductive_dense_head`)."""
        return self.model.cold_items if self.config.inductive_dense_head else None

    @torch.no_grad()
    def prepare_training(self, train_counts_N: Any) -> list[Any]:
        """Called by `train_recommender`: notes which items never occur in training and takes their free vectors away."""
        if self.config.inductive_dense_head:
            cold_N = torch.as_tensor(np.asarray(train_counts_N) == 0)
            self.model.cold_items.copy_(cold_N)
            if self.model.item_embedding is not None:
                self.model.item_embedding.weight[self.model.cold_items] = 0.0
        return []

    # -- shared pieces --------------------------------------------------------------------------------------------

    def _codes(self, ids_BTL: Tensor, mask_BT: Tensor) -> Tensor:
        offsets = torch.as_tensor(list(self.config.level_offsets), device=ids_BTL.device)
        return torch.where(mask_BT.bool().unsqueeze(-1), ids_BTL - offsets, -1)

    def _history(self, codes_BTL: Tensor) -> tuple[Tensor, Tensor]:
        """Catalogue rows (B, T), -1 = none, and first-occurrence flags (B, T) of the items of a window."""
        if not self.config.num_items:
            none = torch.full_like(codes_BTL[..., 0], -1)
            return none, none >= 0
        rows = self.model.item_rows(codes_BTL)
        same = (rows.unsqueeze(-1) == rows.unsqueeze(-2)).tril(-1)
        return rows, (rows >= 0) & ~same.any(-1)

    def _repeat_logits(self, level: int, below_PT: Tensor, rows_PT: Tensor) -> Tensor:
        """Log-factor (P, C) of the level's codes when a seen item is exp(a) times as likely as an unseen one.

        `below_PT` marks the history items (catalogue rows `rows_PT`) under the prefix chosen so far. The factor of a node
        of whose items a share s was seen is log(1 - s + s exp(a)): exact when the items below a node are equally
        likely, 0 when a = 0, a for a seen leaf.
        """
        _, _, share_NL = self.model._catalogue_tables()
        rows_PT = rows_PT.clamp(min=0)
        share = self.depth.repeat_weight.new_zeros(rows_PT.shape[0], int(self.config.codebook_sizes[level]))
        share.scatter_add_(1, self.model.item_codes[:, level].long()[rows_PT], below_PT * share_NL[:, level][rows_PT])
        return self._repeat_factor(level, share)

    def _repeat_factor(self, level: int, share: Tensor) -> Tensor:
        weight = torch.expm1(REPEAT_GAIN * self.depth.repeat_weight[level]).clamp(min=1e-6 - 1)
        return torch.log1p(share.clamp(max=1) * weight)

    # -- training and plain forward -------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> RQTransformerOutput:
        """Loss over all positions, or next-token logits.

        Args:
            input_ids: (B, S) item tokens; with labels S = T * L, without labels the last item may be incomplete.
            labels: (B, T * L), -100 = no target; aligned with `input_ids` (an item is predicted from those before it).
            num_items_in_batch: label tokens of the whole optimiser step, for exact gradient accumulation.
            logits_to_keep: without labels, only the last so many positions (0 = all).
        """
        if labels is None:
            return RQTransformerOutput(logits=self._token_logits(input_ids, attention_mask, logits_to_keep))
        levels = self.config.num_levels
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids_BTL = input_ids.reshape(input_ids.shape[0], input_ids.shape[1] // levels, levels)
        mask_BT = mask.view_as(ids_BTL)[..., 0]
        rows_BT, first_BT = self._history(self._codes(ids_BTL, mask_BT))
        # the last item is only a target, so the timeline reads T - 1 items and gives T states
        states = self.model(
            ids_BTL[:, :-1].flatten(1), mask.view_as(ids_BTL)[:, :-1].flatten(1), item_rows=rows_BT[:, :-1]
        ).last_hidden_state
        target_BT = labels.view_as(ids_BTL)[..., 0] != -100
        batch_P, position_P = target_BT.nonzero(as_tuple=True)
        states_Pd, ids_PL = states[batch_P, position_P], ids_BTL[batch_P, position_P]
        earlier_PT = None
        if self.config.learn_repeat_weight and self.config.num_items:
            columns = torch.arange(ids_BTL.shape[1], device=input_ids.device)
            earlier_PT = (columns < position_P.unsqueeze(-1)) & first_BT[batch_P]
        code_nll = self._code_nll(states_Pd, ids_PL, rows_BT, batch_P, position_P, earlier_PT)
        count = target_BT.sum() if num_items_in_batch is None else num_items_in_batch / levels
        code_loss = code_nll.sum() / count
        loss, dense_loss = code_loss, None
        if self.dense is not None:
            dense_loss = self._dense_nll(states_Pd, rows_BT, batch_P, position_P, earlier_PT).sum() / count
            loss = loss + self.config.dense_loss_weight * dense_loss
        return RQTransformerOutput(loss=loss, code_loss=code_loss.detach(), dense_loss=dense_loss)

    def _code_nll(
        self,
        states_Pd: Tensor,
        ids_PL: Tensor,
        rows_BT: Tensor,
        batch_P: Tensor,
        position_P: Tensor,
        earlier_PT: Tensor | None,
    ) -> Tensor:
        hidden_PLd = self.depth.hidden(states_Pd, ids_PL[:, :-1])
        total = states_Pd.new_zeros(())
        for level in range(self.config.num_levels):
            logits = self.depth.level_logits(hidden_PLd[:, level], level)
            if earlier_PT is not None:
                below_PT, rows_PT = earlier_PT, rows_BT[batch_P]
                if level:
                    prefix_BT = self.model._catalogue_tables()[1][:, level - 1][rows_BT.clamp(min=0)]
                    below_PT = below_PT & (prefix_BT[batch_P] == prefix_BT[batch_P, position_P].unsqueeze(-1))
                logits = logits + self._repeat_logits(level, below_PT, rows_PT)
            target = ids_PL[:, level] - int(self.config.level_offsets[level])
            total = total + F.cross_entropy(logits.float(), target, reduction="none")
        return total

    def _item_vectors(self) -> Tensor:
        """Vectors of the catalogue for the dense head, from the same code table as the input. (N, d)"""
        assert self.dense is not None
        ids = self.model.item_codes.long() + torch.as_tensor(
            list(self.config.level_offsets), device=self.model.item_codes.device
        )
        vectors = F.embedding_bag(ids, self.model.code_embedding.weight, mode="sum")
        if self.dense.feature_projection is not None:
            vectors = vectors + self.dense.feature_projection(self.model.item_features)
        elif self.model.feature_projection is not None:
            vectors = vectors + self.model.projected_features()
        if self.model.item_embedding is not None and not self.config.inductive_dense_head:
            vectors = vectors + self.model.item_embedding.weight
        return vectors

    def _dense_nll(
        self, states_Pd: Tensor, rows_BT: Tensor, batch_P: Tensor, position_P: Tensor, earlier_PT: Tensor | None
    ) -> Tensor:
        assert self.dense is not None
        logits = self.dense(states_Pd, self._item_vectors())
        if earlier_PT is not None:
            rows_PT = rows_BT[batch_P].clamp(min=0)
            logits = logits.scatter_add(1, rows_PT, earlier_PT * (REPEAT_GAIN * self.dense.repeat_weight))
        target = rows_BT[batch_P, position_P]
        if self.config.inductive_dense_head:
            out_PN = self.model.cold_items.expand_as(logits).scatter(1, target.clamp(min=0).unsqueeze(1), False)
            logits = logits.masked_fill(out_PN, -torch.inf)
        return F.cross_entropy(logits.float(), target.where(target >= 0, torch.tensor(-100)), reduction="none")

    def _token_logits(self, input_ids: Tensor, attention_mask: Tensor | None, keep: int) -> Tensor:
        """Next-token logits (B, S or keep, V): position s predicts token s + 1, codes outside its level at finfo.min."""
        levels, batch, length = self.config.num_levels, *input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        dtype = self.depth.code_head.weight.dtype
        first = length - keep if keep else 0
        logits = torch.full(
            (batch, length - first, self.config.vocab_size),
            torch.finfo(dtype).min,
            dtype=dtype,
            device=input_ids.device,
        )
        state, offsets = None, torch.as_tensor(list(self.config.level_offsets), device=input_ids.device)
        for position in range(first, length):
            item, level = divmod(position + 1, levels)  # of the predicted token
            if state is None or level == 0:
                state = self.start_decoding(input_ids[:, : item * levels], mask[:, : item * levels])
            prefix = (input_ids[:, item * levels : position + 1] - offsets[:level]).unsqueeze(1)
            start, size = int(self.config.level_offsets[level]), int(self.config.codebook_sizes[level])
            scores = self.score_codes(state, prefix.clamp(min=0), level)[:, 0]
            logits[:, position - first, start : start + size] = scores.to(dtype)
        return logits

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`generate` passes the whole sequence each step: the reference path, `recommend` is the fast one."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    # -- recommendation -------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> TimelineState:
        """Read the histories once: B rows, whatever the number of beams."""
        levels = self.config.num_levels
        ids_BTL = input_ids.reshape(input_ids.shape[0], input_ids.shape[1] // levels, levels)
        mask_BT = (
            torch.ones_like(ids_BTL[..., 0]) if attention_mask is None else attention_mask.view_as(ids_BTL)[..., 0]
        )
        rows, first = self._history(self._codes(ids_BTL, mask_BT))
        # the newest items that fit, moved to the right end whatever the padding side
        newest = min(self.config.max_position_embeddings, ids_BTL.shape[1])
        order = torch.argsort(mask_BT.bool().int(), dim=1, stable=True)[:, ids_BTL.shape[1] - newest :]
        recent_ids = ids_BTL.gather(1, order.unsqueeze(-1).expand(-1, -1, levels))
        recent_mask = mask_BT.gather(1, order).unsqueeze(-1).expand(-1, -1, levels)
        states = self.model(recent_ids.flatten(1), recent_mask.flatten(1), item_rows=rows.gather(1, order))
        return TimelineState(states.last_hidden_state[:, -1], rows, first)

    def score_codes(self, state: TimelineState, prefix_codes: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, C) of the codes of `level` behind the prefixes (B, K, level)."""
        batch, beams = prefix_codes.shape[:2]
        offsets = torch.as_tensor(list(self.config.level_offsets)[:level], device=prefix_codes.device, dtype=torch.long)
        prefix_ids = (prefix_codes + offsets).view(batch * beams, level)
        states_Pd = state.state_Bd.unsqueeze(1).expand(-1, beams, -1).reshape(batch * beams, -1)
        logits = self.depth.level_logits(self.depth.hidden(states_Pd, prefix_ids)[:, -1], level)
        if self.config.learn_repeat_weight and self.config.num_items and state.rows_BT.shape[1]:
            logits = logits + self._repeat_logits_of_beams(state, prefix_codes, level)
        return logits.float().log_softmax(-1).view(batch, beams, -1)

    def _repeat_logits_of_beams(self, state: TimelineState, prefix_BKl: Tensor, level: int) -> Tensor:
        """The repeat term (B * K, C) of all beams: by history items for few beams, by trie nodes for many."""
        batch, beams = prefix_BKl.shape[:2]
        trie, nodes_NL, share_NL = self.model._catalogue_tables()
        rows_BT = state.rows_BT.clamp(min=0)
        prefix_BK = trie.lookup(prefix_BKl)
        if beams * rows_BT.shape[1] <= trie.num_nodes(level + 1):
            below_BKT = state.first_BT.unsqueeze(1).expand(-1, beams, -1)
            if level:
                own_BT = nodes_NL[:, level - 1][rows_BT]
                below_BKT = below_BKT & (own_BT.unsqueeze(1) == prefix_BK.unsqueeze(-1))
            rows_BKT = rows_BT.unsqueeze(1).expand(-1, beams, -1)
            return self._repeat_logits(level, below_BKT.flatten(0, 1), rows_BKT.flatten(0, 1))
        seen = torch.zeros(batch, trie.num_nodes(level + 1), device=rows_BT.device, dtype=share_NL.dtype)
        seen.scatter_add_(1, nodes_NL[:, level][rows_BT], state.first_BT * share_NL[:, level][rows_BT])
        codes_BKW, children_BKW, valid_BKW = trie.expand(level, prefix_BK)
        share_BKW = seen.gather(1, children_BKW.flatten(1)).view_as(children_BKW) * valid_BKW
        share = seen.new_zeros(batch, beams, int(self.config.codebook_sizes[level])).scatter_add_(
            2, codes_BKW, share_BKW
        )
        return self._repeat_factor(level, share).flatten(0, 1)

    def score_dense(self, state: TimelineState) -> Tensor | None:
        """Log-probabilities (B, N) of the dense head, None without one."""
        if self.dense is None:
            return None
        logits = self.dense(state.state_Bd, self._item_vectors())
        if self.config.learn_repeat_weight:
            logits = logits.scatter_add(
                1, state.rows_BT.clamp(min=0), state.first_BT * (REPEAT_GAIN * self.dense.repeat_weight)
            )
        return logits.float().log_softmax(-1)

    def rescore_items(self, state: TimelineState, items_BK: Tensor, scores_BK: Tensor, config: Any) -> Tensor:
        """(1 - w) generated + w dense log-probability of the candidates, w = `config.dense_weight`."""
        weight = float(config.dense_weight)
        if weight == 0.0 or self.dense is None:
            return scores_BK
        scores_BN = self.score_dense(state)
        assert scores_BN is not None
        dense = scores_BN.gather(1, items_BK.clamp(min=0)).to(scores_BK.dtype)
        return (1.0 - weight) * scores_BK + weight * dense
