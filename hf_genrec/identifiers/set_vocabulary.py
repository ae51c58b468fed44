"""SetVocabulary: segment sequences of unordered sets with learnt merges, and read the sets back from the tokens.

The encoding half of ActionPiece (arXiv 2502.13581); set_bpe.py learns the merges.

Shape legend: F features, R merges, M features of one set, P pairs of a set, n sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..errors import IncompatibleComponentsError

FeatureSet = Sequence[int]

_MOST_FEATURES = 2**16  # features of one token; merges learnt from histories stay far below
_NOTHING = (math.inf, 0)


class Reading(NamedTuple):
    """What a token sequence says: its sets (features by level), and whether it can be read in no other way."""

    sets: list[tuple[int, ...]]
    unique: bool


class SetVocabulary:
    """Features 0..F-1, level by level, and merged tokens F..F+R-1: segments sequences of sets and reads them back.

    Args:
        level_sizes: how many features each level has.
        merges: (R, 2) integers, the two tokens (a <= b) that token F + r replaces, both below F + r.
        weights: (R,) expected count of the pair when it was merged; orders the merges of the fixed segmentation.

    Raises:
        IncompatibleComponentsError: merges that name later tokens, repeat a pair, or do not fit the weights.

    Relations: with R = 0 every segmentation is the plain features. `encode_permuted` is the set permutation
    regularisation of section 3.2.2 and then ordinary byte-pair encoding; `encode_fixed` needs no order of the features
    and has no randomness.

    Example:
        >>> vocabulary = SetVocabulary([2, 1], [[0, 2]], [2.25])
        >>> vocabulary.encode_fixed([[0, 2], [1, 2]]), vocabulary.features(3)
        ([3, 1, 2], (0, 2))
    """

    def __init__(self, level_sizes: Sequence[int], merges, weights):
        self.level_sizes = tuple(int(size) for size in level_sizes)
        if not self.level_sizes or min(self.level_sizes) < 1:
            raise IncompatibleComponentsError(f"level_sizes are {self.level_sizes}: give a positive integer per level")
        self.num_features = sum(self.level_sizes)
        self.merges = np.asarray(merges, dtype=np.int32).reshape(-1, 2)
        self.weights = np.asarray(weights, dtype=np.float64).reshape(-1)
        self._check()
        self.merges.setflags(write=False)
        self.weights.setflags(write=False)
        self.size = self.num_features + len(self.merges)
        pairs = self.merges.tolist()
        self._new = {a * self.size + b: self.num_features + r for r, (a, b) in enumerate(pairs)}
        self._weight = [0.0] * self.num_features + self.weights.tolist()
        level_F = np.repeat(np.arange(len(self.level_sizes)), self.level_sizes)
        self._level = level_F.tolist()
        # levels of a token as bits, -1 where a level occurs twice: such a token spans two sets
        masks = [1 << level for level in self._level]
        for a, b in pairs:
            apart = masks[a] >= 0 and masks[b] >= 0 and not masks[a] & masks[b]
            masks.append(masks[a] | masks[b] if apart else -1)
        self.level_masks = masks
        self._features: dict[int, tuple[int, ...]] = {}

    def _check(self) -> None:
        problem = None
        new_R = self.num_features + np.arange(len(self.merges))
        bad_R = (self.merges[:, 0] < 0) | (self.merges[:, 0] > self.merges[:, 1]) | (self.merges[:, 1] >= new_R)
        if len(self.weights) != len(self.merges):
            problem = f"{len(self.weights)} weights for {len(self.merges)} merges"
        elif bad_R.any():
            row = int(np.flatnonzero(bad_R)[0])
            problem = f"merges row {row}: {self.merges[row].tolist()} is no ascending pair of tokens below {new_R[row]}"
        elif len(np.unique(self.merges, axis=0)) < len(self.merges):
            problem = "merges: the same pair occurs twice"
        elif not (np.isfinite(self.weights) & (self.weights >= 0)).all():
            problem = "weights: not all are finite and 0 or more"
        else:
            lengths = [1] * self.num_features
            for row, (a, b) in enumerate(self.merges.tolist()):
                lengths.append(lengths[a] + lengths[b])
                if lengths[-1] > _MOST_FEATURES:
                    problem = f"merges row {row}: a token of more than {_MOST_FEATURES} features"
                    break
        if problem:
            raise IncompatibleComponentsError(f"{problem}: build the vocabulary again")

    def features(self, token: int) -> tuple[int, ...]:
        """The features that a token stands for, ascending (a feature of both sets of a spanning token twice)."""
        known = self._features.get(token)
        if known is None:
            found, waiting = [], [token]
            while waiting:
                current = waiting.pop()
                if current < self.num_features:
                    found.append(current)
                else:
                    waiting += self.merges[current - self.num_features].tolist()
            known = self._features[token] = tuple(sorted(found))
        return known

    # --- segmenting ----------------------------------------------------------------------------------------------

    def merge_pair(self, x: int, y: int) -> int:
        """The token that replaces two tokens, -1 where no merge does."""
        return self._new.get(x * self.size + y if x <= y else y * self.size + x, -1)

    def merge_tokens(self, tokens: Sequence[int]) -> list[int]:
        """Ordinary byte-pair encoding of a token sequence: the earliest merge first, the leftmost of equals.

        Quadratic in the length with a small constant (about 3 microseconds a merge at 100 tokens).
        """
        tokens, size, new = list(tokens), self.size, self._new
        none = size  # behind every token
        found = [new.get(x * size + y if x <= y else y * size + x, none) for x, y in pairwise(tokens)]
        while found:
            best = min(found)
            if best == none:
                break
            place = found.index(best)
            tokens[place : place + 2] = [best]
            del found[place]
            for link, other in ((place - 1, place - 1), (place, place + 1)):
                if 0 <= link < len(found):
                    x = tokens[other]
                    found[link] = new.get(x * size + best if x <= best else best * size + x, none)
        return tokens

    def encode_permuted(self, sets: Sequence[FeatureSet], generator: np.random.Generator) -> list[int]:
        """Set permutation regularisation: every set in random order, then `merge_tokens` over all of it."""
        return self.merge_tokens([int(token) for features in sets for token in generator.permutation(features)])

    def encode_fixed(self, sets: Sequence[FeatureSet]) -> list[int]:
        """The segmentation without chance: again and again the merge of the largest weight over all pairs of the sets.

        The weight of a merge is its count when it was learnt times the probability that the two tokens are neighbours
        here (2 / n inside, 1 / (n m) across). Equal weights: the earlier merge, then the leftmost, inside before
        across. New tokens come first in their set, so an item reads from coarse to fine.
        """
        groups = [[int(token) for token in features] for features in sets]
        inside = [self._best_inside(group) for group in groups]
        across = [self._best_across(left, right) for left, right in pairwise(groups)]
        while groups:
            in_set, between = min(inside), min(across, default=_NOTHING)
            if min(in_set, between) == _NOTHING:
                break
            if in_set <= between:
                place, new, stop = inside.index(in_set), in_set[1], 1
                a, b = self.merges[new - self.num_features].tolist()
                pieces = [[new, *(token for token in groups[place] if token not in (a, b))]]
            else:
                place, new, stop = across.index(between), between[1], 2
                a, b = self.merges[new - self.num_features].tolist()
                left, right = groups[place : place + 2]
                if a not in left or b not in right:
                    a, b = b, a
                rests = [token for token in left if token != a], [token for token in right if token != b]
                pieces = [piece for piece in (rests[0], [new], rests[1]) if piece]
            groups[place : place + stop] = pieces
            inside[place : place + stop] = [self._best_inside(piece) for piece in pieces]
            first = max(place - 1, 0)
            around = groups[first : place + len(pieces) + 1]
            across[first : place + stop] = [self._best_across(left, right) for left, right in pairwise(around)]
        return [token for group in groups for token in group]

    def _best_inside(self, group: list[int]) -> tuple[float, int]:
        found = [
            new for place, x in enumerate(group) for y in group[place + 1 :] if (new := self.merge_pair(x, y)) >= 0
        ]
        return min(((-self._weight[new] * 2 / len(group), new) for new in found), default=_NOTHING)

    def _best_across(self, left: list[int], right: list[int]) -> tuple[float, int]:
        found = [new for x in left for y in right if (new := self.merge_pair(x, y)) >= 0]
        return min(((-self._weight[new] / (len(left) * len(right)), new) for new in found), default=_NOTHING)

    def encode_items(self, features_nM: np.ndarray) -> np.ndarray:
        """`encode_fixed` of n sets, each on its own, at once: tokens int64 (n, M), filled up with -1."""
        tokens_nM = np.array(features_nM, dtype=np.int64)
        if not len(self.merges) or not tokens_nM.size:
            return tokens_nM
        keys_R = self.merges[:, 0].astype(np.int64) * self.size + self.merges[:, 1]
        order_R = np.argsort(keys_R)
        keys_R = keys_R[order_R]
        by_weight_R = np.lexsort((np.arange(len(keys_R)), -self.weights))  # the heaviest first, then the earliest
        rank_R = np.empty_like(by_weight_R)
        rank_R[by_weight_R] = np.arange(len(by_weight_R))
        rows, columns = np.triu_indices(tokens_nM.shape[1], 1)
        waiting_n = np.arange(len(tokens_nM))
        while len(waiting_n):
            now_nM = tokens_nM[waiting_n]
            x_nP, y_nP = now_nM[:, rows], now_nM[:, columns]
            pair_nP = np.minimum(x_nP, y_nP) * self.size + np.maximum(x_nP, y_nP)
            place_nP = np.minimum(np.searchsorted(keys_R, pair_nP), len(keys_R) - 1)
            fits_nP = (keys_R[place_nP] == pair_nP) & (x_nP >= 0) & (y_nP >= 0)
            rank_nP = np.where(fits_nP, rank_R[order_R[place_nP]], len(keys_R))
            best_n = rank_nP.min(axis=1, initial=len(keys_R))
            going_n = best_n < len(keys_R)
            waiting_n, now_nM, best_n = waiting_n[going_n], now_nM[going_n], best_n[going_n]
            merge_n = by_weight_R[best_n]
            gone_nM = (now_nM == self.merges[merge_n, :1]) | (now_nM == self.merges[merge_n, 1:]) | (now_nM < 0)
            kept_nM = np.take_along_axis(
                np.where(gone_nM, -1, now_nM), np.argsort(gone_nM, axis=1, kind="stable"), axis=1
            )
            tokens_nM[waiting_n] = np.concatenate((self.num_features + merge_n[:, None], kept_nM[:, :-1]), axis=1)
        return tokens_nM

    # --- reading -------------------------------------------------------------------------------------------------

    def read(self, tokens: Sequence[int], is_legal: Callable[[tuple[int, ...]], bool] | None = None) -> Reading | None:
        """The sets that a token sequence stands for, each with one feature of every level; None where there are none.

        A merge does not say which of its two tokens came first. Where sets end follows from the levels, and that
        settles nearly all of it; but a token that spans two sets and holds two features of one level can be read in two
        ways (`unique` is then False, and the reading with the smaller features first is given). One set alone, which is
        what a model generates, is always unique.

        Args:
            tokens: numbers below F + R.
            is_legal: which sets (features in the order of the levels) may occur; default: all.
        """
        # what is read so far, by the features of the set that is still open: (linked list of closed sets, ways <= 2)
        states: dict[tuple[int, ...], tuple[Any, int]] = {(): (None, 1)}
        for token in tokens:
            after: dict[tuple[int, ...], tuple[Any, int]] = {}
            for opened in sorted(states):
                closed, ways = states[opened]
                for rest, sets in self._splits(int(token), opened):
                    if is_legal is not None and not all(map(is_legal, sets)):
                        continue
                    if rest in after:
                        after[rest] = (after[rest][0], 2)
                        continue
                    link = closed
                    for one in sets:
                        link = (link, one)
                    after[rest] = (link, ways)
            states = after
        if () not in states:
            return None
        link, ways = states[()]
        sets = []
        while link is not None:
            link, one = link
            sets.append(one)
        return Reading(sets[::-1], ways == 1)

    def _splits(self, token: int, opened: tuple[int, ...]) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        """Ways to read a token after the open set: (features then open, sets closed on the way), in a fixed order."""
        levels, level, masks = len(self.level_sizes), self._level, self.level_masks
        results = set()
        work: list[tuple[tuple[int, ...], tuple[int, ...], tuple]] = [((token,), opened, ())]
        seen = set(work)
        while work:
            (*pending, node), features, closed = work.pop()
            mask = sum(1 << level[feature] for feature in features)
            if masks[node] >= 0 and not masks[node] & mask:  # all of it belongs to the open set
                features = tuple(sorted((*features, *self.features(node))))
                if len(features) == levels:
                    features, closed = (), (*closed, features)
                following = [(tuple(pending), features, closed)]
            elif node < self.num_features:
                continue  # a second feature of one level
            else:
                a, b = self.merges[node - self.num_features].tolist()
                following = [((*pending, b, a), features, closed), ((*pending, a, b), features, closed)]
            for state in following:
                if not state[0]:
                    results.add((state[1], state[2]))
                elif state not in seen:
                    seen.add(state)
                    work.append(state)
        return [(rest, list(sets)) for rest, sets in sorted(results)]
