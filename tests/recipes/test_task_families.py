"""Every task family by its name: in a recipe's `families` one step of training, in scripts/sft.py rows; else a typed error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_genrec.alignment.tasks.families import COLUMNS, ITEM_COLUMNS, TaskData, usable
from hf_genrec.alignment.tasks.language_families import language_fields
from hf_genrec.alignment.tasks.language_mixture import language_mixture
from hf_genrec.alignment.tasks.language_rows import LanguageEncoder
from hf_genrec.alignment.tasks.mixture import task_mixture
from hf_genrec.alignment.tasks.requested import lacking
from hf_genrec.alignment.tasks.templates import FAMILIES
from hf_genrec.alignment.tasks.templates_language import LANGUAGE_FAMILIES, language_wordings
from hf_genrec.data.interactions import load_data
from hf_genrec.data.splits import make_split
from hf_genrec.errors import RecipeError, TrainingError
from hf_genrec.recipes.components import METHODS
from hf_genrec.recipes.dry_run import dry_run
from hf_genrec.recipes.resolver import resolve_recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "alignment"))
from language_cases import IDS, make_tokenizer
from script_cases import line_for, load_script, write_world
from script_cases import run as run_script

ITEMS, USERS, LENGTH = 24, 24, 8
NAMES = tuple(dict.fromkeys(FAMILIES + LANGUAGE_FAMILIES))


def generated(*, columns: bool = True, texts: bool = True):
    """Item i is followed by item i + 1; with everything that families ask for, or with less."""
    log: dict[str, list] = {"user_id": [], "item_id": [], "timestamp": []}
    extra = [known[0] for known in COLUMNS.values()] if columns else []
    log |= {name: [] for name in extra}
    for user in range(USERS):
        for step in range(LENGTH):
            row = (f"u{user:02d}", f"i{(5 * user + step) % ITEMS:02d}", step)
            for name, value in zip(("user_id", "item_id", "timestamp"), row):
                log[name].append(value)
            for name in extra:
                log[name].append(float(1 + step % 5) if name == "rating" else f"{name} {user} {step}")
    items = {"item_id": [f"i{n:02d}" for n in range(ITEMS)]}
    if texts:
        items["title"] = [f"Title {n}" for n in range(ITEMS)]
        items |= {known[0]: [f"{name} {n}" for n in range(ITEMS)] for name, known in ITEM_COLUMNS.items()}
    data = load_data(log, items=items, min_user=0, min_item=0, extra_columns=extra)
    return data, make_split(data)


@pytest.fixture(scope="module")
def everything():
    return generated()


@pytest.fixture(scope="module")
def bare():
    return generated(columns=False, texts=False)


def recipe_with(families: dict, name: str = "lc_rec"):
    """The recipe with these families alone; LC-Rec's with quick identifiers, which need no texts."""
    recipe = resolve_recipe(name)
    recipe.training["method_options"] = {"families": families}
    if name == "lc_rec":
        recipe.features, recipe.model["item_init"] = {}, "mean"
        recipe.identifiers = {"quantizer": "atomic"}
    return recipe


def seen_families(monkeypatch, method: str) -> list[dict]:
    """The counts of rows per family of every run from here on."""
    found: list[dict] = []
    real = METHODS[method].load()

    def load(self):
        def run(job, **options):
            result = real(job, **options)
            found.append(result.summary.get("rows_per_family") or result.summary["samples_per_family"])
            return result

        return run if self is METHODS[method] else original(self)

    original = type(METHODS[method]).load
    monkeypatch.setattr(type(METHODS[method]), "load", load)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_family_takes_a_step_in_a_recipe(name, everything, monkeypatch):
    found = seen_families(monkeypatch, "sft")
    dry_run(recipe_with({name: 1.0}), *everything)
    assert list(found[0]) == [name] and found[0][name] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_p5_takes_a_step_in_an_encoder_decoder(name, everything, monkeypatch):
    found = seen_families(monkeypatch, "tasks")
    dry_run(recipe_with({name: 1.0}, "p5"), *everything)
    assert list(found[0]) == [name] and found[0][name] > 0


