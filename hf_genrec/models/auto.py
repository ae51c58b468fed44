"""Auto classes: `AutoModelForRecommendation`, and registration of our models with transformers' own Auto classes.

A checkpoint of a new `model_type` can be read by `AutoModel...from_pretrained` only after its classes are registered;
`import hf_genrec` does that by calling `register_auto_classes`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# Nothing in transformers itself is a recommender, so all entries come from `register`.
MODEL_FOR_RECOMMENDATION_MAPPING = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForRecommendation(_BaseAutoModelClass):
    """Any model of this library that recommends, from a folder or a Hub repository.

    Example:
        >>> from hf_genrec.models.auto import AutoModelForRecommendation, register_auto_classes
        >>> from hf_genrec.models.sasrec.configuration_sasrec import SASRecConfig
        >>> register_auto_classes()
        >>> type(AutoModelForRecommendation.from_config(SASRecConfig(codebook_sizes=[5]))).__name__
        'SASRecForCausalLM'
    """

    _model_mapping = MODEL_FOR_RECOMMENDATION_MAPPING  # type: ignore[assignment]


def register_auto_classes() -> None:
    """Make every model known to `AutoConfig`, `AutoModel`, its `AutoModelFor...` and `AutoModelForRecommendation`.

    Calling it again changes nothing. Also enters the class names in transformers' name tables, which `Trainer` reads to
    decide whether labels are shifted and transformers' test mixins read to decide which inputs a class takes.
    """
    from .action_piece.configuration_action_piece import ActionPieceConfig
    from .action_piece.modeling_action_piece import ActionPieceForConditionalGeneration, ActionPieceModel
    from .candidate_ranker.configuration_candidate_ranker import CandidateRankerConfig
    from .candidate_ranker.modeling_candidate_ranker import CandidateRankerForCausalLM
    from .colarec.configuration_colarec import ColaRecConfig
    from .colarec.modeling_colarec import ColaRecForConditionalGeneration, ColaRecModel
    from .e4srec.configuration_e4srec import E4SRecConfig
    from .e4srec.modeling_e4srec import E4SRecForRecommendation
    from .eager.configuration_eager import EagerConfig
    from .eager.modeling_eager import EagerForCausalLM, EagerModel
    from .etegrec.configuration_etegrec import EtegrecConfig
    from .etegrec.modeling_etegrec import EtegrecForConditionalGeneration, EtegrecModel
    from .grounded.configuration_grounded import GroundedLanguageConfig
    from .grounded.modeling_grounded import GroundedLanguageRecommender
    from .idgenrec.configuration_idgenrec import IDGenRecConfig
    from .idgenrec.modeling_idgenrec import IDGenRecForConditionalGeneration
    from .language.configuration_language import LanguageRecommenderConfig
    from .language.modeling_language import LanguageRecommenderForCausalLM
    from .liger.configuration_liger import LigerConfig
    from .liger.modeling_liger import LigerForConditionalGeneration, LigerModel
    from .llada_rec.configuration_llada_rec import LLaDARecConfig
    from .llada_rec.modeling_llada_rec import LLaDARecForMaskedLM, LLaDARecModel
    from .p5.configuration_p5 import P5Config
    from .p5.modeling_p5 import P5ForConditionalGeneration, P5Model
    from .psrq.configuration_psrq import PSRQConfig
    from .psrq.modeling_psrq import PSRQForRecommendation
    from .rpg.configuration_rpg import RPGConfig
    from .rpg.modeling_rpg import RPGForCausalLM, RPGModel
    from .rq_transformer.configuration_rq_transformer import RQTransformerConfig
    from .rq_transformer.modeling_rq_transformer import RQTransformerForCausalLM, RQTransformerModel
    from .sasrec.configuration_sasrec import SASRecConfig
    from .sasrec.modeling_sasrec import SASRecForCausalLM, SASRecModel
    from .setrec.configuration_setrec import SETRecConfig
    from .setrec.modeling_setrec import SETRecForCausalLM, SETRecModel
    from .specgr.configuration_specgr import SpecGRConfig
    from .specgr.modeling_specgr import SpecGRForConditionalGeneration, SpecGRModel
    from .tiger.configuration_tiger import TigerConfig
    from .tiger.modeling_tiger import TigerForConditionalGeneration, TigerModel
    from .vq_rec.configuration_vq_rec import VQRecConfig
    from .vq_rec.modeling_vq_rec import VQRecForRecommendation, VQRecModel

    seq2seq = (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    causal = (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    masked = (AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    items: tuple[Any, dict[str, str]] = (AutoModelForRecommendation, {})  # scores items, and is no language model
    for config_class, base_class, model_class, (auto_class, names) in (
        (TigerConfig, TigerModel, TigerForConditionalGeneration, seq2seq),
        (ActionPieceConfig, ActionPieceModel, ActionPieceForConditionalGeneration, seq2seq),
        (EtegrecConfig, EtegrecModel, EtegrecForConditionalGeneration, seq2seq),
        (LigerConfig, LigerModel, LigerForConditionalGeneration, seq2seq),
        (IDGenRecConfig, IDGenRecForConditionalGeneration, IDGenRecForConditionalGeneration, seq2seq),
        (SpecGRConfig, SpecGRModel, SpecGRForConditionalGeneration, seq2seq),
        (P5Config, P5Model, P5ForConditionalGeneration, seq2seq),
        (ColaRecConfig, ColaRecModel, ColaRecForConditionalGeneration, seq2seq),
        (SASRecConfig, SASRecModel, SASRecForCausalLM, causal),
        (RQTransformerConfig, RQTransformerModel, RQTransformerForCausalLM, causal),
        (RPGConfig, RPGModel, RPGForCausalLM, causal),
        (SETRecConfig, SETRecModel, SETRecForCausalLM, causal),
        (VQRecConfig, VQRecModel, VQRecForRecommendation, items),
        (PSRQConfig, PSRQForRecommendation, PSRQForRecommendation, items),
        (E4SRecConfig, E4SRecForRecommendation, E4SRecForRecommendation, items),
        (GroundedLanguageConfig, GroundedLanguageRecommender, GroundedLanguageRecommender, items),
        (CandidateRankerConfig, CandidateRankerForCausalLM, CandidateRankerForCausalLM, items),
        (EagerConfig, EagerModel, EagerForCausalLM, causal),
        (LanguageRecommenderConfig, LanguageRecommenderForCausalLM, LanguageRecommenderForCausalLM, causal),
        (LLaDARecConfig, LLaDARecModel, LLaDARecForMaskedLM, masked),
    ):
        for one in (base_class, model_class):
            if isinstance(
                one.config_class, str
            ):  # `config: X` under postponed annotations reaches transformers as text
                one.config_class = config_class
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, base_class, exist_ok=True)
        auto_class.register(config_class, model_class, exist_ok=True)
        AutoModelForRecommendation.register(config_class, model_class, exist_ok=True)
        names[config_class.model_type] = model_class.__name__
        modeling_auto.MODEL_MAPPING_NAMES[config_class.model_type] = base_class.__name__
