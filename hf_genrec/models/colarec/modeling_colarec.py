"""ColaRec: content-based collaborative generation with a T5 that also indexes items by their content (arXiv 2403.18480).

The encoder reads items, not their codes: a free vector of the item followed by the tokens of its content, after a token that
says whether a user's items or one item follow. The decoder writes the codes, which come from collaborative vectors, so the
model ties content to collaboration. Four tasks share encoder and decoder:

- user -> code of the next item, and item content -> its own code (*indexing*, for the target and for a sampled other item);
- BPR between the encoder state of the user and those of target and other item;
- contrast: the target's state is nearer to that of an item of the same cluster (all codes but the last) than to the other's.

The head of a level sees the tokens of its level alone (T5LevelsForConditionalGeneration), so levels share no rows.

*Relations*: see `ColaRecConfig`. The paper's item side also reads vectors of the item's users; users have no vectors here.

Shapes: B users, T items or targets of a window, L levels, N items, C content tokens, S encoder positions, M width,
R rows of the item side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Model
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.t5 import T5State
from hf_genrec.generation.trie import ItemTrie
from hf_genrec.models.item_timeline import whole_items
from hf_genrec.models.t5_levels import T5LevelsForConditionalGeneration, apply_options
from hf_genrec.models.t5_packed import packed_decode, prefix_states

from .configuration_colarec import ColaRecConfig

USER, ITEM = 0, 1  # rows of the task table


class ColaRecModel(T5Model):
    """The encoder-decoder without heads: what `AutoModel` gives for a ColaRec checkpoint."""

    config_class = ColaRecConfig  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: ColaRecConfig):
        super().__init__(config)
        apply_options(self, config)


class ColaRecForConditionalGeneration(T5LevelsForConditionalGeneration):
    """T5 from item contents to item codes.

    Example:
        >>> config = ColaRecConfig(codebook_sizes=[4, 4], num_items=3, content_vocab_size=9, content_length=2, d_model=16,
        ...                        d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1)
        >>> model = ColaRecForConditionalGeneration(config).eval()
        >>> model.set_catalogue([[0, 1], [2, 3], [2, 0]])
        >>> model.set_content([[5, 6], [7, -1], [8, 6]])
        >>> model(input_ids=torch.tensor([[4, 9]]), labels=torch.tensor([[6, 11]])).logits.shape
        torch.Size([1, 2, 12])
    """

    config_class = ColaRecConfig  # not an annotation: postponed annotations would reach transformers as strings

    item_codes: Tensor
    content_tokens: Tensor

    def __init__(self, config: ColaRecConfig):
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items, config.d_model)
        self.content_embedding = nn.Embedding(config.content_vocab_size, config.d_model)
        self.task_embedding = nn.Embedding(2, config.d_model)
        # the catalogue travels with the weights
        self.register_buffer("item_codes", torch.zeros(config.num_items, config.num_levels, dtype=torch.int32))
        self.register_buffer(
            "content_tokens", torch.full((config.num_items, config.content_length), -1, dtype=torch.int32)
        )
        self._trie: ItemTrie | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        own = (getattr(self, name, None) for name in ("item_embedding", "content_embedding", "task_embedding"))
        if any(module is table for table in own):
            init.normal_(module.weight, std=self.config.initializer_factor * self.config.item_embedding_std)
        elif module is self and "content_tokens" in self._buffers:
            init.zeros_(self.item_codes)
            init.constant_(self.content_tokens, -1)

    def set_catalogue(self, item_codes: Any) -> None:
        """Store the codes (N, L) of the catalogue.

        Raises:
            IncompatibleComponentsError: a shape differs from the configuration, or two items share a code: the encoder
                must know an item by its code.
        """
        codes = torch.tensor(np.asarray(item_codes)).to(self.item_codes)
        if codes.shape != self.item_codes.shape:
            raise IncompatibleComponentsError(
                f"set_catalogue: item_codes has shape {tuple(codes.shape)}, the configuration says "
                f"{tuple(self.item_codes.shape)}; build the configuration with from_tokenizer of the same catalogue."
            )
        shared = len(codes) - len(torch.unique(codes, dim=0))
        if shared:
            raise IncompatibleComponentsError(
                f"{shared} items share their codes with another, and ColaRec finds the content of an item by its codes: use "
                "collisions 'counter', or a tree with a unique leaf."
            )
        self.item_codes.copy_(codes)
        self._trie = None

    def set_content(self, content_tokens: Any) -> None:
        """Store the content tokens (N, <= C) of the catalogue, -1 behind the end; longer contents are cut to C.

        Raises:
            IncompatibleComponentsError: another number of items, a token outside the content vocabulary.
        """
        tokens = torch.tensor(np.asarray(content_tokens))[:, : self.config.content_length]
        if len(tokens) != self.config.num_items:
            raise IncompatibleComponentsError(
                f"set_content: {len(tokens)} contents for a catalogue of {self.config.num_items} items."
            )
        if tokens.numel() and int(tokens.max()) >= self.config.content_vocab_size:
            raise IncompatibleComponentsError(
                f"set_content: token {int(tokens.max())} is outside content_vocab_size {self.config.content_vocab_size}."
            )
        self.content_tokens.fill_(-1)
        self.content_tokens[:, : tokens.shape[1]] = tokens.to(self.content_tokens)

    def _codes_trie(self, device: torch.device) -> ItemTrie:
        if self._trie is None or self._trie.device != device:
            self._trie = ItemTrie.from_codes(self.item_codes.cpu(), list(self.config.codebook_sizes)).to(device)
        return self._trie

    def item_rows(self, tokens_L: Tensor) -> Tensor:
        """Catalogue row of each item by its tokens (..., L), -1 for none."""
        offsets = torch.tensor(self.config.level_offsets, device=tokens_L.device)
        codes = (tokens_L - offsets).clamp(min=-1)
        trie = self._codes_trie(tokens_L.device)
        return trie.first_items(trie.lookup(codes.reshape(-1, codes.shape[-1]))).view(tokens_L.shape[:-1])

    # -- the encoder's input ----------------------------------------------------------------------------------------

    def _encode(self, rows_BT: Tensor, task: int) -> tuple[Tensor, Tensor, Tensor]:
        """States (B, S, M) of items in order, the mask (B, S) and the tokens of each item (B, T); S = 1 + T (1 + C).

        A row of -1 is no item.
        """
        batch, length = rows_BT.shape
        known_BT, safe_BT = rows_BT >= 0, rows_BT.clamp(min=0)
        content_BTC = self.content_tokens[safe_BT].long()
        vectors = torch.cat(
            [self.item_embedding(safe_BT).unsqueeze(2), self.content_embedding(content_BTC.clamp(min=0))], dim=2
        )
        mask_BTC = torch.cat([known_BT.unsqueeze(2), (content_BTC >= 0) & known_BT.unsqueeze(2)], dim=2)
        task_B1M = self.task_embedding.weight[task].expand(batch, 1, -1)
        inputs_BSM = torch.cat([task_B1M, vectors.flatten(1, 2)], dim=1)
        mask_BS = F.pad(mask_BTC.flatten(1, 2), (1, 0), value=True)
        more: dict[str, Any] = {}
        if self.config.causal_encoder:
            number_T = torch.arange(1, length + 1, device=rows_BT.device).repeat_interleave(mask_BTC.shape[2])
            more["item_numbers"] = F.pad(number_T, (1, 0)).expand(batch, -1)
        states_BSM = self.encoder(inputs_embeds=inputs_BSM, attention_mask=mask_BS.long(), **more)[0]
        return states_BSM, mask_BS.long(), mask_BTC.sum(2)

    def _encode_history(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        ids_BTL, real_BT = whole_items(input_ids, attention_mask, self.config.num_levels)
        rows_BT = torch.where(real_BT, self.item_rows(ids_BTL), -1)
        # real items first: the task token stands before them whatever the padding side
        order_BT = torch.argsort((~real_BT).int(), dim=1, stable=True)
        return self._encode(rows_BT.gather(1, order_BT), USER)

    @staticmethod
    def _visible(tokens_BT: Tensor, items_BT: Tensor) -> Tensor:
        """Encoder tokens that a target may see (B, T), the task token included, by the number of items it may see."""
        seen_BT = F.pad(tokens_BT.cumsum(1), (1, 0))
        return torch.where(items_BT > 0, 1 + seen_BT.gather(1, items_BT.clamp(max=tokens_BT.shape[1])), 0)

    # -- training ---------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        history_lengths: torch.LongTensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """As `T5LevelsForConditionalGeneration.forward`, packed or not; the loss holds all four tasks.

        Raises:
            IncompatibleComponentsError: histories that are not whole items; packed labels without `causal_encoder`.
        """
        if labels is None or encoder_outputs is not None or input_ids is None:
            if encoder_outputs is None and input_ids is not None:
                states, attention_mask, _ = self._encode_history(input_ids, attention_mask)
                encoder_outputs, input_ids = BaseModelOutput(last_hidden_state=states), None
            kwargs.pop("return_dict", None)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoder_outputs=encoder_outputs,
                labels=labels,
                num_items_in_batch=num_items_in_batch,
                return_dict=True,
                **kwargs,
            )
        packed = labels.dim() == 3
        if packed and (not self.config.causal_encoder or history_lengths is None):
            raise IncompatibleComponentsError(
                "packed labels need causal_encoder=True in the configuration and history_lengths (B, T) beside them."
            )
        states_BSM, mask_BS, tokens_BT = self._encode_history(input_ids, attention_mask)
        labels_BTL = labels if packed else labels.unsqueeze(1)
        if history_lengths is None:
            visible_BT = mask_BS.sum(1, keepdim=True)
        else:
            visible_BT = self._visible(tokens_BT, history_lengths // self.config.num_levels)
        logits = self._logits(labels_BTL, states_BSM, mask_BS, visible_BT)
        if self.config.restrict_to_level and labels.device.type == "cpu":
            self._check_labels(labels)
        logits = self._restrict_to_level(logits, 0) if self.config.restrict_to_level else logits
        outputs = Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=states_BSM)
        generation = super().training_loss(outputs, labels_BTL, mask_BS, num_items_in_batch)
        outputs.loss = self._all_losses(
            generation, labels_BTL, prefix_states(states_BSM, mask_BS, visible_BT), num_items_in_batch
        )
        outputs.logits = logits if packed else logits.squeeze(1)
        return outputs

    def _logits(self, labels_BTL: Tensor, states_BSM: Tensor, mask_BS: Tensor, visible_BT: Tensor) -> Tensor:
        inputs = self.decoder.embed_tokens(self._shift_right(labels_BTL))
        hidden = packed_decode(self.decoder, inputs, states_BSM, mask_BS, visible_BT)
        if self.config.scale_decoder_outputs:
            hidden = hidden * (self.model_dim**-0.5)
        return self.lm_head(hidden)

    def _all_losses(
        self, generation: Tensor, labels_BTL: Tensor, users_BTM: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        config = self.config
        loss = config.generation_weight * generation
        if not (config.indexing or config.ranking_weight or config.contrast_weight):
            return loss
        real = (labels_BTL[..., : config.num_levels] >= 0).all(-1)
        chosen = real.nonzero()
        if config.indexed_items is not None and len(chosen) > config.indexed_items:
            chosen = chosen[torch.randperm(len(chosen), device=chosen.device)[: config.indexed_items]]
        target_R = self.item_rows(labels_BTL[chosen[:, 0], chosen[:, 1], : config.num_levels])
        same_R = self._of_same_cluster(target_R)
        other_R = self._another(target_R, same_R)
        state_RM, index_loss = self._item_side(torch.cat([target_R, other_R]), same_R)
        target_RM, other_RM, same_RM = state_RM.chunk(3)
        user_RM = users_BTM[chosen[:, 0], chosen[:, 1]]
        extra = config.generation_weight * index_loss
        if config.ranking_weight:
            extra = extra - config.ranking_weight * F.logsigmoid((user_RM * (target_RM - other_RM)).sum(-1)).mean()
        if config.contrast_weight:
            extra = extra - config.contrast_weight * F.logsigmoid((target_RM * (same_RM - other_RM)).sum(-1)).mean()
        if num_items_in_batch is not None:  # means of this part of the step -> its share of the step
            extra = extra * (labels_BTL >= 0).sum() / num_items_in_batch
        return loss + extra

    def _item_side(self, coded_R: Tensor, same_R: Tensor) -> tuple[Tensor, Tensor]:
        """States of all items, and the loss of writing the codes of `coded_R` (0 without `indexing`)."""
        rows_R1 = torch.cat([coded_R, same_R]).unsqueeze(1)
        states_RSM, mask_RS, _ = self._encode(rows_R1, ITEM)
        visible_R1 = mask_RS.sum(1, keepdim=True)
        state_RM = prefix_states(states_RSM, mask_RS, visible_R1).squeeze(1)
        if not self.config.indexing:
            return state_RM, state_RM.new_zeros(())
        count = len(coded_R)
        offsets = torch.tensor(self.config.level_offsets, device=coded_R.device)
        labels_R1L = (self.item_codes[coded_R].long() + offsets).unsqueeze(1)
        logits = self._logits(labels_R1L, states_RSM[:count], mask_RS[:count], visible_R1[:count])
        if self.config.restrict_to_level:
            logits = self._restrict_to_level(logits, 0)
        # the target and the other item are two tasks of the paper, each a mean
        return state_RM, 2 * F.cross_entropy(logits.flatten(0, 2).float(), labels_R1L.flatten())

    def _of_same_cluster(self, rows_R: Tensor) -> Tensor:
        """A random other item with the same codes but the last, or the item itself where it is alone."""
        trie = self._codes_trie(rows_R.device)
        codes_NL = self.item_codes.long()
        node_N = torch.zeros(len(codes_NL), dtype=torch.long, device=codes_NL.device)
        for level in range(self.config.num_levels - 1):
            node_N = trie.step(level, node_N, codes_NL[:, level])
        order_N = torch.argsort(node_N, stable=True)
        size_P = torch.bincount(node_N)
        start_P = size_P.cumsum(0) - size_P
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        node_R = node_N[rows_R]
        others_R = (size_P[node_R] - 1).clamp(min=1)
        step_R = 1 + (torch.rand(len(rows_R), device=rows_R.device) * others_R).long().clamp(max=others_R - 1)
        place_R = place_N[rows_R] - start_P[node_R]
        return order_N[start_P[node_R] + (place_R + step_R) % size_P[node_R]]

    def _another(self, target_R: Tensor, same_R: Tensor) -> Tensor:
        """A random item that is neither of the two (where the catalogue has one)."""
        count = self.config.num_items
        first, second = torch.minimum(target_R, same_R), torch.maximum(target_R, same_R)
        taken_R = 1 + (first != second).long()
        free_R = (count - taken_R).clamp(min=1)
        pick_R = (torch.rand(len(target_R), device=target_R.device) * free_R).long().clamp(max=free_R - 1)
        pick_R = pick_R + (pick_R >= first).long()
        pick_R = pick_R + ((pick_R >= second) & (first != second)).long()
        return pick_R.clamp(max=count - 1)

    # -- decoding ---------------------------------------------------------------------------------------------------

    def start_decoding(self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None) -> T5State:
        """Encode the items of B users once; S = 0 (nothing known about the user) leaves the task token."""
        states_BSM, mask_BS, _ = self._encode_history(input_ids, attention_mask)
        return self.start_from_encoder(states_BSM, mask_BS)

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, generation_config: Any
    ) -> dict[str, Any]:
        # `generate` passes the mask on to the decoder: it must be that of the encoder's own positions
        states_BSM, mask_BS, _ = self._encode_history(inputs_tensor, model_kwargs.get("attention_mask"))
        return model_kwargs | {
            "encoder_outputs": BaseModelOutput(last_hidden_state=states_BSM),
            "attention_mask": mask_BS,
        }

    @torch.no_grad()
    def indexing_accuracy(self) -> float:
        """Share of the catalogue's items whose content alone, greedily decoded among all codes, gives their own code."""
        was_training = self.training
        self.eval()
        hits = 0
        for rows_R in torch.arange(self.config.num_items, device=self.item_codes.device).split(512):
            states_RSM, mask_RS, _ = self._encode(rows_R.unsqueeze(1), ITEM)
            state = self.start_from_encoder(states_RSM, mask_RS)
            prefix = rows_R.new_empty(len(rows_R), 1, 0)
            for level in range(self.config.num_levels):
                best = self.score_codes(state, prefix, level).argmax(-1, keepdim=True)
                prefix = torch.cat([prefix, best], dim=-1)
            hits += int((prefix.squeeze(1) == self.item_codes[rows_R]).all(-1).sum())
        self.train(was_training)
        return hits / self.config.num_items
