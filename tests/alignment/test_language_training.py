"""The language recommender learns the successor catalogue from titles alone."""

from __future__ import annotations

import torch
from trainer_cases import successor_split

from hf_genrec.alignment.trainers.arguments import RecommenderTrainingArguments
from hf_genrec.alignment.trainers.recommender import train_recommender
from hf_genrec.identifiers.text_vocabulary import train_text_tokenizer
from hf_genrec.identifiers.tokenization_item_words import ItemWordsTokenizer
from hf_genrec.models.language.configuration_language import LanguageRecommenderConfig
from hf_genrec.models.language.modeling_language import LanguageRecommenderForCausalLM

WORDS = ["star", "war", "trek", "night", "day", "of", "the", "king", "queen", "x"]
SIZES = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


def test_learns_that_an_item_is_followed_by_the_next(tmp_path):
    """The successor catalogue, titles only: Hit@1 = 1."""
    torch.manual_seed(0)
    titles = [f"{WORDS[i // 10]} {WORDS[i % 10]}" for i in range(30)]
    tokenizer = ItemWordsTokenizer.from_texts(train_text_tokenizer(titles, 300), [f"i{i}" for i in range(30)], titles)
    config = LanguageRecommenderConfig.from_tokenizer(tokenizer, language_model=SIZES)
    model = LanguageRecommenderForCausalLM(config)
    model.set_catalogue(tokenizer.codes)
    args = RecommenderTrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=25, learning_rate=5e-3, per_device_train_batch_size=8,
        max_history=14, eval_epochs=25, disable_tqdm=True, report_to=[], use_cpu=True,
    )  # fmt: skip
    train_recommender(model, tokenizer, successor_split(), args)
    histories = [[f"i{(start + step) % 30}" for step in range(5)] for start in range(30)]
    found = model.eval().recommend(histories, tokenizer=tokenizer, k=1, exclude_seen=False)
    assert [row[0].item_id for row in found] == [f"i{(start + 5) % 30}" for start in range(30)]
