"""Language models with item tokens and training in stages, as recipes: from the YAML to a folder that recommends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_genrec
from hf_genrec.cli.main import main
from hf_genrec.errors import IncompatibleComponentsError, RecipeError
from hf_genrec.hub.artifact import load_artifact
from hf_genrec.recipes.dry_run import dry_run_data, shrunk
from hf_genrec.recipes.pipeline import train_recipe
from hf_genrec.recipes.resolver import resolve_recipe
from hf_genrec.recipes.stages import staged

LLAMA = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
NO_TEXT = {"features.text": None, "identifiers.features": ["cooccurrence"], "features.cooccurrence.dim": 16}
SHORT = {"max_history": 12, "eval_users": 100, "logging_steps": 1000}
LANGUAGE = {"model.base": None, "model.language_model": LLAMA, "model.text_vocab_size": 400}
CODES = {"codebook_sizes": [8, 8], "pca_dim": None, "max_load": None}
NEXT = {"families": {"next_item": 1.0}}


def write_log(folder: Path, items: int = 40, users: int = 50, length: int = 14) -> Path:
    """A log in which item i is followed by i + 1 (cyclic)."""
    rows = ["user_id,item_id,timestamp"]
    for user in range(users):
        start = (user * 17) % items
        rows += [f"u{user},i{(start + step) % items:02d},{1_000_000 + user * 50 + step}" for step in range(length)]
    (folder / "log.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    titles = [f'i{n:02d},"</s> number {n} <a_1>"' for n in range(items)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *titles]) + "\n", encoding="utf-8")
    return folder / "log.csv"


def run(tmp_path: Path, name: str, options: dict, **more):
    log = write_log(tmp_path)
    recipe = resolve_recipe(name, NO_TEXT | SHORT | LANGUAGE | options)
    return train_recipe(
        recipe, log, tmp_path / "model", items=tmp_path / "items.csv", baselines=["popularity"], progress=False, **more
    )


TINY = {"codebook_sizes": [8, 8], "latent_size": 8, "hidden_sizes": [16]}


@pytest.mark.slow
def test_a_language_model_learns_the_successor(tmp_path) -> None:
    training = {"num_train_epochs": 100, "learning_rate": 3e-3, "eval_epochs": 20, "per_device_train_batch_size": 4}
    options = TINY | training | {"identifiers.max_steps": 300, "model.lora": None, "training.method_options": NEXT}
    trained = run(tmp_path, "lc_rec", options)
    assert trained.metrics["test"]["recall@1"] == 1.0
    assert trained.metrics["training"]["rows_per_family"]["next_item"] > 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    histories = [["i00", "i01", "i02", "i03", "i04"], ["i35", "i36", "i37", "i38", "i39"]]
    found = hf_genrec.recommend(stock, histories, tokenizer=tokenizer, k=1)
    assert [row[0].item_id for row in found] == ["i05", "i00"]
    again = load_artifact(tmp_path / "model").recommend(histories, k=3)
    assert again[0][0].item_id == "i05" and len({r.item_id for r in again[0]}) == 3


def test_single_item_tokens_start_from_the_items_vectors(tmp_path, monkeypatch) -> None:
    """Distances between the new rows are those of the recipe's item vectors, up to one factor."""
    from hf_genrec.alignment import item_embeddings

    add_item_tokens, seen = item_embeddings.add_item_tokens, {}

    def spy(model, tokenizer, **options):
        add_item_tokens(model, tokenizer, **options)
        start = int(tokenizer.level_offsets[0])
        seen.update(options, rows=model.get_input_embeddings().weight[start : start + 40].detach().clone())
        return model

    monkeypatch.setattr(item_embeddings, "add_item_tokens", spy)
    short = {"max_steps": 1, "model.dtype": "float32", "model.lora": {"r": 4, "alpha": 8}, "identifiers.pca_dim": 8}
    trained = run(tmp_path, "item_lm", short | {"warmup_steps": 0})
    vectors = torch.as_tensor(seen["codebooks"][0])
    assert seen["init"] == "codebook" and vectors.shape == (40, 8)
    ratio = torch.pdist(seen["rows"]) / torch.pdist(vectors)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=1e-5)
    assert trained.metrics["identifiers"]["collision_rate"] == 0


