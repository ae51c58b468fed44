"""Weight averaging, and the time budget with its movable schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trainer_cases import same, small_trainer, weights
from transformers import TrainerCallback, get_scheduler

from hf_genrec.alignment.trainers import callbacks
from hf_genrec.alignment.trainers.averaging import WeightAverage
from hf_genrec.alignment.trainers.callbacks import MovableSchedule, movable_scheduler


def evaluated_steps(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]


# ------------------------------------------------------------------------------------------------- weight averaging


def test_average_formula():
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, 0.9)
    expected = 1.0
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.applied():
        assert model.weight.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert model.weight.flatten().tolist() == [199.0, 199.0]


def test_average_off_and_decay_zero_are_plain_training(tmp_path):
    plain = small_trainer("sasrec", tmp_path / "plain", eval_strategy="no", save_strategy="no")
    plain.train()
    zero = small_trainer("sasrec", tmp_path / "zero", eval_strategy="no", save_strategy="no", ema_decay=0.0)
    zero.train()
    assert same(weights(plain.model), weights(zero.model))


def test_average_is_validated_saved_and_kept(tmp_path):
    trainer = small_trainer("sasrec", tmp_path, ema_decay=0.9, num_train_epochs=3, learning_rate=0.02)
    raw = {}

    class Keep(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            raw[state.global_step] = weights(model)

    trainer.add_callback(Keep())
    trainer.train()
    best = trainer.state.best_global_step
    logged = next(e for e in trainer.state.log_history if e["step"] == best and "eval_loss" in e)
    assert not same(weights(trainer.model), raw[best]), "the model must be the average"
    folder = tmp_path / f"checkpoint-{best}"
    loaded = type(trainer.model).from_pretrained(folder)
    assert same(weights(loaded), weights(trainer.model))
    again = trainer.evaluate()
    assert again["eval_loss"] == logged["eval_loss"] and again["eval_ndcg@10"] == logged["eval_ndcg@10"]


# ------------------------------------------------------------------------------------------------------- time budget


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant_with_warmup", "constant"])
def test_movable_schedule_that_is_not_moved_is_the_usual_one(shape):
    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(optimizer)
        seen = []
        for _ in range(100):
            seen.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return seen

    usual = rates(lambda o: get_scheduler(shape, o, num_warmup_steps=10, num_training_steps=100))
    assert rates(lambda o: movable_scheduler(o, shape, 10, 100)) == pytest.approx(usual, abs=1e-12)


def test_schedule_ends_at_zero_and_warms_up_in_short_runs():
    schedule = MovableSchedule("cosine", warmup=50, total=20)
    rates = [schedule(step) for step in range(21)]
    assert rates[5] == 1.0 and rates[20] == pytest.approx(0.0, abs=1e-12) and max(rates) == 1.0


class _Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class _Passing(TrainerCallback):
    """Each step takes 1 s (2 s from step 60 on); an evaluation takes 5 s."""

    def __init__(self, clock):
        self.clock, self.rates = clock, []

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.clock.now += 1.0 if state.global_step < 60 else 2.0
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=clock))
    return clock


def budget_trainer(folder, clock, budget, **options):
    trainer = small_trainer("sasrec", folder, max_train_seconds=budget, callbacks=[_Passing(clock)], **options)
    inner = trainer.evaluation_loop

    def slow(*args, **kwargs):
        clock.now += 5.0
        return inner(*args, **kwargs)

    trainer.evaluation_loop = slow
    return trainer


def test_time_budget_is_kept_and_annealed(tmp_path, clock):
    trainer = budget_trainer(tmp_path, clock, 200.0, num_train_epochs=100)
    trainer.train()
    assert 180 <= clock.now <= 200, "evaluations, saves and the slow-down are inside the budget, and it is used"
    assert trainer.state.global_step == trainer.state.max_steps < 800
    rates = next(c for c in trainer.callback_handler.callbacks if isinstance(c, _Passing)).rates
    assert rates[-1] < 0.02 * max(rates)
    assert evaluated_steps(trainer)[-1] == trainer.state.global_step


def test_time_budget_that_suffices_changes_nothing(tmp_path, clock):
    trainer = budget_trainer(tmp_path / "budget", clock, 1e6, num_train_epochs=2)
    trainer.train()
    plain = small_trainer("sasrec", tmp_path / "plain", num_train_epochs=2)
    plain.train()
    assert trainer.state.global_step == plain.state.global_step == 16
    assert same(weights(trainer.model), weights(plain.model))


def test_time_budget_is_resumed(tmp_path, clock):
    trainer = budget_trainer(tmp_path, clock, 200.0, num_train_epochs=100)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 45:
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    planned = trainer.state.max_steps
    clock.now = 0.0
    again = budget_trainer(tmp_path, clock, 200.0, num_train_epochs=100)
    seen = []

    class See(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
            seen.append((state.global_step, state.max_steps, lr_scheduler.lr_lambdas[0].total))

    again.add_callback(See())
    again.train(resume_from_checkpoint=True)
    step, max_steps, total = seen[0]
    assert step == 40 and max_steps == total and abs(max_steps - planned) < 20, "the stored plan, not 800 steps"
    used = 40 + 5 * 5  # steps and evaluations before that checkpoint
    assert 170 - used <= clock.now <= 205 - used
