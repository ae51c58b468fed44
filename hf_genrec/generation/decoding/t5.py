"""Decoding for the T5 family (T5, mT5, umT5 and TIGER, arXiv 2305.05065): every part of the work is done once.

- The encoder runs once per user. Its output is projected to the keys and values of each cross-attention once per user,
  and stored once: the beams of a user are query positions of one attention, so nothing is ever copied per beam.
- One step of the decoder runs the newest code of each beam only. Keys and values of the codes before it stay where they
  were computed; beams that change places change a row number, and rows are gathered when they are read. Those of the
  start token are the same for all beams of a user and are stored once per user.
- The head is multiplied with the rows of the level's code block only. Where the normaliser runs over the whole
  vocabulary (stock T5), it is a logsumexp over blocks of rows: no table of log-probabilities is kept.

Every projection is one with the model's live weights, or a call of its own module (LoRA, quantised layers, hooks); what
is replaced is the code around them (t5_layers.py). `fits` says whether a model is one whose code this is.

Numbers equal those of the model's own forward to about 1e-5 (float32).

Shape legend: B users, K beams, S encoder positions, L levels, l codes so far, C codes of a level, V vocabulary, H heads,
D width of a head, M width of the model, P positions of the decoder so far, R = B * K rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from ...errors import IncompatibleComponentsError
from .beam_cache import BeamCache, CodeScores, StatelessBeams
from .t5_layers import (
    FAMILY,
    Attention,
    Layer,
    clamped,
    decoder_bias,
    encode,
    feed_forward,
    layers_of,
    norm,
    runs_as_written,
)

_ROWS_PER_CALL = 2048  # B * K rows that `score_codes` runs together; bounds memory, changes nothing else
_LOGITS_PER_BLOCK = 2**22  # numbers of a full-vocabulary head held at once


@dataclass(frozen=True)
class T5State:
    """What decoding needs of B encoded users; nothing changes it afterwards, so searches can share it.

    Attributes:
        keys, values: per decoder layer, those of the cross-attention, (B, H, S, D).
        mask: (B, 1 or H, 1, S) additive mask of the encoder positions, or None when all are real.
        layers: the decoder's modules, looked up once.
        as_written: see `runs_as_written`.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor | None
    layers: list[Layer]
    as_written: bool

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]


def fits(model: Any) -> bool:
    """Is this a stock T5, mT5 or umT5 with a language-model head (LoRA and quantised layers included)?"""
    if hasattr(model, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in model.peft_config.values()):
            return False
        model = model.get_base_model()
    name = type(model).__name__
    return type(model).__module__ in FAMILY and name.endswith("ForConditionalGeneration") and runs_as_written(model)


def _scales_outputs(model: Any) -> bool:
    """Does the family member divide by sqrt(M) before the head?"""
    if type(model.decoder).__name__ == "MT5Stack":
        return False
    return (
        model.config.tie_word_embeddings
        if type(model.decoder).__name__ == "UMT5Stack"
        else model.config.scale_decoder_outputs
    )


