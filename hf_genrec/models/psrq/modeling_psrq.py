"""PSRQ's ranking network, multi-codebook cross-attention: joint codes ask, modal codes of the history answer (2508.20359).

An item is named by codes of each modality (text, behaviour, ...) and by codes of all of them together (arXiv 2508.20359;
`residual_kmeans` with `concat_prefix` makes them, `joined` puts them side by side). To score a candidate, its joint codes
give the queries and the modal codes of the history's items keys and values: each modality has heads of its own, so taste
in one is not drowned by the other, and the joint codes decide what of it counts. The logit is the sum over the heads of
what was read, matched with the candidate, plus a bias of the candidate. Nothing is generated: decoding "dense" ranks the
catalogue. The published text gives no sizes and no exact layer; what is not said above is our design.

A head also prefers new items by a learned slope per position (as ALiBi, arXiv 2108.12409). As a slope shifts all scores of
a prefix alike, one pass over a window scores every candidate behind every prefix (`cross_attention.py`).

Relations: with one part the same codes ask and answer (target attention as in DIN, arXiv 1706.06978, over codes); a
history of one item makes each head a bilinear form of both items' codes.

Shapes: B users, T items of a window, L codes, N items or candidates, M modalities, H heads, G = M * H, h width of a head,
d width, P positions with a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.dropout import PooledDropout
from hf_genrec.models.item_scores import ItemCodesMixin
from hf_genrec.models.item_timeline import newest_items, whole_items

from .configuration_psrq import PSRQConfig
from .cross_attention import prefix_interest

_SCORES_AT_ONCE = 1 << 22  # attention scores that are held while items are ranked: what a processor's cache takes


class ItemTower(nn.Module):
    """Sum of an item's code vectors, through one residual layer, to the vectors a side of the attention needs."""

    def __init__(self, config: PSRQConfig, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, width)
        self.dropout = PooledDropout(config.dropout)

    def forward(self, vectors_Xd: Tensor) -> Tensor:
        """(X, d) to (X, width)."""
        x = vectors_Xd + self.dropout(self.down(F.gelu(self.up(self.norm(vectors_Xd)))))
        return self.out(x)


