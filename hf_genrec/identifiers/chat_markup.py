"""What a tokenizer's chat template writes around the turns of a conversation, found without showing it their contents.

The template is rendered once with unguessable marks in place of system text, questions and answers, and the result is cut
at the marks. The contents are encoded apart, so nothing that a title holds can be read as markup, and a template that
trims, joins or escapes contents cannot change them either.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from ..errors import IncompatibleComponentsError
from .segments import control_token_ids


@dataclass(frozen=True)
class ChatMarkup:
    """Markup of a conversation of T turns.

    Args:
        start: before the system text ("" without one: then everything before the first question is in `questions[0]`).
        questions: T texts, each before a question; the later ones begin with the end of the answer before.
        answers: T texts, each between a question and its answer; the last one is what the template writes when it asks
            for an answer (`add_generation_prompt`), so training shows what inference will.
        stop: how the end of an answer begins: its markup up to the first control token, "" where it has none.
    """

    start: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    stop: str


def chat_markup(tokenizer: Any, turns: int = 1, *, system: bool = False) -> ChatMarkup:
    """Render the tokenizer's chat template for `turns` questions and answers.

    Templates that write today's date (Llama 3 does) give the markup of the day on which it is made.

    Raises:
        IncompatibleComponentsError: no chat template, one that refuses the conversation (some know no system text), or one
            that repeats, drops or changes the contents.
    """
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise IncompatibleComponentsError(
            f"{name} has no chat template: set tokenizer.chat_template (instruction-tuned models bring one), or write "
            "rows with style='plain'"
        )
    marks = [f"x{secrets.token_hex(16)}x" for _ in range(2 * turns + 1)]
    talk = [{"role": "system", "content": marks[0]}] if system else []
    for turn in range(turns):
        talk.append({"role": "user", "content": marks[2 * turn + 1]})
        talk.append({"role": "assistant", "content": marks[2 * turn + 2]})
    used = marks if system else marks[1:]
    whole = _cut(tokenizer, talk, used, ask=False)
    asked = _cut(tokenizer, talk[:-1], used[:-1], ask=True)
    start = asked[0] if system else ""
    around = asked[1:] if system else asked
    if asked == _cut(tokenizer, talk[:-1], used[:-1], ask=False):  # knows no way to ask: what stands before an answer
        around[-1] = whole[-2]
    return ChatMarkup(start, tuple(around[::2]), tuple(around[1::2]), _stop(tokenizer, whole[-1]))


def _cut(tokenizer: Any, talk: list[dict[str, str]], marks: list[str], *, ask: bool) -> list[str]:
    """The rendered conversation, cut at the marks."""
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=ask)
    except Exception as problem:  # templates raise whatever they like
        raise IncompatibleComponentsError(
            f"the chat template of {type(tokenizer).__name__} refuses the roles {', '.join(m['role'] for m in talk)}: "
            f"{problem}. Leave the system text out (system=None) or set another tokenizer.chat_template"
        ) from problem
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            raise IncompatibleComponentsError(
                f"the chat template of {type(tokenizer).__name__} writes a message {text.count(mark)} times or out of order, "
                "so the place of its content is not known: set another tokenizer.chat_template, or use style='plain'"
            )
        piece, text = text.split(mark)
        pieces.append(piece)
    return [*pieces, text]


def _stop(tokenizer: Any, behind: str) -> str:
    """The beginning of `behind` up to its first control token."""
    control = control_token_ids(tokenizer)
    for token in tokenizer.encode(behind, add_special_tokens=False):
        if token in control:
            content = tokenizer.convert_ids_to_tokens(token)
            if content in behind:
                return behind[: behind.index(content) + len(content)]
    return ""
