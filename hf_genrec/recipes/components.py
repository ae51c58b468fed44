"""The closed tables of what a recipe may name: one dict literal per stage, with the capabilities a recipe is checked against.

Adding a component = its file, one line here, one recipe. Values are "module:attribute" and are imported on first use;
`gives` and `needs` are compared before a byte of data is read.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, type | tuple[type, ...]]


@dataclass(frozen=True)
class Component:
    """One line of a table: where the code is, what it needs of earlier stages and what it gives to later ones."""

    target: str
    gives: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    options: Options = field(default_factory=dict)
    gives_if: dict[str, frozenset[str]] = field(default_factory=dict)  # option -> what it adds where it is set

    def given(self, options: dict[str, Any]) -> frozenset[str]:
        """What the component gives under these options of a recipe."""
        return self.gives.union(*(more for option, more in self.gives_if.items() if options.get(option)))

    def load(self) -> Any:
        """Import the component."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


_CODES = frozenset({"fixed_length", "ordered_codes"})
_KMEANS_OPTIONS: Options = {
    "codebook_sizes": list,
    "iterations": int,
    "pca_dim": int,
    "whiten": bool,
    "max_load": float,
    "balanced": bool,
    "within_cluster": bool,
    "concat_prefix": bool,
    "prefix_weight": float,
}

_AUTOENCODER_OPTIONS: Options = {
    "hidden_sizes": list,
    "dropout": float,
    "standardise": str,
    "reconstruction_weight": float,
    "max_steps": int,
    "batch_size": int,
    "learning_rate": float,
    "tags": dict,
}
_VQ_OPTIONS: Options = _AUTOENCODER_OPTIONS | {
    "codebook_sizes": list,
    "latent_size": int,
    "codebook_update": str,
    "assignment": (str, list),
    "assignment_temperature": float,
    "assignment_temperature_end": float,
    "assignment_temperature_steps": int,
    "sinkhorn_epsilon": float,
    "sinkhorn_iterations": int,
    "gradient_path": str,
    "commitment_weight": float,
    "quantization_weight": float,
    "ema_decay": float,
    "kmeans_init": bool,
    "dead_code_interval": int,
    "dead_code_share": float,
    "last_level": str,
}

_PRODUCT_OPTIONS: Options = {
    "num_codebooks": int,
    "codebook_size": int,
    "iterations": int,
    "pca_dim": int,
    "whiten": bool,
}

_TREE_OPTIONS: Options = {
    "branching": (int, list),
    "depth": int,
    "max_leaf": int,
    "balanced": bool,
    "max_load": float,
    "code_style": str,
    "pca_dim": int,
    "whiten": bool,
}
_FIXED = frozenset({"fixed_length"})

