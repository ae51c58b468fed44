"""P5 and CID end to end: one checkpoint for several families, ids that exist, and identifiers made of the training part."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_genrec.alignment.tasks.fill import ExampleEncoder, fill
from hf_genrec.alignment.tasks.templates import wordings
from hf_genrec.errors import ItemTableError, RecipeError
from hf_genrec.evaluation.validity import invalid_id_rate, names_items
from hf_genrec.recipes.build import build_identifiers
from hf_genrec.recipes.pipeline import load_data_section, train_recipe
from hf_genrec.recipes.resolver import resolve_recipe

ITEMS = 24


def write_log(folder, items: int = ITEMS, users: int = 60):
    """Item i is always followed by item i + 1, and has 1 + i % 5 stars from everybody."""
    rng = np.random.default_rng(0)
    with open(folder / "log.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["user_id", "item_id", "timestamp", "rating"])
        for user in range(users):
            start = int(rng.integers(items))
            for step in range(10):
                item = (start + step) % items
                table.writerow([f"u{user:03d}", f"i{item:03d}", step, 1 + item % 5])
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["item_id", "title", "kind", "sort"])
        table.writerows(
            [(f"i{n:03d}", f"Title {n % 7}", f"kind {n % 3}", "" if n % 5 == 0 else n % 2) for n in range(items)]
        )
    return folder / "log.csv"


SMALL = {
    "model.d_model": 32, "model.d_kv": 16, "model.d_ff": 64, "model.num_layers": 1, "model.num_decoder_layers": 1,
    "model.dropout_rate": 0.0, "max_history": 12, "logging_steps": 1000, "eval_epochs": 50, "min_user": 0, "min_item": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("p5")
    options = {
        "num_train_epochs": 30, "ema_decay": None, "per_device_train_batch_size": 4,
        "model.num_layers": 2, "model.d_model": 48,  # numbers of users and items are the same tokens: one layer mixes them up
        "training.method_options": {"families": {"sequential": 2.0, "rating": 2.0, "direct": None}, "group": 8},
    }  # fmt: skip
    recipe = resolve_recipe("p5", SMALL | options)
    return train_recipe(recipe, write_log(folder), folder / "model", baselines=["popularity"], progress=False)


@pytest.mark.slow
def test_one_checkpoint_recommends_and_rates(trained):
    assert trained.metrics["test"]["recall@1"] == 1.0
    model, tokenizer = trained.model.eval(), trained.tokenizer
    encoder = ExampleEncoder(tokenizer)

    def correct(template) -> int:  # through a wording alone: the same model, no other head
        right = 0
        for item in range(ITEMS):
            values = {"user": "user_3", "item": f"i{item:03d}", "rating": 0.0}
            source, _ = encoder(fill(template, values))
            answer = model.generate(torch.tensor([source]), max_new_tokens=4, num_beams=1)
            right += tokenizer.decode(answer[0], skip_special_tokens=True).strip() == str(1 + item % 5)
        return right

    assert correct(wordings("rating", "stars")[0]) >= 0.9 * ITEMS
    assert (
        correct(wordings("rating", "stars", held_out=True)[0]) >= 0.5 * ITEMS
    )  # never trained; guessing gives a fifth


@pytest.mark.slow
def test_free_beams_invent_ids_and_the_trie_stops_them(trained):
    model, tokenizer = trained.model, trained.tokenizer
    histories = [[f"i{n:03d}", f"i{n + 1:03d}"] for n in range(8)]
    free = invalid_id_rate(model, tokenizer, histories, num_beams=20)
    assert 0.0 < free < 1.0
    assert invalid_id_rate(model, tokenizer, histories, num_beams=20, constrained=True) == 0.0
    assert names_items(tokenizer, [tokenizer.item_token_ids("i003") + [1, 2], [5, 6]]).tolist() == [True, False]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    log = write_log(folder)
    recipe = resolve_recipe("p5", SMALL)
    return load_data_section(recipe.data, log, items=folder / "items.csv")


FAMILY = {
    "RID": {"quantizer": "item_numbers", "order": "random"},
    "SID": {"quantizer": "item_numbers", "order": "sequential", "first": 1001},
    "running": {"quantizer": "item_numbers", "order": "running"},
    "TID": {"quantizer": "item_words", "unique": True},
    "IID": {"quantizer": "item_paths", "path": "none", "leaf": "atomic"},
    "SemID": {"quantizer": "item_paths", "path": "semantic", "columns": ["kind", "sort"]},
    "CID": {"quantizer": "item_paths", "path": "collaborative", "num_clusters": 3, "max_cluster": 4},
    "HID": {"quantizer": "item_paths", "path": "collaborative", "leaf": "atomic", "num_clusters": 3, "max_cluster": 4},
}


def names_with(tables, identifiers: dict, split=None):
    data, own_split = tables
    recipe = resolve_recipe("p5", SMALL)
    recipe.identifiers = identifiers
    return build_identifiers(recipe, data, split or own_split, seed=0, progress=False).tokenizer


@pytest.mark.parametrize("name", FAMILY)
def test_every_index_of_the_family_names_every_item_once(tables, name):
    tokenizer = names_with(tables, FAMILY[name])
    assert tokenizer.num_items == ITEMS and len({tuple(row) for row in tokenizer.codes.tolist()}) == ITEMS
    assert all(tokenizer.item_token_ids(item)[-1] == tokenizer.item_end_token_id for item in tokenizer.item_ids)


def test_paths_say_what_they_are(tables):
    collaborative, hybrid, semantic = (names_with(tables, FAMILY[name]) for name in ("CID", "HID", "SemID"))
    tokens = collaborative.convert_ids_to_tokens(collaborative.item_token_ids("i003"))
    assert tokens[0].startswith("<CI") and tokens[-2].startswith("<A")
    assert hybrid.convert_ids_to_tokens(hybrid.item_token_ids("i003"))[:-2] == tokens[:-2]
    assert hybrid.convert_ids_to_tokens(hybrid.item_token_ids("i003"))[-2] == "<I4>"
    first = [semantic.item_token_ids(f"i{n:03d}")[0] for n in range(ITEMS)]
    assert all((first[a] == first[b]) == (a % 3 == b % 3) for a in range(ITEMS) for b in range(ITEMS))


@pytest.mark.parametrize("name", ["SID", "CID"])
def test_identifiers_do_not_know_validation_and_test(tables, name):
    _, split = tables
    rng = np.random.default_rng(0)
    shuffled = replace(
        split,
        validation=replace(split.validation, targets=rng.permutation(split.validation.targets)),
        test=replace(split.test, targets=rng.permutation(split.test.targets)),
    )
    assert (names_with(tables, FAMILY[name]).codes == names_with(tables, FAMILY[name], shuffled).codes).all()
    other = replace(split, train=split.train.truncate_tail(3))  # another training part does change them
    assert (names_with(tables, FAMILY[name]).codes.shape != names_with(tables, FAMILY[name], other).codes.shape) or (
        names_with(tables, FAMILY[name]).codes != names_with(tables, FAMILY[name], other).codes
    ).any()


def test_errors(tables):
    with pytest.raises(RecipeError, match="collaborative, semantic, none"):
        names_with(tables, {"quantizer": "item_paths", "path": "spectral"})
    with pytest.raises(ItemTableError, match=r"identifiers\.columns"):
        names_with(tables, {"quantizer": "item_paths", "path": "semantic"})
    with pytest.raises(ItemTableError, match="no field 'knd'"):
        names_with(tables, {"quantizer": "item_paths", "path": "semantic", "columns": ["knd"]})


@pytest.mark.parametrize("name", ["p5", "cid"])
def test_recipes_resolve(name):
    recipe = resolve_recipe(name)
    assert recipe.model["type"] == "p5" and recipe.training["method"] == "tasks"
    with pytest.raises(RecipeError, match="familes"):
        resolve_recipe(name, {"training.method_options": {"familes": {}}})
