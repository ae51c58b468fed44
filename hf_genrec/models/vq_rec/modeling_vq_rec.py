"""VQ-Rec: text -> codes -> code vectors, so that a recommender can move to another domain (arXiv 2210.12316).

An item's text is quantized into L digits (product quantization) and the item *is* the mean of the L vectors of its codes:
no vector of its own, no order among the digits, and items that share all codes are one to the model. A causal Transformer
reads the history, and the cosine of its last state and an item's vector, over a temperature, is the item's logit. Nothing is
spelled out: decoding "dense" ranks the catalogue.

Training is cross-entropy over all items, or (the first `pretrain_share` of the steps) contrastive: the target against the
other targets of the batch, those with the target's own codes left out, and against a semi-synthetic negative, the target's
codes with each digit replaced at random with probability `fake_code_ratio`.

In a new domain the codes mean something else. `begin_transfer` keeps all weights of the old domain and learns nothing but
which old code vector each new code takes (`permutation.py`); `end_transfer` writes the chosen vectors into the table, and
training goes on as usual. Between both domains nothing but the code table differs then.

Relations: one digit of N codes is a SASRec with cosine logits; RPG (arXiv 2506.05781) reads items the same way and predicts
digits where this predicts items.

Shapes: B users, T items of a window, L digits, C codes of a digit, N items, d width, P positions with a target, K beams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.item_scores import ItemCodesMixin
from hf_genrec.models.item_timeline import ItemTimeline, newest_items, whole_items

from .configuration_vq_rec import VQRecConfig
from .permutation import CodePermutation


class VQRecPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the two classes below."""

    config_class = VQRecConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, VQRecModel):
            std = self.config.embedding_std
            init.normal_(module.code_embedding.weight, std=std)
            # as long as an item's vector, the mean of L code vectors
            init.normal_(module.position_embedding.weight, std=std / self.config.num_levels**0.5)
            init.normal_(module.start, std=std / self.config.num_levels**0.5)
        elif isinstance(module, VQRecForRecommendation):
            init.zeros_(module.item_codes)
            init.zeros_(module.pretraining)


