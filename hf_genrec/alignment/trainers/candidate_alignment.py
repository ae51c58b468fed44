"""Stage 1 of A-LLMRec: item vectors of a collaborative filter and of texts in one latent space (arXiv 2404.11343).

Two small autoencoders, one over the retriever's item vectors and one over text vectors, are drawn together in the middle:

    BCE(u . f_rec(i+), u . f_rec(i-)) + MSE(f(i), g(i)) for both items + 0.5 MSE(f_rec, cf) + 0.2 MSE(g_rec, text)

with u the retriever's user vector. No language model takes part. f(i) becomes the item's soft token; an item that was never
trained on gets g(i), which is made of its text alone. Deviation: the text encoder is frozen here (its vectors are given),
where the paper also tunes it.

Shapes: B rows, N items, D width of the collaborative vectors, E of the text vectors, Z latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_genrec.errors import IncompatibleComponentsError, TrainingError

MATCHING, ITEM_RECONSTRUCTION, TEXT_RECONSTRUCTION = 1.0, 0.5, 0.2


class _Autoencoder(nn.Module):
    """Linear, sigmoid, linear."""

    def __init__(self, size: int, latent_size: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(size, latent_size), nn.Linear(latent_size, size)

    def encode(self, vectors: Tensor) -> Tensor:
        return self.encoder(vectors).sigmoid()


class CollaborativeTextAligner(nn.Module):
    """Both autoencoders over tables of vectors.

    Args:
        item_vectors: (N, D) of the retriever, frozen; D is the width of user vectors too.
        text_vectors: (N, E), frozen.
        latent_size: Z.
        matching: weight of the term that draws both sides together; 0 leaves them apart.

    Raises:
        IncompatibleComponentsError: tables of different length.

    Example:
        >>> aligner = CollaborativeTextAligner(torch.randn(5, 4), torch.randn(5, 6), latent_size=3)
        >>> aligner(torch.randn(2, 4), torch.tensor([0, 1]), torch.tensor([2, 3]))["loss"].shape, aligner.latents().shape
        (torch.Size([]), torch.Size([5, 3]))
    """

    items: Tensor
    texts: Tensor

    def __init__(
        self, item_vectors: Any, text_vectors: Any, latent_size: int = 128, matching: float = MATCHING
    ) -> None:
        super().__init__()
        items, texts = (torch.as_tensor(np.asarray(v), dtype=torch.float32) for v in (item_vectors, text_vectors))
        if items.dim() != 2 or texts.dim() != 2 or len(items) != len(texts):
            raise IncompatibleComponentsError(
                f"item vectors {tuple(items.shape)} and text vectors {tuple(texts.shape)}: give one row of each per item."
            )
        self.register_buffer("items", items, persistent=False)
        self.register_buffer("texts", texts, persistent=False)
        self.matching = float(matching)
        self.item_side = _Autoencoder(items.shape[1], latent_size)
        self.text_side = _Autoencoder(texts.shape[1], latent_size)

    def forward(self, user_vectors: Tensor, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """Loss of B rows: user vectors (B, D), the item that came next and a drawn one (B,)."""
        total = user_vectors.new_zeros(())
        for items_B, label in ((positive, 1.0), (negative, 0.0)):
            cf_BD, text_BE = self.items[items_B], self.texts[items_B]
            item_BZ, text_BZ = self.item_side.encode(cf_BD), self.text_side.encode(text_BE)
            item_rec, text_rec = self.item_side.decoder(item_BZ), self.text_side.decoder(text_BZ)
            logits_B = (user_vectors * item_rec).sum(-1)
            total = total + F.binary_cross_entropy_with_logits(logits_B, torch.full_like(logits_B, label))
            total = total + self.matching * F.mse_loss(item_BZ, text_BZ)
            total = total + ITEM_RECONSTRUCTION * F.mse_loss(item_rec, cf_BD)
            total = total + TEXT_RECONSTRUCTION * F.mse_loss(text_rec, text_BE)
        return {"loss": total}

    @torch.no_grad()
    def latents(self, cold: Any = None) -> Tensor:
        """Latent vectors (N, Z): of the collaborative side, and of the text side for `cold` items ((N,) bool)."""
        from_items = self.item_side.encode(self.items)
        if cold is None:
            return from_items
        cold_N = torch.as_tensor(np.asarray(cold, bool), device=from_items.device)
        return torch.where(cold_N[:, None], self.text_side.encode(self.texts), from_items)


class AlignmentCollator:
    """Lists of two (`CandidateDataset` with m = 2) as user vectors, targets and drawn items."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        samples = [sample for sample in samples if len(sample["candidates"]) == 2]
        if not samples:
            raise TrainingError(
                "no item is left to draw beside the targets: these users have seen the whole catalogue."
            )
        users = self.model.user_vectors(*self.model.retriever_inputs([sample["history"] for sample in samples]))
        targets = [int(sample["target"]) for sample in samples]
        others = [int(sample["candidates"][sample["candidates"] != sample["target"]][0]) for sample in samples]
        return {"user_vectors": users.cpu(), "positive": torch.tensor(targets), "negative": torch.tensor(others)}
