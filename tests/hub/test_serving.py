"""The catalogue export: the JSON files alone decode what `recommend` decodes, in a process without hf_genrec."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_samples import make_model, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_genrec.alignment.item_embeddings import add_item_tokens
from hf_genrec.cli.main import main
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.hub import load_artifact, save_artifact
from hf_genrec.hub.serving import export_catalogue, prefix_tree, prompt_facts, semantic_ids
from hf_genrec.identifiers.extend import extend_tokenizer
from hf_genrec.identifiers.item_names import tokenizer_from_names
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
from hf_genrec.identifiers.tokenization_item import ItemTokenizer
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration

DRIVER = Path(__file__).with_name("hub_serving_driver.py")
CODES = [[item // 5 % 4, item % 5] for item in range(20)] + [[0, 0], [2, 3]]  # the last two share codes
ITEMS = [f"i{item:02d}" for item in range(22)]


def text_tokenizer(codes=CODES, sizes=(4, 5), **options):
    base = train_text_tokenizer(["bought: then next"], 120)
    items = ItemTokenizer.from_codes(ITEMS[: len(codes)], codes, sizes)
    return extend_tokenizer(base, items, **{"history_before": "Bought: ", "history_after": "\nNext: ", **options})


@pytest.fixture(scope="module", params=[False, True], ids=["whole vocabulary", "level"])
def artefact(request, tmp_path_factory):
    tokenizer = text_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) - 9, initializer_range=0.5, **sizes))
    add_item_tokens(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[-9:] += torch.randn(9, 16)  # answers that differ between histories
    config = RecommendationConfig(k=5, num_beams=50, restrict_to_level=request.param, max_history=4)
    model.recommendation_config = config
    folder = tmp_path_factory.mktemp("serving") / "model"
    return save_artifact(folder, model=model, tokenizer=tokenizer, recommendation_config=config)


def test_plain_transformers_recommends_the_same(artefact, tmp_path):
    histories = [["i03"], ["i00", "i07"], ["i20", "i05", "i11"], [f"i{item:02d}" for item in range(9)], ["i13", "i21"]]
    export = export_catalogue(artefact, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(artefact), str(export), json.dumps(histories), "50"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["class"] == "transformers.models.llama.modeling_llama.LlamaForCausalLM"
    assert json.loads((artefact / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    ours = load_artifact(artefact).recommend(histories, k=5)
    first = [answers[0] for answers in found["answers"]]
    assert first == [row[0].item_id for row in ours]
    assert [answers[:5] for answers in found["answers"]] == [[one.item_id for one in row] for row in ours]
    assert len(set(first)) > 1, "the model answers every history alike, so this shows nothing"


def walk(tree, table):
    """Every item that the tree spells, by its own rules."""
    found, open_nodes = [], [(0, [])]
    while open_nodes:
        node, prefix = open_nodes.pop()
        children = range(tree["first_child"][node], tree["first_child"][node + 1])
        if node and (not children or node in tree["ends"]):
            found.append(tuple(prefix))
        open_nodes += [(child, [*prefix, tree["token_ids"][child]]) for child in children]
    return sorted(found)


@pytest.mark.parametrize("uneven", [False, True])
def test_the_tree_spells_the_catalogue_and_nothing_else(uneven):
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 30):
        table = rng.integers(0, 3, (size, 4)) + [10, 20, 30, 40]
        if uneven:
            lengths = rng.integers(1, 5, size)
            table[np.arange(4) >= lengths[:, None]] = -1
        tree = prefix_tree(table)
        assert walk(tree, table) == sorted({tuple(row[row >= 0].tolist()) for row in table})
        assert len(tree["first_child"]) == len(tree["token_ids"]) + 1
        assert tree["first_child"][-1] == len(tree["token_ids"])


def test_shared_spellings_are_all_listed():
    named = semantic_ids(text_tokenizer())
    assert named["<a_0><b_0>"] == ["i00", "i20"] and named["<a_2><b_3>"] == ["i13", "i21"] and len(named) == 20


def test_prompt_with_end_token_and_short_memory():
    base = train_text_tokenizer(["bought: then next"], 120)
    items = ItemTokenizer.from_codes(ITEMS, CODES, (4, 5), history_eos=True, num_user_tokens=3)
    tokenizer = extend_tokenizer(base, items, history_before="Bought: ", history_after=" Next: ")
    facts = prompt_facts(tokenizer, RecommendationConfig(max_history=2))
    example = facts["example"]
    assert example["history"] == ["i01", "i02"] and example["text_gives_token_ids"]
    before, after = facts["history_before"]["token_ids"], facts["history_after"]["token_ids"]
    items = tokenizer.item_token_ids("i01") + tokenizer.item_token_ids("i02")
    assert example["token_ids"] == [*before, *items, tokenizer.eos_token_id, *after]
    assert facts["user_tokens"] == 3 and facts["max_history"] == 2


def test_command_and_readme(artefact, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(artefact), "--output_dir", str(out), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {"semantic_ids.json", "item_tokens.json", "allowed_prefixes.json", "prompt.json", "README.md"} <= set(files)
    readme = (out / "README.md").read_text()
    assert "stock architecture" in readme and "2 items share their spelling" in readme
    assert main(["export", str(artefact), "--output_dir", str(out)]) == 0, "an earlier export is replaced"


def test_refusals(artefact, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no earlier export"):
        export_catalogue(artefact, mine)
    with pytest.raises(ArtifactError, match="artefact itself"):
        export_catalogue(artefact, artefact)
    assert main(["export", str(tmp_path / "a/b/nothing"), "--output_dir", str(tmp_path / "x")]) == 2
    assert "not a folder" in capsys.readouterr().err
    words = tokenizer_from_names(train_text_tokenizer(["film one film two"], 120), ["a", "b"], ["film one", "film two"])
    folder = save_artifact(tmp_path / "words", tokenizer=words)
    with pytest.raises(IncompatibleComponentsError, match="tokens that levels share"):
        export_catalogue(folder, tmp_path / "x")


def test_other_architectures_are_named_as_such(tmp_path):
    tokenizer = make_tokenizer()
    folder = save_artifact(tmp_path / "t5", model=make_model(tokenizer), tokenizer=tokenizer)
    assert "stock encoder-decoder" in (export_catalogue(folder, tmp_path / "t5-out") / "README.md").read_text()
    config = TigerConfig.from_tokenizer(tokenizer, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1)
    own = TigerForConditionalGeneration(config)
    artifact = load_artifact(save_artifact(tmp_path / "own", model=own, tokenizer=tokenizer))
    out = export_catalogue(artifact, tmp_path / "out")
    assert "is an architecture of hf_genrec" in (out / "README.md").read_text()
    assert json.loads((out / "prompt.json").read_text())["example"]["history"] == tokenizer.item_ids[:3]
