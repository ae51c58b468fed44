"""Wordings of the five task families of P5 (arXiv 2203.13366), as data: rating, sequential, explanation, review, direct.

The families, what each asks and what it answers are the paper's; the sentences are our own. A wording is a source and a
target with fields in braces; `fill.py` turns them into segments, so that what is filled in stays text. Each family keeps at
least one wording out of training, for zero-shot tests of wordings that were never seen.

Fields: {user} "user_23"; {history} item names, oldest first; {item} an item name; {title} its title; {rating} the stars;
{candidates} item names in random order; {answer} what a question is answered with; {review}, {headline}, {explanation},
{feature} texts of an interaction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FIELDS = (
    "user", "history", "item", "title", "rating", "candidates", "answer", "review", "headline", "explanation", "feature",
)  # fmt: skip
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Template:
    """One wording of a task.

    Args:
        name: unique, the family first.
        source, target: texts with fields.
        kind: which question of the family it asks; says how the fields are filled.
        held_out: kept out of training.
    """

    name: str
    source: str
    target: str
    kind: str
    held_out: bool = False

    @property
    def family(self) -> str:
        """The part of the name before the number."""
        return self.name.split("-")[0]

    def fields(self) -> set[str]:
        """Names of the fields of source and target."""
        return set(_FIELD.findall(self.source + self.target))

    def parts(self, side: str) -> list[str | tuple[str]]:
        """Source or target cut at its fields: texts, and fields as tuples of one name.

        Example:
            >>> Template("rating-9", "stars of {user} for {item}?", "{rating}", "stars").parts("source")
            ['stars of ', ('user',), ' for ', ('item',), '?']
        """
        pieces = _FIELD.split(getattr(self, side))
        return [(piece,) if place % 2 else piece for place, piece in enumerate(pieces) if place % 2 or piece]


def _wordings(
    family: str, kind: str, pairs: list[tuple[str, str]], first: int = 1, held_out: int = 1
) -> list[Template]:
    """Numbered wordings, the last `held_out` of them for zero-shot."""
    kept = len(pairs) - held_out
    return [
        Template(f"{family}-{first + place}", source, target, kind, place >= kept)
        for place, (source, target) in enumerate(pairs)
    ]


TEMPLATES: tuple[Template, ...] = tuple(
    _wordings(
        "sequential",
        "next",
        [
            # the history comes last in all of these: then every prefix of it is a prompt too, and is trained at once
            ("next item after: {history}", "{item}"),
            ("predict what follows these items: {history}", "{item}"),
            ("{user} went through these items in this order, name the next one: {history}", "{item}"),
            ("which item comes next? so far {user} had: {history}", "{item}"),
            ("recommend the next item for a person with this list: {history}", "{item}"),
            ("given what {user} bought before, guess the coming item: {history}", "{item}"),
        ],
    )
    + _wordings(
        "direct",
        "yes_no",
        [
            ("will {user} like {item}? answer yes or no", "{answer}"),
            ("should we show {item} to {user}?", "{answer}"),
            ("{user} had: {history} is {item} a good choice now?", "{answer}"),
            ("decide with yes or no whether {item} fits {user}", "{answer}"),
        ],
    )
    + _wordings(
        "direct",
        "choose",
        [
            ("{user} had: {history} pick the best of: {candidates}", "{item}"),
            ("which of these would {user} take? {candidates}", "{item}"),
            ("choose one item for {user} from: {candidates}", "{item}"),
        ],
        first=5,
    )
    + _wordings(
        "direct",
        "yes_no_title",
        [
            ("would {user} enjoy {title}?", "{answer}"),
            ("is {title} something for {user}? yes or no", "{answer}"),
        ],
        first=8,
    )
    + _wordings(
        "rating",
        "stars",
        [
            ("how many stars does {user} give {item}?", "{rating}"),
            ("predict the rating of {item} by {user}", "{rating}"),
            ("{user} rates {item} with", "{rating}"),
            ("guess the number of stars that {item} gets from {user}", "{rating}"),
        ],
    )
    + _wordings(
        "rating",
        "stars_yes_no",
        [
            ("does {user} rate {item} with {rating} stars?", "{answer}"),
            ("yes or no: {rating} stars from {user} for {item}", "{answer}"),
        ],
        first=5,
    )
    + _wordings(
        "rating",
        "like",
        [
            ("does {user} like or dislike {item}?", "{answer}"),
            ("what is the opinion of {user} on {item}: like or dislike?", "{answer}"),
        ],
        first=7,
    )
    + _wordings(
        "explanation",
        "explain",
        [
            ("explain to {user} why {item} is recommended", "{explanation}"),
            ("{user} gave {item} {rating} stars, say why", "{explanation}"),
            ("write a reason for {user} to choose {title}", "{explanation}"),
            ("why would {user} pick {item}?", "{explanation}"),
        ],
    )
    + _wordings(
        "explanation",
        "explain_feature",
        [
            ("using the word {feature}, explain {item} to {user}", "{explanation}"),
            ("explain {item} to {user}, mention: {feature}", "{explanation}"),
        ],
        first=5,
    )
    + _wordings(
        "review",
        "headline",
        [
            ("give this review by {user} a headline: {review}", "{headline}"),
            ("sum up in a few words: {review}", "{headline}"),
            ("a short title for what {user} wrote: {review}", "{headline}"),
        ],
    )
    + _wordings(
        "review",
        "stars_of_review",
        [
            ("how many stars go with this review? {review}", "{rating}"),
            ("guess the rating of the person who wrote: {review}", "{rating}"),
        ],
        first=4,
    )
)
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(template.family for template in TEMPLATES))
SERVING: Template = TEMPLATES[0]  # the wording that `recommend` puts before a history


def wordings(family: str, kind: str | None = None, *, held_out: bool = False) -> list[Template]:
    """The wordings of a family (of one kind), those of training or those kept out of it."""
    return [
        template
        for template in TEMPLATES
        if template.family == family and template.held_out == held_out and kind in (None, template.kind)
    ]


def template_texts() -> list[str]:
    """Every sentence without its fields, and the fixed answers: what a small vocabulary should be able to write."""
    texts = [_FIELD.sub("", side) for template in TEMPLATES for side in (template.source, template.target)]
    return [text for text in texts if text.strip()] + ["yes no like dislike", "user_1 item_1"]
