"""hf_genrec: generative recommendation as Hugging Face objects.

Importing the package registers its tokenizers and models with the Auto classes of transformers, so that
`AutoTokenizer.from_pretrained` and `AutoModelForSeq2SeqLM.from_pretrained` open its folders and Hub repositories.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module; imported on first use
_PUBLIC = {
    "ItemTokenizer": "hf_genrec.identifiers.tokenization_item",
    "ItemTextTokenizer": "hf_genrec.identifiers.tokenization_item_text",
    "ItemWordsTokenizer": "hf_genrec.identifiers.tokenization_item_words",
    "extend_tokenizer": "hf_genrec.identifiers.extend",
    "encode_segments": "hf_genrec.identifiers.extend",
    "ResidualKMeans": "hf_genrec.identifiers.quantizers.residual_kmeans",
    "ProductQuantizer": "hf_genrec.identifiers.quantizers.product",
    "RQVAEConfig": "hf_genrec.identifiers.quantizers.configuration_rq_vae",
    "RQVAEModel": "hf_genrec.identifiers.quantizers.rq_vae",
    "FSQConfig": "hf_genrec.identifiers.quantizers.configuration_fsq",
    "FSQModel": "hf_genrec.identifiers.quantizers.fsq",
    "TreeIndexer": "hf_genrec.identifiers.quantizers.tree",
    "SpectralIndexer": "hf_genrec.identifiers.quantizers.spectral",
    "ActionPieceTokenizer": "hf_genrec.identifiers.tokenization_action_piece",
    "MultiHeadVQConfig": "hf_genrec.identifiers.quantizers.configuration_multi_head_vq",
    "MultiHeadVQModel": "hf_genrec.identifiers.quantizers.multi_head_vq",
    "TigerConfig": "hf_genrec.models.tiger.configuration_tiger",
    "TigerForConditionalGeneration": "hf_genrec.models.tiger.modeling_tiger",
    "SpecGRConfig": "hf_genrec.models.specgr.configuration_specgr",
    "SpecGRForConditionalGeneration": "hf_genrec.models.specgr.modeling_specgr",
    "SASRecConfig": "hf_genrec.models.sasrec.configuration_sasrec",
    "SASRecForCausalLM": "hf_genrec.models.sasrec.modeling_sasrec",
    "RQTransformerConfig": "hf_genrec.models.rq_transformer.configuration_rq_transformer",
    "RQTransformerForCausalLM": "hf_genrec.models.rq_transformer.modeling_rq_transformer",
    "EagerConfig": "hf_genrec.models.eager.configuration_eager",
    "EagerForCausalLM": "hf_genrec.models.eager.modeling_eager",
    "LLaDARecConfig": "hf_genrec.models.llada_rec.configuration_llada_rec",
    "LLaDARecForMaskedLM": "hf_genrec.models.llada_rec.modeling_llada_rec",
    "SETRecConfig": "hf_genrec.models.setrec.configuration_setrec",
    "SETRecForCausalLM": "hf_genrec.models.setrec.modeling_setrec",
    "VQRecConfig": "hf_genrec.models.vq_rec.configuration_vq_rec",
    "VQRecForRecommendation": "hf_genrec.models.vq_rec.modeling_vq_rec",
    "PSRQConfig": "hf_genrec.models.psrq.configuration_psrq",
    "PSRQForRecommendation": "hf_genrec.models.psrq.modeling_psrq",
    "RPGConfig": "hf_genrec.models.rpg.configuration_rpg",
    "RPGForCausalLM": "hf_genrec.models.rpg.modeling_rpg",
    "LanguageRecommenderConfig": "hf_genrec.models.language.configuration_language",
    "LanguageRecommenderForCausalLM": "hf_genrec.models.language.modeling_language",
    "CandidateRankerConfig": "hf_genrec.models.candidate_ranker.configuration_candidate_ranker",
    "CandidateRankerForCausalLM": "hf_genrec.models.candidate_ranker.modeling_candidate_ranker",
    "E4SRecConfig": "hf_genrec.models.e4srec.configuration_e4srec",
    "E4SRecForRecommendation": "hf_genrec.models.e4srec.modeling_e4srec",
    "GroundedLanguageConfig": "hf_genrec.models.grounded.configuration_grounded",
    "GroundedLanguageRecommender": "hf_genrec.models.grounded.modeling_grounded",
    "AutoModelForRecommendation": "hf_genrec.models.auto",
    "ItemTrie": "hf_genrec.generation.trie",
    "ItemTrieLogitsProcessor": "hf_genrec.generation.logits_process",
    "real_beams": "hf_genrec.generation.logits_process",
    "CandidateTrieLogitsProcessor": "hf_genrec.generation.logits_process_candidates",
    "PrefixMarginalLogitsProcessor": "hf_genrec.generation.logits_process_prefix_marginal",
    "PerLevelLogitsProcessor": "hf_genrec.generation.logits_process_levels",
    "FMIndexLogitsProcessor": "hf_genrec.generation.logits_process_fm",
    "FMIndex": "hf_genrec.generation.fm_index",
    "PrefixMarginal": "hf_genrec.generation.logits_process_prefix_marginal",
    "TokenTrie": "hf_genrec.generation.token_trie",
    "constrain_generation": "hf_genrec.generation.constrain",
    "attach_constraint": "hf_genrec.generation.constrain",
    "release_constraint": "hf_genrec.generation.constrain",
    "ItemGeneration": "hf_genrec.generation.custom_generate",
    "certified_top_k": "hf_genrec.generation.decoding.certified",
    "ZeroShotRanker": "hf_genrec.generation.ranking.zero_shot",
    "ZeroShotRecommender": "hf_genrec.generation.ranking.zero_shot",
    "ChatModel": "hf_genrec.generation.ranking.chat_model",
    "ChatEndpoint": "hf_genrec.generation.ranking.chat_client",
    "EmbeddingGrounder": "hf_genrec.generation.grounding",
    "NgramGrounder": "hf_genrec.generation.ngram_grounding",
    "TitleMatcher": "hf_genrec.generation.title_matching",
    "RecommendationConfig": "hf_genrec.generation.configuration_recommendation",
    "RecommendationMixin": "hf_genrec.generation.recommend",
    "Recommendation": "hf_genrec.generation.recommend",
    "recommend": "hf_genrec.generation.recommend",
    "RecommenderTrainer": "hf_genrec.alignment.trainers.recommender",
    "RecommenderTrainingArguments": "hf_genrec.alignment.trainers.arguments",
    "SoftmaxDPOConfig": "hf_genrec.alignment.trainers.softmax_dpo",
    "SoftmaxDPOTrainer": "hf_genrec.alignment.trainers.softmax_dpo",
    "Seq2SeqPreferenceConfig": "hf_genrec.alignment.trainers.seq2seq_preference",
    "Seq2SeqPreferenceTrainer": "hf_genrec.alignment.trainers.seq2seq_preference",
    "Seq2SeqGRPOConfig": "hf_genrec.alignment.trainers.seq2seq_grpo",
    "Seq2SeqGRPOTrainer": "hf_genrec.alignment.trainers.seq2seq_grpo",
    "ItemSFTConfig": "hf_genrec.alignment.trainers.item_sft",
    "ItemSFTTrainer": "hf_genrec.alignment.trainers.item_sft",
    "ItemGRPOConfig": "hf_genrec.alignment.trainers.item_grpo",
    "ItemGRPOTrainer": "hf_genrec.alignment.trainers.item_grpo",
    "IterativePreferenceTrainer": "hf_genrec.alignment.trainers.iterative_preference",
    "train_candidate_ranker": "hf_genrec.alignment.trainers.candidate_training",
    "add_item_tokens": "hf_genrec.alignment.item_embeddings",
    "item_lora": "hf_genrec.alignment.adapters",
    "merge_item_lora": "hf_genrec.alignment.adapters",
    "LanguageEncoder": "hf_genrec.alignment.tasks.language_rows",
    "language_mixture": "hf_genrec.alignment.tasks.language_mixture",
    "train_recommender": "hf_genrec.alignment.trainers.recommender",
    "load_data": "hf_genrec.data.interactions",
    "make_split": "hf_genrec.data.splits",
    "ItemTable": "hf_genrec.data.items",
    "evaluate": "hf_genrec.evaluation.evaluator",
    "compare_buckets": "hf_genrec.evaluation.bucket_comparison",
    "save_artifact": "hf_genrec.hub",
    "load_artifact": "hf_genrec.hub",
    "push_artifact": "hf_genrec.hub",
    "pull_artifact": "hf_genrec.hub",
    "resolve_recipe": "hf_genrec.recipes.resolver",
    "train_recipe": "hf_genrec.recipes.pipeline",
}
_SUBPACKAGES = ("hub", "data", "identifiers", "models", "generation", "alignment", "evaluation", "recipes", "errors")
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604  (all strings)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"hf_genrec.{name}")
    raise AttributeError(f"module 'hf_genrec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_SUBPACKAGES])


def _register() -> None:
    from transformers import AutoConfig, AutoModel

    from hf_genrec.identifiers.quantizers.configuration_fsq import FSQConfig
    from hf_genrec.identifiers.quantizers.configuration_multi_head_vq import MultiHeadVQConfig
    from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
    from hf_genrec.identifiers.quantizers.fsq import FSQModel
    from hf_genrec.identifiers.quantizers.multi_head_vq import MultiHeadVQModel
    from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
    from hf_genrec.identifiers.tokenization_item import register
    from hf_genrec.models.auto import register_auto_classes

    register()
    register_auto_classes()
    for config, model in ((RQVAEConfig, RQVAEModel), (MultiHeadVQConfig, MultiHeadVQModel), (FSQConfig, FSQModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)


_register()
