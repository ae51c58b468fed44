"""Two processes over gloo train a ranker's stages as one does, and each result is written once."""

from __future__ import annotations

import json

import pytest
from process_cases import written


@pytest.mark.slow
def test_two_processes_are_one_and_write_once(tmp_path):
    one, two = (
        written("candidate_driver.py", tmp_path / name, size, processes=processes, name="losses.json")
        for name, processes, size in (("one", 1, 8), ("two", 2, 4))
    )
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-4, abs=1e-5)
    first, second = (json.loads((tmp_path / "two" / f"process-{number}.json").read_text()) for number in (0, 1))
    assert first["scores"] == second["scores"]
    assert first["written"] == ["1-text-result", "2-mapping-result"] and second["written"] == []
    left = sorted(path.name for path in (tmp_path / "two" / "run").iterdir())
    assert left == ["1-text", "1-text-result", "2-mapping", "2-mapping-result"]
