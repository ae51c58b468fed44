"""P5: one text-to-text T5 for all recommendation tasks, with whole-word embeddings (arXiv 2203.13366).

Histories, questions and answers are texts of one vocabulary, item names are part of them; which task is meant says the
wording alone (`alignment/tasks`). All tokens of a word, and of an item name, share one more embedding, added to the
encoder's input. The same model runs over every kind of item name: numbers, titles, paths of new tokens (CID, arXiv
2305.06569).

*Relations*: `whole_word=False, causal_encoder=False, pooled_dropout=False` is `T5ForConditionalGeneration`.

Shapes: B rows, S encoder tokens, T targets of a window, L tokens of a target, K beams, N items.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import T5Model
from transformers import initialization as init

from hf_genrec.errors import IncompatibleComponentsError
from hf_genrec.generation.decoding.t5 import T5State
from hf_genrec.models.t5_levels import T5LevelsForConditionalGeneration, use_pooled_dropout
from hf_genrec.models.t5_packed import use_recency

from .configuration_p5 import P5Config
from .whole_words import install, word_start_flags


@torch.no_grad()
def _init_words(model: Any) -> None:
    encoder = model.encoder
    if encoder.whole_words is not None:
        # as the tokens' own: the numbers are also what tells the decoder which item came last
        init.normal_(encoder.whole_words.weight, mean=0.0, std=model.config.initializer_factor)
    init.constant_(encoder.item_tokens, -1)
    init.constant_(encoder.word_starts, False)


class P5Model(T5Model):
    """The encoder-decoder without a head: what `AutoModel` gives for a P5 checkpoint."""

    config_class = P5Config  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: P5Config) -> None:
        super().__init__(config)
        if config.pooled_dropout:
            use_pooled_dropout(self)
        if config.causal_encoder:
            use_recency(self)
        install(self, config)
        _init_words(self)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self.encoder, "whole_words"):
            _init_words(self)


class P5ForConditionalGeneration(T5LevelsForConditionalGeneration):
    """T5 that writes item names and answers, with whole-word embeddings and the decoding of `RecommendationMixin`.

    After construction, `set_words(tokenizer)` tells it which tokens begin words and which sequences name items.

    Example:
        >>> config = P5Config(vocab_size=30, codebook_sizes=[30, 30], level_offsets=[0, 0], item_end_token_id=4,
        ...                   d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1)
        >>> model = P5ForConditionalGeneration(config)
        >>> model(input_ids=torch.tensor([[5, 6, 4]]), labels=torch.tensor([[7, 4]])).logits.shape
        torch.Size([1, 2, 30])
    """

    config_class = P5Config  # not an annotation: postponed annotations would reach transformers as strings

    def __init__(self, config: P5Config) -> None:
        super().__init__(config)
        install(self, config)
        _init_words(self)
        ends = [token for token in (config.eos_token_id, config.item_end_token_id) if isinstance(token, int)]
        self.generation_config.eos_token_id = list(dict.fromkeys(ends))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self.encoder, "whole_words"):
            _init_words(self)

    def set_catalogue(self, item_codes: Any) -> None:
        """Store the token ids (N, L) that name each item, -1 behind the end of shorter ones.

        Raises:
            IncompatibleComponentsError: when the shape differs from the configuration.
        """
        codes = torch.as_tensor(np.array(item_codes))
        table = self.encoder.item_tokens
        if codes.shape != table.shape:
            raise IncompatibleComponentsError(
                f"set_catalogue: item_codes has shape {tuple(codes.shape)}, the configuration says {tuple(table.shape)}; "
                "build the configuration with from_tokenizer of the same catalogue."
            )
        table.copy_(codes)

    def set_words(self, tokenizer: Any) -> None:
        """Take item names and word boundaries from an `ItemWordsTokenizer`."""
        self.set_catalogue(tokenizer.codes)
        self.encoder.word_starts.copy_(word_start_flags(tokenizer))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        whole_word_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As `T5LevelsForConditionalGeneration.forward`, packed targets included.

        Args:
            whole_word_ids: (B, S) number of the word of each token, from 1, 0 on padding; None = derived from `input_ids`.
        """
        if whole_word_ids is not None and encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, whole_word_ids=whole_word_ids
            )
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, encoder_outputs=encoder_outputs, **kwargs
        )

    def prompted(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Histories (B, S) behind the prompt of the configuration: ids and mask, padding moved to the right."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if not bool(mask.all()):
            order = mask.sort(dim=-1, descending=True, stable=True).indices
            input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        prompt = torch.tensor(list(self.config.prompt_ids), dtype=input_ids.dtype, device=input_ids.device)
        prompt_BP = prompt.expand(input_ids.shape[0], -1)
        return torch.cat([prompt_BP, input_ids], 1), torch.cat([torch.ones_like(prompt_BP), mask], 1)

    def start_decoding(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> T5State:  # type: ignore[override]
        """Encode B histories, the prompt before them, once; see `T5LevelsForConditionalGeneration.start_decoding`."""
        return self._t5_decoder().start_decoding(*self.prompted(input_ids, attention_mask))
