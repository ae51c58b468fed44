"""Configuration of E4SRec, a language model between an item projection and a catalogue head (arXiv 2312.02443)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values
from hf_genrec.models.lora import checked_lora


@strict
class E4SRecConfig(PreTrainedConfig):
    """Sizes and switches of [`E4SRecForRecommendation`].

    Args:
        language_model: configuration of a causal language model of transformers, with its `model_type`; its vocabulary
            is that of the instruction, not of the items.
        num_items: N, size of the catalogue.
        item_feature_dim: D, width of the frozen item vectors (the paper: a SASRec's, 64).
        instruction_tokens: token ids (of the language model) before the items. Empty = its begin token alone: a history
            without items must be something to read.
        response_tokens: token ids behind the items, from the last of which the next item is read.
        prefix_training: False: every position of a window is trained at once (our choice for small machines; needs no
            response tokens). True: one target per row, as in the paper.
        freeze_language_model: only the two maps (and LoRA) are trained. Always so with `lora`.
        lora: `{"r", "alpha", "dropout", "target_modules"}`, defaults 16, 16, .05 and gate, up and down projections, as in
            the paper; {} = these; None = no adapters.
        max_position_embeddings: newest items of a history that are read (the paper: 20 to 50).
        codebook_sizes, level_offsets: of the item tokenizer (one code per item).
        catalogue_fingerprint: of the tokenizer's catalogue; checked by `recommend`.

    Raises:
        IncompatibleComponentsError: a model type that is no causal language model, response tokens without
            `prefix_training`, a token outside the language model's vocabulary, or wrong options of `lora`.
    """

    model_type = "e4srec"
    auto_map: ClassVar[dict] = {}

    language_model: dict | None = None
    num_items: int = 1
    item_feature_dim: int = 64
    instruction_tokens: list[int] | tuple[int, ...] = ()
    response_tokens: list[int] | tuple[int, ...] = ()
    prefix_training: bool = False
    freeze_language_model: bool = False
    lora: dict | None = None
    max_position_embeddings: int = 50
    initializer_range: float = 0.02
    vocab_size: int = 5
    codebook_sizes: list[int] | tuple[int, ...] = (1,)
    level_offsets: list[int] | tuple[int, ...] = (4,)
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    tie_word_embeddings: bool = False
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        self.level_offsets = [int(offset) for offset in self.level_offsets]
        self.language_model = {"model_type": "llama", **(self.language_model or {})}
        kind = self.language_model["model_type"]
        if kind not in CONFIG_MAPPING or kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise IncompatibleComponentsError(
                f"language_model.model_type is {kind!r}, which is no causal language model of transformers; name one such "
                "as 'llama', 'qwen3' or 'gpt2'."
            )
        if self.lora is not None:
            self.lora = checked_lora(self.lora)
        text = self.language_config().get_text_config(decoder=True)
        if not self.instruction_tokens:
            begin = text.bos_token_id if text.bos_token_id is not None else text.eos_token_id
            begin = begin[0] if isinstance(begin, list) else begin
            self.instruction_tokens = [int(begin) if begin is not None and begin < text.vocab_size else 0]
        self.instruction_tokens = [int(token) for token in self.instruction_tokens]
        self.response_tokens = [int(token) for token in self.response_tokens]
        super().__post_init__(**kwargs)
        for name in ("instruction_tokens", "response_tokens"):
            wrong = [token for token in getattr(self, name) if not 0 <= token < text.vocab_size]
            if wrong:
                raise IncompatibleComponentsError(
                    f"{name} holds {wrong[0]}, the language model has {text.vocab_size} tokens; encode the text with its "
                    "own tokenizer."
                )
        if self.response_tokens and not self.prefix_training:
            raise IncompatibleComponentsError(
                "response_tokens stand behind a whole history, so a row has one target: set prefix_training to true, or "
                "leave them out."
            )
        positions = getattr(text, "max_position_embeddings", None)
        longest = len(self.instruction_tokens) + self.max_position_embeddings + len(self.response_tokens)
        if positions is not None and longest > positions:
            raise IncompatibleComponentsError(
                f"{longest} positions are needed for {self.max_position_embeddings} items and the prompt around them, the "
                f"language model has {positions}; lower max_position_embeddings."
            )

    def language_config(self) -> PreTrainedConfig:
        """Of the language model."""
        values = dict(self.language_model or {})
        return AutoConfig.for_model(values.pop("model_type"), **values)

    @property
    def num_levels(self) -> int:
        """Codes per item."""
        return len(self.codebook_sizes)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "E4SRecConfig":
        """Sizes and special ids from the catalogue of an `ItemTokenizer`; `kwargs` override."""
        return cls(**(catalogue_values(tokenizer) | {"num_items": int(tokenizer.num_items)} | kwargs))
