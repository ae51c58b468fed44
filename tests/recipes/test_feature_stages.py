"""Feature blocks of recipes: attributes, arrays, place and time, SASRec vectors, gated fusion; errors that name the row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hf_genrec.data.interactions import load_data
from hf_genrec.data.items import ItemTable
from hf_genrec.data.splits import make_split
from hf_genrec.errors import IncompatibleComponentsError, ItemTableError, RecipeError
from hf_genrec.identifiers.feature_transforms import ItemFeatures
from hf_genrec.identifiers.features_array import read_vectors, vectors_of_items
from hf_genrec.identifiers.features_attributes import attribute_slots, attribute_values, multi_hot
from hf_genrec.identifiers.features_geo_time import on_the_sphere, time_histograms
from hf_genrec.identifiers.fusion import fit_gated_fusion, gate_weights
from hf_genrec.recipes.stages import features as stages
from hf_genrec.recipes.stages.context import FeatureBlock, StageContext

ITEMS, USERS = 12, 40


def context(**columns) -> StageContext:
    """A log in which even items go with even ones and odd with odd, at hours and weekdays that follow the item."""
    rng = np.random.default_rng(0)
    rows: dict[str, list] = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(USERS):
        for step in range(6):
            item = int(rng.integers(ITEMS // 2)) * 2 + user % 2
            rows["user_id"].append(f"u{user}")
            rows["item_id"].append(f"i{item:02d}")
            rows["timestamp"].append(1_600_000_000 + user * 7 * 86400 + step * 86400 + item % 2 * 3600 * 9)
    table = {"item_id": [f"i{n:02d}" for n in range(ITEMS)], "title": [f"title {n}" for n in range(ITEMS)], **columns}
    data = load_data(rows, items=table, min_user=0, min_item=0)
    return StageContext(data, make_split(data, "leave_one_out"), 0, False)


# --- attributes ----------------------------------------------------------------------------------------------------------


def test_attribute_values_and_multi_hot():
    assert attribute_values(["a|b|a", "", None, ["x", None, "x"], 3.0, float("nan")]) == [
        ["a", "b"],
        [],
        [],
        ["x"],
        ["3.0"],
        [],
    ]
    assert attribute_values(["Sci-Fi  War"], " ") == [["Sci-Fi", "War"]]
    matrix, names = multi_hot({"g": [["a"], ["a", "b"], ["c"]], "k": [["a"], [], ["a"]]}, 2)
    assert names == [("g", "a"), ("k", "a")] and matrix.tolist() == [[1, 1], [1, 0], [0, 1]]
    with pytest.raises(ItemTableError, match="min_count"):
        multi_hot({"g": [["a"], ["b"]]}, 2)


def test_attribute_slots_by_hand():
    codes, sizes = attribute_slots([["a", "b"], ["b"], [], ["c", "a"], ["b", "c", "a"]], slots=2, min_count=2)
    # a and b occur three times, c twice: a before b before c
    assert codes.tolist() == [[1, 1], [2, 0], [0, 0], [1, 2], [1, 1]] and sizes == (3, 3)


def test_attributes_block_makes_the_same_vectors_for_other_items():
    made = context(genres=["a|b", "a", "b"] * 4)
    block = stages.attributes_block(made, columns=["genres"])
    assert block.symmetric.shape == (ITEMS, 2)
    assert block.transform is not None
    again = block.transform.apply(ItemTable.from_source({"item_id": ["x", "y"], "genres": ["a|b", "b|new"]}))
    assert np.allclose(again, block.symmetric[[0, 2]], atol=1e-6)
    with pytest.raises(ItemTableError, match="genres"):
        block.transform.apply(ItemTable.from_source({"item_id": ["x"]}))
    with pytest.raises(ItemTableError, match="'genres'"):
        stages.attributes_block(made, columns=["genre"])
    with pytest.raises(RecipeError, match="columns"):
        stages.attributes_block(made)


# --- arrays ----------------------------------------------------------------------------------------------------------------


def test_arrays_of_every_format(tmp_path):
    made = context()
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32)
    order = np.random.default_rng(1).permutation(ITEMS)
    ids = [made.data.item_ids[n] for n in order]
    np.save(tmp_path / "plain.npy", vectors)
    np.save(tmp_path / "named.npy", vectors[order])
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    np.savez(tmp_path / "named.npz", ids=np.array(ids), vectors=vectors[order])
    pq.write_table(pa.table({"item_id": ids, "image": vectors[order].tolist()}), tmp_path / "named.parquet")
    save_file({"vectors": torch.from_numpy(vectors)}, tmp_path / "plain.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.from_numpy(vectors[order])}, tmp_path / "two.safetensors")
    expected = stages._unit_scale(vectors)
    for name, options in (
        ("plain.npy", {}),
        ("named.npy", {"ids": str(tmp_path / "ids.txt")}),
        ("named.npz", {}),
        ("named.parquet", {}),
        ("plain.safetensors", {}),
        ("two.safetensors", {"ids": str(tmp_path / "ids.txt"), "vector_column": "b"}),
    ):
        block = stages.array_block(made, path=str(tmp_path / name), **options)
        assert np.allclose(block.symmetric, expected, atol=1e-6), name


def test_array_errors_name_the_row(tmp_path):
    def saved(name, ids, vectors):
        np.savez(tmp_path / name, ids=np.array(ids), vectors=np.array(vectors))
        return tmp_path / name

    bad = [
        (saved("a.npz", ["x", "y"], [[1.0], [np.nan]]), r"row 1 \(item 'y'\)"),
        (saved("b.npz", ["x", "x"], [[1.0], [2.0]]), "row 1: item 'x' is already row 0"),
        (saved("c.npz", ["x"], [[1.0], [2.0]]), "1 ids for 2 vectors"),
        (saved("d.npz", ["x", "y"], [1.0, 2.0]), "not a matrix"),
        (tmp_path / "none.npy", "no such file"),
        (tmp_path / "ids.txt", "not '.txt'"),
    ]
    (tmp_path / "ids.txt").write_text("x")
    for path, match in bad:
        with pytest.raises(ItemTableError, match=match):
            read_vectors(path)
    pq.write_table(pa.table({"item_id": ["x", "y"], "v": [[1.0], [1.0, 2.0]]}), tmp_path / "e.parquet")
    with pytest.raises(ItemTableError, match=r"row 1 \(item 'y'\) has 2 numbers"):
        read_vectors(tmp_path / "e.parquet")
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ItemTableError, match="cannot be read"):
        read_vectors(tmp_path / "o.npy")
    save_file({"v": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "h.safetensors")  # numpy has no such numbers
    assert read_vectors(tmp_path / "h.safetensors")[1].dtype == np.float32
    save_file({"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)}, tmp_path / "i.safetensors")
    with pytest.raises(ItemTableError, match=r"2 tensors; found \['a', 'b'\]. Set vector_column"):
        read_vectors(tmp_path / "i.safetensors")
    (tmp_path / "j.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ItemTableError, match="cannot be read"):
        read_vectors(tmp_path / "j.safetensors")
    some = saved("f.npz", ["x", "z"], [[1.0], [3.0]])
    with pytest.raises(ItemTableError, match=r"1 of 2 items have no row \(first: 'y' of catalogue row 1\)"):
        vectors_of_items(some, ["x", "y"])
    assert vectors_of_items(some, ["x", "y", "z"], when_missing="mean").tolist() == [[1.0], [2.0], [3.0]]
    np.save(tmp_path / "g.npy", np.zeros((3, 2)))
    with pytest.raises(ItemTableError, match="3 rows for 2 items"):
        vectors_of_items(tmp_path / "g.npy", ["x", "y"])


# --- place and time --------------------------------------------------------------------------------------------------------


def test_places_and_times():
    points = on_the_sphere(np.array([0, 0, 0, np.nan]), np.array([179.9, -179.9, 0, 5]))
    assert np.linalg.norm(points[0] - points[1]) < 0.01 < np.linalg.norm(points[0] - points[2])
    assert np.allclose(points[3], points[:3].mean(0), atol=1e-6)
    with pytest.raises(ItemTableError, match="row 1: latitude 91"):
        on_the_sphere(np.array([0, 91.0]), np.array([0, 0]))
    histogram = time_histograms(np.array([0, 0, 1]), np.array([0, 3600, 86400 * 4]), 3, prior=1.0)  # Thursday, Monday
    assert np.allclose(histogram[:, :24].sum(1), 1) and np.allclose(histogram[:, 24:].sum(1), 1)
    assert histogram[0, 24 + 3] > histogram[1, 24 + 3] and histogram[1, 24] > histogram[0, 24]
    assert np.allclose(histogram[2, :24], [2 / 3, 1 / 3, *[0] * 22])


def test_geo_time_block_takes_what_is_there():
    only_times = stages.geo_time_block(context())
    even, odd = only_times.symmetric[::2].mean(0), only_times.symmetric[1::2].mean(0)
    assert only_times.symmetric.shape == (ITEMS, 31) and np.abs(even - odd).max() > 0.5
    places = {"latitude": np.linspace(0, 60, ITEMS).tolist(), "longitude": [0.0] * ITEMS, "region": ["a", "b", "c"] * 4}
    assert stages.geo_time_block(context(**places), times=False).symmetric.shape == (ITEMS, 3 + 3)
    with pytest.raises(ItemTableError, match="nothing to make geo_time"):
        stages.geo_time_block(context(), times=False)
    with pytest.raises(ItemTableError, match="no number"):
        stages.geo_time_block(context(latitude=["x"] * ITEMS, longitude=[0.0] * ITEMS))


# --- SASRec ----------------------------------------------------------------------------------------------------------------


def test_sasrec_vectors_know_who_goes_with_whom():
    made = context()
    block = stages.sasrec_block(made, epochs=20, hidden_size=8, max_history=8)
    assert block.symmetric.shape == (ITEMS, 8)
    unit = block.symmetric / np.linalg.norm(block.symmetric, axis=1, keepdims=True)
    similarity = unit @ unit.T
    parity = np.arange(ITEMS) % 2
    same = (parity[:, None] == parity) & ~np.eye(ITEMS, dtype=bool)
    assert similarity[same].mean() > similarity[parity[:, None] != parity].mean() + 0.2
    first = stages.sasrec_vectors(made, epochs=20, hidden_size=8, max_history=8)
    model, _ = stages.trained_sasrec(made, epochs=20, hidden_size=8, max_history=8)
    assert stages.trained_sasrec(made, epochs=20, hidden_size=8, max_history=8)[0] is model  # trained once
    assert np.array_equal(stages.sasrec_vectors(made, epochs=20, hidden_size=8, max_history=8), first)
    again = stages.sasrec_vectors(context(), epochs=20, hidden_size=8, max_history=8)
    assert np.array_equal(first, again)  # the same seed, the same vectors


# --- gated fusion ------------------------------------------------------------------------------------------------------------


def two_blocks(made: StageContext) -> None:
    """A block that says which items go together, and one of noise."""
    rng = np.random.default_rng(0)
    parity = np.where(np.arange(ITEMS) % 2, 1.0, -1.0)[:, None]
    made.blocks["useful"] = FeatureBlock(
        (parity + 0.1 * rng.normal(size=(ITEMS, 4))).astype(np.float32), parity.astype(np.float32)
    )
    noise = rng.normal(size=(ITEMS, 6)).astype(np.float32)
    made.blocks["noise"] = FeatureBlock(noise, noise)


def test_weight_zero_is_concatenation():
    made = context()
    two_blocks(made)
    for options in ({"weight": 0.0}, {"steps": 0}):
        made.blocks.pop("gated", None)
        made.blocks["gated"] = stages.gated_block(made, **options)
        assert np.allclose(made.vectors(["gated"]), made.vectors(["useful", "noise"]), atol=1e-6)
        assert np.allclose(
            made.blocks["gated"].inputs, np.concatenate([b.inputs for b in list(made.blocks.values())[:2]], axis=1)
        )


def test_the_gate_learns_which_block_matters():
    made = context()
    two_blocks(made)
    rows, columns = np.nonzero(np.arange(ITEMS)[:, None] % 2 == np.arange(ITEMS) % 2)
    pairs = np.stack([rows, columns], axis=1)[rows != columns]
    blocks = [b.symmetric / np.sqrt(b.symmetric.shape[1]) for b in made.blocks.values()]
    fusion = fit_gated_fusion(blocks, pairs, steps=200)
    gates = gate_weights(fusion, blocks)
    assert np.allclose(gates.mean(1), 1, atol=1e-5) and (gates[:, 0] > gates[:, 1]).mean() > 0.9
    assert np.array_equal(gates, gate_weights(fit_gated_fusion(blocks, pairs, steps=200), blocks))
    with pytest.raises(IncompatibleComponentsError, match="different items"):
        fit_gated_fusion([blocks[0], blocks[1][:3]], pairs)
    with pytest.raises(RecipeError, match="behind the blocks"):
        stages.gated_block(context())


# --- what is saved -----------------------------------------------------------------------------------------------------------


def test_saved_features_give_what_the_quantizer_read(tmp_path):
    made = context(genres=["a|b", "a", "b"] * 4)
    made.blocks["attributes"] = stages.attributes_block(made, columns=["genres"])
    made.blocks["cooccurrence"] = stages.cooccurrence_block(made, dim=4)
    names = ["cooccurrence", "attributes"]
    saved = stages.item_features(made, names, ["attributes"])
    assert saved is not None
    saved.save(tmp_path / "f.safetensors")
    loaded = ItemFeatures.load(tmp_path / "f.safetensors")
    assert np.allclose(loaded.identifier_vectors(), made.vectors(names), atol=1e-6)
    assert np.allclose(loaded.model_vectors(), made.blocks["attributes"].inputs, atol=1e-6)
    # a new item that is like item 0 in content gets its content, and behaviour from items of that content
    new = loaded.of_new_items(ItemTable.from_source({"item_id": ["x"], "genres": ["a|b"]}))
    assert list(new) == ["attributes", "cooccurrence"]
    assert np.allclose(new["attributes"].symmetric[0], made.blocks["attributes"].symmetric[0], atol=1e-6)
    grown = loaded.changed(np.arange(ITEMS), new)
    assert grown.identifier_vectors().shape == (ITEMS + 1, 6)
    assert grown.identifier_vectors(new).shape == (1, 6)
