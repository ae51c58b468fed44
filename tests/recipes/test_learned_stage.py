"""Learned quantizers and their losses as a recipe names them: every option reaches the quantizer, errors are typed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RecipeError
from hf_genrec.recipes.components import FEATURES, LOSSES, QUANTIZERS
from hf_genrec.recipes.dry_run import dry_run_data
from hf_genrec.recipes.resolver import resolve_recipe
from hf_genrec.recipes.stages.context import FeatureBlock, StageContext
from hf_genrec.recipes.stages.learned import fsq_codes, multi_head_vq_codes, rq_vae_codes
from hf_genrec.recipes.stages.losses import TermSources, make_terms

SIZES = {"codebook_sizes": [6, 6], "latent_size": 4, "hidden_sizes": [16], "max_steps": 15, "batch_size": 48}
TAGS = {"columns": ["genres"], "order": "frequent", "min_items": 3}


@pytest.fixture
def context() -> StageContext:
    data, split = dry_run_data()
    made = StageContext(data, split, seed=0, progress=False)
    made.blocks["text"] = FeatureBlock(*[np.random.default_rng(0).normal(size=(data.num_items, 12)).astype("f4")] * 2)
    made.blocks["cooccurrence"] = FEATURES["cooccurrence"].load()(made, dim=8)
    return made


def test_letter_without_its_terms_has_the_codes_of_plain_tiger(context) -> None:
    """alpha = beta = 0 and tau = 1 is TIGER: the same quantizer, codes and model configuration."""
    x = context.vectors(["text"])
    letter = resolve_recipe(
        "letter",
        {
            "identifiers.losses": {"collaborative": {"weight": 0.0}, "diversity": {"weight": 0.0}},
            "model.loss_temperature": 1.0,
        },
    )
    component = QUANTIZERS["rq_vae"]
    options = {key: letter.identifiers[key] for key in component.options if key in letter.identifiers}
    plain = rq_vae_codes(context, x, **options | SIZES)
    without = rq_vae_codes(context, x, losses=letter.identifiers["losses"], **options | SIZES)
    assert np.array_equal(plain.codes_NL, without.codes_NL) and without.record == {}
    with_terms = rq_vae_codes(context, x, losses=resolve_recipe("letter").identifiers["losses"], **options | SIZES)
    assert set(with_terms.record["losses"]) == {"collaborative", "diversity"}
    assert not np.array_equal(plain.features, with_terms.features)
    assert letter.model["loss_temperature"] == 1.0 and letter.model["type"] == resolve_recipe("tiger").model["type"]


def test_cost_without_its_term_is_tiger_with_these_sizes(context) -> None:
    x = context.vectors(["text", "cooccurrence"])
    losses = {"reconstruction_contrast": {"weight": 0.0}}
    plain, without = rq_vae_codes(context, x, **SIZES), rq_vae_codes(context, x, losses=losses, **SIZES)
    assert np.array_equal(plain.codes_NL, without.codes_NL)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_of_the_table_trains(context, name) -> None:
    options = dict(SIZES)
    losses = {name: {"weight": 0.5}}
    stage = multi_head_vq_codes if name == "orthogonality" else rq_vae_codes
    if name == "diversity":
        options["codebook_update"] = "gradient"
    if name.startswith("tag"):
        options["tags"] = TAGS
    if name == "tag_contrast":
        losses[name]["tag_vectors"] = "items"
    made = stage(context, context.vectors(["text"]), losses=losses, **options)
    assert made.codes_NL.shape == (context.num_items, 2) and np.isfinite(made.record["losses"][name])
    assert np.allclose(made.features, made.quantizer.transform(context.vectors(["text"])))
    if name == "tag_classification":
        found = made.record["tags"]
        assert found["tags"] == [5, 5] and len(found["accuracy"]) == len(found["chance"]) == 2
        reader = made.files["tag_paths.safetensors"]
        assert reader.path(made.codes_NL[:10]) == list(found["paths"].values())
        assert next(iter(found["paths"])) == context.data.item_ids[0] and len(found["paths"]["i00"]) == 2


def test_options_reach_the_configuration(context) -> None:
    x = context.vectors(["text"])
    wanted = {
        "codebook_update": "simvq", "assignment": ["gumbel", "sinkhorn"], "assignment_temperature": 0.5,
        "assignment_temperature_end": 0.1, "assignment_temperature_steps": 9, "sinkhorn_epsilon": 0.05,
        "sinkhorn_iterations": 7, "gradient_path": "rotation", "commitment_weight": 0.5, "quantization_weight": 2.0,
        "ema_decay": 0.9, "dead_code_interval": 5, "dead_code_share": 0.1, "random_prefix": 0.5, "dropout": 0.1,
        "standardise": "column", "reconstruction_weight": 0.7,
    }  # fmt: skip
    assert set(wanted) <= set(QUANTIZERS["rq_vae"].options)
    made = rq_vae_codes(context, x, **SIZES | wanted)
    assert {key: getattr(made.quantizer.config, key) for key in wanted} == wanted
    assert made.codebook_sizes == (6, 6) and len(made.codebooks) == 2


def test_levels_that_share_a_codebook(context) -> None:
    x = context.vectors(["text"])
    tail = rq_vae_codes(context, x, **SIZES | {"codebook_sizes": [8, 6, 6]}, shared_codebooks="tail")
    assert np.array_equal(tail.codebooks[1], tail.codebooks[2]) and len(tail.quantizer.levels) == 2


def test_random_codebooks_and_balanced_last_codes(context) -> None:
    x = context.vectors(["text"])
    start = rq_vae_codes(context, x, **SIZES)
    other = rq_vae_codes(context, x, kmeans_init=False, **SIZES)
    assert not np.array_equal(start.codebooks[0], other.codebooks[0])
    balanced = rq_vae_codes(context, x, last_level="sinkhorn", **SIZES)
    counts = np.bincount(balanced.codes_NL[:, -1], minlength=6)
    assert counts.max() - counts.min() < np.ptp(np.bincount(start.codes_NL[:, -1], minlength=6))
    assert np.array_equal(balanced.codes_NL[:, 0], start.codes_NL[:, 0])


def test_fsq_stage(context) -> None:
    made = fsq_codes(
        context, context.vectors(["text"]), scalar_levels=[[3, 3], [5, 4]], hidden_sizes=[16], max_steps=10
    )
    assert made.codebook_sizes == (9, 20) and made.codebooks is None and made.codes_NL.shape[1] == 2
    assert {"learned", "fixed_length"} <= QUANTIZERS["fsq"].gives


def test_heads_of_blocks_with_a_gate(context) -> None:
    x = context.vectors(["text", "cooccurrence"])
    options = SIZES | {"codebook_sizes": [6, 6, 6]}
    made = multi_head_vq_codes(context, x, gate=True, heads=["text", "cooccurrence", "all"], **options)
    config = made.quantizer.config
    assert config.block_sizes == [12, 8] and config.head_blocks == [[0], [1], [0, 1]] and config.gate
    with pytest.raises(IncompatibleComponentsError, match=r"identifiers\.features"):
        multi_head_vq_codes(context, x, heads=["text", "all", "all"], **options)
    with pytest.raises(IncompatibleComponentsError, match="heads"):
        multi_head_vq_codes(context, x, heads=["text", "picture", "all"], **options)


def test_errors_name_the_key(context) -> None:
    x = context.vectors(["text"])
    with pytest.raises(RecipeError, match="codebook_update"):
        rq_vae_codes(context, x, codebook_update="adam", **SIZES)
    with pytest.raises(IncompatibleComponentsError, match=r"identifiers\.tags"):
        rq_vae_codes(context, x, losses={"tag_classification": {}}, **SIZES)
    with pytest.raises(RecipeError, match="'column'"):
        rq_vae_codes(context, x, tags={"column": ["genres"]}, **SIZES)
    with pytest.raises(ItemTableError, match="genre"):
        rq_vae_codes(context, x, tags={"columns": ["genre"]}, **SIZES)
    with pytest.raises(IncompatibleComponentsError, match="tag_vectors"):
        rq_vae_codes(context, x, tags=TAGS, losses={"tag_contrast": {"tag_vectors": "vibes"}}, **SIZES)
    bare = replace(context, data=replace(context.data, items=None))
    with pytest.raises(ItemTableError, match="--items"):
        rq_vae_codes(bare, x, tags=TAGS, **SIZES)


def test_resolver_checks_losses() -> None:
    with pytest.raises(RecipeError, match="collaborative"):
        resolve_recipe("tiger", {"identifiers.losses": {"colaborative": {"weight": 1.0}}})
    with pytest.raises(RecipeError, match="features"):
        resolve_recipe("letter", {"identifiers.losses": {"collaborative": {"features": "pictures"}}})
    with pytest.raises(IncompatibleComponentsError, match="rq_vae"):
        resolve_recipe("tiger_rkmeans", {"identifiers.losses": {"uniqueness": {"weight": 1.0}}})


def test_terms_share_the_pairs_of_a_window(context) -> None:
    sources = TermSources(context, context.vectors(["text"]))
    terms = make_terms(sources, {"cooccurrence_contrast": {"window": 3}, "prefix_contrast": {"window": 3}})
    assert terms["cooccurrence_contrast"].pairs is terms["prefix_contrast"].pairs
    assert make_terms(sources, {"uniqueness": {"weight": 0.0}, "mmd": None}).keys() == {"mmd"}
