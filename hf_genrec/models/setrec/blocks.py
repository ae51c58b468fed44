"""Parts of SETRec: the tokens of an item, and attention among sets of tokens (arXiv 2502.10833).

Shapes: B users, N items, F width of the item vectors, n tokens of an item, H tokens of the history, X = H + query tokens,
h heads, k width of a head, d width of the model.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_genrec.models.layers import TransformerBlock


class TokenLinear(nn.Linear):
    """A linear layer on item vectors: weights start with variance `gain` / inputs, so that tokens start at their own size."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__(inputs, outputs)
        self.start_std = (gain / inputs) ** 0.5


def _perceptron(widths: list[int], last_gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [TokenLinear(before, after, 2.0), nn.ReLU()]  # He et al., arXiv 1502.01852
    return nn.Sequential(*layers[:-2], TokenLinear(widths[-2], widths[-1], last_gain))


class SetTokens(nn.Module):
    """Item vectors -> the item's set of continuous tokens, no codebook in between.

    The first token is a linear map of the collaborative vector. The others are the code of an autoencoder over the
    semantic vector, whose reconstruction is part of the training loss.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.widths = [config.item_feature_dims[0], sum(config.item_feature_dims[1:])]
        self.num_semantic, self.hidden_size = config.num_semantic_tokens, config.hidden_size
        variance = config.embedding_std**2
        self.collaborative = TokenLinear(self.widths[0], config.hidden_size, variance)
        self.encoder: nn.Module | None = None
        self.decoder: nn.Module | None = None
        if self.num_semantic:
            widths = [self.widths[1], *config.autoencoder_sizes, self.num_semantic * config.hidden_size]
            self.encoder, self.decoder = _perceptron(widths, variance), _perceptron(widths[::-1], 1.0)

    def forward(self, features_NF: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, n, d), the collaborative one first, and the autoencoder's mean squared error (0 without one)."""
        collaborative_NF, semantic_NF = features_NF.split(self.widths, dim=1)
        first_N1d = self.collaborative(collaborative_NF).unsqueeze(1)
        if self.encoder is None or self.decoder is None:
            return first_N1d, features_NF.new_zeros(())
        code = self.encoder(semantic_NF)
        error = F.mse_loss(self.decoder(code), semantic_NF)
        return torch.cat([first_N1d, code.view(len(code), self.num_semantic, self.hidden_size)], dim=1), error


class SetBlock(TransformerBlock):
    """A Transformer layer in which a token sees the history tokens its mask allows, and itself, and nothing else.

    Only history tokens are keys: tokens of one item do not see each other, and queries see neither each other nor are
    seen. With one token per item, history tokens attend as under an ordinary causal mask.
    """

    def _attend(self, x_BTd: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """`x_BTd` is (B, X, d), history first; `mask_B1TT` (B or 1, 1, X, H) says which history tokens each one sees."""
        assert mask_B1TT is not None
        batch, length, width = x_BTd.shape
        history, head = mask_B1TT.shape[-1], width // self.num_heads
        query, key, value = self.qkv(x_BTd).view(batch, length, 3, self.num_heads, head).permute(2, 0, 3, 1, 4)
        query = query * head**-0.5
        others_BhXH = query @ key[:, :, :history].transpose(2, 3)
        others_BhXH = others_BhXH.masked_fill(~mask_B1TT, torch.finfo(others_BhXH.dtype).min)
        own_BhX1 = (query * key).sum(-1, keepdim=True)
        weights = torch.cat([others_BhXH, own_BhX1], dim=-1).softmax(-1)
        mixed = weights[..., :history] @ value[:, :, :history] + weights[..., history:] * value
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
