"""Push an artefact folder to the Hub: checked, as one commit, with its model card.

    python scripts/push.py --folder runs/demo --repo_id me/films
    python scripts/push.py --folder runs/demo --repo_id me/shop --license apache-2.0 --data_terms "our own log"
    python scripts/push.py --folder runs/demo --repo_id me/films --dry_run        # what would be uploaded, no network

Log in first (`hf auth login`), or set HF_TOKEN. A repository made here is private where the terms of the training data
forbid giving it away; --private / --public decide otherwise.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_genrec.errors import ArtifactError, GenRecError
from hf_genrec.hub import push_artifact, save_artifact
from hf_genrec.hub.remote import files_to_push


@dataclass
class PushArguments:
    """What to push where, and what the card should say."""

    folder: str = field(metadata={"help": "Artefact folder."})
    repo_id: str = field(metadata={"help": "owner/name, or a name in your own namespace."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    public: bool = field(default=False, metadata={"help": "Make a new repository public, whatever the data's terms."})
    revision: str | None = field(default=None, metadata={"help": "Branch; default main."})
    commit_message: str = field(default="Upload hf_genrec artefact", metadata={"help": "Of the commit."})
    title: str | None = field(default=None, metadata={"help": "Title of the card."})
    description: str | None = field(default=None, metadata={"help": "One or two sentences under the title."})
    license: str | None = field(default=None, metadata={"help": "Hub licence identifier of the weights."})
    data_terms: str | None = field(default=None, metadata={"help": "What the owner of the data allows, one sentence."})
    dataset_id: str | None = field(default=None, metadata={"help": "Hub data set of the results (.eval_results)."})
    dry_run: bool = field(default=False, metadata={"help": "Check and list the files; upload nothing."})


def main(arguments: PushArguments) -> str:
    """Write the card anew where a part of it is given, check, push; returns the URL of the commit."""
    if arguments.private and arguments.public:
        raise ArtifactError("--private and --public exclude each other.")
    said = {key: getattr(arguments, key) for key in ("title", "description", "license", "data_terms", "dataset_id")}
    if any(value is not None for value in said.values()):
        save_artifact(arguments.folder, card_data=said)
    if arguments.dry_run:
        for path in files_to_push(arguments.folder):
            print(f"{(Path(arguments.folder) / path).stat().st_size:>12,} {path}")
        return ""
    commit = push_artifact(
        arguments.folder,
        arguments.repo_id,
        private=True if arguments.private else False if arguments.public else None,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
    )
    print(commit.commit_url)
    return commit.commit_url


if __name__ == "__main__":
    try:
        main(HfArgumentParser(PushArguments).parse_args_into_dataclasses()[0])  # type: ignore[arg-type]
    except GenRecError as error:
        sys.exit(f"error: {error}")
