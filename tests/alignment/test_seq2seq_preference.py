"""DPO and S-DPO for encoder-decoders: against log-probabilities of the model itself, references, exact steps, resume."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from preference_cases import catalogue, histories, tiger

from hf_genrec.alignment.negatives import RandomNegatives
from hf_genrec.alignment.pair_datasets import item_dataset
from hf_genrec.alignment.pairs import PreferencePairs
from hf_genrec.alignment.trainers.seq2seq_preference import (
    Seq2SeqPreferenceCollator,
    Seq2SeqPreferenceConfig,
    Seq2SeqPreferenceTrainer,
    answer_logps,
)
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError, TrainingError

TOKENIZER = catalogue()


def data(counts: list[int], seed: int = 0) -> Dataset:
    rows, chosen = histories(len(counts), seed=seed)
    rejected = RandomNegatives(64, seed=seed)(rows, chosen, max(counts))
    rejected[np.arange(max(counts)) >= np.array(counts)[:, None]] = -1
    return item_dataset(PreferencePairs(rows, chosen, rejected), TOKENIZER)


def trainer_of(folder, dataset, model=None, **options) -> Seq2SeqPreferenceTrainer:
    named = ("ref_model", "peft_config", "data_collator", "eval_dataset", "processing_class")
    trainer_options = {name: options.pop(name) for name in named if name in options}
    values = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1, "beta": 0.5,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }  # fmt: skip
    return Seq2SeqPreferenceTrainer(
        model if model is not None else tiger(TOKENIZER),
        args=Seq2SeqPreferenceConfig(output_dir=str(folder), **{**values, **options}),
        train_dataset=dataset,
        **{"processing_class": TOKENIZER, **trainer_options},
    )


def train(folder, dataset, model=None, **options):
    trainer = trainer_of(folder, dataset, model, **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry["loss"] for entry in logs], logs, trainer


def test_log_probabilities_are_those_that_recommend_uses():
    """Answers scored behind one encoding of their prompt = `score_all`, on either padding side."""
    model = tiger(TOKENIZER).eval()
    rows = data([3, 1, 2])
    for side in ("right", "left"):
        batch = Seq2SeqPreferenceCollator(0, side)([rows[i] for i in range(3)])
        with torch.no_grad():
            logps_A = answer_logps(model, model, batch)
        rejected_R = logps_A[3:].split(batch["rejected_counts"].tolist())
        for row in range(3):
            history = TOKENIZER.token_ids_to_items(rows[row]["prompt_ids"])
            scores_N = model.score_all([[group[0] for group in history]], tokenizer=TOKENIZER)[0]
            wanted = TOKENIZER.item_index([rows[row]["chosen_item"], *rows[row]["rejected_items"]])
            torch.testing.assert_close(torch.cat([logps_A[row : row + 1], rejected_R[row]]), scores_N[wanted])


def test_answers_of_several_lengths_and_a_stock_t5():
    """A T5 of transformers: the same as one forward with labels per answer."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes)).eval()
    row = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 1], "rejected_ids": [[10, 1], [11, 12, 13, 1]]}
    short = {"prompt_ids": [3], "chosen_ids": [4, 1], "rejected_ids": [[5, 1]]}
    batch = Seq2SeqPreferenceCollator(0)([row, short])
    with torch.no_grad():
        logps_A = answer_logps(model, model, batch).tolist()
        expected = []
        for prompt, answer in [
            (row["prompt_ids"], row["chosen_ids"]),
            (short["prompt_ids"], short["chosen_ids"]),
            *[(row["prompt_ids"], ids) for ids in row["rejected_ids"]],
            (short["prompt_ids"], short["rejected_ids"][0]),
        ]:
            loss = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
            expected.append(-loss.item() * len(answer))
    assert logps_A == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_first_loss_is_log_of_k_plus_one_and_training_raises_the_margin(tmp_path, count):
    losses, logs, trainer = train(tmp_path, data([count] * 8), num_train_epochs=4)
    assert losses[0] == pytest.approx(math.log(count + 1), abs=1e-6)  # also with dropout in the model: it is off
    assert losses[-1] < losses[0] - 0.1 and logs[-1]["rewards/margins"] > 0
    assert all(module.p == 0.1 for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))
    assert trainer.model.training  # only for the loss


