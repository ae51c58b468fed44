"""Residual k-means: known clusters, brute-force oracles, identities of its options, dead codes, files, real text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.features import text_features
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.identifiers.quantizers.kmeans import (
    assign,
    balancing_prices,
    cluster_sums,
    kmeans,
    kmeans_plus_plus,
    nearest,
    restart_dead_codes,
)
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans


def blobs(num_clusters: int, per_cluster: int, dim: int, seed: int = 0, spread: float = 0.05) -> tuple:
    """Points around far-apart centres, shuffled, and the cluster of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_clusters, dim, generator=generator) * 10
    label = torch.arange(num_clusters).repeat_interleave(per_cluster)
    label = label[torch.randperm(len(label), generator=generator)]
    return centres[label] + spread * torch.randn(len(label), dim, generator=generator), label


def noise(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def skewed(num: int = 1500, dim: int = 32, seed: int = 0) -> torch.Tensor:
    """A dense core and far outliers: what makes plain k-means spend its codes on single points."""
    return noise(num, dim, seed) * torch.rand(num, 1, generator=torch.Generator().manual_seed(seed + 1)).pow(-0.25)


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    pairs = set(zip(a.tolist(), b.tolist()))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def brute_nearest(x: torch.Tensor, codebook: torch.Tensor, price: torch.Tensor | None = None) -> torch.Tensor:
    cost = (x.double()[:, None] - codebook.double()[None]).pow(2).sum(2)
    return (cost if price is None else cost + price.double()).argmin(1)


# ------------------------------------------------------------------------------------------------------------- k-means


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("clusters", "per_cluster", "dim"), [(2, 3, 1), (16, 20, 3), (64, 10, 24)])
def test_separated_clusters_are_found(clusters: int, per_cluster: int, dim: int, seed: int) -> None:
    if dim == 1:
        label = torch.arange(clusters).repeat(per_cluster)
        x = label[:, None] * 5.0
    else:
        x, label = blobs(clusters, per_cluster, dim, seed)
    result = kmeans(x, clusters, generator=torch.Generator().manual_seed(seed))
    assert same_partition(result.codes_N, label)
    for code in range(clusters):
        torch.testing.assert_close(result.centroids_CD[code], x[result.codes_N == code].mean(0))


def test_lloyd_agrees_with_a_naive_loop() -> None:
    x = noise(300, 5, 3)
    centroids = kmeans_plus_plus(x, 12, torch.Generator().manual_seed(4)).double()
    for _ in range(7):
        codes = brute_nearest(x, centroids)
        assert len(set(codes.tolist())) == 12  # no restart happens, so the naive loop is the whole method
        centroids = torch.stack([x[codes == code].double().mean(0) for code in range(12)])
    result = kmeans(x, 12, generator=torch.Generator().manual_seed(4), iterations=7)
    torch.testing.assert_close(result.centroids_CD.double(), centroids, atol=1e-5, rtol=0)
    assert torch.equal(result.codes_N, brute_nearest(x, result.centroids_CD))


@pytest.mark.parametrize(("num", "dim", "codes"), [(1, 1, 1), (7, 3, 5), (200, 17, 31), (1000, 4, 64)])
@pytest.mark.parametrize("chunk_size", [1, 3, 64, 10_000])
def test_nearest_is_the_brute_force_for_every_chunking(num: int, dim: int, codes: int, chunk_size: int) -> None:
    x, codebook = noise(num, dim, 1), noise(codes, dim, 2)
    found, error = assign(x, codebook, chunk_size=chunk_size)
    assert torch.equal(found, brute_nearest(x, codebook))
    torch.testing.assert_close(error, (x - codebook[found]).pow(2).sum(1))
    price = noise(codes, 1, 3).abs()[:, 0]
    assert torch.equal(nearest(x, codebook, price, chunk_size), brute_nearest(x, codebook, price))


def test_ties_go_to_the_lowest_code() -> None:
    codebook = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert nearest(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]), codebook).tolist() == [0, 1, 0]


def test_cluster_sums_without_scattered_additions_agree() -> None:
    x, codes = noise(500, 6).double(), torch.randint(0, 9, (500,), generator=torch.Generator().manual_seed(0))
    product = torch.nn.functional.one_hot(codes, 9).double().t() @ x
    torch.testing.assert_close(cluster_sums(x, codes, 9, chunk_size=64), product)


