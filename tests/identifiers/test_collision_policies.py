"""Policies of published systems: guarantees over random codes, identities between policies, codes of several lengths."""

from __future__ import annotations

import itertools
import logging
from collections import Counter

import numpy as np
import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.collision_groups import code_groups
from hf_genrec.identifiers.collision_texts import pick_unique
from hf_genrec.identifiers.collisions import (
    COLLISION_POLICIES,
    check_collision_options,
    collision_options,
    resolve_collisions,
)
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.quantizers.assignment import sinkhorn_codes
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SHAPES = [(1, (1,)), (5, (5,)), (40, (5, 9)), (300, (4, 8, 12)), (64, (4, 4, 4)), (500, (3, 3, 40))]


def random_codes(num: int, sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, num) for size in sizes], 1)


def shorter_codes(num: int, sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    codes = random_codes(num, sizes, seed)
    length = np.random.default_rng(seed + 1).integers(1, len(sizes) + 1, num)
    codes[np.arange(len(sizes)) >= length[:, None]] = -1
    return codes


def num_distinct(codes: np.ndarray) -> int:
    return len({tuple(row) for row in codes.tolist()})


def groups_of(codes: np.ndarray) -> list[list[int]]:
    groups: dict[tuple, list[int]] = {}
    for item, row in enumerate(codes.tolist()):
        groups.setdefault(tuple(row), []).append(item)
    return list(groups.values())


def space(sizes: tuple[int, ...], num: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {"codebooks": [rng.normal(size=(size, 3)) for size in sizes], "features": rng.normal(size=(num, 3))}


# ------------------------------------------------------------------------------------------------- every policy at once


@pytest.mark.parametrize("policy", COLLISION_POLICIES)
@pytest.mark.parametrize(("num", "sizes"), SHAPES)
def test_codes_stay_inside_their_codebooks_and_inputs_untouched(policy: str, num: int, sizes: tuple[int, ...]) -> None:
    codes = random_codes(num, sizes)
    before = codes.copy()
    inputs = space(sizes, num) | {"priority": np.arange(num), "seed": 3}
    options = {"when_full": "keep"} if policy == "next_tail" else {}
    if policy == "require_unique" and num_distinct(codes) < num:
        with pytest.raises(IncompatibleComponentsError):
            resolve_collisions(codes, sizes, policy, **inputs)
        return
    if policy == "next_nearest" and num > np.prod(sizes):
        return
    resolved, resolved_sizes = resolve_collisions(codes, sizes, policy, **inputs, **options)
    again, _ = resolve_collisions(codes, sizes, policy, **inputs, **options)
    assert np.array_equal(codes, before) and np.array_equal(resolved, again)
    assert (resolved >= 0).all() and (resolved < np.array(resolved_sizes)).all()
    assert np.array_equal(resolved[:, : len(sizes) - 1], codes[:, :-1]) or policy == "next_nearest"
    if policy in ("counter", "random_tail", "extra_id", "next_nearest"):
        assert num_distinct(resolved) == num
    if policy in ("counter", "random_tail", "extra_id", "keep"):
        assert np.array_equal(resolved[:, : len(sizes)], codes)
    if policy in ("next_tail", "sinkhorn", "next_nearest"):
        assert resolved_sizes == sizes
        sharing = identifier_health(codes, sizes).items_sharing
        assert identifier_health(resolved, sizes).items_sharing <= sharing


@pytest.mark.parametrize("policy", ["counter", "random_tail", "extra_id", "keep"])
@pytest.mark.parametrize("seed", range(3))
def test_codes_of_several_lengths(policy: str, seed: int) -> None:
    sizes = (4, 3, 5)
    codes = shorter_codes(80, sizes, seed)
    resolved, resolved_sizes = resolve_collisions(codes, sizes, policy)
    health = identifier_health(resolved, resolved_sizes)  # checks the table: ranges, -1 only behind the end
    if policy == "keep":
        assert np.array_equal(resolved, codes)
        return
    assert health.items_sharing == 0 and health.mean_length == (codes >= 0).sum(1).mean() + 1
    for row, given in zip(resolved.tolist(), codes.tolist(), strict=True):
        length = sum(code >= 0 for code in given)
        assert row[:length] == given[:length]
        if length < len(sizes):  # the digit behind an end is none of the given codes of that level
            assert sizes[length] <= row[length] < resolved_sizes[length]
    tokenizer = ItemTokenizer.from_codes([str(i) for i in range(80)], resolved, codebook_sizes=resolved_sizes)
    assert all(tokenizer.codes_to_items(tokenizer.item_to_codes(str(i))) == [[str(i)]] for i in range(80))


@pytest.mark.parametrize("policy", ["next_nearest", "next_tail", "sinkhorn"])
def test_policies_of_a_codebook_space_refuse_codes_that_end_early(policy: str) -> None:
    with pytest.raises(IncompatibleComponentsError, match="item row 1 ends before the last level"):
        resolve_collisions([[0, 0], [1, -1]], (2, 2), policy, **space((2, 2), 2))
    with pytest.raises(IncompatibleComponentsError, match="item row 1 ends before the last level"):
        resolve_collisions([[0, 0], [1, -1]], (2, 2), "random_tail", redraw=True)


def test_bad_shorter_codes_are_named() -> None:
    with pytest.raises(IncompatibleComponentsError, match="item row 1, level 1: -1 stands before a code"):
        resolve_collisions([[0, 0, 0], [1, -1, 1]], (2, 2, 2), "keep")
    with pytest.raises(IncompatibleComponentsError, match="item row 0, level 1: code -2"):
        resolve_collisions([[0, -2]], (2, 2), "keep")


def test_an_end_is_a_code_of_its_own() -> None:
    codes = np.array([[1, -1], [1, 0], [1, -1], [0, -1]])
    group, size = code_groups(codes, (2, 1))
    assert group.tolist() == [1, 2, 1, 0] and size.tolist() == [1, 2, 1]
    wide_group, _ = code_groups(codes, (2**40, 2**30))  # the slow path
    assert wide_group.tolist() == group.tolist()


# ------------------------------------------------------------------------------------------------------------- counter


@pytest.mark.parametrize("seed", range(3))
def test_counter_only_where_needed_numbers_whole_groups(seed: int) -> None:
    codes, sizes = random_codes(60, (5, 9), seed), (5, 9)
    priority = np.random.default_rng(seed).integers(0, 9, 60)
    everywhere, _ = resolve_collisions(codes, sizes, "counter", priority=priority)
    resolved, resolved_sizes = resolve_collisions(codes, sizes, "counter", priority=priority, only_where_needed=True)
    for items in groups_of(codes):
        if len(items) == 1:
            assert resolved[items[0], -1] == -1
        else:
            assert np.array_equal(resolved[items], everywhere[items])
    assert set((resolved >= 0).sum(1)) == {2, 3}  # the card's check: lengths in {L, L + 1}
    assert resolved_sizes == (5, 9, max(map(len, groups_of(codes)))) and num_distinct(resolved) == 60
    prefixes = {tuple(row[:2]) for row in resolved.tolist() if row[2] >= 0}
    assert not any(tuple(row[:2]) in prefixes for row in resolved.tolist() if row[2] < 0)  # prefix-free
    alone = np.stack(np.meshgrid(range(3), range(3)), -1).reshape(-1, 2)
    assert resolve_collisions(alone, (3, 3), "counter", only_where_needed=True)[1] == (3, 3)


# ------------------------------------------------------------------------------------------------------- random, extra


def test_random_tail_is_seeded_and_uniform() -> None:
    codes = random_codes(6000, (50, 60))
    first, sizes = resolve_collisions(codes, (50, 60), "random_tail", seed=1, size=16)
    assert sizes == (50, 60, 16)
    other, _ = resolve_collisions(codes, (50, 60), "random_tail", seed=2, size=16)
    assert (first[:, 2] != other[:, 2]).mean() > 0.8
    share = np.bincount(first[:, 2], minlength=16) / 6000
    assert abs(share - 1 / 16).max() < 0.015
    largest = max(map(len, groups_of(codes)))
    exact, _ = resolve_collisions(codes, (50, 60), "random_tail", size=largest)  # just enough buckets
    assert num_distinct(exact) == 6000
    with pytest.raises(IncompatibleComponentsError, match=f"{largest} items share one code.*at least {largest}"):
        resolve_collisions(codes, (50, 60), "random_tail", size=largest - 1)


@pytest.mark.parametrize("seed", range(4))
def test_redrawn_tails_fill_free_codes_only(seed: int) -> None:
    sizes = (3, 12)
    codes = np.stack([np.repeat(np.arange(3), 12), np.random.default_rng(seed).integers(0, 12, 36)], 1)
    resolved, resolved_sizes = resolve_collisions(codes, sizes, "random_tail", seed=seed, redraw=True)
    assert resolved_sizes == sizes and num_distinct(resolved) == 36  # every prefix exactly full
    for items in groups_of(codes):
        assert np.array_equal(resolved[items[0]], codes[items[0]])
    with pytest.raises(IncompatibleComponentsError, match=r"all 12 last codes under its prefix \[1\] are taken"):
        resolve_collisions([*codes.tolist(), [1, 0]], sizes, "random_tail", redraw=True)


def test_extra_id_is_the_row() -> None:
    resolved, sizes = resolve_collisions([[0], [0], [1]], (2,), "extra_id")
    assert resolved.tolist() == [[0, 0], [0, 1], [1, 2]] and sizes == (2, 3)


def test_require_unique_names_the_pair() -> None:
    codes = np.array([[0, 1], [1, 1], [1, 0], [1, 1]])
    with pytest.raises(IncompatibleComponentsError, match=r"item rows 1 and 3 share the code \[1, 1\] \(2 items"):
        resolve_collisions(codes, (2, 2), "require_unique")
    resolved, sizes = resolve_collisions(codes[:3], (2, 2), "require_unique")
    assert np.array_equal(resolved, codes[:3]) and sizes == (2, 2)


# ----------------------------------------------------------------------------------------------------- tails of a space


@pytest.mark.parametrize("seed", range(4))
def test_next_tail_is_next_nearest_while_prefixes_have_room(seed: int) -> None:
    sizes = (4, 60)
    codes = random_codes(120, (4, 20), seed)
    inputs = space(sizes, 120, seed)
    resolved, _ = resolve_collisions(codes, sizes, "next_tail", **inputs)
    assert np.array_equal(resolved, resolve_collisions(codes, sizes, "next_nearest", **inputs)[0])
    changed = (resolved != codes).any(1)
    for items in groups_of(codes):
        assert (~changed[items]).sum() == 1


def test_next_tail_when_a_prefix_is_full(caplog: pytest.LogCaptureFixture) -> None:
    books = [np.array([[0.0], [9.0]]), np.array([[0.0], [1.0]])]
    x, codes = np.array([[0.0], [0.1], [0.2], [9.0]]), np.array([[0, 0], [0, 0], [0, 0], [1, 0]])
    inputs = {"codebooks": books, "features": x}
    with pytest.raises(IncompatibleComponentsError, match=r"item row 2: all 2 last codes under its prefix \[0\]"):
        resolve_collisions(codes, (2, 2), "next_tail", **inputs)
    with caplog.at_level(logging.WARNING):
        resolved, _ = resolve_collisions(codes, (2, 2), "next_tail", when_full="keep", **inputs)
    assert resolved.tolist() == [[0, 0], [0, 1], [0, 0], [1, 0]] and "1 of 4 items still share" in caplog.text
    with pytest.raises(IncompatibleComponentsError, match="when_full must be"):
        resolve_collisions(codes, (2, 2), "next_tail", when_full="skip", **inputs)


# ------------------------------------------------------------------------------------------------------------ sinkhorn


def naive_sinkhorn(codes: np.ndarray, books: list[np.ndarray], x: np.ndarray, rounds: int) -> np.ndarray:
    """The rounds of the papers' code, without its shortcuts: every shared code anew in every round, best round kept."""
    current, best = codes.copy(), codes.copy()

    def sharing(table: np.ndarray) -> int:
        return sum(len(items) for items in groups_of(table) if len(items) > 1)

    for _ in range(rounds):
        for items in [items for items in groups_of(current) if len(items) > 1]:
            residual = x[items] - sum((books[i][codes[items, i]] for i in range(len(books) - 1)), np.zeros(1))
            current[items, -1] = sinkhorn_codes(torch.as_tensor(residual), torch.as_tensor(books[-1]), 0.003, 50)
        if sharing(current) < sharing(best):
            best = current.copy()
    return best


@pytest.mark.parametrize("seed", range(4))
def test_sinkhorn_is_the_published_loop(seed: int) -> None:
    sizes = (3, 16)
    codes, inputs = random_codes(40, (3, 6), seed), space(sizes, 40, seed)
    resolved, _ = resolve_collisions(codes, sizes, "sinkhorn", **inputs)
    assert np.array_equal(resolved, naive_sinkhorn(codes, inputs["codebooks"], inputs["features"], 20))
    before, after = identifier_health(codes, sizes), identifier_health(resolved, sizes)
    assert after.items_sharing < before.items_sharing


def test_sinkhorn_separates_a_group_but_not_equal_items(caplog: pytest.LogCaptureFixture) -> None:
    books = [np.zeros((1, 1)), np.array([[0.0], [1.0], [2.0]])]
    codes = np.zeros((3, 2), dtype=int)
    spread = {"codebooks": books, "features": np.array([[0.0], [0.4], [0.8]])}
    resolved, _ = resolve_collisions(codes, (1, 3), "sinkhorn", **spread)
    assert sorted(resolved[:, 1]) == [0, 1, 2] and resolved[0, 1] < resolved[1, 1] < resolved[2, 1]
    equal = {"codebooks": books, "features": np.zeros((3, 1))}
    with caplog.at_level(logging.WARNING):
        left, _ = resolve_collisions(codes, (1, 3), "sinkhorn", **equal)
    assert identifier_health(left, (1, 3)).items_sharing == 3 and "3 of 3 items still share" in caplog.text
    moved, _ = resolve_collisions(codes, (1, 3), "sinkhorn", fallback="next_nearest", **equal)
    assert num_distinct(moved) == 3


@pytest.mark.parametrize("fallback", ["keep", "next_nearest"])
def test_no_rounds_are_the_fallback_alone(fallback: str) -> None:
    codes, inputs = random_codes(50, (4, 20)), space((4, 20), 50)
    resolved, _ = resolve_collisions(codes, (4, 20), "sinkhorn", rounds=0, fallback=fallback, **inputs)
    assert np.array_equal(resolved, resolve_collisions(codes, (4, 20), fallback, **inputs)[0])


# ---------------------------------------------------------------------------------------------------------- pick_unique


def best_possible(candidates: list[list[int]], taken: set[int]) -> int:
    choices = itertools.product(*[[-1, *[c for c in row if c not in taken]] for row in candidates])
    counts = (Counter(c for c in choice if c >= 0) for choice in choices)
    return max((sum(count.values()) for count in counts if not count or max(count.values()) == 1), default=0)


@pytest.mark.parametrize("seed", range(40))
def test_pick_unique_serves_as_many_as_possible(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidates = [rng.permutation(6)[: rng.integers(0, 4)].tolist() for _ in range(6)]
    taken = set(rng.permutation(6)[: rng.integers(0, 2)].tolist())
    choice = pick_unique(candidates, taken)
    picked = [row[c] for row, c in zip(candidates, choice.tolist()) if c >= 0]
    assert len(set(picked)) == len(picked) and not set(picked) & taken
    assert len(picked) == best_possible(candidates, taken)


def test_pick_unique_takes_the_first_unused_where_it_can() -> None:
    rng = np.random.default_rng(0)
    candidates = [[f"text {c}" for c in rng.permutation(200)[:30]] for _ in range(60)]
    used: set[str] = set()
    for item, position in enumerate(pick_unique(candidates).tolist()):
        greedy = next(p for p, text in enumerate(candidates[item]) if text not in used)
        used.add(candidates[item][greedy])
        assert position == greedy


# -------------------------------------------------------------------------------------------------------------- options


def test_options_are_checked_by_name_and_type() -> None:
    assert collision_options("counter") == {"only_where_needed": bool}
    assert collision_options("keep") == {} and set(collision_options("random_tail")) == {"size", "redraw"}
    check_collision_options("sinkhorn", {"rounds": 5, "epsilon": 1})
    with pytest.raises(IncompatibleComponentsError, match=r"unknown option 'only_needed'.*'only_where_needed'"):
        check_collision_options("counter", {"only_needed": True})
    with pytest.raises(IncompatibleComponentsError, match=r"unknown option 'size'.*it has none"):
        resolve_collisions([[0]], (1,), "keep", size=3)
    with pytest.raises(IncompatibleComponentsError, match=r"'size'.*must be int, got True"):
        check_collision_options("random_tail", {"size": True})
    with pytest.raises(IncompatibleComponentsError, match=r"'next_tails'.*did you mean 'next_tail'"):
        check_collision_options("next_tails", {})
