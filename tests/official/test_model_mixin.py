"""transformers' own model and configuration tests, run on every model of this library.

To add a model: a tester (its configuration and a batch of inputs) and a test class below. A test that is not run stands
in `excluded` with its reason.
"""

from __future__ import annotations

import unittest

import official_mixins
import pytest
import torch

from hf_genrec.models.auto import register_auto_classes
from hf_genrec.models.liger.configuration_liger import LigerConfig
from hf_genrec.models.liger.modeling_liger import LigerForConditionalGeneration, LigerModel
from hf_genrec.models.rpg.configuration_rpg import RPGConfig
from hf_genrec.models.rpg.modeling_rpg import RPGForCausalLM, RPGModel
from hf_genrec.models.rq_transformer.configuration_rq_transformer import RQTransformerConfig
from hf_genrec.models.rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM, RQTransformerModel
from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
from hf_genrec.models.sasrec.modeling_sasrec import SASRecForCausalLM, SASRecModel
from hf_genrec.models.setrec.configuration_setrec import SETRecConfig
from hf_genrec.models.setrec.modeling_setrec import SETRecForCausalLM, SETRecModel
from hf_genrec.models.specgr.configuration_specgr import SpecGRConfig
from hf_genrec.models.specgr.modeling_specgr import SpecGRForConditionalGeneration, SpecGRModel
from hf_genrec.models.tiger.configuration_tiger import TigerConfig
from hf_genrec.models.tiger.modeling_tiger import TigerForConditionalGeneration, TigerModel
from hf_genrec.models.vq_rec.configuration_vq_rec import VQRecConfig
from hf_genrec.models.vq_rec.modeling_vq_rec import VQRecForRecommendation, VQRecModel

pytestmark = pytest.mark.official
modeling = official_mixins.load("test_modeling_common")
configuration = official_mixins.load("test_configuration_common")
register_auto_classes()


class ModelTester:
    """Sizes the mixin reads, and the two methods it calls."""

    batch_size, seq_length, is_training = 5, 6, True
    hidden_size, num_hidden_layers, num_attention_heads = 16, 2, 2

    def __init__(self, parent):
        self.parent = parent
        self.key_length = self.encoder_seq_length = self.decoder_seq_length = self.seq_length

    def get_config(self):
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = modeling.ids_tensor([self.batch_size, self.seq_length], config.vocab_size).clamp(min=2)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class TigerTester(ModelTester):
    decoder_layers, restrict_to_level, causal_encoder = 2, True, False

    def get_config(self):
        # more levels than the mixin's sequences are long
        return TigerConfig(
            vocab_size=99,
            codebook_sizes=[12] * 8,
            level_offsets=[2 + 12 * level for level in range(8)],
            d_model=self.hidden_size,
            d_kv=8,
            d_ff=20,
            num_heads=self.num_attention_heads,
            num_layers=self.num_hidden_layers,
            num_decoder_layers=self.decoder_layers,
            restrict_to_level=self.restrict_to_level,
            causal_encoder=self.causal_encoder,
        )

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["decoder_input_ids"] = modeling.ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        return config, inputs


class SpecGRTester(TigerTester):
    def get_config(self):
        sizes = super().get_config().to_dict()
        del sizes["model_type"]
        return SpecGRConfig(**sizes, num_items=20, projection_size=8)


class CausalTigerTester(TigerTester):
    causal_encoder = True


class LigerTester(TigerTester):
    def get_config(self):
        sizes = super().get_config().to_dict()
        del sizes["model_type"]
        return LigerConfig(**sizes, num_items=20, item_feature_dim=6, projection_sizes=[8])


class SASRecTester(ModelTester):
    learn_repeat_weight = False

    def get_config(self):
        # every token is an item, as the mixin draws labels from the whole vocabulary
        return SASRecConfig(
            vocab_size=99,
            codebook_sizes=[99],
            level_offsets=[0],
            pad_token_id=None,
            eos_token_id=None,
            bos_token_id=None,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=64,
            dropout=0.1,
        )


