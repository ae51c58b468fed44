"""From the words of a chat answer to catalogue items: exact titles, the same title written differently, small typos.

A language model that answers in words may name things that do not exist. Each line is matched in three steps, and what
none of them accepts is *not in the catalogue*; an edit distance of 2 is accepted and 3 is not, as in the evaluation of
conversational recommenders with language models (arXiv 2308.10053).

Everything here is spelling, with the standard library and numpy only, so that results do not depend on what is installed.
Meaning is `grounding.EmbeddingGrounder`.

Shape legend: N titles, C characters.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RequestError

_YEAR = re.compile(r"\s*[\(\[](?:18|19|20)\d\d[\)\]]\s*$")
_ARTICLE = re.compile(r"^(.*), (the|a|an|le|la|les|il|der|die|das|el|los)$")
_BULLET = re.compile(r"^\s*(?:[-*\u2022]+|\(?\d{1,3}[.):])\s+")
_QUOTES = "\"'`*_\u201c\u201d\u2018\u2019\u00ab\u00bb "


@dataclass(frozen=True)
class TitleMatch:
    """What a text was matched to.

    Attributes:
        item: index of the item, -1 = not in the catalogue. Of several items with that title, the lowest index.
        kind: "exact", "normalised" (case, accents, punctuation, article, year), "edit", "ratio" or "none".
        edits: characters inserted, deleted or replaced between the normalised texts (-1 for "ratio" and "none").
        items: all items with the matched title, ascending.
    """

    item: int
    kind: str
    edits: int
    items: tuple[int, ...]


class TitleMatcher:
    """Finds the item a text names.

    Args:
        titles: N item titles. Empty ones never match.
        max_edits: edit distance that is still the same title, 0 = none. Short titles are held to less: a text of C
            characters may differ in (C - 1) // 3 of them, else "Up" would be "Us". Numbers must agree: "Toy Story 3" is
            no typo of "Toy Story 2".
        min_ratio: also accept the title with the highest `difflib` similarity of at least this (0 to 1); None = off.
            For long titles that a model shortens.

    Raises:
        RequestError: no titles, or a limit out of range.

    Example:
        >>> matcher = TitleMatcher(["Toy Story (1995)", "Matrix, The (1999)", "Heat (1995)"])
        >>> [matcher.match(text).item for text in ("the matrix", "Toy Stroy", "Cars", "HEAT (1995)")]
        [1, 0, -1, 2]
    """

    def __init__(self, titles: Sequence[str], *, max_edits: int = 2, min_ratio: float | None = None):
        if not len(titles):
            raise RequestError("title matching needs at least one title.")
        if isinstance(max_edits, bool) or not isinstance(max_edits, int) or max_edits < 0:
            raise RequestError(f"max_edits must be a whole number >= 0, got {max_edits!r}.")
        if min_ratio is not None and not 0 < min_ratio <= 1:
            raise RequestError(f"min_ratio must be above 0 and at most 1, got {min_ratio!r}.")
        self.titles, self.max_edits, self.min_ratio = [str(title) for title in titles], max_edits, min_ratio
        self._exact = _group((title.strip(), item) for item, title in enumerate(self.titles))
        # a text without a year means any year; a text with one means that year
        self._normalised = _group((normalise_title(title), item) for item, title in enumerate(self.titles))
        self._without_year = _group(
            (normalise_title(title, drop_year=True), item) for item, title in enumerate(self.titles)
        )
        self._names = sorted({*self._normalised, *self._without_year})
        self._table = _CharacterTable(self._names)
        self._numbers = np.array([_numbers(name) for name in self._names])

    def match(self, text: str) -> TitleMatch:
        """The item one text names, or item -1."""
        items = self._exact.get(text.strip())
        if items:
            return TitleMatch(items[0], "exact", 0, items)
        name = normalise_title(text)
        items = self._items(name) or ()
        if items:
            return TitleMatch(items[0], "normalised", 0, items)
        if not name:
            return TitleMatch(-1, "none", -1, ())
        limit = min(self.max_edits, (len(name) - 1) // 3)
        if limit > 0:
            edits = self._table.edit_distances(name, limit)
            edits[self._numbers != _numbers(name)] = limit + 1
            best = int(edits.argmin())
            if edits[best] <= limit:
                items = self._items(self._names[best])
                return TitleMatch(items[0], "edit", int(edits[best]), items)
        if self.min_ratio is not None:
            names = [self._names[row] for row in np.flatnonzero(self._numbers == _numbers(name))]
            near = difflib.get_close_matches(name, names, n=1, cutoff=self.min_ratio)
            if near:
                items = self._items(near[0])
                return TitleMatch(items[0], "ratio", -1, items)
        return TitleMatch(-1, "none", -1, ())

    def match_lines(self, answer: str) -> tuple[list[int], list[str]]:
        """The items of an answer that lists one title per line (bullets, numbers and quotes are ignored).

        Returns:
            Distinct items in the order they are named, and the lines that name nothing in the catalogue.
        """
        items: list[int] = []
        unknown: list[str] = []
        for line in answer.splitlines():
            text = _BULLET.sub("", line).strip().strip(_QUOTES).strip()
            if not text:
                continue
            found = self.match(text)
            if found.item < 0:
                unknown.append(text)
            elif found.item not in items:
                items.append(found.item)
        return items, unknown

    def _items(self, name: str) -> tuple[int, ...]:
        return self._normalised.get(name) or self._without_year.get(name) or ()


def normalise_title(title: str, *, drop_year: bool = False) -> str:
    """Lower case, no accents or punctuation, single spaces, "Matrix, The" as "the matrix"; optionally no final year.

    Example:
        >>> normalise_title("Am\\u00e9lie, L\\u2019 (2001)"), normalise_title("Matrix, The (1999)", drop_year=True)
        ('amelie l 2001', 'the matrix')
    """
    text = unicodedata.normalize("NFKD", title).casefold()
    text = "".join(letter for letter in text if not unicodedata.combining(letter)).strip()
    year = _YEAR.search(text)
    if year:
        text = text[: year.start()]
    article = _ARTICLE.match(text)
    if article:
        text = f"{article[2]} {article[1]}"
    if year and not drop_year:
        text = f"{text} {year[0]}"
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text).split())


def _numbers(name: str) -> str:
    return " ".join(re.findall(r"\d+", name))


def _group(pairs: Iterable[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    groups: dict[str, list[int]] = {}
    for name, item in pairs:
        if name:
            groups.setdefault(name, []).append(item)
    return {name: tuple(items) for name, items in groups.items()}


class _CharacterTable:
    """Names as a table of characters (N, C), for edit distances to all of them at once."""

    def __init__(self, names: Sequence[str]):
        self._lengths = np.fromiter((len(name) for name in names), dtype=np.int64, count=len(names))
        self._letters = np.zeros((len(names), int(self._lengths.max(initial=0))), dtype=np.uint32)
        for row, name in enumerate(names):
            self._letters[row, : len(name)] = np.frombuffer(name.encode("utf-32-le"), dtype=np.uint32)

    def edit_distances(self, name: str, limit: int) -> np.ndarray:
        """Levenshtein distance to every name (N,), exact up to `limit` and `limit + 1` above it.

        Only cells within `limit` of the diagonal can matter, so each row of the usual table is a band.
        """
        far = limit + 1
        result = np.full(len(self._lengths), far, dtype=np.int64)
        close = np.flatnonzero(np.abs(self._lengths - len(name)) <= limit)
        if not close.size:
            return result
        lengths = self._lengths[close]
        # letters[:, j + limit] is character j of the name; 0 stands left and right of it and equals nothing
        letters = np.pad(
            self._letters[close], ((0, 0), (limit, 2 * limit + max(0, len(name) - self._letters.shape[1])))
        )
        band = np.arange(-limit, limit + 1)
        row = np.where(band >= 0, np.minimum(band, far), far)[None].repeat(len(close), axis=0)  # distance to ""
        for position, letter in enumerate(map(ord, name)):
            # cell d is column position + 1 + d of the table; its diagonal neighbour is cell d of the row before
            columns = position + 1 + band
            window = letters[:, position : position + 2 * limit + 1]
            new = np.minimum(row + (window != letter), np.pad(row[:, 1:], ((0, 0), (0, 1)), constant_values=far) + 1)
            new = np.where(columns > 0, new, np.where(columns == 0, position + 1, far))
            for cell in range(1, len(band)):
                np.minimum(new[:, cell], new[:, cell - 1] + 1, out=new[:, cell])
            row = np.minimum(new, far)
        result[close] = row[np.arange(len(close)), lengths - len(name) + limit]
        return result
