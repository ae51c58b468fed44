"""`load_data`: order, filters, ties, duplicates, times and the report, on logs worked out by hand or by brute force."""

from __future__ import annotations

import json
from datetime import date, datetime, timezone

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.data.interactions import load_data
from hf_genrec.data.items import ItemTable

NAMES = ("user_id", "item_id", "timestamp", "rating")


def load(rows, **options):
    columns = dict(zip(NAMES, map(list, zip(*rows))))
    return load_data(columns, **({"min_user": 0, "min_item": 0} | options))


def histories(data):
    return {user: [data.item_ids[i] for i in row] for user, row in zip(data.user_ids, data.sequences)}


LOGS = st.lists(
    st.tuples(st.sampled_from("uvwx"), st.sampled_from("abcdef"), st.integers(0, 5)), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(rows=LOGS, keep_all=st.booleans())
def test_histories_against_plain_python(rows, keep_all):
    data = load(rows, keep_duplicates=keep_all)
    expected, seen = {}, set()
    for user, item, time in sorted(rows, key=lambda row: (row[0], row[2])):  # sorted() is stable
        if keep_all or (user, item, time) not in seen:
            expected.setdefault(user, []).append((item, time))
        seen.add((user, item, time))
    assert histories(data) == {user: [item for item, _ in row] for user, row in expected.items()}
    assert data.sequences.timestamps.tolist() == [time for row in expected.values() for _, time in row]
    report = data.report
    assert report.exact_duplicates == len(rows) - len(seen)
    times = {user: [time for _, time in row] for user, row in expected.items()}
    assert report.ties_rows == sum(row.count(time) > 1 for row in times.values() for time in row)
    assert report.ties_beyond_first == sum(len(row) - len(set(row)) for row in times.values())
    assert report.ties_users == sum(len(set(row)) < len(row) for row in times.values())
    assert report.ties_last_two == sum(len(row) > 1 and row[-1] == row[-2] for row in times.values())
    largest = max(row.count(time) for row in times.values() for time in row)
    assert report.ties_largest == (largest if largest > 1 else 0)
    repeated = sum(len(row) - len({item for item, _ in row}) for row in expected.values())
    assert report.repeated_interactions == repeated and data.repeats == (repeated > 0)
    assert data.item_ids == sorted({item for _, item, _ in rows}) and data.user_ids == sorted(expected)
    assert report.interactions == data.sequences.num_items == report.rows_read - sum(report.dropped.values())


@settings(max_examples=60, deadline=None)
@given(rows=LOGS, bound=st.integers(2, 4))
def test_five_core_counts(rows, bound):
    try:
        data = load(rows, min_user=bound, min_item=bound)
    except ValueError as problem:
        assert "survives" in str(problem)
        return
    assert data.sequences.lengths.min() >= bound
    assert np.bincount(data.sequences.items, minlength=data.num_items).min() >= bound
    report = data.report
    assert report.interactions + sum(report.dropped.values()) == report.rows_read
    assert report.users + report.users_dropped == len({row[0] for row in rows})
    assert report.items + report.items_dropped == len({row[1] for row in rows})


def test_reasons_of_dropping():
    rows = [("u", item, 1) for item in "abc"] + [("v", item, 1) for item in "abc"] + [("w", "a", 1), ("v", "z", 2)]
    report = load(rows, min_user=2, min_item=2).report
    assert report.dropped == {
        "item with fewer than 2 interactions": 1,
        "user with fewer than 2 interactions": 1,
    }
    assert (report.users_dropped, report.items_dropped) == (1, 1)


def test_the_order_of_the_file_decides_ties_only():
    rows = [("u", "b", 2), ("u", "a", 1), ("v", "c", 3), ("v", "a", 3), ("u", "c", 0)]
    data, other = load(rows), load(rows[::-1])
    assert data.item_ids == other.item_ids and data.user_ids == other.user_ids
    assert histories(data) == {"u": ["c", "a", "b"], "v": ["c", "a"]}
    assert histories(other) == {"u": ["c", "a", "b"], "v": ["a", "c"]}


def test_shuffled_ties():
    rows = [("u", f"i{n}", n // 50) for n in range(100)]
    plain = load(rows)
    orders = {}
    for seed in (0, 0, 1):
        data = load(rows, shuffle_ties=seed)
        row = histories(data)["u"]
        assert set(row[:50]) == {f"i{n}" for n in range(50)}  # times still order
        assert orders.setdefault(seed, row) == row  # the seed decides alone
        assert data.report.tie_policy == f"shuffled (seed {seed})"
        assert data.report.ties_rows == plain.report.ties_rows == 100
    assert orders[0] != orders[1] and orders[0] != histories(plain)["u"]


def test_shuffling_ties_is_fair():
    first = sum(
        histories(load([("u", "a", 1), ("u", "b", 1)], shuffle_ties=seed))["u"][0] == "a" for seed in range(200)
    )
    assert 60 < first < 140


@pytest.mark.parametrize(
    "times, unit, seconds",
    [
        ([20, 3], "s", [3, 20]),
        ([1_600_000_001, 1_600_000_000], "s", [1_600_000_000, 1_600_000_001]),
        ([1_600_000_001.25, 1_600_000_001.125], "s", [1_600_000_001, 1_600_000_001]),
        ([1_600_000_001_500, 1_600_000_000_900], "ms", [1_600_000_000, 1_600_000_001]),
        ([1_600_000_001_500_000, 1_600_000_001_000_000], "us", [1_600_000_001, 1_600_000_001]),
        ([1_600_000_001 * 10**9, 1_600_000_000 * 10**9], "ns", [1_600_000_000, 1_600_000_001]),
        ([-5, -7], "s", [-7, -5]),
        (["2", "1"], "s", [1, 2]),
        ([" 2.5", "1e0"], "s", [1, 2]),
        (["1970-01-02", "1970-01-01"], "datetime", [0, 86_400]),
        (["1970-01-01T00:00:02", "1970-01-01 00:00:01.5"], "datetime", [1, 2]),
        (["1970-01-01T00:00:02Z", "1970-01-01T01:00:01+01:00"], "datetime", [1, 2]),
        ([date(1970, 1, 2), date(1970, 1, 1)], "datetime", [0, 86_400]),
        ([datetime(1970, 1, 2), datetime(1970, 1, 1)], "datetime", [0, 86_400]),
        (
            [datetime(1970, 1, 2, tzinfo=timezone.utc), datetime(1970, 1, 1, tzinfo=timezone.utc)],
            "datetime",
            [0, 86_400],
        ),
        (pa.array([2, 1], pa.uint32()), "s", [1, 2]),
        (pa.array([2000, 1000], pa.timestamp("ms")), "datetime", [1, 2]),
    ],
)
def test_times(times, unit, seconds):
    data = load_data({"user_id": ["u", "u"], "item_id": ["b", "a"], "timestamp": times}, min_user=0, min_item=0)
    assert histories(data) == {"u": ["a", "b"]}
    assert data.report.time_unit == unit and data.sequences.timestamps.tolist() == seconds
    assert data.report.ties_rows == 0  # told apart at the resolution of the source
    assert (data.report.first_time, data.report.last_time) == (seconds[0], seconds[1])


@pytest.mark.parametrize(
    "largest, unit", [(10**11 - 1, "s"), (10**11, "ms"), (10**14 - 1, "ms"), (10**14, "us"), (10**17, "ns")]
)
def test_the_size_tells_the_unit(largest, unit):
    assert load([("u", "a", largest), ("u", "b", largest)]).report.time_unit == unit


def test_time_unit_can_be_told():
    rows = [("u", "a", 5_000), ("u", "b", 200_000_000_000)]  # mixed by their size, but all ms
    assert load(rows, time_unit="ms").sequences.timestamps.tolist() == [5, 200_000_000]


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([10, 9], ["9", "10"]),
        ([10.0, 9.0], ["9", "10"]),
        (["10", "9"], ["9", "10"]),
        (["010", "9"], ["010", "9"]),
        ([" x", "x"], [" x", "x"]),
        (["null", "None"], ["None", "null"]),
        (pa.array(["b", "a"]).dictionary_encode(), ["a", "b"]),
        ([2**60, -1], ["-1", str(2**60)]),
    ],
)
def test_ids(ids, expected):
    data = load_data({"user_id": ids, "item_id": ids, "timestamp": [1, 2]}, min_user=0, min_item=0)
    assert data.item_ids == expected and data.user_ids == expected


def test_minus_zero_is_zero():
    data = load_data({"user_id": [0.0, -0.0], "item_id": ["a", "b"], "timestamp": [1, 2]}, min_user=0, min_item=0)
    assert histories(data) == {"0": ["a", "b"]}


def test_min_rating():
    rows = [("u", "a", 1, 5.0), ("u", "b", 2, 2.0), ("v", "b", 3, 4.0)]
    data = load(rows, min_rating=4)
    assert histories(data) == {"u": ["a"], "v": ["b"]} and data.report.dropped == {"rated below 4": 1}


def test_items_give_the_order_and_cold_items_stay_without_a_bound():
    items = {"item_id": ["z", "b", "a"], "title": ["Z", "B", "A"]}
    rows = [("u", "a", 1), ("u", "q", 2), ("u", "b", 3)]
    data = load(rows, items=items)
    assert data.item_ids == ["z", "b", "a", "q"] and data.items.titles() == ["Z", "B", "A", ""]
    assert histories(data) == {"u": ["a", "q", "b"]}
    report = data.report
    assert (report.items_without_interactions, report.items_not_in_table, report.items_without_text) == (1, 1, 1)
    data = load(rows, items=ItemTable.from_source(items), min_item=1)
    assert data.item_ids == ["b", "a", "q"] and data.items.item_ids == data.item_ids
    assert data.report.items_without_interactions == 0


def test_row_numbers_survive_the_rating_filter():
    rows = [("u", "a", 1, 1.0), ("u", None, 2, 5.0)]
    with pytest.raises(ValueError, match="row 2"):
        load(rows, min_rating=4)


def test_a_log_without_times_warns_once_and_says_so():
    with pytest.warns(UserWarning, match="no timestamp column"):
        data = load_data({"user_id": ["u", "u"], "item_id": ["b", "a"]}, min_user=0, min_item=0)
    assert histories(data) == {"u": ["b", "a"]} and data.tied is None
    assert data.report.ties_rows is None and "time order" in data.report.notes[0]


def test_report_is_json_printable_and_holds_no_path(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\nu,a,1\nu,b,1\nu,b,1\n")
    data = load_data(path, name="mine", min_user=0, min_item=0)
    described = json.dumps(data.report.to_dict())
    assert str(tmp_path) not in described and '"source": "log.csv"' in described
    assert data.report.density == 1.0
    text = str(data.report)
    for part in ("mine: 1 users, 2 items, 2 interactions", "exact duplicate", "1 users tie on their last two"):
        assert part in text


def test_bounds_default_to_five():
    with pytest.raises(ValueError, match="min_user=5 and min_item=5"):
        load_data({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]})
