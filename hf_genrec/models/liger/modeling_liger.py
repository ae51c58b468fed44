"""LIGER: a T5 over item codes and item texts; its encoder's last state also retrieves items (arXiv 2411.18814).

The encoder reads, per code, the code's embedding + the projected vector of the item's text + the item's position + the
code's slot (items.py). The decoder writes the next item's codes as TIGER's does; the encoder state at the last token of
the history, by cosine with the projected vectors of the items, is a dense retriever. Both losses are cross-entropies, of
the codes and of the item among all items that training has seen; items it never saw are left out of the latter, so that
nothing pushes them away. Decoding "generate_then_dense" ranks the beam's items and all cold items by the dense score.

With `causal_encoder` every prefix of a window is trained in one pass, the dense loss at each of them.

*Relations*: `item_inputs=False, dense_loss_weight=0` is TIGER; decoding "dense" ranks all items, "beam" generates alone,
and `dense_weight` in (0, 1) mixes both log-probabilities of the beam's items.

Shapes: B users, T targets of a window, P targets of a batch, N items, L levels, S encoder positions, M width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5Model
from transformers.modeling_outputs import Seq2SeqLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.beam_cache import BeamCache
from hf_genrec.generation.decoding.t5 import T5State
from hf_genrec.models.t5_levels import T5LevelsForConditionalGeneration, apply_options
from hf_genrec.models.t5_packed import prefix_states, use_encoder

from .configuration_liger import LigerConfig
from .items import Items, LigerStack


class LigerState(NamedTuple):
    """What decoding needs of B encoded users: the generator's state, and the queries (B, M) of the dense head."""

    generator: T5State
    query_BM: Tensor


class _WithItems:
    """What both model classes share: an encoder that holds the items."""

    config_class = LigerConfig  # not an annotation: postponed annotations would reach transformers as strings

    def _add_items(self, config: LigerConfig) -> None:
        apply_options(self, config)  # type: ignore[arg-type]
        use_encoder(self, LigerStack)
        self.encoder.items = Items(config)  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]


class LigerModel(_WithItems, T5Model):
    """The encoder-decoder without heads: what `AutoModel` gives for a LIGER checkpoint."""

    def __init__(self, config: LigerConfig):
        super().__init__(config)
        self._add_items(config)


