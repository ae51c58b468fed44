"""Collision policies: their stated guarantees, a naive re-implementation, capacity, both sort paths, errors."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.collisions import COLLISION_POLICIES, code_groups, resolve_collisions
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans

SHAPES = [(1, (1,)), (5, (3,)), (40, (3, 4)), (500, (4, 8, 3)), (300, (2, 2, 2, 64)), (64, (4, 4, 4))]


def random_codes(num: int, sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, num) for size in sizes], 1)


def num_distinct(codes: np.ndarray) -> int:
    return len({tuple(row) for row in codes.tolist()})


@pytest.mark.parametrize(("num", "sizes"), [*SHAPES, (200, (2**31,) * 3), (200, (2**40, 2**22))])
def test_groups_are_the_distinct_codes_in_order(num: int, sizes: tuple[int, ...]) -> None:
    codes = random_codes(num, tuple(min(size, 4) for size in sizes))
    group, size = code_groups(codes, sizes)
    expected = sorted({tuple(row) for row in codes.tolist()})
    assert [expected.index(tuple(row)) for row in codes.tolist()] == group.tolist()
    assert size.tolist() == [Counter(map(tuple, codes.tolist()))[code] for code in expected]


# ------------------------------------------------------------------------------------------------------ counter, keep


@pytest.mark.parametrize(("num", "sizes"), SHAPES)
def test_counter_makes_every_code_unique(num: int, sizes: tuple[int, ...]) -> None:
    codes = random_codes(num, sizes)
    before = codes.copy()
    resolved, resolved_sizes = resolve_collisions(codes, sizes, "counter")
    assert num_distinct(resolved) == num and np.array_equal(codes, before)
    assert np.array_equal(resolved[:, :-1], codes)
    assert resolved_sizes == (*sizes, max(Counter(map(tuple, codes.tolist())).values()))
    seen: Counter = Counter()
    for row, number in zip(codes.tolist(), resolved[:, -1].tolist()):
        assert number == seen[tuple(row)]  # a running number in catalogue order
        seen[tuple(row)] += 1


def test_counter_with_priority_numbers_by_it() -> None:
    codes = random_codes(300, (3, 3))
    priority = np.random.default_rng(1).integers(0, 20, 300)
    resolved, _ = resolve_collisions(codes, (3, 3), priority=priority)
    for code in {tuple(row) for row in codes.tolist()}:
        members = [i for i in range(300) if tuple(codes[i]) == code]
        expected = sorted(members, key=lambda i: (-priority[i], i))
        assert resolved[expected, -1].tolist() == list(range(len(members)))
    constant, _ = resolve_collisions(codes, (3, 3), priority=np.zeros(300))
    assert np.array_equal(constant, resolve_collisions(codes, (3, 3))[0])


def test_counter_without_collisions_adds_a_level_of_one_code() -> None:
    resolved, sizes = resolve_collisions([[0, 1], [1, 0]], (2, 2))
    assert sizes == (2, 2, 1) and resolved.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_keep_changes_nothing() -> None:
    codes = torch.tensor([[0, 1], [0, 1]])
    resolved, sizes = resolve_collisions(codes, [2, 2], "keep")
    assert resolved.tolist() == codes.tolist() and sizes == (2, 2)


# ------------------------------------------------------------------------------------------------------- next nearest


def naive_next_nearest(codes: np.ndarray, books: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """The docstring, item by item, over the explicit set of free full codes."""
    sizes = [len(book) for book in books]

    def vector(code: tuple) -> np.ndarray:
        return sum((books[level][c] for level, c in enumerate(code)), np.zeros(x.shape[1]))

    error = [float(((x[i] - vector(tuple(codes[i]))) ** 2).sum()) for i in range(len(x))]
    free = set(itertools.product(*map(range, sizes)))
    result, moving = codes.copy(), []
    for code in sorted({tuple(row) for row in codes.tolist()}):
        members = sorted((i for i in range(len(x)) if tuple(codes[i]) == code), key=lambda i: (error[i], i))
        free.discard(code)
        moving += members[1:]
    for i in sorted(moving, key=lambda i: (error[i], i)):
        prefix = tuple(codes[i][:-1].tolist())
        while not any(code[: len(prefix)] == prefix for code in free):
            prefix = prefix[:-1]
        while len(prefix) < len(sizes):
            level = len(prefix)
            room = [c for c in range(sizes[level]) if any(f[: level + 1] == (*prefix, c) for f in free)]
            prefix = (*prefix, min(room, key=lambda c: (((x[i] - vector(prefix) - books[level][c]) ** 2).sum(), c)))
        free.remove(prefix)
        result[i] = prefix
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("num", "sizes"), [(1, (1,)), (6, (8,)), (30, (5, 8)), (60, (4, 4, 4)), (64, (4, 4, 4)), (27, (3, 3, 3))]
)
def test_next_nearest_is_the_naive_rule(num: int, sizes: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    books = [rng.normal(size=(size, 3)) for size in sizes]
    x = rng.normal(size=(num, 3))
    codes = np.stack([rng.integers(0, max(1, size // 2), num) for size in sizes], 1)  # crowded into one half
    resolved, resolved_sizes = resolve_collisions(codes, sizes, "next_nearest", codebooks=books, features=x)
    assert np.array_equal(resolved, naive_next_nearest(codes, books, x))
    assert num_distinct(resolved) == num and resolved_sizes == sizes


def test_next_nearest_keeps_the_closest_item_and_touches_nobody_else() -> None:
    books = [np.array([[0.0], [10.0]]), np.array([[0.0], [1.0], [3.0]])]
    x = np.array([[0.2], [0.1], [10.0], [0.45]])
    codes = np.array([[0, 0], [0, 0], [1, 0], [0, 0]])
    resolved, _ = resolve_collisions(codes, (2, 3), "next_nearest", codebooks=books, features=x)
    assert resolved.tolist() == [[0, 1], [0, 0], [1, 0], [0, 2]]  # .1 stays, then .2 moves first, .45 gets what is left


def test_next_nearest_moves_up_a_level_only_when_the_prefix_is_full() -> None:
    books = [np.array([[0.0], [5.0], [-4.0]]), np.array([[0.0], [1.0]])]
    x, codes = np.array([[0.0], [0.1], [0.2]]), np.zeros((3, 2), dtype=int)
    resolved, _ = resolve_collisions(codes, (3, 2), "next_nearest", codebooks=books, features=x)
    assert resolved.tolist() == [[0, 0], [0, 1], [2, 1]]


def test_next_nearest_on_a_quantizer() -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    x[200:] = x[:100]  # equal items always collide
    quantizer = ResidualKMeans((8, 8, 8)).fit(x)
    codes = quantizer.encode(x)
    resolved, sizes = resolve_collisions(
        codes, quantizer.codebook_sizes, "next_nearest", codebooks=quantizer.codebooks, features=quantizer.transform(x)
    )
    assert num_distinct(resolved) == 300 and sizes == (8, 8, 8)
    group, size = code_groups(codes.numpy(), sizes)
    alone = size[group] == 1
    assert np.array_equal(resolved[alone], codes.numpy()[alone])
    changed = (resolved != codes.numpy()).any(1)
    assert changed.sum() == (size - 1).sum()


def test_next_nearest_needs_room_and_matching_inputs() -> None:
    books, codes = [np.zeros((2, 1))], np.zeros((3, 1), dtype=int)
    with pytest.raises(IncompatibleComponentsError, match="3 items do not fit into 2 full codes"):
        resolve_collisions(codes, (2,), "next_nearest", codebooks=books, features=np.zeros((3, 1)))
    with pytest.raises(IncompatibleComponentsError, match="needs codebooks="):
        resolve_collisions(codes, (2,), "next_nearest")
    with pytest.raises(IncompatibleComponentsError, match="codebooks have sizes"):
        resolve_collisions(codes, (2,), "next_nearest", codebooks=[np.zeros((5, 1))], features=np.zeros((3, 1)))
    with pytest.raises(IncompatibleComponentsError, match="codebooks have sizes"):
        resolve_collisions(codes, (2,), "next_nearest", codebooks=books, features=np.zeros((2, 1)))


# -------------------------------------------------------------------------------------------------------------- inputs


def test_the_table_names_every_policy() -> None:
    assert set(COLLISION_POLICIES) == {
        *("counter", "extra_id", "keep", "next_nearest"),
        *("next_tail", "random_tail", "require_unique", "sinkhorn"),
    }
    assert all("Guarantee:" in policy.__doc__ for policy in COLLISION_POLICIES.values())


def test_bad_codes_are_named() -> None:
    with pytest.raises(IncompatibleComponentsError, match=r"unknown collision policy 'count'.*counter"):
        resolve_collisions([[0]], (1,), "count")
    with pytest.raises(IncompatibleComponentsError, match=r"item row 1, level 1: code 4 is outside 0\.\.3"):
        resolve_collisions([[0, 3], [1, 4]], (2, 4))
    with pytest.raises(IncompatibleComponentsError, match="item row 0, level 0: code -1"):
        resolve_collisions([[-1]], (2,))
    with pytest.raises(IncompatibleComponentsError, match="codes have 1 levels, codebook_sizes has 2"):
        resolve_collisions([[0]], (2, 2))
    with pytest.raises(IncompatibleComponentsError, match="priority"):
        resolve_collisions([[0], [0]], (2,), priority=[1, 2, 3])
    for bad in ([], [0, 1], [[0.5]], [[]]):
        with pytest.raises(IncompatibleComponentsError, match="matrix of integers"):
            resolve_collisions(bad, (2,))
