"""Preference pairs as datasets: TRL's `prompt`, `chosen`, `rejected`, the same as token ids, and Parquet files.

`rejected` is a list of answers (S-DPO, arXiv 2406.09215), or one answer where no pair has more (DPO). The `*_ids`
columns are what this library's trainers read: item tokens by table look-up, titles encoded apart from the template, so
that the text of strangers cannot forge a token.

Shape legend: M pairs, N items.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import TrainingError
from hf_genrec.identifiers.catalogue import item_token
from hf_genrec.identifiers.extend import encode_segments

from .pairs import PreferencePairs
from .preference_rows import WINDOW, check_answers


def item_dataset(
    pairs: PreferencePairs,
    tokenizer: Any,
    *,
    before: str = "",
    after: str = "",
    max_history: int | None = None,
    max_prompt_tokens: int | None = None,
    answer_eos: bool = False,
    window: int | None = None,
) -> Dataset:
    """Pairs for models with item tokens: prompts are histories, answers are items.

    Args:
        pairs: M pairs.
        tokenizer: ItemTokenizer, or an extended text tokenizer.
        before, after: template around the history (text tokenizers only): yours, control tokens in it count.
        max_history: newest items kept.
        max_prompt_tokens: longest prompt; the oldest items go, never a part of one.
        answer_eos: end answers with the end token (chat models; TRL's DPOTrainer adds it to text anyway).
        window: cut histories at every so many items of a user instead of keeping the newest, so that the prompts of one
            window are beginnings of one another and can share a pass (`after` has to be empty); pairs of a user stand
            together, with whole histories. No longer than `max_history`, where that is given.

    Returns:
        Columns `prompt`, `chosen`, `rejected` (text; `rejected` a list, or one answer when no pair has more),
        `prompt_ids`, `chosen_ids`, `rejected_ids`, and `chosen_item`, `rejected_items` (ids of the catalogue); with
        `window` also `window` (number of the user's window).

    Raises:
        TrainingError: items that share a code as chosen and rejected, or a prompt that cannot be cut (row named).
    """
    table_NL = np.asarray(tokenizer.item_token_table)
    tokens = [row[row >= 0].tolist() for row in table_NL]
    texts = ["".join(item_token(level, code) for level, code in enumerate(row) if code >= 0) for row in tokenizer.codes]
    pieces = _Pieces(tokens, texts, _template(tokenizer, before), [], _template(tokenizer, after), before, "", after)
    eos = [tokenizer.eos_token_id] if answer_eos else []
    if window is None:
        return _dataset(pairs, pieces, tokenizer.item_ids, eos, max_history, max_prompt_tokens)
    if after:
        raise TrainingError(
            "window: the template puts text behind the history, so no prompt begins another; leave it out."
        )
    if pairs.users is None:
        raise TrainingError("window: these pairs do not say whose they are; make them with make_pairs.")
    window = window if max_history is None else min(window, max_history)
    histories, numbers = cut_at_windows(pairs.histories, pairs.users, window)
    cut = replace(pairs, histories=histories)
    dataset = _dataset(cut, pieces, tokenizer.item_ids, eos, max_history, max_prompt_tokens)
    return dataset.add_column(WINDOW, numbers.tolist())


def cut_at_windows(histories: Sequences, users: np.ndarray, window: int) -> tuple[Sequences, np.ndarray]:
    """Cut histories at every `window` items of a user: of n items the last `1 + (n - 1) % window` stay.

    Args:
        histories: M whole histories, those of a user side by side.
        users: (M,) whose they are.
        window: items.

    Returns:
        M cut histories, and (M,) the number of each row's window, counted through.

    Raises:
        TrainingError: a window below 1.

    Example:
        >>> histories = Sequences.from_rows([[5], [5, 6], [5, 6, 7], [8]])
        >>> cut, numbers = cut_at_windows(histories, np.array([0, 0, 0, 1]), 2)
        >>> [row.tolist() for row in cut], numbers.tolist()
        ([[5], [5, 6], [7], [8]], [0, 0, 1, 2])
    """
    if window < 1:
        raise TrainingError(f"window={window}: give at least 1 item.")
    starts_M = (histories.lengths - 1) // window * window
    new_M = np.r_[True, (users[1:] != users[:-1]) | (starts_M[1:] != starts_M[:-1])]
    cut = histories.select(histories.offsets[:-1] + starts_M, histories.lengths - starts_M)
    return cut, np.cumsum(new_M) - 1


def text_dataset(
    pairs: PreferencePairs,
    texts: Sequence[str],
    *,
    tokenizer: Any = None,
    before: str = "The user has watched: ",
    separator: str = ", ",
    after: str = "\nNext: ",
    item_ids: Sequence[str] | None = None,
    max_history: int | None = None,
    max_prompt_tokens: int | None = None,
    answer_eos: bool = True,
) -> Dataset:
    """Pairs for models that answer with titles.

    Args:
        pairs: M pairs.
        texts: (N,) title of each item.
        tokenizer: adds the `*_ids` columns, in which titles are encoded apart from the template: a title that spells a
            control token stays text. Without it only text columns are written, which TRL encodes as they are.
        before, separator, after: the template: yours, control tokens in it count.
        item_ids: (N,) for the columns `chosen_item`, `rejected_items`; None: indices as text.
        others: as for `item_dataset`; `max_prompt_tokens` needs the tokenizer.

    Raises:
        TrainingError: as for `item_dataset`; items of one title as chosen and rejected; an item without a title.
    """
    if max_prompt_tokens is not None and tokenizer is None:
        raise TrainingError("max_prompt_tokens counts tokens: pass tokenizer=.")
    used = np.unique(np.concatenate([pairs.histories.items, pairs.chosen, pairs.rejected[pairs.rejected >= 0]]))
    if int(used[-1]) >= len(texts):
        raise TrainingError(f"item {int(used[-1])} has no title: texts has {len(texts)}; give one per item.")
    blank = next((int(item) for item in used if not str(texts[item] or "").strip()), None)
    if blank is not None:
        raise TrainingError(f"item {blank} has no title: fill it in, or leave out the rows that name it.")
    tokens: list[list[int]] | None = None
    first: list[int] = []
    between: list[int] = []
    last: list[int] = []
    if tokenizer is not None:
        tokens = [[] for _ in texts]
        for item in used:
            tokens[item] = encode_segments(tokenizer, [("text", texts[item])])
        first, between, last = (_template(tokenizer, part) for part in (before, separator, after))
    pieces = _Pieces(tokens, list(texts), first, between, last, before, separator, after)
    names = [str(item) for item in range(len(texts))] if item_ids is None else item_ids
    eos = [tokenizer.eos_token_id] if answer_eos and tokenizer is not None else []
    return _dataset(pairs, pieces, names, eos, max_history, max_prompt_tokens)


def save_pairs(dataset: Dataset, path: str | Path) -> None:
    """Write a dataset as one Parquet file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        dataset.to_parquet(str(part))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_pairs(path: str | Path) -> Dataset:
    """Read what `save_pairs` wrote.

    Raises:
        TrainingError: no such file, or one without preference columns.
    """
    if not Path(path).is_file():
        raise TrainingError(f"{path} does not exist: write it with save_pairs.")
    dataset = Dataset.from_parquet(str(path))
    missing = {"prompt", "chosen", "rejected"} - set(dataset.column_names)
    if missing:
        raise TrainingError(f"{path} has no column {sorted(missing)}: it does not hold preference pairs.")
    return dataset


@dataclass(frozen=True)
class _Pieces:
    """What prompts are made of: the ids (or None) and the text of each item and of the template's three parts."""

    item_tokens: list[list[int]] | None
    item_texts: list[str]
    before: list[int]
    separator: list[int]
    after: list[int]
    before_text: str
    separator_text: str
    after_text: str

    def fitting(self, row: int, items: list[int], limit: int | None) -> list[int]:
        """The newest items whose prompt has at most `limit` tokens."""
        if limit is None or self.item_tokens is None:
            return items
        room = limit - len(self.before) - len(self.after)
        for kept, item in enumerate(reversed(items)):
            room -= len(self.item_tokens[item]) + (len(self.separator) if kept else 0)
            if room < 0:
                if not kept:
                    raise TrainingError(
                        f"row {row}: template and newest item alone exceed max_prompt_tokens={limit}; raise it, or "
                        "shorten the template or the title."
                    )
                return items[len(items) - kept :]
        return items

    def prompt_ids(self, items: list[int]) -> list[int]:
        assert self.item_tokens is not None
        ids = list(self.before)
        for place, item in enumerate(items):
            ids += (self.separator if place else []) + self.item_tokens[item]
        return ids + self.after


def _template(tokenizer: Any, text: str) -> list[int]:
    return encode_segments(tokenizer, [("template", text)]) if text else []


def _dataset(
    pairs: PreferencePairs,
    pieces: _Pieces,
    item_ids: Sequence[str],
    eos: list[int],
    max_history: int | None,
    max_prompt_tokens: int | None,
) -> Dataset:
    if max_history is not None and max_history < 1:
        raise TrainingError(f"max_history={max_history}: keep at least 1 item.")
    single = pairs.rejected.shape[1] == 1
    tokens, texts = pieces.item_tokens, pieces.item_texts
    columns: dict[str, list] = {name: [] for name in ("prompt", "chosen", "rejected")}
    if tokens is not None:
        columns |= {name: [] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    columns |= {"chosen_item": [], "rejected_items": []}
    for row, (history, chosen, rejected) in enumerate(zip(pairs.histories, pairs.chosen.tolist(), pairs.rejected)):
        items = history[-max_history:].tolist() if max_history is not None else history.tolist()
        items = pieces.fitting(row, items, max_prompt_tokens)
        others = rejected[rejected >= 0].tolist()
        prompt = f"{pieces.before_text}{pieces.separator_text.join(texts[item] for item in items)}{pieces.after_text}"
        answers = [texts[item] for item in others]
        check_answers(row, prompt, texts[chosen], answers)
        values: dict[str, Any] = {"prompt": prompt, "chosen": texts[chosen], "rejected": answers}
        if tokens is not None:
            values["prompt_ids"], values["chosen_ids"] = pieces.prompt_ids(items), tokens[chosen] + eos
            values["rejected_ids"] = [tokens[item] + eos for item in others]
            check_answers(row, values["prompt_ids"], values["chosen_ids"], values["rejected_ids"])
        if single:
            values |= {name: values[name][0] for name in ("rejected", "rejected_ids") if name in values}
        values |= {"chosen_item": item_ids[chosen], "rejected_items": [item_ids[item] for item in others]}
        for name, value in values.items():
            columns[name].append(value)
    return Dataset.from_dict(columns)
