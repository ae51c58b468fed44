"""Tree identifiers: unique leaves, size limits, planted hierarchies, new items, brute-force oracles, files."""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, TrainingError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.features import PrincipalComponents
from hf_genrec.identifiers.quantizers.code_tree import CodeTree, rank_within
from hf_genrec.identifiers.quantizers.kmeans import kmeans
from hf_genrec.identifiers.quantizers.tree import (
    TreeIndexer,
    _canonical_order,
    optimal_assignment,
    quota_assignment,
)
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

OPTIONS: dict[str, dict] = {
    "dsi": {"branching": 4, "max_leaf": 10},
    "nci": {"branching": 5},
    "uneven": {"branching": (6, 3), "max_leaf": 8, "max_load": 1.5},
    "colarec": {"branching": 8, "depth": 3},
    "seater": {"branching": 4, "balanced": True},
    "eager": {"branching": 20, "depth": 2, "balanced": True, "code_style": "prefix"},
    "deep": {"branching": 2, "depth": 9, "balanced": True, "code_style": "node"},
    "projected": {"branching": 4, "max_leaf": 6, "pca_dim": 3, "whiten": True, "code_style": "node"},
}


def noise(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def skewed(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return noise(num, dim, seed) * torch.rand(num, 1, generator=torch.Generator().manual_seed(seed + 1)).pow(-0.25)


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    pairs = set(zip(a.tolist(), b.tolist()))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def rows(codes: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(code for code in row if code >= 0) for row in codes.tolist()]


def check_codes(indexer: TreeIndexer, codes: torch.Tensor) -> None:
    """What holds for the codes of every tree: unique, inside the codebooks, no code the beginning of another."""
    assert codes.dtype == torch.int64
    assert codes.shape[1] == indexer.num_levels
    assert (codes < torch.tensor(indexer.codebook_sizes)).all()
    named = rows(codes)
    assert len(set(named)) == len(named)
    beginnings = {row[:length] for row in named for length in range(len(row))}
    assert not beginnings & set(named)


def cluster_sizes(codes: torch.Tensor) -> dict[tuple[int, ...], int]:
    """Items below every cluster: every beginning of a code but the whole."""
    sizes: dict[tuple[int, ...], int] = {}
    for row in rows(codes):
        for length in range(len(row)):
            sizes[row[:length]] = sizes.get(row[:length], 0) + 1
    return sizes


@pytest.mark.parametrize("name", OPTIONS)
def test_leaves_are_unique_and_sizes_within_limits(name: str) -> None:
    x = skewed(230, 12)
    indexer = TreeIndexer(**OPTIONS[name]).fit(x)
    codes, tree = indexer.codes_NL, indexer.tree
    check_codes(indexer, codes)
    leaf, number = tree.locate(codes)
    assert np.bincount(leaf).max() <= indexer.max_leaf
    assert all(sorted(number[leaf == node]) == list(range((leaf == node).sum())) for node in set(leaf.tolist()))
    sizes = cluster_sizes(codes)
    children: dict[tuple[int, ...], list[int]] = {}
    for prefix, size in sizes.items():
        if prefix:
            children.setdefault(prefix[:-1], []).append(size)
    for prefix, parts in children.items():
        width = indexer.branching[min(len(prefix), len(indexer.branching) - 1)]
        assert len(parts) <= width
        if indexer.balanced:
            assert max(parts) - min(parts) <= 1
        if indexer.max_load is not None:
            assert max(parts) <= np.ceil(indexer.max_load * sizes[prefix] / min(width, sizes[prefix]))
    if indexer.depth is None and not indexer.balanced:
        assert all(sizes[prefix] > indexer.max_leaf for prefix in children)  # nothing is split without need
    else:
        assert {len(row) for row in rows(codes)} == {indexer.num_levels}
    assert indexer.depth in (None, indexer.num_levels)


@pytest.mark.parametrize("num", [255, 256, 257, 1000, 4096])
def test_balanced_tree_has_one_length_and_equal_clusters(num: int) -> None:
    indexer = TreeIndexer(8, balanced=True, iterations=4).fit(skewed(num, 6))
    lengths = {len(row) for row in rows(indexer.codes_NL)}
    assert lengths == {int(np.ceil(np.log(num) / np.log(8) - 1e-9))}
    by_depth: dict[int, list[int]] = {}
    for prefix, size in cluster_sizes(indexer.codes_NL).items():
        by_depth.setdefault(len(prefix), []).append(size)
    for depth, sizes in by_depth.items():
        assert len(sizes) == 8**depth
        assert max(sizes) - min(sizes) <= 1
    check_codes(indexer, indexer.codes_NL)


def test_trie_and_tokenizer_take_the_codes() -> None:
    indexer = TreeIndexer(4, max_leaf=9).fit(skewed(150, 5))
    assert (indexer.codes_NL < 0).any()  # codes of several lengths
    trie = ItemTrie.from_codes(indexer.codes_NL, indexer.codebook_sizes)
    assert trie.max_items_per_leaf == 1
    ended = torch.where(indexer.codes_NL < 0, torch.tensor(indexer.codebook_sizes), indexer.codes_NL)
    assert [trie.items_of_leaf(leaf).tolist() for leaf in trie.lookup(ended).tolist()] == [[row] for row in range(150)]
    names = [f"item{row}" for row in range(150)]
    tokenizer = ItemTokenizer.from_codes(names, indexer.codes_NL, indexer.codebook_sizes)
    np.testing.assert_array_equal(tokenizer.codes, indexer.codes_NL.numpy())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"max_load": 1.0}])
