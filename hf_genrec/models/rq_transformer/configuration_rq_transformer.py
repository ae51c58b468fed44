"""Configuration of the RQ-Transformer recommender (timeline + depth decoder, arXiv 2203.01941 and 2508.14910)."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values


class RQTransformerConfig(PreTrainedConfig):
    r"""Sizes and switches of [`RQTransformerForCausalLM`].

    Args:
        codebook_sizes: codes per level, `L` entries.
        level_offsets: token id of code 0 of every level, `L` entries.
        num_items: catalogue size `N`; 0 means that the model holds no catalogue tables (no features, no dense head).
        item_feature_dim: width `F` of the fixed item feature vectors (text and collaborative, concatenated); 0 = none.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the timeline Transformer.
        depth_layers, depth_intermediate_size: the depth decoder (same width and heads as the timeline).
        max_position_embeddings: newest items of a history that the timeline reads.
        item_embedding: add a free vector per item to input and dense head (0 for an item never trained on).
        dense_head: train a catalogue-wide head beside the codes (2411.18814) whose scores can be fused at inference.
        dense_similarity: "dot" with the vectors the timeline reads, or "cosine" with own item vectors (2411.18814).
        dense_loss_weight: weight of its cross-entropy; the code loss has weight 1.
        inductive_dense_head: the dense head knows an item by its codes and features alone (no bias, no free vector), and
            items that training never sees are left out of its cross-entropy, so that it does not learn to turn them
            down (2411.18814). It can then draft new items (decoding "speculative", 2410.02939).
        learn_repeat_weight: learn how much more or less likely an item is because the user had it already.
        feature_dropout: on the projected features (2411.18814 drops half of them).
        norm_first: normalise before attention and feed-forward instead of after them.
        initializer_range: standard deviation of the linear layers at the start.
        embedding_std: of each part of an item's input vector at the start (the depth decoder's tables have their own).
        catalogue_fingerprint: of the tokenizer the model belongs to; checked by `recommend`.
    """

    model_type = "rq_transformer"
    auto_map: ClassVar[dict] = {}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 260
    codebook_sizes: list[int] | tuple[int, ...] = (64, 64, 64, 64)
    level_offsets: list[int] | tuple[int, ...] = (4, 68, 132, 196)
    num_items: int = 0
    item_feature_dim: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    depth_layers: int = 1
    depth_intermediate_size: int = 128
    max_position_embeddings: int = 50
    item_embedding: bool = True
    dense_head: bool = True
    dense_similarity: str = "dot"
    dense_loss_weight: float | int = 1.0
    inductive_dense_head: bool = False
    learn_repeat_weight: bool = True
    norm_first: bool = False
    dropout: float | int = 0.2
    feature_dropout: float | int = 0.5
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
                f"RQTransformerConfig: {len(self.codebook_sizes)} codebook_sizes but {len(self.level_offsets)} "
                "level_offsets; take both from one tokenizer with RQTransformerConfig.from_tokenizer."
            )
        if self.dense_similarity not in ("dot", "cosine"):
            raise IncompatibleComponentsError(
                f"RQTransformerConfig: dense_similarity must be 'dot' or 'cosine', got {self.dense_similarity!r}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise IncompatibleComponentsError(
                f"RQTransformerConfig: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}."
            )

    @property
    def num_levels(self) -> int:
        """Codes per item, `L`."""
        return len(self.codebook_sizes)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "RQTransformerConfig":
        """Sizes and special ids from the catalogue of an [`ItemTokenizer`]; `kwargs` override."""
        values = catalogue_values(tokenizer) | {"num_items": int(tokenizer.num_items)}
        return cls(**(values | kwargs))
