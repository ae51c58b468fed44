"""LoRA with item tokens: what trains and what does not, adapter and merged folders, TRL's own trainers on top."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig, get_peft_model
from sft_cases import arguments, base_lm, base_tokenizer, item_lm, row_dataset, rows, state, text_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_genrec.alignment.adapters import item_lora, merge_item_lora
from hf_genrec.alignment.item_embeddings import add_item_tokens
from hf_genrec.alignment.trainers.item_sft import ItemSFTTrainer
from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.recommend import recommend

BASE = len(base_tokenizer())
OPTIONS = {"r": 2, "alpha": 8, "dropout": 0.0}
HISTORIES = [["i1", "i2"], ["i9"], []]


def lora(model, **options) -> PeftModel:
    torch.manual_seed(3)
    return item_lora(model, text_tokenizer(), **{**OPTIONS, **options})


def named(result) -> list[list[str]]:
    return [[entry.item_id for entry in entries] for entries in result]


def same_scores(one, other) -> None:
    assert named(one) == named(other)
    for first, second in zip(one, other):
        torch.testing.assert_close([e.score for e in first], [e.score for e in second], rtol=0, atol=1e-4)


@pytest.mark.parametrize("head", ["full", "level"])
@pytest.mark.parametrize("tied", [True, False])
def test_item_rows_train_and_nothing_else_does(tmp_path, tied, head):
    """Real steps; then the adapter's folder and the merged folder recommend what the model in memory does."""
    base_lm(tied).save_pretrained(tmp_path / "base")
    model = add_item_tokens(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), text_tokenizer())
    before = state(model)
    wrapped = lora(model)
    trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trainable)
    assert sum("trainable_tokens_delta" in name for name in trainable) == (1 if tied else 2)
    trainer = ItemSFTTrainer(
        wrapped,
        arguments(tmp_path / "run", item_head=head, max_steps=3),
        train_dataset=row_dataset(24, texts=True),
        processing_class=text_tokenizer(),
    )
    trainer.train()
    for name, parameter in wrapped.named_parameters():  # what PEFT holds frozen
        if not parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace("base_layer.", "").replace("token_adapter.", "")
            assert torch.equal(parameter, before[plain]), name
    results = recommend(wrapped, HISTORIES, tokenizer=text_tokenizer(), k=8)

    trainer.save_model(tmp_path / "adapter")
    text_tokenizer().save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    level = {"restrict_to_level": head == "level"}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    same_scores(recommend(loaded, HISTORIES, tokenizer=tokenizer, k=8, **level), results)

    merged = merge_item_lora(wrapped)
    after = merged.state_dict()
    assert type(merged) is type(base_lm()) and after.keys() == before.keys()
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows_moved = (after[name] != before[name]).any(dim=1)
        assert not rows_moved[:BASE].any() and rows_moved[tokenizer.level_offsets[0] :].all()
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    same_scores(recommend(merged, HISTORIES, tokenizer=tokenizer, k=8), results)
    merged.save_pretrained(tmp_path / "merged")
    if head == "level":
        merged.recommendation_config.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.config.architectures == ["LlamaForCausalLM"] and again.config.tie_word_embeddings == tied
    same_scores(recommend(again, HISTORIES, tokenizer=tokenizer, k=8), results)  # the folder says restrict_to_level


def test_an_extended_base_folder_makes_a_small_adapter(tmp_path):
    item_lm().save_pretrained(tmp_path / "base")
    wrapped = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert size < 4 * trained + 8000  # no copy of the embedding table
    expected = recommend(wrapped, HISTORIES, tokenizer=text_tokenizer(), k=8)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # transformers reads adapters too
    same_scores(recommend(plain, HISTORIES, tokenizer=text_tokenizer(), k=8), expected)


def test_frozen_item_tokens_leave_plain_lora():
    model = lora(item_lm(), train_item_tokens=False)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    before = state(item_lm())
    assert torch.equal(merge_item_lora(model).get_input_embeddings().weight, before["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_trl_trains_the_wrapped_head(tmp_path, tied):
    """TRL asks the head for a bias, which PEFT's wrapper does not name."""
    wrapped = lora(item_lm(tied))
    options = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": "none", "max_steps": 2}
    SFTTrainer(
        wrapped,
        SFTConfig(str(tmp_path), learning_rate=1e-2, disable_tqdm=True, save_strategy="no", **options),
        train_dataset=row_dataset(8),
        processing_class=text_tokenizer(),
    ).train()
    before, after = state(item_lm(tied)), merge_item_lora(wrapped).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (after[name] != before[name]).any(dim=1)
        assert not moved[:BASE].any() and moved[text_tokenizer().level_offsets[0] :].all()


def test_preference_training_takes_the_untrained_rows_as_reference(tmp_path):
    """The reference is the model without its adapter, item rows included: the first loss is log(K + 1) = log 2."""
    made, items = rows(4), text_tokenizer().item_token_table.tolist()
    chosen = [entry["input_ids"][-2:] for entry in made]
    table = {
        "prompt_ids": [entry["input_ids"][:-2] for entry in made],
        "chosen_ids": chosen,
        "rejected_ids": [[items[items.index(answer) - 1]] for answer in chosen],
    }
    wrapped = lora(item_lm())
    options = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
    config = SoftmaxDPOConfig(
        str(tmp_path), learning_rate=1e-2, max_steps=3, logging_steps=1, save_strategy="no", **options
    )
    trainer = SoftmaxDPOTrainer(
        wrapped, args=config, train_dataset=Dataset.from_dict(table), processing_class=text_tokenizer()
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert math.isclose(logged[0], math.log(2), abs_tol=1e-5) and logged[-1] < logged[0]


def test_a_copy_of_a_trained_model_runs_its_own_weights(tmp_path):
    trainer = ItemSFTTrainer(
        lora(item_lm()),
        arguments(tmp_path, max_steps=1),
        train_dataset=row_dataset(8),
        processing_class=text_tokenizer(),
    )
    trainer.train()
    merged = merge_item_lora(trainer.model)
    other = copy.deepcopy(merged)
    ids = torch.tensor([[5, 6, 7]])
    before = merged(input_ids=ids).logits
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other(input_ids=ids).logits.abs().max() == 0 and torch.equal(merged(input_ids=ids).logits, before)
    assert merge_item_lora(merged) is merged


def test_what_cannot_be_trained_or_merged_is_refused():
    tokenizer = text_tokenizer()
    biased = base_lm(tied=False)
    biased.set_output_embeddings(torch.nn.Linear(16, BASE))
    for words, model, options in [
        ("call add_item_tokens", base_lm(), {}),
        ("adapters already", lora(item_lm()), {}),
        ("target_modules holds 'lm_head'", item_lm(tied=False), {"target_modules": ["q_proj", "lm_head"]}),
        ("has a bias", add_item_tokens(biased, tokenizer), {}),
    ]:
        with pytest.raises(IncompatibleComponentsError, match=words):
            item_lora(model, tokenizer, **options)
    with pytest.raises(IncompatibleComponentsError, match="carries no catalogue"):
        item_lora(item_lm(), base_tokenizer())
    prompts = get_peft_model(item_lm(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(IncompatibleComponentsError, match="cannot be merged"):
        merge_item_lora(prompts)
