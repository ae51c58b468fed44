"""Saves are whole or not at all: killed before every file operation, killed at random moments, two writers at once."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from hf_genrec import artifacts
from hf_genrec.artifacts import (
    check_safe,
    check_target,
    find_unsafe_files,
    read_manifest,
    recover,
    staged_folder,
    verify_manifest,
)
from hf_genrec.errors import ArtifactError, UnsafeArtifactError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills child processes made by fork")

# Two artefacts that share some file names, differ in others, and have folders: a mixture cannot look like either.
OLD = {"config.json": b'{"v": "old"}', "model-1.safetensors": b"old" * 999, "only_old.json": b"1", "sub/a.json": b"old"}
NEW = {"config.json": b'{"v": "new"}', "model.safetensors": b"new" * 4999, "sub/a.json": b"new", "sub/b.json": b"2"}
OPERATIONS = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.link",
    "shutil.rmtree",
    "hf_genrec.artifacts",
)


def write(folder: Path, files: dict[str, bytes], repeat: int = 1) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with open(path, "wb") as stream:
            for _ in range(repeat):
                stream.write(content)


def save(target: Path, files: dict[str, bytes], repeat: int = 1, fsync: bool = False) -> None:
    with staged_folder(target, fsync=fsync) as folder:
        write(folder, files, repeat)


def content(folder: Path) -> dict[str, bytes]:
    """What a load sees: recovers, checks every hash, and reads all."""
    recover(folder)
    verify_manifest(folder, deep=True)
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert set(files) == set(read_manifest(folder)["files"]) | {"manifest.json"}, "files that no manifest lists"
    del files["manifest.json"]
    return files


def no_exchange(*_):
    return False


def in_child(action, *, fallback: bool) -> int:
    """Run `action` in a forked process and return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        if fallback:
            artifacts._exchange = no_exchange
        action()
        code = 0
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(event_number: int, home: Path):
    """Let the process die just before its n-th operation on a path below `home`."""
    seen = 0
    root = str(home)

    def hook(event, arguments):
        nonlocal seen
        if event in OPERATIONS and any(root in str(argument) for argument in arguments):
            seen += 1
            if seen == event_number:
                os._exit(9)

    sys.addaudithook(hook)


@contextmanager
def existing(home: Path):
    target = home / "artefact"
    save(target, OLD)
    assert content(target) == OLD
    yield target


@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "journal"])
@pytest.mark.parametrize("old_exists", [True, False], ids=["replace", "first"])
def test_killed_before_every_file_operation(tmp_path, fallback, old_exists):
    outcomes = []
    for number in range(1, 500):
        home = tmp_path / str(number)
        home.mkdir()
        target = home / "artefact"
        if old_exists:
            save(target, OLD)

        def attempt(number=number, home=home, target=target):
            die_at(number, home)
            save(target, NEW, fsync=True)

        code = wait(in_child(attempt, fallback=fallback))
        if code == 0:
            assert content(target) == NEW
            break
        assert code == 9
        recover(target)
        if not target.exists():
            assert not old_exists, f"killed at operation {number}: nothing is left"
            outcomes.append("none")
        else:
            outcomes.append("old" if (seen := content(target)) == OLD else "new")
            assert seen in (OLD, NEW), f"killed at operation {number}: a mixture"
        # the next save works and sweeps up what the dead process left
        save(target, OLD)
        assert content(target) == OLD
        assert [p.name for p in home.iterdir()] == ["artefact"], f"litter after a kill at operation {number}"
    else:
        pytest.fail("the save never finished")
    before = "old" if old_exists else "none"
    assert len(outcomes) > 20 and outcomes[0] == before and outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=[before, "new"].index), "the swap happens once"


@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "journal"])
def test_sigkill_at_25_moments(tmp_path, fallback):
    """Moments spread over the measured length of a save with larger files (also inside writes and hashing)."""
    repeat, rng = 300, random.Random(0)
    new = {name: value * repeat for name, value in NEW.items()}
    start = time.perf_counter()
    assert wait(in_child(lambda: save(tmp_path / "timing", NEW, repeat, fsync=True), fallback=fallback)) == 0
    length = time.perf_counter() - start
    seen = {"old": 0, "new": 0}
    for moment in range(25):
        home = tmp_path / str(moment)
        home.mkdir()
        target = home / "artefact"
        save(target, OLD)
        pid = in_child(lambda target=target: save(target, NEW, repeat, fsync=True), fallback=fallback)
        time.sleep(length * (moment + rng.random()) / 22)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait(pid)
        result = content(target)
        assert result in (OLD, new), f"moment {moment}: a mixture"
        seen["old" if result == OLD else "new"] += 1
    assert seen["old"] > 3, f"the kills came too late to test anything: {seen}"


@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "journal"])
def test_two_writers_never_mix(tmp_path, fallback):
    target = tmp_path / "artefact"

    def writer(files):
        for _ in range(40):
            save(target, files)

    children = [in_child(lambda files=files: writer(files), fallback=fallback) for files in (OLD, NEW)]
    assert [wait(pid) for pid in children] == [0, 0]
    assert content(target) in (OLD, NEW)
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_exchange_is_used_here(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    if not artifacts._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no rename exchange")
    assert (tmp_path / "b").is_dir() and (tmp_path / "a").read_text() == "b"
    with pytest.raises(FileNotFoundError):
        artifacts._exchange(tmp_path / "a", tmp_path / "missing")


def test_exception_leaves_target_untouched(tmp_path):
    with existing(tmp_path) as target:
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error), staged_folder(target) as folder:
                write(folder, NEW)
                raise error
        assert content(target) == OLD
        with pytest.raises(ArtifactError, match="nothing was written"), staged_folder(target):
            pass
        assert content(target) == OLD
        assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_a_living_writers_folder_is_not_swept(tmp_path):
    with existing(tmp_path) as target, staged_folder(target) as folder:
        write(folder, NEW)
        save(target, OLD)  # another save of the same target, while the first is under way
        assert folder.is_dir()
    assert content(target) == NEW


