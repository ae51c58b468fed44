"""What trainers of language models are given: folders and their defaults, contexts, padding tokens, references' vocabularies."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from preference_cases import catalogue, tiger
from sft_cases import arguments as sft_arguments
from sft_cases import base_lm, base_tokenizer, evaluation_set, item_lm, row, row_dataset, rows, text_tokenizer
from test_seq2seq_preference import data as seq2seq_rows
from test_seq2seq_preference import trainer_of as seq2seq_trainer
from test_softmax_dpo import arguments, causal_lm, item_tokenizer
from test_softmax_dpo import rows as preference_rows
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from hf_genrec.alignment.item_embeddings import add_item_tokens
from hf_genrec.alignment.trainers.item_sft import ItemSFTTrainer
from hf_genrec.alignment.trainers.language_model import context_of
from hf_genrec.alignment.trainers.mixed_preference import (
    MixedCollator,
    MixedPreferenceConfig,
    MixedPreferenceTrainer,
    Seq2SeqMixedPreferenceConfig,
    Seq2SeqMixedPreferenceTrainer,
)
from hf_genrec.alignment.trainers.softmax_dpo import SoftmaxDPOTrainer, SoftmaxPreferenceCollator
from hf_genrec.errors import IncompatibleComponentsError, TrainingError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommendation_config_of
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SERVED = RecommendationConfig(k=3, num_beams=7, restrict_to_level=True, max_history=4)
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def requests(data: Dataset) -> Dataset:
    return data.add_column("target_ids", data["chosen_ids"])


def preference_trainer(kind: str, folder, model, dataset=None, **options):
    """A SoftmaxDPOTrainer or a MixedPreferenceTrainer."""
    named = ("ref_model", "peft_config", "data_collator", "processing_class")
    mine = {name: options.pop(name) for name in named if name in options}
    dataset = preference_rows([2, 3, 1, 2]) if dataset is None else dataset
    if kind == "mixed":
        args = arguments(folder, MixedPreferenceConfig, **options)
        return MixedPreferenceTrainer(model, args=args, train_dataset=requests(dataset), **mine)
    return SoftmaxDPOTrainer(model, args=arguments(folder, **options), train_dataset=dataset, **mine)


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved(folder, model, tokenizer, served: RecommendationConfig | None = SERVED) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if served is not None:
        served.save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", ["softmax", "mixed"])
def test_a_folder_trains_as_its_model_does_and_keeps_its_recommending_defaults(tmp_path, kind):
    folder = saved(tmp_path / "start", causal_lm(), item_tokenizer())
    model = causal_lm()
    model.recommendation_config = SERVED
    from_model = losses(preference_trainer(kind, tmp_path / "m", model, processing_class=item_tokenizer()))
    trainer = preference_trainer(kind, tmp_path / "f", folder)
    assert type(trainer.data_collator) is (MixedCollator if kind == "mixed" else SoftmaxPreferenceCollator)
    assert losses(trainer) == from_model and trainer._item_head == "level"
    trainer.save_model(tmp_path / "end")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert recommendation_config_of(loaded) == SERVED


def test_sft_keeps_the_defaults_of_a_folder(tmp_path):
    folder = saved(tmp_path / "start", item_lm(), text_tokenizer())
    trainer = ItemSFTTrainer(
        tmp_path / "start", sft_arguments(tmp_path / "a", max_steps=1), train_dataset=row_dataset(8)
    )
    trainer.save_model(tmp_path / "end")
    kept = recommendation_config_of(AutoModelForCausalLM.from_pretrained(tmp_path / "end"))
    assert kept == SERVED.merged(restrict_to_level=False)  # what was trained
    assert trainer.processing_class.name_or_path == folder


def test_the_folder_of_an_adapter_goes_on_with_the_adapter(tmp_path):
    base = saved(tmp_path / "base", causal_lm(), item_tokenizer(), None)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    folder = saved(tmp_path / "adapter", tuned, item_tokenizer())
    trainer = preference_trainer("softmax", tmp_path / "run", folder, preference_rows([3] * 4))
    trains = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trains and all(".default." in name for name in trains)
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(4), abs=1e-6) and found[-1] < found[0]  # the reference is the tuned one
    trainer.save_model(tmp_path / "end")
    assert RecommendationConfig.from_pretrained(tmp_path / "end") == SERVED


def test_weights_of_a_folder_are_float32_unless_asked_otherwise(tmp_path):
    folder = saved(tmp_path / "start", causal_lm().to(torch.bfloat16), item_tokenizer())
    trainer = preference_trainer("softmax", tmp_path / "a", folder)
    assert trainer.model.dtype == trainer.ref_model.dtype == torch.float32
    asked = preference_trainer("softmax", tmp_path / "b", folder, model_init_kwargs={"dtype": "bfloat16"})
    assert asked.model.dtype == torch.bfloat16


def test_folders_without_the_right_model_are_refused(tmp_path):
    tokenizer = catalogue()
    saved(tmp_path / "t", tiger(tokenizer), tokenizer)
    for kind in ("softmax", "mixed"):
        with pytest.raises(TrainingError, match=r"/t is an encoder-decoder: use Seq2SeqPreferenceTrainer"):
            preference_trainer(kind, tmp_path / "a", str(tmp_path / "t"))
    with pytest.raises(TrainingError, match=r"/t is an encoder-decoder: use RecommenderTrainer"):
        ItemSFTTrainer(str(tmp_path / "t"), sft_arguments(tmp_path / "a"), train_dataset=row_dataset(8))
    (tmp_path / "empty").mkdir()
    with pytest.raises(IncompatibleComponentsError, match="empty cannot be loaded as a causal language model"):
        preference_trainer("softmax", tmp_path / "a", str(tmp_path / "empty"))


# ------------------------------------------------------------------------------------------------------------- context


def gpt2(context: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=context, n_embd=8, n_layer=1, n_head=2))


def long_rows() -> Dataset:
    table = {"prompt_ids": [[4, 8], [4, 8] * 7 + [5]], "chosen_ids": [[5, 9]] * 2, "rejected_ids": [[[6, 10]]] * 2}
    return Dataset.from_dict(table)


def test_contexts():
    assert context_of(gpt2(8)) == 8 and context_of(causal_lm()) == 2048
    assert context_of(tiger(catalogue())) is None
    prompts = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    assert context_of(gpt2(8), prompts) == 5 and context_of(get_peft_model(gpt2(8), prompts)) == 5
    assert context_of(get_peft_model(causal_lm(), LoraConfig(**LORA))) == 2048


@pytest.mark.parametrize("kind", ["softmax", "mixed"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "reference"])
def test_preference_rows_beyond_the_context_are_named(tmp_path, kind, architecture):
    options = {"processing_class": item_tokenizer(), "max_length": None}
    model = gpt2(8) if architecture == "gpt2" else causal_lm()
    if architecture == "llama":  # rotary positions would go on silently
        model.config.max_position_embeddings = 8
    if architecture == "reference":
        options["ref_model"] = gpt2(8)
    with pytest.raises(TrainingError, match=r"row 1 has 17 tokens, but the model reads at most 8 .*max_history"):
        preference_trainer(kind, tmp_path, model, long_rows(), **options)
    options.pop("ref_model", None)
    trainer = preference_trainer(kind, tmp_path, gpt2(17), long_rows(), **options)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    with pytest.raises(TrainingError, match="row 0 of a batch has 19 tokens, but the model reads at most 17"):
        data = requests(long_rows()) if kind == "mixed" else long_rows()
        trainer.data_collator([data[1] | {"prompt_ids": [4] * 17}])


@pytest.mark.parametrize("source", ["dataset", "drawn"])
def test_sft_rows_beyond_the_context_are_named(tmp_path, source):
    made = rows(8)
    longest = max(len(example["input_ids"]) for example in made)
    data = Dataset.from_list(made) if source == "dataset" else made
    where = "of the train dataset" if source == "dataset" else "of a batch"
    message = rf"row \d {where} has {longest} tokens, but the model reads at most {longest - 1} "
    with pytest.raises(TrainingError, match=message):
        ItemSFTTrainer(
            item_lm(max_position_embeddings=longest - 1), sft_arguments(tmp_path), train_dataset=data,
            processing_class=text_tokenizer(),
        ).train()  # fmt: skip


def test_encoder_decoder_prompts_beyond_the_context_are_named(tmp_path):
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1,
             "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}  # fmt: skip
    tokenizer = catalogue()
    bart = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), max_position_embeddings=6, **sizes))
    prompts = [[4, 8, 12], [4, 8, 12] * 3]
    table = {"prompt_ids": prompts, "chosen_ids": [[5, 8, 12]] * 2, "rejected_ids": [[[6, 8, 12]]] * 2}
    with pytest.raises(TrainingError, match="row 1 has 9 tokens, but the model reads at most 6"):
        seq2seq_trainer(tmp_path, Dataset.from_dict(table), bart)
    args = Seq2SeqMixedPreferenceConfig(output_dir=str(tmp_path), use_cpu=True)
    data = requests(Dataset.from_dict(table))
    with pytest.raises(TrainingError, match="row 1 has 9 tokens, but the model reads at most 6"):
        Seq2SeqMixedPreferenceTrainer(bart, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("bound", ["context", "max_length"])
def test_ranking_prompts_lose_their_oldest_items(tmp_path, bound):
    """Validation in a context of three items and an answer is validation of the three newest; so is what is served."""
    tokenizer, ranking = text_tokenizer(), evaluation_set(24)
    assert ranking.histories.lengths.max() == 5
    around = len(tokenizer.encode_item_indices([[]], padding=False, return_tensors=None)["input_ids"][0])
    size = around + 2 * 3 + 2 + 1  # one token short of a fourth item
    data = Dataset.from_list([row([2, 3], 4)])

    def run(folder, model, data=data, **options) -> ItemSFTTrainer:
        return ItemSFTTrainer(
            model, sft_arguments(folder, eval_ks=[1, 10], **options), train_dataset=data, processing_class=tokenizer,
            ranking_dataset=ranking,
        )  # fmt: skip

    expected = run(tmp_path / "a", item_lm(), max_history=3).evaluate()
    limits = {"max_length": size} if bound == "max_length" else {}
    model = item_lm(max_position_embeddings=size) if bound == "context" else item_lm()
    trainer = run(tmp_path / "b", model, **limits)
    found = trainer.evaluate()
    for name in ("eval_loss", "eval_ndcg@10", "eval_recall@1"):
        assert found[name] == expected[name]
    assert run(tmp_path / "c", item_lm()).evaluate()["eval_loss"] != found["eval_loss"]
    assert recommendation_config_of(trainer.model).max_history == 3
    assert recommendation_config_of(run(tmp_path / "d", item_lm()).model).max_history is None
    with pytest.raises(TrainingError, match=f"more than the {around + 3} of max_length and the model's context"):
        short = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, 6]]})
        run(tmp_path / "e", item_lm(max_position_embeddings=around + 3), short)


# ------------------------------------------------------------------------------------------------------- padding token


@pytest.mark.parametrize("kind", ["softmax", "mixed"])
@pytest.mark.parametrize("collator", [False, True])
def test_a_tokenizer_without_padding_token_is_refused_and_stays_as_it_is(tmp_path, kind, collator):
    tokenizer = copy.deepcopy(base_tokenizer())
    assert tokenizer.pad_token is None
    own = {"data_collator": (MixedCollator if kind == "mixed" else SoftmaxPreferenceCollator)(0)} if collator else {}
    with pytest.raises(TrainingError, match=r"has no padding token: set tokenizer\.pad_token, or extend it"):
        preference_trainer(kind, tmp_path, base_lm(), processing_class=tokenizer, **own)
    assert tokenizer.pad_token is None and tokenizer.pad_token_id is None


# ----------------------------------------------------------------------------------------------------------- reference


def test_a_reference_may_be_a_folder(tmp_path):
    folder = saved(tmp_path / "r", causal_lm(seed=1), item_tokenizer(), None)
    options = {"processing_class": item_tokenizer()}
    kept = losses(preference_trainer("softmax", tmp_path / "a", causal_lm(), ref_model=causal_lm(seed=1), **options))
    assert losses(preference_trainer("softmax", tmp_path / "b", causal_lm(), ref_model=folder, **options)) == kept


def other_tokens() -> ItemTokenizer:
    """As many tokens as `item_tokenizer`, 2 + 6 codes in place of 4 + 4."""
    return ItemTokenizer.from_codes([f"i{i}" for i in range(12)], [[i // 6, i % 6] for i in range(12)], (2, 6))


def other_items() -> ItemTokenizer:
    """The tokens of `item_tokenizer`, other codes of the items."""
    return ItemTokenizer.from_codes([f"i{i}" for i in range(16)], [[i % 4, i // 4] for i in range(16)])


@pytest.mark.parametrize("how", ["folders", "folder", "loaded"])
@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [(other_tokens, "token 6 is '<b_0>' in the tokenizer of the reference .* and '<a_2>'"), (other_items, "catalogue")],
)
def test_a_reference_of_another_vocabulary_of_the_same_size_is_refused(tmp_path, how, tokenizer, message):
    assert len(tokenizer()) == len(item_tokenizer())
    reference = saved(tmp_path / "r", causal_lm(seed=1), tokenizer(), None)
    policy: object = causal_lm()
    options = {"processing_class": item_tokenizer()}
    if how == "folders":
        policy, options = saved(tmp_path / "p", causal_lm(), item_tokenizer(), None), {}
    if how == "loaded":
        reference = AutoModelForCausalLM.from_pretrained(reference)
    with pytest.raises(IncompatibleComponentsError, match=message) as caught:
        preference_trainer("softmax", tmp_path / "a", policy, ref_model=reference, **options)
    assert "leave ref_model out" in str(caught.value)


def test_a_reference_that_got_its_item_tokens_in_memory_is_welcome(tmp_path):
    """The tokenizer of its folder knows the base vocabulary alone."""
    saved(tmp_path / "base", base_lm(), base_tokenizer(), None)
    reference = add_item_tokens(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), text_tokenizer())
    table = text_tokenizer().item_token_table.tolist()
    data = {"prompt_ids": [table[0], table[1]], "chosen_ids": [table[2], table[3]], "rejected_ids": [[table[4]]] * 2}
    options = {"processing_class": text_tokenizer(), "ref_model": reference}
    trainer = preference_trainer("softmax", tmp_path / "a", item_lm(), Dataset.from_dict(data), **options)
    assert all(np.isfinite(losses(trainer)))


def test_encoder_decoders_take_the_folder_of_a_reference_and_compare_it(tmp_path):
    ours = catalogue()
    saved(tmp_path / "r", tiger(ours, seed=1), ours)
    first = seq2seq_trainer(tmp_path / "a", seq2seq_rows([2] * 4), ref_model=str(tmp_path / "r"))
    second = seq2seq_trainer(tmp_path / "b", seq2seq_rows([2] * 4), ref_model=tiger(ours, seed=1))
    assert losses(first) == losses(second)
    codes = [[i % 2, i // 2 % 4, i // 8] for i in range(16)]
    other = ItemTokenizer.from_codes([f"i{i}" for i in range(16)], codes, (2, 4, 6))
    saved(tmp_path / "o", tiger(other), other)
    with pytest.raises(IncompatibleComponentsError, match="token 6 is '<b_0>' in the tokenizer of the reference"):
        seq2seq_trainer(tmp_path / "c", seq2seq_rows([2] * 4), ref_model=str(tmp_path / "o"))
    saved(tmp_path / "l", causal_lm(), item_tokenizer())
    with pytest.raises(TrainingError, match="/l is no encoder-decoder: use SoftmaxDPOTrainer"):
        seq2seq_trainer(tmp_path / "d", seq2seq_rows([2] * 4), ref_model=str(tmp_path / "l"))
