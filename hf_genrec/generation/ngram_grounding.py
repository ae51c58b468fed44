"""From generated pieces of text to items: every piece votes for the items it occurs in (TransRec, arXiv 2310.06491).

Position-free generation (FMIndexLogitsProcessor) writes substrings of titles, attributes or ids; none of them has to be a
whole identifier. Each *facet* (title, attribute, id) has its own index over the items' strings. A piece g of facet f with
log-probability s counts

    weight(g) = max(0, log(p (1 - q) / (q (1 - p)))) ** alpha,   p = exp(min(s + bias_f, ceiling)),  q = corpus frequency

so that likely pieces count more and pieces that occur everywhere count little. An item adds up the pieces it contains,
the heaviest first; a piece whose tokens were covered by earlier ones is discounted to
`1 - beta + beta * new tokens / tokens`. Facets are added with their weights, each raised to `gamma` first.

Relations: facet weights of 0 leave the other facets alone; `beta=0` adds all pieces in full. The index is `FMIndex`, or
anything with `count(pattern)`, `documents_containing(pattern)` and `num_tokens`.

Shape legend: B requests, N items, k items returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..errors import RequestError


class SubstringIndex(Protocol):
    """What grounding asks of a facet's corpus; document i holds the strings of item i."""

    @property
    def num_tokens(self) -> int: ...

    def count(self, pattern: Sequence[int]) -> int: ...

    def documents_containing(self, pattern: Sequence[int]) -> Any: ...


class Ngram(NamedTuple):
    """A generated piece: its facet, its token ids, and the model's log-probability of it."""

    facet: str
    tokens: tuple[int, ...]
    log_prob: float


