"""FMIndex against Python: every substring, its count, its documents, what follows it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_genrec.errors import RequestError
from hf_genrec.generation.fm_index import FMIndex


def substrings(documents):
    found = {}
    for number, document in enumerate(documents):
        for start in range(len(document)):
            for end in range(start + 1, len(document) + 1):
                found.setdefault(tuple(document[start:end]), []).append(number)
    return found


def as_rows(patterns):
    table = torch.zeros(len(patterns), max(map(len, patterns)), dtype=torch.long)
    for row, pattern in enumerate(patterns):
        table[row, : len(pattern)] = torch.tensor(pattern, dtype=torch.long)
    return table, torch.tensor([len(pattern) for pattern in patterns])


@pytest.mark.parametrize("seed", range(40))
def test_against_all_substrings(seed):
    rng = np.random.default_rng(seed)
    symbols = int(rng.integers(1, 5))  # few symbols: long repeats, equal documents
    documents = [rng.integers(0, symbols, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 10))]
    index, known = FMIndex.from_sequences(documents), substrings(documents)
    strangers = [tuple(rng.integers(0, 7, rng.integers(1, 7)).tolist()) for _ in range(20)] + [
        (-1,),
        (0, 99),
        (2**31 - 1,),
    ]
    patterns = [(), *known, *strangers]
    table, lengths = as_rows(patterns)
    start, end = index.find(table, lengths)
    rows, tokens, at_end = index.continuations(start, end, lengths)
    for row, pattern in enumerate(patterns):
        if pattern:
            assert int(end[row] - start[row]) == len(known.get(pattern, [])) == index.count(pattern)
            assert index.documents_containing(pattern).tolist() == sorted(set(known.get(pattern, [])))
        followers = sorted({longer[-1] for longer in known if longer[:-1] == pattern})
        assert tokens[rows == row].tolist() == followers, pattern
        assert bool(at_end[row]) == any(tuple(doc[len(doc) - len(pattern) :]) == pattern for doc in documents)


def test_no_substring_spans_two_documents():
    index = FMIndex.from_sequences([[1, 2], [3, 4], [2, 3]])
    assert index.count([2, 3]) == 1 and index.documents_containing([2, 3]).tolist() == [2]
    assert index.count([1, 2, 3]) == index.count([4, 2]) == 0


def test_rows_do_not_know_each_other():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 30, rng.integers(2, 12)).tolist() for _ in range(300)]
    index = FMIndex.from_sequences(documents)
    patterns = [document[1:3] for document in documents]
    table, lengths = as_rows(patterns)
    start, end = index.find(table, lengths)
    rows, tokens, at_end = index.continuations(start, end, lengths)
    for row in range(0, 300, 29):
        alone = index.find(torch.tensor([patterns[row]]))
        assert (int(alone[0]), int(alone[1])) == (int(start[row]), int(end[row]))
        own = index.continuations(*alone, lengths[row : row + 1])
        assert own[1].tolist() == tokens[rows == row].tolist() and own[2].item() == at_end[row].item()


def test_size_and_long_texts():
    """20 bytes per token and per document; a long repeated text takes few rounds of sorting."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 5000, 10).tolist() for _ in range(4000)] + [[7] * 1500, [7] * 1500]
    index = FMIndex.from_sequences(documents)
    assert index.num_tokens == 43_000 and index.num_documents == 4002
    assert index.nbytes < 21 * (43_000 + 4002) + 8 * (1502 + 4003)
    assert index.count([7] * 1500) == 2 and index.count([7] * 1501) == 0
    assert index.documents_containing([7] * 700).tolist() == [4000, 4001]
    assert index.to("cpu") is index


def test_bad_documents_are_named():
    for documents, message in (
        ([], "at least one"),
        ([[1], []], "document 1 has no tokens"),
        ([[1], [2, -3]], "document 1 holds the token id -3"),
        ([[2**31], [2]], "document 0 holds the token id 2147483648"),
    ):
        with pytest.raises(RequestError, match=message):
            FMIndex.from_sequences(documents)
