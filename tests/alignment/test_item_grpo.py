"""GRPO on items: rollouts, rewards by place, advantages and losses against TRL's formulas, references, LoRA, resuming."""

from __future__ import annotations

import copy
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from preference_cases import catalogue, histories
from transformers import LlamaConfig, LlamaForCausalLM

from hf_genrec.alignment.rewards import ItemReward, RankReward, RuleReward
from hf_genrec.alignment.rollouts import item_prompts
from hf_genrec.alignment.trainers.item_grpo import ItemGRPOConfig, ItemGRPOTrainer, restricted_log_probs
from hf_genrec.alignment.trainers.language_model import prompt_room
from hf_genrec.alignment.trainers.shared_prompts import packed_answers
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommend
from hf_genrec.generation.trie import ItemTrie

TOKENIZER = catalogue(48)
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.5, "pad_token_id": 0,
}  # fmt: skip


def causal_lm(seed: int = 0, extra: int = 7, **options) -> LlamaForCausalLM:
    """A language model whose vocabulary has tokens that are no items."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER) + extra, **{**SIZES, **options}))


def prompts(rows: int, seed: int = 0):
    past, chosen = histories(rows, num_items=48, seed=seed)
    return item_prompts(EvaluationSet(np.arange(rows), past, chosen), TOKENIZER)


def trainer_of(folder, model=None, rewards=None, dataset=None, **options) -> ItemGRPOTrainer:
    named = ("ref_model", "peft_config", "eval_dataset", "callbacks")
    more = {name: options.pop(name) for name in named if name in options}
    values = {
        "num_generations": 4, "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-2,
        "logging_steps": 1, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return ItemGRPOTrainer(
        model if model is not None else causal_lm(),
        rewards if rewards is not None else Recorder(),
        ItemGRPOConfig(output_dir=str(folder), **{**values, **options}),
        dataset if dataset is not None else prompts(8),
        processing_class=TOKENIZER,
        **more,
    )


class Recorder(ItemReward):
    """Keeps the groups it is asked about; pays the even items."""

    def __init__(self):
        super().__init__()
        self.groups = []

    def score(self, groups):
        self.groups.append(groups)
        return (groups.items_BG % 2 == 0).float()


@pytest.mark.parametrize("rollouts", ["beam", "sample"])
def test_rollouts_are_distinct_items_in_the_order_of_the_model(tmp_path, rollouts):
    reward, model = Recorder(), causal_lm()
    before = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model, reward, rollouts=rollouts, learning_rate=0.0, exclude_seen=True,
                         num_beams=48)  # fmt: skip
    trainer.train()
    assert len(reward.groups) == 4
    for groups in reward.groups:
        for items, past in zip(groups.items_BG.tolist(), groups.histories):
            assert len(set(items)) == 4 and all(0 <= item < 48 for item in items)
            assert not set(items) & set(past.tolist())
            ids = [TOKENIZER.item_ids[item] for item in past]
            ranked = [int(r.item_id[1:]) for r in recommend(before, [ids], tokenizer=TOKENIZER, k=40, num_beams=48)[0]]
            if rollouts == "beam":
                assert items == ranked[:4]
            elif len(past) < 3:  # all 40 best are there to compare with
                places = [ranked.index(item) for item in items if item in ranked]
                assert len(places) < 2 or max(places) > 3  # not simply the beam


def test_sampled_rollouts_differ_from_step_to_step_and_repeat_with_the_seed(tmp_path):
    def drawn(seed):
        reward = Recorder()
        data = prompts(2).select([0] * 4)
        trainer_of(tmp_path, rewards=reward, dataset=data, rollouts="sample", learning_rate=0.0, seed=seed).train()
        return [groups.items_BG.tolist() for groups in reward.groups]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again and first != other
    assert first[0] != first[1] and first[0][0] != first[0][1]  # the same prompt, twice in a batch


def test_the_first_step_is_the_formula(tmp_path):
    """Gradient of -(1/R) sum_r A_r * mean_q log pi(token), with TRL's advantages, by hand and autograd."""
    reward, model = Recorder(), causal_lm()
    data = prompts(2)
    trainer = trainer_of(tmp_path, copy.deepcopy(model), reward, data, learning_rate=1.0, optim="sgd", max_steps=1,
                         beta=0.0, max_grad_norm=0.0, shuffle_dataset=False)  # fmt: skip
    trainer.train()
    loss = torch.zeros(())
    for row, items in enumerate(reward.groups[0].items_BG.tolist()):
        rewards = torch.tensor([float(item % 2 == 0) for item in items])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        prompt = data[row]["prompt_ids"]
        for item, advantage in zip(items, advantages):
            answer = TOKENIZER.item_token_table[item].tolist()
            logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            chosen = logps[torch.arange(len(prompt) - 1, len(prompt) + 2), torch.tensor(answer)]
            loss = loss - advantage * chosen.mean() / 8
    loss.backward()
    assert len(set(reward.groups[0].items_BG.flatten().tolist())) > 4
    for (name, old), new in zip(model.named_parameters(), trainer.model.parameters()):
        torch.testing.assert_close(old.detach() - old.grad, new.detach(), atol=2e-5, rtol=1e-4, msg=name)
    assert max(p.grad.abs().max().item() for p in model.parameters()) > 1e-2


