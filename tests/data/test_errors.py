"""Bad input: one typed error that names the file, the row or field, and the fix."""

from __future__ import annotations

import gzip
import re

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from hf_genrec.data.interactions import load_data
from hf_genrec.errors import GenRecError, InteractionTableError, ItemTableError

HEADER = "user_id,item_id,timestamp\n"
GOOD = {"user_id": [1, 1, 2], "item_id": [10, 9, 10], "timestamp": [1, 2, 3]}
FILES = [  # name, content, what the message must say
    ("a.csv", "", ["empty", "Bring"]),
    ("a.csv", HEADER, ["no rows"]),
    ("a.csv", HEADER.strip(), ["no rows"]),
    ("a.csv", "user,item_id,timestamp\n1,2,3\n", ["'user_id'", "'user', 'item_id', 'timestamp'", "user_column='user'"]),
    ("a.csv", "user_id,movie,timestamp\n1,2,3\n", ["'item_id'", "item_column='movie'"]),
    ("a.csv", "user_id,item_id,time\n1,2,3\n", ["'timestamp'", "timestamp_column='time'", "timestamp_column=None"]),
    ("a.csv", "196,242,881250949\n1,2,3\n", ["no header line"]),
    ("a.csv", "user_id,user_id,item_id,timestamp\n1,2,3,4\n", ["'user_id' twice"]),
    ("a.csv", "\n1,2,3\n", ["header line is blank"]),
    ("a.csv", HEADER + "1,2,3\n1,2\n", ["Expected 3 columns, got 2"]),
    ("a.csv", HEADER + "1,2,3\n,3,4\n,4,5\n", ["'user_id'", "2 of 3 rows", "first in row 2"]),
    ("a.csv", HEADER + "1,2,3\n4,NaN,4\n", ["'item_id'", "1 of 2 rows", "first in row 2"]),
    ("a.csv", HEADER + "1,2,3\n1,3,\n", ["'timestamp'", "1 of 2 rows", "first in row 2"]),
    ("a.csv", HEADER + "1,2,3\n1,3,nan\n", ["'timestamp'", "1 of 2 rows", "first in row 2"]),
    (
        "a.csv",
        HEADER + "1,2,881250949\n1,3,881250949000\n",
        ["mixes time units", "row 1 holds 881250949 (looks like s)", "row 2 holds 881250949000 (looks like ms)"],
    ),
    ("a.csv", HEADER + "1,2,5\n1,3,2020-01-01\n", ["mixes numbers", "row 1 holds '5'", "row 2 holds '2020-01-01'"]),
    ("a.csv", HEADER + "1,2,2020-01-01\n1,2,2020-01-02\n1,3,soon\n", ["'soon' in row 3", "ISO 8601"]),
    ("a.csv", HEADER + "1,2,2020-01-01T00:00:00Z\n1,3,2020-01-01T00:00:00\n", ["zone in row 1", "none in row 2"]),
    ("a.csv", (HEADER + "1,café,3\n").encode("latin-1"), ["line 2", "byte 0xe9", "offset 31", "encoding="]),
    ("a.csv", (HEADER + "1,a,3\n").encode("utf-16"), ["line 1", "byte 0xff", "encoding="]),
    ("a.csv", HEADER.encode() + b"1,a\xed\xa0\x80,3\n", ["line 2", "byte 0xed"]),  # a surrogate in bytes
    ("a.jsonl", '{"user_id":"1","item_id":"a\\ud800","timestamp":3}\n', ["line 1", "lone surrogate", "Clean"]),
    ("a.jsonl", '{"user_id":"1"}\n{"user_id":\n', ["line 2", "no JSON"]),
    ("a.jsonl", b'{"user_id":"1","item_id":"\xe9","timestamp":3}\n', ["line 1", "byte 0xe9"]),
    ("a.json", '[{"user_id":"1"}]', ["one object a line"]),
    ("a.jsonl", '{"user_id":"1"}\n{"user_id":1}\n', ["/user_id", "one type"]),
    ("a.inter", "user_id\titem_id\n1\t2\n", ["'user_id'", "name:type", ".tsv"]),
    ("a.parquet", "junk", ["Parquet"]),
    ("a.xyz", "junk", ["'.xyz'", ".csv"]),
    ("a.txt", "\n\n", ["no rows"]),
    ("a.csv.gz", gzip.compress(b"user_id")[:12], ["cannot be read"]),
]


@pytest.mark.parametrize("name, content, expected", FILES, ids=range(len(FILES)))
def test_bad_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InteractionTableError) as caught:
        load_data(path, min_user=0, min_item=0)
    message = str(caught.value)
    assert str(path) in message
    for part in expected:
        assert part in message
    assert "\n" not in message and message.endswith((".", ")"))


