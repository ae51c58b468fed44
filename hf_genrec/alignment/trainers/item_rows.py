"""Rows of token ids with labels, as ItemSFTTrainer reads them: the collator, checks, and the order of an epoch.

A row is `{"input_ids": list[int], "labels": list[int]}` with labels of -100 on everything that is not to be learned (the
prompt). Rows come from a `datasets.Dataset`, or from an object that draws them anew (`alignment/tasks`): `__len__`,
`__getitem__`, and where it has them `set_epoch(epoch)` and `lengths`.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from transformers.data.data_collator import DataCollatorMixin

from hf_genrec.data.collators import IGNORED
from hf_genrec.errors import TrainingError

PADDING_SIDES = ("right", "left")


@dataclass
class ItemRowCollator(DataCollatorMixin):
    """Rows -> one padded batch.

    The first token of a row has nothing before it and never a label. Rows padded on the left carry `position_ids`, so that
    models with absolute positions see the same row.

    Args:
        pad_token_id: for the empty places.
        max_length: most tokens of a row; a longer one is an error, never cut.
        padding_side: "right", as TRL pads, or "left".
        pad_to_multiple_of: width of the batch.

    Returns:
        `input_ids`, `attention_mask`, `labels` (B, T), and with padding on the left `position_ids`.

    Example:
        >>> batch = ItemRowCollator(pad_token_id=0)([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6], [7, 0]], [[-100, 6], [-100, -100]])
    """

    pad_token_id: int
    max_length: int | None = None
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [example["input_ids"] for example in examples]
        lengths = [len(row) for row in rows]
        for place, length in enumerate(lengths):
            check_length(f"{place} of a batch", length, self.max_length)
        width = max(lengths)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids_BT = np.full((len(rows), width), self.pad_token_id, np.int64)
        labels_BT = np.full((len(rows), width), IGNORED, np.int64)
        mask_BT = np.zeros((len(rows), width), np.int64)
        for place, (example, row, length) in enumerate(zip(examples, rows, lengths)):
            start = width - length if self.padding_side == "left" else 0
            where = slice(start, start + length)
            labels = example.get("labels", row)
            if len(labels) != length:
                raise TrainingError(
                    f"row {place} of a batch: {len(labels)} labels for {length} tokens; give one per token."
                )
            ids_BT[place, where], labels_BT[place, where], mask_BT[place, where] = row, labels, 1
            labels_BT[place, start] = IGNORED
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
        if self.padding_side == "left":
            batch["position_ids"] = (mask_BT.cumsum(axis=1) - 1).clip(min=0)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def check_length(row: object, length: int, max_length: int | None) -> None:
    """Raise TrainingError, naming the row, for one that is empty or longer than `max_length`."""
    if length == 0:
        raise TrainingError(f"row {row} has no tokens: remove it.")
    if max_length is not None and length > max_length:
        raise TrainingError(
            f"row {row} has {length} tokens, more than max_length={max_length}: shorten its history (max_history, or "
            "max_history_tokens of the tokenizer), or raise max_length. Rows are never cut: that would cut the answer."
        )


def is_row_source(dataset: Any) -> bool:
    """Rows drawn one by one, and no `datasets` object?"""
    return (
        not isinstance(dataset, Dataset | IterableDataset)
        and hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
    )


def row_lengths(dataset: Dataset, column: str = "input_ids") -> np.ndarray:
    """Tokens of each row of a `datasets.Dataset`, int64."""
    column_n = dataset.with_format("arrow")[:][column] if len(dataset) else []
    return np.zeros(0, np.int64) if not len(column_n) else pc.list_value_length(column_n).to_numpy().astype(np.int64)


class EpochOrder:
    """What the length sampler reads of a dataset: how many rows, and how long each is (all alike where unknown)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._fixed = row_lengths(dataset) if isinstance(dataset, Dataset) else None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lengths(self) -> np.ndarray:
        if self._fixed is not None:
            return self._fixed
        known = getattr(self.dataset, "lengths", None)  # a mixture draws them anew every epoch
        return np.zeros(len(self.dataset), np.int64) if known is None else np.asarray(known)