def test_adapters_are_merged_into_a_stock_checkpoint_that_recommends(tmp_path, capsys) -> None:
    options = TINY | {"identifiers.max_steps": 2, "model.lora": {"r": 4, "alpha": 8}, "training.max_steps": 3}
    trained = run(tmp_path, "lc_rec", options | {"eval_strategy": "no", "training.method_options": NEXT})
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(stock).__name__ == "LlamaForCausalLM" and not any("lora" in name for name in stock.state_dict())
    for name, weight in stock.state_dict().items():
        assert torch.equal(weight, trained.model.state_dict()[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    served = load_artifact(tmp_path / "model").recommend([["i03", "i04"]], k=5)[0]
    assert {one.item_id for one in served} <= set(tokenizer.item_ids) - {"i03", "i04"} and len(served) == 5
    direct = hf_genrec.recommend(trained.model, [["i03", "i04"]], tokenizer=trained.tokenizer, k=5)[0]
    assert [one.item_id for one in served] == [one.item_id for one in direct]
    capsys.readouterr()  # what training printed
    assert main(["recommend", str(tmp_path / "model"), "--history", "i03,i04", "-k", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recommendations"]
    assert [row["item_id"] for row in rows] == [one.item_id for one in direct]
    log = str(tmp_path / "log.csv")
    assert main(["evaluate", str(tmp_path / "model"), "--dataset", log, "--num_beams", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["recall@10"] == pytest.approx(trained.metrics["test"]["recall@10"])


RANKERS = ("tallrec", "collm", "llara", "a_llmrec", "llamarec", "llmrank")


@pytest.mark.parametrize("name", RANKERS)
def test_rankers_stand_beside_their_retriever(tmp_path, name) -> None:
    options = LANGUAGE | {"model.num_candidates": 5, "model.max_title_tokens": 12, "model.max_history": 3}
    if name == "a_llmrec":
        options |= NO_TEXT
    if name != "llmrank":
        options |= {"training.max_steps": 4, "training.method_options": {"samples": 16}, "logging_steps": 1000}
    log = write_log(tmp_path)
    trained = train_recipe(
        resolve_recipe(name, options), log, tmp_path / "model", items=tmp_path / "items.csv", baselines=[],
        test_users=12, progress=False,
    )  # fmt: skip
    # the language model orders the retriever's five best: no other item comes in, none falls out
    retriever = trained.baselines["retriever"]
    assert trained.metrics["test"]["recall@5"] == retriever.removed["recall@5"]
    assert "ndcg@10" in trained.metrics["differences"]["retriever"]
    found = trained.metrics["buckets"]["test"]
    assert found["before"] == "retriever" and found["after"] == name and "cold" in found["buckets"]
    assert found["all"]["before"] == trained.metrics["baselines"]["retriever"]["ndcg@10"]
    assert found["all"]["after"] == trained.metrics["test"]["ndcg@10"]
    histories = [["i03", "i04"], ["i20"]]
    direct = trained.model.recommend(histories, tokenizer=trained.tokenizer, k=5)
    alone = trained.model.retriever.recommend(histories, tokenizer=trained.tokenizer, k=5)
    assert [{r.item_id for r in row} for row in direct] == [{r.item_id for r in row} for row in alone]
    again = load_artifact(tmp_path / "model").recommend(histories, k=5)
    assert [[r.item_id for r in row] for row in again] == [[r.item_id for r in row] for row in direct]


_SFT = {
    "method": "sft",
    "options": NEXT,
    "training": {"num_train_epochs": 100, "learning_rate": 3e-3, "per_device_train_batch_size": 4},
}
_TIGER = {
    "method": "next_item",
    "training": {"num_train_epochs": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "ema_decay": None},
}
_AFTER = {
    "s_dpo": {"method": "softmax_dpo", "options": {"num_negatives": 7, "sft_weight": 0.5, "pairs": 300}},  # one token
    "minionerec s_dpo": {"method": "softmax_dpo", "options": {"num_negatives": 3, "negatives": "beam", "pairs": 60}},
    "minionerec": {"method": "grpo", "options": {"num_generations": 4, "prompts": 60}},
    "tiger_s_dpo": {"method": "softmax_dpo", "options": {"negatives": "prefix", "shared": [0, 1], "pairs": 60}},
    "tiger_grpo": {"method": "grpo", "options": {"num_generations": 4, "prompts": 60}},
    "onerec": {
        "method": "iterative_preference",
        "options": {"iterations": 2, "share": 0.2, "num_candidates": 6, "requests": 40, "dpo_weight": 0.2},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_AFTER))
def test_alignment_stages_keep_the_successor_and_report_buckets(tmp_path, name) -> None:
    second = _AFTER[name] | {
        "training": {"num_train_epochs": 1, "learning_rate": 1e-5, "per_device_train_batch_size": 8}
    }
    name = name.split()[0]
    language = name in ("s_dpo", "minionerec")
    first = _SFT if language else _TIGER
    small = {"model.d_model": 32, "model.num_layers": 1, "model.num_decoder_layers": 1, "model.dropout_rate": 0.0}
    options = NO_TEXT | SHORT | CODES | (LANGUAGE | {"model.lora": None} if language else small)
    if name == "onerec":
        options.pop("max_load")
    if name == "s_dpo":
        options = {key: value for key, value in options.items() if key not in ("codebook_sizes", "max_load")}
    recipe = resolve_recipe(name, options | {"training.method_options": {"stages": [first, second]}})
    log = write_log(tmp_path)
    trained = train_recipe(recipe, log, tmp_path / "model", items=tmp_path / "items.csv", baselines=[], progress=False)
    summaries = trained.metrics["training"]["stages"]
    assert [summary["method"] for summary in summaries] == [first["method"], second["method"]]
    assert summaries[0]["validation"]["recall@10"] == 1.0 and summaries[0]["buckets"]["all"]["verdict"] == "better"
    assert set(summaries[1]["buckets"]["buckets"]) <= {"head", "tail", "cold"} and "worse" in summaries[1]["buckets"]
    assert trained.metrics["test"]["recall@1"] >= 0.95  # the preferences must not undo what was learned


ALIGNED = {"num_train_epochs": 1, "model.dtype": "float32", "per_device_train_batch_size": 4}
AROUND = {"model.base": None, "model.language_model": LLAMA}
_TEXT_TO_TEXT = {"model.d_model": 32, "model.d_kv": 16, "model.num_layers": 1, "model.num_decoder_layers": 1}
_COMPARED = {
    "item_lm": NO_TEXT | LANGUAGE | ALIGNED | {"identifiers.pca_dim": 8, "model.lora": {"r": 4, "dropout": 0.1}},
    "lc_rec": NO_TEXT | LANGUAGE | ALIGNED | TINY | {"identifiers.max_steps": 2, "training.method_options": NEXT},
    "e4srec": AROUND | {"features.sasrec": {"epochs": 1}, "num_train_epochs": 1, "model.lora": {"r": 4}},
    "bigrec": AROUND | {"identifiers.text_tokenizer": None, "identifiers.item_end_token": None, "vocab_size": 400},
    "p5": _TEXT_TO_TEXT | {"num_train_epochs": 1, "ema_decay": None},
}


@pytest.mark.parametrize("name", sorted(_COMPARED))
def test_alignment_is_compared_with_the_model_before_its_first_step(tmp_path, monkeypatch, caplog, name) -> None:
    """By buckets, on the same users; and training is what it is without: same weights, nothing of its time budget."""
    log = write_log(tmp_path)
    options = _COMPARED[name] | SHORT | {"eval_users": 30, "eval_epochs": 1}
    recipe = resolve_recipe(name, options)

    def trained(folder: str, recipe=recipe):
        items = tmp_path / "items.csv"
        return train_recipe(recipe, log, tmp_path / folder, items=items, baselines=[], test_users=10, progress=False)

    compared = trained("compared")
    (stage,) = compared.metrics["training"]["stages"]
    assert stage["method"] == recipe.training.get("method", "next_item")
    found = stage["buckets"]
    assert (found["before"], found["after"]) == ("before training", "after training")
    assert found["all"]["targets"] == 30 and set(found["buckets"]) == {"head", "tail", "cold"}
    assert found["all"]["after"] == stage["validation"]["ndcg@10"]
    untouched = resolve_recipe(name, options | {"max_steps": 1, "learning_rate": 0.0, "warmup_steps": 0})
    same = trained("untouched", untouched).metrics["training"]["stages"][0]["buckets"]["all"]
    assert same["before"] == found["all"]["before"]
    if name not in ("bigrec", "p5"):  # whose methods also choose a number or the words of a prompt
        assert same["after"] == same["before"]  # the model that training begins with, searched in the same way
    monkeypatch.setattr("hf_genrec.recipes.pipeline.compares", lambda job: False)
    alone = trained("alone")
    assert "stages" not in alone.metrics["training"]
    for one, other in zip(compared.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ranking_before_training_is_no_part_of_its_time(tmp_path, monkeypatch) -> None:
    from hf_genrec.alignment.trainers.callbacks import TimeBudgetCallback
    from hf_genrec.recipes.stages import judged

    events, evaluate, begin = [], judged.evaluate, TimeBudgetCallback.on_train_begin
    monkeypatch.setattr(
        judged, "evaluate", lambda *args, **more: events.append(more["name"]) or evaluate(*args, **more)
    )
    monkeypatch.setattr(
        TimeBudgetCallback, "on_train_begin", lambda *args, **more: events.append("clock") or begin(*args, **more)
    )
    options = _COMPARED["item_lm"] | {"max_steps": 1, "training.max_train_seconds": 600.0, "eval_strategy": "no"}
    trained = run(tmp_path, "item_lm", options)
    assert events == ["before training", "clock", "after training"]
    assert trained.metrics["wall_seconds"]["validation before training"] > 0
    events.clear()
    quiet = run(tmp_path, "item_lm", options | {"eval_users": None})  # a run that ranks no validation users at all
    assert events == ["clock"] and "stages" not in quiet.metrics["training"]


def test_a_bucket_that_got_worse_is_in_the_card(tmp_path, monkeypatch, caplog) -> None:
    from hf_genrec.recipes import pipeline

    def ranks(rank: float):
        def report(job, *args):
            found = judged_ranked(job, job.model, job.tokenizer, "before" if rank == 1 else "after")
            found.removed.ranks_M[:] = rank
            return found

        return report

    judged_ranked = pipeline.ranked
    monkeypatch.setattr(pipeline, "ranked_before", ranks(1))
    monkeypatch.setattr(pipeline, "ranked", ranks(float("inf")))
    trained = run(tmp_path, "item_lm", _COMPARED["item_lm"] | {"max_steps": 1})
    (note,) = trained.metrics["notes"]
    assert "ndcg@10 got worse from before to after" in note and "head items" in note
    assert note in caplog.text and "got worse from before to after" in (trained.folder / "README.md").read_text()


def test_stages_go_on_where_they_were_interrupted(tmp_path, monkeypatch) -> None:
    stage = {"method": "next_item", "training": {"num_train_epochs": 2, "ema_decay": None}}
    options = {"codebook_sizes": [8, 8], "pca_dim": None} | NO_TEXT
    options |= {
        "model.d_model": 16,
        "model.num_layers": 1,
        "model.num_decoder_layers": 1,
        "eval_epochs": 1,
        "max_history": 8,
    }
    options |= {"training.method_options": {"stages": [stage, stage | {"training": {"num_train_epochs": 1}}]}}
    log = write_log(tmp_path, items=12, users=12, length=6)
    recipe = resolve_recipe("tiger_s_dpo", options)
    whole = train_recipe(recipe, log, tmp_path / "whole", baselines=[], progress=False)

    original, calls = staged._run, []

    def interrupted(job, model, tokenizer, place, stage, share):
        calls.append(place.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(job, model, tokenizer, place, stage, share)

    monkeypatch.setattr(staged, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe, log, tmp_path / "cut", baselines=[], progress=False)
    monkeypatch.setattr(staged, "_run", original)
    finished = tmp_path / "cut-checkpoints" / "stage-1-next_item" / "finished"
    assert json.loads((finished / "stage.json").read_text())["validation"]
    resumed = train_recipe(recipe, log, tmp_path / "cut", baselines=[], progress=False, resume=True)
    assert len(calls) == 2  # the first stage did not run again
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    first, second = resumed.metrics["training"]["stages"]
    assert first["buckets"]["before"] == "before training" and second["buckets"]["before"] == "after next_item"
    expected = [stage["buckets"] for stage in whole.metrics["training"]["stages"]]
    assert [first["buckets"], second["buckets"]] == expected  # before its first step, resumed or not


def test_stages_share_the_training_time(tmp_path, monkeypatch) -> None:
    from types import SimpleNamespace

    from hf_genrec.recipes.components import METHODS
    from hf_genrec.recipes.stages.context import MethodResult

    first = {"method": "next_item", "share": 3, "training": {"learning_rate": 0.5}}
    options = {"codebook_sizes": [8, 8], "pca_dim": None, "model.d_model": 16, "eval_strategy": "no"} | NO_TEXT
    options |= {"training.max_train_seconds": 40.0, "lr_scheduler_type": "linear"}
    options |= {"training.method_options": {"stages": [first, {"method": "next_item"}]}}
    recipe = resolve_recipe("tiger_s_dpo", options)
    onerec = {"method": "iterative_preference", "options": {"iterations": 4}}
    in_rounds = resolve_recipe("tiger_s_dpo", options | {"training.method_options": {"stages": [first, onerec]}})
    seen = []

    def method(job):
        seen.append((job.args.max_train_seconds, job.recipe.training["max_train_seconds"], job.args.learning_rate))
        return MethodResult(job.model, job.tokenizer, {})

    monkeypatch.setitem(METHODS, "next_item", SimpleNamespace(load=lambda: method))
    log = write_log(tmp_path, items=12, users=12, length=6)
    train_recipe(recipe, log, tmp_path / "model", baselines=[], progress=False)
    rate = recipe.training["learning_rate"]
    rounds = []

    def driver(model, tokenizer, rows, pairs, args, **options):
        rounds.append((args.max_train_seconds, options["iterations"]))
        raise InterruptedError

    monkeypatch.setattr("hf_genrec.alignment.trainers.iterative_preference.IterativePreferenceTrainer", driver)
    monkeypatch.setattr("hf_genrec.recipes.stages.preference._sasrec_scores", lambda job: lambda rows: rows)
    with pytest.raises(InterruptedError):
        train_recipe(in_rounds, log, tmp_path / "rounds", baselines=[], progress=False)
    assert rounds == [(2.5, 4)]  # the stage's 10 seconds, shared out among its rounds
    assert seen.pop() == (30.0, 30.0, 0.5)
    assert seen == [(30.0, 30.0, 0.5), (10.0, 10.0, rate)]
    with pytest.raises(RecipeError, match=r"stages\[0\].share: 0 is no part"):
        resolve_recipe("tiger_s_dpo", {"training.method_options": {"stages": [{"method": "next_item", "share": 0}]}})


def test_the_dry_run_loads_no_pretrained_model() -> None:
    small = shrunk(resolve_recipe("bigrec"))
    assert small.model["base"] is None and "text_tokenizer" not in small.identifiers


def test_what_cannot_be_is_said_before_data_is_read() -> None:
    def stages(*listed):
        return {"training.method_options": {"stages": list(listed)}}

    with pytest.raises(RecipeError, match=r"stages\[0\].method.*did you mean 'softmax_dpo'"):
        resolve_recipe("s_dpo", stages({"method": "softmaxdpo"}))
    with pytest.raises(RecipeError, match=r"stages\[0\].options.num_negative.*num_negatives"):
        resolve_recipe("s_dpo", stages({"method": "softmax_dpo", "options": {"num_negative": 3}}))
    with pytest.raises(RecipeError, match=r"stages\[0\].training.learning_rat"):
        resolve_recipe("s_dpo", stages({"method": "sft", "training": {"learning_rat": 1.0}}))
    with pytest.raises(RecipeError, match="keys are method, options, training"):
        resolve_recipe("s_dpo", stages({"method": "sft", "families": {}}))
    with pytest.raises(RecipeError, match="not stages again"):
        resolve_recipe("s_dpo", stages({"method": "stages"}))
    with pytest.raises(RecipeError, match="must be a list"):
        resolve_recipe("s_dpo", {"training.method_options": {"stages": []}})
    with pytest.raises(IncompatibleComponentsError, match="'sft' needs a model that gives language_model"):
        resolve_recipe("tiger_s_dpo", stages({"method": "sft"}))
    with pytest.raises(IncompatibleComponentsError, match="needs a model that gives preferences"):
        resolve_recipe("sasrec", {"training.method": "softmax_dpo"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model.base": "/no/such/folder"}, IncompatibleComponentsError, r"--model.base FOLDER"),
        ({"model.language_model": None}, RecipeError, "model.base is missing"),
        ({"training.ema_decay": 0.9}, RecipeError, "ema_decay is no option of ItemSFTConfig"),
    ],
)
def test_errors_name_the_fix(tmp_path, change, error, message) -> None:
    options = {
        "codebook_sizes": [8, 8],
        "latent_size": 4,
        "hidden_sizes": [8],
        "identifiers.max_steps": 2,
        "max_steps": 1,
    }
    with pytest.raises(error, match=message):
        run(tmp_path, "lc_rec", options | change)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"method": "softmax_dpo", "options": {"negatives": "bream"}},
            "choose one of random, popularity, beam, prefix",
        ),
        ({"method": "grpo", "options": {"reward": "rules"}}, "choose one of rule, rank"),
        ({"method": "grpo", "options": {"reward": "semantic", "reward_features": "texts"}}, "no block of this recipe"),
        ({"method": "grpo", "options": {"num_generations": 3}}, "no multiple of num_generations 3"),
    ],
)
def test_errors_of_stages_name_the_choice(stage, message) -> None:
    from hf_genrec.recipes.dry_run import dry_run

    recipe = resolve_recipe("s_dpo", {"training.method_options": {"stages": [stage]}})
    with pytest.raises(RecipeError, match=message):
        dry_run(recipe, *dry_run_data())