def test_losses_of_one_and_many_rejected_answers_by_hand(tmp_path):
    """First steps with another model as the reference: DPO's and the paper's formula on scores of `score_all`."""
    model, reference = tiger(TOKENIZER), tiger(TOKENIZER, seed=1)
    for counts in ([1, 1, 1], [3, 2, 4]):
        rows = data(counts)
        scores = []
        for one in (model, reference):
            one.eval()
            items = [[group[0] for group in TOKENIZER.token_ids_to_items(row["prompt_ids"])] for row in rows]
            scores.append(one.score_all(items, tokenizer=TOKENIZER).double())
        expected = []
        for row in range(3):
            items = TOKENIZER.item_index([rows[row]["chosen_item"], *rows[row]["rejected_items"]])
            ratios = (scores[0][row] - scores[1][row])[items] * 0.5
            if counts == [1, 1, 1]:
                expected.append(-math.log(1 / (1 + math.exp(ratios[1] - ratios[0]))))
            else:
                inner = -math.log(sum(math.exp(other - ratios[0]) for other in ratios[1:]))
                expected.append(-math.log(1 / (1 + math.exp(-inner))))
        losses, _, _ = train(
            tmp_path, rows, copy.deepcopy(model), ref_model=copy.deepcopy(reference), max_steps=1,
            per_device_train_batch_size=3,
        )  # fmt: skip
        assert losses[0] == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_steps_do_not_depend_on_how_they_are_cut(tmp_path):
    rows = data([1, 4, 2, 3, 1, 2, 4, 3, 2, 1, 3])
    whole, logs, first = train(tmp_path / "8", rows, per_device_train_batch_size=8, sft_weight=0.3)
    assert len(whole) == 4
    for size, steps in ((4, 2), (2, 4)):
        parts, parts_logs, second = train(
            tmp_path / str(size), rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            sft_weight=0.3, data_collator=Seq2SeqPreferenceCollator(0, "left"),
        )  # fmt: skip
        assert parts == pytest.approx(whole, abs=1e-5)
        for one, other in zip(logs, parts_logs):
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            for name in ("rewards/margins", "rewards/hardest_margins", "logps/chosen", "logps/rejected"):
                assert one[name] == pytest.approx(other[name], abs=1e-4), name
        for one, other in zip(first.model.parameters(), second.model.parameters()):
            torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-3)


def test_the_next_token_loss_is_added(tmp_path):
    rows = data([2] * 4)
    model = tiger(TOKENIZER)
    with_it, _, _ = train(tmp_path / "a", rows, copy.deepcopy(model), sft_weight=0.5, max_steps=1)
    model.eval()
    table = TOKENIZER.item_token_table
    labels = torch.as_tensor(table[TOKENIZER.item_index(rows["chosen_item"])])
    batch = Seq2SeqPreferenceCollator(0)([rows[i] for i in range(4)])
    plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.item()
    assert with_it[0] == pytest.approx(math.log(3) + 0.5 * plain, abs=1e-5)


def test_precomputed_reference_keeps_no_model_and_gives_the_same_losses(tmp_path):
    rows, reference = data([1, 4, 2, 3, 1, 2, 4]), tiger(TOKENIZER, seed=1)
    kept, _, _ = train(tmp_path / "k", rows, ref_model=copy.deepcopy(reference))
    computed, _, trainer = train(
        tmp_path / "p", rows, ref_model=reference, precompute_ref_log_probs=True, precompute_ref_batch_size=2
    )
    assert computed == pytest.approx(kept, abs=1e-5) and trainer.ref_model is None
    own, _, trainer = train(tmp_path / "o", rows, precompute_ref_log_probs=True)
    assert own == pytest.approx(train(tmp_path / "c", rows)[0], abs=1e-5)
    with pytest.raises(TrainingError, match="pass evaluation pairs as eval_dataset"):
        trainer.evaluate(rows)


