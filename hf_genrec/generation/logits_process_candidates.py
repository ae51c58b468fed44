"""CandidateTrieLogitsProcessor: an answer out of a closed set of candidates, another set for each request.

For re-ranking and choice prompts ("which of these twenty films?"): what comes out is exactly one of the candidates of
that request, followed by the end token, never a mixture of two of them and never somebody else's candidate. All requests
share one prefix tree; a request's own set is a filter over it, so that no answer walks into a dead end.

Shape legend: B requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RequestError
from .logits_process import ItemTrieLogitsProcessor
from .token_trie import TokenTrie

_KINDS = ("items", "texts")


class CandidateTrieLogitsProcessor(ItemTrieLogitsProcessor):
    """Allows only answers that are one of the request's candidates (or several different ones).

    Args:
        tokenizer: with `kind="items"` a tokenizer that carries the catalogue; with `kind="texts"` any Hugging Face
            tokenizer.
        candidates: one list per request, or one list for all: item ids, or texts. A text is tokenised as it is written
            here, without special tokens: write the leading space that follows your prompt. One candidate may be the
            beginning of another ("Star", "Star Wars").
        prompt_length: tokens before the answer, as in ItemTrieLogitsProcessor.
        kind: "items" or "texts".
        num_items: candidates per answer, all different.
        separator_token_id: token between the candidates of an answer; texts need one if `num_items` > 1.
        eos_token_id, renormalize: as in ItemTrieLogitsProcessor.
        free_end: default True for items, False for texts: a text's score includes its end token, which is what tells
            "Star" from "Star Wars".

    Relations: with the whole catalogue as candidates it is ItemTrieLogitsProcessor. For a ranking of texts that
    does not favour long ones, generate with `length_penalty=0.0` (arXiv 2406.14900).

    Raises:
        RequestError: an empty list, fewer different candidates than `num_items`, an empty text, something that is no
            string (row named).
        UnknownItemError: an id that is not in the catalogue.
        IncompatibleComponentsError: several texts per answer without a separator that tells where one ends.

    Example:
        processor = CandidateTrieLogitsProcessor(
            tokenizer, [[" Star", " Star Wars"], [" Alien", " Aliens"]], inputs["input_ids"].shape[1], kind="texts"
        )
        model.generate(**inputs, num_beams=4, length_penalty=0.0, max_new_tokens=16, logits_processor=[processor])
    """

    def __init__(
        self,
        tokenizer: Any,
        candidates: Sequence[Any],
        prompt_length: int = 1,
        *,
        kind: str = "items",
        num_items: int = 1,
        separator_token_id: int | None = None,
        eos_token_id: int | None = None,
        renormalize: bool = False,
        free_end: bool | None = None,
    ):
        if kind not in _KINDS:
            raise RequestError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}.")
        rows = _checked_rows(candidates, num_items)
        source: Any = tokenizer
        allowed: list[list[Any]] = rows
        if kind == "texts":
            texts = list(dict.fromkeys(text for row in rows for text in row))
            number = {text: index for index, text in enumerate(texts)}
            source = TokenTrie.from_texts(tokenizer, texts)
            allowed = [[number[text] for text in row] for row in rows]
            if eos_token_id is None:
                eos_token_id = tokenizer.eos_token_id
        super().__init__(
            source,
            prompt_length,
            eos_token_id=eos_token_id,
            num_items=num_items,
            allowed_items=allowed,
            renormalize=renormalize,
            free_end=free_end,
            separator_token_id=separator_token_id,
        )


def _checked_rows(candidates: Any, num_items: int) -> list[list[str]]:
    if isinstance(candidates, str | bytes):
        raise RequestError("candidates must be a list of ids or texts, or one such list per request, not one string.")
    lists = list(candidates)
    if not lists:
        raise RequestError("candidates is empty, which leaves nothing to generate; give at least one per request.")
    if all(isinstance(entry, str) for entry in lists):
        lists = [lists]
    rows = []
    for number, row in enumerate(lists):
        if isinstance(row, str | bytes):
            raise RequestError(f"candidates row {number} is {row!r}, not a list; pass one list per request.")
        entries = list(row)
        wrong = [entry for entry in entries if not isinstance(entry, str)]
        if wrong:
            raise RequestError(f"candidates row {number} holds {wrong[0]!r}; ids and texts are strings.")
        if not entries:
            raise RequestError(f"candidates row {number} is empty, which leaves nothing to generate for that request.")
        if len(set(entries)) < num_items:
            raise RequestError(
                f"candidates row {number} has {len(set(entries))} different candidates for answers of {num_items}; "
                "lower num_items or give more."
            )
        rows.append(entries)
    return rows
