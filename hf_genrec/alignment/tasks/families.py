"""Task families filled from interactions: which wordings the data can feed, and one example per interaction.

Examples are made of the training rows alone. What an interaction lacks is never made up: a wording whose fields the data
does not have is left out, and a family without wordings too (with a log line).

Shape suffixes: n interactions of the training rows, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hf_genrec.data.columns import nearest_names
from hf_genrec.data.sequences import Sequences, ragged_positions
from hf_genrec.errors import TrainingError

from .fill import ITEM_FIELDS, Example, clipped, fill
from .templates import Template, wordings

LIKED = 0.8  # of the highest rating: 4 of 5 stars
# columns of an interaction log that hold what a field needs, in order of preference; others are named by the caller
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
        log: further columns of the log by their own names, as `columns`; `fed_by` makes fields of them.
        items: the item table whose further columns `fed_by` may read, or None.
    """

    train: Sequences
    item_ids: Sequence[str]
    titles: Sequence[str] | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    item_texts: dict[str, Sequence[str]] = field(default_factory=dict)
    log: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    items: Any = field(default=None, repr=False)

    @classmethod
    def from_split(cls, data: Any, split: Any) -> TaskData:
        """Of a `RecommendationData` and its `Split`; ratings and texts from `data.extra`."""
        starts = data.sequences.offsets[:-1]
        positions = ragged_positions(starts, split.train.lengths)  # training rows are the beginnings of the users' rows
        log, columns = {name: values[positions] for name, values in data.extra.items()}, {}
        for name, known in COLUMNS.items():
            found = next((column for column in known if column in log), None)
            if found is not None:
                columns[name] = log[found]
        titles = None if data.items is None else data.items.titles()
        return cls(split.train, data.item_ids, titles, columns, item_texts(data.items), log, data.items)

    def fed_by(self, named: Mapping[str, str]) -> TaskData:
        """The same data with fields read from the columns that the caller names.

        Args:
            named: field -> column: of the log for the fields of `COLUMNS`, of the item table for those of `ITEM_COLUMNS`;
                the log comes first where both have it.

        Raises:
            TrainingError: an unknown field, or a column that is not there or holds numbers instead of text, or the reverse.
        """
        columns, texts = dict(self.columns), dict(self.item_texts)
        for name, column in ((name, str(column)) for name, column in named.items()):
            if name not in COLUMNS and name not in ITEM_COLUMNS:
                fields = list(dict.fromkeys([*COLUMNS, *ITEM_COLUMNS]))
                raise TrainingError(f"no field {name!r} of task families: {_nearest(name, fields)}.")
            columns.pop(name, None)
            texts.pop(name, None)
            if name in COLUMNS and column in self.log:
                if (self.log[column].dtype.kind == "f") != (name == "rating"):
                    wanted = "numbers" if name == "rating" else "text"
                    raise TrainingError(
                        f"column {column!r} of the log cannot be the {name}: it does not hold {wanted}."
                    )
                columns[name] = self.log[column]
            elif name in ITEM_COLUMNS and self.items is not None and column in self.items.columns:
                texts[name] = _item_field(self.items, name, column)
            else:
                found = [*(self.log if name in COLUMNS else ())]
                found += self.items.columns if name in ITEM_COLUMNS and self.items is not None else ()
                raise TrainingError(
                    f"no column {column!r} to take the {name} from: {_nearest(column, found)}. Columns of the log are read "
                    "where data.extra_columns lists them (extra_columns= of load_data)."
                )
        return replace(self, columns=columns, item_texts=texts)

    def fields(self) -> set[str]:
        """Fields of wordings that this data can fill."""
        always = {"user", "history", "item", "candidates", "answer"}
        titled = {"title"} if self.titled().any() else set()
        return always | titled | set(self.columns)

    def titled(self) -> np.ndarray:
        """(N,) boolean: does the item have a title?"""
        return filled(self.titles, len(self.item_ids))

    def has(self, name: str) -> np.ndarray:
        """(n,) boolean: does the interaction have this field?"""
        if name == "title":
            return self.titled()[self.train.items]
        if name not in self.columns:
            return np.ones(len(self.train.items), bool)
        values = self.columns[name]
        return ~np.isnan(values) if values.dtype.kind == "f" else filled(values, len(values))


def filled(texts: Any, count: int) -> np.ndarray:
    """(count,) boolean: is there a text that is not blank? None = no texts."""
    if texts is None:
        return np.zeros(count, bool)
    return np.array([bool(str(text).strip()) for text in texts], bool)


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
        values = _item_field(items, name, found)
        if any(values):
            texts[name] = values
    return texts


def _item_field(items: Any, name: str, column: str) -> list[str]:
    values = items.texts([column])
    if name != "genres":
        return values
    values = ["" if value == "(no genres listed)" else value for value in values]  # MovieLens' way to say none
    parted = [[part.strip() for part in value.replace("|", ",").split(",")] for value in values]
    words = {word for value in values for word in value.split()}
    if all(len(parts) == 1 for parts in parted) and len(words) < len(set(values)):
        parted = [value.split() for value in values]
    return [", ".join(part for part in parts if part) for parts in parted]


