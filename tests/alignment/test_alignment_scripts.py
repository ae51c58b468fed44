"""scripts/sft.py, dpo.py and grpo.py from a CSV log to artefacts: what they write, resuming, processes, wrong options."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from process_cases import free_port
from safetensors.torch import load_file
from script_cases import NUM_ITEMS, ROOT, line_for, load_script, run, write_tiger, write_world
from sft_cases import base_lm, item_lm
from transformers import AutoTokenizer, TrainerCallback

from hf_genrec.alignment.pair_datasets import load_pairs, save_pairs
from hf_genrec.alignment.rewards import ItemGroups
from hf_genrec.alignment.trainers.language_model import prompt_room
from hf_genrec.cli import script_run
from hf_genrec.cli.script_run import trained_model
from hf_genrec.data.interactions import load_data
from hf_genrec.data.splits import make_split
from hf_genrec.errors import ArtifactError, IncompatibleComponentsError, RequestError, TrainingError
from hf_genrec.evaluation.evaluator import evaluate
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.hub import load_artifact
from hf_genrec.recipes.pipeline import train_recipe
from hf_genrec.recipes.resolver import resolve_recipe

CONFIGS = ROOT / "examples" / "configs"
ITEMS = {f"i{item:02d}" for item in range(NUM_ITEMS)}
SCRIPTS = ("sft", "dpo", "grpo")
CONTEXT = 72  # tokens, of which the wording takes about 60


@pytest.fixture(scope="module")
def scripts():
    return {name: load_script(name) for name in SCRIPTS}


@pytest.fixture(scope="module")
def world(tmp_path_factory, scripts):
    """Log, items, codes and base model, `start` (what sft.py made of them) and `tiger`."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    run(scripts["sft"], line_for("sft", folder, folder / "start"))
    write_tiger(folder / "tiger")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_sft_writes_a_stock_model_that_ranks_as_its_metrics_say(world):
    artifact = load_artifact(world / "start")
    config = json.loads((world / "start" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and not any(
        "lora" in name for name in weights(world / "start")
    )
    found = artifact.recommend([["i03", "i04"], ["i11"]], k=5)
    assert all(one.item_id in ITEMS for row in found for one in row) and [len(row) for row in found] == [5, 5]
    served = RecommendationConfig.from_pretrained(world / "start")
    assert served.restrict_to_level and served.max_history == 8 and served.num_beams == 16
    data = load_data(str(world / "log.csv"), min_user=3, min_item=1)
    report = evaluate(
        ModelRecommender(artifact.model, artifact.tokenizer), make_split(data).test, num_items=16, progress=False
    )
    assert {k: v for k, v in artifact.metrics["test"].items() if "@" in k} == pytest.approx(
        {metric: report[metric] for metric in artifact.metrics["test"] if "@" in metric}
    )
    assert artifact.metrics["validation"]["recall@10"] > 0 and artifact.metrics["training"]["rows_per_family"] == {
        "next_item": 40, "item_to_index": 8
    }  # fmt: skip
    assert artifact.recipe["data"] == {"min_user": 3, "min_item": 1} and artifact.recipe["model"]["base"] == "base"
    for part in ("validation", "test"):  # beside the base model with fresh rows, searched in the same way
        found = artifact.metrics["buckets"][part]
        assert set(found["buckets"]) == {"head", "tail", "cold"} and found["before"] == "before"
    assert found["all"]["before"] < found["all"]["after"] == artifact.metrics["test"]["ndcg@10"]
    assert not (world / "start-checkpoints").exists(), "checkpoints are removed"
    assert str(world) not in (world / "start" / "README.md").read_text(), "no path of this machine in the card"


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_alignment_reports_buckets_before_and_after(scripts, world, tmp_path, name, kind):
    start = world / ("start" if kind == "causal" else "tiger")
    words = line_for(name, world, tmp_path / "out", model=start, lora=kind == "causal")
    if kind == "seq2seq":  # no adapters there
        with pytest.raises(RequestError, match="unknown option 'lora_r'"):
            run(scripts[name], [*words, "--lora_r", "4"])
    metrics = run(scripts[name], words)
    artifact = load_artifact(tmp_path / "out")
    assert type(artifact.model) is type(load_artifact(start).model)
    assert all(one.item_id in ITEMS for one in artifact.recommend([["i03", "i04"]], k=10)[0])
    before, after = weights(start), weights(tmp_path / "out")
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    for part in ("validation", "test"):
        found = metrics["buckets"][part]
        assert set(found["buckets"]) == {"head", "tail", "cold"} and found["before"] == "before"
    assert metrics["buckets"]["test"]["all"]["after"] == pytest.approx(metrics["test"][found["metric"]])
    assert metrics["buckets"]["test"]["all"]["before"] == pytest.approx(metrics["baselines"]["before"][found["metric"]])
    if kind == "causal":  # the split of the start, and the record of both stages
        assert metrics["baselines"]["before"]["recall@5"] == load_artifact(start).metrics["test"]["recall@5"]
        stages = artifact.recipe["training"]["method_options"]["stages"]
        assert [stage["method"] for stage in stages] == ["sft", "softmax_dpo" if name == "dpo" else "grpo"]
        assert artifact.recipe["data"]["min_user"] == 3 and artifact.recipe["paper"][0] == "2311.09049"
        assert (
            stages[1]["options"]["beta"] == (0.5 if name == "dpo" else 1e-3)
            and stages[1]["training"]["max_history"] == 8
        )
    else:
        assert scripts[name].parse_line(words)[-1].max_history == 6, "the history length of the artefact"


@pytest.mark.parametrize("kind", ["sft", "sft k-means", "dpo", "grpo", "dpo tiger", "grpo tiger"])
def test_what_is_written_is_a_recipe_that_trains_again(scripts, world, tmp_path, kind):
    name = kind.split()[0]
    start = None if name == "sft" else world / ("tiger" if "tiger" in kind else "start")
    words = line_for(name, world, tmp_path / "out", "--max_steps", "1", model=start, lora="tiger" not in kind)
    if kind == "sft k-means":
        place = words.index("--codes")
        words = [*words[:place], *words[place + 2 :], "--codebook_sizes", "4", "4", "--features", "cooccurrence"]
    metrics = run(scripts[name], words)
    no_text = {} if kind == "sft k-means" else {"features.text": None, "identifiers.features": ["cooccurrence"]}
    base = {} if "tiger" in kind else {"model.base": str(world / "base")}  # a folder's path stays on its machine
    recipe = resolve_recipe(str(tmp_path / "out" / "recipe.yaml"), no_text | base)
    assert recipe.status == "smoke" and recipe.generation == {"num_beams": 16} and recipe.title
    if name != "sft":
        stages = recipe.training["method_options"]["stages"]
        assert [stage["method"] for stage in stages][-1] == {"dpo": "softmax_dpo", "grpo": "grpo"}[name]
        options = stages[-1]["options"]
        expected = {"pairs": 48, "num_negatives": 2, "beta": 0.5, "sft_weight": 0.0}
        expected = expected if name == "dpo" else {"prompts": 16, "num_generations": 4, "reward": "rule_and_rank"}
        assert {key: options[key] for key in expected} == expected
        assert stages[-1]["training"]["learning_rate"] == 1e-3 and stages[-1]["training"]["max_steps"] == 1
    assert set(metrics["training"]["other_settings"]) <= {"lora", "loss_type"}
    again = train_recipe(
        recipe, str(world / "log.csv"), tmp_path / "again", items=str(world / "items.csv"), baselines=[], progress=False
    )
    assert type(again.model) is type(load_artifact(tmp_path / "out").model) and again.metrics["test"]["rows"] == 40
    assert again.tokenizer.num_levels == load_artifact(tmp_path / "out").tokenizer.num_levels
    assert (tmp_path / "again-stage-2-pairs.parquet").is_file() == (kind == "dpo")


@pytest.mark.parametrize("kind", ["start", "tiger"])
def test_feedback_of_the_log_and_the_kept_pairs(scripts, world, tmp_path, kind, capsys):
    """Items 0, 5, 10 and 15 are rated 2, all others 5: these are chosen, those are rejected."""
    lines = (world / "log.csv").read_text().splitlines()
    rating = {f"i{item:02d}": 2.0 if item % 5 == 0 else 5.0 for item in range(NUM_ITEMS)}
    rated = [f"{lines[0]},stars", *(f"{line},{rating[line.split(',')[1]]}" for line in lines[1:])]
    (tmp_path / "rated.csv").write_text("\n".join(rated) + "\n")
    words = line_for("dpo", world, tmp_path / "out", model=world / kind, lora=kind == "start")
    words[words.index("--dataset") + 1] = str(tmp_path / "rated.csv")
    words[words.index("--disable_tqdm") + 1] = "false"
    words += ["--max_steps", "1", "--negatives", "feedback"]
    with pytest.raises(TrainingError, match="no column 'rating'"):
        run(scripts["dpo"], words)
    more = ["--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "true", "--save_strategy", "no"]
    more += [] if kind == "start" else ["--load_best_model_at_end", "false"]
    metrics = run(scripts["dpo"], [*words, *more, "--feedback_column", "stars", "--liked", "4"])
    pairs = load_pairs(tmp_path / "out-pairs.parquet")
    assert not (tmp_path / "out-checkpoints").exists() and len(pairs) == metrics["training"]["pairs"] > 10
    assert {rating[item] for item in pairs["chosen_item"]} == {5.0}
    assert {rating[item] for row in pairs["rejected_items"] for item in row} == {2.0}
    assert metrics["training"]["pairs_file"] == "out-pairs.parquet" and str(tmp_path) not in json.dumps(metrics)
    assert f"kept in {tmp_path / 'out-pairs.parquet'}" in capsys.readouterr().out
    recipe = resolve_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert recipe.data["extra_columns"] == ["stars"]
    assert recipe.training["method_options"]["stages"][-1]["options"]["feedback_column"] == "stars"
    files = ["--pairs_file", str(tmp_path / "mine.parquet"), "--title_pairs", str(tmp_path / "titles.parquet")]
    run(scripts["dpo"], [*words, "--feedback_column", "stars", *files])
    mine, titles = load_pairs(tmp_path / "mine.parquet"), load_pairs(tmp_path / "titles.parquet")
    assert len(mine) == len(pairs) and titles["chosen_item"] == mine["chosen_item"]
    title = lambda item: f"The {'red' if int(item[1:]) % 2 else 'blue'} shoe {int(item[1:])}"
    assert titles["chosen"][:] == [title(item) for item in mine["chosen_item"]]
    assert titles["rejected"][:] == [[title(item) for item in row] for row in mine["rejected_items"]]


def test_tasks_read_columns_of_the_log_that_are_named(scripts, world, tmp_path):
    lines = (world / "log.csv").read_text().splitlines()
    rated = [
        f"{lines[0]},stars,wish",
        *(f"{line},{1 + row % 5},something to keep {row}" for row, line in enumerate(lines[1:])),
    ]
    (tmp_path / "rated.csv").write_text("\n".join(rated) + "\n")
    words = line_for("sft", world, tmp_path / "out", "--max_steps", "2")
    words[words.index("--dataset") + 1] = str(tmp_path / "rated.csv")
    tasks = {"yes_no:rated": 0.5, "item_search": {"weight": 0.5, "intention": "wish"}, "next_item": 1.0}
    words[words.index("--tasks") + 1] = json.dumps(tasks)
    with pytest.raises(TrainingError, match="no column 'wish'"):
        run(scripts["sft"], words)
    metrics = run(scripts["sft"], [*words, "--extra_columns", "stars", "wish"])
    assert (
        set(metrics["training"]["rows_per_family"]) == set(tasks)
        and min(metrics["training"]["rows_per_family"].values()) > 0
    )
    recipe = resolve_recipe(str(tmp_path / "out" / "recipe.yaml"))
    assert recipe.data["extra_columns"] == ["stars", "wish"] and recipe.training["method_options"]["families"] == tasks
    words[words.index("--tasks") + 1] = json.dumps({"next_item": {"share": 1.0}})
    with pytest.raises(RequestError, match="tasks must map families to weights"):
        run(scripts["sft"], words)


def test_histories_are_cut_to_what_the_model_reads(scripts, world, tmp_path, monkeypatch):
    """A base model of a short context: whole oldest items go, in rows and in pairs."""
    base = base_lm(hidden_size=32, intermediate_size=64, max_position_embeddings=CONTEXT)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(tmp_path / "base")
    lengths = []
    trainer = scripts["sft"].ItemSFTTrainer

    class Watching(trainer):
        def compute_loss(self, model, inputs, *args, **more):
            lengths.append(inputs["input_ids"].shape[1])
            return super().compute_loss(model, inputs, *args, **more)

    monkeypatch.setattr(scripts["sft"], "ItemSFTTrainer", Watching)
    words = line_for("sft", world, tmp_path / "start", "--num_train_epochs", "1", model=tmp_path / "base")
    words[words.index("--tasks") + 1] = '{"next_item": 1.0}'
    run(scripts["sft"], words)
    assert lengths and max(lengths) <= CONTEXT
    rooms = []

    def smaller(model, tokenizer):
        rooms.append(prompt_room(model, tokenizer))
        return 33

    monkeypatch.setattr(scripts["dpo"], "prompt_room", smaller)
    run(scripts["dpo"], line_for("dpo", world, tmp_path / "out", "--max_steps", "1", model=tmp_path / "start"))
    assert set(rooms) == {CONTEXT - 3}  # two codes and an end token
    pairs = load_pairs(tmp_path / "out-pairs.parquet")
    assert max(map(len, pairs["prompt_ids"])) in (32, 33)
    table = np.asarray(load_artifact(tmp_path / "start").tokenizer.item_token_table)
    for row in pairs["prompt_ids"]:  # every first code is followed by its second
        firsts, seconds = (np.isin(row, table[:, level]) for level in (0, 1))
        assert firsts.any() and (np.flatnonzero(firsts) + 1).tolist() == np.flatnonzero(seconds).tolist()


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_answers_end_as_they_were_trained_to(scripts, world, tmp_path, name):
    ended = line_for("sft", world, tmp_path / "start", "--max_steps", "1")
    ended[ended.index("--end_items") + 1] = "true"
    run(scripts["sft"], ended)
    words = line_for(name, world, tmp_path / "out", "--max_steps", "1", model=tmp_path / "start")
    kept = []
    trainer = {"dpo": "SoftmaxDPOTrainer", "grpo": "ItemGRPOTrainer"}[name]
    original = getattr(scripts[name], trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts[name], trainer, lambda *args, **more: kept.append(original(*args, **more)) or kept[0])
        run(scripts[name], words)
    eos = load_artifact(tmp_path / "start").tokenizer.eos_token_id
    if name == "grpo":
        assert kept[0].args.answer_eos
    else:
        pairs = load_pairs(tmp_path / "out-pairs.parquet")
        assert {ids[-1] for ids in pairs["chosen_ids"]} == {eos}


def test_what_got_worse_is_in_the_card(scripts, world, tmp_path, monkeypatch):
    rank, warned = script_run.ScriptRun.rank, []

    def ranked(self, model, tokenizer, data, split, name):
        reports = rank(self, model, tokenizer, data, split, name)
        for report in reports.values():
            report.removed.ranks_M[:] = 1 if name == "before" else np.inf
        return reports

    monkeypatch.setattr(script_run.ScriptRun, "rank", ranked)
    monkeypatch.setattr(script_run.logger, "warning", lambda text, *values: warned.append(text % values))
    metrics = run(scripts["sft"], line_for("sft", world, tmp_path / "out", "--max_steps", "1"))
    assert len(warned) == 2 and metrics["notes"] == warned
    assert "got worse from before to sft" in (tmp_path / "out" / "README.md").read_text()


def test_windows_of_preferences_from_the_line(scripts, world, tmp_path, monkeypatch):
    """One code per item: histories are cut at every 3 items and whole windows make up num_pairs."""
    line = line_for("sft", world, tmp_path / "start", "--codebook_sizes", "16", "--features", "cooccurrence")
    place = line.index("--codes")
    run(scripts["sft"], [*line[:place], *line[place + 2 :], "--collisions", "next_nearest", "--max_steps", "1"])
    kept = {}
    monkeypatch.setattr(
        scripts["dpo"], "save_pairs", lambda made, path: (kept.update(made=made), save_pairs(made, path))
    )
    run(scripts["dpo"], line_for("dpo", world, tmp_path / "out", "--window", "3", model=tmp_path / "start"))
    rows = kept["made"]
    sizes = [len(row["prompt_ids"]) for row in rows]
    assert len(set(sizes)) == 3 and 30 < len(rows) <= 48
    for before, after in pairwise(rows):
        together = before["window"] == after["window"]
        assert together == (after["prompt_ids"] == before["prompt_ids"] + before["chosen_ids"])


def test_residual_k_means_on_the_spot_joins_the_artefact(scripts, world, tmp_path):
    words = line_for("sft", world, tmp_path / "out", "--codebook_sizes", "4", "4", "--features", "cooccurrence")
    place = words.index("--codes")
    metrics = run(scripts["sft"], [*words[:place], *words[place + 2 :], "--item_init", "codebook", "--max_steps", "2"])
    artifact = load_artifact(tmp_path / "out")
    assert (tmp_path / "out" / "quantizer" / "quantizer.safetensors").is_file()
    assert metrics["identifiers"]["collision_rate"] == 0 and set(artifact.tokenizer.item_ids) == ITEMS
    again = line_for("sft", world, tmp_path / "again", "--codes", str(tmp_path / "out"), "--max_steps", "1")
    run(scripts["sft"], again)
    other = load_artifact(tmp_path / "again").tokenizer
    assert other.catalogue_fingerprint == artifact.tokenizer.catalogue_fingerprint


class Interrupted(BaseException):
    pass


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Interrupted


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_ends_with_the_same_weights(scripts, world, tmp_path, name, monkeypatch):
    more = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "5"]
    if name == "sft":
        more += ["--lora_r", "2", "--lora_dropout", "0.1"]
    if name == "dpo":
        more += ["--negatives", "beam"]
    words = line_for(name, world, tmp_path / "whole", *more, model=None if name == "sft" else world / "start")
    run(scripts[name], words)
    words[words.index(str(tmp_path / "whole"))] = str(tmp_path / "cut")
    trainer = {"sft": "ItemSFTTrainer", "dpo": "SoftmaxDPOTrainer", "grpo": "ItemGRPOTrainer"}[name]
    stopped = functools.partial(getattr(scripts[name], trainer), callbacks=[StopAt()])
    with monkeypatch.context() as patch, suppress(Interrupted):
        patch.setattr(scripts[name], trainer, stopped)
        run(scripts[name], words)
        pytest.fail("was not interrupted")
    assert (tmp_path / "cut-checkpoints" / "checkpoint-2").is_dir() and not (tmp_path / "cut").exists()
    with pytest.raises(TrainingError, match="resume_from_checkpoint true"):
        run(scripts[name], words)
    metrics = run(scripts[name], [*words, "--resume_from_checkpoint", "true"])
    assert metrics["training"]["steps"] == 5
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --------------------------------------------------------------------------------------------------------------- options


def test_yaml_and_command_line(scripts, world, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: base\ndataset: log.csv\noutput_dir: out\nlearning_rate: 1e-3\ncodebook_sizes: [8, 8]\n"
        "tasks: {next_item: 1.0, item_to_index: 0.5}\nwindows: false\n"
    )
    script, data, _, args = scripts["sft"].parse_line([f"--config={file}", "--learning_rate", "0.5", "--seed", "7"])
    assert args.learning_rate == 0.5 and args.seed == 7 and data.dataset == "log.csv" and script.windows is False
    assert script.tasks == {"next_item": 1.0, "item_to_index": 0.5} and script.codebook_sizes == [8, 8]
    args = scripts["sft"].parse_line(["--config", str(file)])[-1]
    assert args.learning_rate == 1e-3 and args.item_head == "full"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--learning_rat", "1"], "unknown option 'learning_rat': did you mean 'learning_rate'"),
        (["--config", "{file}"], "unknown option 'code_book_sizes' of --config: did you mean 'codebook_sizes'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--config"], "no value"),
        (["--output_dir", "x", "--tasks", "{next_item"], "no JSON mapping"),
        (["--output_dir", "x", "--tasks", '["next_item"]'], "map families to weights"),
        (["--output_dir", "x", "--packing", "true"], "packing"),
    ],
)
def test_wrong_options_are_named(scripts, tmp_path, words, message):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: x\ncode_book_sizes: [4]\n")
    with pytest.raises((RequestError, TrainingError), match=message.replace("{", r"\{")):
        scripts["sft"].parse_line([word.replace("{file}", str(file)) for word in words])


