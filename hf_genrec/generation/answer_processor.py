"""What the logits processors of this room share: where the answer begins, which request a row belongs to, checks.

`generate` gives a processor the whole sequences (prompt and answer) of all rows at every step, in an order of its own:
each processor here is a pure function of them and only needs to know how long the prompt is.

Shape legend: B requests, R = B * beams rows, T tokens, A tokens of the answer so far, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LogitsProcessor

from ..errors import IncompatibleComponentsError, RequestError


class AnswerProcessor(LogitsProcessor):
    """A logits processor that constrains what follows the prompt.

    Args:
        prompt_length: tokens before the answer in every row: `input_ids.shape[1]` for a decoder-only model (padding
            included), 1 for an encoder-decoder (its start token).
        eos_token_id: token that ends an answer.

    Raises:
        RequestError: a negative prompt length, or no end token.
    """

    supports_continuous_batching = False  # there, requests of different prompt lengths share one row
    catalogue_fingerprint: str | None = None

    def __init__(self, prompt_length: int, eos_token_id: int | None):
        if eos_token_id is None:
            raise RequestError("no end token is known: pass eos_token_id=....")
        if prompt_length < 0:
            raise RequestError(f"prompt_length must be >= 0, got {prompt_length}.")
        self.prompt_length = int(prompt_length)
        self.eos_token_id = int(eos_token_id)

    def with_prompt_length(self, prompt_length: int) -> Any:
        """The same processor for prompts of another length; the tables are shared."""
        if prompt_length < 0:
            raise RequestError(f"prompt_length must be >= 0, got {prompt_length}.")
        twin = copy.copy(self)
        twin.prompt_length = int(prompt_length)
        return twin

    def answers(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What was generated so far: (R, A)."""
        if input_ids.shape[1] < self.prompt_length:
            raise RequestError(
                f"prompt_length is {self.prompt_length}, but the sequences hold {input_ids.shape[1]} tokens; "
                "it is input_ids.shape[1] for a decoder-only model and 1 for an encoder-decoder."
            )
        return input_ids[:, self.prompt_length :]


def end_token(tokenizer: Any, eos_token_id: int | None) -> int | None:
    """The given end token, else the tokenizer's, else its padding token."""
    if eos_token_id is not None or tokenizer is None:
        return eos_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id


def check_vocabulary(scores_RV: torch.Tensor, needed: int) -> None:
    """The model must score every token that may be generated.

    Raises:
        IncompatibleComponentsError: a smaller vocabulary.
    """
    if scores_RV.shape[1] < needed:
        raise IncompatibleComponentsError(
            f"the model scores {scores_RV.shape[1]} tokens, the item tokens need {needed}; "
            "call model.resize_token_embeddings(len(tokenizer)) and train it."
        )


def rows_per_request(rows: int, requests: int) -> int:
    """Rows of each request: `generate` repeats a request for its beams, so row r belongs to request r // this.

    Raises:
        IncompatibleComponentsError: rows that are no multiple of the requests.
    """
    if rows == 0 or rows % requests:
        raise IncompatibleComponentsError(
            f"{rows} rows for item lists of {requests} requests; make the processor with one list per row of the batch."
        )
    return rows // requests
