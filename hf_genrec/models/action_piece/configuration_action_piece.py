"""Configuration of ActionPiece's T5 over merged feature tokens (arXiv 2502.13581)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import T5Config

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values


@strict
class ActionPieceConfig(T5Config):
    """Sizes of the paper's model and the vocabulary of an `ActionPieceTokenizer`.

    Args:
        vocab_size: size of the token table; None = up to the end of the widest level.
        codebook_sizes: tokens that may stand at each decoder position, length L (most tokens an item can have).
        level_offsets: token id of the first of them, length L; None = all zeros. Levels overlap: one softmax over the
            whole vocabulary at every position.
        pooled_dropout: take dropout masks from a pre-drawn pool (several times cheaper on a CPU).
        causal_encoder: True = a token of the encoder sees itself and earlier tokens only, so that several targets of a
            window are trained in one pass (models/t5_packed.py). False = T5's encoder, one sample per prefix, as published.
        catalogue_fingerprint: `catalogue_fingerprint` of the tokenizer that the model belongs to.

    All other arguments are those of `T5Config`.

    Raises:
        IncompatibleComponentsError: sizes and offsets of different length, or outside the vocabulary.

    Example:
        >>> config = ActionPieceConfig(codebook_sizes=[30, 30], d_model=32)
        >>> config.num_levels, config.level_offsets, config.vocab_size
        (2, [0, 0], 30)
    """

    model_type = "action_piece"
    auto_map: ClassVar[dict] = {}

    vocab_size: int | None = None
    d_model: int = 128
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 4
    num_decoder_layers: int | None = 4
    num_heads: int = 6
    dropout_rate: float | int = 0.1
    feed_forward_proj: str = "relu"
    decoder_start_token_id: int | None = 0
    codebook_sizes: list[int] | tuple[int, ...] = (256,)
    level_offsets: list[int] | tuple[int, ...] | None = None
    pooled_dropout: bool = True
    causal_encoder: bool = False
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        offsets = [0] * len(self.codebook_sizes) if self.level_offsets is None else self.level_offsets
        self.level_offsets = [int(offset) for offset in offsets]
        ends = [offset + size for offset, size in zip(self.level_offsets, self.codebook_sizes)]
        if self.vocab_size is None:
            self.vocab_size = max(ends, default=0)
        super().__post_init__(**kwargs)
        wrong = len(self.level_offsets) != len(self.codebook_sizes) or not self.codebook_sizes
        if wrong or min(self.codebook_sizes) < 1 or min(self.level_offsets) < 0 or max(ends) > self.vocab_size:
            raise IncompatibleComponentsError(
                f"ActionPieceConfig: codebook_sizes {self.codebook_sizes} and level_offsets {self.level_offsets} need one "
                f"entry per level inside vocab_size {self.vocab_size}; use ActionPieceConfig.from_tokenizer(tokenizer)."
            )

    @property
    def num_levels(self) -> int:
        """L, the most tokens of one item."""
        return len(self.codebook_sizes)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "ActionPieceConfig":
        """Take sizes, special token ids and the catalogue's fingerprint from an `ActionPieceTokenizer`.

        Args:
            tokenizer: the tokenizer; any other with a catalogue works too.
            **kwargs: any other field of the configuration; they win over the tokenizer's values.
        """
        values = catalogue_values(tokenizer) | {"decoder_start_token_id": tokenizer.pad_token_id}
        return cls(**(values | kwargs))
