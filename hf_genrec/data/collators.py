"""Training and evaluation samples from sequences, and the collators that turn them into token batches.

Shapes: R rows of `Sequences`, N items, L codes per item, B batch, T items in a history, S tokens.

Datasets give plain dicts of numpy arrays; collators ask the tokenizer for tokens (`encode_item_indices`,
`item_token_table`) and know nothing else about it. With `Trainer`, set `remove_unused_columns=False`, since samples are
no model inputs yet.
Every dataset has `lengths` ((len,) int64 items per sample) for length-bucketed sampling, and `set_epoch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_genrec.data.sequences import Sequences, offsets_from_lengths
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, TrainingError

IGNORED = -100  # label that transformers' losses leave out


def _mixed(seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """(len(rows),) uint64 noise that depends on nothing but (seed, epoch, row): the splitmix64 finaliser, twice."""
    key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    noise = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        noise = (noise ^ (noise >> np.uint64(shift))) * np.uint64(factor)
    return noise ^ (noise >> np.uint64(31))


class WindowDataset(Dataset):
    """Windows for sequence models, which learn every position of a window at once.

    A row of n items has n - 1 targets (all but its first item). Rows with at most `window` targets are one sample;
    longer rows are cut into pieces of at most `window` targets, each preceded by the one item before it, so a sample
    holds at most `window + 1` items and every target occurs exactly once per epoch. Where the cuts fall shifts with
    (seed, epoch, row) and nothing else; the number of samples is the same in every epoch.

    Args:
        sequences: training rows. Rows of fewer than two items have nothing to predict and give no sample.
        window: most targets of a sample.
        seed: of the cuts.
        user_ids: id of each row, passed on for tokenizers with user tokens.

    Raises:
        TrainingError: no row has two items.

    Example:
        >>> data = WindowDataset(Sequences.from_rows([[4, 5, 6], [7]]), window=50)
        >>> len(data), data[0]["items"].tolist()
        (1, [4, 5, 6])
    """

    def __init__(
        self, sequences: Sequences, window: int, *, seed: int = 0, user_ids: Sequence[str] | None = None
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window}: use at least 1")
        self.sequences, self.window, self.seed, self.user_ids = sequences, int(window), int(seed), user_ids
        targets = sequences.lengths - 1
        self._rows = np.flatnonzero(targets >= 1)
        if not len(self._rows):
            raise TrainingError(
                "no training row has two items, so there is nothing to predict. Bring longer histories."
            )
        self._targets = targets[self._rows]
        pieces = -(-self._targets // self.window)
        # one piece more than needed leaves room to shift the cuts; windows of one target cannot shift
        self._shifted = (pieces > 1) & (self.window > 1)
        self._pieces = pieces + self._shifted
        self.epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Cut for this epoch. Persistent workers keep their own copy of the data set and would not notice: use none."""
        if epoch == self.epoch:
            return
        self.epoch = int(epoch)
        noise = _mixed(self.seed, self.epoch, self._rows)
        whole = self._pieces - self._shifted  # pieces that the even spacing is made of
        longest = -(-self._targets // whole)
        span = np.where(self._shifted, longest - 1, 1).astype(np.uint64)
        first = np.where(self._shifted, 1 + (noise % span).astype(np.int64), 0)
        offsets = offsets_from_lengths(self._pieces)
        row = np.repeat(np.arange(len(self._rows)), self._pieces)
        piece = np.arange(offsets[-1]) - offsets[:-1][row]
        # cut k of a shifted row lies at first + floor((k - 1) * targets / whole), else at floor(k * targets / whole)
        step = piece - self._shifted[row]
        start = first[row] + step * self._targets[row] // whole[row]
        start[piece == 0] = 0
        stop = np.append(start[1:], 0)
        ends = offsets[1:] - 1
        stop[ends] = self._targets
        self._begin = self.sequences.offsets[:-1][self._rows][row] + start
        self.lengths = stop - start + 1
        self.rows = self._rows[row]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin = self._begin[index]
        sample: dict[str, Any] = {"items": self.sequences.items[begin : begin + self.lengths[index]]}
        if self.user_ids is not None:
            sample["user_id"] = self.user_ids[self.rows[index]]
        return sample

    @property
    def num_targets(self) -> int:
        """Targets of one epoch."""
        return int(self._targets.sum())


class PrefixDataset(Dataset):
    """One sample per (history, next item), for encoder-decoder models.

    Args:
        sequences: training rows; each item but the first of a row is a target, its history the items before it.
        max_history: most items of a history, the newest are kept.
        samples_per_epoch: draw this many different samples for each epoch, by (seed, epoch) alone; None uses all.
        user_ids: id of each row, passed on for tokenizers with user tokens.

    Raises:
        TrainingError: no row has two items.
    """

    def __init__(
        self,
        sequences: Sequences,
        max_history: int,
        *,
        samples_per_epoch: int | None = None,
        seed: int = 0,
        user_ids: Sequence[str] | None = None,
    ) -> None:
        if max_history < 1:
            raise ValueError(f"max_history={max_history}: use at least 1")
        self.sequences, self.max_history, self.seed, self.user_ids = sequences, int(max_history), int(seed), user_ids
        first = np.zeros(len(sequences.items), bool)
        first[sequences.offsets[:-1][sequences.lengths > 0]] = True
        self._positions = np.flatnonzero(~first)
        if not len(self._positions):
            raise TrainingError(
                "no training row has two items, so there is nothing to predict. Bring longer histories."
            )
        self._sampled = samples_per_epoch is not None and samples_per_epoch < len(self._positions)
        self._count = (
            int(samples_per_epoch) if samples_per_epoch is not None and self._sampled else len(self._positions)
        )
        if self._count < 1:
            raise ValueError(f"samples_per_epoch={samples_per_epoch}: use at least 1, or None for all")
        self._row_of = sequences.row_index()
        self.epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the samples of this epoch (nothing changes without `samples_per_epoch`)."""
        if epoch == self.epoch:
            return
        self.epoch = int(epoch)
        chosen = self._positions
        if self._sampled:
            generator = np.random.default_rng([self.seed, self.epoch])
            chosen = chosen[generator.choice(len(chosen), self._count, replace=False)]
        self._target = chosen
        self.rows = self._row_of[chosen]
        self.lengths = np.minimum(chosen - self.sequences.offsets[:-1][self.rows], self.max_history)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self._target[index]
        items = self.sequences.items
        sample = {"items": items[position - self.lengths[index] : position], "target": int(items[position])}
        if self.user_ids is not None:
            sample["user_id"] = self.user_ids[self.rows[index]]
        return sample


class EvaluationDataset(Dataset):
    """The rows of an `EvaluationSet`: the newest items to encode, the target, and everything seen before it.

    Args:
        evaluation_set: M rows.
        max_history: most items to encode (the newest); `seen` keeps the whole history.
        user_ids: id of each row of the *data* (not of the set), passed on for tokenizers with user tokens.
    """

    def __init__(
        self, evaluation_set: EvaluationSet, max_history: int | None = None, *, user_ids: Sequence[str] | None = None
    ) -> None:
        self.evaluation_set, self.user_ids = evaluation_set, user_ids
        self.rows = evaluation_set.users
        lengths = evaluation_set.histories.lengths
        self.lengths = lengths if max_history is None else np.minimum(lengths, max_history)

    def set_epoch(self, epoch: int) -> None:
        """Evaluation rows are the same in every epoch."""

    def __len__(self) -> int:
        return len(self.evaluation_set)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seen = self.evaluation_set.histories[index]
        sample = {
            "items": seen[len(seen) - self.lengths[index] :],
            "target": int(self.evaluation_set.targets[index]),
            "seen": seen,
        }
        if self.user_ids is not None:
            sample["user_id"] = self.user_ids[self.rows[index]]
        return sample


def _encode(tokenizer: Any, samples: Sequence[dict[str, Any]], max_items: int | None) -> dict[str, torch.Tensor]:
    rows = [sample["items"] for sample in samples]
    users = [sample["user_id"] for sample in samples] if "user_id" in samples[0] else None
    # the samples are cut already: without a bound of its own the tokenizer would cut again to its own max_history
    bound = max_items if max_items is not None else max(1, max(len(row) for row in rows))
    encoding = tokenizer.encode_item_indices(rows, max_items=bound, user_ids=users, return_tensors="pt")
    return {"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"]}


class SequenceCollator:
    """Windows -> `input_ids`, `attention_mask`, `labels`, all (B, S), for models that shift inside by one item.

    Labels equal `input_ids`, with -100 on padding, on tokens that belong to no item, and on each row's first item.

    Args:
        tokenizer: an item tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens_N = (np.asarray(tokenizer.item_token_table) >= 0).sum(axis=1)
        self._after = int(bool(getattr(tokenizer, "history_eos", False)))

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = _encode(self.tokenizer, samples, None)
        targets = [int(self._tokens_N[sample["items"][1:]].sum()) for sample in samples]
        batch["labels"] = last_tokens(batch["input_ids"], batch["attention_mask"], targets, skip=self._after)
        return batch


def last_tokens(
    input_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor, counts: Sequence[int], *, skip: int = 0
) -> torch.Tensor:
    """Labels (B, S): the last `counts[b]` tokens of each row, leaving out the very last `skip`; -100 elsewhere.

    Padding may be on either side.
    """
    from_end_BS = attention_mask_BS.flip(1).cumsum(1).flip(1)  # 1 = the last token of the row
    counts_B1 = torch.as_tensor(counts).unsqueeze(1)
    is_label_BS = attention_mask_BS.bool() & (from_end_BS > skip) & (from_end_BS <= counts_B1 + skip)
    return torch.where(is_label_BS, input_ids_BS, IGNORED)


class PrefixCollator:
    """Prefix samples -> `input_ids`, `attention_mask` (B, S) of the history and `labels` (B, L), the target's tokens.

    Args:
        tokenizer: an item tokenizer.
        max_items: cut histories again to the newest, None keeps what the data set gives.
    """

    def __init__(self, tokenizer: Any, max_items: int | None = None) -> None:
        self.tokenizer, self.max_items = tokenizer, max_items
        table_NL = np.asarray(tokenizer.item_token_table, np.int64)
        self._table_NL = torch.tensor(np.where(table_NL < 0, IGNORED, table_NL))

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = _encode(self.tokenizer, samples, self.max_items)
        batch["labels"] = self._table_NL[torch.tensor([sample["target"] for sample in samples])]
        return batch


class PackedPrefixCollator:
    """Windows -> every prefix of each at once, for encoder-decoder models with `causal_encoder` (models/t5_packed.py).

    A window of n + 1 items is a history of n items (`input_ids`, `attention_mask`, both (B, S)) and n targets: `labels`
    (B, T, L), the tokens of item t + 1, and `history_lengths` (B, T), how many of the row's real tokens target t may
    see: those of the items up to t, and a user token before them. T is the most targets of the batch; labels of targets
    that are not there are -100, their history lengths 0.

    Args:
        tokenizer: an item tokenizer.

    Raises:
        IncompatibleComponentsError: the tokenizer ends histories with a token of their own, which a prefix inside a
            window has not; or it does not write an item as the same number of tokens everywhere.

    Example:
        >>> from hf_genrec.identifiers.tokenization_item import ItemTokenizer
        >>> tokenizer = ItemTokenizer.from_codes(["a", "b", "c"], [[0, 0], [0, 1], [1, 0]])
        >>> batch = PackedPrefixCollator(tokenizer)([{"items": [0, 1, 2]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["history_lengths"].tolist()
        ([[4, 6, 4, 7]], [[[4, 7], [5, 6]]], [[2, 4]])
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "history_eos", False):
            raise IncompatibleComponentsError(
                "history_eos puts an end token behind every history, and the prefixes packed in one window have none: set "
                "identifiers.history_eos to false, or causal_encoder to false (one sample per prefix)."
            )
        self.tokenizer = tokenizer
        table_NL = np.asarray(tokenizer.item_token_table, np.int64)
        self._tokens_N = (table_NL >= 0).sum(axis=1)
        self._table_NL = torch.tensor(np.where(table_NL < 0, IGNORED, table_NL))

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        windows = [np.asarray(sample["items"]) for sample in samples]
        batch = _encode(self.tokenizer, [{**sample, "items": row[:-1]} for sample, row in zip(samples, windows)], None)
        targets = max(len(row) for row in windows) - 1
        labels_BTL = torch.full((len(windows), targets, self._table_NL.shape[1]), IGNORED)
        lengths_BT = torch.zeros(len(windows), targets, dtype=torch.int64)
        for index, row in enumerate(windows):
            labels_BTL[index, : len(row) - 1] = self._table_NL[torch.as_tensor(row[1:], dtype=torch.int64)]
            lengths_BT[index, : len(row) - 1] = torch.from_numpy(self._tokens_N[row[:-1]].cumsum())
        before_B = batch["attention_mask"].sum(1) - lengths_BT.amax(1)  # a user token, where there is one
        if bool(((before_B < 0) | (before_B > 1)).any()):
            raise IncompatibleComponentsError(
                f"{type(self.tokenizer).__name__} does not write a history as the tokens of its items one after the other, so "
                "its prefixes cannot be packed: set causal_encoder to false (one sample per prefix)."
            )
        lengths_BT += before_B.unsqueeze(1) * (lengths_BT > 0)
        return {**batch, "labels": labels_BTL, "history_lengths": lengths_BT}


class EvaluationCollator:
    """Evaluation samples -> `input_ids`, `attention_mask` (B, S), `targets` (B,) item indices, `seen` (B arrays).

    Args:
        tokenizer: an item tokenizer.
        max_items: cut histories to the newest, None keeps what the data set gives. `seen` is never cut.
    """

    def __init__(self, tokenizer: Any, max_items: int | None = None) -> None:
        self.tokenizer, self.max_items = tokenizer, max_items

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(_encode(self.tokenizer, samples, self.max_items))
        batch["targets"] = torch.tensor([sample["target"] for sample in samples], dtype=torch.int64)
        batch["seen"] = [np.asarray(sample["seen"]) for sample in samples]
        return batch
