"""PerLevelLogitsProcessor: only the code tokens of the current level, whether or not an item has that code.

The constraint of models that score each level on its own, RPG (arXiv 2506.05781) and NEZHA (arXiv 2511.18793): the
softmax of level l runs over its codebook. It needs no catalogue, so it also serves models that must be free to spell new
codes; what it spells need not exist.

Shape legend: R rows, V vocabulary, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import IncompatibleComponentsError, RequestError
from .answer_processor import AnswerProcessor, check_vocabulary, end_token


class PerLevelLogitsProcessor(AnswerProcessor):
    """Allows the tokens of level l at the l-th place of an item, and the end token after the last item.

    Args:
        tokenizer: a tokenizer with item tokens, or None with `level_offsets` and `codebook_sizes`.
        prompt_length: tokens before the answer in every row.
        level_offsets: (L,) token id of code 0 of each level.
        codebook_sizes: (L,) codes of each level.
        eos_token_id: the tokenizer's end token, else its padding token; it costs nothing after the last item.
        num_items: items per answer.
        renormalize: log-probabilities over the level's own codes, as these models are trained.

    Relations: ItemTrieLogitsProcessor with every combination of codes in the catalogue.

    Raises:
        RequestError: no end token, or numbers below 1.
        IncompatibleComponentsError: neither a tokenizer nor both tables.

    Example:
        >>> processor = PerLevelLogitsProcessor(None, 1, level_offsets=[4, 6], codebook_sizes=[2, 3], eos_token_id=1)
        >>> masked = processor(torch.tensor([[0, 5]]), torch.zeros(1, 9))
        >>> masked.isfinite().nonzero()[:, 1].tolist()
        [6, 7, 8]
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_length: int = 1,
        *,
        level_offsets: Sequence[int] | None = None,
        codebook_sizes: Sequence[int] | None = None,
        eos_token_id: int | None = None,
        num_items: int = 1,
        renormalize: bool = False,
    ):
        offsets = level_offsets if level_offsets is not None else getattr(tokenizer, "level_offsets", None)
        sizes = codebook_sizes if codebook_sizes is not None else getattr(tokenizer, "codebook_sizes", None)
        if offsets is None or sizes is None or len(offsets) != len(sizes) or len(sizes) == 0:
            raise IncompatibleComponentsError(
                "the tokens of each level are unknown: pass a tokenizer with item tokens, or level_offsets and "
                "codebook_sizes, one number per level each."
            )
        super().__init__(prompt_length, end_token(tokenizer, eos_token_id))
        if num_items < 1:
            raise RequestError(f"num_items must be >= 1, got {num_items}.")
        self.blocks = [(int(first), int(first) + int(size)) for first, size in zip(np.asarray(offsets), sizes)]
        self.num_items = int(num_items)
        self.renormalize = bool(renormalize)
        self.catalogue_fingerprint = getattr(tokenizer, "catalogue_fingerprint", None)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Masks scores (R, V) with -inf outside the current level's codes."""
        generated = self.answers(input_ids).shape[1]
        check_vocabulary(scores, max(end for _, end in self.blocks))
        masked = torch.full_like(scores, -torch.inf)
        if generated >= self.num_items * len(self.blocks):
            masked[:, self.eos_token_id] = 0.0
            return masked  # type: ignore[return-value]
        first, end = self.blocks[generated % len(self.blocks)]
        block = scores[:, first:end]
        masked[:, first:end] = block.log_softmax(-1) if self.renormalize else block
        return masked  # type: ignore[return-value]
