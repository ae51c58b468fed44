"""ItemTokenizer: known answers, agreement with plain Python, files that round-trip, errors that name the place."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_genrec.errors import ArtifactError, GenRecError, IncompatibleComponentsError, ItemTableError, UnknownItemError
from hf_genrec.identifiers.catalogue import item_token, level_name, level_number, user_token_index
from hf_genrec.identifiers.catalogue_file import FILE_NAME, Catalogue
from hf_genrec.identifiers.tokenization_item import ItemTokenizer, register

register()

IDS = ["shoe", "sock", "hat", "coat"]
CODES = [[0, 1], [0, 2], [3, 1], [0, 2]]  # sock and coat share a code


def make(**kwargs) -> ItemTokenizer:
    return ItemTokenizer.from_codes(IDS, CODES, **kwargs)


def random_catalogue(num_items: int, num_levels: int, size: int, seed: int = 0, **kwargs) -> ItemTokenizer:
    codes = np.random.default_rng(seed).integers(0, size, (num_items, num_levels))
    return ItemTokenizer.from_codes([f"i{n}" for n in range(num_items)], codes, [size] * num_levels, **kwargs)


def reference_rows(tokenizer, histories, user_ids=None, max_items=None) -> list[list[int]]:
    """Unpadded rows, written the slow and obvious way."""
    rows = []
    for place, history in enumerate(histories):
        row = []
        if user_ids is not None and tokenizer.num_user_tokens and user_ids[place] is not None:
            row.append(4 + user_token_index(user_ids[place], tokenizer.num_user_tokens))
        kept = history if max_items is None else history[len(history) - min(max_items, len(history)) :]
        for item in kept:
            for level, code in enumerate(tokenizer.codes[tokenizer.item_ids.index(item)]):
                row.append(4 + tokenizer.num_user_tokens + sum(tokenizer.codebook_sizes[:level]) + int(code))
        if tokenizer.history_eos:
            row.append(1)
        rows.append(row)
    return rows


# --- vocabulary and text -----------------------------------------------------------------------------------------


def test_vocabulary_layout():
    tokenizer = make(num_user_tokens=2)
    expected = ["<pad>", "</s>", "<unk>", "<s>", "<user_0>", "<user_1>"]
    expected += ["<a_0>", "<a_1>", "<a_2>", "<a_3>", "<b_0>", "<b_1>", "<b_2>"]
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(expected)}
    assert len(tokenizer) == tokenizer.vocab_size == 13
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id] == [
        0,
        1,
        2,
        3,
    ]
    assert tokenizer.convert_ids_to_tokens(list(range(13))) == expected
    assert tokenizer.convert_tokens_to_ids(expected) == list(range(13))
    assert tokenizer.codebook_sizes == (4, 3)
    assert tokenizer.level_offsets.tolist() == [6, 10]
    assert tokenizer.item_token_table.tolist() == [[6, 11], [6, 12], [9, 11], [6, 12]]


@given(st.integers(0, 701))
def test_level_names(level):
    assert level_number(level_name(level)) == level


def test_level_names_known():
    assert [level_name(level) for level in (0, 1, 25, 26, 51, 52, 701)] == ["a", "b", "z", "aa", "az", "ba", "zz"]
    assert item_token(2, 17) == "<c_17>"


def test_many_levels_and_uneven_codebooks():
    codes = np.array([[level % 2 for level in range(30)], [1] * 30])
    sizes = [2 + level for level in range(30)]
    tokenizer = ItemTokenizer.from_codes(["x", "y"], codes, sizes)
    vocab = tokenizer.get_vocab()
    assert len(vocab) == 4 + sum(sizes)
    assert tokenizer.convert_tokens_to_ids(list(vocab)) == list(vocab.values()) == list(range(len(vocab)))
    assert vocab["<ad_30>"] == len(vocab) - 1
    assert tokenizer.codes_to_items(codes) == [["x"], ["y"]]  # 30 levels: the key does not fit an int64
    assert tokenizer.decode(tokenizer.item_token_ids("y")).startswith("<a_1><b_1>")


def test_text_form_round_trip():
    tokenizer = make()
    ids = tokenizer.item_token_ids("hat") + tokenizer.item_token_ids("shoe")
    assert tokenizer.decode(ids) == "<a_3><b_1><a_0><b_1>"
    assert tokenizer("<a_3><b_1><a_0><b_1>")["input_ids"] == ids  # no automatic </s>
    assert tokenizer(" <a_3> <b_1>\n<a_0><b_1> ")["input_ids"] == ids
    assert tokenizer("<a_3><b_1></s>")["input_ids"] == [7, 9, 1]


@pytest.mark.parametrize(
    "text",
    [
        "<a_4>",
        "<c_0>",
        "<a_00>",
        "<a_01>",
        "<A_0>",
        "<a_-1>",
        "<user_0>",
        "word",
        "<a_" + "9" * 5000 + ">",
        "<ａ_0>",
        "<a_٣>",
    ],
)
def test_unknown_text_is_unk(text):
    assert set(make()(text)["input_ids"]) == {2}


def test_special_token_names_can_be_chosen():
    tokenizer = make(pad_token="[PAD]", eos_token="[EOS]", mask_token="[MASK]")
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[EOS]", "[MASK]"]) == [0, 1, 4 + 4 + 3]
    assert len(tokenizer) == tokenizer.vocab_size + 1 == len(tokenizer.get_vocab())
    with pytest.raises(IncompatibleComponentsError, match="not distinct"):
        make(pad_token="</s>")


# --- items -------------------------------------------------------------------------------------------------------


def test_item_methods():
    tokenizer = make()
    assert tokenizer.num_items == 4 and tokenizer.num_levels == 2 and list(tokenizer.item_ids) == IDS
    assert tokenizer.codes.dtype == np.int32 and tokenizer.codes.tolist() == CODES
    assert tokenizer.item_index(["hat", "nope", "shoe"]).tolist() == [2, -1, 0]
    assert tokenizer.item_index([]).shape == (0,)
    assert tokenizer.item_to_codes("hat").tolist() == [3, 1]
    assert tokenizer.item_token_ids("hat") == [7, 9]
    assert tokenizer.codes_to_items([3, 1]) == [["hat"]]
    assert tokenizer.codes_to_items([[0, 2], [1, 1], [3, 1], [-1, 0], [99, 0]]) == [
        ["sock", "coat"],
        [],
        ["hat"],
        [],
        [],
    ]
    assert tokenizer.codes_to_items(torch.tensor([[0, 1]])) == [["shoe"]]
    assert tokenizer.codes_to_items(np.zeros((0, 2), int)) == []
    assert tokenizer.token_ids_to_items([0, 7, 9, 4, 10, 1]) == [["hat"], ["sock", "coat"]]
    assert tokenizer.token_ids_to_items([]) == tokenizer.token_ids_to_items([4]) == []
    # a cut item in front, a tuple that names nothing, tokens out of order
    assert tokenizer.token_ids_to_items([9, 7, 9, 5, 8, 9, 7]) == [["hat"], []]
    with pytest.raises(ValueError, match="read-only"):
        tokenizer.codes[0, 0] = 1


def test_code_lookup_against_brute_force():
    for sizes in ([5, 5, 5], [2**21, 2**21, 2**21]):  # the second overflows a mixed-radix int64
        rng = np.random.default_rng(1)
        codes = rng.integers(0, 5, (200, 3)) * (sizes[0] // 5)
        tokenizer = ItemTokenizer.from_codes([str(n) for n in range(200)], codes, sizes)
        queries = rng.integers(0, 5, (100, 3)) * (sizes[0] // 5)
        expected = [[str(n) for n in range(200) if (codes[n] == query).all()] for query in queries]
        assert tokenizer.codes_to_items(queries) == expected
        assert any(len(group) > 1 for group in expected) and any(not group for group in expected)


def test_unknown_single_items():
    tokenizer = make()
    for call in (tokenizer.item_to_codes, tokenizer.item_token_ids):
        for item in ("nope", 5, ["shoe"]):
            with pytest.raises(UnknownItemError, match="not in this catalogue of 4 items"):
                call(item)
    for codes in ([1, 2, 3], [[0.5, 1.0]], [[[0, 1]]], "ab"):
        with pytest.raises(ItemTableError):
            tokenizer.codes_to_items(codes)


# --- histories ---------------------------------------------------------------------------------------------------


def test_histories_known_answer():
    tokenizer = make()
    batch = tokenizer.encode_histories([["shoe", "hat"], [], ["sock"]], return_tensors="pt")
    assert batch["input_ids"].tolist() == [[4, 9, 7, 9], [0, 0, 0, 0], [0, 0, 4, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert batch.input_ids.dtype == torch.int64 and list(batch) == ["input_ids", "attention_mask"]
    assert batch.skipped_items == 0


histories_strategy = st.lists(st.lists(st.sampled_from(IDS), max_size=6), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    histories=histories_strategy,
    users=st.booleans(),
    num_user_tokens=st.sampled_from([0, 3]),
    eos=st.booleans(),
    side=st.sampled_from(["left", "right"]),
    max_items=st.sampled_from([None, 0, 1, 2, 10]),
)
def test_histories_against_reference(histories, users, num_user_tokens, eos, side, max_items):
    tokenizer = make(num_user_tokens=num_user_tokens, history_eos=eos, padding_side=side)
    user_ids = [None if place == 1 else f"user {place}" for place in range(len(histories))] if users else None
    expected = reference_rows(tokenizer, histories, user_ids, max_items)
    batch = tokenizer.encode_histories(histories, user_ids, max_items, return_tensors="np")
    width = max(map(len, expected)) or 2
    for row, ids, mask in zip(expected, batch["input_ids"], batch["attention_mask"]):
        padding = [0] * (width - len(row))
        assert ids.tolist() == (padding + row if side == "left" else row + padding)
        assert mask.tolist() == (padding + [1] * len(row) if side == "left" else [1] * len(row) + padding)
    ragged = tokenizer.encode_histories(histories, user_ids, max_items, padding=False)
    assert ragged["input_ids"] == expected
    assert ragged["attention_mask"] == [[1] * len(row) for row in expected]
    lists = tokenizer.encode_histories(histories, user_ids, max_items)
    assert lists["input_ids"] == batch["input_ids"].tolist()
    indices = [tokenizer.item_index(history) for history in histories]
    by_index = tokenizer.encode_item_indices(indices, user_ids, max_items)
    assert by_index["input_ids"].tolist() == lists["input_ids"]


def test_decode_is_the_inverse():
    tokenizer = random_catalogue(500, 4, 32, history_eos=True, num_user_tokens=7)
    assert len(np.unique(tokenizer.codes, axis=0)) == 500  # no shared codes with this seed
    rng = np.random.default_rng(2)
    histories = [[f"i{n}" for n in rng.integers(0, 500, length)] for length in [0, 1, 5, 20, 3]]
    batch = tokenizer.encode_histories(histories, user_ids=list("abcde"), return_tensors="pt")
    assert tokenizer.decode_histories(batch["input_ids"]) == histories
    assert tokenizer.decode_histories(batch["input_ids"].tolist()) == histories
    # a shared code decodes to the first item that has it
    assert make().decode_histories([make().item_token_ids("coat")]) == [["sock"]]


def test_truncation_keeps_newest_and_never_cuts_an_item():
    tokenizer = random_catalogue(50, 3, 8, max_history=4)
    history = [f"i{n}" for n in range(10)]
    for limit in (None, 1, 3, 99):
        ids = tokenizer.encode_histories([history], max_items=limit)["input_ids"][0]
        kept = history[-(limit or 4) :]
        assert ids == [token for item in kept for token in tokenizer.item_token_ids(item)]


def test_indices_from_flat_sequences():
    class Flat:  # the shape of data.Sequences: row offsets and items
        offsets = np.array([2, 5, 5, 6])
        items = np.array([9, 9, 0, 2, 1, 3], np.int32)

    tokenizer = make()
    batch = tokenizer.encode_item_indices(Flat())
    assert batch["input_ids"].tolist() == [[4, 9, 7, 9, 4, 10], [0] * 6, [0, 0, 0, 0, 4, 10]]
    assert tokenizer.encode_item_indices([]).input_ids.shape == (0, 2)
    for bad in ([[0], [1, 4]], [[0], [-1]]):
        with pytest.raises(UnknownItemError, match="row 1: item index"):
            tokenizer.encode_item_indices([np.array(row) for row in bad])


def test_unknown_items_error_names_row_id_and_fix():
    with pytest.raises(UnknownItemError, match=r"history row 1: item 'nope' .*1 unknown.*unknown_items = 'skip'"):
        make().encode_histories([["shoe"], ["hat", "nope"]])
    with pytest.raises(UnknownItemError, match=r"item 7 .ids are strings, this is a int"):
        make().encode_histories([["shoe", 7]])
    for not_histories in ("shoe", ["shoe", "hat"], [[["shoe"]]]):
        with pytest.raises(UnknownItemError):
            make().encode_histories(not_histories)


def test_unknown_items_skip_counts_and_warns_once(caplog):
    tokenizer = make(unknown_items="skip")
    with caplog.at_level(logging.WARNING):
        batch = tokenizer.encode_histories([["nope", "shoe", "x"], ["y"], ["hat"]], max_items=1, return_tensors="pt")
    assert batch.skipped_items == 3 and "skipped_items" not in batch
    assert batch["input_ids"].tolist() == [[4, 9], [0, 0], [7, 9]]  # skipped first, then cut to the newest
    assert [record.message for record in caplog.records] == [
        "left out 3 unknown items (the first is 'nope' in history row 0)"
    ]
    (lambda input_ids, attention_mask: None)(**batch)  # model(**batch) sees no extra key
    caplog.clear()
    tokenizer.encode_histories([["shoe"]])
    assert not caplog.records


def test_user_tokens():
    tokenizer = make(num_user_tokens=2000)
    batch = tokenizer.encode_histories([["shoe"], ["shoe"]], user_ids=["u1", None])
    assert batch["input_ids"] == [[4 + user_token_index("u1", 2000), 2004, 2009], [0, 2004, 2009]]
    # the same in every process and release: known values
    assert [user_token_index(user, 2000) for user in ("", "u1", "ü", 17)] == [756, 130, 1525, 256]
    spread = np.bincount([user_token_index(f"user {n}", 20) for n in range(20_000)], minlength=20)
    assert spread.min() > 850 and spread.max() < 1150
    assert make().encode_histories([["shoe"]], user_ids=["u1"])["input_ids"] == [[4, 9]]  # no user tokens: no effect
    for user_ids in (["u1"], "u1"):
        with pytest.raises(IncompatibleComponentsError, match="user_ids"):
            tokenizer.encode_histories([["shoe"], []], user_ids=user_ids)


def test_bad_options():
    for options in ({"unknown_items": "drop"}, {"num_user_tokens": -1}, {"num_user_tokens": 1.5}, {"max_history": 0}):
        with pytest.raises(IncompatibleComponentsError, match=next(iter(options))):
            make(**options)
    for options in (
        {"max_items": -1},
        {"padding": "max"},
        {"return_tensors": "tf"},
        {"padding": False, "return_tensors": "pt"},
    ):
        with pytest.raises(IncompatibleComponentsError):
            make().encode_histories([["shoe"]], **options)
    with pytest.raises(IncompatibleComponentsError, match="from_codes"):
        ItemTokenizer()


# --- bad catalogues ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "codes", "sizes", "message"),
    [
        (["a", "b", "a"], [[0], [1], [2]], None, "row 2: 'a' is already row 0"),
        (["a", 5], [[0], [1]], None, "row 1: 5 is a int"),
        (["a", None], [[0], [1]], None, "row 1: None is a NoneType"),
        (["a", "x\ud800"], [[0], [1]], None, "row 1: .*lone surrogate"),
        ([], np.zeros((0, 2), int), None, "empty"),
        ("ab", [[0], [1]], None, "one string"),
        (["a"], [0], None, "shape"),
        (["a"], [[0], [1]], None, r"shape \(2, 1\), not \(1, L\)"),
        (["a"], [[]], None, "shape"),
        (["a", "b"], [[0], [0, 1]], None, "different lengths"),
        (["a"], [[0.5]], None, "float64, not integers"),
        (["a"], [["0"]], None, "not integers"),
        (["a"], [[True]], None, "bool, not integers"),
        (["a", "b"], [[0, 0], [-1, 0]], None, "row 1 .item 'b'., level 0: code -1 is negative"),
        (["a", "b"], [[0, 0, 1], [0, -1, 2]], None, "row 1 .item 'b'., level 1: code -1 is negative.*end of a shorter"),
        (["a", "b"], [[0, 0], [-1, -1]], None, "row 1 .item 'b'., level 0: code -1 is negative"),
        (["a", "b"], [[0, 0], [0, -2]], None, "row 1 .item 'b'., level 1: code -2 is negative"),
        (
            ["a", "b"],
            [[0, 0], [4, 1]],
            [4, 2],
            r"row 1 .item 'b'., level 0: code 4 is outside 0..3.*codebook_sizes\[0\]",
        ),
        (["a"], [[0, 0]], [4], "2 positive integers"),
        (["a"], [[0, 0]], [4, 0], "2 positive integers"),
        (["a"], [[0, 0]], [4, 1.5], "2 positive integers"),
        (["a"], [[0]], 2**40, "more than"),
        (["a"], [[0] * 1000], None, "1000 levels"),
        (["a"], [[2**63]], None, "more than|outside"),
    ],
)
def test_bad_catalogue(ids, codes, sizes, message):
    with pytest.raises(ItemTableError, match=message):
        ItemTokenizer.from_codes(ids, codes, sizes)


@settings(deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=30, unique=True))
def test_any_unicode_id_survives(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("ids")
    tokenizer = ItemTokenizer.from_codes(ids, np.arange(len(ids))[:, None])
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.item_ids == ids
    assert loaded.decode_histories(loaded.encode_histories([ids])["input_ids"]) == [ids]


def test_ids_from_columns():
    import pyarrow as pa

    for ids in (np.array(IDS), pa.array(IDS), tuple(IDS), (item for item in IDS)):
        tokenizer = ItemTokenizer.from_codes(ids, torch.tensor(CODES))
        assert tokenizer.item_ids == IDS and {type(item) for item in tokenizer.item_ids} == {str}


# --- files -------------------------------------------------------------------------------------------------------


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}


@pytest.mark.parametrize("model_type", [None, "t5", "llama", "gpt2", "qwen3", "bert", "some_unknown_type"])
def test_round_trip_byte_identical(tmp_path, model_type):
    tokenizer = make(num_user_tokens=3, history_eos=True, max_history=2, unknown_items="skip", model_max_length=64)
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer.save_pretrained(first)
    assert set(files(first)) == {"tokenizer_config.json", FILE_NAME}
    if model_type:
        (first / "config.json").write_text(json.dumps({"model_type": model_type}))
    for load in (AutoTokenizer.from_pretrained, ItemTokenizer.from_pretrained):
        loaded = load(first)
        assert type(loaded) is ItemTokenizer
        loaded.save_pretrained(second)
        assert files(first) == files(second)
        assert loaded.catalogue_fingerprint == tokenizer.catalogue_fingerprint
        assert (loaded.num_user_tokens, loaded.history_eos, loaded.max_history) == (3, True, 2)
        assert (loaded.unknown_items, loaded.padding_side, loaded.truncation_side) == ("skip", "left", "left")
        assert loaded.get_vocab() == tokenizer.get_vocab()
        history = [["shoe", "hat", "nope"]]
        assert dict(loaded.encode_histories(history, ["u"])) == dict(tokenizer.encode_histories(history, ["u"]))
    register()  # again: no effect
    assert type(AutoTokenizer.from_pretrained(first)) is ItemTokenizer


def test_options_can_be_changed_after_and_while_loading(tmp_path):
    tokenizer = make()
    tokenizer.unknown_items = "skip"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).unknown_items == "skip"
    assert AutoTokenizer.from_pretrained(tmp_path, unknown_items="error", max_history=1).max_history == 1


def test_saving_twice_gives_equal_bytes(tmp_path):
    for name in "ab":
        random_catalogue(3000, 4, 64).save_pretrained(tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


class FakeApi:
    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})


def test_pushed_files_hold_the_catalogue(tmp_path, monkeypatch):
    sent = {}
    monkeypatch.setattr(
        ItemTokenizer, "_upload_modified_files", lambda self, folder, *a, **k: sent.update(files(Path(folder)))
    )
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *a, **k: FakeApi())
    make().push_to_hub("me/catalogue")
    make().save_pretrained(tmp_path / "local")
    sent.pop("README.md", None)
    assert sent == files(tmp_path / "local")


def test_added_tokens_survive(tmp_path):
    tokenizer = make()
    tokenizer.add_tokens(["<query>"])
    assert tokenizer.convert_tokens_to_ids("<query>") == tokenizer.vocab_size == len(tokenizer) - 1
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab() and len(loaded) == len(tokenizer)
    assert loaded("<query><a_0>")["input_ids"] == [tokenizer.vocab_size, 4]


def test_pickle_and_deepcopy():
    tokenizer = make(num_user_tokens=2)
    before = pickle.dumps(tokenizer)
    tokenizer.encode_histories([["shoe"]], ["u"])
    tokenizer.codes_to_items([0, 1])
    _ = tokenizer.catalogue_fingerprint
    assert pickle.dumps(tokenizer) == before  # caches stay out, so that datasets' hash is stable
    for other in (pickle.loads(before), copy.deepcopy(tokenizer)):  # noqa: S301 (our own bytes)
        assert other.catalogue_fingerprint == tokenizer.catalogue_fingerprint
        assert dict(other.encode_histories([["hat"]])) == dict(tokenizer.encode_histories([["hat"]]))
        with pytest.raises(ValueError, match="read-only"):
            other.codes[0, 0] = 1


def test_fingerprint_tells_catalogues_apart():
    base = make().catalogue_fingerprint
    assert base == make(num_user_tokens=5).catalogue_fingerprint == Catalogue(IDS, CODES, [4, 3]).fingerprint
    others = [
        Catalogue(IDS, CODES, [4, 4]),
        Catalogue([*IDS[:3], "cap"], CODES),
        Catalogue(IDS[::-1], CODES),
        Catalogue(IDS, [[0, 1], [0, 2], [3, 1], [0, 1]]),
        Catalogue(["sho", "esock", "hat", "coat"], CODES),  # same joined bytes
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 6


def corrupt_cases(data: bytes):
    from safetensors.numpy import load, save

    arrays = load(data)
    meta = {"format": "hf_genrec.item_codes/1"}
    yield "cut", data[: len(data) // 2]
    yield "empty", b""
    yield "not safetensors", b"PK\x03\x04" + data
    yield "format", save(arrays, metadata={"format": "other"})
    for name in arrays:
        yield name, save({k: v for k, v in arrays.items() if k != name}, metadata=meta)
        yield name, save({**arrays, name: arrays[name].astype(np.float32)}, metadata=meta)
    changed = {
        "codes": arrays["codes"] + 100,
        "codebook_sizes": arrays["codebook_sizes"][:1],
        "item_id_offsets": arrays["item_id_offsets"] + 1,
        "item_id_bytes": np.full_like(arrays["item_id_bytes"], 0xFF),
    }
    for name, array in changed.items():
        yield "", save({**arrays, name: array}, metadata=meta)
    yield "", save({**arrays, "item_id_offsets": arrays["item_id_offsets"][::-1].copy()}, metadata=meta)
    twice = {"item_id_bytes": np.frombuffer(b"aaaa", np.uint8), "item_id_offsets": np.arange(5)}
    yield "already row 0", save({**arrays, **twice}, metadata=meta)


def test_damaged_files_name_the_file(tmp_path):
    make().save_pretrained(tmp_path)
    data = (tmp_path / FILE_NAME).read_bytes()
    for field, damaged in corrupt_cases(data):
        (tmp_path / FILE_NAME).write_bytes(damaged)
        message = field if field in ("codes", "codebook_sizes", "item_id_bytes", "item_id_offsets") else FILE_NAME
        with pytest.raises(ArtifactError, match=message) as caught:
            AutoTokenizer.from_pretrained(tmp_path)
        assert FILE_NAME in str(caught.value)
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(GenRecError, match=FILE_NAME):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_million_single_token_items(tmp_path):
    number = 1_000_000
    tokenizer = ItemTokenizer.from_codes([f"B{n:07d}" for n in range(number)], np.arange(number)[:, None])
    assert len(tokenizer) == number + 4
    assert tokenizer.convert_ids_to_tokens(number + 3) == "<a_999999>"
    assert tokenizer("<a_999999>")["input_ids"] == tokenizer.item_token_ids("B0999999") == [number + 3]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.catalogue_fingerprint == tokenizer.catalogue_fingerprint
    assert loaded.decode_histories(loaded.encode_histories([["B0000000", "B0999999"]])["input_ids"]) == [
        ["B0000000", "B0999999"]
    ]


def test_codes_of_several_lengths(tmp_path):
    """-1 fills up shorter codes: no token for it anywhere, one item may be the beginning of another."""
    ids = ["a", "b", "c", "d"]
    codes = [[1, 0, 2], [1, -1, -1], [1, 0, -1], [0, 3, -1]]
    tokenizer = ItemTokenizer.from_codes(ids, codes, [2, 4, 3])
    assert tokenizer.codes.tolist() == codes and tokenizer.item_token_ids("c") == [5, 6]
    encoded = tokenizer.encode_histories([["a", "b", "c"], ["d"], []])
    assert encoded["input_ids"] == [[5, 6, 12, 5, 5, 6], [0, 0, 0, 0, 4, 9], [0] * 6]
    assert encoded["attention_mask"] == [[1] * 6, [0, 0, 0, 0, 1, 1], [0] * 6]
    assert tokenizer.decode_histories(encoded["input_ids"]) == [["a", "b", "c"], ["d"], []]
    assert tokenizer.token_ids_to_items([5, 6, 12, 6, 4, 9, 4]) == [["a"], ["d"], []]
    assert tokenizer.codes_to_items([[1, 0, -1], [1, 0, 1], [1, -1, -1]]) == [["c"], [], ["b"]]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.codes.tolist() == codes and loaded.catalogue_fingerprint == tokenizer.catalogue_fingerprint
    with_end = ItemTokenizer.from_codes(ids, codes, [2, 4, 3], history_eos=True, num_user_tokens=2)
    rows = with_end.encode_histories([["b", "a"], ["c"]], user_ids=["u", "v"])["input_ids"]
    assert [row[-1] for row in rows] == [1, 1] and with_end.decode_histories(rows) == [["b", "a"], ["c"]]
    with_end.padding_side = "right"
    rows = with_end.encode_item_indices([np.array([1, 0]), np.array([2])])["input_ids"]
    assert rows.tolist() == [[7, 7, 8, 14, 1], [7, 8, 1, 0, 0]]


def test_many_codes_of_several_lengths_match_by_hand():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5000, (300, 6))
    for row, length in enumerate(rng.integers(1, 7, 300)):
        codes[row, length:] = -1
    ids = [f"i{row}" for row in range(300)]
    tokenizer = ItemTokenizer.from_codes(ids, codes, [5000] * 6)  # the packed key would not fit 64 bits
    by_code: dict[tuple, list[str]] = {}
    for item, row in zip(ids, codes.tolist()):
        by_code.setdefault(tuple(row), []).append(item)
    assert tokenizer.codes_to_items(codes) == [by_code[tuple(row)] for row in codes.tolist()]
