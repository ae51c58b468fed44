"""Training rows of a candidate ranker: lists drawn anew every epoch, yes/no rows, instruction rows, preference rows.

A list is the item that came next and m - 1 others, in an order drawn for every row and epoch, so that no place of the list is
favoured (LlamaRec, arXiv 2311.02089; LLaRA, 2312.02445). A yes/no row asks about one item: from ratings, whether the user liked
it (TALLRec, 2305.00447); without ratings, the item that came next against a drawn one. Everything is a function of (seed,
epoch, row).

Shapes: R training rows, n targets, m candidates, N items, B rows of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset as TableDataset
from torch import Tensor
from torch.utils.data import Dataset

from hf_genrec.alignment.negatives import NegativeSampler
from hf_genrec.alignment.preference_rows import check_answers
from hf_genrec.alignment.tasks.families import LIKED
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import TrainingError
from hf_genrec.models.candidate_ranker.prompts import PromptRow, PromptWriter, padded

_IGNORED = -100
_AT_ONCE = 4096  # rows whose negatives are drawn together


class CandidateDataset(Dataset):
    """Rows {"history", "disliked", "candidates", "target", "label"} of item indices.

    `candidates` holds the target and the drawn items in their order; a yes/no row has the one item asked about in it and a
    `label` of 0 or 1 (lists have -1).

    Args:
        train: R rows, oldest item first; every item but the first of a row is a target.
        sampler: draws what stands beside the target.
        num_candidates: m, places of a list.
        pointwise: yes/no rows.
        max_history: newest items of a history (and of the disliked ones).
        ratings: one per item of `train.items`, NaN = none, for yes/no rows: was the item liked? Items without a rating are
            not asked about. Without ratings a drawn item is asked about beside every target.
        like_from: least rating of a liked item; None = `LIKED` times the highest rating.
        split_history: histories hold the liked items, and `disliked` the others (for prompts that show both); else every
            item that came before, as `recommend` reads them.
        samples: train on a fixed random part of so many rows (few-shot); None = all.
        samples_per_epoch: draw so many rows for each epoch; None = all.
        seed: of all draws.

    Raises:
        TrainingError: nothing to predict, ratings that are all likes or all dislikes, or options that contradict each other.
    """

    def __init__(
        self,
        train: Sequences,
        sampler: NegativeSampler,
        *,
        num_candidates: int,
        pointwise: bool = False,
        max_history: int = 20,
        ratings: np.ndarray | None = None,
        like_from: float | None = None,
        split_history: bool = False,
        samples: int | None = None,
        samples_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        if ratings is not None and (not pointwise or len(ratings) != len(train.items)):
            raise TrainingError(
                "ratings are for yes/no rows (pointwise=True) and must be one per item of the training rows."
            )
        if split_history and ratings is None:
            raise TrainingError(
                "the prompt shows liked and disliked items apart, which needs ratings: give ratings=..., or a wording "
                "without {disliked}."
            )
        self.train, self.sampler, self.seed, self.split_history = train, sampler, int(seed), bool(split_history)
        self.num_candidates, self.pointwise, self.max_history = int(num_candidates), bool(pointwise), int(max_history)
        first = np.zeros(len(train.items), bool)
        first[train.offsets[:-1][train.lengths > 0]] = True
        self.liked: np.ndarray | None = None
        self._rated = np.ones(len(train.items), bool)
        if ratings is not None:
            values, like_from = rated_values(ratings, like_from)
            self.liked, self._rated = values >= like_from, ~np.isnan(values)
        self._row_of = train.row_index()
        positions = np.flatnonzero(~first & self._rated)
        if not len(positions):
            raise TrainingError(
                "no training row has two items (with a rating, where there are ratings), so there is nothing to predict; "
                "bring longer histories."
            )
        # one entry per row of an epoch: the target's place, and whether the row asks about it or about a drawn item
        asked = [(1,) if self.liked is not None else (1, 0) if pointwise else (-1,)] * len(positions)
        self._all = np.array([(place, kind) for place, kinds in zip(positions, asked) for kind in kinds], np.int64)
        if samples is not None and samples < len(self._all):
            self._all = self._all[np.random.default_rng([self.seed, 7]).permutation(len(self._all))[:samples]]
        if self.liked is not None and len(set(self.liked[self._all[:, 0]].tolist())) < 2:
            which = "liked" if self.liked[self._all[0, 0]] else "not liked"
            raise TrainingError(
                f"all {len(self._all)} rated rows are {which} at a threshold of {like_from:g}, so there is "
                "nothing to tell apart: set like_from to a rating between dislikes and likes, use more samples, or leave "
                "the ratings out."
            )
        self.samples_per_epoch = samples_per_epoch
        self.epoch = -1
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows, the other candidates and the orders of this epoch."""
        if epoch == self.epoch:
            return
        self.epoch, chosen = int(epoch), self._all
        if self.samples_per_epoch is not None and self.samples_per_epoch < len(chosen):
            generator = np.random.default_rng([self.seed, self.epoch, 11])
            chosen = chosen[generator.choice(len(chosen), self.samples_per_epoch, replace=False)]
        self._place, self._kind = chosen[:, 0], chosen[:, 1]
        start = self.train.offsets[:-1][self._row_of[self._place]]
        self.lengths = np.minimum(self._place - start, self.max_history)
        wanted = 1 if self.pointwise else self.num_candidates - 1
        self._drawn = np.full((len(chosen), wanted), -1, np.int64)
        if self.liked is not None or not wanted:
            return
        chunks = -(-len(chosen) // _AT_ONCE)
        for number in range(chunks):
            part = slice(number * _AT_ONCE, (number + 1) * _AT_ONCE)
            histories = self.train.select(start[part], self._place[part] - start[part])
            targets = self.train.items[self._place[part]]
            self._drawn[part] = self.sampler(histories, targets, wanted, round=self.epoch * chunks + number)

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, kind = int(self._place[index]), int(self._kind[index])
        start = int(self.train.offsets[self._row_of[place]])
        history, target = self.train.items[start:place], int(self.train.items[place])
        disliked = history[:0]
        if self.liked is not None:
            if self.split_history:
                good, rated = self.liked[start:place], self._rated[start:place]
                history, disliked = history[good], history[rated & ~good]
            candidates, label = np.array([target]), int(self.liked[place])
        elif self.pointwise:
            drawn = int(self._drawn[index, 0])
            label = kind if drawn >= 0 else 1
            candidates = np.array([target if label else drawn])
        else:
            drawn_m = self._drawn[index][self._drawn[index] >= 0]
            candidates, label = np.append(drawn_m, target), -1
            candidates = candidates[np.random.default_rng([self.seed, self.epoch, index]).permutation(len(candidates))]
        return {
            "history": history[-self.max_history :],
            "disliked": disliked[-self.max_history :],
            "candidates": candidates,
            "target": int(candidates[0]) if self.pointwise else target,
            "label": label,
        }


def rated_values(ratings: Any, like_from: float | None = None) -> tuple[np.ndarray, float]:
    """Ratings as float64 (n,), and the least rating of a liked item (infinite where nothing is rated).

    Args:
        ratings: (n,), NaN = none.
        like_from: None = `LIKED` times the highest rating.

    Raises:
        TrainingError: ratings that are no numbers.

    Example:
        >>> rated_values([1.0, 0.5, float("nan"), 0.8])[1]
        0.8
    """
    try:
        values = np.asarray(ratings, np.float64)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"ratings must be numbers ({error}): fix the column, or leave the ratings out.") from error
    if like_from is None:
        like_from = np.inf if np.isnan(values).all() else LIKED * np.nanmax(values)
    return values, float(like_from)


