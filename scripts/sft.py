r"""Fine-tune a language model on items: semantic IDs in its vocabulary, task families as rows (LC-Rec, arXiv 2311.09049).

    python scripts/sft.py --config examples/configs/sft_smollm2.yaml --model FOLDER --dataset movielens-100k
    accelerate launch --config_file examples/configs/accelerate/multi_gpu.yaml scripts/sft.py --config ...
    python scripts/sft.py --model FOLDER --dataset log.csv --items items.csv --output_dir runs/sft --lora_r 0 \
        --tasks '{"next_item": 1.0, "item_to_index": 0.5}' --num_train_epochs 4

Identifiers: --codes names an artefact of hf_genrec (its catalogue is taken), a folder of scripts/train_quantizer.py or an
array; without it a residual k-means is made of item texts and co-occurrence. The result is an artefact folder whose model is
the stock architecture, adapters merged; scripts/dpo.py and scripts/grpo.py go on from it.

Checkpoints go to <output_dir>-checkpoints and are removed after the save; --resume_from_checkpoint true goes on after an
interruption. --push_to_hub true --hub_model_id owner/name uploads the artefact. Every argument of ItemSFTConfig works.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_genrec.alignment.item_embeddings import INITS, add_item_tokens
from hf_genrec.alignment.tasks.families import TaskData
from hf_genrec.alignment.tasks.language_mixture import language_mixture, serving_texts
from hf_genrec.alignment.tasks.language_rows import STYLES, LanguageEncoder
from hf_genrec.alignment.trainers.item_sft import ItemSFTConfig, ItemSFTTrainer
from hf_genrec.alignment.trainers.language_model import context_of
from hf_genrec.cli.script_options import DataArguments, LoraArguments, parse, run_script
from hf_genrec.cli.script_record import as_recipe, checked_record, described_identifiers, searched
from hf_genrec.cli.script_run import ScriptRun
from hf_genrec.cli.script_start import data_section
from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.evaluation.catalogue import align_to_catalogue
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.hub import load_artifact
from hf_genrec.identifiers.collisions import COLLISION_POLICIES, resolve_collisions
from hf_genrec.identifiers.extend import extend_tokenizer
from hf_genrec.identifiers.quantizers.residual_kmeans import ResidualKMeans
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.recipes.pipeline import load_data_section
from hf_genrec.recipes.stages.context import StageContext
from hf_genrec.recipes.stages.features import cooccurrence_block, item_features, text_block

logger = logging.getLogger(__name__)


@dataclass
class ScriptArguments:
    """The base model, the identifiers, and what the rows say."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of the base language model."})
    dtype: str = field(
        default="float32", metadata={"help": "Of its weights.", "choices": ["float32", "bfloat16", "float16"]}
    )
    codes: str | None = field(
        default=None,
        metadata={
            "help": "Artefact folder, or codes (items, levels): .npy, .safetensors, a folder with codes.safetensors."
        },
    )
    features: list[str] = field(
        default_factory=lambda: ["text", "cooccurrence"], metadata={"help": "Without --codes: what k-means sees."}
    )
    text_encoder: str | None = field(default=None, metadata={"help": "Encoder of item texts; default MiniLM's wheel."})
    codebook_sizes: list[int] = field(
        default_factory=lambda: [64, 64, 64], metadata={"help": "Without --codes: codes per level."}
    )
    collisions: str = field(
        default="counter", metadata={"help": "What happens to shared codes.", "choices": list(COLLISION_POLICIES)}
    )
    item_init: str = field(default="text", metadata={"help": "Start of the item tokens' rows.", "choices": list(INITS)})
    tasks: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Task families and weights: a mapping in YAML, JSON here. Default: next_item alone."},
    )
    style: str = field(default="plain", metadata={"help": "Rows as plain text or as chat.", "choices": list(STYLES)})
    system: str | None = field(default=None, metadata={"help": "System text of the prompts."})
    windows: bool = field(default=True, metadata={"help": "next_item rows hold whole windows, each item a target."})
    end_items: bool = field(default=False, metadata={"help": "End item answers with the end token, as LC-Rec does."})
    num_candidates: int = field(default=20, metadata={"help": "Titles in candidate lists."})

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str):
            try:
                self.tasks = json.loads(self.tasks)
            except ValueError as error:
                raise RequestError(f"--tasks is no JSON mapping ({error}): {self.tasks}") from error
        if self.tasks is None:
            self.tasks = {"next_item": 1.0}
        given = self.tasks.values() if isinstance(self.tasks, dict) else [None]
        weights = [one.get("weight") if isinstance(one, dict) else one for one in given]
        if not all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights):
            raise RequestError(f"tasks must map families to weights, such as next_item: 1.0; got {self.tasks!r}.")


