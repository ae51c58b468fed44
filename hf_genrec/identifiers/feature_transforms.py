"""Item vectors of items that join later: what was fitted on the first catalogue is kept and applied, nothing is refitted.

A feature block is centred, scaled and perhaps projected with figures of the catalogue it was made from; a new item has to
pass through the same figures, or its codes mean something else. Blocks of content (texts, attributes) can be computed for
any item. Blocks of behaviour (co-occurrence, another recommender's table) know nothing of an item without interactions:
they are filled in with the mean of the item's nearest neighbours in the content blocks (our choice).

Shape legend: N items of the catalogue, M new items, E and F widths, P projected width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ArtifactError, IncompatibleComponentsError, ItemTableError
from .features_attributes import attribute_values

if TYPE_CHECKING:
    from ..data.items import ItemTable

FEATURES_FILE = "features.safetensors"
_FORMAT = "hf_genrec.item_features/1"
_NEIGHBOURS = 10


@dataclass
class BlockTransform:
    """How a block of content vectors is made for other items.

    Attributes:
        kind: "text" or "attributes".
        settings: plain values (encoder and fields; columns and their values).
        tensors: "mean" (E,), "scale" (1,), and for text perhaps "pca_mean" (D,), "pca" (P, D).
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def apply(self, items: ItemTable) -> np.ndarray:
        """Vectors (M, E) float32 of items from their table.

        Raises:
            ItemTableError: an item without a text, or a missing column (named).
        """
        raw_ME = self._texts(items) if self.kind == "text" else self._attributes(items)
        if "pca" in self.tensors:
            raw_ME = (raw_ME - self.tensors["pca_mean"]) @ self.tensors["pca"].T
        return ((raw_ME - self.tensors["mean"]) / self.tensors["scale"]).astype(np.float32)

    def _texts(self, items: ItemTable) -> np.ndarray:
        from .features import text_features

        items.require_text(self.settings["fields"])
        return text_features(items.texts(self.settings["fields"]), self.settings["encoder"], progress=False)

    def _attributes(self, items: ItemTable) -> np.ndarray:
        names = [tuple(name) for name in self.settings["names"]]
        place = {name: number for number, name in enumerate(names)}
        raw_MA = np.zeros((len(items), len(names)), np.float32)
        for column in dict.fromkeys(name for name, _ in names):
            if column not in items.columns:
                raise ItemTableError(f"item table: no column {column!r}, which the identifiers are made from; add it")
            rows = attribute_values(items.table[column].to_pylist(), self.settings["separator"])
            for item, row in enumerate(rows):
                for value in row:
                    if (number := place.get((column, value))) is not None:
                        raw_MA[item, number] = 1.0
        return raw_MA


@dataclass
class FittedBlock:
    """One block of a saved catalogue: the vectors of its items, and how to make more of them."""

    symmetric: np.ndarray
    inputs: np.ndarray
    transform: BlockTransform | None = None


