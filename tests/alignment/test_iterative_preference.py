"""OneRec's iterations and Align3GR's stages: whose answers, whose reference, what rises, what stops, what resumes."""

from __future__ import annotations

import copy
import shutil
import tempfile

import numpy as np
import pytest
import torch
from preference_cases import catalogue, histories, tiger
from test_mixed_preference import causal_lm

from hf_genrec.alignment.negatives import shared_prefix
from hf_genrec.alignment.rewards import CollaborativeReward
from hf_genrec.alignment.self_preference import RewardPairs, SampledPairs, prefix_ranges, self_play_stages
from hf_genrec.alignment.trainers import iterative_preference
from hf_genrec.alignment.trainers.iterative_preference import IterativePreferenceTrainer, target_nll
from hf_genrec.alignment.trainers.mixed_preference import MixedPreferenceConfig, Seq2SeqMixedPreferenceConfig
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import TrainingError
from hf_genrec.generation.recommend import recommend
from hf_genrec.recipes.stages import staged

TOKENIZER = catalogue()
PAST, CHOSEN = histories(40, seed=1)
ROWS = EvaluationSet(np.arange(40), PAST, CHOSEN)


def likes_high_numbers(past: list[np.ndarray], items_BN: np.ndarray) -> np.ndarray:
    return items_BN / 64.0


def model_of(kind: str, seed: int = 0):
    return tiger(TOKENIZER, seed) if kind == "seq2seq" else causal_lm(seed)


def args_of(kind: str, folder, **options):
    values = {
        "output_dir": str(folder), "learning_rate": 5e-3, "per_device_train_batch_size": 8, "num_train_epochs": 2,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant",
        "warmup_steps": 0, "logging_steps": 1, "beta": 0.5, **options,
    }  # fmt: skip
    if kind == "seq2seq":
        return Seq2SeqMixedPreferenceConfig(**values)
    return MixedPreferenceConfig(bf16=False, gradient_checkpointing=False, **values)


def driver_of(kind: str, folder, model=None, pairs=None, **options) -> IterativePreferenceTrainer:
    names = ("iterations", "validation", "max_drop", "max_nll_rise", "requests_per_iteration", "train_counts")
    own = {name: options.pop(name) for name in names if name in options}
    if pairs is None:
        pairs = RewardPairs(likes_high_numbers, num_candidates=12, share=0.4)
    return IterativePreferenceTrainer(
        model if model is not None else model_of(kind), TOKENIZER, ROWS, pairs, args_of(kind, folder, **options), **own
    )


_FITTED: dict[str, object] = {}


def fitted(kind: str):
    """A model that knows some of the targets; every call gives a copy."""
    if kind not in _FITTED:
        with tempfile.TemporaryDirectory() as folder:
            model = model_of(kind)
            driver_of(kind, folder, model, dpo_weight=0.0, iterations=1, num_train_epochs=6).train()
        _FITTED[kind] = model
    return copy.deepcopy(_FITTED[kind])


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------------------- the pairs


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_best_and_worst_of_the_model_s_own_beam(kind):
    """Against `recommend` and the reward by hand, for the drawn share of the requests only."""
    model = model_of(kind).eval()
    found = RewardPairs(likes_high_numbers, num_candidates=8, share=0.25, batch_size=3)(model, TOKENIZER, ROWS, 2)
    assert len(found.rows) == 10 and found.summary["requests"] == 10
    ids = [[TOKENIZER.item_ids[item] for item in PAST[row]] for row in found.rows]
    lists = recommend(model, ids, tokenizer=TOKENIZER, k=8, num_beams=8)
    items = np.array([[int(r.item_id[1:]) for r in row] for row in lists])
    assert found.chosen.tolist() == items.max(axis=1).tolist()
    assert found.rejected[:, 0].tolist() == items.min(axis=1).tolist()
    assert found.summary["reward_top"] == pytest.approx(items[:, 0].mean() / 64)
    assert found.summary["reward_chosen"] == pytest.approx(items.max(axis=1).mean() / 64)
    again = RewardPairs(likes_high_numbers, num_candidates=8, share=0.25)(model, TOKENIZER, ROWS, 3)
    assert again.rows.tolist() != found.rows.tolist()  # other requests in another iteration