def catalogue_of(codes: str | None) -> Any:
    """The tokenizer of an artefact named by --codes, None for anything else."""
    if codes is None or not (Path(codes) / "tokenizer_config.json").is_file():
        return None
    tokenizer = load_artifact(codes).tokenizer
    if not hasattr(tokenizer, "codes"):
        raise IncompatibleComponentsError(f"{codes}: its tokenizer carries no catalogue; name another artefact.")
    return tokenizer


def read_codes(path: str) -> tuple[np.ndarray, list[int] | None]:
    """Codes (items, levels) of a file, and codebook sizes where it has them."""
    file = Path(path) / "codes.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise IncompatibleComponentsError(f"{file} does not exist: give --codes an artefact folder or a file of codes.")
    if file.suffix == ".npy":
        return np.load(file, allow_pickle=False), None
    tensors = load_file(file)
    if "codes" not in tensors:
        raise IncompatibleComponentsError(f"{file} has no tensor 'codes', only {', '.join(sorted(tensors))}.")
    sizes = tensors.get("codebook_sizes")
    return tensors["codes"], None if sizes is None else sizes.tolist()


def identifiers(script: ScriptArguments, data: Any, split: Any, seed: int, progress: bool) -> tuple[Any, Any, dict]:
    """Item tokenizer, codebooks (None for codes that come from elsewhere), and the quantizer for the artefact."""
    known = catalogue_of(script.codes)
    if known is not None:
        return ItemTokenizer.from_codes(known.item_ids, known.codes, codebook_sizes=known.codebook_sizes), None, {}
    if script.codes is not None:
        codes, sizes = read_codes(script.codes)
        if len(codes) != data.num_items:
            raise IncompatibleComponentsError(
                f"{script.codes} has codes for {len(codes)} items, the data has {data.num_items}: make them from the same "
                "item table (same filters, same order)."
            )
        return ItemTokenizer.from_codes(data.item_ids, codes, codebook_sizes=sizes), None, {}
    context = StageContext(data, split, seed=seed, progress=progress)
    makers = {
        "text": lambda: text_block(context, encoder=script.text_encoder, when_missing="skip"),
        "cooccurrence": lambda: cooccurrence_block(context, dim=min(64, data.num_items - 1)),
    }
    for name in script.features:
        if name not in makers:
            raise RequestError(f"--features {name!r}: choose of {', '.join(makers)}.")
        block = makers[name]()
        if block is not None:
            context.blocks[name] = block
    names = [name for name in script.features if name in context.blocks]
    vectors = context.vectors(script.features)
    quantizer = ResidualKMeans(script.codebook_sizes, seed=seed, pca_dim=min(32, *vectors.shape), max_load=2.0)
    quantizer.fit(vectors)
    codes, sizes = resolve_collisions(
        quantizer.encode(vectors),
        quantizer.codebook_sizes,
        script.collisions,
        codebooks=quantizer.codebooks,
        features=quantizer.transform(vectors),
    )
    books = [np.asarray(book) for book in quantizer.codebooks]
    fitting = [book if len(book) == size else None for book, size in zip(books, sizes)]
    kept = {"quantizer": quantizer, "item_features": item_features(context, names, [])}
    tokenizer = ItemTokenizer.from_codes(data.item_ids, codes, codebook_sizes=sizes)
    return tokenizer, [*fitting, *[None] * (len(sizes) - len(fitting))], kept


