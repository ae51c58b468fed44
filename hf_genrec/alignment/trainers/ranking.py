"""Full-ranking validation inside the Trainer: histories and targets in, the rank of each target out.

Legend: M evaluation rows, B batch, T items in a history, L levels (codes per item), K list length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_genrec.data.collators import IGNORED, last_tokens
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.evaluation.metrics import ndcg_values, recall_values


class RankingDataset(Dataset):
    """An EvaluationSet as a torch dataset, sorted by history length (short ones pad little together).

    Args:
        evaluation: Histories and targets, M rows.
        max_users: Use only this many rows, drawn with `seed`; None = all. The draw is the same in every epoch.
    """

    def __init__(self, evaluation: EvaluationSet, *, max_users: int | None = None, seed: int = 0) -> None:
        rows = np.arange(len(evaluation.targets))
        if max_users is not None and max_users < len(rows):
            rows = np.random.default_rng(seed).permutation(rows)[:max_users]
        self.rows = rows[np.argsort(evaluation.histories.lengths[rows], kind="stable")]
        self.evaluation = evaluation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = int(self.rows[position])
        return {
            "history": self.evaluation.histories[row],
            "target": int(self.evaluation.targets[row]),
            "user": int(self.evaluation.users[row]),
        }


class RankingCollator:
    """Rows of a RankingDataset -> one batch: inputs of the search, inputs of the loss, targets and seen items.

    Args:
        tokenizer: ItemTokenizer of the catalogue.
        sequence_model: True: the loss reads `history + target` and only the target has labels (decoder-only models).
            False: the loss reads the history and the labels are the target's tokens (encoder-decoder models).
        max_history: Newest items read, by the search as by the loss.
        user_ids: User strings by user row, for tokenizers with user tokens.
        exclude_seen: Hand the items of the whole history (also beyond `max_history`) to the search as not wanted.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        sequence_model: bool,
        max_history: int | None = None,
        user_ids: Sequence[str] | None = None,
        exclude_seen: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence_model = sequence_model
        self.max_history = max_history
        self.user_ids = user_ids
        self.exclude_seen = exclude_seen

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        histories = [sample["history"] for sample in samples]
        targets_B = np.array([sample["target"] for sample in samples])
        users = None if self.user_ids is None else [self.user_ids[sample["user"]] for sample in samples]
        inputs = self._encode(histories, users, self.max_history)
        return {
            **inputs,
            "loss_inputs": self._loss_inputs(inputs, histories, targets_B, users),
            "targets": torch.as_tensor(targets_B),
            "seen": [np.unique(row) for row in histories] if self.exclude_seen else None,
        }

    def _loss_inputs(
        self,
        inputs: dict[str, torch.Tensor],
        histories: list[np.ndarray],
        targets_B: np.ndarray,
        users: list[str] | None,
    ) -> dict[str, torch.Tensor]:
        if not self.sequence_model:
            table_BL = self.tokenizer.item_token_table[targets_B]
            return {**inputs, "labels": torch.as_tensor(np.where(table_BL < 0, IGNORED, table_BL))}
        # as long as the longest training window: what the model reads, then the target
        rows = [np.append(row, target) for row, target in zip(histories, targets_B)]
        loss_inputs = self._encode(rows, users, self.max_history and self.max_history + 1)
        loss_inputs["labels"] = last_tokens(
            loss_inputs["input_ids"],
            loss_inputs["attention_mask"],
            (self.tokenizer.item_token_table[targets_B] >= 0).sum(axis=1),
            skip=int(self.tokenizer.history_eos),
        )
        return loss_inputs

    def _encode(
        self, rows: list[np.ndarray], users: list[str] | None, max_items: int | None
    ) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer.encode_item_indices(rows, user_ids=users, max_items=max_items, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class PromptRankingCollator(RankingCollator):
    """For language models: the loss reads the prompt as the search does (templates included), then the target's tokens.

    Args:
        tokenizer: extended tokenizer (or ItemTokenizer) of the catalogue.
        rows: collator of the loss rows, `ItemRowCollator`.
        max_history, user_ids, exclude_seen: as in RankingCollator.
    """

    def __init__(
        self,
        tokenizer: Any,
        rows: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        *,
        max_history: int | None = None,
        user_ids: Sequence[str] | None = None,
        exclude_seen: bool = True,
    ) -> None:
        super().__init__(
            tokenizer, sequence_model=False, max_history=max_history, user_ids=user_ids, exclude_seen=exclude_seen
        )
        self.rows = rows

    def _loss_inputs(
        self,
        inputs: dict[str, torch.Tensor],
        histories: list[np.ndarray],
        targets_B: np.ndarray,
        users: list[str] | None,
    ) -> dict[str, torch.Tensor]:
        examples = []
        for ids, mask, target in zip(inputs["input_ids"], inputs["attention_mask"], targets_B):
            prompt, tokens = ids[mask == 1].tolist(), self.tokenizer.item_token_table[target]
            answer = tokens[tokens >= 0].tolist()
            examples.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
        return self.rows(examples)


def ranks_from_items(items_BK: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
    """1-based rank of each target in its list, `inf` when it is not there. (B,) float32

    Example:
        >>> ranks_from_items(torch.tensor([[4, 2, -1], [1, 0, 3]]), torch.tensor([2, 5]))
        tensor([2., inf])
    """
    hit_BK = items_BK == targets_B.unsqueeze(1)
    first_B = hit_BK.int().argmax(dim=1) + 1.0
    return torch.where(hit_BK.any(dim=1), first_B, torch.inf)


def ranking_metrics(ranks_M: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """`{"recall@5": ..., "ndcg@5": ...}` for each K, means over the M rows.

    Example:
        >>> ranking_metrics(np.array([1.0, np.inf]), [10])
        {'recall@10': 0.5, 'ndcg@10': 0.5}
    """
    ranks_M = np.asarray(ranks_M, np.float64)
    metrics = {}
    for k in ks:
        metrics[f"recall@{k}"] = float(recall_values(ranks_M, k).mean())
        metrics[f"ndcg@{k}"] = float(ndcg_values(ranks_M, k).mean())
    return metrics
