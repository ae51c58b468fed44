"""S-DPO: the loss against the paper's formula and TRL's DPO, references, exact accumulation, bad rows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import DPOConfig, DPOTrainer

from hf_genrec.alignment.trainers.item_head import use_item_head_as_fused
from hf_genrec.alignment.trainers.preference_loss import padded_rejected, softmax_preference_loss, step_counts
from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer, SoftmaxPreferenceCollator
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.5,
}  # fmt: skip


def level_logps(model, prompt: list[int], answer: list[int]) -> float:
    """Sum over an answer of log-probabilities among the codes of each token's level."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].float()
    total = 0.0
    for place, token in enumerate(answer):
        start = 4 if token < 8 else 8
        scores = logits[len(prompt) - 1 + place, start : start + 4]
        total += float(scores.log_softmax(-1)[token - start])
    return total


def item_tokenizer() -> ItemTokenizer:
    return ItemTokenizer.from_codes([f"i{i}" for i in range(16)], [[i // 4, i % 4] for i in range(16)])


def causal_lm(kind: str = "llama", seed: int = 0, vocab_size: int = 12):
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, pad_token_id=0, **SIZES))
    if kind == "gpt2":  # learned absolute positions
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=32, **sizes))
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab_size, pad_token_id=0, head_dim=8, **SIZES))


