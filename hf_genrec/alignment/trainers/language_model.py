"""What the trainers of language models are given, made ready and checked: a folder's model, its context, its padding token.

The same answers for every trainer: a folder becomes the model that training expects (adapters as adapters that train) with
the recommending defaults that lie beside it, a tokenizer without a padding token is an error, and a row is never longer than
what the model reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils.peft_utils import find_adapter_config_file

from hf_genrec.errors import GenRecError, IncompatibleComponentsError, TrainingError
from hf_genrec.generation.configuration_recommendation import RECOMMENDATION_CONFIG_NAME, RecommendationConfig
from hf_genrec.generation.recommend import RecommendationMixin, recommendation_config_of


def load_model(
    source: str | Path, options: dict[str, Any] | None = None, *, otherwise: str, seq2seq: bool = False
) -> Any:
    """The model of a folder or Hub id, with its recommending defaults as `recommendation_config`.

    Args:
        source: folder or Hub id of a model, or of a PEFT adapter (whose base model is loaded too; the adapter trains).
        options: for `from_pretrained`; `dtype` is float32 where they say nothing, as in TRL's trainers, because a learning
            rate of 1e-5 changes no bit of most bfloat16 weights.
        otherwise: the trainer of the other kind of models, for the message.
        seq2seq: an encoder-decoder is wanted, else a causal language model.

    Raises:
        TrainingError: the other kind of model.
        IncompatibleComponentsError: no model that can be loaded.
    """
    name, options = str(source), {"dtype": torch.float32} | (options or {})
    kind = "an encoder-decoder" if seq2seq else "a causal language model"
    try:
        if find_adapter_config_file(name) is not None:
            return _with_adapter(name, options, seq2seq)
        found = bool(getattr(AutoConfig.from_pretrained(name), "is_encoder_decoder", False))
        if found != seq2seq:
            raise TrainingError(f"{name} is {'an' if found else 'no'} encoder-decoder: use {otherwise}.")
        auto: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        model = auto.from_pretrained(name, **options)
    except GenRecError:
        raise
    except (OSError, ValueError) as error:
        raise IncompatibleComponentsError(
            f"{name} cannot be loaded as {kind} ({str(error).splitlines()[0]}): name a folder with its config.json and weights."
        ) from error
    model.recommendation_config = recommendation_config_of(model)
    return model


def _with_adapter(name: str, options: dict[str, Any], seq2seq: bool) -> Any:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM

    auto: Any = AutoPeftModelForSeq2SeqLM if seq2seq else AutoPeftModelForCausalLM
    model = auto.from_pretrained(name, is_trainable=True, **options)
    base = model.get_base_model()
    beside = (Path(name) / RECOMMENDATION_CONFIG_NAME).is_file()
    base.recommendation_config = (
        RecommendationConfig.from_pretrained(name, local_files_only=True) if beside else recommendation_config_of(base)
    )
    return model


def save_defaults(model: Any, folder: str | Path) -> None:
    """Write the `recommendation_config.json` of a model, or of the one inside its adapters, where it has defaults."""
    inner = model.get_base_model() if is_peft_model(model) else model
    served = getattr(inner, "recommendation_config", None)
    if served is not None:
        served.save_pretrained(folder)


def pad_token_id(tokenizer: Any) -> int:
    """The padding token; raises TrainingError where there is none (TRL would pad with the end token, and set it so)."""
    if tokenizer.pad_token_id is None:
        raise TrainingError(
            f"{type(tokenizer).__name__} has no padding token: set tokenizer.pad_token, or extend it with extend_tokenizer, "
            "which adds one."
        )
    return tokenizer.pad_token_id


def context_of(model: Any, peft_config: Any = None) -> int | None:
    """Most tokens of a row that a language model reads; None where nothing bounds them (T5, state-space models).

    Beyond learned positions a model fails, beyond the ones that rotary embeddings were made for it silently gets worse.

    Args:
        model: model of transformers, or a PeftModel; positions of this library's own models count items, not tokens: None.
        peft_config: of an adapter that the model is about to get; its virtual tokens take up places, as those of a
            PeftModel do.
    """
    inner = model.get_base_model() if is_peft_model(model) else model
    longest = getattr(inner.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(inner, RecommendationMixin) or not isinstance(longest, int) or longest < 1:
        return None
    adapter = model.active_peft_config if is_peft_model(model) else peft_config
    return longest - (getattr(adapter, "num_virtual_tokens", None) or 0)


def prompt_room(model: Any, tokenizer: Any) -> int | None:
    """Most tokens of a prompt that leave room for an item and an end token in the model's context; None: no bound.

    For `max_prompt_tokens` of the pair datasets, which drop the oldest items until a prompt fits.
    """
    context = context_of(model)
    return None if context is None else context - int(tokenizer.num_levels) - 1


def check_context(row: object, length: int, context: int | None) -> None:
    """Raise TrainingError, naming the row, for one that is longer than the model's context."""
    if context is not None and length > context:
        raise TrainingError(
            f"row {row} has {length} tokens, but the model reads at most {context} (max_position_embeddings): cut its history "
            f"where rows are made (max_history, max_prompt_tokens, or a max_length of at most {context}), which drops the "
            "oldest items whole. Rows are never cut here."
        )
