"""EmbeddingInjector: vectors of another model as soft tokens of a language model (arXiv 2310.19488, 2312.02445, 2404.11343).

A collaborative, visual or joint vector goes through a small projector and takes the place of a placeholder token in the
language model's input embeddings.

Relations: projector "mlp" with ReLU and a hidden width of 10 D is CoLLM's; with GELU and the language model's width LLaRA's;
with a layer norm before the activation A-LLMRec's.

Shapes: B rows, T tokens, X slots of all rows, D width of a vector, H width of the language model, P tokens per slot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_genrec.errors import IncompatibleComponentsError


class EmbeddingInjector(nn.Module):
    """Puts projected vectors where a placeholder token stands.

    Args:
        vector_size: D.
        hidden_size: H.
        placeholder_token_id: the token whose places are taken; best one outside the vocabulary, which no text can hold.
        projector: "linear" or "mlp" (linear, activation, linear).
        projector_size: width between the two layers of "mlp"; None = H.
        projector_act: activation of "mlp", by its transformers name.
        projector_norm: a layer norm before the activation.
        tokens_per_vector: P places per vector, one behind the other.

    Example:
        >>> injector = EmbeddingInjector(3, 4, placeholder_token_id=9)
        >>> ids = torch.tensor([[1, 9, 2]])
        >>> mixed = injector(ids, torch.zeros(1, 3, 4), torch.ones(1, 3))
        >>> mixed[0, 0].tolist(), torch.equal(mixed[0, 1], injector.project(torch.ones(1, 3))[0, 0])
        ([0.0, 0.0, 0.0, 0.0], True)
    """

    def __init__(
        self,
        vector_size: int,
        hidden_size: int,
        placeholder_token_id: int,
        *,
        projector: str = "mlp",
        projector_size: int | None = None,
        projector_act: str = "gelu",
        projector_norm: bool = False,
        tokens_per_vector: int = 1,
    ) -> None:
        super().__init__()
        self.vector_size, self.hidden_size = int(vector_size), int(hidden_size)
        self.placeholder_token_id, self.tokens_per_vector = int(placeholder_token_id), int(tokens_per_vector)
        width = hidden_size * self.tokens_per_vector
        if projector == "linear":
            self.projector: nn.Module = nn.Linear(vector_size, width)
        elif projector == "mlp":
            between = projector_size or hidden_size
            norm = nn.LayerNorm(between) if projector_norm else nn.Identity()
            self.projector = nn.Sequential(
                nn.Linear(vector_size, between), norm, ACT2FN[projector_act], nn.Linear(between, width)
            )
        else:
            raise IncompatibleComponentsError(f"projector {projector!r} is unknown; choose 'linear' or 'mlp'.")

    def project(self, vectors_XD: Tensor) -> Tensor:
        """Soft tokens (X, P, H) of vectors."""
        first = next(self.projector.parameters())
        return self.projector(vectors_XD.to(first)).unflatten(-1, (self.tokens_per_vector, self.hidden_size))

    def forward(self, input_ids: Tensor, inputs_embeds: Tensor, vectors_XD: Tensor | None) -> Tensor:
        """Embeddings (B, T, H) with the placeholders filled, in reading order: row by row, left to right.

        Without a placeholder the embeddings come back as they are and the projector does not run, so it gets no gradient.

        Args:
            input_ids: (B, T).
            inputs_embeds: (B, T, H) embeddings of these ids; what they hold at placeholders does not matter.
            vectors_XD: one vector per P placeholders; None = there are none.

        Raises:
            IncompatibleComponentsError: the number of placeholders is not P times the number of vectors.
        """
        place_BT = input_ids == self.placeholder_token_id
        places = int(place_BT.sum())
        given = 0 if vectors_XD is None else len(vectors_XD)
        if places != given * self.tokens_per_vector:
            raise IncompatibleComponentsError(
                f"the prompts hold {places} placeholders (token {self.placeholder_token_id}), but {given} vectors of "
                f"{self.tokens_per_vector} tokens each were given; write one slot per vector."
            )
        if vectors_XD is None or not places:
            return inputs_embeds
        soft = self.project(vectors_XD).flatten(0, 1).to(inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(place_BT.unsqueeze(-1), soft)


def embed_text(embeddings: nn.Module, input_ids: Tensor, vocab_size: int) -> Tensor:
    """Embeddings (B, T, H) of token ids of which those outside the vocabulary are placeholders (they read token 0)."""
    return embeddings(torch.where(input_ids < vocab_size, input_ids, 0))
