"""Which engine scores codes for a model: the model itself where it can, else an adapter for its kind."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import IncompatibleComponentsError
from .decoding.causal_lm import CausalLMScorer
from .decoding.encoder_decoder import EncoderDecoderScorer
from .trie import ItemTrie


def scorer_for(model: Any, tokenizer: Any, *, restrict_to_level: bool = False) -> Any:
    """A decoder (`start_decoding`, `score_codes`, mostly `start_beams`) for any model of transformers or of ours.

    Args:
        restrict_to_level: distributions over the codes of each level instead of the whole vocabulary: the head multiplies
            only the level's rows. Our own models say this in their configuration, and ignore it here.

    Raises:
        IncompatibleComponentsError: the vocabulary does not hold the tokenizer's item tokens.
    """
    if hasattr(model, "start_decoding") and hasattr(model, "score_codes"):
        return model
    if getattr(tokenizer, "segmentations", 1) > 1:
        raise IncompatibleComponentsError(
            f"the tokenizer writes a history in {tokenizer.segmentations} segmentations at once, which {type(model).__name__} "
            "cannot read; set tokenizer.segmentations = 1."
        )
    ItemTrie.from_tokenizer(tokenizer)  # fails here, by name, for a tokenizer without a catalogue
    embeddings = model.get_input_embeddings()
    needed = int(max(np.asarray(tokenizer.level_offsets) + np.asarray(tokenizer.codebook_sizes)))
    if embeddings is not None and embeddings.weight.shape[0] < needed:
        raise IncompatibleComponentsError(
            f"{type(model).__name__} has {embeddings.weight.shape[0]} token embeddings, the tokenizer's item "
            f"tokens need {needed}; "
            "call model.resize_token_embeddings(len(tokenizer)) and train it."
        )
    kind = EncoderDecoderScorer if model.config.is_encoder_decoder else CausalLMScorer
    return kind(model, tokenizer.level_offsets, tokenizer.codebook_sizes, restrict_to_level=restrict_to_level)
