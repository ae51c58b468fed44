"""From the text of an answer to an order of the candidates: nothing that is not a candidate, and no candidate lost.

A line is read in this order: it is a title; it contains titles; it is a title written differently (case, article, year);
it shares a longest common subsequence of more than nine tenths with a title (LLMRank, arXiv 2305.08845). Repeated titles
count once. Beyond the authors' rule the line itself must consist mostly of that subsequence, and the numbers of both must
agree: otherwise "Here it is:" names the film "Heat", and "Toy Story 3" is taken for "Toy Story 2".

Only the candidates decide what is a match. What the right answer is plays no part (the released loop asks again when the
target is missing from an answer, which leaks the label).

Shape legend: C candidates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import RequestError
from ..title_matching import normalise_title
from .prompts import written_title

_NUMBER = re.compile(r"^\s*(?:[-*\u2022]+|\(?\d{1,3}[.):\]])\s+")
_EDGES = "\"'`*_\u201c\u201d\u2018\u2019\u00ab\u00bb,;. \t"
_ASIDE = re.compile(r"\s+[-\u2013\u2014]\s+|:\s+|\s+\(?because\b")
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)


@dataclass(frozen=True)
class ParsedRanking:
    """What an answer says.

    Attributes:
        order: places of the candidates that are named, best first, each once.
        unknown: lines that name none of them.
        repeats: mentions of candidates that were named already.
    """

    order: tuple[int, ...]
    unknown: tuple[str, ...]
    repeats: int = 0


class RankingParser:
    """Reads rankings of one list of candidates.

    Args:
        titles: C candidate titles as the prompt lists them. Of several with the same title each mention names the next.
        min_overlap: share of a title that a common subsequence must exceed, 0 to 1.

    Raises:
        RequestError: no titles, or a share out of range.

    Example:
        >>> RankingParser(["Heat", "Alien", "Up"]).parse("1. Alien\\n2. Aliens vs Heat\\n3. Alien")
        ParsedRanking(order=(1, 0), unknown=(), repeats=1)
    """

    def __init__(self, titles: Sequence[str], *, min_overlap: float = 0.9):
        if not len(titles):
            raise RequestError("there are no candidates to look for; give at least one title.")
        if not 0 < min_overlap <= 1:
            raise RequestError(f"min_overlap must be above 0 and at most 1, got {min_overlap!r}.")
        self.min_overlap = min_overlap
        self._places: dict[str, list[int]] = {}  # one name, the candidates that bear it
        names: dict[str, str] = {}  # every way to write a title -> its name
        loose: dict[str, set[str]] = {}
        for place, title in enumerate(titles):
            name = _clean(title)
            self._places.setdefault(name, []).append(place)
            for form in (name, _clean(written_title(title))):
                if form:
                    names.setdefault(form, name)
            for form in (normalise_title(title), normalise_title(title, drop_year=True)):
                if form:
                    loose.setdefault(form, set()).add(name)
        self._names = names
        self._loose = {form: next(iter(found)) for form, found in loose.items() if len(found) == 1}
        longest_first = sorted(names, key=lambda form: (-len(form), form))
        self._inside = re.compile("|".join(rf"(?<!\w){re.escape(form)}(?!\w)" for form in longest_first) or r"(?!)")

    def parse(self, answer: str) -> ParsedRanking:
        """The candidates an answer names, in its order. Reasoning between `<think>` marks is not read."""
        left = {name: list(places) for name, places in self._places.items()}
        order: list[int] = []
        unknown: list[str] = []
        repeats = 0
        for line in _THOUGHT.sub("", answer).splitlines():
            if not line.strip(_EDGES):
                continue
            found = self._read(line)
            if not found:
                unknown.append(line.strip())
            for name in found:
                if left[name]:
                    order.append(left[name].pop(0))
                else:
                    repeats += 1
        return ParsedRanking(tuple(order), tuple(unknown), repeats)

    def _read(self, line: str) -> list[str]:
        bare = _NUMBER.sub("", line)
        for text in dict.fromkeys((_clean(line), _clean(bare))):  # a title may begin with a number
            if text in self._names:
                return [self._names[text]]
        text = _clean(bare)
        found = [self._names[match[0]] for match in self._inside.finditer(text)]
        if found:
            return found
        head = _clean(_ASIDE.split(bare)[0])
        for part in dict.fromkeys((text, head)):
            name = self._loose.get(normalise_title(part)) or self._loose.get(normalise_title(part, drop_year=True))
            if name is not None and _numbers(name).issuperset(_numbers(part)):
                return [name]
            name = self._nearest(part)
            if name is not None:
                return [name]
        return []

    def _nearest(self, text: str) -> str | None:
        best: tuple[float, str] | None = None
        for form, name in self._names.items():
            common = common_subsequence(form, text)
            if common <= self.min_overlap * len(form) or common < 0.75 * len(text) or _numbers(form) != _numbers(text):
                continue
            share = 2 * common / (len(form) + len(text))
            if best is None or share > best[0]:
                best = (share, name)
        return None if best is None else best[1]


def common_subsequence(first: str, second: str) -> int:
    """Length of the longest common subsequence, one machine word operation per 30 characters of `first`.

    Example:
        >>> common_subsequence("terminator", "termintor")
        9
    """
    places: dict[str, int] = {}
    for place, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full  # a zero bit: the best so far grows at this place
    for letter in second:
        here = row & places.get(letter, 0)
        row = ((row + here) | (row - here)) & full
    return len(first) - row.bit_count()


def _clean(text: str) -> str:
    return " ".join(text.split()).strip(_EDGES).casefold()


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+", text))