@dataclass
class ItemFeatures:
    """The feature blocks of a catalogue, and which of them identifiers and model read.

    Attributes:
        blocks: by name, in the order of the recipe.
        identifiers, model: names of blocks.

    Relations: `identifier_vectors()` of the saved blocks are those the quantizer was fitted on.
    """

    blocks: dict[str, FittedBlock]
    identifiers: list[str]
    model: list[str]

    def identifier_vectors(self, blocks: dict[str, FittedBlock] | None = None) -> np.ndarray:
        """Blocks of the identifiers side by side, each divided by the root of its width. (N, E)"""
        blocks = self.blocks if blocks is None else blocks
        chosen = [blocks[name].symmetric for name in self.identifiers]
        return np.concatenate([block / np.sqrt(block.shape[1]) for block in chosen], axis=1).astype(np.float32)

    def model_vectors(self, blocks: dict[str, FittedBlock] | None = None) -> np.ndarray | None:
        """Input features of the model (N, F), None where it reads none."""
        blocks = self.blocks if blocks is None else blocks
        chosen = [blocks[name].inputs for name in self.model]
        return np.concatenate(chosen, axis=1).astype(np.float32) if chosen else None

    def of_new_items(self, items: ItemTable) -> dict[str, FittedBlock]:
        """Vectors of M new items: content blocks computed, the others from their nearest neighbours by content.

        Raises:
            IncompatibleComponentsError: no content block, so that nothing is known of a new item.
            ItemTableError: an item without a text or attribute that is needed.
        """
        made: dict[str, FittedBlock] = {}
        for name, block in self.blocks.items():
            if block.transform is not None:
                vectors_ME = block.transform.apply(items)
                made[name] = FittedBlock(vectors_ME, vectors_ME)
        if not made:
            raise IncompatibleComponentsError(
                f"the item vectors come from {', '.join(self.blocks)} alone, which know nothing of a new item: give its "
                "vectors yourself, or train with a block of content (text, attributes)"
            )
        old_NE = np.concatenate([_unit(self.blocks[name].symmetric) for name in made], axis=1)
        new_ME = np.concatenate([_unit(block.symmetric) for block in made.values()], axis=1)
        count = min(_NEIGHBOURS, len(old_NE))
        nearest_MK = np.argsort(-(new_ME @ old_NE.T), axis=1, kind="stable")[:, :count]
        for name, block in self.blocks.items():
            if name not in made:
                made[name] = FittedBlock(
                    block.symmetric[nearest_MK].mean(axis=1), block.inputs[nearest_MK].mean(axis=1)
                )
        return {name: made[name] for name in self.blocks}

    def changed(self, kept_N: np.ndarray, new: dict[str, FittedBlock] | None = None) -> ItemFeatures:
        """The blocks of another catalogue: the kept rows, then the new ones."""
        blocks = {}
        for name, block in self.blocks.items():
            parts = [[block.symmetric[kept_N]], [block.inputs[kept_N]]]
            if new is not None:
                parts[0].append(new[name].symmetric)
                parts[1].append(new[name].inputs)
            blocks[name] = FittedBlock(np.concatenate(parts[0]), np.concatenate(parts[1]), block.transform)
        return ItemFeatures(blocks, list(self.identifiers), list(self.model))

    # --- file ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (settings in its header, no pickle); equal features give equal bytes."""
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {}
        described: dict[str, Any] = {}
        for name, block in self.blocks.items():
            tensors[f"{name}/symmetric"] = np.ascontiguousarray(block.symmetric, np.float32)
            if block.inputs is not block.symmetric and not np.array_equal(block.inputs, block.symmetric):
                tensors[f"{name}/inputs"] = np.ascontiguousarray(block.inputs, np.float32)
            described[name] = None
            if block.transform is not None:
                described[name] = {"kind": block.transform.kind, "settings": block.transform.settings}
                for key, value in block.transform.tensors.items():
                    tensors[f"{name}/transform/{key}"] = np.ascontiguousarray(value, np.float32)
        about = {"blocks": described, "identifiers": self.identifiers, "model": self.model}
        save_file(tensors, str(path), metadata={_FORMAT: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> ItemFeatures:
        """Read a file of `save`. Raises ArtifactError for any other."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                about = json.loads((file.metadata() or {})[_FORMAT])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            blocks = {}
            for name, entry in about["blocks"].items():
                symmetric, transform = tensors[f"{name}/symmetric"], None
                if entry is not None:
                    start = f"{name}/transform/"
                    own = {key.removeprefix(start): v for key, v in tensors.items() if key.startswith(start)}
                    transform = BlockTransform(entry["kind"], entry["settings"], own)
                blocks[name] = FittedBlock(symmetric, tensors.get(f"{name}/inputs", symmetric), transform)
            return cls(blocks, list(about["identifiers"]), list(about["model"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path}: not a file of item features of this version ({error}); train again to write it"
            ) from error


def _unit(block_NE: np.ndarray) -> np.ndarray:
    return block_NE / np.maximum(np.linalg.norm(block_NE, axis=1, keepdims=True), 1e-12)


def feature_names(chosen: Sequence[str] | None, blocks: dict[str, Any]) -> list[str]:
    """Names that a recipe lists and that could be made; all blocks where it lists none."""
    return [name for name in (blocks if chosen is None else chosen) if name in blocks]
