"""Configuration of ColaRec: content in, collaborative item codes out (arXiv 2403.18480)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.configuration_t5_levels import T5LevelsConfig


@strict
class ColaRecConfig(T5LevelsConfig):
    """Sizes of the model and the weights of its losses.

    Args:
        num_items: size N of the catalogue.
        content_vocab_size: tokens of the text vocabulary that item contents are written in.
        content_length: most content tokens C of an item.
        item_embedding_std: of the vectors of items and content tokens at the start; 1.0 = as T5's tokens. An item is seen
            far more rarely than a code, and hardly leaves a random place of that size.
        generation_weight: weight of the two generation tasks together: user to item code, item content to its own code.
        indexing: train the second of them (item content to its own code).
        ranking_weight: weight of the pairwise ranking (BPR) of encoder states.
        contrast_weight: weight of the contrast between an item, an item of the same cluster, and another item.
        indexed_items: targets per batch that the item side is trained on; None = all.

    All other arguments are those of `T5LevelsConfig`. With `causal_encoder` all prefixes of a window are one pass.

    Raises:
        IncompatibleComponentsError: a size below 1, a negative weight.

    Relations: `indexing=False, ranking_weight=0, contrast_weight=0` is a T5 that reads item contents.
    """

    model_type = "colarec"
    auto_map: ClassVar[dict] = {}

    num_items: int = 0
    content_vocab_size: int = 1
    content_length: int = 16
    item_embedding_std: float | int = 1.0
    generation_weight: float | int = 0.08  # repository, Phone
    indexing: bool = True
    ranking_weight: float | int = 1.0
    contrast_weight: float | int = 0.1  # repository, Phone
    indexed_items: int | None = 64

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_items < 0 or self.content_vocab_size < 1 or self.content_length < 1:
            raise IncompatibleComponentsError(
                f"ColaRecConfig: num_items {self.num_items} must be >= 0, content_vocab_size {self.content_vocab_size} and "
                f"content_length {self.content_length} >= 1."
            )
        if self.indexed_items is not None and self.indexed_items < 1:
            raise IncompatibleComponentsError(
                f"ColaRecConfig: indexed_items is {self.indexed_items}; give 1 or more, or None for every target."
            )
        for name in ("generation_weight", "ranking_weight", "contrast_weight"):
            if getattr(self, name) < 0:
                raise IncompatibleComponentsError(f"ColaRecConfig: {name} is {getattr(self, name)}; it must be >= 0.")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "ColaRecConfig":
        """As in `T5LevelsConfig`, with the size of the tokenizer's catalogue.

        Raises:
            IncompatibleComponentsError: the tokenizer adds user or end tokens, which this model does not read.
        """
        if getattr(tokenizer, "num_user_tokens", 0) or getattr(tokenizer, "history_eos", False):
            raise IncompatibleComponentsError(
                "ColaRec reads whole items and a task token of its own: make the tokenizer without num_user_tokens and "
                "history_eos."
            )
        return super().from_tokenizer(tokenizer, **({"num_items": int(tokenizer.num_items)} | kwargs))
