"""Configuration of SpecGR++: a T5 over item codes whose encoder also retrieves (arXiv 2410.02939)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.configuration_t5_levels import T5LevelsConfig


@strict
class SpecGRConfig(T5LevelsConfig):
    """Sizes of the generator, and of the retriever that its encoder also is.

    Args:
        num_items: size N of the catalogue; 0 = no retriever's table (the model generates, but drafts nothing).
        projection_size: width of the query and item embeddings.
        contrast_temperature: of the contrastive losses; embeddings have length 1.
        generation_loss_weight: weight of the cross-entropy of the codes.
        embedding_loss_weight: weight of the contrastive loss.
        finetune_share: share of the training steps, at the end, in which the contrast runs over the embeddings of the
            whole catalogue, held fixed, in place of those of the batch.

    All other arguments are those of `T5LevelsConfig`.

    Raises:
        IncompatibleComponentsError: a temperature or width that is not positive, a share outside 0..1.

    Relations: `embedding_loss_weight=0` is TIGER.
    """

    model_type = "specgr"
    auto_map: ClassVar[dict] = {}

    num_items: int = 0
    projection_size: int = 64
    contrast_temperature: float | int = 0.07
    generation_loss_weight: float | int = 1.0
    embedding_loss_weight: float | int = 6.0
    finetune_share: float | int = 0.16

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_items < 0 or self.projection_size < 1 or not self.contrast_temperature > 0:
            raise IncompatibleComponentsError(
                f"SpecGRConfig: num_items {self.num_items} must be >= 0, projection_size {self.projection_size} >= 1 "
                f"and contrast_temperature {self.contrast_temperature} > 0."
            )
        if self.causal_encoder:
            raise IncompatibleComponentsError(
                "SpecGRConfig: causal_encoder is not for SpecGR, whose retriever reads one history per sample; leave it out."
            )
        if not 0 <= self.finetune_share <= 1:
            raise IncompatibleComponentsError(
                f"SpecGRConfig: finetune_share is a share of the training steps, from 0 to 1, got {self.finetune_share}."
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "SpecGRConfig":
        """As in `T5LevelsConfig`, with the size of the tokenizer's catalogue."""
        return super().from_tokenizer(tokenizer, **({"num_items": int(tokenizer.num_items)} | kwargs))