def test_equal_rewards_teach_nothing_but_the_kl_term_pulls_back(tmp_path):
    """All-miss groups of the rank reward: no gradient without KL; with it, back to another reference."""
    past, _ = histories(4, num_items=48)
    model = causal_lm()
    best = [recommend(model, [[f"i{i}" for i in row]], tokenizer=TOKENIZER, k=8, num_beams=48)[0] for row in past]
    targets = [next(i for i in range(48) if f"i{i}" not in {r.item_id for r in row}) for row in best]
    data = item_prompts(EvaluationSet(np.arange(4), past, np.array(targets)), TOKENIZER)
    for beta, reference in ((0.0, None), (0.1, None), (0.1, causal_lm(seed=3))):
        moving = copy.deepcopy(model)
        trainer = trainer_of(tmp_path, moving, RankReward(), data, beta=beta, max_steps=1, ref_model=reference)
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "reward" in entry)
        assert log["reward"] == 0.0 and log["rollouts/hit"] == 0.0 and log["frac_reward_zero_std"] == 1.0
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), moving.parameters()))
        if reference is None:  # the policy is its own reference at the first step: k3 and its gradient are 0
            assert log["grad_norm"] == pytest.approx(0.0, abs=1e-6) and (same or beta > 0)
        else:
            assert log["kl"] > 0 and log["grad_norm"] > 1e-3 and not same


def test_the_reference_is_the_policy_in_memory(tmp_path):
    model = causal_lm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(tmp_path, model, beta=0.1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-6) and logs[-1]["kl"] > 0
    reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in reference.items())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.args.beta == trainer.beta == 0.1
    synced = trainer_of(tmp_path, causal_lm(), beta=0.1, sync_ref_model=True, ref_model_sync_steps=1,
                        ref_model_mixup_alpha=1.0)  # fmt: skip
    synced.train()
    reference = synced.accelerator.unwrap_model(synced.ref_model)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), synced.model.parameters()))


