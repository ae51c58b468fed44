"""Preference rows whose answers are one token each, scored from as few passes over their prompts as there can be.

S-DPO (arXiv 2406.09215) compares 1 + K answers of a prompt, and trainers of pairs run the prompt once per answer. An answer
of one token (an item with a single code, a letter, "Yes") is scored where the prompt ends, so one pass serves all of them.
A causal model reads a prompt the same way whether or not more comes behind it, so rows whose prompts are beginnings of one
another share that pass too: a window of 50 items holds 49 preferences (`item_dataset(window=...)` makes such rows).

*Relations*: log-probabilities, and with them losses and gradients, are those of a pass per answer, to rounding.

Shape legend: B prompts, H of them kept, A answers (first the B chosen, then the rejected, prompt after prompt), T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler


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
    chosen: Sequence[int],
    rejected: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    left: bool = False,
    multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """Rows of one-token answers as inputs of a model whose fused head reads `answer_tokens` (`item_head.py`).

    Args:
        prompts: B prompts.
        chosen: (B,) tokens.
        rejected: B lists of tokens.
        pad_token_id, left, multiple_of: how prompts are padded.

    Returns:
        `input_ids`, `attention_mask`, `completion_mask` (H, T; the last all 0, since no answer is an input), and
        `answer_rows`, `answer_places`, `answer_tokens` (A,): an answer is scored behind input place (row, place).
    """
    kept, host_of = kept_prompts(prompts)
    longest = max(len(prompts[row]) for row in kept)
    width = longest if multiple_of is None else -(-longest // multiple_of) * multiple_of
    ids_HT = torch.full((len(kept), width), pad_token_id, dtype=torch.long)
    mask_HT = torch.zeros_like(ids_HT)
    starts = [width - len(prompts[row]) if left else 0 for row in kept]
    for place, (row, start) in enumerate(zip(kept, starts)):
        ids_HT[place, start : start + len(prompts[row])] = torch.tensor(prompts[row])
        mask_HT[place, start : start + len(prompts[row])] = 1
    counts = torch.tensor([len(answers) for answers in rejected])
    rows_B = torch.tensor(host_of)
    places_B = torch.tensor([starts[host] + len(prompt) - 1 for host, prompt in zip(host_of, prompts)])
    tokens = [*chosen, *(token for answers in rejected for token in answers)]
    return {
        "input_ids": ids_HT,
        "attention_mask": mask_HT,
        "completion_mask": torch.zeros_like(ids_HT),
        "answer_rows": torch.cat([rows_B, rows_B.repeat_interleave(counts)]),
        "answer_places": torch.cat([places_B, places_B.repeat_interleave(counts)]),
        "answer_tokens": torch.tensor(tokens, dtype=torch.long),
    }


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
