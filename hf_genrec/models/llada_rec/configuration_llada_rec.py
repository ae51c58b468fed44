"""Configuration of LLaDA-Rec, the masked-diffusion Transformer over item codes (arXiv 2511.06254)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values

HISTORY_ATTENTION = ("bidirectional", "causal")


@strict
class LLaDARecConfig(PreTrainedConfig):
    r"""Sizes and switches of `LLaDARecForMaskedLM`. The defaults are those of the authors' code.

    Args:
        vocab_size: size of the token table.
        codebook_sizes: codes of each position of an item, M entries.
        level_offsets: token id of code 0 of each position.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the Transformer (RMS norm before each
            sublayer, gated SiLU feed-forward, no biases, no rotary positions).
        max_position_embeddings: newest items of a history that the model reads.
        history_attention: what the codes of a history item see.
            `"bidirectional"`: everything, also the target's codes (the paper). One target per training sample, and
            every beam runs the whole history again.
            `"causal"`: their own item and the items before it. Every item of a window is then a target in one pass,
            which gives some twenty times the targets per second, and a history is encoded once per user. Inside an
            item attention stays bidirectional, so the diffusion over codes is the paper's. Positions count from the
            first item (the paper's padding makes them count from the target), so targets also learn a bias by distance.
        history_loss_weight: weight of the loss over masked history codes (`his_mask_w`); 0 leaves its pass out.
        dropout: rate for embeddings and sublayer outputs (from a pre-drawn pool, see `PooledDropout`).
        initializer_range: standard deviation of the linear layers.
        embedding_std: of code, mask and position vectors.
        catalogue_fingerprint: `ItemTokenizer.catalogue_fingerprint` of the catalogue the model belongs to.

    Raises:
        IncompatibleComponentsError: sizes and offsets of different length or outside the vocabulary, an unknown
            `history_attention`, or a hidden size that the heads do not divide.

    Example:
        >>> config = LLaDARecConfig(codebook_sizes=[8, 8], level_offsets=[4, 12], vocab_size=20, hidden_size=32)
        >>> config.num_levels, config.prefix_training
        (2, True)
    """

    model_type = "llada_rec"
    auto_map: ClassVar[dict] = {}

    vocab_size: int = 1028
    codebook_sizes: list[int] | tuple[int, ...] = (256, 256, 256, 256)
    level_offsets: list[int] | tuple[int, ...] = (4, 260, 516, 772)
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    max_position_embeddings: int = 20
    history_attention: str = "bidirectional"
    history_loss_weight: float | int = 1.0
    dropout: float | int = 0.1
    rms_norm_eps: float = 1e-6
    initializer_range: float | int = 0.05
    embedding_std: float | int = 0.1
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    tie_word_embeddings: bool = False
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        super().__post_init__(**kwargs)
        self._check_layout()

    def _check_layout(self) -> None:
        ends = [offset + size for offset, size in zip(self.level_offsets, self.codebook_sizes)]
        if not ends or len(self.codebook_sizes) != len(self.level_offsets) or max(ends) > self.vocab_size:
            raise IncompatibleComponentsError(
                f"LLaDARecConfig: codebook_sizes {self.codebook_sizes} and level_offsets {self.level_offsets} must have "
                f"one entry per position each and end within vocab_size {self.vocab_size}; use "
                "LLaDARecConfig.from_tokenizer(tokenizer)."
            )
        if self.history_attention not in HISTORY_ATTENTION:
            raise IncompatibleComponentsError(
                f"LLaDARecConfig: history_attention must be one of {HISTORY_ATTENTION}, got {self.history_attention!r}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise IncompatibleComponentsError(
                f"LLaDARecConfig: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}."
            )
        if self.history_loss_weight < 0:
            raise IncompatibleComponentsError(
                f"LLaDARecConfig: history_loss_weight must not be negative, got {self.history_loss_weight}."
            )

    @property
    def num_levels(self) -> int:
        """M, the number of codes of one item."""
        return len(self.codebook_sizes)

    @property
    def prefix_training(self) -> bool:
        """True: training samples are (history, target) pairs; False: windows whose items are all targets."""
        return self.history_attention == "bidirectional"

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "LLaDARecConfig":
        """Take sizes, special token ids and the catalogue's fingerprint from an `ItemTokenizer`.

        Args:
            tokenizer: an `ItemTokenizer`.
            **kwargs: any other field of the configuration; they win over the tokenizer's values.
        """
        return cls(**(catalogue_values(tokenizer) | kwargs))
