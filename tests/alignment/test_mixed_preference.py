"""The mixture of next-token loss and preferences: against the trainers it reduces to, exact steps, batches with pairs."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from preference_cases import catalogue, histories, tiger
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_genrec.alignment.negatives import RandomNegatives
from hf_genrec.alignment.trainers.mixed_preference import (
    MixedCollator,
    MixedPreferenceConfig,
    MixedPreferenceTrainer,
    PairBatches,
    Seq2SeqMixedCollator,
    Seq2SeqMixedPreferenceConfig,
    Seq2SeqMixedPreferenceTrainer,
)
from hf_genrec.alignment.trainers.seq2seq_preference import Seq2SeqPreferenceConfig, Seq2SeqPreferenceTrainer
from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer
from hf_genrec.errors import TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig

TOKENIZER = catalogue()
COMMON = {
    "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True,
    "save_strategy": "no", "lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 2, "beta": 0.5,
}  # fmt: skip


def causal_lm(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), pad_token_id=0, initializer_range=0.5, **sizes))


def gpt2() -> GPT2LMHeadModel:
    """Learned absolute positions."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), **sizes))


def requests(counts: list[int], seed: int = 0, own: bool = False) -> Dataset:
    """Requests with so many rejected answers each (0: no pair); `own`: the chosen answer is the target."""
    rows, targets = histories(len(counts), seed=seed)
    answers = RandomNegatives(64, seed=seed)(rows, targets, max(counts) + 1)
    tokens = TOKENIZER.item_token_table
    prompts = TOKENIZER.encode_item_indices(rows, return_tensors="pt")
    table = {name: [] for name in ("prompt_ids", "target_ids", "chosen_ids", "rejected_ids")}
    for row, count in enumerate(counts):
        table["prompt_ids"].append(prompts["input_ids"][row][prompts["attention_mask"][row] == 1].tolist())
        target = tokens[targets[row]].tolist()
        table["target_ids"].append(target)
        chosen = target if own else tokens[answers[row, 0]].tolist()
        table["chosen_ids"].append(chosen if count else [])
        table["rejected_ids"].append([tokens[item].tolist() for item in answers[row, 1 : 1 + count]])
    return Dataset.from_dict(table)


def mixed(kind: str, folder, dataset, model=None, **options):
    collator = {name: options.pop(name) for name in ("data_collator", "ref_model") if name in options}
    values = {**COMMON, "per_device_train_batch_size": 4, **options}
    if kind == "causal":
        args = MixedPreferenceConfig(str(folder), bf16=False, gradient_checkpointing=False, **values)
        trainer = MixedPreferenceTrainer(model or causal_lm(), args=args, train_dataset=dataset,
                                         processing_class=TOKENIZER, **collator)  # fmt: skip
    else:
        args = Seq2SeqMixedPreferenceConfig(output_dir=str(folder), **values)
        trainer = Seq2SeqMixedPreferenceTrainer(model or tiger(TOKENIZER), args=args, train_dataset=dataset,
                                                processing_class=TOKENIZER, **collator)  # fmt: skip
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_pairs_whose_chosen_answer_is_the_target_are_s_dpo_with_its_next_token_loss(tmp_path, kind):
    """One batch per step, so that the order of the rows does not matter: same losses, same weights."""
    data = requests([2, 1, 3, 2], own=True)
    ours = mixed(kind, tmp_path / "m", data, ntp_weight=0.3, dpo_weight=1.0)
    plain = data.remove_columns("target_ids")
    if kind == "causal":
        args = SoftmaxDPOConfig(str(tmp_path / "p"), bf16=False, gradient_checkpointing=False, **COMMON,
                                per_device_train_batch_size=4, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3])  # fmt: skip
        theirs = SoftmaxDPOTrainer(causal_lm(), args=args, train_dataset=plain, processing_class=TOKENIZER)
    else:
        args = Seq2SeqPreferenceConfig(output_dir=str(tmp_path / "p"), **COMMON, per_device_train_batch_size=4,
                                       sft_weight=0.3)  # fmt: skip
        theirs = Seq2SeqPreferenceTrainer(tiger(TOKENIZER), args=args, train_dataset=plain, processing_class=TOKENIZER)
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters()):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_without_pairs_it_is_supervised_training(tmp_path, kind):
    data = requests([0] * 4)
    model = causal_lm() if kind == "causal" else tiger(TOKENIZER)
    first = losses(mixed(kind, tmp_path, data, copy.deepcopy(model), max_steps=1))[0]
    model.eval()
    total = 0.0
    for row in data:
        target = torch.tensor([row["target_ids"]])
        if kind == "causal":
            ids = torch.tensor([row["prompt_ids"] + row["target_ids"]])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(row["prompt_ids"]), -100)
            total += model(input_ids=ids, labels=labels).loss.item()
        else:
            total += model(input_ids=torch.tensor([row["prompt_ids"]]), labels=target).loss.item()
    assert first == pytest.approx(total / 4, abs=1e-5)  # every target has 3 tokens


