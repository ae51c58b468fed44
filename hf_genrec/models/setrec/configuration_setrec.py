"""Configuration of SETRec, the recommender of items that are sets of continuous tokens (arXiv 2502.10833)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values


@strict
class SETRecConfig(PreTrainedConfig):
    """Sizes and switches of [`SETRecForCausalLM`].

    Args:
        codebook_sizes: one entry, the number of item tokens N (a catalogue for SETRec has one code per item).
        level_offsets: one entry, the token id of item code 0.
        item_feature_dim: width F of the item vectors, all blocks side by side.
        item_feature_dims: widths of the blocks: the first is collaborative, the others are semantic (texts, ...).
        num_semantic_tokens: tokens the autoencoder makes of an item's semantic vector; 0 = the collaborative one alone.
        autoencoder_sizes: hidden widths of its encoder; the decoder has them in reverse.
        reconstruction_weight: weight of its mean squared error in the loss (alpha).
        semantic_weight: b in an item's score, (1 - b) * collaborative + b * sum of semantic ones.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the Transformer.
        max_position_embeddings: newest items of a history that it reads.
        norm_first: normalise before attention and feed-forward instead of after them.
        initializer_range: standard deviation of the Transformer's matrices at the start.
        embedding_std: that of an item's token, of queries and of positions.
        catalogue_fingerprint: of the tokenizer the model belongs to; checked by `recommend`.

    Raises:
        IncompatibleComponentsError: more than one code per item, blocks that do not add up, semantic tokens without a
            semantic block, a weight out of range, or a hidden size that the heads do not divide.

    Example:
        >>> SETRecConfig(codebook_sizes=[9], item_feature_dims=[4, 6], num_semantic_tokens=2).num_tokens
        3
    """

    model_type = "setrec"
    auto_map: ClassVar[dict] = {}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int | None = None
    codebook_sizes: list[int] | tuple[int, ...] = (1000,)
    level_offsets: list[int] | tuple[int, ...] = (4,)
    item_feature_dim: int | None = None
    item_feature_dims: list[int] | tuple[int, ...] = (64, 64)
    num_semantic_tokens: int = 4
    autoencoder_sizes: list[int] | tuple[int, ...] = (512, 256, 128)
    reconstruction_weight: float | int = 0.7
    semantic_weight: float | int = 0.5
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    max_position_embeddings: int = 50
    norm_first: bool = False
    dropout: float | int = 0.2
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.1
    embedding_std: float = 0.05
    use_cache: bool = False
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    tie_word_embeddings: bool = False
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        self.item_feature_dims = [int(width) for width in self.item_feature_dims]
        self.autoencoder_sizes = [int(width) for width in self.autoencoder_sizes]
        if self.vocab_size is None:
            self.vocab_size = sum(self.level_offsets[:1]) + sum(self.codebook_sizes[:1])
        if self.item_feature_dim is None:
            self.item_feature_dim = sum(self.item_feature_dims)
        super().__post_init__(**kwargs)
        self._check_items()
        if self.hidden_size % self.num_attention_heads:
            raise IncompatibleComponentsError(
                f"SETRecConfig: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if not 0 <= self.semantic_weight <= 1 or self.reconstruction_weight < 0:
            raise IncompatibleComponentsError(
                f"SETRecConfig: semantic_weight {self.semantic_weight} must lie between 0 and 1, and "
                f"reconstruction_weight {self.reconstruction_weight} must be >= 0."
            )

    def _check_items(self) -> None:
        if len(self.codebook_sizes) != 1 or len(self.level_offsets) != 1:
            raise IncompatibleComponentsError(
                f"SETRecConfig: an item must be one code, got {len(self.codebook_sizes)} code levels; its tokens are "
                "vectors that the model makes, so use quantizer 'atomic'."
            )
        assert self.vocab_size is not None
        first, size = self.level_offsets[0], self.codebook_sizes[0]
        if size < 1 or first < 0 or first + size > self.vocab_size:
            raise IncompatibleComponentsError(
                f"SETRecConfig: the {size} item tokens from id {first} do not fit a vocabulary of {self.vocab_size}; "
                "use SETRecConfig.from_tokenizer(tokenizer)."
            )
        widths = self.item_feature_dims
        if not widths or min(widths) < 1 or sum(widths) != self.item_feature_dim:
            raise IncompatibleComponentsError(
                f"SETRecConfig: item_feature_dims {widths} must be block widths above 0 that add up to "
                f"item_feature_dim {self.item_feature_dim}."
            )
        if self.num_semantic_tokens < 0 or (self.num_semantic_tokens and len(widths) < 2):
            raise IncompatibleComponentsError(
                f"SETRecConfig: {self.num_semantic_tokens} semantic tokens need a semantic block behind the "
                f"collaborative one, and item_feature_dims is {widths}; name two blocks in model.features "
                "([cooccurrence, text], say), or set num_semantic_tokens to 0."
            )

    @property
    def num_levels(self) -> int:
        """L, always 1: the continuous tokens are no codes."""
        return len(self.codebook_sizes)

    @property
    def num_tokens(self) -> int:
        """n, vectors per item: the collaborative one and the semantic ones."""
        return 1 + self.num_semantic_tokens

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "SETRecConfig":
        """Sizes and special ids from the catalogue of an `ItemTokenizer` with one code per item; `kwargs` override."""
        return cls(**(catalogue_values(tokenizer) | kwargs))
