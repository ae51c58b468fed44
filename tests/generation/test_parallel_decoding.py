"""Parallel and graph decoding against brute force: exact scan, item graph, propagation, filters."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from hf_genrec.errors import GenRecError, IncompatibleComponentsError, RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.decoding import parallel as room
from hf_genrec.generation.item_filter import ItemFilter
from hf_genrec.generation.search import search_items
from hf_genrec.generation.trie import ItemTrie


class DigitModel:
    """Random log-probabilities of all digits for B users, and random code vectors."""

    device = torch.device("cpu")

    def __init__(self, sizes, users: int = 4, seed: int = 0, width: int = 6):
        generator = torch.Generator().manual_seed(seed)
        levels, largest = len(sizes), max(sizes)
        absent = torch.arange(largest) >= torch.tensor(list(sizes))[:, None]
        logits = 2 * torch.randn(users, levels, largest, generator=generator)
        self.logp = logits.masked_fill(absent, -torch.inf).log_softmax(-1)
        self.vectors = torch.nn.functional.normalize(torch.randn(levels, largest, width, generator=generator), dim=-1)
        self.vectors = self.vectors.masked_fill(absent.unsqueeze(-1), 0.0)
        self.sizes = sizes

    def start_decoding(self, input_ids, attention_mask=None):
        return self.logp

    def score_digits(self, state):
        return state

    def digit_vectors(self):
        return self.vectors

    def score_codes(self, state, prefix_BKl, level):
        return state[:, None, level, : self.sizes[level]].expand(-1, prefix_BKl.shape[1], -1)


def brute_scores(model, codes) -> np.ndarray:
    logp = model.logp.double().numpy()
    levels = np.arange(codes.shape[1])
    return np.array([[logp[user, levels, row].mean() for row in codes] for user in range(len(logp))])


def search(model, codes, decoding="parallel", k=5, num_beams=5, allowed=None, state=None, **options):
    trie = ItemTrie.from_codes(codes, model.sizes)
    state = model.logp if state is None else state
    config = RecommendationConfig(k=k, num_beams=num_beams, decoding=decoding, decoding_options=options)
    item_filter = None if allowed is None else ItemFilter.from_mask(trie, allowed)
    return search_items(model, state, trie, config, item_filter, batch_size=len(state))


def graph(model, codes, k=5, num_beams=5, allowed=None, trie=None, state=None, **options):
    trie = ItemTrie.from_codes(codes, model.sizes) if trie is None else trie
    state = model.logp if state is None else state
    item_filter = None if allowed is None else ItemFilter.from_mask(trie, allowed)
    config = RecommendationConfig(k=k, num_beams=num_beams)
    return room.graph_search(model, state, trie, config, item_filter, batch_size=len(state), **options)


def check(items, scores, expected, codes, allowed, k) -> None:
    """The best allowed items, best first; equal scores by code, then by item."""
    for user in range(len(items)):
        legal = [i for i in range(len(codes)) if allowed is None or bool(allowed[user, i])]
        ranked = sorted(legal, key=lambda i: (-round(expected[user, i], 5), tuple(codes[i]), i))[:k]
        assert items[user, : len(ranked)].tolist() == ranked
        assert np.allclose(scores[user, : len(ranked)], expected[user, ranked], atol=1e-5)
        assert (items[user, len(ranked) :] == -1).all() and (scores[user, len(ranked) :] == -torch.inf).all()


# ----------------------------------------------------------------------------------------------------- full scan


@pytest.mark.parametrize("num_items", [1, 2, 4, 60])
@pytest.mark.parametrize("filtered", [False, True])
def test_parallel_is_brute_force(random_codes, num_items, filtered) -> None:
    sizes = (3, 4, 2, 3)  # few codes: items share codes, and digits have different numbers of codes
    codes = random_codes(num_items, sizes, seed=num_items)
    model = DigitModel(sizes)
    allowed = torch.rand(4, num_items, generator=torch.Generator().manual_seed(1)) < 0.4 if filtered else None
    items, scores = search(model, codes, k=7, num_beams=7, allowed=allowed)
    check(items, scores, brute_scores(model, codes), codes, allowed, 7)


def test_chunks_of_the_catalogue_change_nothing(random_codes, monkeypatch) -> None:
    sizes = (5, 5, 5)
    codes, model = random_codes(300, sizes), DigitModel((5, 5, 5), users=3)
    whole = search(model, codes, k=20)
    for elements in (3 * 7, 3 * 64):
        monkeypatch.setattr(room, "_CHUNK_ELEMENTS", elements)
        items, scores = search(model, codes, k=20)
        assert torch.equal(items, whole[0]) and torch.equal(scores, whole[1])


def test_a_wide_beam_agrees_up_to_the_number_of_digits_and_a_narrow_one_can_miss(random_codes) -> None:
    sizes = (4,) * 6
    codes, model = random_codes(200, sizes), DigitModel(sizes)
    items, scores = search(model, codes, k=10)
    wide, wide_scores = search(model, codes, "beam", k=10, num_beams=200)
    assert torch.equal(items, wide) and torch.allclose(6 * scores, wide_scores, atol=1e-4)
    narrow, narrow_scores = search(model, codes, "beam", k=1, num_beams=1)
    assert (narrow_scores[:, 0] <= wide_scores[:, 0] + 1e-5).all() and not torch.equal(narrow, wide[:, :1])


@pytest.mark.parametrize("decoding", ["parallel", "graph"])
def test_a_batch_is_each_user_alone(random_codes, decoding) -> None:
    sizes = (6,) * 5
    codes, model = random_codes(150, sizes), DigitModel(sizes, users=6)
    allowed = torch.rand(6, 150, generator=torch.Generator().manual_seed(3)) < torch.linspace(0.01, 1, 6)[:, None]
    options = {"num_neighbours": 6, "num_steps": 2} if decoding == "graph" else {}
    together = search(model, codes, decoding, allowed=allowed, **options)
    for user in range(6):
        rows = slice(user, user + 1)
        alone = search(model, codes, decoding, allowed=allowed[rows], state=model.logp[rows], **options)
        assert torch.equal(alone[0][0], together[0][user])
        assert torch.allclose(alone[1][0], together[1][user], atol=1e-5)


def test_a_large_catalogue_of_long_codes() -> None:
    rng = np.random.default_rng(0)
    codes, model = rng.integers(0, 256, (100_000, 8)), DigitModel((256,) * 8, users=3)
    items, scores = search(model, codes, k=50)
    logp = model.logp.double()
    expected = torch.stack([logp[:, level, codes[:, level]] for level in range(8)]).mean(0)
    best = expected.topk(50, dim=1)
    assert torch.allclose(scores.double(), best.values, atol=1e-5)
    assert torch.allclose(expected.gather(1, items), best.values, atol=1e-5)
    assert all(len(set(row)) == 50 for row in items.tolist())


def test_impossible_digits_are_ranked_last_and_stay_finite(random_codes) -> None:
    sizes = (2, 2)
    model = DigitModel(sizes, users=1)
    model.logp = torch.tensor([[[0.0, -torch.inf], [-1.0, -0.5]]])
    items, scores = search(model, np.array([[1, 0], [0, 0], [0, 1]]), k=3)
    assert items.tolist() == [[2, 1, 0]] and scores[0, 2] < -1e20


# ---------------------------------------------------------------------------------------------------------- graph


def brute_neighbours(model, codes, number) -> list[list[int]]:
    """Of the distinct codes in lexicographic order, from all pairs at once."""
    vectors = model.vectors.double().numpy()
    levels = np.arange(codes.shape[1])
    own = np.stack([vectors[levels, row] for row in codes])
    weight = ((1 + np.einsum("ild,jld->ijl", own, own)) / 2).mean(-1)
    return [sorted(range(len(codes)), key=lambda j: (-round(weight[i, j], 6), j))[:number] for i in range(len(codes))]


def test_neighbours_are_brute_force_whatever_the_chunk(random_codes, monkeypatch) -> None:
    sizes = (7, 3, 5, 4)
    codes, model = np.unique(random_codes(150, sizes), axis=0), DigitModel(sizes)
    expected = brute_neighbours(model, codes, 9)
    for queries in (64, 10):
        monkeypatch.setattr(room, "_QUERIES", queries)
        found = room.neighbour_graph(model.vectors, ItemTrie.from_codes(codes, sizes), 9)
        assert found.dtype == torch.int32
        assert [row[0] for row in found.tolist()] == list(range(len(codes)))
        assert [set(row) for row in found.tolist()] == [set(row) for row in expected]
    assert room.neighbour_graph(model.vectors, ItemTrie.from_codes(codes, sizes), 10_000).shape == (len(codes),) * 2


def test_never_all_pairs_at_once(random_codes, monkeypatch) -> None:
    """The scan that looks for neighbours is given at most 64 leaves, and keeps only the neighbours."""
    sizes = (30,) * 3
    codes, model, seen = random_codes(1000, sizes, unique=True), DigitModel(sizes), []
    scan = room.scan_leaves

    def recorded(logp_BLC, codes_NL, width, *rest):
        result = scan(logp_BLC, codes_NL, width, *rest)
        seen.append((len(logp_BLC), tuple(result[0].shape)))
        return result

    monkeypatch.setattr(room, "scan_leaves", recorded)
    room.neighbour_graph(model.vectors, ItemTrie.from_codes(codes, sizes), 5)
    assert [rows for rows, _ in seen] == [64] * 15 + [40] and all(shape[1] == 5 for _, shape in seen)


def test_a_leaf_is_its_own_neighbour_even_among_equal_vectors() -> None:
    model = DigitModel((8, 8))
    model.vectors[:] = model.vectors[:1, :1]  # every code alike: all weights are 1
    codes = np.stack(np.unravel_index(np.arange(64), (8, 8)), axis=1)
    found = room.neighbour_graph(model.vectors, ItemTrie.from_codes(codes, (8, 8)), 3)
    assert found[:, 0].tolist() == list(range(64))
    assert all(len(set(row)) == 3 for row in found.tolist())


def test_graph_is_made_once_per_weights_and_catalogue(random_codes, monkeypatch) -> None:
    sizes = (6,) * 4
    model, other = DigitModel(sizes), DigitModel(sizes, seed=5)
    trie = ItemTrie.from_codes(random_codes(90, sizes), sizes)
    first = room.neighbour_graph(model.vectors, trie, 4)
    assert room.neighbour_graph(model.vectors.clone(), trie, 4) is first  # equal numbers
    assert room.neighbour_graph(model.vectors, trie, 5) is not first
    changed = model.vectors.clone()
    changed.data[2, 1] = -changed[2, 1]  # not even autograd's version counter sees this
    again = room.neighbour_graph(changed, trie, 4)
    assert not torch.equal(again, first)
    for vectors in (other.vectors, model.vectors, changed):  # pushed out of the cache and made again
        found = room.neighbour_graph(vectors, trie, 4)
        fresh = room.neighbour_graph(vectors, ItemTrie.from_codes(random_codes(90, sizes), sizes), 4)
        assert torch.equal(found, fresh)
    assert len(room._graphs[trie]) <= room._GRAPHS_KEPT
    alive = weakref.ref(trie)
    del trie
    gc.collect()
    assert alive() is None  # the graph does not keep its catalogue


def brute_walk(model, codes, user, width, neighbours, steps, start) -> tuple[list[int], float]:
    """The walk in Python sets over distinct codes."""
    scores = brute_scores(model, codes)[user]

    def rank(leaves):
        return sorted(leaves, key=lambda i: (-scores[i], i))[:width]

    beam, visited = list(start), set(start)
    for _ in range(steps):
        candidates = {j for i in beam for j in neighbours[i]}
        visited |= candidates
        beam = rank(candidates)
    return rank(beam), len(visited) / len(codes)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_graph_search_is_the_walk_of_the_paper(random_codes, steps) -> None:
    sizes = (8,) * 5
    codes, model = np.unique(random_codes(300, sizes), axis=0), DigitModel(sizes)
    found = graph(model, codes, num_beams=6, num_neighbours=7, num_steps=steps, seed=3)
    start = torch.randperm(len(codes), generator=torch.Generator().manual_seed(3))[:6].tolist()
    neighbours = brute_neighbours(model, codes, 7)
    for user in range(4):
        items, share = brute_walk(model, codes, user, 6, neighbours, steps, start)
        assert found.items_BX[user].tolist() == items
        assert found.visited_B[user].item() == pytest.approx(share)
    assert (found.visited_B < 1).all()


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("num_items", [1, 2, 4, 80])
def test_graph_with_all_neighbours_is_the_full_scan(random_codes, num_items, filtered) -> None:
    sizes = (4, 3, 4, 2)
    codes, model = random_codes(num_items, sizes, seed=2), DigitModel(sizes)
    allowed = torch.rand(4, num_items, generator=torch.Generator().manual_seed(4)) < 0.5 if filtered else None
    full = search(model, codes, k=5, allowed=allowed)
    found = search(model, codes, "graph", k=5, allowed=allowed, num_neighbours=num_items, num_steps=1)
    assert torch.equal(found[0], full[0]) and torch.allclose(found[1], full[1], atol=1e-5)
    assert (graph(model, codes, allowed=allowed, num_neighbours=num_items, num_steps=1).visited_B == 1).all()


@pytest.mark.parametrize("filtered", [False, True])
def test_recall_never_falls_and_rises_with_steps(random_codes, filtered) -> None:
    """A model whose digit log-probabilities follow its code vectors, so that neighbours have similar scores."""
    sizes, num_items = (16,) * 6, 3000
    codes, model = random_codes(num_items, sizes), DigitModel(sizes, users=16)
    query = torch.randn(16, 6, 6, generator=torch.Generator().manual_seed(8))
    model.logp = (3 * torch.einsum("bld,lcd->blc", query, model.vectors)).log_softmax(-1)
    allowed = None
    if filtered:
        allowed = torch.rand(16, num_items, generator=torch.Generator().manual_seed(9)) < 0.7
    exact = search(model, codes, k=10, num_beams=30, allowed=allowed)[0].tolist()
    trie = ItemTrie.from_codes(codes, sizes)
    recalls, shares = [], []
    for steps in (0, 1, 2, 3, 5):
        found = graph(model, codes, k=10, num_beams=30, num_neighbours=15, num_steps=steps, trie=trie, allowed=allowed)
        rows = found.items_BX[:, :10].tolist()
        recalls.append([len(set(row) & set(best)) / 10 for row, best in zip(rows, exact, strict=True)])
        shares.append(found.visited_B)
        assert all(len(set(row)) == 10 for row in rows)
    assert (np.diff(recalls, axis=0) >= 0).all() and (np.diff(torch.stack(shares), axis=0) >= 0).all()
    means = np.mean(recalls, axis=1)
    assert means[0] < 0.1 and means[-1] > 0.5 and shares[-1].max() < 0.5, (means, shares[-1])


def test_same_seed_same_start_other_seed_another(random_codes) -> None:
    sizes = (8,) * 5
    codes, model = random_codes(400, sizes), DigitModel(sizes)
    options = {"num_neighbours": 3, "num_steps": 1}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (search(model, codes, "graph", seed=seed, **options)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("share", [0.002, 0.05, 0.9])
def test_a_filter_never_leaves_a_user_short(random_codes, share) -> None:
    sizes = (8,) * 5
    codes, model = random_codes(1000, sizes), DigitModel(sizes, users=8)
    codes[500:] = codes[:500]  # every code names two items
    allowed = torch.rand(8, 1000, generator=torch.Generator().manual_seed(6)) < share
    allowed[:, 17] = True
    items, scores = search(model, codes, "graph", k=5, allowed=allowed, num_neighbours=4, num_steps=1)
    for user, row in enumerate(items.tolist()):
        real = [item for item in row if item >= 0]
        assert len(real) == min(5, int(allowed[user].sum())) == len(set(real))
        assert all(bool(allowed[user, item]) for item in real)
        assert np.allclose(scores[user, : len(real)], brute_scores(model, codes)[user, real], atol=1e-5)
    found = graph(model, codes, k=5, allowed=allowed, num_neighbours=4, num_steps=1)
    few = allowed.sum(1) < 5  # more than visited is needed: these rows are exact and say so
    assert (found.visited_B[few] == 1).all()
    if share == 0.9:
        assert (found.visited_B < 0.2).all()


# ---------------------------------------------------------------------------------------------------------- errors


def test_bad_requests_are_typed_errors(random_codes) -> None:
    sizes = (4, 4)
    codes, model = random_codes(10, sizes), DigitModel(sizes)
    for option, value in (("num_neighbours", 0), ("num_steps", -1), ("num_steps", 1.5), ("seed", True)):
        with pytest.raises(RequestError, match=option):
            search(model, codes, "graph", **{option: value})
    with pytest.raises(RequestError, match="no option 'beams'"):
        search(model, codes, "graph", beams=3)
    with pytest.raises(IncompatibleComponentsError, match="2 digits of 4 codes, the catalogue has 3"):
        trie = ItemTrie.from_codes(random_codes(10, (4, 4, 4)), (4, 4, 4))
        room.parallel(model, model.logp, trie, RecommendationConfig(), batch_size=4)
    model.logp = model.logp.clone()
    model.logp[2, 1, 0] = torch.nan
    with pytest.raises(GenRecError, match="row 2"):
        search(model, codes)


def test_models_without_digits_are_refused(table_model, random_codes) -> None:
    model, codes = table_model((4, 4)), random_codes(10, (4, 4))
    config = RecommendationConfig(decoding="parallel")
    state = model.start_decoding(torch.tensor([[1]]), None)
    with pytest.raises(IncompatibleComponentsError, match="score_digits"):
        search_items(model, state, ItemTrie.from_codes(codes, (4, 4)), config, batch_size=1)


def test_codes_of_different_lengths_are_refused() -> None:
    model = DigitModel((4, 4))
    try:
        trie = ItemTrie.from_codes([[0, 1], [2, -1]], (4, 4))
    except IncompatibleComponentsError:
        pytest.skip("this trie takes full codes only")
    with pytest.raises(IncompatibleComponentsError, match="different lengths"):
        room.parallel(model, model.logp, trie, RecommendationConfig(), batch_size=4)