def test_rewards_that_say_nothing_or_nonsense():
    model = model_of("seq2seq")
    with pytest.raises(TrainingError, match="prefers nothing"):
        RewardPairs(lambda past, items: np.ones(items.shape), num_candidates=4)(model, TOKENIZER, ROWS)
    with pytest.raises(TrainingError, match="one finite number per candidate"):
        RewardPairs(lambda past, items: np.full(items.shape, np.nan), num_candidates=4)(model, TOKENIZER, ROWS)
    half = lambda past, items: np.where(np.array([len(row) for row in past])[:, None] > 3, items, 0)
    found = RewardPairs(half, num_candidates=4, share=1.0)(model, TOKENIZER, ROWS)
    assert found.rows.tolist() == [row for row in range(40) if len(PAST[row]) > 3]
    with pytest.raises(TrainingError, match="share=0"):
        RewardPairs(half, share=0)


def test_requests_with_too_few_candidates_left_get_no_pair(caplog):
    """13 of 16 items seen and 8 candidates asked for; items of a shared code count once, with their last unseen one."""
    tokenizer = catalogue(16, shared=2)  # 14 codes: items 14 and 15 are those of 0 and 1 again
    model = tiger(tokenizer).eval()
    past = Sequences.from_rows([list(range(13)), [3, 4], [0, 1, 2, 3, 4, 5, 6, 7], [14, 15, 2, 3, 4, 5, 0]])
    rows = EvaluationSet(np.arange(4), past, np.array([13, 5, 8, 6]))
    found = RewardPairs(likes_high_numbers, num_candidates=8, share=1.0)(model, tokenizer, rows)
    assert found.rows.tolist() == [1, 2, 3] and found.summary["requests"] == 3
    assert "1 of 4 requests" in caplog.text and "num_candidates=8" in caplog.text
    with pytest.raises(TrainingError, match=r"1 of 1 requests .* lower num_candidates"):
        RewardPairs(likes_high_numbers, num_candidates=8, share=1.0)(model, tokenizer, rows.take(np.array([0])))
    kept = RewardPairs(likes_high_numbers, num_candidates=8, share=1.0, exclude_seen=False)(model, tokenizer, rows)
    assert kept.rows.tolist() == [0, 1, 2, 3]


def test_stages_have_exactly_the_prescribed_prefixes():
    codes = np.asarray(TOKENIZER.codes)
    pairs = SampledPairs(self_play_stages(TOKENIZER, num_beams=64), num_negatives=2)
    assert prefix_ranges(3) == [(0, 0), (1, 1), (2, 2)]
    model = model_of("seq2seq")
    for iteration, (least, most) in enumerate([(0, 0), (1, 1), (2, 2), (2, 2)]):  # the last stage goes on
        found = pairs(model, TOKENIZER, ROWS, iteration)
        assert len(found.rows) == 40 and found.chosen.tolist() == CHOSEN.tolist()
        for row, rejected in enumerate(found.rejected):
            assert (rejected >= 0).all() and not set(rejected) & set(PAST[row])
            lengths = shared_prefix(codes[rejected], codes[found.chosen[row]][None])
            assert lengths.min() >= least and lengths.max() <= most


# -------------------------------------------------------------------------------------------------------- the rounds


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_the_reward_of_the_top_rises_and_every_reference_is_the_model_of_its_iteration(tmp_path, kind, monkeypatch):
    started, references = [], []
    name = "Seq2SeqMixedPreferenceTrainer" if kind == "seq2seq" else "MixedPreferenceTrainer"
    original = getattr(iterative_preference, name)

    class Spy(original):
        def train(self, *args, **kwargs):
            started.append(state(self.model))
            result = super().train(*args, **kwargs)
            references.append(state(self.accelerator.unwrap_model(self.ref_model)))
            return result

    monkeypatch.setattr(iterative_preference, name, Spy)
    counts = np.bincount(PAST.items, minlength=64)
    everyone = RewardPairs(likes_high_numbers, num_candidates=12, share=1.0)
    tops, nlls = {}, {}
    for name, weights in {"both": (1.0, 3.0), "no preferences": (1.0, 0.0), "no targets": (0.0, 3.0)}.items():
        model = fitted(kind)
        tops["before"] = everyone(model, TOKENIZER, ROWS).summary["reward_top"]
        nlls["before"] = target_nll(model, TOKENIZER, ROWS)
        driver = driver_of(kind, tmp_path / name, model, iterations=3, validation=ROWS, train_counts=counts, max_drop=0.99,
                           max_nll_rise=50.0, ntp_weight=weights[0], dpo_weight=weights[1])  # fmt: skip
        result = driver.train()
        tops[name] = everyone(model, TOKENIZER, ROWS).summary["reward_top"]
        nlls[name] = target_nll(model, TOKENIZER, ROWS)
        assert [len(result.history), result.stopped] == [3, ""]
        assert result.history[-1]["validation"]["nll"] == pytest.approx(nlls[name])
        assert all(entry["rows"] == 40 and entry["pairs"] == 16 for entry in result.history)
    for start in range(0, 9, 3):
        for iteration in range(start, start + 3):
            assert same(started[iteration], references[iteration])  # M_t, and it stays
            assert iteration == start or not same(started[start], references[iteration])  # not M_0
    assert tops["both"] > tops["before"] + 0.1 and tops["both"] > tops["no preferences"] + 0.1
    assert (
        nlls["both"] < nlls["before"] + 1.0 < nlls["no targets"] + 1.0
    )  # what keeps the likelihood is the targets' loss
    assert nlls["both"] < nlls["no targets"]
    assert set(result.buckets("ndcg@10").buckets) == {"head", "tail", "cold"}
    assert not driver.model.training and "forward" not in driver.model.__dict__


