"""Configuration of LIGER: a T5 over item codes and item texts that generates and retrieves (arXiv 2411.18814)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.configuration_t5_levels import T5LevelsConfig


@strict
class LigerConfig(T5LevelsConfig):
    """Sizes of the generator, of the item vectors it reads and of its dense head.

    Args:
        num_items: size N of the catalogue.
        item_feature_dim: width F of the fixed item vectors (text embeddings); 0 = no dense head.
        item_inputs: the encoder reads code embedding + projected item vector + item position + code slot, through a
            LayerNorm. False = code embeddings alone, as T5 does.
        projection_sizes: hidden widths of the projection from F to `d_model`; none = one linear map.
        projection_dropout: inside the projection.
        feature_dropout: of the projected vectors that the encoder reads.
        max_item_positions: item positions that have a vector of their own; later items share the last one.
        dense_temperature: of the dense head, whose vectors have length 1.
        generation_loss_weight: weight of the cross-entropy of the codes.
        dense_loss_weight: weight of the cross-entropy of the item, over all items that training has seen.

    All other arguments are those of `T5LevelsConfig`.

    Raises:
        IncompatibleComponentsError: a size or temperature out of range.

    Relations: `item_inputs=False, dense_loss_weight=0` is TIGER.
    """

    model_type = "liger"
    auto_map: ClassVar[dict] = {}

    num_items: int = 0
    item_feature_dim: int = 0
    item_inputs: bool = True
    projection_sizes: list[int] | tuple[int, ...] = (768, 512, 256)
    projection_dropout: float | int = 0.2
    feature_dropout: float | int = 0.5
    max_item_positions: int = 64
    dense_temperature: float | int = 0.07
    generation_loss_weight: float | int = 1.0
    dense_loss_weight: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.projection_sizes = [int(size) for size in self.projection_sizes]
        if min(self.num_items, self.item_feature_dim) < 0 or min(self.projection_sizes, default=1) < 1:
            raise IncompatibleComponentsError(
                f"LigerConfig: num_items {self.num_items} and item_feature_dim {self.item_feature_dim} must be >= 0, the "
                f"projection_sizes {self.projection_sizes} >= 1."
            )
        if self.max_item_positions < 1 or not self.dense_temperature > 0:
            raise IncompatibleComponentsError(
                f"LigerConfig: max_item_positions {self.max_item_positions} must be >= 1 and dense_temperature "
                f"{self.dense_temperature} > 0."
            )

    @property
    def has_dense_head(self) -> bool:
        """Are there item vectors to retrieve with?"""
        return self.num_items > 0 and self.item_feature_dim > 0

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "LigerConfig":
        """As in `T5LevelsConfig`, with the size of the tokenizer's catalogue."""
        return super().from_tokenizer(tokenizer, **({"num_items": int(tokenizer.num_items)} | kwargs))
