"""The reward model of OneRec: it learns what each column says, ignores what is unknown, and is saved whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from hf_genrec.alignment.reward_model import FeedbackRows, ItemRewardModel, train_reward_model
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import TrainingError


def arguments(folder, **options):
    values = {"per_device_train_batch_size": 32, "num_train_epochs": 15, "learning_rate": 1e-2, "use_cpu": True,
              "report_to": [], "disable_tqdm": True, "save_strategy": "no"}  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**values, **options})


def taste(users: int = 120, seed: int = 0) -> tuple[Sequences, dict[str, np.ndarray]]:
    """Users keep to even or to odd items; "like": an item of the user's kind; "long": item below 10."""
    rng = np.random.default_rng(seed)
    rows, likes = [], []
    for user in range(users):
        kind = user % 2
        own = rng.permutation(np.arange(kind, 20, 2))[:5]
        foreign = rng.permutation(np.arange(1 - kind, 20, 2))[:2]
        rows.append(np.concatenate([own[:3], foreign, own[3:]]))
        likes += [1, 1, 1, 0, 0, 1, 1]
    sequences = Sequences.from_rows(rows)
    return sequences, {"like": np.array(likes, float), "long": (sequences.items < 10).astype(float)}


def test_columns_are_learned_apart_and_the_history_counts(tmp_path):
    sequences, labels = taste()
    torch.manual_seed(0)
    model = ItemRewardModel(20, list(labels), hidden_size=16)
    train_reward_model(model, FeedbackRows(sequences, labels, 20), arguments(tmp_path))
    even, odd = np.array([2, 6, 14]), np.array([3, 7, 15])
    items = np.array([[4, 5, 16, 17]] * 2)
    like = ItemRewardModel(20, list(labels), [1.0, 0.0], hidden_size=16)
    like.load_state_dict(model.state_dict())
    scores = like.score_items([even, odd], items)
    assert scores[0, 0] > scores[0, 1] + 0.3 and scores[0, 2] > scores[0, 3] + 0.3  # even items after even items
    assert scores[1, 1] > scores[1, 0] + 0.3 and scores[1, 3] > scores[1, 2] + 0.3
    long = ItemRewardModel(20, list(labels), [0.0, 1.0], hidden_size=16)
    long.load_state_dict(model.state_dict())
    scores = long.score_items([even, odd], items)
    assert (scores[:, :2].min() > scores[:, 2:].max() + 0.3).all()
    both = model.score_items([even, odd], items)
    np.testing.assert_allclose(both, like.score_items([even, odd], items) + scores, atol=1e-5)


def test_save_and_load_and_short_histories(tmp_path):
    torch.manual_seed(0)
    model = ItemRewardModel(9, ["like", "share"], [1.0, 0.5], hidden_size=8, max_history=3)
    model.save_pretrained(tmp_path)
    again = ItemRewardModel.from_pretrained(tmp_path)
    past, items = [np.array([1, 2, 3, 4]), np.array([], int)], np.array([[5, 6], [5, 6]])
    np.testing.assert_array_equal(model.score_items(past, items), again.score_items(past, items))
    assert again.columns == ["like", "share"] and again.weights == [1.0, 0.5]
    cut = [np.array([2, 3, 4]), np.array([], int)]
    np.testing.assert_allclose(model.score_items(past, items), model.score_items(cut, items), atol=1e-6)
    alone = model.score_items(past[1:], items[1:])  # padding beside a longer history changes nothing
    np.testing.assert_allclose(model.score_items(past, items)[1:], alone, atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}


def test_unknown_labels_teach_nothing():
    torch.manual_seed(0)
    model = ItemRewardModel(9, ["like", "share"], hidden_size=8)
    labels = torch.tensor([[[1.0, torch.nan], [0.0, torch.nan]]])
    model(torch.tensor([[1, 2, -1]]), torch.tensor([[3, 4]]), labels)["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in model.towers[1].parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.towers[0].parameters())


def test_rows_and_their_negatives():
    sequences = Sequences.from_rows([[1, 2, 3], [4, 0]])
    rows = FeedbackRows(sequences, {"like": np.array([1, 0, np.nan, 1, 1])}, 6, num_negatives=2)
    row = rows[2]
    assert row["history"].tolist() == [1, 2] and row["items"][0] == 3 and np.isnan(row["labels"][0]).all()
    assert not set(row["items"][1:]) & {1, 2, 3} and (row["labels"][1:] == 0).all()
    first = [rows[place]["items"] for place in range(5)]
    rows.set_epoch(1)
    assert [rows[place]["items"] for place in range(5)] != first
    everything = FeedbackRows(Sequences.from_rows([[0, 1]]), {"like": np.array([1, 1])}, 2, num_negatives=2)[1]
    assert len(everything["items"]) == 3 and np.isnan(everything["labels"][1:]).all()


def test_bad_input(tmp_path):
    sequences, labels = taste(4)
    with pytest.raises(TrainingError, match="column 'like' must be 28 values of 0 or 1"):
        FeedbackRows(sequences, {"like": labels["like"] * 5}, 20)
    with pytest.raises(TrainingError, match="no interaction"):
        FeedbackRows(Sequences.from_rows([[]]), {"like": np.zeros(0)}, 20)
    with pytest.raises(TrainingError, match="2 columns and 1 weights"):
        ItemRewardModel(20, ["a", "b"], [1.0])
    with pytest.raises(TrainingError, match="2 label columns for a model of 1"):
        train_reward_model(ItemRewardModel(20, ["like"]), FeedbackRows(sequences, labels, 20), arguments(tmp_path))
