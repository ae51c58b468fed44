"""train_jointly: tokenizer and recommender trained in turn, each with the other frozen (ETEGRec, arXiv 2409.05546).

A schedule is a list of phases. In a *tokenizer* phase the recommender is frozen and what gives the items their identifiers
is trained; at its end the items are named anew, and tokenizer, model and trie move to the next index version together
(`versions.CatalogueIndex`). In a *recommender* phase the identifiers stand. The last phase is the recommender's: by then
the identifiers are frozen for good.

Both kinds of phases are runs of `train_recommender`, so they have its stop at a loss that is not finite, its weight average
and its time budget. Optimiser and learning-rate schedule begin anew with each phase; before the last phase the rate is
held after the warm-up, because there is nothing to anneal towards.

Every finished phase leaves `<output_dir>/phase-K` (model, tokenizer, history), written whole or not at all; a resumed run
goes on behind the newest of them, and in the last phase from Trainer's own checkpoints.

Relations: a schedule of one recommender phase is `train_recommender`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.torch import load_model
from transformers import AutoTokenizer

from hf_genrec.artifacts import staged_folder, verify_manifest
from hf_genrec.data.splits import Split
from hf_genrec.errors import ArtifactError, TrainingError

from .arguments import RecommenderTrainingArguments
from .checkpoints import checkpoints
from .recommender import COLLATORS, train_recommender, training_layout
from .versions import CatalogueIndex

logger = logging.getLogger(__name__)

TOKENIZER, RECOMMENDER = "tokenizer", "recommender"
_STATE = "phase.json"


class JointModel(Protocol):
    """What a model must offer beside being trainable by `train_recommender`."""

    config: Any

    def start_phase(self, side: str, *, aligned: bool = True) -> None:
        """Make `side` ("tokenizer" or "recommender") the one that learns: freeze the other, choose the loss.

        `aligned=False` leaves out the terms that tie the two sides together.
        """

    def set_catalogue(self, item_codes: Any) -> None:
        """Take over new codes (N, L) of the same layout."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Args:
        side: "tokenizer" or "recommender": who learns.
        epochs: passes over the training set.
        aligned: are the terms that tie the two sides together part of the loss?
        final: the last phase: validated and annealed as the arguments say.
    """

    side: str
    epochs: float
    aligned: bool = True
    final: bool = False


def alternating_schedule(
    cycles: int,
    *,
    tokenizer_epochs: float = 1,
    recommender_epochs: float = 1,
    warm_epochs: float = 0,
    final_epochs: float = 0,
    aligned_at_end: bool = True,
) -> list[Phase]:
    """`warm_epochs` of the recommender alone, then `cycles` times tokenizer and recommender, then the recommender.

    Args:
        cycles: how often the identifiers change; 0 = never.
        final_epochs: of the recommender after the last cycle; the identifiers are frozen for good by then.
        aligned_at_end: keep the alignment terms in the last phase.

    Raises:
        TrainingError: nothing to train, or a tokenizer phase with no recommender phase behind it.

    Example:
        >>> [(phase.side, phase.epochs) for phase in alternating_schedule(1, recommender_epochs=3, final_epochs=5)]
        [('tokenizer', 1), ('recommender', 3), ('recommender', 5)]
    """
    phases = [Phase(RECOMMENDER, warm_epochs, aligned=False)]
    for _ in range(cycles):
        phases += [Phase(TOKENIZER, tokenizer_epochs), Phase(RECOMMENDER, recommender_epochs)]
    phases.append(Phase(RECOMMENDER, final_epochs, aligned=aligned_at_end and cycles > 0))
    phases = [phase for phase in phases if phase.epochs > 0]
    if not phases or phases[-1].side != RECOMMENDER:
        raise TrainingError(
            "the schedule must end with the recommender, which has to learn the last identifiers: set recommender_epochs "
            "or final_epochs above 0."
        )
    return [*phases[:-1], dataclasses.replace(phases[-1], final=True)]


@dataclass
class JointResult:
    """What `train_jointly` gives: the model, the tokenizer of the last index version, and a summary."""

    model: Any
    tokenizer: Any
    summary: dict[str, Any]


class JointTrainer:
    """Runs a schedule; `train_jointly` is the way in.

    Args:
        model: see `JointModel`.
        tokenizer: of the model's catalogue.
        split: as for `train_recommender`.
        args: of all phases; `output_dir` holds the phases' folders.
        reassign: `reassign(model, tokenizer)` -> codes (N, L) of all items by the model's present tokenizer side.
        tokenizer_args, final_args: arguments that differ in tokenizer phases, and in the last phase.
        user_ids: as for `train_recommender`.
        progress: print a line per phase.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        split: Split,
        args: RecommenderTrainingArguments,
        reassign: Callable[[Any, Any], np.ndarray],
        *,
        tokenizer_args: dict[str, Any] | None = None,
        final_args: dict[str, Any] | None = None,
        user_ids: Sequence[str] | None = None,
        progress: bool = True,
    ) -> None:
        self.index = CatalogueIndex(model, tokenizer)
        self.model, self.split, self.args, self.reassign = model, split, args, reassign
        self.tokenizer_args, self.final_args = tokenizer_args or {}, final_args or {}
        self.user_ids, self.progress = user_ids, progress
        self.folder = Path(str(args.output_dir))
        self.history: list[dict[str, Any]] = []
        self.used_seconds = self.used_budget = 0.0
        self._clock = time.process_time if args.train_clock == "cpu" else time.perf_counter

    def run(self, schedule: Sequence[Phase], *, resume: bool = False) -> JointResult:
        """Run what is left of the schedule."""
        done = self._restore(len(schedule)) if resume else self._check_empty()
        last: dict[str, Any] = {}
        for number in range(done, len(schedule)):
            last = self._phase(number, schedule, resume and number == done)
        self.model.start_phase(RECOMMENDER)
        self.model.eval()
        last = last or (self.history[-1]["training"] if self.history else {})
        summary = dict(last) | {
            "index_version": self.index.version,
            "phases": [{k: v for k, v in entry.items() if k != "training"} for entry in self.history],
            "train_seconds": self.used_seconds,
        }
        return JointResult(self.model, self.index.tokenizer, summary)

    # ------------------------------------------------------------------------------------------------------ one phase

    def _phase(self, number: int, schedule: Sequence[Phase], resume: bool) -> dict[str, Any]:
        phase, index = schedule[number], self.index
        started, budget_started = time.perf_counter(), self._clock()
        running = self.folder / f"phase-{number}-running"
        if not resume:
            shutil.rmtree(running, ignore_errors=True)
        args = self._arguments(number, schedule, running)
        self.model.start_phase(phase.side, aligned=phase.aligned)
        result = train_recommender(
            self.model,
            index.tokenizer,
            self.split,
            args,
            data_collator=index.collator(COLLATORS[training_layout(self.model)]),
            user_ids=self.user_ids,
            resume_from_checkpoint=True if resume and checkpoints(running) else None,
        )
        changed = index.reassign(self.reassign(self.model, index.tokenizer)) if phase.side == TOKENIZER else 0
        seconds = time.perf_counter() - started
        self.used_seconds += seconds
        self.used_budget += self._clock() - budget_started
        entry = {
            "phase": number,
            "side": phase.side,
            "epochs": phase.epochs,
            "train_loss": result.summary["train_loss"],
            "codes_changed": changed,
            "index_version": index.version,
            "seconds": round(seconds, 2),
        }
        losses = getattr(self.model, "phase_losses", None)
        if losses is not None:
            entry["losses"] = losses()
        if result.summary["validation"]:
            entry["validation"] = result.summary["validation"]
        self.history.append(entry | {"training": result.summary})
        if self.progress:
            print(_line(entry, len(schedule)), flush=True)
        self._store(number)
        shutil.rmtree(running, ignore_errors=True)
        return result.summary

    def _arguments(self, number: int, schedule: Sequence[Phase], running: Path) -> RecommenderTrainingArguments:
        phase, args = schedule[number], self.args
        changes: dict[str, Any] = {
            "output_dir": str(running),
            "num_train_epochs": float(phase.epochs),
            "seed": args.seed + number,  # a phase is repeatable by itself: resuming behind another gives the same bits
            "data_seed": None,
        }
        if args.max_train_seconds is not None:
            left = sum(other.epochs for other in schedule[number:])
            rest = max(1.0, args.max_train_seconds - self.used_budget)
            changes["max_train_seconds"] = rest * phase.epochs / left
        if not phase.final:
            changes |= {"eval_strategy": "no", "save_strategy": "no", "early_stopping_patience": None}
            changes |= {"lr_scheduler_type": "constant_with_warmup"}
        if phase.side == TOKENIZER:
            changes |= {"ema_decay": None} | self.tokenizer_args
        elif phase.final:
            changes |= self.final_args
        return dataclasses.replace(args, **changes)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _check_empty(self) -> int:
        if old := finished_phases(self.folder):
            raise TrainingError(
                f"{self.folder} holds phases of an earlier run ({old[-1].name}), which this one would mix up with its own: "
                "resume, remove them, or choose another output_dir."
            )
        return 0

    def _store(self, number: int) -> None:
        state = {
            "version": self.index.version,
            "used_seconds": self.used_seconds,
            "used_budget": self.used_budget,
            "history": self.history,
        }
        with staged_folder(self.folder / f"phase-{number}") as folder:
            self.model.save_pretrained(folder)
            self.index.tokenizer.save_pretrained(folder)
            (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
        if number:  # the newest is all that a resumed run needs
            shutil.rmtree(self.folder / f"phase-{number - 1}", ignore_errors=True)

    def _restore(self, phases: int) -> int:
        """Load the newest whole phase; the number of the next one."""
        for folder in reversed(finished_phases(self.folder)):
            number = int(folder.name.removeprefix("phase-"))
            try:
                verify_manifest(folder)
            except ArtifactError as error:
                logger.warning("phase skipped: %s", error)
                continue
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            self.index.adopt(AutoTokenizer.from_pretrained(str(folder), local_files_only=True), state["version"])
            load_model(self.model, str(folder / "model.safetensors"))
            self.history = state["history"]
            self.used_seconds, self.used_budget = state["used_seconds"], state["used_budget"]
            if number >= phases:
                raise TrainingError(
                    f"{folder} is phase {number + 1} of a longer schedule than the {phases} phases asked for: remove it, or "
                    "resume with the schedule it was made with."
                )
            return number + 1
        logger.warning("no finished phase in %s: training starts from the beginning.", self.folder)
        return 0


def train_jointly(
    model: Any,
    tokenizer: Any,
    split: Split,
    args: RecommenderTrainingArguments,
    schedule: Sequence[Phase],
    reassign: Callable[[Any, Any], np.ndarray],
    *,
    resume: bool = False,
    **options: Any,
) -> JointResult:
    """Train tokenizer and recommender in turn.

    Args:
        model, tokenizer, split, args, reassign: see `JointTrainer`.
        schedule: see `alternating_schedule`.
        resume: go on behind the newest finished phase in `args.output_dir`.
        options: further arguments of `JointTrainer`.

    Returns:
        `summary` is that of the last phase, with `phases` (side, loss, codes changed, index version, seconds of each),
        `index_version` and the seconds of all phases together.

    Raises:
        TrainingError: as `train_recommender`, or `output_dir` holds another run's phases.
        IncompatibleComponentsError: new codes of another layout, or a batch with the codes of another index version.
    """
    return JointTrainer(model, tokenizer, split, args, reassign, **options).run(schedule, resume=resume)


def finished_phases(folder: str | Path) -> list[Path]:
    """Folders of the finished phases of a run in `folder`, oldest first."""
    found = [path for path in Path(folder).glob("phase-*") if path.name.removeprefix("phase-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("phase-")))


def _line(entry: dict[str, Any], phases: int) -> str:
    parts = [f"phase {entry['phase'] + 1}/{phases} {entry['side']}: {entry['epochs']:g} epochs"]
    parts.append(f"loss {entry['train_loss']:.4f}")
    parts += [f"{name} {value:.4f}" for name, value in entry.get("losses", {}).items()]
    if entry["side"] == TOKENIZER:
        parts.append(f"{entry['codes_changed']} items renamed, index version {entry['index_version']}")
    if "ndcg@10" in entry.get("validation", {}):
        parts.append(f"validation ndcg@10 {entry['validation']['ndcg@10']:.4f}")
    return ", ".join([*parts, f"{entry['seconds']:.1f} s"])
