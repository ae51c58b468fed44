"""EAGER: behaviour codes and semantic codes of the next item, generated side by side (arXiv 2406.14017).

An item has the codes of one tree per stream, one after the other: [behaviour | semantic]. One causal Transformer encodes
the history, read as item numbers through a table per stream; each stream has its own decoder, which starts from the newest
of the encoder's states, attends to all of them and writes the stream's codes. A state scores the codes that may follow the
codes so far by the inner product with their vectors, so that each stream is a distribution over the items of its tree.
Given the history the streams are independent: an item's score is the sum of its log-probabilities in both
(`decoding: two_stream`).

Training takes every position of a window at once: the decoder writes the codes of all next items, each seeing the states
up to its own position. To the cross-entropy of the codes (mean over a stream's levels, summed over streams) it adds

- a contrast: behind the codes stands a summary token, whose projected state is to pick out the item's fixed vector among
  sampled items;
- the guide: a bidirectional layer reads the summary of the semantic stream, *detached*, and the behaviour codes, and is to
  reconstruct a hidden code and to recognise tuples in which one was replaced. Its gradient reaches the behaviour codes'
  vectors, never the semantic decoder.

Both are left out in evaluation mode: the validation loss is that of the codes.

Relations: `guide_weight=0`, `contrast_weights=[0, 0]` are two generators with a shared encoder; one stream
(`stream_levels: [2]`) is a tree-indexed generator by itself.

Shapes: B batch, T items of a window, G = T targets of a row, L levels of all streams, S encoder states, Q decoder tokens,
d width, P positions with a target, K beams, l codes of a prefix, C codes of a level, N items, F feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.recommend import RecommendationMixin

from .blocks import Guide, KeysValues, StreamDecoder
from .configuration_eager import EagerConfig
from .encoder import EagerModel, EagerPreTrainedModel, visible_states


@dataclass
class EagerOutput(CausalLMOutput):
    """`loss` = `code_loss` + weighted `contrast_loss` and `guide_loss` (both None in evaluation mode); or `logits`."""

    code_loss: Tensor | None = None
    contrast_loss: Tensor | None = None
    guide_loss: Tensor | None = None


@dataclass
class EagerState:
    """What decoding needs of B encoded users: per stream the newest state (B, 1, d) and the memory as its layers read it."""

    newest: list[Tensor]
    memory: list[list[KeysValues]]
    mask_B11S: Tensor  # which of the memory is real


class EagerForCausalLM(RecommendationMixin, EagerPreTrainedModel, GenerationMixin):
    """Encoder, one decoder per stream, contrast heads and guide.

    Example:
        >>> config = EagerConfig(codebook_sizes=[2, 4, 2, 4], level_offsets=[4, 6, 10, 12], vocab_size=16, num_items=3)
        >>> model = EagerForCausalLM(config).eval()
        >>> model.set_catalogue([[0, 0, 1, 2], [0, 1, 0, 0], [1, 2, 0, 1]])
        >>> state = model.start_decoding(torch.tensor([[4, 6, 11, 14]]))
        >>> model.score_stream(state, 0, torch.tensor([[[0]]]), 1).exp().sum().item()  # of the two codes behind code 0
        1.0
    """

    def __init__(self, config: EagerConfig) -> None:
        super().__init__(config)
        self.model = EagerModel(config)
        self.decoders = nn.ModuleList(StreamDecoder(config, levels) for levels in config.stream_levels)
        widths = [len(range(config.item_feature_dim)[part]) for part in self._feature_columns()]
        self.contrast_heads = nn.ModuleList(nn.Linear(config.hidden_size, width) for width in widths)
        guided = config.num_streams > 1 and config.guide_weight
        self.guide = Guide(config, config.stream_levels[0]) if guided else None
        self.post_init()

    def _feature_columns(self) -> list[slice]:
        parts = [self.config.feature_columns(stream) for stream in range(self.config.num_streams)]
        return [part for part in parts if part is not None]

    @property
    def stream_levels(self) -> list[int]:
        """Codes of each stream: what the search "two_stream" asks for."""
        return list(self.config.stream_levels)

    def set_catalogue(self, item_codes: Any, item_features: Any | None = None) -> None:
        """See `EagerModel.set_catalogue`."""
        self.model.set_catalogue(item_codes, item_features)

    # -- training -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> EagerOutput:
        """Loss over all positions, or next-token log-probabilities.

        Args:
            input_ids: (B, T * L) item tokens; without labels the last item may be incomplete.
            labels: (B, T * L), aligned with `input_ids` (an item is predicted from those before it); items whose labels
                are -100 are no targets.
            num_items_in_batch: label tokens of the whole optimiser step, for exact gradient accumulation; None = the
                mean over this batch.
            logits_to_keep: without labels, only the last so many positions (0 = all).

        Returns:
            The losses, each a mean over targets; or, without labels, `logits` (B, T * L, V): position s predicts token
            s + 1, tokens that cannot come at finfo.min.

        Raises:
            IncompatibleComponentsError: tokens that are not whole items, or labels that are no item of the catalogue.
        """
        if labels is None:
            return EagerOutput(logits=self._token_logits(input_ids, attention_mask, logits_to_keep))
        rows_BT, mask_BT = self.model.items(input_ids, attention_mask)
        target_BT, rows_P = self._targets(labels)
        losses = {"code": rows_P.new_zeros((), dtype=torch.float32), "contrast": None, "guide": None}
        auxiliary = self.training and (any(self._contrast_weights()) or self.guide is not None)
        picked = self._pick_targets(target_BT) if auxiliary else None
        # behind which the summary token stands: all targets at once, or some of them in a pass of their own
        summary_BT = target_BT if picked is None else target_BT.gather(1, picked)
        summaries = []
        for stream, tree in enumerate(self.model.tables()[1]):
            # the last item is only a target
            memory_BSd = self.model.encode(rows_BT[:, :-1], mask_BT[:, :-1], stream)
            decode = partial(self._decode_targets, stream, rows_BT, mask_BT[:, :-1], memory_BSd)
            states_BGQd = decode(summary=auxiliary and picked is None)
            for level in range(self.stream_levels[stream]):
                loss = tree.cross_entropy(level, states_BGQd[:, :, level][target_BT], rows_P, self._code_vectors())
                losses["code"] = losses["code"] + loss / self.stream_levels[stream]
            if auxiliary:
                states_BGQd = states_BGQd if picked is None else decode(summary=True, picked=picked)
                summaries.append(states_BGQd[:, :, -1][summary_BT])
        if auxiliary:
            rows_p = rows_P if picked is None else rows_BT.gather(1, picked)[summary_BT]
            share = len(rows_P) / max(len(rows_p), 1)  # those picked stand for all
            for name, term in (("contrast", self._contrast), ("guide", self._guidance)):
                loss = term(summaries, rows_p)
                losses[name] = None if loss is None else share * loss
        count: Any = max(len(rows_P), 1)
        if num_items_in_batch is not None:  # label tokens -> target items of the whole step
            count = num_items_in_batch / self.config.num_levels
            count = count.to(rows_P.device) if torch.is_tensor(count) else count
        parts = {f"{name}_loss": None if loss is None else loss / count for name, loss in losses.items()}
        return EagerOutput(loss=sum(loss for loss in parts.values() if loss is not None), **parts)

    def _code_vectors(self) -> Tensor:
        return self.model.code_embedding.weight

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which items are targets (B, T), and their catalogue rows (P,)."""
        first_BT = labels.reshape(len(labels), -1, self.config.num_levels)[..., 0]
        rows_BT, target_BT = self.model.items(labels, (labels != -100).long())
        rows_P = rows_BT[target_BT]
        if labels.device.type == "cpu" and bool((rows_P < 0).any()):
            token = int(first_BT[target_BT][rows_P < 0][0])
            raise IncompatibleComponentsError(
                f"labels hold an item (first token {token}) that is not in the catalogue of {self.config.num_items}; "
                "labels are whole items of the tokenizer that the model was configured from, -100 where there is no target."
            )
        return target_BT, rows_P.clamp(min=0)

    def _pick_targets(self, target_BT: Tensor) -> Tensor | None:
        """Positions (B, p) of at most `summary_targets` random targets of each row; None = all of them."""
        most = self.config.summary_targets
        if most is None or int(target_BT.sum(1).max()) <= most:
            return None
        order_BT = torch.rand(target_BT.shape, device="cpu").to(target_BT.device).masked_fill(~target_BT, -1)
        return order_BT.topk(most, dim=1).indices

    def _decode_targets(
        self,
        stream: int,
        rows_BT: Tensor,
        mask_BS: Tensor,
        memory_BSd: Tensor,
        *,
        summary: bool,
        picked: Tensor | None = None,
    ) -> Tensor:
        """Decoder states (B, G, Q, d): the item at t from the items before it, its codes given (all with `summary`)."""
        visible_B1GS = visible_states(mask_BS)
        newest_BGd = memory_BSd
        if picked is not None:
            rows_BT = rows_BT.gather(1, picked)
            newest_BGd = memory_BSd.gather(1, picked.unsqueeze(-1).expand(-1, -1, memory_BSd.shape[-1]))
            index = picked[:, None, :, None].expand(-1, 1, -1, visible_B1GS.shape[-1])
            visible_B1GS = visible_B1GS.gather(2, index)
        codes_BGl = self.model.item_codes[rows_BT.clamp(min=0)][..., self.config.stream_columns(stream)]
        vectors_BGld = self._code_states(stream, codes_BGl if summary else codes_BGl[..., :-1])
        decoder = self.decoders[stream]
        return decoder(vectors_BGld, newest_BGd, decoder.read_memory(memory_BSd), visible_B1GS, summary=summary)

    def _contrast_weights(self) -> list[float]:
        return [weight for weight, _ in zip(self.config.contrast_weights, self.contrast_heads)]

    def _code_states(self, stream: int, codes_Xl: Tensor) -> Tensor:
        """Vectors (X, l, d) of the first l codes of a stream."""
        offsets = self.config.level_offsets[self.config.stream_columns(stream)][: codes_Xl.shape[-1]]
        return self.model.code_embedding(codes_Xl.long() + torch.tensor(offsets, dtype=torch.long, device=self.device))

    def _contrast(self, summaries: list[Tensor], rows_P: Tensor) -> Tensor | None:
        """Weighted sum over streams of -log p(the item's fixed vector among sampled items), summed over P."""
        config = self.config
        weights = self._contrast_weights()
        if not any(weights):
            return None
        if config.num_items <= config.contrast_samples:
            drawn_S = torch.arange(config.num_items, device=rows_P.device)
        else:
            drawn_S = torch.randint(config.num_items, (config.contrast_samples,), device="cpu").to(rows_P.device)
        same_PS = rows_P[:, None] == drawn_S
        total = rows_P.new_zeros((), dtype=torch.float32)
        for weight, part, head, summary in zip(weights, self._feature_columns(), self.contrast_heads, summaries):
            if weight:
                query_PF = F.normalize(head(summary).float(), dim=-1)
                features_NF = F.normalize(self.model.item_features[:, part].float(), dim=-1)
                others_PS = (query_PF @ features_NF[drawn_S].T).masked_fill(same_PS, -torch.inf)
                own_P1 = (query_PF * features_NF[rows_P]).sum(-1, keepdim=True)
                logits = torch.cat([own_P1, others_PS], dim=1) / config.contrast_temperature
                total = total + weight * F.cross_entropy(logits, torch.zeros_like(rows_P), reduction="sum")
        return total

    def _guidance(self, summaries: list[Tensor], rows_P: Tensor) -> Tensor | None:
        """Weighted reconstruction + recognition of the first stream's codes from the second's summary, summed over P."""
        if self.guide is None:
            return None
        summary_Pd, tree = summaries[1].detach(), self.model.tables()[1][0]
        levels, sizes = self.stream_levels[0], self.config.codebook_sizes
        codes_Pl = self.model.item_codes[rows_P, :levels].long()
        vectors_Pld = self._code_states(0, codes_Pl)
        hidden, replaced = torch.randint(levels, (2,), device="cpu").tolist()
        states_Pd = self.guide.reconstruct(vectors_Pld, summary_Pd, hidden)
        loss = tree.cross_entropy(hidden, states_Pd, rows_P, self._code_vectors().detach())
        if sizes[replaced] > 1:  # with one code there is no wrong one
            shift_P = torch.randint(1, sizes[replaced], (len(rows_P),), device="cpu").to(rows_P.device)
            wrong_Pl = codes_Pl.clone()
            wrong_Pl[:, replaced] = (wrong_Pl[:, replaced] + shift_P) % sizes[replaced]
            both = torch.cat([vectors_Pld, self._code_states(0, wrong_Pl)])
            logits = self.guide.recognise(both, torch.cat([summary_Pd, summary_Pd]))
            right = torch.arange(len(both), device=both.device) < len(rows_P)
            judged = F.binary_cross_entropy_with_logits(logits.float(), right.float(), reduction="sum")
            loss = loss + judged / 2
        return self.config.guide_weight * loss

    # -- plain forward --------------------------------------------------------------------------------------------

    def _token_logits(self, input_ids: Tensor, attention_mask: Tensor | None, keep: int) -> Tensor:
        """Next-token log-probabilities (B, S or keep, V)."""
        levels, (batch, length) = self.config.num_levels, input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        whole, rest = divmod(length, levels)
        rows_BT, mask_BT = self.model.items(input_ids[:, : whole * levels], mask[:, : whole * levels])
        # codes of the items and of the one being written; what it lacks is never looked at
        offsets = torch.tensor(self.config.level_offsets, device=input_ids.device)
        lacking = offsets[rest:].expand(batch, -1)
        codes_BGL = torch.cat([input_ids, lacking], dim=1).view(batch, whole + 1, levels) - offsets
        codes_BGL = codes_BGL.minimum(torch.tensor(self.config.codebook_sizes, device=offsets.device) - 1).clamp(min=0)
        low = torch.finfo(self._code_vectors().dtype).min
        logits = self._code_vectors().new_full((batch, whole + 1, levels, self.config.vocab_size), low)
        for stream, decoder in enumerate(self.decoders):
            part = self.config.stream_columns(stream)
            memory_BSd = self.model.encode(rows_BT, mask_BT, stream)
            vectors = self._code_states(stream, codes_BGL[..., part][..., :-1])
            states = decoder(vectors, memory_BSd, decoder.read_memory(memory_BSd), visible_states(mask_BT))
            for level in range(self.stream_levels[stream]):
                logp = self._level_log_probs(stream, level, states[:, :, level], codes_BGL[..., part][..., :level])
                column = part.start + level
                start = self.config.level_offsets[column]
                logits[:, :, column, start : start + logp.shape[-1]] = logp.clamp(min=low).to(logits.dtype)
        logits = logits.flatten(1, 2)[:, 1 : length + 1]
        return logits[:, -keep:] if keep else logits

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`generate` passes the whole sequence each step: the reference path, `recommend` is the fast one."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    # -- recommendation -------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> EagerState:
        """Encode B users once for each stream.

        Args:
            input_ids: (B, T * L) item tokens, padded on either side; of longer histories the newest items are read.
            attention_mask: (B, T * L); None = no padding.
        """
        rows_BT, mask_BT = self.model.items(input_ids, attention_mask)
        # the newest items that fit, moved to the right end whatever the padding side
        newest = min(self.config.max_position_embeddings, rows_BT.shape[1])
        order = torch.argsort(mask_BT.int(), dim=1, stable=True)[:, rows_BT.shape[1] - newest :]
        rows_BT, mask_BT = rows_BT.gather(1, order), mask_BT.gather(1, order)
        states = [self.model.encode(rows_BT, mask_BT, stream) for stream in range(self.config.num_streams)]
        newest = [states_BSd[:, -1:] for states_BSd in states]
        memory = [decoder.read_memory(states_BSd) for decoder, states_BSd in zip(self.decoders, states, strict=True)]
        return EagerState(newest, memory, F.pad(mask_BT, (1, 0), value=True)[:, None, None, :])

    def _level_log_probs(self, stream: int, level: int, states_BKd: Tensor, prefix_BKl: Tensor) -> Tensor:
        """Log-probabilities (B, K, C) of a level's codes, float32; -inf for codes that cannot follow the prefix."""
        tree = self.model.tables()[1][stream]
        children = tree.children(level, tree.trie.lookup(prefix_BKl))
        low = torch.finfo(torch.float32).min  # not -inf: a prefix that leads nowhere has no children at all
        logits = tree.logits(level, states_BKd, children, self._code_vectors()).masked_fill(~children.valid_XW, low)
        size = tree.trie.codebook_sizes[level]
        codes_BKW = children.codes_XW.masked_fill(~children.valid_XW, size)  # padding goes to a column that is cut off
        logp = logits.new_full((*logits.shape[:-1], size + 1), -torch.inf)
        return logp.scatter(-1, codes_BKW, logits.log_softmax(-1))[..., :size]

    def score_stream(self, state: EagerState, stream: int, prefix_BKl: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, C) of a stream's next code behind the stream's codes so far; l = level of the stream."""
        vectors = self._code_states(stream, prefix_BKl)
        states = self.decoders[stream](vectors, state.newest[stream], state.memory[stream], state.mask_B11S)
        return self._level_log_probs(stream, level, states[:, :, -1], prefix_BKl)

    def score_codes(self, state: EagerState, prefix_BKl: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, C) of the codes of `level`, counted over all streams: their sum is the fused score."""
        stream = 0 if level < self.stream_levels[0] else 1
        first = self.config.stream_columns(stream).start
        return self.score_stream(state, stream, prefix_BKl[..., first:], level - first)
