"""One row of preference data: prompt, chosen answer, rejected answers, all as token ids; the checks every door makes.

The data format is TRL's: columns `prompt`, `chosen` and `rejected`, where `rejected` is one answer (DPO) or a list of
answers (S-DPO, arXiv 2406.09215). The same row as token ids has the columns `prompt_ids`, `chosen_ids` and
`rejected_ids` (one list of ids, or a list of such lists); trainers of this library read these where they exist, since
text of strangers, encoded as text, could forge special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_genrec.errors import TrainingError

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
TEXT_COLUMNS = ("prompt", "chosen", "rejected")
WINDOW = "window"  # optional column: rows of one window have prompts that are beginnings of one another


def as_answers(rejected: Any) -> list[Any]:
    """`rejected` as a list of answers, whether it holds one answer or several.

    Example:
        >>> as_answers([4, 5]), as_answers([[4, 5], [6]]), as_answers("b"), as_answers(["b", "c"])
        ([[4, 5]], [[4, 5], [6]], ['b'], ['b', 'c'])
    """
    if isinstance(rejected, str):
        return [rejected]
    answers = list(rejected or [])
    if answers and isinstance(answers[0], (int, dict)):  # token ids or messages of one answer
        return [answers]
    return answers


def check_answers(row: int | str, prompt: Any, chosen: Any, rejected: Sequence[Any]) -> None:
    """One row is fit for training.

    Args:
        row: its number, for messages.
        prompt, chosen: token ids, or text.
        rejected: the rejected answers, of the same kind.

    Raises:
        TrainingError: an empty prompt or answer, no rejected answer, one named twice, or the chosen one among them.
    """
    if not len(prompt):
        raise TrainingError(f"row {row}: the prompt is empty; leave out rows without a history.")
    if not len(chosen):
        raise TrainingError(f"row {row}: the chosen answer is empty; every row needs one.")
    if not len(rejected):
        raise TrainingError(f"row {row}: there is no rejected answer; give at least one, or leave the row out.")
    seen: dict[Any, int] = {}
    target = _key(chosen)
    for place, answer in enumerate(rejected):
        if not len(answer):
            raise TrainingError(f"row {row}: rejected answer {place} is empty; remove it.")
        key = _key(answer)
        if key == target:
            raise TrainingError(
                f"row {row}: rejected answer {place} equals the chosen one; remove it. (Items that share a code are "
                "one answer to a model: pass groups=code_groups(tokenizer) to the sampler of negatives.)"
            )
        if key in seen:
            raise TrainingError(
                f"row {row}: rejected answers {seen[key]} and {place} are the same; remove one of them."
            )
        seen[key] = place


def _key(answer: Any) -> Any:
    if isinstance(answer, str):
        return answer
    return tuple(json.dumps(part, sort_keys=True, default=str) if isinstance(part, dict) else part for part in answer)


def check_length(row: int | str, prompt: int, answers: Sequence[int], limit: int | None) -> None:
    """Prompt and longest answer fit into `limit` tokens; a cut answer would be another answer.

    Raises:
        TrainingError: they do not.
    """
    if limit is not None and prompt + max(answers) > limit:
        raise TrainingError(
            f"row {row}: {prompt} prompt tokens and an answer of {max(answers)} tokens exceed max_length={limit}; "
            "cut histories when building the pairs (max_history or max_prompt_tokens), or raise max_length."
        )
