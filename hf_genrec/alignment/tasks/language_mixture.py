"""LanguageMixtureDataset: task families for a causal language model in one training set, drawn anew for every epoch.

The mixture of LC-Rec (arXiv 2311.09049): every row is one conversation of one family in a wording drawn for this epoch. A row
is a pure function of (seed, epoch, index), so training resumes anywhere and workers need no state. The families of P5
(arXiv 2203.13366) take part under their own names.

Next-item training may pack a whole window of a history into a row (`windows=True`): a causal model then learns every
position at once, with about as many targets per row as the window has items. In such rows the items follow the question
without anything between; `serving_texts` gives the texts that make inference do the same.

Relations: `mixture.TaskMixtureDataset` is the same for encoder-decoders.

Shape suffixes: N items.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from hf_genrec.data.collators import WindowDataset
from hf_genrec.errors import TrainingError, UnknownItemError

from .families import FamilyExamples, TaskData, usable
from .fill import Example, clipped
from .language_families import (
    MAX_DESCRIPTION,
    MAX_TITLE,
    NUM_CANDIDATES,
    LanguageFamily,
    language_fields,
    p5_conversation,
    usable_wordings,
)
from .language_rows import LanguageEncoder, LanguageRow, Segment
from .mixture import mixture_counts
from .requested import check_family, family_weights, lacking, with_reasons
from .templates import FAMILIES
from .templates_language import SERVING_WORDING, Wording, language_wordings

logger = logging.getLogger(__name__)

_WORDING_TOKENS = 16  # about, where only the length of a window matters


class RowFamily(Protocol):
    """A family as the mixture sees it."""

    def __len__(self) -> int: ...

    def row(self, index: int, generator: np.random.Generator) -> LanguageRow:
        """The row of unit `index`, what is drawn for it drawn from the generator."""

    def length(self, index: int) -> int:
        """About how many tokens it has."""

    def set_epoch(self, epoch: int) -> None: ...


class ConversationRows:
    """Rows of a `LanguageFamily`.

    Raises:
        TrainingError: the rows of its longest texts cannot be cut to `max_length`. Lists of candidates are drawn anew for
            every row; a longer one met later raises the same error.
    """

    def __init__(self, family: LanguageFamily, encoder: LanguageEncoder) -> None:
        self.family, self.encoder = family, encoder
        self.fixed, self.per_item = _sizes(family, encoder)
        for index in _largest(family):  # what cannot fit is said now, not in the middle of training
            self.row(index, np.random.default_rng(index))

    def __len__(self) -> int:
        return len(self.family)

    def row(self, index: int, generator: np.random.Generator) -> LanguageRow:
        return self.encoder(self.family.example(index, generator), self.family.describe(index))

    def length(self, index: int) -> int:
        return round(self.fixed + self.per_item * self.family.history_length(index))

    def set_epoch(self, epoch: int) -> None:
        """Wordings are drawn with the mixture's generator, which knows the epoch."""


