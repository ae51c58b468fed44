"""Wordings of the task families for language models, as data: item tokens and texts in one conversation.

Families and what they ask are those of LC-Rec (arXiv 2311.09049: next_item, item_to_index, index_to_item, fused_history,
item_search, preference), LLaRA (2312.02445) and S-DPO (2406.09215) (candidates), LlamaRec (2311.02089) (candidate_letters),
TALLRec (2305.00447) (yes_no), BIGRec (2308.08434) and GenRec (2307.00457) (fused_history, titles to title); "chat" holds
conversations of several turns. The sentences are our own. Each kind of question keeps at least one wording out of training.

A wording is a list of turns, each what the user says and what the assistant answers, with fields in braces. Lists of a
history ({history}, {titles}, {liked}, {disliked}) lose their oldest entries where a row would grow too long.

Fields: {history} item tokens, oldest first; {item}, {next} the item and the one after it, as tokens; {title}, {next_title},
{description}, {genres} texts of them; {titles} titles of the history; {liked}, {disliked} the same by rating; {intention}
what somebody looks for; {preference} what somebody likes; {candidates}, {lettered} titles with numbers or letters, {letter}
the right one; {answer} "Yes." or "No.".
"""

from __future__ import annotations

from dataclasses import dataclass

from .templates import Template

LANGUAGE_FIELDS = (
    "history", "item", "next", "title", "next_title", "description", "genres", "titles", "liked", "disliked", "intention",
    "preference", "candidates", "lettered", "letter", "answer",
)  # fmt: skip


@dataclass(frozen=True)
class Wording:
    """One wording of a task for language models.

    Args:
        name: unique, the family first.
        turns: user and assistant, each turn a `Template` (source and target).
        kind: which question of the family it asks; says how the fields are filled.
        held_out: kept out of training.
    """

    name: str
    turns: tuple[Template, ...]
    kind: str
    held_out: bool = False

    @property
    def family(self) -> str:
        """The part of the name before the number."""
        return self.name.split("-")[0]

    def fields(self) -> set[str]:
        """Names of the fields of all turns."""
        return set().union(*(turn.fields() for turn in self.turns))


Turns = tuple[tuple[str, str], ...]

