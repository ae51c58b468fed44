"""Candidate rankers as recipes: where soft tokens come from, written answers, and the comparison with the retriever."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_language_recipes import LANGUAGE, write_log

from hf_genrec.errors import RecipeError
from hf_genrec.recipes.build import build_identifiers, build_model
from hf_genrec.recipes.pipeline import load_data_section, train_recipe
from hf_genrec.recipes.resolver import resolve_recipe

SMALL = LANGUAGE | {"model.num_candidates": 5, "model.max_title_tokens": 12, "model.max_history": 3}
SHORT = {"training.max_steps": 4, "training.method_options": {"samples": 16}, "logging_steps": 1000}
ITEMS = 40


def train(tmp_path, name, options, **more):
    log = write_log(tmp_path)
    return train_recipe(
        resolve_recipe(name, SMALL | options), log, tmp_path / "model", items=tmp_path / "items.csv", baselines=[],
        test_users=12, progress=False, **more,
    )  # fmt: skip


def source_options(source, tmp_path, minilm_dir):
    if source == "text":
        return {"features.text.encoder": str(minilm_dir), "features.text.dim": 8}, None
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float32)
    np.save(tmp_path / "images.npy", vectors)
    return {"features.array.path": str(tmp_path / "images.npy")}, vectors


@pytest.mark.parametrize("name", ["llara", "collm"])
@pytest.mark.parametrize("source", ["text", "array"])
def test_soft_tokens_are_projections_of_the_chosen_vectors(tmp_path, name, source, minilm_dir, monkeypatch):
    options, vectors = source_options(source, tmp_path, minilm_dir)
    trained = train(tmp_path, name, options | SHORT | {"model.soft_tokens": source})
    model = trained.model
    if vectors is not None:  # as the block has them: centred, one common scale
        centred = vectors - vectors.mean(0)
        assert torch.allclose(model.item_vectors, torch.from_numpy(centred / centred.std()), atol=1e-5)
    assert model.item_vectors.shape == (ITEMS, 6 if source == "array" else 8)
    assert len(torch.unique(model.item_vectors, dim=0)) == ITEMS
    seen, embed = [], model.embed

    def reading(input_ids, slot_items=None, user_BU=None):
        embeds = embed(input_ids, slot_items, user_BU)
        seen.append((input_ids, slot_items, embeds))
        return embeds

    monkeypatch.setattr(model, "embed", reading)
    model.rank_candidates([[3, 4], [5]], [[6, 7, 8], [9, 10, 11]])
    injected = 0
    for ids, items, embeds in seen:
        soft = embeds[ids == model.config.item_placeholder_id]
        named = items[items >= 0]
        expected = model.item_injector.project(model.item_vectors[named]).flatten(0, 1)
        assert torch.allclose(soft, expected, atol=1e-6)
        injected += len(named)
    assert injected == (9 if name == "llara" else 6)  # of histories and candidates, or of candidates
    assert all(len(row) == 5 for row in model.recommend([["i03"], ["i20"]], tokenizer=trained.tokenizer, k=5))


def test_a_projector_of_given_vectors_learns(tmp_path):
    """One step moves the projector, the vectors stay, and scores change with the vectors."""
    options, _ = source_options("array", tmp_path, None)
    recipe = resolve_recipe("llara", SMALL | options | SHORT | {"model.soft_tokens": "array"})
    data, split = load_data_section(recipe.data, write_log(tmp_path), items=tmp_path / "items.csv")
    identifiers = build_identifiers(recipe, data, split, seed=0, progress=False)
    start = build_model(recipe, identifiers, seed=0)
    trained = train(tmp_path, "llara", options | SHORT | {"model.soft_tokens": "array"}).model
    assert torch.equal(start.item_vectors, trained.item_vectors)
    before, after = start.item_injector.state_dict(), trained.item_injector.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    scores = trained.rank_candidates([[3, 4]], [[6, 7, 8]])
    trained.item_vectors[7] += 3.0
    assert not torch.allclose(scores, trained.rank_candidates([[3, 4]], [[6, 7, 8]]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llamarec", {"model.soft_tokens": "array"}, "no soft tokens"),
        ("llara", {"model.soft_tokens": "image"}, "no block of this run's features \\(there are none\\)"),
        ("a_llmrec", {"features.text": None, "features.cooccurrence.dim": 4, "model.soft_tokens": "text"}, "cooccurrence"),
    ],
)  # fmt: skip
def test_soft_tokens_that_cannot_be_made(tmp_path, name, options, message):
    with pytest.raises(RecipeError, match=message):
        train(tmp_path, name, options)


@pytest.mark.parametrize("name", ["llara", "llmrank", "llamarec"])
def test_rankers_that_write_report_their_answers(tmp_path, name):
    trained = train(tmp_path, name, {} if name == "llmrank" else SHORT)
    summary = trained.metrics["training"]
    if name == "llamarec":  # it never writes
        assert "written_answers" not in summary
        return
    found = summary["written_answers"]
    assert found["rows"] == 50 and found["candidates"] == 5
    assert 0 <= found["hit_rate@1"] <= found["valid_ratio"] <= 1