def test_planted_hierarchy_is_found(options: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(4).repeat_interleave(40)[torch.randperm(160, generator=generator)]
    part = torch.empty(160, dtype=torch.int64)
    for value in range(4):
        part[group == value] = torch.arange(4).repeat_interleave(10)
    far, near = torch.eye(4, 10) * 100, torch.eye(4, 10).flip(1) * 10
    x = far[group] + near[part] + 0.1 * torch.randn(160, 10, generator=generator)
    indexer = TreeIndexer(4, max_leaf=10, seed=seed, **options).fit(x)
    assert indexer.codebook_sizes == (4, 4, 10)
    assert same_partition(indexer.codes_NL[:, 0], group)
    assert same_partition(indexer.codes_NL[:, 0] * 4 + indexer.codes_NL[:, 1], group * 4 + part)
    # number 0 is the item nearest to the centre of its leaf cluster
    first = (group == 2) & (part == 1)
    distance = (x[first] - x[first].mean(0)).pow(2).sum(1)
    assert indexer.codes_NL[first, 2].tolist() == distance.argsort().argsort().tolist()


@pytest.mark.parametrize("name", OPTIONS)
def test_permuted_rows_get_permuted_codes(name: str) -> None:
    x = skewed(230, 12, 3)
    order = torch.randperm(230, generator=torch.Generator().manual_seed(1))
    codes = TreeIndexer(**OPTIONS[name]).fit(x).codes_NL
    torch.testing.assert_close(TreeIndexer(**OPTIONS[name]).fit(x[order]).codes_NL, codes[order])


def test_one_split_is_kmeans_and_global_random_state_stays() -> None:
    x = noise(300, 6)
    state = torch.get_rng_state()
    indexer = TreeIndexer(7, depth=2, max_leaf=300, seed=5).fit(x)
    assert torch.equal(state, torch.get_rng_state())
    order = _canonical_order(x)
    centred = PrincipalComponents.fit(x[order], None).apply(x[order])
    result = kmeans(centred, 7, generator=torch.Generator().manual_seed(5))
    assert same_partition(indexer.codes_NL[order, 0], result.codes_N)
    torch.testing.assert_close(indexer.decode(indexer.codes_NL)[order], result.centroids_CD[result.codes_N] + x.mean(0))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num", [1, 2, 3])
def test_few_items(num: int, options: dict) -> None:
    indexer = TreeIndexer(**options).fit(noise(num, 12))
    check_codes(indexer, indexer.codes_NL)
    assert len(indexer.codes_NL) == num


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["zero", "equal", "half", "nearly"])
def test_equal_vectors_still_get_codes_of_their_own(kind: str, options: dict) -> None:
    x = torch.zeros(300, 12)
    if kind == "equal":
        x += 3.7
    elif kind == "half":
        x[::2] = noise(150, 12)
    elif kind == "nearly":  # differences below the precision of an expanded square
        x = torch.full((300, 12), 1000.0) + 1e-3 * noise(300, 12)
        x[0] = -1000.0
    indexer = TreeIndexer(**options).fit(x)
    check_codes(indexer, indexer.codes_NL)
    leaf, _ = indexer.tree.locate(indexer.codes_NL)
    assert np.bincount(leaf).max() <= indexer.max_leaf
    if kind == "equal" and indexer.depth is None:
        assert indexer.num_levels <= 2 + np.log(300) / np.log(min(indexer.branching))  # even pieces, no long tail


