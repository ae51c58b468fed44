"""The rows every number stands beside: popularity, item graph, and a SASRec trained in a process of its own.

SASRec trains while the recipe trains, on the other core, as the artefact `<output_dir>-sasrec_ce`; an artefact of the same
data, recipe and seed is used again, so a second run costs nothing.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_genrec.data.interactions import RecommendationData
from hf_genrec.data.splits import Split
from hf_genrec.errors import ArtifactError, GenRecError, TrainingError
from hf_genrec.evaluation.baselines import ItemGraph, Popularity
from hf_genrec.evaluation.evaluation_report import EvaluationReport
from hf_genrec.evaluation.evaluator import evaluate, training_counts
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.hub import load_artifact
from hf_genrec.recipes.resolver import Recipe, resolve_recipe

logger = logging.getLogger(__name__)
SIMPLE = {"popularity": Popularity, "item_graph": ItemGraph}


def evaluate_simple(
    names: Sequence[str], data: RecommendationData, split: Split, *, ks: Sequence[int], progress: bool
) -> dict[str, EvaluationReport]:
    """Reports of the untrained baselines among `names`."""
    counts = training_counts(split.train, data.num_items)
    return {
        name: evaluate(
            SIMPLE[name]().fit(split.train, data.num_items),
            split.test,
            num_items=data.num_items,
            ks=ks,
            train_counts=counts,
            repeats=data.repeats,
            name=name,
            progress=progress,
        )
        for name in names
        if name in SIMPLE
    }


@dataclass
class SASRecRun:
    """A SASRec artefact that exists or is being trained."""

    folder: Path
    process: subprocess.Popen[bytes] | None
    log: Path

    def stop(self) -> None:
        """End the training process, if any."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def evaluate(
        self, data: RecommendationData, split: Split, *, ks: Sequence[int], progress: bool
    ) -> EvaluationReport:
        """Wait for the artefact and rank the same test rows with it."""
        if self.process is not None:
            if progress and self.process.poll() is None:
                print(f"waiting for the SASRec baseline (log: {self.log})", flush=True)
            if self.process.wait() != 0:
                tail = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
                raise TrainingError(f"the SASRec baseline failed, see {self.log}: {' / '.join(tail)}")
        return evaluate_sasrec(self.folder, data, split, ks=ks, progress=progress)


def evaluate_sasrec(
    folder: Path, data: RecommendationData, split: Split, *, ks: Sequence[int], progress: bool = True
) -> EvaluationReport:
    """Report of a SASRec artefact on the test rows of `split`."""
    artifact = load_artifact(folder)
    return evaluate(
        ModelRecommender(artifact.model, artifact.tokenizer),
        split.test,
        num_items=data.num_items,
        ks=ks,
        train_counts=training_counts(split.train, data.num_items),
        repeats=data.repeats,
        name="sasrec_ce",
        progress=progress,
    )


def _up_to_date(folder: Path, recipe: Recipe, seed: int, fingerprint: str) -> bool:
    try:
        artifact = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        stored = load_artifact(folder).recipe
    except (OSError, ValueError, ArtifactError):
        return False
    return artifact.get("fingerprint") == fingerprint and artifact.get("seed") == seed and stored == recipe.to_dict()


def start_sasrec(
    folder: Path,
    dataset: Any,
    recipe: Recipe,
    *,
    items: Any = None,
    data_dir: Any = None,
    seed: int = 0,
    fingerprint: str = "",
) -> SASRecRun:
    """Begin training SASRec with the recipe's data settings, unless an artefact of the same run is there already.

    Raises:
        GenRecError: the data set is an object in memory, which a second process cannot read.
    """
    log = folder.with_name(f"{folder.name}.log")
    overrides = {f"data.{key}": value for key, value in recipe.data.items()}
    if _up_to_date(folder, resolve_recipe("sasrec", overrides), seed, fingerprint):
        return SASRecRun(folder, None, log)
    if not isinstance(dataset, str | Path):
        raise GenRecError(
            "the sasrec_ce baseline is trained in a second process and needs a data set by name or path; "
            "leave it out of baselines, or save the table to a file."
        )
    command = [sys.executable, "-m", "hf_genrec.cli.main", "train", "sasrec", "--dataset", str(dataset)]
    command += ["--output_dir", str(folder), "--seed", str(seed), "--baselines", "none", "--quiet"]
    for flag, value in (("--items", items), ("--data_dir", data_dir)):
        command += [flag, str(value)] if value is not None else []
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two one-thread runs beat one run on two threads at this size
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    return SASRecRun(folder, process, log)
