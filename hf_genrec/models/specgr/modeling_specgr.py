"""SpecGR++: one T5 that generates the next item's codes and, with its encoder, retrieves items to draft (arXiv 2410.02939).

The encoder's states, averaged over the tokens, projected and scaled to length 1, are the embedding of whatever was read: a
history (the query) or the L codes of an item. Their product is the draft score. Nothing about an item enters but its
codes, so items that training never saw have embeddings like all others: decoding "speculative" drafts them, and the
decoder judges.

Training has two phases, in one run. First the loss is `generation_loss_weight` * cross-entropy of the codes +
`embedding_loss_weight` * InfoNCE(history, next item), where the other targets of the batch are the negatives (equal
targets are left out). In the last `finetune_share` of the steps the negatives are all trained items: their
embeddings are computed once, when the phase begins, and held fixed, and only the query side goes on learning. The phase
and the fixed embeddings are buffers, so they travel with every checkpoint. `train_recommender` brings the switch
(`prepare_training`); by hand, call `start_finetuning`.

Negatives are those of one device's batch; with gradient accumulation those of one of its parts.

*Relations*: `embedding_loss_weight=0` trains TIGER; decoding "beam" ignores the retriever.

Shapes: B users, N items, L levels, S encoder positions, M width of the model, P width of an embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Model, TrainerCallback
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.beam_cache import BeamCache
from hf_genrec.generation.decoding.t5 import T5State, encode
from hf_genrec.generation.search import evaluating
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.t5_levels import T5LevelsForConditionalGeneration, use_pooled_dropout

from .configuration_specgr import SpecGRConfig

_ITEMS_PER_CALL = 1024  # items that are encoded together; bounds memory, changes nothing else


class SpecGRState(NamedTuple):
    """What decoding needs of B encoded users: the generator's state, and the queries (B, P) of the retriever."""

    generator: T5State
    query_BP: Tensor


class SpecGRModel(T5Model):
    """The encoder-decoder without heads: what `AutoModel` gives for a SpecGR checkpoint."""

    config_class = SpecGRConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: SpecGRConfig):
        super().__init__(config)
        if config.pooled_dropout:
            use_pooled_dropout(self)


