"""constrain_generation: every `generate` of a model stays in the catalogue, TRL's rollouts included."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from logits_cases import EOS, answers, left_padded, prompt_length, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, MinLengthLogitsProcessor

from hf_genrec.errors import IncompatibleComponentsError, RequestError
from hf_genrec.generation.constrain import attach_constraint, constrain_generation, generating_model, release_constraint
from hf_genrec.generation.logits_process import ItemTrieLogitsProcessor
from hf_genrec.generation.logits_process_levels import PerLevelLogitsProcessor
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES = (5, 4, 6)
PROMPTS = [[4, 5], [6, 9, 13, 7], [8]]


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(120, 12, replace=False), SIZES), axis=1)
    return ItemTokenizer.from_codes([f"item-{i}" for i in range(12)], codes, SIZES)


@pytest.fixture(scope="module")
def catalogue(tokenizer):
    return {tuple(row) for row in tokenizer.item_token_table.tolist()}


def free(model, inputs, **options):
    output = model.generate(**inputs, return_dict_in_generate=True, max_new_tokens=4, **options)
    return answers(model, inputs, output)


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 8}, {"num_beams": 4, "do_sample": False}],
)
def test_generate_without_an_argument_is_constrained(kind, options, tokenizer, catalogue):
    """One processor serves prompts of any width; afterwards the model is as it was."""
    model = tiny_model(kind, len(tokenizer))
    before = free(model, left_padded(PROMPTS), do_sample=False)
    with constrain_generation(model, ItemTrieLogitsProcessor(tokenizer)) as same:
        assert same is model
        for prompts in (PROMPTS, PROMPTS[:1], [[8, 8, 8, 8, 8, 8, 4]]):
            assert set(free(model, left_padded(prompts), **options)) <= catalogue
    assert free(model, left_padded(PROMPTS), do_sample=False) == before and not set(before) <= catalogue


def test_equals_the_processor_given_by_hand(tokenizer):
    model, inputs = tiny_model("llama", len(tokenizer)), left_padded(PROMPTS)
    processor = ItemTrieLogitsProcessor(tokenizer, 4)
    by_hand = free(model, inputs, num_beams=5, do_sample=False, logits_processor=LogitsProcessorList([processor]))
    with constrain_generation(model, ItemTrieLogitsProcessor(tokenizer, 99)):
        assert free(model, inputs, num_beams=5, do_sample=False) == by_hand


def test_a_factory_sees_the_prompts_of_the_call(tokenizer, catalogue):
    """Seen items differ per call: the factory reads them off the prompts."""
    model = tiny_model("llama", len(tokenizer))
    calls = []

    def unseen(call):
        calls.append((call.prompt_length, tuple(call.inputs.shape), call.generation_config.do_sample))
        seen = [[item for run in tokenizer.token_ids_to_items(row) for item in run] for row in call.inputs.tolist()]
        return [ItemTrieLogitsProcessor(tokenizer, call.prompt_length, excluded_items=seen)]

    history = [["item-3", "item-5"], ["item-1"]]
    inputs = dict(tokenizer.encode_histories(history, return_tensors="pt"))
    with constrain_generation(model, unseen):
        got = free(model, inputs, do_sample=True, num_return_sequences=40)
    assert calls == [(6, (2, 6), True)]
    for row, seen in enumerate(history):
        names = set(got[40 * row : 40 * row + 40])
        assert names <= catalogue - {tuple(tokenizer.item_token_ids(item)) for item in seen} and len(names) > 1


def test_sampling_warpers_come_after_the_constraint(tokenizer, catalogue):
    """top_k=1 over the whole vocabulary would leave no catalogue token; over the legal ones it is greedy."""
    model, inputs = tiny_model("llama", len(tokenizer)), left_padded(PROMPTS)
    with constrain_generation(model, ItemTrieLogitsProcessor(tokenizer)):
        assert free(model, inputs, do_sample=True, top_k=1) == free(model, inputs, do_sample=False)
        own = LogitsProcessorList([MinLengthLogitsProcessor(2, EOS)])
        assert set(free(model, inputs, do_sample=False, logits_processor=own)) <= catalogue


def test_nothing_is_saved_and_copies_stand_alone(tokenizer, catalogue, tmp_path):
    model, inputs = tiny_model("llama", len(tokenizer)), left_padded(PROMPTS)
    before = free(model, inputs, do_sample=False)
    release = attach_constraint(model, ItemTrieLogitsProcessor(tokenizer))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert "processor" not in (tmp_path / "config.json").read_text()
    assert free(LlamaForCausalLM.from_pretrained(tmp_path), inputs, do_sample=False) == before
    assert free(pickle.loads(pickle.dumps(model)), inputs, do_sample=False) == before  # noqa: S301
    stored = io.BytesIO()
    torch.save(model, stored)
    assert len(stored.getvalue()) < 2 * (tmp_path / "model.safetensors").stat().st_size + 20_000
    twin = copy.deepcopy(model)
    assert set(free(twin, inputs, do_sample=False)) <= catalogue
    release()
    release()  # once more does nothing
    assert free(model, inputs, do_sample=False) == before
    assert set(free(twin, inputs, do_sample=False)) <= catalogue
    assert twin._get_logits_processor.model is twin
    release_constraint(twin)
    assert free(twin, inputs, do_sample=False) == before


def test_wrapped_models(tokenizer, catalogue):
    """From outside and from inside of PEFT, data parallel and compiled wrappers."""
    peft = pytest.importorskip("peft")
    inner, inputs = tiny_model("llama", len(tokenizer)), left_padded(PROMPTS)
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with constrain_generation(model, ItemTrieLogitsProcessor(tokenizer)):
        assert set(free(model, inputs, do_sample=True)) <= catalogue
        assert set(free(model.get_base_model(), inputs, do_sample=True)) <= catalogue
    with constrain_generation(model.get_base_model(), ItemTrieLogitsProcessor(tokenizer)):
        assert set(free(model, inputs, do_sample=True)) <= catalogue
    assert not set(free(model, inputs, do_sample=False)) <= catalogue
    plain = tiny_model("llama", len(tokenizer))
    assert generating_model(torch.nn.DataParallel(plain)) is plain
    assert generating_model(torch.compile(plain, backend="eager")) is plain
    assert generating_model(torch.nn.DataParallel(model)) is inner


def test_continuous_batching_is_refused(tokenizer):
    model = tiny_model("llama", len(tokenizer))
    with (
        constrain_generation(model, ItemTrieLogitsProcessor(tokenizer)),
        pytest.raises(IncompatibleComponentsError, match="continuous batching"),
    ):
        model._get_logits_processor(model.generation_config)


def test_bad_arguments_are_named(tokenizer):
    model = tiny_model("llama", len(tokenizer))
    processor = ItemTrieLogitsProcessor(tokenizer)
    with pytest.raises(IncompatibleComponentsError, match="Linear does not generate"):
        attach_constraint(torch.nn.Linear(2, 2), processor)
    with pytest.raises(IncompatibleComponentsError, match="MinLengthLogitsProcessor does not know"):
        attach_constraint(model, MinLengthLogitsProcessor(2, EOS))
    with pytest.raises(RequestError, match="neither a logits processor"):
        attach_constraint(model, "items")
    release = attach_constraint(model, processor)
    with pytest.raises(IncompatibleComponentsError, match="constrained already"):
        attach_constraint(model, processor)
    release()
    model.config.catalogue_fingerprint = "0" * 64
    for one in (processor, PerLevelLogitsProcessor(tokenizer)):
        with pytest.raises(IncompatibleComponentsError, match="made for catalogue 000000000000"):
            attach_constraint(model, one)
    with (
        constrain_generation(tiny_model("llama", len(tokenizer)), lambda call: None) as other,
        pytest.raises(RequestError, match="returned None"),
    ):
        free(other, left_padded(PROMPTS))


@pytest.mark.parametrize("lora", [False, True])
def test_grpo_rollouts_are_catalogue_items(lora, tokenizer, catalogue, tmp_path):
    """TRL calls generate itself, with left-padded prompts of another width each time."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, pad_token_id=0, eos_token_id=EOS, bos_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    seen = []

    def reward(completion_ids, **columns):
        seen.extend(tuple(ids) for ids in completion_ids)
        return [float(ids[0] % 2) for ids in completion_ids]

    names = [f"item-{i}" for i in range(12)]
    text = lambda items: "".join(tokenizer.decode(tokenizer.item_token_ids(item)) for item in items)
    prompts = [text(names[start : start + 1 + start % 3]) for start in range(8)]
    options = {
        "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": 4, "report_to": "none", "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    peft_config = None
    if lora:
        peft = pytest.importorskip("peft")
        peft_config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**options),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    with constrain_generation(trainer.model, ItemTrieLogitsProcessor(tokenizer)):
        trainer.train()
    rollouts = [ids[: ids.index(EOS)] if EOS in ids else ids for ids in seen]
    assert len(rollouts) == 16 and set(rollouts) <= catalogue and len(set(rollouts)) > 1
    inputs = left_padded(PROMPTS)
    assert prompt_length(generating_model(trainer.model), inputs) == 4
    assert not set(free(trainer.model, inputs, do_sample=False)) <= catalogue
