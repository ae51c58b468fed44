"""Codes for items that join: nearest where free, numbers and neighbours where not, never anybody else's."""

from __future__ import annotations

import numpy as np
import pytest

from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, ItemTableError, UnknownItemError
from hf_genrec.identifiers.life_cycle import add_items, reassign, remove_items
from hf_genrec.identifiers.quantizers.auto_quantizer import can_save, load_quantizer, save_quantizer
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.product import ProductQuantizer
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.identifiers.quantizers.tree import TreeIndexer
from hf_genrec.identifiers.tokenization_action_piece import ActionPieceTokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

X = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
IDS = [f"i{n}" for n in range(30)]


@pytest.fixture(scope="module")
def quantizer():
    return ResidualKMeans([4, 4]).fit(X[:30])


def numbered(quantizer, digit: int) -> ItemTokenizer:
    """30 items with a number behind their codes; numbers up to `digit` exist."""
    codes = quantizer.encode(X[:30]).numpy()
    seen: dict[tuple[int, ...], int] = {}
    numbers = [seen.setdefault(tuple(row), 0) or 0 for row in codes.tolist()]
    for n, row in enumerate(map(tuple, codes.tolist())):
        numbers[n] = seen[row]
        seen[row] += 1
    assert max(numbers) < digit
    return ItemTokenizer.from_codes(IDS, np.column_stack([codes, numbers]), (4, 4, digit), max_history=7)


def test_new_items_take_the_next_free_number(quantizer):
    tokenizer = numbered(quantizer, 12)
    change = add_items(tokenizer, quantizer, [f"new{n}" for n in range(10)], X[30:])
    new = change.tokenizer
    assert np.array_equal(new.codes[:30], tokenizer.codes) and new.codebook_sizes == tokenizer.codebook_sizes
    assert np.array_equal(new.codes[30:, :2], quantizer.encode(X[30:]).numpy())
    assert len(np.unique(new.codes, axis=0)) == 40 and change.moved == 0
    assert new.max_history == 7 and tokenizer.num_items == 30
    assert np.array_equal(new.item_token_table[:30], tokenizer.item_token_table)
    for n in range(30, 40):  # the smallest number that was free
        number = new.codes[n, 2]
        same = new.codes[:n][(new.codes[:n, :2] == new.codes[n, :2]).all(axis=1), 2]
        assert set(range(number)) <= set(same.tolist()) and number not in same


def test_a_full_digit_is_an_error_or_moves_to_the_nearest_free_code(quantizer):
    vector = X[[3, 3, 3]]
    tokenizer = numbered(quantizer, 8)
    base = quantizer.encode(vector[:1])[0].numpy()
    used = int((tokenizer.codes[:, :2] == base).all(axis=1).sum())
    many = [f"n{n}" for n in range(8 - used + 1)]
    vectors = np.repeat(vector[:1], len(many), axis=0)
    with pytest.raises(IncompatibleComponentsError, match="when_full='nearest'"):
        add_items(tokenizer, quantizer, many, vectors)
    change = add_items(tokenizer, quantizer, many, vectors, when_full="nearest")
    moved = change.tokenizer.codes[-1]
    assert change.moved == 1 and moved[0] == base[0] and moved[1] != base[1]
    # the nearest of the other last codes
    residual = quantizer.transform(vector[:1])[0] - quantizer.codebooks[0][base[0]]
    order = ((residual - quantizer.codebooks[1]) ** 2).sum(1).argsort().tolist()
    assert moved[1] == order[1]


def test_without_a_number_free_codes_are_searched_or_codes_shared(quantizer):
    codes = quantizer.encode(X[:30]).numpy()
    shared = ItemTokenizer.from_codes(IDS, codes, (4, 4))
    assert len(np.unique(codes, axis=0)) < 30
    change = add_items(shared, quantizer, ["new"], X[[0]])  # items share codes here: so does this one
    assert np.array_equal(change.tokenizer.codes[30], codes[0])
    _, first = np.unique(codes, axis=0, return_index=True)
    distinct = ItemTokenizer.from_codes([IDS[n] for n in first], codes[first], (4, 4))
    change = add_items(distinct, quantizer, ["new"], X[[first[0]]])
    assert change.moved == 1 and change.after.collision_rate == 0
    room = 16 - len(first)
    crowd = [f"n{n}" for n in range(room + 1)]
    with pytest.raises(IncompatibleComponentsError, match="no free code"):
        add_items(distinct, quantizer, crowd, np.repeat(X[:1], room + 1, axis=0))
    filled = add_items(distinct, quantizer, crowd[:-1], np.repeat(X[:1], room, axis=0))
    assert len(np.unique(filled.tokenizer.codes, axis=0)) == 16  # every last code is found


def test_parallel_codes_move_too():
    quantizer = ProductQuantizer([4, 4], pca_dim=4).fit(X[:30])
    codes = quantizer.encode(X[:30]).numpy()
    _, first = np.unique(codes, axis=0, return_index=True)
    tokenizer = ItemTokenizer.from_codes([IDS[n] for n in first], codes[first], (4, 4))
    row = first[0]
    change = add_items(tokenizer, quantizer, ["new"], X[[row]])
    got, want = change.tokenizer.codes[-1], codes[row]
    assert change.moved == 1 and (got == want).sum() == 1


