"""Every distinct question is asked once: a chat function that keeps each answer in a file as soon as it is there.

An answer that was paid for, or took minutes, survives whatever ends the run; the same run again goes on from the file. An
answer is used again only for an identical request: the same model (of a local one the weights count, not the name), the same
settings, and the same messages, letter by letter.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ...errors import RequestError
from .prompts import Message

logger = logging.getLogger(__name__)


class AnswerCache:
    """A chat function in front of another one.

    Args:
        chat: `ChatModel`, `ChatEndpoint`, or a chat function of yours with `identity()` (what its answers depend on, as JSON
            values) that takes `on_answer=` (called with row and answer, one at a time).
        path: JSON Lines, `{"request": ..., "answer": ...}`, created or gone on with; None keeps answers in memory only.
        progress: called with how many more questions are answered.

    Attributes:
        asked: questions that went to `chat` and were answered.
        reused: questions whose answer was there already.

    Raises:
        RequestError: a file that cannot be read or written.

    Example:
        >>> class Echo:
        ...     def identity(self):
        ...         return {"model": "echo"}
        ...     def __call__(self, conversations, on_answer):
        ...         for row, messages in enumerate(conversations):
        ...             on_answer(row, messages[-1]["content"])
        >>> chat = AnswerCache(Echo(), None)
        >>> chat([[{"role": "user", "content": text}] for text in ("a", "b", "a")]), chat.asked, chat.reused
        (['a', 'b', 'a'], 2, 1)
    """

    def __init__(
        self, chat: Any, path: str | Path | None, *, progress: Callable[[int], Any] = lambda count: None
    ) -> None:
        self.chat, self.path, self.progress = chat, None if path is None else Path(path), progress
        self.asked = self.reused = 0
        self._identity = chat.identity()
        self._answers: dict[bytes, str] = {}
        self._torn = False  # the file ends within a line
        if self.path is not None and self.path.exists():
            self._load(self.path)
        if hasattr(chat, "complete_lists"):  # what the other one cannot do, this one cannot
            self.complete_lists = self._complete_lists

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """One answer per conversation."""
        requests = [{**self._identity, "messages": list(messages)} for messages in conversations]
        return self._each(requests, lambda rows, keep: self.chat([conversations[r] for r in rows], on_answer=keep))

    def _complete_lists(
        self, conversations: Sequence[Sequence[Message]], choices: Sequence[Sequence[str]]
    ) -> list[str]:
        requests = [
            {**self._identity, "messages": list(messages), "choices": list(row)}
            for messages, row in zip(conversations, choices, strict=True)
        ]

        def ask(rows: list[int], keep: Callable[[int, str], None]) -> None:
            self.chat.complete_lists([conversations[r] for r in rows], [choices[r] for r in rows], on_answer=keep)

        return self._each(requests, ask)

    def _each(
        self, requests: list[dict[str, Any]], ask: Callable[[list[int], Callable[[int, str], None]], Any]
    ) -> list[str]:
        keys = [_key(request) for request in requests]
        first: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in self._answers:
                first.setdefault(key, row)
        rows = list(first.values())
        self.reused += len(keys) - len(rows)
        self.progress(len(keys) - len(rows))

        def keep(place: int, answer: str) -> None:
            self._answers[keys[rows[place]]] = answer
            self._write(requests[rows[place]], answer)
            self.asked += 1
            self.progress(1)

        if rows:
            ask(rows, keep)
        return [self._answers[key] for key in keys]

    def _write(self, request: dict[str, Any], answer: str) -> None:
        if self.path is None:
            return
        line = json.dumps({"request": request, "answer": answer}) + "\n"  # ASCII: any answer can be written
        try:
            with open(self.path, "a", encoding="ascii") as file:
                file.write("\n" + line if self._torn else line)
        except OSError as error:
            raise RequestError(f"{self.path} cannot be written ({error}); name another folder.") from error
        self._torn = False

    def _load(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise RequestError(f"{path} cannot be read ({error}); name another folder.") from error
        self._torn = bool(text) and not text.endswith("\n")
        lines, damaged = text.split("\n"), 0
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                self._answers[_key(record["request"])] = str(record["answer"])
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += bool(line) and number < len(lines)  # an interrupted run may leave part of a last line
        if damaged:
            logger.warning("%s: %d lines hold no answer and are not used", path, damaged)


def _key(request: dict[str, Any]) -> bytes:
    return blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=16).digest()