def rows(counts: list[int], seed: int = 0) -> Dataset:
    """Item-token rows with prompts and answers of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    table = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for count in counts:
        items = torch.randperm(16, generator=generator).tolist()
        history, answers = items[: 1 + len(table["chosen_ids"]) % 3], items[4 : 5 + count]
        tokens = [[4 + item // 4, 8 + item % 4] + [5] * (item % 2) for item in answers]
        table["prompt_ids"].append([token for item in history for token in (4 + item // 4, 8 + item % 4)])
        table["chosen_ids"].append(tokens[0])
        table["rejected_ids"].append(tokens[1:])
    return Dataset.from_dict(table)


def arguments(folder, kind=SoftmaxDPOConfig, **options):
    values = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1, "beta": 0.5,
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**values, **options})


def train(folder, dataset, model=None, **options):
    """(losses, log entries, trainer)."""
    named = ("ref_model", "peft_config", "data_collator", "processing_class", "eval_dataset")
    trainer_options = {name: options.pop(name) for name in named if name in options}
    trainer_options.setdefault("processing_class", item_tokenizer())
    trainer = SoftmaxDPOTrainer(
        model if model is not None else causal_lm(),
        args=arguments(folder, **options),
        train_dataset=dataset,
        **trainer_options,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry["loss"] for entry in logs], logs, trainer


# ------------------------------------------------------------------------------------------------------------ the loss


def test_loss_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    chosen_B, rejected_BK = torch.randn(5, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    inner_B = -torch.log(torch.exp(0.7 * (rejected_BK - chosen_B[:, None])).sum(1))
    expected_B = -torch.log(1 / (1 + torch.exp(-inner_B)))
    torch.testing.assert_close(softmax_preference_loss(chosen_B, rejected_BK, beta=0.7), expected_B)


def test_loss_is_invariant_to_the_order_of_the_rejected_and_ignores_padding():
    torch.manual_seed(1)
    chosen_B, values_R, counts_B = torch.randn(3), torch.randn(6), torch.tensor([1, 3, 2])
    table_BK, there_BK = padded_rejected(values_R, counts_B)
    loss_B = softmax_preference_loss(chosen_B, table_BK, there_BK, beta=1.0)
    for row, part_K in enumerate(values_R.split(counts_B.tolist())):
        alone = softmax_preference_loss(chosen_B[row : row + 1], part_K.flip(0)[None], beta=1.0)
        torch.testing.assert_close(alone, loss_B[row : row + 1])


def test_gradient_of_a_rejected_answer_is_its_share_of_the_softmax():
    rejected_BK = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    softmax_preference_loss(torch.tensor([0.1]), rejected_BK, beta=0.8).sum().backward()
    shares_BK = rejected_BK.grad / rejected_BK.grad.sum()
    torch.testing.assert_close(shares_BK, torch.softmax(0.8 * rejected_BK.detach(), dim=1))


@pytest.mark.parametrize("gap", [-2000.0, 2000.0])
def test_loss_stays_finite_where_exponentials_do_not(gap):
    chosen_B = torch.tensor([gap], requires_grad=True)
    loss_B = softmax_preference_loss(chosen_B, torch.zeros(1, 3), beta=1.0)
    loss_B.sum().backward()
    assert torch.isfinite(loss_B).all() and torch.isfinite(chosen_B.grad).all()
    assert math.isclose(loss_B.item(), max(0.0, -gap + math.log(3)), rel_tol=1e-6, abs_tol=1e-6)


# --------------------------------------------------------------------------------------------------------- the trainer


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("served", [False, True])
def test_item_answers_compete_with_their_level_where_the_model_is_served_so(tmp_path, served, precompute):
    """Loss and log-probabilities by hand; without the option, and for a model that is served otherwise, nothing changes."""
    model, reference = causal_lm(), causal_lm(seed=1)
    if served:
        model.recommendation_config = RecommendationConfig(restrict_to_level=True)
    data = Dataset.from_dict(
        {
            "prompt_ids": [[4, 9], [5, 8, 6, 11]],
            "chosen_ids": [[7, 10], [4, 8]],
            "rejected_ids": [[[6, 9], [4, 11]], [[5, 9]]],
        }
    )
    expected_loss, chosen_logps = 0.0, 0.0
    for row in data:
        prompt = row["prompt_ids"]
        ratio = [
            level_logps(model, prompt, answer) - level_logps(reference, prompt, answer)
            for answer in (row["chosen_ids"], *row["rejected_ids"])
        ]
        expected_loss += math.log(1 + sum(math.exp(0.5 * (one - ratio[0])) for one in ratio[1:])) / 2
        chosen_logps += level_logps(model, prompt, row["chosen_ids"]) / 2
    options = {} if served else {"item_head": "level"}
    options |= {"precompute_ref_log_probs": precompute, "num_train_epochs": 1, "ref_model": reference}
    losses, logs, _ = train(tmp_path / "a", data, model=model, **options)
    assert losses[0] == pytest.approx(expected_loss, abs=1e-4)
    assert logs[0]["logps/chosen"] == pytest.approx(chosen_logps, abs=1e-3)
    full, _, _ = train(
        tmp_path / "b", data, model=causal_lm(), **(options | {"item_head": "full", "ref_model": causal_lm(seed=1)})
    )
    assert abs(full[0] - expected_loss) > 1e-3


def test_adapters_and_their_reference_go_through_the_item_head(tmp_path):
    model = causal_lm()
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"]), "num_train_epochs": 1, "learning_rate": 0.0}
    losses, _, _ = train(tmp_path, rows([2, 3, 1, 2]), model=model, item_head="items", **options)
    assert losses[0] == pytest.approx((2 * math.log(3) + math.log(4) + math.log(2)) / 4, abs=1e-4)
    with pytest.raises(TrainingError, match="items"):
        arguments(tmp_path, item_head="codes")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_one_rejected_answer_is_trl_dpo(tmp_path, kind):
    """Same text rows, same losses and rewards at every step, same weights at the end."""
    words = [f"<a_{i // 4}><b_{i % 4}>" for i in range(16)]
    text = Dataset.from_dict(
        {
            "prompt": [words[i] + words[(3 * i + 1) % 16] for i in range(8)],
            "chosen": [words[(i + 5) % 16] for i in range(8)],
            "rejected": [words[(i + 9) % 16] for i in range(8)],
        }
    )
    model, reference = causal_lm(kind), causal_lm(kind, seed=1)
    theirs_model = copy.deepcopy(model)
    _, ours, _ = train(tmp_path / "a", text, model=model, ref_model=copy.deepcopy(reference))
    theirs = DPOTrainer(
        theirs_model, ref_model=reference, args=arguments(tmp_path / "b", DPOConfig), train_dataset=text,
        processing_class=item_tokenizer(),
    )  # fmt: skip
    theirs.train()
    expected = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert len(ours) == len(expected) == 4
    names = (
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "grad_norm",
    )  # fmt: skip
    for mine, other in zip(ours, expected):
        for name in names:
            assert mine[name] == pytest.approx(other[name], abs=1e-6, rel=1e-5), name
    for mine, other in zip(model.parameters(), theirs_model.parameters()):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_first_loss_is_log_of_k_plus_one(tmp_path, count):
    losses, logs, _ = train(tmp_path, rows([count] * 4), max_steps=1)
    assert losses[0] == pytest.approx(math.log(count + 1), abs=1e-6)
    assert logs[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_first_loss_with_lora_and_with_an_adapter_that_is_trained_on(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    data = rows([3] * 8)
    losses, logs, trainer = train(tmp_path / "new", data, peft_config=config)
    assert trainer.ref_model is None  # the disabled adapter
    assert losses[0] == pytest.approx(math.log(4), abs=1e-6) and losses[-1] < losses[0]
    assert logs[-1]["rewards/margins"] > 0

    tuned = get_peft_model(causal_lm(), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    losses, _, _ = train(tmp_path / "old", data, model=tuned)
    assert losses[0] == pytest.approx(math.log(4), abs=1e-6) and losses[-1] < losses[0]


def test_the_reference_is_the_policy_in_memory_and_stays(tmp_path):
    model = causal_lm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, _, trainer = train(tmp_path, rows([2] * 8), model=model)
    assert all(torch.equal(value, before[name]) for name, value in trainer.ref_model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # a second round on the trained policy starts from that policy, not from the first reference
    losses, _, _ = train(tmp_path, rows([2] * 8, seed=1), model=model, max_steps=1)
    assert losses[0] == pytest.approx(math.log(3), abs=1e-6)


def test_steps_do_not_depend_on_how_they_are_cut(tmp_path):
    """11 rows with 1 to 4 rejected answers: batches of 8, 4 x 2 and 2 x 4 make the same steps, the last one short."""
    data = rows([1, 4, 2, 3, 1, 2, 4, 3, 2, 1, 3])
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "beta": 1.0}
    whole, logs, first = train(tmp_path / "8", data, per_device_train_batch_size=8, **options)
    assert len(whole) == 4
    for size, steps in ((4, 2), (2, 4)):
        parts, parts_logs, second = train(
            tmp_path / str(size), data, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options
        )
        assert parts == pytest.approx(whole, abs=1e-5)
        for one, other in zip(logs, parts_logs):
            assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=1e-5)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        for one, other in zip(first.model.parameters(), second.model.parameters()):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("answers", ["several tokens", "one token", "one token, shared prompts"])
def test_padding_side_does_not_matter(tmp_path, kind, answers):
    data = rows([1, 4, 2, 3, 1, 2, 4, 3]) if answers == "several tokens" else one_token_rows().remove_columns("window")
    right, logs, _ = train(tmp_path / "r", data, model=causal_lm(kind))
    tokenizer = item_tokenizer()
    tokenizer.padding_side = "right"
    shared = answers.endswith("prompts")
    collator = SoftmaxPreferenceCollator(0, padding_side="left", pad_to_multiple_of=8, share_prompts=shared)
    options = {"model": causal_lm(kind), "data_collator": collator, "processing_class": tokenizer}
    left, left_logs, trainer = train(tmp_path / "l", data, **options)
    assert len(right) >= 4 and left == pytest.approx(right, abs=1e-5)
    for one, other in zip(logs, left_logs):
        assert other["rewards/margins"] == pytest.approx(one["rewards/margins"], abs=1e-5)
    batch = collator([trainer.train_dataset[row] for row in range(5)])
    assert batch["attention_mask"][:, 0].min() == 0 and ("answer_tokens" in batch) is shared


def test_precomputed_reference_gives_the_same_losses(tmp_path):
    data, reference = rows([1, 4, 2, 3, 1, 2, 4, 3]), causal_lm(seed=1)
    kept, _, _ = train(tmp_path / "k", data, ref_model=copy.deepcopy(reference))
    computed, _, trainer = train(
        tmp_path / "p", data, ref_model=reference, precompute_ref_log_probs=True, precompute_ref_batch_size=3
    )
    assert computed == pytest.approx(kept, abs=1e-5)
    stored = trainer.train_dataset
    assert len(stored[1]["ref_rejected_logps"]) == 4
    given, _, _ = train(tmp_path / "g", stored, precompute_ref_log_probs=True)  # no reference model at all
    assert given == pytest.approx(kept, abs=1e-5)
    alone, _, _ = train(tmp_path / "n", data, precompute_ref_log_probs=True, max_steps=1, per_device_train_batch_size=8)
    expected = sum(math.log(k + 1) for k in [1, 4, 2, 3, 1, 2, 4, 3]) / 8
    assert alone[0] == pytest.approx(expected, abs=1e-6)


def test_evaluation_weighs_prompts_and_accuracy_means_all_rejected(tmp_path):
    data = rows([1, 4, 2, 3, 1])
    _, _, trainer = train(tmp_path, data, ref_model=causal_lm(seed=1), eval_dataset=data, per_device_eval_batch_size=8)
    whole = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 2
    pieces = trainer.evaluate()
    assert pieces["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)
    accuracy = trainer.state.log_history[-1]["eval_rewards/accuracies"]
    batch = trainer.data_collator([data[i] for i in range(5)])
    with torch.no_grad():
        ref_B, ref_BK = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        keep, trainer.ref_model = trainer.ref_model, trainer.model
        now_B, now_BK = trainer.compute_ref_log_probs(trainer.model, batch)
        trainer.ref_model = keep
    wins = 0
    for row, count in enumerate(batch["rejected_counts"].tolist()):
        wins += bool(((now_B[row] - ref_B[row]) > (now_BK[row, :count] - ref_BK[row, :count])).all())
    assert accuracy == pytest.approx(wins / 5)


@pytest.mark.parametrize("chat", [False, True])
def test_text_and_messages_are_encoded_behind_one_prompt(tmp_path, chat):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import TokenizersBackend

    words = ["<pad>", "<end>", "user", "assistant", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer = TokenizersBackend(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    if chat:
        row = {
            "prompt": [{"role": "user", "content": "a b"}],
            "chosen": [{"role": "assistant", "content": "c"}],
            "rejected": [[{"role": "assistant", "content": text}] for text in ("d e", "f")],
        }
        expected = [[2, 4, 5, 1, 3], [6, 1], [[7, 8, 1], [9, 1]]]
    else:
        row = {"prompt": "a b ", "chosen": "c <end>", "rejected": ["d e <end>", "f <end>"]}
        expected = [[4, 5], [6, 1], [[7, 8, 1], [9, 1]]]
    data = Dataset.from_list([row, row])
    losses, _, trainer = train(tmp_path, data, processing_class=tokenizer, max_steps=1)
    assert [trainer.train_dataset[0][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == expected
    assert losses[0] == pytest.approx(math.log(3), abs=1e-6)


# ------------------------------------------------------------------------------------------------------ shared prompts


def one_token_rows(rows_of_a_user: int = 5, users: int = 3) -> Dataset:
    """Windows of growing prompts: answers of one token, 1 to 3 rejected."""
    generator = torch.Generator().manual_seed(3)
    table = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], "window": []}
    for user in range(users):
        items = (4 + torch.randint(4, (rows_of_a_user + 1,), generator=generator)).tolist()
        for end in range(1, rows_of_a_user + 1):
            others = [token for token in torch.randperm(4, generator=generator).add(4).tolist() if token != items[end]]
            table["prompt_ids"].append(items[:end])
            table["chosen_ids"].append([items[end]])
            table["rejected_ids"].append([[token] for token in others[: 1 + end % 3]])
            table["window"].append(user)
    return Dataset.from_dict(table)


def in_two_tokens(data: Dataset) -> Dataset:
    """The same rows with items of two tokens; some answers are cut to one or go on with a third."""

    def spelled(tokens: list[int]) -> list[int]:
        return [part for token in tokens for part in (token, 8 + (token * 3) % 4)]

    def answer(tokens: list[int], number: int) -> list[int]:
        return (spelled(tokens) + [5] * (number % 3 == 2))[: 1 if number % 5 == 4 else 3]

    def row(example, number):
        rejected = [answer(tokens, number + place) for place, tokens in enumerate(example["rejected_ids"])]
        prompt, chosen = spelled(example["prompt_ids"]), answer(example["chosen_ids"], number + 1)
        return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    return data.map(row, with_indices=True)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tokens", ["one", "several"])
@pytest.mark.parametrize("head", ["full", "level"])
@pytest.mark.parametrize("reference", ["copy", "precomputed", "adapter"])
def test_shared_prompts_train_as_a_pass_per_answer_does(tmp_path, head, reference, tokens, kind):
    data = one_token_rows().remove_columns("window")
    data = data if tokens == "one" else in_two_tokens(data)
    options = {"item_head": head, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    if reference == "precomputed":
        options["precompute_ref_log_probs"] = True
    if reference == "adapter":
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    kept = {}
    for shared in (False, True):
        torch.manual_seed(0)
        folder = tmp_path / str(shared)
        _, logs, trainer = train(folder, data, model=causal_lm(kind), share_prompts=shared, **options)
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(5)])
        assert ("answer_tokens" in batch) is shared and len(batch["input_ids"]) == (1 if shared else 5 + 11)
        with torch.no_grad():
            batch = trainer._prepare_inputs(batch)
            loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        assert torch.equal(loss, trainer.compute_loss(trainer.model, batch).detach())
        assert outputs.logits.shape[:2] == batch["input_ids"].shape
        kept[shared] = logs, [parameter.detach() for parameter in trainer.model.parameters()]
    for one, other in zip(kept[False][0], kept[True][0]):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/rejected", "mean_token_accuracy"):
            assert other[name] == pytest.approx(one[name], abs=2e-5, rel=1e-4), name
    for one, other in zip(kept[False][1], kept[True][1]):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_prompts_are_shared_only_where_scores_stay_what_they_are(tmp_path):
    """Left padding gives the same answers' scores; answers of two tokens and prompt tuning keep a pass per answer."""
    from peft import PromptTuningConfig

    data, model = one_token_rows().remove_columns("window"), causal_lm()
    examples = [data[row] for row in (4, 0, 9, 12)]
    found = []
    for side in ("right", "left"):
        collator = SoftmaxPreferenceCollator(0, padding_side=side, pad_to_multiple_of=8, share_prompts=True)
        batch = collator(examples)
        assert len(batch["input_ids"]) == 3
        mask_HT = batch["attention_mask"]
        places_HT = (mask_HT.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            inputs = {"input_ids": batch["input_ids"], "attention_mask": mask_HT, "position_ids": places_HT}
            logits = model(**inputs).logits.log_softmax(-1)
        found.append(logits[batch["answer_rows"], batch["answer_places"][:, 0], batch["answer_tokens"][:, 0]])
    torch.testing.assert_close(found[0], found[1])
    collator = SoftmaxPreferenceCollator(0, share_prompts=True)
    assert "answer_tokens" not in collator([rows([2])[0], examples[0]])
    tuning = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    _, _, trainer = train(tmp_path, data, peft_config=tuning, max_steps=1)
    assert not trainer.data_collator.share_prompts
    # a sliding window of 6: a prompt and answer of 7 tokens have a pass each, shorter ones share theirs
    sizes = {**SIZES, "layer_types": ["sliding_attention"], "use_sliding_window": True, "sliding_window": 6}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=12, pad_token_id=0, head_dim=8, **sizes))
    _, _, trainer = train(tmp_path, in_two_tokens(data), model=model, max_steps=1)
    assert trainer.data_collator.longest_shared == 6
    several = trainer.train_dataset
    assert "answer_tokens" in trainer.data_collator([several[0]])
    assert "answer_tokens" not in trainer.data_collator([several[0], several[4]])
    stateful = causal_lm()
    stateful._is_stateful = True
    _, _, trainer = train(tmp_path, data, model=stateful, max_steps=1)
    assert trainer.data_collator.longest_shared == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_answers_see_their_prompt_and_themselves_alone(implementation):
    """Scores by hand, whatever stands beside: every answer of a packed batch as if it were alone."""
    data = in_two_tokens(one_token_rows())
    model = causal_lm("qwen3")
    model.set_attn_implementation(implementation)
    use_item_head_as_fused(model, "full", item_tokenizer())
    examples = [data[row] for row in (2, 7, 4, 0, 11)]
    batch = SoftmaxPreferenceCollator(0, share_prompts=True, longest_shared=None, pad_to_multiple_of=8)(examples)
    names = ("input_ids", "attention_mask", "position_ids", "answer_rows", "answer_places", "answer_tokens")
    labels = torch.full_like(batch["input_ids"], -100)
    with torch.no_grad():
        found = model(**{name: batch[name] for name in names}, labels=labels, fused_lm_head=True).log_probs.sum(1)
        answers = [(row["prompt_ids"], row["chosen_ids"]) for row in examples]
        answers += [(row["prompt_ids"], answer) for row in examples for answer in row["rejected_ids"]]
        for score, (prompt, answer) in zip(found.tolist(), answers, strict=True):
            logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            assert score == pytest.approx(expected, abs=1e-5)


