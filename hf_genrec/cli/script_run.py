"""One run of scripts/sft.py, dpo.py or grpo.py: its folder and checkpoints, its evaluation, its artefact.

The scripts themselves stay flat: data, model, trainer. Here is what is the same in all of them and has to be right in many
processes: checkpoints of another run are not mixed in, one process evaluates and writes, and head, tail and cold items are
compared with the model before.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_genrec.alignment.adapters import merge_item_lora
from hf_genrec.alignment.trainers.checkpoints import checkpoints
from hf_genrec.artifacts import check_target
from hf_genrec.cli.script_options import DataArguments
from hf_genrec.data.interactions import RecommendationData
from hf_genrec.data.splits import Split
from hf_genrec.errors import RequestError, TrainingError
from hf_genrec.evaluation.bucket_comparison import compare_buckets
from hf_genrec.evaluation.evaluation_report import EvaluationReport
from hf_genrec.evaluation.evaluator import evaluate, training_counts
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.hub import build_metrics, push_artifact, save_artifact
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.recipes.stages.preference import part_of_rows

logger = logging.getLogger(__name__)


@dataclass
class ScriptRun:
    """Where a run writes, and what it has to say; made by `begin` before anything is read.

    Attributes:
        folder: the artefact to write; checkpoints go to `<folder>-checkpoints`.
        args: the trainer's configuration.
        data_arguments: what is ranked and kept.
        resume: checkpoint to go on from, True for the newest whole one, None for a new run.
        push: arguments of `push_artifact`, None without `push_to_hub`.
        seconds: wall-clock seconds of the stages so far.
    """

    folder: Path
    args: Any
    data_arguments: DataArguments
    resume: str | bool | None
    push: dict[str, Any] | None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def begin(cls, args: Any, data_arguments: DataArguments) -> ScriptRun:
        """Check the target, move `args.output_dir` to the checkpoints, seed everything.

        Raises:
            ArtifactError: `output_dir` holds something that is no artefact.
            TrainingError: checkpoints of an earlier run are there and the run is not resumed.
            RequestError: `push_to_hub` without `hub_model_id`.
        """
        folder = Path(args.output_dir)
        check_target(folder)
        push = None
        if args.push_to_hub:
            if not args.hub_model_id:
                raise RequestError("push_to_hub needs a name: give --hub_model_id owner/name.")
            push = {"repo_id": args.hub_model_id, "private": args.hub_private_repo, "token": args.hub_token}
            args.push_to_hub = False  # the whole artefact goes up at the end, not the trainer's checkpoints
        args.output_dir = str(folder.with_name(f"{folder.name}-checkpoints"))
        given = args.resume_from_checkpoint
        resume = {"true": True, "false": None, "none": None}.get(str(given).lower(), given)
        args.resume_from_checkpoint = None  # resolved here
        if not resume and (old := checkpoints(args.output_dir)):
            raise TrainingError(
                f"{args.output_dir} holds checkpoints of an earlier run ({old[-1].name}): go on with "
                "--resume_from_checkpoint true, or remove them, or choose another output_dir."
            )
        set_seed(args.seed)
        return cls(folder, args, data_arguments, resume, push)

    @property
    def is_main(self) -> bool:
        """Is this the process that prints, evaluates and writes?"""
        return self.args.process_index == 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.say(f"[{name}] ...")
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.say(f"[{name}] {self.seconds[name]:.1f} s")

    def say(self, text: Any) -> None:
        if self.is_main and not self.args.disable_tqdm:
            print(text, flush=True)

    def train(self, trainer: Any, rebuild: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """Train, and give the plain model (None but in the main process) and what metrics.json says about it.

        Args:
            rebuild: makes the model as it went into the trainer, for weights that lie in pieces (FSDP, ZeRO-3).
        """
        with self.stage("training"):
            output = trainer.train(resume_from_checkpoint=self.resume)
        summary = {"steps": int(output.global_step), "train_loss": float(output.training_loss)}
        if trainer.state.best_metric is not None:
            summary["best_validation"] = float(trainer.state.best_metric)
        if self.args.world_size > 1:
            summary["processes"] = int(self.args.world_size)
        return trained_model(trainer, rebuild), summary

    def rank(self, model: Any, tokenizer: Any, data: RecommendationData, split: Split, name: str) -> dict[str, Any]:
        """Full ranking of the validation and the test part: part -> EvaluationReport."""
        users = data.user_ids if tokenizer.num_user_tokens else None
        reports = {}
        for part in ("validation", "test"):
            rows = getattr(split, part)
            if len(rows):
                reports[part] = evaluate(
                    ModelRecommender(model.to(self.args.device).eval(), tokenizer, user_ids=users),
                    part_of_rows(rows, self.data_arguments.test_users, 0),
                    num_items=data.num_items,
                    train_counts=training_counts(split.train, data.num_items),
                    repeats=data.repeats,
                    name=name,
                    progress=not self.args.disable_tqdm,
                )
        return reports

    def save(
        self,
        model: Any,
        tokenizer: Any,
        data: RecommendationData,
        split: Split,
        after: Mapping[str, EvaluationReport],
        before: Mapping[str, EvaluationReport] | None = None,
        *,
        summary: Mapping[str, Any],
        recipe: Mapping[str, Any],
        **parts: Any,
    ) -> dict[str, Any]:
        """Write the artefact, clear the checkpoints, push when asked; returns the content of metrics.json.

        Args:
            after, before: reports of `rank`; with `before` the buckets are compared, and what got worse is said.
            summary, recipe: for metrics.json and recipe.yaml.
            parts: more of `save_artifact` (`quantizer`, `item_features`).
        """
        compared = {part: compare_buckets(before[part], after[part]) for part in after} if before else {}
        for part, found in compared.items():
            self.say(f"{part}, before and after:\n{found}")
            if found.warning:
                logger.warning("%s: %s", part, found.warning)
        test, notes = after["test"], [f"{part}: {found.warning}" for part, found in compared.items() if found.warning]
        if self.data_arguments.test_users is not None:
            notes.append(f"shortened run: at most {self.data_arguments.test_users} rows of each part were ranked")
        differences = None
        if before:
            pairs = {metric: test.compare(before["test"], metric).to_dict() for metric in ("recall@10", "ndcg@10")}
            differences = {before["test"].name: pairs}
        metrics = build_metrics(
            dataset=data.name,
            protocol=split.protocol,
            seed=self.args.seed,
            test=test,
            validation=after["validation"].to_dict() if "validation" in after else None,
            baselines={before["test"].name: before["test"]} if before else {},
            differences=differences,
            buckets={part: found.to_dict() for part, found in compared.items()} or None,
            identifiers=identifier_health(tokenizer.codes, tokenizer.codebook_sizes).to_dict(),
            wall_seconds=dict(self.seconds),
            training=dict(summary),
            data=data.report.to_dict(),
            split=dict(split.report),
            notes=notes or None,
        )
        save_artifact(
            self.folder,
            model=model.cpu(),
            tokenizer=tokenizer,
            items=data.items,
            metrics=metrics,
            recipe=recipe,
            recommendation_config=recommendation_config_of(model),
            **parts,
        )
        if not self.data_arguments.keep_checkpoints:
            shutil.rmtree(self.args.output_dir, ignore_errors=True)
        self.say(f"saved to {self.folder}; reload it with hf_genrec.hub.load_artifact({str(self.folder)!r})")
        if self.push is not None:
            commit = push_artifact(self.folder, **self.push)
            self.say(f"pushed: {commit.commit_url}")
        return metrics


def trained_model(trainer: Any, rebuild: Callable[[], Any]) -> Any:
    """The plain model of a trainer, adapters merged: on the main process, None on the others.

    Weights in pieces (FSDP, DeepSpeed) are collected by all processes and put into a model made anew.

    Raises:
        TrainingError: collected weights that do not cover the model.
    """
    accelerator, model = trainer.accelerator, trainer.model
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        wrapped = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
        state = accelerator.get_state_dict(wrapped)
        if not trainer.is_world_process_zero():
            return None
        model = rebuild()
        own = model.state_dict()
        missing = set(model.load_state_dict(state, strict=False).missing_keys)
        there = {own[name].data_ptr() for name in set(own) - missing}
        lost = sorted(name for name in missing if own[name].data_ptr() not in there)  # tied weights come once
        if lost:
            raise TrainingError(f"the collected weights lack {lost[0]!r}: resume from a checkpoint in one process.")
    elif not trainer.is_world_process_zero():
        return None
    return merge_item_lora(accelerator.unwrap_model(model)).eval()