@dataclass
class PSRQOutput(ModelOutput):
    """`loss` over the positions with a target; or, without labels, `logits` (B, T + 1, N) of all items at all positions."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class PSRQState:
    """What `start_decoding` keeps per user: log-probabilities of all items, float32, in order of item index."""

    logp_BN: Tensor


class PSRQPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = PSRQConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.embedding_std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, PSRQForRecommendation):
            init.zeros_(module.item_codes)
            # heads of a modality look back over 1, 4, 16, ... items at the start
            steps_H = torch.arange(self.config.num_attention_heads, dtype=torch.float32)
            init.copy_(module.log_slope, (-steps_H * np.log(4.0)).repeat(self.config.num_modalities))


class PSRQForRecommendation(ItemCodesMixin, RecommendationMixin, PSRQPreTrainedModel):
    """The ranking network with its scores over the catalogue.

    Example:
        >>> config = PSRQConfig(codebook_sizes=[4, 4], level_offsets=[4, 8], vocab_size=12, part_levels=[1, 1], num_items=3)
        >>> model = PSRQForRecommendation(config).eval()
        >>> model.set_catalogue([[0, 1], [2, 3], [2, 0]])
        >>> model.score_dense(model.start_decoding(torch.tensor([[4, 9, 6, 11]]))).exp().sum(-1)
        tensor([1.0000], grad_fn=<SumBackward1>)
    """

    item_codes: Tensor
    code_embedding: nn.Module

    def __init__(self, config: PSRQConfig) -> None:
        super().__init__(config)
        heads = config.num_modalities * config.num_attention_heads
        self.code_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.modal_towers = nn.ModuleList(
            ItemTower(config, 2 * config.hidden_size) for _ in range(config.num_modalities)
        )
        self.joint_tower = ItemTower(config, 2 * config.num_modalities * config.hidden_size + 1)
        self.log_slope = nn.Parameter(torch.zeros(heads))
        # the catalogue travels with the weights
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self._trie: ItemTrie | None = None
        self.recommendation_config = RecommendationConfig(decoding="dense")
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.code_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.code_embedding = value

    # -- both sides of the attention ------------------------------------------------------------------------------

    def _part(self, ids_XL: Tensor, part: int) -> Tensor:
        """Sum of the code vectors of one part of the identifier. (X, d)"""
        levels = self.config.parts[part]
        return self.code_embedding(ids_XL[:, levels.start : levels.stop]).sum(1)

    def candidates(self, ids_NL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and match vectors (N, G, h), and biases (N,), of items as candidates: from their joint codes."""
        *both, bias_N1 = self.joint_tower(self._part(ids_NL, -1)).split(
            [self.config.num_modalities * self.config.hidden_size] * 2 + [1], dim=1
        )
        shape = (len(ids_NL), len(self.log_slope), self.config.hidden_size // self.config.num_attention_heads)
        query, match = (side.view(shape) for side in both)
        return query, match, bias_N1.squeeze(1)

    def memories(self, ids_XL: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (X, G, h) of items of a history: from their modal codes."""
        sides = [tower(self._part(ids_XL, part)).chunk(2, dim=1) for part, tower in enumerate(self.modal_towers)]
        heads = self.config.num_attention_heads
        shape = (len(ids_XL), heads, self.config.hidden_size // heads)
        key, value = (torch.cat([one.view(shape) for one in side], 1) for side in zip(*sides, strict=True))
        return key, value

    def candidate_logits(self, ids_BTL: Tensor, mask_BT: Tensor, ids_NL: Tensor, *, last_only: bool = False) -> Tensor:
        """Logits (B, T + 1, N) of candidates: row t has read the items before t. `last_only`: (B, 1, N), the last row."""
        batch, length, levels = ids_BTL.shape
        query_NGh, match_NGh, bias_N = self.candidates(ids_NL)
        heads, width = query_NGh.shape[1:]
        key, value = (side.view(batch, length, heads, width) for side in self.memories(ids_BTL.reshape(-1, levels)))
        scores = torch.einsum("btgh,ngh->tbng", key, query_NGh) * width**-0.5
        matches = torch.einsum("btgh,ngh->tbng", value, match_NGh) * width**-0.5
        position_TB = (mask_BT.cumsum(1) - 1).clamp(min=0).t().to(scores.dtype)
        scores = scores + position_TB[:, :, None, None] * self.log_slope.exp()
        scores = scores.masked_fill(~mask_BT.t()[:, :, None, None], -torch.inf)
        if last_only:
            # a user without items reads nothing
            shares = scores.softmax(0).nan_to_num(0.0)
            interest = (shares * matches).sum(0, keepdim=True)
        else:
            interest = prefix_interest(scores, matches)
        return (interest.sum(-1) + bias_N).transpose(0, 1)

    # -- training -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PSRQOutput:
        """Loss over all positions, or logits.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side by whole items.
            labels: (B, T * L), aligned with `input_ids` (an item is predicted from those before it); items whose first
                label is -100 are no targets.
            num_items_in_batch: label tokens of the whole optimiser step, for exact gradient accumulation; None = the
                mean over this batch.

        Raises:
            IncompatibleComponentsError: tokens that are not whole items, or labels that are no item's codes.
        """
        levels = self.config.num_levels
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, levels)
        if labels is None:
            return PSRQOutput(logits=self.candidate_logits(ids_BTL, mask_BT, self._item_tokens()).float())
        ids_BTL, mask_BT = ids_BTL[:, :-1], mask_BT[:, :-1]  # the last item is only a target
        labels_BTL = labels.reshape(len(labels), -1, levels)
        target_BT = labels_BTL[..., 0] != -100
        rows_P = self._rows(labels_BTL[target_BT] - torch.tensor(self.config.level_offsets, device=labels.device))
        tokens_NL = self._item_tokens()
        if self.config.loss == "softmax":
            logits_PN = self.candidate_logits(ids_BTL, mask_BT, tokens_NL)[target_BT].float()
            loss = F.cross_entropy(logits_PN, rows_P, reduction="sum")
        else:
            drawn_K = torch.randint(len(tokens_NL), (self.config.num_negatives,), device=rows_P.device)
            items_C, column_X = torch.unique(torch.cat([rows_P, drawn_K]), return_inverse=True)
            logits_PC = self.candidate_logits(ids_BTL, mask_BT, tokens_NL[items_C])[target_BT].float()
            positive_P, negative_K = column_X[: len(rows_P)], column_X[len(rows_P) :]
            right_P = logits_PC.gather(1, positive_P[:, None]).squeeze(1)
            itself_PK = positive_P[:, None] == negative_K
            wrong_PK = F.softplus(logits_PC[:, negative_K]).masked_fill(itself_PK, 0.0)
            loss = F.softplus(-right_P).sum() + wrong_PK.sum()
        count: Any = max(len(rows_P), 1) if num_items_in_batch is None else num_items_in_batch / levels
        return PSRQOutput(loss=loss / (count.to(loss.device) if torch.is_tensor(count) else count))

    # -- recommendation -------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> PSRQState:
        """Read the histories and score all items.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side; of longer histories the newest items are read.
            attention_mask: (B, T * L); None = no padding.
        """
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        ids_BTL, mask_BT = newest_items(ids_BTL, mask_BT, self.config.max_position_embeddings)
        tokens_NL = self._item_tokens()
        scores_per_user = max(1, ids_BTL.shape[1] * len(tokens_NL) * len(self.log_slope))
        users = max(1, _SCORES_AT_ONCE // scores_per_user)
        logits = [
            self.candidate_logits(ids_bTL, mask_bT, tokens_NL, last_only=True)[:, 0]
            for ids_bTL, mask_bT in zip(ids_BTL.split(users), mask_BT.split(users), strict=True)
        ]
        return PSRQState(torch.cat(logits).float().log_softmax(-1))

    def score_dense(self, state: PSRQState) -> Tensor:
        """Log-probabilities (B, N) of all items, the softmax of their logits."""
        return state.logp_BN
