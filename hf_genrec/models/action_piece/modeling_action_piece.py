"""ActionPiece's generator: a T5 with one softmax over all feature and merged tokens (arXiv 2502.13581).

The encoder reads a history whose tokens depend on their context, the decoder writes the tokens of the next item's
feature set. Histories may come in q segmentations at once, (B, q, S): training takes each of them as a sample, and the
search "segmentation_ensemble" adds up what each of them finds.

Merged tokens belong to two items, so prefixes cannot share an item-causal encoder as TIGER's do. With `causal_encoder` every
token sees earlier tokens only, and `SetPermutationCollator` cuts a window before each of its targets: no token spans a cut,
and all targets of the window are trained in one pass.

Shapes: B users, T targets of a window, q segmentations, K beams, L decoder positions, l codes of a prefix, S encoder
positions, Q decoder positions, P labelled positions, V vocabulary, M width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, T5ForConditionalGeneration, T5Model
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.beam_cache import BeamCache
from hf_genrec.generation.decoding.t5 import T5Decoder, T5State
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.models.t5_levels import use_pooled_dropout
from hf_genrec.models.t5_packed import (
    ItemCausalStack,
    item_causal,
    packed_decode,
    packed_forward,
    use_encoder,
    use_recency,
)

from .configuration_action_piece import ActionPieceConfig


class TokenCausalStack(ItemCausalStack):
    """A T5 encoder in which a token sees itself and earlier tokens."""

    def item_numbers(self, input_ids_BS: torch.Tensor) -> torch.Tensor:
        """(B, S): every token counts as an item of its own."""
        return torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device).expand_as(input_ids_BS)


def _apply_options(model: Any, config: ActionPieceConfig) -> None:
    if config.pooled_dropout:
        use_pooled_dropout(model)
    if config.causal_encoder:
        use_encoder(model, TokenCausalStack)
        use_recency(model)


@dataclass(frozen=True)
class SegmentedState:
    """B histories encoded in q segmentations: one decoding state of B rows for each."""

    segmentations: tuple[T5State, ...]


class ActionPieceModel(T5Model):
    """The encoder-decoder without a head: what `AutoModel` gives for an ActionPiece checkpoint."""

    config_class = ActionPieceConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: ActionPieceConfig):
        super().__init__(config)
        _apply_options(self, config)


class ActionPieceForConditionalGeneration(RecommendationMixin, T5ForConditionalGeneration, GenerationMixin):
    """T5 over the tokens of an `ActionPieceTokenizer`, with the decoding interface of `RecommendationMixin`.

    Relations: with histories in one segmentation, (B, S), it is `T5ForConditionalGeneration`, bit for bit (in eval mode,
    or with `pooled_dropout=False`), but for the loss, which can be normalised by `num_items_in_batch`.

    Example:
        >>> import torch
        >>> config = ActionPieceConfig(codebook_sizes=[20, 20], d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1)
        >>> model = ActionPieceForConditionalGeneration(config)
        >>> two_ways = torch.tensor([[[4, 12, 5], [17, 5, 0]]])
        >>> model(input_ids=two_ways, attention_mask=two_ways.ne(0), labels=torch.tensor([[6, 14]])).logits.shape
        torch.Size([2, 2, 20])
    """

    config_class = ActionPieceConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: ActionPieceConfig):
        super().__init__(config)
        _apply_options(self, config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.BoolTensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        history_lengths: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """As `T5ForConditionalGeneration.forward`, with a normalisable loss and histories in q segmentations.

        Args:
            input_ids, attention_mask: (B, S), or (B, q, S).
            labels: (B, L) tokens of the target item, -100 behind its end; packed: (B, T, L).
            history_lengths: (B, T), only with `causal_encoder`: how many real tokens of the row target t may see, 0 for
                targets that are not there.
            num_items_in_batch: number of labels of the whole optimisation step, for exact gradient accumulation.

        Returns:
            `loss` and `logits` (B, Q, V), packed (B, T, Q, V) without labels and (P, V) of the P labelled positions with
            them; with q segmentations (B * q, Q, V) and the mean loss over them.

        Raises:
            IncompatibleComponentsError: `history_lengths` without `causal_encoder`, or of another shape than the labels.
        """
        if input_ids is not None and input_ids.dim() == 3:
            count = input_ids.shape[1]
            input_ids = input_ids.flatten(0, 1)  # type: ignore[assignment]
            attention_mask = None if attention_mask is None else attention_mask.flatten(0, 1)
            labels = None if labels is None else labels.repeat_interleave(count, 0)  # type: ignore[assignment]
            num_items_in_batch = None if num_items_in_batch is None else num_items_in_batch * count
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        kwargs.pop("return_dict", None)
        if history_lengths is not None and labels is not None:
            return self._packed_loss(
                history_lengths, decoder_input_ids, labels, input_ids, attention_mask, num_items_in_batch
            )
        if history_lengths is not None and decoder_input_ids is not None:
            outputs = packed_forward(
                self,
                history_lengths=history_lengths,
                decoder_input_ids=decoder_input_ids,
                attention_mask=attention_mask,
                encoder_outputs=encoder_outputs,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        else:
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                decoder_inputs_embeds=decoder_inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
        if labels is not None:
            logits = outputs.logits.reshape(-1, outputs.logits.shape[-1])
            outputs.loss = fixed_cross_entropy(logits, labels.to(logits.device).reshape(-1), num_items_in_batch)
        return outputs

    def _packed_loss(
        self,
        history_lengths: torch.Tensor,
        decoder_input_ids: Any,
        labels_BTL: torch.Tensor,
        input_ids: Any,
        attention_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> Seq2SeqLMOutput:
        """The loss of `packed_forward`'s logits, the head run at labelled positions only: most targets are short."""
        check_packed(self, decoder_input_ids, history_lengths)
        states_BSM = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        embedded = self.decoder.embed_tokens(decoder_input_ids)
        hidden = packed_decode(self.decoder, embedded, states_BSM, attention_mask, history_lengths)
        labelled = labels_BTL != -100
        hidden_PM = hidden[labelled]
        if self.config.scale_decoder_outputs:
            hidden_PM = hidden_PM * (self.model_dim**-0.5)
        logits_PV = self.lm_head(hidden_PM)
        loss = fixed_cross_entropy(logits_PV, labels_BTL[labelled], num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, logits=logits_PV, encoder_last_hidden_state=states_BSM)

    # Decoding interface of RecommendationMixin

    def _t5_decoder(self) -> T5Decoder:
        config = self.config
        return T5Decoder(self, config.level_offsets, config.codebook_sizes, config.decoder_start_token_id)

    def start_decoding(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> T5State | SegmentedState:
        """Encode B users once; histories (B, q, S) give one state for each segmentation."""
        decoder = self._t5_decoder()
        if input_ids.dim() == 2:
            return decoder.start_decoding(input_ids, attention_mask)
        masks = [None] * input_ids.shape[1] if attention_mask is None else attention_mask.unbind(1)
        return SegmentedState(
            tuple(decoder.start_decoding(ids, mask) for ids, mask in zip(input_ids.unbind(1), masks, strict=True))
        )

    def start_beams(self, state: T5State | SegmentedState) -> BeamCache:
        """A search's own place in the model: one new token per beam and level is run."""
        return self._t5_decoder().start_beams(_single(state))

    def score_codes(self, state: T5State | SegmentedState, prefix_BKl: torch.LongTensor, level: int) -> torch.Tensor:
        """Log-probabilities logp_BKC of the tokens at position `level` after each prefix of `level` tokens; they sum to
        one over the whole vocabulary.
        """
        return self._t5_decoder().score_codes(_single(state), prefix_BKl, level)


def check_packed(model: Any, decoder_input_ids_BTL: torch.Tensor, history_lengths_BT: torch.Tensor) -> None:
    """
    Raises:
        IncompatibleComponentsError: an encoder that sees whole rows, or labels and lengths of other shapes.
    """
    if not item_causal(model):
        raise IncompatibleComponentsError(
            "history_lengths: this encoder sees whole rows, so a target would be seen; set causal_encoder=True in the "
            "configuration, or train on one history per sample."
        )
    if decoder_input_ids_BTL.dim() != 3 or decoder_input_ids_BTL.shape[:2] != history_lengths_BT.shape:
        raise IncompatibleComponentsError(
            f"packed labels have shape {tuple(decoder_input_ids_BTL.shape)} and history_lengths "
            f"{tuple(history_lengths_BT.shape)}; they must be (B, T, L) and (B, T)."
        )


def _single(state: T5State | SegmentedState) -> T5State:
    if not isinstance(state, SegmentedState):
        return state
    if len(state.segmentations) == 1:
        return state.segmentations[0]
    raise IncompatibleComponentsError(
        f"the histories come in {len(state.segmentations)} segmentations, which one search cannot read: set "
        "decoding='segmentation_ensemble', or tokenizer.segmentations = 1."
    )
