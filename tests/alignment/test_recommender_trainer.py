"""RecommenderTrainer: validation, batches, accumulation, NaN stop, averaging, time budget, the training function."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from trainer_cases import (
    KINDS,
    NUM_ITEMS,
    same,
    small_arguments,
    small_model,
    small_tokenizer,
    small_trainer,
    successor_split,
    weights,
)
from transformers import HfArgumentParser, TrainerCallback

from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.ranking import RankingCollator, RankingDataset, ranking_metrics, ranks_from_items
from hf_genrec.alignment.trainers.recommender import RecommenderTrainer, train_recommender
from hf_genrec.alignment.trainers.sampling import LengthBucketSampler
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.evaluation.metrics import ranks_from_topk
from hf_genrec.evaluation.recommenders import ModelRecommender


class Lengths:
    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def __len__(self):
        return len(self.lengths)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1003])
def test_sampler_yields_every_index_once(count):
    sampler = LengthBucketSampler(Lengths(np.arange(count) % 13), batch_size=8, bucket_batches=5)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(count)) and len(sampler) == count


def test_sampler_batches_have_one_length_and_are_shuffled():
    rng = np.random.default_rng(0)
    data = Lengths(rng.integers(1, 50, 4000))
    sampler = LengthBucketSampler(data, batch_size=16, bucket_batches=50)
    batches = data.lengths[np.array(list(sampler))].reshape(-1, 16)
    assert np.ptp(batches, axis=1).mean() < 2.0  # a random batch of 16 spreads over 43
    order = batches.mean(axis=1)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.2, "batches must not come sorted"
    plain = LengthBucketSampler(data, batch_size=16, bucket_batches=1)
    assert np.ptp(data.lengths[np.array(list(plain))].reshape(-1, 16), axis=1).mean() > 35


def test_sampler_is_a_function_of_seed_and_epoch():
    data = Lengths(np.arange(200) % 9)

    def order(seed, epoch):
        sampler = LengthBucketSampler(data, 8, seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)  # the global state does not matter
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3) and order(1, 2) != order(2, 2)


def test_sampler_reads_lengths_of_the_epoch():
    data = Lengths([1, 9, 1, 9])
    sampler = LengthBucketSampler(data, 2)
    assert sorted(list(sampler)[:2]) in ([0, 2], [1, 3])
    data.lengths = np.array([1, 1, 9, 9])
    assert sorted(list(sampler)[:2]) in ([0, 1], [2, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_training_batches_are_bucketed(tmp_path, kind):
    """Every target is in the batches of an epoch once, and bucketing removes padding."""
    padding = {}
    for strategy in ("group_by_length", "random"):
        trainer = small_trainer(kind, tmp_path, train_sampling_strategy=strategy)
        loader = trainer.get_train_dataloader()
        batches = list(loader)
        tokens = sum(batch["attention_mask"].numel() for batch in batches)
        padding[strategy] = 1 - sum(batch["attention_mask"].sum().item() for batch in batches) / tokens
        labels = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
        targets = sum(map(len, successor_split().train)) - len(successor_split().train)
        if kind == "tiger":
            targets = 100
        assert len(labels) == targets * trainer.model.config.num_levels
    assert padding["group_by_length"] < 0.6 * padding["random"]


# --------------------------------------------------------------------------------------------------------- validation


def test_ranks_against_brute_force():
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(20)[:8] for _ in range(200)])
    items[::7, 5:] = -1
    targets = rng.integers(0, 20, 200)
    ranks = ranks_from_items(torch.as_tensor(items), torch.as_tensor(targets)).numpy()
    assert np.array_equal(ranks, ranks_from_topk(items, targets))
    assert 0.2 < np.isfinite(ranks).mean() < 0.8
    metrics = ranking_metrics(ranks, [1, 5])
    assert metrics["recall@5"] == np.mean(ranks <= 5)
    assert metrics["ndcg@5"] == pytest.approx(np.mean([1 / math.log2(r + 1) if r <= 5 else 0 for r in ranks]))


def test_ranking_dataset_draws_a_fixed_part():
    split = successor_split()
    part = RankingDataset(split.validation, max_users=10, seed=3)
    again = RankingDataset(split.validation, max_users=10, seed=3)
    assert len(part) == 10 and np.array_equal(part.rows, again.rows)
    lengths = [len(part[i]["history"]) for i in range(10)]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_ranking_collator(kind):
    tokenizer = small_tokenizer(kind)
    levels = tokenizer.num_levels
    evaluation = EvaluationSet(
        np.arange(3), Sequences.from_rows([[1, 2, 3, 4, 2], [5], []]), np.array([7, 8, 9], np.int32)
    )
    data = RankingDataset(evaluation)
    collate = RankingCollator(tokenizer, sequence_model=kind != "tiger", max_history=3)
    batch = collate([data[i] for i in range(3)])
    assert batch["targets"].tolist() == [9, 8, 7]  # shortest history first
    assert [seen.tolist() for seen in batch["seen"]] == [[], [5], [1, 2, 3, 4]]  # all of it, not the newest three
    assert batch["input_ids"].shape == (3, 3 * levels)
    assert batch["attention_mask"].sum(1).tolist() == [0, levels, 3 * levels]
    loss_inputs = batch["loss_inputs"]
    for row, target in enumerate(batch["targets"].tolist()):
        labels = loss_inputs["labels"][row]
        assert labels[labels != -100].tolist() == tokenizer.item_token_table[target].tolist()
    if kind != "tiger":
        assert loss_inputs["input_ids"][2, -levels:].tolist() == tokenizer.item_token_table[7].tolist()
        assert loss_inputs["attention_mask"].sum(1).tolist() == [levels, 2 * levels, 4 * levels]
    assert RankingCollator(tokenizer, sequence_model=True, exclude_seen=False)([data[0]])["seen"] is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_metrics_agree_with_the_evaluator(tmp_path, kind, exclude_seen):
    """An untrained model: ranks are all over the list, and both paths must see the same ones."""
    trainer = small_trainer(kind, tmp_path, eval_exclude_seen=exclude_seen, per_device_eval_batch_size=7)
    metrics = trainer.evaluate()
    split = successor_split()
    config = trainer.model.recommendation_config.merged(max_history=10, num_beams=10)
    wrapped = ModelRecommender(trainer.model, trainer.processing_class, config)
    items = wrapped.recommend_topk(split.validation.histories, 10, exclude_seen)
    expected = ranking_metrics(ranks_from_topk(items, split.validation.targets), [1, 5, 10])
    assert 0 < expected["recall@10"] < 1
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_validation_loss_is_the_loss_of_the_target(tmp_path, kind):
    """An untrained model with one user per batch: the mean over users, whatever the lengths."""
    trainer = small_trainer(kind, tmp_path, per_device_eval_batch_size=1)
    one_by_one = trainer.evaluate()["eval_loss"]
    trainer = small_trainer(kind, tmp_path, per_device_eval_batch_size=64)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(one_by_one, rel=1e-5)


def test_model_without_ranking_is_refused(tmp_path):
    class Plain(torch.nn.Module):
        config = None

    tokenizer, split = small_tokenizer("sasrec"), successor_split()
    with pytest.raises(IncompatibleComponentsError, match="recommend_indices"):
        RecommenderTrainer(
            model=Plain(), args=small_arguments(tmp_path), eval_dataset=split.validation, processing_class=tokenizer
        )
    with pytest.raises(IncompatibleComponentsError, match="tokenizer"):
        RecommenderTrainer(
            model=small_model("sasrec", tokenizer), args=small_arguments(tmp_path), eval_dataset=split.validation
        )


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation_is_exact(tmp_path, kind):
    """Four micro batches of unequal lengths give the gradient, and the logged loss, of the one batch of all."""
    results = {}
    for micro in (16, 4):
        model = small_model(kind, small_tokenizer(kind), dropout=0.0)
        trainer = small_trainer(
            kind,
            tmp_path / str(micro),
            model=model,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=16 // micro,
            train_sampling_strategy="sequential",
            eval_strategy="no",
            save_strategy="no",
            max_steps=2,
            logging_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
        )
        trainer.train()
        results[micro] = weights(model), [e["loss"] for e in trainer.state.log_history if "loss" in e]
        lengths = [len(trainer.train_dataset[i]["items"]) for i in range(16)]
        assert len({sum(lengths[i : i + 4]) for i in range(0, 16, 4)}) > 1
    start = weights(small_model(kind, small_tokenizer(kind)))
    moved = max((results[16][0][name] - start[name]).abs().sum() for name in start)
    assert moved > 1e-3
    for name, value in results[16][0].items():
        torch.testing.assert_close(results[4][0][name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert results[4][1] == pytest.approx(results[16][1], rel=1e-5)


class _Poison(TrainerCallback):
    def __init__(self, value, step):
        self.value, self.step = value, step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).fill_(self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_loss_stops_at_once(tmp_path, value):
    trainer = small_trainer(
        "sasrec", tmp_path, callbacks=[_Poison(value, 5)], eval_strategy="steps", save_strategy="steps", save_steps=5,
        eval_steps=5,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"at step 6 .*learning_rate \(now 0\.003\)"):
        trainer.train()
    assert trainer.state.global_step == 5
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_bad_loss_on_an_accelerator_names_the_first_step(tmp_path):
    """There the loss is not read at every step; the flag lives on the device and is read before anything is saved."""
    trainer = small_trainer("sasrec", tmp_path)
    for step, loss in enumerate([1.0, 2.0, math.nan, 1.0, math.inf]):
        trainer.state.global_step = step
        trainer._watch_without_waiting(torch.tensor(loss))
    for action in (
        trainer._stop_if_not_finite,
        lambda: trainer._save_checkpoint(trainer.model, None),
        trainer.evaluate,
    ):
        with pytest.raises(TrainingError, match="at step 3"):
            action()
    assert not list(tmp_path.glob("checkpoint*"))
    trainer._first_bad_step = None
    trainer.state.global_step = 14
    trainer._watch_without_waiting(torch.tensor(math.nan))
    trainer.state.global_step = 15
    with pytest.raises(TrainingError, match="at step 15"):
        trainer._watch_without_waiting(torch.tensor(1.0))


class _Epochs(TrainerCallback):
    """Notes the epoch that the data set has at every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = train_dataloader.batch_sampler.sampler
        self.seen.append((train_dataloader.dataset.epoch, sampler.epoch))


