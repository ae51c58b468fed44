"""Joined codes: parts side by side, a tail on the residual, one space for collision policies, nearest-name errors."""

from __future__ import annotations

import numpy as np
import pytest

from hf_genrec.data.interactions import load_data
from hf_genrec.data.splits import make_split
from hf_genrec.errors import IncompatibleComponentsError, RecipeError
from hf_genrec.identifiers.collisions import resolve_collisions
from hf_genrec.identifiers.health import identifier_health
from hf_genrec.recipes.components import QUANTIZERS
from hf_genrec.recipes.stages.codes import residual_kmeans_codes
from hf_genrec.recipes.stages.context import FeatureBlock, StageContext
from hf_genrec.recipes.stages.joined import check_parts, joined_codes

KMEANS = {"quantizer": "residual_kmeans", "codebook_sizes": [8, 6]}


@pytest.fixture(scope="module")
def context() -> StageContext:
    rng = np.random.default_rng(0)
    log: dict = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(40):
        for step, item in enumerate(rng.permutation(120)[:30]):
            log["user_id"].append(f"u{user}")
            log["item_id"].append(f"i{item:03d}")
            log["timestamp"].append(step)
    data = load_data(log, name="random", min_user=0, min_item=0)
    blocks = {}
    for name, width in (("text", 6), ("cooccurrence", 4)):
        vectors = rng.standard_normal((data.num_items, width)).astype(np.float32)
        blocks[name] = FeatureBlock(vectors, vectors)
    return StageContext(data, make_split(data, "leave_one_out"), 0, False, blocks)


def test_one_part_is_that_quantizer(context: StageContext) -> None:
    alone = residual_kmeans_codes(context, context.vectors(["text"]), codebook_sizes=[8, 6])
    joined = joined_codes(context, None, parts=[KMEANS | {"features": ["text"]}])
    assert np.array_equal(joined.codes_NL, alone.codes_NL) and joined.codebook_sizes == alone.codebook_sizes
    assert all(np.array_equal(a, b) for a, b in zip(joined.codebooks, alone.codebooks))


def test_parts_stand_side_by_side(context: StageContext) -> None:
    parts = [KMEANS | {"features": ["text"]}, {**KMEANS, "codebook_sizes": [5], "features": ["cooccurrence", "text"]}]
    joined = joined_codes(context, None, parts=parts)
    second = residual_kmeans_codes(context, context.vectors(["cooccurrence", "text"]), codebook_sizes=[5])
    assert joined.codebook_sizes == (8, 6, 5) and np.array_equal(joined.codes_NL[:, 2:], second.codes_NL)
    assert [part["levels"] for part in joined.record["parts"]] == [[0, 1], [2]]
    assert [part["quantizer"] for part in joined.record["parts"]] == ["residual_kmeans"] * 2
    assert len(joined.quantizer) == 2 and hasattr(joined.quantizer[1], "encode")
    # parts have dimensions of their own: what the codes stand for is as near as in each part alone
    decoded = sum(np.asarray(book)[joined.codes_NL[:, level]] for level, book in enumerate(joined.codebooks))
    assert decoded.shape == joined.features.shape == (context.num_items, 16)
    tail = np.asarray(second.codebooks[0])[second.codes_NL[:, 0]]
    assert np.allclose(decoded[:, 6:], tail, atol=1e-6)
    moved, sizes = resolve_collisions(
        joined.codes_NL, joined.codebook_sizes, "next_nearest", codebooks=joined.codebooks, features=joined.features
    )
    assert identifier_health(moved, sizes).items_sharing == 0


def test_a_tail_on_the_residual_lowers_collisions(context: StageContext) -> None:
    head = {**KMEANS, "codebook_sizes": [4, 4], "features": ["text"]}
    tail = {"quantizer": "opq", "num_codebooks": 2, "codebook_size": 8, "residual": True}
    joined = joined_codes(context, None, parts=[head, tail])
    before = residual_kmeans_codes(context, context.vectors(["text"]), codebook_sizes=[4, 4])
    left = context.vectors(["text"]) - before.quantizer.decode(before.codes_NL).numpy()
    again = QUANTIZERS["opq"].load()(context, left, num_codebooks=2, codebook_size=8)
    assert np.array_equal(joined.codes_NL, np.concatenate([before.codes_NL, again.codes_NL], axis=1))
    rate = [identifier_health(one.codes_NL, one.codebook_sizes).collision_rate for one in (before, joined)]
    assert rate[1] < rate[0]


def test_atomic_codes_can_be_a_part(context: StageContext) -> None:
    joined = joined_codes(context, None, parts=[KMEANS | {"features": ["text"]}, {"quantizer": "atomic"}])
    assert joined.codes_NL[:, 2].tolist() == list(range(context.num_items)) and joined.codebooks is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "must be a list of mappings"),
        ({"quantizer": "pq"}, "must be a list of mappings"),
        (["pq"], r"parts\[0\] must be a mapping"),
        ([{"quantizer": "residual_kmean"}], r"parts\[0\].quantizer.*did you mean 'residual_kmeans'"),
        ([{"quantizer": "joined"}], r"unknown choice 'joined'"),
        ([KMEANS | {"features": ["text"], "iteration": 3}], r"parts\[0\].iteration: did you mean 'iterations'"),
        ([KMEANS | {"features": ["text"], "pca_dim": "4"}], r"pca_dim must be int, got '4'"),
        ([KMEANS | {"features": ["texts"]}], r"unknown block 'texts': did you mean 'text'"),
        ([KMEANS], "needs item vectors"),
        ([KMEANS | {"residual": True}], "no part before the first"),
    ],
)
def test_bad_parts_are_named(parts: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_parts(parts, ["text", "cooccurrence"])


def test_parts_that_cannot_follow(context: StageContext) -> None:
    tree = {"quantizer": "tree", "features": ["text"], "branching": 5, "max_leaf": 6}
    with pytest.raises(IncompatibleComponentsError, match=r"parts\[0\].*end before their last level"):
        joined_codes(context, None, parts=[tree, KMEANS | {"features": ["text"]}])
    joined = joined_codes(context, None, parts=[KMEANS | {"features": ["text"]}, tree])
    assert (joined.codes_NL[:, -1] < 0).any()
    with pytest.raises(IncompatibleComponentsError, match="cannot say what its codes stand for"):
        joined_codes(context, None, parts=[{"quantizer": "atomic"}, KMEANS | {"residual": True}])
