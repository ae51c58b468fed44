"""Save, update and load an artefact while watching for connections; prints what was tried. Run by test_artifact.py."""

from __future__ import annotations

import json
import sys

connections: list[str] = []
sys.addaudithook(
    lambda event, args: (
        connections.append(f"{event} {args[-1]}") if event in ("socket.connect", "socket.getaddrinfo") else None
    )
)

from hub_samples import make_items, make_metrics, make_model, make_tokenizer  # noqa: E402

from hf_genrec.hub import load_artifact, save_artifact  # noqa: E402

folder = sys.argv[1]
tokenizer = make_tokenizer()
save_artifact(
    folder, model=make_model(tokenizer), tokenizer=tokenizer, items=make_items(tokenizer), card_data={"repo_id": "a/b"}
)
save_artifact(folder, metrics=make_metrics())
found = load_artifact(folder).recommend([["B0001"]], k=5)[0]
print(json.dumps({"connections": connections, "recommended": len(found)}))
