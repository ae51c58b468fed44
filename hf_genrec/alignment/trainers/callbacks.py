"""Callbacks of RecommenderTrainer: epochs told to the data, sparser evaluation, a time budget with an annealed
schedule."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, ProgressCallback

from hf_genrec.errors import TrainingError

logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """Calls `set_epoch` of the training set, its sampler and its collator when an epoch begins (also the resumed one)."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        epoch = state.global_step // steps
        sampler = getattr(train_dataloader.batch_sampler, "sampler", None)
        for part in (train_dataloader.dataset, sampler, train_dataloader.collate_fn):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


class SparseEvaluationCallback(TrainerCallback):
    """Evaluates and saves every `eval_epochs` epochs only, and always at the end: the last annealed state is a
    candidate."""

    def __init__(self, eval_epochs: int = 1) -> None:
        self.eval_epochs = int(eval_epochs)

    def on_epoch_end(self, args, state, control, **kwargs):
        last = control.should_training_stop or state.global_step >= state.max_steps
        if not last and round(state.epoch) % self.eval_epochs:
            if args.eval_strategy == "epoch":
                control.should_evaluate = False
            if args.save_strategy == "epoch":
                control.should_save = False
        return control


SCHEDULE_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
}


class MovableSchedule:
    """Learning-rate factor by step: linear warm-up, then a shape over `total` steps, which may still change.

    LambdaLR stores the attributes of a callable object with the scheduler, so `total` comes back on resume.
    """

    def __init__(self, shape: str, warmup: int, total: int) -> None:
        self.shape, self.warmup, self.total = shape, int(warmup), int(total)

    def __call__(self, step: int) -> float:
        warmup = 0 if self.shape == "constant" else min(self.warmup, self.total // 4)
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, self.total - warmup)
        return SCHEDULE_SHAPES[self.shape](min(1.0, max(0.0, progress)))


def movable_scheduler(optimizer: Optimizer, shape: str, warmup: int, total: int) -> LambdaLR:
    """A LambdaLR whose length the TimeBudgetCallback can move."""
    return LambdaLR(optimizer, MovableSchedule(shape, warmup, total))


