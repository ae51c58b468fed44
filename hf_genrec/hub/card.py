"""The model card: a README.md written from the recipe, the numbers and the catalogue, without the network.

Layout in `card_template.md` (Jinja2, values are inserted once and never read as a template). Item ids, titles and names
of data sets are strangers' text: everything goes through `markdown.py` before it gets near the card.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

from .card_metadata import base_of, card_metadata, check_card_data
from .card_results import data_statement, identifier_health, protocol, results, summary
from .data_terms import DATA_TERMS
from .markdown import clean, code, fenced, inline, table
from .metrics_file import check_metrics

TEMPLATE = Path(__file__).with_name("card_template.md")
README_NAME = "README.md"
# The folder argument of the snippets. `readme_for_repo` puts the Hub id in its place when the artefact is pushed.
HERE = '(".")'

_ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{4,5})(?:v\d+)?(?!\d)")
_DOI = re.compile(r"10\.\d{4,9}/[A-Za-z0-9._;()/:-]+")
_SHOWN_ITEMS = 5
_SHOWN_RECIPE = 20_000  # characters


@dataclass(frozen=True)
class ModelFacts:
    """What the card says of a model: from the live model, or from the files of a saved one.

    Args:
        name: class name. model_type: of its configuration. parameters: how many, None if unknown.
        library: "hf_genrec" or "transformers".
    """

    name: str
    model_type: str | None = None
    parameters: int | None = None
    library: str = "hf_genrec"

    @classmethod
    def of(cls, model: Any) -> ModelFacts:
        """Facts of a model object."""
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        count = model.num_parameters() if hasattr(model, "num_parameters") else None
        ours = type(model).__module__.split(".")[0] == "hf_genrec"
        return cls(type(model).__name__, model_type, count, "hf_genrec" if ours else "transformers")

    @classmethod
    def from_folder(cls, folder: Path) -> ModelFacts | None:
        """Facts of a saved model without building it; None where the folder has no model."""
        from .parts import model_class_of, read_config

        if not (folder / "config.json").exists():
            return None
        model_class, count = model_class_of(folder), 0
        for path in folder.glob("model*.safetensors"):
            with safe_open(path, framework="np") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        ours = model_class.__module__.split(".")[0] == "hf_genrec"
        model_type = read_config(folder).get("model_type")
        return cls(model_class.__name__, model_type, count or None, "hf_genrec" if ours else "transformers")


def model_card(
    *,
    model: Any = None,
    tokenizer: Any = None,
    items: Any = None,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    plots: Mapping[str, str] | None = None,
    card_data: Mapping[str, Any] | None = None,
) -> str:
    """Text of the README.md of an artefact: valid YAML front matter and Markdown, whatever the data is called.

    Args:
        model: for its type and size; a model or its `ModelFacts`.
        tokenizer: an item tokenizer; its ids appear in the usage snippet.
        items: `ItemTable`, for sample titles.
        recipe: as in `recipe.yaml`; shown whole, cited by the arXiv ids under `paper`/`papers`.
        metrics: as in `metrics.json`; without them the card says that nothing was measured.
        plots: caption -> path inside the artefact of PNG pictures.
        card_data: what only a person knows; keys in `card_metadata.CARD_DATA_KEYS`.

    Raises:
        ArtifactError: metrics or card data that do not fit their layout.
    """
    card_data, recipe = check_card_data(card_data), dict(recipe or {})
    metrics = check_metrics(metrics) if metrics is not None else None
    facts = model if model is None or isinstance(model, ModelFacts) else ModelFacts.of(model)
    title = clean(card_data.get("title") or _default_title(recipe, facts, metrics), 120)
    metadata = card_metadata(
        title=title,
        model_type=facts.model_type if facts else None,
        library_name=facts.library if facts else "hf_genrec",
        metrics=metrics,
        card_data=base_of(recipe) | card_data,
    )
    nothing = "Nothing was measured: this artefact has no `metrics.json`."
    sections = {
        "title": inline(title, 120),
        "description": _description(facts, tokenizer, recipe, card_data)
        + (f"\n\n{summary(metrics)}" if metrics else ""),
        "usage": usage(facts, tokenizer),
        "results": results(metrics, inline(title, 60)) if metrics else nothing,
        "protocol": protocol(metrics) if metrics else "None.",
        "identifiers": _identifiers(metrics, tokenizer, items),
        "data": data_statement(metrics, card_data),
        "training": _training(recipe, metrics),
        "limitations": _limitations(metrics, tokenizer, card_data),
        "pictures": "\n\n".join(f"![{inline(name, 80)}]({path})" for name, path in (plots or {}).items()),
        "citation": _citation(recipe, metrics, card_data),
    }
    card = str(ModelCard.from_template(metadata, template_path=str(TEMPLATE), **sections)).rstrip() + "\n"
    return readme_for_repo(card, card_data["repo_id"]) if card_data.get("repo_id") else card


def readme_for_repo(readme: str, repo_id: str) -> str:
    """The card with its snippets reading from the Hub instead of from the folder they stand in."""
    return readme.replace(f"load_artifact{HERE}", f'load_artifact("{repo_id}")').replace(
        f"from_pretrained{HERE}", f'from_pretrained("{repo_id}")'
    )


def _default_title(recipe: Mapping[str, Any], facts: ModelFacts | None, metrics: Mapping[str, Any] | None) -> str:
    name = recipe.get("name") or (facts.name if facts else "Item identifiers")
    return f"{name} on {metrics['dataset']}" if metrics else str(name)


def _naming(tokenizer: Any) -> str:
    if hasattr(tokenizer, "item_end_token"):
        return f"texts of at most {tokenizer.num_levels} tokens (vocabulary {tokenizer.codebook_sizes[0]:,})"
    sizes = list(tokenizer.codebook_sizes)
    if len(sizes) > 4 and len(set(sizes)) == 1:
        return f"{len(sizes)} codes each ({len(sizes)} codebooks of {sizes[0]})"
    if len(sizes) == 1:
        return f"one code each (of {sizes[0]:,})"
    return f"{len(sizes)} codes each (codebooks {' × '.join(map(str, sizes))})"


def _description(
    facts: ModelFacts | None, tokenizer: Any, recipe: Mapping[str, Any], card_data: Mapping[str, Any]
) -> str:
    if card_data.get("description"):
        return inline(card_data["description"], 600)
    parts = []
    if facts:
        size = f" with {facts.parameters:,} parameters" if facts.parameters else ""
        parts.append(f"A generative recommender ({code(facts.name)}{size}).")
    if hasattr(tokenizer, "num_items"):
        parts.append(
            f"It reads a history of item ids and generates the identifier of the next item, for a fixed catalogue of "
            f"{tokenizer.num_items:,} items named by {_naming(tokenizer)}."
        )
    if recipe.get("name"):
        status = f", status {code(recipe['status'])}" if recipe.get("status") else ""
        parts.append(f"Recipe: {code(recipe['name'])}{status}.")
    return " ".join(parts) or "Part of a generative recommender."


# --------------------------------------------------------------------------------------------------------------- usage


def usage(facts: ModelFacts | None, tokenizer: Any) -> str:
    """Two snippets of at most five lines that run from the folder of the card as they stand."""
    if facts is None or not hasattr(tokenizer, "item_ids"):
        return "See the [library](https://pypi.org/project/hf-genrec/) for how to load this folder."
    history = _history_literal(tokenizer)
    auto = next(
        (
            auto_class
            for suffix, auto_class in (
                ("ForConditionalGeneration", "Seq2SeqLM"),
                ("ForCausalLM", "CausalLM"),
                ("ForMaskedLM", "MaskedLM"),
            )
            if facts.name.endswith(suffix)
        ),
        None,
    )
    auto = f"AutoModelFor{auto}" if auto else "AutoModel"
    call = "model.recommend(" if facts.library == "hf_genrec" else "hf_genrec.recommend(model, "
    short = f"""
