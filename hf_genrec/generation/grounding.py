"""From free text or a vector to catalogue items: nearest item vectors with a multiplicative prior (BIGRec, arXiv
2308.08434).

A language model writes a title; it need not exist. `EmbeddingGrounder` embeds what was written like the item texts and
ranks all items by distance, so every result is a catalogue item. A prior (popularity, or another recommender's scores)
may pull items forward: `minmax(distance) * (1 + minmax(prior)) ** -gamma`, see `fusion.gamma_prior`.

Relations: `gamma=0` is pure distance ranking. `fusion.fuse_prior` applies the same prior to a list. Grounding of short
pieces instead of whole titles: `ngram_grounding`. Spelling instead of meaning: `title_matching`.

Shape legend: B requests, N items, D width of the vectors, M validation requests, G values of gamma, k items returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import IncompatibleComponentsError, RequestError
from .decoding.kernel import best_children
from .fusion import check_gamma, check_prior, minmax
from .text_encoding import encode_texts

METRICS = ("l2", "cosine", "dot")
GAMMA_GRID = (*(step / 100 for step in range(101)), *(float(step) for step in range(2, 100)))  # {0..1 by .01} u {1..99}
_CELLS = 2**23  # float64 distances held at a time (64 MiB)
_ITEMS_PER_PRODUCT = 2**16


@dataclass(frozen=True)
class GammaChoice:
    """Result of `choose_gamma`: the best value, its metric, and the metric of every value tried."""

    gamma: float
    value: float
    grid: dict[float, float]


class EmbeddingGrounder:
    """Ranks all items by the distance of their vectors to a request's vector.

    Distances are computed in float64 and rounded to float32 once, so that neither the batch nor the size of the catalogue
    changes an order. Items of the same text (of the same vector, where no texts are given) share the best value among
    them and follow one another by index; other equal values fall to the lower index.

    Args:
        vectors_ND: of the items, finite.
        item_texts: N texts. A request that is one of them, after stripping, takes that item's own vector: with "l2" and
            "cosine" such an item is first.
        encode: from B texts to vectors (B, D); needed for requests that are texts.
        metric: "l2"; "cosine" (1 - cosine; a zero vector is at distance 1 from everything); "dot" (negated product).
        prior: (N,) popularity or scores, finite.
        gamma: strength of the prior, 0 = off.

    Raises:
        RequestError: a value out of range.
        IncompatibleComponentsError: vectors and texts that do not fit one another, or vectors that are not finite.

    Example:
        >>> grounder = EmbeddingGrounder(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]]))
        >>> grounder.ground(torch.tensor([[0.9, 0.1]]), k=2)[0].tolist()
        [[1, 0]]
    """

    def __init__(
        self,
        vectors_ND: torch.Tensor | np.ndarray,
        *,
        item_texts: Sequence[str] | None = None,
        encode: Callable[[list[str]], torch.Tensor] | None = None,
        metric: str = "l2",
        prior: torch.Tensor | None = None,
        gamma: float = 0.0,
    ):
        vectors = torch.as_tensor(vectors_ND).detach().float()
        if vectors.dim() != 2 or 0 in vectors.shape:
            raise IncompatibleComponentsError(
                f"item vectors must be a table (items, width), got {tuple(vectors.shape)}."
            )
        _check_finite(vectors, "item", IncompatibleComponentsError)
        if metric not in METRICS:
            raise RequestError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
        if item_texts is not None and len(item_texts) != len(vectors):
            raise IncompatibleComponentsError(f"{len(item_texts)} item texts for {len(vectors)} item vectors.")
        check_gamma(gamma)
        self.vectors_ND, self.metric, self.encode, self.gamma = vectors, metric, encode, float(gamma)
        self.prior = None if prior is None else check_prior(prior, 1, len(vectors))
        keys: list[Any]
        if item_texts is not None:
            keys = [text.strip() for text in item_texts]
            self._item_of_text: dict[Any, int] = {}
            for item, text in enumerate(keys):
                self._item_of_text.setdefault(text, item)
        else:
            keys = [row.tobytes() for row in vectors.cpu().numpy()]
            self._item_of_text = {}
        first: dict[Any, int] = {}
        # the lowest item of the same text or vector stands for all of them
        self._first_N = torch.tensor([first.setdefault(key, item) for item, key in enumerate(keys)], dtype=torch.long)
        self._first_N = self._first_N.to(vectors.device)
        self._has_duplicates = len(first) < len(keys)

    @classmethod
    def from_language_model(
        cls,
        model: Any,
        tokenizer: Any,
        item_texts: Sequence[str],
        *,
        pooling: str = "last",
        batch_size: int = 32,
        max_length: int | None = None,
        **options: Any,
    ) -> EmbeddingGrounder:
        """Item texts and requests embedded by the hidden states of a language model, as BIGRec does with the model that
        wrote the request.

        Args:
            model, tokenizer: any transformers model (causal, encoder, encoder-decoder: its encoder; PEFT wrappers too)
                and its tokenizer.
            pooling: "last" = last layer at the last token, "mean" = mean over the tokens.
            max_length: tokens of a text that are read.
            options: `metric`, `prior`, `gamma`.
        """

        def encode(texts: list[str]) -> torch.Tensor:
            return encode_texts(
                model, tokenizer, texts, pooling=pooling, batch_size=batch_size, max_length=max_length
            ).float()

        return cls(encode([text.strip() for text in item_texts]), item_texts=item_texts, encode=encode, **options)

    @property
    def num_items(self) -> int:
        return self.vectors_ND.shape[0]

    # ------------------------------------------------------------------------------------------------ grounding

    def ground(
        self,
        requests: Sequence[str] | torch.Tensor | np.ndarray,
        k: int = 10,
        *,
        gamma: float | None = None,
        prior: torch.Tensor | None = None,
        excluded: Sequence[np.ndarray] | None = None,
        allowed: Sequence[np.ndarray] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest items of each request.

        Args:
            requests: texts, or vectors (B, D).
            gamma, prior: instead of the grounder's own; a prior may be (N,) or one row per request (B, N).
            excluded, allowed: item indices per request that must not, or alone may, be returned. They change which items
                are listed and not their order: distances and prior are scaled over the whole catalogue.

        Returns:
            items_Bk (int64, -1 padded where fewer items may be returned) and scores_Bk (float32, higher is better: the
            negated distance, or the negated product with the prior).

        Raises:
            RequestError: k below 1, a text without an encoder, a vector of another width or not finite, an item index
                outside the catalogue, an allow-list that leaves nothing (row named).
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise RequestError(f"k must be a whole number of at least 1, got {k!r}.")
        vectors = self.vectors_of(requests)
        batch = len(vectors)
        gamma = self.gamma if gamma is None else gamma
        check_gamma(gamma)
        scaled = self._scaled_prior(prior, batch) if gamma > 0 else None
        masks = _blocked_items(self.num_items, batch, excluded, allowed)
        items = torch.full((batch, k), -1, dtype=torch.long, device=vectors.device)
        scores = torch.full((batch, k), -torch.inf, device=vectors.device)
        width = min(k, self.num_items)
        for rows in self._row_chunks(batch):
            values = self._values(vectors[rows], None if scaled is None else scaled[rows], gamma)
            for row, (blocked, keep_listed) in enumerate(masks[rows]):
                listed = torch.as_tensor(blocked, device=values.device)
                if keep_listed:
                    values[row] = torch.full_like(values[row], torch.inf).index_copy_(0, listed, values[row, listed])
                else:
                    values[row, listed] = torch.inf
            found, value = self._smallest(values, width)
            items[rows, : found.shape[1]], scores[rows, : found.shape[1]] = found, value
        return items, scores

    def vectors_of(self, requests: Sequence[str] | torch.Tensor | np.ndarray) -> torch.Tensor:
        """Vectors (B, D) of texts (catalogue texts take their item's own) or of vectors, checked."""
        if isinstance(requests, str):
            raise RequestError("requests must be a list of texts, not one string: [text].")
        if isinstance(requests, torch.Tensor | np.ndarray):
            vectors = torch.as_tensor(requests).detach().float().to(self.vectors_ND.device)
        else:
            texts = [text.strip() for text in requests]
            known = [self._item_of_text.get(text) for text in texts]
            unknown = [row for row, item in enumerate(known) if item is None]
            vectors = self.vectors_ND[[0 if item is None else item for item in known]].clone()
            if unknown:
                if self.encode is None:
                    raise RequestError(
                        f"row {unknown[0]}: {texts[unknown[0]]!r} is no item text, and the grounder has no encoder; "
                        "pass encode=... or vectors."
                    )
                vectors[unknown] = self.encode([texts[row] for row in unknown]).float().to(vectors.device)
        if vectors.dim() != 2 or vectors.shape[1] != self.vectors_ND.shape[1]:
            raise RequestError(
                f"requests have shape {tuple(vectors.shape)}, item vectors are {self.vectors_ND.shape[1]} wide; use the "
                "encoder of the item vectors."
            )
        _check_finite(vectors, "row", RequestError)
        return vectors

    def distances(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        """Distances (B, N), float64, of whole requests to whole catalogue; duplicates have the same one."""
        query = vectors_BD.double()
        if self.metric == "cosine":
            query = _unit(query)
        parts = []
        for items in self.vectors_ND.split(_ITEMS_PER_PRODUCT):
            table = items.double()
            if self.metric == "cosine":
                table = _unit(table)
            product = query @ table.T
            if self.metric == "l2":
                square = query.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * product
                # what cancellation leaves of two equal vectors is no distance
                square[square < 1e-14 * query.square().sum(-1, keepdim=True)] = 0.0
                parts.append(square.clamp_(min=0.0).sqrt_())
            else:
                parts.append((1.0 - product).clamp_(min=0.0) if self.metric == "cosine" else -product)
        found = torch.cat(parts, dim=1).float().double()
        return found[:, self._first_N] if self._has_duplicates else found

    def _values(self, vectors_BD: torch.Tensor, scaled_BN: torch.Tensor | None, gamma: float) -> torch.Tensor:
        """What the ranking sorts by, ascending: (B, N) float64, duplicates at the best of their values."""
        distances = self.distances(vectors_BD)
        if scaled_BN is None:
            return distances
        return self._share_best(minmax(distances) * (1.0 + scaled_BN).pow(-gamma))

    def _share_best(self, values_BN: torch.Tensor) -> torch.Tensor:
        if not self._has_duplicates:
            return values_BN
        first = self._first_N.expand_as(values_BN)
        best = torch.full_like(values_BN, torch.inf).scatter_reduce_(1, first, values_BN, "amin")
        return best.gather(1, first)

    def _smallest(self, values_BN: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = best_children(-values_BN, width)
        values, order = values_BN.gather(1, chosen).sort(dim=-1, stable=True)
        return chosen.gather(1, order).masked_fill(values == torch.inf, -1), -values.float()

    def _scaled_prior(self, prior: torch.Tensor | None, batch: int) -> torch.Tensor:
        given = self.prior if prior is None else check_prior(prior, batch, self.num_items)
        if given is None:
            raise RequestError("gamma above 0 needs a prior: popularity or another recommender's scores, one per item.")
        if given.shape[1] != self.num_items:
            raise RequestError(f"the prior has {given.shape[1]} columns for {self.num_items} items.")
        return minmax(given.to(self.vectors_ND.device)).expand(batch, -1)

    def _row_chunks(self, batch: int) -> list[slice]:
        rows = max(1, _CELLS // self.num_items)
        return [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]

    # -------------------------------------------------------------------------------------------- choice of gamma

    def choose_gamma(
        self,
        requests: Sequence[str] | torch.Tensor | np.ndarray,
        targets_M: Sequence[int] | np.ndarray,
        *,
        prior: torch.Tensor | None = None,
        excluded: Sequence[np.ndarray] | None = None,
        k: int = 10,
        metric: str = "ndcg",
        grid: Sequence[float] = GAMMA_GRID,
    ) -> GammaChoice:
        """The gamma of `grid` with the best validation metric; of several, the smallest.

        A target counts at the rank of the best item of its text, as in BIGRec. All values are tried on one computation of
        the distances.

        Args:
            requests: M validation requests, as in `ground`.
            targets_M: the item that came next.
            metric: "ndcg" or "recall", at `k`.

        Raises:
            RequestError: no request, targets that do not fit, an unknown metric or an empty grid.
        """
        targets = torch.as_tensor(np.asarray(targets_M, dtype=np.int64))
        vectors = self.vectors_of(requests)
        if metric not in ("ndcg", "recall") or k < 1 or not len(grid):
            raise RequestError(f"metric must be 'ndcg' or 'recall' with k >= 1 and a grid; got {metric!r}, k = {k}.")
        if not len(targets) or len(targets) != len(vectors):
            raise RequestError(
                f"{len(targets)} targets for {len(vectors)} requests; give one per request, at least one."
            )
        if int(targets.min()) < 0 or int(targets.max()) >= self.num_items:
            raise RequestError(f"a target lies outside the catalogue of {self.num_items} items.")
        for gamma in grid:
            check_gamma(gamma)
        scaled = self._scaled_prior(prior, len(vectors))
        masks = _blocked_items(self.num_items, len(vectors), excluded, None)
        first_N, targets = self._first_N, targets.to(vectors.device)
        before = torch.zeros(len(vectors), len(grid), dtype=torch.long, device=vectors.device)
        for row in range(len(vectors)):
            near = minmax(self.distances(vectors[row : row + 1]))[0]
            log_near, log_boost = near.log(), torch.log1p(scaled[row])
            stands_for = first_N[targets[row]]
            alive = torch.ones_like(near, dtype=torch.bool)
            if len(masks[row][0]):
                alive[torch.as_tensor(masks[row][0], device=near.device)] = False
            alive[targets[row]] = True
            for gammas in range(0, len(grid), max(1, _CELLS // self.num_items)):
                part = slice(gammas, gammas + max(1, _CELLS // self.num_items))
                strength = torch.tensor(grid[part], dtype=torch.float64, device=near.device)
                values_GN = self._share_best(log_near - strength.unsqueeze(-1) * log_boost)
                own = values_GN[:, stands_for : stands_for + 1]
                earlier = (values_GN < own) | ((values_GN == own) & (first_N < stands_for))
                before[row, part] = (earlier & alive).sum(-1)
        hit = before < k
        gain = hit.double() if metric == "recall" else torch.where(hit, 1.0 / torch.log2(before.double() + 2.0), 0.0)
        values = gain.mean(0).tolist()
        order = sorted(range(len(grid)), key=lambda g: (-round(values[g], 12), grid[g]))
        return GammaChoice(float(grid[order[0]]), values[order[0]], dict(zip(map(float, grid), values)))


def _blocked_items(
    num_items: int, batch: int, excluded: Sequence[np.ndarray] | None, allowed: Sequence[np.ndarray] | None
) -> list[tuple[np.ndarray, bool]]:
    """Per request, the listed items and whether only these may be returned (True) or none of them (False)."""
    for name, rows in (("excluded", excluded), ("allowed", allowed)):
        if rows is None:
            continue
        if len(rows) != batch:
            raise RequestError(f"{name} holds {len(rows)} lists for {batch} requests; pass one per request.")
        for row, items in enumerate(rows):
            listed = np.asarray(items, dtype=np.int64)
            if listed.size and (listed.min() < 0 or listed.max() >= num_items):
                raise RequestError(f"{name} row {row} holds an item index outside 0..{num_items - 1}.")
    result = []
    for row in range(batch):
        out = np.unique(np.asarray(excluded[row], dtype=np.int64)) if excluded is not None else np.zeros(0, np.int64)
        if allowed is None:
            result.append((out, False))
            continue
        keep = np.setdiff1d(np.asarray(allowed[row], dtype=np.int64), out)
        if not keep.size:
            raise RequestError(
                f"row {row}: the allow-list leaves nothing to recommend; widen it, or exclude fewer items."
            )
        result.append((keep, True))
    return result


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, math.inf)


def _check_finite(vectors: torch.Tensor, what: str, error: type[Exception]) -> None:
    broken = ~torch.isfinite(vectors).flatten(1).all(-1) if vectors.dim() > 1 else ~torch.isfinite(vectors)
    if bool(broken.any()):
        raise error(f"{what} {int(broken.nonzero()[0])}: its vector is not finite; check the encoder.")