class SpecGRForConditionalGeneration(T5LevelsForConditionalGeneration):
    """Generator and retriever in one.

    Example:
        >>> config = SpecGRConfig(codebook_sizes=[8, 8], num_items=3, d_model=16, d_kv=8, d_ff=32, num_layers=1)
        >>> model = SpecGRForConditionalGeneration(config).eval()
        >>> model.set_catalogue([[0, 1], [2, 3], [2, 4]])
        >>> model.draft_scores(model.start_decoding(torch.tensor([[4, 13]]))).shape
        torch.Size([1, 3])
    """

    config_class = SpecGRConfig  # not an annotation: postponed annotations would reach transformers as strings

    item_codes: Tensor
    cold_items: Tensor
    item_embeddings: Tensor
    finetuning: Tensor

    def __init__(self, config: SpecGRConfig):
        super().__init__(config)
        self.projection = nn.Linear(config.d_model, config.projection_size)
        # the catalogue travels with the weights, as do the phase and its fixed embeddings
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self.register_buffer("cold_items", torch.zeros(config.num_items, dtype=torch.bool))
        self.register_buffer("item_embeddings", torch.zeros(config.num_items, config.projection_size))
        self.register_buffer("finetuning", torch.zeros((), dtype=torch.bool))
        self._encoded: tuple[Tensor, Tensor] | None = None
        self._trie: ItemTrie | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "projection", None):
            init.normal_(module.weight, std=self.config.d_model**-0.5)
            init.zeros_(module.bias)
        elif module is self and "finetuning" in self._buffers:
            for buffer in (self.item_codes, self.cold_items, self.item_embeddings, self.finetuning):
                init.zeros_(buffer)

    def set_catalogue(self, item_codes: Any, cold_items: Any | None = None) -> None:
        """Store the codes (N, L) of the catalogue, and which items (N,) training never sees (default: none).

        Raises:
            IncompatibleComponentsError: a shape differs from the configuration.
        """
        codes = torch.tensor(np.asarray(item_codes)).to(self.item_codes)
        if codes.shape != self.item_codes.shape:
            raise IncompatibleComponentsError(
                f"set_catalogue: item_codes has shape {tuple(codes.shape)}, the configuration says "
                f"{tuple(self.item_codes.shape)}; build the configuration with from_tokenizer of the same catalogue."
            )
        self.item_codes.copy_(codes)
        self._trie = self._encoded = None
        self.finetuning.fill_(False)  # the fixed embeddings were those of other codes
        self._set_cold(torch.zeros_like(self.cold_items) if cold_items is None else cold_items)

    def _set_cold(self, cold_items: Any) -> None:
        cold = torch.tensor(np.asarray(cold_items), dtype=torch.bool)
        if cold.shape != self.cold_items.shape:
            raise IncompatibleComponentsError(
                f"cold items have shape {tuple(cold.shape)}, the configuration says {tuple(self.cold_items.shape)}."
            )
        self.cold_items.copy_(cold)

    # -- the retriever ----------------------------------------------------------------------------------------------

    def _embed(self, states_BSM: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Mean over the tokens, projected, of length 1: (B, P)."""
        if mask_BS is None:
            mean_BM = states_BSM.mean(1)
        else:
            weight_BS = mask_BS.to(states_BSM.dtype)
            mean_BM = torch.einsum("bsm,bs->bm", states_BSM, weight_BS) / weight_BS.sum(-1, keepdim=True).clamp(min=1)
        return F.normalize(self.projection(mean_BM).float(), dim=-1)

    def _encode_catalogue(self) -> Tensor:
        """Embeddings (N, P) of the catalogue's items by the present weights, in evaluation mode."""
        offsets = torch.tensor(self.config.level_offsets, device=self.item_codes.device)
        with evaluating(self):
            return self._encode_items(self.item_codes.long() + offsets)

    def _encode_items(self, tokens_NL: Tensor) -> Tensor:
        """Embeddings (N, P) of items by the tokens of their codes."""
        parts = [
            self._embed(self.encoder(input_ids=tokens).last_hidden_state, None)
            for tokens in tokens_NL.split(_ITEMS_PER_CALL)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def start_finetuning(self) -> None:
        """Begin the second phase: from here on the items' embeddings are those of the present weights."""
        self._require_catalogue()
        self.item_embeddings.copy_(self._encode_catalogue())
        self.finetuning.fill_(True)

    def item_table(self) -> Tensor:
        """Embeddings (N, P) of the catalogue that drafts are made from: the fixed ones after the second phase began,
        else those of the present weights (computed when they have changed).
        """
        self._require_catalogue()
        if bool(self.finetuning):
            return self.item_embeddings.float()
        # weights change in ways that leave no trace on the tensors (averages swapped in, checkpoints loaded)
        weights = [*self.encoder.parameters(), *self.projection.parameters()]
        stamp = torch.stack([weight.detach().double().sum() for weight in weights])
        if self._encoded is None or self._encoded[0].device != stamp.device or not torch.equal(self._encoded[0], stamp):
            self._encoded = stamp, self._encode_catalogue()
        return self._encoded[1]

    def _require_catalogue(self) -> None:
        if not self.config.num_items:
            raise IncompatibleComponentsError(
                "the model holds no catalogue to draft from: build its configuration with from_tokenizer, and call "
                "set_catalogue(tokenizer.codes)."
            )

    def draft_scores(self, state: SpecGRState) -> Tensor:
        """Cosine similarity (B, N) of history and item."""
        return state.query_BP @ self.item_table().T

    # -- training ---------------------------------------------------------------------------------------------------

    def prepare_training(self, train_counts_N: Any) -> list[TrainerCallback]:
        """Called by `train_recommender`: notes which items never occur in training; gives the switch of the phases."""
        self._set_cold(np.asarray(train_counts_N) == 0)
        return [FinetuningPhase(self)] if self.config.finetune_share > 0 else []

    def training_loss(
        self,
        outputs: Seq2SeqLMOutput,
        labels_BQ: torch.LongTensor,
        attention_mask: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Cross-entropy per label and contrast per row, weighted, both relative to `num_items_in_batch` where given."""
        config = self.config
        loss = super().training_loss(outputs, labels_BQ, attention_mask, num_items_in_batch)
        if not config.embedding_loss_weight:
            return config.generation_loss_weight * loss
        query_BP = self._embed(outputs.encoder_last_hidden_state, attention_mask)
        contrast_B = self._contrast(query_BP, labels_BQ[:, : config.num_levels])
        rows: Any = len(labels_BQ)
        if num_items_in_batch is not None:  # labels of the whole step -> rows of the whole step
            rows = num_items_in_batch * len(labels_BQ) / (labels_BQ != -100).sum()
        return config.generation_loss_weight * loss + config.embedding_loss_weight * contrast_B.sum() / rows

    def _contrast(self, query_BP: Tensor, labels_BL: Tensor) -> Tensor:
        """-log p(target) per row (B,), among the batch's targets or, fine-tuning, among all trained items."""
        same_code, target_B = self._candidates(labels_BL)
        if bool(self.finetuning):
            logits = query_BP @ self.item_embeddings.float().T / self.config.contrast_temperature
        else:
            logits = query_BP @ self._encode_items(labels_BL).T / self.config.contrast_temperature
        others = same_code.scatter(1, target_B.unsqueeze(1), False)  # the same code again is no negative
        return F.cross_entropy(logits.masked_fill(others, -torch.inf), target_B, reduction="none")

    def _candidates(self, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Which candidates are out for a row unless they are its target (same code; never trained on), and the target."""
        if not bool(self.finetuning):
            same_BB = (labels_BL.unsqueeze(1) == labels_BL.unsqueeze(0)).all(-1)
            return same_BB, torch.arange(len(labels_BL), device=labels_BL.device)
        if self._trie is None or self._trie.device != labels_BL.device:
            self._trie = ItemTrie.from_codes(self.item_codes.cpu(), list(self.config.codebook_sizes)).to(
                labels_BL.device
            )
        offsets = torch.tensor(self.config.level_offsets, device=labels_BL.device)
        leaf_B = self._trie.lookup(labels_BL - offsets)
        same_BN = self._trie.item_leaf_N == leaf_B.unsqueeze(1)
        return same_BN | self.cold_items, self._trie.first_items(leaf_B).clamp(min=0)

    # -- decoding ---------------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None) -> SpecGRState:
        """Encode B users once, for the generator and for the retriever."""
        if input_ids.shape[1] == 0:  # nothing known: one padding token that counts for nothing
            input_ids = input_ids.new_full((input_ids.shape[0], 1), self.config.pad_token_id)
            attention_mask = torch.zeros_like(input_ids)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        decoder = self._t5_decoder()
        if decoder.as_written:
            states_BSM = encode(self.encoder, input_ids, attention_mask)
        else:
            states_BSM = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.start_from_encoder(states_BSM, attention_mask)

    def start_from_encoder(self, states_BSM: Tensor, attention_mask: Tensor | None = None) -> SpecGRState:
        """As `start_decoding`, from encoder states (B, S, M) that are there already (`generate` makes them)."""
        query_BP = self._embed(states_BSM, attention_mask)
        return SpecGRState(self._t5_decoder().state_of(states_BSM, attention_mask), query_BP)

    def start_beams(self, state: SpecGRState) -> BeamCache:  # type: ignore[override]
        return super().start_beams(state.generator)

    def score_codes(self, state: SpecGRState, prefix_BKl: torch.LongTensor, level: int) -> Tensor:  # type: ignore[override]
        return super().score_codes(state.generator, prefix_BKl, level)


class FinetuningPhase(TrainerCallback):
    """Begins the second phase when `finetune_share` of the steps are left."""

    def __init__(self, model: SpecGRForConditionalGeneration) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step >= (1 - self.model.config.finetune_share) * state.max_steps
        if done and not bool(self.model.finetuning):
            self.model.start_finetuning()
