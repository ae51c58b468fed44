"""What becomes of the files that are already in an artefact folder when a new artefact takes its place.

The old folder is swapped out as a whole, so whatever should stay is taken along into the new one first: parts of the
artefact that were not given again, and files that are not ours at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from hf_genrec.artifacts import MANIFEST_NAME, find_unsafe_files, read_manifest
from hf_genrec.errors import ArtifactError

from .artifact_files import part_of
from .card import README_NAME

logger = logging.getLogger(__name__)


def old_files(target: Path) -> list[str]:
    """Every file below the existing folder, as relative paths with `/`."""
    if not target.is_dir():
        return []
    return sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_symlink() or not path.is_dir()
    )


def old_yaml(target: Path, name: str, old: list[str]) -> dict[str, Any]:
    """A YAML table of the old folder; empty where there is none, or it cannot be read."""
    found = None
    if name in old:
        with suppress(yaml.YAMLError, UnicodeDecodeError):
            found = yaml.safe_load((target / name).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def carry_over(target: Path, staged: Path, old: list[str], kept: set[str]) -> list[str]:
    """Take along what stays of the old folder, as hard links where possible. Returns the files that are not ours."""
    try:
        listed = set(read_manifest(target)["files"])
    except ArtifactError:
        listed = set()
    unsafe = find_unsafe_files(target) if old else []
    foreign = []
    for path in old:
        part = part_of(path)
        if (part is not None and part not in kept) or (staged / path).exists():
            continue
        if any(entry.startswith(f"{path}: ") for entry in unsafe):
            logger.warning("%s is not taken along into the new artefact: it holds data only", target / path)
            continue
        _link(target / path, staged / path)
        if part is None and path not in listed:
            foreign.append(path)
    if _edited_readme(target):
        number = next(n for n in range(1, 10**6) if not (staged / f"README.previous-{n}.md").exists())
        _link(target / README_NAME, staged / f"README.previous-{number}.md")
        foreign.append(f"README.previous-{number}.md")
        logger.warning("%s was edited by hand: kept as README.previous-%d.md", target / README_NAME, number)
    return foreign


def _link(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)  # nothing writes to a carried file before the old folder is gone
    except OSError:
        shutil.copy2(source, destination)


def _edited_readme(target: Path) -> bool:
    path = target / README_NAME
    if not path.is_file():
        return False
    try:
        entry = read_manifest(target)["files"].get(README_NAME)
    except ArtifactError:
        return False
    return entry is not None and entry.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest()


def unlist(target: Path, foreign: list[str]) -> None:
    """Take the user's own files off the manifest: editing a note must not make the artefact look damaged."""
    if not foreign:
        return
    manifest = read_manifest(target)
    for path in foreign:
        manifest["files"].pop(path, None)
    draft = target / ".manifest.json.new"
    draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, target / MANIFEST_NAME)
