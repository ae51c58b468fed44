"""Identifiers that are names in a text vocabulary: numbers (P5, arXiv 2203.13366) and paths of new tokens (CID, 2305.06569).

CID's index family as stages: random and sequential numbers here with `order`, titles with `item_words` and `unique`, and
the paths below: collaborative, semantic, independent and hybrid by `path` and `leaf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_genrec.alignment.tasks.templates import template_texts
from hf_genrec.data.cooccurrence import cooccurrence
from hf_genrec.errors import ItemTableError, RecipeError
from hf_genrec.identifiers.item_names import tokenizer_from_names
from hf_genrec.identifiers.number_identifiers import item_numbers, number_names
from hf_genrec.identifiers.path_identifiers import atomic_tokens, column_paths, path_codes, path_tokens
from hf_genrec.recipes.stages.context import StageContext
from hf_genrec.recipes.stages.words import load_text_tokenizer

PATHS = ("collaborative", "semantic", "none")


def task_vocabulary(text_tokenizer: str | None, vocab_size: int, words: Sequence[str] = ()) -> Any:
    """A pretrained text tokenizer, or a small byte-level BPE of the task wordings, `words`, and numbers of two digits."""
    from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer

    if text_tokenizer is not None:
        return load_text_tokenizer(text_tokenizer)
    numbers = [f"{number:02d}" for number in range(100)]  # longer numbers fall apart in pairs, as in P5's example
    return train_text_tokenizer(template_texts() + [*words] * 50 + numbers * 3, vocab_size, digit_groups=2)


def item_numbers_tokenizer(
    context: StageContext,
    vectors: np.ndarray | None = None,
    *,
    order: str = "running",
    first: int = 1,
    prefix: str = "item_",
    vocab_size: int = 1000,
    text_tokenizer: str | None = None,
) -> Any:
    """Items named by numbers written as text.

    Args:
        order: "running", "random" or "sequential" (see `item_numbers`); sequential reads the training part only.
        first: the smallest number.
        prefix: written before the number.
        vocab_size: of the BPE learned where no `text_tokenizer` (a folder) is given.
    """
    data = context.data
    numbers_N = item_numbers(
        data.num_items, order, train_items=context.split.train.items, first=first, seed=context.seed
    )
    base = task_vocabulary(text_tokenizer, vocab_size, [prefix])
    return tokenizer_from_names(base, data.item_ids, number_names(numbers_N, prefix))


def item_paths_tokenizer(
    context: StageContext,
    vectors: np.ndarray | None = None,
    *,
    path: str = "collaborative",
    leaf: str = "counter",
    columns: list[str] | None = None,
    max_depth: int | None = None,
    num_clusters: int = 16,
    max_cluster: int = 64,
    eigengap: bool = False,
    assign: str = "qr",
    max_load: float | None = 2.0,
    smoothing: float = 1.0,
    window: int = 10,
    weight: str = "uniform",
    vocab_size: int = 1000,
    text_tokenizer: str | None = None,
) -> Any:
    """Items named by new tokens: the way through a tree, then a counter or a token of their own.

    Args:
        path: "collaborative" = spectral clusters of the training part's co-occurrence graph (CID), "semantic" = columns of
            the item table (SemID), "none" = no path: with `leaf="atomic"` independent tokens (IID).
        leaf: "counter", or "atomic" for a token per item (hybrid, HID).
        columns, max_depth: of the semantic path: columns from wide to narrow, and the steps kept.
        num_clusters to smoothing: of the spectral partition, see `SpectralIndexer`.
        window, weight: of the co-occurrence counts, see `cooccurrence`.
        vocab_size: of the BPE learned where no `text_tokenizer` (a folder) is given.

    Raises:
        ItemTableError: a semantic path without an item table or columns.
        RecipeError: an unknown path.
    """
    from hf_genrec.identifiers.quantizers.spectral import SpectralIndexer

    data = context.data
    if path not in PATHS:
        raise RecipeError(f"identifiers.path: unknown choice {path!r}: choose one of {', '.join(PATHS)}.")
    if path == "none" and leaf == "atomic":
        names = atomic_tokens(data.num_items)
    elif path == "none":
        names = path_tokens(np.arange(data.num_items)[:, None], leaf=leaf)
    elif path == "semantic":
        if data.items is None or not columns:
            raise ItemTableError(
                f"{data.name}: a semantic path needs columns of an item table; give --items FILE and name them in "
                "identifiers.columns."
            )
        data.items.texts(columns)  # names a column that is not there
        paths = column_paths([data.items.table[name].to_pylist() for name in columns])
        names = path_tokens(path_codes(paths, max_depth), "SC", leaf)
    else:
        graph = cooccurrence(context.split.train, data.num_items, window=window, weight=weight)  # type: ignore[arg-type]
        indexer = SpectralIndexer(
            num_clusters,
            max_cluster=max_cluster,
            eigengap=eigengap,
            assign=assign,
            max_load=max_load,
            smoothing=smoothing,
            code_style="local",  # the tokens name the ancestors, which is what the style "node" is for
            seed=context.seed,
        ).fit(graph)
        names = path_tokens(indexer.codes_NL.numpy(), "CI", leaf)
    return tokenizer_from_names(task_vocabulary(text_tokenizer, vocab_size), data.item_ids, names)
