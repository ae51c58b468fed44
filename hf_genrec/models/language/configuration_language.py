"""Configuration of the language recommender: a causal language model over item texts (arXiv 2308.08434, 2406.14900)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values


@strict
class LanguageRecommenderConfig(PreTrainedConfig):
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
        for name in ("language_model", "assistant"):
            values = getattr(self, name)
            if values is not None and values.get("model_type") not in CONFIG_MAPPING:
                raise IncompatibleComponentsError(
                    f"{name}.model_type is {values.get('model_type')!r}, which transformers does not know; name a "
                    "model type such as 'llama', 'qwen3' or 'gpt2' ('sasrec' for the assistant)."
                )
        super().__post_init__(**kwargs)

    def language_config(self) -> PreTrainedConfig:
        """Of the language model, with this vocabulary."""
        values = dict(self.language_model or {})
        tokens = {
            "vocab_size": self.vocab_size,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }
        return AutoConfig.for_model(values.pop("model_type"), **(values | tokens))

    def assistant_config(self) -> PreTrainedConfig | None:
        """Of the assistant: one token per item behind its four special tokens."""
        if self.assistant is None:
            return None
        values = dict(self.assistant)
        return AutoConfig.for_model(
            values.pop("model_type"), **({"codebook_sizes": [self.num_items], "level_offsets": [4]} | values)
        )

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "LanguageRecommenderConfig":
        """Sizes, special tokens and fingerprint of an `ItemWordsTokenizer`; other fields as keyword arguments.

        Raises:
            IncompatibleComponentsError: a tokenizer whose items are not named by words.
        """
        if not hasattr(tokenizer, "item_end_token_id"):
            raise IncompatibleComponentsError(
                f"{type(tokenizer).__name__} does not name items by words; make one with ItemWordsTokenizer.from_texts."
            )
        values = catalogue_values(tokenizer) | {
            "num_items": tokenizer.num_items,
            "item_end_token_id": tokenizer.item_end_token_id,
        }
        return cls(**(values | kwargs))
