"""Keys and values of a prompt and of the codes that its beams grew: one cache row per user, whatever the beams.

The tokens of all levels of all beams of a user are extra columns behind the prompt's. A token sees the prompt, the
columns of its own beam (its ancestors in the tree of beams) and itself: a 4-D attention mask says which, explicit
position ids put every beam right behind the prompt. So a level runs ONE new token per beam, the prompt's keys are held
once, and choosing other beams only changes the table of ancestors: no key is ever repeated or reordered.

Shape legend: B users, T prompt tokens, K beams, l codes so far, M columns held, H key heads, E head width, C codes of the
level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from .beam_cache import CodeScores
from .causal_head import CausalHead

_COMPACT_FROM = 256  # columns; fewer are not worth the search for dead ones


class PromptRead(Exception):
    """Raised by PromptCache once the keys of the last layer are there: the rest of that layer serves no later token."""


class PromptCache(DynamicCache):
    """The cache of a prompt that is being read.

    Args:
        stop_at: number of the last layer; reading ends (PromptRead) where its keys are known. None: reads on.
    """

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.stop_at = stop_at

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.stop_at:
            raise PromptRead
        return result


class TreeLayer(DynamicLayer):
    """One layer's view of the prompt (shared, never written) and of the columns behind it (own).

    Attributes:
        prompt: keys and values (B, H, T, E) of the prompt.
        columns: keys and values (B, H, M, E) behind it.
        rows: the users whose tokens come next.
        select_BX: columns that the next tokens of these users may look at; None = all.
        fresh: keys and values that came in since the last `keep`, one entry per pass.
    """

    def __init__(self, prompt: tuple[torch.Tensor, torch.Tensor]):
        super().__init__()
        self.prompt = prompt
        self.lazy_initialization(*prompt)
        self.columns = (prompt[0][:, :, :0], prompt[1][:, :, :0])
        self.rows = slice(None)
        self.select_BX: torch.Tensor | None = None
        self.fresh: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt, columns and new tokens side by side; what is held does not change before `keep`."""
        self.fresh.append((key_states, value_states))
        seen = []
        for prompt, columns, new in zip(self.prompt, self.columns, (key_states, value_states)):
            seen.append(torch.cat([prompt[self.rows], _select(columns[self.rows], self.select_BX), new], dim=-2))
        return seen[0], seen[1]

    def look(self, rows: slice = slice(None), select_BX: torch.Tensor | None = None) -> None:
        self.rows, self.select_BX = rows, select_BX

    def keep(self, passes_per_row: int) -> None:
        """The tokens of all passes since the last call become columns; passes as in `joined`."""
        keys, values = (joined([new[part] for new in self.fresh], passes_per_row, dim=-2) for part in (0, 1))
        self.columns = (torch.cat([self.columns[0], keys], dim=-2), torch.cat([self.columns[1], values], dim=-2))

    def with_fresh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt with the new tokens behind it."""
        keys, values = self.fresh[0]
        return torch.cat([self.prompt[0], keys], dim=-2), torch.cat([self.prompt[1], values], dim=-2)

    def compact(self, columns_BX: torch.Tensor) -> None:
        self.columns = (_select(self.columns[0], columns_BX), _select(self.columns[1], columns_BX))

    def get_seq_length(self) -> int:
        held = self.columns[0].shape[-2] if self.select_BX is None else self.select_BX.shape[-1]
        return self.prompt[0].shape[-2] + held


def _select(held_BHME: torch.Tensor, select_BX: torch.Tensor | None) -> torch.Tensor:
    if select_BX is None:
        return held_BHME
    batch, heads, _, width = held_BHME.shape
    index = select_BX.to(held_BHME.device)[:, None, :, None].expand(batch, heads, -1, width)
    return held_BHME.gather(2, index)


def joined(parts: list[torch.Tensor], parts_per_row: int, dim: int) -> torch.Tensor:
    """Puts together what passes over groups of rows (users) and, inside each, over parts along `dim` gave."""
    if len(parts) == 1:
        return parts[0]
    groups = [parts[start : start + parts_per_row] for start in range(0, len(parts), parts_per_row)]
    return torch.cat([torch.cat(group, dim=dim) if len(group) > 1 else group[0] for group in groups])


@dataclass(frozen=True)
class Prompt:
    """What a search needs of a batch of prompts. Never written after reading.

    Attributes:
        layers: keys and values (B, H, T, E) of each layer.
        mask_BT: True at real tokens; padding is on the left.
        next_position_B: position of the first token behind the prompt.
    """

    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    mask_BT: torch.Tensor
    next_position_B: torch.Tensor

    def tree(self) -> list[TreeLayer]:
        return [TreeLayer(layer) for layer in self.layers]


# tokens_BQ, mask_BQS (True = visible), positions_BQ, cache -> outputs of the tokens, (B, Q, something)
RunTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Cache], torch.Tensor]


class TreeBeams:
    """The BeamCache (see beam_cache) of causal language models: one new token per beam and level.

    Several searches may run from one prompt at the same time; each has its own columns.

    Args:
        prompt: of B users.
        first_B1x: what `head` keeps of the prompt's last token.
        head: makes scores.
        run: the model.
        beams_per_call: beams of a user in one forward pass; more are run in parts, each looking only at its own
            ancestors, so that attention does not grow with the square of all beams.
        tokens_per_call: users * beams in one forward pass, where that leaves at least one user.
    """

    def __init__(
        self,
        prompt: Prompt,
        first_B1x: torch.Tensor,
        head: CausalHead,
        run: RunTokens,
        beams_per_call: int,
        tokens_per_call: int,
    ):
        self.prompt, self.head, self.run = prompt, head, run
        self.beams_per_call, self.tokens_per_call = beams_per_call, tokens_per_call
        self.layers = prompt.tree()
        self.outputs_BKx: torch.Tensor = first_B1x
        batch, device = prompt.mask_BT.shape[0], prompt.mask_BT.device
        # column of each code of each current beam; the last code is no column before it has run
        self.ancestors_BKl = torch.zeros(batch, 1, 0, dtype=torch.long, device=device)
        self.waiting_BK: torch.Tensor | None = None

    @property
    def level(self) -> int:
        """Codes so far."""
        return self.ancestors_BKl.shape[-1] + (self.waiting_BK is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns, without the prompt."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.columns)

    def score(self, level: int, total: bool = True) -> CodeScores:
        """Scores of the codes of `level` after each current beam, see `BeamCache.score`."""
        self._run_waiting()
        assert level == self.level, f"{self.level} codes so far, asked for level {level}"
        return self.head.scores(self.outputs_BKx, level, total)

    def reorder(self, parents_BK: torch.Tensor, codes_BK: torch.Tensor, level: int) -> None:
        """Keep these beams, see `BeamCache.reorder`. Moves no key."""
        self._run_waiting()
        self.ancestors_BKl = self.ancestors_BKl.gather(1, parents_BK.unsqueeze(-1).expand(-1, -1, level))
        self._drop_dead_columns()
        # an ended beam goes on with any token: nobody reads its scores
        self.waiting_BK = codes_BK.clamp(0, self.head.codebook_sizes[level] - 1) + self.head.level_offsets[level]

    def _run_waiting(self) -> None:
        """One pass (or one per chunk of beams) for the codes that have not been run."""
        if self.waiting_BK is None:
            return
        tokens_BK, level, held = self.waiting_BK, self.level, self.layers[0].columns[0].shape[-2]
        batch, beams = tokens_BK.shape
        parts = [slice(start, start + self.beams_per_call) for start in range(0, beams, self.beams_per_call)]
        users = max(1, self.tokens_per_call // min(beams, self.beams_per_call))
        outputs = []
        try:
            for rows in (slice(start, start + users) for start in range(0, batch, users)):
                for part in parts:
                    ancestors = self.ancestors_BKl[rows, part]
                    chunked = len(parts) > 1
                    for layer in self.layers:
                        layer.look(rows, ancestors.flatten(1) if chunked else None)
                    visible = ancestors_in_order(ancestors) if chunked else ancestors_among(ancestors, held)
                    mask = beams_mask(self.prompt.mask_BT[rows], visible)
                    positions = (self.prompt.next_position_B[rows] + level - 1).unsqueeze(1)
                    output = self.run(
                        tokens_BK[rows, part], mask, positions.expand(-1, mask.shape[1]), Cache(layers=[*self.layers])
                    )
                    outputs.append(self.head.keep(output, level))
            for layer in self.layers:
                layer.keep(len(parts))
        finally:
            for layer in self.layers:
                layer.look()
                layer.fresh = []
        self.outputs_BKx = joined(outputs, len(parts), dim=1)
        own = torch.arange(held, held + beams, device=tokens_BK.device).expand(batch, -1)
        self.ancestors_BKl = torch.cat([self.ancestors_BKl, own.unsqueeze(-1)], dim=-1)
        self.waiting_BK = None

    def _drop_dead_columns(self) -> None:
        """Forget columns that no beam descends from, once they are the greater part of many (long item titles)."""
        held = self.layers[0].columns[0].shape[-2]
        if held < _COMPACT_FROM:
            return
        used_BM = torch.zeros(len(self.ancestors_BKl), held, dtype=torch.bool, device=self.ancestors_BKl.device)
        used_BM.scatter_(1, self.ancestors_BKl.flatten(1), True)
        count = int(used_BM.sum(-1).max())
        if 2 * count > held:
            return
        columns = used_BM.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :count]
        for layer in self.layers:
            layer.compact(columns)
        moved = (used_BM.cumsum(-1) - 1).gather(1, self.ancestors_BKl.flatten(1))
        self.ancestors_BKl = moved.view_as(self.ancestors_BKl)


def ancestors_among(ancestors_BKl: torch.Tensor, held: int) -> torch.Tensor:
    """Which of `held` columns each beam descends from: (B, K, M) bool."""
    visible = torch.zeros(*ancestors_BKl.shape[:2], held, dtype=torch.bool, device=ancestors_BKl.device)
    return visible.scatter_(2, ancestors_BKl, True)


def ancestors_in_order(ancestors_BKl: torch.Tensor) -> torch.Tensor:
    """The same where the columns are those of the beams one after the other: (B, K, K * l) bool."""
    batch, beams, length = ancestors_BKl.shape
    number = torch.arange(beams, device=ancestors_BKl.device)
    return (number.unsqueeze(1) == number.repeat_interleave(length)).expand(batch, -1, -1)


def beams_mask(prompt_mask_BT: torch.Tensor, visible_BKM: torch.Tensor) -> torch.Tensor:
    """What one new token per beam sees: the prompt, `visible_BKM` and itself. (B, K, T + M + K) bool."""
    batch, beams, _ = visible_BKM.shape
    itself = torch.eye(beams, dtype=torch.bool, device=visible_BKM.device).expand(batch, -1, -1)
    return torch.cat([prompt_mask_BT.unsqueeze(1).expand(-1, beams, -1), visible_BKM, itself], dim=-1)
