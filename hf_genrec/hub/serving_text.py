"""README of a catalogue export: how to serve the model elsewhere, and what does not work there."""

from __future__ import annotations

import json
from typing import Any

_WALK = '''import json

tree = json.load(open("allowed_prefixes.json"))

def next_tokens(answer):
    """Token ids that may follow these answer tokens; empty: the item is whole."""
    node = 0
    for token in answer:
        children = range(tree["first_child"][node], tree["first_child"][node + 1])
        node = next(child for child in children if tree["token_ids"][child] == token)
    return tree["token_ids"][tree["first_child"][node] : tree["first_child"][node + 1]]'''


def serving_readme(
    *,
    architecture: str | None,
    stock: bool,
    encoder_decoder: bool,
    num_items: int,
    num_spellings: int,
    levels: int,
    nodes: int,
    prompt: dict[str, Any],
    plain_tokenizer: bool,
) -> str:
    """Markdown text.

    Args:
        architecture: class of the model; None where the artefact has none.
        stock: does transformers have that class?
        encoder_decoder: does it read prompts with an encoder of its own?
        num_items, num_spellings, levels, nodes: of the catalogue.
        prompt: content of `prompt.json`.
        plain_tokenizer: is there a `tokenizer/` folder?
    """
    parts = ["# Catalogue for serving", _contents(num_items, num_spellings, levels, nodes, plain_tokenizer)]
    parts += ["## Model", _model(architecture, stock, encoder_decoder, plain_tokenizer)]
    parts += ["## Prompt", _prompt(prompt)]
    parts += ["## Answer", _answer(prompt, levels)]
    parts += ["```python\n" + _WALK + "\n```", "## Limits", _limits(prompt, num_items, num_spellings, stock)]
    return "\n\n".join(parts) + "\n"


def _contents(num_items: int, num_spellings: int, levels: int, nodes: int, plain: bool) -> str:
    lines = [
        f"{num_items:,} items, {num_spellings:,} spellings of up to {levels} tokens.",
        "",
        "- `semantic_ids.json`: spelling -> item ids.",
        "- `item_tokens.json`: token ids and strings of each level.",
        f"- `allowed_prefixes.json`: prefix tree of {nodes:,} nodes. The children of node n are the nodes `first_child[n]` up "
        "to, not including, `first_child[n + 1]`; `token_ids[m]` leads to node m; node 0 is the empty prefix. `ends`: nodes "
        "that are a whole item although longer ones go on there.",
        "- `prompt.json`: what stands around a history, an example, the stop rule, how scores are made.",
    ]
    return "\n".join([*lines, "- `tokenizer/`: the text tokenizer as a plain fast tokenizer."] if plain else lines)


def _model(architecture: str | None, stock: bool, encoder_decoder: bool, plain: bool) -> str:
    if architecture is None:
        return "The artefact has no model: this export serves any model that was trained on its tokens."
    if not stock:
        return (
            f"`{architecture}` is an architecture of hf_genrec: general engines do not load it. Serve it with hf_genrec; the "
            "files here still describe its catalogue."
        )
    if encoder_decoder:
        return (
            f"`{architecture}` is a stock encoder-decoder: plain transformers loads the artefact folder, engines for causal "
            "language models do not. The prompt goes to the encoder, the answer starts with the decoder's start token."
        )
    text = (
        f"`{architecture}` is a stock architecture with merged weights: vLLM, SGLang and plain transformers load the artefact "
        "folder as it is, without hf_genrec. The embedding table already holds the item tokens."
    )
    if plain:
        text += (
            " Its `tokenizer_config.json` names a class of hf_genrec; recent versions of transformers fall back to the plain "
            "class, older ones stop. Point the engine at `tokenizer/` then (vLLM: `--tokenizer`), or feed token ids only."
        )
    return text


def _prompt(prompt: dict[str, Any]) -> str:
    example = prompt["example"]
    text = (
        "Feed token ids: `history_before`, then the tokens of the items, oldest first and without a separator, then "
        "`history_after`. vLLM takes them as `prompt_token_ids`, SGLang as `input_ids`. Nothing else is put in front: an engine "
        "that tokenises text itself may add a start token, and a server's chat route would write its template around it."
    )
    text += f"\n\nThe example, {json.dumps(example['history'])}, is `{json.dumps(example['token_ids'])}`."
    if example["text_gives_token_ids"]:
        text += " As text, without added special tokens, it gives the same ids."
    else:
        text += " Its text does not give the same ids with this tokenizer: feed ids."
    return text


def _answer(prompt: dict[str, Any], levels: int) -> str:
    scores = prompt["scores"]
    among = "the tokens of one level only" if scores["softmax"] != "whole vocabulary" else "the whole vocabulary"
    lines = [
        f"An item is at most {levels} tokens; it ends at a node without children, no end token follows. Only tokens that the "
        "prefix tree allows may be chosen: mask all others in every step, by a logits processor that walks the tree.",
        "",
        f"Scores are log-probabilities over {among}, taken before the mask and summed over the tokens"
        + (", then divided by what is legal." if scores["renormalised_over_legal_tokens"] else "."),
    ]
    if scores["exclude_seen"]:
        lines.append(
            "`recommend` leaves out items of the user's own history: take such leaves out of the tree per request, or skip them."
        )
    return "\n".join(lines)


def _limits(prompt: dict[str, Any], num_items: int, num_spellings: int, stock: bool) -> str:
    limits = [
        "Without the prefix tree the model can spell items that do not exist. A list of choices or a regular expression over "
        "spellings does the same for small catalogues, where the engine's grammar knows special tokens: item tokens are "
        "special tokens, and grammar back ends that leave those out cannot spell an item.",
        "Item tokens are special tokens, so detokenisers leave them out: read the answer's token ids, or set "
        "`skip_special_tokens=False`. They are read back as one token each only by this tokenizer.",
        "Text of strangers (titles, questions) must not be pasted into a prompt as text: a title that contains an item token "
        "or a chat marker would become one. Encode it apart, with special tokens split.",
        "A chat template of the base model is not applied to this prompt; whatever of it training used is in `history_before` "
        "and `history_after` already.",
        "One greedy answer is one item. For a ranked list search with beams (width in `prompt.json`) or ask for several.",
    ]
    if num_spellings < num_items:
        limits.append(
            f"{num_items - num_spellings:,} items share their spelling with another: `semantic_ids.json` lists all of them, and "
            "the model cannot tell them apart. `recommend` returns them in the order of the list."
        )
    if prompt["user_tokens"]:
        limits.append(
            f"{prompt['user_tokens']} user tokens exist; prompts here have none. With one it stands between `history_before` and "
            "the first item."
        )
    if prompt["history_end_token_id"] is not None:
        limits.append(f"Token {prompt['history_end_token_id']} stands between the last item and `history_after`.")
    limits.append("New items need new tokens or codes and a new export: both belong to one version of the model.")
    if stock:
        limits.append(
            "The engines named here were not run when this was written; the files were tested with transformers."
        )
    return "\n".join(f"- {limit}" for limit in limits)
