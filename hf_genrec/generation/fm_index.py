"""FM-index over token sequences: every substring of a corpus, whatever place it begins at (TransRec, arXiv 2310.06491).

A prefix tree knows the beginnings of titles; this index knows all their substrings: how often one occurs, which tokens
can follow it, which documents hold it. Three tables over the n tokens of the corpus (one separator per document):

    suffix array    the places of the text in the order of what follows them; a substring is a range of it
    rank keys       token * n + place, ascending: one binary search per token extends a substring to the left
    branch table    places where neighbouring suffixes part, grouped by how many tokens they share: the distinct
                    continuations of a substring of m tokens are one slice of group m, however often it occurs

Separators are smaller than all tokens and different from each other, so no substring spans two documents.

Cost. 20 bytes per token (and per document); building takes about 2.5 s per million tokens on one core (sorting by
doubled prefixes, as many rounds as the longest repeated substring has binary digits). `find` is two binary searches per
token of the substring.

Shape legend: n tokens of the corpus, D documents, R rows, M tokens of a substring, X continuations of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import RequestError


class FMIndex:
    """Substring index of D token sequences.

    Args:
        text_n: int32, tokens + 1 of all documents, each followed by the separator 0.
        suffixes_n: int32 suffix array.
        rank_keys_n: int64 ascending `symbol * n + place`, where `symbol` stands before the suffix of that place.
        branches: int32 places whose suffix parts from the one before it, grouped by the number of shared symbols.
        branch_offsets: int64 where each group begins.
        document_starts: (D + 1,) int64.

    Example:
        >>> index = FMIndex.from_sequences([[5, 6, 7], [6, 7, 8], [6, 7]])
        >>> index.count([6, 7]), index.count([7, 6]), index.documents_containing([7, 8]).tolist()
        (3, 0, [1])
        >>> rows, tokens, at_end = index.continuations(*index.find(torch.tensor([[6, 7]])), torch.tensor([2]))
        >>> rows.tolist(), tokens.tolist(), at_end.tolist()
        ([0], [8], [True])
    """

    def __init__(
        self,
        text_n: torch.Tensor,
        suffixes_n: torch.Tensor,
        rank_keys_n: torch.Tensor,
        branches: torch.Tensor,
        branch_offsets: torch.Tensor,
        document_starts: torch.Tensor,
    ):
        self.text_n = text_n
        self.suffixes_n = suffixes_n
        self.rank_keys_n = rank_keys_n
        self.branches = branches
        self.branch_offsets = branch_offsets
        self.document_starts = document_starts
        self.vocabulary = int(text_n.max())  # every token is smaller
        self._copies: dict[torch.device, FMIndex] = {}

    # ---------------------------------------------------------------- build

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int]]) -> FMIndex:
        """Build from lists of token ids, one per document; document d is sequence d.

        Raises:
            RequestError: no documents, or an empty one or a negative token (row named).
        """
        if len(sequences) == 0:
            raise RequestError("there are no documents to index; give at least one.")
        lengths = np.fromiter((len(row) for row in sequences), dtype=np.int64, count=len(sequences))
        if (lengths == 0).any():
            raise RequestError(f"document {int(lengths.argmin())} has no tokens; leave empty texts out.")
        starts = np.concatenate([[0], np.cumsum(lengths + 1)])
        text = np.zeros(starts[-1], dtype=np.int32)
        inside = np.ones(len(text), dtype=bool)
        inside[starts[1:] - 1] = False
        tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in sequences])
        if tokens.min() < 0 or tokens.max() >= 2**31 - 2:
            place = int(np.flatnonzero((tokens < 0) | (tokens >= 2**31 - 2))[0])
            row = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise RequestError(f"document {row} holds the token id {int(tokens[place])}; ids are 0..2^31 - 3.")
        if len(text) >= 2**31:
            raise RequestError(f"{len(text)} tokens are more than one index holds (2^31); split the corpus.")
        text[inside] = tokens + 1
        suffixes = _suffix_array(text)
        before = text[suffixes - 1].astype(np.int64)  # of suffix 0: the last separator
        rank_keys = np.sort(before * len(text) + np.arange(len(text)))
        branches, offsets = _branches(text, suffixes)
        tables = (text, suffixes, rank_keys, branches, offsets, starts)
        return cls(*(torch.from_numpy(table) for table in tables))

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Sequence[str]) -> FMIndex:
        """Build from texts, tokenised as they are, without special tokens.

        Tokenisers that mark a space in front of a word see a title's first word differently inside a sentence: write
        the leading space if the model does.

        Raises:
            RequestError: an empty text (document named).
        """
        return cls.from_sequences([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])

    # ---------------------------------------------------------------- size

    @property
    def num_documents(self) -> int:
        return self.document_starts.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without separators."""
        return self.text_n.shape[0] - self.num_documents

    @property
    def device(self) -> torch.device:
        return self.text_n.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self._tables())

    def __repr__(self) -> str:
        return f"FMIndex(num_documents={self.num_documents}, num_tokens={self.num_tokens})"

    # ---------------------------------------------------------------- search

    def find(
        self, patterns_RM: torch.Tensor, lengths_R: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranges (R,) of the suffix array that begin with each pattern; empty (start = end) where it never occurs.

        Args:
            patterns_RM: token ids.
            lengths_R: tokens of each pattern that count, from the left; all of them by default. The empty pattern is
                found everywhere.
        """
        rows, width = patterns_RM.shape
        size = self.text_n.shape[0]
        start = torch.zeros(rows, dtype=torch.long, device=patterns_RM.device)
        end = torch.full_like(start, size)
        for place in range(width - 1, -1, -1):  # a substring grows to the left, from its last token to its first
            symbol = patterns_RM[:, place].long() + 1
            known = (symbol > 0) & (symbol <= self.vocabulary)
            bounds = (symbol * size).unsqueeze(0) + torch.stack([start, end])
            new_start, new_end = torch.searchsorted(self.rank_keys_n, bounds.masked_fill_(~known, 0))
            if lengths_R is not None:
                skip = place >= lengths_R
                new_start, new_end = torch.where(skip, start, new_start), torch.where(skip, end, new_end)
            start, end = new_start, new_end
        return start, end

    def continuations(
        self, start_R: torch.Tensor, end_R: torch.Tensor, lengths_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Distinct tokens that follow substrings somewhere in the corpus.

        Args:
            start_R, end_R, lengths_R: ranges from `find` and the numbers of tokens of the substrings.

        Returns:
            rows_X, tokens_X (each continuation and the row it belongs to, rows ascending, tokens ascending inside a row)
            and at_end_R: does the substring end some document?
        """
        size = self.text_n.shape[0]
        group = lengths_R.clamp(max=self.branch_offsets.shape[0] - 2)
        low, high = self._branch_bounds(group, torch.stack([start_R + 1, torch.maximum(end_R, start_R + 1)]))
        choices = (high - low + 1).masked_fill_(end_R <= start_R, 0)  # the first suffix, and each that parts from it
        rows = torch.repeat_interleave(choices)
        steps = torch.arange(rows.shape[0], device=rows.device) - (choices.cumsum(0) - choices)[rows]
        inner = self.branches[(low[rows] + steps - 1).clamp_(0, self.branches.shape[0] - 1)].long()
        places = torch.where(steps == 0, start_R[rows], inner)
        symbols = self.text_n[(self.suffixes_n[places].long() + lengths_R[rows]).clamp_(max=size - 1)].long()
        ends = symbols == 0
        at_end = torch.zeros_like(start_R, dtype=torch.bool)
        at_end[rows[ends]] = True
        return rows[~ends], symbols[~ends] - 1, at_end

    def _branch_bounds(self, group_R: torch.Tensor, places_2R: torch.Tensor) -> torch.Tensor:
        """First entry of each row's group of branches that is not below a place: (2, R)."""
        low = self.branch_offsets[group_R].expand_as(places_2R)
        high = self.branch_offsets[group_R + 1].expand_as(places_2R)
        last = max(0, self.branches.shape[0] - 1)
        for _ in range(int((high - low).max()).bit_length() if low.numel() else 0):
            middle = (low + high) >> 1
            right = (low < high) & (self.branches[middle.clamp(max=last)] < places_2R)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, torch.maximum(middle, low))
        return low

    def count(self, pattern: Sequence[int]) -> int:
        """How often a substring occurs in the corpus (the empty one: once per token and document end)."""
        start, end = self.find(torch.as_tensor([list(pattern)], dtype=torch.long, device=self.device))
        return int(end - start)

    def documents_containing(self, pattern: Sequence[int]) -> torch.Tensor:
        """Numbers of the documents that hold a substring, ascending, each once (int64)."""
        start, end = self.find(torch.as_tensor([list(pattern)], dtype=torch.long, device=self.device))
        places = self.suffixes_n[int(start) : int(end)].long()
        return (torch.searchsorted(self.document_starts, places, right=True) - 1).unique()

    # ---------------------------------------------------------------- move

    def _tables(self) -> tuple[torch.Tensor, ...]:
        return (
            self.text_n,
            self.suffixes_n,
            self.rank_keys_n,
            self.branches,
            self.branch_offsets,
            self.document_starts,
        )

    def to(self, device: torch.device | str) -> FMIndex:
        """The same index on another device (itself when it is there already); each copy is made once."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device not in self._copies:
            self._copies[device] = FMIndex(*(table.to(device) for table in self._tables()))
        return self._copies[device]


def _suffix_array(text_n: np.ndarray) -> np.ndarray:
    """Places of the text ordered by what follows, up to the separator; equal ones by place. Prefix doubling."""
    size = len(text_n)
    separators = text_n == 0
    documents = int(separators.sum())
    # every separator gets a rank of its own, in text order, below all tokens
    rank = np.where(separators, np.cumsum(separators) - 1, text_n.astype(np.int64) + documents - 1)
    step = 1
    order = np.argsort(rank, kind="stable")
    rank = _dense_ranks(rank[order], order)
    while int(rank.max()) < size - 1:
        after = np.zeros(size, dtype=np.int64)
        after[: size - step] = rank[step:] + 1
        key = rank * (size + 1) + after
        order = np.argsort(key, kind="stable")
        rank = _dense_ranks(key[order], order)
        step *= 2
    return order.astype(np.int32)


def _dense_ranks(sorted_n: np.ndarray, order_n: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(order_n), dtype=np.int64)
    ranks[order_n] = np.concatenate([[0], np.cumsum(sorted_n[1:] != sorted_n[:-1])])
    return ranks


def _branches(text_n: np.ndarray, suffixes_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where suffixes part from their predecessor, grouped by shared symbols; separators count as equal.

    Two suffixes that agree up to and with the separator part nowhere: to a reader they are the same.
    """
    first, second = suffixes_n[:-1].astype(np.int64), suffixes_n[1:].astype(np.int64)
    alive = np.arange(1, len(suffixes_n))
    groups = []
    shared = 0
    while len(alive):
        one, two = text_n[first + shared], text_n[second + shared]
        groups.append(alive[one != two].astype(np.int32))
        going_on = (one == two) & (one != 0)
        alive, first, second = alive[going_on], first[going_on], second[going_on]
        shared += 1
    offsets = np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64)
    # one empty group at the end, for substrings longer than any repeated one
    return np.concatenate(groups), np.append(offsets, offsets[-1])
