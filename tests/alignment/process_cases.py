"""Runs a driver script under torchrun over gloo: one process or two, offline, one thread each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launched(driver: str, folder: Path, *arguments: object, processes: int) -> subprocess.CompletedProcess:
    """`driver folder arguments...` in so many processes; the driver stands beside this file."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return subprocess.run(
        [
            *launcher,
            f"--nproc_per_node={processes}",
            f"--master_port={free_port()}",
            str(Path(__file__).with_name(driver)),
            str(folder),
            *map(str, arguments),
        ],
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )


def written(driver: str, folder: Path, *arguments: object, processes: int, name: str = "logs.json") -> Any:
    """What a driver that must succeed wrote into `name` of its new folder."""
    folder.mkdir()
    done = launched(driver, folder, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / name).read_text())