@pytest.mark.parametrize("kind", ["causal", "gpt2", "seq2seq"])
def test_steps_do_not_depend_on_how_they_are_cut(tmp_path, kind):
    """Steps of 8 of 20 requests, some with pairs: in one batch, in two, in four; padding on either side."""
    data = requests([0, 2, 0, 1, 0, 0, 3, 0, 0, 0, 2, 0, 0, 1, 0, 3, 1, 2, 0, 3])
    collator = Seq2SeqMixedCollator if kind == "seq2seq" else MixedCollator

    def run(size: int, steps: int, **options):
        folder = tmp_path / f"{size}-{len(options)}"
        return mixed("causal" if kind == "gpt2" else kind, folder, data, gpt2() if kind == "gpt2" else None,
                     per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options)  # fmt: skip

    whole = run(8, 1)
    assert len(losses(whole)) == 6
    # a step of 8 pairs, one of 8 requests without, and the rest
    assert sum("rewards/margins" in entry for entry in whole.state.log_history) == 4
    left = {"data_collator": collator(0, padding_side="left")}
    for parts in (run(8, 1, **left), run(4, 2), run(2, 4, **left)):
        assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
        for name, parameter in parts.model.named_parameters():
            if (
                "c_attn.bias" not in name
            ):  # keys' bias moves no score: Adam makes steps of the rounding in a gradient of 0
                torch.testing.assert_close(parameter, whole.model.get_parameter(name), atol=5e-5, rtol=1e-3)


def hand_losses(data: Dataset, policy, reference, scores) -> tuple[float, float]:
    """Next-token and preference loss of one batch: `scores(model, prompt, answer)` sums log-probabilities."""
    tokens = sum(len(row["target_ids"]) for row in data)
    ntp = -sum(scores(policy, row["prompt_ids"], row["target_ids"]) for row in data) / tokens
    pairs = []
    for row in data:
        answers = [row["chosen_ids"], *row["rejected_ids"]] if row["rejected_ids"] else []
        ratios = [scores(policy, row["prompt_ids"], a) - scores(reference, row["prompt_ids"], a) for a in answers]
        if ratios:
            pairs.append(math.log(1 + sum(math.exp(0.5 * (other - ratios[0])) for other in ratios[1:])))
    return ntp, sum(pairs) / len(pairs)


def summed(blocks):
    """Log-probability of an answer, each token among its block of four, or among all."""

    def scores(model, prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].float()
        total = 0.0
        for place, token in enumerate(answer):
            start, stop = (token // 4 * 4, token // 4 * 4 + 4) if blocks else (0, len(TOKENIZER))
            total += float(logits[len(prompt) - 1 + place, start:stop].log_softmax(-1)[token - start])
        return total

    return scores


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_item_answers_compete_with_their_level_where_the_model_is_served_so(tmp_path, served, shared):
    """Both losses by hand, with the level's softmax and with the vocabulary's."""
    data, reference = requests([2, 0, 1, 3]), causal_lm(seed=1)
    model = causal_lm()
    model.recommendation_config = RecommendationConfig(restrict_to_level=served)
    ntp, dpo = hand_losses(data, model, reference, summed(served))
    other = hand_losses(data, model, reference, summed(not served))
    trainer = mixed("causal", tmp_path, data, model, ref_model=reference, ntp_weight=0.3, dpo_weight=2.0, max_steps=1,
                    share_prompts=shared)  # fmt: skip
    assert losses(trainer)[0] == pytest.approx(0.3 * ntp + 2.0 * dpo, abs=1e-4)
    assert abs(0.3 * other[0] + 2.0 * other[1] - 0.3 * ntp - 2.0 * dpo) > 1e-2
    assert ("answer_tokens" in trainer.data_collator([data[row] for row in range(4)])) is shared
    assert "answer_tokens" not in trainer.data_collator([data[1]])


@pytest.mark.parametrize("adapter", [False, True])
def test_shared_prompts_train_as_a_pass_per_answer_does(tmp_path, adapter):
    from peft import LoraConfig, get_peft_model

    data = requests([0, 2, 0, 1, 0, 0, 3, 0, 2, 2, 1, 0])
    runs = []
    for shared in (False, True):
        torch.manual_seed(0)
        model = causal_lm()
        if adapter:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        runs.append(mixed("causal", tmp_path / str(shared), data, model, share_prompts=shared))
        batch = runs[-1].data_collator([data[row] for row in (1, 6, 8)])
        assert len(batch["input_ids"]) == (3 if shared else 3 + 3 + 7)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5) and len(losses(runs[0])) == 6
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters()):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-3)