def test_kmeans_plus_plus_takes_every_far_cluster_and_never_a_point_twice() -> None:
    x, label = blobs(20, 15, 6, seed=2)
    seeds = kmeans_plus_plus(x, 20, torch.Generator().manual_seed(0))
    owner = label[brute_nearest(seeds, x)]
    assert len(set(owner.tolist())) == 20
    seeds = kmeans_plus_plus(noise(30, 2), 30, torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in seeds.tolist()}) == 30


def test_dead_codes_move_to_the_farthest_points() -> None:
    x = torch.tensor([[0.0], [0.1], [5.0], [5.1], [-40.0]])
    centroids = torch.tensor([[0.0], [100.0], [200.0]])
    codes, error = assign(x, centroids)
    assert restart_dead_codes(x, centroids, codes, error) == 2
    # first the worst point, then the worst of what is left with it: 5.1, not a neighbour of the first
    assert centroids.flatten().tolist() == pytest.approx([0.0, -40.0, 5.1])


def test_dead_codes_stay_when_nothing_is_left_to_split() -> None:
    x = torch.zeros(10, 2)
    centroids = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    codes, error = assign(x, centroids)
    assert restart_dead_codes(x, centroids, codes, error) == 0
    result = kmeans(x, 4, generator=torch.Generator().manual_seed(0))
    assert result.codes_N.tolist() == [0] * 10 and bool(torch.isfinite(result.centroids_CD).all())


def test_every_code_is_used_when_there_are_enough_distinct_points() -> None:
    x = torch.cat([torch.zeros(1000, 3), noise(63, 3) * 0.01])  # one heavy point, 63 light ones
    result = kmeans(x, 64, generator=torch.Generator().manual_seed(0))
    assert len(result.codes_N.unique()) == 64


def test_prices_limit_the_largest_code_and_are_zero_without_need() -> None:
    x = skewed()
    centroids = kmeans(x, 50, generator=torch.Generator().manual_seed(0)).centroids_CD
    free = torch.bincount(nearest(x, centroids), minlength=50).max()
    price = balancing_prices(x, centroids, torch.zeros(50), 2.0, steps=200)
    priced = torch.bincount(nearest(x, centroids, price), minlength=50).max()
    assert free > 70 and priced <= 62 and float(price.min()) >= 0  # limit: 2 * 1500 / 50 = 60
    assert float(balancing_prices(x, centroids, torch.zeros(50), 50.0, steps=10).abs().max()) == 0


def test_kmeans_rejects_nonsense() -> None:
    generator = torch.Generator()
    with pytest.raises(TrainingError, match="at least one point"):
        kmeans(torch.empty(0, 3), 2, generator=generator)
    with pytest.raises(TrainingError, match="max_load"):
        kmeans(noise(9, 2), 2, generator=generator, max_load=0.5)


# ----------------------------------------------------------------------------------------------------- residual k-means


