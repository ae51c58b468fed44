"""GRPO for encoder-decoders: the loss and its gradient by hand, references, exact steps, validation, resuming."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from preference_cases import catalogue, histories, tiger

from hf_genrec.alignment.rewards import ItemReward, RankReward, RuleReward, group_advantages, rule_and_rank
from hf_genrec.alignment.rollouts import item_prompts
from hf_genrec.alignment.trainers.seq2seq_grpo import (
    PromptCollator,
    Seq2SeqGRPOConfig,
    Seq2SeqGRPOTrainer,
    policy_losses,
)
from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, TrainingError

TOKENIZER = catalogue()


class Recorder(ItemReward):
    """Keeps the groups it is asked about; pays the even items."""

    def __init__(self):
        super().__init__()
        self.groups = []

    def score(self, groups):
        self.groups.append(groups)
        return (groups.items_BG % 2 == 0).float()


def prompts(rows: int, seed: int = 0):
    past, chosen = histories(rows, seed=seed)
    return item_prompts(EvaluationSet(np.arange(rows), past, chosen), TOKENIZER)


def trainer_of(folder, model=None, reward=None, dataset=None, **options) -> Seq2SeqGRPOTrainer:
    named = ("ref_model", "peft_config", "data_collator", "eval_dataset")
    more = {name: options.pop(name) for name in named if name in options}
    values = {
        "per_device_train_batch_size": 4, "num_generations": 4, "num_train_epochs": 1, "learning_rate": 1e-2,
        "logging_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "lr_scheduler_type": "constant", "warmup_steps": 0,
    }  # fmt: skip
    return Seq2SeqGRPOTrainer(
        model if model is not None else tiger(TOKENIZER),
        reward if reward is not None else Recorder(),
        Seq2SeqGRPOConfig(output_dir=str(folder), **{**values, **options}),
        dataset if dataset is not None else prompts(8),
        processing_class=TOKENIZER,
        **more,
    )


def logs_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_gradient_of_a_tiny_case_by_hand():
    """Two answers of two tokens with known probabilities and a reference: d loss / d log pi in closed form."""
    logps = torch.tensor([[0.5, 0.25], [0.1, 0.9]]).log().requires_grad_()
    reference = torch.tensor([[0.25, 0.5], [0.1, 0.45]]).log()
    advantages = torch.tensor([1.5, -0.5])
    losses = policy_losses(logps, advantages, reference, beta=0.2)
    losses.sum().backward()
    for row in range(2):
        for place in range(2):
            gap = (reference - logps.detach())[row, place].item()
            assert losses[row, place].item() == pytest.approx(
                -advantages[row].item() + 0.2 * (math.exp(gap) - gap - 1), abs=1e-6
            )
            slope = -advantages[row].item() + 0.2 * (1 - math.exp(gap))
            assert logps.grad[row, place].item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_first_step_is_the_formula(tmp_path, loss_type):
    """Rewards, advantages, log-probabilities of the model's own forward, KL to another reference: one step of SGD."""
    reward, model, reference = Recorder(), tiger(TOKENIZER), tiger(TOKENIZER, seed=1)
    data = prompts(3)
    trainer = trainer_of(tmp_path, copy.deepcopy(model), reward, data, ref_model=copy.deepcopy(reference), max_steps=1,
                         optim="sgd", learning_rate=0.5, max_grad_norm=0.0, beta=0.3, loss_type=loss_type,
                         per_device_train_batch_size=3)  # fmt: skip
    trainer.train()
    model.eval(), reference.eval()
    groups, loss = reward.groups[0], torch.zeros(())
    assert groups.items_BG.shape == (3, 4)
    for row, items in enumerate(groups.items_BG):
        place = next(i for i in range(3) if data[i]["target"] == groups.targets_B[row])
        ids = torch.tensor([data[place]["prompt_ids"]])
        rewards = (items % 2 == 0).float()
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for item, advantage in zip(items.tolist(), advantages):
            labels = torch.tensor([TOKENIZER.item_token_table[item].tolist()])
            logps = model(input_ids=ids, labels=labels).logits.log_softmax(-1).gather(2, labels[..., None])
            with torch.no_grad():
                old = reference(input_ids=ids, labels=labels).logits.log_softmax(-1).gather(2, labels[..., None])
            k3 = (old - logps).exp() - (old - logps) - 1
            loss = loss + (-advantage * logps + 0.3 * k3).mean() / 12  # one length: both loss types
    loss.backward()
    for old, new in zip(model.parameters(), trainer.model.parameters()):
        if old.grad is not None:
            torch.testing.assert_close(old.detach() - 0.5 * old.grad, new.detach(), atol=1e-5, rtol=1e-4)
    log = logs_of(trainer)[0]
    assert log["reward"] == pytest.approx((groups.items_BG % 2 == 0).float().mean().item()) and log["kl"] > 0
    items = [groups.items_BG.tolist(), groups.targets_B.tolist()]
    assert log["rollouts/hit"] == pytest.approx(np.mean([target in row for row, target in zip(*items)]))


