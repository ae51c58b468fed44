"""Tags of items by level, their loss terms, and reading a tag path off the codes (HiD-VAE)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_genrec.data.items import ItemTable
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, ItemTableError
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.identifiers.quantizers.terms import QuantizerWithTerms, Step
from hf_genrec.identifiers.quantizers.terms_tags import TagClassification, TagContrast
from hf_genrec.identifiers.quantizers.training import train_rq_vae
from hf_genrec.identifiers.tag_path import TagPathReader
from hf_genrec.identifiers.tags import UNKNOWN, TagTable

NUM, DIM, ROOTS, LEAVES = 320, 16, 4, 3


def noise(num: int, dim: int, seed: int) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def catalogue() -> tuple[Tensor, TagTable]:
    """Two-level tags of which the second adds a small shift to the features; a tenth of them is missing."""
    root = torch.arange(NUM) % ROOTS
    leaf = (torch.arange(NUM) // ROOTS) % LEAVES
    x = noise(ROOTS, DIM, 0)[root] + 0.7 * noise(ROOTS * LEAVES, DIM, 1)[root * LEAVES + leaf] + noise(NUM, DIM, 2)
    values = [[f"root{r}", f"leaf{r}{k}"] for r, k in zip(root.tolist(), leaf.tolist())]
    values = [row[:1] if item % 10 == 0 else row for item, row in enumerate(values)]
    return x, TagTable.from_values(values)


def small(**options) -> RQVAEConfig:
    settings = {"input_size": DIM, "hidden_sizes": [32], "latent_size": 8, "codebook_sizes": [12, 12, 12]}
    return RQVAEConfig(**settings | options)


# --------------------------------------------------------------------------------------------------------------- table


def test_one_column_of_several_tags_or_one_column_per_level() -> None:
    listed = {"item_id": list("abcd"), "kind": [["x", "y"], ["x", "z"], [], ["w", "y"]]}
    table = TagTable.from_items(ItemTable.from_source(listed), ["kind"], min_items=1)
    assert table.names == (("w", "x"), ("y", "z"))
    assert table.tags_NT.tolist() == [[1, 0], [1, 1], [UNKNOWN, UNKNOWN], [0, 0]]
    text = {"item_id": list("abcd"), "kind": ["x|y", "x|z", None, "w|y"]}
    again = TagTable.from_items(ItemTable.from_source(text), ["kind"], min_items=1)
    assert again.names == table.names and np.array_equal(again.tags_NT, table.tags_NT)
    words = {"item_id": list("abcd"), "kind": ["x y", "x  z", " ", "w y"]}
    again = TagTable.from_items(ItemTable.from_source(words), ["kind"], separators="| ", min_items=1)
    assert again.names == table.names and np.array_equal(again.tags_NT, table.tags_NT)
    apart = {"item_id": list("abcd"), "top": ["x", "x", None, "w"], "sub": ["y", "z", None, "y"]}
    columns = TagTable.from_items(ItemTable.from_source(apart), ["top", "sub"], min_items=1)
    assert columns.names == table.names and np.array_equal(columns.tags_NT, table.tags_NT)
    with pytest.raises(ItemTableError, match=r"'genre'.*'top'"):
        TagTable.from_items(ItemTable.from_source(apart), ["genre"])


def test_frequent_order_puts_the_common_tag_first_and_rare_ones_are_unknown() -> None:
    values = [["b", "a"], ["a", "c"], ["a"], ["c", "d"], ["c", "once"]]
    table = TagTable.from_values(values, order="frequent", min_items=1)
    assert table.names[0] == ("a", "c") and table.tags_NT[:, 0].tolist() == [0, 0, 0, 1, 1]
    table = TagTable.from_values([["t", "a"], ["t", "a"], ["t", "b"], ["t", "b"], ["t", "c"]])
    assert table.names == (("a", "b"),)  # "t" is everybody's, "c" only one item's
    assert (
        table.tags_NT.tolist() == [[0], [0], [1], [1], [UNKNOWN]] and table.coverage == [0.8] and table.chance == [0.5]
    )
    with pytest.raises(ItemTableError, match="min_items"):
        TagTable.from_values([["a"], ["b"], []])
    with pytest.raises(ItemTableError, match="order"):
        TagTable.from_values(values, order="alphabet")


def test_missing_tags_are_taken_from_the_nearest_tagged_item() -> None:
    x, table = catalogue()
    filled = table.filled(x.numpy())
    known = table.tags_NT != UNKNOWN
    assert filled.coverage == [1.0, 1.0] and np.array_equal(filled.tags_NT[known], table.tags_NT[known])
    unit = torch.nn.functional.normalize(x, dim=1)
    for item in np.flatnonzero(~known[:, 1])[:8]:
        cosine = (unit @ unit[item]).masked_fill(torch.as_tensor(~known[:, 1]), -2)
        assert filled.tags_NT[item, 1] == table.tags_NT[int(cosine.argmax()), 1]


# --------------------------------------------------------------------------------------------------------------- terms


def test_items_without_a_tag_take_no_part() -> None:
    x, table = catalogue()
    torch.manual_seed(0)
    model = RQVAEModel(small()).initialise_codebooks(x)
    terms = {"c": TagClassification(1.0, table), "n": TagContrast(1.0, table, table.centroids(x.numpy()))}
    QuantizerWithTerms(model, terms, x, 1)
    model.eval()

    def values(items: Tensor) -> tuple[float, float]:
        step = Step(model, model(features=x[items]), x[items], items, x)
        return terms["c"](step).item(), terms["n"](step).item()

    items = torch.arange(1, 10)
    with_unknown = torch.cat([items, torch.tensor([0, 10])])  # known at level 1, unknown at level 2
    second = [TagTable(table.names[1:], table.tags_NT[:, 1:])]
    terms = {
        "c": TagClassification(1.0, second[0]),
        "n": TagContrast(1.0, second[0], [second[0].centroids(x.numpy())[0]]),
    }
    QuantizerWithTerms(model, terms, x, 1)
    model.eval()
    assert values(with_unknown) == pytest.approx(values(items), rel=1e-5)
    assert values(torch.tensor([0, 10])) == (0.0, 0.0)


def test_more_tag_levels_than_codes() -> None:
    x, table = catalogue()
    with pytest.raises(IncompatibleComponentsError, match="2 tag levels"):
        QuantizerWithTerms(RQVAEModel(small(codebook_sizes=[12])), {"c": TagClassification(1.0, table)}, x, 1)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_hid_vae_tags_can_be_read_off_the_first_codes(update, tmp_path) -> None:
    x, table = catalogue()
    tags = TagClassification(0.5, table)
    terms = {"tags": tags, "contrast": TagContrast(1.0, table, table.centroids(x.numpy()))}
    options = {"max_steps": 150, "batch_size": NUM, "learning_rate": 5e-3, "progress": False}
    model = train_rq_vae(x, small(codebook_update=update), terms=terms, **options)
    codes = model.encode(x)
    reader = TagPathReader.from_term(model, tags)
    accuracy = reader.accuracy(codes, table.tags_NT)
    assert accuracy[0] > table.chance[0] + 0.4 and accuracy[1] > table.chance[1] + 0.3
    paths = reader.path(codes)  # readable, and right for most items
    right = [path[0] == f"root{item % ROOTS}" for item, path in enumerate(paths)]
    assert np.mean(right) == pytest.approx(accuracy[0]) and paths[0][1].startswith("leaf")
    assert reader.path(np.concatenate([codes, codes[:, :1]], 1)) == paths  # a collision counter is not read

    reader.save(tmp_path / "tag_path.safetensors")
    again = TagPathReader.load(tmp_path / "tag_path.safetensors")
    assert again.path(codes) == paths and again.names == table.names
    with pytest.raises(IncompatibleComponentsError, match="outside"):
        reader.path([[0, 99, 0]])
    with pytest.raises(IncompatibleComponentsError, match="2 or more"):
        reader.path([[0]])


def test_supervision_moves_tags_into_the_first_code() -> None:
    """With the terms off the first code says less about the first tag."""
    x, table = catalogue()
    options = {"max_steps": 150, "batch_size": NUM, "learning_rate": 5e-3, "progress": False}
    purity = {}
    for weight in (0.0, 1.0):
        terms = {"tags": TagClassification(weight, table, gamma=0.0)}
        first_N = train_rq_vae(x, small(codebook_update="gradient"), terms=terms, **options).encode(x)[:, 0].numpy()
        counts = np.zeros((12, ROOTS))
        np.add.at(counts, (first_N, table.tags_NT[:, 0]), 1)
        purity[weight] = counts.max(1).sum() / NUM
    assert purity[1.0] > purity[0.0] + 0.05


def test_a_file_of_another_kind_is_refused(tmp_path) -> None:
    ResidualKMeans([4]).fit(noise(20, 3, 0)).save(tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="tag path"):
        TagPathReader.load(tmp_path / "other.safetensors")
