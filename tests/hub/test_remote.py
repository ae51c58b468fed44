"""Push and pull against a fake Hub on loopback, with the real clients in fresh processes and fresh caches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_genrec.artifacts import verify_manifest
from hf_genrec.hub.artifact import load_artifact
from hf_genrec.testing.fake_hub import FakeHub

HERE = Path(__file__).parent


def run(driver: str, env: dict[str, str], *args: object) -> dict:
    done = subprocess.run(
        [sys.executable, HERE / driver, *map(str, args)],
        env=env | {"OMP_NUM_THREADS": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "10"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One push process, one pull process, then one without the Hub."""
    home = tmp_path_factory.mktemp("hub")
    with FakeHub() as hub:
        pushed = run("hub_push_driver.py", hub.environment(home / "pusher"), home / "artefact")
        good = hub.files("tester/artefact")
        bent = bytearray(good["model.safetensors"])
        bent[len(bent) // 2] ^= 0xFF
        hub.put("tester/damaged_remote", {**good, "model.safetensors": bytes(bent)})
        hub.put("tester/unsafe_remote", {**good, "modeling.py": b"raise SystemExit"})
        hub.put("tester/down", good)
        hub.put("tester/artefact", {"README.md": good["README.md"] + b"\nEdited on the web page.\n"})
        hub.fail += [("GET", r"/api/models/tester/down", 500)] * 8
        pulled = run("hub_pull_driver.py", hub.environment(home / "puller"), home / "nowhere")
        env = hub.environment(home / "puller")
    cached = run("hub_cached_driver.py", env | {"HF_HUB_OFFLINE": "1"})
    return {"hub": hub, "pushed": pushed, "pulled": pulled, "cached": cached, "home": home}


def test_the_whole_folder_is_in_the_repository(story):
    remote, folder = story["hub"].files("tester/artefact"), story["home"] / "artefact"
    local = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    local.pop(".env")
    assert set(local) | {".gitattributes", "notes.txt"} == set(remote)
    assert all(remote[name] == content for name, content in local.items() if name != "README.md")
    assert 'load_artifact("tester/artefact")' in remote["README.md"].decode()
    assert 'load_artifact(".")' in local["README.md"].decode()


def test_old_shards_leave_and_files_of_others_stay(story):
    remote = story["hub"].files("tester/artefact")
    assert len(story["pushed"]["sharded"]) > 1
    assert not set(story["pushed"]["sharded"]) & set(remote)
    assert remote["notes.txt"] == b"mine"


def test_one_commit_per_push_and_none_without_changes(story):
    first, again = story["pushed"]["commits"]
    assert first == again
    # creation, sharded artefact, notes, artefact, the edited card
    assert len(story["hub"].repositories["tester/artefact"].commits) == 5


def test_large_files_go_through_lfs(story):
    assert any(method == "PUT" and path.startswith("/lfs-upload/") for method, path in story["hub"].requests)
    assert "data file" not in story["pushed"]["stderr"]


def test_terms_of_the_data_decide_who_may_read(story):
    repositories = story["hub"].repositories
    assert repositories["tester/by_terms"].private
    assert "GroupLens terms" in story["pushed"]["stderr"]
    assert not repositories["tester/artefact"].private
    assert repositories["tester/secret"].private


def test_refused_pushes_name_the_reason_and_upload_nothing(story):
    fail = story["pushed"]["fail"]
    assert set(fail) == {"unsafe", "token", "name", "damaged"}
    assert "x.py" in fail["unsafe"]
    assert "hf auth login" in fail["token"]
    assert "metrics.json" in fail["damaged"]
    assert not {"tester/unsafe", "tester/damaged", "tester/anonymous"} & set(story["hub"].repositories)


def test_fresh_process_gives_identical_recommendations(story):
    pulled, expected = story["pulled"], story["pushed"]["recommended"]
    assert pulled["artifact"] == expected
    for repo_id in ("tester/artefact", "tester/pieces"):
        assert pulled[repo_id] == expected
        assert [[i for i, _ in row] for row in pulled[f"{repo_id} by function"]] == [
            [i for i, _ in r] for r in expected
        ]
        assert pulled[f"{repo_id} default k"] == 6
    assert (pulled["default_k"], pulled["title"], pulled["dataset"]) == (6, "Title 4", "shop")


def test_pull_into_a_folder(story):
    folder = Path(story["pushed"]["pulled"])
    verify_manifest(folder, deep=True)
    assert not any(p.is_symlink() for p in folder.rglob("*"))
    assert load_artifact(folder).metrics["dataset"] == "shop"


def test_failures_are_typed_and_leave_nothing(story):
    fail = story["pulled"]["fail"]
    assert set(fail) == {"missing", "private", "revision", "pieces", "damaged", "unsafe", "down", "name"}
    assert "no such repository" in fail["missing"]
    assert "no such repository, or it is private" in fail["private"]
    assert "no such revision" in fail["revision"]
    assert "push_artifact" in fail["pieces"]
    assert "model.safetensors" in fail["damaged"]
    assert fail["unsafe"].startswith("UnsafeArtifactError") and "modeling.py" in fail["unsafe"]
    assert "owner/name" in fail["name"]
    assert not (story["home"] / "nowhere").exists()


def test_once_in_the_cache_the_network_is_not_needed(story):
    assert story["cached"]["artifact"] == story["pushed"]["recommended"]
    assert "HF_HUB_OFFLINE" in story["cached"]["fail"]["pull"]
    assert "cannot be reached" in story["cached"]["fail"]["push"]