def test_epoch_reaches_dataset_and_sampler(tmp_path):
    notes = _Epochs()
    trainer = small_trainer(
        "tiger", tmp_path, callbacks=[notes], num_train_epochs=3, eval_strategy="no", save_strategy="no"
    )
    trainer.train()
    per_epoch = math.ceil(100 / 8)
    assert notes.seen == [(epoch, epoch) for epoch in range(3) for _ in range(per_epoch)]


def test_empty_training_set(tmp_path):
    trainer = small_trainer("sasrec", tmp_path)
    trainer.train_dataset = Lengths([])
    with pytest.raises(TrainingError, match="empty"):
        trainer.train()


# ------------------------------------------------------------------------------------------- what is kept at the end


def evaluated_steps(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 11},  # in the middle of an epoch (8 steps)
        {"num_train_epochs": 1.5},
        {"num_train_epochs": 4, "eval_epochs": 3},
        {"max_steps": 11, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 4, "save_steps": 4},
    ],
)
def test_last_annealed_state_is_validated_and_saved(tmp_path, options):
    trainer = small_trainer("sasrec", tmp_path, **options)
    trainer.train()
    steps = evaluated_steps(trainer)
    assert steps[-1] == trainer.state.global_step == trainer.state.max_steps and len(set(steps)) == len(steps)
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}").is_dir()
    if "eval_epochs" in options:
        assert steps == [24, 32]