class RQTransformerTester(ModelTester):
    def get_config(self):
        return RQTransformerConfig(
            vocab_size=99,
            codebook_sizes=[48, 49],
            level_offsets=[2, 50],
            num_items=20,
            item_feature_dim=3,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            depth_intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        offsets = torch.tensor(config.level_offsets).repeat(self.seq_length // config.num_levels)
        inputs["input_ids"] = offsets + modeling.ids_tensor([self.batch_size, self.seq_length], 48)
        return config, inputs


class RPGTester(RQTransformerTester):
    def get_config(self):
        return RPGConfig(
            vocab_size=99,
            codebook_sizes=[48, 49],
            level_offsets=[2, 50],
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )


class SETRecTester(ModelTester):
    def get_config(self):
        # every token is an item, as the mixin draws labels from the whole vocabulary
        return SETRecConfig(
            vocab_size=99,
            codebook_sizes=[99],
            level_offsets=[0],
            pad_token_id=None,
            eos_token_id=None,
            bos_token_id=None,
            item_feature_dims=[5, 7],
            num_semantic_tokens=2,
            autoencoder_sizes=[8],
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=64,
            dropout=0.1,
        )


class VQRecTester(RQTransformerTester):
    def get_config(self):
        return VQRecConfig(
            vocab_size=99,
            codebook_sizes=[48, 49],
            level_offsets=[2, 50],
            num_items=20,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )


class CommonTests(modeling.ModelTesterMixin, official_mixins.GenerationTesterMixin):
    """What our test classes share; `generated_tokens` is how many tokens a `generate` call of ours makes."""

    generated_tokens = 1
    inputs_from, config_class = ModelTester, None

    def setUp(self):
        self.model_tester = self.inputs_from(self)
        self.config_tester = configuration.ConfigTester(self, config_class=self.config_class)

    def test_config(self):
        self.config_tester.run_common_tests()


@official_mixins.excluded(
    {
        "test_model_base_model_prefix": "T5 keeps encoder and decoder in the model itself; stock T5 fails it too",
    }
)
class TigerModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (TigerModel, TigerForConditionalGeneration)
    inputs_from, config_class, is_encoder_decoder = TigerTester, TigerConfig, True
    generated_tokens = 3

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs:  # the mixin's label is 0, which is a code of no level
            first_codes = self.model_tester.get_config().level_offsets[: self.model_tester.seq_length]
            inputs["labels"] = torch.tensor(first_codes).expand_as(inputs["labels"]).contiguous()
        return inputs

    def test_encoder_decoder_loss_no_double_shift(self):
        self.model_tester.restrict_to_level = False  # the test draws its own labels, from the whole vocabulary
        super().test_encoder_decoder_loss_no_double_shift()


@official_mixins.excluded(
    {
        "test_model_base_model_prefix": "T5 keeps encoder and decoder in the model itself; stock T5 fails it too",
        "test_torch_save_load": "for boolean buffers the test calls a state dict as if it were a function",
    }
)
class SpecGRModelTest(TigerModelTest):
    all_model_classes = (SpecGRModel, SpecGRForConditionalGeneration)
    inputs_from, config_class = SpecGRTester, SpecGRConfig


_ITEM_NUMBERS = "where an item begins is read from the tokens: embeddings alone need item_numbers beside them"


@official_mixins.excluded(
    {
        "test_model_base_model_prefix": "T5 keeps encoder and decoder in the model itself; stock T5 fails it too",
        "test_inputs_embeds": _ITEM_NUMBERS,
        "test_inputs_embeds_matches_input_ids": _ITEM_NUMBERS,
    }
)
class CausalTigerModelTest(TigerModelTest):
    inputs_from = CausalTigerTester


@official_mixins.excluded(
    {
        "test_model_base_model_prefix": "T5 keeps encoder and decoder in the model itself; stock T5 fails it too",
        "test_torch_save_load": "for boolean buffers the test calls a state dict as if it were a function",
        "test_inputs_embeds_matches_input_ids": "the encoder adds what it knows of an item to the codes' embeddings",
    }
)
class LigerModelTest(TigerModelTest):
    all_model_classes = (LigerModel, LigerForConditionalGeneration)
    inputs_from, config_class = LigerTester, LigerConfig


class SASRecModelTest(CommonTests, unittest.TestCase):
    all_model_classes = (SASRecModel, SASRecForCausalLM)
    inputs_from, config_class = SASRecTester, SASRecConfig


_NO_STATES = "the model returns the states of its last layer only: a depth decoder has no one list of layers to report"


_WHOLE_ITEMS = {
    "test_hidden_states_output": _NO_STATES,
    "test_retain_grad_hidden_states_attentions": _NO_STATES,
    "test_feed_forward_chunking": _NO_STATES,
    "test_eager_matches_sdpa_inference_*": _NO_STATES,
    "test_model_outputs_equivalence": "outputs are always a ModelOutput, never a tuple",
    "test_causal_lm_loss_honors_shift_labels": "targets are whole items: labels are aligned, nothing is shifted",
    "test_resize_tokens_embeddings": "the vocabulary is the catalogue's codes and cannot be resized",
}


@official_mixins.excluded(_WHOLE_ITEMS)
class RQTransformerModelTest(CommonTests, unittest.TestCase):
    has_attentions = False
    all_model_classes = (RQTransformerModel, RQTransformerForCausalLM)
    inputs_from, config_class = RQTransformerTester, RQTransformerConfig


@official_mixins.excluded(_WHOLE_ITEMS)
class RPGModelTest(CommonTests, unittest.TestCase):
    has_attentions = False
    all_model_classes = (RPGModel, RPGForCausalLM)
    inputs_from, config_class = RPGTester, RPGConfig

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs:  # the mixin's label is 0, which is a code of no level
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs


@official_mixins.excluded(
    {
        **{name: reason for name, reason in _WHOLE_ITEMS.items() if "resize" not in name and "shift" not in name},
        "test_causal_lm_loss_honors_shift_labels": "labels are aligned with the items, nothing is shifted",
        "test_resize_tokens_embeddings": "items are vectors of their features: there is no token table to resize",
    }
)
class SETRecModelTest(CommonTests, unittest.TestCase):
    has_attentions = False
    all_model_classes = (SETRecModel, SETRecForCausalLM)
    inputs_from, config_class = SETRecTester, SETRecConfig


@official_mixins.excluded(
    _WHOLE_ITEMS
    | {"test_generation_tester_mixin_inheritance": "it scores items and spells out nothing: no class here can generate"}
)
class VQRecModelTest(CommonTests, unittest.TestCase):
    has_attentions = False
    all_model_classes = (VQRecModel, VQRecForRecommendation)
    inputs_from, config_class = VQRecTester, VQRecConfig

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is VQRecForRecommendation:  # no language model: the mixin brings no labels
            inputs["labels"] = torch.tensor([2, 50]).repeat(
                inputs["input_ids"].shape[0], self.model_tester.seq_length // 2
            )
        return inputs


del CommonTests
