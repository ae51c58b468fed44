"""Rejected items for preference tuning: random, popular, from a model's own beam, from feedback, by shared code prefix.

Sources: random negatives S-DPO (arXiv 2406.09215); the model's own beam OneRec (arXiv 2502.18965); feedback tiers and
prefix difficulty (easy: no shared prefix, hard: a long one) Align3GR (arXiv 2511.11255).

Every sampler gives up to K distinct items per row, never one of the history, never the chosen one, and is a function of
(seed, round, rows) alone. With `groups` (see `code_groups`) items that share a code count as one item: to a model they
are the same answer. `fallback` fills rows for which a sampler finds fewer than K.

*Relations*: PopularityNegatives with `power=0` over items that all occur is RandomNegatives; PrefixNegatives with
`shared=(0, L - 1)` draws from the whole catalogue; BeamNegatives with `shared` is self-play at a given difficulty.

Shape legend: M rows, K rejected items per row, N items, L levels, n candidates of all rows, W proposals per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hf_genrec.data.filtering import stable_order
from hf_genrec.data.sequences import Sequences, offsets_from_lengths, ragged_positions
from hf_genrec.errors import RequestError, TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.generation.scorers import scorer_for
from hf_genrec.generation.search import evaluating, search_items
from hf_genrec.generation.trie import ItemTrie

_ROUNDS = 6  # of proposals, before the rows still open are filled from the list of all their candidates
_CHUNK = 1 << 22  # candidates listed at once
_BLOCK = 1 << 20  # history items of the rows that are filled together


def code_groups(tokenizer: Any) -> np.ndarray:
    """(N,) int64: items with the same number have the same code, so that a model cannot tell them apart."""
    return ItemTrie.from_tokenizer(tokenizer).item_leaf_N.numpy()


def shared_prefix(first_XL: np.ndarray, second_XL: np.ndarray) -> np.ndarray:
    """Leading codes that two rows of codes have in common: (X,) int64 (-1, a code that has ended, counts as none).

    Example:
        >>> shared_prefix(np.array([[1, 2, 3], [1, 2, 3]]), np.array([[1, 2, 0], [0, 2, 3]])).tolist()
        [2, 0]
    """
    return np.cumprod((first_XL == second_XL) & (first_XL >= 0), axis=-1).sum(axis=-1)


class _Draw:
    """Rows being filled: what each has, and what it may no longer get."""

    def __init__(self, histories: Sequences, chosen_M: np.ndarray, users_M: Any, k: int, groups_N: np.ndarray) -> None:
        self.histories, self.chosen_M, self.users_M, self.k, self.groups_N = histories, chosen_M, users_M, k, groups_N
        self.rejected_MK = np.full((len(chosen_M), k), -1, np.int64)
        self.filled_M = np.zeros(len(chosen_M), np.int64)
        self._span = int(groups_N.max()) + 1
        rows = np.concatenate([histories.row_index(), np.arange(len(chosen_M))])
        self._taken = np.unique(self._keys(rows, np.concatenate([histories.items, chosen_M])))

    def _keys(self, row_n: np.ndarray, item_n: np.ndarray) -> np.ndarray:
        return row_n * self._span + self.groups_N[item_n]

    @property
    def open_rows(self) -> np.ndarray:
        return np.flatnonzero(self.filled_M < self.k)

    def taken_items(self, rows_m: np.ndarray) -> list[np.ndarray]:
        """For each row all items that it may not get, those of a taken group included."""
        by_group = np.argsort(self.groups_N, kind="stable")
        offsets = offsets_from_lengths(np.bincount(self.groups_N, minlength=self._span))
        found = []
        for row in rows_m:
            low, high = np.searchsorted(self._taken, [row * self._span, (row + 1) * self._span])
            groups = self._taken[low:high] - row * self._span
            found.append(by_group[ragged_positions(offsets[groups], np.diff(offsets)[groups])])
        return found

    def accept(self, row_n: np.ndarray, item_n: np.ndarray) -> None:
        """Give candidates to their rows in the order they come, as long as they are new there and places are left."""
        known = item_n >= 0
        row_n, item_n = row_n[known], item_n[known]
        order = stable_order(row_n)
        row_n, item_n = row_n[order], item_n[order]
        key_n = self._keys(row_n, item_n)
        place_n = np.minimum(np.searchsorted(self._taken, key_n), len(self._taken) - 1)
        new = np.flatnonzero(self._taken[place_n] != key_n)
        keep = new[np.sort(np.unique(key_n[new], return_index=True)[1])]
        row_n, item_n, key_n = row_n[keep], item_n[keep], key_n[keep]
        column_n = self.filled_M[row_n] + np.arange(len(row_n)) - np.searchsorted(row_n, row_n)
        fits = column_n < self.k
        row_n, item_n, key_n = row_n[fits], item_n[fits], key_n[fits]
        self.rejected_MK[row_n, column_n[fits]] = item_n
        self.filled_M += np.bincount(row_n, minlength=len(self.filled_M))
        key_n.sort()
        self._taken = np.insert(self._taken, np.searchsorted(self._taken, key_n), key_n)


class NegativeSampler:
    """Base of the samplers.

    Args:
        num_items: N.
        groups: (N,) items of one number count as one item; None: every item for itself.
        seed: of the draws.
        fallback: sampler that fills the rows left short.
    """

    def __init__(
        self,
        num_items: int,
        *,
        groups: np.ndarray | None = None,
        seed: int = 0,
        fallback: NegativeSampler | None = None,
    ) -> None:
        self.num_items, self.seed, self.fallback = int(num_items), int(seed), fallback
        self.groups_N = np.arange(self.num_items) if groups is None else np.asarray(groups, np.int64)
        if len(self.groups_N) != self.num_items or not self.num_items:
            raise TrainingError(
                f"groups has {len(self.groups_N)} numbers for {self.num_items} items: give one per item."
            )
        if fallback is not None and fallback.num_items != self.num_items:
            raise TrainingError(f"the fallback knows {fallback.num_items} items, this sampler {self.num_items}.")

    def __call__(
        self,
        histories: Sequences,
        chosen: np.ndarray,
        num_negatives: int,
        *,
        users: np.ndarray | None = None,
        round: int = 0,
    ) -> np.ndarray:
        """Rejected items of M rows.

        Args:
            histories: M rows of item indices.
            chosen: (M,) item indices.
            num_negatives: K.
            users: (M,) row of each user in the feedback, for FeedbackNegatives.
            round: another one gives other draws (epochs, iterations).

        Returns:
            (M, K) int64, -1 at the end of rows that have fewer.

        Raises:
            TrainingError: K below 1, rows that do not match, or an item outside the catalogue (row named).
        """
        chosen_M = np.asarray(chosen, np.int64)
        if num_negatives < 1:
            raise TrainingError(f"num_negatives={num_negatives}: ask for at least 1.")
        if len(histories) != len(chosen_M) or (users is not None and len(users) != len(chosen_M)):
            raise TrainingError(
                f"{len(histories)} histories for {len(chosen_M)} chosen items: pass one of each per row."
            )
        for rows, items in ((np.arange(len(chosen_M)), chosen_M), (histories.row_index(), histories.items)):
            bad = (items < 0) | (items >= self.num_items)
            if bad.any():
                raise TrainingError(
                    f"row {int(rows[bad.argmax()])}: item {int(items[bad.argmax()])} is outside 0..{self.num_items - 1}; "
                    "pass indices of this catalogue."
                )
        if not len(chosen_M):
            return np.zeros((0, num_negatives), np.int64)
        users_M = None if users is None else np.asarray(users)
        cuts = np.unique(np.searchsorted(histories.offsets, np.arange(_BLOCK, histories.num_items, _BLOCK)))
        parts = []
        for block, rows in enumerate(np.split(np.arange(len(chosen_M)), cuts[cuts < len(chosen_M)])):
            users_m = None if users_M is None else users_M[rows]
            draw = _Draw(histories.take(rows), chosen_M[rows], users_m, num_negatives, self.groups_N)
            sampler: NegativeSampler | None = self
            while sampler is not None and len(draw.open_rows):
                sampler._fill(draw, np.random.default_rng([sampler.seed, round, *([block] if block else [])]))
                sampler = sampler.fallback
            parts.append(draw.rejected_MK)
        return np.concatenate(parts)

    def _fill(self, draw: _Draw, rng: np.random.Generator) -> None:
        raise NotImplementedError


def _fill_by_proposals(
    draw: _Draw,
    rng: np.random.Generator,
    propose: Callable[[np.ndarray, int], np.ndarray],
    candidates: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
    largest: int,
) -> None:
    """Draw, skip what is taken, draw again; then the exact rest. Both are successive sampling without replacement.

    Args:
        propose: (rows m, W) -> items (m, W), independent draws.
        candidates: rows -> row, item and log-weight of all their candidates, flat.
        largest: most candidates of one row.
    """
    for _ in range(_ROUNDS):
        rows_m = draw.open_rows
        if not len(rows_m):
            return
        width = 2 * int(draw.k - draw.filled_M[rows_m].min()) + 4
        draw.accept(np.repeat(rows_m, width), propose(rows_m, width).reshape(-1))
    rows_m, step = draw.open_rows, max(1, _CHUNK // max(1, largest))
    for start in range(0, len(rows_m), step):
        row_n, item_n, weight_n = candidates(rows_m[start : start + step])
        order = np.lexsort((-(weight_n + rng.gumbel(size=len(row_n))), row_n))  # the Gumbel trick, row by row
        draw.accept(row_n[order], item_n[order])


class PopularityNegatives(NegativeSampler):
    """Items in proportion to `counts ** power`; items that never occur are not drawn (unless power is 0).

    Args:
        counts: (N,) how often each item occurs in training.
        power: 1 by popularity, 0.75 flatter, 0 uniform.
        options: as for NegativeSampler.
    """

    def __init__(self, counts: np.ndarray, power: float = 1.0, **options: Any) -> None:
        super().__init__(len(counts), **options)
        weights_N = np.asarray(counts, np.float64) ** power
        if not np.isfinite(weights_N).all() or (weights_N < 0).any() or not weights_N.any():
            raise TrainingError("counts must be numbers of 0 or more, at least one above 0 (and power 0 or more).")
        self._items = np.flatnonzero(weights_N)
        self._log_weights = np.log(weights_N[self._items])
        self._cumulative = np.cumsum(weights_N[self._items]) / weights_N.sum()

    def _fill(self, draw: _Draw, rng: np.random.Generator) -> None:
        size = len(self._items)

        def propose(rows_m: np.ndarray, width: int) -> np.ndarray:
            drawn = np.searchsorted(self._cumulative, rng.random((len(rows_m), width)), side="right")
            return self._items[np.minimum(drawn, size - 1)]

        def candidates(rows_m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return np.repeat(rows_m, size), np.tile(self._items, len(rows_m)), np.tile(self._log_weights, len(rows_m))

        _fill_by_proposals(draw, rng, propose, candidates, size)


class RandomNegatives(PopularityNegatives):
    """Items drawn uniformly from the catalogue.

    Example:
        >>> RandomNegatives(4)(Sequences.from_rows([[0]]), np.array([1]), 2).tolist() in ([[2, 3]], [[3, 2]])
        True
    """

    def __init__(self, num_items: int, **options: Any) -> None:
        super().__init__(np.ones(num_items), 0.0, **options)


class FeedbackNegatives(NegativeSampler):
    """Items that the user was shown and rated low, skipped or disliked (RF-DPO of arXiv 2511.11255).

    Args:
        rejected_by_user: a row of item indices per user: a tier of `pairs.Feedback`, or explicit negatives. Calls name
            the row of each pair by `users`.
        num_items: N.
        options: as for NegativeSampler.
    """

    def __init__(self, rejected_by_user: Sequences, num_items: int, **options: Any) -> None:
        super().__init__(num_items, **options)
        self.rejected_by_user = rejected_by_user

    def _fill(self, draw: _Draw, rng: np.random.Generator) -> None:
        if draw.users_M is None:
            raise TrainingError("feedback belongs to users: pass users= (the row of each pair's user in the feedback).")
        rows_m = draw.open_rows
        users_m = draw.users_M[rows_m]
        if (users_m < 0).any() or (users_m >= len(self.rejected_by_user)).any():
            raise TrainingError(f"users must be rows 0..{len(self.rejected_by_user) - 1} of the feedback.")
        picked = self.rejected_by_user.take(users_m)
        order = np.lexsort((rng.random(picked.num_items), picked.row_index()))
        draw.accept(rows_m[picked.row_index()[order]], picked.items[order].astype(np.int64))


class PrefixNegatives(NegativeSampler):
    """Items whose code shares between `shared[0]` and `shared[1]` leading codes with the chosen item's, uniformly.

    Args:
        tokenizer: of the catalogue.
        shared: least and most leading codes in common, 0 <= least <= most < L. (0, 0) is easy, (L - 1, L - 1) hardest.
        options: as for NegativeSampler; `groups` is `code_groups(tokenizer)` by default.
    """

    def __init__(self, tokenizer: Any, shared: tuple[int, int], **options: Any) -> None:
        options.setdefault("groups", code_groups(tokenizer))
        super().__init__(tokenizer.num_items, **options)
        self._range = _PrefixRange(tokenizer, shared)

    def _fill(self, draw: _Draw, rng: np.random.Generator) -> None:
        slots = self._range.slots(draw.chosen_M)

        def propose(rows_m: np.ndarray, width: int) -> np.ndarray:
            sizes_m1 = slots.sizes[rows_m, None]
            drawn = (rng.random((len(rows_m), width)) * sizes_m1).astype(np.int64)
            items = self._range.items(slots.place(rows_m[:, None], np.minimum(drawn, np.maximum(sizes_m1 - 1, 0))))
            return np.where(sizes_m1 > 0, items, -1)

        def candidates(rows_m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            row_n, item_n = self._range.listed(slots, rows_m)
            return row_n, item_n, np.zeros(len(row_n))

        _fill_by_proposals(draw, rng, propose, candidates, int(slots.sizes.max(initial=1)))


class _Slots:
    """Per row the slots first..end of the catalogue without the hole hole..hole_end inside."""

    def __init__(self, first: np.ndarray, end: np.ndarray, hole: np.ndarray, hole_end: np.ndarray) -> None:
        self.first, self.hole, self.gap = first, hole, hole_end - hole
        self.sizes = end - first - self.gap

    def place(self, rows: np.ndarray, number: np.ndarray) -> np.ndarray:
        slot = self.first[rows] + number
        return slot + np.where(slot >= self.hole[rows], self.gap[rows], 0)


class _PrefixRange:
    """The items of a trie that share a range of prefix lengths with given items: in slot order an interval with a hole."""

    def __init__(self, tokenizer: Any, shared: tuple[int, int]) -> None:
        least, most = (int(length) for length in shared)
        if not 0 <= least <= most < tokenizer.num_levels:
            raise TrainingError(
                f"shared={tuple(shared)}: give the least and the most leading codes in common, both from 0 to "
                f"{tokenizer.num_levels - 1} (codes have {tokenizer.num_levels} levels)."
            )
        self.least, self.most = least, most
        self._trie = ItemTrie.from_tokenizer(tokenizer)
        self._codes_NL = torch.from_numpy(np.array(tokenizer.codes, np.int64))

    def slots(self, chosen_M: np.ndarray) -> _Slots:
        codes_ML = self._trie.end_filled(self._codes_NL[torch.from_numpy(chosen_M)])
        bounds: list[np.ndarray] = []
        for depth in (self.least, self.most + 1):
            nodes_M = self._trie.lookup(codes_ML[:, :depth])
            bounds += [part.numpy() for part in self._trie.slot_range(depth, nodes_M)]
        return _Slots(*bounds)

    def items(self, slots: np.ndarray) -> np.ndarray:
        return self._trie.items_at(torch.from_numpy(np.minimum(slots, self._trie.num_items - 1))).numpy()

    def listed(self, slots: _Slots, rows_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All items of some rows, flat: row and item."""
        sizes_m = slots.sizes[rows_m]
        row_n = np.repeat(rows_m, sizes_m)
        return row_n, self.items(slots.place(row_n, ragged_positions(np.zeros_like(sizes_m), sizes_m)))


