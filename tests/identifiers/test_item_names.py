"""Item names: numbers in several orders, titles, paths of new tokens (CID); unique, and without a look at the test part."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hostile_strings import hostile_strings
from text_tokenizers import FAMILIES, family
from transformers import AutoTokenizer

import hf_genrec  # noqa: F401  (registers the tokenizers)
from hf_genrec.data.cooccurrence import cooccurrence
from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import IncompatibleComponentsError, ItemTableError
from hf_genrec.identifiers.item_names import distinct_rows, tokenizer_from_names
from hf_genrec.identifiers.number_identifiers import ORDERS, item_numbers, number_names, sequential_order
from hf_genrec.identifiers.path_identifiers import atomic_tokens, column_paths, path_codes, path_tokens
from hf_genrec.identifiers.quantizers.spectral import SpectralIndexer
from hf_genrec.identifiers.segments import encode_segments
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer

IDS = [f"i{n}" for n in range(6)]


@pytest.fixture(scope="module")
def base():
    return train_text_tokenizer(["item_ user_ next item after"] + [f"{n:02d}" for n in range(100)], 400)


def names_of(tokenizer) -> list[tuple[int, ...]]:
    return [tuple(tokenizer.item_token_ids(item)) for item in tokenizer.item_ids]


@pytest.mark.parametrize("order", ORDERS)
def test_every_number_is_used_once(order):
    numbers = item_numbers(500, order, train_items=np.arange(100)[::-1], first=1001, seed=3)
    assert sorted(numbers.tolist()) == list(range(1001, 1501))


def test_random_order_depends_on_the_seed():
    first, again, other = (item_numbers(100, "random", seed=seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any() and (first != item_numbers(100)).any()


def test_sequential_numbers_follow_histories():
    # a user's consecutive items that nobody had before get consecutive numbers
    rows = [[4, 2, 7], [2, 9, 1, 4], [3]]
    places = sequential_order(np.concatenate(rows), 10)
    assert places[[4, 2, 7]].tolist() == [0, 1, 2]
    assert places[[9, 1]].tolist() == [3, 4]
    assert places[3] == 5 and places[[0, 5, 6, 8]].tolist() == [6, 7, 8, 9]  # never consumed: catalogue order, last


def test_unknown_orders_and_indices_are_refused():
    with pytest.raises(IncompatibleComponentsError, match="running, random, sequential"):
        item_numbers(5, "alphabetical")
    with pytest.raises(IncompatibleComponentsError, match="train_items"):
        item_numbers(5, "sequential")
    with pytest.raises(IncompatibleComponentsError, match="5 items"):
        sequential_order(np.array([2, 5]), 5)


def test_numbers_are_split_by_the_text_tokenizer(base):
    ids = [f"i{n}" for n in range(2000)]
    tokenizer = tokenizer_from_names(base, ids, number_names(item_numbers(2000)))
    names = names_of(tokenizer)
    assert len(set(names)) == 2000
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.item_token_ids("i1681"))
    assert pieces == ["item", "_", "16", "82", "<item_end>"]
    assert set(names[1681][:3]) <= set(names[1600])  # 1682 and 1601 share their first digits


def test_real_t5_vocabulary(data_dir):
    real = AutoTokenizer.from_pretrained(data_dir / "t5_tokenizer")
    tokenizer = tokenizer_from_names(real, [f"i{n}" for n in range(300)], number_names(item_numbers(300, first=7300)))
    assert len(set(names_of(tokenizer))) == 300
    assert len(tokenizer.item_token_ids("i91")) > 3  # several pieces, and the end


def test_equal_titles_are_told_apart(base):
    titles = ["Hamlet", "Hamlet", "Hamlet 2", "Macbeth", "Hamlet", "a" * 200]
    tokenizer = tokenizer_from_names(base, IDS, titles, max_tokens=16)
    assert len(set(names_of(tokenizer))) == 6
    assert tokenizer.num_levels <= 16
    assert tokenizer.decode(tokenizer.item_token_ids("i0"), skip_special_tokens=True) == "Hamlet"
    # the untouched "Hamlet 2" keeps its name, the second Hamlet becomes something else
    assert tokenizer.decode(tokenizer.item_token_ids("i2"), skip_special_tokens=True) == "Hamlet 2"


def test_cut_titles_stay_unique():
    rows = distinct_rows([[1] * 30] * 40, [[2, n] for n in range(3, 60)], max_length=10)
    assert len({tuple(row) for row in rows}) == 40 and max(map(len, rows)) == 10
    with pytest.raises(ItemTableError, match="cannot be told apart"):
        distinct_rows([[1]] * 3, [[2]], max_length=5)


def test_paths_from_columns_are_unique_and_prefixed():
    paths = column_paths([["Toys", "Toys", "Toys", "Books", "", None], [["Dolls"], ["Dolls"], ["Cars"], [], [], []]])
    names = path_tokens(path_codes(paths), "SC")
    assert len({tuple(name) for name in names}) == 6
    assert names[0] == ["<SC1>", "<SC1-1>", "<A1>"] and names[1] == ["<SC1>", "<SC1-1>", "<A2>"]
    assert names[2] == ["<SC1>", "<SC1-2>", "<A1>"] and names[3] == ["<SC2>", "<A1>"]
    assert names[4] == ["<A1>"] and names[5] == ["<A2>"]  # no category: the counter alone
    hybrid = path_tokens(path_codes(paths), "SC", leaf="atomic")
    assert hybrid[1] == ["<SC1>", "<SC1-1>", "<I2>"] and len({name[-1] for name in hybrid}) == 6
    assert path_codes(paths, max_depth=1).shape[1] == 2


def test_a_child_token_belongs_to_one_parent():
    rng = np.random.default_rng(0)
    paths = [tuple(rng.choice(list("abcd"), rng.integers(1, 4))) for _ in range(400)]
    parents: dict[str, set[str]] = {}
    for name in path_tokens(path_codes(paths)):
        for parent, child in zip(["", *name], name[:-1]):
            parents.setdefault(child, set()).add(parent)
    assert all(len(found) == 1 for found in parents.values())


def _collaborative(graph, **options) -> list[list[str]]:
    settings = {"max_cluster": 8, "smoothing": 1.0, "max_load": 2.0, "code_style": "local"} | options
    return path_tokens(SpectralIndexer(4, **settings).fit(graph).codes_NL.numpy())


def test_cooccurring_items_share_their_first_token_and_strangers_do_not():
    groups = [list(range(start, start + 10)) for start in range(0, 40, 10)]
    rng = np.random.default_rng(0)
    rows = [rng.permutation(groups[user % 4]).tolist() for user in range(80)]
    names = _collaborative(cooccurrence(Sequences.from_rows(rows), 40))
    for a in range(40):
        for b in range(40):
            assert (names[a][0] == names[b][0]) == (a // 10 == b // 10)
    assert len({tuple(name) for name in names}) == 40


def test_sharing_a_prefix_rises_with_cooccurrence():
    rng = np.random.default_rng(1)
    place = rng.permutation(120)  # items on a line, near ones are consumed together
    rows = []
    for _ in range(600):
        centre = rng.uniform(0, 120)
        near = np.clip(rng.normal(centre, 6, 8).round(), 0, 119).astype(int)
        rows.append(place[near].tolist())
    graph = cooccurrence(Sequences.from_rows(rows), 120, weight="uniform", directed=False)
    names = _collaborative(graph)
    weight = np.asarray(sp.csr_matrix(graph).todense())
    shared = np.array([[a[0] == b[0] for b in names] for a in names])
    upper = np.triu_indices(120, 1)
    weight, shared = weight[upper], shared[upper]
    bins = [shared[weight == 0].mean(), shared[(weight > 0) & (weight <= 6)].mean(), shared[weight > 6].mean()]
    assert bins[0] < bins[1] < bins[2] and bins[2] > 3 * bins[0]


def test_new_tokens_join_the_vocabulary(base, tmp_path):
    tokenizer = tokenizer_from_names(
        base, IDS, path_tokens(path_codes([("a", "b"), ("a",), ("a", "b"), ("c",)] + [()] * 2))
    )
    assert tokenizer.convert_ids_to_tokens(tokenizer.item_token_ids("i2")) == ["<CI1>", "<CI1-1>", "<A2>", "<item_end>"]
    assert len(tokenizer) == len(base) + 1 + len({"<CI1>", "<CI1-1>", "<CI2>", "<A1>", "<A2>"})
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.item_token_ids("i2") == tokenizer.item_token_ids("i2")
    assert again.catalogue_fingerprint == tokenizer.catalogue_fingerprint
    with pytest.raises(IncompatibleComponentsError, match="already"):
        tokenizer_from_names(base, ["x"], [["item"]])
    with pytest.raises(IncompatibleComponentsError, match="catalogue"):
        tokenizer_from_names(tokenizer, ["x"], ["y"])
    with pytest.raises(ItemTableError, match="used twice"):
        tokenizer_from_names(base, ["x", "y"], [["<q>"], ["<q>"]])
    with pytest.raises(ItemTableError, match="2 names for 1 items"):
        tokenizer_from_names(base, ["x"], ["y", "z"])
    assert names_of(tokenizer_from_names(base, IDS, atomic_tokens(6))) == [
        (len(base) + 1 + item, len(base)) for item in range(6)
    ]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"word_level"}))  # which cannot write numbers
def test_hostile_titles_forge_nothing(name):
    text = family(name)
    titles = hostile_strings(["<item_end>", "<CI1>"], 400)
    usable = [title for title in titles if encode_segments(text, [("text", title)])]
    tokenizer = tokenizer_from_names(text, [str(n) for n in range(len(usable))], usable)
    control = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    specials = list(tokenizer.special_tokens_map.values())
    if specials.count(tokenizer.unk_token) == 1:
        control.discard(tokenizer.unk_token_id)
    assert len(usable) > 100 and len(set(names_of(tokenizer))) == len(usable)
    for ids in names_of(tokenizer):
        assert control.isdisjoint(ids[:-1]) and ids[-1] == tokenizer.item_end_token_id