class CandidateCollator:
    """Rows of a `CandidateDataset` as prompts with their answers, labels on the answers only.

    Args:
        model: the ranker; its prompt, answers and slots are used.
        prompts: "hybrid" (with the ranker's soft tokens), "text" (without), or "both": the batch then holds the text
            version under names that begin with "text_".
        padding_side: "right" or "left".

    Returns:
        `input_ids`, `attention_mask`, `labels` (B, T), `slot_items` (B, S), and for user slots `retriever_input_ids` and
        `retriever_attention_mask`.
    """

    def __init__(self, model: Any, prompts: str = "hybrid", padding_side: str = "right") -> None:
        if prompts not in ("hybrid", "text", "both"):
            raise TrainingError(f"prompts is {prompts!r}; choose hybrid, text or both.")
        self.model, self.prompts, self.left = model, prompts, padding_side == "left"

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self._batch(samples, text_only=self.prompts == "text")
        if self.prompts == "both":
            text = self._batch(samples, text_only=True)
            batch |= {f"text_{name}": text[name] for name in ("input_ids", "attention_mask", "labels")}
        if "user" in self.model.config.slots and self.prompts != "text":
            ids, mask = self.model.retriever_inputs([sample["history"] for sample in samples])
            batch |= {"retriever_input_ids": ids.cpu(), "retriever_attention_mask": mask.cpu()}
        return batch

    def _batch(self, samples: Sequence[dict[str, Any]], *, text_only: bool) -> dict[str, Tensor]:
        rows = [training_row(self.model.writer, sample, text_only=text_only) for sample in samples]
        batch = padded([row for row, _ in rows], 0, left=self.left)
        labels = torch.full_like(batch["input_ids"], _IGNORED)
        for place, (row, answer) in enumerate(rows):
            end = labels.shape[1] if self.left else len(row.ids)
            labels[place, end - answer : end] = batch["input_ids"][place, end - answer : end]
        return batch | {"labels": labels}