class NgramGrounder:
    """Ranks items by the generated pieces they contain.

    Args:
        indexes: facet name -> index over the items' strings.
        num_items: catalogue size N; documents beyond it are refused.
        alpha: exponent of a piece's weight (2.0 in the authors' code).
        beta: discount of repeated tokens, 0 to 1 (0.8 in the authors' code).
        biases: facet -> added to its log-probabilities; default 0.
        facet_weights: facet -> factor of its score, >= 0; default 1, 0 switches it off.
        gamma: exponent of a facet's sum, > 0; below 1 it favours items hit by several facets.
        ceiling: log-probabilities are cut here, below 0 (-1 in the authors' code): no piece is certain.

    Raises:
        RequestError: a value out of range, or options for a facet without an index.

    Example:
        >>> from hf_genrec.generation.fm_index import FMIndex
        >>> titles = FMIndex.from_sequences([[1, 2, 3], [2, 3, 4], [9, 9, 9]])
        >>> grounder = NgramGrounder({"title": titles}, num_items=3)
        >>> items, scores = grounder.ground([[Ngram("title", (3, 4), -1.2), Ngram("title", (2,), -1.2)]], k=3)
        >>> items.tolist()
        [[1, 0, -1]]
    """

    def __init__(
        self,
        indexes: Mapping[str, SubstringIndex],
        num_items: int,
        *,
        alpha: float = 2.0,
        beta: float = 0.8,
        biases: Mapping[str, float] | None = None,
        facet_weights: Mapping[str, float] | None = None,
        gamma: float = 1.0,
        ceiling: float = -1.0,
    ):
        if not indexes:
            raise RequestError("n-gram grounding needs an index for at least one facet.")
        if num_items < 1:
            raise RequestError(f"num_items must be at least 1, got {num_items}.")
        for name, value, fits, rule in (
            ("alpha", alpha, alpha > 0, "above 0"),
            ("beta", beta, 0 <= beta <= 1, "between 0 and 1"),
            ("gamma", gamma, gamma > 0, "above 0"),
            ("ceiling", ceiling, ceiling < 0, "below 0"),
        ):
            if not (math.isfinite(value) and fits):
                raise RequestError(f"{name} must be a finite number {rule}, got {value}.")
        for name, values in (("biases", biases or {}), ("facet_weights", facet_weights or {})):
            for facet, value in values.items():
                if facet not in indexes:
                    raise RequestError(f"{name} names the facet {facet!r}; there are {', '.join(indexes)}.")
                if not math.isfinite(value) or (name == "facet_weights" and value < 0):
                    raise RequestError(f"{name}[{facet!r}] is {value}; it must be finite (facet weights: >= 0).")
        self.indexes, self.num_items = dict(indexes), num_items
        self.alpha, self.beta, self.gamma, self.ceiling = alpha, beta, gamma, ceiling
        self.biases, self.facet_weights = dict(biases or {}), dict(facet_weights or {})

    def weight(self, ngram: Ngram) -> float:
        """How much a piece counts where it occurs; 0 for a piece that occurs nowhere, or no rarer than the model thinks.

        Raises:
            RequestError: a facet without an index, an empty piece, or a log-probability that is NaN or above 0.
        """
        index = self._index(ngram)
        count = index.count(ngram.tokens)
        if count == 0 or ngram.log_prob == -math.inf:
            return 0.0
        said = min(ngram.log_prob + self.biases.get(ngram.facet, 0.0), self.ceiling)
        # a piece that is the whole corpus has frequency 1, which no odds can express
        frequency = min(math.log(count) - math.log(max(index.num_tokens, 1)), -1e-12)
        odds = (said - _log1mexp(said)) - (frequency - _log1mexp(frequency))
        return max(0.0, odds) ** self.alpha

    def ground(
        self,
        ngrams: Sequence[Sequence[Ngram]],
        k: int = 10,
        *,
        excluded: Sequence[np.ndarray] | None = None,
        allowed: Sequence[np.ndarray] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best items of each request; only items that contain a piece with a weight are listed.

        Args:
            ngrams: per request, the pieces of all beams and steps; of a piece given twice the likelier one counts.
            excluded, allowed: item indices per request that must not, or alone may, be returned.

        Returns:
            items_Bk (int64, -1 padded) and scores_Bk (float32, -inf there). Equal scores: lower index first.

        Raises:
            RequestError: k below 1, lists that do not fit the requests, or a bad piece (see `weight`).
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise RequestError(f"k must be a whole number of at least 1, got {k!r}.")
        for name, rows in (("excluded", excluded), ("allowed", allowed)):
            if rows is not None and len(rows) != len(ngrams):
                raise RequestError(f"{name} holds {len(rows)} lists for {len(ngrams)} requests; pass one per request.")
        items = torch.full((len(ngrams), k), -1, dtype=torch.long)
        scores = torch.full((len(ngrams), k), -torch.inf)
        for row, pieces in enumerate(ngrams):
            found = self.scores(pieces)
            if allowed is not None:
                kept = set(np.asarray(allowed[row], dtype=np.int64).tolist())
                found = {item: score for item, score in found.items() if item in kept}
            if excluded is not None:
                out = set(np.asarray(excluded[row], dtype=np.int64).tolist())
                found = {item: score for item, score in found.items() if item not in out}
            best = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))[:k]
            for place, (item, score) in enumerate(best):
                items[row, place], scores[row, place] = item, score
        return items, scores

    def scores(self, ngrams: Sequence[Ngram]) -> dict[int, float]:
        """Score of every item that contains a piece with a weight."""
        total: dict[int, float] = {}
        for facet in self.indexes:
            strength = self.facet_weights.get(facet, 1.0)
            if strength > 0:
                for item, score in self._facet_scores(facet, ngrams).items():
                    total[item] = total.get(item, 0.0) + strength * score**self.gamma
        for ngram in ngrams:
            self._index(ngram)  # a facet that does not exist is a mistake, not a miss
        return total

    def _facet_scores(self, facet: str, ngrams: Sequence[Ngram]) -> dict[int, float]:
        likeliest: dict[tuple[int, ...], Ngram] = {}
        for ngram in ngrams:
            if ngram.facet == facet:
                tokens = tuple(ngram.tokens)
                if tokens not in likeliest or ngram.log_prob > likeliest[tokens].log_prob:
                    likeliest[tokens] = ngram
        weighted = [(self.weight(ngram), tokens) for tokens, ngram in likeliest.items()]
        # of equal weights the longer piece first, then by tokens: the order the pieces came in means nothing
        weighted.sort(key=lambda entry: (-entry[0], -len(entry[1]), entry[1]))
        total: dict[int, float] = {}
        covered: dict[int, set[int]] = {}
        for weight, tokens in weighted:
            if weight == 0.0:
                break
            for item in np.asarray(self.indexes[facet].documents_containing(tokens), dtype=np.int64).tolist():
                if item >= self.num_items:
                    raise RequestError(
                        f"facet {facet!r} has a document {item}, the catalogue {self.num_items} items; index one "
                        "document per item, in item order."
                    )
                seen = covered.setdefault(item, set())
                new = sum(token not in seen for token in tokens)
                total[item] = total.get(item, 0.0) + weight * (1.0 - self.beta + self.beta * new / len(tokens))
                seen.update(tokens)
        return total

    def _index(self, ngram: Ngram) -> SubstringIndex:
        if ngram.facet not in self.indexes:
            raise RequestError(f"n-gram of facet {ngram.facet!r}; there are indexes for {', '.join(self.indexes)}.")
        if not len(ngram.tokens):
            raise RequestError(f"facet {ngram.facet!r}: an n-gram without tokens occurs everywhere; leave it out.")
        if math.isnan(ngram.log_prob) or ngram.log_prob > 0:
            raise RequestError(
                f"facet {ngram.facet!r}, n-gram {tuple(ngram.tokens)}: log-probability {ngram.log_prob} is not a number "
                "<= 0."
            )
        return self.indexes[ngram.facet]


def _log1mexp(value: float) -> float:
    """log(1 - exp(value)) for value < 0."""
    return math.log(-math.expm1(value)) if value > -math.log(2.0) else math.log1p(-math.exp(value))
