"""Item tokens in a language model: the vocabulary grows, the new rows start from something better than noise.

`extend_tokenizer` gives the tokens, `add_item_tokens` gives them rows in the input embedding and in the output head
(LC-Rec, arXiv 2311.09049, trains such rows together with the model). Three starts:

* "mean": the mean of the old rows, with a little of their spread, so that no two rows are equal;
* "codebook": the vectors that the quantizer found for the codes, turned into the embedding space. Close codes start
  close: inside a level all distances are kept up to one factor;
* "text": the mean embedding of the titles of the items that carry the code.

*Relations*: "codebook" and "text" fall back to "mean" where they know nothing (user tokens, a level without a codebook,
a code without items). Only the new rows are written; all others keep their bits. `adapters.item_lora` trains them.

Shape legend: N items, L levels, C codes of a level, P width of a codebook, V old rows, D width of the model, M new rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import IncompatibleComponentsError, ItemTableError
from ..identifiers.catalogue import CatalogueMixin
from ..identifiers.segments import encode_segments

INITS = ("mean", "codebook", "text")

_NOISE = 0.1  # standard deviation of the noise, as a share of the old rows'
_NOISE_ROWS = 2048  # old rows that the noise is mixed from
_PADDED_TO = 64  # vocabularies are padded to a multiple of this (Qwen, Phi, T5): rows that no token uses


def add_item_tokens(
    model: Any,
    tokenizer: Any,
    *,
    init: str = "mean",
    codebooks: Sequence[Any] | None = None,
    item_texts: Mapping[str, str] | Sequence[str] | None = None,
    seed: int = 0,
) -> Any:
    """Give the tokens of an extended tokenizer rows in a model, in place.

    The configuration notes the catalogue (`catalogue_fingerprint`, which `recommend` compares) and the size of the old
    vocabulary (`base_vocab_size`, from which on `item_lora` trains rows). The architecture stays what it was.

    Args:
        model: any model of transformers with token embeddings, tied to the head or not.
        tokenizer: made by `extend_tokenizer` of this model's tokenizer.
        init: "mean", "codebook" or "text", see the module's text.
        codebooks: for "codebook": one array (C, P) per level, rows in the order of the codes; None for a level without
            one (a level that only tells apart items of equal codes).
        item_texts: for "text": {item id: text}, or N texts in catalogue order; "" for an item without. Written by strangers,
            so they are read as text: control tokens in them mean nothing.
        seed: of noise and projections.

    Returns:
        the model.

    Raises:
        IncompatibleComponentsError: item tokens are there already, the vocabulary is not that of the base tokenizer, an
            unknown `init`, or codebooks and texts that do not fit the catalogue.
        ItemTableError: an item without a text entry.

    Example: `add_item_tokens(model, tokenizer, init="codebook", codebooks=quantizer_vectors)`
    """
    if init not in INITS:
        raise IncompatibleComponentsError(f"init is {init!r}: choose one of {', '.join(INITS)}")
    carries_items = isinstance(tokenizer, CatalogueMixin)
    if not carries_items:
        raise IncompatibleComponentsError(
            f"{type(tokenizer).__name__} carries no catalogue: make the tokenizer with extend_tokenizer"
        )
    old_rows = _old_rows(model, tokenizer)
    vectors: list[torch.Tensor | None] = [None] * tokenizer.num_levels
    if init == "codebook":
        vectors = _checked_codebooks(codebooks, tokenizer.codebook_sizes)
    texts = _checked_texts(item_texts, tokenizer.item_ids) if init == "text" else None

    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        with torch.random.fork_rng(devices=[]):  # the rows drawn here are overwritten: leave the caller's stream alone
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tables = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not tables[0].weight:
        tables.append(head)
    token_ids = None if texts is None else _text_ids(tokenizer, texts)
    with torch.no_grad():
        for number, table in enumerate(tables):
            weight_VD = table.weight[:old_rows].float()
            start = _Start(weight_VD, seed, number)
            new_MD = start.mean_rows(len(tokenizer) - old_rows)
            for level, (offset, size) in enumerate(zip(tokenizer.level_offsets.tolist(), tokenizer.codebook_sizes)):
                rows = slice(offset - old_rows, offset - old_rows + size)
                vectors_CP = vectors[level]
                if vectors_CP is not None:
                    new_MD[rows] = start.codebook_rows(vectors_CP, level)
                elif token_ids is not None:
                    known_C, rows_CD = _text_rows(weight_VD, token_ids, tokenizer.codes[:, level], size)
                    new_MD[rows] = torch.where(known_C.unsqueeze(1), rows_CD, new_MD[rows])
            table.weight[old_rows : len(tokenizer)] = new_MD.to(table.weight)
            if getattr(table, "bias", None) is not None:
                table.bias[old_rows : len(tokenizer)] = table.bias[:old_rows].float().mean().to(table.bias)
    model.config.catalogue_fingerprint = tokenizer.catalogue_fingerprint
    model.config.base_vocab_size = old_rows
    return model


def _old_rows(model: Any, tokenizer: Any) -> int:
    """Rows that belong to the base vocabulary; the ones behind are ours to write."""
    present = getattr(model.config, "catalogue_fingerprint", None)
    if present:
        raise IncompatibleComponentsError(
            f"the model already has item tokens (catalogue {present[:12]}): start from the base model"
        )
    first = int(tokenizer._first_user_id if tokenizer.num_user_tokens else tokenizer.level_offsets[0])
    embeddings = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    added_pad = int(tokenizer.pad_token_id == first - 1)  # extend_tokenizer may have put a padding token in front
    if rows < first - added_pad:
        raise IncompatibleComponentsError(
            f"the model has {rows} token embeddings, the base tokenizer {first - added_pad} tokens: extend the tokenizer "
            "that belongs to this model"
        )
    if rows > len(tokenizer) and rows % _PADDED_TO:
        raise IncompatibleComponentsError(
            f"the model's vocabulary is already larger ({rows}) than the tokenizer ({len(tokenizer)}): it was extended "
            "before, or belongs to another tokenizer; start from the base model"
        )
    head = model.get_output_embeddings()
    if head is not None and head.weight.shape[0] != rows:
        raise IncompatibleComponentsError(
            f"the head has {head.weight.shape[0]} rows and the input embedding {rows}: resize one to the other first"
        )
    return min(rows, first)


# ------------------------------------------------------------------------------------------------------------- starts


class _Start:
    """New rows in the space of one table's old rows."""

    def __init__(self, old_VD: torch.Tensor, seed: int, table: int) -> None:
        self.mean_D = old_VD.mean(dim=0)
        self.spread_VD = old_VD - self.mean_D
        self.distance = self.spread_VD.norm(dim=1).mean()  # how far a row lies from the mean
        self.seed, self.table = seed, table

    def _generator(self, *key: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def mean_rows(self, count: int) -> torch.Tensor:
        """(count, D): the mean, plus noise whose covariance is that of the old rows, made small.

        Random sums of old rows have the old rows' covariance, without a D x D matrix to factorise.
        """
        generator = self._generator(0, self.table)
        chosen = torch.randperm(len(self.spread_VD), generator=generator)[:_NOISE_ROWS]
        mix = torch.randn(count, len(chosen), generator=generator).to(self.mean_D.device)
        return self.mean_D + _NOISE * (mix @ self.spread_VD[chosen]) / len(chosen) ** 0.5

    def codebook_rows(self, vectors_CP: torch.Tensor, level: int) -> torch.Tensor:
        """(C, D): the vectors turned by an orthogonal map and scaled to lie as far from the mean as old rows do.

        Input embedding and head use the same map. More than D directions do not fit: the D widest are kept.
        """
        vectors_CP = (vectors_CP - vectors_CP.mean(dim=0)).to(self.mean_D)
        width = self.mean_D.shape[0]
        if vectors_CP.shape[1] > width:
            left_CR, values_R, _ = torch.linalg.svd(vectors_CP, full_matrices=False)
            vectors_CP = (left_CR * values_R)[:, :width]
        generator = self._generator(1, level)
        map_DP = torch.randn(width, vectors_CP.shape[1], generator=generator)
        map_DP = torch.linalg.qr(map_DP).Q.to(self.mean_D)
        rows_CD = vectors_CP @ map_DP.T
        length = rows_CD.norm(dim=1).mean()
        return self.mean_D + rows_CD * (self.distance / length if length > 0 else 0.0)


def _text_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [encode_segments(tokenizer, [("text", text)]) for text in texts]


def _text_rows(
    weight_VD: torch.Tensor, token_ids: list[list[int]], codes_N: np.ndarray, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which codes have items with a text (C,), and the mean over these of their texts' mean rows (C, D)."""
    sums_CD = weight_VD.new_zeros(size, weight_VD.shape[1])
    count_C = weight_VD.new_zeros(size)
    for code, ids in zip(codes_N.tolist(), token_ids):
        if ids and code >= 0:
            sums_CD[code] += weight_VD[ids].mean(dim=0)
            count_C[code] += 1
    return count_C > 0, sums_CD / count_C.clamp(min=1).unsqueeze(1)


# ------------------------------------------------------------------------------------------------------------- checks


def _checked_codebooks(codebooks: Sequence[Any] | None, sizes: Sequence[int]) -> list[torch.Tensor | None]:
    if codebooks is None or len(codebooks) != len(sizes):
        given = "none" if codebooks is None else len(codebooks)
        raise IncompatibleComponentsError(
            f"codebooks: {given} given for {len(sizes)} levels; give one array (codes, width) per level, None where a "
            "level has none"
        )
    vectors: list[torch.Tensor | None] = []
    for level, (codebook, size) in enumerate(zip(codebooks, sizes)):
        if codebook is None:
            vectors.append(None)
            continue
        vectors_CP = torch.as_tensor(np.asarray(codebook.detach().cpu() if hasattr(codebook, "detach") else codebook))
        if vectors_CP.dim() != 2 or len(vectors_CP) != size:
            raise IncompatibleComponentsError(
                f"codebooks[{level}] has shape {tuple(vectors_CP.shape)}, the level has {size} codes: give ({size}, width)"
            )
        if not torch.isfinite(vectors_CP).all():
            raise IncompatibleComponentsError(f"codebooks[{level}] holds NaN or infinity: train the quantizer again")
        vectors.append(vectors_CP.float())
    return vectors


def _checked_texts(item_texts: Any, item_ids: Sequence[str]) -> list[str]:
    if item_texts is None or isinstance(item_texts, str):
        raise IncompatibleComponentsError('init="text" needs item_texts: {item id: text}, or one text per item')
    if isinstance(item_texts, Mapping):
        missing = next((item for item in item_ids if item not in item_texts), None)
        if missing is not None:
            raise ItemTableError(f"item_texts has no entry for item {missing!r}: give its text, or ''")
        texts = [item_texts[item] for item in item_ids]
    else:
        texts = list(item_texts)
    if len(texts) != len(item_ids):
        raise ItemTableError(f"item_texts has {len(texts)} texts for {len(item_ids)} items: give one per item")
    for item, text in zip(item_ids, texts):
        if not isinstance(text, str):
            raise ItemTableError(f"the text of item {item!r} is a {type(text).__name__}, not a string")
    return texts
