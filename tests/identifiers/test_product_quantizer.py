"""Product quantizer: k-means per slice, the rotation of OPQ, files, and the long codes in a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_genrec import ItemTokenizer, ProductQuantizer
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, TrainingError
from hf_genrec.identifiers.collisions import resolve_collisions
from hf_genrec.identifiers.features import text_features
from hf_genrec.identifiers.quantizers.kmeans import kmeans
from hf_genrec.identifiers.quantizers.product import balanced_rotation, procrustes


def noise(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def mixed(num: int = 600, dim: int = 12, sources: int = 5, seed: int = 0) -> torch.Tensor:
    """Few skewed sources mixed into many correlated dimensions, with a little noise."""
    return noise(num, sources, seed).exp() @ noise(sources, dim, seed + 1) + 0.1 * noise(num, dim, seed + 2)


def squared_error(quantizer: ProductQuantizer, x: torch.Tensor) -> float:
    return float((quantizer.decode(quantizer.encode(x)) - x).pow(2).sum(1).mean())


# ------------------------------------------------------------------------------------------------------------- codes


def test_one_level_is_plain_kmeans() -> None:
    x = noise(400, 6)
    quantizer = ProductQuantizer([16], rotate=False, seed=3).fit(x)
    plain = kmeans(x - x.double().mean(0).float(), 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(quantizer.codebooks[0], plain.centroids_CD)
    assert torch.equal(quantizer.encode(x)[:, 0], plain.codes_N)


@pytest.mark.parametrize(
    "options", [{"rotate": False}, {}, {"pca_dim": 7}, {"pca_dim": 8, "whiten": True, "rotate": False}]
)
def test_every_digit_is_the_nearest_code_of_its_own_slice(options: dict) -> None:
    x = mixed(500, 10)
    quantizer = ProductQuantizer((16, 9, 5), **options).fit(x)
    y = quantizer.transform(x).double()
    first = 0
    for level, codes in enumerate(quantizer.encode(x).t()):
        book = quantizer.codebooks[level].double()
        slice_ = y[:, first : first + book.shape[1]]
        assert (codes == torch.cdist(slice_, book).argmin(1)).float().mean() > 0.995  # single precision: near ties
        first += book.shape[1]
    assert first == y.shape[1] and [len(book) for book in quantizer.codebooks] == [16, 9, 5]


def test_slices_are_as_even_as_they_can_be() -> None:
    books = ProductQuantizer([4] * 4).fit(noise(50, 10)).codebooks
    assert [book.shape[1] for book in books] == [3, 3, 2, 2]


def test_a_digit_depends_on_nothing_but_its_own_slice() -> None:
    x = mixed(400, 8)
    other = torch.cat([x[:, :4], noise(400, 4, 9)], dim=1)
    one, two = (ProductQuantizer([8, 8], rotate=False).fit(part) for part in (x, other))
    assert torch.equal(one.encode(x)[:, 0], two.encode(other)[:, 0])
    assert torch.equal(one.encode(other)[:, 0], one.encode(x)[:, 0])
    assert not torch.equal(one.encode(other)[:, 1], one.encode(x)[:, 1])


def test_a_grid_is_coded_without_error() -> None:
    grid = torch.cartesian_prod(torch.arange(4.0), 10 * torch.arange(3.0), 100 * torch.arange(5.0))
    quantizer = ProductQuantizer([4, 3, 5], rotate=False).fit(grid)
    codes = quantizer.encode(grid)
    assert len({tuple(row) for row in codes.tolist()}) == 60
    assert torch.allclose(quantizer.decode(codes), grid, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- rotation


def test_procrustes_finds_a_known_rotation_and_no_other_is_better() -> None:
    x = noise(200, 6)
    known = torch.linalg.qr(noise(6, 6, 1)).Q
    assert torch.allclose(procrustes(x, x @ known), known, atol=1e-5)
    target = noise(200, 6, 2)
    best = procrustes(x, target)
    assert torch.allclose(best @ best.t(), torch.eye(6), atol=1e-5)
    found = (x @ best - target).pow(2).sum()
    for seed in range(20):
        other = torch.linalg.qr(noise(6, 6, seed)).Q
        assert found < (x @ other - target).pow(2).sum()


def test_balanced_rotation_deals_out_the_variances() -> None:
    """Variances 16, 8, 4, 2 in two slices: {16, 2} and {8, 4} have the same product."""
    x = torch.linalg.qr(noise(100, 4) - noise(100, 4).mean(0)).Q * 99**0.5 * torch.tensor([16.0, 8, 4, 2]).sqrt()
    x = x @ torch.linalg.qr(noise(4, 4, 1)).Q  # hidden by a rotation
    variances = (x @ balanced_rotation(x, 2)).var(0)
    assert torch.allclose(variances[:2].sort().values, torch.tensor([2.0, 16]), rtol=1e-3)
    assert torch.allclose(variances[2:].sort().values, torch.tensor([4.0, 8]), rtol=1e-3)


def test_rotation_stays_orthogonal_and_lowers_the_error() -> None:
    x = mixed()
    plain, first, fitted = (
        ProductQuantizer([16] * 4, **options).fit(x) for options in ({"rotate": False}, {"rounds": 0}, {"rounds": 30})
    )
    for quantizer in (first, fitted):
        rotation = quantizer.rotation_PP
        assert torch.allclose(rotation @ rotation.t(), torch.eye(12), atol=1e-5)
    errors = [squared_error(quantizer, x) for quantizer in (plain, first, fitted)]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.97 * errors[1], errors
    assert plain.rotation_PP is None


def test_no_rounds_is_k_means_in_the_balanced_space() -> None:
    x = mixed()
    quantizer = ProductQuantizer([8] * 3, rounds=0, seed=4).fit(x)
    centred = x - x.double().mean(0).float()
    by_hand = ProductQuantizer([8] * 3, rotate=False, seed=4).fit(centred @ balanced_rotation(centred, 3))
    assert torch.equal(quantizer.encode(x), by_hand.encode(centred @ balanced_rotation(centred, 3)))


def test_same_seed_same_bits_and_the_global_random_state_is_untouched() -> None:
    x = mixed()
    state = torch.get_rng_state()
    first = ProductQuantizer([16] * 4, seed=1, subsample=100).fit(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second = ProductQuantizer([16] * 4, seed=1, subsample=100).fit(x.numpy())
    assert torch.equal(first.rotation_PP, second.rotation_PP)
    assert all(torch.equal(a, b) for a, b in zip(first.codebooks, second.codebooks, strict=True))
    assert torch.equal(first.encode(x[50:60]), first.encode(x)[50:60])


def test_agrees_with_faiss(monkeypatch) -> None:
    faiss = pytest.importorskip("faiss")
    x = mixed(2000, 16).numpy()
    ours = ProductQuantizer([16] * 4, rotate=False).fit(x)
    theirs = faiss.ProductQuantizer(16, 4, 4)
    faiss.copy_array_to_vector(torch.stack(ours.codebooks).numpy().ravel(), theirs.centroids)
    packed = theirs.compute_codes(ours.transform(x).numpy())  # two 4-bit codes a byte, low half first
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(x), 4)
    assert (codes == ours.encode(x).numpy()).mean() > 0.999
    # quality of codebooks and rotation: as good as theirs, which are trained for longer
    theirs.train(ours.transform(x).numpy())
    error = ((theirs.decode(theirs.compute_codes(ours.transform(x).numpy())) - ours.transform(x).numpy()) ** 2).sum(1)
    assert squared_error(ours, torch.as_tensor(x)) < 1.03 * error.mean()
    rotation = faiss.OPQMatrix(16, 4)
    rotation.pq = faiss.ProductQuantizer(16, 4, 4)
    rotation.train(ours.transform(x).numpy())
    rotated = rotation.apply_py(ours.transform(x).numpy())
    theirs = faiss.ProductQuantizer(16, 4, 4)
    theirs.train(rotated)
    error = ((theirs.decode(theirs.compute_codes(rotated)) - rotated) ** 2).sum(1)
    fitted = ProductQuantizer([16] * 4, rounds=50).fit(x)
    assert squared_error(fitted, torch.as_tensor(x)) < 1.03 * error.mean()


# ------------------------------------------------------------------------------------------------- bad input and files


def test_bad_input_is_named() -> None:
    x = noise(20, 4)
    x[7, 1] = float("nan")
    with pytest.raises(TrainingError, match="first in row 7"):
        ProductQuantizer((4, 4)).fit(x)
    with pytest.raises(TrainingError, match="4 dimensions cannot be cut into 5 slices"):
        ProductQuantizer([4] * 5).fit(noise(20, 4))
    with pytest.raises(TrainingError, match="20 items cannot fill a codebook of 32 codes"):
        ProductQuantizer([32] * 2).fit(noise(20, 4))
    with pytest.raises(TrainingError, match="not fitted"):
        ProductQuantizer([4]).encode(noise(20, 4))
    with pytest.raises(IncompatibleComponentsError, match=r"\(N, 2\)"):
        ProductQuantizer([4, 4]).fit(noise(20, 4)).decode(torch.zeros(3, 1))
    for bad in (
        {"codebook_sizes": ()},
        {"codebook_sizes": (4, 0)},
        {"codebook_sizes": (4,), "few_points": "x"},
        {"codebook_sizes": (4,), "whiten": True},
        {"codebook_sizes": (4,), "rounds": -1},
    ):
        with pytest.raises(IncompatibleComponentsError):
            ProductQuantizer(**bad)


def test_fewer_items_than_codes() -> None:
    x = noise(9, 4)
    quantizer = ProductQuantizer([16, 16], few_points="duplicate").fit(x)
    assert torch.allclose(quantizer.decode(quantizer.encode(x)), x, atol=1e-4)
    assert [len(book) for book in quantizer.codebooks] == [16, 16]


@pytest.mark.parametrize("options", [{}, {"rotate": False}, {"pca_dim": 5, "whiten": True, "rounds": 2}])
def test_files_round_trip(tmp_path: Path, options: dict) -> None:
    x = mixed(200, 7)
    quantizer = ProductQuantizer((16, 8, 8), seed=5, **options).fit(x)
    path = tmp_path / "quantizer.safetensors"
    quantizer.save(path)
    loaded = ProductQuantizer.load(path)
    assert torch.equal(loaded.encode(x), quantizer.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), quantizer.decode(quantizer.encode(x)))
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_broken_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "quantizer.safetensors"
    ProductQuantizer((4, 4)).fit(noise(20, 4)).save(path)
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        ProductQuantizer.load(path)
    save_file(tensors, str(path))
    with pytest.raises(ArtifactError, match="not a product quantizer file"):
        ProductQuantizer.load(path)
    header = {"hf_genrec.product_quantizer.1": '{"codebook_sizes": [4, 4]}'}
    save_file({name: t for name, t in tensors.items() if name != "rotation"}, str(path), header)
    with pytest.raises(ArtifactError, match="rotation"):
        ProductQuantizer.load(path)
    save_file(tensors | {"rotation": torch.eye(3)}, str(path), header)
    with pytest.raises(ArtifactError, match="rotation of shape"):
        ProductQuantizer.load(path)


# --------------------------------------------------------------------------------------------- collisions and long codes


def test_colliding_items_can_move_to_the_nearest_free_code() -> None:
    x = mixed(300, 6)
    quantizer = ProductQuantizer([8, 8, 8]).fit(x)
    codes, books = quantizer.encode(x), quantizer.padded_codebooks()
    assert torch.allclose(
        sum(book[codes[:, level]] for level, book in enumerate(books)),
        quantizer.transform(quantizer.decode(codes)),
        atol=1e-3,
    )
    moved, _ = resolve_collisions(
        codes, quantizer.codebook_sizes, "next_nearest", codebooks=books, features=quantizer.transform(x)
    )
    assert len({tuple(row) for row in codes.tolist()}) < 300 == len({tuple(row) for row in moved.tolist()})


def test_a_tokenizer_takes_codes_of_32_digits(tmp_path: Path) -> None:
    """Level names go on after z (aa, ab, ...); 256 ** 32 codes overflow any integer key."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (50, 32))
    codes[7] = codes[3]  # two items with one code
    codes[9], codes[9, -1] = codes[8], (codes[8, -1] + 1) % 256  # and two that differ in the last digit alone
    tokenizer = ItemTokenizer.from_codes([f"i{n}" for n in range(50)], codes, [256] * 32)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, ItemTokenizer.from_pretrained(tmp_path)):
        assert one.vocab_size == len(one) == 4 + 32 * 256 == len(set(one.get_vocab().values()))
        batch = one.encode_histories([["i3", "i9"], ["i8"]])
        assert one.decode_histories(np.array(batch["input_ids"])) == [["i3", "i9"], ["i8"]]
        assert one.codes_to_items(codes[[3, 8, 9]]) == [["i3", "i7"], ["i8"], ["i9"]]
        text = one.decode(one.item_token_ids("i9"))
        assert text.count("<") == 32 and f"<af_{codes[9, -1]}>" in text and f"<z_{codes[9, 25]}>" in text
        assert one(text)["input_ids"] == one.item_token_ids("i9")


def test_movielens_text_gives_long_codes_that_keep_films_apart(ml100k_dir: Path, minilm_dir: Path) -> None:
    lines = (ml100k_dir / "ml-100k.item").read_text("utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    features = text_features([f"{title} ({year}) {genres}" for _, title, year, genres in rows], progress=False)
    quantizer = ProductQuantizer([64] * 16, pca_dim=128, whiten=True, rounds=3).fit(features)
    codes = quantizer.encode(features)
    used = [len(codes[:, level].unique()) for level in range(16)]
    distinct = len({tuple(row) for row in codes.tolist()})
    assert min(used) == 64 and len(np.unique(features, axis=0)) - 5 <= distinct <= len(rows)
