"""Folders that are written whole or not at all, their manifest, and the check that they hold nothing that can run.

Every save path of the library (artefacts, trainer checkpoints, quantizers) goes through `staged_folder`:

1. everything is written to a temporary folder beside the target (same file system), fsynced, and described in
   `manifest.json`;
2. one rename puts it in place: `renameat2(RENAME_EXCHANGE)` (Linux; `renamex_np(RENAME_SWAP)` on macOS) swaps it with
   the old folder in a single step. Two plain renames would leave nothing when the process dies between them. Where the
   file system has no exchange, a journal is written first and whoever comes next (`recover`, called by every load and
   every save) finishes the swap;
3. the old folder, now under the temporary name, is removed.

A kill at any moment leaves the old or the new folder, never a mixture. Of two processes that save at once, the last one
wins. What a killed process left behind (its temporary folder) is removed by the next save of the same target.

Steps that Python does not audit itself are announced with `sys.audit("hf_genrec.artifacts", step, path)`: the tests
kill a process there.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ArtifactError, UnsafeArtifactError

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
# Edited by hand on the Hub after the save: listed in the manifest, but a change of them is no damage.
EDITABLE_FILES = frozenset({"README.md", ".gitattributes"})
# A non-empty target must hold one of these, so that a slip of the keyboard does not replace a home folder by a model.
_MARKER_FILES = (MANIFEST_NAME, "config.json", "tokenizer_config.json", "trainer_state.json", "adapter_config.json")
_MODEL_SUFFIXES = frozenset({".json", ".jinja", ".safetensors", ".md", ".txt", ".model", ".parquet", ".yaml"})
_CHUNK = 1 << 20
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def staged_folder(target: str | os.PathLike, *, fsync: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside `target`: a clean exit makes it `target` in one step, an exception removes it.

    Args:
        target: the folder to create or replace. A symbolic link is followed. Parents are created.
        fsync: flush every file and folder to disk before the swap (a power cut then keeps the promise too).

    Raises:
        ArtifactError: `target` is a file or a mount point, holds files but no artefact, or nothing was written.

    Files in the old folder that are not part of an artefact (notes, checkpoints) are never deleted: the old folder is
    then kept as `<name>.replaced-<n>` and a warning names it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     with staged_folder(Path(home) / "artefact") as folder:
        ...         _ = (folder / "metrics.json").write_text("{}")
        ...     sorted(read_manifest(Path(home) / "artefact")["files"])
        ['metrics.json']
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    check_target(target)
    _remove_stale(target)
    staged = target.parent / f".{target.name}.staged-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        os.mkdir(staged)
        yield staged
        _write_manifest(staged, fsync)
        with _parent_lock(target):
            leftover = _swap(staged, target)
        if fsync:
            _fsync(target.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if leftover is not None:
        shutil.rmtree(leftover, ignore_errors=True)


def check_target(target: str | os.PathLike) -> None:
    """Raise ArtifactError when `staged_folder(target)` would refuse it: call it before hours of training.

    Allowed are: no such path, an empty folder, or a folder with a manifest or the files of a model.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file; name a folder to save to, or move the file away.")
    if target.is_dir() and any(target.iterdir()) and not any((target / name).exists() for name in _MARKER_FILES):
        raise ArtifactError(
            f"{target} holds files ({next(target.iterdir()).name}, ...) but no saved model, and would be replaced as a "
            "whole. Name a new folder, or empty this one first."
        )


def _swap(staged: Path, target: Path) -> Path | None:
    """Put `staged` in the place of `target`; return the path that now holds what must be removed, if any."""
    for _ in range(16):  # another process may create or replace the target between two of our steps
        if not target.exists():
            try:
                sys.audit("hf_genrec.artifacts", "rename", str(target))
                os.rename(staged, target)
                return None
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise _explained(error, target) from error
        # a file of the user's that was carried over (hard link) stands in the new folder too and is not lost
        foreign = [name for name in _foreign_files(target) if not _same_file(staged / name, target / name)]
        if foreign:
            # The old folder lands under the name that the new one has before the exchange: the name it shall keep.
            kept = next(p for n in range(1, 10**6) if not (p := target.parent / f"{target.name}.replaced-{n}").exists())
            os.rename(staged, kept)
            staged = kept
            logger.warning("%s held files of yours (%s): the old folder is kept as %s", target, foreign[0], kept)
        try:
            sys.audit("hf_genrec.artifacts", "exchange", str(target))
            exchanged = _exchange(staged, target)
            sys.audit("hf_genrec.artifacts", "exchanged", str(target))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _explained(error, target) from error
        if not exchanged:
            _journalled_swap(staged, target)
        return None if foreign else staged
    raise ArtifactError(
        f"{target} keeps changing while it is saved: another process writes there. Save to another folder."
    )


