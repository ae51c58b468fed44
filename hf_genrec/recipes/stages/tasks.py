"""Training method "tasks": one text-to-text model on a weighted mixture of task families (P5, arXiv 2203.13366)."""

from __future__ import annotations

from typing import Any

from hf_genrec.alignment.tasks.families import TaskData
from hf_genrec.alignment.tasks.fill import ExampleEncoder
from hf_genrec.alignment.tasks.mixture import TaskCollator, serving_prompt, task_mixture
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob


def tasks(
    job: TrainingJob, *, families: dict[str, Any] | None = None, group: int = 16, max_items: int = 10
) -> MethodResult:
    """Train on texts of several families; the sequential wording that serves becomes the model's prompt.

    Args:
        families: family -> weight, 1.0 = one pass per epoch (see `TaskMixtureDataset`); default: sequential alone.
        group: pairs of the other families per sample.
        max_items: history items that wordings of the other families show.
    """
    model, tokenizer, args = job.model, job.tokenizer, job.args
    encoder = ExampleEncoder(tokenizer)
    packed = bool(getattr(model.config, "causal_encoder", False))
    mixture = task_mixture(
        TaskData.from_split(job.context.data, job.context.split),
        encoder,
        families or {"sequential": 1.0},
        packed=packed,
        window=args.max_history,
        max_items=max_items,
        group=group,
        seed=args.seed,
    )
    model.config.prompt_ids = serving_prompt(encoder)
    trained = train_recommender(
        model,
        tokenizer,
        job.context.split,
        args,
        train_dataset=mixture,
        data_collator=TaskCollator(tokenizer.pad_token_id, packed=packed),
        resume_from_checkpoint=job.resume or None,
    )
    return MethodResult(trained.model, tokenizer, trained.summary | {"samples_per_family": mixture.counts})
