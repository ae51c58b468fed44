"""Item vectors by the language model that writes the titles, always those of its weights as they are (arXiv 2308.08434).

A vector is the last layer's state at the last token of a title, read alone. The vectors of the catalogue are a buffer, saved
with the model; whatever changes the weights (training here or behind the model's back, merged adapters, another device),
they are made anew before they are used or saved.

Shapes: B texts, N items, L tokens of the longest item text, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.grounding import EmbeddingGrounder
from hf_genrec.generation.search import evaluating

from .item_texts import ItemTexts

_TEXTS_AT_ONCE = 64


class GroundedItems:
    """For a model with `language_model` and the buffers `item_tokens` (N, L) and `item_vectors` (N, H, NaN = not made yet).

    Put it first among the bases, and call `forget_catalogue` in `__init__` and whenever `item_tokens` changes.
    """

    config: Any
    language_model: Any
    item_tokens: Tensor
    item_vectors: Tensor

    def forget_catalogue(self) -> None:
        """What was worked out from `item_tokens`, and which weights `item_vectors` belong to."""
        self._texts: ItemTexts | None = None
        self._grounder: EmbeddingGrounder | None = None
        self._vectors_of: Any = None  # the state of the weights that item_vectors were made with

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the item vectors of the folder are taken for those of its weights."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if bool(torch.isfinite(model.item_vectors).all()):
            model._vectors_of = model._weights_state()
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with item vectors that belong to the weights."""
        if kwargs.get("is_main_process", True) and bool((self.item_tokens[:, 0] >= 0).any()):
            self.grounder()
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def item_texts(self) -> ItemTexts:
        """The token texts of the catalogue."""
        if self._texts is None:
            self._texts = ItemTexts(self.item_tokens, self.config.item_end_token_id)
        return self._texts

    def _run(self, ids: Tensor, mask: Tensor, part: Any = None) -> Any:
        """The language model, or a part of it, on rows padded on either side."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model = self.language_model if part is None else part
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)

    def _embed(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """Last hidden state of the last token (B, H) float32 of texts, each read alone behind the begin token."""
        begin = () if self.config.bos_token_id is None else (self.config.bos_token_id,)
        rows = [(*begin, *text) for text in texts]
        device = self.language_model.device
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        vectors = torch.empty(len(rows), self.item_vectors.shape[1], device=device)
        with evaluating(self.language_model):
            for start in range(0, len(order), _TEXTS_AT_ONCE):
                some = order[start : start + _TEXTS_AT_ONCE]
                lengths = torch.tensor([len(rows[row]) for row in some])
                mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
                ids = torch.zeros_like(mask)
                ids[mask.bool()] = torch.tensor([token for row in some for token in rows[row]])
                ids, mask = ids.to(device), mask.to(device)
                hidden = self._run(ids, mask, self.language_model.base_model).last_hidden_state
                vectors[some] = hidden[torch.arange(len(some)), lengths - 1].float()
        return vectors

    def embed_texts(self, texts: Sequence[tuple[int, ...]]) -> Tensor:
        """Vectors (B, H) of texts as token ids; a catalogue title has its item's own vector."""
        return self.grounder().vectors_of([_key(text) for text in texts])

    def _weights_state(self) -> Any:
        """Changes with every change of the language model's weights, also one made behind this model's back."""
        return [(weight.data_ptr(), weight._version) for weight in self.language_model.parameters()]

    def refresh_item_vectors(self) -> None:
        """Embed all titles with the weights as they are now. Called by itself where it is needed."""
        if bool((self.item_tokens[:, 0] < 0).any()):
            raise IncompatibleComponentsError("items have no texts yet: call set_catalogue(tokenizer.codes).")
        with torch.no_grad():
            self.item_vectors.copy_(self._embed(self.item_texts().texts))
        self._grounder, self._vectors_of = None, self._weights_state()

    def grounder(self) -> EmbeddingGrounder:
        """Ranks the catalogue by distance, with item vectors that belong to the weights as they are now."""
        if self._vectors_of is None or self._vectors_of != self._weights_state():
            self.refresh_item_vectors()
        if self._grounder is None:
            self._grounder = EmbeddingGrounder(
                self.item_vectors,
                item_texts=[_key(text) for text in self.item_texts().texts],
                encode=lambda keys: self._embed([tuple(map(int, key.split())) for key in keys]),
            )
        return self._grounder


def _key(text: Sequence[int]) -> str:
    return " ".join(map(str, text))
