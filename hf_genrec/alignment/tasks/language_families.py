"""Task families for language models filled from interactions and item texts: one conversation per interaction or item.

History, ratings and wishes come from the training rows alone; titles and descriptions belong to the catalogue, so the two
families that tie an item's tokens to its texts cover all items that have some. What the data lacks is never made up: a
wording whose fields cannot be filled is left out, and a family without wordings too (with a log line). Two fields have
declared stand-ins, named in the log, where no column holds them (a family may name its own, `requested.family_weights`): an
item's own description or groups for what somebody looks for, the most frequent groups of a history for what somebody likes.

Shape suffixes: n interactions of the training rows, N items, U units (interactions or items) of a family, W wordings.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from hf_genrec.errors import IncompatibleComponentsError, TrainingError

from .families import LIKED, TaskData, filled
from .fill import Example, clipped
from .language_rows import Conversation, History, Segment
from .requested import check_family
from .templates_language import LANGUAGE_FAMILIES, Wording, language_wordings

logger = logging.getLogger(__name__)

ITEM_FAMILIES = ("item_to_index", "index_to_item")  # asked about items, the others about interactions
TOKEN_FIELDS = {"history", "item", "next"}  # need item tokens in the vocabulary
MAX_TITLE, MAX_DESCRIPTION = 150, 400  # characters, cut at a blank: our choice, LlamaRec cuts titles at 32 tokens
NUM_CANDIDATES = 20  # as in LLaRA, S-DPO and LlamaRec


def language_fields(data: TaskData, *, items: bool = True) -> set[str]:
    """Fields of wordings that this data can fill; `items`: does the tokenizer carry the catalogue?"""
    known = {"answer"} | (TOKEN_FIELDS if items else set())
    if data.titles is not None and any(data.titles):
        known |= {"title", "next_title", "titles", "candidates", "lettered", "letter"}
        if "rating" in data.columns:
            known |= {"liked", "disliked"}
    known |= {"description", "genres"} & set(data.item_texts)
    known |= {field for field in ("intention", "preference") if _source(data, field)}
    return known


def _source(data: TaskData, field: str) -> str | None:
    """Where texts of somebody's wish or taste come from: "column", "item", or the name of the stand-in."""
    if field in data.columns and data.columns[field].dtype.kind != "f":
        return "column"
    if field in data.item_texts:
        return "item"
    stand_ins = ("description", "genres") if field == "intention" else ("genres",)
    return next((name for name in stand_ins if name in data.item_texts), None)


def usable_wordings(
    family: str, data: TaskData, kind: str | None = None, *, held_out: bool = False, items: bool = True
) -> list[Wording]:
    """The wordings of a family that the data can feed.

    Where the log has ratings, yes and no are about liking; without, about taking an item or not.
    """
    known = language_fields(data, items=items)
    wordings = [w for w in language_wordings(family, kind, held_out=held_out) if w.fields() <= known]
    return [w for w in wordings if w.kind != "taken" or "rating" not in data.columns]


@dataclass
class Case:
    """One question: an item, what came before it, and what is drawn for it."""

    item: int
    history: np.ndarray
    position: int  # in the training rows, -1 for none (an item)
    row: int
    generator: np.random.Generator
    owned: Callable[[], set[int]]  # title numbers of the user's items
    listed: list[int] | None = None  # candidates in the order in which they are shown
    answer: str = ""


