"""The training method of most recipes: the next item of every position, identifiers fixed."""

from __future__ import annotations

from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob


def next_item(job: TrainingJob) -> MethodResult:
    """Train the model on the split with `train_recommender`; the tokenizer stays as it is."""
    trained = train_recommender(
        job.model,
        job.tokenizer,
        job.context.split,
        job.args,
        user_ids=job.user_ids,
        resume_from_checkpoint=job.resume or None,
    )
    return MethodResult(trained.model, job.tokenizer, trained.summary)