# family -> kind -> wordings; the last one of every kind is held out
_TEXTS: dict[str, dict[str, list[Turns]]] = {
    "next_item": {
        # the history comes last in all of these: then a whole window of it can be trained at once
        "next": [
            (("Next item after this history: {history}", "{item}"),),
            (("A person took these items, oldest first. Which one follows? {history}", "{item}"),),
            (("Continue the list of items: {history}", "{item}"),),
            (("Recommend one more item to somebody who had: {history}", "{item}"),),
            (("Read the history and name the item that comes next. History: {history}", "{item}"),),
            (("What will this person choose after these? {history}", "{item}"),),
            (("Guess the next choice from the earlier ones: {history}", "{item}"),),
            (("Items taken so far, in order of time: {history}", "{item}"),),
            (("You know what was taken before. Say what is taken now. Before: {history}", "{item}"),),
            (("Predict the item that belongs at the end of: {history}", "{item}"),),
        ]
    },
    "item_to_index": {
        "title": [
            (("Which item has the title {title}?", "{item}"),),
            (("Give the item that is called {title}.", "{item}"),),
            (("Title: {title}. Item:", "{item}"),),
            (("Write the item whose name is {title}.", "{item}"),),
        ],
        "description": [
            (("Which item is described like this? {description}", "{item}"),),
            (("Find the item from its description: {description}", "{item}"),),
            (("Name the item that these words are about: {description}", "{item}"),),
        ],
        "title_description": [
            (("Which item is called {title} and described as follows? {description}", "{item}"),),
            (("Title: {title}. Description: {description} Item:", "{item}"),),
        ],
    },
    "index_to_item": {
        "title": [
            (("What is the title of {item}?", "{title}"),),
            (("Say what {item} is called.", "{title}"),),
            (("Item: {item}. Title:", "{title}"),),
            (("Tell me the name of {item}.", "{title}"),),
        ],
        "description": [
            (("Describe {item}.", "{description}"),),
            (("What kind of thing is {item}? Describe it in words.", "{description}"),),
            (("Write the description of {item}.", "{description}"),),
        ],
        "genres": [
            (("Which groups does {item} belong to?", "{genres}"),),
            (("Name the categories of {item}.", "{genres}"),),
        ],
    },
    "fused_history": {
        "items_to_title": [
            (("Say the title of the next item after: {history}", "{title}"),),
            (("Which title would somebody with this list choose next? {history}", "{title}"),),
            (("A person had {history} and now takes one more. What is it called?", "{title}"),),
            (("What is the name of the item that follows {history}?", "{title}"),),
        ],
        "titles_to_item": [
            (("Next item for somebody who had: {titles}", "{item}"),),
            (("These titles were taken, oldest first: {titles}. Recommend an item.", "{item}"),),
            (("Which item follows {titles}?", "{item}"),),
            (("Read these titles and give the next item: {titles}", "{item}"),),
        ],
        "titles_to_title": [
            (("Recommend one more title to somebody who had: {titles}", "{title}"),),
            (("These titles were taken, oldest first: {titles}. Which title comes next?", "{title}"),),
            (("Titles so far: {titles}. Name another one that fits.", "{title}"),),
            (("What should a person choose after {titles}?", "{title}"),),
        ],
    },
    "item_search": {
        "search": [
            (("Find an item for this wish: {intention}", "{item}"),),
            (("Somebody looks for: {intention} Which item fits?", "{item}"),),
            (("Search: {intention}", "{item}"),),
            (("Which item would answer this request? {intention}", "{item}"),),
        ],
        "search_with_history": [
            (("Somebody who had {history} now looks for: {intention} Which item fits?", "{item}"),),
            (("Request: {intention} Earlier items of the same person: {history}", "{item}"),),
            (("Find what this person wants. Earlier: {history} Wish: {intention}", "{item}"),),
        ],
    },
    "preference": {
        "items": [
            (("What does somebody like who had these items? {history}", "{preference}"),),
            (("Describe the taste behind this list: {history}", "{preference}"),),
            (("Read the history and sum up what this person prefers: {history}", "{preference}"),),
        ],
        "titles": [
            (("What does somebody like who had {titles}?", "{preference}"),),
            (("Sum up the taste of a person with this list: {titles}", "{preference}"),),
        ],
    },
    "candidates": {
        "choose": [
            (("A person had: {titles}\nChoose the next title from this list:\n{candidates}", "{title}"),),
            (("History: {titles}\nCandidates:\n{candidates}\nWhich candidate comes next?", "{title}"),),
            (("Only one of the titles below follows {titles}. Name it.\n{candidates}", "{title}"),),
            (("Which of these fits best behind {titles}?\n{candidates}", "{title}"),),
        ]
    },
    "candidate_letters": {
        "letter": [
            (("A person had: {titles}\nCandidates:\n{lettered}\nAnswer with the letter of the next one.", "{letter}"),),
            (("History: {titles}\nWhich candidate follows? Give its letter.\n{lettered}", "{letter}"),),
            (("Give the letter of the title that comes after {titles}.\n{lettered}", "{letter}"),),
        ]
    },
    "yes_no": {
        "rated": [
            (("Liked: {liked}\nDisliked: {disliked}\nWill this person like {title}? Answer Yes or No.", "{answer}"),),
            (("Somebody enjoyed {liked} but not {disliked}. Will {title} be enjoyed too?", "{answer}"),),
            (("Good: {liked}\nBad: {disliked}\nIs {title} good for the same person, Yes or No?", "{answer}"),),
        ],
        "taken": [
            (("Somebody had: {titles}\nWill this person take {title} as well? Answer Yes or No.", "{answer}"),),
            (("After {titles}, is {title} a good next choice?", "{answer}"),),
            (("History: {titles}\nShould we recommend {title}, Yes or No?", "{answer}"),),
        ],
    },
    "chat": {
        "again": [
            (("I had: {history} What should I take next?", "{item}"), ("I took it. And after that?", "{next}")),
            (("My list so far: {history} Suggest one item.", "{item}"), ("Good, one more please.", "{next}")),
            (("These were mine: {history} Continue.", "{item}"), ("Continue once more.", "{next}")),
        ],
        "explain": [
            (("I had: {history} What is next for me?", "{item}"), ("What is it called?", "{title}")),
            (("Recommend something after {history}", "{item}"), ("I do not know it. Which title is that?", "{title}")),
            (("Given {history} which item do you suggest?", "{item}"), ("Tell me its name.", "{title}")),
        ],
        "titles": [
            (("I had {titles}. What next?", "{title}"), ("I like it. What comes after that?", "{next_title}")),
            (("Titles I had: {titles}. Suggest one.", "{title}"), ("And one more?", "{next_title}")),
        ],
        "search": [
            (("I want this: {intention}", "{item}"), ("What is the title of it?", "{title}")),
            (("Can you find it for me? {intention}", "{item}"), ("And its title?", "{title}")),
        ],
    },
}  # fmt: skip


def _wordings() -> tuple[Wording, ...]:
    made = []
    for family, kinds in _TEXTS.items():
        number = 0
        for kind, texts in kinds.items():
            for place, turns in enumerate(texts):
                number += 1
                name = f"{family}-{number}"
                parts = tuple(Template(name, source, target, kind) for source, target in turns)
                made.append(Wording(name, parts, kind, place == len(texts) - 1))
    return tuple(made)


WORDINGS: tuple[Wording, ...] = _wordings()
LANGUAGE_FAMILIES: tuple[str, ...] = tuple(_TEXTS)
SERVING_WORDING: Wording = WORDINGS[0]  # the wording that `recommend` puts around a history


def language_wordings(family: str, kind: str | None = None, *, held_out: bool = False) -> list[Wording]:
    """The wordings of a family (of one kind), those of training or those kept out of it."""
    return [
        wording
        for wording in WORDINGS
        if wording.family == family and wording.held_out == held_out and kind in (None, wording.kind)
    ]
