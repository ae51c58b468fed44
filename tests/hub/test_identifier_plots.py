"""Pictures of identifiers: made for codes, not for texts; saved into the artefact and its card; a note without matplotlib."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from hf_genrec.cli.main import main
from hf_genrec.errors import GenRecError
from hf_genrec.hub import save_artifact
from hf_genrec.hub.identifier_plots import _spread, code_colours, flat_map, identifier_pictures, tree_figure
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

RNG = np.random.default_rng(0)
CODES = np.column_stack([RNG.integers(0, 6, 80), RNG.integers(0, 8, 80), np.arange(80) % 3])
TOKENIZER = ItemTokenizer.from_codes([f"i{n}" for n in range(80)], CODES, (8, 8, 3))
NAMES = {"codebook usage", "prefix tree", "item map"}


@pytest.mark.parametrize("vectors", [None, RNG.normal(size=(80, 5)), np.zeros((80, 1))])
def test_three_pictures(vectors):
    pytest.importorskip("matplotlib")
    pictures = identifier_pictures(TOKENIZER, vectors)
    assert set(pictures) == NAMES and all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert pictures == identifier_pictures(TOKENIZER, vectors)  # the same bytes


def test_codes_of_several_lengths_have_boxes_only_where_they_go_on():
    pytest.importorskip("matplotlib")
    codes = np.array([[0, 0], [0, 1], [1, -1]])
    figure = tree_figure(codes, np.ones((2, 3)))
    boxes = [len(collection.get_paths()) for collection in figure.axes[0].collections]
    assert boxes == [1, 2, 2]  # the root, two first codes, two codes below the first
    assert set(identifier_pictures(ItemTokenizer.from_codes(["a", "b", "c"], codes, (2, 2)))) == NAMES


def test_one_code_per_item_has_nothing_to_show():
    assert identifier_pictures(ItemTokenizer.from_codes(["a", "b"], [[0], [1]])) == {}


def test_map_and_colours():
    points = RNG.normal(size=(50, 4)) * [9, 3, 1, 1]
    flat = flat_map(points)
    assert flat[:, 0].var() > flat[:, 1].var() > 0 and abs(np.corrcoef(flat.T)[0, 1]) < 1e-9
    assert np.array_equal(np.argsort(_spread(flat)[:, 0]), np.argsort(flat[:, 0]))  # the order along an axis stays
    colours = code_colours(CODES, (8, 8, 3), None)
    assert colours.shape == (8, 3) and len(np.unique(colours.round(6), axis=0)) == 8
    assert colours.min() >= 0 and colours.max() <= 1


def test_command_line_puts_them_into_artefact_and_card(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "a"
    old = identifier_pictures(TOKENIZER)["item map"]
    save_artifact(folder, tokenizer=TOKENIZER, plots={"results": old})
    assert main(["plots", str(folder), "--json"]) == 0
    assert "prefix-tree.png" in capsys.readouterr().out
    assert {path.stem for path in (folder / "plots").iterdir()} == {
        "results",
        "codebook-usage",
        "prefix-tree",
        "item-map",
    }
    card = (folder / "README.md").read_text()
    assert "plots/prefix-tree.png" in card and "plots/results.png" in card
    assert main(["plots", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "item-map.png").is_file()


def test_without_matplotlib(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert identifier_pictures(TOKENIZER) == {}
    assert "hf_genrec[viz]" in caplog.text
    with pytest.raises(GenRecError, match="matplotlib"):
        identifier_pictures(TOKENIZER, required=True)