def test_likelihood_of_targets_is_that_of_score_all():
    for kind in ("seq2seq", "causal"):
        model = model_of(kind).eval()
        total = 0.0
        for row in range(40):
            ids = [[TOKENIZER.item_ids[item] for item in PAST[row]]]
            best = recommend(model, ids, tokenizer=TOKENIZER, k=64, num_beams=64, exclude_seen=False)[0]
            total -= next(r.score for r in best if r.item_id == TOKENIZER.item_ids[CHOSEN[row]])
        assert target_nll(model, TOKENIZER, ROWS, batch_size=7) == pytest.approx(total / 40, abs=1e-4)


@pytest.mark.parametrize("limit", ["metric", "nll"])
def test_a_collapse_stops_the_run_and_goes_back(tmp_path, limit):
    """No next-token loss, huge steps, an adverse reward: the guard names the cause, the model is the one before."""
    model = fitted("seq2seq")
    before = state(model)

    def dislikes_targets(past, items):
        wanted = {tuple(PAST[row]): CHOSEN[row] for row in range(40)}
        return np.array([[float(item != wanted[tuple(row)]) for item in line] for row, line in zip(past, items)])

    bad = {"ntp_weight": 0.0, "dpo_weight": 1.0, "learning_rate": 5e-2, "num_train_epochs": 3, "beta": 0.05}
    guards = {"max_drop": 0.2, "max_nll_rise": 1e9} if limit == "metric" else {"max_drop": 0.999, "max_nll_rise": 0.5}
    pairs = RewardPairs(dislikes_targets, num_candidates=8, share=1.0)
    driver = driver_of("seq2seq", tmp_path / "bad", model, pairs, iterations=3, validation=ROWS, **guards, **bad)
    result = driver.train()
    assert result.stopped.startswith("iteration 1 of 3 stops the run: ")
    assert ("validation ndcg@10 fell from" if limit == "metric" else "negative log-likelihood rose") in result.stopped
    assert "ntp_weight (now 0)" in result.stopped and len(result.history) == 1
    assert same(before, state(model)) and result.after["ndcg@10"] == result.before["ndcg@10"]
    again = driver_of("seq2seq", tmp_path / "bad", model, pairs, iterations=3, validation=ROWS, **guards, **bad)
    assert again.train(resume=True).stopped == result.stopped and same(before, state(model))
    # without the guard the same run goes on: the collapse is real
    free = driver_of("seq2seq", tmp_path / "free", model, pairs, iterations=1, **bad)
    free.train()
    assert target_nll(model, TOKENIZER, ROWS) > result.history[0]["validation"]["nll"] - 1e-3


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_resumes_between_iterations_with_the_same_bits(tmp_path, kind):
    whole = driver_of(kind, tmp_path / "w", iterations=3, requests_per_iteration=10, num_train_epochs=1)
    history = whole.train().history
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["iteration-3"]
    assert all(entry["rows"] == 26 for entry in history)
    part = driver_of(kind, tmp_path / "p", iterations=2, requests_per_iteration=10, num_train_epochs=1)
    part.train()
    with pytest.raises(TrainingError, match="iterations of an earlier run"):
        driver_of(kind, tmp_path / "p").train()
    half = tmp_path / "p" / "iteration-3"
    shutil.copytree(tmp_path / "p" / "iteration-2", half)
    (half / "model.safetensors").write_bytes(b"cut off")  # half an iteration: the one before it is taken
    again = driver_of(kind, tmp_path / "p", iterations=3, requests_per_iteration=10, num_train_epochs=1)
    resumed = again.train(resume=True).history
    assert same(state(whole.model), state(again.model))
    drop = lambda entry: {name: value for name, value in entry.items() if name != "seconds"}
    assert list(map(drop, resumed)) == list(map(drop, history))


