"""What alignment did to head, tail and cold items: the same validation users ranked before its first step and after it.

The model before is the one that training begins with: a base model with fresh item rows, or what an earlier stage made.
Ranking it takes nothing from the training: not its time budget, not its random numbers, not the mode or place of its model.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hf_genrec.evaluation.bucket_comparison import compare_buckets
from hf_genrec.evaluation.evaluation_report import EvaluationReport
from hf_genrec.evaluation.evaluator import evaluate, training_counts
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.recipes.components import MODELS
from hf_genrec.recipes.stages.context import TrainingJob
from hf_genrec.recipes.stages.preference import part_of_rows

logger = logging.getLogger(__name__)
METRICS = ("recall@10", "ndcg@10")
_LANGUAGE = frozenset({"language_model", "language_base"})


def compares(job: TrainingJob) -> bool:
    """Is this run compared with the model that it begins with?

    Not those that align nothing, not candidate rankers (whose "before" is their retriever), and not runs that rank no
    validation users: with `eval_strategy` "no" and without `eval_users`.
    """
    gives = MODELS[job.recipe.model["type"]].gives
    aligns = job.recipe.stage == "alignment" or bool(gives & _LANGUAGE)
    validates = str(getattr(job.args.eval_strategy, "value", job.args.eval_strategy)) != "no"
    return aligns and "ranks_candidates" not in gives and (validates or job.args.eval_users is not None)


def ranked_before(job: TrainingJob) -> EvaluationReport | None:
    """The report of the job's model as it comes, searched as it is served once trained; None without validation users."""
    place = job.model.device
    first = job.recipe.training.get("method_options") or {}
    if "stages" in first:
        first = first["stages"][0].get("options") or {}
    level = True if first.get("item_head", "full") != "full" else None
    with _own_random_numbers():
        model = job.model.to(job.args.device)
        report = ranked(job, model, job.tokenizer, "before training", restrict_to_level=level)
    job.model.to(place)  # what is added to it before training begins is drawn there
    return report


def ranked(job: TrainingJob, model: Any, tokenizer: Any, name: str, **search: Any) -> EvaluationReport | None:
    """Full ranking of the run's validation users (`eval_users` of them, always the same); None where there are none.

    Args:
        search: fields of the model's recommendation configuration that are others here; None leaves one as it is.
    """
    split = job.context.split
    if not len(split.validation.targets):
        return None
    config = recommendation_config_of(model).merged(**search)
    if config.max_history is None:  # the length that training reads
        config = config.merged(max_history=job.args.max_history)
    return evaluate(
        ModelRecommender(model, tokenizer, config, user_ids=job.user_ids),
        part_of_rows(split.validation, job.args.eval_users, 0),
        num_items=job.context.num_items,
        ks=[10],
        train_counts=training_counts(split.train, job.context.num_items),
        name=name,
        progress=False,
    )


def judged(before: EvaluationReport | None, after: EvaluationReport | None, show: bool) -> dict[str, Any]:
    """Entries of a training stage in metrics.json: `validation` after it, and `buckets` where there is a before.

    The comparison is printed with `show`; a bucket that got worse is logged as a warning in any case.
    """
    if after is None:
        return {}
    entries: dict[str, Any] = {"validation": {metric: after[metric] for metric in METRICS}}
    if before is not None:
        entries["buckets"] = compared(before, after, show)
    return entries


def compared(before: EvaluationReport, after: EvaluationReport, show: bool) -> dict[str, Any]:
    """`compare_buckets` as plain values, printed with `show`; what got worse is logged as a warning."""
    found = compare_buckets(before, after)
    if show:
        print(found, flush=True)
    if found.warning:
        logger.warning(found.warning)
    return found.to_dict()


def bucket_warnings(*comparisons: Mapping[str, Any] | None) -> list[str]:
    """The sentences of what got worse, for the notes of a run and its card."""
    return [found["warning"] for found in comparisons if found and found["warning"]]


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards all generators stand where they stood."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
