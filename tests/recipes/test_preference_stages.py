"""Preference methods in recipes: feedback and self-play, end tokens, evaluation, kept pairs, and options without effect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hf_genrec.alignment.pair_datasets import load_pairs
from hf_genrec.data.interactions import load_data
from hf_genrec.data.splits import make_split
from hf_genrec.errors import RecipeError, TrainingError
from hf_genrec.recipes.dry_run import dry_run, dry_run_data
from hf_genrec.recipes.pipeline import train_recipe
from hf_genrec.recipes.resolver import resolve_recipe
from hf_genrec.recipes.stages import preference, staged

FIRST = {"causal": {"method": "sft", "options": {"families": {"next_item": 1.0}}}, "seq2seq": {"method": "next_item"}}
KINDS = {"causal": "minionerec", "seq2seq": "tiger_s_dpo"}  # three codes per item


def rated_data(**columns):
    """The data of the dry run with its ratings: item i has 1 + i % 5 stars."""
    plain, _ = dry_run_data()
    rows, items = plain.sequences.row_index(), plain.sequences.items
    log: dict[str, Any] = {
        "user_id": [plain.user_ids[row] for row in rows],
        "item_id": [plain.item_ids[item] for item in items],
        "timestamp": plain.sequences.timestamps.tolist(),
        "rating": (1.0 + items % 5).tolist(),
    }
    table = {"item_id": plain.item_ids, "title": plain.items.titles()}
    data = load_data(log, items=table, name="rated", min_user=0, min_item=0, extra_columns=["rating"])
    return data, make_split(data)


def run(kind: str, stage: dict[str, Any], data=None, **options):
    recipe = resolve_recipe(KINDS[kind], options | {"training.method_options": {"stages": [FIRST[kind], stage]}})
    return dry_run(recipe, *(data or dry_run_data()))


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of the preference stages, after they trained."""
    found = []
    original = preference._finished

    def spy(job, trainer, summary):
        result = original(job, trainer, summary)
        found.append(trainer)
        return result

    monkeypatch.setattr(preference, "_finished", spy)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_of_the_data_makes_the_pairs(kind, trainers):
    options = {"negatives": "feedback", "liked": 4, "disliked": 3, "num_negatives": 2, "pairs": None}
    run(kind, {"method": "softmax_dpo", "options": options}, rated_data())
    rows = trainers[0].train_dataset
    stars = lambda item: 1 + int(item[1:]) % 5
    assert len(rows) > 10 and all(stars(item) >= 4 for item in rows["chosen_item"])
    assert all(stars(item) <= 2 for row in rows["rejected_items"] for item in row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", ["self_play", "feedback"])
def test_iterations_by_self_play_and_by_the_towers_of_feedback(kind, reward, monkeypatch):
    options = {"iterations": 2, "share": 1.0, "requests": 4}
    options |= {"pairs": "self_play", "num_negatives": 2} if reward == "self_play" else {"reward": "feedback"}
    seen, original = [], staged._run

    def spy(job, model, tokenizer, place, stage, share):
        result = original(job, model, tokenizer, place, stage, share)
        seen.append(result.summary)
        return result

    monkeypatch.setattr(staged, "_run", spy)
    run(kind, {"method": "iterative_preference", "options": options}, rated_data())
    rounds = seen[-1]["iterations"]
    assert len(rounds) == 2 and all(entry["pairs"] > 0 for entry in rounds)
    assert ("rejected" in rounds[0]) == (reward == "self_play") and ("reward_top" in rounds[0]) == (
        reward == "feedback"
    )


@pytest.mark.parametrize("method", ["softmax_dpo", "grpo", "iterative_preference"])
@pytest.mark.parametrize("ended", [True, False])
def test_answers_end_as_the_recipe_trains_them(method, ended, trainers, monkeypatch):
    from hf_genrec.alignment.trainers import iterative_preference

    seen = []
    original = iterative_preference.IterativePreferenceTrainer._requests
    monkeypatch.setattr(
        iterative_preference.IterativePreferenceTrainer,
        "_requests",
        lambda self, *args: seen.append(original(self, *args)) or seen[-1],
    )
    options = {"grpo": {"num_generations": 4}, "iterative_preference": {"iterations": 1, "share": 1.0}}.get(method, {})
    monkeypatch.setattr(preference, "_sasrec_scores", lambda job: lambda rows: np.random.rand(len(rows), 48))
    run("causal", {"method": method, "options": options}, **{"model.end_items": ended})
    if method == "grpo":
        assert trainers[0].args.answer_eos == ended
        return
    rows = trainers[0].train_dataset if method == "softmax_dpo" else seen[0]
    names = ("chosen_ids", "rejected_ids") if method == "softmax_dpo" else ("target_ids", "chosen_ids", "rejected_ids")
    for name in names:
        answers = [ids if isinstance(ids[0], int) else ids[0] for ids in rows[name] if ids]
        assert {len(ids) for ids in answers} == {4 if ended else 3}, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["softmax_dpo", "grpo"])
