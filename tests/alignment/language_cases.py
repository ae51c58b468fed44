"""Data, tokenizers and readers that the tests of language tasks share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hf_genrec.alignment.tasks.families import TaskData
from hf_genrec.alignment.tasks.language_rows import History
from hf_genrec.data.sequences import Sequences
from hf_genrec.identifiers.extend import extend_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "identifiers"))
from hostile_strings import hostile_strings  # noqa: F401 - for the tests that import this file
from text_tokenizers import FAMILIES as TEXT_TOKENIZERS

ROWS = [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9, 1, 0], [2, 4]]
IDS = [f"i{n}" for n in range(10)]
CODES = [[n // 4, n % 4] for n in range(10)]
TITLES = [f"Title {n}" for n in range(10)]
GROUPS = ["Drama", "Drama, War", "War", "Comedy", "Comedy, Drama", "Drama", "War", "Comedy", "Drama", "War"]
FLAT = [item for row in ROWS for item in row]
STARTS = [0] * 5 + [5] * 3 + [8] * 4 + [12] * 2

# how real chat templates differ: roles and markers, trimmed contents, a system text of their own or refused, the answer asked
# for with a flag (ChatML, Gemma) or by the question's own end (Llama 2)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (s if loop.index0 == 0 else '') + "
    "m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'].replace('assistant', 'model') + '\n' + "
    "m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA}


def make_tokenizer(name: str = "byte_level_bpe", template: str | None = CHATML, ids=IDS, codes=CODES):
    tokenizer = extend_tokenizer(TEXT_TOKENIZERS[name](), ItemTokenizer.from_codes(list(ids), codes))
    tokenizer.chat_template = template
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def data_with(*columns: str, texts: tuple[str, ...] = ("description", "genres"), titles=TITLES) -> TaskData:
    count = sum(map(len, ROWS))
    made = {
        "rating": np.random.default_rng(0).integers(1, 6, count).astype(float),
        "intention": np.array([f"wish {n}" for n in range(count)], object),
        "preference": np.array([f"taste {n}" for n in range(count)], object),
        "review": np.array([f"review {n}" for n in range(count)], object),
    }
    kept = {"description": [f"About {n}." for n in range(10)], "genres": GROUPS}
    return TaskData(
        Sequences.from_rows(ROWS), IDS, titles, {c: made[c] for c in columns}, {name: kept[name] for name in texts}
    )


def texts_of(segments, kind: str = "text") -> list[str]:
    """Contents of one kind, those inside histories too."""
    found: list = []
    for this, content in segments:
        if this == "history":
            found += [part for _, entry in content.entries for part in texts_of(entry, kind)]
        elif this == kind:
            found += content if kind == "items" else [content]
    return found


def runs(tokenizer, row) -> list[str]:
    """The labelled runs of a row, decoded."""
    found, open_run = [], False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (-100, token)
        if label < 0:
            open_run = False
            continue
        if not open_run:
            found.append([])
        found[-1].append(token)
        open_run = True
    return [tokenizer.decode(run) for run in found]


def history_of(ids) -> list:
    return [("history", History(tuple((time, (("items", (name,)),)) for time, name in enumerate(ids))))]
