"""SETRec: an item is an unordered set of continuous tokens, and queries find all of them at once (arXiv 2502.10833).

The identifier is no code: an item is one collaborative token and n - 1 semantic ones, vectors that the model makes from the
item's fixed features (`set_catalogue`), so two items never collide and nothing is spelled out. The `ItemTokenizer` carries
one code per item, which only says *which* item it is.

The Transformer reads the tokens of the history; those of one item share its position and do not see each other. Where an
item is to be predicted stand n learned queries, one for each kind of token. They share the position too, see the history
and not each other, so one pass predicts all tokens, for all positions of a window. A query's state is compared with the
tokens of its kind of *all* items: the loss is the mean over the queries of the cross-entropy + `reconstruction_weight` *
the autoencoder's error. An item's score is (1 - b) * collaborative + b * sum of the semantic products, b =
`config.semantic_weight`: chosen on the validation part (`training.method: tuned_next_item`), never by a search over tokens.

One stack of layers stands for the paper's encoder and decoder (as in its decoder-only variant), with learned positions.

Relations: `num_semantic_tokens=0` is the collaborative token alone (a SASRec whose item vectors are a linear map of fixed
ones, read out by a query); `semantic_weight=0` leaves the semantic products out of the score.

Shapes: B users, T items of a window, Q places of queries, n tokens of an item, N items, F width of the item vectors, d width
of the model, P positions with a target, K beams, V vocabulary.
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
from hf_genrec.models.dropout import PooledDropout
from hf_genrec.models.item_timeline import newest_items

from .blocks import SetBlock, SetTokens, TokenLinear
from .configuration_setrec import SETRecConfig


class SETRecPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the two classes below."""

    config_class = SETRecConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["SetBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            std = module.start_std if isinstance(module, TokenLinear) else self.config.initializer_range
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.embedding_std)
        elif isinstance(module, SETRecModel):
            init.zeros_(module.item_features)


