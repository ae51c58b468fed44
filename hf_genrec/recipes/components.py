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
}

_PRODUCT_OPTIONS: Options = {
    "num_codebooks": int,
    "codebook_size": int,
    "iterations": int,
    "pca_dim": int,
    "whiten": bool,
}

QUANTIZERS: dict[str, Component] = {
    "item_words": Component(
        "hf_genrec.recipes.stages.words:item_words_tokenizer",
        frozenset({"text_identifiers", "tokenizer"}),
        frozenset({"item_text"}),
        {"fields": list, "vocab_size": int, "text_tokenizer": str, "max_tokens": int},
    ),
    "atomic": Component("hf_genrec.recipes.stages.codes:atomic_codes", frozenset({"fixed_length", "single_code"})),
    "residual_kmeans": Component(
        "hf_genrec.recipes.stages.codes:residual_kmeans_codes", _CODES, frozenset({"item_vectors"}), _KMEANS_OPTIONS
    ),
    "opq": Component(
        "hf_genrec.recipes.stages.codes:opq_codes",
        frozenset({"fixed_length"}),
        frozenset({"item_vectors"}),
        _PRODUCT_OPTIONS | {"rounds": int},
    ),
    "multi_head_vq": Component(
        "hf_genrec.recipes.stages.learned:multi_head_vq_codes",
        frozenset({"fixed_length"}),
        frozenset({"item_vectors"}),
        {
            "codebook_sizes": list,
            "latent_size": int,
            "hidden_sizes": list,
            "codebook_update": str,
            "max_steps": int,
            "learning_rate": float,
        },
    ),
    "pq": Component(
        "hf_genrec.recipes.stages.codes:pq_codes",
        frozenset({"fixed_length"}),
        frozenset({"item_vectors"}),
        _PRODUCT_OPTIONS,
    ),
    "rq_vae": Component(
        "hf_genrec.recipes.stages.learned:rq_vae_codes",
        _CODES,
        frozenset({"item_vectors"}),
        {
            "codebook_sizes": list,
            "latent_size": int,
            "hidden_sizes": list,
            "codebook_update": str,
            "max_steps": int,
            "learning_rate": float,
        },
    ),
}

MODELS: dict[str, Component] = {
    "language": Component(
        "hf_genrec.models.language.modeling_language:LanguageRecommenderForCausalLM",
        frozenset({"autoregressive", "sequence_training"}),
        frozenset({"text_identifiers"}),
    ),
    "llada_rec": Component(
        "hf_genrec.models.llada_rec.modeling_llada_rec:LLaDARecForMaskedLM",
        frozenset({"masked_diffusion", "sequence_training", "prefix_training"}),
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
    "specgr": Component(
        "hf_genrec.models.specgr.modeling_specgr:SpecGRForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training"}),
        frozenset({"fixed_length", "ordered_codes"}),
    ),
    "tiger": Component(
        "hf_genrec.models.tiger.modeling_tiger:TigerForConditionalGeneration",
        frozenset({"autoregressive", "prefix_training"}),
        frozenset({"fixed_length", "ordered_codes"}),
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
}

LOSSES: dict[str, Component] = {}

METHODS: dict[str, Component] = {
    "next_item": Component("hf_genrec.recipes.stages.training:next_item"),
}