def test_refusals_before_hours_of_training(scripts, world, tmp_path):
    np.save(tmp_path / "few.npy", np.zeros((3, 2), np.int32))
    sft, dpo, grpo = scripts["sft"], scripts["dpo"], scripts["grpo"]
    with pytest.raises(RequestError, match="hub_model_id"):
        run(sft, line_for("sft", world, tmp_path / "a", "--push_to_hub", "true"))
    with pytest.raises(IncompatibleComponentsError, match="cannot be loaded"):
        run(sft, line_for("sft", world, tmp_path / "a", model=tmp_path))
    with pytest.raises(IncompatibleComponentsError, match="codes for 3 items"):
        run(sft, line_for("sft", world, tmp_path / "a", "--codes", str(tmp_path / "few.npy")))
    with pytest.raises(ArtifactError, match="manifest"):
        run(dpo, line_for("dpo", world, tmp_path / "a", model=world / "base"))
    with pytest.raises(RequestError, match="--model is missing"):
        run(dpo, ["--output_dir", str(tmp_path / "a")])
    with pytest.raises(RequestError, match="--shared has no effect on popularity negatives"):
        run(dpo, line_for("dpo", world, tmp_path / "a", "--negatives", "popularity", "--shared", "1", "1"))
    with pytest.raises(RequestError, match="--liked belongs to --negatives feedback, not random"):
        run(dpo, line_for("dpo", world, tmp_path / "a", "--liked", "3"))
    with pytest.raises(RequestError, match="reward 'rul'"):
        run(grpo, line_for("grpo", world, tmp_path / "a", "--reward", '{"rul": 1}', model=world / "start"))
    with pytest.raises(RequestError, match="divisible"):
        run(grpo, line_for("grpo", world, tmp_path / "a", "--num_generations", "3", model=world / "start"))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match=r"mine\.txt"):
        run(sft, line_for("sft", world, notes))


