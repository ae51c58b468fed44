"""`genrec recommend DIR --history ID,ID -k 10`."""

from __future__ import annotations

import argparse
import csv
from typing import Any

from hf_genrec.hub import load_artifact


def run_recommend(options: argparse.Namespace) -> tuple[Any, str]:
    """JSON value and text to print."""
    artifact = load_artifact(options.folder)
    history = _ids(options.history)
    answers = artifact.recommend(
        [history],
        k=options.k,
        num_beams=options.num_beams,
        exclude_seen=False if options.include_seen else None,
        allowed_items=_ids(options.allowed_items) if options.allowed_items is not None else None,
    )[0]
    titles = titles_of(artifact)
    rows: list[dict[str, Any]] = [
        {"rank": r.rank, "item_id": r.item_id, "score": r.score, "title": titles.get(r.item_id)} for r in answers
    ]
    width = max([len(row["item_id"]) for row in rows], default=0)
    lines = ["history: " + ("; ".join(titles.get(item) or item for item in history[-10:]) or "(none)")]
    lines += [f"{row['rank']:>3}  {row['item_id']:<{width}}  {row['score']:8.3f}  {row['title'] or ''}" for row in rows]
    return {"history": history, "recommendations": rows}, "\n".join(lines)


def titles_of(artifact: Any) -> dict[str, str]:
    """Item id to title, empty when the artefact has no item table."""
    if artifact.items is None:
        return {}
    # one printed line a title: control characters of untrusted text would reach the terminal
    clean = ["".join(c if c.isprintable() else " " for c in title) for title in artifact.items.titles()]
    return dict(zip(artifact.items.item_ids, clean, strict=True))


def _ids(text: str) -> list[str]:
    """Comma-separated ids; an id that holds a comma is quoted as in CSV."""
    return [item.strip() for item in next(csv.reader([text], skipinitialspace=True), []) if item.strip()]
