"""Configuration of ETEGRec: a T5 over item codes together with the quantizer that makes them (arXiv 2409.05546)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.configuration_t5_levels import T5LevelsConfig


@strict
class EtegrecConfig(T5LevelsConfig):
    """Sizes of the recommender, the quantizer inside, and the weights of the two alignment terms.

    Args:
        num_items: size N of the catalogue.
        quantizer: configuration of the RQ-VAE, as a dictionary; `attach_quantizer` fills it in. None = no tokenizer side.
        sequence_alignment_weight: mu, of the symmetric divergence between the code distributions of the history and of
            the target item (SIA).
        preference_alignment_weight: lambda, of the contrast between the decoder's first state and the target's
            reconstruction (PSA).
        preference_temperature: t of that contrast.

    All other arguments are those of `T5LevelsConfig`.

    Raises:
        IncompatibleComponentsError: a negative weight, a temperature that is not positive.

    Relations: both weights 0 is TIGER (its code tables are per level and tied to the head already).
    """

    model_type = "etegrec"
    auto_map: ClassVar[dict] = {}

    num_items: int = 0
    quantizer: dict | None = None
    sequence_alignment_weight: float | int = 0.01
    preference_alignment_weight: float | int = 0.01
    preference_temperature: float | int = 0.07

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("sequence_alignment_weight", "preference_alignment_weight", "num_items"):
            if getattr(self, name) < 0:
                raise IncompatibleComponentsError(f"EtegrecConfig: {name} must be >= 0, got {getattr(self, name)}.")
        if not self.preference_temperature > 0:
            raise IncompatibleComponentsError(
                f"EtegrecConfig: preference_temperature must be > 0, got {self.preference_temperature}."
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "EtegrecConfig":
        """As in `T5LevelsConfig`, with the size of the tokenizer's catalogue."""
        return super().from_tokenizer(tokenizer, **({"num_items": int(tokenizer.num_items)} | kwargs))
