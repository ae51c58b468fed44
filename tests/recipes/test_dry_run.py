"""Every shipped recipe is built, takes a step and recommends on a generated catalogue, cut down to a second or two."""

from __future__ import annotations

import time

import pytest

import hf_genrec  # noqa: F401
from hf_genrec.cli.main import main
from hf_genrec.recipes.dry_run import dry_run, dry_run_data, shrunk
from hf_genrec.recipes.resolver import recipe_names, resolve_recipe

_SECONDS: dict[str, float] = {}


@pytest.fixture(scope="module")
def generated():
    return dry_run_data()


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_runs_end_to_end(name, generated) -> None:
    started = time.process_time()
    found = dry_run(resolve_recipe(name), *generated)
    _SECONDS[name] = time.process_time() - started
    assert found["recipe"] == name and found["parameters"] > 0 and found["tokens_per_item"] >= 1


def test_all_recipes_together_take_less_than_a_minute() -> None:
    if len(_SECONDS) < len(recipe_names()):
        pytest.skip("counts the runs above, and not all of them were selected")
    assert sum(_SECONDS.values()) < 60.0, sorted(_SECONDS.items(), key=lambda entry: -entry[1])[:5]


def test_shrunk_keeps_the_components() -> None:
    recipe = resolve_recipe("tandem")
    small = shrunk(recipe)
    assert small.identifiers["quantizer"] == recipe.identifiers["quantizer"] and small.model["type"] == "rq_transformer"
    assert small.identifiers["codebook_sizes"] == [5, 5, 5] and recipe.identifiers["codebook_sizes"] == [64, 64, 64]


def test_command_line_dry_run(capsys) -> None:
    assert main(["train", "sasrec", "--dataset", "anything", "--output_dir", "nowhere", "--dry_run"]) == 0
    assert "takes a step" in capsys.readouterr().out
