"""Answers scored from one pass over each prompt, and one for prompts that begin one another: preference rows, rollouts.

S-DPO (arXiv 2406.09215) compares 1 + K answers of a prompt, and trainers of pairs run the prompt once per answer. Here a
prompt is read once and its answers stand behind it side by side: a 4-D attention mask lets a token see its prompt and its
own answer, explicit position ids put every answer right behind the prompt. An answer of one token (an item with a single
code, a letter, "Yes") needs no place at all: it is scored where the prompt ends. A causal model reads a prompt the same
way whatever comes behind it, so rows whose prompts are beginnings of one another share the pass too: a window of 50 items
holds 49 preferences (`item_dataset(window=...)` makes such rows).

*Relations*: log-probabilities, and with them losses and gradients, are those of a pass per answer, to rounding.

Shape legend: B prompts, H of them kept, A answers (first the B chosen, then the rejected, prompt after prompt), T tokens of
a kept prompt with what stands behind it, Q tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

MOST_TOKENS = 4096  # of a packed row: the mask has the square of it


def kept_prompts(prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Leave out the prompts that begin another one.

    Returns:
        indices of the H prompts that stay, and for each of the B prompts its place among them.

    Example:
        >>> kept_prompts([[1, 2], [1], [3], [1, 2, 4], [1, 2]])
        ([2, 3], [1, 1, 0, 1, 1])
    """
    ordered = sorted(range(len(prompts)), key=lambda row: tuple(prompts[row]))
    host, host_of = -1, [0] * len(prompts)
    for row in reversed(ordered):  # all that begin with a prompt stand right behind it
        if host < 0 or list(prompts[host][: len(prompts[row])]) != list(prompts[row]):
            host = row
        host_of[row] = host
    kept = sorted(set(host_of))
    place = {row: number for number, row in enumerate(kept)}
    return kept, [place[host] for host in host_of]


