"""Item scoring with any Hugging Face encoder-decoder (T5, BART, Marian ...) whose vocabulary holds the item tokens.

The encoder, the decoder's first step and the cross-attention keys and values are computed once per user. Models of the
T5 family run on the tight engine of t5.py. All others run their own decoder, one new token per beam and level, on a
self-attention cache of the beams' few tokens (the only thing that is reordered) and on ONE cross-attention cache of B
rows: while such a step runs, the model's attention is the function `shared_attention`, registered with transformers'
AttentionInterface, which reads K rows of queries per row of keys as K query positions. A model whose cross-attention does
not go through that interface gets its cross-attention cache copied per beam, once per request.

Threads: the attention implementation is a field of the model's configuration, set for the time of a step and put back in
any case. Other threads that run the same model meanwhile get `shared_attention` too; on ordinary inputs it is sdpa.

Shape legend: B users, T history tokens, D width, V vocabulary, K beams, l codes so far, C codes of the level, H heads,
S encoder positions, Q new tokens per beam, R = B * K rows.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from ...errors import IncompatibleComponentsError
from .beam_cache import BeamCache, CodeScores, StatelessBeams
from .t5 import T5Decoder, T5State, fits

_ROWS_PER_CALL = 2048  # B * K rows of the decoder run together; bounds memory, changes nothing else
_SHARED = "hf_genrec_shared_beams"
_REPLACEABLE = ("sdpa", "eager")  # attention implementations that sdpa may stand in for

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class EncodedState:
    """A batch of encoded histories. Searches share it; nothing in it changes but `per_beam`.

    Attributes:
        hidden, mask: (B, T, D) and (B, T).
        first: scores of level 0's codes after the start token, (B, 1, C).
        own: per layer, keys and values of the start token, B rows; None for models without a cache.
        cross: per layer, keys and values of the encoder output, B rows.
        per_beam: copies of `cross` with B * K rows, by K (the last one only); models that cannot share `cross`.
    """

    hidden: torch.Tensor
    mask: torch.Tensor
    first: CodeScores
    own: list[Pair] | None
    cross: list[Pair]
    per_beam: dict[int, list[Pair]] = field(default_factory=dict)

    def cross_for(self, beams: int) -> list[Pair]:
        if beams not in self.per_beam:
            copies = [(k.repeat_interleave(beams, 0), v.repeat_interleave(beams, 0)) for k, v in self.cross]
            self.per_beam.clear()
            self.per_beam[beams] = copies
        return self.per_beam[beams]


class EncoderDecoderScorer:
    """`start_decoding`, `start_beams` and `score_codes` for an encoder-decoder of any architecture.

    Args:
        model: an encoder-decoder with a language-model head. Put it in evaluation mode first.
        level_offsets: (L,) token id of code 0 of each level.
        codebook_sizes: codes per level.
        restrict_to_level: log-probabilities over the level's codes only, instead of the full vocabulary.

    Raises:
        IncompatibleComponentsError: the model names no decoder start token.
    """

    def __init__(
        self,
        model: Any,
        level_offsets: Sequence[int],
        codebook_sizes: Sequence[int],
        *,
        restrict_to_level: bool = False,
    ):
        self.model = model
        self.restrict_to_level = restrict_to_level
        self.level_offsets = [int(offset) for offset in level_offsets]
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        self.start_token = decoder_start_token(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes_cache = "past_key_values" in inspect.signature(base.forward).parameters
        self._configs = list({id(m.config): m.config for m in base.modules() if hasattr(m, "config")}.values())
        self.shares_cross = bool(getattr(base, "_supports_sdpa", False)) and all(
            getattr(config, "_attn_implementation", None) in _REPLACEABLE for config in self._configs
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def start_decoding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> EncodedState | T5State:
        """Encode the histories (B, T) and take the decoder's first step, once.

        Padding may be on either side; rows are shifted to padding at the end first.
        """
        if fits(self.model):
            return self._t5().start_decoding(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not bool(mask.all()):  # padding to the end, so that positions do not depend on the rest of the batch
            order = mask.sort(dim=-1, descending=True, stable=True).indices
            input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return self.start_from_encoder(hidden, mask)

    def start_from_encoder(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> EncodedState | T5State:
        """As `start_decoding`, from an encoder output (B, T, D) that is there already, B rows."""
        if fits(self.model):
            return self._t5().start_from_encoder(hidden, attention_mask)
        shape = hidden.shape[:2]
        mask = hidden.new_ones(shape, dtype=torch.long) if attention_mask is None else attention_mask
        start = torch.full((shape[0], 1), self.start_token, dtype=torch.long, device=hidden.device)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if self._takes_cache else None
        first = self._scores(self._run(hidden, mask, start, cache), 0)
        if cache is None or cache.get_seq_length() != 1 or not all(cache.is_updated.values()):
            return EncodedState(hidden, mask, first, None, [])  # the model keeps its keys elsewhere, if anywhere
        return EncodedState(
            hidden, mask, first, _pairs(cache.self_attention_cache), _pairs(cache.cross_attention_cache)
        )

    def start_beams(self, state: EncodedState | T5State) -> BeamCache:
        """A search's own place in the model; any number of them may run from one state."""
        if isinstance(state, T5State):
            return self._t5().start_beams(state)
        if state.own is None:
            return StatelessBeams(self, state, state.hidden.shape[0], state.hidden.device)
        return EncoderDecoderBeams(self, state)

    def score_codes(self, state: EncodedState | T5State, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor:
        """Log-probabilities (B, K, C) of the level's codes after the partial codes of each beam."""
        if isinstance(state, T5State):
            return self._t5().score_codes(state, prefix_BKl, level)
        batch, beams, length = prefix_BKl.shape
        if length == 0:
            return state.first.log_probs().expand(-1, beams, -1)
        offsets = torch.tensor(self.level_offsets[:length], device=prefix_BKl.device)
        parts = []
        for tokens in (prefix_BKl + offsets).split(max(1, _ROWS_PER_CALL // batch), dim=1):
            count = tokens.shape[1]
            ids = tokens.reshape(batch * count, length)
            if state.own is None:
                hidden, mask = (t.repeat_interleave(count, 0) for t in (state.hidden, state.mask))
                start = ids.new_full((ids.shape[0], 1), self.start_token)
                scores = self._scores(self._run(hidden, mask, torch.cat([start, ids], dim=-1), None), level)
            else:
                own = [(k.repeat_interleave(count, 0), v.repeat_interleave(count, 0)) for k, v in state.own]
                scores, _ = self.step(state, own, ids, level, slice(None))
            parts.append(scores.log_probs().view(batch, count, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def step(
        self, state: EncodedState, own: list[Pair], ids_RQ: torch.Tensor, level: int, users: slice
    ) -> tuple[CodeScores, list[Pair]]:
        """Run new tokens of the beams of some users on top of their keys and values.

        Args:
            own: per layer, keys and values of the R beams' tokens so far.
            ids_RQ: the new tokens, all beams of a user one after another.
            users: the users these are.

        Returns:
            Scores of the codes of `level` (R, 1, C), and keys and values with the new tokens appended.
        """
        hidden, mask = state.hidden[users], state.mask[users]
        beams = ids_RQ.shape[0] // hidden.shape[0]
        mask = mask.repeat_interleave(beams, 0)
        # with every cross-attention cached, the encoder output is only asked for its shape
        hidden = hidden[:1].expand(len(ids_RQ), -1, -1)
        if self.shares_cross and beams > 1:
            cache = EncoderDecoderCache(_cache(own), _cache([(k[users], v[users]) for k, v in state.cross]))
            try:
                with _shared_attention(self._configs) as served:
                    logits = self._run(hidden, mask, ids_RQ, cache)
                if len(served) >= len(state.cross):
                    return self._scores(logits, level), _pairs(cache.self_attention_cache)
            except (RuntimeError, ValueError, TypeError, KeyError):
                pass  # another kind of attention met keys of B rows: below it gets what it expects, or fails by itself
            self.shares_cross = False
        copies = state.cross_for(beams)
        first, last, _ = users.indices(state.hidden.shape[0])
        rows = slice(first * beams, last * beams)
        cache = EncoderDecoderCache(_cache(own), _cache([(k[rows], v[rows]) for k, v in copies]))
        logits = self._run(hidden, mask, ids_RQ, cache)
        return self._scores(logits, level), _pairs(cache.self_attention_cache)

    def _t5(self) -> T5Decoder:
        return T5Decoder(
            self.model,
            self.level_offsets,
            self.codebook_sizes,
            self.start_token,
            restrict_to_level=self.restrict_to_level,
        )

    def _scores(self, logits_RV: torch.Tensor, level: int) -> CodeScores:
        first, size = self.level_offsets[level], self.codebook_sizes[level]
        block = logits_RV[:, None, first : first + size].clone()  # let go of the rest
        over = block[:, 0] if self.restrict_to_level else logits_RV
        return CodeScores(block, over.float().logsumexp(-1, keepdim=True))

    def _run(
        self, hidden: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, cache: EncoderDecoderCache | None
    ) -> torch.Tensor:
        """Logits (rows, V) after the last token."""
        options = {} if cache is None else {"past_key_values": cache}
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),  # type: ignore[arg-type]
            attention_mask=mask,
            decoder_input_ids=ids,
            use_cache=cache is not None,
            **options,
        )
        return output.logits[:, -1]


class EncoderDecoderBeams:
    """The BeamCache of one search: self-attention keys and values of the beams' own tokens, gathered when beams move."""

    def __init__(self, scorer: EncoderDecoderScorer, state: EncodedState):
        self.scorer = scorer
        self.state = state
        self.own: list[Pair] = state.own or []
        self.tokens_BK: torch.Tensor | None = None  # newest codes, not run yet
        self.scores = state.first
        self.level = 0

    def score(self, level: int, total: bool = True) -> CodeScores:
        """Scores of the codes of `level` after each current beam; see BeamCache."""
        if level != self.level:
            raise IncompatibleComponentsError(
                f"beams hold {self.level} codes, level {level} was asked for; go level by level."
            )
        if self.tokens_BK is not None:
            batch, beams = self.tokens_BK.shape
            users = max(1, _ROWS_PER_CALL // beams)
            parts = []
            for first in range(0, batch, users):
                rows = slice(first * beams, (first + users) * beams)
                own = self.own if users >= batch else [(k[rows], v[rows]) for k, v in self.own]
                ids = self.tokens_BK[first : first + users].reshape(-1, 1)
                parts.append(self.scorer.step(self.state, own, ids, level, slice(first, first + users)))
            logits = torch.cat([scores.logits_BKC for scores, _ in parts]).view(batch, beams, -1)
            totals = torch.cat([scores.log_total_BK for scores, _ in parts]).view(batch, beams)  # type: ignore[misc]
            self.scores = CodeScores(logits, totals)
            layers = zip(*(own for _, own in parts))
            self.own = [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers]
            self.tokens_BK = None
        return self.scores

    def reorder(self, parents_BK: torch.Tensor, codes_BK: torch.Tensor, level: int) -> None:
        """Continue the beams `parents_BK` with the codes `codes_BK` of `level`; see BeamCache."""
        batch, beams = self.score(level).logits_BKC.shape[:2]
        first = beams * torch.arange(batch, device=parents_BK.device).unsqueeze(1)
        parents = (first + parents_BK).flatten()
        self.own = [(k.index_select(0, parents), v.index_select(0, parents)) for k, v in self.own]
        size = self.scorer.codebook_sizes[level]
        self.tokens_BK = codes_BK.clamp(max=size - 1) + self.scorer.level_offsets[level]
        self.level = level + 1


def _pairs(cache: DynamicCache) -> list[Pair]:
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr]


def _cache(pairs: Sequence[Pair]) -> DynamicCache:
    """A cache that starts with these keys and values, not copied."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


# ---------------------------------------------------------------- attention with fewer rows of keys than of queries

_served = threading.local()  # .calls: cross-attentions of the step now running in this thread
_lock = threading.Lock()
_borrowed: dict[int, tuple[int, str | None]] = {}  # id of a configuration: steps running, implementation to put back


def shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """sdpa where K rows of queries (B * K, H, Q, D) read one row of keys (B, H, S, D) as K * Q query positions."""
    rows, heads, length, _ = query.shape
    batch = key.shape[0]
    if rows == batch:
        return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **kwargs)
    beams = rows // batch
    query = query.view(batch, beams, heads, length, -1).transpose(1, 2).reshape(batch, heads, beams * length, -1)
    attention_mask, position_bias = (_fold(bias, batch, beams, length) for bias in (attention_mask, position_bias))
    mixed, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=position_bias, **{**kwargs, "is_causal": False}
    )
    if hasattr(_served, "calls"):
        _served.calls.append(module)
    return mixed.reshape(rows, length, heads, -1), None


def _fold(bias: torch.Tensor | None, batch: int, beams: int, length: int) -> torch.Tensor | None:
    """(B * K or 1, h, Q or 1, S) -> (B or 1, h, K * Q or 1, S)."""
    if bias is None:
        return None
    heads, own_length, positions = bias.shape[1:]
    if bias.shape[0] == 1:
        return bias if own_length == 1 else bias.repeat(1, 1, beams, 1)
    bias = bias.view(batch, beams, heads, own_length, positions).transpose(1, 2)
    if own_length < length:
        bias = bias.expand(-1, -1, -1, length, -1)
    return bias.reshape(batch, heads, beams * length, positions)


@contextmanager
def _shared_attention(configs: Sequence[Any]) -> Iterator[list[torch.nn.Module]]:
    """Run the model on `shared_attention`; gives the modules that used it on shared keys."""
    with _lock:
        for config in configs:
            running, former = _borrowed.get(id(config), (0, config._attn_implementation))
            _borrowed[id(config)] = (running + 1, former)
            config._attn_implementation_internal = _SHARED
    served: list[torch.nn.Module] = []
    _served.calls = served
    try:
        yield served
    finally:
        del _served.calls
        with _lock:
            for config in configs:
                running, former = _borrowed.pop(id(config))
                if running > 1:
                    _borrowed[id(config)] = (running - 1, former)
                else:
                    config._attn_implementation_internal = former


AttentionInterface.register(_SHARED, shared_attention)
AttentionMaskInterface.register(_SHARED, sdpa_mask)


def decoder_start_token(model: Any) -> int:
    """Token that opens the decoder's sequence, as `generate` picks it."""
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token[0] if isinstance(token, list) else token)
    raise IncompatibleComponentsError(
        f"{type(model).__name__} names no decoder start token; set model.generation_config.decoder_start_token_id."
    )
