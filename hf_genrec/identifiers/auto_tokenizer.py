"""`AutoTokenizer` for tokenizers that carry a catalogue.

Registration by name is enough beside most models. But transformers (5.23) looks at the model type first: beside a
`config.json` of qwen2, qwen3_5, mistral, phi3, modernbert and about 80 more it ignores `tokenizer_class` and returns a
plain tokenizer, which loses the catalogue without a word. So a folder whose `tokenizer_config.json` names one of our
classes is given to that class directly; every other folder takes the usual way, unchanged.
"""

from __future__ import annotations

import functools

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .tokenization_action_piece import ActionPieceTokenizer
from .tokenization_item import ItemTokenizer
from .tokenization_item_text import ItemTextTokenizer
from .tokenization_item_words import ItemWordsTokenizer

CLASSES = {
    "ItemTokenizer": ItemTokenizer,
    "ItemTextTokenizer": ItemTextTokenizer,
    "ItemWordsTokenizer": ItemWordsTokenizer,
    "ActionPieceTokenizer": ActionPieceTokenizer,
}
# arguments by which a caller asks for something else than the class named in the folder
_OTHER_WAYS = ("tokenizer_type", "gguf_file", "mistral_format")
# arguments of AutoTokenizer that a tokenizer class does not take
_AUTO_ONLY = ("config", "use_fast", "trust_remote_code", "code_revision", *_OTHER_WAYS)


class ItemTokenizerConfig(PreTrainedConfig):
    """Placeholder that lets `AutoTokenizer` know the class by name; no model uses it."""

    model_type = "hf_genrec_item_tokenizer"


class ItemTextTokenizerConfig(PreTrainedConfig):
    """Placeholder that lets `AutoTokenizer` know the class by name; no model uses it."""

    model_type = "hf_genrec_item_text_tokenizer"


class ItemWordsTokenizerConfig(PreTrainedConfig):
    """Placeholder that lets `AutoTokenizer` know the class by name; no model uses it."""

    model_type = "hf_genrec_item_words_tokenizer"


class ActionPieceTokenizerConfig(PreTrainedConfig):
    """Placeholder that lets `AutoTokenizer` know the class by name; no model uses it."""

    model_type = "hf_genrec_action_piece_tokenizer"


def register() -> None:
    """Make `AutoTokenizer` load what our tokenizers save, whatever model lies beside. Again: no effect."""
    AutoTokenizer.register(ItemTokenizerConfig, tokenizer_class=ItemTokenizer, exist_ok=True)
    AutoTokenizer.register(ItemTextTokenizerConfig, tokenizer_class=ItemTextTokenizer, exist_ok=True)
    AutoTokenizer.register(ItemWordsTokenizerConfig, tokenizer_class=ItemWordsTokenizer, exist_ok=True)
    AutoTokenizer.register(ActionPieceTokenizerConfig, tokenizer_class=ActionPieceTokenizer, exist_ok=True)
    usual = vars(AutoTokenizer)["from_pretrained"].__func__
    if not hasattr(usual, "_looks_for_catalogues"):
        setattr(AutoTokenizer, "from_pretrained", classmethod(_looking_for_catalogues(usual)))  # noqa: B010 (typed method)


def _looking_for_catalogues(usual):
    @functools.wraps(usual)
    def from_pretrained(cls, pretrained_model_name_or_path, *inputs, **kwargs):
        if not any(kwargs.get(name) for name in _OTHER_WAYS):
            try:
                named = get_tokenizer_config(pretrained_model_name_or_path, **kwargs).get("tokenizer_class")
            except (OSError, ValueError, TypeError):
                named = None  # nothing there: the usual way words the error
            if isinstance(named, str) and named in CLASSES:
                options = {name: value for name, value in kwargs.items() if name not in _AUTO_ONLY}
                return CLASSES[named].from_pretrained(pretrained_model_name_or_path, *inputs, **options)
        return usual(cls, pretrained_model_name_or_path, *inputs, **kwargs)

    from_pretrained._looks_for_catalogues = True
    return from_pretrained
