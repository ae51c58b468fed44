"""The main job in one program: MovieLens-100K to a recommender folder, reloaded in a new process.

    python examples/demo.py --output_dir runs/demo

trains the `tandem` recipe beside SASRec with full cross-entropy, an item graph and popularity, writes the artefact folder,
then starts a fresh Python that loads the folder and recommends for a known user's history and for a new user.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def reload_and_recommend(folder: Path) -> None:
    """What anybody can do with the folder: the five lines of the README."""
    import hf_genrec
    from hf_genrec.data.interactions import load_data

    artifact = hf_genrec.load_artifact(folder)
    data = load_data("movielens-100k")
    row = 0
    known = [data.item_ids[i] for i in data.sequences[row]]
    new = artifact.tokenizer.item_ids
    by_title = {artifact.title(item): item for item in new}
    newcomer = [by_title[title] for title in ("Toy Story (1995)", "Aladdin (1992)") if title in by_title]
    for who, history in ((f"user {data.user_ids[row]}", known), ("a new user", newcomer)):
        print(f"\n{who}, who watched {len(history)} films, last: {'; '.join(artifact.title(i) for i in history[-5:])}")
        for found in artifact.recommend([history], k=10)[0]:
            print(f"  {found.rank:>2}  {found.score:7.3f}  {artifact.title(found.item_id)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/demo")
    parser.add_argument("--recipe", default="tandem")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reload_only", action="store_true", help="only load the folder and recommend")
    options, rest = parser.parse_known_args()
    folder = Path(options.output_dir)
    if options.reload_only:
        reload_and_recommend(folder)
        return
    started = time.perf_counter()
    command = [sys.executable, "-m", "hf_genrec.cli.main", "train", options.recipe, "--dataset", "movielens-100k"]
    # recipe and SASRec train side by side, one thread each: faster than one after the other, and repeatable
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--output_dir", str(folder), "--seed", str(options.seed), *rest]
    subprocess.run(command, check=True, env=environment)
    trained = time.perf_counter() - started
    print("\nreloading the folder in a new process", flush=True)
    subprocess.run([sys.executable, __file__, "--output_dir", str(folder), "--reload_only"], check=True)
    seconds = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["wall_seconds"]
    total = time.perf_counter() - started
    print("\nseconds per stage: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"training and evaluation {trained:.0f} s, all {total:.0f} s; the model card is {folder / 'README.md'}")


if __name__ == "__main__":
    main()
