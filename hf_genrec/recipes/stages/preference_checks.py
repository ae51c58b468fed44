"""What the preference methods of a recipe may say, checked before data is used, and which rows their pairs are about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_genrec.alignment.negatives import NEGATIVES, PREFIX_NEGATIVES
from hf_genrec.alignment.pairs import feedback_rows, next_items, training_values
from hf_genrec.errors import RecipeError
from hf_genrec.recipes.stages.context import TrainingJob

PAIRS = ("reward", "self_play")
ITERATION_REWARDS = ("collaborative", "feedback")
FEEDBACK_COLUMN, LIKED = "rating", 4.0  # of five stars
FEEDBACK = {FEEDBACK_COLUMN: LIKED}
REWARDS = ("rule", "rank", "rule_and_rank", "semantic", "collaborative")


def check_softmax_dpo(job: TrainingJob, options: dict[str, Any], training: dict[str, Any] | None = None) -> None:
    """Raises RecipeError for choices that are unknown, or that this training would ignore; TrainingError for feedback that
    the data has not.
    """
    negatives = options.get("negatives") or "random"
    given = {name: options.get(name) for name in ("feedback_column", "liked", "disliked")}
    if negatives not in NEGATIVES:
        raise RecipeError(f"training.method_options.negatives: {negatives!r}: choose one of {', '.join(NEGATIVES)}.")
    if options.get("shared") is not None and negatives not in PREFIX_NEGATIVES:
        raise RecipeError(
            f"training.method_options.shared has no effect on {negatives} negatives: leave it out, or choose one of "
            f"{', '.join(PREFIX_NEGATIVES)}."
        )
    if negatives == "feedback":
        chosen_rows(job.context.data, job.context.split, negatives, "all", **given)
    else:
        _refuse(given, f"negatives are {negatives}, and it belongs to feedback")


def check_grpo(job: TrainingJob, options: dict[str, Any], training: dict[str, Any] | None = None) -> None:
    """Raises RecipeError for rewards that are unknown, and for options of the other kind of model."""
    reward = options.get("reward") or "rule_and_rank"
    for name, weight in (reward if isinstance(reward, dict) else {reward: 1.0}).items():
        if name not in REWARDS or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise RecipeError(f"training.method_options.reward: {name!r}: choose one of {', '.join(REWARDS)}.")
    if job.model.config.is_encoder_decoder:
        _refuse({"logprobs": options.get("logprobs")}, "an encoder-decoder's loss has the softmax of its own head")
    else:
        _refuse({"sft_weight": options.get("sft_weight") or None}, "the trainer of language models has no such loss")


def check_iterative_preference(
    job: TrainingJob, options: dict[str, Any], training: dict[str, Any] | None = None
) -> None:
    """Raises RecipeError for choices that are unknown or without effect; TrainingError for feedback that the data has not.

    Args:
        training: training arguments of the stage itself; default those of the recipe.
    """
    pairs, reward = options.get("pairs") or "reward", options.get("reward")
    if pairs not in PAIRS or reward not in (None, *ITERATION_REWARDS):
        raise RecipeError(
            f"training.method_options: pairs {pairs!r}, reward {reward!r}: choose of {', '.join(PAIRS)}, and of "
            f"{', '.join(ITERATION_REWARDS)}."
        )
    if pairs == "self_play":
        _refuse({"reward": reward}, "pairs are self_play, which has none")
    else:
        _refuse({"num_negatives": options.get("num_negatives")}, "pairs are by reward, of one item each")
    if reward != "feedback":
        _refuse({"feedback": options.get("feedback")}, "it belongs to the reward feedback")
    else:
        for column in options.get("feedback") or FEEDBACK:
            training_values(job.context.data, column, job.context.split.train)
    if training is None:  # inside stages, what is left of the recipe's own is meant for the others too
        training = job.recipe.training if "method" in job.recipe.training else {}
    asked = training.get("eval_strategy")
    if asked not in (None, "no"):
        raise RecipeError(
            f"training.eval_strategy {asked!r}: iterative_preference ranks the validation part after every round and "
            "nowhere else; leave it out."
        )


CHECKS = {
    "softmax_dpo": check_softmax_dpo,
    "grpo": check_grpo,
    "iterative_preference": check_iterative_preference,
}


def _refuse(given: dict[str, Any], why: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise RecipeError(f"training.method_options.{name} {value!r} has no effect: {why}; leave it out.")


def chosen_rows(
    data: Any,
    split: Any,
    negatives: str,
    targets: str,
    *,
    feedback_column: str | None = None,
    liked: float | None = None,
    disliked: float | None = None,
) -> tuple[Any, Any, Any]:
    """What users chose in the training and in the validation part, and for "feedback" what each rejected (else None).

    Raises:
        TrainingError: "feedback" and the data has no such column, or nothing that is liked or disliked.
    """
    if negatives != "feedback":
        return next_items(split.train, targets=targets), split.validation, None  # type: ignore[arg-type]
    bound = LIKED if liked is None else liked
    column = feedback_column or FEEDBACK_COLUMN
    return feedback_rows(data, split, column=column, liked=bound, disliked=disliked, targets=targets)  # type: ignore[arg-type]


def pairs_path(output_dir: Any) -> Path:
    """Where the pairs of a run stay whose trainer writes to `output_dir`: beside the artefact, not among its checkpoints, which
    go; in `output_dir` where that is no place of checkpoints.

    Example:
        >>> str(pairs_path("runs/a-checkpoints")), str(pairs_path("runs/a-checkpoints/stage-2-softmax_dpo/running"))
        ('runs/a-pairs.parquet', 'runs/a-stage-2-pairs.parquet')
    """
    path = Path(str(output_dir))
    folder = next((one for one in (path, *path.parents) if one.name.endswith("-checkpoints")), None)
    if folder is None:
        return path / "pairs.parquet"
    inside = path.relative_to(folder).parts
    stage = f"-{'-'.join(inside[0].split('-')[:2])}" if inside else ""
    return folder.with_name(f"{folder.name.removesuffix('-checkpoints')}{stage}-pairs.parquet")