def test_fixed_depth_holds_exactly_what_fits() -> None:
    for balanced in (False, True):
        indexer = TreeIndexer(4, depth=3, balanced=balanced).fit(skewed(64, 5))
        assert sorted(rows(indexer.codes_NL)) == list(itertools.product(range(4), repeat=3))
        with pytest.raises(TrainingError, match="65 items do not fit"):
            TreeIndexer(4, depth=3, balanced=balanced).fit(skewed(65, 5))
    assert TreeIndexer(4, depth=1, max_leaf=9).fit(noise(9, 3)).codebook_sizes == (9,)


def test_a_deep_tree_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.cat([torch.eye(60) * torch.arange(60).float().exp2()[:, None].clamp(max=1e12)])
    with caplog.at_level(logging.WARNING):
        assert TreeIndexer(2).fit(x).num_levels > 24
    assert "max_load=2.0" in caplog.text
    assert TreeIndexer(2, max_load=1.2).fit(x).num_levels <= 10


# -------------------------------------------------------------------------------------------------------- new items


@pytest.mark.parametrize("name", ["dsi", "nci", "projected"])
def test_a_new_item_like_an_old_one_shares_its_clusters(name: str) -> None:
    x = skewed(230, 12)
    indexer = TreeIndexer(**OPTIONS[name] | {"max_load": None}).fit(x)
    leaf, _ = indexer.tree.locate(indexer.codes_NL)
    size = np.bincount(leaf)
    for item in range(0, 230, 7):
        new = indexer.encode(x[item : item + 1])
        assert tuple(new[0].tolist()) not in set(rows(indexer.codes_NL))
        if size[leaf[item]] < indexer.max_leaf:
            assert indexer.tree.locate(new)[0][0] == leaf[item]
            assert indexer.tree.locate(new)[1][0] == size[leaf[item]]  # the next number


@pytest.mark.parametrize("name", OPTIONS)
def test_new_items_fill_every_free_number_once(name: str) -> None:
    indexer = TreeIndexer(**OPTIONS[name]).fit(skewed(230, 12))
    tree, before = indexer.tree, indexer.codes_NL.clone()
    room = int((tree.num_children_V == 0).sum()) * indexer.max_leaf - 230
    new = indexer.encode(skewed(room, 12, 9))
    check_codes(indexer, torch.cat([before, new]))
    assert torch.equal(before, indexer.codes_NL)  # encoding changes nothing
    assert torch.equal(new, indexer.encode(skewed(room, 12, 9)))
    with pytest.raises(IncompatibleComponentsError, match="free numbers"):
        indexer.encode(skewed(room + 1, 12, 9))
    everything = torch.cat([before, new])
    with pytest.raises(IncompatibleComponentsError, match="0 free numbers"):
        indexer.encode(skewed(1, 12), taken_NL=everything)
    for freed in (0, 117, len(everything) - 1):  # the number of a removed item is given again
        kept = torch.cat([everything[:freed], everything[freed + 1 :]])
        assert indexer.encode(skewed(1, 12), taken_NL=kept)[0].tolist() == everything[freed].tolist()


def test_a_full_leaf_passes_items_to_its_nearest_neighbour() -> None:
    line = torch.tensor([0.0, 1, 2, 10, 11, 100, 101, 102, 120, 121])[:, None]
    indexer = TreeIndexer(2, max_leaf=3).fit(line)
    low, high = indexer.codes_NL[4], indexer.codes_NL[9]  # the leaves with a number left: of 10, 11 and of 120, 121
    new = indexer.encode(torch.tensor([[0.5], [0.6]]))
    assert new[0].tolist() == [*low[:2].tolist(), 2]  # its own leaf is full, the sibling has one number left
    assert new[1].tolist() == [*high[:2].tolist(), 2]  # then that whole side is full
    with pytest.raises(IncompatibleComponentsError, match="2 dimensions"):
        indexer.encode(torch.zeros(1, 2))