def _largest(family: LanguageFamily, count: int = 8) -> list[int]:
    """The units with the longest texts of their own, and as many others."""
    data = family.data
    size_N = np.zeros(len(data.item_ids), np.int64)
    for texts in (family.titles, *data.item_texts.values()):
        size_N += np.minimum([len(text) for text in texts], family.max_description)
    items = family.units if family.about_items else data.train.items[family.units]
    order = np.argsort(-size_N[items], kind="stable")
    return sorted({*order[:count].tolist(), *order[:: max(1, len(order) // count)].tolist()})


def _sizes(family: LanguageFamily, encoder: LanguageEncoder) -> tuple[float, float]:
    """About how many tokens a row has beside its history and per item of it, the mean over the family's wordings."""
    levels = encoder.tokenizer.num_levels if encoder.carries_items else 0
    data = family.data
    sizes = {"item": levels, "next": levels, "letter": 1, "answer": 2, "preference": 8, "intention": 16}
    for name, texts in {"title": family.titles, **data.item_texts}.items():
        shown = [clipped(text, family.max_description) for text in texts[:: max(1, len(texts) // 64)]]
        sizes[name] = round(np.mean([len(encoder.encode([("text", text)])) for text in shown] or [0]))
    title = sizes.get("title", 0)
    listed = family.num_candidates * (title + 3)
    sizes |= {"next_title": title, "candidates": listed, "lettered": listed}
    fixed, per_item = [], []
    for wording in family.wordings:
        parts = [part for turn in wording.turns for side in ("source", "target") for part in turn.parts(side)]
        written: list[Segment] = [("template", part) for part in parts if isinstance(part, str)]
        fields = [part[0] for part in parts if not isinstance(part, str)]
        fixed.append(len(encoder.encode(written)) + sum(sizes.get(name, 0) for name in fields))
        tokens, titles = "history" in fields, not {"titles", "liked", "disliked"}.isdisjoint(fields)
        per_item.append(levels * tokens + (title + 2) * titles)
    return float(np.mean(fixed)), float(np.mean(per_item))


class P5Rows:
    """Rows of one of P5's families, whose examples are drawn rather than counted off.

    Raises:
        TrainingError: the row with the longest texts of a wording cannot be cut to `max_length`; as `ConversationRows`.
    """

    def __init__(self, examples: FamilyExamples, encoder: LanguageEncoder) -> None:
        self.examples, self.encoder = examples, encoder
        for example in examples.longest():  # what cannot fit is said now, not in the middle of training
            self._row(example)

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, index: int, generator: np.random.Generator) -> LanguageRow:
        return self._row(self.examples.draw(generator))

    def _row(self, example: Example) -> LanguageRow:
        return self.encoder(p5_conversation(example), example.where)

    def length(self, index: int) -> int:
        return _WORDING_TOKENS + 4 * self.examples.max_items

    def set_epoch(self, epoch: int) -> None:
        """Examples are drawn with the mixture's generator, which knows the epoch."""


class LanguageWindowRows:
    """Windows of histories behind a next-item wording, every item but the first labelled.

    Args:
        data: training rows.
        encoder: makes token ids.
        window: most targets of a row; fewer where `max_length` has no room for so many.
        seed: of the places where long rows are cut.

    Raises:
        TrainingError: `max_length` has no room for two items behind a wording.
    """

    def __init__(self, data: TaskData, encoder: LanguageEncoder, window: int, seed: int = 0) -> None:
        self.data, self.encoder = data, encoder
        self.questions = [_question(wording) for wording in language_wordings("next_item")]
        self.levels = int(encoder.tokenizer.num_levels)
        longest = max(len(encoder.window_prefix(question)) for question in self.questions) + self.levels
        room = (encoder.max_length - longest) // self.levels
        if room < 1:
            raise TrainingError(
                f"windows of next items: a wording and one item take up to {longest} tokens, an item {self.levels}, and "
                f"max_length is {encoder.max_length}: raise it"
            )
        self.windows = WindowDataset(data.train, min(window, room), seed=seed)

    def __len__(self) -> int:
        return len(self.windows)

    def row(self, index: int, generator: np.random.Generator) -> LanguageRow:
        items = self.windows[index]["items"].tolist()
        question = self.questions[generator.integers(len(self.questions))]
        return self.encoder.window(question, [self.data.item_ids[item] for item in items])

    def length(self, index: int) -> int:
        return _WORDING_TOKENS + self.levels * int(self.windows.lengths[index])

    def set_epoch(self, epoch: int) -> None:
        self.windows.set_epoch(epoch)


def _question(wording: Wording) -> list[tuple[str, Any]]:
    """The template text before the history of a next-item wording."""
    return [("template", part) for part in wording.turns[0].parts("source") if isinstance(part, str)]


def serving_texts(encoder: LanguageEncoder, *, windows: bool = False) -> tuple[str, str]:
    """`history_before`, `history_after` of `extend_tokenizer` with which `recommend` writes the prompts of "next_item".

    Args:
        encoder: the one of training.
        windows: as in `language_mixture`.
    """
    return encoder.around_history([*_question(SERVING_WORDING), ("items", [])], windows=windows)


class LanguageMixtureDataset(Dataset):
    """Rows of several families; how many of which follows from the weights, which ones from (seed, epoch).

    Args:
        families: name -> rows of that family.
        weights: name -> share relative to one full pass: 1.0 = as many rows per epoch as the family has, each once; 0.1 = a
            tenth of them, another tenth in every epoch.
        seed: of draws and wordings.

    Attributes:
        counts: name -> rows per epoch.
        lengths: about how many tokens each row has, for batches of like lengths; no row is made for it.

    Raises:
        TrainingError: no family, a weight that is not positive, or one without its family.
    """

    def __init__(self, families: Mapping[str, RowFamily], weights: Mapping[str, float], seed: int = 0) -> None:
        self.families, self.weights, self.seed = dict(families), dict(weights), int(seed)
        self.counts = mixture_counts("language mixture", self.families, self.weights)
        self.names = list(self.families)
        self.epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of this epoch."""
        if epoch == self.epoch:
            return
        self.epoch = int(epoch)
        which, units, lengths = [], [], []
        for place, (name, rows) in enumerate(self.families.items()):
            rows.set_epoch(self.epoch)
            generator = np.random.default_rng([self.seed, self.epoch, place])
            whole, rest = divmod(self.counts[name], len(rows))
            chosen = np.concatenate([np.tile(np.arange(len(rows)), whole), generator.permutation(len(rows))[:rest]])
            which.append(np.full(len(chosen), place, np.int32))
            units.append(chosen)
            lengths += [rows.length(index) for index in chosen.tolist()]
        self._which, self._units = np.concatenate(which), np.concatenate(units)
        self.lengths = np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        name = self.names[self._which[index]]
        generator = np.random.default_rng([self.seed, self.epoch, index, 1])
        row = self.families[name].row(int(self._units[index]), generator)
        return {"input_ids": row.input_ids, "labels": row.labels, "family": name}


def feedable(names: Sequence[str], data: TaskData | Mapping[str, TaskData], *, items: bool = True) -> list[str]:
    """Of the families asked for ("family" or "family:kind"), those that the data can feed; the log names the others.

    Args:
        data: training rows and texts, or those of each family.
        items: does the tokenizer carry the catalogue?

    Raises:
        TrainingError: an unknown family or kind (the nearest named), or none is left (what it lacks named).
    """
    fed = data if isinstance(data, Mapping) else dict.fromkeys(names, data)
    missing: dict[str, list[str]] = {}
    for name in names:
        check_family(name)
        family, _, kind = name.partition(":")
        if name in FAMILIES:
            fine, lacks = items and bool(usable(name, fed[name])), lacking(name, fed[name])
        else:
            fine = bool(usable_wordings(family, fed[name], kind or None, items=items))
            wanted: set[str] = set().union(*(w.fields() for w in language_wordings(family, kind or None)))
            lacks = sorted(wanted - language_fields(fed[name], items=items))
        if not fine:
            missing[name] = lacks or ["item tokens in its tokenizer" if not items else "use for its wordings"]
    return with_reasons(names, missing)


def check_catalogue(data: TaskData, encoder: LanguageEncoder) -> None:
    """Raise UnknownItemError where the encoder's tokenizer lacks an item of the data."""
    if encoder.carries_items:
        missing = np.flatnonzero(encoder.tokenizer.item_index(data.item_ids) < 0)
        if len(missing):
            raise UnknownItemError(
                f"item {data.item_ids[missing[0]]!r} and {len(missing) - 1} others of the data are not in the catalogue of "
                "the tokenizer: build both of the same items"
            )


def language_mixture(
    data: TaskData,
    encoder: LanguageEncoder,
    weights: Mapping[str, Any],
    *,
    max_history: int = 20,
    windows: bool = False,
    num_candidates: int = NUM_CANDIDATES,
    max_title: int = MAX_TITLE,
    max_description: int = MAX_DESCRIPTION,
    seed: int = 0,
) -> LanguageMixtureDataset:
    """The mixture of the families that the data can feed.

    Args:
        data: training rows and texts.
        encoder: makes token ids. With a tokenizer without catalogue only questions about texts remain.
        weights: "family" or "family:kind" -> weight, see `LanguageMixtureDataset`, or -> {"weight": w, field: column} for
            texts in columns of other names, see `family_weights`; families that the data cannot feed are left out with a
            log line.
        max_history: newest items shown as history; with `windows` also the most targets of a window.
        windows: next_item as windows with all their targets instead of one target per row.
        num_candidates: titles in candidate lists.
        max_title, max_description: characters shown of texts, cut at a blank.
        seed: of all draws.

    Raises:
        TrainingError: unknown families, none that the data can feed, or texts too long for `max_length`.
        UnknownItemError: the tokenizer lacks an item of the data.
    """
    check_catalogue(data, encoder)
    shares, fed = family_weights(weights, data)
    families: dict[str, RowFamily] = {}
    for name in feedable(list(shares), fed, items=encoder.carries_items):
        if windows and name.partition(":")[0] == "next_item":
            families[name] = LanguageWindowRows(fed[name], encoder, max_history, seed)
            continue
        made: FamilyExamples | LanguageFamily
        try:
            if name in FAMILIES:
                made = FamilyExamples(name, fed[name], max_items=max_history, max_text=max_description)
            else:
                made = LanguageFamily(
                    name,
                    fed[name],
                    max_history=max_history,
                    num_candidates=num_candidates,
                    max_title=max_title,
                    max_description=max_description,
                    items=encoder.carries_items,
                )
        except TrainingError as problem:
            logger.warning("task family %r is left out: %s", name, problem)
            continue
        families[name] = P5Rows(made, encoder) if isinstance(made, FamilyExamples) else ConversationRows(made, encoder)
    if not families:
        raise TrainingError(f"no interaction of this data feeds one of the families {', '.join(weights)}.")
    return LanguageMixtureDataset(families, {name: shares[name] for name in families}, seed)
