"""Push an artefact folder to the Hub and pull it back: the whole folder in one commit, checked before and after.

One commit per push means that readers of the repository see the old or the new artefact, never a mixture, as with
`save_artifact` on disk.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_genrec.artifacts import MANIFEST_NAME, check_safe, recover, staged_folder, verify_manifest
from hf_genrec.errors import ArtifactError

from .artifact_files import EVAL_RESULTS_FOLDER
from .card import README_NAME, readme_for_repo
from .data_terms import DATA_TERMS
from .metrics_file import METRICS_NAME, read_metrics

logger = logging.getLogger(__name__)

# Hidden files are caches, version control and, worst, `.env` files with secrets. These two belong to an artefact.
_PUSHED_HIDDEN = (EVAL_RESULTS_FOLDER, ".gitattributes")
_NOT_PULLED = [".gitattributes", ".gitignore"]


def push_artifact(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload hf_genrec artefact",
) -> Any:
    """Upload a whole artefact folder as one commit; the repository is made if need be.

    Files of an earlier artefact in the repository that this one does not have (old shards, say) are deleted in the same
    commit; other files of the repository stay. Hidden files of the folder are not uploaded, except `.eval_results`. In
    the uploaded card the usage snippets name the repository instead of the folder.

    Args:
        folder: an artefact folder.
        repo_id: `"owner/name"`, or `"name"` in your own namespace.
        private: make a new repository private. Default: private where the terms of the training data forbid giving its
            files away (`data_terms.py`; the catalogue holds item ids and titles), else as your account has it.
        token: as in `huggingface_hub`.
        revision: branch.
        commit_message: of the commit.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        ArtifactError: the folder is no whole artefact, or the Hub refuses or cannot be reached.
        UnsafeArtifactError: the folder holds a file that could run code; nothing is uploaded.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    uploaded = files_to_push(folder)
    private = _privacy(folder, private)
    api = HfApi(token=token)
    with _hub_errors(f"push of {folder} to {repo_id!r}"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        present = set(api.list_repo_files(repo_id, revision=revision))
        operations: list[Any] = []
        for path in uploaded:
            content: str | bytes = str(folder / path)
            if path == README_NAME:
                content = readme_for_repo((folder / path).read_text(encoding="utf-8"), repo_id).encode()
            operations.append(CommitOperationAdd(path_in_repo=path, path_or_fileobj=content))
        stale = (_remote_manifest(api, repo_id, revision, present) & present) - set(uploaded)
        operations += [CommitOperationDelete(path_in_repo=path) for path in sorted(stale)]
        with warnings.catch_warnings():
            # items.parquet is the catalogue of this model, not a data set in the wrong place
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            return api.create_commit(
                repo_id, operations=operations, commit_message=commit_message, revision=revision, num_threads=2
            )


def _privacy(folder: Path, private: bool | None) -> bool | None:
    metrics = read_metrics(folder / METRICS_NAME) if (folder / METRICS_NAME).exists() else {}
    terms = DATA_TERMS.get(metrics.get("dataset", ""))
    if terms is None or terms.redistribution or private:
        return private
    if private is None:
        logger.warning(
            "the repository is made private: %s. %s Pass private=False if you have permission.",
            terms.title,
            terms.terms,
        )
        return True
    logger.warning("publishing ids and titles of %s. %s", terms.title, terms.terms)
    return private


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """Check an artefact folder as `push_artifact` does, and list what it would upload.

    Raises:
        ArtifactError: the folder is no whole artefact.
        UnsafeArtifactError: the folder holds a file that could run code.
    """
    folder = Path(folder)
    recover(folder)
    check_safe(folder)
    verify_manifest(folder, deep=True)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [p.as_posix() for p in files if not p.parts[0].startswith(".") or p.parts[0] in _PUSHED_HIDDEN]


def _remote_manifest(api: Any, repo_id: str, revision: str | None, present: set[str]) -> set[str]:
    """Files that an earlier artefact put into the repository; empty where there was none."""
    if MANIFEST_NAME not in present:
        return set()
    try:
        path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=revision)
        return {str(name) for name in json.loads(Path(path).read_text(encoding="utf-8"))["files"]}
    except (ValueError, KeyError, TypeError):
        return set()


def pull_artifact(
    repo_id: str,
    folder: str | os.PathLike | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Download a whole artefact and check it; works offline once it is in the cache.

    Args:
        repo_id: `"owner/name"`.
        folder: where to put it, in one step as `save_artifact` does. Default: leave it in the Hub cache.
        revision: branch, tag or commit. token: as in `huggingface_hub`.

    Returns:
        The folder (of the cache, if none was given).

    Raises:
        ArtifactError: no such repository, no network, no artefact in it, or files that differ from its manifest.
        UnsafeArtifactError: the repository holds a file that could run code.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(f"pull of {repo_id!r}"):
        snapshot = Path(snapshot_download(repo_id, revision=revision, token=token, ignore_patterns=_NOT_PULLED))
    check_safe(snapshot)
    try:
        manifest = verify_manifest(snapshot, deep=True)
    except ArtifactError as error:
        raise ArtifactError(
            f"{repo_id} is not a whole artefact: {error} If single files were pushed after the artefact "
            "(model.push_to_hub, the web page), push the whole folder again with push_artifact."
        ) from error
    if folder is None:
        return snapshot
    with staged_folder(folder) as staged:
        for name in sorted({*manifest["files"], README_NAME}):
            if (snapshot / name).exists():
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(snapshot / name, staged / name)
    return Path(folder)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Errors of the client as ArtifactError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ArtifactError(
            f"{what}: access must be granted first; ask for it on the page of the repository."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ArtifactError(
            f"{what}: there is no such repository, or it is private: check the id, and log in (`hf auth login`) or "
            "pass token=."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ArtifactError(f"{what}: there is no such revision.") from error
    except errors.HFValidationError as error:
        raise ArtifactError(f"{what}: not a valid repository id; write it like 'owner/name'. {error}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ArtifactError(
            f"{what}: the Hub cannot be reached and the files are not in the cache: unset HF_HUB_OFFLINE or go online."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        hint = " Log in with `hf auth login` or pass token=." if status in (401, 403) else " Try again later."
        raise ArtifactError(f"{what}: the Hub answered {status}.{hint}") from error
    except (errors.HTTPError, OSError) as error:
        raise ArtifactError(f"{what}: the Hub cannot be reached ({type(error).__name__}: {error}).") from error
