"""ItemRewardModel: how a user would respond to an item, one probability per feedback column (OneRec, arXiv 2502.18965).

OneRec's reward model predicts several kinds of feedback of a user on an item (long view, like, follow ...), each with a
tower of its own trained by binary cross-entropy, and combines them into one score. Here an item attends to the history,
the result goes through one tower per column, and `score_items` is the weighted sum of the probabilities.

*Relations*: with one column "interaction" and sampled negatives it is a plain click model. Any other recommender can be
the reward instead: `rewards.CollaborativeReward`.

Shape legend: B histories, T items of a history, C candidates, F columns, D width, N items, n interactions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import TrainingError
from hf_genrec.generation.search import evaluating

_ROWS = 256  # histories scored together


class ItemRewardModel(nn.Module, PyTorchModelHubMixin):
    """Towers over item and history. `save_pretrained` and `from_pretrained` are huggingface_hub's (safetensors).

    Args:
        num_items: N.
        columns: F names of feedback.
        weights: of the columns in `score_items`; default 1 each.
        hidden_size: D.
        max_history: newest items read.

    Raises:
        TrainingError: no column, or another number of weights.
    """

    def __init__(
        self,
        num_items: int,
        columns: Sequence[str],
        weights: Sequence[float] | None = None,
        hidden_size: int = 32,
        max_history: int = 50,
    ) -> None:
        super().__init__()
        self.columns, self.max_history, self.num_items = list(columns), int(max_history), int(num_items)
        self.weights = [1.0] * len(self.columns) if weights is None else [float(weight) for weight in weights]
        if not self.columns or len(self.weights) != len(self.columns):
            raise TrainingError(
                f"{len(self.columns)} columns and {len(self.weights)} weights: give one weight per column."
            )
        self.items = nn.Embedding(num_items + 1, hidden_size, padding_idx=num_items)
        self.mix = nn.Linear(3 * hidden_size, hidden_size)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, 1))
            for _ in self.columns
        )
        nn.init.normal_(self.items.weight, std=hidden_size**-0.5)

    @property
    def device(self) -> torch.device:
        return self.items.weight.device

    def forward(
        self, history: torch.Tensor, items: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Logits of every column.

        Args:
            history: (B, T) item indices, -1 where there is none.
            items: (B, C) candidates.
            labels: (B, C, F) 0 or 1, NaN where unknown.

        Returns:
            `logits` (B, C, F), and with labels `loss`, the mean binary cross-entropy of the known ones.
        """
        there_BT = history >= 0
        past_BTD = self.items(history.masked_fill(~there_BT, self.num_items))
        item_BCD = self.items(items)
        scores_BCT = item_BCD @ past_BTD.transpose(1, 2) / math.sqrt(item_BCD.shape[-1])
        scores_BCT = scores_BCT.masked_fill(~there_BT.unsqueeze(1), torch.finfo(scores_BCT.dtype).min)
        read_BCD = scores_BCT.softmax(-1) @ (past_BTD * there_BT.unsqueeze(-1))  # an empty history reads 0
        mixed_BCD = self.mix(torch.cat([item_BCD, read_BCD, item_BCD * read_BCD], dim=-1))
        logits_BCF = torch.cat([tower(mixed_BCD) for tower in self.towers], dim=-1)
        if labels is None:
            return {"logits": logits_BCF}
        known_BCF = ~torch.isnan(labels)
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits_BCF, torch.where(known_BCF, labels, 0.0), reduction="none"
        )
        return {"loss": (losses * known_BCF).sum() / known_BCF.sum().clamp(min=1), "logits": logits_BCF}

    def score_items(self, histories: Sequence[np.ndarray], items: np.ndarray) -> np.ndarray:
        """Rewards (B, C) of candidates (B, C) after B histories: the weighted sum of the columns' probabilities."""
        parts = []
        with evaluating(self):
            for start in range(0, len(items), _ROWS):
                history_BT = _padded(histories[start : start + _ROWS], self.max_history).to(self.device)
                candidates_BC = torch.tensor(np.asarray(items[start : start + _ROWS], np.int64), device=self.device)
                probabilities_BCF = self(history_BT, candidates_BC)["logits"].float().sigmoid()
                parts.append((probabilities_BCF * torch.tensor(self.weights, device=self.device)).sum(-1).cpu().numpy())
        return np.concatenate(parts)