def training_row(writer: PromptWriter, sample: dict[str, Any], *, text_only: bool = False) -> tuple[PromptRow, int]:
    """Prompt with its answer, and how many tokens the answer has."""
    config, target = writer.config, int(sample["target"])
    behind = PromptRow()
    if config.verbalizer == "letters":
        place = int(np.flatnonzero(np.asarray(sample["candidates"]) == target)[0])
        answer = [int(config.answer_tokens[place])]
    elif config.verbalizer == "yes_no":
        behind = writer.target(target, text_only)
        answer = [int(config.answer_tokens[0 if sample["label"] else 1])]
    else:
        answer = writer.answer(target)
    prompt = writer.write(
        sample["history"],
        sample["candidates"] if "candidates" in config.prompt else (),
        sample["disliked"],
        text_only=text_only,
        reserve=len(behind.ids) + len(answer),
        where=f"the training row with target {target}",
    )
    return prompt + behind + PromptRow(answer), len(answer)


def closed_lists(
    histories: Sequence[np.ndarray], targets_B: np.ndarray, size: int, num_items: int, seed: int = 0
) -> np.ndarray:
    """Lists (B, size) for validation: the target and drawn items outside the history, in a drawn order, -1 = none.

    Each row is a function of (seed, set of items in the history, target) alone.
    """
    lists = np.full((len(histories), size), -1, np.int64)
    for row, (history, target) in enumerate(zip(histories, np.asarray(targets_B).tolist(), strict=True)):
        known = np.unique(np.asarray(history, np.int64))
        rng = np.random.default_rng([seed, target, len(known), *known[-3:].tolist()])
        taken = {target, *known.tolist()}
        members = [target]
        if num_items - len(taken) <= 4 * size:
            free = np.setdiff1d(np.arange(num_items), sorted(taken))
            members += rng.permutation(free)[: size - 1].tolist()
            taken = set(range(num_items))  # nothing is left to draw
        while len(members) < size and num_items - len(taken) > 0:
            drawn = int(rng.integers(num_items))
            if drawn not in taken:
                taken.add(drawn)
                members.append(drawn)
        lists[row, : len(members)] = rng.permutation(members)
    return lists


class InstructionCollator:
    """Rows {"input_ids", "labels"} of any instruction data as a padded batch, for a stage of generic tuning.

    Args:
        padding_side: "right" or "left".
    """

    def __init__(self, padding_side: str = "right") -> None:
        self.left = padding_side == "left"

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded([PromptRow(list(sample["input_ids"])) for sample in samples], 0, left=self.left)
        labels = torch.full_like(batch["input_ids"], _IGNORED)
        for place, sample in enumerate(samples):
            given = torch.as_tensor(sample["labels"], dtype=torch.long)
            columns = slice(labels.shape[1] - len(given), None) if self.left else slice(0, len(given))
            labels[place, columns] = given
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def candidate_preference_rows(model: Any, dataset: CandidateDataset, num_rejected: int, epoch: int = 0) -> TableDataset:
    """Lists as rows for `SoftmaxDPOTrainer` (S-DPO, arXiv 2406.09215): chosen = the target's title, rejected = titles of
    other members of the same list.

    Args:
        model: a ranker with verbalizer "title"; rows are text only, for its `language_model`.
        dataset: lists, not yes/no rows.
        num_rejected: K; rows whose list has fewer others keep those.

    Returns:
        Columns `prompt_ids`, `chosen_ids`, `rejected_ids` (a list of token lists).

    Raises:
        TrainingError: another verbalizer, or lists without others.
    """
    if model.config.verbalizer != "title" or dataset.pointwise:
        raise TrainingError("preference rows compare titles: use verbalizer 'title' and a dataset of lists.")
    dataset.set_epoch(epoch)
    table: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for index in range(len(dataset)):
        sample = dataset[index]
        row, answer = training_row(model.writer, sample, text_only=True)
        chosen = row.ids[len(row.ids) - answer :]
        rejected: list[list[int]] = []
        for item in sample["candidates"]:
            other = model.writer.answer(int(item))
            if other != chosen and other not in rejected:
                rejected.append(other)
        prompt = row.ids[: len(row.ids) - answer]
        check_answers(index, prompt, chosen, rejected[:num_rejected])
        for name, values in zip(table, (prompt, chosen, rejected[:num_rejected]), strict=True):
            table[name].append(values)
    return TableDataset.from_dict(table)
