"""Residual k-means with equal sizes, a codebook per prefix, or the prefix beside the residual: identities and oracles."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.features import text_features
from hf_genrec.identifiers.quantizers.balanced import balanced_codes, balanced_kmeans, equal_quotas
from hf_genrec.identifiers.quantizers.kmeans import kmeans, nearest
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans

OPTIONS = [
    {"balanced": True},
    {"within_cluster": True},
    {"concat_prefix": True},
    {"concat_prefix": True, "prefix_weight": 0.5},
    {"balanced": True, "pca_dim": 4},
]


def noise(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) * torch.linspace(2, 0.3, dim)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------ balanced


@pytest.mark.parametrize(("num", "dim", "codes"), [(1, 1, 1), (10, 2, 3), (3, 2, 5), (50, 2, 50), (1000, 8, 64)])
def test_balanced_sizes_differ_by_at_most_one(num: int, dim: int, codes: int) -> None:
    x = noise(num, dim)
    result = balanced_kmeans(x, codes, generator=generator())
    count = torch.bincount(result.codes_N, minlength=codes)
    assert len(count) == codes and int(count.max() - count.min()) <= 1
    assert torch.allclose(result.error_N, (x - result.centroids_CD[result.codes_N]).pow(2).sum(1))


@pytest.mark.parametrize(("num", "dim", "codes"), [(1000, 8, 64), (1682, 32, 64), (1682, 32, 256)])
def test_equal_sizes_cost_little(num: int, dim: int, codes: int) -> None:
    x = noise(num, dim)
    balanced, free = (fit(x, codes, generator=generator()) for fit in (balanced_kmeans, kmeans))
    assert float(balanced.error_N.mean()) <= 1.05 * float(free.error_N.mean())
    rule = nearest(x, balanced.centroids_CD, balanced.price_C)
    assert float((rule == balanced.codes_N).float().mean()) > 0.95


def test_balanced_codes_without_need_are_the_nearest() -> None:
    centroids = torch.tensor([[0.0], [10.0], [20.0]])
    x = torch.tensor([[0.1], [10.2], [19.0], [0.4], [9.0], [21.0], [0.2]])
    codes = balanced_codes(x, centroids, torch.zeros(3))
    assert torch.equal(codes, nearest(x, centroids))
    assert equal_quotas(codes, 3).tolist() == [3, 2, 2]  # the code that draws most gets the one more


def test_balanced_levels_and_the_rule_for_new_items() -> None:
    x = noise(1500, 16)
    quantizer = ResidualKMeans((32, 16, 8), balanced=True).fit(x)
    for level, size in enumerate((32, 16, 8)):
        count = torch.bincount(quantizer.fitted_codes_NL[:, level], minlength=size)
        assert int(count.max() - count.min()) <= 1
    encoded = quantizer.encode(x)
    assert float((encoded[:, 0] == quantizer.fitted_codes_NL[:, 0]).float().mean()) > 0.95
    assert int(torch.bincount(encoded[:, 0]).max()) <= 1.2 * 1500 / 32
    plain = ResidualKMeans((32, 16, 8)).fit(x)
    assert int(torch.bincount(plain.encode(x)[:, 0]).max()) > 1.3 * 1500 / 32


# ----------------------------------------------------------------------------------------------------- within_cluster


def test_within_cluster_is_kmeans_on_the_items_of_each_prefix() -> None:
    x = noise(300, 5)
    quantizer = ResidualKMeans((6, 4), within_cluster=True).fit(x)
    codes, draws = quantizer.encode(x), generator(0)
    first = kmeans(quantizer.transform(x), 6, generator=draws)
    assert torch.equal(codes[:, 0], first.codes_N)
    residual = quantizer.transform(x) - first.centroids_CD[first.codes_N]
    for cluster in range(6):
        members = codes[:, 0] == cluster
        own = kmeans(residual[members], 4, generator=draws)
        assert torch.equal(codes[members, 1], own.codes_N)
        assert torch.equal(quantizer.codebooks[1][cluster], own.centroids_CD)
    assert quantizer.codebooks[1].shape == (6, 4, 5)


def test_within_cluster_reconstructs_better_than_one_codebook() -> None:
    x = noise(800, 8)
    errors = [
        float((x - quantizer.decode(quantizer.encode(x))).pow(2).sum())
        for quantizer in (ResidualKMeans((8, 8), within_cluster=on).fit(x) for on in (False, True))
    ]
    assert errors[1] < errors[0]


def test_unknown_prefixes_get_code_zero_which_adds_nothing() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
    quantizer = ResidualKMeans((2, 2, 2), within_cluster=True, few_points="duplicate").fit(x)
    known = quantizer.encode(x)
    assert torch.allclose(quantizer.decode(known), x, atol=1e-6)
    assert len(set(map(tuple, known[:, :2].tolist()))) == 4
    level = quantizer.levels[2]  # four prefixes of two codes are known; take one away
    kept = level.keys_G != known[0, 0] * 2 + known[0, 1]
    quantizer.levels[2] = type(level)(level.books_GCQ[kept], level.price_GC[kept], level.keys_G[kept], level.width)
    assert quantizer.encode(x)[0, 2] == 0
    assert torch.allclose(quantizer.decode(quantizer.encode(x)), x, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ concat_prefix


def test_concat_prefix_is_kmeans_of_residual_and_prefix() -> None:
    x = noise(400, 5)
    quantizer = ResidualKMeans((6, 8), concat_prefix=True).fit(x)
    codes, draws, y = quantizer.encode(x), generator(0), quantizer.transform(x)
    first = kmeans(y, 6, generator=draws)
    residual = y - first.centroids_CD[first.codes_N]
    second = kmeans(torch.cat([residual, y - residual], 1), 8, generator=draws)
    assert torch.equal(codes[:, 0], first.codes_N) and torch.equal(codes[:, 1], second.codes_N)
    assert torch.equal(quantizer.codebooks[1], second.centroids_CD[:, :5])
    residual = residual - second.centroids_CD[second.codes_N, :5]
    assert torch.allclose(quantizer.decode(codes), x - residual, atol=1e-5)


def test_concat_of_a_prefix_that_says_nothing_is_residual_kmeans() -> None:
    # one first code: all prefixes are the mean, so residual and prefix cluster like the residual alone
    x = noise(400, 5)
    with_prefix = ResidualKMeans((1, 8, 8), concat_prefix=True).fit(x).encode(x)[:, :2]
    assert torch.equal(with_prefix, ResidualKMeans((1, 8)).fit(x).encode(x))


def test_prefix_weight_zero_is_residual_kmeans() -> None:
    x = noise(600, 6)
    codes = ResidualKMeans((8, 8, 8), concat_prefix=True, prefix_weight=0.0).fit(x).encode(x)
    assert torch.equal(codes, ResidualKMeans((8, 8, 8)).fit(x).encode(x))
    with pytest.raises(IncompatibleComponentsError, match="needs concat_prefix=True"):
        ResidualKMeans((8,), prefix_weight=0.5)


def semantic_variance(x: torch.Tensor, codes_N: torch.Tensor) -> float:
    """Variance of the items of a code around their mean, summed over the dimensions."""
    total = 0.0
    for code in codes_N.unique().tolist():
        members = x[codes_N == code]
        total += float((members - members.mean(0)).pow(2).sum())
    return total / len(x)


def test_deep_codes_keep_their_prefix_together() -> None:
    x = noise(1500, 16)
    plain, concat = (ResidualKMeans((24, 24, 24), concat_prefix=on).fit(x).encode(x) for on in (False, True))
    for level in (1, 2):
        assert semantic_variance(x, concat[:, level]) < 0.8 * semantic_variance(x, plain[:, level])


@pytest.mark.slow  # encodes the titles
def test_deep_codes_of_movielens_texts_keep_their_prefix_together(ml100k_dir: Path, minilm_dir: Path) -> None:
    rows = [line.split("\t") for line in (ml100k_dir / "ml-100k.item").read_text("utf-8").splitlines()[1:]]
    x = torch.as_tensor(text_features([f"{t} ({y}) {g}" for _, t, y, g in rows], progress=False))
    plain = ResidualKMeans((64, 64, 64), pca_dim=32).fit(x).encode(x)
    for weight, share in ((1.0, 0.9), (0.3, 1.0)):  # the card's check, for the plain concatenation and the recipe's
        quantizer = ResidualKMeans((64, 64, 64), pca_dim=32, concat_prefix=True, prefix_weight=weight).fit(x)
        concat = quantizer.encode(x)
        for level in (1, 2):
            assert semantic_variance(x, concat[:, level]) < share * semantic_variance(x, plain[:, level])


# ------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("options", OPTIONS)
def test_files_round_trip_and_codes_do_not_depend_on_company(tmp_path: Path, options: dict) -> None:
    x = noise(300, 6)
    quantizer = ResidualKMeans((8, 6, 4), chunk_size=37, **options).fit(x)
    quantizer.save(tmp_path / "quantizer.safetensors")
    loaded = ResidualKMeans.load(tmp_path / "quantizer.safetensors")
    new = noise(90, 6, seed=5)
    assert torch.equal(loaded.encode(new), quantizer.encode(new))
    assert torch.equal(loaded.decode(loaded.encode(new)), quantizer.decode(quantizer.encode(new)))
    assert torch.equal(quantizer.encode(new)[40:], quantizer.encode(new[40:]))
    assert all(getattr(loaded, name) == value for name, value in options.items())
    errors = [float((x - quantizer.decode(quantizer.encode(x)[:, :depth])).pow(2).sum()) for depth in (1, 2, 3)]
    assert all(before > after for before, after in pairwise(errors))


@pytest.mark.parametrize("option", ["balanced", "within_cluster", "concat_prefix"])
def test_one_level_or_option_off_is_the_plain_method(option: str) -> None:
    x = noise(200, 4)
    plain = ResidualKMeans((6, 5)).fit(x)
    off = ResidualKMeans((6, 5), **{option: False}).fit(x)
    assert torch.equal(off.encode(x), plain.encode(x)) and torch.equal(plain.encode(x), plain.fitted_codes_NL)
    assert all(torch.equal(a, b) for a, b in zip(off.codebooks, plain.codebooks))
    on = ResidualKMeans((6, 5), **{option: True}).fit(x)
    assert not torch.equal(on.encode(x), plain.encode(x))
    if option != "balanced":
        one = ResidualKMeans((6,), **{option: True}).fit(x)
        assert torch.equal(one.encode(x), ResidualKMeans((6,)).fit(x).encode(x))


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(IncompatibleComponentsError, match="leave max_load out"):
        ResidualKMeans((4,), balanced=True, max_load=2.0)
    with pytest.raises(IncompatibleComponentsError, match="use one of the two"):
        ResidualKMeans((4,), within_cluster=True, concat_prefix=True)
    with pytest.raises(IncompatibleComponentsError, match="too many prefixes"):
        ResidualKMeans((2**20,) * 4, within_cluster=True)


def test_fit_leaves_the_features_alone() -> None:
    x = np.asarray(noise(100, 4))
    before = x.copy()
    for options in OPTIONS:
        ResidualKMeans((8, 4), **options).fit(x)
        assert np.array_equal(x, before)
