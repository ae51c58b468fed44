"""SVD bins: equal bins, directions of the singular value decomposition, files, and the user-item matrix behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.features import interactions_svd
from hf_genrec.identifiers.quantizers.auto_quantizer import load_quantizer, save_quantizer
from hf_genrec.identifiers.quantizers.svd_bins import SvdBins
from hf_genrec.recipes.dry_run import dry_run, dry_run_data
from hf_genrec.recipes.resolver import resolve_recipe


def noise(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num", [64, 100, 101])
def test_bins_of_one_level_hold_equally_many_items(num: int) -> None:
    quantizer = SvdBins([8, 16, 5]).fit(noise(num, 6).exp())
    for codes, size in zip(quantizer.fitted_codes_NL.t(), (8, 16, 5), strict=True):
        counts = torch.bincount(codes, minlength=size)
        assert counts.max() - counts.min() <= 1


def test_codes_are_ranks_along_the_singular_directions() -> None:
    x = noise(90, 5) * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5]) + 2.0  # not centred: neither is the paper's matrix
    codes = SvdBins([10, 10]).fit(x).fitted_codes_NL.numpy()
    right = np.linalg.svd(x.numpy())[2]
    for level in range(2):
        along = x.numpy() @ right[level]
        bins = np.argsort(np.argsort(along)) * 10 // 90
        assert np.array_equal(codes[:, level], bins) or np.array_equal(codes[:, level], 9 - bins)  # sign is free


def test_encode_repeats_the_fit_and_takes_new_items_from_anywhere() -> None:
    x = noise(200, 6)
    quantizer = SvdBins([16, 16]).fit(x)
    assert torch.equal(quantizer.encode(x), quantizer.fitted_codes_NL)
    far = quantizer.encode(100 * noise(50, 6, 1))
    assert far.min() >= 0 and far.max() <= 15


def test_equal_items_are_parted_by_noise_in_the_fit_only() -> None:
    x = torch.zeros(40, 2)
    x[:20, 0], x[20:, 0], x[:, 1] = 1.0, 2.0, noise(40, 1)[:, 0] * 0.01
    quantizer = SvdBins([4]).fit(x)
    codes = quantizer.fitted_codes_NL[:, 0]
    assert torch.bincount(codes).tolist() == [10, 10, 10, 10]
    assert set(codes[:20].tolist()) == {0, 1} and set(codes[20:].tolist()) == {2, 3}


def test_codebooks_sum_to_the_middle_of_the_bins() -> None:
    x = noise(120, 4)
    quantizer = SvdBins([6, 4]).fit(x)
    codes = quantizer.fitted_codes_NL
    middle = sum(book[codes[:, level]] for level, book in enumerate(quantizer.codebooks))
    places = quantizer.transform(x)
    for level in range(2):
        for code in range(3):
            chosen = codes[:, level] == code
            assert middle[chosen, level].allclose(places[chosen, level].mean(), atol=1e-5)


def test_a_saved_quantizer_gives_equal_codes(tmp_path: Path) -> None:
    x = noise(100, 5)
    quantizer = SvdBins([8, 8], seed=3).fit(x)
    save_quantizer(quantizer, tmp_path)
    loaded = load_quantizer(tmp_path)
    assert type(loaded) is SvdBins and torch.equal(loaded.encode(x), quantizer.encode(x))
    (tmp_path / "quantizer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtifactError):
        SvdBins.load(tmp_path / "quantizer.safetensors")


def test_what_cannot_be_binned_is_named() -> None:
    with pytest.raises(IncompatibleComponentsError, match="2 or more"):
        SvdBins([1])
    with pytest.raises(TrainingError, match="5 items cannot fill 8 bins"):
        SvdBins([8]).fit(noise(5, 3))
    with pytest.raises(TrainingError, match="no 3 singular directions"):
        SvdBins([4, 4, 4]).fit(noise(20, 2))
    with pytest.raises(TrainingError, match="not fitted"):
        SvdBins([4]).encode(noise(5, 3))
    with pytest.raises(IncompatibleComponentsError, match="fitted on 3"):
        SvdBins([4]).fit(noise(9, 3)).encode(noise(5, 2))


@pytest.mark.parametrize("num_items", [12, 1200])  # dense and iterative
def test_item_vectors_are_those_of_the_user_item_matrix(num_items: int) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.choice(num_items, 10, replace=False).tolist() for _ in range(1500)]
    vectors = interactions_svd(Sequences.from_rows(rows), num_items, 8).astype(np.float64)
    matrix = np.zeros((num_items, len(rows)))
    for user, row in enumerate(rows):
        matrix[row, user] = 1.0
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :8] * values[:8]) @ (left[:, :8] * values[:8]).T
    assert np.allclose(vectors @ vectors.T, best, atol=1e-4 * best.max())


def test_interactions_are_needed() -> None:
    with pytest.raises(TrainingError, match="no interactions"):
        interactions_svd(Sequences.from_rows([[]]), 3)


def test_the_recipe_runs() -> None:
    assert dry_run(resolve_recipe("tiger_svd"), *dry_run_data()) is not None