def test_rollouts_are_what_recommend_gives(tmp_path):
    reward, model = Recorder(), tiger(TOKENIZER)
    trainer = trainer_of(tmp_path, model, reward, learning_rate=0.0, exclude_seen=True, num_beams=20)
    trainer.train()
    seen = 0
    for groups in reward.groups:
        ids = [[TOKENIZER.item_ids[item] for item in row] for row in groups.histories]
        expected = model.recommend(ids, tokenizer=TOKENIZER, k=4, num_beams=20)
        for items, row in zip(groups.items_BG.tolist(), expected):
            assert [TOKENIZER.item_ids[item] for item in items] == [r.item_id for r in row]
            seen += 1
    assert seen == 8 and model.training


def test_items_that_share_a_code_are_one_rollout(tmp_path):
    """48 codes for 64 items: rollouts are distinct codes, and the target stands for its own."""
    tokenizer = catalogue(64, shared=16)
    past, _ = histories(6, num_items=40)
    data = item_prompts(EvaluationSet(np.arange(6), past, np.full(6, 50)), tokenizer)  # item 50 has the code of item 2
    reward = RuleReward()
    found = []
    reward.score = lambda groups: found.append(groups) or groups.hits_BG.float()
    trainer = Seq2SeqGRPOTrainer(
        tiger(tokenizer), reward,
        Seq2SeqGRPOConfig(output_dir=str(tmp_path), num_generations=48, per_device_train_batch_size=6, max_steps=1,
                          use_cpu=True, disable_tqdm=True, save_strategy="no"),
        data, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    for items, hits in zip(found[0].items_BG, found[0].hits_BG):
        codes = {tuple(tokenizer.codes[item]) for item in items.tolist()}
        assert len(codes) == 48 and hits.sum() == 1 and 50 in items and 2 not in items


def test_equal_rewards_teach_nothing_but_the_kl_term(tmp_path):
    past, _ = histories(4)
    model = tiger(TOKENIZER)
    ids = [[TOKENIZER.item_ids[item] for item in row] for row in past]
    best = model.eval().recommend(ids, tokenizer=TOKENIZER, k=30, num_beams=64, exclude_seen=False)
    worst = [next(i for i in range(64) if f"i{i}" not in {r.item_id for r in row}) for row in best]
    data = item_prompts(EvaluationSet(np.arange(4), past, np.array(worst)), TOKENIZER)
    for beta, reference in ((0.0, None), (0.3, tiger(TOKENIZER, seed=1))):
        moving = copy.deepcopy(model)
        trainer = trainer_of(tmp_path, moving, RankReward(), data, beta=beta, ref_model=reference, max_steps=1)
        trainer.train()
        log = logs_of(trainer)[0]
        assert log["rollouts/hit"] == 0.0 and log["frac_reward_zero_std"] == 1.0
        moved = any(not torch.equal(a, b) for a, b in zip(model.parameters(), moving.parameters()))
        assert moved == (beta > 0) and (log["grad_norm"] > 0) == (beta > 0)


@pytest.mark.parametrize("rollouts", ["beam", "sample"])
def test_steps_do_not_depend_on_how_they_are_cut(tmp_path, rollouts):
    data = prompts(11)

    def run(size, steps, side):
        model = tiger(TOKENIZER).double()  # in float32 Adam blows up the rounding of gradients that are nearly 0
        trainer = trainer_of(tmp_path, model, dataset=data, per_device_train_batch_size=size, beta=0.1, sft_weight=0.3,
                             gradient_accumulation_steps=steps, data_collator=PromptCollator(0, side), num_train_epochs=2,
                             rollouts=rollouts, learning_rate=3e-3)  # fmt: skip
        trainer.train()
        return trainer

    whole = run(8, 1, "right")
    for size, steps in ((4, 2), (2, 4)):
        parts = run(size, steps, "left")
        for one, other in zip(logs_of(whole), logs_of(parts)):
            for name in ("loss", "reward", "kl", "rollouts/hit"):
                assert one[name] == pytest.approx(other[name], abs=1e-5), name
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        for one, other in zip(whole.model.parameters(), parts.model.parameters()):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_prompts_with_too_little_left_are_left_out_before_training(tmp_path, caplog):
    past = Sequences.from_rows([list(range(61)), [1, 2], list(range(60))])
    data = item_prompts(EvaluationSet(np.arange(3), past, np.array([62, 5, 61])), TOKENIZER)
    trainer = trainer_of(tmp_path, dataset=data, exclude_seen=True, max_steps=1)
    assert trainer.train_dataset["target"][:] == [5, 61]
    assert "1 of 3 prompts of the train dataset" in caplog.text and "num_generations=4" in caplog.text
    trainer.train()
    with pytest.raises(TrainingError, match=r"3 of 3 prompts of the train dataset .* lower num_generations"):
        trainer_of(tmp_path, dataset=data.select([0, 0, 0]), exclude_seen=True)
    assert len(trainer_of(tmp_path, dataset=data).train_dataset) == 3


def test_the_next_token_loss_of_the_targets_is_added(tmp_path):
    """With equal rewards and no KL the loss is the next-token loss alone, as the model computes it."""
    reward, data = RuleReward(), prompts(4)
    reward.score = lambda groups: torch.zeros(groups.items_BG.shape)
    model = tiger(TOKENIZER)
    trainer = trainer_of(tmp_path, copy.deepcopy(model), reward, data, beta=0.0, sft_weight=0.5, max_steps=1)
    trainer.train()
    batch = PromptCollator(0)([data[i] for i in range(4)])
    labels = torch.as_tensor(TOKENIZER.item_token_table[data["target"]]).long()
    plain = model.eval()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
    ).loss.item()
    assert logs_of(trainer)[0]["loss"] == pytest.approx(0.5 * plain, abs=1e-5)


