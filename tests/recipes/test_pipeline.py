"""The whole way on a generated catalogue: an item is followed by its successor, so Hit@1 must be 1.0."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from hf_genrec import load_artifact
from hf_genrec.cli.main import main, parse_overrides
from hf_genrec.errors import ItemTableError, RequestError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.recipes.pipeline import train_recipe
from hf_genrec.recipes.resolver import resolve_recipe

ITEMS, USERS, LENGTH = 60, 120, 14


def _write_log(folder, with_items: bool = True):
    """A log in which item i is followed by i + 1 (cyclic), and an item table with hostile titles among the others."""
    generator = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(USERS):
        start = int(generator.integers(ITEMS))
        rows += [f"u{user},i{(start + step) % ITEMS:03d},{1_000_000 + user * 50 + step}" for step in range(LENGTH)]
    (folder / "log.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    if with_items:
        titles = ['"Film <a_1>, | part"', "</s> ignore", "**bold** [x](http://e)"]
        with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            rows = ((f"i{n:03d}", f"{titles[n % 3]} {n}", f"kind {n // 15}", f"part {n // 5}") for n in range(ITEMS))
            table.writerows([("item_id", "title", "kind", "part"), *rows])
    return folder / "log.csv"


SMALL = {
    "codebook_sizes": [8, 8],
    "features.cooccurrence.dim": 16,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "num_train_epochs": 30,
    "max_history": 12,
    "model.dropout": 0.1,
    "logging_steps": 1000,
    "eval_epochs": 10,
    "features.text.when_missing": "skip",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("successor")
    log = _write_log(folder, with_items=False)
    recipe = resolve_recipe("tandem", SMALL)
    return train_recipe(recipe, log, folder / "model", baselines=["popularity", "item_graph"], progress=False)


def test_successor_catalogue_hit_at_1(trained) -> None:
    assert trained.metrics["test"]["recall@1"] == 1.0
    generated = trained.model.recommend_indices  # generation alone, whatever fusion weight the validation part chose
    batch = trained.tokenizer.encode_item_indices([np.arange(n, n + 6) for n in range(50)], return_tensors="pt")
    config = trained.model.recommendation_config.merged(dense_weight=0.0)
    trie = ItemTrie.from_tokenizer(trained.tokenizer)
    items, _ = generated(batch["input_ids"], batch["attention_mask"], trie=trie, k=1, num_beams=20, config=config)
    assert items[:, 0].tolist() == list(range(6, 56))
    assert trained.metrics["baselines"]["popularity"]["recall@1"] < 0.5


def test_artefact_holds_the_contract_files(trained) -> None:
    names = {path.name for path in trained.folder.iterdir()}
    expected = "config.json model.safetensors generation_config.json recommendation_config.json tokenizer_config.json "
    expected += "item_codes.safetensors recipe.yaml metrics.json manifest.json README.md"
    assert set(expected.split()) <= names
    metrics = json.loads((trained.folder / "metrics.json").read_text())
    assert set(metrics["baselines"]) == {"popularity", "item_graph"} and metrics["identifiers"]["collision_rate"] == 0.0


def test_reloaded_artefact_recommends_the_successor(trained) -> None:
    artifact = load_artifact(trained.folder)
    answers = artifact.recommend([["i004", "i005", "i006"], ["i057", "i058"], []], k=3)
    assert [answer[0].item_id for answer in answers[:2]] == ["i007", "i059"]
    assert len(answers[2]) == 3  # a new user without any history


def test_command_line_reads_the_artefact(trained, capsys) -> None:
    assert main(["recommend", str(trained.folder), "--history", "i010,i011", "-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommendations"][0]["item_id"] == "i012"
    dataset = str(trained.folder.parent / "log.csv")
    assert main(["evaluate", str(trained.folder), "--dataset", dataset, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"]["recall@1"] == 1.0
    assert main(["recommend", str(trained.folder), "--history", "nothing"]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "nothing" in error and "Traceback" not in error


def test_recipe_that_needs_text_says_so_before_training(tmp_path) -> None:
    log = _write_log(tmp_path, with_items=False)
    with pytest.raises(ItemTableError):
        train_recipe(resolve_recipe("tiger"), log, tmp_path / "model", baselines=[], progress=False)


def test_unknown_baseline(tmp_path) -> None:
    with pytest.raises(RequestError, match="item_graph"):
        train_recipe(resolve_recipe("sasrec"), "movielens-100k", tmp_path / "m", baselines=["graph"])


def test_overrides_are_read_as_yaml() -> None:
    assert parse_overrides(["--a", "1e-3", "--b=[1, 2]", "--c", "true", "--d", "text"]) == {
        "a": 1e-3,
        "b": [1, 2],
        "c": True,
        "d": "text",
    }
    with pytest.raises(RequestError, match="has no value"):
        parse_overrides(["--a"])


_SMALL_TIGER = {
    "codebook_sizes": [8, 8], "features.text": None, "features.cooccurrence.dim": 16, "identifiers.features": ["cooccurrence"],
    "model.d_model": 32, "model.d_ff": 64, "model.d_kv": 16, "model.num_layers": 1, "model.num_decoder_layers": 1,
    "model.num_heads": 2, "model.dropout_rate": 0.0, "training.max_steps": 1500, "per_device_train_batch_size": 64,
    "learning_rate": 3e-3, "warmup_steps": 50, "lr_scheduler_type": "cosine", "num_user_tokens": 0,
}  # fmt: skip
_NO_TEXT = {
    "features.text": None, "features.cooccurrence.dim": 16, "identifiers.features": ["cooccurrence"],
}  # fmt: skip
_TREE = {"quantizer": "tree", "features": ["cooccurrence"], "depth": 2, "balanced": True, "code_style": "prefix"}
_SMALL_PACKED = {
    "codebook_sizes": [8, 8], "pca_dim": None, "num_train_epochs": 60, "per_device_train_batch_size": 4,
    "model.dropout_rate": 0.0, "model.num_layers": 1, "model.num_decoder_layers": 1,
}  # fmt: skip
_KMEANS_PART = {"quantizer": "residual_kmeans", "features": ["cooccurrence"], "codebook_sizes": [32, 16]}
_SMALL_TEXT_TO_TEXT = {
    "model.d_model": 32, "model.d_kv": 16, "model.num_layers": 1, "model.num_decoder_layers": 1, "model.dropout_rate": 0.0,
    "num_train_epochs": 40, "per_device_train_batch_size": 4, "ema_decay": None,
}  # fmt: skip
_SMALL_RQ = {"codebook_sizes": [8, 8], "latent_size": 8, "hidden_sizes": [16], "identifiers.max_steps": 300}
_RQ_TIGER = _NO_TEXT | _SMALL_RQ | {"num_train_epochs": 60, "per_device_train_batch_size": 8}
_OTHERS = {
    "idgenrec": {
        "identifiers.min_count": 1,
        "text_tokens": 8,
        "per_device_train_batch_size": 4,
        "training.method_options": {
            "cycles": 2,
            "recommender_epochs": 2,
            "warm_epochs": 2,
            "final_epochs": 40,
            "generator_steps": 60,
        },
    },
    "colarec": {
        "features.cooccurrence.dim": 16,
        "branching": 4,
        "model.d_model": 32,
        "model.dropout_rate": 0.0,
        "max_history": 12,
        "num_train_epochs": 100,
        "per_device_train_batch_size": 4,
        "ema_decay": None,
    },
    "letter": _RQ_TIGER | {"collision_options": {"fallback": "next_nearest"}},
    "cost": _RQ_TIGER,
    "hid_vae": _RQ_TIGER
    | {
        "identifiers.tags": {"columns": ["kind", "part"], "order": "given", "separators": None, "min_items": 2},
        "identifiers.losses": {"tag_contrast": {"tag_vectors": "items"}},
        "collisions": "counter",
    },
    "etegrec": _SMALL_TIGER
    | {
        "identifiers.max_steps": 300,
        "latent_size": 8,
        "hidden_sizes": [16],
        "training.max_steps": -1,
        "per_device_train_batch_size": 8,
        "training.method_options": {"cycles": 2, "recommender_epochs": 3, "warm_epochs": 3, "final_epochs": 90},
    },
    "eager": _NO_TEXT
    | {"identifiers.features": None, "identifiers.parts": [_TREE, _TREE | {"branching": 10}]}
    | {"model.features": ["cooccurrence"], "num_train_epochs": 25},
    "sasrec": {"num_train_epochs": 20},
    "tiger": _SMALL_TIGER | {"identifiers.max_steps": 300, "latent_size": 8, "hidden_sizes": [16]},
    "tiger_rkmeans": _SMALL_TIGER,
    "tiger_packed": _NO_TEXT | _SMALL_PACKED,
    "tiger_svd": {key: value for key, value in _SMALL_PACKED.items() if key not in ("codebook_sizes", "pca_dim")}
    | {"num_codebooks": 3, "codebook_size": 8, "num_train_epochs": 90},
    "liger": _NO_TEXT | _SMALL_PACKED | {"model.features": ["cooccurrence"], "projection_sizes": [32]},
    "d3": {"num_train_epochs": 30, "vocab_size": 400, "eval_strategy": "no"},
    "transrec": {
        "num_train_epochs": 45,
        "vocab_size": 400,
        "model.facets": ["id"],
        "eval_strategy": "no",
        "generation.decoding_options": {"max_tokens": 14},
    },
    "p5": _SMALL_TEXT_TO_TEXT | {"training.method_options": {"families": {"sequential": 2.0, "direct": None}}},
    "cid": _SMALL_TEXT_TO_TEXT | {"num_clusters": 4, "max_cluster": 8},
    "psrq": {"features.text": None, "features.cooccurrence.dim": 16, "num_train_epochs": 30, "collisions": "counter"}
    | {"identifiers.parts": [_KMEANS_PART, _KMEANS_PART], "part_levels": [2, 2]},
    "rpg": _NO_TEXT
    | {"num_codebooks": 4, "codebook_size": 16, "pca_dim": None, "whiten": False, "num_train_epochs": 40},
    "llada_rec": _NO_TEXT
    | {"codebook_sizes": [8, 8, 8], "model.dropout": 0.0, "num_train_epochs": 40, "per_device_train_batch_size": 4},
    "setrec": {
        "features.text.dim": 16,
        "features.cooccurrence.dim": 16,
        "autoencoder_sizes": [32],
        "num_train_epochs": 20,
    },
    "vq_rec": _NO_TEXT | {"num_codebooks": 4, "codebook_size": 16, "pca_dim": None, "num_train_epochs": 30},
    "actionpiece": _NO_TEXT
    | {
        "num_codebooks": 3,
        "codebook_size": 16,
        "attribute_columns": [],
        "hash_buckets_size": 16,
        "vocabulary_size": 70,
        "training.method_options": {"stretch": 1.0},
        "num_train_epochs": 250,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 32,
        "ema_decay": None,
        "eval_epochs": 30,
        "generation.num_beams": 20,
    },
    "specgr": _NO_TEXT | {"codebook_sizes": [8, 8], "model.features": ["cooccurrence"], "num_train_epochs": 30},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_OTHERS))
def test_other_recipes_reach_hit_at_1_too(tmp_path, name) -> None:
    log = _write_log(tmp_path)
    options = {"max_history": 12, "logging_steps": 1000, "eval_epochs": 10} | _OTHERS[name]
    recipe = resolve_recipe(name, options)
    items = tmp_path / "items.csv" if recipe.needs_text() or "tags" in recipe.identifiers else None
    trained = train_recipe(recipe, log, tmp_path / "model", items=items, baselines=["popularity"], progress=False)
    assert trained.metrics["test"]["recall@1"] == 1.0
