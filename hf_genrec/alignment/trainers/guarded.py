"""GuardedTrainer: what every training run of ours has, as a base class for Trainer and for TRL's trainers alike.

Checkpoints are whole or absent and half ones are skipped (`checkpoints.py`); a loss that is NaN or infinite stops the run
before it reaches a checkpoint; a time budget moves the end of the schedule (`callbacks.py`); of equally good states the
later one is the best. Put it before the trainer it guards: `class MyTrainer(GuardedTrainer, SFTTrainer)`.

*Relations*: without a time budget, and as long as the loss is finite, the weights are those of the guarded trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SchedulerType

from hf_genrec.errors import TrainingError

from .callbacks import (
    EpochCallback,
    GuardFields,
    MovingProgressCallback,
    SparseEvaluationCallback,
    TimeBudgetCallback,
    check_guard_options,
    movable_scheduler,
)
from .checkpoints import AtomicCheckpointTrainer

_ACCELERATOR_CHECK_STEPS = 16


@dataclass
class GuardOptions(GuardFields):
    """Fields that a guarded run adds to the arguments of a TRL trainer: put it before TRL's class among the bases."""

    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Early stopping and time budget go on where they were."}
    )

    def __post_init__(self) -> None:
        args: Any = self
        if args.bf16 is None:  # TRL would turn it on everywhere, where a CPU only loses digits
            cuda = torch.cuda.is_available() and not args.use_cpu
            args.bf16 = cuda and not args.fp16 and torch.cuda.is_bf16_supported()
        super().__post_init__()  # type: ignore[misc]
        check_guard_options(self)


def guard_callbacks(args: Any) -> list[TrainerCallback]:
    """The callbacks of a guarded run: epochs told to the data, sparser evaluation, early stopping, time budget."""
    callbacks: list[TrainerCallback] = [EpochCallback(), SparseEvaluationCallback(args.eval_epochs)]
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
    if args.max_train_seconds is not None:
        callbacks.append(TimeBudgetCallback(args.max_train_seconds, args.train_clock))
    return callbacks


class GuardedTrainer(AtomicCheckpointTrainer):
    """See the module's text. `args` has the fields that `guard_callbacks` reads."""

    args: Any
    _first_bad_step: torch.Tensor | None = None
    _further_fix = ""  # of a loss that is not finite

    def _finish_guards(self) -> None:
        """Call it at the end of `__init__`: a bar whose end may move."""
        if self.args.max_train_seconds is not None and self.pop_callback(ProgressCallback) is not None:
            self.add_callback(MovingProgressCallback())

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any
    ) -> Any:
        """As Trainer.train; `True` means the newest whole checkpoint, or a fresh start (and says so) without one.

        Raises:
            ArtifactError: the named checkpoint is missing or only half of one.
            TrainingError: the loss is not finite.
        """
        checkpoint = self._resolve_checkpoint(resume_from_checkpoint)
        self._first_bad_step = None
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch(loss)
        return loss

    def _watch(self, loss: torch.Tensor) -> None:
        """Stop at a loss that is not finite: at once on CPU, within a few steps (but before any save) elsewhere."""
        if loss.device.type != "cpu":
            self._watch_without_waiting(loss)
        elif not math.isfinite(value := loss.item()):
            self._raise_not_finite(self.state.global_step + 1, value)

    def _watch_without_waiting(self, loss: torch.Tensor) -> None:
        """Note the first bad step on the device; it is read now and then, not at every step."""
        step = self.state.global_step + 1
        if self._first_bad_step is None:
            self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=loss.device)
        bad = ~torch.isfinite(loss) & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(bad, step, self._first_bad_step)
        if step % _ACCELERATOR_CHECK_STEPS == 0:
            self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        if self._first_bad_step is not None and (step := int(self._first_bad_step.item())) >= 0:
            self._raise_not_finite(step, math.nan)

    def _raise_not_finite(self, step: int, value: float) -> None:
        args = self.args
        raise TrainingError(
            f"the loss is {value} at step {step} (epoch {self.state.epoch or 0:.2f}), training stops. Checkpoints in "
            f"{args.output_dir} are from before. Likely fixes: a lower learning_rate (now {args.learning_rate:g}), more "
            f"warmup_steps (now {args.warmup_steps:g}), max_grad_norm 1.0 (now {args.max_grad_norm:g}), bf16 in place of "
            f"fp16{self._further_fix}."
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._stop_if_not_finite()
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._stop_if_not_finite()
        super()._save_checkpoint(model, trial)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Of equally good states the later one is the best: its learning rate is further down."""
        before, best_step = self.state.best_metric, self.state.best_global_step
        if super()._determine_best_metric(metrics, trial):
            return True
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if best_step is None or metrics.get(name) != before:
            return False
        self.state.best_global_step = self.state.global_step
        return True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.args.max_train_seconds is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.get_warmup_steps(num_training_steps)
        shape = SchedulerType(self.args.lr_scheduler_type).value
        target: Any = optimizer or self.optimizer
        self.lr_scheduler = movable_scheduler(target, shape, warmup, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: counting walks over all parameters at every step, a noticeable share of a small model's step."""
        return 0
