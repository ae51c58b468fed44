"""LLaDA-Rec: discrete diffusion over the codes of the next item (arXiv 2511.06254).

A Transformer without causal order inside an item reads the codes of a history and M slots for the target. In training
random codes are hidden and predicted (`masking`); in generation all M are hidden and filled in, most certain first
(`generation.decoding.masked_diffusion`). Two losses: over hidden codes of the target behind a clean history, and over
hidden codes of all items.

Choices of ours: every slot has its own mask vector and a softmax over its own codebook (the authors share one mask
token and one vocabulary over all slots of an item, and cut to the slot's codes when decoding).

Relations: `history_attention="bidirectional"` is the paper, trained on (history, target) pairs. With `"causal"` an item
sees only itself and the items before it; every item of a window is a target at once, hidden codes of an item are
predicted from its shown codes and the clean items before it (with a learned bias by distance, see `blocks`), and
`history_loss_weight=0` is block diffusion with items as blocks (2503.09573); with one code per item that is next-item
cross-entropy.

Shapes: B users, T history items, M codes of an item, S = T * M, G groups (targets or beams), K beams, C codes of a slot,
V vocabulary, d width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.models.dropout import PooledDropout

from .blocks import KeyValue, LLaDARecLayer
from .configuration_llada_rec import LLaDARecConfig
from .masking import draw_history_weights, draw_target_weights

_CHUNK_TOKENS = 2**16  # tokens of beams and their histories run at a time in the bidirectional form


class LLaDARecPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the two classes below."""

    config_class = LLaDARecConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LLaDARecLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CodeHead):
            init.normal_(module.weight, std=0.02)  # nearly uniform codes at the start
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.embedding_std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, LLaDARecLayer):
            if module.distance_bias is not None:
                init.zeros_(module.distance_bias)
        elif isinstance(module, LLaDARecModel):
            init.normal_(module.mask_embedding, std=self.config.embedding_std)


class CodeHead(nn.Linear):
    """Logits of codes: one weight row per token of the vocabulary, read one codebook at a time."""

    def block(self, states: Tensor, first: int, size: int) -> Tensor:
        """Logits (..., size) of the tokens from `first` on."""
        return F.linear(states, self.weight[first : first + size], self.bias[first : first + size])