# ------------------------------------------------------------------------------------------------------- code styles


def test_code_styles_tell_the_same_tree() -> None:
    x = skewed(200, 6)
    local, node, prefix = (TreeIndexer(4, max_leaf=7, code_style=style).fit(x) for style in ("local", "node", "prefix"))
    for other in (node, prefix):
        np.testing.assert_array_equal(local.tree.locate(local.codes_NL), other.tree.locate(other.codes_NL))
    named = [dict.fromkeys(rows(indexer.codes_NL)) for indexer in (local, node, prefix)]
    parents: list[dict[tuple[int, int], set]] = [{}, {}, {}]
    for seen, codes in zip(parents, named):
        for row in codes:
            for level, code in enumerate(row):
                last = level == len(row) - 1
                seen.setdefault((level, code), set()).add((row[:level], last))
    assert any(len(above) > 1 for above in parents[0].values())
    for (_, _), above in parents[1].items():  # a cluster code has one parent and is never an item number
        assert len(above) == 1 or all(last for _, last in above)
    assert any(len(above) > 1 for above in parents[1].values())
    assert all(len(above) == 1 for above in parents[2].values())


def test_eager_numbers_codes_below_every_parent() -> None:
    size = 6
    local = TreeIndexer(size, depth=2, balanced=True).fit(noise(36, 4)).codes_NL
    prefix = TreeIndexer(size, depth=2, balanced=True, code_style="prefix").fit(noise(36, 4))
    assert prefix.codebook_sizes == (size, size * size)
    torch.testing.assert_close(prefix.codes_NL[:, 1], local[:, 0] * size + local[:, 1])


@pytest.mark.parametrize("style", ["local", "node", "prefix"])
def test_locate_inverts_codes_and_rejects_everything_else(style: str) -> None:
    tree = CodeTree([3, 0, 2, 0, 0, 2, 0, 0], max_leaf=2, code_style=style)
    leaves = np.flatnonzero(tree.num_children_V == 0)
    leaf, number = np.repeat(leaves, 2), np.tile([0, 1], len(leaves))
    codes = tree.codes(leaf, number)
    np.testing.assert_array_equal(tree.locate(codes), [leaf, number])
    valid = set(map(tuple, codes.tolist()))
    assert len(valid) == len(leaf)
    for row in itertools.product(*[range(-1, size + 1) for size in tree.codebook_sizes]):
        if row in valid:
            assert tree.locate(np.array([row]))[0][0] in leaves
        else:
            with pytest.raises(IncompatibleComponentsError, match="row 1"):
                tree.locate(np.array([codes[0].tolist(), row]))
    with pytest.raises(IncompatibleComponentsError, match="codes must be"):
        tree.locate(codes[:, :1])


@pytest.mark.parametrize("children", [[2, 0], [1, 0, 0], [], [2, -1, 0], [0, 0]])
def test_no_tree(children: list[int]) -> None:
    with pytest.raises(IncompatibleComponentsError):
        CodeTree(children, max_leaf=2)


# -------------------------------------------------------------------------------------------------- assignment, ranks


def test_optimal_assignment_equals_brute_force() -> None:
    generator = np.random.default_rng(0)
    for num, width, low, high in [(5, 2, 2, 3), (6, 3, 2, 2), (5, 3, 1, 2), (6, 3, 0, 4), (4, 4, 1, 1), (3, 2, 0, 9)]:
        cost = generator.normal(size=(num, width))
        best = min(
            sum(cost[row, code] for row, code in enumerate(codes))
            for codes in itertools.product(range(width), repeat=num)
            if all(low <= codes.count(code) <= high for code in range(width))
        )
        codes = optimal_assignment(cost, low, high)
        count = np.bincount(codes, minlength=width)
        assert low <= count.min() and count.max() <= high
        assert cost[np.arange(num), codes].sum() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_quota_assignment_is_near_the_optimum(seed: int) -> None:
    x, centres = skewed(200, 4, seed).numpy(), noise(8, 4, seed + 50).numpy()
    cost = ((x[:, None] - centres) ** 2).sum(2)
    free = cost.argmin(1)
    np.testing.assert_array_equal(quota_assignment(cost, np.full(8, 200)), free)
    codes = quota_assignment(cost, np.full(8, 25))
    assert np.bincount(codes).tolist() == [25] * 8
    total, least = (cost[np.arange(200), c].sum() for c in (codes, optimal_assignment(cost, 25, 25)))
    assert least - 1e-3 <= total <= 1.25 * least  # without prices; the indexer starts from priced costs
    assert cost.min(1).sum() < least


