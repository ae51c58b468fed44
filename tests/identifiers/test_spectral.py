"""Collaborative indexing: planted communities, components, isolated items, known eigenvectors, new items, files."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse.linalg import ArpackNoConvergence

from hf_genrec.data.cooccurrence import cooccurrence
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, TrainingError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.quantizers import graph_spectrum
from hf_genrec.identifiers.quantizers.graph_spectrum import leading_eigenvectors, qr_affinity, row_unit
from hf_genrec.identifiers.quantizers.spectral import SpectralIndexer, _apportion
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

OPTIONS: dict[str, dict] = {
    "plain": {},
    "local": {"code_style": "local"},
    "smooth": {"smoothing": 1.0, "max_load": 2.0},
    "kmeans": {"assign": "kmeans", "max_load": 1.5, "code_style": "prefix"},
    "gap": {"eigengap": True},
}


def planted(
    communities: int,
    parts: int,
    size: int,
    seed: int = 0,
    *,
    inside: float = 0.95,
    near: float = 0.08,
    far: float = 0.005,
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """A graph of communities of parts, shuffled, with the community and the part of every item."""
    generator = np.random.default_rng(seed)
    num = communities * parts * size
    part = generator.permutation(np.repeat(np.arange(communities * parts), size))
    community = part // parts
    chance = np.where(part[:, None] == part, inside, np.where(community[:, None] == community, near, far))
    upper = np.triu(generator.random((num, num)) < chance, 1)
    weight = upper * generator.integers(1, 4, (num, num)).astype(float)
    return sp.csr_matrix(weight + weight.T), community, part


def same_partition(a: Iterable, b: Iterable) -> bool:
    pairs = set(zip(list(map(str, a)), list(map(str, b))))
    return len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})


def rows(codes: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(code for code in row if code >= 0) for row in codes.tolist()]


def check_codes(indexer: SpectralIndexer, codes: torch.Tensor) -> None:
    named = rows(codes)
    assert len(set(named)) == len(named)
    assert not {row[:length] for row in named for length in range(len(row))} & set(named)
    assert (codes < torch.tensor(indexer.codebook_sizes)).all()
    leaf, number = indexer.tree.locate(codes)
    assert np.bincount(leaf).max() <= indexer.max_cluster
    assert (number < indexer.max_cluster).all()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_planted_communities_share_their_first_codes(name: str, seed: int) -> None:
    graph, community, part = planted(4, 4, 12, seed)
    indexer = SpectralIndexer(4, max_cluster=12, **OPTIONS[name]).fit(graph)
    codes = indexer.codes_NL.numpy()
    check_codes(indexer, indexer.codes_NL)
    assert same_partition(codes[:, 0], community)
    assert same_partition(codes[:, :2], part)


def test_eigengap_finds_the_number_of_communities() -> None:
    graph, community, _ = planted(3, 1, 40)
    wide = SpectralIndexer(10, max_cluster=60).fit(graph)
    gap = SpectralIndexer(10, max_cluster=60, eigengap=True).fit(graph)
    assert len(set(wide.codes_NL[:, 0].tolist())) == 10
    assert same_partition(gap.codes_NL[:, 0], community)


@pytest.mark.parametrize("name", OPTIONS)
def test_large_graph_takes_the_sparse_solver_and_the_order_of_rows_does_not_matter(name: str) -> None:
    graph, community, part = planted(4, 4, 30, 5)
    assert graph.shape[0] > graph_spectrum._DENSE_ITEMS
    indexer = SpectralIndexer(4, max_cluster=30, **OPTIONS[name]).fit(graph)
    assert same_partition(indexer.codes_NL[:, 0], community)
    order = np.random.default_rng(1).permutation(len(part))
    again = SpectralIndexer(4, max_cluster=30, **OPTIONS[name]).fit(graph[order][:, order])
    assert same_partition(indexer.codes_NL[order, 0], again.codes_NL[:, 0])
    assert same_partition(indexer.codes_NL[order, :2].tolist(), again.codes_NL[:, :2].tolist())
    assert same_partition(again.codes_NL[:, :2].tolist(), part[order])


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_graph_gives_the_same_codes(name: str) -> None:
    graph = sp.random_array((700, 700), density=0.01, rng=np.random.default_rng(2)).tocsr()
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    codes = [SpectralIndexer(6, max_cluster=20, **OPTIONS[name]).fit(graph).codes_NL for _ in range(2)]
    assert torch.equal(*codes)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()
    # weights of one direction only, both directions, and counts on the diagonal tell the same
    both = SpectralIndexer(6, max_cluster=20, **OPTIONS[name]).fit((graph + graph.T) * 0.5)
    assert torch.equal(both.codes_NL, codes[0])
    busy = SpectralIndexer(6, max_cluster=20, **OPTIONS[name]).fit(graph + 9 * sp.eye_array(700))
    assert torch.equal(busy.codes_NL, codes[0])


# -------------------------------------------------------------------------------------------------- components, sizes


def test_items_that_never_meet_have_other_first_codes() -> None:
    blocks = [np.ones((size, size)) for size in (30, 9, 5, 2)]
    graph = sp.block_diag([*blocks, sp.csr_matrix((6, 6))]).tocsr()
    component = np.repeat(np.arange(5), [30, 9, 5, 2, 6])
    indexer = SpectralIndexer(5, max_cluster=10).fit(graph)
    check_codes(indexer, indexer.codes_NL)
    assert same_partition(indexer.codes_NL[:, 0], component)
    # with clusters to spare the largest component gets them; no cluster joins two components
    codes = SpectralIndexer(9, max_cluster=10).fit(graph).codes_NL[:, 0].numpy()
    assert len({(c, k) for c, k in zip(codes, component)}) == len(set(codes)) == 9
    assert len(set(codes[component == 0])) > len(set(codes[component == 1])) >= 1


def test_always_together_means_a_common_first_code() -> None:
    """From histories: pairs of items that only ever occur together, in 12 separate markets."""
    generator = np.random.default_rng(0)
    histories = []
    for market in range(12):
        for _ in range(30):
            pairs = generator.permutation(8)[:4] * 2 + market * 16
            histories.append(np.stack([pairs, pairs + 1], 1).ravel().tolist())
    graph = cooccurrence(Sequences.from_rows(histories), 192, window=8)
    codes = SpectralIndexer(12, max_cluster=5).fit(graph).codes_NL
    assert (codes[::2, 0] == codes[1::2, 0]).all()
    assert same_partition(codes[:, 0], np.arange(192) // 16)


def test_many_small_components_are_packed() -> None:
    giant, _, _ = planted(1, 1, 100, inside=0.3)
    graph = sp.block_diag([giant, *[np.ones((2, 2))] * 20, sp.csr_matrix((60, 60))]).tocsr()
    indexer = SpectralIndexer(8, max_cluster=30).fit(graph)
    check_codes(indexer, indexer.codes_NL)
    first = indexer.codes_NL[:, 0].numpy()
    assert not set(first[:100]) & set(first[100:])
    pairs = first[100:140]
    assert (pairs[::2] == pairs[1::2]).all()
    # 200 items in 8 clusters: 4 for the giant, 3 for the items without links, 1 for all the pairs
    assert len(set(first[:100])) == 4
    assert len(set(first[140:])) == 3 and np.bincount(first[140:]).max() == 20
    assert len(set(pairs)) == 1


def test_apportion_against_its_rules() -> None:
    generator = np.random.default_rng(3)
    for _ in range(200):
        part = np.sort(generator.zipf(1.6, 60) % generator.integers(1, 40))
        part = np.unique(part, return_inverse=True)[1]
        width = int(generator.integers(2, 12))
        group, share = _apportion(part, width)
        size = np.bincount(part)
        assert share.sum() <= width and share.min() >= 1
        assert set(group) == set(range(len(share)))
        assert all(len(set(group[part == value])) == 1 for value in range(len(size)))  # no part is torn
        if len(size) <= width:
            assert len(share) == len(size) and share.sum() == width
        else:
            assert len(share) >= 2
            assert all((size[part[group == g]] <= len(part) / width).all() for g in range(len(share))
                       if len(set(part[group == g])) > 1)  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["empty", "complete", "star", "path", "pairs", "twins"])
def test_graphs_without_communities(name: str, kind: str) -> None:
    num = 120
    graph = sp.lil_matrix((num, num))
    if kind == "complete":
        graph[:] = 1.0
    elif kind == "star":
        graph[0, 1:] = 1.0
    elif kind == "path":
        graph.setdiag(1.0, 1)
    elif kind == "pairs":
        graph[np.arange(0, num, 2), np.arange(1, num, 2)] = 1.0
    elif kind == "twins":  # two hubs, everybody else linked to both alike
        graph[:2, 2:] = 1.0
    indexer = SpectralIndexer(5, max_cluster=8, **OPTIONS[name]).fit(graph.tocsr())
    check_codes(indexer, indexer.codes_NL)
    if kind in ("empty", "path") or (kind == "pairs" and name != "gap"):
        assert indexer.num_levels <= 4  # 5 * 5 * 8 items fit into three levels


@pytest.mark.parametrize("num", [1, 2, 3, 4])
@pytest.mark.parametrize("linked", [True, False])
def test_few_items(num: int, linked: bool) -> None:
    for max_cluster in (1, 2, 10):
        indexer = SpectralIndexer(6, max_cluster=max_cluster).fit(np.ones((num, num)) * linked)
        check_codes(indexer, indexer.codes_NL)
        if num <= max_cluster:
            assert indexer.codes_NL.tolist() == [[row] for row in range(num)]
        elif max_cluster == 1:
            assert indexer.codes_NL.tolist() == [[row, 0] for row in range(num)]


def test_max_load_bounds_every_cut_and_a_crowded_code_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    core, _, _ = planted(1, 1, 150, inside=0.2)
    graph = sp.lil_matrix((190, 190))
    graph[:150, :150] = core
    for tail in range(8):  # dangling chains: the cheapest cuts of all
        chain = [tail, *range(150 + 5 * tail, 155 + 5 * tail)]
        for a, b in itertools.pairwise(chain):
            graph[a, b] = 0.05
    with caplog.at_level(logging.WARNING):
        plain = np.bincount(SpectralIndexer(8, max_cluster=20).fit(graph.tocsr()).codes_NL[:, 0])
    assert plain.max() > 140 and "smoothing=1.0" in caplog.text
    for assign in ("qr", "kmeans"):
        loaded = SpectralIndexer(8, max_cluster=20, max_load=1.5, assign=assign).fit(graph.tocsr())
        assert np.bincount(loaded.codes_NL[:, 0]).max() <= np.ceil(1.5 * 190 / 8)
        check_codes(loaded, loaded.codes_NL)
    smooth = np.bincount(SpectralIndexer(8, max_cluster=20, smoothing=1.0).fit(graph.tocsr()).codes_NL[:, 0])
    assert smooth.max() < 80


# ------------------------------------------------------------------------------------------------------- eigenvectors


def test_eigenvectors_agree_with_a_dense_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _, _ = planted(5, 1, 30, 2)
    monkeypatch.setattr(graph_spectrum, "_DENSE_ITEMS", 0)
    values, vectors = leading_eigenvectors(graph, 5, smoothing=0.5)
    degree = np.asarray(graph.sum(1)).ravel()
    degree = degree + 0.5 * degree.mean()
    dense = graph.toarray() / np.sqrt(degree[:, None] * degree)
    want, basis = np.linalg.eigh(dense)
    np.testing.assert_allclose(values, want[::-1][:5], atol=1e-8)
    np.testing.assert_allclose(np.abs((vectors * basis[:, ::-1][:, :5]).sum(0)), 1.0, atol=1e-5)
    assert (np.diff(values) <= 0).all()
    assert (vectors[np.abs(vectors).argmax(0), range(5)] > 0).all()
    assert leading_eigenvectors(graph, 3)[0][0] == pytest.approx(1.0)

    def give_up(*_, **__):
        raise ArpackNoConvergence("no", np.empty(0), np.empty((0, 0)))

    monkeypatch.setattr(graph_spectrum, "eigsh", give_up)
    slow_values, slow = leading_eigenvectors(graph, 5, smoothing=0.5)
    np.testing.assert_allclose(slow_values, values, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(slow.T @ vectors, 2), 1.0, atol=1e-5)


def test_qr_clusters_do_not_depend_on_the_basis() -> None:
    label = np.random.default_rng(0).integers(0, 4, 50)
    size = np.random.default_rng(1).uniform(0.5, 2, 50)  # indicator vectors with unequal rows, as of a graph's degrees
    vectors = np.linalg.qr(np.eye(4)[label] * size[:, None])[0]
    for seed in range(5):
        turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
        affinity = qr_affinity(vectors @ turn)
        assert same_partition(affinity.argmax(1), label)
        np.testing.assert_allclose(np.sort(affinity, 1)[:, -1], 1.0, atol=1e-9)
    np.testing.assert_allclose(row_unit(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])


# ---------------------------------------------------------------------------------------------- new items, files, errors


def test_new_items_join_their_community() -> None:
    graph, _, part = planted(4, 4, 12)
    for style in ("local", "node", "prefix"):
        indexer = SpectralIndexer(4, max_cluster=14, smoothing=0.5, code_style=style).fit(graph)
        links = np.stack([(part == value) * 1.0 for value in range(16)])
        new = indexer.encode(links)
        check_codes(indexer, torch.cat([indexer.codes_NL, new]))
        leaf, _ = indexer.tree.locate(new)
        old, _ = indexer.tree.locate(indexer.codes_NL)
        for value in range(16):
            assert leaf[value] == np.bincount(old[part == value]).argmax()
        assert torch.equal(new, indexer.encode(sp.csr_matrix(links)))
        # without links: into the first cluster of all, and from there to wherever room is
        room = int((indexer.tree.num_children_V == 0).sum()) * 14 - 192
        filled = indexer.encode(sp.csr_matrix((room, 192)))
        check_codes(indexer, torch.cat([indexer.codes_NL, filled]))
        with pytest.raises(IncompatibleComponentsError, match="0 free numbers"):
            indexer.encode(links[:1], taken_NL=torch.cat([indexer.codes_NL, filled]))


def test_trie_and_tokenizer_take_the_codes() -> None:
    graph = sp.random_array((300, 300), density=0.01, rng=np.random.default_rng(0)).tocsr()
    indexer = SpectralIndexer(5, max_cluster=12).fit(graph)
    assert (indexer.codes_NL < 0).any()
    assert ItemTrie.from_codes(indexer.codes_NL, indexer.codebook_sizes).max_items_per_leaf == 1
    names = [f"item{row}" for row in range(300)]
    tokenizer = ItemTokenizer.from_codes(names, indexer.codes_NL, indexer.codebook_sizes)
    np.testing.assert_array_equal(tokenizer.codes, indexer.codes_NL.numpy())
    # the paper's style: a cluster code follows one parent only
    parents: dict[tuple[int, int], set] = {}
    for row in rows(indexer.codes_NL):
        for level, code in enumerate(row[:-1]):
            parents.setdefault((level, code), set()).add(row[:level])
    assert all(len(above) == 1 for above in parents.values())


@pytest.mark.parametrize("name", OPTIONS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    graph, _, part = planted(4, 2, 12)
    indexer = SpectralIndexer(4, max_cluster=14, **OPTIONS[name]).fit(graph)
    indexer.save(tmp_path / "a.safetensors")
    again = SpectralIndexer.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(again.codes_NL, indexer.codes_NL) and again.codebook_sizes == indexer.codebook_sizes
    links = np.eye(len(part))[:5]
    assert torch.equal(again.encode(links), indexer.encode(links))


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    SpectralIndexer(4, max_cluster=14).fit(planted(4, 2, 12)[0]).save(path)
    tensors = load_file(str(path))
    header = {"hf_genrec.spectral_indexer.1": '{"num_clusters": 4, "max_cluster": 14}'}
    for change in ({"num_children": tensors["num_children"][:-1]}, {"codes": tensors["codes"] + 50}):
        save_file(tensors | change, str(path), metadata=header)
        with pytest.raises(ArtifactError, match="again"):
            SpectralIndexer.load(path)
    save_file(tensors, str(path), metadata={"hf_genrec.tree_indexer.1": "{}"})
    with pytest.raises(ArtifactError, match="not a tree file"):
        SpectralIndexer.load(path)


def test_errors() -> None:
    for options in (
        {"num_clusters": 1}, {"max_cluster": 0}, {"assign": "discretise"}, {"code_style": "x"}, {"max_load": 0.9},
        {"smoothing": -1.0},
    ):  # fmt: skip
        with pytest.raises(IncompatibleComponentsError):
            SpectralIndexer(**options)
    graph = np.ones((5, 5))
    for row, value in ((3, -1.0), (2, np.nan), (4, np.inf)):
        bad = graph.copy()
        bad[row, 1] = value
        with pytest.raises(TrainingError, match=f"row {row}"):
            SpectralIndexer().fit(bad)
    for shape in ((3, 4), (0, 0)):
        with pytest.raises(TrainingError, match="square"):
            SpectralIndexer().fit(sp.csr_matrix(shape))
    with pytest.raises(TrainingError, match="not fitted"):
        SpectralIndexer().encode(graph)
    with pytest.raises(IncompatibleComponentsError, match="5 fitted items"):
        SpectralIndexer().fit(graph).encode(np.ones((1, 4)))