def _explained(error: OSError, target: Path) -> ArtifactError:
    if error.errno in (errno.EBUSY, errno.EXDEV):
        return ArtifactError(
            f"{target} is a mount point and cannot be replaced in one step: save to a folder below it."
        )
    return ArtifactError(f"{target} could not be put in place: {error}. Check the permissions of {target.parent}.")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step. False: this system or file system cannot. OSError: it can, but not here."""
    libc: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if hasattr(libc, "renameat2"):
        at_cwd, rename_exchange = -100, 2
        result = libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange)
    elif hasattr(libc, "renamex_np"):
        result = libc.renamex_np(os.fsencode(first), os.fsencode(second), 2)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _journal_path(target: Path) -> Path:
    return target.parent / f".{target.name}.swap.json"


@contextmanager
def _parent_lock(target: Path) -> Iterator[None]:
    """Hold the parent folder against other savers during a swap; the system drops the lock of a dead process."""
    try:
        import fcntl
    except ImportError:  # Windows: one writer at a time is the caller's business
        yield
        return
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _journalled_swap(staged: Path, target: Path) -> None:
    """Two renames that `recover` can finish (under the lock); after this `staged` names the old folder."""
    _finish_journal(target)
    aside, draft = (staged.with_name(staged.name + suffix) for suffix in (".old", ".json"))
    draft.write_text(json.dumps({"new": staged.name, "old": aside.name}), encoding="utf-8")
    _fsync(draft)
    os.replace(draft, _journal_path(target))
    _fsync(target.parent)
    if target.exists():
        os.rename(target, aside)
    os.rename(staged, target)
    if aside.exists():
        os.rename(aside, staged)
    os.unlink(_journal_path(target))


def recover(folder: str | os.PathLike) -> bool:
    """Finish the swap of a process that died in it (file systems without an exchange). True when something was done.

    Cheap when there is nothing to do: every load calls it first.
    """
    target = Path(os.path.realpath(folder))
    if not _journal_path(target).exists():
        return False
    with _parent_lock(target):
        return _finish_journal(target)


def _finish_journal(target: Path) -> bool:
    """Under the lock, a journal means that its writer is dead."""
    journal = _journal_path(target)
    try:
        entry = json.loads(journal.read_text(encoding="utf-8"))
        new, old = (target.parent / Path(entry[key]).name for key in ("new", "old"))
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{journal} is not a swap journal ({error}); remove it, then check {target}.") from error
    if not target.exists():
        for candidate in (new, old):  # the new one was complete and fsynced before the journal was written
            if candidate.exists():
                os.rename(candidate, target)
                break
    journal.unlink()
    logger.info("finished the interrupted save of %s", target)
    return True


def _remove_stale(target: Path) -> None:
    """Remove what dead processes of this machine left while saving `target`."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.staged-{_HOST}-(\d+)-[0-9a-f]{{8}}(\.json|\.old)?")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _same_file(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _foreign_files(folder: Path) -> list[str]:
    """Files below `folder` that no save of ours put there."""
    try:
        listed = set(read_manifest(folder)["files"]) | {MANIFEST_NAME} | EDITABLE_FILES
    except ArtifactError:
        listed = set()
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if not path.is_dir() or path.is_symlink()]
    # Plain `save_pretrained` output at the top level is a model too; hidden files are caches of tools.
    return [
        str(path)
        for path in files
        if path.as_posix() not in listed
        and not path.parts[0].startswith(".")
        and not (len(path.parts) == 1 and path.suffix in _MODEL_SUFFIXES)
    ]


def _fsync(path: Path) -> None:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    with suppress(PermissionError):  # folders on Windows
        handle = os.open(path, flags)
        try:
            with suppress(OSError):  # file systems that cannot sync folders
                os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------------------------ manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _write_manifest(folder: Path, fsync: bool) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path != folder / MANIFEST_NAME:
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
            if fsync:
                _fsync(path)
    if not files:
        raise ArtifactError(f"nothing was written to {folder}: the save is given up and the old folder stays.")
    manifest = {"format": "hf_genrec", "version": MANIFEST_VERSION, "files": files}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if fsync:
        for path in (folder / MANIFEST_NAME, *(p for p in folder.rglob("*") if p.is_dir()), folder):
            _fsync(path)


