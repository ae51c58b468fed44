"""Prompts of a candidate ranker as token ids: wordings as data, item texts as segments, histories cut by whole items.

A wording is a text with fields in braces; it is cut at its fields once, and its pieces and the items' texts are encoded
apart (`encode_segments`), so that a title can never forge a control token or end its line early. Questions asked and
answers expected follow TALLRec (arXiv 2305.00447, yes or no), LlamaRec (2311.02089, one letter), LLaRA (2312.02445, a title
of the list) and LLMRank (2305.08845, the list in the model's order); the sentences are ours.

Shapes: N items, L tokens of the longest item text, B rows, T tokens, S soft slots of a row.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RequestError
from hf_genrec.identifiers.chat_markup import chat_markup
from hf_genrec.identifiers.segments import encode_segments

from .configuration_candidate_ranker import FIELDS, CandidateRankerConfig

LETTERS = string.ascii_uppercase + string.ascii_lowercase
WORDINGS: dict[str, str] = {
    "letters": (
        "{bos}{user}Chosen by one user, oldest first:\n{history}\nOne of these comes next:\n{candidates}\n"
        "The letter of the item that comes next is:"
    ),
    "yes_no": (
        "{bos}{user}Chosen by one user, oldest first:\n{history}\nWould the user like this one?\n{target}\n"
        "Answer Yes or No:"
    ),
    "title": (
        "{bos}{user}Chosen by one user, oldest first:\n{history}\nOne of these comes next:\n{candidates}\n"
        "The item that comes next is: "
    ),
    "list": (
        "{bos}These are the items I have chosen, oldest first:\n{history}\nThe last of them was {newest}.\n\n"
        "These are candidates for what I could choose next:\n{candidates}\n\n"
        "Rank all the candidates by how likely I am to choose them next, given the order of my history. Write one title "
        "per line, the most likely first, exactly as it stands in the list of candidates, and write nothing else."
    ),
}
# TALLRec's own question: for requests that come with ratings (`rank_candidates(..., disliked=...)`)
RATED_WORDING = (
    "{bos}{user}The user liked:\n{history}\nThe user did not like:\n{disliked}\nWould the user like this one?\n{target}\n"
    "Answer Yes or No:"
)
_FIELD = re.compile(r"\{(\w+)\}")


def item_token_table(tokenizer: Any, texts: Sequence[str], max_tokens: int = 32) -> np.ndarray:
    """Token ids (N, L) int32 of item texts, cut to `max_tokens`, -1 behind the end.

    Raises:
        ItemTableError: an item without text (row named).
    """
    rows = [encode_segments(tokenizer, [("text", str(text))])[:max_tokens] for text in texts]
    for row, ids in enumerate(rows):
        if not ids:
            raise ItemTableError(
                f"item row {row}: {texts[row]!r} has no tokens, so no prompt can name it; give every item a text (its "
                "id, say)."
            )
    table = np.full((len(rows), max(map(len, rows), default=1)), -1, np.int32)
    for row, ids in enumerate(rows):
        table[row, : len(ids)] = ids
    return table


def answer_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """One token id per answer word, written behind a space where the vocabulary has that form, else without.

    Raises:
        IncompatibleComponentsError: a word is no single token, or two words are the same token.
    """
    broken = words[0] if words else ""
    for lead in (" ", ""):
        ids = [encode_segments(tokenizer, [("template", lead + word)]) for word in words]
        if all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(ids):
            return [one[0] for one in ids]
        broken = next((word for word, one in zip(words, ids, strict=True) if len(one) != 1), broken)
    raise IncompatibleComponentsError(
        f"{type(tokenizer).__name__} has no single token for the answer {broken!r}; add the answers as tokens "
        "(tokenizer.add_tokens, then resize the model), choose other words, or use verbalizer 'title'."
    )


def prompt_values(
    tokenizer: Any,
    verbalizer: str,
    num_candidates: int,
    *,
    wording: str | None = None,
    answers: Sequence[str] | None = None,
    slots: Sequence[str] = (),
    neutral: str = "",
    item_quotes: tuple[str, str] = ('"', '"'),
) -> dict[str, Any]:
    """Fields of `CandidateRankerConfig` that hold token ids, from texts.

    Args:
        tokenizer: the language model's.
        wording: fields {history}, {newest}, {disliked}, {candidates}, {target}, {user} and {bos} (the start token, where
            the tokenizer writes one); control tokens of chat models count. None = the one of `WORDINGS`. For "list" it is
            a question to a chat model and stands in the tokenizer's chat template, where it has one. With {disliked}
            (`RATED_WORDING`) {history} holds liked items only, and every request must say which are which.
        answers: the words of the answers; None = letters, or Yes and No.
        slots: of the configuration; without "user" the field {user} is left out.
        neutral: text in place of a soft token in text-only prompts.
        item_quotes: around every item's text.

    Raises:
        IncompatibleComponentsError: an unknown field, answers that are no single tokens, or for "list" a tokenizer without
            a token for the line break or the end.
    """

    def ids(text: str) -> list[int]:
        return encode_segments(tokenizer, [("template", text)]) if text else []

    start = _start_tokens(tokenizer)
    prompt: list[Any] = []

    def write(tokens: list[int]) -> None:
        if tokens and prompt and isinstance(prompt[-1], list):
            prompt[-1] = prompt[-1] + tokens
        elif tokens:
            prompt.append(tokens)

    pieces = _FIELD.split(wording or WORDINGS[verbalizer])
    behind = ""
    if verbalizer == "list" and getattr(tokenizer, "chat_template", None):
        markup = chat_markup(tokenizer)  # it writes the start token itself
        start, behind = [], markup.answers[0]
        write(ids(markup.start + markup.questions[0]))
    for place, piece in enumerate(pieces):
        if place % 2 == 0 or piece == "bos":
            write(start if place % 2 else ids(piece))
        elif piece not in FIELDS:
            raise IncompatibleComponentsError(
                f"the wording has an unknown field {{{piece}}}; fields are {', '.join(FIELDS)} and bos."
            )
        elif piece != "user" or "user" in slots:
            prompt.append(piece)
    write(ids(behind))
    values: dict[str, Any] = {
        "prompt": prompt,
        "item_open": ids(item_quotes[0]),
        "item_close": ids(item_quotes[1]),
        "history_separator": ids("\n"),
        "candidate_separator": ids("\n"),
        "empty_list": ids("none"),
        "neutral": ids(neutral),
        "verbalizer": verbalizer,
        "num_candidates": num_candidates,
        "slots": list(slots),
    }
    if verbalizer == "letters":
        if num_candidates > len(LETTERS) and answers is None:
            raise IncompatibleComponentsError(
                f"num_candidates is {num_candidates}, but there are {len(LETTERS)} letters; give answers=[...] of your "
                "own, or use verbalizer 'title'."
            )
        words = list(answers or LETTERS[:num_candidates])
        values["answer_tokens"] = answer_tokens(tokenizer, words)
        values["candidate_marks"] = [ids(f"({word}) ") for word in words]
    elif verbalizer == "yes_no":
        values["answer_tokens"] = answer_tokens(tokenizer, answers or ("Yes", "No"))
    elif verbalizer == "list":
        values["answer_end"] = [
            *_line_break(tokenizer),
            *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
        ]
        if len(values["answer_end"]) != 2:
            raise IncompatibleComponentsError(
                f"{type(tokenizer).__name__} has no single token for a line break, or no end token, so written lists cannot "
                "be told apart; use verbalizer 'letters' or 'title'."
            )
    else:
        end = tokenizer.eos_token_id
        values["answer_end"] = [] if end is None else [int(end)]
    return values


def _line_break(tokenizer: Any) -> list[int]:
    """What the tokenizer writes for a line break behind a word."""
    word = encode_segments(tokenizer, [("text", "a")])
    line = encode_segments(tokenizer, [("text", "a\n")])
    return line[len(word) :] if line[: len(word)] == word else []


def _start_tokens(tokenizer: Any) -> list[int]:
    """The start token, where the tokenizer itself puts one before a text."""
    first = tokenizer.bos_token_id
    written = tokenizer("a")["input_ids"]
    return [int(first)] if first is not None and written and written[0] == first else []


@dataclass
class PromptRow:
    """Token ids, and the item of every item slot among them, in order."""

    ids: list[int] = field(default_factory=list)
    slot_items: list[int] = field(default_factory=list)

    def __add__(self, other: PromptRow) -> PromptRow:
        return PromptRow(self.ids + other.ids, self.slot_items + other.slot_items)


class PromptWriter:
    """Writes prompts of item indices.

    Args:
        config: of the ranker.
        item_tokens: (N, L) token ids of the items' texts, -1 behind the end.
    """

    def __init__(self, config: CandidateRankerConfig, item_tokens: Any) -> None:
        self.config = config
        self.titles = [[token for token in row if token >= 0] for row in np.asarray(item_tokens).tolist()]
        # read once: both build a configuration object
        self.limit = config.length_limit
        self._user, self._item = config.user_placeholder_id, config.item_placeholder_id
        cut = config.prompt.index("target") if "target" in config.prompt else len(config.prompt)
        self._before, self._behind = config.prompt[:cut], [token for part in config.prompt[cut + 1 :] for token in part]

    def item(self, item: int, slot: str, text_only: bool, mark: Sequence[int] = ()) -> PromptRow:
        """One item of a list: mark, text, soft tokens."""
        config = self.config
        ids = [*mark, *config.item_open, *self.titles[item], *config.item_close]
        if slot not in config.slots:
            return PromptRow(ids)
        if text_only:
            return PromptRow(ids + list(config.neutral))
        return PromptRow(ids + [self._item] * config.tokens_per_item, [item])

    def answer(self, item: int) -> list[int]:
        """The item's text as an answer, with its end."""
        config = self.config
        return [*config.item_open, *self.titles[item], *config.item_close, *config.answer_end]

    def target(self, item: int, text_only: bool = False) -> PromptRow:
        """What "yes_no" reads of one candidate: the field {target} and what stands behind it."""
        return self.item(item, "candidates", text_only) + PromptRow(self._behind)

    def write(
        self,
        history: Sequence[int],
        candidates: Sequence[int] = (),
        disliked: Sequence[int] = (),
        *,
        text_only: bool = False,
        reserve: int = 0,
        where: str = "the prompt",
    ) -> PromptRow:
        """The prompt up to the answer (up to the candidate for "yes_no").

        Args:
            history, disliked: items, oldest first; the newest `max_history` of each are written, and fewer where the
                prompt would be longer than the language model reads.
            candidates: items of the candidate list, in the order to be shown.
            text_only: no soft tokens.
            reserve: tokens to keep free for what follows.
            where: names the row in messages.

        Raises:
            RequestError: the prompt is too long even without a history, or there are more candidates than letters.
        """
        config = self.config
        if config.candidate_marks and len(candidates) > len(config.candidate_marks):
            raise RequestError(
                f"{where}: {len(candidates)} candidates for {len(config.candidate_marks)} letters; rank fewer at a time, "
                "or build the ranker with a larger num_candidates."
            )
        newest = [self.item(int(i), "history", text_only) for i in history[-1:]]
        lists = {
            "history": [self.item(int(i), "history", text_only) for i in history[-config.max_history :]],
            "disliked": [self.item(int(i), "history", text_only) for i in disliked[-config.max_history :]],
        }
        marks = config.candidate_marks or [()] * len(candidates)
        shown = [self.item(int(i), "candidates", text_only, mark) for i, mark in zip(candidates, marks, strict=False)]
        user = [] if text_only else [self._user] * config.tokens_per_item
        while True:
            row = PromptRow()
            for part in self._before:
                if isinstance(part, list):
                    row += PromptRow(part)
                elif part == "user":
                    row += PromptRow(user)
                elif part in ("candidates", "newest"):
                    row += self._joined(shown if part == "candidates" else newest, config.candidate_separator)
                else:
                    row += self._joined(lists[part], config.history_separator)
            excess = len(row.ids) + reserve - self.limit if self.limit is not None else 0
            if excess <= 0:
                return row
            longer = max(lists.values(), key=len)
            if not longer:
                raise RequestError(
                    f"{where}: {len(row.ids) + reserve} tokens without any history exceed the {self.limit} that the "
                    "language model reads; show fewer candidates (num_candidates), cut item texts (max_title_tokens), "
                    "or raise max_length."
                )
            while longer and excess > 0:  # whole items, the oldest first
                excess -= len(longer.pop(0).ids) + len(config.history_separator)

    def _joined(self, items: Sequence[PromptRow], separator: Sequence[int]) -> PromptRow:
        if not items:
            return PromptRow(list(self.config.empty_list))
        row = PromptRow(list(items[0].ids), list(items[0].slot_items))
        for item in items[1:]:
            row.ids += [*separator, *item.ids]
            row.slot_items += item.slot_items
        return row


def padded(rows: Sequence[PromptRow], pad_id: int, *, left: bool) -> dict[str, Tensor]:
    """Rows as one batch: `input_ids` and `attention_mask` (B, T), `slot_items` (B, S) filled up with -1.

    Example:
        >>> batch = padded([PromptRow([5, 9], [3]), PromptRow([7])], 0, left=True)
        >>> batch["input_ids"].tolist(), batch["slot_items"].tolist()
        ([[5, 9], [0, 7]], [[3], [-1]])
    """
    width = max((len(row.ids) for row in rows), default=0)
    slots = max((len(row.slot_items) for row in rows), default=0)
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros_like(ids)
    items = np.full((len(rows), slots), -1, np.int64)
    for place, row in enumerate(rows):
        columns = slice(width - len(row.ids), None) if left else slice(0, len(row.ids))
        ids[place, columns], mask[place, columns] = row.ids, 1
        items[place, : len(row.slot_items)] = row.slot_items
    return {
        name: torch.from_numpy(a) for name, a in (("input_ids", ids), ("attention_mask", mask), ("slot_items", items))
    }
