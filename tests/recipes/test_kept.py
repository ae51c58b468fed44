"""Identifiers of an interrupted run: taken up by a resumed one as they were, and only where they are the same run's."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from test_language_recipes import LANGUAGE, NO_TEXT, TINY, write_log

from hf_genrec.data.interactions import load_data
from hf_genrec.data.splits import make_split
from hf_genrec.errors import TrainingError
from hf_genrec.identifiers.quantizers.auto_quantizer import save_quantizer
from hf_genrec.recipes import kept, pipeline
from hf_genrec.recipes.build import build_identifiers
from hf_genrec.recipes.kept import kept_identifiers
from hf_genrec.recipes.pipeline import train_recipe
from hf_genrec.recipes.resolver import resolve_recipe

_SMALL = NO_TEXT | {"model.d_model": 16, "model.num_layers": 1, "model.num_decoder_layers": 1, "max_history": 8}
_RQ = _SMALL | TINY | {"identifiers.max_steps": 20}
_JOINED = {"quantizer": "residual_kmeans", "features": ["cooccurrence"], "codebook_sizes": [8, 8]}
# one recipe for every quantizer
KINDS = {
    "rq_vae": ("tiger", _RQ),
    "rq_vae with tags": (
        "hid_vae",
        _RQ | {"identifiers.tags": {"columns": ["kind"], "order": "given", "separators": None, "min_items": 2}}
        | {"identifiers.losses": {"tag_contrast": {"tag_vectors": "items"}}, "collisions": "counter"},
    ),
    "residual_kmeans": ("tiger_rkmeans", _SMALL | {"codebook_sizes": [8, 8]}),
    "multi_head_vq": ("tiger", _SMALL, {"codebook_sizes": [8, 8], "latent_size": 8, "hidden_sizes": [16], "max_steps": 20}),
    "fsq": ("tiger", _SMALL, {"scalar_levels": [[4, 4], [4, 4]], "hidden_sizes": [16], "max_steps": 20}),
    "pq": ("tiger", _SMALL, {"num_codebooks": 4, "codebook_size": 8}),
    "spectral": ("tiger", _SMALL, {"num_clusters": 4, "max_cluster": 8}),
    "item_numbers": ("tiger", _SMALL, {"order": "random", "vocab_size": 400}),
    "opq": ("rpg", NO_TEXT | {"num_codebooks": 4, "codebook_size": 8, "pca_dim": None, "whiten": False}),
    "svd_bins": ("tiger_svd", {"num_codebooks": 3, "codebook_size": 8}),
    "tree": ("colarec", {"features.cooccurrence.dim": 16, "branching": 4}),
    "joined": ("psrq", {"features.text": None, "features.cooccurrence.dim": 16, "identifiers.parts": [_JOINED, _JOINED]}),
    "atomic": ("item_lm", NO_TEXT | LANGUAGE | {"identifiers.pca_dim": 8}),
    "item_words": ("d3", {"vocab_size": 400}),
    "item_paths": ("cid", {"num_clusters": 4, "max_cluster": 8}),
    "keywords": ("idgenrec", {"identifiers.min_count": 1}),
    "action_piece": (
        "actionpiece",
        NO_TEXT | {"num_codebooks": 3, "codebook_size": 8, "attribute_columns": [], "hash_buckets_size": 16}
        | {"vocabulary_size": 60},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalogue")
    log = write_log(folder)
    rows = (folder / "items.csv").read_text(encoding="utf-8").splitlines()
    kinds = [rows[0] + ",kind", *(f"{row},kind {number // 10}" for number, row in enumerate(rows[1:]))]
    (folder / "items.csv").write_text("\n".join(kinds) + "\n", encoding="utf-8")
    data = load_data(str(log), items=str(folder / "items.csv"))
    return data, make_split(data)


def same(one, other) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(np.asarray(torch.as_tensor(one).detach()), np.asarray(torch.as_tensor(other).detach()))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kept_identifiers_are_those_that_were_made(tmp_path, monkeypatch, catalogue, kind) -> None:
    name, options, *given = KINDS[kind]
    recipe = resolve_recipe(name, options)
    if given:  # with a model that does not fit, which is not built here
        recipe.identifiers = {"quantizer": kind, "features": ["cooccurrence"], **given[0]}
    torch.manual_seed(5)
    made = kept_identifiers(recipe, *catalogue, tmp_path, seed=0, resume=False, progress=False)
    drawn = torch.rand(3)
    monkeypatch.setattr(kept, "build_identifiers", lambda *args, **more: pytest.fail("fitted again"))
    torch.manual_seed(6)
    found = kept_identifiers(recipe, *catalogue, tmp_path, seed=0, resume=True, progress=False)
    assert torch.equal(torch.rand(3), drawn)  # what comes behind the fit draws the same numbers
    assert type(found.tokenizer) is type(made.tokenizer) and found.tokenizer.item_ids == made.tokenizer.item_ids
    assert np.array_equal(found.tokenizer.codes, made.tokenizer.codes)
    assert found.record.keys() == made.record.keys()
    assert found.record["collision_rate"] == made.record["collision_rate"]
    assert list(found.context.blocks) == list(made.context.blocks)
    for block, other in zip(found.context.blocks.values(), made.context.blocks.values()):
        assert same(block.symmetric, other.symmetric) and same(block.inputs, other.inputs)
    assert (found.quantized is None) == (made.quantized is None)
    if made.quantized is None:
        return
    one, other = found.quantized, made.quantized
    assert same(one.codes_NL, other.codes_NL) and one.codebook_sizes == other.codebook_sizes
    assert same(one.features, other.features) and one.files.keys() == other.files.keys()
    assert [same(*books) for books in zip(one.codebooks or (), other.codebooks or (), strict=True)].count(False) == 0
    for number, (first, second) in enumerate(zip(kept._quantizers(one), kept._quantizers(other), strict=True)):
        assert type(first) is type(second)
        if first is not None:  # equal files
            places = [tmp_path / f"{side}-{number}" for side in ("first", "second")]
            for quantizer, place in zip((first, second), places):
                save_quantizer(quantizer, place)
            tensors = [sorted(place.glob("*.safetensors"))[0].read_bytes() for place in places]
            assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"options": {"identifiers.max_steps": 21}}, "identifiers"),
        ({"options": {"features.cooccurrence.dim": 8}}, "features"),
        ({"data": True}, "data"),
        ({"damage": True}, "arrays.safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_those_of_another_run_are_made_anew(tmp_path, monkeypatch, caplog, catalogue, change, named) -> None:
    data, split = catalogue
    kept_identifiers(resolve_recipe("tiger", _RQ), data, split, tmp_path, seed=0, resume=False, progress=False)
    if "data" in change:
        (tmp_path / "other").mkdir()
        data = load_data(str(write_log(tmp_path / "other", users=49)), items=str(tmp_path / "other" / "items.csv"))
        split = make_split(data)
        (tmp_path / "other").rename(tmp_path.with_name(f"{tmp_path.name}-other"))
    if "damage" in change:
        (tmp_path / "identifiers" / named).write_bytes(b"")
    fits = []
    monkeypatch.setattr(
        kept, "build_identifiers", lambda *args, **more: fits.append(more["seed"]) or build_identifiers(*args, **more)
    )
    recipe, seed = resolve_recipe("tiger", _RQ | change.get("options", {})), change.get("seed", 0)
    with caplog.at_level(logging.WARNING):
        kept_identifiers(recipe, data, split, tmp_path, seed=seed, resume=True, progress=False)
    assert fits == [seed] and "made anew" in caplog.text and named in caplog.text
    kept_identifiers(recipe, data, split, tmp_path, seed=seed, resume=True, progress=False)
    assert fits == [seed]  # the new ones are kept now
    if "damage" not in change:  # checkpoints of the run before were trained on other codes
        (tmp_path / "checkpoint-7").mkdir()
        with pytest.raises(TrainingError, match=r"values of: .*\..*checkpoint-7.*without --resume"):
            kept_identifiers(recipe, *catalogue, tmp_path, seed=5, resume=True, progress=False)


class Interrupted(BaseException):
    pass


def test_a_run_interrupted_behind_its_identifiers_ends_as_if_it_was_not(tmp_path, monkeypatch) -> None:
    log = write_log(tmp_path, items=12, users=12, length=6)
    recipe = resolve_recipe("tiger", _RQ | {"training.max_steps": 3, "model.dropout_rate": 0.2, "eval_users": 10})

    def trained(folder: str, **more):
        return train_recipe(recipe, log, tmp_path / folder, baselines=[], progress=False, **more)

    whole = trained("whole")
    assert not (tmp_path / "whole-checkpoints").exists()
    build_model = pipeline.build_model

    def interrupted(*args, **more):
        raise Interrupted

    monkeypatch.setattr(pipeline, "build_model", interrupted)
    with pytest.raises(Interrupted):
        trained("cut")
    assert sorted(path.name for path in (tmp_path / "cut-checkpoints").iterdir()) == ["identifiers"]
    assert not list((tmp_path / "cut-checkpoints").rglob("*.p*t*")), "no pickle"
    monkeypatch.setattr(pipeline, "build_model", build_model)
    monkeypatch.setattr(kept, "build_identifiers", lambda *args, **more: pytest.fail("fitted again"))
    resumed = trained("cut", resume=True)
    assert np.array_equal(whole.tokenizer.codes, resumed.tokenizer.codes)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (resumed.folder / "quantizer").is_dir() and resumed.report.removed.metrics == whole.report.removed.metrics


def test_a_rankers_retriever_is_not_trained_again(tmp_path, monkeypatch) -> None:
    log = write_log(tmp_path)
    options = LANGUAGE | {"model.num_candidates": 5, "model.max_title_tokens": 12, "model.max_history": 3}
    recipe = resolve_recipe("llmrank", options)

    def trained(folder: str, **more):
        items = tmp_path / "items.csv"
        return train_recipe(
            recipe, log, tmp_path / folder, items=items, baselines=[], test_users=5, progress=False, **more
        )

    whole = trained("whole")
    method = pipeline.TrainingJob

    def interrupted(*args, **more):
        raise Interrupted

    monkeypatch.setattr(pipeline, "TrainingJob", interrupted)
    with pytest.raises(Interrupted):
        trained("cut")
    monkeypatch.setattr(pipeline, "TrainingJob", method)
    monkeypatch.setattr(
        "hf_genrec.alignment.trainers.recommender.train_recommender", lambda *args, **more: pytest.fail("trained again")
    )
    resumed = trained("cut", resume=True)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.baselines["retriever"].removed.metrics == whole.baselines["retriever"].removed.metrics