class LanguageFamily:
    """Conversations of one family.

    Args:
        family: its name, or "family:kind" for one kind of question alone ("fused_history:titles_to_title").
        data: training rows and texts.
        held_out: use the wordings kept out of training.
        max_history: newest items shown as history.
        num_candidates: titles in a list; fewer where there are not so many. Letters go to 26.
        max_title, max_description: characters shown of texts, cut at a blank.
        items: fill item tokens in (False: for a tokenizer without catalogue, questions about titles alone).

    Attributes:
        units: (U,) positions in the training rows, or items, that at least one wording can use.
        fed: (W, U) boolean: can wording w use unit u?

    Raises:
        TrainingError: an unknown family or kind, or nothing in the data feeds the family.
        IncompatibleComponentsError: more candidates than letters.
    """

    def __init__(
        self,
        family: str,
        data: TaskData,
        *,
        held_out: bool = False,
        max_history: int = 20,
        num_candidates: int = NUM_CANDIDATES,
        max_title: int = MAX_TITLE,
        max_description: int = MAX_DESCRIPTION,
        items: bool = True,
    ) -> None:
        self.name, self.data, self.max_history, self.num_candidates = (
            family,
            data,
            int(max_history),
            int(num_candidates),
        )
        self.max_description = int(max_description)
        name, _, kind = family.partition(":")
        check_family(family, LANGUAGE_FAMILIES)
        if name == "candidate_letters" and not 2 <= num_candidates <= 26:
            raise IncompatibleComponentsError(
                f"task family {family!r}: num_candidates is {num_candidates}: letters allow 2 to 26"
            )
        self.wordings = usable_wordings(name, data, kind or None, held_out=held_out, items=items)
        self.about_items = name in ITEM_FAMILIES
        train, count = data.train, len(data.item_ids)
        self.titled_N = filled(data.titles, count)
        self.titled = np.flatnonzero(self.titled_N)
        self.titles = [clipped(title, max_title) for title in data.titles] if data.titles is not None else [""] * count
        numbers: dict[str, int] = {}
        self.title_number_N = np.array([numbers.setdefault(title, len(numbers)) for title in self.titles], np.int64)
        self.row_of = train.row_index()
        self.begin = train.offsets[:-1][self.row_of]
        ratings = data.columns.get("rating")
        self.likes_at = None if ratings is None or np.isnan(ratings).all() else LIKED * np.nanmax(ratings)
        number = count if self.about_items else len(train.items)
        fed = np.stack([self._fed(w, number) for w in self.wordings]) if self.wordings else np.zeros((0, number), bool)
        self.units = np.flatnonzero(fed.any(axis=0))
        self.fed = fed[:, self.units]
        if not len(self.units):
            missing = sorted(
                set().union(*(w.fields() for w in language_wordings(name, kind or None)))
                - language_fields(data, items=items)
            )
            what = (
                f"this data has no {', no '.join(missing)}" if missing else "no interaction has what its wordings need"
            )
            raise TrainingError(f"task family {family!r}: {what}.")
        for field in ("intention", "preference"):
            source = _source(data, field)
            if source not in (None, "column", "item") and any(field in w.fields() for w in self.wordings):
                logger.info(
                    "task family %r: no column of the data holds %ss, %s stand in", family, field, _STAND_IN[source]
                )

    def __len__(self) -> int:
        return len(self.units)

    def history_length(self, index: int) -> int:
        """Items before unit `index`, at most `max_history`; 0 for families about items."""
        if self.about_items:
            return 0
        position = self.units[index]
        return int(min(position - self.begin[position], self.max_history))

    def example(self, index: int, generator: np.random.Generator, wording: Wording | None = None) -> Conversation:
        """Unit `index` in a wording drawn from the generator (or the given one)."""
        if wording is None:
            fitting = np.flatnonzero(self.fed[:, index])
            wording = self.wordings[fitting[generator.integers(len(fitting))]]
        return self._conversation(wording, self._case(int(self.units[index]), generator))

    def describe(self, index: int) -> str:
        """Names unit `index` in errors."""
        unit = int(self.units[index])
        if self.about_items:
            return f"task family {self.name!r}, item {self.data.item_ids[unit]!r}"
        item = self.data.item_ids[int(self.data.train.items[unit])]
        return f"task family {self.name!r}, item {item!r} of training row {int(self.row_of[unit])}"

    # ------------------------------------------------------------------------------------------ what can be asked

    def _fed(self, wording: Wording, number: int) -> np.ndarray:
        """(n,) or (N,): can the wording be filled for this interaction or item?"""
        fed = np.ones(number, bool)
        item_of = np.arange(number) if self.about_items else self.data.train.items
        for field in wording.fields():
            fed &= self._has(field, wording.kind, item_of)
        return fed

    def _has(self, field: str, kind: str, item_of: np.ndarray) -> np.ndarray:
        data, count, everywhere = self.data, len(self.data.item_ids), np.ones(len(item_of), bool)
        if field in ("title", "candidates", "lettered", "letter"):
            return self.titled_N[item_of]
        if field in data.item_texts and field != "intention":
            return filled(data.item_texts[field], count)[item_of]
        if field == "intention":
            source = _source(data, field)
            if source == "column":
                return filled(data.columns[field], len(item_of))
            return filled(data.item_texts["intention" if source == "item" else source or ""], count)[item_of]
        if field == "preference" and _source(data, field) == "column":
            return filled(data.columns[field], len(item_of))
        if field == "preference":  # of the history
            return self._before(filled(data.item_texts["genres"], count)[item_of])
        if field == "history":
            return self._before(everywhere)
        if field == "titles":
            return self._before(self.titled_N[item_of])
        if field in ("liked", "disliked"):
            return self._before(self.titled_N[item_of] & ~np.isnan(data.columns["rating"]))
        if field == "answer" and kind == "rated":
            return ~np.isnan(data.columns["rating"])
        if field in ("next", "next_title"):
            follows = np.append(self.row_of[1:] == self.row_of[:-1], False)
            fine = np.append(self.titled_N[item_of[1:]], False) if field == "next_title" else everywhere
            return follows & fine
        return everywhere

    def _before(self, flags: np.ndarray) -> np.ndarray:
        """(n,): is one of the newest `max_history` interactions before this one flagged?"""
        counts = np.append(0, np.cumsum(flags))
        here = np.arange(len(flags))
        return counts[here] > counts[np.maximum(self.begin, here - self.max_history)]

    # ------------------------------------------------------------------------------------------ filling in

    def _case(self, unit: int, generator: np.random.Generator) -> Case:
        train = self.data.train
        if self.about_items:
            return Case(unit, np.zeros(0, np.int32), -1, -1, generator, set)
        row = int(self.row_of[unit])
        history = train.items[max(int(self.begin[unit]), unit - self.max_history) : unit]
        return Case(int(train.items[unit]), history, unit, row, generator, lambda: self._owned(row))

    def _conversation(self, wording: Wording, case: Case) -> Conversation:
        if wording.kind in ("rated", "taken"):
            self._judge(wording.kind, case)
        turns = []
        for source, target in _parts(wording):
            question: list[Segment] = []
            answer: list[Segment] = []
            for parts, segments in ((source, question), (target, answer)):
                for part in parts:
                    segments += [("template", part)] if isinstance(part, str) else _FILLERS[part[0]](self, case)
            turns.append((question, answer))
        return Conversation(tuple(turns), wording.name)

    def _owned(self, row: int) -> set[int]:
        """Title numbers of everything that the user of a training row has."""
        return set(self.title_number_N[self.data.train[row]].tolist())

    def _judge(self, kind: str, case: Case) -> None:
        """Answer and, for about every second question of taking, another item that was not taken."""
        if kind == "rated":
            case.answer = "Yes." if self.data.columns["rating"][case.position] >= self.likes_at else "No."
            return
        other = self._others(case, 1) if case.generator.random() < 0.5 else []
        case.answer = "No." if other else "Yes."
        case.item = other[0] if other else case.item

    def _others(self, case: Case, count: int) -> list[int]:
        """Items that the user has not had, under no title that he has had, and no two with the same title."""
        taken, found = set(case.owned()), []
        drawn = self.titled[case.generator.integers(len(self.titled), size=8 * count + 32)]
        for item, number in zip(drawn.tolist(), self.title_number_N[drawn].tolist()):
            if number not in taken:
                taken.add(number)
                found.append(item)
                if len(found) == count:
                    break
        return found

    def _listed(self, case: Case) -> list[int]:
        if case.listed is None:
            shown = [case.item, *self._others(case, self.num_candidates - 1)]
            case.listed = case.generator.permutation(shown).tolist()
        return case.listed

    def _titles(self, history: Sequence[int], flags: np.ndarray | None = None) -> list[Segment]:
        entries = tuple(
            (time, (("template", '"'), ("text", self.titles[item]), ("template", '"')))
            for time, item in enumerate(history)
            if self.titled_N[item] and (flags is None or flags[time])
        )
        return [("history", History(entries, ", "))] if entries else [("template", "nothing")]

    def _rated(self, case: Case, liked: bool) -> list[Segment]:
        ratings = self.data.columns["rating"][case.position - len(case.history) : case.position]
        flags = ratings >= self.likes_at if liked else ratings < self.likes_at  # both False where there is none
        return self._titles(case.history.tolist(), flags)

    def _wish(self, item: int, position: int) -> str:
        source = _source(self.data, "intention")
        if source == "column":
            return str(self.data.columns["intention"][position]).strip()
        return self.data.item_texts["intention" if source == "item" else source or ""][item]

    def _taste(self, history: np.ndarray, position: int) -> str:
        if _source(self.data, "preference") == "column":
            return str(self.data.columns["preference"][position]).strip()
        groups = self.data.item_texts["genres"]
        counts = Counter(group for item in history.tolist() for group in groups[item].split(", ") if group)
        return ", ".join(group for group, _ in counts.most_common(3))

    def _following(self, case: Case) -> int:
        return int(self.data.train.items[case.position + 1])

    def _candidates(self, case: Case, letters: bool) -> list[Segment]:
        segments: list[Segment] = []
        for place, item in enumerate(self._listed(case)):
            label = f"({chr(65 + place)})" if letters else f"{place + 1}."
            segments += [("template", f"{chr(10) if place else ''}{label} "), ("text", self.titles[item])]
        return segments

    def _ids(self, items: Sequence[int]) -> list[str]:
        return [self.data.item_ids[item] for item in items]