def _padded(histories: Sequence[np.ndarray], max_history: int) -> torch.Tensor:
    rows = [torch.as_tensor(np.array(row[-max_history:], np.int64)) for row in histories]
    table = pad_sequence(rows, True, -1)
    return table if table.shape[1] else table.new_full((len(rows), 1), -1)


class FeedbackRows(Dataset):
    """Every interaction with what came before it and its feedback, and sampled items that were passed over.

    Args:
        sequences: U rows of item indices, oldest first.
        labels: column -> (n,) 0 or 1 aligned to `sequences.items`, NaN where unknown.
        num_items: N.
        num_negatives: items per interaction drawn from those outside the user's row, with 0 in all columns.
        seed: of the draws, together with the epoch.

    Raises:
        TrainingError: labels of another length or value (column named), or no interaction.
    """

    def __init__(
        self,
        sequences: Sequences,
        labels: Mapping[str, np.ndarray],
        num_items: int,
        *,
        num_negatives: int = 0,
        seed: int = 0,
    ) -> None:
        if not sequences.num_items:
            raise TrainingError("there is no interaction to learn a reward from.")
        for name, values in labels.items():
            values = np.asarray(values, np.float64)
            if values.shape != sequences.items.shape or not np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
                raise TrainingError(
                    f"labels of column {name!r} must be {sequences.num_items} values of 0 or 1 (NaN: unknown), one per "
                    "interaction; compare a rating with a threshold first."
                )
        self.sequences, self.num_items, self.num_negatives, self.seed = sequences, num_items, num_negatives, seed
        self.labels_nF = np.stack([np.asarray(values, np.float32) for values in labels.values()], axis=1)
        self.epoch, self._rows = 0, sequences.row_index()

    def set_epoch(self, epoch: int) -> None:
        """Another epoch draws other negatives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels_nF)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = int(self._rows[place])
        start = int(self.sequences.offsets[row])
        items, labels = [int(self.sequences.items[place])], [self.labels_nF[place]]
        if self.num_negatives:
            rng = np.random.default_rng([self.seed, self.epoch, place])
            drawn = rng.permutation(self.num_items)[: self.num_negatives + len(self.sequences[row])]
            passed = drawn[~np.isin(drawn, self.sequences[row])][: self.num_negatives]
            # a user who had nearly everything: repeat, so that all rows of a batch are equally long
            items += [int(item) for item in np.resize(passed if len(passed) else items, self.num_negatives)]
            known = np.zeros_like(labels[0]) if len(passed) else np.full_like(labels[0], np.nan)
            labels += [known] * self.num_negatives
        return {"history": self.sequences.items[start:place], "items": items, "labels": np.stack(labels)}


def train_reward_model(model: ItemRewardModel, rows: FeedbackRows, args: TrainingArguments) -> dict[str, float]:
    """Fit the towers with transformers' Trainer; the model ends in evaluation mode.

    Args:
        args: learning rate, epochs, batch size ... (`remove_unused_columns` is turned off).

    Returns:
        `train_loss` and `steps`.

    Raises:
        TrainingError: other columns than the model has, or a loss that is not finite.
    """
    from .trainers.callbacks import EpochCallback

    if rows.labels_nF.shape[1] != len(model.columns):
        raise TrainingError(
            f"{rows.labels_nF.shape[1]} label columns for a model of {len(model.columns)}: {model.columns}."
        )
    args.remove_unused_columns = False

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "history": _padded([sample["history"] for sample in samples], model.max_history),
            "items": torch.tensor([sample["items"] for sample in samples]),
            "labels": torch.from_numpy(np.stack([sample["labels"] for sample in samples])),
        }

    trainer: Any = Trainer(
        model=model, args=args, data_collator=collate, train_dataset=rows, callbacks=[EpochCallback()]
    )
    output = trainer.train()
    model.eval()
    if not math.isfinite(output.training_loss):
        raise TrainingError(f"the loss of the reward model is {output.training_loss}: lower the learning rate.")
    return {"train_loss": output.training_loss, "steps": float(output.global_step)}
