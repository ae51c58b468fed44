"""Training in stages: several methods one after the other on one model, each resumable, each judged by buckets.

A finished stage leaves its model in the checkpoint folder; a resumed run goes on behind the newest one. Every stage is
ranked on the validation part, and head, tail and cold items are compared with the stage before (the first one with the model
that it begins with): a better average must not hide a bucket that got worse.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer

from hf_genrec.artifacts import staged_folder, verify_manifest
from hf_genrec.errors import ArtifactError, GenRecError, RecipeError
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob
from hf_genrec.recipes.stages.judged import judged, ranked
from hf_genrec.recipes.stages.preference_checks import CHECKS

logger = logging.getLogger(__name__)
KEYS = ("method", "options", "training", "share")
_RESULT = "stage.json"


def stages(job: TrainingJob, *, stages: Sequence[dict[str, Any]]) -> MethodResult:
    """Run training methods in a row.

    Args:
        stages: mappings of `method` (a name of the table), `options` (of that method), `training` (training arguments
            that differ from the recipe's) and `share` (of the recipe's `max_train_seconds`, relative to the other stages;
            default 1).
    """
    folder = Path(str(job.args.output_dir))
    model, tokenizer, summaries, before = job.model, job.tokenizer, [], job.before
    shares = [float(stage.get("share", 1.0)) for stage in stages]
    for number, stage in enumerate(stages):  # all of them before the first one takes its hours
        if stage["method"] in CHECKS:
            try:
                CHECKS[stage["method"]](job, stage.get("options") or {}, stage.get("training") or {})
            except GenRecError as error:
                raise type(error)(f"stage {number + 1} of {len(stages)}, {stage['method']}: {error}") from error
    for number, stage in enumerate(stages):
        name = stage["method"]
        place = folder / f"stage-{number + 1}-{name}"
        finished = _finished(place, model, tokenizer) if job.resume else None
        if finished is not None:
            model, tokenizer, summary = finished
            logger.info("stage %d of %d, %s, was finished before", number + 1, len(stages), name)
        else:
            if not job.args.disable_tqdm:
                print(f"[training, stage {number + 1} of {len(stages)}: {name}] ...", flush=True)
            result = _run(job, model, tokenizer, place, stage, shares[number] / sum(shares))
            model, tokenizer, summary = result.model, result.tokenizer, result.summary
        report = _ranked(job, model, tokenizer, f"after {name}")
        summary |= judged(before, report, show=not job.args.disable_tqdm)
        before = report
        if finished is None:
            _store(place, model, tokenizer, summary)
        summaries.append({"method": name} | summary)
    return MethodResult(model, tokenizer, {"stages": summaries})


def check_stages(stages: Any, check: Any) -> None:
    """Check the list in a recipe: `check(where, method, options, training)` checks one stage.

    Raises:
        RecipeError: no list of mappings, or unknown keys.
    """
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise RecipeError(
            "training.method_options.stages must be a list of {method: ..., options: ..., training: ...}."
        )
    for number, stage in enumerate(stages):
        where = f"training.method_options.stages[{number}]"
        unknown = sorted(set(stage) - set(KEYS))
        if unknown or "method" not in stage:
            raise RecipeError(f"{where}: keys are {', '.join(KEYS)}, got {', '.join(map(str, stage))}.")
        if stage["method"] == "stages":
            raise RecipeError(f"{where}: a stage is one method, not stages again.")
        share = stage.get("share", 1.0)
        if isinstance(share, bool) or not isinstance(share, int | float) or share <= 0:
            raise RecipeError(f"{where}.share: {share!r} is no part of the training time; give a number above 0.")
        check(where, stage["method"], stage.get("options") or {}, stage.get("training") or {})


def _run(
    job: TrainingJob, model: Any, tokenizer: Any, place: Path, stage: dict[str, Any], share: float
) -> MethodResult:
    from hf_genrec.recipes.components import METHODS

    base = {name: value for name, value in job.recipe.training.items() if name not in ("method", "method_options")}
    if job.args.max_train_seconds is not None:
        base["max_train_seconds"] = job.args.max_train_seconds * share
    training = base | (stage.get("training") or {})
    known = {name: value for name, value in training.items() if hasattr(job.args, name)}
    args = replace(job.args, **known, output_dir=str(place / "running"))
    recipe = replace(job.recipe, training=training)
    own = replace(job, recipe=recipe, model=model, tokenizer=tokenizer, args=args)
    return METHODS[stage["method"]].load()(own, **(stage.get("options") or {}))


def _ranked(job: TrainingJob, model: Any, tokenizer: Any, name: str) -> Any:
    if job.before is None and str(getattr(job.args.eval_strategy, "value", job.args.eval_strategy)) == "no":
        return None
    return ranked(job, model, tokenizer, name)


def _store(place: Path, model: Any, tokenizer: Any, summary: dict[str, Any]) -> None:
    """Written by the main process; the others wait for it."""
    processes = PartialState()
    processes.wait_for_everyone()  # nobody still reads the checkpoints
    if processes.is_main_process:
        with staged_folder(place / "finished") as staged:
            model.save_pretrained(staged)
            config = getattr(model, "recommendation_config", None)
            if config is not None:
                config.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            (staged / _RESULT).write_text(json.dumps(summary, default=str), encoding="utf-8")
        shutil.rmtree(place / "running", ignore_errors=True)
    processes.wait_for_everyone()


def _finished(place: Path, model: Any, tokenizer: Any) -> tuple[Any, Any, dict[str, Any]] | None:
    """Model, tokenizer and summary of a finished stage."""
    from hf_genrec.generation.configuration_recommendation import RecommendationConfig

    folder = place / "finished"
    if not folder.is_dir():
        return None
    try:
        verify_manifest(folder)
    except ArtifactError as error:
        logger.warning("stage skipped: %s", error)
        return None
    loaded = type(model).from_pretrained(folder, dtype=model.dtype)
    loaded.recommendation_config = RecommendationConfig.from_pretrained(folder, local_files_only=True)
    return loaded, AutoTokenizer.from_pretrained(folder), json.loads((folder / _RESULT).read_text(encoding="utf-8"))
