"""IDGenRec: one T5 names the items in words, another recommends by these names, trained in turn (arXiv 2403.19021).

The *generator* reads an item's plain text and writes its name; the *recommender* reads the names of a history and writes the
name of the next item. What makes the names learnable is the tokenizer phase: the recommender is frozen, and each word of a
history is replaced by the generator's distribution at that step times the recommender's embedding table (a *soft name*), so
the loss of the next item's name reaches the generator. In the recommender phase the generator is frozen and the names are
words. `naming.generate_names` gives all items new, distinct names after each tokenizer phase;
`alignment/trainers/joint.py` runs the phases.

Relations: without tokenizer phases it is a T5 over words.

Shapes: B users, T packed targets, S tokens, L tokens of a name with its end token, I items of a history, N items, U distinct
items of a batch, V words, d width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, T5ForConditionalGeneration
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.beam_cache import BeamCache
from hf_genrec.generation.decoding.encoder_decoder import EncoderDecoderScorer
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.t5_levels import use_pooled_dropout
from hf_genrec.models.t5_packed import ItemCausalStack, packed_forward, use_encoder, use_recency

from .configuration_idgenrec import IDGenRecConfig
from .naming import Name, generate_names

SIDES = ("tokenizer", "recommender")
_IGNORED = -100


def named_item_numbers(input_ids_BS: Tensor, end_token: int) -> Tensor:
    """(B, S) number of the item each word belongs to, from 0: an item goes on up to its end token.

    Example:
        >>> named_item_numbers(torch.tensor([[7, 4, 8, 9, 4]]), 4).tolist()
        [[0, 0, 1, 1, 1]]
    """
    ends_BS = input_ids_BS == end_token
    return ends_BS.cumsum(1) - ends_BS.long()


class NamedItemStack(ItemCausalStack):
    """Item-causal encoder over names: an item ends with the end token."""

    def item_numbers(self, input_ids_BS: Tensor) -> Tensor:
        """(B, S) number of the item each word belongs to."""
        return named_item_numbers(input_ids_BS, self.config.item_end_token_id)


class IDGenRecForConditionalGeneration(RecommendationMixin, PreTrainedModel, GenerationMixin):
    """Generator of names and recommender in one. `recommender` and `generator` are stock T5s.

    Example:
        >>> config = IDGenRecConfig(vocab_size=16, codebook_sizes=[16, 16], num_items=2, text_tokens=3)
        >>> model = IDGenRecForConditionalGeneration(config)
        >>> model.set_catalogue([[5, 4], [6, 4]])
        >>> model(input_ids=torch.tensor([[5, 4]]), labels=torch.tensor([[6, 4]])).logits.shape
        torch.Size([1, 2, 16])
    """

    config_class = IDGenRecConfig  # not an annotation: see the other models
    base_model_prefix = "recommender"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    item_texts: Tensor

    def __init__(self, config: IDGenRecConfig) -> None:
        super().__init__(config)
        self.side = "recommender"
        self._codes_NL: np.ndarray | None = None
        self._trie: ItemTrie | None = None
        self._codes: Tensor | None = None
        self.recommender = T5ForConditionalGeneration(config.t5_config("recommender"))
        self.generator = T5ForConditionalGeneration(config.t5_config("generator"))
        if config.pooled_dropout:
            use_pooled_dropout(self)
        if config.causal_encoder:
            use_encoder(self.recommender, NamedItemStack)
            use_recency(self.recommender)
        # the items' texts as words, -1 behind the end: what names are made from travels with the weights
        self.register_buffer("item_texts", torch.zeros(config.num_items, config.text_tokens, dtype=torch.int32))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            from transformers import initialization as init

            init.constant_(self.item_texts, -1)
            return
        for part in (self.recommender, self.generator):
            if any(module is one for one in part.modules()):
                part._init_weights(module)
                return

    def get_input_embeddings(self) -> nn.Module:
        return self.recommender.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.recommender.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.recommender.get_output_embeddings()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.recommender.encoder

    # ---------------------------------------------------------------------------------------------------------- names

    def set_texts(self, texts_NS: Any) -> None:
        """Store the items' texts as word ids (N, S), -1 behind the end.

        Raises:
            IncompatibleComponentsError: another shape than the configuration says.
        """
        texts = torch.as_tensor(np.asarray(texts_NS)).to(self.item_texts)
        if texts.shape != self.item_texts.shape:
            raise IncompatibleComponentsError(
                f"set_texts: texts have shape {tuple(texts.shape)}, the configuration says {tuple(self.item_texts.shape)}."
            )
        self.item_texts.copy_(texts)

    def set_catalogue(self, item_codes: Any) -> None:
        """Take over the names (N, L) of the catalogue, as token ids, -1 behind the end."""
        codes = np.asarray(item_codes)
        if codes.shape != (self.config.num_items, self.config.num_levels):
            raise IncompatibleComponentsError(
                f"set_catalogue: item_codes has shape {codes.shape}, the configuration says "
                f"{(self.config.num_items, self.config.num_levels)}: use the tokenizer the model was configured from."
            )
        self._trie = ItemTrie.from_codes(codes, list(self.config.codebook_sizes))
        self._codes = torch.tensor(codes, dtype=torch.long)

    def name_items(
        self, texts_MS: Any | None = None, *, taken: Iterable[Name] = (), priority: Any | None = None, **options: Any
    ) -> np.ndarray:
        """Codes (M, L) of distinct names that the generator gives to texts; None = to all items of the catalogue.

        Args:
            texts_MS: word ids, -1 behind the end; new items get names that `taken` does not hold.
            priority, options: as for `naming.generate_names`.
        """
        texts = self.item_texts if texts_MS is None else torch.as_tensor(np.asarray(texts_MS)).to(self.item_texts)
        config = self.config
        special = {config.pad_token_id, config.eos_token_id, config.bos_token_id, 2}  # 2 = unknown
        barred = sorted(token for token in special if isinstance(token, int) and token != config.item_end_token_id)
        return generate_names(
            self.generator,
            texts.long(),
            levels=config.num_levels,
            end_token=config.item_end_token_id,
            barred=barred,
            taken=taken,
            priority=priority,
            **options,
        )

    # --------------------------------------------------------------------------------------------------------- phases

    def start_phase(self, side: str, *, aligned: bool = True) -> None:
        """Let the generator ("tokenizer") or the recommender learn and freeze the other. `aligned` changes nothing here.

        Raises:
            IncompatibleComponentsError: an unknown side.
        """
        if side not in SIDES:
            raise IncompatibleComponentsError(f"unknown side {side!r}: choose one of {', '.join(SIDES)}.")
        self.side = side
        self.recommender.requires_grad_(side == "recommender")
        self.generator.requires_grad_(side == "tokenizer")
        self.train(self.training)

    def train(self, mode: bool = True) -> IDGenRecForConditionalGeneration:
        """Training mode for the side that learns; the frozen one stays in evaluation mode."""
        super().train(mode)
        if mode:
            (self.generator if self.side == "recommender" else self.recommender).eval()
        return self

    # ----------------------------------------------------------------------------------------------------------- loss

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        history_lengths: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Cross-entropy of the next item's name; in a tokenizer phase the history is written in soft names.

        Args:
            input_ids: (B, S) words of the history, padded on either side.
            labels: (B, L) words of the target, -100 behind its end; packed (B, T, L).
            history_lengths: (B, T) for packed labels, as `PackedPrefixCollator` makes them.
            num_items_in_batch: label tokens of the whole optimiser step.
        """
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.recommender._shift_right(labels)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self.training and self.side == "tokenizer" and input_ids is not None:
            numbers_BS = named_item_numbers(input_ids, self.config.item_end_token_id)
            inputs = {"inputs_embeds": self.soft_histories(input_ids, attention_mask, numbers_BS)}
            if self.config.causal_encoder:
                inputs["item_numbers"] = numbers_BS
        if history_lengths is not None:
            outputs = packed_forward(
                self.recommender,
                history_lengths=history_lengths,
                decoder_input_ids=decoder_input_ids,  # type: ignore[arg-type]
                attention_mask=attention_mask,
                encoder_outputs=encoder_outputs,
                **inputs,
            )
        else:
            if encoder_outputs is None:
                encoder_outputs = self.recommender.encoder(attention_mask=attention_mask, **inputs)
            outputs = self.recommender(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoder_outputs[0]),  # type: ignore[arg-type]
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                **{name: kwargs[name] for name in ("past_key_values", "use_cache") if name in kwargs},
            )
        if labels is not None:
            logits = outputs.logits
            outputs.loss = fixed_cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), num_items_in_batch
            )
        return outputs

    def soft_histories(self, input_ids_BS: Tensor, attention_mask: Tensor | None, numbers_BS: Tensor) -> Tensor:
        """Embedded histories (B, S, d) whose words are the generator's expectations; end tokens and padding stay hard.

        Gradient flows into the generator.
        """
        if self._trie is None or self._codes is None:
            raise IncompatibleComponentsError("the model knows no names: call set_catalogue(tokenizer.codes).")
        device, levels = input_ids_BS.device, self.config.num_levels
        real_BS = torch.ones_like(input_ids_BS, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        place_BS = torch.arange(input_ids_BS.shape[1], device=device).expand_as(input_ids_BS)
        before_BS = torch.nn.functional.pad(real_BS & (input_ids_BS != self.config.item_end_token_id), (1, 0))[:, :-1]
        first_BS = torch.where(real_BS & ~before_BS, place_BS, 0).cummax(1).values  # where the item of each word begins
        level_BS = place_BS - first_BS
        items_BIL = torch.full((len(input_ids_BS), int(numbers_BS.max()) + 1, levels), -1, device=device)
        row_BS = torch.arange(len(input_ids_BS), device=device).unsqueeze(1).expand_as(input_ids_BS)
        items_BIL[row_BS[real_BS], numbers_BS[real_BS], level_BS[real_BS]] = input_ids_BS[real_BS]
        self._trie, self._codes = self._trie.to(device), self._codes.to(device)
        index_BI = self._trie.first_items(self._trie.lookup(self._trie.end_filled(items_BIL)))
        index_BS = index_BI.gather(1, numbers_BS)
        if bool((index_BS[real_BS] < 0).any()):
            raise IncompatibleComponentsError(
                "a history holds a name that no item of this index version has: make collators anew after a re-assignment."
            )
        soft_BS = real_BS & (input_ids_BS != self.config.item_end_token_id)
        item_U, which = index_BS[soft_BS].unique(return_inverse=True)
        words_ULd = self.soft_names(item_U)
        embeds_BSd = self.recommender.shared(input_ids_BS)
        return embeds_BSd.masked_scatter(soft_BS.unsqueeze(-1), words_ULd[which, level_BS[soft_BS]])

    def soft_names(self, items_U: Tensor) -> Tensor:
        """(U, L, d): the generator's word distribution at each step of an item's present name times the embeddings."""
        assert self._codes is not None
        texts_US = self.item_texts[items_U].long()
        mask_US = texts_US >= 0
        mask_US[:, 0] = True
        labels_UL = self._codes[items_U].masked_fill(self._codes[items_U] < 0, _IGNORED)
        output = self.generator(
            input_ids=texts_US.clamp(min=0),
            attention_mask=mask_US.long(),
            decoder_input_ids=self.generator._shift_right(labels_UL),
        )
        return output.logits.softmax(-1) @ self.recommender.shared.weight

    # ------------------------------------------------------------------------------------------------------- decoding

    def _scorer(self) -> EncoderDecoderScorer:
        return EncoderDecoderScorer(self.recommender, self.config.level_offsets, self.config.codebook_sizes)

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Read the histories (B, S) once."""
        return self._scorer().start_decoding(input_ids, attention_mask)

    def start_from_encoder(self, states_BSd: Tensor, attention_mask: Tensor | None = None) -> Any:
        """As `start_decoding`, from encoder states that are there already (`generate` makes them)."""
        return self._scorer().start_from_encoder(states_BSd, attention_mask)

    def start_beams(self, state: Any) -> BeamCache:
        """Incremental scores: one new word per beam and level."""
        return self._scorer().start_beams(state)

    def score_codes(self, state: Any, prefix_BKl: Tensor, level: int) -> Tensor:
        """Log-probabilities (B, K, V) of the next word of a name."""
        return self._scorer().score_codes(state, prefix_BKl, level)
