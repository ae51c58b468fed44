"""Load from a fake Hub in a fresh process with a fresh cache, and meet every way it can fail. Run by test_remote.py."""

from __future__ import annotations

import json
import sys

from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

import hf_genrec
from hf_genrec.errors import ArtifactError
from hf_genrec.hub import load_artifact, pull_artifact

HISTORIES = [["B0001", "B0002"], ["B0020"]]
fail = {}


def named(rows) -> list:
    return [[(r.item_id, r.score) for r in row] for row in rows]


artifact = load_artifact("tester/artefact")
answer = {
    "artifact": named(artifact.recommend(HISTORIES, k=5)),
    "default_k": len(artifact.recommend(HISTORIES)[0]),
    "title": artifact.title("B0004"),
    "dataset": artifact.metrics["dataset"],
}
for repo_id in ("tester/artefact", "tester/pieces"):
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    model = AutoModelForSeq2SeqLM.from_pretrained(repo_id)
    assert AutoModel.from_pretrained(repo_id).config.model_type == "tiger"
    answer[repo_id] = named(model.recommend(HISTORIES, tokenizer=tokenizer, k=5))
    answer[f"{repo_id} by function"] = named(hf_genrec.recommend(model, HISTORIES, tokenizer=tokenizer, k=5))
    answer[f"{repo_id} default k"] = model.recommendation_config.k
for name, repo_id, options in (
    ("missing", "tester/nothing", {}),
    ("private", "tester/secret", {"token": False}),
    ("revision", "tester/artefact", {"revision": "no-such-branch"}),
    ("pieces", "tester/pieces", {}),
    ("damaged", "tester/damaged_remote", {}),
    ("unsafe", "tester/unsafe_remote", {}),
    ("down", "tester/down", {}),
    ("name", "tester/a/b", {}),
):
    try:
        pull_artifact(repo_id, sys.argv[1], **options)
    except ArtifactError as error:
        fail[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answer | {"fail": fail}))
