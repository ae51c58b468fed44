"""What models share that hold a language model over item texts and, maybe, an assistant that knows items as such.

Shapes: N items, L tokens of the longest item text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.models.catalogue import catalogue_values


def words_values(tokenizer: Any) -> dict[str, Any]:
    """Fields of a configuration that an `ItemWordsTokenizer` knows: sizes, special tokens, fingerprint.

    Raises:
        IncompatibleComponentsError: a tokenizer whose items are not named by words.
    """
    if not hasattr(tokenizer, "item_end_token_id"):
        raise IncompatibleComponentsError(
            f"{type(tokenizer).__name__} does not name items by words; make one with ItemWordsTokenizer.from_texts."
        )
    return catalogue_values(tokenizer) | {
        "num_items": tokenizer.num_items,
        "item_end_token_id": tokenizer.item_end_token_id,
    }


class LanguagePartsConfig:
    """Methods of configurations with the fields `language_model` and `assistant`: configurations as dicts, with their
    `model_type`.
    """

    language_model: dict | None
    assistant: dict | None
    num_items: int
    vocab_size: int
    codebook_sizes: Sequence[int]

    def check_parts(self) -> None:
        """Raise IncompatibleComponentsError for a `model_type` that transformers does not know."""
        for name in ("language_model", "assistant"):
            values = getattr(self, name)
            if values is not None and values.get("model_type") not in CONFIG_MAPPING:
                raise IncompatibleComponentsError(
                    f"{name}.model_type is {values.get('model_type')!r}, which transformers does not know; name a model "
                    "type such as 'llama', 'qwen3' or 'gpt2' ('sasrec' for the assistant)."
                )

    def language_config(self) -> PreTrainedConfig:
        """Of the language model, with this vocabulary."""
        values = dict(self.language_model or {})
        names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
        tokens = {name: getattr(self, name) for name in names}
        return AutoConfig.for_model(values.pop("model_type"), **(values | tokens))

    def assistant_config(self) -> PreTrainedConfig | None:
        """Of the assistant: one token per item behind its four special tokens."""
        if self.assistant is None:
            return None
        values = dict(self.assistant)
        return AutoConfig.for_model(
            values.pop("model_type"), **({"codebook_sizes": [self.num_items], "level_offsets": [4]} | values)
        )

    @property
    def num_levels(self) -> int:
        """Tokens of the longest item text, its end token included."""
        return len(self.codebook_sizes)


class LanguageEmbeddingsMixin:
    """Embeddings of models with a `language_model` are those of it. Put it before PreTrainedModel among the bases."""

    language_model: Any

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)


class ItemTextsMixin(LanguageEmbeddingsMixin):
    """Catalogue of models with a `language_model` and a buffer `item_tokens` (N, L), -1 behind the end."""

    item_tokens: Tensor

    def forget_catalogue(self) -> None:
        """Called when the item texts change: drop what was derived from them."""

    def set_catalogue(self, item_codes: Any, item_features: Any | None = None) -> None:
        """Store the token ids (N, L) that name each item, -1 behind the end of shorter ones.

        Raises:
            IncompatibleComponentsError: when the shape differs from the configuration.
        """
        codes = torch.tensor(np.asarray(item_codes))
        if codes.shape != self.item_tokens.shape:
            raise IncompatibleComponentsError(
                f"set_catalogue: item_codes has shape {tuple(codes.shape)}, the configuration says "
                f"{tuple(self.item_tokens.shape)}; build the configuration with from_tokenizer of the same catalogue."
            )
        self.item_tokens.copy_(codes)
        self.forget_catalogue()
