"""ETEGRec: recommender and item tokenizer trained end to end, in turn (arXiv 2409.05546).

The recommender is TIGER's T5 with a code table per level. The tokenizer is an RQ-VAE over item vectors that lives inside
the model, so that it is saved with it and can name new items. Two terms tie them together:

- SIA: the mean encoder state of a history, mapped into the quantizer's latent space, should be coded like the target item:
  symmetric KL of the softmax over code distances, summed over the levels;
- PSA: the decoder's first state, mapped into the item space, should find the reconstruction of its target among those of
  the batch: symmetric InfoNCE.

    recommender phase: CE + mu SIA + lambda PSA             (quantizer frozen)
    tokenizer phase:   L_SQ + mu SIA + lambda PSA           (recommender frozen; L_SQ = the RQ-VAE's own loss)

Nothing flows from the cross-entropy through the choice of a code. `alignment/trainers/joint.py` runs the phases.

*Relations*: with both weights 0 (or no quantizer attached) and no tokenizer phase it is TIGER, bit for bit.

Shapes: B users, T packed targets, L levels, S encoder positions, M width of the model, R targets of a batch, U distinct
target items, N items, E width of the item vectors, P width of the quantizer's latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import T5Model
from transformers import initialization as init
from transformers.modeling_outputs import Seq2SeqLMOutput

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.identifiers.losses import pair_nce
from hf_genrec.identifiers.losses_distribution import level_divergence
from hf_genrec.identifiers.quantizers.configuration_rq_vae import RQVAEConfig
from hf_genrec.identifiers.quantizers.rq_vae import RQVAEModel
from hf_genrec.models.t5_levels import T5LevelsForConditionalGeneration, apply_options
from hf_genrec.models.t5_packed import prefix_ends

from .configuration_etegrec import EtegrecConfig

SIDES = ("tokenizer", "recommender")


class EtegrecModel(T5Model):
    """The encoder-decoder without head and tokenizer side: what `AutoModel` gives for an ETEGRec checkpoint."""

    config_class = EtegrecConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: EtegrecConfig):
        super().__init__(config)
        apply_options(self, config)


class EtegrecForConditionalGeneration(T5LevelsForConditionalGeneration):
    """Recommender and item tokenizer in one.

    Example:
        >>> config = EtegrecConfig(codebook_sizes=[4, 4], num_items=8, d_model=16, d_kv=8, d_ff=32, num_layers=1)
        >>> model = EtegrecForConditionalGeneration(config)
        >>> quantizer = RQVAEModel(RQVAEConfig(input_size=6, hidden_sizes=[8], latent_size=4, codebook_sizes=[4, 4]))
        >>> model.attach_quantizer(quantizer, torch.randn(8, 6))
        >>> model.encode_items(torch.randn(3, 6)).shape  # codes of items the model has never seen
        torch.Size([3, 2])
    """

    config_class = EtegrecConfig  # not an annotation: postponed annotations would reach transformers as strings
    item_vectors: Tensor

    def __init__(self, config: EtegrecConfig):
        super().__init__(config)
        self.side, self.aligned = "recommender", True
        self._trie: ItemTrie | None = None
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self.quantizer: RQVAEModel | None = None
        if config.quantizer is not None:
            self._make_tokenizer_side(RQVAEConfig(**config.quantizer))
            self.post_init()

    # ------------------------------------------------------------------------------------------------- tokenizer side

    def _make_tokenizer_side(self, config: RQVAEConfig) -> None:
        width = self.config.d_model
        self.quantizer = RQVAEModel(config)
        self.sequence_adapter = _adapter(width, config.latent_size)
        self.preference_adapter = _adapter(width, config.input_size)
        self.register_buffer("item_vectors", torch.zeros(self.config.num_items, config.input_size))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Sequential) and module in (
            getattr(self, "sequence_adapter", None),
            getattr(self, "preference_adapter", None),
        ):
            for layer in (module[0], module[2]):
                init.normal_(layer.weight, std=layer.in_features**-0.5)
                init.zeros_(layer.bias)
        elif module is self and "item_vectors" in self._buffers:
            init.zeros_(self.item_vectors)

    def attach_quantizer(self, quantizer: Any, item_vectors_NE: Any) -> None:
        """Take in a fitted RQ-VAE (a copy) and the vectors (N, E) of the catalogue that it codes.

        Codes are no longer moved to where items are (`dead_code_interval` 0): in joint training every jump of a code would
        rename items that the recommender has learned.

        Raises:
            IncompatibleComponentsError: another kind of quantizer, or sizes that do not fit the codes or the catalogue.
        """
        config = getattr(quantizer, "config", None)
        if not isinstance(quantizer, RQVAEModel) or not isinstance(config, RQVAEConfig):
            raise IncompatibleComponentsError(
                f"ETEGRec trains an RQ-VAE beside the recommender, got {type(quantizer).__name__}: set "
                "identifiers.quantizer to rq_vae."
            )
        levels = list(config.codebook_sizes)
        vectors = torch.as_tensor(np.asarray(item_vectors_NE), dtype=self.dtype)
        if list(self.config.codebook_sizes)[: len(levels)] != levels:
            raise IncompatibleComponentsError(
                f"the quantizer has codebooks {levels}, the model's codes {list(self.config.codebook_sizes)}: the first "
                "levels of the codes must be the quantizer's."
            )
        if vectors.shape != (self.config.num_items, config.input_size):
            raise IncompatibleComponentsError(
                f"item vectors have shape {tuple(vectors.shape)}; the catalogue and the quantizer need "
                f"{(self.config.num_items, config.input_size)}."
            )
        values = {k: v for k, v in config.to_dict().items() if k in type(config).__dataclass_fields__}
        self.config.quantizer = values | {"dead_code_interval": 0}
        self._make_tokenizer_side(RQVAEConfig(**self.config.quantizer))
        assert self.quantizer is not None
        self.quantizer.load_state_dict(quantizer.state_dict())
        for adapter in (self.sequence_adapter, self.preference_adapter):
            self._init_weights(adapter)
        self.item_vectors.copy_(vectors)
        self.to(self.device)
        self.start_phase(self.side, aligned=self.aligned)

    @torch.no_grad()
    def encode_items(self, item_vectors_ME: Any | None = None) -> Tensor:
        """Codes (M, L') of item vectors by the tokenizer side, before collisions are resolved; None = of the catalogue.

        Raises:
            IncompatibleComponentsError: no quantizer attached, or vectors of another width.
        """
        if self.quantizer is None:
            raise IncompatibleComponentsError("the model has no tokenizer side: call attach_quantizer first.")
        return self.quantizer.encode(self.item_vectors if item_vectors_ME is None else item_vectors_ME)

    # --------------------------------------------------------------------------------------------------------- phases

    def set_catalogue(self, item_codes: Any) -> None:
        """Take over the codes (N, L) of the catalogue: targets are looked up in their trie."""
        self._trie = ItemTrie.from_codes(np.asarray(item_codes), list(self.config.codebook_sizes))

    def start_phase(self, side: str, *, aligned: bool = True) -> None:
        """Let `side` learn and freeze the other; see `alignment/trainers/joint.py`.

        Raises:
            IncompatibleComponentsError: an unknown side, or a tokenizer phase without a quantizer.
        """
        if side not in SIDES:
            raise IncompatibleComponentsError(f"unknown side {side!r}: choose one of {', '.join(SIDES)}.")
        if side == "tokenizer" and self.quantizer is None:
            raise IncompatibleComponentsError("a tokenizer phase needs a quantizer: call attach_quantizer first.")
        self.side, self.aligned = side, bool(aligned)
        self._sums, self._steps = {}, 0
        for parameter in self.parameters():
            parameter.requires_grad_(side == "recommender")
        if self.quantizer is not None:
            for parameter in self.quantizer.parameters():
                parameter.requires_grad_(side == "tokenizer")
        self.train(self.training)

    def train(self, mode: bool = True) -> EtegrecForConditionalGeneration:
        """Training mode for the side that learns; the frozen one stays in evaluation mode (no dropout, no statistics)."""
        super().train(mode)
        quantizer = getattr(self, "quantizer", None)
        if mode and quantizer is not None:
            if self.side == "tokenizer":
                for child in self.children():
                    child.eval()
            quantizer.train(self.side == "tokenizer")
        return self

    def phase_losses(self) -> dict[str, float]:
        """Mean of each loss term over the training steps since the phase began."""
        return {name: float(total) / max(1, self._steps) for name, total in self._sums.items()}

    # ----------------------------------------------------------------------------------------------------------- loss

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        history_lengths: torch.LongTensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """As `T5LevelsForConditionalGeneration.forward`; in training mode the loss is that of the phase."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        inputs |= {"history_lengths": history_lengths, "num_items_in_batch": num_items_in_batch, **kwargs}
        config = self.config
        weights = (config.sequence_alignment_weight, config.preference_alignment_weight)
        tied = self.aligned and self.quantizer is not None and any(weights)
        if not self.training or labels is None or (self.side == "recommender" and not tied):
            return super().forward(**inputs)
        with _inputs_of(self.lm_head) as captured:
            outputs = super().forward(**inputs)
        hidden = captured[0] * (self.model_dim**0.5 if config.scale_decoder_outputs else 1.0)
        terms = self._terms(outputs, hidden, labels, attention_mask, history_lengths, tied)
        share = 1.0 if num_items_in_batch is None else (labels != -100).sum() / num_items_in_batch
        loss = terms["quantization"] * share if self.side == "tokenizer" else outputs.loss
        if tied:
            loss = loss + share * (weights[0] * terms["sia"] + weights[1] * terms["psa"])
        self._count(terms if self.side == "tokenizer" else {"ce": outputs.loss / share} | terms)
        outputs.loss = loss
        return outputs

    def _terms(
        self,
        outputs: Seq2SeqLMOutput,
        hidden: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
        history_lengths: Tensor | None,
        tied: bool,
    ) -> dict[str, Tensor]:
        """Means over the batch's targets: SIA, PSA, and the RQ-VAE's loss on the batch's target items."""
        assert self.quantizer is not None
        states_BSM: Any = outputs.encoder_last_hidden_state
        if history_lengths is None:
            pooled_RM = _mean(states_BSM, attention_mask)
            first_RM, labels_RL = hidden[:, 0], labels
        else:
            there_BT = history_lengths > 0
            pooled_RM = prefix_means(states_BSM, attention_mask, history_lengths)[there_BT]
            first_RM, labels_RL = hidden[:, :, 0][there_BT], labels[there_BT]
        target_R = self._targets(labels_RL)
        target_U, place_R = target_R.unique(return_inverse=True)
        items = self.quantizer(self.item_vectors[target_U])
        terms: dict[str, Tensor] = {}
        if self.side == "tokenizer":
            terms["quantization"] = items.loss
        if tied and self.config.sequence_alignment_weight:
            own = self.quantizer.level_distances(self.sequence_adapter(pooled_RM))
            theirs = self.quantizer.level_distances(items.latents)
            terms["sia"] = level_divergence([-d for d in own], [-d[place_R] for d in theirs])
        if tied and self.config.preference_alignment_weight:
            terms["psa"] = pair_nce(
                self.preference_adapter(first_RM),
                self.quantizer.scaler(items.reconstruction)[place_R],
                temperature=float(self.config.preference_temperature),
                targets=target_R,
                symmetric=True,
            )
        return {"sia": pooled_RM.new_zeros(()), "psa": pooled_RM.new_zeros(())} | terms if tied else terms

    def _targets(self, labels_RL: Tensor) -> Tensor:
        """Catalogue rows (R,) of labelled items."""
        if self._trie is None:
            raise IncompatibleComponentsError("the model knows no catalogue: call set_catalogue(tokenizer.codes).")
        self._trie = self._trie.to(labels_RL.device)
        offsets_L = torch.tensor(self.config.level_offsets, device=labels_RL.device)
        codes_RL = labels_RL[:, : self.config.num_levels] - offsets_L
        target_R = self._trie.first_items(self._trie.lookup(codes_RL))
        if bool((target_R < 0).any()):
            row = int((target_R < 0).nonzero()[0])
            raise IncompatibleComponentsError(
                f"target {row} of the batch has codes {codes_RL[row].tolist()}, which no item of this index version has: "
                "make collators anew after a re-assignment."
            )
        return target_R

    @torch.no_grad()
    def _count(self, terms: dict[str, Tensor]) -> None:
        self._steps += 1
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()


def _adapter(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


def _mean(states_BSM: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return states_BSM.mean(1)
    weight_BS1 = attention_mask.to(states_BSM.dtype).unsqueeze(-1)
    return (states_BSM * weight_BS1).sum(1) / weight_BS1.sum(1).clamp(min=1)


def prefix_means(states_BSM: Tensor, attention_mask: Tensor | None, history_lengths_BT: Tensor) -> Tensor:
    """(B, T, M): mean encoder state of each prefix of a window, from one running sum.

    Example:
        >>> states, mask = torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[0, 1, 1]])
        >>> prefix_means(states, mask, torch.tensor([[1, 2]])).flatten().tolist()
        [1.0, 2.0]
    """
    if attention_mask is None:
        attention_mask = torch.ones(states_BSM.shape[:2], dtype=torch.long, device=states_BSM.device)
    sums_BSM = (states_BSM * attention_mask.to(states_BSM.dtype).unsqueeze(-1)).cumsum(1)
    ends_BT1 = prefix_ends(attention_mask, history_lengths_BT).unsqueeze(-1)
    chosen_BTM = sums_BSM.gather(1, ends_BT1.expand(-1, -1, states_BSM.shape[-1]))
    return chosen_BTM / history_lengths_BT.clamp(min=1).unsqueeze(-1)


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is called with inside the block."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()
