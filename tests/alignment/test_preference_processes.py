"""Two processes over gloo train as one does: same losses, gradients and rewards at equal global batch."""

from __future__ import annotations

import pytest
from process_cases import written


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "windows", "seq2seq"])
def test_two_processes_are_one(tmp_path, kind):
    one = written("preference_driver.py", tmp_path / "one", kind, 8, processes=1)
    two = written("preference_driver.py", tmp_path / "two", kind, 4, processes=2)
    assert len(one) == len(two) == 4
    for mine, other in zip(one, two):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
