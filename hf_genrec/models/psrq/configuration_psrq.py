"""Configuration of PSRQ's ranking network, multi-codebook cross-attention (arXiv 2508.20359)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values

LOSSES = ("bce", "softmax")


@strict
class PSRQConfig(PreTrainedConfig):
    """Sizes and switches of [`PSRQForRecommendation`].

    Args:
        codebook_sizes: codes per level, `L` entries over all parts.
        level_offsets: token id of code 0 of every level, `L` entries.
        part_levels: how many levels each part of the identifier has, in their order: the modal parts, the joint part last.
            Levels behind these (a counter of the collision policy) belong to the joint part. One part alone is both.
        num_items: size of the catalogue.
        hidden_size: width of code vectors and of all heads of one modality together.
        num_attention_heads: heads per modality.
        intermediate_size: hidden width of the item towers.
        max_position_embeddings: newest items of a history that it reads.
        loss: `"bce"` (against sampled negatives, the paper's) or `"softmax"` (cross-entropy over all items).
        num_negatives: items drawn uniformly per step for `"bce"`, shared by the batch.
        initializer_range: standard deviation of the linear layers at the start.
        embedding_std: that of the code vectors.
        catalogue_fingerprint: of the tokenizer the model belongs to; checked by `recommend`.

    Raises:
        IncompatibleComponentsError: parts with more levels than the codes have, sizes and offsets of different lengths, a
            hidden size that the heads do not divide, an unknown loss, or no negatives for `"bce"`.
    """

    model_type = "psrq"
    auto_map: ClassVar[dict] = {}

    vocab_size: int = 76
    codebook_sizes: list[int] | tuple[int, ...] = (8,) * 9
    level_offsets: list[int] | tuple[int, ...] = tuple(4 + 8 * level for level in range(9))
    part_levels: list[int] | tuple[int, ...] = (3, 3, 3)
    num_items: int = 0
    hidden_size: int = 64
    num_attention_heads: int = 2
    intermediate_size: int = 128
    max_position_embeddings: int = 50
    loss: str = "bce"
    num_negatives: int = 256
    dropout: float | int = 0.1
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.1
    embedding_std: float = 0.3
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    tie_word_embeddings: bool = False
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        self.part_levels = [int(levels) for levels in self.part_levels]
        super().__post_init__(**kwargs)
        if len(self.codebook_sizes) != len(self.level_offsets):
            raise IncompatibleComponentsError(
                f"PSRQConfig: {len(self.codebook_sizes)} codebook_sizes but {len(self.level_offsets)} level_offsets; "
                "take both from one tokenizer with PSRQConfig.from_tokenizer."
            )
        if not self.part_levels or min(self.part_levels) < 1 or sum(self.part_levels) > self.num_levels:
            raise IncompatibleComponentsError(
                f"PSRQConfig: part_levels {self.part_levels} must be positive and together at most the {self.num_levels} "
                "levels of the codes; give the number of codes of every part of the identifier."
            )
        if self.hidden_size % self.num_attention_heads:
            raise IncompatibleComponentsError(
                f"PSRQConfig: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if self.loss not in LOSSES:
            raise IncompatibleComponentsError(f"PSRQConfig: loss must be one of {LOSSES}, got {self.loss!r}.")
        if self.loss == "bce" and self.num_negatives < 1:
            raise IncompatibleComponentsError("PSRQConfig: loss 'bce' needs num_negatives of at least 1.")

    @property
    def num_levels(self) -> int:
        """Codes per item, `L`."""
        return len(self.codebook_sizes)

    @property
    def parts(self) -> list[range]:
        """Levels of every part; the joint one is the last."""
        levels, first = [], 0
        for size in self.part_levels[:-1]:
            levels.append(range(first, first + size))
            first += size
        return [*levels, range(first, self.num_levels)]

    @property
    def num_modalities(self) -> int:
        """Parts that are read from the history: all but the joint one, or the only one."""
        return max(1, len(self.part_levels) - 1)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "PSRQConfig":
        """Sizes and special ids from the catalogue of an `ItemTokenizer`; `kwargs` override."""
        return cls(**(catalogue_values(tokenizer) | {"num_items": int(tokenizer.num_items)} | kwargs))
