"""Configuration of IDGenRec: a T5 that names items in words and a T5 that recommends by these names (arXiv 2403.19021)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, T5Config

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values

_SMALL = {
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 128,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "dropout_rate": 0.1,
}


@strict
class IDGenRecConfig(PreTrainedConfig):
    """Two T5s over one vocabulary of words.

    Args:
        recommender_t5, generator_t5: fields of `T5Config` of the two; None and missing fields = small sizes for a CPU.
        causal_encoder: True = all prefixes of a window are trained in one pass (models/t5_packed.py); False = T5's
            encoder, one sample per prefix.
        pooled_dropout: take dropout masks from a pre-drawn pool (several times cheaper on a CPU).
        num_items: size N of the catalogue.
        text_tokens: words of an item's text that the generator reads.
        item_end_token_id: the token that closes every name.
        codebook_sizes, level_offsets: per token of a name: the vocabulary, and 0.
        catalogue_fingerprint: of the tokenizer's catalogue.

    Raises:
        IncompatibleComponentsError: a field that `T5Config` does not have.
    """

    model_type = "idgenrec"
    auto_map: ClassVar[dict] = {}

    recommender_t5: dict | None = None
    generator_t5: dict | None = None
    causal_encoder: bool = True
    pooled_dropout: bool = True
    num_items: int = 1
    text_tokens: int = 24
    item_end_token_id: int = 4
    vocab_size: int = 32
    codebook_sizes: list[int] | tuple[int, ...] = (32, 32)
    level_offsets: list[int] | tuple[int, ...] = (0, 0)
    is_encoder_decoder: bool = True
    initializer_factor: float | int = 1.0
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    decoder_start_token_id: int | None = 0
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        for name in ("recommender_t5", "generator_t5"):
            values = _SMALL | (getattr(self, name) or {})
            unknown = sorted(set(values) - set(T5Config.__dataclass_fields__))
            if unknown:
                raise IncompatibleComponentsError(f"IDGenRecConfig: {name}.{unknown[0]} is no field of T5Config.")
            setattr(self, name, values)
        super().__post_init__(**kwargs)

    @property
    def num_levels(self) -> int:
        """L, tokens of the longest name, its end token included."""
        return len(self.codebook_sizes)

    def t5_config(self, part: str) -> T5Config:
        """Of "recommender" or "generator"."""
        values = dict(getattr(self, f"{part}_t5")) | {"vocab_size": self.vocab_size, "pad_token_id": self.pad_token_id}
        config = T5Config(**values, eos_token_id=self.eos_token_id, initializer_factor=self.initializer_factor)
        config.decoder_start_token_id = self.decoder_start_token_id
        config.item_end_token_id = self.item_end_token_id
        return config

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "IDGenRecConfig":
        """Sizes, special tokens and fingerprint of an `ItemWordsTokenizer`; other fields as keyword arguments.

        Raises:
            IncompatibleComponentsError: a tokenizer whose items are not named by words.
        """
        if not hasattr(tokenizer, "item_end_token_id"):
            raise IncompatibleComponentsError(
                f"{type(tokenizer).__name__} does not name items by words: set identifiers.quantizer to keywords."
            )
        values = catalogue_values(tokenizer) | {
            "num_items": int(tokenizer.num_items),
            "item_end_token_id": int(tokenizer.item_end_token_id),
            "decoder_start_token_id": tokenizer.pad_token_id,
        }
        return cls(**(values | kwargs))
