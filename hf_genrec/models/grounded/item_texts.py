"""Items in a text of item names: which item each stretch of tokens up to an end token names.

Shapes: B rows, T tokens, S items of a row, N items, L tokens of the longest item text.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ItemTexts:
    """The token texts of a catalogue.

    Args:
        tokens_NL: token ids that name each item, -1 behind the end; the end token closes each.
        end_token_id: that token.

    Example:
        >>> texts = ItemTexts(torch.tensor([[5, 6, 2], [7, 2, -1], [5, 6, 2]]), end_token_id=2)
        >>> texts.rows(torch.tensor([[0, 7, 2, 5, 6, 2, 9, 2]]), torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])).tolist()
        [[1, 0, -1]]
    """

    def __init__(self, tokens_NL: Tensor, end_token_id: int):
        self.end = int(end_token_id)
        self.texts = [
            tuple(token for token in row if token >= 0 and token != self.end) for row in tokens_NL.cpu().tolist()
        ]
        self.item_of: dict[tuple[int, ...], int] = {}
        for item, text in enumerate(self.texts):
            self.item_of.setdefault(text, item)  # of several with the same text, the first

    def rows(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Items (B, S) of each row of tokens, oldest first, -1 = unknown text; padded with -1 on the right."""
        found = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist()):
            items: list[int] = []
            text: list[int] = []
            for token in (token for token, real in zip(ids, mask) if real):
                if token == self.end:
                    items.append(self.item_of.get(tuple(text), -1))
                    text = []
                else:
                    text.append(token)
            found.append(items)
        width = max((len(items) for items in found), default=0)
        padded = [items + [-1] * (width - len(items)) for items in found]
        return torch.tensor(padded, dtype=torch.long, device=input_ids.device).view(len(found), width)