from hf_genrec.hub import load_artifact
artifact = load_artifact{HERE}
history = {history}
for item in artifact.recommend([history], k=10)[0]:
    print(item.rank, item.item_id, artifact.title(item.item_id), round(item.score, 3))
""".strip()
    objects = f"""
import hf_genrec
from transformers import {auto}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained{HERE}
model = {auto}.from_pretrained{HERE}
print({call}[{history}], tokenizer=tokenizer, k=10))
""".strip()
    return "\n\n".join(
        [
            "Install with `pip install hf_genrec`, then:",
            fenced(short, "python"),
            "The same with the objects of `transformers`:",
            fenced(objects, "python"),
        ]
    )


def _history_literal(tokenizer: Any) -> str:
    """Python source of a short list of item ids; ids of any form, so ASCII literals on one line."""
    ids = [ascii(str(item_id)) for item_id in tokenizer.item_ids[:100] if len(str(item_id)) <= 40][:2]
    return f"[{', '.join(ids)}]" if ids else "artifact.tokenizer.item_ids[:2]"


# ------------------------------------------------------------------------------------------------------------ sections


def _identifiers(metrics: Mapping[str, Any] | None, tokenizer: Any, items: Any) -> str:
    parts = [identifier_health((metrics or {}).get("identifiers") or {})]
    if hasattr(tokenizer, "num_items") and tokenizer.num_items:
        count = min(_SHOWN_ITEMS, tokenizer.num_items)
        titles = items.table["title"].slice(0, count).to_pylist() if items is not None else [""] * count
        rows = [
            [
                code(tokenizer.item_ids[i], 40, in_table=True),
                inline(titles[i], 60) or "no title",
                ", ".join(str(int(c)) for c in tokenizer.codes[i]),
            ]
            for i in range(count)
        ]
        parts += [
            "First items of the catalogue (`item_codes.safetensors`):",
            table(["Item id", "Title", "Codes"], rows, align_right_from=2),
        ]
    return "\n\n".join(parts)


def _training(recipe: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> str:
    parts = []
    seconds = {k: v for k, v in ((metrics or {}).get("wall_seconds") or {}).items() if isinstance(v, int | float)}
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=False, width=110)
        shown = text if len(text) <= _SHOWN_RECIPE else text[:_SHOWN_RECIPE] + "\n# shortened: see recipe.yaml"
        parts += ["Settings as resolved (`recipe.yaml`):", fenced(shown, "yaml")]
    else:
        parts.append("The settings are not recorded.")
    if seconds:
        rows = [[code(stage, 60, in_table=True), f"{value:,.1f}"] for stage, value in seconds.items()]
        parts.append(table(["Stage", "Seconds"], rows))
    return "\n\n".join(parts)


def _limitations(metrics: Mapping[str, Any] | None, tokenizer: Any, card_data: Mapping[str, Any]) -> str:
    lines = [
        "The catalogue is fixed: an item that is not in `item_codes.safetensors` can neither be read nor recommended.",
        "Offline ranking of held-out interactions is no measure of satisfaction, and logged interactions carry the "
        "exposure and popularity bias of the system that showed the items.",
        "Not audited for fairness between groups of users or of item providers.",
    ]
    identifiers = (metrics or {}).get("identifiers") or {}
    rate = identifiers.get("collision_rate")
    if isinstance(rate, int | float) and rate > 0:
        lines.append(
            f"{rate:.1%} of the items share their code with another item and are told apart by catalogue order only."
        )
    buckets = ((metrics or {}).get("test") or {}).get("buckets") or {}
    cold = buckets.get("cold") if isinstance(buckets, Mapping) else None
    if isinstance(cold, Mapping) and cold.get("targets"):
        value = next((cold[name] for name in ("recall@10", "ndcg@10") if isinstance(cold.get(name), int | float)), None)
        if value is not None:
            lines.append(
                f"Items without training interactions: Recall@10 {value:.4f} over {cold['targets']:,} targets."
            )
    if tokenizer is not None and getattr(tokenizer, "max_history", None):
        lines.append(f"Only the newest {int(tokenizer.max_history)} items of a history are read.")
    lines += [inline(entry, 400) for entry in _sentences(card_data.get("limitations"))]
    lines += [inline(note, 400) for note in _sentences((metrics or {}).get("notes"))]
    return "\n".join(f"- {line}" for line in lines)


def _sentences(value: Any) -> Sequence[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _citation(recipe: Mapping[str, Any], metrics: Mapping[str, Any] | None, card_data: Mapping[str, Any]) -> str:
    known = DATA_TERMS.get((metrics or {}).get("dataset", ""))
    sources = [recipe.get("paper"), recipe.get("papers"), card_data.get("papers"), known.papers if known else None]
    text = " ".join(str(source) for source in sources if source)
    entries = [
        f"@misc{{arxiv_{number.replace('.', '_')},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n"
        f"  url = {{https://arxiv.org/abs/{number}}}\n}}"
        for number in dict.fromkeys(_ARXIV.findall(_DOI.sub(" ", text)))
    ]
    entries += [
        f"@misc{{doi_{re.sub(r'[^0-9A-Za-z]', '_', doi)},\n  doi = {{{doi}}},\n  url = {{https://doi.org/{doi}}}\n}}"
        for doi in dict.fromkeys(match.rstrip(".;,)") for match in _DOI.findall(text))
    ]
    if not entries:
        return "The recipe names no paper."
    return "The papers behind the recipe and the data:\n\n" + fenced("\n\n".join(entries), "bibtex")
