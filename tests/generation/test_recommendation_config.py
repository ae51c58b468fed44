"""RecommendationConfig travels with a model; the model's mode is restored after a call."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from transformers import PreTrainedConfig, PreTrainedModel

from hf_genrec.errors import RequestError
from hf_genrec.generation.configuration_recommendation import RecommendationConfig
from hf_genrec.generation.recommend import RecommendationMixin
from hf_genrec.generation.trie import ItemTrie


class TinyConfig(PreTrainedConfig):
    model_type = "generation_test_tiny"
    width: int = 4


class TinyModel(RecommendationMixin, PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "tiny"

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Linear(config.width, 6)
        self.dropout = torch.nn.Dropout(0.9)
        self.frozen = torch.nn.Dropout(0.9)
        self.post_init()

    def _init_weights(self, module):
        pass

    def start_decoding(self, input_ids, attention_mask):
        assert not self.dropout.training and not torch.is_grad_enabled()
        return self.dropout(self.table(input_ids.float()))

    def score_codes(self, state, prefix_BKl, level):
        return state.log_softmax(-1).unsqueeze(1).expand(-1, prefix_BKl.shape[1], -1)


def test_config_is_saved_and_loaded_with_the_model(tmp_path):
    model = TinyModel(TinyConfig())
    assert model.recommendation_config == RecommendationConfig()
    model.recommendation_config = RecommendationConfig(k=3, num_beams=7, exclude_seen=False, dense_weight=0.5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "recommendation_config.json").read_text())["num_beams"] == 7
    again = TinyModel.from_pretrained(tmp_path)
    assert again.recommendation_config == model.recommendation_config
    loaded, info = TinyModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.recommendation_config == model.recommendation_config and not info["missing_keys"]
    assert torch.equal(loaded.table.weight, model.table.weight)


def test_file_is_there_when_a_push_uploads(tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(
        PreTrainedModel, "_upload_modified_files", lambda self, folder, *_, **__: uploaded.extend(os.listdir(folder))
    )
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    TinyModel(TinyConfig()).save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/name")
    assert "recommendation_config.json" in uploaded and "config.json" in uploaded


def test_models_do_not_share_a_config():
    one, two = TinyModel(TinyConfig()), TinyModel(TinyConfig())
    one.recommendation_config.k = 3
    assert two.recommendation_config.k == 10


def test_folder_without_the_file_gives_defaults(tmp_path):
    TinyModel(TinyConfig()).save_pretrained(tmp_path)
    (tmp_path / "recommendation_config.json").unlink()
    assert TinyModel.from_pretrained(tmp_path).recommendation_config == RecommendationConfig()


def test_unreachable_hub_gives_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = RecommendationConfig.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)
    assert found == RecommendationConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "recommendation_config.json"),
        ('{"beams": 3}', "did you mean 'num_beams'"),
        ('{"k": "10"}', "k must"),
        ("[]", "one JSON object"),
    ],
)
def test_damaged_file_is_named(tmp_path, text, words):
    (tmp_path / "recommendation_config.json").write_text(text)
    with pytest.raises(RequestError, match=words) as caught:
        RecommendationConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_every_submodule_is_back_in_its_mode():
    model = TinyModel(TinyConfig()).train()
    model.frozen.eval()
    trie = ItemTrie.from_codes([[0], [3], [5]], (6,))
    first = model.recommend_indices(torch.ones(2, 4, dtype=torch.long), trie=trie, k=3)
    assert model.training and model.dropout.training and not model.frozen.training
    second = model.recommend_indices(torch.ones(2, 4, dtype=torch.long), trie=trie, k=3)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    model.score_codes = None  # a failing call restores it too
    with pytest.raises(TypeError):
        model.recommend_indices(torch.ones(2, 4, dtype=torch.long), trie=trie)
    assert model.dropout.training and torch.is_grad_enabled()


def test_merged_and_width():
    config = RecommendationConfig(k=5, num_beams=3)
    assert config.search_width == 5
    assert config.merged(k=None, num_beams=20) == RecommendationConfig(k=5, num_beams=20)
    assert RecommendationConfig.from_dict(config.to_dict()) == config
