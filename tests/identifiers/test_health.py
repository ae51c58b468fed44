"""Identifier health: figures by hand, brute force over shapes, extremes, JSON."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.health import identifier_health, neighbour_prefix_depths

SHAPES = [(1, (1,)), (2, (5,)), (50, (4, 6)), (400, (5, 3, 7)), (300, (300, 2))]


def random_codes(num: int, sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([np.minimum(rng.geometric(0.3, num) - 1, size - 1) for size in sizes], 1)


def entropy(counts: list[int]) -> float:
    return -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c)


@pytest.mark.parametrize(("num", "sizes"), SHAPES)
def test_figures_agree_with_counting(num: int, sizes: tuple[int, ...]) -> None:
    codes = random_codes(num, sizes)
    rows = [tuple(row) for row in codes.tolist()]
    health = identifier_health(codes, sizes)
    groups = Counter(rows)
    assert health.distinct_codes == len(groups)
    assert health.items_sharing == sum(groups[row] > 1 for row in rows)
    assert health.collision_rate == pytest.approx(health.items_sharing / num)
    assert health.largest_group == max(groups.values())
    for level, size in enumerate(sizes):
        counts = [sum(row[level] == code for row in rows) for code in range(size)]
        assert health.utilisation[level] == pytest.approx(sum(c > 0 for c in counts) / size)
        assert health.perplexity[level] == pytest.approx(math.exp(entropy(counts)))
        assert health.largest_code[level] == max(counts)
        gini = sum(abs(a - b) for a in counts for b in counts) / (2 * size * sum(counts))  # mean absolute difference
        assert health.gini[level] == pytest.approx(gini)
        prefixes = Counter(row[: level + 1] for row in rows)
        children = Counter(prefix[:-1] for prefix in prefixes)
        assert health.nodes[level] == len(prefixes)
        assert health.max_children[level] == max(children.values())
        assert health.mean_children[level] == pytest.approx(len(prefixes) / len(children))
        parents = Counter(row[:level] for row in rows)
        given = sum(
            parents[parent] / num * entropy([n for prefix, n in prefixes.items() if prefix[:-1] == parent])
            for parent in parents
        )
        assert health.conditional_perplexity[level] == pytest.approx(math.exp(given))


def test_codes_that_end_early_count_where_they_are() -> None:
    codes = np.array([[0, 0, 1], [0, 0, -1], [0, 1, -1], [1, -1, -1], [1, -1, -1], [2, 2, 0]])
    health = identifier_health(codes, (3, 4, 2), np.eye(6, 4))
    assert health.mean_length == pytest.approx(12 / 6) and "2.00 codes per item" in str(health)
    assert health.distinct_codes == 5 and health.items_sharing == 2 and health.largest_group == 2
    assert health.utilisation == pytest.approx([1, 3 / 4, 1]) and health.nodes == [3, 3, 2]
    assert health.largest_code == [3, 2, 1] and health.max_children == [3, 2, 1]
    assert health.mean_children == pytest.approx([3, 3 / 2, 1])  # over the prefixes that go on
    below = 3 / 4 * entropy([2, 1])  # level 2 of the four items that have one, given the first code
    assert health.conditional_perplexity[1:] == pytest.approx([math.exp(below), 1])
    same_end = identifier_health(np.array([[0, -1], [0, -1]]), (1, 3), np.eye(2), neighbours=1)
    assert same_end.neighbour_prefix_rate == [1, 0]  # equal ends are no common code
    assert same_end.utilisation == [1, 0] and same_end.nodes == [1, 0] and same_end.perplexity == [1, 1]


def test_extremes() -> None:
    even = identifier_health(np.indices((4, 8)).reshape(2, -1).T, (4, 8))
    assert even.collision_rate == 0 and even.utilisation == [1, 1] and even.nodes == [4, 32]
    assert even.perplexity == pytest.approx([4, 8]) and even.gini == pytest.approx([0, 0])
    assert even.conditional_perplexity == pytest.approx([4, 8])
    collapsed = identifier_health(np.zeros((10, 2), dtype=int), (4, 4))
    assert collapsed.collision_rate == 1 and collapsed.largest_group == 10 and collapsed.items_sharing == 10
    assert collapsed.utilisation == [0.25, 0.25] and collapsed.perplexity == pytest.approx([1, 1])
    assert collapsed.gini == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize(("num", "k", "chunk"), [(2, 10, 1), (12, 3, 5), (150, 10, 64)])
def test_neighbours_are_the_brute_force(num: int, k: int, chunk: int) -> None:
    codes = random_codes(num, (3, 3, 3))
    features = np.random.default_rng(1).normal(size=(num, 5)).astype(np.float32)
    depth = neighbour_prefix_depths(codes, features, k=k, chunk_size=chunk)
    assert depth.shape == (num, min(k, num - 1))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for item in range(num):
        order = [j for j in np.argsort(-(unit[item].astype(np.float64) @ unit.T)) if j != item][:k]
        expected = []
        for j in order:
            same = [a == b for a, b in zip(codes[item], codes[j])]
            expected.append(same.index(False) if False in same else 3)
        assert sorted(depth[item].tolist()) == sorted(expected)


def test_neighbour_figures() -> None:
    angle = np.array([0.0, 0.1, 1.5, 1.6, 3.0, 3.1])
    features = np.stack([np.cos(angle), np.sin(angle)], 1)
    paired = identifier_health([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 0]], (3, 2), features, neighbours=1)
    assert paired.neighbour_hit_rate == 1 and paired.neighbour_prefix_rate == pytest.approx([1, 1 / 3])
    assert paired.neighbour_prefix_depth == pytest.approx(4 / 3)
    assert paired.neighbour_hit_chance == pytest.approx(3 * 2 / (6 * 5))
    apart = identifier_health([[0, 0], [1, 0], [0, 0], [1, 0], [0, 0], [1, 0]], (2, 1), features, neighbours=1)
    assert apart.neighbour_hit_rate == 0 and apart.neighbour_prefix_depth == 0
    everyone = identifier_health([[0], [0], [1], [1], [2], [2]], (3,), features, neighbours=99)
    assert everyone.neighbour_k == 5 and everyone.neighbour_hit_rate == pytest.approx(everyone.neighbour_hit_chance)


def test_many_items_are_sampled_evenly() -> None:
    codes = random_codes(1000, (8, 8))
    features = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    health = identifier_health(torch.as_tensor(codes), (8, 8), features, max_queries=100)
    assert health.neighbour_queries == 100
    assert health.to_dict() == identifier_health(codes, (8, 8), features.numpy(), max_queries=100).to_dict()


def test_reports_are_json_and_text() -> None:
    features = np.random.default_rng(0).normal(size=(30, 4))
    health = identifier_health(random_codes(30, (4, 4)), (4, 4), features)
    assert json.loads(json.dumps(health.to_dict())) == health.to_dict()
    text = str(health)
    assert "30 items" in text and "nearest neighbours" in text and max(map(len, text.splitlines())) <= 120
    bare = identifier_health(random_codes(30, (4, 4)), (4, 4))
    assert bare.neighbour_hit_rate is None and "neighbours" not in str(bare)


def test_one_item_and_bad_input() -> None:
    single = identifier_health([[0, 0]], (1, 1), np.ones((1, 3)))
    assert single.neighbour_k == 0 and single.collision_rate == 0
    with pytest.raises(IncompatibleComponentsError, match="one row per item"):
        identifier_health([[0], [0]], (1,), np.ones((3, 2)))
    with pytest.raises(IncompatibleComponentsError, match="item row 0"):
        identifier_health([[9]], (1,))
