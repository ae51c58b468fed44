"""Configuration of VQ-Rec, the transferable recommender over code vectors (arXiv 2210.12316)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values


@strict
class VQRecConfig(PreTrainedConfig):
    """Sizes and switches of [`VQRecForRecommendation`].

    Args:
        codebook_sizes: codes per digit, `L` entries (the paper: 32 digits of 256 codes).
        level_offsets: token id of code 0 of every digit, `L` entries.
        num_items: size of the catalogue.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the Transformer.
        max_position_embeddings: newest items of a history that it reads.
        temperature: divides the cosine of a user's state and an item's vector.
        pretrain_share: share of the training steps, from the first, with the contrastive loss (negatives of the batch and
            semi-synthetic ones); the rest has cross-entropy over all items. 0 = no pre-training, 1 = nothing else.
        fake_code_ratio: probability with which a digit of a semi-synthetic negative is replaced by a random code.
        norm_first: normalise before attention and feed-forward instead of after them.
        initializer_range: standard deviation of the linear layers at the start.
        embedding_std: that of the code vectors (an item is the mean of its L code vectors).
        catalogue_fingerprint: of the tokenizer the model belongs to; checked by `recommend`.

    Raises:
        IncompatibleComponentsError: sizes and offsets of different lengths, a hidden size that the heads do not divide, a
            temperature that is not positive, or a share or ratio outside 0 to 1.
    """

    model_type = "vq_rec"
    auto_map: ClassVar[dict] = {}

    vocab_size: int = 1028
    codebook_sizes: list[int] | tuple[int, ...] = (32,) * 32
    level_offsets: list[int] | tuple[int, ...] = tuple(4 + 32 * level for level in range(32))
    num_items: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    max_position_embeddings: int = 50
    temperature: float | int = 0.07
    pretrain_share: float | int = 0.0
    fake_code_ratio: float | int = 0.75
    norm_first: bool = False
    dropout: float | int = 0.2
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.1
    embedding_std: float = 0.05
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    tie_word_embeddings: bool = False
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        super().__post_init__(**kwargs)
        if len(self.codebook_sizes) != len(self.level_offsets):
            raise IncompatibleComponentsError(
                f"VQRecConfig: {len(self.codebook_sizes)} codebook_sizes but {len(self.level_offsets)} level_offsets; "
                "take both from one tokenizer with VQRecConfig.from_tokenizer."
            )
        if self.hidden_size % self.num_attention_heads:
            raise IncompatibleComponentsError(
                f"VQRecConfig: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if not self.temperature > 0:
            raise IncompatibleComponentsError(f"VQRecConfig: temperature must be above 0, got {self.temperature!r}.")
        for name in ("pretrain_share", "fake_code_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise IncompatibleComponentsError(
                    f"VQRecConfig: {name} must lie between 0 and 1, got {getattr(self, name)!r}."
                )

    @property
    def num_levels(self) -> int:
        """Digits per item, `L`."""
        return len(self.codebook_sizes)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "VQRecConfig":
        """Sizes and special ids from the catalogue of an `ItemTokenizer`; `kwargs` override."""
        return cls(**(catalogue_values(tokenizer) | {"num_items": int(tokenizer.num_items)} | kwargs))