def frame(**columns):
    return pd.DataFrame(GOOD | columns)


TABLES = [
    (frame(user_id=[1, np.nan, 2]), ["'user_id'", "1 of 3", "row 2"]),
    (frame(item_id=["a", None, "b"]), ["'item_id'", "1 of 3", "row 2"]),
    (frame(timestamp=[1, np.nan, 2]), ["'timestamp'", "1 of 3", "row 2"]),
    (frame(timestamp=[1, np.inf, 2]), ["'timestamp'", "infinite in row 2"]),
    (frame(timestamp=[1, 1e25, 2]), ["1e+25 in row 2"]),
    (frame(timestamp=[True, False, True]), ["type bool"]),
    (frame(timestamp=[1_600_000_000, 1_600_000_000_000_000, 2]), ["looks like us"]),
    (frame(item_id=[1, 1.5, 2]), ["'item_id'", "1.5 in row 2", "no id"]),
    (frame(item_id=[True, False, True]), ["type bool"]),
    (frame(item_id=pd.Series([1, "a", "b"], dtype=object)), ["item_id", "one type"]),
    (frame(item_id=pd.Series(["a", "x\ud800", "b"], dtype=object)), ["lone surrogate", "Clean"]),
    (frame().head(0), ["no rows"]),
    (pa.table({"user_id": pa.nulls(2), "item_id": ["a", "b"], "timestamp": [1, 2]}), ["'user_id'", "2 of 2"]),
    (datasets.DatasetDict(train=datasets.Dataset.from_dict(GOOD)), ["splits train", "data['train']"]),
    (None, ["no table"]),
    (5, ["no table"]),
    ({}, ["no rows"]),
]


@pytest.mark.parametrize("table, expected", TABLES, ids=range(len(TABLES)))
def test_bad_tables(table, expected):
    with pytest.raises(InteractionTableError) as caught:
        load_data(table, min_user=0, min_item=0)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"min_rating": 3}, "no column 'rating'"),
        ({"shuffle_ties": 1, "timestamp_column": None}, "needs timestamps"),
        ({"time_unit": "min"}, "time_unit='min'"),
        ({"timestamp_column": "when"}, "no column 'when'"),
        ({"min_user": 5}, "min_user=5"),
    ],
)
def test_bad_options(options, expected):
    with pytest.raises(InteractionTableError, match=re.escape(expected)):
        load_data(GOOD, **({"min_user": 0, "min_item": 0} | options))


@pytest.mark.parametrize(
    "items, options, expected",
    [
        ({"item_id": [10, 9, 10], "title": ["a", "b", "c"]}, {}, ["'10'", "rows 1, 3", "more than once"]),
        ({"item_id": [10, None], "title": ["a", "b"]}, {}, ["'item_id'", "row 2"]),
        ({"id": [10, 9], "title": ["a", "b"]}, {}, ["'item_id'", "item_column='id'"]),
        ({"item_id": [10, 9], "title": ["a", " "]}, {"require_text": True}, ["1 of 2 items", "'9'", "title"]),
        ({"item_id": [10], "title": ["a"]}, {"require_text": True}, ["1 of 2 items", "'9'"]),
        (None, {"require_text": True}, ["no item table", "items="]),
    ],
)
def test_bad_item_tables(items, options, expected):
    with pytest.raises(ItemTableError) as caught:
        load_data(GOOD, items=items, min_user=0, min_item=0, **options)
    for part in expected:
        assert part in str(caught.value)


def test_bad_item_files(tmp_path):
    path = tmp_path / "items.csv"
    for content in (b"", b"item_id,title\n", "item_id,title\n10,café\n".encode("latin-1")):
        path.write_bytes(content)
        with pytest.raises(ItemTableError, match=r"items\.csv"):
            load_data(GOOD, items=path)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_GENREC_DATA", raising=False)
    with pytest.raises(InteractionTableError, match="no such file"):
        load_data(tmp_path / "absent.csv")
    with pytest.raises(InteractionTableError, match="Did you mean 'movielens-100k'"):
        load_data("movielens-1000")
    with pytest.raises(InteractionTableError, match="no known data"):
        load_data(tmp_path)
    with pytest.raises(InteractionTableError, match=r"HF_GENREC_DATA.*amazon_toys/sequences.txt"):
        load_data("amazon-toys")
    with pytest.raises(InteractionTableError, match=r"ratings.csv does not exist.*data_dir="):
        load_data("movielens-latest-small", data_dir=tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.inter").write_text("user_id:token\titem_id:token\n1\t2\n")
    with pytest.raises(InteractionTableError, match=r"2 .inter files"):
        load_data(tmp_path)


def test_all_are_value_errors():
    assert issubclass(GenRecError, ValueError) and issubclass(InteractionTableError, GenRecError)
