"""Byte-pair encoding over sequences of unordered sets: the merge layer of ActionPiece (arXiv 2502.13581).

Every item is a set of features, a history is a sequence of sets. `build_set_vocabulary` learns which two tokens to
replace by a new one; `SetVocabulary` (set_vocabulary.py) segments and reads sequences with what was learnt.

What is counted (section 3.2.1): how often two tokens are neighbours when every set is written down in random order,
as an expectation over the orders. Two tokens of one set of n: 2 / n. One token of a set of n and one of the set next to
it, of m: 1 / (n m). So the weights of a sequence of T tokens sum to T - 1, before and after every merge.

What a merge does: inside a set the new token takes the place of the two. Across two sets it stands between them, in the
intermediate node of the paper, which holds at most one token. A set of one token has the same weights, so intermediate
nodes are sets of one token here, and a set that loses its last token is gone.

The published code counts otherwise in two places, which the paper does not describe: pairs that vanish from a sequence
keep their old count (so merges differ after the first few, and a rule can be learnt twice), and an emptied set may stay
and hide its neighbours from each other. With the first corrected its merges equal these up to the first exact tie.

Counts are integers in units of 1 / lcm(1..n)^2, so they are exact, ties are real ties, and the smaller pair of token
numbers wins them.

Legend: F features, R merges.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from ..errors import IncompatibleComponentsError
from .set_vocabulary import FeatureSet, SetVocabulary


def build_set_vocabulary(
    sequences: Iterable[Sequence[FeatureSet]], level_sizes: Sequence[int], num_merges: int
) -> SetVocabulary:
    """Learn merges from sequences of sets.

    Sets are nodes of linked lists, `nodes_of` says for every token in which nodes it stands. A merge touches only the
    nodes where its pair meets, and recounts only these and their neighbours. The heap holds pairs above a threshold
    with stale entries tolerated; the threshold halves when it runs empty.

    Args:
        sequences: sequences of sets of distinct features, numbers below F. Give training histories only.
        level_sizes: how many features each level has, F in total; a feature is the level's start plus its code.
        num_merges: R, how many merges to learn; fewer when no two tokens are neighbours any more.

    Raises:
        IncompatibleComponentsError: a set that is empty, repeats a feature or names none (sequence and set named).

    Example:
        >>> vocabulary = build_set_vocabulary([[[0, 2], [1, 2]], [[0, 2]]], [2, 1], num_merges=1)
        >>> vocabulary.merges.tolist(), vocabulary.weights.tolist()  # 2/2 + 2/2 inside, 1/4 across
        ([[0, 2]], [2.25])
    """
    if type(num_merges) is not int or num_merges < 0:
        raise IncompatibleComponentsError(f"num_merges is {num_merges!r}: give an integer of 0 or more")
    first_new = sum(level_sizes)
    corpus = _Corpus(sequences, first_new, first_new + num_merges)
    merges: list[tuple[int, int]] = []
    weights: list[float] = []
    while len(merges) < num_merges:
        best = corpus.heaviest_pair()
        if best is None:
            break
        a, b, count = best
        merges.append((a, b))
        weights.append(count / corpus.unit)
        corpus.merge(a, b, first_new + len(merges) - 1)
    return SetVocabulary(level_sizes, merges, weights)


class _Corpus:
    """The sequences while they are merged: linked nodes, where every token stands, exact pair counts, a heap."""

    def __init__(self, sequences: Iterable[Sequence[FeatureSet]], num_features: int, capacity: int):
        self.members: list[list[int]] = []  # tokens of a node, ascending; empty: the node is gone
        self.previous: list[int] = []
        self.following: list[int] = []
        self.capacity = capacity  # a pair (a <= b) is the key a * capacity + b: keys sort as pairs do
        largest = 1
        starts = []
        for row, sequence in enumerate(sequences):
            first = len(self.members)
            for place, features in enumerate(sequence):
                tokens = sorted(map(int, features))
                if not tokens or tokens[0] < 0 or tokens[-1] >= num_features or len(set(tokens)) < len(tokens):
                    raise IncompatibleComponentsError(
                        f"sequence {row}, set {place}: {list(features)} is no set of distinct features from 0 to "
                        f"{num_features - 1}: fix the features or the level sizes"
                    )
                largest = max(largest, len(tokens))
                self.members.append(tokens)
            last = len(self.members) - 1
            if last >= first:
                starts.append((first, last))
                self.previous += [-1, *range(first, last)]
                self.following += [*range(first + 1, last + 1), -1]
        self.nodes_of: list[set[int]] = [set() for _ in range(capacity)]
        for node, tokens in enumerate(self.members):
            for token in tokens:
                self.nodes_of[token].add(node)
        common = math.lcm(*range(1, largest + 1))
        self.unit = common * common
        sizes = range(1, largest + 1)
        self._inside = [0] + [2 * self.unit // n for n in sizes]
        self._across = [[0] * (largest + 1)] + [[0] + [self.unit // (n * m) for m in sizes] for n in sizes]
        self.counts: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []
        self._threshold = 1
        for first, last in starts:
            self._count(list(range(first, last + 1)), 1, self.counts)
        self._fill_heap()

    def _count(self, nodes: list[int], sign: int, counts: dict[int, int]) -> None:
        """Add `sign` times the weights inside consecutive `nodes`, between them, and with the nodes around them."""
        members, capacity = self.members, self.capacity
        for node in nodes:
            tokens = members[node]
            weight = sign * self._inside[len(tokens)]
            for place, x in enumerate(tokens[:-1]):
                base = x * capacity
                for y in tokens[place + 1 :]:
                    counts[base + y] = counts.get(base + y, 0) + weight
        before, after = self.previous[nodes[0]], self.following[nodes[-1]]
        chain = [*([before] if before >= 0 else []), *nodes, *([after] if after >= 0 else [])]
        for left, right in pairwise(chain):
            here, there = members[left], members[right]
            weight = sign * self._across[len(here)][len(there)]
            for x in here:
                for y in there:
                    key = x * capacity + y if x <= y else y * capacity + x
                    counts[key] = counts.get(key, 0) + weight

    def _fill_heap(self) -> None:
        """Put the pairs with at least half of the largest count into the heap."""
        self._threshold = max(1, max(self.counts.values(), default=0) // 2)
        self._heap = [(-count, key) for key, count in self.counts.items() if count >= self._threshold]
        heapq.heapify(self._heap)

    def heaviest_pair(self) -> tuple[int, int, int] | None:
        """The pair (a <= b) of the largest count, the smallest of equals, and its count; None where there is none."""
        while self.counts:
            while self._heap:
                negative, key = heapq.heappop(self._heap)
                count = self.counts.get(key, 0)
                if count == -negative:
                    return (*divmod(key, self.capacity), count)
                if self._threshold <= count < -negative:  # the count fell since
                    heapq.heappush(self._heap, (-count, key))
            self._fill_heap()
        return None

    def merge(self, a: int, b: int, new: int) -> None:
        """Replace the pair by `new` wherever it meets, from the left to the right of every sequence."""
        starts = self._meetings(a, b)
        changes: dict[int, int] = {}
        runs = [[start] for start in starts if self.previous[start] not in starts]
        for run in runs:  # meetings that overlap follow each other; listed before any node changes
            while (node := self.following[run[-1]]) in starts:
                run.append(node)
        for run in runs:
            for node in run:
                self._merge_at(node, a, b, new, changes)
        for key, change in changes.items():
            if change:
                count = self.counts.get(key, 0) + change
                if count:
                    self.counts[key] = count
                    if change > 0 and count >= self._threshold:
                        heapq.heappush(self._heap, (-count, key))
                else:
                    del self.counts[key]
        # every new neighbourhood contains the new token, so a pair that was merged is gone for good
        assert a * self.capacity + b not in self.counts

    def _meetings(self, a: int, b: int) -> set[int]:
        """Nodes where the pair meets: inside the node, or in the node and its follower."""
        fewer, more = sorted((self.nodes_of[a], self.nodes_of[b]), key=len)
        starts = set()
        for node in fewer:
            if a != b and node in more:
                starts.add(node)
            if self.following[node] in more:
                starts.add(node)
            if self.previous[node] in more:
                starts.add(self.previous[node])
        return starts

    def _merge_at(self, left: int, a: int, b: int, new: int, changes: dict[int, int]) -> None:
        tokens = self.members[left]
        if a != b and a in tokens and b in tokens:
            self._count([left], -1, changes)
            self._remove(left, a)
            self._remove(left, b)
            self._append(left, new)
            self._count([left], 1, changes)
            return
        right = self.following[left]
        if not tokens or right < 0:
            return
        if a in tokens and b in self.members[right]:
            mine, theirs = a, b
        elif b in tokens and a in self.members[right]:
            mine, theirs = b, a
        else:
            return
        self._count([left, right], -1, changes)
        self._remove(left, mine)
        self._remove(right, theirs)
        nodes = [node for node in (left, right) if self.members[node]]
        if len(nodes) == 2:  # a node of its own between the two
            nodes.insert(1, len(self.members))
            self.members.append([])
            self.previous.append(left)
            self.following.append(right)
            self.following[left] = self.previous[right] = nodes[1]
            middle = nodes[1]
        elif nodes == [left]:
            middle = right
            nodes.append(right)
        else:
            middle = left
            if not nodes:  # both are empty: one is enough
                self.following[left] = self.following[right]
                if self.following[right] >= 0:
                    self.previous[self.following[right]] = left
            nodes.insert(0, left)
        self._append(middle, new)
        self._count(nodes, 1, changes)

    def _remove(self, node: int, token: int) -> None:
        self.members[node] = [other for other in self.members[node] if other != token]
        self.nodes_of[token].discard(node)

    def _append(self, node: int, new: int) -> None:
        self.members[node].append(new)  # the largest number so far, so the order stays
        self.nodes_of[new].add(node)
