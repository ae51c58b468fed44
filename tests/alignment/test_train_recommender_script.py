"""scripts/train_recommender.py from a CSV log to an artefact folder that loads, and its errors."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from trainer_cases import NUM_ITEMS, small_tokenizer

from hf_genrec.artifacts import verify_manifest
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError
from hf_genrec.hub import load_artifact


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "scripts" / "train_recommender.py"
    spec = importlib.util.spec_from_file_location("train_recommender_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Item i is followed by item i + 1; ids are sorted as their numbers, so row i of the codes is item i."""
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(60):
        start, length = rng.integers(0, NUM_ITEMS), rng.integers(5, 12)
        lines += [f"u{user:02d},i{(start + t) % NUM_ITEMS:02d},{1_500_000_000 + 60 * t}" for t in range(length)]
    path = tmp_path_factory.mktemp("log") / "log.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


SMALL = {
    "sasrec": {"hidden_size": 16, "intermediate_size": 32},
    "tiger": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1},
    "rq_transformer": {"hidden_size": 16},
}


def line_for(kind: str, log: Path, folder: Path, *more: str) -> list[str]:
    line = f"--model_type {kind} --dataset {log} --output_dir {folder} --min_user 3 --min_item 1 --max_history 10"
    line += (
        " --num_train_epochs 2 --per_device_train_batch_size 8 --eval_num_beams 10 --use_cpu true --disable_tqdm true"
    )
    return [*line.split(), "--config", json.dumps(SMALL[kind]), *more]


@pytest.mark.parametrize("kind", list(SMALL))
def test_from_log_to_artefact(script, log, tmp_path, kind):
    more = []
    if kind != "sasrec":
        codes = {"codes": small_tokenizer(kind).codes.astype(np.int32), "codebook_sizes": np.array([5, 6], np.int32)}
        save_file(codes, tmp_path / "codes.safetensors")
        more = ["--codes", str(tmp_path)]
    if kind == "rq_transformer":
        np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(NUM_ITEMS, 8)).astype(np.float32))
        more += ["--item_features", str(tmp_path / "features.npy")]
    folder = tmp_path / "artefact"
    metrics = script.main(*script.parse(line_for(kind, log, folder, *more)))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["artefact"], "checkpoints are removed"
    verify_manifest(folder, deep=True)
    artifact = load_artifact(folder)
    assert artifact.metrics["training"]["steps"] == metrics["training"]["steps"] > 0
    assert artifact.model.recommendation_config.max_history == 10
    answers = artifact.recommend([["i03", "i04"]], k=5)
    assert len(answers[0]) == 5 and not {"i03", "i04"} & {answer.item_id for answer in answers[0]}


def test_model_defaults_and_command_line(script):
    def parsed(line):
        return script.parse(line.split())[2]

    args = parsed("--model_type tiger --dataset sasrec --output_dir x --learning_rate 0.5")
    assert (args.max_history, args.per_device_train_batch_size, args.learning_rate) == (20, 128, 0.5)
    args = parsed("--model_type=sasrec --dataset tiger --output_dir x")
    assert (args.max_history, args.num_train_epochs) == (50, 40.0)


def test_help_shows_our_options_and_examples(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = capsys.readouterr().out
    for word in ("--model_type {tiger,sasrec,rq_transformer}", "--max_train_seconds", "--codes", "train_quantizer.py"):
        assert word in text
    assert "--fsdp" not in text and len(text.splitlines()) < 220


def test_errors_name_the_fix(script, log, tmp_path):
    def run(kind, *more):
        return script.main(*script.parse(line_for(kind, log, tmp_path / "out", *more)))

    with pytest.raises(IncompatibleComponentsError, match="pass --codes"):
        run("tiger")
    with pytest.raises(IncompatibleComponentsError, match="does not exist"):
        run("tiger", "--codes", str(tmp_path / "none.npy"))
    np.save(tmp_path / "few.npy", np.zeros((3, 2), np.int64))
    with pytest.raises(IncompatibleComponentsError, match="codes for 3 items, the data has 30"):
        run("tiger", "--codes", str(tmp_path / "few.npy"))
    with pytest.raises(IncompatibleComponentsError, match="no JSON"):
        run("sasrec", "--config", "{hidden_size: 3}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match=r"thesis\.tex"):
        run("sasrec")
