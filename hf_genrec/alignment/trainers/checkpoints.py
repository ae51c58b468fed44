"""Atomic checkpoints for Trainer: written whole or not at all, half ones skipped on resume.

transformers writes a checkpoint file by file; killed in between, it resumes from the half checkpoint and fails, or
(with only `optimizer.pt` missing) goes on silently with a fresh optimiser.

With several processes that hold the whole model each (DDP) the main one writes the folder, every process adds the state of
its own random numbers, and the folder gets its name when all have done so. Checkpoints in shards (FSDP, DeepSpeed) are
Trainer's own: their engines write from all processes at once, under names and with markers (DeepSpeed's `latest`) of their
own, and have no step in which everything is there and nothing is visible. The same for `save_on_each_node`, where no one
folder holds everything, and for tensor or context parallel models. Of those, half ones are still skipped on resume.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints
from transformers.training_args import ParallelMode
from transformers.utils import logging as transformers_logging

from hf_genrec.artifacts import MANIFEST_NAME, recover, staged_folder, verify_manifest
from hf_genrec.errors import ArtifactError, TrainingError

from .arguments import RecommenderTrainingArguments
from .averaging import WeightAverage
from .callbacks import TimeBudgetCallback

logger = logging.getLogger(__name__)

TRAINING_WEIGHTS_NAME = "training_weights.safetensors"

_NAME = re.compile(r"checkpoint-(\d+)")
# What a plain Trainer writes; trainer_state.json comes last.
_PLAIN_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def check_checkpoint(folder: str | Path) -> None:
    """Raise ArtifactError, naming what is missing, unless training can be resumed from this folder."""
    folder = Path(folder)
    recover(folder)
    if (folder / MANIFEST_NAME).exists():
        verify_manifest(folder)
    elif not folder.is_dir():
        raise ArtifactError(f"{folder} does not exist: name a checkpoint folder, or `true` for the newest.")
    for name in _PLAIN_FILES:
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{folder / name} is missing: this checkpoint is only half of one; resume from another."
            )


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoint folders, oldest step first, whole or not."""
    output_dir = Path(output_dir)
    found = [path for path in output_dir.iterdir() if _NAME.fullmatch(path.name)] if output_dir.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint (None when there is none), and why newer ones were skipped."""
    skipped = []
    for folder in reversed(checkpoints(output_dir)):
        try:
            check_checkpoint(folder)
        except ArtifactError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


@contextmanager
def _no_file_bars() -> Iterator[None]:
    """No bar per written file: the bar of the training would be torn apart at every checkpoint."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _together(failure: str) -> Iterator[None]:
    """All processes leave the block when the last one has; what stops one stops them all, or the others would wait for it.

    Raises:
        TrainingError: one of the processes raised an exception in the block.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    found = [text for text in gather_object([own and f"{type(own).__name__}: {own}"]) if text]
    if found:
        raise TrainingError(f"{failure}: {found[0]}") from own


class AtomicCheckpointTrainer(Trainer):
    """Trainer whose checkpoints are whole or absent; the base of RecommenderTrainer.

    With a weight average `model.safetensors` of a checkpoint holds the averaged weights, which were validated, and
    `training_weights.safetensors` the ones to go on from.
    """

    args: RecommenderTrainingArguments
    model: PreTrainedModel
    _average: WeightAverage | None = None

    def _resolve_checkpoint(self, resume: str | Path | bool | None) -> str | None:
        if resume is None or resume is False:
            return None
        if resume is not True:
            check_checkpoint(resume)
            return str(resume)
        folder, skipped = last_checkpoint(str(self.args.output_dir))
        for reason in skipped:
            logger.warning("checkpoint skipped: %s", reason)
        if folder is None:
            logger.warning("no whole checkpoint in %s: training starts from the beginning.", self.args.output_dir)
            return None
        logger.info("resuming from %s", folder)
        return str(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        together = self.args.world_size > 1
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or (together and not self._holds_whole_model()):
            super()._save_checkpoint(model, trial)
            return
        run_dir = Path(self._get_output_dir(trial=trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == target or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        with _no_file_bars():
            if together:
                self._save_together(target)
            else:
                with staged_folder(target) as folder:
                    self._write_checkpoint(str(folder))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _holds_whole_model(self) -> bool:
        """Does each of the processes have all weights, and do they save one folder for all of them (plain DDP)?"""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        plain = self.args.parallel_mode == ParallelMode.DISTRIBUTED and not self.args.save_on_each_node
        whole = parallelism is None or parallelism.non_data_parallel_size == 1
        return plain and whole and not self.is_distributed_loading_by_transformers

    def _save_together(self, target: Path) -> None:
        """`staged_folder` of the main process, into which every process writes its part before it gets its name.

        Raises:
            TrainingError: in all processes, where one of them could not write.
        """
        main = self.is_world_process_zero()
        with ExitStack() as stack:
            place = [""]
            with _together(f"{target} cannot be written"):
                if main:
                    place = [str(stack.enter_context(staged_folder(target)))]
            broadcast_object_list(place)
            with _together(f"{target} was not written"):
                if main:
                    self._write_checkpoint(place[0])
                elif not self.args.save_only_model and Path(place[0]).is_dir():  # a node may see other disks
                    self._save_rng_state(place[0])
            with _together(f"{target} was not put in place"):
                stack.close()

    def _write_checkpoint(self, folder: str) -> None:
        if self._average is None:
            self.save_model(folder, _internal_call=True)
        else:  # model.safetensors is what was validated; the weights under training are for resuming
            with self._average.applied():
                self.save_model(folder, _internal_call=True)
            weights = {name: p.detach().contiguous() for name, p in self._average.weights.items()}
            save_file(weights, Path(folder) / TRAINING_WEIGHTS_NAME)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(folder)
            self._save_scaler(folder)
            self._save_rng_state(folder)
        states: dict[str, Any] = {}
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                states.setdefault(type(part).__name__, []).append(part.state())
        state: Any = self.state
        state.stateful_callbacks = {name: s if len(s) > 1 else s[0] for name, s in states.items()}
        state.save_to_json(str(Path(folder) / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._average is None:
            return
        self._average = WeightAverage(self.model, self._average.decay)
        path = Path(resume_from_checkpoint) / TRAINING_WEIGHTS_NAME
        if not path.is_file():
            logger.warning(
                "%s was made without ema_decay: the average starts from its weights.", resume_from_checkpoint
            )
            return
        stored = load_file(path)
        with torch.no_grad():
            for name, parameter in self._average.weights.items():
                parameter.copy_(stored[name])

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        missing = [name for name in load_result.missing_keys if name not in tied]  # tied ones come with their source
        super()._issue_warnings_after_load(type(load_result)(missing, load_result.unexpected_keys))

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        # what was counted comes back; what was asked for is what this run asks for
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and self.args.early_stopping_patience is not None:
                callback.early_stopping_patience = self.args.early_stopping_patience
            elif isinstance(callback, TimeBudgetCallback) and self.args.max_train_seconds is not None:
                callback.max_seconds = self.args.max_train_seconds
        self.control.should_training_stop = False
        # the folder may have been moved or copied since: the best checkpoint is the one beside the others
        best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)
