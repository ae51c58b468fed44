"""Configuration of the grounded language recommender, BIGRec (arXiv 2308.08434)."""

# No `from __future__ import annotations` here: `strict` checks types only where annotations are not strings.
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.language_parts import LanguagePartsConfig, words_values
from hf_genrec.models.lora import checked_lora

LORA = {"r": 8, "target_modules": ["q_proj", "v_proj"]}  # the authors'
PRIORS = ("popularity", "assistant")


@strict
class GroundedLanguageConfig(LanguagePartsConfig, PreTrainedConfig):
    """Sizes and switches of [`GroundedLanguageRecommender`].

    Args:
        language_model: configuration of a causal language model of transformers, with its `model_type`; vocabulary and
            token ids come from the tokenizer.
        assistant: configuration of a recommender over atomic items (`{"model_type": "sasrec", ...}`) whose scores are
            the prior; None = none. It is trained on the same windows and shares no weights.
        assistant_loss_weight: weight of the assistant's loss.
        prior: "popularity" (training counts) or "assistant": what pulls items forward.
        gamma: strength of the prior, 0 = distance alone; `choose_gamma` finds it on validation data.
        prompt_before, prompt_after: token ids around the history ("The user has watched", "Next:"). What stands behind
            the history needs `prefix_training`.
        prefix_training: False: every item of a window but the first is learned at once. True: one target per row, behind
            the prompt, as in the paper.
        max_new_tokens: longest text that is written.
        text_beams: beams of that text (1 = greedy); the best one is grounded.
        lora: `{"r", "alpha", "dropout", "target_modules"}`; {} = the authors' (8, 16, .05, query and value projections);
            None = no adapters.
        freeze_language_model: the language model is not trained. Always so (but for adapters) with `lora`.
        num_items, item_end_token_id: of the tokenizer, the token that closes every item's text.
        codebook_sizes, level_offsets: per level of the text identifiers: the vocabulary, and 0.
        catalogue_fingerprint: of the tokenizer's catalogue.

    Raises:
        IncompatibleComponentsError: a `model_type` that transformers does not know, a prompt behind the history without
            `prefix_training`, a prior that is not there, or a number out of range.
    """

    model_type = "grounded_language"
    auto_map: ClassVar[dict] = {}
    keys_to_ignore_at_inference = ["past_key_values"]

    language_model: dict | None = None
    assistant: dict | None = None
    assistant_loss_weight: float | int = 1.0
    prior: str = "popularity"
    gamma: float | int = 0.0
    prompt_before: list[int] | tuple[int, ...] = ()
    prompt_after: list[int] | tuple[int, ...] = ()
    prefix_training: bool = False
    max_new_tokens: int = 32
    text_beams: int = 1
    lora: dict | None = None
    freeze_language_model: bool = False
    num_items: int = 1
    item_end_token_id: int = 0
    vocab_size: int = 32
    codebook_sizes: list[int] | tuple[int, ...] = (32,)
    level_offsets: list[int] | tuple[int, ...] = (0,)
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 3
    catalogue_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("codebook_sizes", "level_offsets", "prompt_before", "prompt_after"):
            setattr(self, name, [int(number) for number in getattr(self, name)])
        self.language_model = {"model_type": "llama", **(self.language_model or {})}
        if self.lora is not None:
            self.lora = checked_lora(LORA | self.lora)
        super().__post_init__(**kwargs)
        self.check_parts()
        if self.prompt_after and not self.prefix_training:
            raise IncompatibleComponentsError(
                "prompt_after stands behind a whole history, so a row has one target: set prefix_training to true, or leave "
                "it out."
            )
        if self.prior not in PRIORS or (self.prior == "assistant" and self.assistant is None):
            raise IncompatibleComponentsError(
                f"prior is {self.prior!r}; it must be one of {', '.join(PRIORS)}, and 'assistant' needs an assistant."
            )
        if not self.gamma >= 0 or self.max_new_tokens < 1 or self.text_beams < 1:
            raise IncompatibleComponentsError(
                f"gamma must be at least 0, max_new_tokens and text_beams at least 1; got {self.gamma}, "
                f"{self.max_new_tokens}, {self.text_beams}."
            )

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **kwargs: Any) -> "GroundedLanguageConfig":
        """Sizes, special tokens and fingerprint of an `ItemWordsTokenizer`; other fields as keyword arguments.

        Raises:
            IncompatibleComponentsError: a tokenizer whose items are not named by words.
        """
        values = words_values(tokenizer) | {"max_new_tokens": tokenizer.num_levels}
        return cls(**(values | kwargs))
