"""Windows, prefixes and evaluation rows; their token batches with a small stand-in tokenizer and with the real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.data.collators import (
    EvaluationCollator,
    EvaluationDataset,
    PrefixCollator,
    PrefixDataset,
    SequenceCollator,
    WindowDataset,
)
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import TrainingError


class StandInTokenizer:
    """Two codes an item (tokens 10 + 2i, 11 + 2i), padding 0, optional user token 5 in front and end token 1."""

    def __init__(self, num_items=100, side="left", user=False, eos=False, max_history=None):
        self.item_token_table = 10 + np.arange(2 * num_items).reshape(num_items, 2)
        self.side, self.user, self.eos, self.max_history = side, user, eos, max_history
        self.history_eos = eos
        self.asked_users = None

    def encode_item_indices(self, rows, max_items=None, user_ids=None, return_tensors=None):
        assert return_tensors == "pt"
        self.asked_users = user_ids
        bound = max_items or self.max_history or 10**9
        tokens = [
            [5] * self.user + self.item_token_table[np.asarray(row)[-bound:]].ravel().tolist() + [1] * self.eos
            for row in rows
        ]
        longest = max(map(len, tokens))
        pads = [[0] * (longest - len(row)) for row in tokens]
        left = self.side == "left"
        ids = torch.tensor([pad + row if left else row + pad for pad, row in zip(pads, tokens)])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


ROWS = st.lists(st.lists(st.integers(0, 99), max_size=25), min_size=1, max_size=6).filter(
    lambda rows: any(len(row) > 1 for row in rows)
)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, window=st.integers(1, 9), seed=st.integers(0, 3), epoch=st.integers(0, 5))
def test_windows_cover_every_target_once(rows, window, seed, epoch):
    sequences = Sequences.from_rows(rows)
    data = WindowDataset(sequences, window, seed=seed)
    count = len(data)
    data.set_epoch(epoch)
    assert len(data) == count  # the number of steps of an epoch must not move
    targets: dict[int, list[int]] = {}
    for index in range(len(data)):
        items, row = data[index]["items"], data.rows[index]
        assert items.dtype == np.int32 and 2 <= len(items) <= window + 1 and len(items) == data.lengths[index]
        targets.setdefault(int(row), []).extend(items[1:].tolist())
        start = int(data._begin[index] - sequences.offsets[row])
        assert rows[row][start : start + len(items)] == items.tolist()
    assert targets == {r: row[1:] for r, row in enumerate(rows) if len(row) > 1}
    assert data.num_targets == sum(len(row) - 1 for row in rows if row)


def test_short_rows_are_never_cut():
    data = WindowDataset(Sequences.from_rows([[1, 2, 3, 4], [5]]), window=3)
    for epoch in range(5):
        data.set_epoch(epoch)
        assert [sample["items"].tolist() for sample in (data[i] for i in range(len(data)))] == [[1, 2, 3, 4]]


def test_cuts_move_with_epoch_and_seed_and_depend_on_nothing_else():
    rows = [list(range(90)), list(range(70)), list(range(95))]

    def cuts(seed, epoch, which=(0, 1, 2)):
        data = WindowDataset(Sequences.from_rows([rows[r] if r in which else [] for r in range(3)]), 20, seed=seed)
        data.set_epoch(epoch)
        return {r: [data[i]["items"][0] for i in range(len(data)) if data.rows[i] == r] for r in which}

    assert cuts(0, 1) == cuts(0, 1) and cuts(0, 1) != cuts(0, 2) and cuts(0, 1) != cuts(1, 1)
    assert cuts(0, 1, (1,))[1] == cuts(0, 1)[1]  # the other rows have no say
    first = {tuple(cuts(0, epoch)[0])[1] for epoch in range(200)}
    assert len(first) >= 15  # nearly every place is cut at some time


def test_prefixes():
    sequences = Sequences.from_rows([[1, 2, 3, 4], [], [9], [5, 6]])
    data = PrefixDataset(sequences, max_history=2, user_ids=["a", "b", "c", "d"])
    got = [(s["items"].tolist(), s["target"], s["user_id"]) for s in (data[i] for i in range(len(data)))]
    assert got == [([1], 2, "a"), ([1, 2], 3, "a"), ([2, 3], 4, "a"), ([5], 6, "d")]
    assert data.lengths.tolist() == [1, 2, 2, 1]


def test_sampled_prefixes_depend_on_seed_and_epoch_alone():
    sequences = Sequences.from_rows([list(range(50)), list(range(50, 90))])

    def drawn(seed, epoch):
        data = PrefixDataset(sequences, 5, samples_per_epoch=30, seed=seed)
        data.set_epoch(epoch)
        assert len(data) == len(data.lengths) == 30
        return [data[i]["target"] for i in range(30)]

    assert drawn(0, 3) == drawn(0, 3) and drawn(0, 3) != drawn(0, 4) and drawn(0, 3) != drawn(1, 3)
    assert len(set(drawn(0, 0))) == 30  # without replacement
    assert len(PrefixDataset(sequences, 5, samples_per_epoch=1_000)) == 88


def evaluation():
    histories = Sequences.from_rows([[1, 2, 3], [4]])
    return EvaluationSet(np.array([7, 2]), histories, np.array([5, 6], np.int32))


def test_evaluation_rows_keep_what_was_seen():
    data = EvaluationDataset(evaluation(), max_history=2, user_ids=[f"u{n}" for n in range(8)])
    assert data.lengths.tolist() == [2, 1] and len(data) == 2
    sample = data[0]
    assert sample["items"].tolist() == [2, 3] and sample["seen"].tolist() == [1, 2, 3]
    assert (sample["target"], sample["user_id"]) == (5, "u7")


def test_bad_arguments():
    nothing, something = Sequences.from_rows([[1], []]), Sequences.from_rows([[1, 2]])
    for build in (WindowDataset, PrefixDataset):
        with pytest.raises(TrainingError, match="two items"):
            build(nothing, 5)
        with pytest.raises(ValueError, match="at least 1"):
            build(something, 0)
    with pytest.raises(ValueError, match="samples_per_epoch"):
        PrefixDataset(something, 5, samples_per_epoch=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("user, eos", [(False, False), (True, True)])
def test_sequence_batches(side, user, eos):
    data = WindowDataset(Sequences.from_rows([[1, 2, 3], [4, 5]]), window=10)
    tokenizer = StandInTokenizer(side=side, user=user, eos=eos, max_history=2)  # its own bound must not cut samples
    batch = SequenceCollator(tokenizer)([data[0], data[1]])
    for tokens, mask, labels, items in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], ([1, 2, 3], [4, 5])
    ):
        expected = tokenizer.item_token_table[items].ravel().tolist()
        real = tokens[mask.bool()].tolist()
        assert [t for t in real if t >= 10] == expected
        assert labels[labels != -100].tolist() == expected[2:]  # all but the first item
        assert (labels[mask == 0] == -100).all() and (labels[tokens < 10] == -100).all()
        assert ((labels == tokens) | (labels == -100)).all()


def test_prefix_and_evaluation_batches():
    tokenizer = StandInTokenizer()
    data = PrefixDataset(Sequences.from_rows([[1, 2, 3]]), 5, user_ids=["a"])
    batch = PrefixCollator(tokenizer)([data[0], data[1]])
    assert batch["labels"].tolist() == tokenizer.item_token_table[[2, 3]].tolist()
    assert batch["input_ids"].tolist() == [[0, 0, 12, 13], [12, 13, 14, 15]] and tokenizer.asked_users == ["a", "a"]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    rows = EvaluationDataset(evaluation())
    batch = EvaluationCollator(tokenizer, max_items=2)([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, 4) and batch["targets"].tolist() == [5, 6]
    assert [seen.tolist() for seen in batch["seen"]] == [[1, 2, 3], [4]] and tokenizer.asked_users is None
    assert batch["targets"].dtype == torch.int64


def test_with_the_item_tokenizer():
    ItemTokenizer = pytest.importorskip("hf_genrec.identifiers.tokenization_item").ItemTokenizer
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    tokenizer = ItemTokenizer.from_codes(["a", "b", "c", "d"], codes, history_eos=True, num_user_tokens=4)
    table = np.asarray(tokenizer.item_token_table)
    data = WindowDataset(Sequences.from_rows([[0, 1, 2, 3], [3, 0]]), window=3)
    batch = SequenceCollator(tokenizer)([data[0], data[1]])
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == table[[1, 2, 3]].ravel().tolist()
    assert batch["labels"][1][batch["labels"][1] != -100].tolist() == table[0].tolist()
    prefixes = PrefixDataset(Sequences.from_rows([[0, 1, 2]]), 5, user_ids=["someone"])
    batch = PrefixCollator(tokenizer)([prefixes[1]])
    assert batch["labels"].tolist() == [table[2].tolist()]
    assert batch["input_ids"].shape[1] == 1 + 2 * 2 + 1  # user token, two items, end token


def test_through_a_data_loader_with_workers():
    data = WindowDataset(Sequences.from_rows([list(range(30))] * 8), window=10)
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, collate_fn=SequenceCollator(StandInTokenizer()), num_workers=1
    )
    seen = 0
    for epoch in range(2):
        data.set_epoch(epoch)
        seen += sum(int((batch["labels"] != -100).sum()) for batch in loader)
    assert seen == 2 * 8 * 29 * 2