@pytest.mark.parametrize("name", NAMES)
def test_data_that_lack_a_familys_fields_are_refused_with_their_names(name, bare, monkeypatch):
    tasks = TaskData.from_split(*bare)
    if name in FAMILIES:
        missing = lacking(name, tasks)
        fine = bool(usable(name, tasks))
    else:
        known = language_fields(tasks)
        missing = sorted(set().union(*(wording.fields() for wording in language_wordings(name))) - known)
        fine = any(wording.fields() <= known for wording in language_wordings(name))
    recipe = recipe_with({name: 1.0})
    if fine:
        found = seen_families(monkeypatch, "sft")
        dry_run(recipe, *bare)
        assert list(found[0]) == [name]
        return
    with pytest.raises(TrainingError, match=rf"{name} has no {' and no '.join(missing)}.*data.extra_columns"):
        dry_run(recipe, *bare)


def test_the_bare_data_feed_some_families_and_not_others(bare):
    """So that both halves of the test above are run."""
    tasks = TaskData.from_split(*bare)
    assert "title" not in tasks.fields() and not lacking("sequential", tasks) and lacking("rating", tasks)
    assert "title" not in language_fields(tasks) and "history" in language_fields(tasks)


@pytest.mark.parametrize(
    ("recipe", "name", "message"),
    [
        ("lc_rec", "candidate", "did you mean 'candidates'"),
        ("lc_rec", "Item-Search", "did you mean 'item_search'"),
        ("lc_rec", "yes_no:liked", "its kinds are rated, taken"),
        ("lc_rec", "direct:choose", "did you mean 'direct'"),
        ("p5", "sequentail", "did you mean 'sequential'"),
        ("p5", "candidates", "training method sft"),
    ],
)
def test_unknown_families_are_named_with_the_nearest_before_any_work(recipe, name, message):
    with pytest.raises(RecipeError, match=f"unknown task family '{name}'.*{message}"):
        resolve_recipe(recipe, {"training.method_options": {"families": {name: 1.0}}})