QUANTIZERS: dict[str, Component] = {
    "joined": Component("hf_genrec.recipes.stages.joined:joined_codes", _CODES, options={"parts": list}),
    "keywords": Component(
        "hf_genrec.recipes.stages.joint:keyword_tokenizer",
        frozenset({"text_identifiers", "tokenizer"}),
        frozenset({"item_text"}),
        {"fields": list, "vocab_size": int, "min_count": int, "max_tokens": int},
    ),
    "action_piece": Component(
        "hf_genrec.recipes.stages.action_piece:action_piece_tokenizer",
        frozenset({"set_identifiers", "tokenizer"}),
        frozenset({"item_vectors"}),
        {
            "num_codebooks": int,
            "codebook_size": int,
            "iterations": int,
            "pca_dim": int,
            "attribute_columns": list,
            "separator": str,
            "slots": int,
            "min_count": int,
            "hash_buckets_size": int,
            "vocabulary_size": int,
            "segmentations": int,
        },
    ),
    "spectral": Component(
        "hf_genrec.recipes.stages.trees:spectral_codes",
        frozenset({"ordered_codes"}),  # crowded parts of the graph have longer codes
        options={
            "num_clusters": int,
            "max_cluster": int,
            "eigengap": bool,
            "assign": str,
            "max_load": float,
            "smoothing": float,
            "code_style": str,
            "window": int,
        },
    ),
    "tree": Component(
        "hf_genrec.recipes.stages.trees:tree_codes",
        frozenset({"ordered_codes"}),
        frozenset({"item_vectors"}),
        _TREE_OPTIONS,
        {"depth": _FIXED, "balanced": _FIXED},
    ),
    "item_words": Component(
        "hf_genrec.recipes.stages.words:item_words_tokenizer",
        frozenset({"text_identifiers", "tokenizer"}),
        frozenset({"item_text"}),
        {
            "fields": list,
            "vocab_size": int,
            "text_tokenizer": str,
            "max_tokens": int,
            "unique": bool,
            "item_end_token": str,
        },
    ),
    "item_numbers": Component(
        "hf_genrec.recipes.stages.item_names:item_numbers_tokenizer",
        frozenset({"text_identifiers", "tokenizer"}),
        options={"order": str, "first": int, "prefix": str, "vocab_size": int, "text_tokenizer": str},
    ),
    "item_paths": Component(
        "hf_genrec.recipes.stages.item_names:item_paths_tokenizer",
        frozenset({"text_identifiers", "tokenizer"}),
        options={
            "path": str,
            "leaf": str,
            "columns": list,
            "max_depth": int,
            "num_clusters": int,
            "max_cluster": int,
            "eigengap": bool,
            "assign": str,
            "max_load": float,
            "smoothing": float,
            "window": int,
            "weight": str,
            "vocab_size": int,
            "text_tokenizer": str,
        },
    ),
    "atomic": Component(
        "hf_genrec.recipes.stages.codes:atomic_codes",
        _CODES | {"single_code"},
        options={"pca_dim": int},
    ),
    "residual_kmeans": Component(
        "hf_genrec.recipes.stages.codes:residual_kmeans_codes", _CODES, frozenset({"item_vectors"}), _KMEANS_OPTIONS
    ),
    "opq": Component(
        "hf_genrec.recipes.stages.codes:opq_codes",
        frozenset({"fixed_length"}),
        frozenset({"item_vectors"}),
        _PRODUCT_OPTIONS | {"rounds": int},
    ),
    "svd_bins": Component(
        "hf_genrec.recipes.stages.codes:svd_bins_codes",
        _CODES,
        frozenset({"item_vectors"}),
        {"num_codebooks": int, "codebook_size": int},
    ),
    "multi_head_vq": Component(
        "hf_genrec.recipes.stages.learned:multi_head_vq_codes",
        frozenset({"fixed_length", "learned"}),
        frozenset({"item_vectors"}),
        _VQ_OPTIONS | {"gate": bool, "heads": list},
    ),
    "pq": Component(
        "hf_genrec.recipes.stages.codes:pq_codes",
        frozenset({"fixed_length"}),
        frozenset({"item_vectors"}),
        _PRODUCT_OPTIONS,
    ),
    "rq_vae": Component(
        "hf_genrec.recipes.stages.learned:rq_vae_codes",
        _CODES | {"learned"},
        frozenset({"item_vectors"}),
        _VQ_OPTIONS | {"shared_codebooks": str, "random_prefix": float},
    ),
    "fsq": Component(
        "hf_genrec.recipes.stages.learned:fsq_codes",
        frozenset({"fixed_length", "learned"}),
        frozenset({"item_vectors"}),
        _AUTOENCODER_OPTIONS | {"scalar_levels": list},
    ),
}

