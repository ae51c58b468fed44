"""scripts/evaluate.py from a saved artefact to printed tables and a JSON file."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_genrec.data.interactions import load_data
from hf_genrec.errors import GenRecError
from hf_genrec.hub import build_metrics, save_artifact
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A log where item i is followed by item i + 1, and an untrained SASRec saved for it in another item order."""
    root = tmp_path_factory.mktemp("evaluate")
    rows = ["user_id,item_id,timestamp"]
    for user in range(60):
        rows += [f"u{user},i{(user + step) % 30:02d},{1_600_000_000 + step}" for step in range(8)]
    log = root / "log.csv"
    log.write_text("\n".join(rows) + "\n", encoding="utf-8")
    data = load_data(log)
    ids = list(np.random.default_rng(0).permutation(data.item_ids))
    tokenizer = ItemTokenizer.from_codes(ids, np.arange(len(ids))[:, None])
    torch.manual_seed(0)
    model = SASRecForCausalLM(SASRecConfig.from_tokenizer(tokenizer, hidden_size=16, num_hidden_layers=1))
    metrics = build_metrics(dataset=str(log), protocol="leave_one_out", seed=0, test={"recall@10": 0.1})
    save_artifact(root / "artefact", model=model, tokenizer=tokenizer, metrics=metrics)
    return root


def test_artefact_beside_the_baselines(script, folder, capsys):
    arguments = script.EvaluateArguments(
        artifact=str(folder / "artefact"),
        ks=[1, 10],
        beam_widths=[10, 30],
        json=str(folder / "results.json"),
        bootstrap=100,
        progress=False,
    )
    result = script.main(arguments)
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == result
    # the graph knows the successor; it would not if data and tokenizer disagreed on item indices
    assert result["baselines"]["item_graph"]["recall@1"] == 1.0
    assert result["test"]["recall@1"] < 0.5
    assert result["differences"]["item_graph"]["recall@10"]["verdict"] == "worse"
    assert result["beam_versus_exact"]["widths"]["30"]["missed_share"] == 0.0
    printed = capsys.readouterr().out
    assert "artefact LOSES to: item_graph" in printed and "policy: input order" in printed


def test_baselines_alone_with_shuffled_ties_and_a_sample(script, folder, capsys):
    arguments = script.EvaluateArguments(
        dataset=str(folder / "log.csv"), shuffle_ties=[0], max_users=20, baselines=["markov"], progress=False
    )
    result = script.main(arguments)
    assert result["baselines"]["markov"]["rows"] == 20 and "test" not in result
    spread = result["shuffled_ties"]["markov"]["seen_removed"]["recall@1"]
    assert spread["declared"] == spread["shuffled_mean"] == 1.0  # nothing ties here
    assert "markov: ties in declared order and shuffled" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dataset": "log.csv", "baselines": ["sasrec"]}, "unknown baseline 'sasrec'"),
        ({"dataset": "log.csv", "part": "train"}, "--part"),
        ({}, "name the data"),
    ],
)
def test_mistakes_name_the_option(script, options, message):
    with pytest.raises(GenRecError, match=message):
        script.main(script.EvaluateArguments(**options))


def test_command_line_prints_one_line_for_a_mistake(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--artifact", str(tmp_path / "nothing")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
