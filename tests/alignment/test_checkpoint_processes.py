"""Checkpoints of two processes over gloo: whole or absent, with the random states of both, and resumed bit for bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import same
from transformers.trainer_pt_utils import safe_globals

from hf_genrec.alignment.trainers.checkpoints import checkpoints, last_checkpoint
from hf_genrec.artifacts import verify_manifest

DRIVER = Path(__file__).with_name("checkpoint_driver.py")


def launched(folder: Path, how: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    return subprocess.run(
        [*command, str(DRIVER), str(folder), how],
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_kill_before_the_rename_leaves_the_checkpoint_before(tmp_path):
    whole = launched(tmp_path / "whole", "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = launched(tmp_path / "parts", "killed")
    assert killed.returncode != 0
    newest, skipped = last_checkpoint(tmp_path / "parts")
    assert newest is not None and newest.name == "checkpoint-2" and not skipped
    verify_manifest(newest, deep=True)
    with safe_globals():
        states = [torch.load(newest / f"rng_state_{rank}.pth", weights_only=True)["cpu"] for rank in range(2)]
    assert not torch.equal(*states), "every process has random numbers of its own"
    resumed = launched(tmp_path / "parts", "whole")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert same(*(load_file(tmp_path / name / "final.safetensors") for name in ("whole", "parts")))
    assert not [
        path for path in (tmp_path / "parts").iterdir() if "staged" in path.name and "checkpoint-4" in path.name
    ]
    for folder in checkpoints(tmp_path / "parts"):
        verify_manifest(folder, deep=True)


@pytest.mark.slow
def test_a_process_that_cannot_write_stops_all(tmp_path):
    broken = launched(tmp_path, "broken")
    assert broken.returncode != 0 and "checkpoint-4 was not written: OSError: the disk is full" in broken.stderr
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".checkpoint-4*")), "what was half written is gone"