def test_packed_rows_have_a_bound(monkeypatch):
    """Masks grow with the square of a row: where it would be too long, every answer has its own pass."""
    examples = [in_two_tokens(one_token_rows())[row] for row in (0, 4)]
    collator = SoftmaxPreferenceCollator(0, share_prompts=True, longest_shared=None)
    width = collator(examples)["input_ids"].shape[1]
    for most, packed in ((width, True), (width - 1, False)):
        monkeypatch.setattr("hf_genrec.alignment.trainers.shared_prompts.MOST_TOKENS", most)
        assert ("answer_tokens" in collator(examples)) is packed


def test_rows_of_a_window_come_together(tmp_path):
    data = one_token_rows(rows_of_a_user=4, users=6)
    _, _, trainer = train(tmp_path, data, max_steps=1)
    orders = []
    for epoch in (0, 1):
        sampler = trainer._get_train_sampler()
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(24))
        windows = [data["window"][row] for row in order]
        assert all(len(set(windows[start : start + 4])) == 1 for start in range(0, 24, 4))
        orders.append(order)
    assert orders[0] != orders[1]
    first = next(iter(trainer.get_train_dataloader()))
    assert len(first["input_ids"]) == 1 and len(first["rejected_counts"]) == 4  # a batch of one window is one pass
    _, _, other = train(tmp_path, data, max_steps=1, share_prompts=False)
    assert not hasattr(other._get_train_sampler(), "starts")


