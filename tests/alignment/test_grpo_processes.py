"""Two processes over gloo train as one does: GRPO, the preference mixture and its iterations, at equal global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_genrec.artifacts import verify_manifest

DRIVER = Path(__file__).with_name("grpo_driver.py")


def run(folder: Path, processes: int, *sizes: int) -> dict[str, list[list[float]]]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    done = subprocess.run(
        [*command, str(DRIVER), str(folder), *map(str, sizes)],
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "logs.json").read_text())


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one, two = run(tmp_path / "one", 1, 8, 4), run(tmp_path / "two", 2, 4, 2)
    assert one.keys() == two.keys() and len(one) == 5
    for name in one:
        assert len(one[name]) == len(two[name]) > 1
        for mine, other in zip(one[name], two[name]):
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-4), name
    assert [path.name for path in (tmp_path / "two" / "rounds").iterdir()] == ["iteration-2"]
    verify_manifest(tmp_path / "two" / "rounds" / "iteration-2")
