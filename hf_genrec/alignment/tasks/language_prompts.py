"""Prompts without answers: for policy optimisation (MiniOneRec's three kinds of prompts) and for evaluation with texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import TrainingError

from .families import TaskData
from .language_families import MAX_DESCRIPTION, MAX_TITLE, NUM_CANDIDATES, LanguageFamily
from .language_mixture import check_catalogue
from .language_rows import Conversation, LanguageEncoder, Segment

if TYPE_CHECKING:
    from datasets import Dataset


def prompt_dataset(
    data: TaskData,
    encoder: LanguageEncoder,
    rows: int | EvaluationSet,
    *,
    family: str = "next_item",
    max_history: int = 20,
    num_candidates: int = NUM_CANDIDATES,
    max_title: int = MAX_TITLE,
    max_description: int = MAX_DESCRIPTION,
    held_out: bool = False,
    one_wording: bool = False,
    reserve: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Prompts of one family, each with the item that is asked for.

    Args:
        data: training rows and texts.
        encoder: makes token ids.
        rows: how many prompts to draw of the training rows, each interaction (or item) once before any comes twice; or the
            rows to evaluate, one prompt each and in their order.
        family: "family" or "family:kind".
        max_history: newest items shown as history.
        num_candidates: titles in candidate lists.
        max_title, max_description: characters shown of texts; those of training.
        held_out: use the wordings kept out of training.
        one_wording: always the family's first wording (for next_item the served one) instead of one drawn per prompt.
        reserve: tokens of `max_length` left free for the answer; default: what the answer itself takes.
        seed: of all draws.

    Returns:
        `datasets.Dataset` with columns prompt_ids (token ids), target (index of the item in `data.item_ids`), history (item
        indices of everything before it, oldest first; empty for families about items), answer_ids (token ids of the
        answer with its end), template (name of the wording).

    Raises:
        TrainingError: the data does not feed the family, or it asks yes or no (no item is the answer).
    """
    from datasets import Dataset

    check_catalogue(data, encoder)
    source = LanguageFamily(
        family,
        data,
        held_out=held_out,
        max_history=max_history,
        num_candidates=num_candidates,
        max_title=max_title,
        max_description=max_description,
        items=encoder.carries_items,
    )
    if family.partition(":")[0] in ("yes_no", "chat", "preference"):
        raise TrainingError(f"prompts of {family!r} do not ask for one item: choose another family.")
    wording = source.wordings[0] if one_wording else None
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt_ids", "target", "history", "answer_ids", "template")}
    evaluated = isinstance(rows, EvaluationSet)
    number = len(rows) if isinstance(rows, EvaluationSet) else int(rows)
    units = np.zeros(0, np.int64)
    if not evaluated:
        usable = np.arange(len(source)) if wording is None else np.flatnonzero(source.fed[0])
        if not len(usable):
            raise TrainingError(f"no training row feeds {source.wordings[0].name}, the first wording of {family!r}.")
        order = np.random.default_rng([seed, 0]).permutation(usable)
        units = np.resize(order, number)
    for place in range(number):
        generator = np.random.default_rng([seed, 1, place])
        if isinstance(rows, EvaluationSet):
            target, history = int(rows.targets[place]), rows.histories[place]
            talk = source.conversation_of(target, history, generator, wording)
            where = f"prompt {place}"
        else:
            index = int(units[place])
            target, history = _asked(source, index)
            talk = source.example(index, generator, wording)
            where = source.describe(index)
        answer = answer_ids(encoder, talk)
        columns["prompt_ids"].append(encoder.prompt(talk, where, reserve=len(answer) if reserve is None else reserve))
        columns["target"].append(target)
        columns["history"].append([int(item) for item in history])
        columns["answer_ids"].append(answer)
        columns["template"].append(talk.template)
    return Dataset.from_dict(columns)


def answer_ids(encoder: LanguageEncoder, talk: Conversation) -> list[int]:
    """Token ids of the answer of a conversation of one turn, with its end: what its row labels."""
    bare: list[Segment] = [("template", "")]
    row = encoder(Conversation(((bare, talk.turns[0][1]),), talk.template))
    return [token for token in row.labels if token >= 0]


def _asked(source: LanguageFamily, index: int) -> tuple[int, np.ndarray]:
    """The item that unit `index` is about and everything before it."""
    unit = int(source.units[index])
    if source.about_items:
        return unit, np.zeros(0, np.int32)
    items = source.data.train.items
    return int(items[unit]), items[int(source.begin[unit]) : unit]