class SETRecModel(SETRecPreTrainedModel):
    """The Transformer over sets, without scores: item codes in, n query states per place out."""

    item_features: Tensor
    queries: nn.Module

    def __init__(self, config: SETRecConfig) -> None:
        super().__init__(config)
        self.tokens = SetTokens(config)
        self.queries = nn.Embedding(config.num_tokens, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.dropout = PooledDropout(config.dropout)
        self.layers = nn.ModuleList(SetBlock(config, config.intermediate_size) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.norm_first else nn.Identity()
        # the fixed vectors of the catalogue travel with the weights, in the order of the item codes
        shape = (config.codebook_sizes[0], config.item_feature_dim)
        self.register_buffer("item_features", torch.zeros(*shape))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.queries  # the only table of vectors: items have none, theirs are made of their features

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.queries = value

    def set_catalogue(self, item_codes: Any, item_features: Any) -> None:
        """Store the fixed vectors (N, F) of the items whose codes (N, 1) are given.

        Raises:
            IncompatibleComponentsError: no vectors, a shape that differs from the configuration, or shared codes.
        """
        if item_features is None:
            raise IncompatibleComponentsError(
                "set_catalogue: SETRec makes an item's tokens from its vectors; name blocks in model.features."
            )
        codes_N = torch.tensor(np.asarray(item_codes)).reshape(-1).long()
        features = torch.tensor(np.asarray(item_features)).to(self.item_features)
        if features.shape != self.item_features.shape or len(codes_N) != len(features):
            raise IncompatibleComponentsError(
                f"set_catalogue: {len(codes_N)} codes and vectors {tuple(features.shape)}, the configuration says "
                f"{tuple(self.item_features.shape)}; build it with from_tokenizer and the widths of the blocks."
            )
        if not torch.equal(codes_N.sort().values, torch.arange(len(codes_N))):
            raise IncompatibleComponentsError(
                f"set_catalogue: SETRec needs a code of its own, from 0 to {len(codes_N) - 1}, for every item; use "
                "quantizer 'atomic' with collisions 'keep'."
            )
        self.item_features[codes_N.to(features.device)] = features

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        last_only: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """States of the queries.

        Args:
            input_ids: (B, T) item tokens, padded on either side.
            attention_mask: (B, T), 0 = padding; None = no padding.
            last_only: only the queries behind the window.

        Returns:
            `last_hidden_state` (B, Q, n * d): place t predicts item t from those before it, place T the item after the
            window; Q = T + 1, or 1 with `last_only`.

        Raises:
            IncompatibleComponentsError: more items than the model reads.
        """
        table_Nnd, _ = self.tokens(self.item_features)
        states = self.run(table_Nnd, self.queries.weight, input_ids, attention_mask, last_only)
        return BaseModelOutput(last_hidden_state=states.flatten(2))

    def run(
        self,
        table_Nnd: Tensor,
        queries_nd: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        last_only: bool = False,
    ) -> Tensor:
        """States (B, Q, n, d) of the queries, with the tokens of the items given."""
        batch, length = input_ids.shape
        if length > self.config.max_position_embeddings:
            raise IncompatibleComponentsError(
                f"a history of {length} items exceeds max_position_embeddings={self.config.max_position_embeddings}; "
                "encode with max_items or raise the limit."
            )
        num_tokens, device = table_Nnd.shape[1], input_ids.device
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask_BT = mask_BT.bool()
        codes_BT = (input_ids - self.config.level_offsets[0]).clamp(0, len(table_Nnd) - 1)
        items_BTnd = F.embedding(codes_BT, table_Nnd.flatten(1)).view(batch, length, num_tokens, -1)
        before_BT = F.pad(mask_BT.long().cumsum(-1), (1, 0))  # real items before each place, 0..T
        items_BTnd = items_BTnd + self.position_embedding(before_BT[:, :-1]).unsqueeze(2)
        places_Q = torch.arange(length if last_only else 0, length + 1, device=device)
        asked_BQnd = queries_nd + self.position_embedding(before_BT[:, places_Q]).unsqueeze(2)
        x = self.dropout(torch.cat([items_BTnd.flatten(1, 2), asked_BQnd.flatten(1, 2)], dim=1))
        rows = torch.cat([torch.arange(length, device=device), places_Q])
        earlier = rows[:, None] > torch.arange(length, device=device)
        visible = earlier[None] if bool(mask_BT.all()) else earlier & mask_BT[:, None, :]
        visible = visible.repeat_interleave(num_tokens, dim=1).repeat_interleave(num_tokens, dim=2).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, visible)
        return self.norm(x[:, length * num_tokens :]).view(batch, len(places_Q), num_tokens, -1)


@dataclass
class SETRecState:
    """What `start_decoding` keeps per user: products (n, B, N) of each query with the items' tokens of its kind."""

    products_nBN: Tensor


class SETRecForCausalLM(RecommendationMixin, SETRecPreTrainedModel, GenerationMixin):
    """SETRec with its scores over the catalogue.

    Example:
        >>> config = SETRecConfig(codebook_sizes=[10], item_feature_dims=[4, 6], num_semantic_tokens=2, hidden_size=8)
        >>> model = SETRecForCausalLM(config).eval()
        >>> model.set_catalogue(torch.arange(10)[:, None], torch.randn(10, 10))
        >>> model.item_scores(model.start_decoding(torch.tensor([[4, 7, 5]]))).shape
        torch.Size([1, 10])
    """

    def __init__(self, config: SETRecConfig) -> None:
        super().__init__(config)
        self.model = SETRecModel(config)
        self.post_init()

    def set_catalogue(self, item_codes: Any, item_features: Any) -> None:
        """See [`SETRecModel.set_catalogue`]."""
        self.model.set_catalogue(item_codes, item_features)

    def prepare_training(self, train_counts_N: Any) -> list[Any]:
        """Called by `train_recommender`: the items must have vectors by now.

        Raises:
            IncompatibleComponentsError: they have none.
        """
        if not bool(self.model.item_features.any()):
            raise IncompatibleComponentsError(
                "SETRec holds no item vectors to make tokens of: call set_catalogue(tokenizer.codes, features) first."
            )
        return []

    # -- training and plain forward -------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Loss over all positions, or next-item logits.

        Args:
            input_ids: (B, T) item tokens, padded on either side.
            attention_mask: (B, T), 0 = padding.
            labels: (B, T), aligned with `input_ids` (an item is predicted from those before it), -100 = no target.
            num_items_in_batch: targets of the whole optimiser step, for exact gradient accumulation; None = the mean over
                this batch.
            logits_to_keep: without labels, only the last so many positions (0 = all).

        Returns:
            `loss`; or, without labels, `logits` (B, T, V): position t predicts item t + 1 by the items' scores, tokens
            that are no items at finfo.min.

        Raises:
            IncompatibleComponentsError: a label that is no item token (checked on CPU tensors).
        """
        table_Nnd, error = self.model.tokens(self.model.item_features)
        queries_nd = self.model.queries.weight
        if labels is None:
            states = self.model.run(table_Nnd, queries_nd, input_ids, attention_mask, last_only=logits_to_keep == 1)
            kept = states[:, 1:] if logits_to_keep == 0 else states[:, -logits_to_keep:]
            scores_BQN = self._scores(self._products(kept.flatten(0, 1), table_Nnd)).unflatten(0, kept.shape[:2])
            first = self.config.level_offsets[0]
            rest = self.config.vocab_size - first - scores_BQN.shape[-1]
            lowest = torch.finfo(scores_BQN.dtype).min
            return CausalLMOutput(logits=F.pad(scores_BQN, (first, rest), value=lowest))
        # the last item is only a target, so T - 1 items are read
        mask = None if attention_mask is None else attention_mask[:, :-1]
        states = self.model.run(table_Nnd, queries_nd, input_ids[:, :-1], mask)
        target_BT = labels != -100
        codes_P = labels[target_BT] - self.config.level_offsets[0]
        self._check_codes(codes_P)
        products_nPN = self._products(states[target_BT], table_Nnd).float()
        nll = F.cross_entropy(products_nPN.flatten(0, 1), codes_P.repeat(self.config.num_tokens), reduction="sum")
        count: Any = max(len(codes_P), 1) if num_items_in_batch is None else num_items_in_batch
        count = count.to(nll.device) if torch.is_tensor(count) else count
        # the error is a mean over the catalogue; parts of one optimiser step share it by their targets
        error = self.config.reconstruction_weight * error.float() * len(codes_P)
        return CausalLMOutput(loss=(nll / self.config.num_tokens + error) / count)

    def _check_codes(self, codes_P: Tensor) -> None:
        if codes_P.device.type != "cpu":  # on an accelerator the look would cost a synchronisation per step
            return
        wrong_P = (codes_P < 0) | (codes_P >= self.config.codebook_sizes[0])
        if bool(wrong_P.any()):
            raise IncompatibleComponentsError(
                f"labels hold token {int(codes_P[wrong_P][0]) + self.config.level_offsets[0]}, which is no item; set "
                "labels of padding and other tokens to -100."
            )

    def _products(self, states_Pnd: Tensor, table_Nnd: Tensor) -> Tensor:
        """Inner products (n, P, N) of each query's state with the items' tokens of its kind."""
        return torch.bmm(states_Pnd.transpose(0, 1), table_Nnd.permute(1, 2, 0))

    def _scores(self, products_nPN: Tensor) -> Tensor:
        """(1 - b) * collaborative + b * sum of the semantic ones (P, N); the collaborative one alone where no other is."""
        if len(products_nPN) == 1:
            return products_nPN[0]
        weight = self.config.semantic_weight
        return (1 - weight) * products_nPN[0] + weight * products_nPN[1:].sum(0)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`generate` passes the whole sequence each step: the reference path, `recommend` is the fast one."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    # -- recommendation -------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> SETRecState:
        """Read the histories and answer all queries, in one pass however many tokens an item has.

        Args:
            input_ids: (B, T) item tokens, padded on either side; of longer histories the newest items are read.
            attention_mask: (B, T); None = no padding.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, mask = newest_items(input_ids.unsqueeze(-1), mask.bool(), self.config.max_position_embeddings)
        table_Nnd, _ = self.model.tokens(self.model.item_features)
        states = self.model.run(table_Nnd, self.model.queries.weight, ids.squeeze(-1), mask, last_only=True)
        return SETRecState(self._products(states[:, 0], table_Nnd).float())

    def item_scores(self, state: SETRecState) -> Tensor:
        """Scores (B, N) of all items, in order of item code."""
        return self._scores(state.products_nBN)

    def score_codes(self, state: SETRecState, prefix_BKl: Tensor, level: int) -> Tensor:
        """Softmax of the scores (B, K, N) as log-probabilities; the only level is 0, so all beams get the same row."""
        if level != 0 or prefix_BKl.shape[2] != 0:
            raise IncompatibleComponentsError(f"score_codes: SETRec has one code per item (level 0), got level {level}")
        return self.item_scores(state).log_softmax(-1)[:, None].expand(-1, prefix_BKl.shape[1], -1)
