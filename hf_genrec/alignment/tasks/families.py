"""Task families filled from interactions: which wordings the data can feed, and one example per interaction.

Examples are made of the training rows alone. What an interaction lacks is never made up: a wording whose fields the data
does not have is left out, and a family without wordings too (with a log line).

Shape suffixes: n interactions of the training rows, N items.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_genrec.data.sequences import Sequences, ragged_positions
from hf_genrec.errors import TrainingError

from .fill import Example, fill
from .templates import FAMILIES, Template, wordings

logger = logging.getLogger(__name__)

# columns of an interaction log that hold what a field needs, in order of preference
COLUMNS: dict[str, tuple[str, ...]] = {
    "rating": ("rating", "stars", "overall"),
    "review": ("review", "review_text", "reviewText"),
    "headline": ("headline", "summary"),
    "explanation": ("explanation",),
    "feature": ("feature",),
    "intention": ("query", "intention"),
    "preference": ("preference", "user_preference"),
}
# the same of an item table, for language models (language_families.py)
ITEM_COLUMNS: dict[str, tuple[str, ...]] = {
    "description": ("description", "plot", "overview", "abstract", "summary"),
    "genres": ("genres", "genre", "categories", "category", "tags"),
    "intention": ("query", "intention"),
}
_NEEDS = {"stars_yes_no": {"rating"}, "like": {"rating"}}  # fields a kind needs beyond those its wording shows
NUM_CANDIDATES = 10  # our choice; the paper ranks among 100


@dataclass(frozen=True)
class TaskData:
    """Training rows and what is known about their interactions and items.

    Args:
        train: one row per user.
        item_ids: N ids.
        titles: N titles ("" = none), or None.
        columns: field -> n values aligned to `train.items`: float64 (NaN = none) or text ("" = none).
        item_texts: field -> N texts ("" = none) of the item table: description, genres (", " between them), intention.
    """

    train: Sequences
    item_ids: Sequence[str]
    titles: Sequence[str] | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    item_texts: dict[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def from_split(cls, data: Any, split: Any) -> TaskData:
        """Of a `RecommendationData` and its `Split`; ratings and texts from `data.extra`."""
        starts = data.sequences.offsets[:-1]
        positions = ragged_positions(starts, split.train.lengths)  # training rows are the beginnings of the users' rows
        columns = {}
        for name, known in COLUMNS.items():
            found = next((column for column in known if column in data.extra), None)
            if found is not None:
                columns[name] = data.extra[found][positions]
        titles = None if data.items is None else data.items.titles()
        return cls(split.train, data.item_ids, titles, columns, item_texts(data.items))

    def fields(self) -> set[str]:
        """Fields of wordings that this data can fill."""
        always = {"user", "history", "item", "candidates", "answer"}
        titled = {"title"} if self.titles is not None and any(self.titles) else set()
        return always | titled | set(self.columns)

    def has(self, name: str) -> np.ndarray:
        """(n,) boolean: does the interaction have this field?"""
        if name == "title" and self.titles is not None:
            return np.array([bool(title) for title in self.titles])[self.train.items]
        if name not in self.columns:
            return np.ones(len(self.train.items), bool)
        values = self.columns[name]
        return ~np.isnan(values) if values.dtype.kind == "f" else values != ""


def item_texts(items: Any) -> dict[str, Sequence[str]]:
    """Texts that an item table (or None) has beside the titles, by field.

    Groups of an item are brought to one form, ", " between them: lists and texts with "|" or commas are cut there; texts of
    several words without any (MovieLens: "Action Comedy") are cut at blanks where the same words come back in different
    rows, so that there are fewer words than texts.
    """
    texts: dict[str, Sequence[str]] = {}
    for name, known in ITEM_COLUMNS.items():
        found = None if items is None else next((column for column in known if column in items.columns), None)
        if found is None:
            continue
        values = items.texts([found])
        if name == "genres":
            values = ["" if value == "(no genres listed)" else value for value in values]  # MovieLens' way to say none
            parted = [[part.strip() for part in value.replace("|", ",").split(",")] for value in values]
            words = {word for value in values for word in value.split()}
            if all(len(parts) == 1 for parts in parted) and len(words) < len(set(values)):
                parted = [value.split() for value in values]
            values = [", ".join(part for part in parts if part) for parts in parted]
        if any(values):
            texts[name] = values
    return texts


def usable(family: str, data: TaskData, *, held_out: bool = False) -> list[Template]:
    """The wordings of a family that the data can fill."""
    known = data.fields()
    return [
        template
        for template in wordings(family, held_out=held_out)
        if template.fields() | _NEEDS.get(template.kind, set()) <= known
    ]


def usable_families(names: Sequence[str], data: TaskData) -> list[str]:
    """Of the families asked for, those that the data can feed; the others are named in the log.

    Raises:
        TrainingError: an unknown family, or none is left.
    """
    for name in names:
        if name not in FAMILIES:
            raise TrainingError(f"unknown task family {name!r}: choose of {', '.join(FAMILIES)}.")
    kept = [name for name in names if usable(name, data)]
    for name in names:
        if name not in kept:
            wanted = sorted(
                set.union(*(t.fields() | _NEEDS.get(t.kind, set()) for t in wordings(name))) - data.fields()
            )
            logger.warning("task family %r is left out: this data has no %s", name, " and no ".join(wanted))
    if not kept:
        raise TrainingError(f"none of the task families {', '.join(names)} can be fed by this data: add its columns.")
    return kept


class FamilyExamples:
    """Examples of one family (not of "sequential" windows, see `mixture.py`): one interaction, one wording, one question.

    Args:
        family: its name.
        data: training rows.
        held_out: use the wordings kept out of training.
        max_items: newest items shown as history.

    Raises:
        TrainingError: nothing in the data feeds this family.
    """

    def __init__(self, family: str, data: TaskData, *, held_out: bool = False, max_items: int = 10) -> None:
        self.family, self.data, self.max_items = family, data, max_items
        self.row_of = data.train.row_index()
        ratings = data.columns.get("rating")
        self.stars = np.unique(ratings[~np.isnan(ratings)]) if ratings is not None else np.zeros(0)
        self.choices: list[tuple[Template, np.ndarray]] = []
        inner = np.ones(len(data.train.items), bool)
        inner[data.train.offsets[:-1][data.train.lengths > 0]] = False
        for template in usable(family, data, held_out=held_out):
            fed = np.ones(len(data.train.items), bool)
            for name in template.fields() | _NEEDS.get(template.kind, set()):
                fed &= inner if name == "history" else data.has(name)
            if fed.any():
                self.choices.append((template, np.flatnonzero(fed)))
        if not self.choices:
            raise TrainingError(f"task family {family!r}: no interaction of this data has what its wordings need.")

    def __len__(self) -> int:
        """Interactions that at least one wording can use."""
        return max(len(positions) for _, positions in self.choices)

    def draw(self, generator: np.random.Generator) -> Example:
        """An example of a random interaction in a random wording."""
        template, positions = self.choices[generator.integers(len(self.choices))]
        return self.example(template, int(positions[generator.integers(len(positions))]), generator)

    def example(self, template: Template, position: int, generator: np.random.Generator) -> Example:
        """The example of one interaction (its flat position in the training rows) in one wording."""
        data = self.data
        row, item = int(self.row_of[position]), int(data.train.items[position])
        begin = int(data.train.offsets[row])
        history = data.train.items[max(begin, position - self.max_items) : position]
        values: dict[str, Any] = {
            "user": f"user_{row + 1}",
            "history": [data.item_ids[int(i)] for i in history],
            "item": data.item_ids[item],
            "title": None if data.titles is None else data.titles[item],
        }
        for name, column in data.columns.items():
            values[name] = float(column[position]) if column.dtype.kind == "f" else column[position]
        asked = _QUESTIONS.get(template.kind)
        if asked is not None:
            asked(self, values, row, item, generator)
        return fill(template, values)

    def unseen(self, row: int, count: int, generator: np.random.Generator) -> list[int]:
        """Different items that the user has not had, fewer where there are not so many."""
        seen = set(self.data.train[row].tolist())
        found: dict[int, None] = {}
        for item in generator.integers(len(self.data.item_ids), size=8 * count + 32).tolist():
            if item not in seen and len(found) < count:
                found[item] = None
        return list(found)


def _yes_no(examples: FamilyExamples, values: dict[str, Any], row: int, item: int, generator: Any) -> None:
    """The item of the interaction (yes), or one that the user has not had (no)."""
    other = examples.unseen(row, 1, generator) if generator.random() < 0.5 else []
    if other:
        values["item"] = examples.data.item_ids[other[0]]
        if examples.data.titles is not None:
            values["title"] = examples.data.titles[other[0]]
    values["answer"] = "no" if other else "yes"


def _choose(examples: FamilyExamples, values: dict[str, Any], row: int, item: int, generator: Any) -> None:
    """The item of the interaction among others, in an order drawn for this example alone."""
    candidates = [item, *examples.unseen(row, NUM_CANDIDATES - 1, generator)]
    values["candidates"] = [examples.data.item_ids[i] for i in generator.permutation(candidates).tolist()]


def _stars_yes_no(examples: FamilyExamples, values: dict[str, Any], row: int, item: int, generator: Any) -> None:
    """The rating that was given (yes), or another one of the scale (no)."""
    others = examples.stars[examples.stars != values["rating"]]
    wrong = len(others) > 0 and generator.random() < 0.5
    if wrong:
        values["rating"] = float(others[generator.integers(len(others))])
    values["answer"] = "no" if wrong else "yes"


def _like(examples: FamilyExamples, values: dict[str, Any], row: int, item: int, generator: Any) -> None:
    """At least four fifths of the highest rating is a like: 4 of 5 stars, as in the paper's code."""
    values["answer"] = "like" if values["rating"] >= 0.8 * examples.stars.max() else "dislike"


_QUESTIONS: dict[str, Callable[..., None]] = {
    "yes_no": _yes_no,
    "yes_no_title": _yes_no,
    "choose": _choose,
    "stars_yes_no": _stars_yes_no,
    "like": _like,
}
