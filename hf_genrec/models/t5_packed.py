"""Packed prefixes: every next item of a window trained in one pass of a T5 (T5: arXiv 1910.10683).

An encoder-decoder usually learns one (history, next item) pair per sample, so a history of T items is encoded T times.
With an *item-causal* encoder, in which a token sees the tokens of its own item, of earlier items and of what stands
before the first item (a user token), the states of a prefix do not depend on what follows it. One pass then
serves all prefixes of a window: the encoder reads the window once, its states become keys and values of every
cross-attention once, and the decoder writes the codes of all T next items, each target looking at its own prefix only.
T5's positions are relative, so a prefix inside a window and the same prefix alone give the same numbers.

`PackedPrefixCollator` (data/collators.py) makes the batches, `packed_forward` runs them; `use_encoder` puts an
`ItemCausalStack` into any model with the layout of T5 (`encoder`, `decoder`, `lm_head`).

One thing an item-causal encoder cannot say is which token is the newest: its states do not change when something follows.
`RecencyStack` is a decoder whose cross-attention knows how far each token is from the end of the prefix: a learned bias per
head and distance, in T5's buckets, that starts as a linear decay with a slope per head (arXiv 2108.12409).

*Relations*: packed logits of target t equal those of the same model run on the prefix of t alone; with windows of one
target packing changes nothing. With an ordinary encoder and a recency table of zeros it is T5.

Shapes: B windows, T targets of a window, L codes of a target, S encoder positions, M width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.t5_layers import clamped


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, the smallest finite number elsewhere: a row without anything visible stays finite.

    Example:
        >>> additive_mask(torch.tensor([True, False]), torch.float32).tolist()
        [0.0, -3.4028234663852886e+38]
    """
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


class ItemCausalStack(T5Stack):
    """A T5 encoder in which a token sees its own item and what came before it.

    An item begins with each token of the first level's code block (`level_offsets`, `codebook_sizes` of the
    configuration); what stands before the first item is number 0 and visible to all. Models whose items begin otherwise
    override `item_numbers`.

    Example:
        >>> from hf_genrec.models.configuration_t5_levels import T5LevelsConfig
        >>> config = T5LevelsConfig(codebook_sizes=[8, 8], d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        >>> stack = ItemCausalStack(config).eval()
        >>> stack.item_numbers(torch.tensor([[0, 4, 13, 5, 14]])).tolist()
        [[0, 1, 1, 2, 2]]
    """

    config: Any
    family_engine = True  # decoding's own T5 code may run it: it asks `embed_inputs` and `visible_tokens`
    packs_prefixes = True  # the states of a prefix do not depend on what follows

    def item_numbers(self, input_ids_BS: Tensor) -> Tensor:
        """(B, S) number of the item each token belongs to: 0 before the first item, then 1, 2, ..."""
        first = self.config.level_offsets[0]
        starts_BS = (input_ids_BS >= first) & (input_ids_BS < first + self.config.codebook_sizes[0])
        return starts_BS.cumsum(1)

    def embed_inputs(self, input_ids_BS: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the first layer reads, (B, S, M)."""
        return self.embed_tokens(input_ids_BS)

    def visible_tokens(
        self, input_ids_BS: Tensor | None, attention_mask: Tensor | None, item_numbers: Tensor | None = None
    ) -> Tensor | None:
        """(B, S, S) boolean: may the token of the row see the token of the column? None = all may."""
        if item_numbers is None:
            if input_ids_BS is None:
                raise IncompatibleComponentsError(
                    "an item-causal encoder must know where items begin: pass input_ids, or item_numbers (B, S) beside "
                    "inputs_embeds."
                )
            item_numbers = self.item_numbers(input_ids_BS)
        visible_BSS = item_numbers[:, None, :] <= item_numbers[:, :, None]
        return visible_BSS if attention_mask is None else visible_BSS & attention_mask.bool()[:, None, :]

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        item_numbers: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `T5Stack.forward`.

        Args:
            attention_mask: (B, S), 0 = padding, on either side; a mask (B, 1, S, S) is taken as it is.
            item_numbers: (B, S), needed with `inputs_embeds` in place of `input_ids`.

        Raises:
            IncompatibleComponentsError: neither `input_ids` nor `item_numbers`.
        """
        padding_mask = None if attention_mask is None or attention_mask.dim() > 2 else attention_mask
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed_inputs(input_ids, padding_mask)
        if attention_mask is padding_mask:
            visible_BSS = self.visible_tokens(input_ids, padding_mask, item_numbers)
            if visible_BSS is not None and inputs_embeds is not None:
                attention_mask = additive_mask(visible_BSS.unsqueeze(1), inputs_embeds.dtype)
        return super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class Recency(nn.Embedding):
    """Bias (bucket, head) of T5's cross-attention by the distance from the end of what is read."""


class RecencyStack(T5Stack):
    """A T5 decoder whose cross-attention knows how far from the end of its prefix a token stands.

    Example:
        >>> from hf_genrec.models.configuration_t5_levels import T5LevelsConfig
        >>> config = T5LevelsConfig(codebook_sizes=[8, 8], d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        >>> config.is_decoder = True
        >>> stack = RecencyStack(config)
        >>> bias = stack.prefix_bias(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 2]]), torch.float32)
        >>> bias.shape, bias[0, 0, 1].tolist()
        (torch.Size([1, 2, 2, 3]), [-3.4028234663852886e+38, -0.5, 0.0])
    """

    family_engine = True  # decoding's own T5 code may run it: it asks `prefix_bias`

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.recency = Recency(config.relative_attention_num_buckets, config.num_heads)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Recency):
            buckets = torch.arange(module.num_embeddings, dtype=torch.float32).unsqueeze(1)
            slopes = 0.5 ** torch.arange(1, module.embedding_dim + 1, dtype=torch.float32)
            init.copy_(module.weight, 0.0 - buckets * slopes)

    def prefix_bias(self, attention_mask_BS: Tensor, history_lengths_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, H, T, S) additive: the bias of what target t may see, the smallest finite number elsewhere."""
        visible_BTS, rank_B1S = _visible(attention_mask_BS, history_lengths_BT)
        distance_BTS = (history_lengths_BT.unsqueeze(-1) - rank_B1S).clamp(min=0)
        buckets_BTS = T5Attention._relative_position_bucket(
            -distance_BTS,
            bidirectional=False,
            num_buckets=self.recency.num_embeddings,
            max_distance=self.config.relative_attention_max_distance,
        )
        bias_BHTS = self.recency(buckets_BTS).permute(0, 3, 1, 2).to(dtype)
        return bias_BHTS.masked_fill(~visible_BTS.unsqueeze(1), torch.finfo(dtype).min)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `T5Stack.forward`; all of the encoder's real tokens are the prefix."""
        if encoder_hidden_states is not None and (encoder_attention_mask is None or encoder_attention_mask.dim() == 2):
            if encoder_attention_mask is None:
                encoder_attention_mask = _all_real(encoder_hidden_states)
            lengths_B1 = encoder_attention_mask.long().sum(1, keepdim=True)
            encoder_attention_mask = self.prefix_bias(encoder_attention_mask, lengths_B1, encoder_hidden_states.dtype)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )


