"""Two processes over gloo fine-tune as one does: same losses, gradients and ranking metrics at equal global batch."""

from __future__ import annotations

import pytest
from process_cases import written


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one = written("item_sft_driver.py", tmp_path / "one", 8, processes=1)
    two = written("item_sft_driver.py", tmp_path / "two", 4, processes=2)
    assert len(one) == len(two) > 4
    for mine, other in zip(one, two):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
