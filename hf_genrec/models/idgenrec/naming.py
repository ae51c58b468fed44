"""Names for items out of a text generator: diverse beams until every item has one that nobody else has (2403.19021).

Shapes: M items, S tokens of a text, G groups (candidates of an item), L tokens of a name with its end token, V words,
d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_genrec.generation.search import evaluating
from hf_genrec.identifiers.collision_texts import pick_unique
from hf_genrec.identifiers.keywords import Name, lengthen, name_table

_ITEMS_PER_CALL = 256  # bounds memory, changes nothing else


@torch.no_grad()
def diverse_names(
    generator: Any,
    texts_MS: Tensor,
    *,
    num_names: int,
    levels: int,
    end_token: int,
    barred: Sequence[int],
    diversity_penalty: float = 0.5,
    min_words: int = 1,
) -> Tensor:
    """Tokens (M, G, L) of G names per item, -1 behind the end; group 0 is the greedy name.

    Groups of one beam each, one after the other at every step: a word costs `diversity_penalty` for each earlier group that
    took it at this step (Hamming diversity, arXiv 1610.02424). No word comes twice in a name, and names may not end
    before `min_words` words nor go on behind L - 1.

    Args:
        generator: a T5; in evaluation mode.
        texts_MS: word ids, -1 = padding.
        barred: tokens that are no words.
    """
    mask_MS = texts_MS >= 0
    mask_MS[:, 0] = True  # a text without words is one padding token
    pad = int(generator.config.pad_token_id)
    states = generator.encoder(input_ids=texts_MS.clamp(min=0), attention_mask=mask_MS.long()).last_hidden_state
    items, vocabulary = len(texts_MS), generator.lm_head.out_features
    names = torch.full((items, num_names, levels), -1, dtype=torch.long, device=texts_MS.device)
    ended = torch.zeros(items, num_names, dtype=torch.bool, device=texts_MS.device)
    scale = generator.model_dim**-0.5 if generator.config.scale_decoder_outputs else 1.0
    shut = torch.zeros(vocabulary, dtype=torch.bool, device=texts_MS.device)
    shut[list(barred)] = True
    for level in range(levels):
        groups = 1 if level == 0 else num_names  # nothing tells the groups apart yet
        prefix = torch.nn.functional.pad(names[:, :groups, :level].clamp(min=pad).flatten(0, 1), (1, 0), value=pad)
        hidden = generator.decoder(
            input_ids=prefix,
            encoder_hidden_states=states.repeat_interleave(groups, 0),
            encoder_attention_mask=mask_MS.long().repeat_interleave(groups, 0),
        ).last_hidden_state[:, -1]
        logp = generator.lm_head(hidden * scale).float().log_softmax(-1).view(items, groups, vocabulary)
        logp = logp.masked_fill(shut, -torch.inf).expand(items, num_names, vocabulary).clone()
        logp.scatter_(2, names[:, :, :level].clamp(min=pad), -torch.inf)  # used words, and padding, which is barred
        if level < min_words:
            logp[:, :, end_token] = -torch.inf
        if level == levels - 1:
            logp[:] = -torch.inf
            logp[:, :, end_token] = 0.0
        used_MV = torch.zeros(items, vocabulary, device=logp.device)
        for group in range(num_names):
            token_M = (logp[:, group] - diversity_penalty * used_MV).argmax(-1)
            going_M = ~ended[:, group]
            names[:, group, level] = torch.where(going_M, token_M, -1)
            used_MV.scatter_add_(1, token_M.unsqueeze(1), going_M.to(used_MV.dtype).unsqueeze(1))
            ended[:, group] |= token_M == end_token
    return names


def generate_names(
    generator: Any,
    texts_MS: Tensor,
    *,
    levels: int,
    end_token: int,
    barred: Sequence[int],
    taken: Iterable[Name] = (),
    priority: Any | None = None,
    num_names: int = 5,
    rounds: int = 4,
    diversity_penalty: float = 0.5,
) -> np.ndarray:
    """Codes (M, L) of a name for each item: no two items share one, and nobody gets one of `taken`.

    Every round asks for `num_names` candidates of the items still without a name, each time with a larger diversity
    penalty and longer names; items choose in the order of `priority`. What no round could name (many equal texts) gets the
    first word behind its best name that makes it new, so the procedure always ends.

    Args:
        taken: names (words without the end token) of other items.
        priority: (M,) larger chooses first; None = catalogue order.

    Raises:
        IncompatibleComponentsError: the vocabulary does not make enough different names.
    """
    order = np.arange(len(texts_MS)) if priority is None else np.argsort(-np.asarray(priority), kind="stable")
    used: set[Name] = set(taken)
    found: dict[int, Name] = {}
    best: dict[int, Name] = {}
    left = order
    options: dict[str, Any] = {"levels": levels, "end_token": end_token, "barred": barred, "num_names": num_names}
    with evaluating(generator):
        for step in range(rounds):
            parts = [
                diverse_names(
                    generator,
                    texts_MS[torch.as_tensor(rows)],
                    diversity_penalty=diversity_penalty * (1 + step),
                    min_words=min(1 + step, levels - 1),
                    **options,
                )
                for rows in np.array_split(left, -(-len(left) // _ITEMS_PER_CALL))
            ]
            candidates = [
                [tuple(token for token in name if token >= 0 and token != end_token) for name in item]
                for item in torch.cat(parts).tolist()
            ]
            best |= {int(item): names[0] for item, names in zip(left, candidates) if int(item) not in best}
            chosen = pick_unique(candidates, used)
            for item, names, place in zip(left.tolist(), candidates, chosen.tolist()):
                if place >= 0:
                    found[item] = names[place]
            used |= {found[item] for item in left.tolist() if item in found}
            left = np.array([item for item in left.tolist() if item not in found], dtype=np.int64)
            if not len(left):
                break
    closed = {*barred, end_token}
    words = [word for word in range(generator.lm_head.out_features) if word not in closed]
    for item in left.tolist():
        found[item] = lengthen(best[item], words, used, levels - 1)
        used.add(found[item])
    return name_table([found[item] for item in range(len(texts_MS))], end_token, levels)