class LigerForConditionalGeneration(_WithItems, T5LevelsForConditionalGeneration):
    """Generator and dense retriever in one.

    Example:
        >>> config = LigerConfig(
        ...     codebook_sizes=[8, 8], num_items=3, item_feature_dim=5, d_model=16, d_kv=8, d_ff=32, num_layers=1
        ... )
        >>> model = LigerForConditionalGeneration(config).eval()
        >>> model.set_catalogue([[0, 1], [2, 3], [2, 4]], torch.randn(3, 5))
        >>> model.score_dense(model.start_decoding(torch.tensor([[4, 13]]))).shape
        torch.Size([1, 3])
    """

    config_class = LigerConfig

    def __init__(self, config: LigerConfig):
        super().__init__(config)
        self._add_items(config)

    @property
    def items(self) -> Items:
        """Codes, fixed vectors and projection of the catalogue."""
        return self.encoder.items

    @property
    def cold_items(self) -> Tensor:
        """Items (N,) that training never saw."""
        return self.items.cold_items

    def set_catalogue(self, item_codes: Any, item_features: Any | None = None) -> None:
        """Store the codes (N, L) and the fixed vectors (N, F) of the catalogue.

        Raises:
            IncompatibleComponentsError: a shape differs from the configuration.
        """
        self.items.set_catalogue(item_codes, item_features)

    def prepare_training(self, train_counts_N: Any) -> list[Any]:
        """Called by `train_recommender`: notes which items never occur in training."""
        if self.config.dense_loss_weight and not self.config.has_dense_head:
            raise IncompatibleComponentsError(
                "the dense loss needs item vectors: name feature blocks in model.features (item_feature_dim), or set "
                "dense_loss_weight to 0."
            )
        if self.config.num_items:
            self.items.cold_items.copy_(torch.as_tensor(np.asarray(train_counts_N) == 0))
        return []

    # -- training ---------------------------------------------------------------------------------------------------

    def training_loss(
        self,
        outputs: Seq2SeqLMOutput,
        labels_BQ: Tensor,
        attention_mask: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Cross-entropy per label and per item, weighted, both relative to `num_items_in_batch` where given."""
        config = self.config
        loss = super().training_loss(outputs, labels_BQ, attention_mask, num_items_in_batch)  # type: ignore[arg-type]
        loss = config.generation_loss_weight * loss
        if not config.dense_loss_weight or not config.has_dense_head:
            return loss
        states_BSM = outputs.encoder_last_hidden_state
        assert states_BSM is not None
        lengths = getattr(outputs, "history_lengths", None)
        if lengths is None:  # one target per row, which may see all of it
            labels_BTQ, query_BTM = labels_BQ.unsqueeze(1), self._query(states_BSM, attention_mask).unsqueeze(1)
        else:
            labels_BTQ, query_BTM = labels_BQ, prefix_states(states_BSM, attention_mask, lengths)
        real_BT = labels_BTQ[..., 0] != -100
        dense_P = self._dense_loss(query_BTM[real_BT], self.items.rows(labels_BTQ[real_BT][:, : config.num_levels]))
        rows: Any = len(dense_P)
        if num_items_in_batch is not None:  # labels of the whole step -> targets of the whole step
            rows = num_items_in_batch * len(dense_P) / (labels_BTQ != -100).sum()
        return loss + config.dense_loss_weight * dense_P.sum() / rows

    def _dense_loss(self, query_PM: Tensor, target_P: Tensor) -> Tensor:
        """-log p(target) (P,) among the items that training has seen; 0 for codes that name no item."""
        logits_PN = self._dense_logits(query_PM)
        unseen_PN = self.cold_items.expand_as(logits_PN).scatter(1, target_P.clamp(min=0).unsqueeze(1), False)
        targets = target_P.masked_fill(target_P < 0, -100)
        return F.cross_entropy(logits_PN.masked_fill(unseen_PN, -torch.inf), targets, reduction="none")

    def _dense_logits(self, query_PM: Tensor) -> Tensor:
        """Cosine / temperature (P, N), float32."""
        query_PM = F.normalize(query_PM.float(), dim=-1)
        return query_PM @ self.items.table().T / self.config.dense_temperature

    def _query(self, states_BSM: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The state (B, M) at each row's last token."""
        if attention_mask is None:
            return states_BSM[:, -1]
        return prefix_states(states_BSM, attention_mask, attention_mask.long().sum(1, keepdim=True))[:, 0]

    # -- decoding ---------------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None) -> LigerState:  # type: ignore[override]
        """Encode B users once, for the generator and for the dense head."""
        return self.start_from_encoder(*self._t5_decoder().encode(input_ids, attention_mask))

    def start_from_encoder(self, states_BSM: Tensor, attention_mask: Tensor | None = None) -> LigerState:  # type: ignore[override]
        """As `start_decoding`, from encoder states that are there already (`generate` makes them)."""
        return LigerState(
            super().start_from_encoder(states_BSM, attention_mask), self._query(states_BSM, attention_mask)
        )

    def start_beams(self, state: LigerState) -> BeamCache:  # type: ignore[override]
        return super().start_beams(state.generator)

    def score_codes(self, state: LigerState, prefix_BKl: torch.LongTensor, level: int) -> Tensor:  # type: ignore[override]
        return super().score_codes(state.generator, prefix_BKl, level)

    def score_dense(self, state: LigerState) -> Tensor | None:
        """Log-probabilities (B, N) of the dense head over the whole catalogue, None without item vectors."""
        if not self.config.has_dense_head:
            return None
        return self._dense_logits(state.query_BM).log_softmax(-1)

    def rescore_items(self, state: LigerState, items_BK: Tensor, scores_BK: Tensor, config: Any) -> Tensor:
        """(1 - w) generated + w dense log-probability of the candidates, w = `config.dense_weight`."""
        weight = float(config.dense_weight)
        dense_BN = self.score_dense(state) if weight else None
        if dense_BN is None:
            return scores_BK
        return (1.0 - weight) * scores_BK + weight * dense_BN.gather(1, items_BK.clamp(min=0)).to(scores_BK.dtype)
