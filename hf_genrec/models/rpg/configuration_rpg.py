"""Configuration of RPG, the recommender that predicts all digits of an item at once (arXiv 2506.05781)."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values


class RPGConfig(PreTrainedConfig):
    r"""Sizes and switches of [`RPGForCausalLM`].

    Args:
        codebook_sizes: codes per digit, `L` entries (the paper uses 16 to 64 digits of 256 codes).
        level_offsets: token id of code 0 of every digit, `L` entries.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the timeline Transformer.
        max_position_embeddings: newest items of a history that the timeline reads.
        cosine_temperature: divides the cosine of a digit's head and its code vectors.
        norm_first: normalise before attention and feed-forward (GPT-2) instead of after them.
        initializer_range: standard deviation of the linear layers at the start.
        embedding_std: standard deviation of the code vectors at the start (an item is the mean of its L code vectors).
        catalogue_fingerprint: of the tokenizer the model belongs to; checked by `recommend`.

    Raises:
        IncompatibleComponentsError: sizes and offsets of different lengths, a hidden size that the heads do not divide,
            or a temperature that is not positive.
    """

    model_type = "rpg"
    auto_map: ClassVar[dict] = {}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 1028
    codebook_sizes: list[int] | tuple[int, ...] = (64,) * 16
    level_offsets: list[int] | tuple[int, ...] = tuple(4 + 64 * level for level in range(16))
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    max_position_embeddings: int = 50
    cosine_temperature: float | int = 0.07
    norm_first: bool = False
    dropout: float | int = 0.2
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.1
    embedding_std: float | int = 0.05
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    tie_word_embeddings: bool = False
    use_cache: bool = False
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if len(self.codebook_sizes) != len(self.level_offsets):
            raise IncompatibleComponentsError(
                f"RPGConfig: {len(self.codebook_sizes)} codebook_sizes but {len(self.level_offsets)} level_offsets; "
                "take both from one tokenizer with RPGConfig.from_tokenizer."
            )
        if self.hidden_size % self.num_attention_heads:
            raise IncompatibleComponentsError(
                f"RPGConfig: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}."
            )
        if not self.cosine_temperature > 0:
            raise IncompatibleComponentsError(
                f"RPGConfig: cosine_temperature must be above 0, got {self.cosine_temperature!r}."
            )

    @property
    def num_levels(self) -> int:
        """Digits per item, `L`."""
        return len(self.codebook_sizes)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "RPGConfig":
        """Sizes and special ids from the catalogue of an [`ItemTokenizer`]; `kwargs` override."""
        return cls(**(catalogue_values(tokenizer) | kwargs))
