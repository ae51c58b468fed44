"""Byte-pair encoding over sets: weights by hand, merges equal to a naive recount, segmentations that read back."""

from __future__ import annotations

import itertools
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.set_bpe import _Corpus, build_set_vocabulary
from hf_genrec.identifiers.set_vocabulary import SetVocabulary


def neighbour_expectations(sequence) -> dict[tuple[int, int], Fraction]:
    """Expected number of times each pair is adjacent over all orders of all sets, by writing all of them down."""
    found: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
    flats = [list(itertools.chain(*orders)) for orders in itertools.product(*map(itertools.permutations, sequence))]
    for flat in flats:
        for x, y in itertools.pairwise(flat):
            found[min(x, y), max(x, y)] += Fraction(1, len(flats))
    return dict(found)


def recount(corpus) -> dict[tuple[int, int], Fraction]:
    """All weights of all sequences by the formulas of the paper."""
    counts: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
    for sequence in corpus:
        for one in sequence:
            for x, y in itertools.combinations(sorted(one), 2):
                counts[x, y] += Fraction(2, len(one))
        for left, right in itertools.pairwise(sequence):
            for x, y in itertools.product(left, right):
                counts[min(x, y), max(x, y)] += Fraction(1, len(left) * len(right))
    return counts


def merged(sequence, pair, new):
    """One sequence after a merge, from left to right, with the intermediate nodes written out: [set, node, set, ...]."""
    a, b = pair
    slots = [set(sequence[0])]
    for one in sequence[1:]:
        slots += [set(), set(one)]
    place = 0
    while place < len(slots):
        here = slots[place]
        if a != b and {a, b} <= here:
            slots[place] = here - {a, b} | {new}
        elif place + 2 < len(slots):
            there = slots[place + 2]
            for x, y in ((a, b), (b, a)):
                if x in here and y in there:
                    slots[place], slots[place + 2], slots[place + 1] = here - {x}, there - {y}, {new}
                    break
        place += 2
    return [one for one in slots if one]


def naive_merges(corpus, first_new, num_merges):
    corpus = [[set(one) for one in sequence] for sequence in corpus if sequence]
    merges, weights = [], []
    for new in range(first_new, first_new + num_merges):
        counts = recount(corpus)
        if not counts:
            break
        pair = min(counts, key=lambda key: (-counts[key], key))
        merges.append(list(pair))
        weights.append(float(counts[pair]))
        corpus = [merged(sequence, pair, new) for sequence in corpus]
    return merges, weights


def random_corpus(rng, sequences, longest, levels, size, items):
    offsets = np.arange(levels) * size
    catalogue = rng.integers(0, size, (items, levels)) + offsets
    return [catalogue[rng.integers(0, items, rng.integers(0, longest + 1))].tolist() for _ in range(sequences)]


def total_weight(corpus: _Corpus) -> int:
    return sum(corpus.counts.values())


# --- weights -----------------------------------------------------------------------------------------------------


def test_weights_by_hand():
    # {0, 1, 2} then {0, 3}: 2/3 for each of three pairs, 2/2 inside the second set, 1/6 for each of six pairs across
    corpus = _Corpus([[[0, 1, 2], [0, 3]]], 4, 4)
    weights = {divmod(key, 4): Fraction(count, corpus.unit) for key, count in corpus.counts.items()}
    sixth, two_thirds = Fraction(1, 6), Fraction(2, 3)
    assert weights == {
        (0, 1): two_thirds + sixth,
        (0, 2): two_thirds + sixth,
        (1, 2): two_thirds,
        (0, 3): 1 + sixth,
        (0, 0): sixth,
        (1, 3): sixth,
        (2, 3): sixth,
    }
    assert sum(weights.values()) == 4  # five tokens in a row have four neighbours


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_expected_neighbours(seed):
    rng = np.random.default_rng(seed)
    sequence = [rng.permutation(5)[: rng.integers(1, 4)].tolist() for _ in range(3)]
    corpus = _Corpus([sequence], 5, 5)
    weights = {divmod(key, 5): Fraction(count, corpus.unit) for key, count in corpus.counts.items()}
    assert weights == neighbour_expectations(sequence) == dict(recount([sequence]))


def test_a_merge_across_sets_stands_between_them():
    # 1 and 2 meet across the sets of three sequences; the new token is a neighbour of both sets, which no longer meet
    corpus = _Corpus([[[0, 1], [2, 3]]], 4, 5)
    corpus.merge(1, 2, 4)
    weights = {divmod(key, 5): Fraction(count, corpus.unit) for key, count in corpus.counts.items()}
    assert weights == {(0, 4): 1, (3, 4): 1}
    assert [corpus.members[node] for node in (0, corpus.following[0], 1)] == [[0], [4], [3]]


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_merges_equal_a_naive_recount(seed):
    rng = np.random.default_rng(seed)
    levels, size = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    corpus = random_corpus(rng, int(rng.integers(1, 8)), int(rng.integers(1, 9)), levels, size, int(rng.integers(1, 9)))
    first = levels * size
    vocabulary = build_set_vocabulary(corpus, [size] * levels, 60)
    merges, weights = naive_merges(corpus, first, 60)
    assert vocabulary.merges.tolist() == merges
    assert vocabulary.weights.tolist() == weights


