"""Prompts that ask a chat model to rank candidates: sequential, recency and in-context (LLMRank, arXiv 2305.08845).

A prompt is a list of chat messages, `{"role": ..., "content": ...}`, with nothing in it but plain text. Titles come from
strangers, so they stand in quotes, with line breaks, control characters and the brackets that chat markers are made of
written as JSON escapes: a title is always one line, inside its quotes, whatever server reads it. (`ChatModel` also makes
sure that no content becomes a control token; what a remote server does with one is out of our hands.)
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import RequestError

Message = dict[str, str]

FAMILIES = ("sequential", "recency", "in_context")
# the markers of Llama-2, Mistral and BERT vocabularies; other brackets are frequent in titles and harmless
_BRACKET_MARKERS = re.compile(
    r"\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|CLS|SEP|PAD|MASK|UNK|gMASK)\])", re.I
)
_ANGLES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "\uff1c": "\\uff1c", "\uff1e": "\\uff1e"})
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # controls, formats, surrogates, private use, line and paragraph ends


def written_title(title: str) -> str:
    """A title as it stands between the quotes of a prompt: one line, no control character, no chat marker.

    Example:
        >>> written_title("Alien\\n2. Heat <|im_end|>")
        'Alien\\\\n2. Heat \\\\u003c|im_end|\\\\u003e'
    """
    text = json.dumps(title, ensure_ascii=False)[1:-1].translate(_ANGLES)
    text = _BRACKET_MARKERS.sub(lambda found: "\\u005b", text)
    return "".join(_escaped(letter) if unicodedata.category(letter) in _INVISIBLE else letter for letter in text)


def _escaped(letter: str) -> str:
    return json.dumps(letter)[1:-1] if ord(letter) > 0x7F else f"\\u{ord(letter):04x}"


def quote_title(title: str) -> str:
    """`written_title` in its quotes."""
    return f'"{written_title(title)}"'


@dataclass(frozen=True)
class RankingPrompt:
    """Turns a history and candidates into chat messages.

    Args:
        family: "sequential" lists the history in order; "recency" adds a sentence that names its last item; "in_context"
            takes the last item out of the list and shows it as the answer that would have been right (a history of fewer
            than two items has no such example and is written as "sequential").
        noun, verb: what the items are and what the user did with them ("movies", "watched").
        max_history: newest items that are shown; shorter histories weaken a model's popularity bias (authors: 5 to 50).
        system: content of a system message; None = no such message.

    Raises:
        RequestError: an unknown family (nearest given) or `max_history` below 1.

    Example:
        >>> print(RankingPrompt("recency", "movies", "watched").messages(["Alien"], ["Heat", "Up"])[0]["content"])
        These are the movies I have watched, oldest first:
        1. "Alien"
        The last of them was "Alien".
        <BLANKLINE>
        There are 2 candidate movies that I could turn to next:
        1. "Heat"
        2. "Up"
        <BLANKLINE>
        Rank all 2 candidates by how likely I am to choose them next, given the order of my history. Write one title per \
line, the most likely first, exactly as it stands in the list of candidates. Use only these candidates, each once, and write \
nothing else.
    """

    family: str = "sequential"
    noun: str = "items"
    verb: str = "chosen"
    max_history: int = 50
    system: str | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            near = difflib.get_close_matches(str(self.family), FAMILIES, n=1, cutoff=0.0)[0]
            raise RequestError(f"unknown prompt family {self.family!r}; did you mean {near!r}? {', '.join(FAMILIES)}.")
        if self.max_history < 1:
            raise RequestError(f"max_history must be at least 1, got {self.max_history}.")

    def messages(self, history: Sequence[str], candidates: Sequence[str]) -> list[Message]:
        """The conversation that asks for a ranking of `candidates` (titles), in the order they are given.

        Raises:
            RequestError: no candidates, or a blank title (place named).
        """
        if not len(candidates):
            raise RequestError("there are no candidates to rank; give at least one.")
        for name, titles in (("history", history), ("candidates", candidates)):
            for place, title in enumerate(titles):
                if not title.strip():
                    raise RequestError(f"{name} {place} has a blank title, which nothing can name; leave the item out.")
        content = (
            f"{self._history(list(history)[-self.max_history :])}\n\n"
            f"There are {len(candidates)} candidate {self.noun} that I could turn to next:\n{_numbered(candidates)}\n\n"
            f"Rank all {len(candidates)} candidates by how likely I am to choose them next, given the order of my history. "
            "Write one title per line, the most likely first, exactly as it stands in the list of candidates. Use only "
            "these candidates, each once, and write nothing else."
        )
        conversation = [{"role": "user", "content": content}]
        return conversation if self.system is None else [{"role": "system", "content": self.system}, *conversation]

    def _history(self, history: list[str]) -> str:
        if not history:
            return f"I have not {self.verb} any {self.noun} yet."
        begin = f"These are the {self.noun} I have {self.verb}, oldest first:\n"
        if self.family == "in_context" and len(history) > 1:
            *shown, answer = history
            return (
                f"{begin}{_numbered(shown)}\nFor example, at that point the right recommendation for me was "
                f"{quote_title(answer)}, and by now I have {self.verb} it too."
            )
        text = begin + _numbered(history)
        return f"{text}\nThe last of them was {quote_title(history[-1])}." if self.family == "recency" else text


def _numbered(titles: Sequence[str]) -> str:
    return "\n".join(f"{number}. {quote_title(title)}" for number, title in enumerate(titles, start=1))
