"""Rows for decoder-only language models: conversations as segments -> `input_ids` and labels of the answers alone.

Two styles. "plain" writes question, answer and end token one after the other. "chat" writes the tokenizer's chat template
around them (`identifiers/chat_markup.py`). Labels are -100 everywhere but on the answers and on the token that ends them.
Item texts are "text" segments and cannot become control tokens; item tokens come from a table.

An item continues a history directly, in training as in `recommend`; every other answer is set off by `answer_mark` (plain
style). An item that is the only answer ends itself: identifiers are decoded to a known length, and without an end token all
targets of such a row are item tokens (`end_items=True` labels one, as LC-Rec does). Text answers are always ended.

Relations: `fill.ExampleEncoder` makes sources and targets for encoder-decoders of the same examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_genrec.data.collators import IGNORED
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.chat_markup import ChatMarkup, chat_markup
from hf_genrec.identifiers.segments import encode_segments

from .fill import Example

STYLES = ("plain", "chat")
Segment = tuple[str, Any]
Piece = tuple[str, Any, bool]  # kind, content, labelled


@dataclass(frozen=True)
class History:
    """A list that may lose its oldest entries: content of a ("history", History) segment.

    Args:
        entries: (time, segments) of each entry; entries of the same time, in whatever list, are dropped together, the
            smallest first.
        between: template text between two entries.
    """

    entries: tuple[tuple[int, tuple[Segment, ...]], ...]
    between: str = ""


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, as segments.

    Args:
        turns: (question, answer) pairs of segments: those of `encode_segments`, and ("history", History) in questions.
        template: name of the wording.
    """

    turns: tuple[tuple[list[Segment], list[Segment]], ...]
    template: str