def test_weighted_reward_reads_vectors_and_another_model(scripts, world, tmp_path):
    np.save(tmp_path / "vectors.npy", np.eye(NUM_ITEMS, dtype=np.float32))
    more = ["--reward", '{"rule": 2.0, "semantic": 0.5, "collaborative": 1.0}', "--reward_model", str(world / "tiger")]
    words = line_for("grpo", world, tmp_path / "out", *more, "--item_vectors", str(tmp_path / "vectors.npy"))
    script, *_ = scripts["grpo"].parse_line([*words, "--model", str(world / "start")])
    data = load_data(str(world / "log.csv"), min_user=3, min_item=1)
    tokenizer = load_artifact(world / "start").tokenizer
    reward = scripts["grpo"].reward_of(script, tokenizer, data, make_split(data), 0, False)
    groups = ItemGroups(torch.tensor([[3, 5]]), torch.tensor([5]), [np.array([4])])
    scores = reward.score(groups)[0]
    third = reward.parts[2][1].score(groups)[0]
    assert torch.allclose(scores - third, torch.tensor([0.0, 2.5])) and third.min() >= 0 and third.max() <= 1


def test_push_happens_only_when_asked_and_once(scripts, world, tmp_path, monkeypatch):
    pushed = []

    def push(folder, **options):
        pushed.append((folder, options))
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(script_run, "push_artifact", push)
    more = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    run(scripts["sft"], line_for("sft", world, tmp_path / "a", *more))
    assert not pushed
    asked = [
        "--push_to_hub",
        "true",
        "--hub_model_id",
        "me/films",
        "--hub_token",
        "secret",
        "--hub_private_repo",
        "true",
    ]
    run(scripts["sft"], line_for("sft", world, tmp_path / "b", *more, *asked))
    assert pushed == [(tmp_path / "b", {"repo_id": "me/films", "private": True, "token": "secret"})]
    assert not any("secret" in path.read_text() for path in (tmp_path / "b").glob("*.[jym]*") if path.is_file())