def test_windows_of_pairs_share_their_prompts():
    from hf_genrec.alignment.negatives import RandomNegatives
    from hf_genrec.alignment.pair_datasets import item_dataset
    from hf_genrec.alignment.pairs import make_pairs, next_items
    from hf_genrec.data.sequences import Sequences

    tokenizer = ItemTokenizer.from_codes([f"i{i}" for i in range(16)], [[i] for i in range(16)])
    train_rows = next_items(Sequences.from_rows([list(range(8)), [3, 9, 4]]))
    pairs = make_pairs(train_rows, RandomNegatives(16, seed=0), 2)
    data = item_dataset(pairs, tokenizer, window=3)
    plain = item_dataset(pairs, tokenizer, max_history=3)
    assert data["window"] == [0, 0, 0, 1, 1, 1, 2, 3, 3]
    assert [len(prompt) for prompt in data["prompt_ids"]] == [1, 2, 3, 1, 2, 3, 1, 1, 2]
    for row, other in zip(data, plain):
        assert row["prompt_ids"] == other["prompt_ids"][-len(row["prompt_ids"]) :]
        assert row["chosen_ids"] == other["chosen_ids"] and row["rejected_ids"] == other["rejected_ids"]
    batch = SoftmaxPreferenceCollator(0, share_prompts=True)([data[row] for row in range(6)])
    assert batch["input_ids"].shape == (2, 3) and batch["answer_rows"].tolist()[:6] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(TrainingError, match="behind the history"):
        item_dataset(pairs, tokenizer, window=3, after=" next")
    with pytest.raises(TrainingError, match="at least 1"):
        item_dataset(pairs, tokenizer, window=0)


