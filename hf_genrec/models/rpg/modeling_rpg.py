"""RPG: a causal timeline over items whose state predicts all L digits of the next item at once (arXiv 2506.05781).

An item enters as the mean of its L code vectors, so the sequence is as long as the history has items, however long the
codes are. One head per digit (a residual SiLU block that starts as the identity) turns a state into a vector; a code's
logit is the cosine with its own vector, divided by a temperature. Given the history the digits are independent: the loss
is the mean of their cross-entropies, an item's score is the mean of its digits' log-probabilities, and one forward per
request is all a search needs (`generation/decoding/parallel.py`: full scan, or propagation over an item graph).

A learned start vector stands before the first item, so the state at position t has seen items 0..t-1 and a user without
items has a state too.

Relations: with one digit per item this is SASRec with cosine logits and a head; beam search over the trie
(`decoding="beam"`) adds the same log-probabilities digit by digit, so its scores are L times those of "parallel".

Shapes: B batch, T items of a window, S = T * L tokens, L levels (digits), C codes of the largest level, d width,
P positions with a target, K beams, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.models.item_timeline import ItemTimeline, newest_items, whole_items

from .configuration_rpg import RPGConfig


class DigitHeads(nn.Module):
    """One residual SiLU block per digit: h + silu(h W_l + b_l), the identity at the start."""

    def __init__(self, config: RPGConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_levels, config.hidden_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_levels, 1, config.hidden_size))

    def forward(self, states_Pd: Tensor) -> Tensor:
        """Head vectors (L, P, d) of states (P, d)."""
        states_LPd = states_Pd.expand(self.weight.shape[0], -1, -1)
        return states_LPd + F.silu(torch.baddbmm(self.bias, states_LPd, self.weight))


class RPGPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by the two classes below."""

    config_class = RPGConfig  # not an annotation: postponed annotations would reach transformers as strings
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DigitHeads):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, RPGModel):
            std = self.config.embedding_std
            init.normal_(module.code_embedding.weight, std=std)
            # as long as an item's vector, the mean of L code vectors
            init.normal_(module.position_embedding.weight, std=std / self.config.num_levels**0.5)
            init.normal_(module.start, std=std / self.config.num_levels**0.5)