def test_sets_of_several_sizes_equal_a_naive_recount():
    rng = np.random.default_rng(3)
    for _ in range(20):
        corpus = [
            [rng.permutation(6)[: rng.integers(1, 5)].tolist() for _ in range(rng.integers(1, 6))] for _ in range(4)
        ]
        vocabulary = build_set_vocabulary(corpus, [6], 40)
        assert (vocabulary.merges.tolist(), vocabulary.weights.tolist()) == naive_merges(corpus, 6, 40)


def test_counts_stay_exact_and_sum_to_the_neighbours():
    rng = np.random.default_rng(7)
    data = [row for row in random_corpus(rng, 60, 12, 4, 6, 20) if row]
    corpus = _Corpus(data, 24, 324)
    tokens = 4 * sum(map(len, data))
    for new in range(24, 324):
        best = corpus.heaviest_pair()
        if best is None:
            break
        corpus.merge(best[0], best[1], new)
        left = sum(map(len, corpus.members))
        assert left < tokens
        tokens = left
        assert total_weight(corpus) == (tokens - len(data)) * corpus.unit
    assert new > 200


def test_ties_go_to_the_smaller_pair_and_rows_may_come_in_any_order():
    corpus = [[[0, 3]], [[1, 2]], [[0, 2]], [[1, 3]]]
    expected = [[0, 2], [0, 3], [1, 2], [1, 3]]
    for order in itertools.permutations(corpus):
        assert build_set_vocabulary(order, [2, 2], 9).merges.tolist() == expected  # and it stops when nothing is left


def test_bad_sets_are_named():
    for corpus in ([[[0]], [[0], []]], [[[0]], [[0], [1, 1]]], [[[0]], [[0], [2]]], [[[0]], [[0], [-1]]]):
        with pytest.raises(IncompatibleComponentsError, match="sequence 1, set 1"):
            build_set_vocabulary(corpus, [2], 1)
    with pytest.raises(IncompatibleComponentsError, match="num_merges"):
        build_set_vocabulary([], [2], -1)
    assert build_set_vocabulary([], [2], 5).size == 2


# --- segmenting and reading --------------------------------------------------------------------------------------


def slow_pair_encoding(vocabulary, tokens):
    tokens = list(tokens)
    while True:
        found = [(vocabulary.merge_pair(x, y), place) for place, (x, y) in enumerate(itertools.pairwise(tokens))]
        found = [one for one in found if one[0] >= 0]
        if not found:
            return tokens
        new, place = min(found)
        tokens[place : place + 2] = [new]


def slow_fixed(vocabulary, sets):
    """All pairs of all sets in every step, exact numbers."""
    groups = [list(one) for one in sets]
    while True:
        found = []
        for place, group in enumerate(groups):
            for x, y in itertools.combinations(group, 2):
                new = vocabulary.merge_pair(x, y)
                if new >= 0:
                    weight = vocabulary.weights[new - vocabulary.num_features] * 2 / len(group)
                    found.append((-weight, new, 0, place))
            if place + 1 < len(groups):
                for x, y in itertools.product(group, groups[place + 1]):
                    new = vocabulary.merge_pair(x, y)
                    if new >= 0:
                        pairs = len(group) * len(groups[place + 1])
                        found.append((-(vocabulary.weights[new - vocabulary.num_features] / pairs), new, 1, place))
        if not found:
            return list(itertools.chain(*groups))
        _, new, across, place = min(found)
        a, b = vocabulary.merges[new - vocabulary.num_features].tolist()
        if not across:
            groups[place] = [new] + [token for token in groups[place] if token not in (a, b)]
            continue
        if not (a in groups[place] and b in groups[place + 1]):
            a, b = b, a
        groups[place].remove(a)
        groups[place + 1].remove(b)
        groups[place : place + 2] = [one for one in (groups[place], [new], groups[place + 1]) if one]


@pytest.fixture(scope="module")
def learnt():
    rng = np.random.default_rng(11)
    corpus = [row for row in random_corpus(rng, 120, 10, 3, 5, 25) if row]
    return corpus, build_set_vocabulary(corpus, [5, 5, 5], 200)


def test_segmentations_equal_slow_ones(learnt):
    corpus, vocabulary = learnt
    generator = np.random.default_rng(0)
    for sequence in corpus[:60]:
        flat = [int(token) for one in sequence for token in generator.permutation(one)]
        assert vocabulary.merge_tokens(flat) == slow_pair_encoding(vocabulary, flat)
        assert vocabulary.encode_fixed(sequence) == slow_fixed(vocabulary, sequence)
    items = np.unique([one for sequence in corpus for one in sequence], axis=0)
    for one, row in zip(items.tolist(), vocabulary.encode_items(items).tolist()):
        assert [token for token in row if token >= 0] == vocabulary.encode_fixed([one])


