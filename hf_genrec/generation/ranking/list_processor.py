"""CandidateListProcessor: an answer is all of a request's candidates, each once, with a separator between them.

The always-valid form of a ranking by a language model. Each step allows the tokens that continue a candidate not yet
written: one walk down the prefix tree of what is left. Only the candidate being written is walked again at each step, so
that long lists do not cost the square of their length, as general answers do (`ItemTrieLogitsProcessor` with `num_items`,
which gives the same tokens for requests of equally many candidates).

Shape legend: B requests, R = B * beams rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import RequestError
from ..answer_processor import AnswerProcessor, check_vocabulary, rows_per_request

Tokens = tuple[int, ...]


class CandidateListProcessor(AnswerProcessor):
    """Allows only lists of candidates.

    Args:
        candidates: per request the candidates as token ids; equal ones count once, one may be the beginning of another.
        prompt_length: tokens before the answer, padding included.
        separator_token_id: stands between two candidates and in none of them.
        eos_token_id: ends the answer once all are written, and at once after anything that is no such list.

    Raises:
        RequestError: a request without candidates, an empty candidate, or one that holds the separator (row named).

    Example:
        >>> processor = CandidateListProcessor([[(5, 6), (5,)]], 1, separator_token_id=2, eos_token_id=1)
        >>> masked = processor(torch.tensor([[0, 5]]), torch.zeros(1, 8))
        >>> masked.isfinite().nonzero()[:, 1].tolist()
        [2, 6]
    """

    def __init__(
        self, candidates: Sequence[Sequence[Tokens]], prompt_length: int, *, separator_token_id: int, eos_token_id: int
    ):
        super().__init__(prompt_length, eos_token_id)
        self.separator_token_id = int(separator_token_id)
        self.candidates = [frozenset(tuple(texts) for texts in row) for row in candidates]
        for number, row in enumerate(self.candidates):
            if not row or not all(row) or any(separator_token_id in texts for texts in row):
                raise RequestError(
                    f"row {number}: a request needs candidates, none of them empty or with the separator "
                    f"{separator_token_id} in it."
                )
        self._vocabulary = 1 + max(max(texts) for row in self.candidates for texts in row)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Masks scores (R, V) with -inf outside the legal tokens of each row of input_ids (R, T)."""
        check_vocabulary(scores, self._vocabulary)
        answers = self.answers(input_ids).tolist()
        width = rows_per_request(len(answers), len(self.candidates))
        legal = [(row, token) for row, ids in enumerate(answers) for token in self.next_tokens(row // width, ids)]
        rows, tokens = torch.tensor(legal, device=scores.device).T
        masked = torch.full_like(scores, -torch.inf)
        masked[rows, tokens] = scores[rows, tokens]
        return masked  # type: ignore[return-value]

    def next_tokens(self, request: int, answer: Sequence[int]) -> list[int]:
        """Tokens that may follow an answer so far, ascending."""
        *written, current = split_list(answer, self.separator_token_id)
        left = self.candidates[request] - set(written)
        if len(left) != len(self.candidates[request]) - len(written):  # something else was written, or one twice
            return [self.eos_token_id]
        place = len(current)
        legal = {texts[place] for texts in left if len(texts) > place and texts[:place] == current}
        if current in left:
            legal.add(self.separator_token_id if len(left) > 1 else self.eos_token_id)
        return sorted(legal) or [self.eos_token_id]


def split_list(answer: Sequence[int], separator: int) -> list[Tokens]:
    """The parts of a list; the last one may be unfinished.

    Example:
        >>> split_list([5, 6, 2, 5], separator=2)
        [(5, 6), (5,)]
    """
    parts: list[list[int]] = [[]]
    for token in answer:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return [tuple(part) for part in parts]
