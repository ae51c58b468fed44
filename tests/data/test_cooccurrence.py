"""The item graph against two nested loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_genrec.data.cooccurrence import cooccurrence
from hf_genrec.data.sequences import Sequences


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 4), max_size=8), max_size=5),
    window=st.integers(1, 9),
    weight=st.sampled_from(["inverse_gap", "uniform"]),
    directed=st.booleans(),
)
def test_against_brute_force(rows, window, weight, directed):
    expected = np.zeros((5, 5))
    for row in rows:
        for p in range(len(row)):
            for q in range(p + 1, min(len(row), p + window + 1)):
                value = 1 / (q - p) if weight == "inverse_gap" else 1.0
                expected[row[p], row[q]] += value
                if not directed:
                    expected[row[q], row[p]] += value
    graph = cooccurrence(Sequences.from_rows(rows), 5, window=window, weight=weight, directed=directed)
    assert graph.shape == (5, 5) and graph.has_sorted_indices
    np.testing.assert_allclose(graph.toarray(), expected, atol=1e-12)


def test_bad_arguments():
    rows = Sequences.from_rows([[0, 5]])
    with pytest.raises(ValueError, match="num_items"):
        cooccurrence(rows, 5)
    with pytest.raises(ValueError, match="weight"):
        cooccurrence(rows, 6, weight="gap")
    with pytest.raises(ValueError, match="window"):
        cooccurrence(rows, 6, window=0)
