"""ModelRecommender around stock language models: the lists of `recommend`, configurations, PEFT wrappers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from hf_genrec.data.sequences import Sequences
from hf_genrec.data.splits import EvaluationSet
from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.evaluation import evaluator
from hf_genrec.evaluation.evaluator import evaluate
from hf_genrec.evaluation.recommenders import ModelRecommender, ScoreRecommender
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import recommend, recommendation_config_of
from hf_genrec.identifiers.tokenization_item import ItemTokenizer

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5,
}  # fmt: skip
CODES = np.stack(np.unravel_index(np.random.default_rng(0).permutation(60)[:30], (3, 4, 5)), axis=1)


@pytest.fixture(scope="module")
def tokenizer():
    return ItemTokenizer.from_codes([f"i{item}" for item in range(30)], CODES, (3, 4, 5))


def stock(kind: str, vocab: int):
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "initializer_factor": 3.0}
        return T5ForConditionalGeneration(T5Config(vocab_size=vocab, decoder_start_token_id=0, **sizes))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, pad_token_id=0, **SIZES))
    if kind == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    return model


def rows(count: int = 6) -> EvaluationSet:
    rng = np.random.default_rng(0)
    histories = Sequences.from_rows([rng.permutation(30)[: rng.integers(1, 6)] for _ in range(count)])
    return EvaluationSet(np.arange(count), histories, rng.integers(0, 30, size=count))


def ids(tokenizer, histories) -> list[list[str]]:
    return [[tokenizer.item_ids[item] for item in row] for row in histories]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("kind", ["llama", "lora", "t5"])
def test_lists_are_those_of_recommend(kind, exclude_seen, tokenizer):
    model, histories = stock(kind, len(tokenizer)).train(), rows().histories
    config = RecommendationConfig(num_beams=20, batch_size=4, max_history=3)
    lists = ModelRecommender(model, tokenizer, config).recommend_topk(histories, 10, exclude_seen)
    assert model.training
    found = recommend(
        model, ids(tokenizer, histories), tokenizer=tokenizer, k=10, exclude_seen=exclude_seen,
        recommendation_config=config,
    )  # fmt: skip
    assert ids(tokenizer, lists) == [[entry.item_id for entry in row] for row in found]
    if kind == "lora" and exclude_seen:
        report = evaluate(ModelRecommender(model, tokenizer, config), rows(), num_items=30, progress=False, bootstrap=0)
        hits = (lists == rows().targets[:, None]).any(axis=1)
        assert report["recall@10"] == hits.mean()


def test_the_configuration_decides_over_the_softmax(tokenizer):
    """A token outside the items, likely after some codes only, moves items unless levels are scored alone."""
    model, histories = stock("llama", len(tokenizer) + 5), rows().histories
    with torch.no_grad():
        model.get_output_embeddings().weight[-5:] *= 8
    named = ids(tokenizer, histories)
    lists = {}
    for restrict in (False, True):
        config = RecommendationConfig(num_beams=12, restrict_to_level=restrict)
        items = ModelRecommender(model, tokenizer, config).recommend_topk(histories, 10, False)
        model.recommendation_config = config  # or on the model
        assert np.array_equal(ModelRecommender(model, tokenizer).recommend_topk(histories, 10, False), items)
        found = recommend(model, named, tokenizer=tokenizer, k=10, exclude_seen=False)
        assert ids(tokenizer, items) == [[entry.item_id for entry in row] for row in found]
        del model.recommendation_config
        asked = recommend(model, named, tokenizer=tokenizer, k=10, exclude_seen=False, restrict_to_level=restrict)
        assert [[e.item_id for e in row] for row in asked] == ids(tokenizer, items)
        lists[restrict] = items
    assert not np.array_equal(lists[False], lists[True])
    # a call may also say no where the configuration says yes
    model.recommendation_config = RecommendationConfig(num_beams=12, restrict_to_level=True)
    asked = recommend(model, named, tokenizer=tokenizer, k=10, exclude_seen=False, restrict_to_level=False)
    assert [[e.item_id for e in row] for row in asked] == ids(tokenizer, lists[False])


def test_a_folder_brings_its_configuration(tokenizer, tmp_path):
    stock("llama", len(tokenizer)).save_pretrained(tmp_path)
    assert recommendation_config_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == RecommendationConfig()
    saved = RecommendationConfig(k=3, num_beams=7, restrict_to_level=True, max_history=2)
    saved.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert recommendation_config_of(model) == saved and ModelRecommender(model, tokenizer).config == saved
    assert len(recommend(model, [["i1"]], tokenizer=tokenizer)[0]) == 3
    assert recommendation_config_of(stock("llama", len(tokenizer))) == RecommendationConfig()


def test_models_without_the_item_tokens_are_refused(tokenizer):
    with pytest.raises(IncompatibleComponentsError, match="resize_token_embeddings"):
        ModelRecommender(stock("llama", len(tokenizer) - 1), tokenizer)


def test_the_bar_moves_with_each_batch_of_the_model(tokenizer, monkeypatch):
    """Not with the evaluator's large ones: a language model takes minutes for those."""
    steps: list[int] = []

    class Bar(evaluator.tqdm):
        def update(self, n=1):
            steps.append(n)
            return super().update(n)

    monkeypatch.setattr(evaluator, "tqdm", Bar)
    recommender = ModelRecommender(stock("llama", len(tokenizer)), tokenizer, RecommendationConfig(batch_size=2))
    evaluate(recommender, rows(5), num_items=30, bootstrap=0)
    assert [step for step in steps if step] == [2, 2, 1] and recommender.on_rows is None
    steps.clear()
    evaluate(
        ScoreRecommender(lambda histories: np.zeros((len(histories), 30)), 30), rows(5), num_items=30, batch_size=4
    )
    assert steps == [4, 1] * 2