def test_every_segmentation_reads_back(learnt):
    corpus, vocabulary = learnt
    legal = {tuple(sorted(one)) for sequence in corpus for one in sequence}
    spanning, several, unique = 0, 0, 0
    for number, sequence in enumerate(corpus):
        expected = [tuple(one) for one in sequence]
        segmentations = [vocabulary.encode_permuted(sequence, np.random.default_rng([number, q])) for q in range(3)]
        several += len({tuple(tokens) for tokens in segmentations}) > 1
        for tokens in [*segmentations, vocabulary.encode_fixed(sequence)]:
            spelled = sorted(feature for token in tokens for feature in vocabulary.features(token))
            assert spelled == sorted(itertools.chain(*sequence))  # nothing is lost or added, whatever the order
            spanning += any(vocabulary.level_masks[token] < 0 for token in tokens)
            reading = vocabulary.read(tokens, legal.__contains__)
            assert reading is not None and len(reading.sets) == len(sequence)
            unique += reading.unique
            if reading.unique:
                assert reading.sets == expected
            else:  # some token holds two different features of one level
                levels = [[feature // 5 for feature in set(vocabulary.features(token))] for token in tokens]
                assert any(len(set(one)) < len(one) for one in levels)
    assert spanning > 100 and several > 60 and unique > 150


def test_one_set_always_reads_back(learnt):
    corpus, vocabulary = learnt
    for sequence in corpus[:40]:
        for one in sequence:
            for order in itertools.permutations(one):
                reading = vocabulary.read(vocabulary.merge_tokens(order))
                assert reading is not None and reading.unique and reading.sets == [tuple(one)]


def test_two_readings_are_told():
    # one level: a token of two features of it spans two sets, and does not say which came first
    vocabulary = SetVocabulary([2], [[0, 1]], [1.0])
    assert vocabulary.merge_tokens([1, 0]) == vocabulary.merge_tokens([0, 1]) == [2]
    assert vocabulary.read([2]) == ([(0,), (1,)], False)
    assert vocabulary.read([2], lambda one: one != (2,)) == ([(0,), (1,)], False)
    assert SetVocabulary([2], [[0, 0]], [1.0]).read([2, 1]) == ([(0,), (0,), (1,)], True)
    # two levels, the open set needs one of the two features of level 1: the rest follows
    vocabulary = SetVocabulary([2, 2], [[0, 2], [1, 3], [2, 4]], [3.0, 2.0, 1.0])
    assert vocabulary.read([0, 6]) == ([(0, 2), (0, 2)], True)
    assert vocabulary.read([0, 2, 1]) is None  # a set is open at the end
    assert vocabulary.read([0, 1]) is None  # two features of one level in one set
    assert vocabulary.read([]) == ([], True)


def test_no_merges_are_plain_features():
    vocabulary = SetVocabulary([2, 3], [], [])
    assert vocabulary.size == 5 and vocabulary.encode_fixed([[0, 2], [1, 4]]) == [0, 2, 1, 4]
    assert sorted(vocabulary.encode_permuted([[0, 2]], np.random.default_rng(0))) == [0, 2]
    assert vocabulary.encode_items(np.array([[1, 4]])).tolist() == [[1, 4]]
    assert vocabulary.encode_fixed([]) == vocabulary.merge_tokens([]) == []


def test_same_seed_same_segmentation(learnt):
    corpus, vocabulary = learnt
    one, two = (
        [vocabulary.encode_permuted(row, np.random.default_rng([4, n])) for n, row in enumerate(corpus)]
        for _ in range(2)
    )
    assert one == two


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([(0, 2), (0, 3), (1, 2), (1, 3)]), min_size=1, max_size=6), max_size=6),
    st.integers(0, 12),
)
def test_any_corpus_equals_naive_and_reads_back(corpus, num_merges):
    vocabulary = build_set_vocabulary(corpus, [2, 2], num_merges)
    assert (vocabulary.merges.tolist(), vocabulary.weights.tolist()) == naive_merges(corpus, 4, num_merges)
    for sequence in corpus:
        tokens = vocabulary.encode_fixed(sequence)
        reading = vocabulary.read(tokens)
        assert reading is not None and (reading.sets == [tuple(one) for one in sequence] or not reading.unique)


@pytest.mark.parametrize(
    ("merges", "weights", "message"),
    [
        ([[1, 0]], [1.0], "row 0"),
        ([[0, 3]], [1.0], "row 0"),
        ([[-1, 1]], [1.0], "row 0"),
        ([[0, 1], [0, 1]], [1.0, 1.0], "twice"),
        ([[0, 1]], [], "0 weights for 1"),
        ([[0, 1]], [np.nan], "finite"),
        ([[n, n] for n in range(2, 60)], [1.0] * 58, "more than 65536 features"),
    ],
)
def test_bad_vocabularies_are_refused(merges, weights, message):
    with pytest.raises(IncompatibleComponentsError, match=message):
        SetVocabulary([3], merges, weights)