class Bystander:
    """PartialState of a process that is not the main one."""

    is_main_process, waits = False, 0

    def wait_for_everyone(self):
        Bystander.waits += 1


def test_processes_beside_the_main_one_write_and_remove_nothing(tmp_path, monkeypatch):
    driver_of("seq2seq", tmp_path / "w", iterations=1, num_train_epochs=1).train()
    shutil.copytree(tmp_path / "w" / "iteration-1", tmp_path / "p" / "iteration-1")
    before = sorted((tmp_path / "p").rglob("*"))
    monkeypatch.setattr(iterative_preference, "PartialState", Bystander)
    driver = driver_of("seq2seq", tmp_path / "p", iterations=2, num_train_epochs=1)
    assert len(driver.train(resume=True).history) == 2
    after = [path for path in sorted((tmp_path / "p").rglob("*")) if "running" not in path.parts]
    assert after == before and Bystander.waits >= 5

    monkeypatch.setattr(staged, "PartialState", Bystander)
    Bystander.waits = 0
    (tmp_path / "s" / "running").mkdir(parents=True)
    staged._store(tmp_path / "s", driver.model, TOKENIZER, {})
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["running"] and Bystander.waits == 2
    monkeypatch.undo()
    staged._store(tmp_path / "s", driver.model, TOKENIZER, {"steps": 1})
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["finished"]
    assert staged._finished(tmp_path / "s", driver.model, TOKENIZER)[2] == {"steps": 1}


def test_a_collaborative_reward_and_stage_wise_preferences_run_on_both_kinds(tmp_path):
    reward = CollaborativeReward(lambda past: np.random.default_rng(0).random((len(past), 64)))
    for kind in ("seq2seq", "causal"):
        one = driver_of(
            kind, tmp_path / f"r{kind}", pairs=RewardPairs(reward, num_candidates=6, share=0.1), iterations=1
        )
        assert one.train().history[0]["pairs"] == 4
        stages = SampledPairs(self_play_stages(TOKENIZER, num_beams=20), num_negatives=3, share=0.5)
        two = driver_of(kind, tmp_path / f"s{kind}", pairs=stages, iterations=3, num_train_epochs=1)
        found = [entry["rejected"] for entry in two.train().history]
        assert found[:2] == [3.0, 3.0] and 2.5 < found[2] <= 3.0  # 3 items share two codes, some are in histories


def test_lora_iterates_on_the_adapter_alone(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = causal_lm()
    before = state(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config)
    fresh = copy.deepcopy(model)
    driver = driver_of("causal", tmp_path, model, iterations=2)
    driver.train()
    assert set(model.peft_config) == {"default"} and model.active_adapter == "default"
    inner = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(inner[name], value) for name, value in before.items())
    ids = torch.tensor([[4, 8, 12]])
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path / "iteration-2")
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits
        assert torch.allclose(ours, theirs, atol=1e-6) and not torch.allclose(
            ours, base(input_ids=ids).logits, atol=1e-3
        )
    again = driver_of("causal", tmp_path, fresh, iterations=2)
    again.train(resume=True)
    assert same(state(model), state(fresh))


def test_bad_options(tmp_path):
    with pytest.raises(TrainingError, match="needs args of Seq2SeqMixedPreferenceConfig"):
        IterativePreferenceTrainer(model_of("seq2seq"), TOKENIZER, ROWS, None, args_of("causal", tmp_path))
    with pytest.raises(TrainingError, match="max_drop=1"):
        driver_of("seq2seq", tmp_path, max_drop=1)
    with pytest.raises(TrainingError, match="no validation set"):
        driver_of("seq2seq", tmp_path, iterations=1, num_train_epochs=1).train().buckets()