def test_lora_takes_the_disabled_adapter_and_a_tuned_adapter_its_copy(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q", "v"])
    rows = data([3] * 8)
    options = {"per_device_train_batch_size": 8, "num_train_epochs": 8, "learning_rate": 3e-3}
    losses, logs, trainer = train(tmp_path / "new", rows, peft_config=config, **options)
    assert trainer.ref_model is None and losses[0] == pytest.approx(math.log(4), abs=1e-6)
    assert losses[-1] < losses[0] and logs[-1]["rewards/margins"] > 0
    tuned = get_peft_model(tiger(TOKENIZER), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    losses, _, trainer = train(tmp_path / "old", rows, tuned, **options)
    assert losses[0] == pytest.approx(math.log(4), abs=1e-6) and losses[-1] < losses[0]
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_validation_ranks_items_and_scores_pairs(tmp_path):
    rows, chosen = histories(20, seed=5)
    evaluation = EvaluationSet(np.arange(20), rows, chosen)
    pairs = data([2, 1, 3, 2, 1], seed=3)
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_ks": [5, 10], "eval_num_beams": 10}
    _, _, trainer = train(tmp_path, data([2] * 8), eval_dataset=evaluation, **options)
    found = [entry for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
    assert len(found) == 2
    best = max(entry["eval_ndcg@10"] for entry in found)
    assert trainer.state.best_metric == best
    again = trainer.evaluate()  # the best checkpoint was loaded
    assert again["eval_ndcg@10"] == pytest.approx(best)

    whole = trainer.evaluate(pairs)
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate(pairs)["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)
    assert "eval_rewards/margins" in trainer.state.log_history[-1]


def test_pairs_alone_as_validation(tmp_path):
    pairs = data([2, 1, 3, 2, 1], seed=3)
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "loss"}
    for folder, more in (("kept", {}), ("pre", {"precompute_ref_log_probs": True})):
        _, _, trainer = train(tmp_path / folder, data([2] * 8), eval_dataset=pairs, **options, **more)
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(losses) == 2 and trainer.state.best_metric == min(losses)
        if folder == "kept":
            first = losses
    assert losses == pytest.approx(first, abs=1e-5)


def test_resumes_with_the_same_bits(tmp_path):
    rows = data([2] * 12)
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "num_train_epochs": 2}
    _, _, whole = train(tmp_path / "w", rows, **options)
    reference = tiger(TOKENIZER)
    again = trainer_of(tmp_path / "w", rows, tiger(TOKENIZER, seed=7), ref_model=reference, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "w" / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 6
    for one, other in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, other)


def test_text_rows_are_encoded_by_the_tokenizer(tmp_path):
    ids = data([2, 3])
    text = ids.select_columns(["prompt", "chosen", "rejected"])
    trainer = trainer_of(tmp_path, text)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert trainer.train_dataset[name][:] == ids[name][:]


def test_bad_rows_and_models(tmp_path):
    row = {"prompt_ids": [[4, 8, 12]], "chosen_ids": [[5, 8, 12]], "rejected_ids": [[[6, 8, 12]]]}

    def refuse(error, message, change=None, model=None, **options):
        dataset = Dataset.from_dict({**row, **(change or {})})
        with pytest.raises(error, match=message):
            train(tmp_path, dataset, model, **options)

    refuse(TrainingError, "row 0: rejected answer 0 equals the chosen", {"rejected_ids": [[[5, 8, 12]]]})
    refuse(TrainingError, "row 0: rejected answers 0 and 1 are the same", {"rejected_ids": [[[6, 8, 12], [6, 8, 12]]]})
    refuse(TrainingError, "row 0: there is no rejected", {"rejected_ids": [[]]})
    refuse(TrainingError, "row 0: the prompt is empty", {"prompt_ids": [[]]})
    refuse(TrainingError, "row 0: a prompt of 3 tokens exceeds max_length=2", max_length=2)
    refuse(IncompatibleComponentsError, "token 8 at position 0", {"chosen_ids": [[8, 8, 12]]})
    refuse(TrainingError, "beta", beta=-1.0)
    refuse(TrainingError, "sft_weight", sft_weight=-1.0)
    refuse(IncompatibleComponentsError, "12 tokens|catalogue|tokens", ref_model=tiger(catalogue(50)))
    model = tiger(TOKENIZER)
    refuse(TrainingError, "frozen copy", model=model, ref_model=model)
    with pytest.raises(TrainingError, match="columns prompt, chosen, rejected"):
        trainer_of(tmp_path, Dataset.from_dict({"text": ["a"]}))
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    refuse(TrainingError, "SoftmaxDPOTrainer", model=LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)))
