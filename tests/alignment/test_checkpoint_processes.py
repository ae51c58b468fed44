"""Checkpoints of two processes over gloo: whole or absent, with the random states of both, and resumed bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from process_cases import launched
from safetensors.torch import load_file
from trainer_cases import same
from transformers.trainer_pt_utils import safe_globals

from hf_genrec.alignment.trainers.checkpoints import checkpoints, last_checkpoint
from hf_genrec.artifacts import verify_manifest


def trained(folder: Path, how: str) -> subprocess.CompletedProcess:
    return launched("checkpoint_driver.py", folder, how, processes=2)


@pytest.mark.slow
def test_a_kill_before_the_rename_leaves_the_checkpoint_before(tmp_path):
    whole = trained(tmp_path / "whole", "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = trained(tmp_path / "parts", "killed")
    assert killed.returncode != 0
    newest, skipped = last_checkpoint(tmp_path / "parts")
    assert newest is not None and newest.name == "checkpoint-2" and not skipped
    verify_manifest(newest, deep=True)
    with safe_globals():
        states = [torch.load(newest / f"rng_state_{rank}.pth", weights_only=True)["cpu"] for rank in range(2)]
    assert not torch.equal(*states), "every process has random numbers of its own"
    resumed = trained(tmp_path / "parts", "whole")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert same(*(load_file(tmp_path / name / "final.safetensors") for name in ("whole", "parts")))
    assert not [
        path for path in (tmp_path / "parts").iterdir() if "staged" in path.name and "checkpoint-4" in path.name
    ]
    for folder in checkpoints(tmp_path / "parts"):
        verify_manifest(folder, deep=True)


@pytest.mark.slow
def test_a_process_that_cannot_write_stops_all(tmp_path):
    broken = trained(tmp_path, "broken")
    assert broken.returncode != 0 and "checkpoint-4 was not written: OSError: the disk is full" in broken.stderr
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".checkpoint-4*")), "what was half written is gone"
