"""Tables of recipes: aggregation by hand, the committed one beside its card, and a run that goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hf_genrec.errors import RecipeError
from hf_genrec.recipes import table_run
from hf_genrec.recipes.resolver import FOLDER, resolve_recipe
from hf_genrec.recipes.table import TABLES, collect_table, read_table, render_table, run_table, table_recipes

CARDS = Path(__file__).parents[2] / "model_cards"


def job(name: str, **changed: object) -> table_run.TableJob:
    made = {
        "name": name,
        "seed": 0,
        "dataset": "d",
        "train_seconds": 30.0,
        "items": None,
        "data_dir": None,
        "base": None,
    }
    return table_run.TableJob(**(made | changed))


def write_run(folder: Path, name: str, seed: int, ranks: list[int | None], popular: list[int | None]) -> None:
    metrics = {"dataset": "d", "protocol": "leave_one_out", "identifiers": {"collision_rate": 0.25}, "wall_seconds": {}}
    run = {
        "recipe": name, "title": name, "seed": seed, "metrics": metrics, "ranks": ranks, "popularity_ranks": popular,
        "popularity": {"recall@10": 0.5, "ndcg@10": 0.25}, "train_processor_seconds": 10.0 + seed,
    }  # fmt: skip
    (folder / f"{name}-{seed}.json").write_text(json.dumps(run), encoding="utf-8")


def test_means_and_differences_by_hand(tmp_path) -> None:
    popular = [1, None, None, None]
    write_run(tmp_path, "tiger_packed", 0, [1, 2, None, 11], popular)
    write_run(tmp_path, "tiger_packed", 1, [1, None, None, None], popular)
    write_run(tmp_path, "cid", 0, [1, 2, 3, None], popular)
    write_run(tmp_path, "cid", 1, [1, 2, None, 1], popular)
    table = collect_table("identifiers", tmp_path, ["tiger_packed", "cid", "letter"], [0, 1], 10.0)
    cid, tiger = table["rows"]  # best first; a recipe without runs has no row
    gain = [1.0, 1 / math.log2(3), 0.5]  # of ranks 1, 2, 3
    assert cid["recipe"] == "cid" and tiger["recipe"] == "tiger_packed" and cid["seeds"] == 2
    assert tiger["recall@10"]["seed_values"] == [0.5, 0.25] and tiger["recall@10"]["mean"] == 0.375
    assert cid["ndcg@10"]["mean"] == pytest.approx((2 * gain[0] + gain[1] + gain[2] + gain[0] + gain[1]) / 8, abs=1e-4)
    difference = cid["difference_to_reference"]["recall@10"]["difference"]
    assert difference == pytest.approx(0.75 - 0.375) and "difference_to_reference" not in tiger
    assert tiger["difference_to_popularity"]["recall@10"]["difference"] == pytest.approx(0.375 - 0.25)
    assert tiger["train_seconds"] == 10.5 and tiger["collision_rate"] == 0.25
    text = render_table(table)
    assert text.index("`cid`") < text.index("`tiger_packed`") and "0.5000 / 0.2500" in text


def test_what_the_last_stage_changed_stands_below_the_table(tmp_path) -> None:
    popular = [1, None, None, None]
    write_run(tmp_path, "tiger_packed", 0, [1, 2, None, 11], popular)
    for seed, verdict in ((0, "better"), (1, "worse")):
        write_run(tmp_path, "tiger_s_dpo", seed, [1, 2, 3, None], popular)
        path = tmp_path / f"tiger_s_dpo-{seed}.json"
        run = json.loads(path.read_text())
        part = {"targets": 4, "before": 0.25, "after": 0.5, "verdict": verdict}
        few = {"targets": 0, "before": None, "after": None, "verdict": "too few targets"}
        compared = {"metric": "ndcg@10", "all": part, "buckets": {"tail": part, "cold": few}}
        stages = [{"method": "next_item"}, {"method": "softmax_dpo", "buckets": compared}]
        run["metrics"]["training"] = {"stages": stages}
        path.write_text(json.dumps(run))
    table = collect_table("alignment", tmp_path, table_recipes("alignment"), [0, 1], 10.0)
    text = render_table(table)
    assert "| `tiger_s_dpo` | 0 | softmax_dpo | 0.2500 -> 0.5000 ↑ | 0.2500 -> 0.5000 ↑ |  |" in text
    assert "| `tiger_s_dpo` | 1 | softmax_dpo | 0.2500 -> 0.5000 ↓ | 0.2500 -> 0.5000 ↓ |  |" in text
    assert "last_stage" not in next(row for row in table["rows"] if row["recipe"] == "tiger_packed")
    json.dumps(table, allow_nan=False)


@pytest.mark.parametrize(("name", "base"), [("item_lm", "models/other"), ("item_lm", None), ("sasrec", "models/other")])
def test_budget_and_language_model_reach_the_recipe(tmp_path, monkeypatch, name, base) -> None:
    seen = []

    def train(recipe, *rest, **options):
        seen.append(recipe)
        raise InterruptedError

    monkeypatch.setattr("hf_genrec.recipes.pipeline.train_recipe", train)
    with pytest.raises(InterruptedError):
        table_run.run(job(name, base=base), tmp_path / "x.json")
    given = resolve_recipe(name).model.get("base")
    assert seen[0].model.get("base") == (base if given and base else given)
    assert seen[0].training["max_train_seconds"] == 30.0 and seen[0].training["train_clock"] == "cpu"


def test_a_table_has_its_own_reference(tmp_path) -> None:
    write_run(tmp_path, "sasrec", 0, [1, None], [1, None])
    write_run(tmp_path, "item_lm", 0, [1, 2], [1, None])
    table = collect_table("language", tmp_path, table_recipes("language"), [0], 10.0)
    assert table["reference"] == "sasrec" and [row["recipe"] for row in table["rows"]] == ["item_lm", "sasrec"]
    assert table["rows"][0]["difference_to_reference"]["recall@10"]["difference"] == 0.5
    assert "NDCG@10 - sasrec" in render_table(table)


@pytest.mark.parametrize(
    ("key", "other"), [("dataset", "e"), ("train_seconds", 31.0), ("base", "models/other"), ("items", "items.csv")]
)
def test_a_result_of_another_run_is_not_taken_for_this_one(tmp_path, monkeypatch, key, other) -> None:
    def start(folder, asked):
        raise AssertionError(f"{asked} was started")

    monkeypatch.setattr("hf_genrec.recipes.table._start", start)
    write_run(tmp_path, "sasrec", 0, [1, None], [1, None])
    path = tmp_path / "sasrec-0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job": job("sasrec", **{key: other})}), encoding="utf-8")
    options = {"recipes": ["sasrec"], "seeds": [0], "train_seconds": 30.0, "progress": False}
    with pytest.raises(RecipeError, match=f"sasrec-0.json is the result of another run .{key} "):
        run_table("language", "d", tmp_path, **options)
    if key == "items":  # asked for as it was: nothing is started
        run_table("language", "d", tmp_path, **(options | {"items": other}))


def test_unknown_tables_and_recipes_are_named(tmp_path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'identifiers'"):
        table_recipes("identifier")
    with pytest.raises(RecipeError, match="did you mean 'letter'"):
        run_table("identifiers", "x.csv", tmp_path, recipes=["lettre"])


@pytest.mark.parametrize("name", TABLES)
def test_the_committed_table_its_card_and_the_status_of_recipes_agree(name) -> None:
    if not (FOLDER / f"table.{name}.json").is_file():
        pytest.skip("no table was committed")
    table = read_table(name)
    assert render_table(table).strip() in (CARDS / f"{name}.md").read_text(encoding="utf-8")
    for row in table["rows"]:
        clearly_above = row["difference_to_popularity"]["ndcg@10"]["low"] > 0
        status = resolve_recipe(row["recipe"]).status
        assert row["seeds"] == 3 and row["status"] == status
        if status == "works" and not clearly_above:  # then a longer run is on record
            result = json.loads((FOLDER / f"{row['recipe']}.result.json").read_text(encoding="utf-8"))
            assert result["difference_to_popularity"]["ndcg@10"]["low"] > 0, row["recipe"]
            assert result["budget"]["train_processor_seconds"] > table["budget"]["train_processor_seconds"]


@pytest.mark.slow
def test_a_table_is_run_and_goes_on_where_it_stopped(tmp_path) -> None:
    rows = ["user_id,item_id,timestamp"]
    rows += [f"u{user},i{(user + step) % 15:02d},{1000 * user + step}" for user in range(20) for step in range(8)]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    options = {"recipes": ["sasrec"], "seeds": [0, 1], "train_seconds": 2.0, "processes": 2, "progress": False}
    table = run_table("identifiers", str(tmp_path / "log.csv"), tmp_path / "out", **options)
    assert [row["recipe"] for row in table["rows"]] == ["sasrec"] and table["rows"][0]["seeds"] == 2
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("sasrec-*.json")}
    (tmp_path / "out" / "sasrec-1.json").unlink()
    again = run_table("identifiers", str(tmp_path / "log.csv"), tmp_path / "out", **options)
    assert (tmp_path / "out" / "sasrec-0.json").stat().st_mtime_ns == times["sasrec-0.json"]  # a finished run is kept
    assert again["rows"][0]["seeds"] == 2
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == json.loads(json.dumps(again))
