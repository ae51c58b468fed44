"""Configuration of the language recommender: a causal language model over item texts (arXiv 2308.08434, 2406.14900)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_genrec.models.language_parts import LanguagePartsConfig, words_values


@strict
class LanguageRecommenderConfig(LanguagePartsConfig, PreTrainedConfig):
    """Two stock models in one: the language model, and an assistant that knows items and no words.

    Args:
        language_model: configuration of a causal language model of transformers, with its `model_type`; sizes and token
            ids come from the tokenizer.
        assistant: configuration of a recommender over atomic items (`{"model_type": "sasrec", ...}`); None = none.
        assistant_loss_weight: weight of the assistant's own loss; the two share no weights.
        facets: names of further texts of an item beside the one that names it, e.g. ["id", "genres"] (2310.06491).
        facet_levels: tokens of the longest such text, its end token included.
        marker_levels: tokens of the longest text that announces a facet.
        num_items: N, items of the catalogue.
        item_end_token_id: the token that closes every item's text.
        codebook_sizes, level_offsets: per level of the text identifiers: the vocabulary, and 0.
        catalogue_fingerprint: of the tokenizer's catalogue.

    Raises:
        IncompatibleComponentsError: no `model_type`, or one that transformers does not know.
    """

    model_type = "language_recommender"
    auto_map: ClassVar[dict] = {}
    keys_to_ignore_at_inference = ["past_key_values"]

    language_model: dict | None = None
    assistant: dict | None = None
    assistant_loss_weight: float | int = 1.0
    facets: list[str] | tuple[str, ...] = ()
    facet_levels: int = 1
    marker_levels: int = 1
    num_items: int = 1
    item_end_token_id: int = 0
    vocab_size: int = 32
    codebook_sizes: list[int] | tuple[int, ...] = (32,)
    level_offsets: list[int] | tuple[int, ...] = (0,)
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        self.language_model = {"model_type": "llama", **(self.language_model or {})}
        self.check_parts()
        super().__post_init__(**kwargs)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "LanguageRecommenderConfig":
        """Sizes, special tokens and fingerprint of an `ItemWordsTokenizer`; other fields as keyword arguments.

        Raises:
            IncompatibleComponentsError: a tokenizer whose items are not named by words.
        """
        return cls(**(words_values(tokenizer) | kwargs))