def test_best_checkpoint_is_loaded_and_kept(tmp_path):
    """The metric falls after the second evaluation: that state comes back, and its checkpoint survives rotation."""
    values = iter([0.1, 0.5, 0.2, 0.2, 0.1])
    trainer = small_trainer("sasrec", tmp_path, num_train_epochs=5)
    trainer.compute_metrics = lambda prediction: {"ndcg@10": next(values)}
    states = {}

    class Keep(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            states[state.global_step] = weights(model)

    trainer.add_callback(Keep())
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-16", "checkpoint-40"]
    assert same(weights(trainer.model), states[16]) and not same(states[16], states[40])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-16")


def test_of_equal_states_the_later_is_best(tmp_path):
    values = iter([0.1, 0.5, 0.5])
    trainer = small_trainer("sasrec", tmp_path, num_train_epochs=3)
    trainer.compute_metrics = lambda prediction: {"ndcg@10": next(values)}
    trainer.train()
    assert trainer.state.best_global_step == 24


def test_early_stopping(tmp_path):
    values = iter([0.1, 0.5, 0.2, 0.2, 0.9, 0.9])
    trainer = small_trainer("sasrec", tmp_path, num_train_epochs=6, early_stopping_patience=2)
    trainer.compute_metrics = lambda prediction: {"ndcg@10": next(values)}
    trainer.train()
    assert trainer.state.global_step == 32 and trainer.state.best_global_step == 16


# ---------------------------------------------------------------------------------------- arguments and the function


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "ndcg@7"}, "add its K to eval_ks"),
        ({"eval_ks": []}, "eval_ks"),
        ({"eval_ks": [0, 10]}, "eval_ks"),
        ({"max_history": 0}, "max_history is 0"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"max_train_seconds": 0.0}, "max_train_seconds"),
        ({"max_train_seconds": 9.0, "lr_scheduler_type": "polynomial"}, "lr_scheduler_type is polynomial"),
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "early_stopping_patience needs"),
    ],
)
def test_contradictory_arguments(tmp_path, options, message):
    with pytest.raises(TrainingError, match=message):
        small_arguments(tmp_path, **options)