def test_training_puts_the_targets_first_and_validation_sees_it(tmp_path):
    past, chosen = histories(6, seed=4)
    rows = EvaluationSet(np.arange(6), past, chosen)
    trainer = trainer_of(tmp_path, reward=rule_and_rank(), dataset=item_prompts(rows, TOKENIZER), add_target=True, beta=0.0,
                         num_train_epochs=20, learning_rate=2e-2, per_device_train_batch_size=6, eval_dataset=rows,
                         eval_strategy="epoch", save_strategy="epoch", eval_ks=[1, 10], eval_num_beams=20,
                         max_grad_norm=1.0)  # fmt: skip
    first = trainer.evaluate()["eval_recall@1"]
    trainer.train()
    last = trainer.evaluate()
    assert first < 0.5 and last["eval_recall@1"] == 1.0
    assert trainer.state.best_metric == pytest.approx(last["eval_ndcg@10"])


def test_lora_takes_the_disabled_adapter_as_reference(tmp_path):
    from peft import LoraConfig

    model = tiger(TOKENIZER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(tmp_path, model, peft_config=LoraConfig(r=4, target_modules=["q", "v"]), beta=0.1)
    trainer.train()
    kl = [entry["kl"] for entry in logs_of(trainer)]
    assert trainer.ref_model is None and kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] > 0
    base = {
        name.replace(".base_layer", ""): value for name, value in trainer.model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(base[name], value) for name, value in before.items())


def test_reference_stays_or_follows(tmp_path):
    model = tiger(TOKENIZER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(tmp_path, model, beta=0.1)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.ref_model.state_dict().items())
    trainer = trainer_of(tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.ref_model.parameters(), trainer.model.parameters()))


def test_resumes_with_the_same_bits(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "rollouts": "sample", "beta": 0.1,
               "num_train_epochs": 2}  # fmt: skip
    whole = trainer_of(tmp_path, **options)
    whole.train()
    again = trainer_of(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == whole.state.global_step == 4
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, other)


def test_advantages_are_trl_s():
    from trl.trainer.utils import nanstd

    rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), expected)
    torch.testing.assert_close(group_advantages(rewards, scale=False), rewards - rewards.mean(1, keepdim=True))


def test_bad_input(tmp_path):
    with pytest.raises(TrainingError, match="a group of at least 2"):
        trainer_of(tmp_path, num_generations=1)
    with pytest.raises(TrainingError, match="loss_type='gspo'"):
        trainer_of(tmp_path, loss_type="gspo")
    with pytest.raises(TrainingError, match="sync_ref_model moves a reference"):
        trainer_of(tmp_path, beta=0.0, sync_ref_model=True)
    with pytest.raises(TrainingError, match="no column prompt_ids"):
        trainer_of(tmp_path, dataset=prompts(2).remove_columns("prompt_ids"))
    with pytest.raises(IncompatibleComponentsError, match="row 1 of the train dataset: target 64"):
        trainer_of(tmp_path, dataset=prompts(2).remove_columns("target").add_column("target", [1, 64]))
    with pytest.raises(TrainingError, match=r"1 of 1 prompts of the train dataset .* num_generations=64"):
        past, chosen = histories(4, seed=1)
        past = past.last(3)
        data = item_prompts(EvaluationSet(np.arange(1), past.take(np.flatnonzero(past.lengths == 2)[:1]),
                                          chosen[:1] * 0 + 63), TOKENIZER)  # fmt: skip
        trainer_of(tmp_path, dataset=data, num_generations=64, exclude_seen=True)
    with pytest.raises(TrainingError, match="reward is not finite"):
        reward = RuleReward()
        reward.score = lambda groups: torch.full(groups.items_BG.shape, math.nan)
        trainer_of(tmp_path, reward=reward).train()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(TrainingError, match="use ItemGRPOTrainer"):
        trainer_of(tmp_path, LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