class TimeBudgetCallback(TrainerCallback, ExportableState):
    """Ends training, evaluation included, after about `max_seconds`, with the learning rate annealed by then.

    Step and evaluation times are measured; from them follows how many steps fit, and that number becomes
    `state.max_steps` and the length of the schedule. It is planned first after 10 % of the budget (at most 20 s) and
    then revised, oftener towards the end. The number of steps can only stay below what `num_train_epochs` or
    `max_steps` ask for.

    Plan and used seconds are saved with the checkpoint: a resumed run goes on with the same schedule and the rest of
    the budget. (Revisions after that follow the clock: a run with a time budget is not repeatable bit by bit.)

    Args:
        max_seconds: Seconds from the start of the first step.
        clock: "wall", or "cpu" for processor seconds of this process (all its threads), which do not depend on what
            else the machine does.
    """

    def __init__(self, max_seconds: float, clock: str = "wall") -> None:
        self.max_seconds, self.clock = float(max_seconds), clock
        self._now = time.process_time if clock == "cpu" else time.perf_counter
        self.used_seconds = 0.0  # by the runs before this one
        self.overhead_seconds = 0.0  # evaluating and saving
        self.evaluations = 0
        self.planned_steps: int | None = None
        self._start: float | None = None
        self._mark = self._next_plan = 0.0
        self._last_plan = (0.0, 0)

    def state(self) -> dict[str, Any]:
        return {
            "args": {"max_seconds": self.max_seconds, "clock": self.clock},
            "attributes": {
                "used_seconds": self.elapsed(),
                "overhead_seconds": self.overhead_seconds,
                "evaluations": self.evaluations,
                "planned_steps": self.planned_steps,
            },
        }

    def elapsed(self) -> float:
        """Seconds used so far, by all runs of this training."""
        return self.used_seconds + (0.0 if self._start is None else self._now() - self._start)

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = self._mark = self._now()
        self.asked_steps = state.max_steps
        self._next_plan = max(self.elapsed(), min(20.0, self.max_seconds / 10))
        self._last_plan = (self.elapsed() - self.overhead_seconds, state.global_step)
        if self.planned_steps is not None:
            self._set(state, self.planned_steps, **kwargs)

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        self._mark = self._now()
        if self.elapsed() < self._next_plan or state.global_step >= state.max_steps:
            return control
        # revise oftener towards the end, where an error can no longer be made good
        rest = self.max_seconds - self.elapsed()
        self._next_plan = self.elapsed() + min(self.max_seconds / 20, max(rest / 4, self.max_seconds / 200))
        steps = self._fitting_steps(args, state, train_dataloader)
        self._set(state, steps, **kwargs)
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        self._mark = self._now()

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations += 1
        self._count_overhead()

    def on_save(self, args, state, control, **kwargs):
        self._count_overhead()

    def _count_overhead(self) -> None:
        now = self._now()
        self.overhead_seconds += now - self._mark
        self._mark = now

    def _fitting_steps(self, args, state, train_dataloader) -> int:
        elapsed = self.elapsed()
        training = elapsed - self.overhead_seconds
        done_seconds, done_steps = self._last_plan  # the newest steps tell best how fast the machine is now
        step_seconds = (training - done_seconds) / max(1, state.global_step - done_steps)
        self._last_plan = (training, state.global_step)
        evaluation = self.overhead_seconds / self.evaluations if self.evaluations else 0.0
        interval = self._evaluation_interval(args, state, train_dataloader)
        rest = self.max_seconds - elapsed - evaluation
        if not self.evaluations and args.eval_strategy != "no":
            rest *= 0.9  # nothing is known yet about the evaluation at the end
        cost = step_seconds + (evaluation / interval if interval else 0.0)
        return state.global_step + max(0, int(rest / max(cost, 1e-9)))

    @staticmethod
    def _evaluation_interval(args, state, train_dataloader) -> float:
        if args.eval_strategy == "steps":
            return state.eval_steps
        if args.eval_strategy == "epoch" and train_dataloader is not None:
            return len(train_dataloader) / args.gradient_accumulation_steps * getattr(args, "eval_epochs", 1)
        return 0

    def _set(self, state, steps: int, lr_scheduler=None, **kwargs) -> None:
        steps = min(steps, self.asked_steps)
        if self.planned_steps is None:
            logger.info(
                "time budget of %.0f s: %d steps planned (asked: %d)", self.max_seconds, steps, self.asked_steps
            )
        self.planned_steps = state.max_steps = steps
        for schedule in getattr(lr_scheduler, "lr_lambdas", []):
            if isinstance(schedule, MovableSchedule):
                schedule.total = steps


class MovingProgressCallback(ProgressCallback):
    """The progress bar, for a number of steps that may change."""

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None and self.training_bar.total != state.max_steps:
            self.training_bar.total = state.max_steps
        super().on_step_end(args, state, control, **kwargs)


@dataclass
class GuardFields:
    """Options of every guarded run, for our arguments and TRL's; `check_guard_options` checks them."""

    eval_epochs: int = field(default=1, metadata={"help": "With eval_strategy epoch: every so many epochs."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )
    max_train_seconds: float | None = field(
        default=None, metadata={"help": "Upper bound of the training time; the schedule is annealed to fit it."}
    )
    train_clock: str = field(
        default="wall",
        metadata={
            "help": "What max_train_seconds counts: wall, or cpu (processor seconds, comparable on a busy machine).",
            "choices": ["wall", "cpu"],
        },
    )


def check_guard_options(args: Any) -> None:
    """Options that a guarded run adds to its arguments.

    Raises:
        TrainingError: a value out of range, or options that contradict each other (fields named).
    """
    for name in ("eval_epochs", "early_stopping_patience"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise TrainingError(f"{name} is {getattr(args, name)}: it must be at least 1.")
    if args.early_stopping_patience is not None and str(getattr(args.eval_strategy, "value", "")) == "no":
        raise TrainingError("early_stopping_patience needs evaluations: set eval_strategy to epoch or steps.")
    if args.train_clock not in ("wall", "cpu"):
        raise TrainingError(f"train_clock is {args.train_clock!r}: choose wall or cpu.")
    if args.max_train_seconds is not None:
        if args.max_train_seconds <= 0:
            raise TrainingError(f"max_train_seconds is {args.max_train_seconds}: it must be positive.")
        shape = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if shape not in SCHEDULE_SHAPES:
            raise TrainingError(
                f"lr_scheduler_type is {shape}: with max_train_seconds use one of {', '.join(SCHEDULE_SHAPES)}."
            )
