"""Two processes over gloo train as one does: same losses, gradients and rewards at equal global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("preference_driver.py")


def run(folder: Path, kind: str, processes: int, size: int) -> list[list[float]]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    subprocess.run(
        [*command, str(DRIVER), str(folder), kind, str(size)],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
    )
    return json.loads((folder / "logs.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["softmax", "windows", "seq2seq"])
def test_two_processes_are_one(tmp_path, kind):
    one, two = run(tmp_path / "one", kind, 1, 8), run(tmp_path / "two", kind, 2, 4)
    assert len(one) == len(two) == 4
    for mine, other in zip(one, two):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