@cache
def _parts(wording: Wording) -> tuple:
    """Source and target of every turn, cut at their fields."""
    return tuple((turn.parts("source"), turn.parts("target")) for turn in wording.turns)


_STAND_IN = {"description": "descriptions of items", "genres": "groups of items"}
_FILLERS: dict[str, Callable[[LanguageFamily, Case], list[Segment]]] = {
    "history": lambda f, c: [
        (
            "history",
            History(tuple((time, (("items", (name,)),)) for time, name in enumerate(f._ids(c.history.tolist())))),
        )
    ],
    "item": lambda f, c: [("items", f._ids([c.item]))],
    "next": lambda f, c: [("items", f._ids([f._following(c)]))],
    "title": lambda f, c: [("text", f.titles[c.item])],
    "next_title": lambda f, c: [("text", f.titles[f._following(c)])],
    "description": lambda f, c: [("text", clipped(f.data.item_texts["description"][c.item], f.max_description))],
    "genres": lambda f, c: [("text", f.data.item_texts["genres"][c.item])],
    "titles": lambda f, c: f._titles(c.history.tolist()),
    "liked": lambda f, c: f._rated(c, True),
    "disliked": lambda f, c: f._rated(c, False),
    "intention": lambda f, c: [("text", clipped(f._wish(c.item, c.position), f.max_description))],
    "preference": lambda f, c: [("text", clipped(f._taste(c.history, c.position), f.max_description))],
    "candidates": lambda f, c: f._candidates(c, False),
    "lettered": lambda f, c: f._candidates(c, True),
    "letter": lambda f, c: [("template", chr(65 + f._listed(c).index(c.item)))],
    "answer": lambda f, c: [("template", c.answer)],
}


def p5_conversation(example: Example) -> Conversation:
    """An example of P5's families whose history may lose its oldest items."""
    question: list[Segment] = list(example.source)
    if example.history is not None:
        entries = tuple((time, (("items", (item_id,)),)) for time, item_id in enumerate(question[example.history][1]))
        question[example.history] = ("history", History(entries))
    return Conversation(((question, example.target),), example.template)