def experts() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(vocab_size=len(TOKENIZER), initializer_range=0.5, **sizes, **more))


@pytest.mark.parametrize("counts", [[2, 0, 1, 3], [0, 0, 0, 0]])
def test_the_loss_of_experts_is_added(tmp_path, counts):
    """The router's own loss over the batch, as the model computes it, times its coefficient."""
    data = requests(counts)
    with_it = mixed("causal", tmp_path / "a", data, experts(), max_steps=1)
    without = mixed("causal", tmp_path / "b", data, experts(), max_steps=1, router_aux_loss_coef=0.0)
    batch = MixedCollator(0)([data[row] for row in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        aux = experts()(**inputs, output_router_logits=True).aux_loss.item()
    assert losses(with_it)[0] - losses(without)[0] == pytest.approx(0.5 * aux, abs=1e-4) and aux > 0.1
    gates = [name for name, _ in with_it.model.named_parameters() if "gate" in name]
    moved = [not torch.equal(with_it.model.get_parameter(name), without.model.get_parameter(name)) for name in gates]
    assert gates and all(moved)
    with pytest.raises(TrainingError, match="leaves out the experts' loss"):
        mixed("causal", tmp_path / "c", data, experts(), item_head="level")


def test_the_reference_of_a_trained_adapter_has_its_token_rows(tmp_path):
    """First loss of S-DPO on LoRA whose item rows were trained before: log(K + 1), which TRL's own copy misses."""
    from hf_genrec.alignment.adapters import item_lora

    tuned = item_lora(causal_lm(), TOKENIZER, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    trainer = mixed("causal", tmp_path, requests([3] * 4), tuned, ntp_weight=0.0, max_steps=2)
    assert losses(trainer)[0] == pytest.approx(math.log(4), abs=1e-5) and losses(trainer)[1] < math.log(4)


def test_few_batches_carry_pairs_and_the_others_never_ask_the_reference(tmp_path):
    has_pair = np.zeros(200, bool)
    has_pair[::20] = True  # 10 of 200
    order = list(PairBatches(has_pair, 5, seed=3))
    assert sorted(order) == list(range(200))
    with_pairs = [has_pair[order[start : start + 5]].sum() for start in range(0, 200, 5)]
    assert sorted(with_pairs) == [0] * 38 + [5, 5]
    other = PairBatches(has_pair, 5, seed=3)
    other.set_epoch(1)
    assert list(other) != order and list(PairBatches(has_pair, 5, seed=3)) == order
    data = requests([2 if row % 5 == 0 else 0 for row in range(20)])
    asked = []

    class Counting(Seq2SeqMixedPreferenceTrainer):
        def _reference_logps(self, inputs):
            asked.append(len(inputs["rejected_counts"]))
            return super()._reference_logps(inputs)

    args = Seq2SeqMixedPreferenceConfig(output_dir=str(tmp_path), **{**COMMON, "num_train_epochs": 1},
                                        per_device_train_batch_size=4)  # fmt: skip
    trainer = Counting(tiger(TOKENIZER), args=args, train_dataset=data, processing_class=TOKENIZER)
    trainer.train()
    assert asked == [4] and len(losses(trainer)) == 5
    assert sum("rewards/margins" in entry for entry in trainer.state.log_history) == 1


def test_bad_rows_and_weights(tmp_path):
    good = requests([1, 0]).to_dict()

    def refuse(message, **change):
        with pytest.raises(TrainingError, match=message):
            mixed("seq2seq", tmp_path, Dataset.from_dict({**good, **change}))

    refuse("row 1: a pair has a chosen and rejected answers", chosen_ids=[good["chosen_ids"][0], [4, 8, 12]])
    refuse("row 1: prompt and target must not be empty", target_ids=[good["target_ids"][0], []])
    refuse("row 0: rejected answer 0 equals the chosen one", rejected_ids=[[good["chosen_ids"][0]], []])
    with pytest.raises(TrainingError, match="columns prompt_ids, target_ids"):
        mixed("causal", tmp_path, requests([1]).remove_columns("target_ids"))
    for kind in (MixedPreferenceConfig, Seq2SeqMixedPreferenceConfig):
        with pytest.raises(TrainingError, match="one above 0"):
            kind(output_dir=str(tmp_path), ntp_weight=0.0, dpo_weight=0.0, use_cpu=True)
    with pytest.raises(TrainingError, match=r"sft_weight is 0\.5"):
        Seq2SeqMixedPreferenceConfig(output_dir=str(tmp_path), sft_weight=0.5, use_cpu=True)