def test_one_level_is_plain_kmeans() -> None:
    x = noise(400, 6, 1)
    quantizer = ResidualKMeans([16], seed=3).fit(x)
    plain = kmeans(x - x.double().mean(0).float(), 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(quantizer.codebooks[0], plain.centroids_CD)
    assert torch.equal(quantizer.encode(x)[:, 0], plain.codes_N)


@pytest.mark.parametrize("options", [{}, {"max_load": 1.5}, {"pca_dim": 4}, {"pca_dim": 4, "whiten": True}])
def test_encode_is_greedy_on_the_residual(options: dict) -> None:
    x = skewed(600, 8)
    quantizer = ResidualKMeans((16, 9, 5), **options).fit(x)
    residual = quantizer.transform(x).double()
    for level, codes in enumerate(quantizer.encode(x).t()):
        expected = brute_nearest(residual, quantizer.codebooks[level], quantizer.prices[level])
        assert (codes == expected).float().mean() > 0.995  # single precision may flip a tie
        residual = residual - quantizer.codebooks[level].double()[codes]


def test_option_off_identities() -> None:
    x = skewed(500, 6)
    plain = ResidualKMeans((12, 12)).fit(x)
    assert all(float(price.abs().max()) == 0 for price in plain.prices)
    loose = ResidualKMeans((12, 12), max_load=12.0).fit(x)  # a limit of N points binds nobody
    assert torch.equal(loose.encode(x), plain.encode(x))
    # all components kept = a rotation: same partition into codes
    rotated = ResidualKMeans((12, 12), pca_dim=6).fit(x)
    assert same_partition(rotated.encode(x)[:, 0], plain.encode(x)[:, 0])
    torch.testing.assert_close(rotated.decode(rotated.encode(x)), plain.decode(plain.encode(x)), atol=1e-3, rtol=0)
    # a shift of all features changes nothing
    shifted = ResidualKMeans((12, 12)).fit(x + 5)
    assert same_partition(shifted.encode(x + 5)[:, 0], plain.encode(x)[:, 0])


def test_hierarchical_clusters_give_hierarchical_codes() -> None:
    offset = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    top = torch.tensor([[100.0, 0.0], [0.0, 100.0], [-100.0, 0.0], [0.0, -100.0]])
    a, b = torch.arange(4).repeat_interleave(4).repeat(5), torch.arange(4).repeat(20)
    x = top[a] + offset[b]
    codes = ResidualKMeans((4, 4)).fit(x).encode(x)
    assert same_partition(codes[:, 0], a) and same_partition(codes[:, 1], b)


def test_decode_of_encode_gets_nearer_with_every_level() -> None:
    x = noise(500, 10)
    quantizer = ResidualKMeans((20, 20, 20, 20)).fit(x)
    codes = quantizer.encode(x)
    errors = [float((quantizer.decode(codes[:, :level]) - x).pow(2).sum(1).mean()) for level in range(5)]
    assert errors[0] == pytest.approx(float((x - x.mean(0)).pow(2).sum(1).mean()), rel=1e-5)
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert codes.dtype == torch.int64 and codes.shape == (500, 4)


def test_same_seed_same_bits_and_the_global_random_state_is_untouched() -> None:
    x = skewed(800, 16)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = ResidualKMeans((32, 32), seed=1, subsample=100).fit(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second = ResidualKMeans((32, 32), seed=1, subsample=100).fit(x.numpy())
    assert all(torch.equal(a, b) for a, b in zip(first.codebooks, second.codebooks))
    other = ResidualKMeans((32, 32), seed=2, subsample=100).fit(x)
    assert not torch.equal(first.codebooks[0], other.codebooks[0])


def test_chunking_and_other_rows_do_not_change_codes() -> None:
    x = noise(700, 12)
    quantizer = ResidualKMeans((24, 24)).fit(x)
    codes = quantizer.encode(x)
    quantizer.chunk_size = 37
    assert torch.equal(quantizer.encode(x), codes)
    assert torch.equal(quantizer.encode(x[300:310]), codes[300:310])


@pytest.mark.parametrize("num", [1, 3, 15])
def test_fewer_items_than_codes(num: int) -> None:
    x = noise(num, 4)
    with pytest.raises(TrainingError, match=rf"{num} items cannot fill a codebook of 16 codes.*few_points='duplicate'"):
        ResidualKMeans((8, 16)).fit(x)
    quantizer = ResidualKMeans((16, 16), few_points="duplicate").fit(x)
    codes = quantizer.encode(x)
    assert len(set(map(tuple, codes.tolist()))) == num
    torch.testing.assert_close(quantizer.decode(codes), x, atol=1e-5, rtol=0)
    assert [len(book) for book in quantizer.codebooks] == [16, 16]


def test_as_many_codes_as_items_gives_each_its_own() -> None:
    codes = ResidualKMeans((50,)).fit(noise(50, 3)).encode(noise(50, 3))
    assert sorted(codes[:, 0].tolist()) == list(range(50))


def test_max_load_balances_what_encode_returns() -> None:
    x = skewed(2000, 32)
    plain = ResidualKMeans((40, 40)).fit(x).encode(x)
    balanced = ResidualKMeans((40, 40), max_load=1.5).fit(x).encode(x)
    for level in range(2):
        assert torch.bincount(plain[:, level], minlength=40).max() > 1.8 * 2000 / 40
        assert torch.bincount(balanced[:, level], minlength=40).max() <= 1.6 * 2000 / 40
    assert len({tuple(row) for row in balanced.tolist()}) > len({tuple(row) for row in plain.tolist()})


def test_a_level_that_one_code_swallows_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    x = noise(500, 256)  # many dimensions: all points are nearer to the mean than to each other
    ResidualKMeans((64, 64)).fit(x)
    assert "one of 64 codes of level 2 holds" in caplog.text and "max_load=2.0" in caplog.text
    caplog.clear()
    balanced = ResidualKMeans((64, 64), max_load=2.0).fit(x).encode(x)
    assert not caplog.text and torch.bincount(balanced[:, 1], minlength=64).max() <= 30
    ResidualKMeans((2,)).fit(x)
    ResidualKMeans((16, 16), few_points="duplicate").fit(noise(8, 3))
    assert not caplog.text


def test_bad_input_is_named() -> None:
    x = noise(20, 3)
    x[7, 1] = float("nan")
    with pytest.raises(TrainingError, match="first in row 7"):
        ResidualKMeans((4,)).fit(x)
    quantizer = ResidualKMeans((4,)).fit(noise(20, 3))
    with pytest.raises(TrainingError, match="first in row 7"):
        quantizer.encode(x)
    with pytest.raises(IncompatibleComponentsError, match="5 dimensions, the quantizer was fitted on 3"):
        quantizer.encode(noise(2, 5))
    with pytest.raises(TrainingError, match=r"\(items, dimensions\)"):
        quantizer.encode(torch.zeros(3))
    with pytest.raises(TrainingError, match="not fitted"):
        ResidualKMeans((4,)).encode(noise(20, 3))
    for bad in ({"codebook_sizes": ()}, {"codebook_sizes": (4, 0)}, {"codebook_sizes": (4,), "few_points": "x"}):
        with pytest.raises(IncompatibleComponentsError):
            ResidualKMeans(**bad)
    with pytest.raises(IncompatibleComponentsError, match="pca_dim"):
        ResidualKMeans((4,), whiten=True)
    with pytest.raises(TrainingError, match="between 1 and the 3"):
        ResidualKMeans((4,), pca_dim=9).fit(noise(20, 3))


@pytest.mark.parametrize("options", [{}, {"pca_dim": 3, "whiten": True, "max_load": 2.0, "few_points": "duplicate"}])
def test_files_round_trip(tmp_path: Path, options: dict) -> None:
    x = skewed(200, 6)
    quantizer = ResidualKMeans((16, 8), seed=5, **options).fit(x)
    path = tmp_path / "quantizer.safetensors"
    quantizer.save(path)
    loaded = ResidualKMeans.load(path)
    assert torch.equal(loaded.encode(x), quantizer.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), quantizer.decode(quantizer.encode(x)))
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_broken_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "quantizer.safetensors"
    ResidualKMeans((4,)).fit(noise(20, 3)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        ResidualKMeans.load(path)
    save_file({"x": torch.zeros(2)}, str(path))
    with pytest.raises(ArtifactError, match="not a residual k-means file"):
        ResidualKMeans.load(path)
    save_file(
        {"codebook.0": torch.zeros(4, 1)}, str(path), {"hf_genrec.residual_kmeans.1": '{"codebook_sizes": [4, 4]}'}
    )
    with pytest.raises(ArtifactError, match=r"codebook\.1"):
        ResidualKMeans.load(path)


# ----------------------------------------------------------------------------------------------------------- real data


def ml100k_text_features(ml100k_dir: Path) -> np.ndarray:
    rows = [line.split("\t") for line in (ml100k_dir / "ml-100k.item").read_text("utf-8").splitlines()[1:]]
    return text_features([f"{title} ({year}) {genres}" for _, title, year, genres in rows], progress=False)


def test_movielens_text_codes_use_the_first_codebook(ml100k_dir: Path, minilm_dir: Path) -> None:
    features = ml100k_text_features(ml100k_dir)
    for sizes, options in (
        ((64, 64, 64), {}),
        ((64, 64, 64), {"pca_dim": 32, "max_load": 2.0}),
        ((256, 256, 256), {"pca_dim": 32}),
    ):
        quantizer = ResidualKMeans(sizes, **options).fit(features)
        health = identifier_health(quantizer.encode(features), sizes, features)
        assert health.utilisation[0] >= 0.9, (sizes, options)
        assert health.neighbour_hit_rate > 10 * health.neighbour_hit_chance
        if options:
            # 36 films share title, year and genres with another: no codes of the text can tell them apart
            assert 36 <= health.items_sharing <= 150 and health.largest_group <= 4
        if "max_load" in options:
            assert max(health.largest_code) <= 2.0 * 1682 / 64 + 2
