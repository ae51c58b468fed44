"""Two processes over gloo train as one does: GRPO, the preference mixture and its iterations, at equal global batch."""

from __future__ import annotations

import pytest
from process_cases import written

from hf_genrec.artifacts import verify_manifest


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one = written("grpo_driver.py", tmp_path / "one", 8, 4, processes=1)
    two = written("grpo_driver.py", tmp_path / "two", 4, 2, processes=2)
    assert one.keys() == two.keys() and len(one) == 5
    for name in one:
        assert len(one[name]) == len(two[name]) > 1
        for mine, other in zip(one[name], two[name]):
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-4), name
    assert [path.name for path in (tmp_path / "two" / "rounds").iterdir()] == ["iteration-2"]
    verify_manifest(tmp_path / "two" / "rounds" / "iteration-2")
