"""Load once more after the Hub is gone, from the cache alone. Run by test_remote.py."""

from __future__ import annotations

import json

from hf_genrec.errors import ArtifactError
from hf_genrec.hub import load_artifact, push_artifact

artifact = load_artifact("tester/artefact")
fail = {}
for name, call in (
    ("pull", lambda: load_artifact("tester/never_seen")),
    ("push", lambda: push_artifact(artifact.folder, "tester/artefact")),
):
    try:
        call()
    except ArtifactError as error:
        fail[name] = str(error)
rows = artifact.recommend([["B0001", "B0002"], ["B0020"]], k=5)
print(json.dumps({"artifact": [[(r.item_id, r.score) for r in row] for row in rows], "fail": fail}))
