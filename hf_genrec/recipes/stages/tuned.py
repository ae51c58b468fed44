"""A training method that ends with one choice: a number of the model's configuration, taken from the validation part.

Such numbers do not take part in training (SETRec's share of the semantic tokens in an item's score, arXiv 2502.10833), so
the trained model is ranked once per value, as validation does it (full ranking, seen items removed); the test part is not
read.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import RecipeError
from hf_genrec.evaluation.evaluator import evaluate
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.recipes.stages.context import MethodResult, TrainingJob
from hf_genrec.recipes.stages.training import next_item

METRIC = "ndcg@10"


def tuned_next_item(job: TrainingJob, *, field: str, values: Sequence[float]) -> MethodResult:
    """`next_item`, then `config.<field>` of the model = the value of `values` with the best NDCG@10 on validation.

    The first of equally good values is taken. The summary gains `chosen`: field, value, and NDCG@10 of every value.

    Raises:
        RecipeError: a field that the configuration has not, or that is no number; no values.
    """
    _check(job.model.config, field, values)
    result = next_item(job)
    found = score_values(
        result.model,
        result.tokenizer,
        job.context.split.validation,
        field,
        values,
        exclude_seen=job.args.eval_exclude_seen,
        user_ids=job.user_ids,
    )
    best = max(found, key=lambda value: found[value])
    setattr(result.model.config, field, best)
    chosen = {"field": field, "value": best, METRIC: {f"{value:g}": score for value, score in found.items()}}
    return MethodResult(result.model, result.tokenizer, result.summary | {"chosen": chosen})


def score_values(
    model: Any,
    tokenizer: Any,
    validation: EvaluationSet,
    field: str,
    values: Sequence[float],
    *,
    exclude_seen: bool = True,
    user_ids: Sequence[str] | None = None,
) -> dict[float, float]:
    """NDCG@10 on the validation rows with each value of `config.<field>`; the configuration is left as it was."""
    before, found = getattr(model.config, field), {}
    try:
        for value in values:
            setattr(model.config, field, value)
            report = evaluate(
                ModelRecommender(model, tokenizer, user_ids=user_ids),
                validation,
                num_items=tokenizer.num_items,
                ks=(10,),
                exclude_seen=exclude_seen,
                bootstrap=0,
                progress=False,
            )
            found[value] = report[METRIC]
    finally:
        setattr(model.config, field, before)
    return found


def _check(config: Any, field: str, values: Sequence[float]) -> None:
    numbers = [name for name, value in vars(config).items() if _is_number(value)]
    if field not in numbers:
        near = difflib.get_close_matches(field, numbers, n=1, cutoff=0.0)[0]
        raise RecipeError(
            f"training.method_options.field: {field!r} is no number of {type(config).__name__}: did you mean {near!r}?"
        )
    if not values or not all(_is_number(value) for value in values):
        raise RecipeError(f"training.method_options.values must be a list of numbers to choose from, got {values!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
