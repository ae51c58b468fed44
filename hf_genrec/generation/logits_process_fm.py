"""FMIndexLogitsProcessor: generates substrings of the catalogue's texts, from any place in them (TransRec, arXiv
2310.06491).

A title's most telling words are often in its middle. Where a prefix tree forces an answer to begin with the first word,
this constraint lets it begin anywhere: an answer is any substring of any document of an FMIndex, and no other text. What
was generated is grounded afterwards (`FMIndex.documents_containing`).

Shape legend: R rows, A answer tokens, V vocabulary, X continuations of all rows, B requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import IncompatibleComponentsError, RequestError
from .answer_processor import AnswerProcessor, check_vocabulary, rows_per_request
from .fm_index import FMIndex

_ENDS = ("anywhere", "document_end")


class FMIndexLogitsProcessor(AnswerProcessor):
    """Allows only tokens that continue the answer to a substring of the corpus.

    Args:
        index: an FMIndex, or several: one per facet of the items (titles, attributes, codes).
        prompt_length: tokens before the answer in every row.
        eos_token_id: token that ends an answer, at the model's own score. After an answer that occurs nowhere it is the
            only legal token.
        end: "anywhere" = an answer may end after any substring of at least one token; "document_end" = only where a
            document ends.
        facets: (B,) which index each request uses; needed for more than one index.
        renormalize: renormalise log-probabilities over the legal tokens.

    Relations: an answer that begins where a document does is also an answer of CandidateTrieLogitsProcessor over the
    documents' beginnings; answers from the middle are legal here only. In beam search finished substrings of different
    length compete: `length_penalty=0.0` ranks them by probability.

    Raises:
        RequestError: no end token, no index, an unknown `end`, a facet without an index.
        IncompatibleComponentsError: the end token occurs in the corpus; at a call, rows that are no multiple of the
        requests, or a model that scores fewer tokens than the corpus uses.

    Example:
        index = FMIndex.from_texts(tokenizer, [" Star Wars", " The Empire Strikes Back"])
        processor = FMIndexLogitsProcessor(index, inputs["input_ids"].shape[1], eos_token_id=tokenizer.eos_token_id)
        model.generate(**inputs, num_beams=20, max_new_tokens=15, logits_processor=[processor])
    """

    def __init__(
        self,
        index: FMIndex | Sequence[FMIndex],
        prompt_length: int = 1,
        *,
        eos_token_id: int | None = None,
        end: str = "anywhere",
        facets: Sequence[int] | None = None,
        renormalize: bool = False,
    ):
        super().__init__(prompt_length, eos_token_id)
        self.indexes = [index] if isinstance(index, FMIndex) else list(index)
        if not self.indexes:
            raise RequestError("there is no index to generate from; give at least one FMIndex.")
        if end not in _ENDS:
            raise RequestError(f"end must be one of {', '.join(_ENDS)}, got {end!r}.")
        if facets is None and len(self.indexes) > 1:
            raise RequestError(f"{len(self.indexes)} indexes need facets: the number of its index for each request.")
        self.facets = None if facets is None else [int(facet) for facet in facets]
        wrong = [facet for facet in self.facets or [] if not 0 <= facet < len(self.indexes)]
        if wrong or self.facets == []:
            raise RequestError(f"facets {self.facets} do not name indexes 0..{len(self.indexes) - 1}.")
        for number, one in enumerate(self.indexes):
            if one.count([self.eos_token_id]):
                raise IncompatibleComponentsError(
                    f"index {number} holds the end token {self.eos_token_id}; tokenise the texts without special tokens."
                )
        self.end = end
        self.renormalize = bool(renormalize)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Masks scores (R, V) with -inf outside the legal tokens of each row of input_ids (R, T)."""
        answer_RA = self.answers(input_ids)
        check_vocabulary(scores, max(index.vocabulary for index in self.indexes))
        if answer_RA.shape[1] == 0 and self.facets is None:  # every row has the same choice
            closed_1V = self._mask(answer_RA[:1], torch.zeros_like(scores[:1]), self.indexes[0])
            masked = scores + closed_1V
        elif self.facets is None:
            masked = self._mask(answer_RA, scores, self.indexes[0])
        else:
            beams = rows_per_request(scores.shape[0], len(self.facets))
            facet_R = torch.tensor(self.facets, device=scores.device).repeat_interleave(beams)
            masked = torch.empty_like(scores)
            for number in sorted(set(self.facets)):
                rows = (facet_R == number).nonzero()[:, 0]
                masked[rows] = self._mask(answer_RA[rows], scores[rows], self.indexes[number])
        return masked.log_softmax(-1) if self.renormalize else masked  # type: ignore[return-value]

    def _mask(self, answer_RA: torch.Tensor, scores_RV: torch.Tensor, index: FMIndex) -> torch.Tensor:
        index = index.to(scores_RV.device)
        length_R = torch.full((answer_RA.shape[0],), answer_RA.shape[1], device=scores_RV.device)
        start_R, end_R = index.find(answer_RA)
        row_X, token_X, at_end_R = index.continuations(start_R, end_R, length_R)
        masked = torch.full_like(scores_RV, -torch.inf)
        masked[row_X, token_X] = scores_RV[row_X, token_X]
        may_end_R = (length_R > 0) & (at_end_R | (self.end == "anywhere"))
        may_end_R |= end_R == start_R  # not in the corpus: nothing else is left
        own = scores_RV[:, self.eos_token_id]
        masked[:, self.eos_token_id] = own.masked_fill(~may_end_R, -torch.inf)
        return masked
