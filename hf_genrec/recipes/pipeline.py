"""From a resolved recipe and a data set to an artefact folder: the stages in order, timed, each resumable where it is long.

data -> split -> feature blocks -> identifiers -> tokenizer and model -> training -> weights chosen on the validation part
-> full-ranking test beside the baselines -> artefact folder. The test part is read once, at the end.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.artifacts import check_target
from hf_genrec.data.interactions import RecommendationData, load_data
from hf_genrec.data.splits import Split, make_split
from hf_genrec.errors import RequestError
from hf_genrec.evaluation.evaluation_report import EvaluationReport
from hf_genrec.evaluation.evaluator import evaluate, training_counts
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.evaluation.report import plot_results
from hf_genrec.evaluation.ties import tie_report
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.hub import save_artifact
from hf_genrec.hub.identifier_plots import identifier_pictures
from hf_genrec.hub.metrics_file import build_metrics
from hf_genrec.identifiers.feature_transforms import feature_names
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.recipes import baselines as baseline_runs
from hf_genrec.recipes.build import Identifiers, build_model, trained_record
from hf_genrec.recipes.components import METHODS, MODELS
from hf_genrec.recipes.kept import kept_identifiers
from hf_genrec.recipes.resolver import AT_VALIDATION, Recipe
from hf_genrec.recipes.stages.context import TrainingJob
from hf_genrec.recipes.stages.features import item_features
from hf_genrec.recipes.stages.judged import bucket_warnings, compared, compares, judged, ranked, ranked_before
from hf_genrec.recipes.weights import CHOICES, choose_weights

logger = logging.getLogger(__name__)
KS = (1, 5, 10, 20, 50)
BASELINES = ("popularity", "item_graph", "sasrec_ce")


@dataclass
class Stages:
    """Wall-clock seconds per stage, printed as they end."""

    seconds: dict[str, float] = field(default_factory=dict)
    progress: bool = True

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.progress:
            print(f"[{name}] ...", flush=True)
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        if self.progress:
            print(f"[{name}] {self.seconds[name]:.1f} s", flush=True)


@dataclass
class TrainedRecipe:
    """What `train_recipe` returns: the artefact folder and everything in it."""

    folder: Path
    model: Any
    tokenizer: ItemTokenizer
    data: RecommendationData
    split: Split
    report: EvaluationReport
    variants: dict[str, EvaluationReport]
    baselines: dict[str, EvaluationReport]
    metrics: dict[str, Any]


def load_data_section(
    section: dict[str, Any],
    dataset: Any,
    *,
    items: Any = None,
    data_dir: Any = None,
    require_text: bool = False,
    align: Callable[[RecommendationData], RecommendationData] | None = None,
) -> tuple[RecommendationData, Split]:
    """Data and split as the `data` section of a recipe says; `align` may map the data to another catalogue."""
    options = dict(section)
    protocol = options.pop("protocol", "leave_one_out")
    fractions = {key: options.pop(key) for key in ("validation_fraction", "test_fraction") if key in options}
    data = load_data(dataset, items=items, data_dir=data_dir, require_text=require_text, **options)
    data = align(data) if align else data
    return data, make_split(data, protocol, **(fractions if protocol == "global_time" else {}))


def train_recipe(
    recipe: Recipe,
    dataset: Any,
    output_dir: str | Path,
    *,
    items: Any = None,
    data_dir: str | Path | None = None,
    seed: int = 0,
    baselines: Sequence[str] = BASELINES,
    resume: bool = False,
    keep_checkpoints: bool = False,
    test_users: int | None = None,
    progress: bool = True,
) -> TrainedRecipe:
    """Run every stage of a recipe and write the artefact folder.

    Args:
        recipe: from `resolve_recipe`.
        dataset: anything `load_data` takes.
        output_dir: the artefact folder, replaced in one step when it exists; checkpoints go to `<output_dir>-checkpoints`.
        baselines: of "popularity", "item_graph", "sasrec_ce". SASRec is trained in a second process at the same time and
            kept as an artefact of its own in `<output_dir>-sasrec_ce`; an up-to-date one is used again.
        resume: go on from the newest checkpoint of an interrupted run, its finished identifiers included (see `kept`).
        test_users: rank a fixed random part of the test rows only (a shortened run; metrics.json says so).

    Raises:
        GenRecError: bad data, a recipe that does not fit it, a loss that is not finite.
    """
    folder = Path(output_dir)
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise RequestError(f"unknown baseline {unknown[0]!r}: choose from {', '.join(BASELINES)}, or none.")
    check_target(folder)
    stages = Stages(progress=progress)
    torch.manual_seed(seed)
    with stages("data"):
        data, split = load_data_section(
            recipe.data, dataset, items=items, data_dir=data_dir, require_text=recipe.needs_text()
        )
        notes = []
        if test_users is not None and test_users < len(split.test):
            rows = np.sort(np.random.default_rng(0).permutation(len(split.test))[:test_users])
            notes.append(f"shortened run: {test_users} of {len(split.test)} test rows were ranked")
            split = replace(split, test=split.test.take(rows))
        if progress:
            print("\n".join([str(data.report), *notes]), flush=True)
    pending, against_retriever = None, None
    if "sasrec_ce" in baselines and recipe.name != "sasrec":
        pending = baseline_runs.start_sasrec(
            folder.with_name(f"{folder.name}-sasrec_ce"),
            dataset,
            recipe,
            items=items,
            data_dir=data_dir,
            seed=seed,
            fingerprint=data_fingerprint(data, split),
        )
    checkpoints = folder.with_name(f"{folder.name}-checkpoints")
    try:
        with stages("identifiers"):
            identifiers = kept_identifiers(
                recipe, data, split, checkpoints, seed=seed, resume=resume, progress=progress
            )
        model = build_model(recipe, identifiers, seed=seed)
        tokenizer = identifiers.tokenizer  # a language model's own holds the catalogue beside its text
        generation = dict(recipe.generation)
        to_choose = [name for name in CHOICES if generation.get(name) == AT_VALIDATION]
        before = {"dense_weight": 0.5, "repeat_weight": 0.0}  # while it trains
        model.recommendation_config = RecommendationConfig(**generation | {name: before[name] for name in to_choose})
        settings: dict[str, Any] = {"output_dir": str(checkpoints), "seed": seed, "disable_tqdm": not progress}
        training = dict(recipe.training)
        method = METHODS[training.pop("method", "next_item")].load()
        method_options = training.pop("method_options", None) or {}
        args = RecommenderTrainingArguments(**settings | training)
        job = TrainingJob(
            recipe,
            identifiers.context,
            model,
            tokenizer,
            args,
            quantized=identifiers.quantized,
            user_ids=data.user_ids if tokenizer.num_user_tokens else None,
            resume=resume,
        )
        if compares(job):
            with stages("validation before training"):
                job.before = ranked_before(job)
        with stages("training"):
            processor_seconds = time.process_time()
            trained = method(job, **method_options)
            trained.summary["train_processor_seconds"] = round(time.process_time() - processor_seconds, 2)
        model, tokenizer = trained.model.eval(), trained.tokenizer
        if job.before is not None and "stages" not in trained.summary:  # a method of several compares each of them
            with stages("validation after training"):
                entries = judged(job.before, ranked(job, model, tokenizer, "after training"), progress)
            name = recipe.training.get("method", "next_item")
            trained.summary["stages"] = [{"method": name} | entries]
        notes += bucket_warnings(*(stage.get("buckets") for stage in _stages_of(trained.summary)))
        reads_newest = hasattr(model.config, "max_position_embeddings")
        if reads_newest and "sequence_training" in MODELS[recipe.model["type"]].gives:
            # these models cut to their newest positions themselves, and may use older items as "seen"
            model.recommendation_config = replace(model.recommendation_config, max_history=None)
        with stages("evaluation"):
            reached = choose_weights(model, tokenizer, split, to_choose, progress)
            report, variants = evaluate_model(model, tokenizer, data, split, recipe.name, progress)
        with stages("baselines"):
            reports = baseline_runs.evaluate_simple(baselines, data, split, ks=KS, progress=progress)
            if pending is not None:
                reports["sasrec_ce"] = pending.evaluate(data, split, ks=KS, progress=progress)
            retriever = getattr(model, "retriever", None)
            if retriever is not None:  # whose order a ranker changes: what it adds shows against this row
                reports["retriever"], _ = evaluate_model(retriever, tokenizer, data, split, "retriever", progress)
                against_retriever = compared(reports["retriever"], report, progress)
                notes += bucket_warnings(against_retriever)
    except BaseException:
        if pending is not None:
            pending.stop()
        raise
    metrics = collect_metrics(
        recipe,
        data,
        split,
        seed,
        report,
        variants,
        reports,
        trained_record(identifiers, tokenizer),
        reached,
        trained.summary,
        stages.seconds,
        notes,
        {"test": against_retriever} if against_retriever else None,
    )
    with stages("saving"):
        shown = [report, *variants.values(), *reports.values()]
        save(folder, recipe, model, tokenizer, data, metrics, shown, identifiers)
    if not keep_checkpoints:
        shutil.rmtree(checkpoints, ignore_errors=True)
    return TrainedRecipe(folder, model, tokenizer, data, split, report, variants, reports, metrics)


def _stages_of(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The list of training stages of a summary; a candidate ranker has a mapping of others."""
    stages = training.get("stages")
    return stages if isinstance(stages, list) else []