def test_trees_find_a_free_leaf_themselves():
    indexer = TreeIndexer(branching=3, max_leaf=4).fit(X[:30])
    codes = np.asarray(indexer.codes_NL)
    tokenizer = ItemTokenizer.from_codes(IDS, codes, indexer.codebook_sizes)
    change = add_items(tokenizer, indexer, ["new"], X[[30]])
    assert np.array_equal(change.tokenizer.codes[:30], tokenizer.codes)
    assert len(np.unique(change.tokenizer.codes, axis=0)) == 31


def test_feature_sets_join_by_their_features():
    features = np.array([[0, 0], [0, 1], [1, 1]])
    tokenizer = ActionPieceTokenizer.train(
        ["a", "b", "c"], features, [["a", "b"], ["b", "c"]], feature_sizes=[3, 2], vocabulary_size=7, segmentations=2
    )
    change = add_items(tokenizer, None, ["d"], codes=[[2, 0]])
    new = change.tokenizer
    assert new.segmentations == 2 and np.array_equal(new.item_token_table[:3], tokenizer.item_token_table)
    assert new.token_ids_to_items(new.item_token_ids("d")) == [["d"]]
    with pytest.raises(IncompatibleComponentsError, match="give codes="):
        add_items(tokenizer, ResidualKMeans([2, 2]).fit(X), ["d"], X[:1])


def test_remove_and_reassign(quantizer):
    tokenizer = numbered(quantizer, 12)
    change = remove_items(tokenizer, ["i3", "i0"])
    assert change.tokenizer.item_ids == [item for item in IDS if item not in ("i0", "i3")]
    assert np.array_equal(change.tokenizer.codes, tokenizer.codes[change.kept_rows])
    again = reassign(tokenizer, quantizer, ["i5", "i6"], X[[30, 31]])
    others = [n for n in range(30) if n not in (5, 6)]
    assert np.array_equal(again.tokenizer.codes[others], tokenizer.codes[others])
    assert np.array_equal(again.tokenizer.codes[[5, 6], :2], quantizer.encode(X[[30, 31]]).numpy())
    # a new code for the old vector is the old code, or at least one with the same levels
    same = reassign(tokenizer, quantizer, ["i5"], X[[5]])
    assert np.array_equal(same.tokenizer.codes, tokenizer.codes)
    with pytest.raises(UnknownItemError, match="'nope'"):
        remove_items(tokenizer, ["nope"])
    with pytest.raises(UnknownItemError, match="twice"):
        remove_items(tokenizer, ["i1", "i1"])
    with pytest.raises(ItemTableError, match="no catalogue"):
        remove_items(tokenizer, IDS)


def test_health_delta_is_told(quantizer):
    change = add_items(numbered(quantizer, 12), quantizer, ["new"], X[30:31])
    told = change.to_dict()
    assert told["added"] == ["new"] and told["num_items"] == [30, 31] and "perplexity" in told["health"]
    assert "1 added" in str(change) and "30 -> 31 items" in str(change)


def test_bad_requests_are_named(quantizer):
    tokenizer = numbered(quantizer, 12)
    cases = [
        (["i1"], X[:1], {}, ItemTableError, "row 1"),
        (["a", "a"], X[:2], {}, ItemTableError, "twice"),
        ([], X[:0], {}, ItemTableError, "no item"),
        (["a"], X[:2], {}, ItemTableError, "one row for each of the 1"),
        (["a"], None, {}, IncompatibleComponentsError, "vectors"),
        (["a"], X[:1], {"collisions": "sinkhorn"}, IncompatibleComponentsError, "auto"),
        (["a"], X[:1], {"collisions": "keep"}, IncompatibleComponentsError, "does not fit"),
        (["a"], X[:1], {"codes": [[0, 0]]}, ItemTableError, "full code"),
    ]
    for ids, vectors, options, error, match in cases:
        with pytest.raises(error, match=match):
            add_items(tokenizer, quantizer, ids, vectors, **options)
    with pytest.raises(IncompatibleComponentsError, match="quantizer that made its codes"):
        add_items(tokenizer, ResidualKMeans([3, 4]).fit(X), ["a"], X[:1])


# --- saved quantizers --------------------------------------------------------------------------------------------------


def test_quantizers_come_back(tmp_path, quantizer):
    rq_vae = RQVAEModel(RQVAEConfig(input_size=5, hidden_sizes=[8], latent_size=4, codebook_sizes=[4, 4])).eval()
    rq_vae.initialise_codebooks(X)
    tree = TreeIndexer(branching=3, max_leaf=4).fit(X[:30])
    for number, one in enumerate([quantizer, ProductQuantizer([4, 4], pca_dim=4).fit(X), rq_vae, tree]):
        assert can_save(one)
        back = load_quantizer(save_quantizer(one, tmp_path / str(number)))
        assert type(back) is type(one)
        assert np.array_equal(np.asarray(back.encode(X[30:])), np.asarray(one.encode(X[30:])))
    assert not can_save(object()) and not can_save(None)
    with pytest.raises(ArtifactError, match="no quantizer there"):
        load_quantizer(tmp_path)
    (tmp_path / "0" / "quantizer.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a readable"):
        load_quantizer(tmp_path / "0")
