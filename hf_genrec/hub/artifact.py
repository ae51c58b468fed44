"""`load_artifact`: a folder or a Hub repository back as model, tokenizer, items, recipe and numbers.

Before anything is built from the files, an interrupted save is finished, the folder is checked for files that could run
code, and every file is compared with the manifest. Code from an artefact never runs: no pickle is opened, and
`trust_remote_code` is off whatever the files say.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_genrec.artifacts import MANIFEST_NAME, check_safe, recover, verify_manifest
from hf_genrec.errors import ArtifactError, GenRecError, IncompatibleComponentsError

from .artifact_files import ITEMS_NAME
from .metrics_file import METRICS_NAME, read_metrics
from .parts import check_catalogue, load_items, load_model, load_tokenizer, read_recipe
from .saving import save_artifact

if TYPE_CHECKING:
    from hf_genrec.generation.recommend import Recommendation

__all__ = ["Artifact", "load_artifact", "save_artifact"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_ATTEMPTS = 10  # a save may swap the folder while it is read


@dataclass
class Artifact:
    """What an artefact folder holds; parts that it does not have are None.

    Args:
        folder: where it was read from.
        model, tokenizer: Hugging Face objects.
        items: `ItemTable` in catalogue order.
        recipe, metrics: contents of `recipe.yaml` and `metrics.json`.
    """

    folder: Path
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    items: Any = field(default=None, repr=False)
    recipe: dict[str, Any] | None = field(default=None, repr=False)
    metrics: dict[str, Any] | None = field(default=None, repr=False)

    def recommend(self, histories: Sequence[Sequence[str]], **options: Any) -> list[list[Recommendation]]:
        """At most k distinct items per history, with the artefact's own `recommendation_config.json` as defaults.

        Args:
            histories: item ids per user, oldest first.
            options: as in `RecommendationMixin.recommend` (`k`, `num_beams`, `exclude_seen`, `allowed_items`, ...).

        Raises:
            ArtifactError: the artefact has no model or no item tokenizer.
        """
        if self.model is None or not hasattr(self.tokenizer, "item_ids"):
            raise ArtifactError(f"{self.folder} cannot recommend: it has no model, or no tokenizer with a catalogue.")
        if hasattr(self.model, "recommend_indices"):
            return self.model.recommend(histories, tokenizer=self.tokenizer, **options)
        from hf_genrec.generation.configuration_recommendation import RecommendationConfig
        from hf_genrec.generation.recommend import recommend

        defaults = RecommendationConfig.from_pretrained(self.folder, local_files_only=True).to_dict()
        defaults.pop("dense_weight")
        return recommend(self.model, histories, tokenizer=self.tokenizer, **{**defaults, **options})

    def title(self, item_id: str) -> str:
        """Title of an item; "" where there is none."""
        if self.items is None:
            return ""
        index = int(self.tokenizer.item_index([item_id])[0]) if hasattr(self.tokenizer, "item_index") else -1
        return self.items.table["title"][index].as_py() if index >= 0 else ""


def load_artifact(
    folder: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    deep: bool = True,
    **model_options: Any,
) -> Artifact:
    """Load an artefact folder, or a Hub repository by its id.

    Args:
        folder: path, or `"owner/name"` (used when there is no such folder).
        revision, token: of a Hub repository.
        deep: compare every file's sha256 with the manifest, not only its size.
        model_options: for `from_pretrained` of the model (`dtype`, `device_map`, ...).

    Raises:
        ArtifactError: no such artefact, or a file is missing, truncated or changed (named).
        UnsafeArtifactError: a file could run code, or leads out of the folder (named).
        IncompatibleComponentsError: model and tokenizer are of different catalogues.
    """
    if model_options.pop("trust_remote_code", False):
        raise ArtifactError("load_artifact never runs code from an artefact: leave trust_remote_code out.")
    path = Path(folder)
    recover(path)
    if not path.is_dir():
        if path.exists() or not _HUB_ID.fullmatch(str(folder)):
            raise ArtifactError(f"{folder} is not a folder: give an artefact folder or a Hub id like 'owner/name'.")
        from .remote import pull_artifact

        path = pull_artifact(str(folder), revision=revision, token=token)
    for attempt in range(_ATTEMPTS):
        before = _identity(path)
        try:
            artifact = _load_folder(path, deep, model_options)
        except (GenRecError, OSError):
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return artifact
        time.sleep(0.05 * attempt)
    raise ArtifactError(f"{path} kept changing while it was read: wait until nobody saves to it.")


def _identity(path: Path) -> tuple[int, int, bytes] | None:
    """Which folder stands at this path: two savings in turn may bring back the number of the inode, not the rest."""
    try:
        status = os.stat(path)
        return status.st_ino, status.st_ctime_ns, (path / MANIFEST_NAME).read_bytes()
    except OSError:
        return None


def _load_folder(folder: Path, deep: bool, model_options: dict[str, Any]) -> Artifact:
    check_safe(folder)
    verify_manifest(folder, deep=deep)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer_config.json").exists() else None
    model = load_model(folder, model_options) if (folder / "config.json").exists() else None
    check_catalogue(model, tokenizer)
    metrics = read_metrics(folder / METRICS_NAME) if (folder / METRICS_NAME).exists() else None
    items = load_items(folder)
    num_items = getattr(tokenizer, "num_items", None)
    if items is not None and num_items is not None and len(items) != num_items:
        raise IncompatibleComponentsError(
            f"{folder / ITEMS_NAME} has {len(items):,} rows for {num_items:,} items: save the artefact again."
        )
    return Artifact(folder, model, tokenizer, items, read_recipe(folder), metrics)