def shared_prompt_batch(
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[Sequence[int]]],
    *,
    pad_token_id: int,
    left: bool = False,
    multiple_of: int | None = None,
    longest: int | None = None,
) -> dict[str, torch.Tensor] | None:
    """Prompts and answers as inputs of a model whose fused head reads `answer_tokens` (`item_head.py`).

    Args:
        prompts: B prompts.
        chosen: B answers.
        rejected: B lists of answers.
        pad_token_id, multiple_of: how rows are padded.
        left: padding in front (answers of one token; longer ones always have it behind).
        longest: most tokens of a prompt and its longest answer; None: no bound; 0: answers of one token only.

    Returns:
        None where answers are longer than one token and do not fit, else `input_ids`, `completion_mask` (H, T; the latter all
        0, since no place has a label), `attention_mask` (H, T), or bool (H, 1, T, T) where an answer has several tokens;
        there, and with padding in front, `position_ids` (H, T); `answer_rows` (A,) and `answer_places`, `answer_tokens`
        (A, Q): a token is scored behind input place (row, place); -100 behind the end of an answer.
    """
    kept, host_of = kept_prompts(prompts)
    answers = [*chosen, *(answer for several in rejected for answer in several)]
    owner = [*range(len(prompts)), *(row for row, several in enumerate(rejected) for _ in several)]
    most_Q = max(map(len, answers))
    behind = [0] * len(kept)  # input tokens of answers behind each kept prompt
    for answer, row in zip(answers, owner):
        behind[host_of[row]] += len(answer) - 1
    sizes = [len(prompts[row]) + extra for row, extra in zip(kept, behind)]
    packed = most_Q > 1
    if packed and (
        max(sizes) > MOST_TOKENS
        or (longest is not None and max(len(prompts[row]) + len(a) for a, row in zip(answers, owner)) > longest)
    ):
        return None
    width = max(*sizes, most_Q + 1) if packed else max(sizes)  # room for Q scores per row of the shifted labels
    width = width if multiple_of is None else -(-width // multiple_of) * multiple_of
    starts = [width - size if left and not packed else 0 for size in sizes]

    ids_HT = np.full((len(kept), width), pad_token_id, np.int64)
    mask_HT = np.zeros((len(kept), width), np.int64)
    for number, (row, start) in enumerate(zip(kept, starts)):
        ids_HT[number, start : start + len(prompts[row])] = prompts[row]
        mask_HT[number, start : start + len(prompts[row])] = 1
    places_AQ = np.zeros((len(answers), most_Q), np.int64)
    tokens_AQ = np.full((len(answers), most_Q), -100, np.int64)
    positions_HT = np.maximum(mask_HT.cumsum(1) - 1, 0)
    visible_HTT = np.zeros((len(kept), width, width) if packed else (0, 0, 0), bool)
    if packed:
        visible_HTT |= np.tril(np.ones((width, width), bool)) & mask_HT[:, None, :].astype(bool)
        visible_HTT |= np.eye(width, dtype=bool)  # padding sees itself, so that no row is empty
    free = [start + len(prompts[row]) for row, start in zip(kept, starts)]
    for number, (answer, row) in enumerate(zip(answers, owner)):
        host, length = host_of[row], len(prompts[row])
        places_AQ[number, 0] = starts[host] + length - 1
        tokens_AQ[number, : len(answer)] = answer
        if len(answer) > 1:
            first, end = free[host], free[host] + len(answer) - 1
            places_AQ[number, 1 : len(answer)] = np.arange(first, end)
            ids_HT[host, first:end] = answer[:-1]
            positions_HT[host, first:end] = length + np.arange(end - first)
            visible_HTT[host, first:end, :first] = False
            visible_HTT[host, first:end, :length] = True
            visible_HTT[host, first:end, first:end] = np.tril(np.ones((end - first, end - first), bool))
            free[host] = end
    batch = {
        "input_ids": torch.from_numpy(ids_HT),
        "attention_mask": torch.from_numpy(visible_HTT[:, None] if packed else mask_HT),
        "completion_mask": torch.zeros(ids_HT.shape, dtype=torch.long),
        "answer_rows": torch.tensor([host_of[row] for row in owner]),
        "answer_places": torch.from_numpy(places_AQ),
        "answer_tokens": torch.from_numpy(tokens_AQ),
    }
    return batch | ({"position_ids": torch.from_numpy(positions_HT)} if packed or left else {})


def packed_answers(
    ids_RT: torch.Tensor, mask_RT: torch.Tensor, answer_width: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows of left-padded prompts and answers behind them -> every prompt once, its answers behind it side by side.

    Args:
        ids_RT, mask_RT: R rows; the last `answer_width` = Q columns are answers. Rows of equal prompts may stand anywhere.
        answer_width: Q.

    Returns:
        `input_ids`, `position_ids` (H, S), `attention_mask` (H, 1, S, S) bool; host_R; index_RQ: place whose output scores
        each answer token, counted from the last token of the prompt.

    Example:
        >>> ids = torch.tensor([[7, 8, 1, 2], [7, 8, 3, 4], [0, 9, 5, 6]])
        >>> inputs, host, index = packed_answers(ids, (ids > 0).long(), 2)
        >>> inputs["input_ids"].tolist(), host.tolist(), index.tolist()
        ([[0, 9, 5, 0], [7, 8, 1, 3]], [1, 1, 0], [[0, 1], [0, 2], [0, 1]])
    """
    rows, device = len(ids_RT), ids_RT.device
    width = ids_RT.shape[1] - answer_width
    behind = answer_width - 1  # the last token of an answer is no input
    pairs_R2T = torch.stack([ids_RT[:, :width], mask_RT[:, :width]], dim=1)
    prompts_H2P, host_R = pairs_R2T.unique(dim=0, return_inverse=True)
    hosts = len(prompts_H2P)
    order_R = host_R.argsort(stable=True)
    counts_H = host_R.bincount(minlength=hosts)
    slot_R = torch.empty_like(host_R)
    slot_R[order_R] = torch.arange(rows, device=device) - (counts_H.cumsum(0) - counts_H)[host_R[order_R]]
    slots = int(counts_H.max())
    size = width + slots * behind

    ids_HS = ids_RT.new_zeros(hosts, size)
    ids_HS[:, :width] = prompts_H2P[:, 0]
    real_HP = prompts_H2P[:, 1].bool()
    positions_HS = ids_RT.new_zeros(hosts, size)
    positions_HS[:, :width] = (real_HP.long().cumsum(1) - 1).clamp(min=0)
    steps_Q = torch.arange(behind, device=device)
    columns_RQ = width + slot_R.unsqueeze(1) * behind + steps_Q
    ids_HS[host_R.unsqueeze(1), columns_RQ] = ids_RT[:, width : width + behind]
    positions_HS[:, width:] = real_HP.sum(1, keepdim=True) + steps_Q.repeat(slots)
    visible_HSS = torch.zeros(hosts, size, size, dtype=torch.bool, device=device)
    visible_HSS[:, :, :width] = real_HP.unsqueeze(1)
    visible_HSS[:, :width, :width] &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
    slot_S = torch.arange(slots, device=device).repeat_interleave(behind)
    step_S = steps_Q.repeat(slots)
    visible_HSS[:, width:, width:] = (slot_S.unsqueeze(1) == slot_S) & (step_S.unsqueeze(1) >= step_S)
    visible_HSS |= torch.eye(size, dtype=torch.bool, device=device)  # padding sees itself
    index_RQ = torch.cat([torch.zeros_like(slot_R).unsqueeze(1), columns_RQ - width + 1], dim=1)
    inputs = {"input_ids": ids_HS, "position_ids": positions_HS, "attention_mask": visible_HSS.unsqueeze(1)}
    return inputs, host_R, index_RQ


class WindowSampler(Sampler[int]):
    """Rows of one window one after another, windows in a random order that depends on (seed, epoch) alone.

    Args:
        windows: (M,) the window of each row; rows of one stand side by side.
        seed: of the order.

    Example:
        >>> sorted(list(WindowSampler([0, 0, 7]))) , list(WindowSampler([5, 5]))
        ([0, 1, 2], [0, 1])
    """

    def __init__(self, windows: Sequence[int], seed: int = 0) -> None:
        numbers_M = np.asarray(windows)
        self.seed, self.epoch, self.count = int(seed), 0, len(numbers_M)
        self.starts = np.flatnonzero(np.r_[True, numbers_M[1:] != numbers_M[:-1]][: self.count])

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        ends = np.r_[self.starts[1:], self.count]
        for window in np.random.default_rng([self.seed, self.epoch]).permutation(len(self.starts)):
            yield from range(int(self.starts[window]), int(ends[window]))
