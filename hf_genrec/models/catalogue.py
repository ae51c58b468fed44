"""What every model's configuration takes from a tokenizer that carries a catalogue."""

from __future__ import annotations

from typing import Any


def catalogue_values(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary and code sizes, special token ids and the catalogue's fingerprint, as configuration fields."""
    return {
        "vocab_size": len(tokenizer),
        "codebook_sizes": [int(size) for size in tokenizer.codebook_sizes],
        "level_offsets": [int(offset) for offset in tokenizer.level_offsets],
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "catalogue_fingerprint": tokenizer.catalogue_fingerprint,
    }