def test_arguments_on_the_command_line(tmp_path):
    parser = HfArgumentParser(RecommenderTrainingArguments)
    line = f"--output_dir {tmp_path} --eval_ks 1 10 --max_train_seconds 60 --eval_exclude_seen false --ema_decay 0.99"
    (args,) = parser.parse_args_into_dataclasses(line.split())
    assert args.eval_ks == [1, 10] and args.max_train_seconds == 60.0 and args.ema_decay == 0.99
    assert args.eval_exclude_seen is False and args.metric_for_best_model == "ndcg@10" and args.greater_is_better
    assert args.logging_nan_inf_filter is False and args.report_to == [] and args.load_best_model_at_end
    assert (
        RecommenderTrainingArguments(output_dir=str(tmp_path), logging_nan_inf_filter=True).logging_nan_inf_filter
        is False
    )


@pytest.mark.parametrize("kind", KINDS)
def test_train_recommender_on_the_successor_catalogue(tmp_path, kind):
    tokenizer, split = small_tokenizer(kind), successor_split(users=150)
    epochs = {"sasrec": 12, "tiger": 14, "rq_transformer": 8}[kind]
    model = small_model(kind, tokenizer, dropout=0.0)
    batch = 32 if kind == "tiger" else 8
    options = {"learning_rate": 0.01, "eval_epochs": epochs // 2, "per_device_train_batch_size": batch}
    args = small_arguments(tmp_path, num_train_epochs=epochs, **options)
    result = train_recommender(model, tokenizer, split, args)
    metrics = result.summary
    assert metrics["validation"]["recall@1"] == 1.0
    assert metrics["steps"] == result.trainer.state.max_steps and metrics["targets_per_second"] > 0
    assert model.recommendation_config.max_history == 10, "it serves what it was trained on"
    assert not model.training
    test = result.trainer.evaluate(split.test, metric_key_prefix="test")
    assert test["test_recall@1"] == 1.0
    with pytest.raises(TrainingError, match="earlier run"):
        train_recommender(model, tokenizer, split, args)


def test_train_recommender_refuses_what_does_not_fit(tmp_path):
    tokenizer, split = small_tokenizer("sasrec"), successor_split()
    model = small_model("sasrec", tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="reads 50 items"):
        train_recommender(model, tokenizer, split, small_arguments(tmp_path, max_history=51))
    with pytest.raises(IncompatibleComponentsError, match="catalogue"):
        train_recommender(model, small_tokenizer("sasrec", NUM_ITEMS + 1), split, small_arguments(tmp_path))


def test_empty_validation_part(tmp_path):
    tokenizer, split = small_tokenizer("sasrec"), successor_split()
    nobody = EvaluationSet(np.arange(0), Sequences.from_rows([]), np.empty(0, np.int32))
    split = replace(split, validation=nobody)
    with pytest.raises(TrainingError, match="validation part is empty"):
        train_recommender(small_model("sasrec", tokenizer), tokenizer, split, small_arguments(tmp_path))


def test_train_recommender_without_evaluation(tmp_path, caplog):
    tokenizer = small_tokenizer("sasrec")
    args = small_arguments(tmp_path, num_train_epochs=1, eval_strategy="no", save_strategy="no")
    with caplog.at_level(logging.WARNING):
        result = train_recommender(
            small_model("sasrec", tokenizer), tokenizer, successor_split(), args, resume_from_checkpoint=True
        )
    assert result.summary["validation"] == {} and result.summary["steps"] == 8
    assert "training starts from the beginning" in caplog.text