def test_kinds_can_be_named_too(everything):
    kinds = [f"{name}:{w.kind}" for name in LANGUAGE_FAMILIES for w in language_wordings(name)]
    asked = [name for name in dict.fromkeys(kinds) if name != "yes_no:taken"]  # this data has ratings
    tokenizer = make_tokenizer(ids=[f"i{n:02d}" for n in range(ITEMS)], codes=[[n // 5, n % 5] for n in range(ITEMS)])
    made = language_mixture(TaskData.from_split(*everything), LanguageEncoder(tokenizer), dict.fromkeys(asked, 0.1))
    assert list(made.families) == asked


def test_the_script_takes_the_same_names(tmp_path):
    """All families at once that titles and descriptions feed, by the same names as in a recipe."""
    world = write_world(tmp_path)
    rows = (world / "items.csv").read_text().splitlines()
    described = [f"{row},About {n},{'drama' if n % 2 else 'war'}" for n, row in enumerate(rows[1:])]
    (world / "items.csv").write_text("\n".join([rows[0] + ",description,genres", *described]) + "\n")
    script = load_script("sft")
    asked = {name: 0.1 for name in NAMES if name not in ("rating", "explanation", "review")}
    more = ["--tasks", json.dumps(asked), "--max_steps", "1", "--num_candidates", "4", "--max_length", "1024"]
    metrics = run_script(script, line_for("sft", world, tmp_path / "out", *more))
    assert set(metrics["training"]["rows_per_family"]) == set(asked)
    for name, message in (("next_itm", "did you mean 'next_item'"), ("review", "review has no headline and no")):
        with pytest.raises(TrainingError, match=message):
            run_script(script, line_for("sft", world, tmp_path / "no", "--tasks", json.dumps({name: 1.0})))


# ---------------------------------------------------------------------------------------------------- columns by name


WISHES = {"item_search": {"weight": 1.0, "intention": "asked"}}


def with_wishes(where: str):
    """The wish of an interaction or of an item in a column of its own name."""
    log: dict[str, list] = {"user_id": [], "item_id": [], "timestamp": [], "asked": [], "count": []}
    for user in range(4):
        for step in range(6):
            row = (f"u{user}", IDS[(user + step) % 10], step, f"log wish {user} {step}", 2)
            for name, value in zip(log, row):
                log[name].append(value)
    items = {"item_id": IDS, "title": [f"Title {n}" for n in range(10)], "plot": [f"About {n}" for n in range(10)]}
    if where == "items":
        items["asked"] = [f"item wish {n}" for n in range(10)]
    extra = ["asked", "count"] if where == "log" else []
    data = load_data(log, items=items, min_user=0, min_item=0, extra_columns=extra)
    return TaskData.from_split(data, make_split(data))


def texts_of_rows(data: TaskData, families: dict) -> set[str]:
    tokenizer = make_tokenizer()
    made = language_mixture(data, LanguageEncoder(tokenizer), families)
    return {tokenizer.decode(made[n]["input_ids"]) for n in range(len(made))}


@pytest.mark.parametrize("where", ["log", "items"])
def test_wishes_come_from_the_column_that_is_named(where):
    data = with_wishes(where)
    shown = texts_of_rows(data, WISHES)
    assert shown and all(("log wish" if where == "log" else "item wish") in text for text in shown)
    stand_in = texts_of_rows(data, {"item_search": 1.0})  # documented: the description where no column is known
    assert stand_in and all("About" in text and "m wish" not in text and "g wish" not in text for text in stand_in)
    other = texts_of_rows(data, WISHES | {"item_to_index:description": 1.0})  # of this family alone
    assert any("About" in text for text in other)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"intention": "askd"}, r"'item_search'.*no column 'askd' to take the intention from: did you mean 'asked'"),
        ({"intention": ["asked"]}, "no column .* to take the intention from"),
        ({"intention": "count"}, "column 'count' of the log cannot be the intention: it does not hold text"),
        ({"intent": "asked"}, "no field 'intent' of task families: did you mean 'intention'"),
        ({"description": "asked"}, "no column 'asked' to take the description from"),
    ],
)
def test_columns_that_cannot_be_are_named(named, message):
    data = with_wishes("log")
    with pytest.raises(TrainingError, match=message):
        texts_of_rows(data, {"item_search": {"weight": 1.0, **named}})
    for bad in (None, "1", True, {"intention": "asked"}):
        with pytest.raises(TrainingError, match=r"'item_search'.*no positive weight"):
            texts_of_rows(data, {"item_search": bad})


def test_a_recipe_names_the_columns_of_its_families(everything, monkeypatch):
    """P5's explanations out of another column, and reviews as wishes, through `families` of the two methods."""
    found = seen_families(monkeypatch, "sft")
    dry_run(recipe_with({"item_search": {"weight": 0.5, "intention": "review"}}), *everything)
    assert found[0]["item_search"] == round(0.5 * USERS * (LENGTH - 2))
    found = seen_families(monkeypatch, "tasks")
    dry_run(recipe_with({"explanation": {"weight": 1.0, "explanation": "review"}}, "p5"), *everything)
    assert list(found[0]) == ["explanation"]


def test_named_columns_reach_the_encoder_decoder():
    from hf_genrec.alignment.tasks.fill import ExampleEncoder

    data, tokenizer = with_wishes("log"), make_tokenizer()
    made = task_mixture(
        data, ExampleEncoder(tokenizer), {"explanation": {"weight": 1.0, "explanation": "asked"}}, packed=False
    )
    rows = [row for n in range(len(made)) for row in made[n]]
    assert rows and all("log wish" in tokenizer.decode(row.targets[0]) for row in rows)
    assert np.all([len(row.targets) == 1 for row in rows])
