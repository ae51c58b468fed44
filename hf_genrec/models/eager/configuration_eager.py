"""Configuration of EAGER, the recommender that generates behaviour and semantic codes side by side (arXiv 2406.14017)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values


@strict
class EagerConfig(PreTrainedConfig):
    """Sizes and switches of `EagerForCausalLM`.

    Args:
        codebook_sizes, level_offsets: as in the tokenizer; an item's codes are those of all streams one after the other.
        num_items: N, the size of the catalogue (the encoder reads item numbers).
        stream_levels: codes of every stream, one or two entries, e.g. `[2, 2]` = 2 behaviour codes, then 2 semantic codes.
        item_feature_dims: widths of the item's fixed vectors: one per stream, or one that all streams share. Empty = no
            contrast with fixed vectors.
        item_feature_dim: their sum.
        num_hidden_layers: of the encoder, which all streams share.
        num_decoder_layers: of every stream's decoder.
        max_position_embeddings: newest items of a history that the encoder reads.
        contrast_weights: weight of the contrast of summary and fixed vector, one per stream; 0 = off.
        contrast_temperature: divides its cosines.
        contrast_samples: items drawn at each step as negatives (all, where the catalogue is smaller).
        guide_weight: weight of the guidance of the first stream by the second; 0 = off.
        summary_targets: targets of each row that get a summary token, and with it contrast and guide, drawn at each step;
            their loss is scaled up to the number of all targets. None = every target.
        norm_first: normalise before attention and feed-forward instead of after them.
        initializer_range, embedding_std: standard deviations of linear layers and of all embeddings at the start.
        catalogue_fingerprint: of the tokenizer the model belongs to; checked by `recommend`.

    Raises:
        IncompatibleComponentsError: streams that do not add up to the levels, weights or widths of another number than
            streams, a hidden size that the heads do not divide.

    Example:
        >>> EagerConfig(codebook_sizes=[4, 16, 4, 16], level_offsets=[4, 8, 24, 28], num_items=16).num_streams
        2
    """

    model_type = "eager"
    auto_map: ClassVar[dict] = {}
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 84
    codebook_sizes: list[int] | tuple[int, ...] = (8, 32, 8, 32)
    level_offsets: list[int] | tuple[int, ...] = (4, 12, 44, 52)
    num_items: int = 0
    stream_levels: list[int] | tuple[int, ...] = (2, 2)
    item_feature_dims: list[int] | tuple[int, ...] = ()
    item_feature_dim: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 1
    num_decoder_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    max_position_embeddings: int = 50
    contrast_weights: list[float | int] | tuple[float | int, ...] | None = None
    contrast_temperature: float | int = 0.3
    contrast_samples: int = 2048
    guide_weight: float | int = 1.0
    summary_targets: int | None = None
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
        for name in ("codebook_sizes", "level_offsets", "stream_levels", "item_feature_dims"):
            setattr(self, name, [int(value) for value in getattr(self, name)])
        streams = len(self.stream_levels)
        if self.contrast_weights is None:
            self.contrast_weights = [1.0, 10.0][:streams]
        self.contrast_weights = [float(weight) for weight in self.contrast_weights]
        self.item_feature_dim = sum(self.item_feature_dims)
        super().__post_init__(**kwargs)
        self._check(streams)

    def _check(self, streams: int) -> None:
        if streams not in (1, 2) or min(self.stream_levels) < 1 or sum(self.stream_levels) != len(self.codebook_sizes):
            raise IncompatibleComponentsError(
                f"EagerConfig: stream_levels {self.stream_levels} must be one or two numbers that add up to the "
                f"{len(self.codebook_sizes)} codes of an item; give the levels of each tree, e.g. [2, 2]."
            )
        if len(self.codebook_sizes) != len(self.level_offsets):
            raise IncompatibleComponentsError(
                f"EagerConfig: {len(self.codebook_sizes)} codebook_sizes but {len(self.level_offsets)} level_offsets; "
                "take both from one tokenizer with EagerConfig.from_tokenizer."
            )
        if len(self.contrast_weights) != streams or len(self.item_feature_dims) not in {0, 1, streams}:
            raise IncompatibleComponentsError(
                f"EagerConfig: {streams} streams, but {len(self.contrast_weights)} contrast_weights and "
                f"{len(self.item_feature_dims)} blocks of item features; give one weight per stream, and one block per "
                "stream or one for all (model.features)."
            )
        if self.hidden_size % self.num_attention_heads:
            raise IncompatibleComponentsError(
                f"EagerConfig: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if not self.contrast_temperature > 0 or self.contrast_samples < 1 or self.summary_targets == 0:
            raise IncompatibleComponentsError(
                f"EagerConfig: contrast_temperature {self.contrast_temperature} must be above 0, contrast_samples "
                f"{self.contrast_samples} and summary_targets {self.summary_targets} at least 1 (or null for all targets)."
            )

    @property
    def num_levels(self) -> int:
        """L, the codes of an item over all streams."""
        return len(self.codebook_sizes)

    @property
    def num_streams(self) -> int:
        """Streams that are generated side by side."""
        return len(self.stream_levels)

    def stream_columns(self, stream: int) -> slice:
        """Which of an item's codes belong to a stream."""
        first = sum(self.stream_levels[:stream])
        return slice(first, first + self.stream_levels[stream])

    def feature_columns(self, stream: int) -> slice | None:
        """Which columns of the item features belong to a stream; None without features."""
        if not self.item_feature_dims:
            return None
        block = stream if len(self.item_feature_dims) > 1 else 0
        first = sum(self.item_feature_dims[:block])
        return slice(first, first + self.item_feature_dims[block])

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "EagerConfig":
        """Sizes and special ids from the catalogue of an `ItemTokenizer`; `kwargs` override."""
        return cls(**(catalogue_values(tokenizer) | {"num_items": int(tokenizer.num_items)} | kwargs))