def described(script: ScriptArguments, tokenizer: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Title, and the sections `features` and `identifiers` of the recipe: those of the artefact that --codes names, of the
    k-means made here, or for codes of a file a k-means of the same sizes, which the title says.
    """
    title = "Supervised fine-tuning of a language model on items"
    if script.codes is None:
        text = {"when_missing": "skip"}
        if script.text_encoder is not None and not Path(script.text_encoder).exists():
            text["encoder"] = script.text_encoder
        blocks = {"text": text, "cooccurrence": {"dim": min(64, tokenizer.num_items - 1)}}
        sizes = list(script.codebook_sizes)
        kind = {"quantizer": "residual_kmeans", "features": list(script.features), "codebook_sizes": sizes}
        kind |= {"pca_dim": 32, "max_load": 2.0, "collisions": script.collisions}
        return title, {name: blocks[name] for name in script.features}, kind
    if catalogue_of(script.codes) is not None:
        recipe = load_artifact(script.codes).recipe or {}
        if recipe.get("identifiers"):
            return title, recipe.get("features") or {}, recipe["identifiers"]
    return f"{title}; a k-means stands for the codes of {Path(script.codes).name}", *described_identifiers(tokenizer)


def encoder_of(script: ScriptArguments, args: ItemSFTConfig, tokenizer: Any, model: Any) -> LanguageEncoder:
    """Rows as token ids, none longer than what the model reads."""
    length = args.max_length or 1024
    return LanguageEncoder(
        tokenizer,
        style=script.style,
        max_length=min(length, context_of(model) or length),
        system=script.system,
        end_items=script.end_items,
    )


def load_base(script: ScriptArguments) -> tuple[Any, Any]:
    """Tokenizer and model of the base folder or Hub id."""
    if script.model is None:
        raise RequestError("--model is missing: name the folder or Hub id of a language model.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(script.model)
        return tokenizer, AutoModelForCausalLM.from_pretrained(script.model, dtype=getattr(torch, script.dtype))
    except (OSError, ValueError) as error:
        raise IncompatibleComponentsError(
            f"--model {script.model} cannot be loaded as a causal language model ({str(error).splitlines()[0]})."
        ) from error


def main(
    script: ScriptArguments, data_args: DataArguments, lora: LoraArguments, args: ItemSFTConfig
) -> dict[str, Any] | None:
    """Data, identifiers, model, training, ranking, artefact. Returns metrics.json's content (main process only)."""
    run = ScriptRun.begin(args, data_args)
    progress = not args.disable_tqdm and run.is_main

    with run.stage("data"):
        if data_args.dataset is None:
            raise RequestError("--dataset is missing: name a data set, such as movielens-100k, or the path of a log.")
        section = data_section(data_args)
        known = catalogue_of(script.codes)
        data, split = load_data_section(
            section,
            data_args.dataset,
            items=data_args.items,
            data_dir=data_args.data_dir,
            align=None if known is None else lambda data: align_to_catalogue(data, known.item_ids),
        )
        run.say(data.report)

    with run.stage("identifiers"):
        items, codebooks, quantizer = identifiers(script, data, split, args.seed, progress)

    with run.stage("model"):
        base_tokenizer, base = load_base(script)
        tokenizer = extend_tokenizer(base_tokenizer, items)
        before, after = serving_texts(encoder_of(script, args, tokenizer, base), windows=script.windows)
        tokenizer = extend_tokenizer(base_tokenizer, items, history_before=before, history_after=after)
        encoder = encoder_of(script, args, tokenizer, base)
        start: dict[str, Any] = {"init": script.item_init, "seed": args.seed}
        if script.item_init == "text" and data.items is not None:
            start["item_texts"] = data.items.titles()
        elif script.item_init == "codebook" and codebooks is not None:
            start["codebooks"] = codebooks
        elif script.item_init != "mean":
            logger.warning(
                "item tokens start from the mean of the old ones: nothing for --item_init %s", script.item_init
            )
            start["init"] = "mean"

        def build(model: Any) -> Any:
            add_item_tokens(model, tokenizer, **start)
            model.recommendation_config = RecommendationConfig(num_beams=data_args.test_num_beams or 20)
            torch.manual_seed(args.seed)  # the adapters' random matrices
            return lora.apply(model, tokenizer)

        model = build(base)
        run.say(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters train")

    rows = language_mixture(
        TaskData.from_split(data, split),
        encoder,
        script.tasks,
        max_history=args.max_history or 20,
        windows=script.windows,
        num_candidates=script.num_candidates,
        seed=args.seed,
    )
    run.say(f"rows per epoch: {rows.counts}")
    trainer = ItemSFTTrainer(
        model,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        ranking_dataset=None if args.eval_strategy == "no" else split.validation,
    )
    trained, summary = run.train(trainer, rebuild=lambda: build(load_base(script)[1]))
    if trained is None:
        return None

    with run.stage("evaluation"):
        untouched = build(load_base(script)[1])
        untouched.recommendation_config = recommendation_config_of(trained)
        untrained = run.rank(untouched, tokenizer, data, split, "before")
        reports = run.rank(trained, tokenizer, data, split, "sft")
        run.say(reports["test"])

    names = ("dtype", "item_init", "style", "system", "windows", "end_items")
    base_name = Path(script.model).name if Path(script.model).exists() else script.model
    options = {"families": script.tasks, "item_head": args.item_head, "num_candidates": script.num_candidates}
    stage, other = as_recipe("sft", options, args)
    other.pop("max_length", None)  # of the model's section
    title, features, kind = described(script, tokenizer)
    recipe = {
        "name": "sft",
        "title": title,
        "status": "smoke",
        "stage": "alignment",
        "paper": ["2311.09049"],
        "data": section,
        "features": features,
        "identifiers": kind,
        "model": {"type": "causal_lm", "base": base_name, "lora": lora.record(), "max_length": encoder.max_length}
        | {name: getattr(script, name) for name in names},
        "training": {"method": "sft", "method_options": stage["options"]} | stage["training"],
        "generation": searched(recommendation_config_of(trained)),
    }
    return run.save(
        trained,
        tokenizer,
        data,
        split,
        reports,
        untrained,
        summary=summary | {"method": "sft", "rows_per_family": rows.counts, "other_settings": other},
        recipe=checked_record(recipe),
        **quantizer,
    )


def parse_line(words: list[str] | None = None) -> tuple[Any, ...]:
    """The four groups of options."""
    return parse((ScriptArguments, DataArguments, LoraArguments, ItemSFTConfig), __doc__, words)


if __name__ == "__main__":
    run_script(parse_line, main)