def _all_real(states_BSM: Tensor) -> Tensor:
    return torch.ones(states_BSM.shape[:2], dtype=torch.long, device=states_BSM.device)


def _visible(attention_mask_BS: Tensor, history_lengths_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens target t may see (B, T, S), and the number of each real token in its row (B, 1, S), from 1."""
    rank_B1S = attention_mask_BS.long().cumsum(1).unsqueeze(1)
    real_B1S = attention_mask_BS.bool().unsqueeze(1)
    return (rank_B1S <= history_lengths_BT.unsqueeze(-1)) & real_B1S, rank_B1S


def _around(stack_class: type[T5Stack], former: Any) -> Any:
    """A stack of another class around the layers of one that is there."""
    with torch.device("meta"):  # its own layers are never used
        stack = stack_class(former.config)
    for name, layer in former.named_children():
        setattr(stack, name, layer)
    return stack


def use_encoder(model: Any, stack_class: type[T5Stack] = ItemCausalStack) -> None:
    """Give a T5 an encoder of `stack_class` around the layers it has; weights and their names stay what they are."""
    model.encoder = _around(stack_class, model.encoder)


def use_recency(model: Any) -> None:
    """Give a T5 a decoder that knows which token is the newest (`RecencyStack`): one more weight, `decoder.recency`."""
    former = model.decoder
    model.decoder = _around(RecencyStack, former)
    model.decoder.recency = Recency(former.config.relative_attention_num_buckets, former.config.num_heads)
    model.decoder._init_weights(model.decoder.recency)


def item_causal(model: Any) -> bool:
    """May this model be trained on packed prefixes?"""
    return bool(getattr(model.encoder, "packs_prefixes", False))


def prefix_ends(attention_mask_BS: Tensor, history_lengths_BT: Tensor) -> Tensor:
    """(B, T) position of the last token of each prefix: where the state that has read it stands.

    Example:
        >>> prefix_ends(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[1, 3]])).tolist()
        [[1, 3]]
    """
    rank_BS = attention_mask_BS.long().cumsum(1)
    return torch.searchsorted(rank_BS, history_lengths_BT.clamp(min=1)).clamp(max=rank_BS.shape[1] - 1)


def prefix_states(states_BSM: Tensor, attention_mask: Tensor | None, history_lengths_BT: Tensor) -> Tensor:
    """(B, T, M): the encoder state at the last token of each prefix."""
    if attention_mask is None:
        attention_mask = _all_real(states_BSM)
    ends_BT = prefix_ends(attention_mask, history_lengths_BT)
    return states_BSM.gather(1, ends_BT.unsqueeze(-1).expand(-1, -1, states_BSM.shape[-1]))


def packed_decode(
    decoder: T5Stack,
    inputs_BTLM: Tensor,
    states_BSM: Tensor,
    attention_mask: Tensor | None,
    history_lengths_BT: Tensor,
) -> Tensor:
    """Decoder states (B, T, L, M) of T targets per window.

    Self-attention runs inside each target. In the cross-attention the T * L positions of a window are the queries of one
    attention over its S encoder positions, each target's limited to its prefix.

    Args:
        decoder: T5's decoder stack, or a `RecencyStack`; dropout and adapters are its own.
        inputs_BTLM: embedded decoder inputs.
        states_BSM: encoder states.
        attention_mask: (B, S), 0 = padding; None = no padding.
        history_lengths_BT: how many of the row's real tokens each target may see; 0 for a target that does not exist.
    """
    batch, targets, length, width = inputs_BTLM.shape
    rows, columns = (batch * targets, length, width), (batch, targets * length, width)
    dtype, device = states_BSM.dtype, states_BSM.device
    if attention_mask is None:
        attention_mask = _all_real(states_BSM)
    if hasattr(decoder, "prefix_bias"):
        prefixes = decoder.prefix_bias(attention_mask, history_lengths_BT, dtype)
    else:
        prefixes = additive_mask(_visible(attention_mask, history_lengths_BT)[0], dtype).unsqueeze(1)
    prefixes = prefixes.repeat_interleave(length, dim=2)  # (B, 1 or H, T * L, S)
    causal = additive_mask(torch.ones(length, length, dtype=torch.bool, device=device).tril(), dtype)[None, None]

    x = decoder.dropout(inputs_BTLM)
    own_bias = None
    for block in decoder.block:
        own, cross, dense = block.layer
        x, own_bias, _ = own(x.reshape(rows), attention_mask=causal, position_bias=own_bias)
        x, _, _ = cross(clamped(x).view(columns), key_value_states=states_BSM, position_bias=prefixes)
        x = clamped(dense(clamped(x)))
    return decoder.dropout(decoder.final_layer_norm(x)).view(inputs_BTLM.shape)


@dataclass
class PackedOutput(Seq2SeqLMOutput):
    """As in transformers; `logits` are (B, T, L, V), and `history_lengths` (B, T) go with them."""

    history_lengths: Tensor | None = None


def packed_forward(
    model: Any,
    *,
    history_lengths: Tensor,
    decoder_input_ids: Tensor,
    attention_mask: Tensor | None = None,
    encoder_outputs: Any = None,
    **encoder_inputs: Any,
) -> PackedOutput:
    """Logits (B, T, L, V) of all targets of B windows, by a model with the layout of T5.

    Args:
        model: a T5 with a head, whose encoder is an `ItemCausalStack`.
        history_lengths: (B, T), see `packed_decode`.
        decoder_input_ids: (B, T, L), each target shifted right.
        attention_mask: (B, S), 0 = padding.
        encoder_outputs: states that are there already.
        **encoder_inputs: what the encoder reads (`input_ids` (B, S), or `inputs_embeds` and `item_numbers`).

    Raises:
        IncompatibleComponentsError: an encoder whose prefixes would see what follows them, or other shapes.
    """
    if not item_causal(model):
        raise IncompatibleComponentsError(
            f"history_lengths: the encoder of this {type(model).__name__} sees whole windows, so a prefix would see its own "
            "target; set causal_encoder=True in its configuration, or train on one prefix per sample."
        )
    if decoder_input_ids.dim() != 3 or decoder_input_ids.shape[:2] != history_lengths.shape:
        raise IncompatibleComponentsError(
            f"packed labels have shape {tuple(decoder_input_ids.shape)} and history_lengths {tuple(history_lengths.shape)}; "
            "they must be (B, T, L) and (B, T), as PackedPrefixCollator makes them."
        )
    if encoder_outputs is None:
        encoder_outputs = model.encoder(attention_mask=attention_mask, **encoder_inputs)
    elif not isinstance(encoder_outputs, BaseModelOutput):
        encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0])
    states_BSM = encoder_outputs[0]
    embedded = model.decoder.embed_tokens(decoder_input_ids)
    hidden = packed_decode(model.decoder, embedded, states_BSM, attention_mask, history_lengths)
    if model.config.scale_decoder_outputs:
        hidden = hidden * (model.model_dim**-0.5)
    return PackedOutput(
        logits=model.lm_head(hidden),
        history_lengths=history_lengths,
        encoder_last_hidden_state=states_BSM,
        encoder_hidden_states=encoder_outputs.hidden_states,
        encoder_attentions=encoder_outputs.attentions,
    )


__all__ = [
    "ItemCausalStack",
    "PackedOutput",
    "Recency",
    "RecencyStack",
    "additive_mask",
    "item_causal",
    "packed_decode",
    "packed_forward",
    "prefix_ends",
    "prefix_states",
    "use_encoder",
    "use_recency",
]
