"""Whole words of a token sequence, and the T5 encoder that marks them (P5, arXiv 2203.13366).

A word is an item name, whatever it consists of, or a run of text tokens up to the next blank. Words are numbered along
the sequence; an embedding of the number is added to all of its tokens, so that the pieces of "item_7391" belong together.

Shape suffixes: B rows, S tokens, E ends of items, N items, L tokens of the longest name, V vocabulary, M width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_genrec.models.configuration_t5_levels import T5LevelsConfig
from hf_genrec.models.t5_packed import ItemCausalStack

_BLANKS = ("▁", "Ġ")  # how SentencePiece and byte-level BPE write the blank before a word


def word_start_flags(tokenizer: Any) -> Tensor:
    """(V,) boolean: does this token begin a word? Special tokens are words of their own."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = set(tokenizer.get_added_vocab().values())
    starts = [str(token).startswith(_BLANKS) for token in tokens]
    continues = [str(token).startswith("##") for token in tokens]
    if sum(continues) > sum(starts):  # WordPiece marks what continues a word, not what begins one
        starts = [not one for one in continues]
    return torch.tensor([start or index in added for index, start in enumerate(starts)])


class NameTable:
    """The catalogue's names, to be found by their last token: hashes of the names read backwards.

    Args:
        item_tokens_NL: token ids of every name, its end token last, -1 behind it.
    """

    def __init__(self, item_tokens_NL: Tensor) -> None:
        tokens = item_tokens_NL.long()
        self.num_levels = tokens.shape[1]
        generator = torch.Generator().manual_seed(20220324)
        factors = torch.randint(2**61, (self.num_levels,), generator=generator) * 2 + 1
        self.factors_L = factors.to(tokens.device)
        length_N = (tokens >= 0).sum(1)
        place = length_N[:, None] - 1 - torch.arange(self.num_levels, device=tokens.device)
        backwards = tokens.gather(1, place.clamp(min=0))
        self.hashes_N = torch.where(place >= 0, (backwards + 1) * self.factors_L, 0).sum(1).sort().values

    def first_tokens(self, ids_BS: Tensor, real_BS: Tensor, end_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, place of the end token and place of the first token of every item name in the sequences, each (E,).

        Of several names that end at the same place the longest counts; an end token that closes no known name is its
        own first token.
        """
        row_E, last_E = end_BS.nonzero(as_tuple=True)
        back = torch.arange(self.num_levels, device=ids_BS.device)
        place_EL = last_E[:, None] - back
        inside = place_EL >= 0
        place_EL = place_EL.clamp(min=0)
        tokens_EL = ids_BS[row_E[:, None], place_EL]
        other_end = end_BS[row_E[:, None], place_EL] & (back > 0)
        inside = (inside & real_BS[row_E[:, None], place_EL] & ~other_end).long().cumprod(1).bool()
        hashes_EL = torch.where(inside, (tokens_EL + 1) * self.factors_L, 0).cumsum(1)
        found = torch.searchsorted(self.hashes_N, hashes_EL).clamp(max=len(self.hashes_N) - 1)
        known_EL = inside & (self.hashes_N[found] == hashes_EL)
        length_E = torch.where(known_EL, back, 0).amax(1) if len(row_E) else row_E
        return row_E, last_E, last_E - length_E


def whole_word_ids(
    ids_BS: Tensor, real_BS: Tensor, word_starts_V: Tensor, item_end_token_id: int, names: NameTable
) -> Tensor:
    """(B, S) number of the word each token belongs to, from 1; 0 on padding, which may stand on either side."""
    real_BS = real_BS.bool()
    end_BS = real_BS & (ids_BS == item_end_token_id)
    starts_BS = word_starts_V[ids_BS] & real_BS
    after_end = nn.functional.pad(end_BS, (1, 0))[:, :-1]
    before_first = nn.functional.pad(real_BS, (1, 0))[:, :-1]
    starts_BS = starts_BS | (real_BS & (after_end | ~before_first))
    row_E, last_E, first_E = names.first_tokens(ids_BS, real_BS, end_BS)
    steps = torch.zeros(ids_BS.shape[0], ids_BS.shape[1] + 1, dtype=torch.long, device=ids_BS.device)
    steps.index_put_((row_E, first_E + 1), torch.ones_like(row_E), accumulate=True)
    steps.index_put_((row_E, last_E + 1), -torch.ones_like(row_E), accumulate=True)
    continues_BS = steps.cumsum(1)[:, :-1] > 0
    starts_BS = starts_BS & ~continues_BS
    starts_BS.index_put_((row_E, first_E), torch.ones_like(row_E, dtype=torch.bool))
    return starts_BS.long().cumsum(1) * real_BS


class WholeWordStack(ItemCausalStack):
    """A T5 encoder that adds an embedding per whole word; with `causal_encoder` a word sees itself and earlier words.

    `install` makes it of a model's encoder.
    """

    whole_words: nn.Embedding | None
    word_starts: Tensor
    item_tokens: Tensor

    def names(self) -> NameTable:
        """The catalogue's names, hashed once."""
        table = self.item_tokens
        state = (table.data_ptr(), table._version, table.device)
        held = self.__dict__.get("_names")
        if held is None or held[0] != state:
            held = self.__dict__["_names"] = (state, NameTable(table))
        return held[1]

    def word_ids(self, input_ids_BS: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, S) see `whole_word_ids`; without a mask nothing is padding."""
        real = torch.ones_like(input_ids_BS) if attention_mask is None else attention_mask
        return whole_word_ids(input_ids_BS, real, self.word_starts, self.config.item_end_token_id, self.names())

    def item_numbers(self, input_ids_BS: Tensor) -> Tensor:
        """(B, S): words are what comes one after the other here, items among them."""
        return self.word_ids(input_ids_BS)

    def visible_tokens(
        self, input_ids_BS: Tensor | None, attention_mask: Tensor | None, item_numbers: Tensor | None = None
    ) -> Tensor | None:
        """(B, S, S), or None for an encoder that sees everything."""
        if not self.config.causal_encoder:
            return None
        if item_numbers is None and input_ids_BS is not None:
            item_numbers = self.word_ids(input_ids_BS, attention_mask)
        return super().visible_tokens(input_ids_BS, attention_mask, item_numbers)

    def embed_inputs(
        self, input_ids_BS: Tensor, attention_mask: Tensor | None = None, word_ids_BS: Tensor | None = None
    ) -> Tensor:
        """Token embeddings, plus the embedding of each token's word: (B, S, M)."""
        embedded = self.embed_tokens(input_ids_BS)
        if self.whole_words is None:
            return embedded
        if word_ids_BS is None:
            word_ids_BS = self.word_ids(input_ids_BS, attention_mask)
        return embedded + self.whole_words(word_ids_BS.clamp(max=self.whole_words.num_embeddings - 1))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        item_numbers: Tensor | None = None,
        whole_word_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `ItemCausalStack.forward`.

        Args:
            whole_word_ids: (B, S) numbers of the words; derived from `input_ids` where they are not given.
        """
        if input_ids is not None and inputs_embeds is None:
            padding = None if attention_mask is None or attention_mask.dim() > 2 else attention_mask
            if whole_word_ids is None and (self.whole_words is not None or self.config.causal_encoder):
                whole_word_ids = self.word_ids(input_ids, padding)
            inputs_embeds = self.embed_inputs(input_ids, padding, whole_word_ids)
            item_numbers = whole_word_ids if item_numbers is None else item_numbers
        return super().forward(
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, item_numbers=item_numbers, **kwargs
        )


def install(model: Any, config: T5LevelsConfig) -> None:
    """Let the encoder of a new T5 mark whole words."""
    encoder = model.encoder
    encoder.__class__ = WholeWordStack
    whole_word = getattr(config, "whole_word", True)
    size = getattr(config, "whole_word_size", 512)
    encoder.whole_words = nn.Embedding(size, config.d_model) if whole_word else None
    encoder.register_buffer("word_starts", torch.zeros(config.vocab_size or 0, dtype=torch.bool))
    items = torch.full((getattr(config, "num_items", 1), config.num_levels), -1, dtype=torch.int32)
    encoder.register_buffer("item_tokens", items)