class VQRecModel(ItemTimeline, VQRecPreTrainedModel):
    """The timeline: codes in, one state per position out (the state at t has read the start and items < t)."""

    code_embedding: nn.Module

    def __init__(self, config: VQRecConfig) -> None:
        VQRecPreTrainedModel.__init__(self, config)
        self.code_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.build_timeline(config)
        self.permutation: CodePermutation | None = None  # there while a transfer learns it
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.code_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.code_embedding = value

    def code_tokens(self) -> Tensor:
        """Token id of every code (L, C).

        Raises:
            IncompatibleComponentsError: digits of different sizes.
        """
        sizes = set(self.config.codebook_sizes)
        if len(sizes) != 1:
            raise IncompatibleComponentsError(
                f"codebook_sizes {self.config.codebook_sizes} differ between digits; a transfer needs equal ones "
                "(collisions 'keep' adds no digit)."
            )
        offsets_L1 = torch.tensor(self.config.level_offsets, device=self.device).unsqueeze(1)
        return offsets_L1 + torch.arange(sizes.pop(), device=self.device)

    def code_table(self) -> Tensor:
        """Vectors of all tokens (V, d); while a transfer is learned, those of the codes in their new order."""
        weight_Vd = self.code_embedding.weight
        if self.permutation is None:
            return weight_Vd
        tokens_LC = self.code_tokens()
        chosen_LCd = torch.bmm(self.permutation().to(weight_Vd.dtype), weight_Vd[tokens_LC])
        return weight_Vd.index_copy(0, tokens_LC.flatten(), chosen_LCd.flatten(0, 1))

    def item_vectors(self, ids_XL: Tensor, table_Vd: Tensor | None = None) -> Tensor:
        """The mean of the code vectors of items (..., L): (..., d)."""
        table_Vd = self.code_table() if table_Vd is None else table_Vd
        flat = F.embedding_bag(ids_XL.reshape(-1, ids_XL.shape[-1]), table_Vd, mode="mean")
        return flat.view(*ids_XL.shape[:-1], -1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, code_table: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """States of all positions.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side by whole items.
            attention_mask: (B, T * L), 1 = token, 0 = padding; None = no padding.
            code_table: (V, d) from `code_table()`, where the caller needs the same draw elsewhere.

        Returns:
            `last_hidden_state` (B, T + 1, d): position t predicts item t, position T the item after the window.

        Raises:
            IncompatibleComponentsError: tokens that are not whole items, or more of them than the model reads.
        """
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        return BaseModelOutput(last_hidden_state=self.run_timeline(self.item_vectors(ids_BTL, code_table), mask_BT))


@dataclass
class VQRecOutput(ModelOutput):
    """`loss` over the positions with a target; or, without labels, `logits` (B, T + 1, N) of all items at all positions."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class VQRecState:
    """What `start_decoding` keeps per user: log-probabilities of all items, float32, in order of item index."""

    logp_BN: Tensor


class VQRecForRecommendation(ItemCodesMixin, RecommendationMixin, VQRecPreTrainedModel):
    """VQ-Rec with its scores over the catalogue.

    Example:
        >>> config = VQRecConfig(codebook_sizes=[4, 4], level_offsets=[4, 8], vocab_size=12, num_items=3, hidden_size=8)
        >>> model = VQRecForRecommendation(config).eval()
        >>> model.set_catalogue([[0, 1], [2, 3], [2, 0]])
        >>> model.score_dense(model.start_decoding(torch.tensor([[4, 9, 6, 11]]))).exp().sum(-1)
        tensor([1.], grad_fn=<SumBackward1>)
    """

    item_codes: Tensor
    pretraining: Tensor

    def __init__(self, config: VQRecConfig) -> None:
        super().__init__(config)
        self.model = VQRecModel(config)
        # the catalogue travels with the weights, as does the phase of training (a number: 1 = contrastive)
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self.register_buffer("pretraining", torch.zeros((), dtype=torch.int32))
        self._trie: ItemTrie | None = None
        self.recommendation_config = RecommendationConfig(decoding="dense")
        self.post_init()

    def item_logits(self, states_Pd: Tensor, table_Vd: Tensor | None = None) -> Tensor:
        """Cosine over temperature of every item (P, N), float32."""
        return self._cosine(states_Pd, self.model.item_vectors(self._item_tokens(), table_Vd))

    def _cosine(self, states_Pd: Tensor, vectors_Nd: Tensor) -> Tensor:
        return (F.normalize(states_Pd, dim=-1) @ F.normalize(vectors_Nd, dim=-1).T).float() / self.config.temperature

    # -- training -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> VQRecOutput:
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
        table_Vd, levels = self.model.code_table(), self.config.num_levels
        if labels is None:
            states_BTd = self.model(input_ids, attention_mask, code_table=table_Vd).last_hidden_state
            return VQRecOutput(
                logits=self.item_logits(states_BTd.flatten(0, 1), table_Vd).unflatten(0, states_BTd.shape[:2])
            )
        # the last item is only a target, so T - 1 items are read and give T states
        mask = None if attention_mask is None else attention_mask[:, :-levels]
        states_BTd = self.model(input_ids[:, :-levels], mask, code_table=table_Vd).last_hidden_state
        labels_BTL = labels.reshape(*states_BTd.shape[:2], levels)
        target_BT = labels_BTL[..., 0] != -100
        states_Pd, labels_PL = states_BTd[target_BT], labels_BTL[target_BT]
        rows_P = self._rows(labels_PL - torch.tensor(self.config.level_offsets, device=labels.device))
        if bool(self.pretraining):
            nll = self._contrast(states_Pd, labels_PL, rows_P, table_Vd)
        else:
            nll = F.cross_entropy(self.item_logits(states_Pd, table_Vd), rows_P, reduction="sum")
        count: Any = max(len(rows_P), 1) if num_items_in_batch is None else num_items_in_batch / levels
        return VQRecOutput(loss=nll / (count.to(nll.device) if torch.is_tensor(count) else count))

    def _contrast(self, states_Pd: Tensor, ids_PL: Tensor, rows_P: Tensor, table_Vd: Tensor) -> Tensor:
        """-log p(target) among the targets of the batch and one semi-synthetic negative, summed over the targets."""
        logits_PP = self._cosine(states_Pd, self.model.item_vectors(ids_PL, table_Vd))
        itself = torch.eye(len(rows_P), dtype=torch.bool, device=rows_P.device)
        same_PP = (rows_P.unsqueeze(1) == rows_P) & ~itself  # the target again is no negative
        logits_PP = logits_PP.masked_fill(same_PP, -torch.inf)
        fakes_Pd = self.model.item_vectors(self.fake_items(ids_PL), table_Vd)
        cosine_P1 = F.cosine_similarity(states_Pd, fakes_Pd, dim=-1).float().unsqueeze(1)
        logits = torch.cat([logits_PP, cosine_P1 / self.config.temperature], dim=1)
        return F.cross_entropy(logits, torch.arange(len(rows_P), device=rows_P.device), reduction="sum")

    def fake_items(self, ids_PL: Tensor) -> Tensor:
        """Semi-synthetic items: tokens (P, L) of real ones, each digit replaced by a random code with `fake_code_ratio`."""
        sizes_L = torch.tensor(self.config.codebook_sizes, device=ids_PL.device)
        offsets_L = torch.tensor(self.config.level_offsets, device=ids_PL.device)
        random_PL = offsets_L + (torch.rand(ids_PL.shape, device=ids_PL.device) * sizes_L).long()
        replaced_PL = torch.rand(ids_PL.shape, device=ids_PL.device) < self.config.fake_code_ratio
        return torch.where(replaced_PL, random_PL, ids_PL)

    def prepare_training(self, train_counts_N: Any) -> list[TrainerCallback]:
        """Called by `train_recommender`: brings the switch from the contrastive loss to that over all items."""
        return [PretrainingPhase(self)] if self.config.pretrain_share > 0 else []

    # -- another domain -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_transfer(self, source: VQRecForRecommendation, *, iterations: int = 8, temperature: float = 0.7) -> None:
        """Take all weights of a model of another domain, freeze them, and learn the order of its code vectors from now on.

        Args:
            source: a model of another catalogue, of the same sizes.
            iterations, temperature: of the Gumbel-Sinkhorn relaxation; defaults of the paper.

        Raises:
            IncompatibleComponentsError: a size in which both models differ (named).
        """
        names = ["codebook_sizes", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        for name in [*names, "max_position_embeddings", "norm_first"]:
            old, new = (getattr(model.config, name) for model in (source, self))
            if old != new:
                raise IncompatibleComponentsError(
                    f"the source model has {name} {old}, the new one {new}; a transfer needs equal sizes."
                )
        old_LC, new_LC = source.model.code_tokens(), self.model.code_tokens()
        weights = dict(source.model.named_parameters())
        for name, weight in self.model.named_parameters():
            if not name.startswith("code_embedding"):
                weight.copy_(weights[name])
        table = source.model.code_embedding.weight[old_LC.flatten()].to(self.device)
        self.model.code_embedding.weight[new_LC.flatten()] = table
        for weight in self.parameters():
            weight.requires_grad_(False)
        self.config.pretrain_share = 0.0  # in the new domain only the loss over all items
        self.pretraining.zero_()
        permutation = CodePermutation(*new_LC.shape, iterations=iterations, temperature=temperature)
        self.model.permutation = permutation.to(self.device, torch.float32)

    @torch.no_grad()
    def end_transfer(self) -> None:
        """Write the chosen code vectors into the table, forget the permutation, and make all weights trainable again."""
        if self.model.permutation is not None:
            tokens_LC, chosen_LC = self.model.code_tokens(), self.model.permutation.old_codes()
            weight_Vd = self.model.code_embedding.weight
            weight_Vd[tokens_LC.flatten()] = weight_Vd[tokens_LC.gather(1, chosen_LC).flatten()]
            self.model.permutation = None
        for weight in self.parameters():
            weight.requires_grad_(True)

    # -- recommendation -------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> VQRecState:
        """Read the histories and score all items.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side; of longer histories the newest items are read.
            attention_mask: (B, T * L); None = no padding.
        """
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        ids_BTL, mask_BT = newest_items(ids_BTL, mask_BT, self.config.max_position_embeddings)
        table_Vd = self.model.code_table()
        states_BTd = self.model.run_timeline(self.model.item_vectors(ids_BTL, table_Vd), mask_BT)
        return VQRecState(self.item_logits(states_BTd[:, -1], table_Vd).log_softmax(-1))

    def score_dense(self, state: VQRecState) -> Tensor:
        """Log-probabilities (B, N) of all items, the softmax of their cosines over the temperature."""
        return state.logp_BN


class PretrainingPhase(TrainerCallback):
    """The contrastive loss for the first `pretrain_share` of the steps, cross-entropy over all items after them."""

    def __init__(self, model: VQRecForRecommendation) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.pretraining.fill_(int(state.global_step < self.model.config.pretrain_share * state.max_steps))