class T5Decoder:
    """`start_decoding`, `start_beams` and `score_codes` for a model of the T5 family, in evaluation mode.

    Holds no weights and no state: it may be made anew for every call.

    Args:
        model: see `fits`.
        level_offsets: (L,) token id of code 0 of each level.
        codebook_sizes: codes per level.
        start_token: opens the decoder's sequence.
        restrict_to_level: True = probabilities are normalised over the code block of the level (TIGER); False = over
            the whole vocabulary.
    """

    def __init__(
        self,
        model: Any,
        level_offsets: Sequence[int],
        codebook_sizes: Sequence[int],
        start_token: int,
        *,
        restrict_to_level: bool = False,
    ):
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.level_offsets = level_offsets
        self.codebook_sizes = codebook_sizes
        self.start_token = start_token
        self.restrict_to_level = restrict_to_level

    @functools.cached_property
    def as_written(self) -> bool:
        """May the engine replace the code around the model's modules? If not, the encoder runs by itself."""
        return runs_as_written(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def start_decoding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> T5State:
        """Encode B users once and project the result to the keys and values of every cross-attention.

        Args:
            input_ids: (B, S) tokens of the histories; S = 0 (nothing known about the user) is fine.
            attention_mask: (B, S), 0 = padding, on either side; None = no padding.
        """
        return self.state_of(*self.encode(input_ids, attention_mask))

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encoder states (B, S, M) and their mask (B, S), None where nothing is padding."""
        if input_ids.shape[1] == 0:
            input_ids = input_ids.new_full((input_ids.shape[0], 1), self.model.config.pad_token_id or 0)
            attention_mask = torch.zeros_like(input_ids)
        padded = attention_mask is not None and not bool(attention_mask.all())
        mask_BS = attention_mask if padded else None
        if self.as_written:
            return encode(self.model.encoder, input_ids, mask_BS), mask_BS
        states_BSM = self.model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states_BSM, mask_BS

    def state_of(self, states_BSM: torch.Tensor, attention_mask: torch.Tensor | None) -> T5State:
        """The decoding state of encoder states that are there already; mask None = no padding.

        A decoder may have its own `prefix_bias(attention_mask_BS, lengths_B1, dtype)` -> additive (B, H, 1, S).
        """
        batch, length, _ = states_BSM.shape
        layers = layers_of(self.model.decoder)
        keys, values = [], []
        for layer in layers:
            attention = layer.cross
            assert attention is not None  # a decoder's
            shape = (batch, length, attention.heads, attention.width)
            keys.append(attention.k(states_BSM).view(shape).transpose(1, 2))
            values.append(attention.v(states_BSM).view(shape).transpose(1, 2))
        mask = None
        if hasattr(self.model.decoder, "prefix_bias"):  # a decoder that knows which token is the newest
            real_BS = states_BSM.new_ones(batch, length) if attention_mask is None else attention_mask
            lengths_B1 = real_BS.long().sum(1, keepdim=True)
            mask = self.model.decoder.prefix_bias(real_BS, lengths_B1, keys[0].dtype)
        elif attention_mask is not None:  # finite numbers: a user without history attends to padding
            real_BS = attention_mask.bool()
            mask = torch.zeros_like(real_BS, dtype=keys[0].dtype).masked_fill_(~real_BS, torch.finfo(keys[0].dtype).min)
            mask = mask[:, None, None]
        return T5State(keys, values, mask, layers, self.as_written)

    def start_from_encoder(self, states_BSM: torch.Tensor, attention_mask: torch.Tensor | None = None) -> T5State:
        """As `start_decoding`, from an encoder output that is there already."""
        padded = attention_mask is not None and not bool(attention_mask.all())
        return self.state_of(states_BSM, attention_mask if padded else None)

    def start_beams(self, state: T5State) -> BeamCache:
        """A search's own place in the model; any number of them may run from one state."""
        if state.as_written:
            return T5Beams(self, state)
        return StatelessBeams(self, state, state.batch_size, state.keys[0].device)

    def score_codes(self, state: T5State, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor:
        """Log-probabilities (B, K, C) of the level's codes after the codes of each prefix.

        The stateless reference of `start_beams`: the decoder's own layers run over all l + 1 positions anew.
        """
        batch, _, length = prefix_BKl.shape
        if length != level or not 0 <= level < len(self.level_offsets):
            raise IncompatibleComponentsError(
                f"score_codes: level {level} needs prefixes of {level} codes, got {length}"
            )
        offsets = torch.tensor(self.level_offsets[:level], device=prefix_BKl.device, dtype=torch.long)
        parts = []
        for codes_BKl in prefix_BKl.split(max(1, _ROWS_PER_CALL // max(1, batch)), dim=1):
            tokens = nn.functional.pad(codes_BKl + offsets, (1, 0), value=self.start_token)
            hidden = self._last_of(state, tokens.flatten(0, 1)).view(*codes_BKl.shape[:2], -1)
            parts.append(self.score_hidden(hidden, level, True).log_probs())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _last_of(self, state: T5State, tokens_RQ: torch.Tensor) -> torch.Tensor:
        """Decoder state (R, M) at the last of Q positions."""
        stack = self.model.decoder
        x = stack.embed_tokens(tokens_RQ)
        length = tokens_RQ.shape[1]
        options: dict[str, Any] = {}
        causal = x.new_full((length, length), torch.finfo(x.dtype).min).triu(1)[None, None] if length > 1 else None
        for block, layer, keys, values in zip(stack.block, state.layers, state.keys, state.values):
            x, *more = block.layer[0](x, attention_mask=causal, **options)
            if not layer.has_own_bias:  # one table of relative positions, handed from layer to layer
                options = {"position_bias": more[0]}
            if block is stack.block[-1]:
                x = x[:, -1:]  # nothing after the last self-attention looks at the earlier positions
            cross = block.layer[1]
            query = cross.EncDecAttention.q(cross.layer_norm(x))
            query = query.view(state.batch_size, -1, keys.shape[1], keys.shape[3]).transpose(1, 2)
            mixed = scaled_dot_product_attention(query, keys, values, attn_mask=state.mask, scale=1.0)
            x = x + cross.EncDecAttention.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
            x = block.layer[-1](x)
        return stack.final_layer_norm(x)[:, -1]

    def score_hidden(self, hidden_BKM: torch.Tensor, level: int, total: bool) -> CodeScores:
        """The head: scores of the level's block, and the normaliser where `total` asks for it."""
        model, first, size = self.model, self.level_offsets[level], self.codebook_sizes[level]
        if _scales_outputs(model):
            hidden_BKM = hidden_BKM * (model.model_dim**-0.5)
        head = model.lm_head
        plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
        if plain and (self.restrict_to_level or not total):
            logits = nn.functional.linear(hidden_BKM, head.weight[first : first + size])
            return CodeScores(logits.float().log_softmax(-1) if total else logits)  # one pass less than a logsumexp
        blocks, totals = [], []
        rows = max(1, _LOGITS_PER_BLOCK // head.weight.shape[0])
        for part in hidden_BKM.flatten(0, 1).split(rows):
            logits = head(part)
            blocks.append(logits[:, first : first + size].clone())
            normalised = blocks[-1] if self.restrict_to_level else logits
            if total:
                totals.append(normalised.float().logsumexp(-1))
        shape = hidden_BKM.shape[:2]
        return CodeScores(torch.cat(blocks).view(*shape, size), torch.cat(totals).view(shape) if total else None)


class T5Beams:
    """The BeamCache of one search: keys and values of the beams' own codes.

    Attributes:
        own: per decoder position P, per layer, the key and value rows as computed, (rows of that step, H * D); for the
            start token these are the B users.
        rows: per position after the start token, the row of `own` that each current beam descends from, (R,).
        tokens: (R,) newest token of each beam.
    """

    def __init__(self, decoder: T5Decoder, state: T5State):
        self.decoder = decoder
        self.state = state
        self.own: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.rows: list[torch.Tensor] = []
        device = state.keys[0].device
        self.tokens = torch.full((state.batch_size,), decoder.start_token, dtype=torch.long, device=device)
        self.hidden_BKM: torch.Tensor | None = None  # of the newest tokens, once they have been run

    def score(self, level: int, total: bool = True) -> CodeScores:
        """Scores of the codes of `level` after each current beam; see BeamCache."""
        return self.decoder.score_hidden(self._hidden(level), level, total)

    def reorder(self, parents_BK: torch.Tensor, codes_BK: torch.Tensor, level: int) -> None:
        """Continue the beams `parents_BK` with the codes `codes_BK` of `level`; see BeamCache."""
        batch, beams, _ = self._hidden(level).shape
        first = beams * torch.arange(batch, device=parents_BK.device).unsqueeze(1)
        parents = (first + parents_BK).flatten()
        self.rows = [rows.index_select(0, parents) for rows in self.rows]
        if level > 0:
            self.rows.append(parents)
        size = self.decoder.codebook_sizes[level]
        self.tokens = codes_BK.flatten().clamp(max=size - 1) + self.decoder.level_offsets[level]
        self.hidden_BKM = None

    def _hidden(self, level: int) -> torch.Tensor:
        held = len(self.own) - (self.hidden_BKM is not None)
        if level != held:
            raise IncompatibleComponentsError(
                f"beams hold {held} codes, level {level} was asked for; go level by level."
            )
        if self.hidden_BKM is None:
            self.hidden_BKM = self._run()
        return self.hidden_BKM

    def _run(self) -> torch.Tensor:
        """Run the newest token of each beam: (B, K, M)."""
        state, stack = self.state, self.decoder.model.decoder
        x = stack.embed_tokens(self.tokens)
        batch, rows, bias = state.batch_size, x.shape[0], None
        beams = rows // batch
        own: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer, keys, values in zip(state.layers, state.keys, state.values):
            attention = layer.own
            normed = norm(attention.norm, x)
            key, value = attention.k(normed), attention.v(normed)
            mixed = value  # the start token sees itself alone
            if self.own:
                if attention.bias is not None:
                    bias = decoder_bias(attention.bias, len(self.own) + 1, x.device)
                mixed = self._attend_own(len(own), attention.q(normed), key, value, bias, attention)
            own.append((key, value))
            x = clamped(x + attention.o(mixed))

            attention = layer.cross  # type: ignore[assignment]
            query = attention.q(norm(attention.norm, x)).view(batch, beams, attention.heads, attention.width)
            mixed = scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=state.mask, scale=1.0)
            x = clamped(x + attention.o(mixed.transpose(1, 2).reshape(rows, -1)))
            x = clamped(feed_forward(layer, x))
        self.own.append(own)
        return norm(stack.final_layer_norm, x).view(batch, beams, -1)

    def _attend_own(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias_P: torch.Tensor | None,
        attention: Attention,
    ) -> torch.Tensor:
        """Attention of each beam's newest token to its own few tokens: (R, H * D).

        With so few keys a batched matrix product costs more to start than to do, so this is plain arithmetic, one
        position at a time; products are summed in float32 whatever the weights are.
        """
        dtype = value.dtype
        if dtype in (torch.float16, torch.bfloat16):
            query, key, value = query.float(), key.float(), value.float()
        shape = (self.state.batch_size, -1, attention.heads, attention.width)
        query = query.view(shape)
        scores, values = [], []
        for position, layers in enumerate(self.own):
            keys, held = layers[layer]
            if position > 0:
                rows = self.rows[position - 1]
                keys, held = keys.index_select(0, rows), held.index_select(0, rows)
            scores.append((query * keys.view(shape)).sum(-1))
            values.append(held.view(shape))
        scores.append((query * key.view(shape)).sum(-1))
        values.append(value.view(shape))
        weights = torch.stack(scores)
        if bias_P is not None:
            weights += bias_P
        first, *others = weights.softmax(0).unsqueeze(-1).unbind(0)
        mixed = first * values[0]
        for weight, held in zip(others, values[1:]):
            mixed.addcmul_(weight, held)
        return mixed.view(key.shape).to(dtype)
