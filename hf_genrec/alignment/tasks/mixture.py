"""TaskMixtureDataset: several task families in one training set, drawn anew for every epoch (P5, arXiv 2203.13366).

A sample is a handful of rows of one family; a row is a source text and one or more targets, each of which may see the
beginning of the source up to its own place. Ordinary pairs have one target that sees everything. A window of a history has
one target per item (packed prefixes, `models/t5_packed.py`), so that the sequential family costs no more than without tasks.

Relations: one family, "sequential", is next-item training behind a prompt.

Shape suffixes: R rows of a batch, S source tokens, T targets, L target tokens, N items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_genrec.data.collators import IGNORED, PrefixDataset, WindowDataset
from hf_genrec.errors import IncompatibleComponentsError, TrainingError

from .families import FamilyExamples, TaskData, usable
from .fill import Example, ExampleEncoder, fill
from .requested import family_weights, usable_families
from .templates import SERVING


@dataclass(frozen=True)
class TaskRow:
    """A source and its targets; target t sees the first `visible[t]` source tokens."""

    source: list[int]
    targets: list[list[int]]
    visible: list[int]


class RowSource(Protocol):
    """A family as the mixture sees it."""

    def __len__(self) -> int: ...

    def length(self, index: int) -> int:
        """What batches are bucketed by: targets per row."""

    def rows(self, index: int, generator: np.random.Generator) -> list[TaskRow]:
        """The rows of sample `index`, in wordings drawn from the generator."""

    def set_epoch(self, epoch: int) -> None: ...


class PairRows:
    """`group` text-to-text pairs of a family per sample.

    Args:
        examples: of the family.
        encoder: makes token ids of them.
        group: pairs per sample.

    Raises:
        TrainingError: the pair with the longest texts of a wording does not fit (see `ExampleEncoder`). Candidates are drawn
            anew for every pair; a longer one met later raises the same error.
    """

    def __init__(self, examples: FamilyExamples, encoder: ExampleEncoder, group: int = 16) -> None:
        self.examples, self.encoder, self.group = examples, encoder, int(group)
        for example in examples.longest():  # what cannot fit is said now, not in the middle of training
            encoder(example)

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.group)

    def length(self, index: int) -> int:
        return 1

    def rows(self, index: int, generator: np.random.Generator) -> list[TaskRow]:
        return [pair_row(self.encoder(self.examples.draw(generator))) for _ in range(self.group)]

    def set_epoch(self, epoch: int) -> None:
        """Pairs are drawn with the mixture's generator, which knows the epoch."""


def pair_row(encoded: tuple[list[int], list[int]]) -> TaskRow:
    """A pair as a row of one target that sees the whole source."""
    source, target = encoded
    return TaskRow(source, [target], [len(source)])


class _SequentialRows:
    """What windows and prefixes share: wordings whose history stands last, and item names as token lists."""

    def __init__(self, data: TaskData, encoder: ExampleEncoder) -> None:
        self.data, self.encoder = data, encoder
        self.templates = usable("sequential", data)
        table = encoder.tokenizer.item_token_table
        self.names_N = [row[row >= 0].tolist() for row in np.asarray(table)]

    def prompt(self, row: int, generator: np.random.Generator) -> list[int]:
        """Token ids of a random wording up to the history."""
        template = self.templates[generator.integers(len(self.templates))]
        return self.encoder.encode(prompt_segments(template, f"user_{row + 1}"))


