"""The item table: texts, alignment, capping, Parquet."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_genrec.data.items import ItemTable
from hf_genrec.data.layouts import display_title
from hf_genrec.errors import ItemTableError


def shop():
    return ItemTable.from_source(
        {
            "item_id": [3, 1, 2],
            "price": [1.5, 2.0, None],
            "name": ["Tea &amp; cup", None, "Disc"],
            "categories": [[["home", "kitchen"], ["gift"]], None, [["music"], []]],
            "tags": [["hot", None], [], ["old"]],
            "image_url": ["http://a", "http://b", "http://c"],
            "parent_id": ["p", "q", "r"],
        }
    )


def test_titles_and_texts():
    items = shop()
    assert items.item_ids == ["3", "1", "2"] and len(items) == 3
    assert items.columns[:2] == ["item_id", "title"] and items.text_fields == ("title", "categories", "tags")
    assert items.titles() == ["Tea &amp; cup", "", "Disc"]  # entities stay as they came
    assert items.texts() == ["Tea &amp; cup home, kitchen, gift hot", "", "Disc music old"]
    assert items.texts(["title", "price"]) == ["Tea &amp; cup 1.5", "2", "Disc"]
    assert items.texts([]) == ["", "", ""]
    assert items.has_text().tolist() == [True, False, True]
    with pytest.raises(ItemTableError, match="Did you mean 'categories'"):
        items.texts(["category"])
    with pytest.raises(ItemTableError, match="1 of 3 items have no text in title, categories, tags: '1'"):
        items.require_text()


def test_align():
    aligned = shop().align(["2", "9", "3"])
    assert aligned.item_ids == ["2", "9", "3"] and aligned.titles() == ["Disc", "", "Tea &amp; cup"]
    assert aligned.texts()[1] == "" and aligned.unlisted == 1
    assert aligned.table["price"].to_pylist() == [None, None, 1.5]


def test_parquet_round_trip(tmp_path):
    items = shop().align(["2", "9", "3"])
    items.to_parquet(tmp_path / "items.parquet")
    back = ItemTable.from_parquet(tmp_path / "items.parquet")
    assert back.table.equals(items.table) and back.text_fields == items.text_fields
    assert (back.texts(), back.unlisted, back.texts_capped) == (items.texts(), 1, 0)
    pq.write_table(pa.table({"item_id": [1, 2], "title": ["a", "b"]}), tmp_path / "own.parquet")
    assert ItemTable.from_parquet(tmp_path / "own.parquet").item_ids == ["1", "2"]


def test_damaged_parquet_is_refused(tmp_path):
    path = tmp_path / "items.parquet"
    for metadata in (b"{", b"[]", b"{}", b'{"text_fields": ["nothing"], "texts_capped": 0, "unlisted": 0}'):
        table = pa.table({"item_id": ["a"], "title": ["b"]}).replace_schema_metadata({b"hf_genrec.items": metadata})
        pq.write_table(table, path)
        with pytest.raises(ItemTableError):
            ItemTable.from_parquet(path)


def test_capping():
    with pytest.warns(UserWarning, match="3 texts are longer than 5 characters"):
        items = ItemTable.from_source(
            {"item_id": ["a", "b"], "title": ["é" * 9, "short"], "tags": [["x" * 6, "y"], ["z" * 7]]}, max_text_length=5
        )
    assert items.titles() == ["é" * 5, "short"] and items.texts_capped == 3
    assert items.table["tags"].to_pylist() == [["xxxxx", "y"], ["zzzzz"]]


def test_id_and_title_columns():
    table = pd.DataFrame({"asin": ["007", "7"], "headline": ["x", "y"], "title": ["1", "2"]})
    items = ItemTable.from_source(table, item_column="asin", title_column="headline")
    assert items.item_ids == ["007", "7"] and items.titles() == ["x", "y"]
    assert ItemTable.from_source({"movieId": [1], "title": ["x"]}).item_ids == ["1"]
    no_titles = ItemTable.from_source({"item_id": ["a", "b"], "price": [1, 2]})
    assert no_titles.titles() == ["", ""] and not no_titles.has_text().any()
    with pytest.raises(ItemTableError, match="title_column='title'"):
        ItemTable.from_source(table, item_column="asin", title_column="titel")


def test_numeric_titles_stay_text_in_csv(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title,year\n01,007,1990\n1,1984,1991\n")
    items = ItemTable.from_source(path)
    assert items.item_ids == ["01", "1"] and items.titles() == ["007", "1984"]
    assert items.table["year"].to_pylist() == [1990, 1991] and items.text_fields == ("title",)


def test_sliced_and_chunked_lists():
    table = pa.table({"item_id": list("abcd"), "title": list("wxyz"), "tags": [["1"], ["2", "3"], None, ["4"]]})
    pieces = pa.concat_tables([table.slice(1, 1), table.slice(2)])
    assert ItemTable.from_source(pieces).texts() == ["x 2, 3", "y", "z 4"]
    hidden = pa.ListArray.from_arrays(  # a null row may cover values: they are not its own
        pa.array([0, 2, 3]), pa.array(["x", "y", "z"]), mask=pa.array([True, False])
    )
    assert ItemTable.from_source(pa.table({"item_id": ["a", "b"], "tags": hidden})).texts() == ["", "z"]
    nested = pa.table({"item_id": list("abc"), "tags": [[["0"]], [["1"], None, ["2", "3"]], None]}).slice(1)
    assert ItemTable.from_source(nested).texts() == ["1, 2, 3", ""]


def test_a_million_items_are_read_in_seconds():
    n = 300_000
    items = ItemTable.from_source({"item_id": np.arange(n), "title": np.arange(n).astype(str)})
    assert items.align(items.item_ids[::-1]).titles()[0] == str(n - 1)


@pytest.mark.parametrize(
    "title, shown",
    [
        ("Lion King, The (1994)", "The Lion King (1994)"),
        ("Lion King, The", "The Lion King"),
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("Avventura, L' (1960)", "L'Avventura (1960)"),
        ("City of Lost Children, The (Cité des enfants perdus, La) (1995)",
         "The City of Lost Children (Cité des enfants perdus, La) (1995)"),
        ("Good, the Bad and the Ugly, The", "The Good, the Bad and the Ugly"),
        ("Me, Myself & Irene (2000)", "Me, Myself & Irene (2000)"),
        ("Eat, Pray, Love", "Eat, Pray, Love"),
        ("", ""),
    ],
)  # fmt: skip
def test_display_title(title, shown):
    assert display_title(title) == shown
