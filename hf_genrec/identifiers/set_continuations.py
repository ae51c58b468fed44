"""Which tokens may follow a prefix so that it can still become the feature set of a catalogue item.

The free segmentation of ActionPiece (arXiv 2502.13581): an item may be spelled by any tokens that together are its
feature set, in any order. The paper searches without this constraint and drops what is no item.

Shape legend: N items, L levels, V tokens (features and merged ones), x tokens of all items.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from .set_vocabulary import SetVocabulary


class SetContinuations:
    """Legal continuations over a catalogue of feature sets.

    Args:
        features_NL: features of all items, numbered level by level, (N, L).
        vocabulary: the tokens.

    Example:
        >>> vocabulary = SetVocabulary([2, 2], [[0, 2]], [1.0])
        >>> legal = SetContinuations(np.array([[0, 2], [1, 3]]), vocabulary)
        >>> legal.after([]).tolist(), legal.after([2]).tolist(), legal.after([4]).tolist()
        ([0, 1, 2, 3, 4], [0], [])
    """

    def __init__(self, features_NL: np.ndarray, vocabulary: SetVocabulary):
        self._features_NL, self._vocabulary = features_NL, vocabulary
        starts_L = np.cumsum((0, *vocabulary.level_sizes[:-1]))
        self._level_of = np.searchsorted(starts_L, np.arange(vocabulary.num_features), side="right") - 1
        rows = []
        for features in features_NL.tolist():
            present = list(features)
            for place, x in enumerate(present):  # grows while it is walked; it ends, since a pair makes one token
                for y in present[:place]:
                    new = vocabulary.merge_pair(x, y)
                    if new >= 0 and vocabulary.level_masks[new] >= 0:
                        present.append(new)
            rows.append(present)
        self._offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows], dtype=np.int64)))
        self._tokens_x = np.fromiter(chain.from_iterable(rows), np.int64, int(self._offsets[-1]))
        self._all = np.unique(self._tokens_x)
        self._levels_VL = np.zeros((vocabulary.size, features_NL.shape[1]), bool)
        for token in self._all.tolist():
            self._levels_VL[token, self._level_of[list(vocabulary.features(token))]] = True

    def after(self, prefix: Sequence[int]) -> np.ndarray:
        """Tokens that may follow `prefix`, int64 ascending; none behind a full set or a prefix that fits no item."""
        used_L = np.zeros(self._features_NL.shape[1], bool)
        fits_N = np.ones(len(self._features_NL), bool)
        for token in prefix:
            if not 0 <= token < self._vocabulary.size:
                return np.zeros(0, np.int64)
            for feature in self._vocabulary.features(token):
                level = self._level_of[feature]
                if used_L[level]:
                    return np.zeros(0, np.int64)
                used_L[level] = True
                fits_N &= self._features_NL[:, level] == feature
        found = self._all
        if not fits_N.all():
            bounds = [(self._offsets[row], self._offsets[row + 1]) for row in np.flatnonzero(fits_N)]
            found = np.unique(np.concatenate([self._tokens_x[:0], *(self._tokens_x[a:b] for a, b in bounds)]))
        return found[~(self._levels_VL[found] & used_L).any(axis=1)]
