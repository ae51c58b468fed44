"""Items named by their texts, and further texts of the items."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_genrec.data.interactions import RecommendationData
from hf_genrec.errors import IncompatibleComponentsError, ItemTableError
from hf_genrec.recipes.stages.context import StageContext


def load_text_tokenizer(name: str) -> Any:
    """A pretrained text tokenizer.

    Raises:
        IncompatibleComponentsError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise IncompatibleComponentsError(
            f"identifiers.text_tokenizer {name!r} cannot be loaded ({str(error).splitlines()[0]}); give a folder with "
            "--text_tokenizer FOLDER, or null for a vocabulary learned from the texts."
        ) from error


def item_words_tokenizer(
    context: StageContext,
    vectors: np.ndarray | None = None,
    *,
    fields: list[str] | None = None,
    vocab_size: int = 2000,
    text_tokenizer: str | None = None,
    max_tokens: int = 24,
    unique: bool = False,
    item_end_token: str | None = None,
) -> Any:
    """Items named by their texts: a tokenizer, not codes.

    Args:
        fields: columns of the item table that make the name; default: the title.
        vocab_size: of the byte-level BPE learned from these texts, where no `text_tokenizer` is given.
        text_tokenizer: folder of a pretrained text tokenizer.
        item_end_token: the token that closes a name, of a pretrained vocabulary; default: one of its own.
        unique: number the items of one text apart (CID's title indexing); False = they share their name.
    """
    from hf_genrec.identifiers.item_names import tokenizer_from_names
    from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
    from hf_genrec.identifiers.tokenization_item_words import ItemWordsTokenizer

    data = context.data
    if data.items is None:
        raise ItemTableError(
            f"{data.name}: the recipe names items by their texts; give an item table with --items FILE."
        )
    texts = data.items.titles() if fields is None else data.items.texts(fields)
    if text_tokenizer is None:
        base: Any = train_text_tokenizer(texts, vocab_size)
    else:
        base = load_text_tokenizer(text_tokenizer)
    if unique:
        return tokenizer_from_names(base, data.item_ids, texts, max_tokens=max_tokens)
    end: dict[str, Any] = {} if item_end_token is None else {"item_end_token": item_end_token}
    return ItemWordsTokenizer.from_texts(base, data.item_ids, texts, max_tokens=max_tokens, **end)


def facet_tables(data: RecommendationData, tokenizer: Any, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Further texts of the items for a language recommender: tokens (F, N, L) and markers (F, M), -1 behind the end.

    A facet is "id" (the item's own string) or a column of the item table. Item texts are untrusted: see `encode_segments`.
    """
    from hf_genrec.identifiers.segments import encode_segments

    tables, markers = [], []
    for name in names:
        if name != "id" and data.items is None:
            raise ItemTableError(
                f"{data.name}: facet {name!r} is a column of the item table; give one with --items FILE."
            )
        texts = data.item_ids if name == "id" else data.items.texts([name])  # type: ignore[union-attr]
        rows = [encode_segments(tokenizer, [("text", text or "unknown")]) for text in texts]
        tables.append([[*row, tokenizer.item_end_token_id] for row in rows])
        markers.append(encode_segments(tokenizer, [("text", f"{name}: ")]))
    width = max(len(row) for table in tables for row in table)
    tokens_FNL = np.full((len(names), data.num_items, width), -1, np.int32)
    markers_FM = np.full((len(names), max(map(len, markers))), -1, np.int32)
    for facet, table in enumerate(tables):
        markers_FM[facet, : len(markers[facet])] = markers[facet]
        for item, row in enumerate(table):
            tokens_FNL[facet, item, : len(row)] = row
    return tokens_FNL, markers_FM


def item_content(context: StageContext, vocab_size: int = 2000, max_tokens: int = 32) -> tuple[np.ndarray, int]:
    """The items' texts as tokens of a byte-level BPE learned from them: `(tokens (N, S), vocabulary size)`, -1 padded.

    Raises:
        ItemTableError: no item table.
    """
    from hf_genrec.identifiers.segments import encode_segments
    from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer

    if context.data.items is None:
        raise ItemTableError(f"{context.data.name}: the model reads item texts; give an item table with --items FILE.")
    texts = context.data.items.texts(None)
    base = train_text_tokenizer(texts, vocab_size)
    rows = [encode_segments(base, [("text", text or "unknown")])[:max_tokens] for text in texts]
    tokens_NS = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for item, row in enumerate(rows):
        tokens_NS[item, : len(row)] = row
    return tokens_NS, len(base)
