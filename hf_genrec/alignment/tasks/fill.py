"""From a wording and its values to segments and token ids: what is filled in stays text, items stay items.

Wordings are ours and count as template; titles, reviews and everything else that comes from the data is a "text" segment, in
which control tokens do not exist (`encode_segments`); item names are "items" segments. Token ids are flat lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_genrec.errors import ItemTableError
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
    """

    source: list[Segment]
    target: list[Segment]
    template: str


def fill(template: Template, values: Mapping[str, Any]) -> Example:
    """The wording with its values: item fields take lists of item ids (or one id), the others anything printable.

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

    return Example(side("source"), side("target"), template.name)


class ExampleEncoder:
    """Token ids of examples, the pieces that repeat encoded once.

    A target that ends in an item ends in the item's own end token; every other target gets the tokenizer's end token.

    Args:
        tokenizer: a text tokenizer that carries a catalogue, with an end token.
        max_source, max_target: longest source and target; a source loses its first tokens, a target its last ones.
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
        """Source and target of one example."""
        source = self.encode(example.source)[-self.max_source :]
        target = self.encode(example.target)[: self.max_target - 1]
        if not example.target or example.target[-1][0] != "items":
            target = target + self.end
        return source, target
