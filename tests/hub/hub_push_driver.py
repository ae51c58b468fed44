"""Push to a fake Hub as a user would: a whole artefact, then model and tokenizer alone. Run by test_remote.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hub_samples import make_items, make_metrics, make_model, make_tokenizer

from hf_genrec.errors import ArtifactError, UnsafeArtifactError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.hub import load_artifact, pull_artifact, push_artifact, save_artifact
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

HISTORIES = [["B0001", "B0002"], ["B0020"]]
folder, fail = Path(sys.argv[1]), {}


def refused(name: str, call, error=ArtifactError) -> None:
    try:
        call()
    except error as found:
        fail[name] = str(found)


tokenizer = make_tokenizer()
tiny = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1}
tiger = TigerForConditionalGeneration(TigerConfig.from_tokenizer(tokenizer, **tiny)).eval()
tiger.recommendation_config = RecommendationConfig(k=6)

# an artefact of shards, then one without: the old shards must go, a file of somebody else must stay
save_artifact(folder, model=make_model(tokenizer, seed=9), tokenizer=tokenizer, max_shard_size="8KB")
push_artifact(folder, "tester/artefact")
sharded = sorted(p.name for p in folder.glob("model-*"))
from huggingface_hub import HfApi  # noqa: E402

HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="tester/artefact")
save_artifact(
    folder,
    model=tiger,
    tokenizer=tokenizer,
    items=make_items(tokenizer),
    metrics=make_metrics("shop"),
    recipe={"name": "t"},
)
(folder / ".env").write_text("SECRET=1")
first = push_artifact(folder, "tester/artefact")
again = push_artifact(folder, "tester/artefact")

save_artifact(folder.with_name("private"), tokenizer=tokenizer, items=make_items(tokenizer))
save_artifact(folder.with_name("private"), metrics=make_metrics("movielens-100k"))
push_artifact(folder.with_name("private"), "by_terms")
push_artifact(folder, "tester/secret", private=True)

# the pieces alone, with transformers' own methods
tiger.push_to_hub("tester/pieces")
tokenizer.push_to_hub("tester/pieces")

refused(
    "unsafe", lambda: ((folder / "x.py").write_text("1"), push_artifact(folder, "tester/unsafe")), UnsafeArtifactError
)
(folder / "x.py").unlink()
refused("token", lambda: push_artifact(folder, "tester/anonymous", token=False))
refused("name", lambda: push_artifact(folder, "not a name!"))
content = (folder / "metrics.json").read_bytes()
(folder / "metrics.json").write_bytes(content[:-5])
refused("damaged", lambda: push_artifact(folder, "tester/damaged"))
(folder / "metrics.json").write_bytes(content)

answer = {
    "sharded": sharded,
    "commits": [first.oid, again.oid],
    "fail": fail,
    "recommended": [[(r.item_id, r.score) for r in row] for row in load_artifact(folder).recommend(HISTORIES, k=5)],
    "pulled": str(pull_artifact("tester/artefact", folder.with_name("pulled"))),
}
print(json.dumps(answer))