def data_fingerprint(data: RecommendationData, split: Split) -> str:
    """Identity of data and split: what an earlier baseline run must match to be used again."""
    digest = hashlib.sha256(f"{split.protocol}|{data.num_items}".encode())
    for part in (data.sequences.offsets, data.sequences.items, split.test.users, split.test.targets):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def evaluate_model(
    model: Any, tokenizer: ItemTokenizer, data: RecommendationData, split: Split, name: str, progress: bool
) -> tuple[EvaluationReport, dict[str, EvaluationReport]]:
    """Test report of the configured recommender, and of generation alone where a dense head takes part."""

    def measure(config: RecommendationConfig, label: str) -> EvaluationReport:
        return evaluate(
            ModelRecommender(model, tokenizer, config, user_ids=data.user_ids if tokenizer.num_user_tokens else None),
            split.test,
            num_items=data.num_items,
            ks=KS,
            train_counts=training_counts(split.train, data.num_items),
            repeats=data.repeats,
            name=label,
            progress=progress,
        )

    config = recommendation_config_of(model)
    report = measure(config, name)
    variants = {}
    if config.dense_weight:
        label = f"{name}, generation only"
        variants[label] = measure(config.merged(dense_weight=0.0), label)
    return report, variants


def collect_metrics(
    recipe: Recipe,
    data: RecommendationData,
    split: Split,
    seed: int,
    report: EvaluationReport,
    variants: dict[str, EvaluationReport],
    baselines: dict[str, EvaluationReport],
    health: dict[str, Any],
    chosen_weights: dict[str, dict[str, float]],
    training: dict[str, Any],
    seconds: dict[str, float],
    notes: list[str],
    buckets: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of metrics.json; `buckets` (part -> comparison) is a ranker's with its retriever."""
    differences = {
        name: {metric: report.compare(other, metric).to_dict() for metric in ("recall@10", "ndcg@10")}
        for name, other in baselines.items()
    }
    return build_metrics(
        dataset=data.name,
        protocol=split.protocol,
        seed=seed,
        test=report,
        baselines=baselines,
        identifiers=health,
        wall_seconds=dict(seconds),
        variants={name: variant.to_dict() for name, variant in variants.items()},
        differences=differences or None,
        data=data.report.to_dict(),
        split=dict(split.report),
        buckets=buckets,
        ties=tie_report(data, split),
        fingerprint=data_fingerprint(data, split),
        training={key: value for key, value in training.items() if value is not None},
        **{f"validation_ndcg10_by_{name}": values for name, values in chosen_weights.items()},
        status=recipe.status,
        notes=notes or None,
    )


def save(
    folder: Path,
    recipe: Recipe,
    model: Any,
    tokenizer: ItemTokenizer,
    data: RecommendationData,
    metrics: dict[str, Any],
    reports: list[EvaluationReport],
    identifiers: Identifiers,
) -> None:
    """Write the artefact in one step: with the quantizer, and with pictures where matplotlib is installed."""
    names = feature_names(recipe.identifiers.get("features", []), identifiers.context.blocks)
    vectors = identifiers.context.vectors(names) if names else None
    same = (
        tokenizer is identifiers.tokenizer and identifiers.quantized is not None
    )  # training may have made other codes
    features = None
    if same and names:
        takes = "item_features" in MODELS[recipe.model["type"]].gives
        model_names = feature_names(recipe.model.get("features"), identifiers.context.blocks) if takes else []
        features = item_features(identifiers.context, names, model_names)
    with tempfile.TemporaryDirectory() as scratch:
        picture = plot_results(reports, Path(scratch) / "results.png", required=False)
        beside = {}
        if same and identifiers.quantized is not None:
            for name, part in identifiers.quantized.files.items():
                beside[name] = Path(scratch) / name
                part.save(beside[name])
        save_artifact(
            folder,
            model=model,
            tokenizer=tokenizer,
            items=data.items,
            recipe=recipe.to_dict(),
            metrics=metrics,
            plots=identifier_pictures(tokenizer, vectors) | ({"results": picture.read_bytes()} if picture else {}),
            quantizer=identifiers.quantized.quantizer if same and identifiers.quantized is not None else None,
            item_features=features,
            quantizer_files=beside,
        )