MODELS: dict[str, Component] = {
    "idgenrec": Component(
        "hf_genrec.models.idgenrec.modeling_idgenrec:IDGenRecForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training", "trainable_names"}),
        frozenset({"text_identifiers"}),
    ),
    "candidate_ranker": Component(
        "hf_genrec.recipes.stages.candidate_ranker:CandidateRanker",
        frozenset({"dense", "ranks_candidates"}),
        frozenset({"single_code"}),
    ),
    "causal_lm": Component(
        "hf_genrec.recipes.stages.causal_lm:CausalLM",
        frozenset({"autoregressive", "language_model", "preferences"}),
        frozenset({"ordered_codes"}),
    ),
    "colarec": Component(
        "hf_genrec.models.colarec.modeling_colarec:ColaRecForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training", "item_content"}),
        frozenset({"fixed_length", "ordered_codes"}),
    ),
    "e4srec": Component(
        "hf_genrec.models.e4srec.modeling_e4srec:E4SRecForRecommendation",
        frozenset({"dense", "sequence_training", "item_features", "language_base"}),
        frozenset({"single_code"}),
    ),
    "grounded_language": Component(
        "hf_genrec.models.grounded.modeling_grounded:GroundedLanguageRecommender",
        frozenset({"autoregressive", "sequence_training", "language_base", "grounded"}),
        frozenset({"text_identifiers"}),
    ),
    "eager": Component(
        "hf_genrec.models.eager.modeling_eager:EagerForCausalLM",
        frozenset({"autoregressive", "sequence_training", "item_features"}),
        frozenset({"fixed_length"}),
    ),
    "etegrec": Component(
        "hf_genrec.models.etegrec.modeling_etegrec:EtegrecForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training", "trainable_codes"}),
        frozenset({"fixed_length", "ordered_codes"}),
    ),
    "action_piece": Component(
        "hf_genrec.models.action_piece.modeling_action_piece:ActionPieceForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training", "set_tokens"}),
        frozenset({"set_identifiers"}),
    ),
    "language": Component(
        "hf_genrec.models.language.modeling_language:LanguageRecommenderForCausalLM",
        frozenset({"autoregressive", "sequence_training"}),
        frozenset({"text_identifiers"}),
    ),
    "liger": Component(
        "hf_genrec.models.liger.modeling_liger:LigerForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training", "item_features"}),
        frozenset({"fixed_length", "ordered_codes"}),
    ),
    "llada_rec": Component(
        "hf_genrec.models.llada_rec.modeling_llada_rec:LLaDARecForMaskedLM",
        frozenset({"masked_diffusion", "sequence_training", "prefix_training"}),
        frozenset({"fixed_length"}),
    ),
    "p5": Component(
        "hf_genrec.models.p5.modeling_p5:P5ForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training", "text_tasks"}),
        frozenset({"text_identifiers"}),
    ),
    "psrq": Component(
        "hf_genrec.models.psrq.modeling_psrq:PSRQForRecommendation",
        frozenset({"dense", "sequence_training"}),
        frozenset({"fixed_length"}),
    ),
    "rpg": Component(
        "hf_genrec.models.rpg.modeling_rpg:RPGForCausalLM",
        frozenset({"parallel_digits", "sequence_training"}),
        frozenset({"fixed_length"}),
    ),
    "rq_transformer": Component(
        "hf_genrec.models.rq_transformer.modeling_rq_transformer:RQTransformerForCausalLM",
        frozenset({"autoregressive", "sequence_training", "item_features"}),
        frozenset({"fixed_length"}),
    ),
    "sasrec": Component(
        "hf_genrec.models.sasrec.modeling_sasrec:SASRecForCausalLM",
        frozenset({"autoregressive", "sequence_training"}),
        frozenset({"single_code"}),
    ),
    "setrec": Component(
        "hf_genrec.models.setrec.modeling_setrec:SETRecForCausalLM",
        frozenset({"autoregressive", "sequence_training", "item_features"}),
        frozenset({"single_code"}),
    ),
    "vq_rec": Component(
        "hf_genrec.models.vq_rec.modeling_vq_rec:VQRecForRecommendation",
        frozenset({"dense", "sequence_training", "transferable_codes"}),
        frozenset({"fixed_length"}),
    ),
    "specgr": Component(
        "hf_genrec.models.specgr.modeling_specgr:SpecGRForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training"}),
        frozenset({"fixed_length", "ordered_codes"}),
    ),
    "tiger": Component(
        "hf_genrec.models.tiger.modeling_tiger:TigerForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training", "preferences"}),
        frozenset({"ordered_codes"}),
    ),
}

