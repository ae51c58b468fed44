"""Which file of an artefact folder belongs to which part, so that a part can be replaced or kept as a whole.

A file that belongs to no part is the user's (or came in through `extra_files`): saving carries it over.
"""

from __future__ import annotations

import re

MODEL, TOKENIZER, ITEMS, RECIPE, METRICS, PLOTS, CARD, MANIFEST = (
    "model",
    "tokenizer",
    "items",
    "recipe",
    "metrics",
    "plots",
    "card",
    "manifest",
)
ITEMS_NAME, RECIPE_NAME, CARD_DATA_NAME = "items.parquet", "recipe.yaml", "card_data.yaml"
PLOTS_FOLDER, EVAL_RESULTS_FOLDER, QUANTIZER_FOLDER = "plots", ".eval_results", "quantizer"

_PARTS = {
    "config.json": MODEL,
    "generation_config.json": MODEL,
    "recommendation_config.json": MODEL,
    "model.safetensors.index.json": MODEL,
    "adapter_config.json": MODEL,
    "adapter_model.safetensors": MODEL,
    "tokenizer_config.json": TOKENIZER,
    "tokenizer.json": TOKENIZER,
    "special_tokens_map.json": TOKENIZER,
    "added_tokens.json": TOKENIZER,
    "chat_template.jinja": TOKENIZER,
    "item_codes.safetensors": TOKENIZER,
    "set_merges.safetensors": TOKENIZER,
    "vocab.json": TOKENIZER,
    "vocab.txt": TOKENIZER,
    "merges.txt": TOKENIZER,
    "spiece.model": TOKENIZER,
    "tokenizer.model": TOKENIZER,
    "sentencepiece.bpe.model": TOKENIZER,
    ITEMS_NAME: ITEMS,
    RECIPE_NAME: RECIPE,
    "metrics.json": METRICS,
    "README.md": CARD,
    CARD_DATA_NAME: CARD,
    "manifest.json": MANIFEST,
    ".manifest.json.new": MANIFEST,
}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?(\.[\w-]+)?\.safetensors")
_FOLDERS = {
    PLOTS_FOLDER: PLOTS,
    EVAL_RESULTS_FOLDER: CARD,
    QUANTIZER_FOLDER: TOKENIZER,  # it made the codes: it goes when they go
    "chat_templates": TOKENIZER,
    "additional_chat_templates": TOKENIZER,
}


def part_of(path: str) -> str | None:
    """The part that a file (path inside the folder, with `/`) belongs to; None for files that are not ours.

    Example:
        >>> part_of("model-00001-of-00002.safetensors"), part_of("plots/loss.png"), part_of("notes.txt")
        ('model', 'plots', None)
    """
    folder, _, rest = path.partition("/")
    if rest:
        return _FOLDERS.get(folder)
    return MODEL if _WEIGHTS.fullmatch(path) else _PARTS.get(path)