def test_training_raises_the_reward(tmp_path):
    """12 steps on the rule reward, with the targets put into the groups: they come out first."""
    data = prompts(4, seed=2)
    trainer = trainer_of(tmp_path, rewards=RuleReward(), dataset=data, add_target=True, num_train_epochs=12,
                         per_device_train_batch_size=16, beta=0.0, learning_rate=2e-2)  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert all(entry["rollouts/hit"] == 1.0 and entry["reward"] == pytest.approx(0.25) for entry in logs)
    past = [[TOKENIZER.item_ids[item] for item in row] for row in data["history"]]
    first = [row[0].item_id for row in recommend(trainer.model, past, tokenizer=TOKENIZER, k=1, num_beams=8)]
    assert first == [TOKENIZER.item_ids[target] for target in data["target"]]


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("logprobs", ["level", "legal"])
def test_rollouts_that_share_a_prompt_have_the_scores_of_rows_of_their_own(tmp_path, logprobs, eos):
    """Uneven groups in a shuffled order, prompts of several lengths: log-probabilities, entropies and gradients."""
    model = causal_lm(num_hidden_layers=2).double()
    trainer = trainer_of(tmp_path, model, logprobs=logprobs, temperature=0.7, rollouts="sample", answer_eos=eos)
    table = np.asarray(TOKENIZER.item_token_table)
    past, _ = histories(4, num_items=48, seed=5)
    rows = [(user, item) for user, size in ((0, 3), (1, 1), (2, 4), (3, 2)) for item in range(user, user + size)]
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    asked = [table[past[user]].reshape(-1).tolist() for user, _ in rows]
    width, tail = max(map(len, asked)), [TOKENIZER.eos_token_id] * eos
    ids = torch.tensor([[0] * (width - len(q)) + q + table[item].tolist() + tail for q, (_, item) in zip(asked, rows)])
    mask = torch.tensor([[0] * (width - len(q)) + [1] * (ids.shape[1] - width + len(q)) for q in asked])
    found = []
    for shared in (False, True):
        trainer.args.share_prompts = shared
        scores = trainer._get_per_token_logps_and_entropies(model, ids, mask, 3 + eos, compute_entropy=True)
        model.zero_grad()
        (scores[0].sum() + scores[1].sum()).backward()
        found.append([*scores[:2], *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    inputs, _, _ = packed_answers(ids, mask, 3 + eos)
    assert inputs["input_ids"].shape == (4, width + 4 * (2 + eos))


def test_training_is_the_same_with_and_without_shared_prompts(tmp_path):
    logs = []
    for shared in (False, True):
        options = {"logprobs": "level", "share_prompts": shared, "num_iterations": 2, "learning_rate": 1e-3}
        trainer = trainer_of(tmp_path / str(shared), causal_lm(), **options)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == len(logs[1]) > 2
    for one, other in zip(*logs):
        assert other["loss"] == pytest.approx(one["loss"], abs=2e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("logprobs", ["level", "legal"])
def test_restricted_log_probabilities_are_those_of_the_search(tmp_path, logprobs):
    """Summed over an item's tokens they are the scores of `recommend` under the same restriction."""
    model, trie = causal_lm().eval(), ItemTrie.from_tokenizer(TOKENIZER)
    past = ["i3", "i40"]
    options = {"restrict_to_level": True} if logprobs == "level" else {"renormalize": True}
    best = recommend(model, [past], tokenizer=TOKENIZER, k=48, num_beams=48, exclude_seen=False, **options)[0]
    prompt = TOKENIZER.encode_histories([past])["input_ids"]
    items = [int(r.item_id[1:]) for r in best]
    answers = torch.from_numpy(TOKENIZER.item_token_table[items].astype(np.int64))
    ids = torch.cat([torch.as_tensor(prompt).expand(len(items), -1), answers], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -4:-1]
    logps, entropy = restricted_log_probs(logits, answers, trie, TOKENIZER.level_offsets, legal=logprobs == "legal")
    torch.testing.assert_close(logps.sum(1), torch.tensor([r.score for r in best]), atol=1e-4, rtol=1e-4)
    # the first level by hand: 3 of its 4 codes exist among 48 items
    block = logits[0, 0, TOKENIZER.level_offsets[0] :][: 3 if logprobs == "legal" else 4].log_softmax(0)
    assert entropy[0, 0].item() == pytest.approx(-(block.exp() * block).sum().item(), abs=1e-5)
    with pytest.raises(IncompatibleComponentsError, match="row 0"):
        restricted_log_probs(logits[:1], torch.tensor([[7, 8, 12]]), trie, TOKENIZER.level_offsets, legal=True)
    served = causal_lm()
    served.recommendation_config = RecommendationConfig(**options)
    assert trainer_of(tmp_path, served, beta=0.1).args.logprobs == logprobs  # follows the search unless told otherwise
    assert trainer_of(tmp_path, beta=0.1).args.logprobs == "full"
    trainer = trainer_of(tmp_path, logprobs=logprobs, beta=0.1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-6) and logs[-1]["kl"] > 0


def test_lora_trains_the_adapter_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = causal_lm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(tmp_path, model, Recorder(), peft_config=config, beta=0.05)
    trainer.train()
    base = {
        name.replace(".base_layer", ""): value for name, value in trainer.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(base[name], value) for name, value in before.items())
    assert any(bool(value.any()) for name, value in base.items() if "lora_B" in name)
    tuned = get_peft_model(causal_lm(), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    trainer = trainer_of(tmp_path, tuned, Recorder(), beta=0.05)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-6) and logs[-1]["kl"] > 0  # against the adapter as it was


@pytest.mark.parametrize("tied", [True, False])
def test_trained_item_tokens_are_part_of_the_reference(tmp_path, tied):
    """LoRA with rows of item tokens that were trained before: TRL's copy of the adapter leaves those rows out."""
    from hf_genrec.alignment.adapters import item_lora

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), tie_word_embeddings=tied, **SIZES))
    tuned = item_lora(model, TOKENIZER, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    trainable = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    trainer = trainer_of(tmp_path, tuned, Recorder(), beta=0.05)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert logs[0]["kl"] == pytest.approx(0.0, abs=1e-6) and logs[-1]["kl"] > 0
    assert {name for name, parameter in tuned.named_parameters() if parameter.requires_grad} == trainable
    assert "add_adapter" not in tuned.__dict__


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_steps_do_not_depend_on_how_they_are_cut(tmp_path, loss_type):
    def run(size, steps):
        trainer = trainer_of(tmp_path, rewards=Recorder(), dataset=prompts(8), per_device_train_batch_size=size,
                             gradient_accumulation_steps=steps, loss_type=loss_type, beta=0.05, shuffle_dataset=False,
                             learning_rate=3e-3)  # fmt: skip
        trainer.train()
        return trainer

    whole = run(16, 1)
    for size, steps in ((8, 2), (4, 4)):
        parts = run(size, steps)
        for one, other in zip(whole.model.parameters(), parts.model.parameters()):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_resumes_with_the_same_bits(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "rollouts": "sample", "beta": 0.05}
    whole = trainer_of(tmp_path, rewards=Recorder(), **options)
    whole.train()
    assert (tmp_path / "checkpoint-2" / "manifest.json").is_file()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()  # half a checkpoint: the one before it is taken
    again = trainer_of(tmp_path, rewards=Recorder(), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 4
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, other)


def test_every_draw_has_seeds_of_its_own(tmp_path, monkeypatch):
    """Two generations within a step, and evaluations of several batches; evaluating leaves the training draws alone."""

    def seeds_of(folder, stop=None, **more):
        found = {"train": [], "eval": []}
        trainer = trainer_of(tmp_path / folder, rollouts="sample", gradient_accumulation_steps=2, steps_per_generation=1,
                             per_device_eval_batch_size=4, num_train_epochs=2, save_steps=1, save_strategy="steps",
                             save_total_limit=None, beta=0.05, **more)  # fmt: skip
        draw = trainer._draw_seed
        monkeypatch.setattr(trainer, "_draw_seed", lambda mode: found[mode].append(draw(mode)) or found[mode][-1])
        if stop:
            shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / folder / f"checkpoint-{stop}")
        trainer.train(resume_from_checkpoint=bool(stop))
        return trainer, found

    asked = {"eval_dataset": prompts(3, seed=9), "eval_strategy": "steps", "eval_steps": 1}
    whole, seeds = seeds_of("whole", **asked)
    steps = whole.state.global_step
    assert len(seeds["train"]) == 2 * steps > 4 and len(seeds["eval"]) == 3 * steps
    every = sorted(seeds["train"] + seeds["eval"])
    assert min(later - earlier for earlier, later in pairwise(every)) >= 8  # more than a generation has prompts
    assert seeds_of("alone")[1]["train"] == seeds["train"]
    resumed, rest = seeds_of("resumed", stop=steps // 2, **asked)
    assert rest["train"] == seeds["train"][len(seeds["train"]) // 2 :]
    assert rest["eval"] == seeds["eval"][len(seeds["eval"]) // 2 :]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, other)


def test_prompts_with_too_little_left_are_left_out_before_training(tmp_path, caplog):
    past = Sequences.from_rows([list(range(45)), [1, 2], list(range(44))])
    data = item_prompts(EvaluationSet(np.arange(3), past, np.array([46, 5, 45])), TOKENIZER)
    few = item_prompts(EvaluationSet(np.arange(2), past.take(np.array([1, 2])), np.array([5, 45])), TOKENIZER)
    trainer = trainer_of(tmp_path, dataset=data, exclude_seen=True, eval_dataset=few, num_generations_eval=8)
    assert trainer.train_dataset["target"][:] == [5, 45] and trainer.eval_dataset["target"][:] == [5]
    assert "1 of 3 prompts of the train dataset" in caplog.text and "1 of 2 prompts of the eval dataset" in caplog.text
    trainer.train()
    with pytest.raises(TrainingError, match=r"3 of 3 prompts of the train dataset .* lower num_generations"):
        trainer_of(tmp_path, dataset=data.select([0, 0, 0]), exclude_seen=True)
    with pytest.raises(TrainingError, match="give the train dataset a `history` column"):
        trainer_of(tmp_path, dataset=data.remove_columns("history"), exclude_seen=True)
    assert len(trainer_of(tmp_path, dataset=data).train_dataset) == 3


def test_evaluation_with_groups_of_another_size(tmp_path):
    reward = Recorder()
    trainer = trainer_of(tmp_path, rewards=reward, eval_dataset=prompts(3, seed=9), num_generations_eval=6,
                         per_device_eval_batch_size=6)  # fmt: skip
    metrics = trainer.evaluate()
    assert [tuple(groups.items_BG.shape) for groups in reward.groups] == [(1, 6)] * 3
    mean = np.mean([(groups.items_BG % 2 == 0).float().mean().item() for groups in reward.groups])
    logged = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
    assert logged["eval_reward"] == pytest.approx(mean) and "eval_loss" in metrics


def test_bad_options_and_data(tmp_path):
    with pytest.raises(TrainingError, match=r"top_p=0\.9 belongs to free generation"):
        trainer_of(tmp_path, top_p=0.9)
    with pytest.raises(TrainingError, match="rollouts='beams'"):
        trainer_of(tmp_path, rollouts="beams")
    with pytest.raises(TrainingError, match=r"temperature=0\.7 has no place"):
        trainer_of(tmp_path, temperature=0.7)
    with pytest.raises(TrainingError, match="the catalogue has 48 codes"):
        trainer_of(tmp_path, num_generations=64, per_device_train_batch_size=64)
    with pytest.raises(TrainingError, match="no column target"):
        trainer_of(tmp_path, dataset=prompts(4).remove_columns("target"))
    with pytest.raises(IncompatibleComponentsError, match="row 1 of the train dataset: target 48"):
        data = prompts(3).remove_columns("target").add_column("target", [1, 48, 2])
        trainer_of(tmp_path, dataset=data)
    with pytest.raises(IncompatibleComponentsError, match="the reference has 24"):
        trainer_of(tmp_path, ref_model=causal_lm(extra=8))


def test_prompts_fit_the_context(tmp_path):
    """Prompts lose whole oldest items where they are made; rows that are too long are named where they are trained on."""
    model = causal_lm(max_position_embeddings=9)
    whole = prompts(12)
    tokenizer, levels = TOKENIZER, TOKENIZER.num_levels
    long = next(row for row, ids in enumerate(whole["prompt_ids"]) if len(ids) + levels > 9)
    with pytest.raises(TrainingError, match=f"row {long} has .* but the model reads at most 9"):
        trainer_of(tmp_path, model, dataset=whole)
    rows = EvaluationSet(np.arange(12), Sequences.from_rows(whole["history"]), np.array(whole["target"]))
    fitted = item_prompts(rows, tokenizer, max_prompt_tokens=prompt_room(model, tokenizer))
    for cut, ids in zip(fitted["prompt_ids"], whole["prompt_ids"]):
        assert len(cut) <= 9 - levels - 1 and cut[-levels:] == ids[-levels:] and (len(ids) - len(cut)) % levels == 0
    assert fitted["history"] == whole["history"]  # what was seen stays known
    trainer_of(tmp_path, model, dataset=fitted)
    with pytest.raises(TrainingError, match="max_prompt_tokens is 1, but the template has"):
        item_prompts(rows, tokenizer, max_prompt_tokens=1)