class BeamNegatives(NegativeSampler):
    """What a model itself would recommend, best first: the hardest negatives (self-play).

    Args:
        model: a recommender of this library, or any causal LM or encoder-decoder that knows the item tokens.
        tokenizer: of the catalogue.
        num_beams: beams of the constrained search; at least K.
        shared: only items that share so many leading codes with the chosen one, (least, most); None: all.
        batch_size: rows searched together.
        max_history: newest items of a history that the model reads.
        encode: function of a list of item-index arrays that gives `input_ids` and `attention_mask` (B, T), for models
            with prompts of their own; default `tokenizer.encode_item_indices`.
        restrict_to_level: a softmax over the codes of each level (stock models trained so); None: as the model is served.
        options: as for NegativeSampler; `groups` is `code_groups(tokenizer)` by default. Beam search draws nothing, so
            the seed has no effect here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        num_beams: int = 50,
        shared: tuple[int, int] | None = None,
        batch_size: int = 64,
        max_history: int | None = None,
        encode: Callable[[list[np.ndarray]], tuple[torch.Tensor, torch.Tensor]] | None = None,
        restrict_to_level: bool | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("groups", code_groups(tokenizer))
        super().__init__(tokenizer.num_items, **options)
        self.model, self.tokenizer, self.num_beams, self.batch_size = model, tokenizer, int(num_beams), int(batch_size)
        self.max_history, self._encode = max_history, encode or self._encode_items
        self.restrict_to_level = restrict_to_level
        self._range = None if shared is None else _PrefixRange(tokenizer, shared)

    def _encode_items(self, rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        bound = self.max_history or max(1, max(map(len, rows)))
        encoded = self.tokenizer.encode_item_indices(rows, max_items=bound, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]

    def _fill(self, draw: _Draw, rng: np.random.Generator) -> None:
        served = recommendation_config_of(self.model).merged(restrict_to_level=self.restrict_to_level)
        decoder = scorer_for(self.model, self.tokenizer, restrict_to_level=served.restrict_to_level)
        trie = ItemTrie.from_tokenizer(self.tokenizer, decoder.device)
        wanted = min(self.num_items, draw.k * trie.max_items_per_leaf)  # items of one code count once
        config = RecommendationConfig(
            k=wanted, num_beams=max(self.num_beams, wanted), exclude_seen=False, renormalize=served.renormalize
        )
        slots = None if self._range is None else self._range.slots(draw.chosen_M)
        rows_m = draw.open_rows
        with evaluating(decoder), evaluating(self.model):
            for start in range(0, len(rows_m), self.batch_size):
                rows_b = rows_m[start : start + self.batch_size]
                allowed = None
                if self._range is not None and slots is not None:
                    row_n, item_n = self._range.listed(slots, rows_b)
                    allowed = np.split(item_n, np.searchsorted(row_n, rows_b[1:]))
                item_filter = ItemFilter.from_rows(trie, draw.taken_items(rows_b), allowed)
                input_ids, mask = self._encode([draw.histories[row] for row in rows_b])
                state = decoder.start_decoding(input_ids.to(decoder.device), mask.to(decoder.device))
                items_bk, _ = search_items(decoder, state, trie, config, item_filter, batch_size=len(rows_b))
                draw.accept(np.repeat(rows_b, items_bk.shape[1]), items_bk.cpu().numpy().reshape(-1))


def self_play_negatives(
    model: Any,
    tokenizer: Any,
    shared: tuple[int, int],
    *,
    num_beams: int = 50,
    batch_size: int = 64,
    max_history: int | None = None,
    seed: int = 0,
    fallback: NegativeSampler | None = None,
) -> BeamNegatives:
    """Prefix self-play (arXiv 2511.11255): the model's own best answers among the items that share `shared` leading codes
    with the chosen one, filled up from the catalogue there, then from `fallback`.

    Args:
        num_beams, batch_size, max_history: of the search.
        seed: of what fills up.
    """
    there = PrefixNegatives(tokenizer, shared, seed=seed, fallback=fallback)
    return BeamNegatives(
        model,
        tokenizer,
        num_beams=num_beams,
        shared=shared,
        batch_size=batch_size,
        max_history=max_history,
        fallback=there,
    )


NEGATIVES = ("random", "popularity", "beam", "prefix", "self_play", "feedback")
PREFIX_NEGATIVES = ("beam", "prefix", "self_play")


def named_sampler(
    name: str,
    tokenizer: Any,
    counts_N: np.ndarray,
    *,
    seed: int = 0,
    shared: Sequence[int] | None = None,
    num_negatives: int = 3,
    model: Any = None,
    batch_size: int = 64,
    max_history: int | None = None,
    rejected_by_user: Sequences | None = None,
) -> NegativeSampler:
    """A sampler by its name in recipes and scripts. Where one finds too few items, random ones fill up; but "feedback" gives
    what users rejected and nothing else.

    Args:
        name: one of `NEGATIVES`.
        counts_N: training interactions per item, for "popularity".
        shared: least and most leading codes in common with the chosen item, for "prefix" and "self_play" (default: one to
            all but one) and "beam" (default: any).
        num_negatives: K; "beam" and "self_play" search at least 2 K answers.
        model: whose answers are drawn, for "beam" and "self_play".
        batch_size, max_history: of that search.
        rejected_by_user: a row of items per user, for "feedback" (see `pairs.feedback_rows`).

    Raises:
        RequestError: an unknown name, `shared` that is no pair or that the sampler does not read, feedback without items.
    """
    if name not in NEGATIVES:
        raise RequestError(f"unknown negatives {name!r}: choose one of {', '.join(NEGATIVES)}.")
    if shared is not None and len(shared) != 2:
        raise RequestError(f"shared {list(shared)}: give two numbers, least and most leading codes in common.")
    if shared is not None and name not in PREFIX_NEGATIVES:
        raise RequestError(
            f"shared {list(shared)} has no effect on {name} negatives: leave it out, or choose one of "
            f"{', '.join(PREFIX_NEGATIVES)}."
        )
    groups_N = code_groups(tokenizer)
    fallback = RandomNegatives(tokenizer.num_items, groups=groups_N, seed=seed)
    if name == "random":
        return fallback
    if name == "popularity":
        return PopularityNegatives(counts_N, groups=groups_N, seed=seed, fallback=fallback)
    if name == "feedback":
        if rejected_by_user is None:
            raise RequestError("feedback negatives need rejected_by_user=, what each user rejected.")
        return FeedbackNegatives(rejected_by_user, tokenizer.num_items, groups=groups_N, seed=seed)
    bounds = None if shared is None else (int(shared[0]), int(shared[1]))
    near = bounds or (1, tokenizer.num_levels - 1)
    if name == "prefix":
        return PrefixNegatives(tokenizer, near, seed=seed, fallback=fallback)
    search: dict[str, Any] = {"num_beams": max(20, 2 * num_negatives), "batch_size": batch_size}
    search |= {"max_history": max_history, "fallback": fallback}
    if name == "self_play":
        return self_play_negatives(model, tokenizer, near, seed=seed, **search)
    return BeamNegatives(model, tokenizer, shared=bounds, **search)