def test_balanced_clusters_of_a_large_node_are_near_the_optimum_for_their_centres() -> None:
    """Above 256 points prices and greedy moves stand in for the exact assignment: hardly worse, and exactly balanced."""
    x = skewed(600, 8, 2)
    indexer = TreeIndexer(6, depth=2, max_leaf=100, balanced=True).fit(x)
    codes = indexer.codes_NL[:, 0].numpy()
    assert np.bincount(codes).tolist() == [100] * 6
    centres = torch.stack([x[indexer.codes_NL[:, 0] == code].mean(0) for code in range(6)])
    cost = torch.cdist(x, centres).square().numpy()
    best = optimal_assignment(cost, 100, 100)
    assert cost[np.arange(600), codes].sum() <= 1.01 * cost[np.arange(600), best].sum()


def test_rank_within_groups() -> None:
    assert rank_within(np.array([1, 0, 1, 1, 0])).tolist() == [0, 0, 1, 2, 1]
    assert rank_within(np.array([1, 0, 1, 1, 0]), np.array([3.0, 2, 1, 1, 0])).tolist() == [2, 1, 0, 1, 0]
    assert rank_within(np.array([], dtype=np.int64)).tolist() == []


# ------------------------------------------------------------------------------------------------------ files, errors


@pytest.mark.parametrize("name", OPTIONS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    indexer = TreeIndexer(**OPTIONS[name]).fit(skewed(230, 12))
    indexer.save(tmp_path / "a.safetensors")
    again = TreeIndexer.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    new = skewed(20, 12, 8)
    assert torch.equal(again.encode(new), indexer.encode(new))
    assert torch.equal(again.codes_NL, indexer.codes_NL)
    assert again.codebook_sizes == indexer.codebook_sizes


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    with pytest.raises(ArtifactError, match="readable"):
        TreeIndexer.load(path)
    save_file({"codes": torch.zeros(1)}, str(path))
    with pytest.raises(ArtifactError, match="not a tree file"):
        TreeIndexer.load(path)
    TreeIndexer(3).fit(noise(40, 3)).save(path)
    header = {"hf_genrec.tree_indexer.1": '{"branching": [3]}'}
    tensors = load_file(str(path))
    for change in (
        {"num_children": tensors["num_children"][:-1]},
        {"codes": tensors["codes"] + 5},
        {"centroids": tensors["centroids"][1:]},
        {"projection.mean": None},
    ):
        changed = {name: value for name, value in (tensors | change).items() if value is not None}
        save_file(changed, str(path), metadata=header)
        with pytest.raises(ArtifactError, match="again"):
            TreeIndexer.load(path)
    save_file(tensors, str(path), metadata=header)
    assert TreeIndexer.load(path).num_levels > 1


@pytest.mark.parametrize(
    "options",
    [
        {"branching": 1}, {"branching": ()}, {"max_leaf": 0}, {"depth": 0}, {"branching": (4, 4), "depth": 2},
        {"max_load": 0.5}, {"code_style": "global"}, {"whiten": True},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(options: dict) -> None:
    with pytest.raises(IncompatibleComponentsError):
        TreeIndexer(**options)


def test_errors_of_features_and_unfitted_trees(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="row 1"):
        TreeIndexer(2).fit(torch.tensor([[0.0], [float("nan")]]))
    for call in (
        lambda: TreeIndexer().encode(noise(1, 2)),
        lambda: TreeIndexer().codebook_sizes,
        lambda: TreeIndexer().save(tmp_path / "x"),
    ):
        with pytest.raises(TrainingError, match="not fitted"):
            call()


@pytest.mark.slow
def test_twenty_thousand_vectors_in_seconds() -> None:
    x = skewed(20_000, 64)
    for options in ({"branching": 10, "max_leaf": 100, "max_load": 2.0}, {"branching": 8, "balanced": True}):
        start = time.process_time()
        indexer = TreeIndexer(**options).fit(x)
        assert time.process_time() - start < 60
        check_codes(indexer, indexer.codes_NL)