class RPGModel(ItemTimeline, RPGPreTrainedModel):
    """The timeline: item vectors in, one state per position out (the state at t has read the start and items < t)."""

    code_embedding: nn.Module

    def __init__(self, config: RPGConfig) -> None:
        RPGPreTrainedModel.__init__(self, config)
        self.code_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.build_timeline(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.code_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.code_embedding = value

    def item_vectors(self, ids_BTL: Tensor) -> Tensor:
        """One vector per item, the mean of its code vectors. (B, T, d)"""
        batch, length, levels = ids_BTL.shape
        vectors = F.embedding_bag(ids_BTL.reshape(-1, levels), self.code_embedding.weight, mode="mean")
        return vectors.view(batch, length, self.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """States of all positions.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side by whole items.
            attention_mask: (B, T * L), 1 = token, 0 = padding; None = no padding.

        Returns:
            `last_hidden_state` (B, T + 1, d): position t predicts item t, position T the item after the window.

        Raises:
            IncompatibleComponentsError: tokens that are not whole items, or more of them than the model reads.
        """
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        return BaseModelOutput(last_hidden_state=self.run_timeline(self.item_vectors(ids_BTL), mask_BT))


@dataclass
class DigitState:
    """What `start_decoding` keeps per user: log-probabilities of all digits, float32, -inf beyond a smaller codebook."""

    logp_BLC: Tensor


class RPGForCausalLM(RecommendationMixin, RPGPreTrainedModel, GenerationMixin):
    """The timeline with one head per digit.

    Example:
        >>> config = RPGConfig(codebook_sizes=[4, 4], level_offsets=[4, 8], vocab_size=12, hidden_size=8)
        >>> model = RPGForCausalLM(config).eval()
        >>> state = model.start_decoding(torch.tensor([[4, 8, 7, 11]]))
        >>> model.score_digits(state).exp().sum(-1)
        tensor([[1.0000, 1.0000]], grad_fn=<SumBackward1>)
    """

    def __init__(self, config: RPGConfig) -> None:
        super().__init__(config)
        self.model = RPGModel(config)
        self.heads = DigitHeads(config)
        self.post_init()

    # -- digits ---------------------------------------------------------------------------------------------------

    def _digit_tokens(self) -> tuple[Tensor, Tensor]:
        """Token id of every code (L, C), and where a smaller codebook has none (L, C) bool."""
        sizes = torch.tensor(list(self.config.codebook_sizes), device=self.device)
        codes_C = torch.arange(max(self.config.codebook_sizes), device=self.device)
        absent_LC = codes_C >= sizes[:, None]
        tokens_LC = codes_C + torch.tensor(list(self.config.level_offsets), device=self.device)[:, None]
        return tokens_LC.masked_fill(absent_LC, 0), absent_LC

    def digit_vectors(self) -> Tensor:
        """Code vectors of every digit at length 1 (L, C, d), 0 beyond a smaller codebook."""
        tokens_LC, absent_LC = self._digit_tokens()
        vectors = F.normalize(F.embedding(tokens_LC, self.model.code_embedding.weight), dim=-1)
        return vectors.masked_fill(absent_LC.unsqueeze(-1), 0.0)

    def digit_logits(self, states_Pd: Tensor) -> Tensor:
        """Cosine over temperature of every digit's codes (L, P, C), float32; -inf beyond a smaller codebook."""
        heads_LPd = F.normalize(self.heads(states_Pd), dim=-1)
        logits = torch.bmm(heads_LPd, self.digit_vectors().transpose(1, 2)).float() / self.config.cosine_temperature
        if len(set(self.config.codebook_sizes)) > 1:
            logits = logits.masked_fill(self._digit_tokens()[1].unsqueeze(1), -torch.inf)
        return logits

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
        """Loss over all positions, or next-token logits.

        Args:
            input_ids: (B, S) item tokens; with labels S = T * L, without labels the last item may be incomplete.
            labels: (B, T * L), aligned with `input_ids` (an item is predicted from those before it); items whose first
                label is -100 are no targets.
            num_items_in_batch: label tokens of the whole optimiser step, for exact gradient accumulation; None = the
                mean over this batch.
            logits_to_keep: without labels, only the last so many positions (0 = all).

        Returns:
            `loss`, the mean over targets and digits; or, without labels, `logits` (B, S, V): position s predicts token
            s + 1, codes of other digits at finfo.min.

        Raises:
            IncompatibleComponentsError: tokens that are not whole items, or labels that are not their digit's codes.
        """
        if labels is None:
            return CausalLMOutput(logits=self._token_logits(input_ids, attention_mask, logits_to_keep))
        levels = self.config.num_levels
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # the last item is only a target, so the timeline reads T - 1 items and gives T states
        states_BTd = self.model(input_ids[:, :-levels], mask[:, :-levels]).last_hidden_state
        labels_BTL = labels.reshape(*states_BTd.shape[:2], levels)
        target_BT = labels_BTL[..., 0] != -100
        codes_PL = labels_BTL[target_BT] - torch.tensor(list(self.config.level_offsets), device=labels.device)
        self._check_codes(codes_PL)
        logits_LPC = self.digit_logits(states_BTd[target_BT])
        loss = F.cross_entropy(logits_LPC.flatten(0, 1), codes_PL.t().flatten(), reduction="sum")
        count: Any = max(codes_PL.numel(), 1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=loss / (count.to(loss.device) if torch.is_tensor(count) else count))

    def _check_codes(self, codes_PL: Tensor) -> None:
        if codes_PL.device.type != "cpu":  # on an accelerator the look would cost a synchronisation per step
            return
        wrong_PL = (codes_PL < 0) | (codes_PL >= torch.tensor(list(self.config.codebook_sizes)))
        if bool(wrong_PL.any()):
            level = int(wrong_PL.nonzero()[0, 1])
            token = int(codes_PL[wrong_PL][0]) + int(self.config.level_offsets[level])
            raise IncompatibleComponentsError(
                f"labels hold token {token} at digit {level}, which is no code of it; labels are item tokens in whole "
                "items of L digits, and -100 at all digits of an item that is no target."
            )

    def _token_logits(self, input_ids: Tensor, attention_mask: Tensor | None, keep: int) -> Tensor:
        """Next-token logits (B, S or keep, V). One pass where the history fits, else one per predicted item."""
        levels, (batch, length) = self.config.num_levels, input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        first = length - min(keep, length) if keep else 0
        weight = self.model.code_embedding.weight
        logits = torch.full(
            (batch, length - first, self.config.vocab_size),
            torch.finfo(weight.dtype).min,
            dtype=weight.dtype,
            device=input_ids.device,
        )
        items = range((first + 1) // levels, length // levels + 1)
        whole = length // levels
        states_BTd = None
        if whole <= self.config.max_position_embeddings:
            states_BTd = self.model(input_ids[:, : whole * levels], mask[:, : whole * levels]).last_hidden_state
        for item in items:
            if states_BTd is not None:
                state = DigitState(self._log_probs(states_BTd[:, item]))
            else:
                state = self.start_decoding(input_ids[:, : item * levels], mask[:, : item * levels])
            for level in range(levels):
                position = item * levels + level - 1  # the one that predicts this digit
                if first <= position < length:
                    start, size = int(self.config.level_offsets[level]), int(self.config.codebook_sizes[level])
                    scores = state.logp_BLC[:, level, :size].to(logits.dtype)
                    logits[:, position - first, start : start + size] = scores
        return logits

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`generate` passes the whole sequence each step: the reference path, `recommend` is the fast one."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    # -- recommendation -------------------------------------------------------------------------------------------

    def _log_probs(self, states_Bd: Tensor) -> Tensor:
        return self.digit_logits(states_Bd).log_softmax(-1).transpose(0, 1)

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> DigitState:
        """Read the histories once: log-probabilities of all digits of the next item, whatever search follows.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side; of longer histories the newest items are read.
            attention_mask: (B, T * L); None = no padding.
        """
        ids_BTL, mask_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        ids_BTL, mask_BT = newest_items(ids_BTL, mask_BT, self.config.max_position_embeddings)
        mask_BTL = mask_BT.unsqueeze(-1).expand_as(ids_BTL)
        states = self.model(ids_BTL.flatten(1), mask_BTL.flatten(1)).last_hidden_state
        return DigitState(self._log_probs(states[:, -1]))

    def score_digits(self, state: DigitState) -> Tensor:
        """Log-probabilities (B, L, C) of every digit's codes, float32; -inf beyond a smaller codebook."""
        return state.logp_BLC

    def score_codes(self, state: DigitState, prefix_BKl: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, C) of the codes of `level`: the same behind every prefix, as digits are independent."""
        size = int(self.config.codebook_sizes[level])
        return state.logp_BLC[:, None, level, :size].expand(-1, prefix_BKl.shape[1], -1)
