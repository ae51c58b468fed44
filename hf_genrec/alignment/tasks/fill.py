"""From a wording and its values to segments and token ids: what is filled in stays text, items stay items.

Wordings are ours and count as template; titles, reviews and everything else that comes from the data is a "text" segment, in
which control tokens do not exist (`encode_segments`); item names are "items" segments. Token ids are flat lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_genrec.errors import ItemTableError, TrainingError
from hf_genrec.identifiers.segments import encode_segments

from .templates import Template

Segment = tuple[str, Any]
ITEM_FIELDS = ("history", "item", "candidates")


@dataclass(frozen=True)
class Example:
    """One text-to-text pair of a task, as segments for `encode_segments`.

    Args:
        source, target: lists of ("template" | "text", str) and ("items", [item ids]).
        template: name of the wording.
        history: place of the source segment that may lose its oldest items, None for a source without one.
        where: names the example in errors: its family, item and training row.
    """

    source: list[Segment]
    target: list[Segment]
    template: str
    history: int | None = None
    where: str = ""


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters, cut at a blank where there is one.

    >>> clipped("a long title", 8)
    'a long'
    """
    text = text.strip()
    if len(text) <= limit:
        return text
    cut = text[: limit + 1]
    return (cut.rsplit(None, 1)[0] if len(cut.split()) > 1 else text[:limit]).strip()


def fill(template: Template, values: Mapping[str, Any], where: str = "") -> Example:
    """The wording with its values: item fields take lists of item ids (or one id), the others anything printable.

    Args:
        where: names the example in errors.

    Raises:
        ItemTableError: a field without a value (named).

    Example:
        >>> from hf_genrec.alignment.tasks.templates import wordings
        >>> fill(wordings("rating")[0], {"user": "user_1", "item": "B01", "rating": 4}).source[2:4]
        [('template', ' give '), ('items', ['B01'])]
    """

    def side(name: str) -> list[Segment]:
        segments: list[Segment] = []
        for part in template.parts(name):
            if isinstance(part, str):
                segments.append(("template", part))
                continue
            field = part[0]
            if values.get(field) is None:
                raise ItemTableError(f"wording {template.name}: no value for {{{field}}}; fill it or leave it out")
            value = values[field]
            if field in ITEM_FIELDS:
                segments.append(("items", [value] if isinstance(value, str) else list(value)))
            else:
                segments.append(("text", f"{value:g}" if isinstance(value, float) else str(value)))
        return segments

    parts = template.parts("source")
    history = parts.index(("history",)) if ("history",) in parts else None
    return Example(side("source"), side("target"), template.name, history, where or f"wording {template.name}")


class ExampleEncoder:
    """Token ids of examples, the pieces that repeat encoded once.

    A target that ends in an item ends in the item's own end token; every other target gets the tokenizer's end token.

    A source that is too long loses whole items of its history, the oldest first and never the last one; then the longest
    text (a review) loses its end. A text target that is too long loses its end too and is ended all the same. Items are
    never cut in two, wordings never at all.

    Args:
        tokenizer: a text tokenizer that carries a catalogue, with an end token.
        max_source, max_target: most tokens of a source and of a target with its end.
    """

    def __init__(self, tokenizer: Any, max_source: int = 512, max_target: int = 64) -> None:
        self.tokenizer, self.max_source, self.max_target = tokenizer, max_source, max_target
        self.end: list[int] = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self._known: dict[tuple[str, str], list[int]] = {}

    def encode(self, segments: Sequence[Segment]) -> list[int]:
        """Token ids of segments, one after the other."""
        ids: list[int] = []
        for kind, content in segments:
            if kind == "items":
                ids += encode_segments(self.tokenizer, [(kind, content)])
                continue
            key = (kind, content)
            if key not in self._known:
                if len(self._known) > 100_000:
                    self._known.clear()
                self._known[key] = encode_segments(self.tokenizer, [key])
            ids += self._known[key]
        return ids

    def __call__(self, example: Example) -> tuple[list[int], list[int]]:
        """Source and target of one example.

        Raises:
            TrainingError: an item in the target, or wording and items of the source, take more tokens than allowed.
        """
        source = [self.encode([segment]) for segment in example.source]
        target = [self.encode([segment]) for segment in example.target]
        if not example.target or example.target[-1][0] != "items":
            target.append(self.end)
        self._drop_items(source, example)
        return (
            self._fitting(source, example.source, "source", self.max_source, example.where),
            self._fitting(target, example.target, "target", self.max_target, example.where),
        )

    def _drop_items(self, pieces: list[list[int]], example: Example) -> None:
        """Take the oldest items out of the history's piece until the source fits or one item is left."""
        excess = sum(map(len, pieces)) - self.max_source
        if excess <= 0 or example.history is None:
            return
        names = [self.encode([("items", [item_id])]) for item_id in example.source[example.history][1]]
        while excess > 0 and len(names) > 1:
            excess -= len(names.pop(0))
        pieces[example.history] = [token for name in names for token in name]

    def _fitting(
        self, pieces: list[list[int]], segments: Sequence[Segment], side: str, limit: int, where: str
    ) -> list[int]:
        """The pieces one after the other, the longest text shortened where they are too long."""
        full = sum(map(len, pieces))
        texts = [place for place, (kind, _) in enumerate(segments) if kind == "text"]
        if full > limit and texts:
            longest = max(texts, key=lambda place: len(pieces[place]))
            kept = max(1, len(pieces[longest]) - (full - limit))
            pieces[longest] = pieces[longest][:kept]
        if sum(map(len, pieces)) > limit:
            named = [content[0] for kind, content in segments if kind == "items"] if side == "target" else []
            what = f"the target, item {named[0]!r}," if named else f"the {side}, with one item of its history at most,"
            raise TrainingError(
                f"{where}: {what} takes {sum(map(len, pieces))} tokens, and max_{side} is {limit}: raise max_{side}, or "
                "name items by fewer tokens."
            )
        return [token for piece in pieces for token in piece]
