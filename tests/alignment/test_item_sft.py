"""ItemSFTTrainer: TRL's loss, heads of item tokens, exact steps, rows drawn anew and resumed, ranking validation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from sft_cases import (
    AFTER,
    BEFORE,
    arguments,
    base_lm,
    base_tokenizer,
    evaluation_set,
    item_lm,
    losses,
    row,
    row_dataset,
    rows,
    state,
    text_tokenizer,
)
from torch.utils.data import Dataset as TorchDataset
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import SFTConfig, SFTTrainer

from hf_genrec.alignment.adapters import item_lora
from hf_genrec.alignment.item_embeddings import add_item_tokens
from hf_genrec.alignment.trainers.item_head import add_item_head, item_log_probs
from hf_genrec.alignment.trainers.item_rows import ItemRowCollator
from hf_genrec.alignment.trainers.item_sft import ItemSFTConfig, ItemSFTTrainer
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.evaluation.evaluator import evaluate
from hf_genrec.evaluation.recommenders import ModelRecommender
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommend, recommendation_config_of


def trainer(folder, dataset, model=None, **options) -> ItemSFTTrainer:
    own = ("ranking_dataset", "eval_dataset", "callbacks")
    mine = {name: options.pop(name) for name in own if name in options}
    model = model if model is not None else item_lm()
    return ItemSFTTrainer(
        model, arguments(folder, **options), train_dataset=dataset, processing_class=text_tokenizer(), **mine
    )


def lora(model=None, **options):
    torch.manual_seed(3)
    return item_lora(model or item_lm(), text_tokenizer(), r=2, alpha=8, dropout=0.0, **options)


# ------------------------------------------------------------------------------------------------------ TRL's own loss


@pytest.mark.parametrize(("kind", "peft"), [("ids", False), ("ids", True), ("text", False)])
def test_full_head_is_trl_sft(tmp_path, kind, peft):
    """The whole training set in every step, so that the order does not matter: losses and weights agree."""
    data = row_dataset(12, texts=True)
    if kind == "text":
        words = [f"<a_{i // 4}><b_{i % 4}>" for i in range(16)]
        table = {"prompt": [f"{BEFORE}{words[i]}{AFTER}" for i in range(8)], "completion": words[4:12]}
        data = Dataset.from_dict(table)
    options = {"per_device_train_batch_size": len(data), "max_steps": 3}
    ours = trainer(tmp_path / "ours", data, lora() if peft else None, **options)
    ours.train()
    assert ours._own_head
    plain = {
        "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", "lr_scheduler_type": "constant", "gradient_checkpointing": False, "report_to": "none",
    }  # fmt: skip
    theirs = SFTTrainer(
        lora() if peft else item_lm(),
        SFTConfig(str(tmp_path / "trl"), **plain, **options),
        train_dataset=data,
        processing_class=text_tokenizer(),
    )
    theirs.train()
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=0, atol=1e-6)
    assert losses(ours)[-1] < losses(ours)[0]
    for name, value in state(theirs.model).items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=1e-5)
    logged = next(entry for entry in ours.state.log_history if "loss" in entry)
    theirs_logged = next(entry for entry in theirs.state.log_history if "loss" in entry)
    for name in ("mean_token_accuracy", "num_tokens"):
        assert math.isclose(logged[name], theirs_logged[name])


def test_models_that_bend_their_logits_keep_trls_head(tmp_path):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=len(base_tokenizer()), num_key_value_heads=1, final_logit_softcapping=2.0, **sizes)
    model = add_item_tokens(Gemma2ForCausalLM(config), text_tokenizer())
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)
    made = rows(4)
    ids = ItemRowCollator(text_tokenizer().pad_token_id)(made)
    expected = model(**{name: ids[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1].log_softmax(-1)
    labels = ids["labels"][:, 1:]
    picked = expected.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[labels != -100]
    first = trainer(tmp_path, Dataset.from_list(made), model, max_steps=1)
    assert not first._own_head
    first.train()
    assert math.isclose(losses(first)[0], -picked.mean().item(), abs_tol=1e-4)
    with pytest.raises(IncompatibleComponentsError, match="bends or scales its logits"):
        trainer(tmp_path, Dataset.from_list(made), model, item_head="level")


# ------------------------------------------------------------------------------------------------------------ the head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["full", "items", "level"])
def test_log_probabilities_are_those_of_the_rows_that_compete(kind, peft, tied):
    """Against a softmax over the model's own logits; text targets always over the whole vocabulary."""
    tokenizer, model = text_tokenizer(), item_lm(tied)
    wrapped = lora(model) if peft else model
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    batch = ItemRowCollator(tokenizer.pad_token_id)(rows(6, texts=True))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = wrapped(**inputs).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    first, second = (range(int(start), int(start) + 4) for start in tokenizer.level_offsets)
    expected, kinds = [], set()
    for row_logits, row_labels in zip(logits, labels):
        for scores, label in zip(row_logits, row_labels.tolist()):
            if label == -100:
                continue
            rival = range(len(tokenizer))
            if kind == "items" and label in [*first, *second]:
                rival = [*first, *second]
            elif kind == "level" and label in [*first, *second]:
                rival = first if label in first else second
            kinds.add(len(rival))
            expected.append(scores[label] - scores[list(rival)].logsumexp(0))
    assert len(kinds) == (1 if kind == "full" else 2)
    add_item_head(model, kind, tokenizer)
    outputs = wrapped(**inputs, labels=batch["labels"], item_head=True)
    torch.testing.assert_close(outputs.log_probs, torch.stack(expected), rtol=1e-4, atol=1e-5)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    ours = torch.autograd.grad(outputs.log_probs.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(torch.stack(expected).sum(), parameters, allow_unused=True)
    for one, two in zip(ours, theirs):
        if two is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_item_only_targets_touch_no_other_row_of_the_head():
    head = torch.nn.Linear(4, 100, bias=True)
    hidden = torch.randn(6, 4)
    targets = torch.tensor([50, 59, 60, 65, 50, 69])
    item_log_probs(hidden, targets, head, [(50, 60), (60, 70)]).log_probs.sum().backward()
    assert head.weight.grad[50:70].abs().sum(1).min() > 0 and head.bias.grad[50:70].abs().min() > 0
    for grad in (head.weight.grad, head.bias.grad):
        assert grad[:50].abs().max() == 0 and grad[70:].abs().max() == 0
    nothing = item_log_probs(hidden[:0].requires_grad_(), targets[:0], head, [(50, 60)])
    nothing.log_probs.sum().backward()  # a batch without labels has a gradient of zero, not an error
    assert nothing.log_probs.shape == (0,)


def test_generation_is_as_before(tmp_path):
    model = item_lm()
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    trainer(tmp_path, row_dataset(8), model, item_head="level")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


# -------------------------------------------------------------------------------------------------------- exact steps


@pytest.mark.parametrize(("head", "kind"), [("full", "llama"), ("level", "lora"), ("full", "gpt2")])
def test_batch_split_and_padding_side_leave_the_trajectory(tmp_path, head, kind):
    """Rows have 2 to 5 labels, so an average of averages would differ. GPT-2 has learned absolute positions."""

    def model():
        if kind != "gpt2":
            return lora() if kind == "lora" else item_lm()
        torch.manual_seed(0)
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
        base = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(base_tokenizer()), **sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        )
        return add_item_tokens(base, text_tokenizer())

    data = row_dataset(20, texts=True)  # the last step of an epoch is a short one
    runs = {}
    for name, options in {
        "whole": {"per_device_train_batch_size": 8},
        "split": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "left": {"per_device_train_batch_size": 8, "padding_side": "left"},
        "both": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padding_side": "left"},
    }.items():
        run = trainer(tmp_path / name, data, model(), item_head=head, num_train_epochs=2, **options)
        run.train()
        runs[name] = (losses(run), state(run.model))
    assert len(runs["whole"][0]) == 6
    for name in ("split", "left", "both"):
        np.testing.assert_allclose(runs[name][0], runs["whole"][0], rtol=0, atol=1e-5)
        for key, value in runs["whole"][1].items():
            if (
                "c_attn.bias" not in key
            ):  # keys' bias moves no score: Adam makes steps of the rounding in a gradient of 0
                torch.testing.assert_close(runs[name][1][key], value, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------- rows drawn anew


class Drawn(TorchDataset):
    """Another target length and history in every epoch; remembers what was asked."""

    def __init__(self, count: int = 20):
        self.count, self.epoch, self.read = count, 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    @property
    def lengths(self):
        return np.array([1 + (index + self.epoch) % 4 for index in range(self.count)])

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append((self.epoch, index))
        start = (7 * index + 3 * self.epoch) % 16
        length = int(self.lengths[index])
        return row([(start + step) % 16 for step in range(length)], (start + length) % 16)


def test_row_sources_are_drawn_anew_and_resume_bit_by_bit(tmp_path):
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 8}
    data = Drawn()
    whole = trainer(tmp_path / "whole", data, item_lm(attention_dropout=0.2), **options)
    whole.train()
    assert sorted(set(data.read)) == [(epoch, index) for epoch in range(3) for index in range(20)]
    orders = [[index for epoch, index in data.read if epoch == asked] for asked in range(3)]
    assert orders[0] != orders[1] != orders[2]
    resumed = trainer(tmp_path / "resumed", Drawn(), item_lm(seed=4, attention_dropout=0.2), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))  # inside the second epoch
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    for name, value in state(whole.model).items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_lora_resumes_bit_by_bit(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4, "item_head": "level"}
    item_lm().save_pretrained(tmp_path / "base")
    build = lambda: lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    whole = trainer(tmp_path / "run", row_dataset(20), build(), **options)
    whole.train()
    expected = state(whole.model)
    resumed = trainer(tmp_path / "run", row_dataset(20), build(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, value in expected.items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


# ----------------------------------------------------------------------------------------------- ranking validation


@pytest.mark.parametrize("head", ["full", "level"])
def test_validation_ranks_as_the_evaluator_does_and_keeps_the_best(tmp_path, head):
    ranking = evaluation_set(12)
    run = trainer(
        tmp_path, row_dataset(24), ranking_dataset=ranking, item_head=head, num_train_epochs=3, learning_rate=5e-2,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, max_history=3, eval_ks=[1, 10],
    )  # fmt: skip
    run.train()
    seen = [entry for entry in run.state.log_history if "eval_ndcg@10" in entry]
    assert len(seen) == 3 and run.args.metric_for_best_model == "ndcg@10"
    best = max(entry["eval_ndcg@10"] for entry in seen)
    assert run.state.best_metric == best
    config = recommendation_config_of(run.model)
    assert (config.restrict_to_level, config.max_history) == (head == "level", 3)
    recommender = ModelRecommender(run.model, text_tokenizer(), num_beams=20)
    report = evaluate(recommender, ranking, num_items=16, ks=(1, 10), exclude_seen=True, progress=False, bootstrap=0)
    assert math.isclose(report["ndcg@10"], best, abs_tol=1e-9)
    entry = next(entry for entry in seen if entry["eval_ndcg@10"] == best)
    assert math.isclose(report["recall@1"], entry["eval_recall@1"], abs_tol=1e-9)
    again = run.evaluate(ranking)
    assert again["eval_ndcg@10"] == best

    run.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    histories = [["i1", "i2", "i3", "i4", "i5"], ["i9"]]
    ours = recommend(run.model, histories, tokenizer=text_tokenizer(), k=5)
    assert recommend(loaded, histories, tokenizer=text_tokenizer(), k=5) == ours
    cut = recommend(
        loaded, [history[-3:] for history in histories], tokenizer=text_tokenizer(), k=5, exclude_seen=False
    )
    assert [e.score for e in cut[0]] == pytest.approx(
        [e.score for e in recommend(loaded, histories, tokenizer=text_tokenizer(), k=5, exclude_seen=False)[0]]
    )
    saved = json.loads((tmp_path / "saved" / "recommendation_config.json").read_text())
    assert saved["restrict_to_level"] == (head == "level")


@pytest.mark.parametrize("head", ["full", "level"])
def test_what_is_validated_is_served_whatever_the_model_was_served_as_before(tmp_path, head):
    """A start that was trained and served the other way: validation, the model and its folder agree on the new one."""
    model = item_lm()
    model.recommendation_config = RecommendationConfig(restrict_to_level=head == "full", num_beams=20)
    ranking = evaluation_set(24)
    run = trainer(
        tmp_path, row_dataset(8), model, ranking_dataset=ranking, item_head=head, eval_ks=[1, 10], max_steps=1
    )
    found = run.evaluate()
    served = recommendation_config_of(run.model)
    assert served.restrict_to_level == (head == "level")
    recommender = ModelRecommender(run.model, text_tokenizer(), num_beams=20)
    report = evaluate(recommender, ranking, num_items=16, ks=(1, 10), exclude_seen=True, progress=False, bootstrap=0)
    assert math.isclose(report["ndcg@10"], found["eval_ndcg@10"], abs_tol=1e-9)
    run.save_model(tmp_path / "saved")
    assert RecommendationConfig.from_pretrained(tmp_path / "saved") == served


def test_loss_of_validation_is_that_of_the_targets(tmp_path):
    """Without rows of its own the evaluation loss is the targets' behind their prompts; with rows it is theirs."""
    ranking = evaluation_set(6)
    targets = Dataset.from_list(
        [row(ranking.histories[place].tolist(), int(ranking.targets[place])) for place in range(6)]
    )
    options = {"per_device_eval_batch_size": 6}
    one = trainer(tmp_path / "one", row_dataset(8), ranking_dataset=ranking, **options).evaluate()
    two = trainer(tmp_path / "two", row_dataset(8), eval_dataset=targets, **options).evaluate()
    assert math.isclose(one["eval_loss"], two["eval_loss"], abs_tol=1e-6) and "eval_ndcg@10" not in two
    both = trainer(
        tmp_path / "both", row_dataset(8), eval_dataset=row_dataset(6, seed=9), ranking_dataset=ranking, **options
    ).evaluate()
    assert both["eval_ndcg@10"] == one["eval_ndcg@10"] and both["eval_loss"] != one["eval_loss"]


@pytest.mark.slow
def test_successor_catalogue_is_learned(tmp_path):
    ranking = evaluation_set(32)
    every = [row([(start + step) % 16 for step in range(length)], (start + length) % 16)
             for start in range(16) for length in range(1, 6)]  # fmt: skip
    model = lora(item_lm(num_hidden_layers=2, hidden_size=32))
    run = trainer(
        tmp_path, Dataset.from_list(every), model, ranking_dataset=ranking, item_head="level", eval_ks=[1, 10],
        num_train_epochs=40, per_device_train_batch_size=16, learning_rate=1e-2, lr_scheduler_type="cosine",
    )  # fmt: skip
    run.train()
    assert run.evaluate()["eval_recall@1"] == 1.0


# -------------------------------------------------------------------------------------------------------------- guards


def test_a_time_budget_ends_the_run_and_anneals_the_schedule(tmp_path):
    run = trainer(
        tmp_path, row_dataset(16), max_steps=100000, max_train_seconds=4.0, train_clock="cpu",
        lr_scheduler_type="cosine", logging_steps=1,
    )  # fmt: skip
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert 3 < run.state.global_step < 2000 and rates[-1] < 0.1 * max(rates)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = item_lm()
    with torch.no_grad():
        model.get_input_embeddings().weight[290:] = float("nan")
    run = trainer(tmp_path, row_dataset(8), model, save_strategy="steps", save_steps=1)
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_half_checkpoints_are_skipped(tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, row_dataset(16), **options)
    whole.train()
    expected = state(whole.model)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = trainer(tmp_path, row_dataset(16), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 2
    assert all(torch.equal(resumed.model.state_dict()[name], value) for name, value in expected.items())


def test_bad_rows_and_options_are_named(tmp_path):
    data, short = row_dataset(8), {"max_length": 8}
    longest = max(range(8), key=lambda place: len(data[place]["input_ids"]))
    with pytest.raises(
        TrainingError, match=rf"row {longest} of the train dataset has \d+ tokens, more than max_length=8"
    ):
        trainer(tmp_path, data, **short)
    with pytest.raises(TrainingError, match=r"row \d of a batch has \d+ tokens, more than max_length=8"):
        trainer(tmp_path, Drawn(), **short).train()
    with pytest.raises(TrainingError, match="has no tokens"):
        trainer(tmp_path, Dataset.from_dict({"input_ids": [[5, 6], []], "labels": [[-100, 6], []]}))
    with pytest.raises(TrainingError, match="3 labels for 2 tokens"):
        ItemRowCollator(0)([{"input_ids": [1, 2], "labels": [1, 2, 3]}])
    with pytest.raises(TrainingError, match="training set is empty"):
        trainer(tmp_path, Dataset.from_dict({"input_ids": [], "labels": []}))
    with pytest.raises(TrainingError, match="needs a ranking_dataset"):
        trainer(tmp_path, data, eval_dataset=data, metric_for_best_model="ndcg@10")
    with pytest.raises(TrainingError, match="add its K"):
        trainer(tmp_path, data, ranking_dataset=evaluation_set(), metric_for_best_model="recall@7")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(TrainingError, match="encoder-decoder"):
        trainer(tmp_path, data, t5)
    with pytest.raises(IncompatibleComponentsError, match="token embeddings"):
        trainer(tmp_path, data, base_lm(), ranking_dataset=evaluation_set())
    with pytest.raises(TrainingError, match="no padding token"):
        ItemSFTTrainer(base_lm(), arguments(tmp_path), train_dataset=data, processing_class=base_tokenizer())
    with pytest.raises(IncompatibleComponentsError, match="item_head='items' needs a tokenizer"):
        collator = ItemRowCollator(0)
        ItemSFTTrainer(base_lm(), arguments(tmp_path, item_head="items"), collator, data, None, base_tokenizer())
    with pytest.raises(TrainingError, match="pass an ItemSFTConfig"):
        ItemSFTTrainer(base_lm(), SFTConfig(str(tmp_path), bf16=False, use_cpu=True), train_dataset=data)
    for words, options in [
        ("item_head is 'all'", {"item_head": "all"}),
        ("padding_side is 'both'", {"padding_side": "both"}),
        ("packing", {"packing": True}),
        ("label_smoothing", {"label_smoothing_factor": 0.1}),
        ("eval_num_beams is 0", {"eval_num_beams": 0}),
        ("max_train_seconds is -1", {"max_train_seconds": -1}),
        ("use one of", {"max_train_seconds": 5, "lr_scheduler_type": "polynomial"}),
        ("early_stopping_patience needs", {"early_stopping_patience": 2}),
    ]:
        with pytest.raises(TrainingError, match=words):
            arguments(tmp_path, **options)


def test_configuration_reads_from_a_command_line(tmp_path):
    from trl import TrlParser

    line = ["--output_dir", str(tmp_path), "--item_head", "level", "--eval_ks", "1", "10", "--use_cpu", "true"]
    (config,) = TrlParser(ItemSFTConfig).parse_args_and_config(line)
    assert (config.item_head, config.eval_ks, config.bf16, config.report_to) == ("level", [1, 10], False, [])
