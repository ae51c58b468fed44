"""The named data sets against published figures. Skipped where the data is absent."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from hf_genrec.data.interactions import load_data
from hf_genrec.data.named import NAMED_DATASETS
from hf_genrec.data.splits import global_time, leave_one_out


def test_movielens_100k(ml100k_dir):
    data = load_data("movielens-100k")
    assert (data.num_users, data.num_items, data.sequences.num_items) == (943, 1_682, 100_000)
    assert not data.repeats and data.report.dropped == {} and "recbole" not in sys.modules
    assert data.item_ids == [str(n) for n in range(1, 1_683)]
    lengths = data.sequences.lengths
    assert (lengths.min(), np.median(lengths), lengths.max()) == (20, 65, 737)
    titles = dict(zip(data.item_ids, data.items.titles()))
    assert titles["1"] == "Toy Story (1995)" and titles["71"] == "The Lion King (1994)"
    assert data.items.texts()[0] == "Toy Story (1995) Animation Children's Comedy"
    assert data.items.has_text().all()
    assert (data.report.first_time, data.report.last_time) == (874_724_710, 893_286_638)
    # "only 49 % of the timestamps are distinct within a user"
    assert (~data.tied).mean() == pytest.approx(0.49, abs=0.005)
    split = leave_one_out(data)
    assert split.train.num_items == 98_114 and len(split.validation) == len(split.test) == 943
    seen = [target in history for history, target in zip(split.test.histories, split.test.targets)]
    assert not any(seen)


def test_movielens_100k_by_its_folder(ml100k_dir):
    data = load_data(ml100k_dir, min_user=0, min_item=0)
    assert data.num_items == 1_682 and data.items.titles()[0] == "Toy Story (1995)"


def test_movielens_latest_small(data_dir):
    data = load_data("movielens-latest-small", data_dir=data_dir)
    assert (data.num_users, data.num_items, data.sequences.num_items) == (610, 3_650, 90_274)
    assert data.report.dropped == {"item with fewer than 5 interactions": 10_562}
    whole = load_data("movielens-latest-small", data_dir=data_dir, min_user=0, min_item=1)
    report = whole.report
    assert (report.users, report.items, report.interactions) == (610, 9_724, 100_836)
    assert (report.ties_beyond_first, report.ties_users, report.ties_largest, report.ties_last_two) == (
        15_790,
        300,
        128,
        94,
    )
    assert report.ties_rows == 23_228
    with_cold = load_data("movielens-latest-small", data_dir=data_dir / "ml-latest-small", min_user=0, min_item=0)
    assert with_cold.num_items == 9_742 and with_cold.report.items_without_interactions == 18
    assert len(global_time(data).test) > 0


def test_amazon_toys(data_dir):
    data = load_data("amazon-toys", data_dir=data_dir, require_text=True)
    assert (data.num_users, data.num_items, data.sequences.num_items) == (19_412, 11_924, 167_597)
    assert data.item_ids[:3] == ["1", "2", "3"] and data.sequences[0].tolist() == [0, 1, 2, 3, 4]
    assert not data.repeats and data.sequences.timestamps is None
    assert data.items.titles()[0] == "Pocoyo And Friends Swiggle Traks Feature Track With Bridge"
    assert data.items.texts()[0].endswith("Toys & Games, Dolls & Accessories, Dolls")
    assert load_data("amazon-toys", data_dir=data_dir, min_user=5, min_item=5).report.dropped == {}  # it is a 5-core


def test_amazon_games(data_dir):
    data = load_data("amazon-games", data_dir=data_dir)
    assert (data.num_users, data.num_items, data.sequences.num_items) == (49_156, 17_332, 342_329)
    row = data.sequences[data.user_ids.index("10")]
    assert [data.item_ids[i] for i in row][-3:] != [] and "217 218 219" in " ".join(data.item_ids[i] for i in row)


def test_amazon_phone(data_dir):
    data = load_data("amazon-phone", data_dir=data_dir)
    assert (data.num_users, data.num_items, data.sequences.num_items) == (27_879, 10_429, 194_439)
    assert data.sequences.timestamps is None and data.report.ties_users >= 18_925
    row = [data.item_ids[i] for i in data.sequences[data.user_ids.index("1")]]
    assert row[-2:] == ["2024", "4362"]  # validation, then test
    assert data.items.titles()[0].startswith("Leopard Home Button Sticker")
    shuffled = load_data("amazon-phone", data_dir=data_dir, shuffle_ties=0)
    changed = (shuffled.sequences.items != data.sequences.items).mean()
    assert 0.1 < changed < 0.5
    assert np.array_equal(np.sort(shuffled.sequences.items), np.sort(data.sequences.items))


def test_the_folder_can_come_from_the_environment(data_dir, monkeypatch):
    monkeypatch.setenv("HF_GENREC_DATA", str(data_dir))
    assert load_data("amazon_toys").name == "amazon-toys"
    assert load_data("ml-latest-small").name == "movielens-latest-small"


def test_table_of_names():
    assert list(NAMED_DATASETS) == [
        "movielens-100k",
        "movielens-latest-small",
        "amazon-toys",
        "amazon-games",
        "amazon-phone",
    ]