class WindowRows(_SequentialRows):
    """Windows of histories behind a prompt, every item but the first a target: for models that train packed prefixes.

    Args:
        data: training rows.
        encoder: makes token ids.
        window: most targets of a row.
        seed: of the places where long rows are cut.
    """

    def __init__(self, data: TaskData, encoder: ExampleEncoder, window: int, seed: int = 0) -> None:
        super().__init__(data, encoder)
        self.windows = WindowDataset(data.train, window, seed=seed)

    def __len__(self) -> int:
        return len(self.windows)

    def length(self, index: int) -> int:
        return int(self.windows.lengths[index])

    def rows(self, index: int, generator: np.random.Generator) -> list[TaskRow]:
        items = self.windows[index]["items"].tolist()
        source = list(self.prompt(int(self.windows.rows[index]), generator))
        targets, visible = [], []
        for item, following in itertools.pairwise(items):
            source += self.names_N[item]
            targets.append(self.names_N[following])
            visible.append(len(source))
        return [TaskRow(source, targets, visible)]

    def set_epoch(self, epoch: int) -> None:
        self.windows.set_epoch(epoch)


class PrefixRows(_SequentialRows):
    """Single prefixes of histories behind a prompt, `group` per sample: for any text-to-text model."""

    def __init__(self, data: TaskData, encoder: ExampleEncoder, max_items: int, group: int = 16) -> None:
        super().__init__(data, encoder)
        self.prefixes = PrefixDataset(data.train, max_items)
        self.group = int(group)

    def __len__(self) -> int:
        return math.ceil(len(self.prefixes) / self.group)

    def length(self, index: int) -> int:
        return 1

    def rows(self, index: int, generator: np.random.Generator) -> list[TaskRow]:
        rows = []
        for place in generator.integers(len(self.prefixes), size=self.group).tolist():
            sample = self.prefixes[place]
            source = list(self.prompt(int(self.prefixes.rows[place]), generator))
            for item in sample["items"].tolist():
                source += self.names_N[item]
            rows.append(TaskRow(source, [self.names_N[sample["target"]]], [len(source)]))
        return rows

    def set_epoch(self, epoch: int) -> None:
        """Prefixes are drawn with the mixture's generator, which knows the epoch."""


def prompt_segments(template: Any, user: str | None = None) -> list[tuple[str, Any]]:
    """The segments of a sequential wording up to its history.

    Raises:
        IncompatibleComponentsError: a wording that goes on behind the history.
    """
    if template.parts("source")[-1] != ("history",):
        raise IncompatibleComponentsError(f"wording {template.name} must end in {{history}} to be a prompt of it")
    example: Example = fill(template, {"user": user, "history": [], "item": []})
    return example.source[:-1]


def serving_prompt(encoder: ExampleEncoder) -> list[int]:
    """Token ids that stand before a history when items are recommended."""
    return encoder.encode(prompt_segments(SERVING))


def mixture_counts(what: str, families: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, int]:
    """How many samples an epoch has of each family, at least one.

    Raises:
        TrainingError: no family, a weight that is not positive, or one without its family.
    """
    if not families or set(families) != set(weights) or min(weights.values()) <= 0:
        raise TrainingError(
            f"{what}: families {sorted(families)} and weights {dict(weights)} must name the same families, each with a "
            "positive weight."
        )
    return {name: max(1, round(weights[name] * len(rows))) for name, rows in families.items()}


