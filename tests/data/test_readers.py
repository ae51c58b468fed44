"""One log written in every format must read back the same."""

from __future__ import annotations

import gzip
import json

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_genrec.data import readers
from hf_genrec.data.interactions import load_data
from hf_genrec.errors import InteractionTableError

ROWS = [  # leading zeros, a comma, a quote, a line end, an accent
    ("007", "7", 5.0, 1_600_000_003),
    ("007", "a,b", 4.0, 1_600_000_001),
    ("7", 'say "hi"', 1.0, 1_600_000_002),
    ("7", "7", 3.5, 1_600_000_001),
    ("café", "line\nend", 2.0, 1_600_000_005),
]
NAMES = ["user_id", "item_id", "rating", "timestamp"]
PLAIN = [
    row for row in ROWS if row[0] != "café" and "," not in row[1] and '"' not in row[1]
]  # for formats without quotes


def seen(data):
    """user -> item ids in order."""
    return {user: [data.item_ids[i] for i in row] for user, row in zip(data.user_ids, data.sequences)}


def load(source, **options):
    return load_data(source, min_user=0, min_item=0, **options)


def frame():
    return pd.DataFrame(ROWS, columns=NAMES)


EXPECTED = {"007": ["a,b", "7"], "7": ["7", 'say "hi"'], "café": ["line\nend"]}


@pytest.mark.parametrize(
    "name, write",
    [
        ("log.csv", lambda path: frame().to_csv(path, index=False)),
        ("log.csv.gz", lambda path: frame().to_csv(path, index=False)),
        ("log.csv", lambda path: frame().to_csv(path, index=False, sep=";")),
        ("log.csv", lambda path: path.write_bytes(b"\xef\xbb\xbf" + frame().to_csv(index=False).encode())),
        ("log.csv", lambda path: frame().to_csv(path, index=False, lineterminator="\r\n")),
        ("log.tsv", lambda path: frame().to_csv(path, index=False, sep="\t")),
        ("log.txt", lambda path: frame().to_csv(path, index=False, sep="\t")),
        ("log.parquet", lambda path: pq.write_table(pa.Table.from_pandas(frame()), path)),
        ("log.jsonl", lambda path: path.write_text("".join(json.dumps(dict(zip(NAMES, r))) + "\n" for r in ROWS))),
        ("log.ndjson", lambda path: frame().to_json(path, orient="records", lines=True, force_ascii=False)),
        (
            "log.jsonl.gz",
            lambda path: path.write_bytes(
                gzip.compress("\n".join(json.dumps(dict(zip(NAMES, row))) for row in ROWS).encode())
            ),
        ),
    ],
)
def test_every_file_format(tmp_path, name, write):
    write(tmp_path / name)
    assert seen(load(tmp_path / name)) == EXPECTED
    assert load(str(tmp_path / name)).name == "log"


@pytest.mark.parametrize(
    "convert",
    [
        lambda table: table,
        lambda table: table.to_batches()[0],
        lambda table: table.to_pandas(),
        lambda table: table.to_pandas(types_mapper=pd.ArrowDtype),
        lambda table: table.to_pandas().astype({"item_id": "category", "user_id": "category"}),
        lambda table: pl.from_arrow(table),
        lambda table: pl.from_arrow(table).lazy(),
        lambda table: datasets.Dataset(table),
        lambda table: datasets.concatenate_datasets([datasets.Dataset(table.slice(r, 1)) for r in range(len(table))]),
        lambda table: datasets.Dataset(table).add_column("text", ["x"] * len(table)),
        lambda table: table.to_pydict(),
        lambda table: table.to_pylist(),
        lambda table: pa.concat_tables([table.slice(0, 2), table.slice(2)]),
        lambda table: table.cast(
            pa.schema([(n, pa.large_string() if n[-2:] == "id" else pa.float64()) for n in NAMES])
        ),
    ],
)
def test_every_table(convert):
    assert seen(load(convert(pa.Table.from_pandas(frame())))) == EXPECTED


def test_a_dataset_with_selected_rows():
    chosen = datasets.Dataset(pa.Table.from_pandas(frame())).select([3, 0])
    assert seen(load(chosen)) == {"7": ["7"], "007": ["7"]}


def test_recbole_atomic_file_with_its_items(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, row)) for row in PLAIN]
    (folder / "shop.inter").write_text("\n".join(lines) + "\n")
    (folder / "shop.item").write_text(
        'item_id:token\ttitle:token_seq\tprice:float\tcategories:token_seq\n7\t12" disc\t3.5\tmusic vinyl\n'
    )
    expected = {"7": ["7"], "007": ["7"]}
    assert seen(load(folder / "shop.inter")) == expected
    data = load(folder)
    assert seen(data) == expected and data.name == "shop"
    assert data.items.texts() == ['12" disc music vinyl'] and data.report.time_unit == "s"


