"""Tree and co-occurrence stages: fitted codes, training part alone, room for new items, what fits which model."""

from __future__ import annotations

import numpy as np
import pytest

from hf_genrec.data.interactions import load_data
from hf_genrec.data.splits import make_split
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.recipes.components import QUANTIZERS
from hf_genrec.recipes.resolver import resolve_recipe
from hf_genrec.recipes.stages.context import FeatureBlock, StageContext
from hf_genrec.recipes.stages.trees import full_branching, spectral_codes, tree_codes

GROUPS, SIZE = 4, 9  # users stay in one group of items, but for their last (test) item


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> StageContext:
    generator, rows = np.random.default_rng(0), ["user_id,item_id,timestamp"]
    for user in range(80):
        group = user % GROUPS
        items = list(generator.permutation(SIZE)[:7] * GROUPS + group)
        items.append(int((group + 1) % GROUPS))  # the test item links to the next group
        rows += [f"u{user},i{item:03d},{step}" for step, item in enumerate(items)]
    log = tmp_path_factory.mktemp("groups") / "log.csv"
    log.write_text("\n".join(rows) + "\n", encoding="utf-8")
    data = load_data(log)
    vectors = generator.standard_normal((data.num_items, 6)).astype(np.float32)
    blocks = {"text": FeatureBlock(vectors, vectors)}
    return StageContext(data, make_split(data, "leave_one_out"), 0, False, blocks)


def group_of(context: StageContext) -> np.ndarray:
    return np.array([int(item[1:]) % GROUPS for item in context.data.item_ids])


def test_spectral_codes_follow_the_training_graph_and_nothing_else(context) -> None:
    made = spectral_codes(context, None, num_clusters=4, max_cluster=9)
    group = group_of(context)
    pairs = set(zip(group.tolist(), made.codes_NL[:, 0].tolist()))
    assert len(pairs) == GROUPS  # items of a group share the first code; test items would have mixed the groups
    assert len(np.unique(made.codes_NL, axis=0)) == context.num_items
    assert made.record["tree"] == {"clusters": 4, "shortest_code": 2, "longest_code": 2}
    links = (group == 2)[None].astype(float)  # a new item that is consumed with group 2
    with pytest.raises(IncompatibleComponentsError, match="only 0 free numbers"):
        made.quantizer.encode(links)
    roomy = spectral_codes(context, None, num_clusters=4, max_cluster=12)
    assert roomy.quantizer.encode(links)[0, 0] == roomy.codes_NL[np.flatnonzero(group == 2)[0], 0]


def test_a_crowded_graph_gets_codes_of_several_lengths(context) -> None:
    made = spectral_codes(context, None, num_clusters=3, max_cluster=5)
    record = made.record["tree"]
    assert record["shortest_code"] < record["longest_code"] and (made.codes_NL < 0).any()
    tokenizer = ItemTokenizer.from_codes(context.data.item_ids, made.codes_NL, codebook_sizes=made.codebook_sizes)
    assert [tokenizer.codes_to_items(codes) for codes in tokenizer.codes[:3]] == [
        [[item]] for item in context.data.item_ids[:3]
    ]


def test_tree_codes_are_those_of_the_fit_and_leave_room(context) -> None:
    vectors = context.vectors(["text"])
    made = tree_codes(context, vectors, depth=2, balanced=True, code_style="prefix", pca_dim=99)
    assert made.codebook_sizes == (6, 36)  # 36 items: 6 clusters of 6
    assert np.bincount(made.codes_NL[:, 0]).tolist() == [6] * 6
    np.testing.assert_array_equal(made.codes_NL, made.quantizer.codes_NL.numpy())
    wide = tree_codes(context, vectors, branching=7, depth=2)
    new = wide.quantizer.encode(vectors[:5] + 0.01)
    both = np.concatenate([wide.codes_NL, new.numpy()])
    assert len(np.unique(both, axis=0)) == context.num_items + 5 and (new >= 0).all()
    free = tree_codes(context, vectors, branching=3, max_leaf=4)
    assert free.record["tree"]["longest_code"] > free.record["tree"]["shortest_code"]
    same = tree_codes(context, vectors, branching=3, max_leaf=4)
    np.testing.assert_array_equal(free.codes_NL, same.codes_NL)


@pytest.mark.parametrize(
    ("num_items", "depth"), [(1, 1), (1, 3), (16, 2), (17, 2), (1682, 2), (10**6, 3), (10**6 + 1, 3)]
)
def test_full_branching_is_the_least_that_fits(num_items: int, depth: int) -> None:
    branching = full_branching(num_items, depth)
    assert branching**depth >= num_items and (branching == 2 or (branching - 1) ** depth < num_items)


def test_the_resolver_knows_which_trees_have_one_length() -> None:
    tree, fixed = QUANTIZERS["tree"], "fixed_length"
    assert fixed not in tree.given({}) and fixed in tree.given({"depth": 2}) and fixed in tree.given({"balanced": True})
    assert fixed not in tree.given({"balanced": False, "depth": None})
    names = {"codebook_sizes": None, "pca_dim": None, "max_load": None, "whiten": None, "iterations": None}
    base = {f"identifiers.{name}": value for name, value in names.items()} | {"identifiers.quantizer": "tree"}
    recipe = resolve_recipe("tandem", base | {"identifiers.depth": 3})
    assert recipe.identifiers["depth"] == 3
    with pytest.raises(IncompatibleComponentsError, match=r"needs fixed_length, which quantizer 'tree' .* tree"):
        resolve_recipe("tandem", base)
    with pytest.raises(IncompatibleComponentsError, match="needs fixed_length, which quantizer 'spectral'"):
        resolve_recipe("tandem", base | {"identifiers.quantizer": "spectral"})
