"""Configuration of a T5 encoder-decoder over item codes: what TIGER (arXiv 2305.05065) and the models built on it share."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import T5Config

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values

NUM_SPECIAL_TOKENS = 4  # <pad> </s> <unk> <s>, as ItemTokenizer lays them out


@strict
class T5LevelsConfig(T5Config):
    """Sizes of the paper's model, plus the layout of the item codes in the vocabulary.

    Args:
        vocab_size: size of the token table; None = up to the end of the last code block.
        codebook_sizes: number of codes of each level, length L.
        level_offsets: token id of code 0 of each level, length L; None = one block after the other, after the four
            special tokens.
        restrict_to_level: True = the distribution at decoder position l runs over the codes of level l only (and only
            the end token can follow the last code). False = plain T5 over the whole vocabulary.
        pooled_dropout: take dropout masks from a pre-drawn pool (several times cheaper on a CPU). The weights of the
            attention keep T5's own dropout.
        causal_encoder: True = a token of the encoder sees its own item and earlier ones only, and all prefixes of a
            window are trained in one pass (models/t5_packed.py). False = T5's encoder, one sample per prefix.
        loss_temperature: the loss is the cross-entropy of logits / loss_temperature (the ranking-guided loss of LETTER,
            arXiv 2405.07314): below 1 it weighs the hard negatives more; 1.0 = plain cross-entropy.
        catalogue_fingerprint: `ItemTokenizer.catalogue_fingerprint` of the catalogue the model belongs to.

    All other arguments are those of `T5Config`.

    Raises:
        IncompatibleComponentsError: sizes and offsets of different length, overlapping or outside the vocabulary; a
            temperature that is not positive.

    Example:
        >>> config = T5LevelsConfig(codebook_sizes=[16, 16, 4], d_model=32)
        >>> config.num_levels, config.level_offsets, config.vocab_size
        (3, [4, 20, 36], 40)
    """

    model_type = "t5_levels"
    auto_map: ClassVar[dict] = {}

    vocab_size: int | None = None
    d_model: int = 128  # sec 4.1 "Sequence-to-Sequence Model Implementation Details"
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 4
    num_decoder_layers: int | None = 4
    num_heads: int = 6
    dropout_rate: float | int = 0.1
    feed_forward_proj: str = "relu"
    decoder_start_token_id: int | None = 0
    codebook_sizes: list[int] | tuple[int, ...] = (256, 256, 256, 256)
    level_offsets: list[int] | tuple[int, ...] | None = None
    restrict_to_level: bool = True
    pooled_dropout: bool = True
    causal_encoder: bool = False
    loss_temperature: float | int = 1.0
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        if self.level_offsets is None:
            self.level_offsets = [
                NUM_SPECIAL_TOKENS + sum(self.codebook_sizes[:level]) for level in range(self.num_levels)
            ]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        if self.vocab_size is None:
            ends = [offset + size for offset, size in zip(self.level_offsets, self.codebook_sizes)]
            self.vocab_size = max(ends, default=NUM_SPECIAL_TOKENS)
        super().__post_init__(**kwargs)
        self._check_layout()
        if not self.loss_temperature > 0:
            raise IncompatibleComponentsError(
                f"{type(self).__name__}: loss_temperature {self.loss_temperature} must be > 0; 1.0 is plain cross-entropy."
            )

    def _check_layout(self) -> None:
        if not self.codebook_sizes or len(self.codebook_sizes) != len(self.level_offsets):
            raise IncompatibleComponentsError(
                f"{type(self).__name__}: codebook_sizes {list(self.codebook_sizes)} and level_offsets {list(self.level_offsets)} "
                f"must have one entry per level each; use {type(self).__name__}.from_tokenizer(tokenizer)."
            )
        end = 0
        for level, (offset, size) in enumerate(zip(self.level_offsets, self.codebook_sizes)):
            if size < 1 or offset < end or offset + size > self.vocab_size:
                raise IncompatibleComponentsError(
                    f"{type(self).__name__}: level {level} has {size} codes from token {offset}, which is empty, overlaps the "
                    f"level before it or ends behind vocab_size {self.vocab_size}; "
                    f"use {type(self).__name__}.from_tokenizer(tokenizer)."
                )
            end = offset + size

    @property
    def num_levels(self) -> int:
        """L, the number of codes of one item."""
        return len(self.codebook_sizes)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "T5LevelsConfig":
        """Take sizes, special token ids and the catalogue's fingerprint from an `ItemTokenizer`.

        Args:
            tokenizer: an `ItemTokenizer`, or a text tokenizer extended by one.
            **kwargs: any other field of the configuration; they win over the tokenizer's values.
        """
        values = catalogue_values(tokenizer) | {"decoder_start_token_id": tokenizer.pad_token_id}
        return cls(**(values | kwargs))
