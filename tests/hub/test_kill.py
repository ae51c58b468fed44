"""save_artifact is all or nothing: kill -9 anywhere in a save leaves exactly the old artefact or exactly the new."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")


def kill(folder: Path, events: int, moments: int, *options: str, timeout: int) -> dict:
    driver = Path(__file__).with_name("hub_kill_driver.py")
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for attempt in range(3):
        home = folder / f"try-{attempt}"
        home.mkdir()
        try:
            done = subprocess.run(
                [sys.executable, driver, home, str(events), str(moments), *options],
                env=env, capture_output=True, text=True, timeout=timeout, check=False,
            )  # fmt: skip
            break
        except subprocess.TimeoutExpired:
            # the driver forks a process that has run torch; such a child can hang in a lock it never owned
            continue
    else:
        pytest.fail(f"the driver hung three times for {timeout} s")
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    return report


def check(report: dict) -> None:
    over, fresh = report["over"], report["fresh"]
    assert over["killed"] == over["old"] + over["new"]
    assert over["old"] >= 5 and over["new"] >= 2, "kills on both sides of the swap"
    assert fresh["killed"] == fresh.get("nothing", 0) + fresh.get("new", 0)
    moments = report["over_moments"]
    assert moments["killed"] == moments.get("old", 0) + moments.get("new", 0)
    assert "mixture" not in report.get("loads_while_saving", {})


def test_a_sample_of_kills(tmp_path):
    check(kill(tmp_path, 14, 6, timeout=200))


@pytest.mark.long  # pytest -m long; the driver alone: python tests/hub/hub_kill_driver.py FOLDER 0 25 [journal]
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("journal",)], ids=["exchange", "journal"])
def test_every_operation_and_25_moments(tmp_path, options):
    report = kill(tmp_path, 0, 25, *options, timeout=300)
    check(report)
    assert report["over"]["killed"] == report["over"]["operations"]