class TaskMixtureDataset(Dataset):
    """Samples of several families; how many of which follows from the weights, which ones from (seed, epoch).

    Args:
        families: name -> rows of that family.
        weights: name -> share relative to one full pass: 1.0 = as many samples per epoch as the family has (windows: each
            once; pairs: as many drawn as there are interactions), 0.1 = a tenth of them, another tenth in every epoch.
        seed: of draws and wordings.

    Attributes:
        lengths: what batches are bucketed by, so that rows with one target and windows do not share a batch.

    Raises:
        TrainingError: no family, a weight that is not positive, or one without its family.
    """

    def __init__(self, families: Mapping[str, RowSource], weights: Mapping[str, float], seed: int = 0) -> None:
        self.families, self.weights, self.seed = dict(families), dict(weights), int(seed)
        self.counts = mixture_counts("task mixture", self.families, self.weights)
        self.epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of this epoch."""
        if epoch == self.epoch:
            return
        self.epoch = int(epoch)
        self._samples: list[tuple[str, int]] = []
        lengths = []
        for place, (name, rows) in enumerate(self.families.items()):
            rows.set_epoch(self.epoch)
            generator = np.random.default_rng([self.seed, self.epoch, place])
            wanted = self.counts[name]
            whole, rest = divmod(wanted, len(rows))
            chosen = np.concatenate([np.tile(np.arange(len(rows)), whole), generator.permutation(len(rows))[:rest]])
            self._samples += [(name, int(index)) for index in chosen]
            lengths += [rows.length(int(index)) for index in chosen]
        self.lengths = np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> list[TaskRow]:
        name, sample = self._samples[index]
        return self.families[name].rows(sample, np.random.default_rng([self.seed, self.epoch, index, 1]))

    @property
    def num_targets(self) -> int:
        """Targets of one epoch."""
        return int(np.maximum(self.lengths - 1, 1).sum())


class TaskCollator:
    """Samples of a mixture -> `input_ids`, `attention_mask` (R, S), `labels` and, packed, `history_lengths` (R, T).

    Labels are the targets' tokens alone, -100 elsewhere: (R, T, L) packed, (R, L) not.

    Args:
        pad_token_id: fills up sources.
        packed: keep several targets per row; False = every target becomes a row of its own that ends where it may see.
    """

    def __init__(self, pad_token_id: int, *, packed: bool = True) -> None:
        self.pad_token_id, self.packed = int(pad_token_id), packed

    def __call__(self, samples: Sequence[list[TaskRow]]) -> dict[str, torch.Tensor]:
        rows = [row for sample in samples for row in sample]
        if not self.packed:
            rows = [
                TaskRow(row.source[:seen], [target], [seen])
                for row in rows
                for target, seen in zip(row.targets, row.visible)
            ]
        width = max(len(row.source) for row in rows)
        count = max(len(row.targets) for row in rows)
        longest = max(len(target) for row in rows for target in row.targets)
        input_ids = np.full((len(rows), width), self.pad_token_id, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        labels = np.full((len(rows), count, longest), IGNORED, np.int64)
        seen_RT = np.zeros((len(rows), count), np.int64)
        for place, row in enumerate(rows):
            input_ids[place, : len(row.source)] = row.source
            mask[place, : len(row.source)] = 1
            seen_RT[place, : len(row.visible)] = row.visible
            for number, target in enumerate(row.targets):
                labels[place, number, : len(target)] = target
        batch = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
        if not self.packed:
            return batch | {"labels": torch.from_numpy(labels[:, 0])}
        return batch | {"labels": torch.from_numpy(labels), "history_lengths": torch.from_numpy(seen_RT)}


def task_mixture(
    data: TaskData,
    encoder: ExampleEncoder,
    weights: Mapping[str, Any],
    *,
    packed: bool,
    window: int = 50,
    max_items: int = 10,
    group: int = 16,
    seed: int = 0,
) -> TaskMixtureDataset:
    """The mixture of the families that the data can feed.

    Args:
        weights: family -> weight, see `TaskMixtureDataset`, or -> {"weight": w, field: column} for texts in columns of other
            names, see `family_weights`; families that the data cannot feed are left out with a log line.
        packed: sequential windows with all their targets (`WindowRows`), or single prefixes.
        window: most targets of a window, and most items of a prefix.
        max_items: newest items that a wording of another family shows as history.
        group: pairs per sample.

    Raises:
        TrainingError: unknown families, or none that the data can feed.
    """
    shares, fed = family_weights(weights, data)
    families: dict[str, RowSource] = {}
    for name in usable_families(list(shares), fed):
        if name != "sequential":
            families[name] = PairRows(FamilyExamples(name, fed[name], max_items=max_items), encoder, group)
        elif packed:
            families[name] = WindowRows(fed[name], encoder, window, seed)
        else:
            families[name] = PrefixRows(fed[name], encoder, window, group)
    return TaskMixtureDataset(families, {name: shares[name] for name in families}, seed)
