"""Recommends from a merged language model and the JSON files of `export_catalogue` alone; hf_genrec cannot be imported here.

Usage: hub_serving_driver.py MODEL_FOLDER EXPORT_FOLDER REQUESTS_JSON BEAMS
REQUESTS_JSON: a list of histories (item ids); prints one JSON list of item ids per history, best first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_folder: str, export: str, requests: str, beams: int) -> None:
    assert not any(name.partition(".")[0] == "hf_genrec" for name in sys.modules)
    sys.modules["hf_genrec"] = None  # importing it is an error
    files = {path.stem: json.loads(path.read_text()) for path in Path(export).glob("*.json")}
    tree, prompt, items_of = files["allowed_prefixes"], files["prompt"], files["semantic_ids"]
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    plain = AutoTokenizer.from_pretrained(Path(export, "tokenizer"))
    names = {i: t for lv in files["item_tokens"]["levels"] for i, t in zip(lv["token_ids"], lv["tokens"])}
    ids_of_name = {name: token for token, name in names.items()}
    spelling_of = {item: text for text, shared in items_of.items() for item in shared}
    answers = []
    for history in json.loads(requests):
        ids = list(prompt["history_before"]["token_ids"])
        text = prompt["history_before"]["text"]
        for item in history[-prompt["max_history"] :] if prompt["max_history"] else history:
            text += spelling_of[item]
            ids += [ids_of_name[part + ">"] for part in spelling_of[item].split(">")[:-1]]
        ids += prompt["history_after"]["token_ids"]
        assert plain(text + prompt["history_after"]["text"], add_special_tokens=False).input_ids == ids
        alive, whole = [(0.0, 0, [])], []
        while alive:
            grown = []
            for score, node, answer in alive:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids + answer])).logits[0, -1].float()
                if prompt["scores"]["softmax"] == "whole vocabulary":
                    logps = logits.log_softmax(0)
                else:
                    level = torch.tensor(files["item_tokens"]["levels"][len(answer)]["token_ids"])
                    logps = torch.full_like(logits, -torch.inf)
                    logps[level] = logits[level].log_softmax(0)
                for child in range(tree["first_child"][node], tree["first_child"][node + 1]):
                    token = tree["token_ids"][child]
                    grown.append((score + float(logps[token]), child, [*answer, token]))
            grown = sorted(grown, key=lambda beam: -beam[0])[:beams]
            leaf = [tree["first_child"][node] == tree["first_child"][node + 1] for _, node, _ in grown]
            whole += [beam for beam, end in zip(grown, leaf) if end]
            alive = [beam for beam, end in zip(grown, leaf) if not end]
        found = []
        for _, _, answer in sorted(whole, key=lambda beam: -beam[0]):
            named = items_of["".join(names[token] for token in answer)]
            found += [item for item in named if not (prompt["scores"]["exclude_seen"] and item in history)]
        answers.append(found)
    print(json.dumps({"class": type(model).__module__ + "." + type(model).__name__, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