FEATURES: dict[str, Component] = {
    "text": Component(
        "hf_genrec.recipes.stages.features:text_block",
        frozenset({"item_vectors"}),
        options={"encoder": str, "fields": list, "dim": int, "when_missing": str},
    ),
    "cooccurrence": Component(
        "hf_genrec.recipes.stages.features:cooccurrence_block",
        frozenset({"item_vectors"}),
        options={"dim": int, "window": int, "damping": str},
    ),
    "interactions": Component(
        "hf_genrec.recipes.stages.features:interactions_block",
        frozenset({"item_vectors"}),
        options={"dim": int, "damping": str},
    ),
    "sasrec": Component(
        "hf_genrec.recipes.stages.features:sasrec_block",
        frozenset({"item_vectors"}),
        options={"epochs": float, "hidden_size": int, "max_history": int},
    ),
    "array": Component(
        "hf_genrec.recipes.stages.features:array_block",
        frozenset({"item_vectors"}),
        options={
            "path": str,
            "ids": str,
            "id_column": str,
            "vector_column": str,
            "dim": int,
            "when_missing": str,
        },
    ),
    "attributes": Component(
        "hf_genrec.recipes.stages.features:attributes_block",
        frozenset({"item_vectors"}),
        options={"columns": list, "separator": str, "min_count": int, "dim": int},
    ),
    "geo_time": Component(
        "hf_genrec.recipes.stages.features:geo_time_block",
        frozenset({"item_vectors"}),
        options={"latitude": str, "longitude": str, "region": str, "times": bool, "min_count": int},
    ),
    "gated": Component(
        "hf_genrec.recipes.stages.features:gated_block",
        frozenset({"item_vectors"}),
        options={"blocks": list, "weight": float, "steps": int, "learning_rate": float, "window": int},
    ),
}

LOSSES: dict[str, Component] = {
    "collaborative": Component(
        "hf_genrec.recipes.stages.losses:collaborative",
        options={"weight": float, "features": str, "temperature": float, "similarity": str, "symmetric": bool},
    ),
    "cooccurrence_contrast": Component(
        "hf_genrec.recipes.stages.losses:cooccurrence_contrast",
        options={"weight": float, "temperature": float, "window": int, "views": list, "learn_temperature": bool},
    ),
    "diversity": Component(
        "hf_genrec.recipes.stages.losses:diversity",
        options={"weight": float, "temperature": float, "clusters": int, "every": int},
    ),
    "kl": Component(
        "hf_genrec.recipes.stages.losses:kl", options={"weight": float, "features": str, "temperature": float}
    ),
    "mmd": Component("hf_genrec.recipes.stages.losses:mmd", options={"weight": float, "features": str, "side": str}),
    "orthogonality": Component("hf_genrec.recipes.stages.losses:orthogonality", options={"weight": float}),
    "prefix_contrast": Component(
        "hf_genrec.recipes.stages.losses:prefix_contrast",
        options={"weight": float, "temperature": float, "window": int},
    ),
    "reconstruction_contrast": Component(
        "hf_genrec.recipes.stages.losses:reconstruction_contrast", options={"weight": float, "temperature": float}
    ),
    "tag_classification": Component(
        "hf_genrec.recipes.stages.losses:tag_classification",
        options={"weight": float, "gamma": float, "label_smoothing": float},
    ),
    "tag_contrast": Component(
        "hf_genrec.recipes.stages.losses:tag_contrast",
        options={"weight": float, "temperature": float, "tag_vectors": str, "encoder": str},
    ),
    "uniqueness": Component("hf_genrec.recipes.stages.losses:uniqueness", options={"weight": float, "margin": float}),
    "usage_balance": Component(
        "hf_genrec.recipes.stages.losses:usage_balance",
        options={"weight": float, "temperature": float, "form": str, "sharpness": float},
    ),
}

