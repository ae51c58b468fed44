"""Recipes resolve, stay short, and every wrong key or misfit is a typed error that names the nearest valid choice."""

from __future__ import annotations

import pytest

from hf_genrec.errors import IncompatibleComponentsError, RecipeError
from hf_genrec.recipes.resolver import FOLDER, STATUSES, list_recipes, recipe_names, resolve_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_resolve_and_stay_short(name: str) -> None:
    recipe = resolve_recipe(name)
    assert recipe.name == name and recipe.status in STATUSES and recipe.paper
    assert len((FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()) <= 40
    assert resolve_recipe(name).to_dict() == recipe.to_dict()


def test_the_four_recipes_are_there() -> None:
    assert {"tandem", "tiger", "tiger_rkmeans", "sasrec"} <= {row["name"] for row in list_recipes()}


def test_extends_merges_and_null_removes() -> None:
    base, derived = resolve_recipe("tiger"), resolve_recipe("tiger_rkmeans")
    assert derived.model == base.model and derived.identifiers["quantizer"] == "residual_kmeans"
    assert "latent_size" in base.identifiers and "latent_size" not in derived.identifiers


def test_provenance_comes_from_the_comments() -> None:
    assert "4.1" in resolve_recipe("tiger").provenance["model.d_model"]
    assert (
        resolve_recipe("tiger_rkmeans").provenance["model.d_model"]
        == resolve_recipe("tiger").provenance["model.d_model"]
    )


def test_overrides_by_short_and_long_name() -> None:
    recipe = resolve_recipe("tandem", {"learning_rate": 0.01, "model.dropout": 0.5, "features.cooccurrence.dim": 8})
    assert recipe.training["learning_rate"] == 0.01
    assert recipe.model["dropout"] == 0.5 and recipe.features["cooccurrence"]["dim"] == 8


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        ({"lerning_rate": 1.0}, "learning_rate"),
        ({"model.hiden_size": 8}, "hidden_size"),
        ({"modle.hidden_size": 8}, "model"),
        ({"identifiers.quantizer": "rqvae"}, "rq_vae"),
        ({"identifiers.collisions": "count"}, "counter"),
        ({"num_beams": "many"}, "must be int"),
        ({"model.dropout": [0.1, "x"]}, None),
    ],
)
def test_wrong_overrides_name_the_nearest_choice(overrides, hint) -> None:
    if hint is None:
        resolve_recipe(
            "tandem", overrides
        )  # a list is a type some field takes; the model configuration refuses it later
        return
    with pytest.raises(RecipeError, match=hint):
        resolve_recipe("tandem", overrides)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="tandem"):
        resolve_recipe("tandm")


def test_components_that_do_not_fit() -> None:
    with pytest.raises(IncompatibleComponentsError, match="atomic"):
        resolve_recipe(
            "sasrec",
            {
                "identifiers.quantizer": "residual_kmeans",
                "identifiers.features": ["cooccurrence"],
                "features.cooccurrence.dim": 8,
            },
        )
    with pytest.raises((IncompatibleComponentsError, RecipeError)):
        resolve_recipe("tandem", {"identifiers.features": []})


def test_own_recipe_file_and_its_errors(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nextends: tandem\ntraining: {learning_rate: 1e-3}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"unknown key|must be|1\.0e-3"):
        resolve_recipe(str(path), {"k": "x"})
    path.write_text("name: mine\nextends: tandem\ntraining: {learning_rate: 1.0e-3}\n", encoding="utf-8")
    assert resolve_recipe(str(path)).training["learning_rate"] == 1e-3
    path.write_text("name: mine\nextends: tiger_rkmeans\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="one level"):
        resolve_recipe(str(path))
    path.write_text("model: !!python/object:os.system {}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="not valid YAML"):
        resolve_recipe(str(path))


def test_searches_are_checked() -> None:
    recipe = resolve_recipe("tandem", {"decoding": "sample", "generation.decoding_options": {"seed": 1}})
    assert recipe.generation["decoding"] == "sample"
    with pytest.raises(RecipeError, match=r"generation.decoding: unknown choice 'samples': did you mean 'sample'"):
        resolve_recipe("tandem", {"decoding": "samples"})
    with pytest.raises(RecipeError, match=r"decoding_options.sede: did you mean 'seed'"):
        resolve_recipe("tandem", {"decoding": "sample", "generation.decoding_options": {"sede": 1}})
    with pytest.raises(IncompatibleComponentsError, match="needs a model with score_digits, which TigerFor"):
        resolve_recipe("tiger", {"decoding": "parallel"})


def test_an_unquoted_no_is_a_strategy() -> None:
    assert resolve_recipe("sasrec", {"eval_strategy": False}).training["eval_strategy"] == "no"