def read_manifest(folder: str | os.PathLike) -> dict:
    """The manifest: `{"format", "version", "files": {relative path: {"size": bytes, "sha256": hex}}}`.

    Raises:
        ArtifactError: there is none, it is no manifest, or it is newer than this library.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "has no manifest.json" if Path(folder).is_dir() else "does not exist"
        raise ArtifactError(
            f"{folder} {what}: it is not an artefact written by hf_genrec, or only half of one."
        ) from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): save or download the artefact again.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{path} is not a manifest (no table `files`): save or download the artefact again.")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > MANIFEST_VERSION:
        raise ArtifactError(
            f"{path} has version {manifest.get('version')!r}, this library reads {MANIFEST_VERSION}: upgrade it."
        )
    return manifest


def verify_manifest(folder: str | os.PathLike, deep: bool = False) -> dict:
    """Check that every listed file is there with its size, and with `deep` its sha256. Returns the manifest.

    Raises:
        ArtifactError: names the first file that is missing or differs.
        UnsafeArtifactError: a listed name leads out of the folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if _leaves_folder(name):
            raise UnsafeArtifactError(
                f"{folder / MANIFEST_NAME} lists {name!r}, which leads out of the folder: do not use it."
            )
        if name in EDITABLE_FILES:
            continue
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing (manifest.json lists it): save or download the artefact again.")
        size = path.stat().st_size
        if size != entry.get("size"):
            raise ArtifactError(
                f"{path} has {size} bytes, manifest.json says {entry.get('size')}: save or download the artefact again."
            )
        if deep and _sha256(path) != entry.get("sha256"):
            raise ArtifactError(
                f"{path} does not match its sha256 in manifest.json: save or download the artefact again."
            )
    return manifest


# -------------------------------------------------------------------------------------------------------------- safety

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npz"})
_CODE_SUFFIXES = frozenset({".py", ".pyc", ".pyd", ".pyw", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ipynb"})


def _leaves_folder(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return not name or ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in name


def find_unsafe_files(folder: str | os.PathLike) -> list[str]:
    """What in this folder could run code or lead out of it, as `"<relative path>: <reason>"`; empty when all is well.

    Refused: pickle formats, `.npy` of objects, Python and native code, links that leave the folder (those into the blob
    store of a Hub cache snapshot are its normal form), pipes and devices, and names in `manifest.json` or
    `*.index.json` that lead out.
    """
    folder = Path(folder)
    inside = [Path(os.path.realpath(folder))]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    found = []
    for path in sorted(folder.rglob("*")):
        reason = _unsafe_reason(path, inside)
        if reason:
            found.append(f"{path.relative_to(folder).as_posix()}: {reason}")
    return found


def _unsafe_reason(path: Path, inside: list[Path]) -> str | None:
    suffix = path.suffix.lower()
    real = Path(os.path.realpath(path))
    if path.is_symlink() and not any(real.is_relative_to(root) for root in inside):
        return "a symbolic link that leaves the folder"
    if path.is_dir():
        return None
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        return "not a regular file"
    if suffix in _PICKLE_SUFFIXES:
        return "a pickle format; weights must be safetensors"
    if suffix in _CODE_SUFFIXES:
        return "code; an artefact holds data only"
    if suffix == ".npy" and _npy_holds_objects(path):
        return "a numpy file of pickled objects"
    if path.name == MANIFEST_NAME or path.name.endswith(".index.json"):
        return _names_leading_out(path)
    return None


def _npy_holds_objects(path: Path) -> bool:
    import numpy as np

    try:
        # memory mapping refuses object arrays before anything of them is read
        np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return True
    return False


def _names_leading_out(path: Path) -> str | None:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        names = table["files"] if path.name == MANIFEST_NAME else table["weight_map"].values()
        bad = next((name for name in names if not isinstance(name, str) or _leaves_folder(name)), None)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return "not readable as a file table"
    return None if bad is None else f"names {bad!r}, which leads out of the folder"


def check_safe(folder: str | os.PathLike) -> None:
    """Raise UnsafeArtifactError naming the first unsafe file of `find_unsafe_files`."""
    found = find_unsafe_files(folder)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UnsafeArtifactError(
            f"{folder} is refused: {found[0]}{more}. Use an artefact of safetensors, JSON, YAML and parquet only."
        )