@dataclass(frozen=True)
class LanguageRow:
    """A row for a causal language model: token ids, and the same ids as labels where an answer is, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


class LanguageEncoder:
    """Token ids and labels of conversations for one tokenizer and style.

    Args:
        tokenizer: a text tokenizer with a padding and an end token; item segments need one made by `extend_tokenizer`.
        style: "plain" or "chat".
        max_length: most tokens of a row. A longer one loses the oldest items of its history, never a part of one, never
            the last one, nor anything else.
        system: text at the beginning: the system message in chat style, a line before the question in plain style.
        end_items: end an item that is a row's only answer with a labelled end token.
        answer_mark: plain style: between a question and an answer that does not continue a history, and between turns.

    Raises:
        IncompatibleComponentsError: no padding token, no end token, no chat template, or one that cannot be cut.

    Example:
        >>> from hf_genrec.identifiers.item_names import tokenizer_from_names
        >>> from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
        >>> base = train_text_tokenizer(["next item after: ", "item_1 item_2"], 100)
        >>> encoder = LanguageEncoder(tokenizer_from_names(base, ["a", "b"], ["item_1", "item_2"]))
        >>> row = encoder(Example([("template", "next: "), ("items", ["a"])], [("items", ["b"])], "mine"))
        >>> row.labels[-2:] == row.input_ids[-2:], row.labels[0]
        (True, -100)
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        style: str = "plain",
        max_length: int = 1024,
        system: str | None = None,
        end_items: bool = False,
        answer_mark: str = "\n",
    ) -> None:
        if style not in STYLES:
            raise IncompatibleComponentsError(f"style {style!r}: choose one of {', '.join(STYLES)}")
        name = type(tokenizer).__name__
        if tokenizer.pad_token_id is None:
            raise IncompatibleComponentsError(
                f"{name} has no padding token, so rows cannot be put into one batch: extend_tokenizer(base, items) adds "
                "<pad>, or call tokenizer.add_special_tokens({'pad_token': '<pad>'}) and resize the model's embeddings"
            )
        if tokenizer.eos_token_id is None:
            raise IncompatibleComponentsError(
                f"{name} has no end token, so answers would never end: set tokenizer.eos_token to one of its tokens"
            )
        self.tokenizer, self.style, self.max_length = tokenizer, style, int(max_length)
        self.system, self.end_items, self.answer_mark = system or "", bool(end_items), answer_mark
        self.carries_items = hasattr(tokenizer, "item_token_table")
        # plain rows begin as this tokenizer begins texts
        opened = tokenizer.encode("", add_special_tokens=True)
        self._begin = tokenizer.bos_token if opened and opened[0] == tokenizer.bos_token_id else ""
        self._markup: dict[int, ChatMarkup] = {}
        self._known: dict[tuple[str, str], list[int]] = {}
        self._items: dict[str, list[int]] = {}
        self._prefixes: dict[tuple, list[int]] = {}
        if style == "chat":
            self.markup(1)

    def markup(self, turns: int) -> ChatMarkup:
        """The chat template around a conversation of so many turns."""
        if turns not in self._markup:
            self._markup[turns] = chat_markup(self.tokenizer, turns, system=bool(self.system))
        return self._markup[turns]

    # ------------------------------------------------------------------------------------------ rows and prompts

    def __call__(self, example: Example | Conversation, where: str = "row") -> LanguageRow:
        """The row of a conversation.

        Args:
            example: what is said; an `Example` is a conversation of one turn.
            where: names the row in errors.

        Raises:
            TrainingError: longer than `max_length` even with the newest item of the history alone.
        """
        return self._fitting(_turns(example), False, self.max_length, where)

    def prompt(self, example: Example | Conversation, where: str = "row", *, reserve: int = 0) -> list[int]:
        """Token ids up to the place of the last answer, `reserve` tokens of `max_length` left free for it.

        Raises:
            TrainingError: as above.
        """
        return self._fitting(_turns(example), True, self.max_length - reserve, where).input_ids

    def window(self, question: Sequence[Segment], item_ids: Sequence[str]) -> LanguageRow:
        """A question (without history) and a whole window of items behind it, every item but the first labelled.

        In chat style the items are the assistant's answer. In plain style the labels of the last item are those of the
        single row of the items before it.

        Raises:
            TrainingError: longer than `max_length`.
        """
        prefix = self.window_prefix(question)
        ids = list(prefix)
        for item in item_ids:
            ids += self.item(item)
        if len(ids) > self.max_length:
            raise TrainingError(
                f"a window of {len(item_ids)} items has {len(ids)} tokens, max_length is {self.max_length}: use shorter "
                "windows or a larger max_length"
            )
        unasked = len(prefix) + len(self.item(item_ids[0]))
        return LanguageRow(ids, [IGNORED] * unasked + ids[unasked:])

    def window_prefix(self, question: Sequence[Segment]) -> list[int]:
        """Token ids before the items of a window (do not change the list)."""
        key = tuple(question)
        prefix = self._prefixes.get(key)
        if prefix is None:
            shown = list(question) if self.style == "chat" else [*question, ("items", [])]  # the items follow directly
            pieces = self._pieces(((shown, [("items", [])]),), None, True)
            prefix = self._prefixes[key] = self._row(pieces).input_ids
        return prefix

    def around_history(self, question: Sequence[Segment], *, windows: bool = False) -> tuple[str, str]:
        """Template texts before and after a history of item tokens, for `extend_tokenizer(history_before=, history_after=)`.

        With them `encode_histories` and `recommend` write the prompts that training showed.

        Args:
            question: segments of a wording with its one ("history", ...) or ("items", ...) segment; the rest template.
            windows: the model was trained on `window` rows of this wording.

        Raises:
            IncompatibleComponentsError: a question without such a place, or with more than template around it; windows of a
                wording that goes on behind its history.
        """
        places = [place for place, (kind, _) in enumerate(question) if kind != "template"]
        if len(places) != 1 or question[places[0]][0] not in ("history", "items"):
            raise IncompatibleComponentsError("a served wording is template text around one history of item tokens")
        if windows and places[0] != len(question) - 1:
            raise IncompatibleComponentsError("windows need a wording that ends in its history")
        mark: Segment = ("items", [])
        shown = question[: places[0]] if windows and self.style == "chat" else [*question[: places[0]], mark]
        rest = [] if windows else question[places[0] + 1 :]
        pieces = self._pieces((([*shown, *rest], [mark]),), None, True)
        texts = ["", ""]
        behind = 0
        for kind, content, _ in pieces:
            if kind == "template":
                texts[behind] += content
            else:
                behind = 1
        return texts[0], texts[1]

    # ------------------------------------------------------------------------------------------ from segments to ids

    def item(self, item_id: str) -> list[int]:
        """Token ids of one item (do not change the list). Raises UnknownItemError."""
        ids = self._items.get(item_id)
        if ids is None:
            ids = self._items[item_id] = encode_segments(self.tokenizer, [("items", [item_id])])
        return ids

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of segments without anything around them ("history" is not one of them here)."""
        return [token for kind, content in segments for token in self._ids(kind, content)]

    def _fitting(self, turns: tuple, ask: bool, limit: int, where: str) -> LanguageRow:
        row = self._row(self._pieces(turns, None, ask))
        if len(row.input_ids) <= limit:
            return row
        times = sorted(
            {time for question, _ in turns for history in _histories(question) for time, _ in history.entries}
        )
        full, dropped = len(row.input_ids), 0
        while len(row.input_ids) > limit and dropped < len(times) - 1:
            excess, freed = len(row.input_ids) - limit, 0
            while freed < excess and dropped < len(times) - 1:
                freed += self._cost(turns, times[dropped])
                dropped += 1
            row = self._row(self._pieces(turns, times[dropped], ask))
        if len(row.input_ids) > limit:
            raise TrainingError(
                f"{where}: {full} tokens, and still {len(row.input_ids)} with the newest item of its history alone; "
                f"{limit} are allowed (max_length is {self.max_length}): raise max_length (within the model's context), or "
                "show less (max_title, max_description, num_candidates)"
            )
        return row

    def _cost(self, turns: tuple, time: int) -> int:
        """Tokens that the row loses at most without the entries of this time: joined template texts are not longer."""
        return sum(
            len(self._ids(kind, content))
            for question, _ in turns
            for history in _histories(question)
            for when, segments in history.entries
            if when == time
            for kind, content in (*segments, ("template", history.between))
        )

    def _pieces(self, turns: tuple, oldest: int | None, ask: bool) -> list[Piece]:
        """Segments and markup in order, neighbouring template texts joined; histories without entries before `oldest`."""
        pieces: list[Piece] = []
        open_text: list[str] = []  # template text that is not closed yet, and whether it is labelled
        labelled = False

        def close() -> None:
            if open_text:
                text = "".join(open_text)
                open_text.clear()
                if text:
                    pieces.append(("template", text, labelled))

        def add(segments: Sequence[Segment], label: bool) -> None:
            nonlocal labelled
            if label != labelled:
                close()
                labelled = label
            for kind, content in segments:
                if kind == "template":
                    open_text.append(content)
                elif kind == "history":
                    first = True
                    for time, entry in content.entries:
                        if oldest is None or time >= oldest:
                            if not first and content.between:
                                open_text.append(content.between)
                            add(entry, label)
                            first = False
                else:
                    close()
                    pieces.append((kind, content, label))

        markup = self.markup(len(turns)) if self.style == "chat" else None
        add([("template", self._opening(markup))], False)
        for place, (question, answer) in enumerate(turns):
            last = place == len(turns) - 1
            if markup is None:
                before = self.answer_mark if place else ""
                mark = "" if _is_items(question[-1:]) and _is_items(answer[:1]) else self.answer_mark
            else:
                before, mark = markup.questions[place], markup.answers[place]
                if place and before.startswith(markup.stop):
                    add([("template", markup.stop)], True)
                    before = before[len(markup.stop) :]
            add([("template", before), *question, ("template", mark)], False)
            if last and ask:
                break
            add(answer, True)
            ended = len(turns) > 1 or self.end_items or not _is_items(answer[-1:])
            if ended and (last or markup is None):  # in a chat the next question begins with the end of this answer
                add([("template", (markup.stop if markup else "") or self.tokenizer.eos_token)], True)
        close()
        return pieces

    def _opening(self, markup: ChatMarkup | None) -> str:
        if markup is not None:
            return markup.start + self.system
        return self._begin + self.system + ("\n" if self.system else "")

    def _row(self, pieces: list[Piece]) -> LanguageRow:
        input_ids: list[int] = []
        labels: list[int] = []
        for kind, content, labelled in pieces:
            ids = self._ids(kind, content)
            input_ids += ids
            labels += ids if labelled else [IGNORED] * len(ids)
        return LanguageRow(input_ids, labels)

    def _ids(self, kind: str, content: Any) -> list[int]:
        if kind == "items":
            return [token for item_id in content for token in self.item(item_id)]
        key = (kind, content)
        ids = self._known.get(key)
        if ids is None:
            if len(self._known) > 200_000:
                self._known.clear()
            ids = self._known[key] = encode_segments(self.tokenizer, [key])
        return ids


def _turns(example: Example | Conversation) -> tuple:
    return example.turns if isinstance(example, Conversation) else ((example.source, example.target),)


def _histories(segments: Sequence[Segment]) -> list[History]:
    return [content for kind, content in segments if kind == "history"]


def _is_items(segments: Sequence[Segment]) -> bool:
    """Is the one segment a run of item tokens?"""
    if not segments:
        return False
    kind, content = segments[0]
    if kind == "history":
        return bool(content.entries) and content.entries[-1][1][-1][0] == "items"
    return kind == "items"
