"""Configuration of P5, a T5 over texts with item names and whole-word embeddings (arXiv 2203.13366)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.configuration_t5_levels import T5LevelsConfig


@strict
class P5Config(T5LevelsConfig):
    """T5 and the layout of item names in its vocabulary.

    Every level of an item name has the whole vocabulary as its codebook, so `codebook_sizes` repeats the vocabulary and
    `level_offsets` are 0.

    Args:
        whole_word: add one embedding per word to the encoder's input, the same for all tokens of the word (an item name
            is one word). False = T5.
        whole_word_size: rows of that table; words further on share the last row.
        num_items: N, items of the catalogue.
        item_end_token_id: the token that closes every item name.
        prompt_ids: tokens put before a history when items are recommended: the wording that training used.

    All other arguments are those of `T5LevelsConfig`.

    Raises:
        IncompatibleComponentsError: levels that are not given alike in sizes and offsets.

    Example:
        >>> config = P5Config(vocab_size=50, codebook_sizes=[50, 50], level_offsets=[0, 0], d_model=32)
        >>> config.num_levels, config.whole_word_size, config.restrict_to_level
        (2, 512, False)
    """

    model_type = "p5"
    auto_map: ClassVar[dict] = {}

    codebook_sizes: list[int] | tuple[int, ...] = (32,)
    level_offsets: list[int] | tuple[int, ...] | None = (0,)
    restrict_to_level: bool = False
    whole_word: bool = True
    whole_word_size: int = 512  # repository: at most 512 whole words in a source text
    num_items: int = 1
    item_end_token_id: int = 0
    prompt_ids: list[int] | tuple[int, ...] = ()

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.prompt_ids = [int(token) for token in self.prompt_ids]

    def _check_layout(self) -> None:
        """Names of words share their tokens, so levels may overlap here; they must only lie in the vocabulary."""
        assert self.level_offsets is not None and self.vocab_size is not None
        ends = [first + size for first, size in zip(self.level_offsets, self.codebook_sizes)]
        if not ends or len(self.codebook_sizes) != len(self.level_offsets) or max(ends) > self.vocab_size:
            raise IncompatibleComponentsError(
                f"P5Config: codebook_sizes {list(self.codebook_sizes)} and level_offsets {list(self.level_offsets)} must "
                f"have one entry per level and lie in the vocabulary of {self.vocab_size}; use P5Config.from_tokenizer."
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "P5Config":
        """Sizes, special tokens and fingerprint of an `ItemWordsTokenizer`; other fields as keyword arguments.

        Raises:
            IncompatibleComponentsError: a tokenizer whose items are not named by words.
        """
        if not hasattr(tokenizer, "item_end_token_id"):
            raise IncompatibleComponentsError(
                f"{type(tokenizer).__name__} does not name items by words; make one with ItemWordsTokenizer.from_texts or "
                "tokenizer_from_names."
            )
        values = {"num_items": tokenizer.num_items, "item_end_token_id": tokenizer.item_end_token_id}
        return super().from_tokenizer(tokenizer, **(values | kwargs))  # type: ignore[return-value]
