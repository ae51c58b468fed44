"""Item features: text vectors against a plain loop, the co-occurrence SVD against numpy, joining and projecting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from hf_genrec.data.cooccurrence import cooccurrence
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, TrainingError
from hf_genrec.identifiers.features import (
    DAMPING,
    PrincipalComponents,
    concatenate,
    cooccurrence_svd,
    pca,
    standardise,
    text_features,
)

WORDS = ["toy", "story", "the", "lion", "king", "heat", "casino", "seven", "babe", "get", "shorty", "red", "blue"]
TEXTS = ["toy story", "heat", "the lion king red blue", "", "heat", "seven babe get shorty " * 3]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 16 dimensions that reads at most 12 tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, model_max_length=12)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=12, **sizes)).save_pretrained(folder)
    return folder


def one_by_one(folder: Path, texts: list[str], pooling: str = "mean") -> np.ndarray:
    """Each text alone: no padding, no sorting, nothing shared with the code under test."""
    tokenizer, model = BertTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    vectors = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state[0]
        vector = states.mean(0) if pooling == "mean" else states[0]
        vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_text_vectors_are_masked_means_of_length_one(tiny_encoder: Path, batch_size: int) -> None:
    vectors = text_features(TEXTS, tiny_encoder, batch_size=batch_size, progress=False)
    assert vectors.dtype == np.float32 and vectors.shape == (6, 16)
    np.testing.assert_allclose(vectors, one_by_one(tiny_encoder, TEXTS), atol=2e-6)
    assert np.array_equal(vectors[1], vectors[4])  # equal texts, equal bits


def test_text_options(tiny_encoder: Path, tmp_path: Path) -> None:
    raw = text_features(TEXTS, tiny_encoder, normalise=False, progress=False)
    unit = text_features(TEXTS, tiny_encoder, progress=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit, atol=1e-6)
    prefixed = text_features(["story"], tiny_encoder, prefix="toy ", progress=False)
    np.testing.assert_allclose(prefixed, unit[:1], atol=2e-6)
    first = text_features(TEXTS, tiny_encoder, pooling="cls", progress=False)
    np.testing.assert_allclose(first, one_by_one(tiny_encoder, TEXTS, "cls"), atol=2e-6)
    short = text_features(["toy story heat"], tiny_encoder, max_length=4, progress=False)  # [CLS] toy story [SEP]
    np.testing.assert_allclose(short, unit[:1], atol=2e-6)
    with pytest.raises(IncompatibleComponentsError, match="pooling"):
        text_features(TEXTS, tiny_encoder, pooling="max", progress=False)


def test_the_folder_says_how_to_pool(tiny_encoder: Path, tmp_path: Path) -> None:
    for file in tiny_encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    vectors = text_features(["toy story heat"], tmp_path, progress=False)
    np.testing.assert_allclose(vectors, one_by_one(tiny_encoder, ["toy story"], "cls"), atol=2e-6)


def test_text_errors_name_the_row(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ItemTableError, match="item row 1 is float"):
        text_features(["a", float("nan")], tiny_encoder)
    with pytest.raises(ItemTableError, match="no item texts"):
        text_features([], tiny_encoder)
    with pytest.raises(IncompatibleComponentsError, match="cannot be loaded"):
        text_features(["a"], tmp_path)


def test_minilm_knows_what_is_alike(minilm_dir: Path) -> None:
    texts = ["Star Wars (1977) Sci-Fi", "Return of the Jedi (1983) Sci-Fi", "Pride and Prejudice (1995) Romance"]
    default = text_features(texts, progress=False)
    assert np.array_equal(default, text_features(texts, minilm_dir, progress=False))
    similarity = default @ default.T
    assert similarity[0, 1] > similarity[0, 2] + 0.1 and default.shape == (3, 384)


# ------------------------------------------------------------------------------------------------------- co-occurrence


def random_rows(num_rows: int, num_items: int, seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    return Sequences.from_rows([rng.integers(0, num_items, rng.integers(2, 12)).tolist() for _ in range(num_rows)])


def damped(matrix: np.ndarray, damping: str) -> np.ndarray:
    if damping == "log":
        return np.log(1 + matrix)
    if damping == "sqrt":
        return matrix**0.5
    if damping == "ppmi":
        joint = matrix / matrix.sum()
        expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(joint > 0, np.maximum(np.log(joint / expected), 0), 0)
    return matrix


@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize(("num_items", "dim"), [(600, 6), (40, 6), (8, 7), (5, 12)])
def test_directed_svd_is_the_best_low_rank_product(damping: str, num_items: int, dim: int) -> None:
    train = random_rows(200, num_items)
    source, target = cooccurrence_svd(train, num_items, dim, window=4, damping=damping, directed=True)
    matrix = damped(cooccurrence(train, num_items, window=4).toarray(), damping)
    left, values, right = np.linalg.svd(matrix)
    rank = min(dim, num_items)
    np.testing.assert_allclose(
        source @ target.T, (left[:, :rank] * values[:rank]) @ right[:rank], atol=1e-4 * values[0], rtol=0
    )
    assert source.shape == target.shape == (num_items, dim) and source.dtype == np.float32
    np.testing.assert_allclose((source**2).sum(0)[:rank], values[:rank], rtol=1e-3, atol=1e-5 * values[0])
    np.testing.assert_allclose((source**2).sum(0), (target**2).sum(0), rtol=1e-3, atol=1e-5 * values[0])


def test_undirected_svd_is_blind_to_order() -> None:
    rows = [[0, 1, 2, 3], [3, 4, 5, 0], [2, 2, 6, 7, 1]] * 5 + [[7, 8, 9, 10, 11]]
    forward = cooccurrence_svd(Sequences.from_rows(rows), 12, 4)
    backward = cooccurrence_svd(Sequences.from_rows([row[::-1] for row in rows]), 12, 4)
    np.testing.assert_allclose(forward, backward, atol=1e-6)


def test_directed_svd_knows_what_comes_next() -> None:
    rows = [[(start + step) % 30 for step in range(8)] for start in range(30)]
    source, target = cooccurrence_svd(Sequences.from_rows(rows), 30, 25, directed=True, damping="none")
    assert ((source @ target.T).argmax(1) == (np.arange(30) + 1) % 30).all()


@pytest.mark.parametrize("num_items", [60, 700])
def test_svd_is_deterministic_and_leaves_the_global_random_state_alone(num_items: int) -> None:
    train = random_rows(300, num_items)
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    first = cooccurrence_svd(train, num_items, 8, directed=True)
    assert np.array_equal(np.random.get_state()[1], state)
    np.random.seed(1)
    second = cooccurrence_svd(train, num_items, 8, directed=True)
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    source = first[0]
    assert (source[np.abs(source).argmax(0), np.arange(8)] > 0).all()


@pytest.mark.parametrize("num_items", [20, 700])
def test_unseen_items_and_missing_rank_give_zeros(num_items: int) -> None:
    train = Sequences.from_rows([[0, 1], [1, 0], [2, 3]])
    source, target = cooccurrence_svd(train, num_items, 6, directed=True, damping="none")
    assert np.isfinite(source).all() and np.abs(source[4:]).max() < 1e-6 and np.abs(source[:, 3:]).max() == 0
    expected = np.zeros((num_items, num_items))
    expected[0, 1] = expected[1, 0] = expected[2, 3] = 1
    np.testing.assert_allclose(source @ target.T, expected, atol=1e-6)
    for _ in range(5):  # equal singular values and a rank below dim: where ARPACK draws vectors
        again, _ = cooccurrence_svd(train, num_items, 6, directed=True, damping="none")
        assert np.array_equal(again, source)


def test_svd_errors() -> None:
    with pytest.raises(TrainingError, match="damping must be one of"):
        cooccurrence_svd(random_rows(5, 5), 5, 2, damping="cube")
    with pytest.raises(TrainingError, match="no two items co-occur"):
        cooccurrence_svd(Sequences.from_rows([[0], [1]]), 2, 2)


# ------------------------------------------------------------------------------------------------- joining, projecting


def test_standardise() -> None:
    x = np.random.default_rng(0).normal(3, 2, (50, 4))
    x[:, 2] = 7
    scaled = standardise(x)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std(0), [1, 1, 0, 1], atol=1e-6)


def test_pca_against_the_svd_and_back() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(80, 3)) @ rng.normal(size=(3, 7)) + 5).astype(np.float32)  # rank 3
    projected = pca(x, 3)
    _, _, right = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(projected), np.abs((x - x.mean(0)) @ right[:3].T), atol=1e-3)
    np.testing.assert_allclose(pca(x, 3, whiten=True).std(0, ddof=1), 1, atol=1e-4)
    for whiten in (False, True):
        fitted = PrincipalComponents.fit(torch.tensor(x), 3, whiten=whiten)
        torch.testing.assert_close(fitted.invert(fitted.apply(torch.tensor(x))), torch.tensor(x), atol=1e-4, rtol=0)
        again = PrincipalComponents.from_tensors(fitted.tensors())
        assert torch.equal(again.apply(torch.tensor(x)), fitted.apply(torch.tensor(x)))
    # directions without variance are not blown up by whitening
    assert np.isfinite(pca(x, 7, whiten=True)).all() and np.abs(pca(x, 7, whiten=True)).max() < 100
    assert np.array_equal(pca(-x, 2), -pca(x, 2))  # signs are fixed by the components, not by chance


def test_concatenate_shares_the_variance() -> None:
    rng = np.random.default_rng(0)
    text, behaviour = rng.normal(2, 5, (100, 8)), rng.normal(0, 0.01, (100, 3))
    behaviour[3] = 0
    joined = concatenate(text, behaviour)
    share = (joined**2).sum(1).mean()
    assert joined.shape == (100, 11) and joined.dtype == np.float32 and share == pytest.approx(1, rel=1e-5)
    assert (joined[:, :8] ** 2).sum(1).mean() == pytest.approx(0.5, rel=1e-5)
    weighted = concatenate(text, behaviour, weights=[3, 1])
    assert (weighted[:, 8:] ** 2).sum(1).mean() == pytest.approx(0.25, rel=1e-5)
    rows = concatenate(text, behaviour, scale="row", centre=False)
    length = np.linalg.norm(rows[:, 8:], axis=1)
    assert length[3] == 0 and np.allclose(np.delete(length, 3), 0.5**0.5, atol=1e-6)
    assert np.allclose(concatenate(text, scale="none", centre=False), text)
    for bad in ({"weights": [1]}, {"weights": [0, 0]}, {"scale": "column"}):
        with pytest.raises(IncompatibleComponentsError):
            concatenate(text, behaviour, **bad)
    with pytest.raises(IncompatibleComponentsError, match="different items"):
        concatenate(text, behaviour[:5])
