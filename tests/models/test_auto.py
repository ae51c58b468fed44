"""Auto classes: a saved model comes back as its own class, through every Auto class it should."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto

from hf_genrec.models.auto import MODEL_FOR_RECOMMENDATION_MAPPING, AutoModelForRecommendation, register_auto_classes
from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM, RQTransformerModel
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM, SASRecModel
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration, TigerModel

register_auto_classes()

SIZES = {"codebook_sizes": [8, 8], "level_offsets": [4, 12], "vocab_size": 20}
CASES = {
    "tiger": (
        TigerConfig(d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=1, num_decoder_layers=1, **SIZES),
        TigerModel,
        TigerForConditionalGeneration,
        AutoModelForSeq2SeqLM,
    ),
    "sasrec": (
        SASRecConfig(codebook_sizes=[16], hidden_size=8, intermediate_size=8, num_hidden_layers=1),
        SASRecModel,
        SASRecForCausalLM,
        AutoModelForCausalLM,
    ),
    "rq_transformer": (
        RQTransformerConfig(
            hidden_size=8, num_hidden_layers=1, intermediate_size=8, depth_intermediate_size=8, **SIZES
        ),
        RQTransformerModel,
        RQTransformerForCausalLM,
        AutoModelForCausalLM,
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_round_trip_through_the_auto_classes(name, tmp_path):
    config, base_class, model_class, task_class = CASES[name]
    torch.manual_seed(0)
    model = model_class(config)
    model.save_pretrained(tmp_path)
    loaded_config = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded_config) is type(config)
    before, after = (json.loads(one.to_json_string(use_diff=False)) for one in (model.config, loaded_config))
    ignored = {"_name_or_path", "architectures", "dtype"}
    changed = {key: (value, after.get(key)) for key, value in before.items() if after.get(key) != value}
    assert not changed.keys() - ignored, changed
    for auto_class in (task_class, AutoModelForRecommendation):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is model_class
        weights = loaded.state_dict()
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert type(AutoModel.from_pretrained(tmp_path)) is base_class
    assert type(AutoModelForRecommendation.from_config(config)) is model_class


@pytest.mark.parametrize("name", list(CASES))
def test_class_names_are_in_the_name_tables(name):
    _, _, model_class, task_class = CASES[name]
    tables = {
        AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        AutoModelForSeq2SeqLM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    assert model_class.__name__ in tables[task_class].values()


def test_registering_twice_changes_nothing():
    before = list(MODEL_FOR_RECOMMENDATION_MAPPING.keys())
    number = len(AutoModelForCausalLM._model_mapping)
    register_auto_classes()
    assert list(MODEL_FOR_RECOMMENDATION_MAPPING.keys()) == before
    assert len(AutoModelForCausalLM._model_mapping) == number


def test_every_model_of_the_recipes_is_registered():
    from hf_genrec.recipes.components import MODELS

    registered = {
        AutoModelForRecommendation._model_mapping[config] for config in list(MODEL_FOR_RECOMMENDATION_MAPPING.keys())
    }
    classes = [
        component.load() for name, component in MODELS.items() if name != "causal_lm"
    ]  # that one is a stock model
    assert {getattr(one, "decoder_class", one) for one in classes} <= registered


def test_other_models_stay_what_they_are_and_are_refused():
    from transformers import GPT2Config, T5Config, T5ForConditionalGeneration

    tiny = T5Config(d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, vocab_size=10)
    assert type(AutoModelForSeq2SeqLM.from_config(tiny)) is T5ForConditionalGeneration
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForRecommendation.from_config(GPT2Config())
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSeq2SeqLM.from_config(SASRecConfig())