def test_an_error_is_one_paragraph(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [
        sys.executable,
        str(ROOT / "scripts" / "dpo.py"),
        "--model",
        str(tmp_path / "nowhere/a/b"),
        "--output_dir",
        "x",
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("owner/name.") and "is not a folder" in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_ours_and_hides_the_crowd(scripts, name, capsys):
    with pytest.raises(SystemExit):
        scripts[name].parse_line(["--help"])
    text = capsys.readouterr().out
    assert "--config FILE.yaml" in text and "--lora_r" in text and "--dataset" in text
    assert "-pairs.parquet" in text or name != "dpo"
    assert "--torchdynamo" not in text and "--hub_token" not in text and len(text.splitlines()) < 330


# ------------------------------------------------------------------------------------------------------ shipped settings


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_are_understood(scripts, world, file):
    model = world / ("tiger" if "t5" in file else "start")
    groups = scripts[file.partition("_")[0]].parse_line(["--config", str(CONFIGS / file), "--model", str(model)])
    values = yaml.safe_load((CONFIGS / file).read_text())
    found = {name: getattr(group, name) for group in groups for name in values if hasattr(group, name)}
    assert found | {"model": values["model"]} == values


@pytest.mark.parametrize("file", sorted(path.name for path in (CONFIGS / "accelerate").glob("*.yaml")))
def test_accelerate_reads_its_configs(file):
    path = str(CONFIGS / "accelerate" / file)
    config = load_config_from_file(path)
    raw = yaml.safe_load(Path(path).read_text())
    assert config.num_processes == 2 and config.distributed_type == raw["distributed_type"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "scripts/sft.py"]))
    assert (args.use_fsdp, args.use_deepspeed) == ("fsdp" in file, "deepspeed" in file)
    if "fsdp" in file:
        assert int(args.fsdp_version) == 2 and args.fsdp_state_dict_type == "FULL_STATE_DICT"
    if "deepspeed" in file:
        assert int(args.zero_stage) == int(file[-6])
    if "cpu" in file:
        assert args.multi_gpu and args.use_cpu, "several processes, none on a GPU"