def test_counts_of_a_step():
    class One:
        num_processes = 1

    batches = [
        {"rejected_counts": torch.tensor([1, 2]), "chosen_tokens": torch.tensor([3, 4])},
        {"rejected_counts": torch.tensor([5]), "chosen_tokens": torch.tensor([2])},
    ]
    assert step_counts(batches, One(), torch.device("cpu")).tolist() == [3, 9]


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_ids": [[[4, 8], [4, 8]]]}, "row 0: rejected answers 0 and 1 are the same"),
        ({"rejected_ids": [[[5, 9]]]}, "row 0: rejected answer 0 equals the chosen one"),
        ({"rejected_ids": [[]]}, "row 0: there is no rejected answer"),
        ({"rejected_ids": [[[]]]}, "row 0: rejected answer 0 is empty"),
        ({"prompt_ids": [[]]}, "row 0: the prompt is empty"),
        ({"chosen_ids": [[]]}, "row 0: the chosen answer is empty"),
        ({"prompt_ids": [[4, 8] * 10]}, "row 0: 20 prompt tokens and an answer of 2 tokens exceed max_length=16"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    table = {"prompt_ids": [[4, 8]], "chosen_ids": [[5, 9]], "rejected_ids": [[[6, 10]]], **change}
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, Dataset.from_dict(table), max_length=16)


def test_bad_options_and_models(tmp_path):
    with pytest.raises(TrainingError, match="loss_type"):
        arguments(tmp_path, loss_type="ipo")
    with pytest.raises(TrainingError, match="ld_alpha"):
        arguments(tmp_path, ld_alpha=0.5)
    with pytest.raises(TrainingError, match="beta"):
        arguments(tmp_path, beta=0.0)
    with pytest.raises(IncompatibleComponentsError, match="13 tokens, the policy 12"):
        train(tmp_path, rows([1]), ref_model=causal_lm(vocab_size=13))
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1))
    with pytest.raises(TrainingError, match="Seq2SeqPreferenceTrainer"):
        train(tmp_path, rows([1]), model=t5)
