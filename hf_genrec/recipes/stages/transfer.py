"""A training method that begins with a model of another domain: VQ-Rec's permutation of code vectors (arXiv 2210.12316)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hf_genrec.alignment.trainers.checkpoints import checkpoints
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.errors import IncompatibleComponentsError, RecipeError
from hf_genrec.models.auto import AutoModelForRecommendation
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob
from hf_genrec.recipes.stages.training import next_item


def transfer_codes(
    job: TrainingJob, *, source: str, permutation_epochs: float = 3.0, permutation_learning_rate: float = 0.1
) -> MethodResult:
    """First learn which code vector of the source each new code takes, everything else frozen; then train all weights.

    Args:
        source: folder or repository of a model of the same kind and sizes, trained on another catalogue.
        permutation_epochs: passes of the first step; the second has those of the recipe.
        permutation_learning_rate: of the first step, whose only weights are the logits of the permutations.

    Raises:
        RecipeError: no source.
        IncompatibleComponentsError: a source of another kind or of other sizes.
    """
    if not source:
        raise RecipeError("training.method_options.source: name the folder of a trained model of another domain.")
    summary: dict[str, Any] = {"source": str(source)}
    resumed = job.resume and checkpoints(str(job.args.output_dir))  # those hold the second step, and all weights
    if not resumed:
        old = AutoModelForRecommendation.from_pretrained(source)
        if type(old) is not type(job.model):
            raise IncompatibleComponentsError(
                f"{source}: is a {type(old).__name__}, and a {type(job.model).__name__} can take over only its own kind."
            )
        job.model.begin_transfer(old)
        args = copy.deepcopy(job.args)
        args.output_dir = str(Path(job.args.output_dir) / "permutation")
        args.num_train_epochs, args.max_steps = permutation_epochs, -1
        args.learning_rate, args.weight_decay = permutation_learning_rate, 0.0
        args.eval_epochs = 1
        first = train_recommender(
            job.model, job.tokenizer, job.context.split, args, resume_from_checkpoint=job.resume or None
        )
        job.model.end_transfer()
        summary["permutation"] = first.summary
    result = next_item(job)
    return MethodResult(result.model, result.tokenizer, result.summary | {"transfer": summary})