def test_weights_in_pieces_become_a_whole_model():
    """What FSDP and ZeRO-3 need at the end: collected weights, tied ones once, into a model made anew."""
    trained = item_lm(tied=True, seed=3)
    state = {name: value for name, value in trained.state_dict().items() if name != "lm_head.weight"}
    accelerator = SimpleNamespace(get_state_dict=lambda model: state, unwrap_model=lambda model: model)
    trainer = SimpleNamespace(
        accelerator=accelerator, model=None, is_fsdp_enabled=True, is_deepspeed_enabled=False,
        is_world_process_zero=lambda: True,
    )  # fmt: skip
    whole = trained_model(trainer, rebuild=lambda: item_lm(tied=True, seed=5))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in trained.state_dict().items())
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    del state["model.norm.weight"]
    with pytest.raises(TrainingError, match=r"model\.norm\.weight"):
        trained_model(trainer, rebuild=lambda: item_lm(tied=True, seed=5))
    trainer.is_world_process_zero = lambda: False
    assert trained_model(trainer, rebuild=base_lm) is None


# ------------------------------------------------------------------------------------------------------------- processes


def launched(world: Path, output: Path, processes: int, size: int) -> dict[str, list[float]]:
    driver = [str(Path(__file__).with_name("script_driver.py")), str(world), str(output), str(size)]
    config = CONFIGS / "accelerate" / "cpu_2_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", str(free_port())] if processes == 2 else []
    done = subprocess.run(
        [*command, *driver] if processes == 2 else [sys.executable, *driver],
        timeout=900,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = {}
    for name in SCRIPTS:
        state = json.loads((output / f"{name}-checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
        logs[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        load_artifact(output / name)
    return logs


@pytest.mark.slow
def test_two_processes_train_as_one(world, tmp_path):
    one, two = launched(world, tmp_path / "one", 1, 8), launched(world, tmp_path / "two", 2, 4)
    for name in SCRIPTS:
        assert len(one[name]) == 6 and one[name] == pytest.approx(two[name], abs=1e-4), name
    assert json.loads((tmp_path / "two" / "sft" / "metrics.json").read_text())["training"]["processes"] == 2