def test_a_stage_evaluates_when_it_is_asked_to(kind, method, trainers):
    asked = {"training": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": False}}
    options = {"options": {"num_generations": 4} if method == "grpo" else {}}
    run(kind, {"method": method} | options | asked)
    run(kind, {"method": method} | options)
    with_it, without = ([log for log in one.state.log_history if "eval_loss" in log] for one in trainers)
    assert with_it and not without


@pytest.mark.parametrize(
    ("kind", "stage", "message"),
    [
        ("causal", {"method": "grpo", "options": {"sft_weight": 0.5}}, r"sft_weight 0\.5 has no effect"),
        ("seq2seq", {"method": "grpo", "options": {"logprobs": "level"}}, "logprobs 'level' has no effect"),
        ("causal", {"method": "softmax_dpo", "options": {"shared": [0, 1]}}, "shared has no effect on random"),
        ("seq2seq", {"method": "softmax_dpo", "options": {"liked": 3}}, "liked 3 has no effect"),
        (
            "seq2seq",
            {"method": "iterative_preference", "training": {"eval_strategy": "epoch"}},
            "eval_strategy 'epoch': iterative_preference ranks",
        ),
        (
            "seq2seq",
            {"method": "iterative_preference", "options": {"num_negatives": 3}},
            "num_negatives 3 has no effect",
        ),
        ("seq2seq", {"method": "iterative_preference", "options": {"pairs": "play"}}, "choose of reward, self_play"),
        (
            "seq2seq",
            {"method": "iterative_preference", "options": {"pairs": "self_play", "reward": "feedback"}},
            "reward 'feedback' has no effect",
        ),
    ],
)
def test_options_without_effect_are_refused_before_the_first_stage(kind, stage, message, monkeypatch) -> None:
    monkeypatch.setattr(staged, "_run", lambda *args: pytest.fail("a stage has begun"))
    with pytest.raises(RecipeError, match=f"stage 2 of 2, {stage['method']}: .*{message}"):
        run(kind, stage)


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "softmax_dpo", "options": {"negatives": "feedback", "feedback_column": "stars"}},
        {"method": "iterative_preference", "options": {"reward": "feedback", "feedback": {"stars": 3}}},
    ],
)
def test_feedback_that_the_data_lacks_is_named_before_the_first_stage(stage, monkeypatch) -> None:
    monkeypatch.setattr(staged, "_run", lambda *args: pytest.fail("a stage has begun"))
    with pytest.raises(TrainingError, match=r"stage 2 of 2, .*no column 'stars'.*extra_columns"):
        run("seq2seq", stage, rated_data())


def test_the_pairs_stay_beside_the_artefact(tmp_path, capsys) -> None:
    rows = [f"u{user},i{(user + step) % 12:02d},{100 * user + step}" for user in range(12) for step in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1}
    options: dict[str, Any] = {f"model.{name}": value for name, value in small.items()}
    options |= {"features.text": None, "identifiers.features": ["cooccurrence"], "features.cooccurrence.dim": 8}
    options |= {"codebook_sizes": [8, 8], "pca_dim": None, "max_steps": 1, "max_history": 4, "eval_strategy": "no"}
    dpo = {"method": "softmax_dpo", "options": {"num_negatives": 2, "pairs": 20}}
    options["training.method_options"] = {"stages": [{"method": "next_item", "training": {"ema_decay": None}}, dpo]}
    recipe = resolve_recipe("tiger_s_dpo", options)
    trained = train_recipe(recipe, tmp_path / "log.csv", tmp_path / "model", baselines=[])
    pairs = load_pairs(tmp_path / "model-stage-2-pairs.parquet")
    summary = trained.metrics["training"]["stages"][1]
    assert len(pairs) == summary["pairs"] == 20 and not (tmp_path / "model-checkpoints").exists()
    assert summary["pairs_file"] == "model-stage-2-pairs.parquet"
    assert f"kept in {tmp_path / 'model-stage-2-pairs.parquet'}" in capsys.readouterr().out
