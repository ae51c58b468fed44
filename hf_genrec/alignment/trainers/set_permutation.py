"""Set permutation regularisation: a new segmentation of training histories in every epoch (ActionPiece, arXiv 2502.13581).

Shape legend: B rows, S tokens of a row, T targets of a window, L tokens of a target.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_genrec.data.collators import IGNORED, PrefixCollator
from hf_genrec.errors import IncompatibleComponentsError


class SetPermutationCollator(PrefixCollator):
    """Batches for an `ActionPieceTokenizer` that segments histories anew, by (seed, epoch), in every epoch.

    It works on a copy of the tokenizer: validation and serving keep the segmentation they have. The trainer calls
    `set_epoch`; a batch depends on nothing but (seed, epoch, items), so a resumed run repeats it.

    Samples with a `target` (`PrefixDataset`) become one history and its target each, as in `PrefixCollator`. Windows
    (`WindowDataset`) are cut in stretches of random length; the item behind each stretch is a target. A stretch is segmented
    by itself, so that no token knows of an item behind its cut: with a causal encoder all targets of a window are trained in
    one pass (`labels` (B, T, L) and `history_lengths` (B, T), as `packed_forward` reads them). When recommending, a
    history is one stretch.

    Args:
        tokenizer: with `resegment`; no user tokens and no end token in windows.
        seed: of segmentations and cuts.
        permute: False = the segmentation without chance in every epoch.
        stretch: mean number of items of a stretch, at least 1; 1 makes every item but the first a target.
        max_items: as in `PrefixCollator`.

    Raises:
        IncompatibleComponentsError: a tokenizer without `resegment`, or a stretch below 1.

    Relations: for prefixes, `permute=False` is `PrefixCollator`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        seed: int = 0,
        permute: bool = True,
        stretch: float = 3.0,
        max_items: int | None = None,
    ) -> None:
        if not hasattr(tokenizer, "resegment"):
            raise IncompatibleComponentsError(
                f"{type(tokenizer).__name__} has one segmentation only: set permutation needs an ActionPieceTokenizer."
            )
        if not stretch >= 1:
            raise IncompatibleComponentsError(f"stretch is {stretch}: a stretch has at least 1 item.")
        own = copy.deepcopy(tokenizer)
        own.segmentations = 1
        own.resegment(None)
        super().__init__(own, max_items)
        self.seed, self.permute, self.stretch = int(seed), bool(permute), float(stretch)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Segment and cut by (seed, epoch) from now on."""
        self.epoch = int(epoch)
        if self.permute:
            self.tokenizer.resegment((self.seed, self.epoch))

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` (B, S) and `labels`; the targets' own tokens are segmented without chance."""
        return super().__call__(samples) if "target" in samples[0] else self._packed([s["items"] for s in samples])

    def target_places(self, items: np.ndarray) -> list[int]:
        """Where the targets of a window stand, ascending; the last item is always one."""
        place, places = len(items) - 1, []
        key = zlib.crc32(np.ascontiguousarray(items, np.int64).tobytes())
        generator = np.random.default_rng([self.seed, self.epoch, key])
        while place >= 1:
            places.append(place)
            place -= int(generator.geometric(1.0 / self.stretch))
        return places[::-1]

    def _packed(self, windows: list[np.ndarray]) -> dict[str, torch.Tensor]:
        places = [self.target_places(window) for window in windows]
        stretches = [
            window[start:stop]
            for window, ends in zip(windows, places)
            for start, stop in zip([0, *ends[:-1]], ends, strict=True)
        ]
        longest = max(map(len, windows))
        tokens = self.tokenizer.encode_item_indices(stretches, max_items=longest, padding=False, return_tensors=None)
        waiting = iter(tokens["input_ids"])
        rows: list[list[int]] = []
        lengths_BT = np.zeros((len(windows), max(map(len, places))), np.int64)
        labels_BTL = torch.full((*lengths_BT.shape, self._table_NL.shape[1]), IGNORED)
        for b, (window, ends) in enumerate(zip(windows, places)):
            row: list[int] = []
            for t in range(len(ends)):
                row += next(waiting)
                lengths_BT[b, t] = len(row)
            rows.append(row)
            labels_BTL[b, : len(ends)] = self._table_NL[torch.as_tensor(np.asarray(window)[ends], dtype=torch.long)]
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        for b, row in enumerate(rows):
            start = width - len(row) if self.tokenizer.padding_side == "left" else 0
            input_ids[b, start : start + len(row)] = torch.tensor(row)
        mask = torch.zeros_like(input_ids)
        for b, row in enumerate(rows):
            start = width - len(row) if self.tokenizer.padding_side == "left" else 0
            mask[b, start : start + len(row)] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": labels_BTL,
            "history_lengths": torch.from_numpy(lengths_BT),
        }