@pytest.mark.parametrize("fallback", [False, True], ids=["exchange", "journal"])
def test_foreign_files_are_kept(tmp_path, fallback, monkeypatch, caplog):
    if fallback:
        monkeypatch.setattr(artifacts, "_exchange", no_exchange)
    with existing(tmp_path) as target:
        (target / "notes.log").write_text("mine")
        save(target, NEW)
        assert content(target) == NEW
        assert (tmp_path / "artefact.replaced-1" / "notes.log").read_text() == "mine"
        assert "notes.log" in caplog.text
        save(target, OLD)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["artefact", "artefact.replaced-1"]


def test_plain_save_pretrained_folder_is_replaced_whole(tmp_path):
    """A folder written file by file (here with stale shards) has no manifest and is still replaced without a rest."""
    (tmp_path / "m").mkdir()
    write(tmp_path / "m", {"config.json": b"{}", "model-00001-of-00002.safetensors": b"x"})
    save(tmp_path / "m", NEW)
    assert content(tmp_path / "m") == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_refused_targets(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        check_target(tmp_path / "file")
    home = tmp_path / "home"
    home.mkdir()
    check_target(home)
    check_target(tmp_path / "new" / "folder")
    (home / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match=r"thesis\.tex"), staged_folder(home):
        pass
    assert (home / "thesis.tex").read_text() == "x"


def test_mount_point_is_explained(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, "busy")

    with existing(tmp_path) as target:
        monkeypatch.setattr(artifacts, "_exchange", busy)
        with pytest.raises(ArtifactError, match="mount point"):
            save(target, NEW)
        assert content(target) == OLD


def test_link_is_followed(tmp_path):
    save(tmp_path / "v1", OLD)
    (tmp_path / "latest").symlink_to("v1")
    save(tmp_path / "latest", NEW)
    assert (tmp_path / "latest").is_symlink() and content(tmp_path / "v1") == NEW


def test_verify_names_the_file(tmp_path):
    with existing(tmp_path) as target:
        (target / "README.md").write_text("not listed")
        verify_manifest(target, deep=True)
        path = target / "model-1.safetensors"
        path.write_bytes(b"OLD" * 999)
        verify_manifest(target)
        with pytest.raises(ArtifactError, match=r"model-1.*sha256"):
            verify_manifest(target, deep=True)
        path.write_bytes(b"short")
        with pytest.raises(ArtifactError, match=r"model-1.*5 bytes"):
            verify_manifest(target)
        path.unlink()
        with pytest.raises(ArtifactError, match=r"model-1.*missing"):
            verify_manifest(target)
        for text, match in (
            ("[1]", "not a manifest"),
            ("{", "cannot be read"),
            ('{"files": {}, "version": 99}', "upgrade"),
        ):
            (target / "manifest.json").write_text(text)
            with pytest.raises(ArtifactError, match=match):
                verify_manifest(target)
        (target / "manifest.json").unlink()
        with pytest.raises(ArtifactError, match=r"no manifest\.json"):
            verify_manifest(target)
    with pytest.raises(ArtifactError, match="does not exist"):
        verify_manifest(tmp_path / "nowhere")


def test_card_may_be_edited(tmp_path):
    save(tmp_path / "m", {**OLD, "README.md": b"card"})
    (tmp_path / "m" / "README.md").write_text("a better card")
    verify_manifest(tmp_path / "m", deep=True)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "", "a\0b"])
def test_manifest_names_cannot_leave(tmp_path, name):
    save(tmp_path / "m", OLD)
    manifest = read_manifest(tmp_path / "m")
    manifest["files"][name] = {"size": 0, "sha256": ""}
    (tmp_path / "m" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsafeArtifactError, match="leads out"):
        verify_manifest(tmp_path / "m")
    with pytest.raises(UnsafeArtifactError, match="leads out"):
        check_safe(tmp_path / "m")


def test_unsafe_files(tmp_path):
    folder = tmp_path / "m"
    save(folder, OLD)
    check_safe(folder)
    np.save(folder / "numbers.npy", np.arange(3))
    (folder / "inner.json").symlink_to("config.json")
    assert find_unsafe_files(folder) == []
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("pytorch_model.bin", "optimizer.PT", "sub/x.pkl", "modeling_evil.py", "lib.so"):
        (folder / name).write_bytes(b"x")
    (folder / "outer.json").symlink_to(tmp_path / "elsewhere.json")
    (folder / "outer_dir").symlink_to(tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../x.safetensors"}}')
    os.mkfifo(folder / "pipe")
    expected = (
        "lib.so model.safetensors.index.json modeling_evil.py objects.npy optimizer.PT outer.json outer_dir pipe "
        "pytorch_model.bin sub/x.pkl"
    )
    assert sorted(line.split(":")[0] for line in find_unsafe_files(folder)) == expected.split()
    with pytest.raises(UnsafeArtifactError, match=r"lib\.so.*and 9 more"):
        check_safe(folder)


def test_hub_cache_snapshot_is_safe(tmp_path):
    """The Hub cache holds links into its blob folder."""
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--x--y" / "blobs" / "123"
    blob.parent.mkdir()
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert find_unsafe_files(snapshot) == []
