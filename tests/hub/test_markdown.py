"""Strangers' text in Markdown, judged by a CommonMark parser: it must come back as text and as nothing else."""

from __future__ import annotations

import pytest
from hub_hostile import HOSTILE, PARSER
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_genrec.hub.markdown import clean, code, fenced, inline, slug, table


def text_of(tokens) -> str:
    """What a reader sees; fails on anything that is not plain text."""
    seen = []
    for token in tokens:
        if token.type == "inline":
            for child in token.children:
                assert child.type in ("text", "code_inline", "text_special"), (child.type, child.content)
                seen.append(child.content)
        else:
            assert token.type in ("paragraph_open", "paragraph_close"), token.type
    return "".join(seen)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:25]))
def test_inline_is_plain_text_anywhere(text):
    shown = clean(text)
    if shown:
        assert text_of(PARSER.parse(inline(text))) == shown
    for before in (
        "",
        "- ",
        "# ",
        "> ",
    ):  # at the start of a list item, heading or quote it must not become another one
        kinds = [t.type for t in PARSER.parse(f"{before}{inline(text) or 'x'}")]
        assert kinds == [t.type for t in PARSER.parse(f"{before}x")]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:25]))
def test_cells_stay_cells(text):
    document = table(["a", "b"], [[inline(text), code(text, in_table=True)], ["x", "y"]])
    tokens = PARSER.parse(document)
    assert sum(t.type == "td_open" for t in tokens) == 4
    assert sum(t.type == "tr_open" for t in tokens) == 3
    cells = [t for t in tokens if t.type == "inline"]
    assert [child.type for child in cells[3].children] == ["code_inline"]
    assert "".join(child.content for child in cells[2].children) == clean(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab01 .-_*`|\\<>[]()!#&:{}\n~=+@$^\"'\u202e\ud800w"), max_size=30))
@example("www.www.")
@example("a_b _c_ d_")
@example("1) x")
@example("\\`|`\\")
def test_random_text_is_plain_text(text):
    shown = clean(text)
    if shown:
        assert text_of(PARSER.parse(inline(text))) == shown
        assert text_of(PARSER.parse("x " + code(text))) == "x " + shown
    cells = [
        t for t in PARSER.parse(table(["a", "b"], [[inline(text), code(text, in_table=True)]])) if t.type == "inline"
    ]
    assert len(cells) == 4 - (not shown) or not shown


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t[:25]))
def test_fences_cannot_be_closed_from_inside(text):
    tokens = PARSER.parse(f"before\n\n{fenced(text, 'yaml')}\n\nafter")
    assert [t.type for t in tokens if t.type != "inline"] == [
        "paragraph_open", "paragraph_close", "fence", "paragraph_open", "paragraph_close",
    ]  # fmt: skip
    assert tokens[3].info == "yaml"


def test_clean_is_one_short_line():
    assert clean("a\r\n\tb") == "a b"
    assert len(clean("x" * 10**6)) == 200
    assert clean("\ud800") == ""
    clean("lone \ud800").encode("utf-8")


def test_slug():
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("日本") == "unnamed"
    assert slug("Amazon Toys 2.0") == "amazon-toys-2.0"
