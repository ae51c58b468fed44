"""Two processes over gloo train a ranker's stages as one does, and each result is written once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("candidate_driver.py")


def run(folder: Path, processes: int, size: int) -> list[float]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    subprocess.run(
        [*command, str(DRIVER), str(folder), str(size)],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
    )
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.slow
def test_two_processes_are_one_and_write_once(tmp_path):
    one, two = run(tmp_path / "one", 1, 8), run(tmp_path / "two", 2, 4)
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-4, abs=1e-5)
    first, second = (json.loads((tmp_path / "two" / f"process-{number}.json").read_text()) for number in (0, 1))
    assert first["scores"] == second["scores"]
    assert first["written"] == ["1-text-result", "2-mapping-result"] and second["written"] == []
    left = sorted(path.name for path in (tmp_path / "two" / "run").iterdir())
    assert left == ["1-text", "1-text-result", "2-mapping", "2-mapping-result"]