class LLaDARecModel(LLaDARecPreTrainedModel):
    """Code tokens in, one state per token out."""

    def __init__(self, config: LLaDARecConfig) -> None:
        super().__init__(config)
        self.code_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mask_embedding = nn.Parameter(torch.zeros(config.num_levels, config.hidden_size))
        self.position_embedding = nn.Embedding(config.max_position_embeddings + 1, config.hidden_size)
        self.dropout = PooledDropout(config.dropout)
        self.layers = nn.ModuleList(LLaDARecLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.code_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.code_embedding = value

    @property
    def causal(self) -> bool:
        """Do history items see only what came before them?"""
        return self.config.history_attention == "causal"

    def items_of(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token rows (B, S) as items: ids (B, T, M) and which items are real (B, T) bool.

        Raises:
            IncompatibleComponentsError: rows that are no whole items (user or end tokens, cut items).
        """
        levels = self.config.num_levels
        if input_ids.shape[1] % levels:
            raise IncompatibleComponentsError(
                f"rows of {input_ids.shape[1]} tokens are no whole items of {levels} codes; LLaDA-Rec reads item codes "
                "only: use a tokenizer without user tokens and history_eos."
            )
        ids_BTM = input_ids.reshape(input_ids.shape[0], input_ids.shape[1] // levels, levels)
        if attention_mask is None:
            return ids_BTM, torch.ones_like(ids_BTM[..., 0], dtype=torch.bool)
        return ids_BTM, attention_mask.reshape(ids_BTM.shape)[..., 0].bool()

    def positions(self, real_BT: Tensor) -> Tensor:
        """Position of each history item (B, T): counted from the target (bidirectional) or from the first item (causal).

        The target's is 0 in the first case and the number of history items in the second.
        """
        count_BT = real_BT.cumsum(1) - 1 if self.causal else real_BT.flip(1).cumsum(1).flip(1)
        return count_BT.clamp(min=0, max=self.config.max_position_embeddings)

    def embed(self, ids_BGM: Tensor, hidden_BGM: Tensor | None, positions_BG: Tensor) -> Tensor:
        """Code vectors, or the slot's mask vector where hidden, plus the item's position. (B, G, M, d)"""
        x = self.code_embedding(ids_BGM)
        if hidden_BGM is not None:
            x = torch.where(hidden_BGM.unsqueeze(-1), self.mask_embedding, x)
        return self.dropout(x + self.position_embedding(positions_BG).unsqueeze(-2))

    def visible(self, real_BT: Tensor) -> Tensor:
        """Which item sees which: (B, T, T) bool. Padding sees itself, so that no softmax is empty."""
        length = real_BT.shape[1]
        seen_BTT = real_BT.unsqueeze(1).expand(-1, length, -1)
        if self.causal:
            seen_BTT = seen_BTT.tril()
        return seen_BTT | torch.eye(length, dtype=torch.bool, device=real_BT.device)

    def encode(
        self,
        x_BTMd: Tensor,
        real_BT: Tensor,
        groups_BGMd: Tensor | None = None,
        seen_BGT: Tensor | None = None,
        distance_GT: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the layers over history items, and over groups that read them.

        Returns:
            The normalised states of the groups where there are any, else those of the items (B, T, M, d); and the keys
            and values of every layer.
        """
        levels, shape = self.config.num_levels, x_BTMd.shape
        mask_BTT = self.visible(real_BT)
        mask_B1SS = mask_BTT.repeat_interleave(levels, 1).repeat_interleave(levels, 2).unsqueeze(1)
        x_BSd, cache = x_BTMd.flatten(1, 2), []
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            need_states = groups_BGMd is None or not last
            x_BSd, groups_BGMd, history = layer(x_BSd, mask_B1SS, groups_BGMd, seen_BGT, distance_GT, need_states)
            cache.append(history)
        return self.norm(groups_BGMd if groups_BGMd is not None else x_BSd.view(shape)), cache

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """States (B, S, d) of the tokens of histories (B, S), none hidden."""
        ids_BTM, real_BT = self.items_of(input_ids, attention_mask)
        states_BTMd, _ = self.encode(self.embed(ids_BTM, None, self.positions(real_BT)), real_BT)
        return BaseModelOutput(last_hidden_state=states_BTMd.flatten(1, 2))


@dataclass
class LLaDARecOutput(ModelOutput):
    """Output of `LLaDARecForMaskedLM`.

    Attributes:
        loss: target_loss + history_loss_weight * history_loss.
        target_loss, history_loss: per code, each code weighted by one over its mask rate (detached).
        logits: (B, M, V) for the slots of the next item; only without labels. Codes outside a slot's codebook have the
            smallest finite number of the dtype.
    """

    loss: Tensor | None = None
    target_loss: Tensor | None = None
    history_loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class LLaDARecState:
    """What decoding needs of B users: their newest items, at the right edge.

    Attributes:
        ids_BTM, real_BT: the items, and which are no padding.
        cache: keys and values of every layer, only where the history does not see the target.
    """

    ids_BTM: Tensor
    real_BT: Tensor
    cache: list[KeyValue] = field(default_factory=list)


class LLaDARecForMaskedLM(RecommendationMixin, LLaDARecPreTrainedModel):
    """Masked diffusion over item codes, with the decoding interface of `RecommendationMixin`.

    `recommend` fills in the codes in the order of the model's certainty (decoding "masked_diffusion"); every other
    search sees the same model filled in from left to right (`score_codes`).

    Example:
        >>> import torch
        >>> config = LLaDARecConfig(
        ...     codebook_sizes=[8, 8], level_offsets=[4, 12], vocab_size=20, hidden_size=16, num_hidden_layers=1
        ... )
        >>> model = LLaDARecForMaskedLM(config)
        >>> history, target = torch.tensor([[4, 12, 5, 13]]), torch.tensor([[6, 14]])
        >>> model(input_ids=history, labels=target).loss.shape, model(input_ids=history).logits.shape
        (torch.Size([]), torch.Size([1, 2, 20]))
    """

    def __init__(self, config: LLaDARecConfig) -> None:
        super().__init__(config)
        self.model = LLaDARecModel(config)
        self.code_head = CodeHead(config.hidden_size, config.vocab_size)
        self.recommendation_config = RecommendationConfig(decoding="masked_diffusion")
        self.post_init()

    # ------------------------------------------------------------------------------------------------------- training

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        target_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LLaDARecOutput:
        """Loss with labels, logits of the next item's slots without.

        In training mode the hidden codes are drawn from torch's global generator; in evaluation mode from a fixed seed,
        so that the loss is a function of its inputs.

        Args:
            input_ids: (B, S) item tokens, padded on either side by whole items.
            attention_mask: (B, S), 0 = padding.
            labels: bidirectional: (B, M), tokens of the item after the history. Causal: (B, S), equal to `input_ids` at
                items that are targets, -100 elsewhere.
            target_ids: (B, M) without labels: tokens of the next item that are known, -1 where hidden. None = all hidden.
            num_items_in_batch: label tokens of the whole optimisation step, for exact gradient accumulation.

        Raises:
            IncompatibleComponentsError: labels of the wrong shape, or a label that is no code of its slot.
        """
        if labels is None:
            return LLaDARecOutput(logits=self._slot_logits(input_ids, attention_mask, target_ids))
        ids_BTM, real_BT = self.model.items_of(input_ids, attention_mask)
        self._check_training_shapes(ids_BTM, labels)
        generator = None if self.training else torch.Generator().manual_seed(0)
        if self.model.causal:
            count = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            target, history = self._window_losses(ids_BTM, real_BT, labels.view_as(ids_BTM), generator)
        else:
            count = labels.numel() if num_items_in_batch is None else num_items_in_batch
            target, history = self._prefix_losses(ids_BTM, real_BT, labels, generator)
        target_loss, history_loss = target / count, history / count
        return LLaDARecOutput(
            loss=target_loss + self.config.history_loss_weight * history_loss,
            target_loss=target_loss.detach(),
            history_loss=history_loss.detach(),
        )

    def _check_training_shapes(self, ids_BTM: Tensor, labels: Tensor) -> None:
        batch, length, levels = ids_BTM.shape
        longest = self.config.max_position_embeddings
        wanted, kind = (batch, levels), "(users, codes of an item)"
        if self.model.causal:
            wanted, kind, longest = (batch, length * levels), "of input_ids", longest + 1
        if tuple(labels.shape) != wanted:
            raise IncompatibleComponentsError(
                f"labels have shape {tuple(labels.shape)}; with history_attention={self.config.history_attention!r} they "
                f"must have the shape {kind}, {wanted}."
            )
        if length > longest:
            raise IncompatibleComponentsError(
                f"a row of {length} items exceeds what the model reads ({longest}): lower max_history or raise "
                "max_position_embeddings of its configuration."
            )

    def _window_losses(
        self, ids_BTM: Tensor, real_BT: Tensor, labels_BTM: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Summed weighted losses of all targets of windows, and of hidden codes of all their items."""
        model, levels, device = self.model, self.config.num_levels, ids_BTM.device
        shape, position_BT = ids_BTM.shape[:2], model.positions(real_BT)
        weight_BTM = draw_target_weights(shape, levels, generator).to(device) * (labels_BTM[..., :1] != -100)
        groups = model.embed(ids_BTM, weight_BTM > 0, position_BT)
        # the last item is only a target; every target reads the clean items before it
        clean = model.embed(ids_BTM[:, :-1], None, position_BT[:, :-1])
        before_BTT = real_BT.unsqueeze(1).expand(-1, shape[1], -1).tril(-1)[..., :-1]
        columns_T = torch.arange(shape[1], device=device)
        distance_TT = columns_T[:, None] - columns_T[:-1]
        states, _ = model.encode(clean, real_BT[:, :-1], groups, before_BTT, distance_TT)
        target = self._weighted_nll(states, ids_BTM, weight_BTM)
        if not self.config.history_loss_weight:
            return target, target.new_zeros(())
        # a row's history counts as much as its targets, whatever share of its items are targets
        share_B = (labels_BTM != -100).flatten(1).sum(1) / (levels * real_BT.sum(1).clamp(min=1))
        weight_BTM = draw_history_weights(shape, levels, generator).to(device) * (real_BT * share_B[:, None]).unsqueeze(
            -1
        )
        states, _ = model.encode(model.embed(ids_BTM, weight_BTM > 0, position_BT), real_BT)
        return target, self._weighted_nll(states, ids_BTM, weight_BTM)

    def _prefix_losses(
        self, ids_BTM: Tensor, real_BT: Tensor, labels_BM: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """The same of (history, target) pairs, both passes in one run of 2 B rows.

        The history loss of a pair is divided by the items it could have (`max_position_embeddings` + 1), as in the
        authors' code, where every row is padded to that length.
        """
        batch, length, levels = ids_BTM.shape
        ids_BTM = torch.cat([ids_BTM, labels_BM.unsqueeze(1)], dim=1)
        target_BTM = F.pad(draw_target_weights((batch, 1), levels, generator).to(ids_BTM.device), (0, 0, length, 0))
        weights, runs = [target_BTM], 1
        if self.config.history_loss_weight:
            drawn_BTM = draw_history_weights((batch, length + 1), levels, generator).to(ids_BTM.device)
            weights, runs = [target_BTM, drawn_BTM * F.pad(real_BT, (0, 1), value=True).unsqueeze(-1)], 2
        weight = torch.cat(weights)
        states = self._run_with_target(ids_BTM.repeat(runs, 1, 1), weight > 0, real_BT.repeat(runs, 1))
        target = self._weighted_nll(states[:batch, -1:], ids_BTM[:, -1:], target_BTM[:, -1:])
        if runs == 1:
            return target, target.new_zeros(())
        history = self._weighted_nll(states[batch:], ids_BTM, weights[1])
        return target, history / (self.config.max_position_embeddings + 1)

    def _run_with_target(self, ids_BTM: Tensor, hidden_BTM: Tensor, real_BT: Tensor) -> Tensor:
        """States (B, T + 1, M, d) of histories (T items, `real_BT`) followed by the target, all in sight of each other."""
        position_BT = F.pad(self.model.positions(real_BT), (0, 1))
        x = self.model.embed(ids_BTM, hidden_BTM, position_BT)
        return self.model.encode(x, F.pad(real_BT, (0, 1), value=True))[0]

    def _weighted_nll(self, states_BGMd: Tensor, ids_BGM: Tensor, weight_BGM: Tensor) -> Tensor:
        """Sum over hidden codes of weight times negative log-probability, float32."""
        total = states_BGMd.new_zeros((), dtype=torch.float32)
        for level in range(self.config.num_levels):
            chosen_BG = weight_BGM[..., level] > 0
            target_P = ids_BGM[..., level][chosen_BG] - self.config.level_offsets[level]
            if target_P.device.type == "cpu" and target_P.numel():
                self._check_codes(target_P, level)
            logits_PC = self._head(states_BGMd[..., level, :][chosen_BG], level)
            nll_P = F.cross_entropy(logits_PC.float(), target_P, reduction="none")
            total = total + (nll_P * weight_BGM[..., level][chosen_BG]).sum()
        return total

    def _check_codes(self, codes_P: Tensor, level: int) -> None:
        first, size = self.config.level_offsets[level], self.config.codebook_sizes[level]
        lowest, highest = int(codes_P.min()), int(codes_P.max())
        if lowest < 0 or highest >= size:
            raise IncompatibleComponentsError(
                f"token {(lowest if lowest < 0 else highest) + first} is no code of position {level} (tokens {first} to "
                f"{first + size - 1}); build inputs and labels with the tokenizer the model was configured from."
            )

    def _head(self, states: Tensor, level: int) -> Tensor:
        """Logits (..., C) over the codebook of one slot."""
        return self.code_head.block(states, self.config.level_offsets[level], self.config.codebook_sizes[level])

    def _slot_logits(self, input_ids: Tensor, attention_mask: Tensor | None, target_ids: Tensor | None) -> Tensor:
        levels, batch = self.config.num_levels, input_ids.shape[0]
        offsets_M = torch.as_tensor(self.config.level_offsets, device=input_ids.device)
        codes = input_ids.new_full((batch, levels), -1)
        if target_ids is not None:
            codes = torch.where(target_ids < 0, -1, target_ids - offsets_M)
        states = self._slot_states(self.start_decoding(input_ids, attention_mask), codes.unsqueeze(1))[:, 0]
        logits = states.new_full((batch, levels, self.config.vocab_size), torch.finfo(states.dtype).min)
        for level, (first, size) in enumerate(zip(self.config.level_offsets, self.config.codebook_sizes)):
            logits[:, level, first : first + size] = self._head(states[:, level], level)
        return logits

    # ------------------------------------------------------------------------------------------------------- decoding

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> LLaDARecState:
        """Read B histories (B, S), padded on either side; S = 0 is a user without history. Keeps the newest items."""
        ids_BTM, real_BT = self.model.items_of(input_ids, attention_mask)
        newest = min(self.config.max_position_embeddings, ids_BTM.shape[1])
        order_BT = torch.argsort(real_BT.int(), dim=1, stable=True)[:, ids_BTM.shape[1] - newest :]
        ids_BTM = ids_BTM.gather(1, order_BT.unsqueeze(-1).expand(-1, -1, self.config.num_levels))
        real_BT = real_BT.gather(1, order_BT)
        state = LLaDARecState(ids_BTM, real_BT)
        if self.model.causal:
            x = self.model.embed(ids_BTM, None, self.model.positions(real_BT))
            _, state.cache = self.model.encode(x, real_BT)
        return state

    def score_positions(self, state: LLaDARecState, codes_BKM: Tensor) -> Tensor:
        """Log-probabilities of the codes of every slot, given the codes that are filled in.

        Args:
            codes_BKM: codes (not token ids), -1 = hidden.

        Returns:
            (B, K, M, C), C the largest codebook; each slot sums to one over its own codebook, -inf beyond its end.
            Slots that are filled in are scored as well (by a model that sees them).
        """
        states, largest = self._slot_states(state, codes_BKM), max(self.config.codebook_sizes)
        slots = []
        for level, size in enumerate(self.config.codebook_sizes):
            logp_BKC = self._head(states[:, :, level], level).float().log_softmax(-1)
            slots.append(F.pad(logp_BKC, (0, largest - size), value=-torch.inf))
        return torch.stack(slots, dim=2)

    def score_codes(self, state: LLaDARecState, prefix_BKl: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, C) of the codes of `level` when the slots are filled in from left to right."""
        if prefix_BKl.shape[-1] != level or not 0 <= level < self.config.num_levels:
            raise IncompatibleComponentsError(
                f"score_codes: level {level} needs prefixes of {level} codes, got {prefix_BKl.shape[-1]}"
            )
        codes = F.pad(prefix_BKl, (0, self.config.num_levels - level), value=-1)
        return self._head(self._slot_states(state, codes)[:, :, level], level).float().log_softmax(-1)

    def _slot_states(self, state: LLaDARecState, codes_BKM: Tensor) -> Tensor:
        """States (B, K, M, d) of partly filled slots."""
        hidden = codes_BKM < 0
        ids = codes_BKM.clamp(min=0) + torch.as_tensor(self.config.level_offsets, device=codes_BKM.device)
        if not self.model.causal:
            return self._slot_states_with_history(state, ids, hidden)
        position_BK = state.real_BT.sum(1, keepdim=True).expand(-1, codes_BKM.shape[1])
        groups = self.model.embed(ids, hidden, position_BK)
        length = state.real_BT.shape[1]
        distance_1T = torch.arange(length, 0, -1, device=ids.device).unsqueeze(0)
        for layer, history in zip(self.model.layers, state.cache, strict=True):
            groups = layer.forward_groups(groups, history, state.real_BT.unsqueeze(1), distance_1T)
        return self.model.norm(groups)

    def _slot_states_with_history(self, state: LLaDARecState, ids_BKM: Tensor, hidden_BKM: Tensor) -> Tensor:
        """The history sees the slots, so every beam runs its user's history again, a bounded number of tokens at a time."""
        batch, beams, levels = ids_BKM.shape
        length = state.ids_BTM.shape[1]
        rows = torch.arange(batch, device=ids_BKM.device).repeat_interleave(beams)
        slots, hide = ids_BKM.reshape(-1, 1, levels), hidden_BKM.reshape(-1, 1, levels)
        chunk = max(1, _CHUNK_TOKENS // ((length + 1) * levels))
        parts = []
        for start in range(0, max(1, len(rows)), chunk):
            users = rows[start : start + chunk]
            ids = torch.cat([state.ids_BTM[users], slots[start : start + chunk]], dim=1)
            hidden = F.pad(hide[start : start + chunk], (0, 0, length, 0))
            parts.append(self._run_with_target(ids, hidden, state.real_BT[users])[:, -1])
        return torch.cat(parts).view(batch, beams, levels, -1)
