"""Rows of candidate rankers: lists, yes/no rows from ratings or draws, labels, and the metrics of closed lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from candidate_training_cases import LORA, N, arguments, cases, dataset, split

from hf_genrec.alignment.trainers.candidate_data import CandidateCollator, closed_lists
from hf_genrec.alignment.trainers.candidate_metrics import auc, closed_set_answers, closed_set_metrics, list_metrics
from hf_genrec.alignment.trainers.candidate_stages import RANKER_METHODS, RankerStage
from hf_genrec.alignment.trainers.candidate_training import train_candidate_ranker
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import Split
from hf_genrec.errors import RequestError, TrainingError
from hf_genrec.models.candidate_ranker.prompts import RATED_WORDING

NONE = np.nan


# -- rows --------------------------------------------------------------------------------------------------------------


def rows_of(data) -> list[tuple]:
    samples = [data[index] for index in range(len(data))]
    return [(s["history"].tolist(), s["disliked"].tolist(), s["target"], s["label"]) for s in samples]


def test_lists_hold_the_target_once_in_a_drawn_place():
    data = dataset()
    first = [data[index] for index in range(len(data))]
    places = np.zeros(5)
    for sample in first:
        items = sample["candidates"].tolist()
        assert len(set(items)) == 5 and items.count(sample["target"]) == 1
        assert not set(items) - {sample["target"]} & set(sample["history"].tolist())
        places[items.index(sample["target"])] += 1
    expected = len(first) / 5
    assert ((places - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom, 0.1 %
    data.set_epoch(1)
    assert any(a["candidates"].tolist() != data[i]["candidates"].tolist() for i, a in enumerate(first))
    data.set_epoch(0)
    again = dataset()
    for index, sample in enumerate(first):
        for other in (data[index], again[index]):
            assert all(np.array_equal(sample[name], other[name]) for name in sample)


def test_yes_no_rows_come_from_ratings_or_from_drawn_items():
    data = dataset(pointwise=True)
    labels = [data[index]["label"] for index in range(len(data))]
    assert sum(labels) * 2 == len(labels)
    for index in range(len(data)):
        sample = data[index]
        follows = (sample["history"][-1] + 1) % N == sample["target"]  # the catalogue's rule
        assert follows == bool(sample["label"])
    rows = Sequences.from_rows([[1, 2, 3, 4], [5, 6]])
    ratings = np.array([5, 1, 4, 2, 3, 5.0])
    rated = dataset(rows, pointwise=True, ratings=ratings, split_history=True)
    assert rows_of(rated) == [([1], [], 2, 0), ([1], [2], 3, 1), ([1, 3], [2], 4, 0), ([], [5], 6, 1)]
    whole = dataset(rows, pointwise=True, ratings=ratings)  # as `recommend` reads a history
    assert rows_of(whole) == [([1], [], 2, 0), ([1, 2], [], 3, 1), ([1, 2, 3], [], 4, 0), ([5], [], 6, 1)]
    few = dataset(pointwise=True, samples=16)
    before = [few[i]["target"] for i in range(16)]
    few.set_epoch(5)
    assert len(few) == 16 and sorted(few._place.tolist()) == sorted(dataset(pointwise=True, samples=16)._place.tolist())
    assert (
        sum(a == few[i]["target"] for i, a in enumerate(before)) >= 4
    )  # the targets stay, what is drawn beside changes
    with pytest.raises(TrainingError, match="ratings"):
        dataset(ratings=np.ones(3))
    with pytest.raises(TrainingError, match="two items"):
        dataset(Sequences.from_rows([[1], []]))


@pytest.mark.parametrize("scale", [5.0, 1.0, 100.0])
def test_likes_are_relative_and_a_missing_rating_is_no_dislike(scale):
    rows = Sequences.from_rows([[1, 2, 3, 4], [5, 6]])
    ratings = scale * np.array([0.2, NONE, 0.8, 0.6, NONE, 1.0])
    data = dataset(rows, pointwise=True, ratings=ratings, split_history=True)
    assert rows_of(data) == [([], [1], 3, 1), ([3], [1], 4, 0), ([], [], 6, 1)]
    data = dataset(rows, pointwise=True, ratings=ratings, like_from=0.9 * scale)
    assert [label for *_, label in rows_of(data)] == [0, 0, 1]


def test_ratings_that_tell_nothing_apart_are_refused(tmp_path):
    rows = Sequences.from_rows([[1, 2, 3, 4], [5, 6]])
    for ratings, options, message in (
        (np.ones(6), {}, "are liked at a threshold of 0.8"),
        (np.array([1, 2, 3, 4, 5, 5.0]), {"like_from": 9}, "not liked at a threshold of 9"),
        (np.array([5, 5, 1, 5, 5, 5.0]), {"samples": 1}, "all 1 rated rows"),
        (np.full(6, NONE), {}, "with a rating"),
        (np.array(["good"] * 6), {}, "numbers"),
    ):
        with pytest.raises(TrainingError, match=message):
            dataset(rows, pointwise=True, ratings=ratings, **options)
    with pytest.raises(TrainingError, match="disliked"):
        dataset(rows, pointwise=True, split_history=True)
    model, items, _ = cases.ranker("yes_no")
    ratings = np.tile([0.0, 0.7], len(split().train.items))[: len(split().train.items)]
    options = {"stages": [RankerStage("s", ("language_model",))], "ratings": ratings}
    with pytest.raises(TrainingError, match="threshold of 3"):
        train_candidate_ranker(model, items, split(), arguments(tmp_path / "a"), like_from=3, **options)
    train_candidate_ranker(model, items, split(), arguments(tmp_path / "b", max_steps=1), **options)


@pytest.mark.parametrize("system", ["tallrec", "collm"])
@pytest.mark.parametrize("rated", [True, False])
def test_what_is_learned_from_is_what_is_served(system, rated, tmp_path, monkeypatch):
    """Tokens, slots and user vector of a training row are those that `recommend` reads for its history and item."""
    model, items, text = cases.ranker(**{**RANKER_METHODS[system].fields, "num_candidates": N})
    table = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]]
    rows = Split("leave_one_out", Sequences.from_rows(table), split().validation, split().test, {})
    ratings = np.array([5, 1, 4, NONE, 3, 5, 4, 1, 5, 1, 5.0]) if rated else None
    trained, original = [], CandidateCollator.__call__

    def collate(self, samples):
        batch = original(self, samples)
        trained.extend((self.prompts, sample, batch, place) for place, sample in enumerate(samples))
        return batch

    monkeypatch.setattr(CandidateCollator, "__call__", collate)
    train_candidate_ranker(
        model, items, rows, arguments(tmp_path, max_steps=1, per_device_train_batch_size=64),
        stages=RANKER_METHODS[system].stages, lora=LORA, ratings=ratings,
    )  # fmt: skip
    served, embed = [], model.embed

    def reading(input_ids, slot_items=None, user_BU=None):
        served.append((input_ids, slot_items, user_BU))
        return embed(input_ids, slot_items, user_BU)

    monkeypatch.setattr(model, "embed", reading)
    last = [entry for entry in trained if entry[0] == trained[-1][0]]
    assert len(last) == (8 if rated else 18)
    for _, sample, batch, place in last:
        row = next(row for row in table if sample["history"][-1] in row)
        history = row[: row.index(sample["history"][-1]) + 1]
        served.clear()
        model.recommend([[f"i{i}" for i in history]], tokenizer=items, k=N, exclude_seen=False)
        (prompt, slots, users), (behind, behind_slots, _) = served
        title, size = f'"{cases.titles()[sample["target"]]}"', len(text)
        at = next(at for at, ids in enumerate(behind) if text.decode(ids[ids < size]).startswith(title))
        continued = model.writer.target(sample["target"])
        assert behind[at][: len(continued.ids)].tolist() == continued.ids
        read = batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist()
        assert read[:-1] == prompt[0].tolist() + continued.ids
        expected = [*slots[0].tolist(), *behind_slots[at].tolist()]
        assert [i for i in batch["slot_items"][place].tolist() if i >= 0] == [i for i in expected if i >= 0]
        if system == "collm":
            vectors = model.user_vectors(batch["retriever_input_ids"], batch["retriever_attention_mask"])
            assert torch.allclose(vectors[place], users[0], atol=1e-5)


def test_a_prompt_with_liked_and_disliked_items_needs_ratings_of_the_request(tmp_path):
    model, items, text = cases.ranker("yes_no", wording=RATED_WORDING)
    shown = text.decode(model.writer.write([1, 2], (), [3]).ids)
    names = cases.titles()
    assert f'liked:\n"{names[1]}"\n"{names[2]}"\n' in shown and f'not like:\n"{names[3]}"\n' in shown
    one = model.rank_candidates([[1, 2]], [[4, 5]], disliked=[[3]])
    assert not torch.allclose(one, model.rank_candidates([[1, 2]], [[4, 5]], disliked=[[]]))
    for call in (
        lambda: model.rank_candidates([[1, 2]], [[4, 5]]),
        lambda: model.generate_answers([[1, 2]], [[4, 5]]),
        lambda: model.recommend([["i1", "i2"]], tokenizer=items),
    ):
        with pytest.raises(RequestError, match="disliked"):
            call()
    stages = [RankerStage("s", ("language_model",))]
    ratings = np.tile([1.0, 5.0], len(split().train.items))[: len(split().train.items)]
    with pytest.raises(TrainingError, match="ratings"):
        train_candidate_ranker(model, items, split(), arguments(tmp_path), stages=stages)
    with pytest.raises(TrainingError, match="eval_strategy"):
        validated = arguments(tmp_path, eval_strategy="epoch", load_best_model_at_end=False)
        train_candidate_ranker(model, items, split(), validated, stages=stages, ratings=ratings)
    train_candidate_ranker(model, items, split(), arguments(tmp_path, max_steps=1), stages=stages, ratings=ratings)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("verbalizer", ["letters", "yes_no", "title"])
def test_only_answers_are_labelled(verbalizer, side):
    model, _, text = cases.ranker(verbalizer)
    data = dataset(pointwise=verbalizer == "yes_no")
    samples = [data[index] for index in range(6)]
    batch = CandidateCollator(model, padding_side=side)(samples)
    for sample, ids, labels in zip(samples, batch["input_ids"], batch["labels"]):
        answer = text.decode(labels[labels != -100])
        if verbalizer == "letters":
            assert answer.strip() == "ABCDE"[sample["candidates"].tolist().index(sample["target"])]
        elif verbalizer == "yes_no":
            assert answer.strip() == ("Yes" if sample["label"] else "No")
            assert f'"{cases.titles()[sample["target"]]}"\nAnswer' in text.decode(ids)
        else:
            assert answer == f'"{cases.titles()[sample["target"]]}"</s>'
        assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_closed_lists_depend_on_their_row_alone():
    histories = [np.array([1, 2, 3]), np.arange(20), np.array([5])]
    targets = np.array([4, 21, 5])
    lists = closed_lists(histories, targets, 6, N)
    assert np.array_equal(lists[1:2], closed_lists(histories[1:2], targets[1:2], 6, N))
    for row, history, target in zip(lists, histories, targets):
        members = [item for item in row.tolist() if item >= 0]
        assert members.count(target) == 1 and not set(members) - {target} & set(history.tolist())
        assert len(members) == len(set(members)) == min(6, N - len({target, *history.tolist()}) + 1)
    wide = closed_lists(histories, targets, 6, 10_000)
    assert (wide >= 0).all() and len(set(wide[0].tolist())) == 6


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_answers_naming_two_candidates_are_invalid():
    shown = [["Alien", "Aliens", "Heat", ""]] * 5
    found = closed_set_answers(["I say HEAT!", "Aliens", "Alien", "Heat, Alien", ""], shown)
    assert found.tolist() == [2, -2, 0, -2, -1]
    assert closed_set_metrics(found, np.array([2, 1, 0, 0, 0])) == {
        "valid_ratio": 0.4, "hit_rate@1": 0.4, "hit_rate@1_valid": 1.0,
    }  # fmt: skip


def test_auc_by_counting_pairs():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.integers(0, 2, 60)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert np.isnan(auc(scores[:0], labels[:0]))
    table = np.array([[3.0, 1.0, -np.inf], [1.0, 2.0, 0.0]])
    assert list_metrics(table)["uauc"] == pytest.approx((1.0 + 0.5) / 2)
    assert list_metrics(table)["mrr"] == pytest.approx(0.75)