def _nearest(name: str, found: Sequence[str]) -> str:
    near = nearest_names(name, found)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, found)) or 'none'}"


def usable(family: str, data: TaskData, *, held_out: bool = False) -> list[Template]:
    """The wordings of a family that the data can fill."""
    known = data.fields()
    return [template for template in wordings(family, held_out=held_out) if needs(template) <= known]


def needs(template: Template) -> set[str]:
    """Fields that the data must have for this wording."""
    return template.fields() | _NEEDS.get(template.kind, set())


class FamilyExamples:
    """Examples of one family (not of "sequential" windows, see `mixture.py`): one interaction, one wording, one question.

    Args:
        family: its name.
        data: training rows.
        held_out: use the wordings kept out of training.
        max_items: newest items shown as history.
        max_text: most characters shown of a text, cut at a blank; None = all.

    Raises:
        TrainingError: nothing in the data feeds this family.
    """

    def __init__(
        self,
        family: str,
        data: TaskData,
        *,
        held_out: bool = False,
        max_items: int = 10,
        max_text: int | None = None,
    ) -> None:
        self.family, self.data, self.max_items, self.max_text = family, data, max_items, max_text
        self.titled = np.flatnonzero(data.titled())
        self.titles = list(data.titles) if data.titles is not None else [""] * len(data.item_ids)
        self.row_of = data.train.row_index()
        ratings = data.columns.get("rating")
        self.stars = np.unique(ratings[~np.isnan(ratings)]) if ratings is not None else np.zeros(0)
        self.choices: list[tuple[Template, np.ndarray]] = []
        inner = np.ones(len(data.train.items), bool)
        inner[data.train.offsets[:-1][data.train.lengths > 0]] = False
        for template in usable(family, data, held_out=held_out):
            fed = np.ones(len(data.train.items), bool)
            for name in needs(template):
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

    def longest(self) -> list[Example]:
        """Of each wording the example with the longest texts: what does not fit is found before training."""
        columns = {name: values for name, values in self.data.columns.items() if values.dtype.kind != "f"}
        found = []
        for template, positions in self.choices:
            texts = [columns[name][positions] for name in sorted(template.fields() & set(columns))]
            if "title" in template.fields():
                texts.append([self.titles[item] for item in self.data.train.items[positions].tolist()])
            size_n = np.sum([[len(text) for text in one] for one in texts], axis=0) if texts else np.zeros(1)
            found.append(self.example(template, int(positions[np.argmax(size_n)]), np.random.default_rng(0)))
        return found

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
            "title": None if data.titles is None else self.titles[item],
        }
        for name, column in data.columns.items():
            values[name] = float(column[position]) if column.dtype.kind == "f" else column[position]
        asked = _QUESTIONS.get(template.kind)
        if asked is not None:
            asked(self, values, row, item, generator)
        for name in template.fields() - set(ITEM_FIELDS):
            if self.max_text is not None and isinstance(values.get(name), str):
                values[name] = clipped(values[name], self.max_text)
        where = f"task family {self.family!r}, item {data.item_ids[item]!r} of training row {row}, {template.name}"
        return fill(template, values, where)

    def unseen(self, row: int, count: int, generator: np.random.Generator, *, titled: bool = False) -> list[int]:
        """Different items that the user has not had, fewer where there are not so many.

        Args:
            titled: only items with a title, and none under a title that the user has had.
        """
        seen = set(self.data.train[row].tolist())
        had = {self.titles[item] for item in seen} if titled else set()
        drawn = generator.integers(len(self.titled if titled else self.titles), size=8 * count + 32)
        found: dict[int, None] = {}
        for item in (self.titled[drawn] if titled else drawn).tolist():
            if item not in seen and self.titles[item] not in had and len(found) < count:
                found[item] = None
        return list(found)


def _yes_no(examples: FamilyExamples, values: dict[str, Any], row: int, item: int, generator: Any) -> None:
    """The item of the interaction (yes), or one that the user has not had (no)."""
    other = examples.unseen(row, 1, generator) if generator.random() < 0.5 else []
    if other:
        values["item"] = examples.data.item_ids[other[0]]
    values["answer"] = "no" if other else "yes"


def _yes_no_title(examples: FamilyExamples, values: dict[str, Any], row: int, item: int, generator: Any) -> None:
    """The same of titles: items without one are not asked about."""
    other = examples.unseen(row, 1, generator, titled=True) if generator.random() < 0.5 else []
    if other:
        values["title"] = examples.titles[other[0]]
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
    values["answer"] = "like" if values["rating"] >= LIKED * examples.stars.max() else "dislike"


_QUESTIONS: dict[str, Callable[..., None]] = {
    "yes_no": _yes_no,
    "yes_no_title": _yes_no_title,
    "choose": _choose,
    "stars_yes_no": _stars_yes_no,
    "like": _like,
}
