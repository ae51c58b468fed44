"""Templates around histories and a bound in tokens: ids by hand, nothing mid-item, kept on disk, off is off."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from text_tokenizers import FAMILIES, family
from transformers import AutoTokenizer

from hf_genrec.data.sequences import Sequences
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.requests import seen_from_prompts
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.extend import encode_segments, extend_tokenizer
from hf_genrec.identifiers.histories import newest_tokens
from hf_genrec.identifiers.tokenization_item import ItemTokenizer, register

register()

IDS = ["shoe", "sock", "hat", "coat", "tie"]
CODES = [[0, 1], [0, 2], [3, 1], [2, 0], [1, 1]]
UNEVEN = [[0, 1], [1, -1], [3, 1], [2, 0], [4, -1]]
BEFORE, AFTER = "The matrix: ", " Next item:"
ROWS = [["shoe", "hat", "sock"], [], ["coat"], ["tie", "sock", "tie", "hat", "shoe"]]


def build(name="byte_level_bpe", codes=CODES, before=BEFORE, after=AFTER, bound=None, **options):
    items = ItemTokenizer.from_codes(IDS, codes, **options)
    texts = {"history_before": before, "history_after": after, "max_history_tokens": bound}
    return extend_tokenizer(family(name), items, **texts)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("codes", [CODES, UNEVEN])
def test_a_history_is_template_user_items_end_template(name, side, codes):
    eos = name != "word_level"
    tokenizer = build(name, codes, num_user_tokens=3, history_eos=eos, max_history=4)
    tokenizer.padding_side = side
    users = ["u1", None, "u2", "u3"]
    batch = tokenizer.encode_histories(ROWS, users, return_tensors="pt")
    index = [[IDS.index(item) for item in history] for history in ROWS]
    for rows in (index, Sequences.from_rows(index)):
        other = tokenizer.encode_item_indices(rows, users)
        assert torch.equal(batch["input_ids"], other["input_ids"])
    ragged = tokenizer.encode_histories(ROWS, users, padding=False)["input_ids"]
    for row, (history, user, ids, mask) in enumerate(zip(ROWS, users, batch["input_ids"], batch["attention_mask"])):
        user_ids = [] if user is None else [int(tokenizer._user_token_ids([user], 1)[0])]
        end = [tokenizer.eos_token_id] if eos else []
        middle = [token for item in history[-4:] for token in tokenizer.item_token_ids(item)]
        head, tail = (encode_segments(tokenizer, [("template", text)]) for text in (BEFORE, AFTER))
        assert ids[mask == 1].tolist() == head + user_ids + middle + end + tail == ragged[row]
        assert (mask.diff() >= 0).all() if side == "left" else (mask.diff() <= 0).all()
        assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert tokenizer.decode_histories(batch["input_ids"]) == [history[-4:] for history in ROWS]


def test_control_tokens_in_a_template_count():
    tokenizer = build(before="<|im_start|>user\nLike <a_3><b_1>: ", after="<|im_end|>")
    ids = tokenizer.encode_histories([["shoe"]])["input_ids"][0]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode_histories([ids]) == [["hat", "shoe"]]  # what the template names is named


def test_seen_items_are_found_in_prompts():
    tokenizer = build(num_user_tokens=2)
    ids = tokenizer.encode_histories(ROWS, ["a", "b", None, "c"], return_tensors="pt")["input_ids"]
    seen = seen_from_prompts(tokenizer, ids, ItemTrie.from_tokenizer(tokenizer))
    assert [sorted(row) for row in seen] == [sorted({IDS.index(item) for item in history}) for history in ROWS]


@pytest.mark.parametrize("codes", [CODES, UNEVEN])
@pytest.mark.parametrize("bound", range(17, 30))
def test_bound_in_tokens_leaves_out_the_oldest_items_whole(bound, codes):
    """Against a loop that drops items until the row fits."""
    plain = build(codes=codes, num_user_tokens=3, history_eos=True)
    bounded = build(codes=codes, num_user_tokens=3, history_eos=True, bound=bound)
    users = ["u1", None, "u2", "u3"]

    def fitting(history, user):
        for start in range(len(history) + 1):
            row = plain.encode_histories([history[start:]], [user], padding=False)["input_ids"][0]
            if len(row) <= bound:
                return row if start < len(history) or not history else None
        return None

    expected = [fitting(history, user) for history, user in zip(ROWS, users)]
    if None in expected:
        message = rf"row {expected.index(None)}: the template takes \d+ tokens and the newest item \d"
        with pytest.raises(IncompatibleComponentsError, match=message):
            bounded.encode_histories(ROWS, users)
    else:
        assert bounded.encode_histories(ROWS, users, padding=False)["input_ids"] == expected
        both = bounded.encode_histories(ROWS, users, max_items=1, padding=False)["input_ids"]
        assert both == plain.encode_histories(ROWS, users, max_items=1, padding=False)["input_ids"]


def test_newest_tokens_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, limit = rng.integers(0, 6, 5), int(rng.integers(8, 14))
        index = np.arange(lengths.sum())
        sizes, around = rng.integers(1, 5, len(index)), rng.integers(0, 4, 5)
        kept_lengths, kept = newest_tokens(lengths, index, sizes, around, limit)
        start, expected = 0, []
        for length, extra in zip(lengths, around):
            row, total = [], extra
            for item in reversed(index[start : start + length]):
                total += sizes[item]
                if total > limit:
                    break
                row.insert(0, item)
            expected.append(row)
            start += length
        assert kept_lengths.tolist() == [len(row) for row in expected]
        assert kept.tolist() == [item for row in expected for item in row]


def test_options_stay_with_the_tokenizer(tmp_path):
    tokenizer = build(bound=21)
    rows = tokenizer.encode_histories(ROWS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    copies = [loaded, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))]  # noqa: S301 (our own bytes)
    for other in copies:
        assert other.encode_histories(ROWS) == rows
        assert (other.history_before, other.history_after, other.max_history_tokens) == (BEFORE, AFTER, 21)
    tokenizer.history_after = ""  # may be set anew, as max_history may
    assert tokenizer.encode_histories([["hat"]])["input_ids"][0][-2:] == tokenizer.item_token_ids("hat")


@pytest.mark.parametrize("name", FAMILIES)
def test_without_options_nothing_is_added(name):
    items = ItemTokenizer.from_codes(IDS, CODES, num_user_tokens=2)
    tokenizer = extend_tokenizer(family(name), items)
    shift = tokenizer.level_offsets[0] - items.level_offsets[0]
    for row in (["u", "v", None, "w"], None):
        ours = tokenizer.encode_histories(ROWS, row, padding=False)["input_ids"]
        theirs = items.encode_histories(ROWS, row, padding=False)["input_ids"]
        assert ours == [[token + shift for token in ids] for ids in theirs]


def test_bad_options_are_named():
    for words, options in [
        ("history_before is None", {"before": None}),
        ("history_after is 3", {"after": 3}),
        ("max_history_tokens is 0", {"bound": 0}),
        ("max_history_tokens is 2.5", {"bound": 2.5}),
    ]:
        with pytest.raises(IncompatibleComponentsError, match=words):
            build(**options)
    with pytest.raises(
        IncompatibleComponentsError, match=r"row 0: the template takes \d+ tokens and the newest item 0"
    ):
        build(bound=2).encode_histories([[]])
