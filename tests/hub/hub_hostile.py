"""Strangers' text, and the CommonMark parser that judges what became of it."""

from __future__ import annotations

import pytest

markdown_it = pytest.importorskip("markdown_it")
PARSER = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "<https://evil.example>",
    "https://evil.example and www.evil.example",
    "a | b | c",
    "a \\| b \\",
    "```\n# heading\n```",
    "`tick` ``two``",
    "---\nlicense: mit\n---",
    "\n# Heading\n\n- list\n1. one",
    "1. one",
    "- item",
    "* star * _under_ __strong__ ~~gone~~",
    "&lt;b&gt; &amp;",
    "{{ 7 * 7 }} {% raw %}",
    "key: [value, {a: b}] # comment",
    "'single' \"double\"",
    "\u202egnirts\u202c \u200b zero",
    "lone \ud800 surrogate",
    "\x00\x07\x1b[31m",
    "x" * 1_000_000,
    "",
    " ",
    "日本語 🎲 ß",
    "<a_12> <|im_start|>",
    "$$x$$ @user #1 :smile:",
    "[^1]: note",
    "| --- |",
    "=====",
    "C++ & C#",
]