def test_movielens_folders_of_three_generations(tmp_path):
    new, old, first = (tmp_path / name for name in ("ml-new", "ml-1m", "ml-100k"))
    for folder in (new, old, first):
        folder.mkdir()
    (new / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,10,4.0,964982703\n1,2,4.5,964981247\n")
    (new / "movies.csv").write_text(
        'movieId,title,genres\n2,"Lion King, The (1994)",Drama|Musical\n10,Café (1990),Drama\n'
    )
    (old / "ratings.dat").write_text("1::10::4::964982703\n1::2::5::964981247\n")
    (old / "movies.dat").write_bytes(
        "2::Lion King, The (1994)::Drama|Musical\n10::Café (1990)::Drama\n".encode("latin-1")
    )
    (first / "u.data").write_text("1\t10\t4\t964982703\n1\t2\t5\t964981247\n")
    flags = {2: [8, 12], 10: [8]}  # Drama, Musical
    titles = {2: "Lion King, The (1994)", 10: "Café (1990)"}
    lines = [
        "|".join(
            [str(i), titles[i], "01-Jan-1994", "", "http://x", *("1" if g in flags[i] else "0" for g in range(19))]
        )
        for i in (2, 10)
    ]
    (first / "u.item").write_bytes("\n".join(lines).encode("latin-1"))
    for folder in (new, old, first):
        data = load(folder)
        assert seen(data) == {"1": ["2", "10"]}
        assert data.items.titles() == ["The Lion King (1994)", "Café (1990)"]
        assert data.items.texts() == ["The Lion King (1994) Drama Musical", "Café (1990) Drama"]
        assert data.items.table["raw_title"].to_pylist() == ["Lion King, The (1994)", "Café (1990)"]
    assert seen(load(new / "ratings.csv", items=new / "movies.csv")) == {"1": ["2", "10"]}
    assert seen(load(old / "ratings.dat", min_rating=4.5)) == {"1": ["2"]}
    assert seen(load(first / "u.data")) == {"1": ["2", "10"]}


def test_plain_folder_and_lines_of_sequences(tmp_path):
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\nu,a,2\nu,b,1\n")
    (tmp_path / "items.jsonl").write_text('{"item_id": "a", "title": "A"}\n{"item_id": "b", "title": "B"}\n')
    data = load(tmp_path)
    assert seen(data) == {"u": ["b", "a"]} and data.items.titles() == ["A", "B"]
    (tmp_path / "blanks.txt").write_text("u1 5 3 5\r\n\r\n u2  3 \r\nu3\r\n")
    data = load(tmp_path / "blanks.txt")
    assert seen(data) == {"u1": ["5", "3", "5"], "u2": ["3"]}  # repeats stay without times
    assert data.repeats and data.sequences.timestamps is None


def test_types_of_a_column_may_change_after_the_first_block(tmp_path):
    path = tmp_path / "late.csv"
    filler = "x" * 200
    with path.open("w") as out:
        out.write("user_id,item_id,timestamp,rating,note\n")
        for row in range(
            100_000
        ):  # > 16 MiB, then a rating with a fraction, a float time and a text where numbers were
            out.write(f"{row % 10},{row % 7},{row},5,{row if row < 99_000 else filler}{'' if row else filler}\n")
            out.write(f"{row % 10},{row % 7},{row}.5,4.5,{filler}\n")
    data = load_data(path, min_rating=4.5)
    assert data.report.rows_read == 200_000 and data.report.interactions == 200_000
    assert data.report.ties_rows == 0  # half seconds order the rows


def test_one_thread_and_many_blocks_keep_the_order(tmp_path):
    n = 200_000
    users = np.arange(n) % 3
    path = tmp_path / "big.csv"
    pd.DataFrame({"user_id": users, "item_id": np.arange(n), "timestamp": 5, "pad": "y" * 100}).to_csv(
        path, index=False
    )
    data = load(path)
    ids = np.array(data.item_ids, int)
    for user, row in zip(data.user_ids, data.sequences):
        assert (ids[row] == np.arange(int(user), n, 3)).all()


def test_ids_that_other_readers_take_for_missing(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('user_id,item_id,timestamp\nnull,NA,1\nnull,N/A,2\nnull,"None",3\n')
    assert seen(load(path)) == {"null": ["NA", "N/A", "None"]}


def test_line_ends_inside_quotes_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK", 256)
    path = tmp_path / "log.csv"
    rows = [("u", f"i{n}", "one\ntwo,\nthree\n" * (n % 5), n) for n in range(200)]
    pd.DataFrame(rows, columns=["user_id", "item_id", "note", "timestamp"]).to_csv(path, index=False)
    assert seen(load(path)) == {"u": [row[1] for row in rows]}


def test_a_million_characters_in_one_field(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\na," + "x" * 1_000_000 + "\nb,ok\n")
    lines = tmp_path / "items.jsonl"
    lines.write_text(json.dumps({"item_id": "a", "title": "é" * 1_000_000}) + '\n{"item_id": "b", "title": "ok"}\n')
    for source in (path, lines):
        with pytest.warns(UserWarning, match="1 texts are longer than 2,000 characters"):
            data = load({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [1, 2]}, items=source)
        assert [len(title) for title in data.items.titles()] == [2_000, 2]
        assert data.report.texts_capped == 1


def test_encodings(tmp_path):
    path = tmp_path / "log.csv"
    text = "user_id,item_id,timestamp\nu,café,1\n"
    for encoding in ("latin-1", "cp1252", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert load(path, encoding=encoding).item_ids == ["café"]
    # far into the file, after a two-byte character that the reading buffer (1 MiB) cuts in two
    head = b"user_id,item_id,timestamp\nu,a,1\n"
    filler = b"u,a" + b"x" * ((1 << 20) - len(head) - 4) + "é".encode() + b",1\n"
    path.write_bytes(head + filler + b"u,\xe9,1\n")
    with pytest.raises(InteractionTableError, match=f"line 4 .* byte offset {len(head + filler) + 2:,}"):
        load(path)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InteractionTableError, match=r"line 2 .* byte 0xe9 at byte offset 31.* encoding="):
        load(path)