METHODS: dict[str, Component] = {
    "rank_candidates": Component(
        "hf_genrec.recipes.stages.candidate_ranker:rank_candidates",
        needs=frozenset({"ranks_candidates"}),
        options={"samples": int, "stage_options": dict},
    ),
    "stages": Component("hf_genrec.recipes.stages.staged:stages", options={"stages": list}),
    "softmax_dpo": Component(
        "hf_genrec.recipes.stages.preference:softmax_dpo",
        needs=frozenset({"preferences"}),
        options={
            "num_negatives": int,
            "negatives": str,
            "shared": list,
            "beta": float,
            "sft_weight": float,
            "pairs": int,
            "targets": str,
            "batches_of_beams": int,
            "feedback_column": str,
            "liked": float,
            "disliked": float,
        },
    ),
    "grpo": Component(
        "hf_genrec.recipes.stages.preference:grpo",
        needs=frozenset({"preferences"}),
        options={
            "reward": (str, dict),
            "reward_features": str,
            "num_generations": int,
            "beta": float,
            "rollouts": str,
            "add_target": bool,
            "logprobs": str,
            "sft_weight": float,
            "prompts": int,
            "targets": str,
        },
    ),
    "iterative_preference": Component(
        "hf_genrec.recipes.stages.preference:iterative_preference",
        needs=frozenset({"preferences"}),
        options={
            "iterations": int,
            "share": float,
            "num_candidates": int,
            "beta": float,
            "ntp_weight": float,
            "dpo_weight": float,
            "requests": int,
            "max_drop": float,
            "targets": str,
            "pairs": str,
            "reward": str,
            "feedback": dict,
            "num_negatives": int,
        },
    ),
    "sft": Component(
        "hf_genrec.recipes.stages.causal_lm:sft",
        needs=frozenset({"language_model"}),
        options={"families": dict, "item_head": str, "num_candidates": int},
    ),
    "joint_names": Component(
        "hf_genrec.recipes.stages.joint:joint_names",
        needs=frozenset({"trainable_names"}),
        options={
            "cycles": int,
            "tokenizer_epochs": float,
            "recommender_epochs": float,
            "warm_epochs": float,
            "final_epochs": float,
            "tokenizer_learning_rate": float,
            "final_learning_rate": float,
            "generator_steps": int,
            "generator_learning_rate": float,
            "num_names": int,
            "diversity_penalty": float,
        },
    ),
    "joint_codes": Component(
        "hf_genrec.recipes.stages.joint:joint_codes",
        needs=frozenset({"trainable_codes"}),
        options={
            "cycles": int,
            "tokenizer_epochs": float,
            "recommender_epochs": float,
            "warm_epochs": float,
            "final_epochs": float,
            "tokenizer_learning_rate": float,
            "final_learning_rate": float,
            "aligned_at_end": bool,
        },
    ),
    "set_permutation": Component(
        "hf_genrec.recipes.stages.action_piece:set_permutation",
        needs=frozenset({"set_tokens"}),
        options={"permute": bool, "stretch": float},
    ),
    "next_item": Component("hf_genrec.recipes.stages.training:next_item"),
    "tasks": Component(
        "hf_genrec.recipes.stages.tasks:tasks",
        needs=frozenset({"text_tasks"}),
        options={"families": dict, "group": int, "max_items": int},
    ),
    "grounded_next_item": Component(
        "hf_genrec.recipes.stages.language_parts:grounded_next_item", needs=frozenset({"grounded"})
    ),
    "tuned_next_item": Component(
        "hf_genrec.recipes.stages.tuned:tuned_next_item", options={"field": str, "values": list}
    ),
    "transfer_codes": Component(
        "hf_genrec.recipes.stages.transfer:transfer_codes",
        needs=frozenset({"transferable_codes"}),
        options={"source": str, "permutation_epochs": float, "permutation_learning_rate": float},
    ),
}
