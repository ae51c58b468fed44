"""The catalogue of an artefact as JSON, for servers that know nothing of this library (vLLM, SGLang, your own loop).

A fine-tuned language model keeps its stock architecture (adapters are merged), so any engine loads its folder. What the
engine lacks is the catalogue: which tokens spell an item, which token may follow, which items a spelling names, and how a
prompt is written. `export_catalogue` writes that down:

* `semantic_ids.json`: spelling of an item -> the item ids that have it (several where items share a code);
* `item_tokens.json`: token ids and token strings of every level;
* `allowed_prefixes.json`: the prefix tree of all spellings, as flat lists (below);
* `prompt.json`: what stands around a history, an example as text and as token ids, when to stop, how scores are made;
* `tokenizer/`: the text tokenizer as a plain fast tokenizer, for installations that do not know our class;
* `README.md`: the limits.

The prefix tree. Node 0 is the empty prefix. The children of node n are the nodes `first_child[n]` up to, not including,
`first_child[n + 1]`; `token_ids[m]` is the token that leads to node m. A node without children is a whole item. `ends`
lists the nodes with children that are a whole item too (items of different length).

Shape legend: N items, L levels, X distinct spellings.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hf_genrec.artifacts import check_safe, recover, staged_folder, verify_manifest
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.identifiers.catalogue import item_token

from .artifact import Artifact
from .parts import load_tokenizer, read_config
from .serving_text import serving_readme

SEMANTIC_IDS, ITEM_TOKENS, PREFIXES, PROMPT = (
    "semantic_ids.json",
    "item_tokens.json",
    "allowed_prefixes.json",
    "prompt.json",
)
PREFIX_FORMAT = "hf_genrec.prefix_tree.1"
TOKENIZER_FOLDER = "tokenizer"
# of tokenizer_config.json, what a plain fast tokenizer understands
_PLAIN_OPTIONS = (
    "bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length", "padding_side",
    "clean_up_tokenization_spaces", "model_input_names",
)  # fmt: skip
_CHAT_TEMPLATE = "chat_template.jinja"
_EXAMPLE_ITEMS = 3


def export_catalogue(folder_or_artifact: str | os.PathLike | Artifact, output_dir: str | os.PathLike) -> Path:
    """Write the catalogue of an artefact for serving elsewhere; the folder is written whole or not at all.

    Args:
        folder_or_artifact: artefact folder, Hub id, or a loaded `Artifact`. Weights are not read.
        output_dir: folder to make; an earlier export there is replaced.

    Returns:
        `output_dir`.

    Raises:
        ArtifactError: no artefact, or an `output_dir` that holds something else.
        IncompatibleComponentsError: a tokenizer without a catalogue, or one whose items have no tokens of their own.

    Example: `export_catalogue("runs/sft", "runs/sft-serving")`
    """
    folder, tokenizer = _opened(folder_or_artifact)
    if not hasattr(tokenizer, "item_token_table"):
        raise IncompatibleComponentsError(f"{folder}: {type(tokenizer).__name__} carries no catalogue to export.")
    expected_NL = np.where(tokenizer.codes < 0, -1, tokenizer.codes + tokenizer.level_offsets)
    if (tokenizer.num_levels > 1 and not tokenizer.level_offsets.any()) or not np.array_equal(
        tokenizer.item_token_table, expected_NL
    ):  # fmt: skip
        raise IncompatibleComponentsError(
            f"{folder}: items of a {type(tokenizer).__name__} are spelled with tokens that levels share, not with tokens of "
            "their own: export an artefact with semantic IDs."
        )
    output = Path(output_dir)
    _check_output(output, folder)
    table_NL = np.asarray(tokenizer.item_token_table)
    tree = prefix_tree(table_NL)
    prompt = prompt_facts(tokenizer, RecommendationConfig.from_pretrained(folder, local_files_only=True))
    with staged_folder(output) as staged:
        _write(staged / SEMANTIC_IDS, semantic_ids(tokenizer))
        _write(staged / ITEM_TOKENS, item_tokens_by_level(tokenizer))
        _write(staged / PREFIXES, tree)
        _write(staged / PROMPT, prompt)
        plain = _plain_tokenizer(folder, staged / TOKENIZER_FOLDER)
        text = serving_readme(
            **_architecture(folder),
            num_items=tokenizer.num_items,
            num_spellings=len(np.unique(table_NL, axis=0)),
            levels=tokenizer.num_levels,
            nodes=len(tree["token_ids"]),
            prompt=prompt,
            plain_tokenizer=plain,
        )
        (staged / "README.md").write_text(text, encoding="utf-8")
    return output


def semantic_ids(tokenizer: Any) -> dict[str, list[str]]:
    """Spelling ("<a_12><b_3>") -> ids of the items that have it, in catalogue order.

    Example:
        >>> from hf_genrec.identifiers.tokenization_item import ItemTokenizer
        >>> semantic_ids(ItemTokenizer.from_codes(["x", "y", "z"], [[0, 1], [1, 0], [0, 1]]))
        {'<a_0><b_1>': ['x', 'z'], '<a_1><b_0>': ['y']}
    """
    named: dict[str, list[str]] = {}
    for item_id, codes in zip(tokenizer.item_ids, tokenizer.codes.tolist()):
        text = "".join(item_token(level, code) for level, code in enumerate(codes) if code >= 0)
        named.setdefault(text, []).append(item_id)
    return named


def item_tokens_by_level(tokenizer: Any) -> dict[str, Any]:
    """Token ids and token strings of each level, code 0 first."""
    levels = []
    for level, (offset, size) in enumerate(zip(tokenizer.level_offsets.tolist(), tokenizer.codebook_sizes)):
        tokens = [item_token(level, code) for code in range(size)]
        levels.append({"level": level, "token_ids": list(range(offset, offset + size)), "tokens": tokens})
    return {"levels": levels}


def prefix_tree(table_NL: np.ndarray) -> dict[str, Any]:
    """The prefix tree of token ids (N, L), -1 behind shorter items, in the form of the module's text.

    Example:
        >>> tree = prefix_tree(np.array([[7, 9], [7, 8], [6, 9]]))
        >>> tree["token_ids"], tree["first_child"]
        ([-1, 6, 7, 9, 8, 9], [1, 3, 4, 6, 6, 6, 6])
    """
    rows_XL = np.unique(np.asarray(table_NL, np.int64), axis=0)
    token_ids, counts, ends = [-1], [], []
    parents_X, first = np.zeros(len(rows_XL), np.int64), 0  # node of each spelling at the level before; its first node
    for level in range(rows_XL.shape[1]):
        going_X = rows_XL[:, level] >= 0
        keys_n2 = np.stack([parents_X[going_X], rows_XL[going_X, level]], axis=1)
        nodes_M2, places_n = np.unique(keys_n2, axis=0, return_inverse=True)
        number = len(token_ids) - first  # nodes of the level before
        children = np.bincount(nodes_M2[:, 0] - first, minlength=number)
        stopped = np.unique(parents_X[~going_X]) if level else np.zeros(0, np.int64)
        ends += [int(node) for node in stopped if node >= first and children[node - first]]
        counts += children.tolist()
        first = len(token_ids)
        token_ids += nodes_M2[:, 1].tolist()
        parents_X = parents_X.copy()
        parents_X[going_X] = first + places_n.reshape(-1)
    counts += [0] * (len(token_ids) - first)
    first_child = (1 + np.concatenate([[0], np.cumsum(counts)])).tolist()
    return {"format": PREFIX_FORMAT, "token_ids": token_ids, "first_child": first_child, "ends": ends}


def prompt_facts(tokenizer: Any, config: RecommendationConfig) -> dict[str, Any]:
    """How a prompt is written and an answer is read."""
    before, after = tokenizer._history_template()
    history = list(tokenizer.item_ids[:_EXAMPLE_ITEMS])
    encoded = tokenizer.encode_histories([history], padding=False, return_tensors=None, max_items=config.max_history)
    ids = [int(token) for token in encoded["input_ids"][0]]
    shown = tokenizer.decode_histories([ids])[0]
    texts = ["".join(item_token(level, int(code)) for level, code in enumerate(tokenizer.item_to_codes(item)) if code >= 0)
             for item in history[len(history) - len(shown):]]  # fmt: skip
    end = tokenizer.eos_token_id if tokenizer.history_eos else None
    text = f"{getattr(tokenizer, 'history_before', '')}{''.join(texts)}"
    text += f"{'' if end is None else tokenizer.eos_token}{getattr(tokenizer, 'history_after', '')}"
    return {
        "history_before": {"text": getattr(tokenizer, "history_before", ""), "token_ids": list(before)},
        "history_after": {"text": getattr(tokenizer, "history_after", ""), "token_ids": list(after)},
        "history_end_token_id": end,
        "item_separator": "",
        "max_history": config.max_history if config.max_history is not None else tokenizer.max_history,
        "max_history_tokens": tokenizer.max_history_tokens,
        "user_tokens": tokenizer.num_user_tokens,
        "example": {
            "history": history[len(history) - len(shown) :],
            "text": text,
            "token_ids": ids,
            "text_gives_token_ids": _read_back(tokenizer, text) == ids,
        },
        "stop": {
            "max_new_tokens": tokenizer.num_levels,
            "rule": "stop at a node without children: the item is whole. No end token follows.",
        },
        "scores": {
            "softmax": "codes of the level" if config.restrict_to_level else "whole vocabulary",
            "renormalised_over_legal_tokens": config.renormalize,
            "num_beams": config.num_beams,
            "exclude_seen": config.exclude_seen,
        },
        "special_tokens": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
    }


# --------------------------------------------------------------------------------------------------------------- parts


def _opened(source: Any) -> tuple[Path, Any]:
    if isinstance(source, Artifact):
        return source.folder, source.tokenizer
    folder = Path(source)
    recover(folder)
    if not folder.is_dir():
        if folder.exists() or str(source).count("/") > 1:
            raise ArtifactError(f"{source} is not a folder: give an artefact folder or a Hub id like 'owner/name'.")
        from .remote import pull_artifact

        folder = pull_artifact(str(source))
    check_safe(folder)
    verify_manifest(folder)
    if not (folder / "tokenizer_config.json").exists():
        raise ArtifactError(f"{folder} has no tokenizer: give an artefact folder with its catalogue.")
    return folder, load_tokenizer(folder)


def _check_output(output: Path, folder: Path) -> None:
    """Only an earlier export is ever replaced."""
    if output.resolve() == folder.resolve():
        raise ArtifactError(f"{output} is the artefact itself: name another folder for the export.")
    if output.is_dir() and any(output.iterdir()) and not ((output / PREFIXES).exists() and (output / PROMPT).exists()):
        raise ArtifactError(
            f"{output} holds {next(output.iterdir()).name} and no earlier export: name an empty folder."
        )


def _architecture(folder: Path) -> dict[str, Any]:
    """The model's class, whether transformers has it, and whether it has an encoder of its own."""
    if not (folder / "config.json").exists():
        return {"architecture": None, "stock": False, "encoder_decoder": False}
    import transformers

    config = read_config(folder)
    name = (config.get("architectures") or [None])[0]
    stock = isinstance(name, str) and hasattr(transformers, name)
    return {"architecture": name, "stock": stock, "encoder_decoder": bool(config.get("is_encoder_decoder"))}


def _plain_tokenizer(folder: Path, target: Path) -> bool:
    """Copy of the text tokenizer under the class that every version of transformers has; False where there is none."""
    if not (folder / "tokenizer.json").exists():
        return False
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    target.mkdir()
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
    if (folder / _CHAT_TEMPLATE).exists():
        shutil.copyfile(folder / _CHAT_TEMPLATE, target / _CHAT_TEMPLATE)
    kept = {name: config[name] for name in _PLAIN_OPTIONS if config.get(name) is not None}
    _write(target / "tokenizer_config.json", {**kept, "tokenizer_class": "PreTrainedTokenizerFast"})
    return True


def _read_back(tokenizer: Any, text: str) -> list[int] | None:
    """Token ids that the tokenizer reads in a text, None for one that reads no text."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except (TypeError, ValueError, NotImplementedError):
        return None


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")


__all__ = ["export_catalogue", "item_tokens_by_level", "prefix_tree", "prompt_facts", "semantic_ids"]
