"""Scores and answers of a candidate ranker for given lists: letters, yes or no, likelihood of titles, written lists.

Letters take one pass per user (arXiv 2311.02089). For yes or no (2305.00447) and titles the prompt is read once per user and
every candidate behind its keys and values. Lists are written token by token, and only what continues a candidate not yet
written can be (2305.08845 reads free answers; `ZeroShotRanker` does that, too). Free answers are written without any
constraint, for measuring how many name exactly one candidate (2312.02445).

Shapes: M or B users, C candidates of a list, T tokens, U width of a user vector, H width and x outputs of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_genrec.errors import RequestError
from hf_genrec.generation.ranking.bootstrap import round_scores
from hf_genrec.generation.ranking.list_processor import CandidateListProcessor, split_list
from hf_genrec.generation.search import evaluating

from .prompts import PromptRow, PromptWriter, padded
from .reading import LanguageReader

_ROWS_AT_ONCE = 64  # prompts, or continuations of prompts, in one pass of the language model


class CandidateScoresMixin:
    """`rank_candidates` and `generate_answers` of `CandidateRankerForCausalLM`, whose parts these methods use."""

    config: Any
    device: Any
    language_model: Any
    user_injector: Any
    writer: PromptWriter
    embed: Any
    user_vectors: Any
    retriever_inputs: Any
    text_only: bool

    def rank_candidates(
        self,
        histories: Sequence[Any],
        candidates: Any,
        *,
        disliked: Sequence[Any] | None = None,
        text_only: bool | None = None,
    ) -> Tensor:
        """Scores (M, C) float32 of candidate lists, higher is better, -inf where there is no candidate.

        "letters": log-probability of the candidate's letter among the letters shown, one pass per user. "yes_no":
        log-probability of yes among both answers (log-sigmoid of its logit for "yes_bce"), the prompt read once per user.
        "title": log-likelihood of the candidate's text. "list": C for the candidate that the model writes first, C - 1 for
        the next ... (with several orders of the list the mean).

        Args:
            histories: M lists of item indices, oldest first.
            candidates: (M, C) item indices, -1 = none; a row's items in the order they are shown.
            disliked: M lists of item indices for prompts with the field {disliked}, which need them; `histories` are
                then the liked items.
            text_only: leave the soft tokens out; None = as `self.text_only` says.

        Raises:
            RequestError: lists that do not match, no disliked items for a prompt that shows them apart, more candidates
                than letters, or an item outside the catalogue.
        """
        text_only = self.text_only if text_only is None else text_only
        self._check_disliked(disliked)
        candidates_MC = np.asarray(candidates, np.int64)
        rows = [np.asarray(row, np.int64).reshape(-1) for row in histories]
        no_disliked = np.zeros(0, np.int64)
        bad = [no_disliked] * len(rows) if disliked is None else [np.asarray(r, np.int64).reshape(-1) for r in disliked]
        if candidates_MC.ndim != 2 or len(candidates_MC) != len(rows) or len(bad) != len(rows):
            raise RequestError(
                f"{len(rows)} histories, {len(bad)} disliked lists and candidates of shape {candidates_MC.shape}: give one "
                "row of each per user."
            )
        for place, items in enumerate(zip(rows, bad, candidates_MC, strict=True)):
            named = np.concatenate(items)
            if named.size and (named.max() >= self.config.num_items or min(map(_least, items[:2])) < 0):
                raise RequestError(
                    f"row {place}: an item index is outside 0..{self.config.num_items - 1}; pass indices of this "
                    "catalogue."
                )
        scores = []
        with evaluating(self):
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                users = self._users(rows[part], text_only)
                scores.append(self._score(rows[part], candidates_MC[part], users, bad[part], text_only, start))
        return torch.cat(scores) if scores else torch.zeros(candidates_MC.shape)

    def _check_disliked(self, disliked: Any) -> None:
        if self.config.rated_history and disliked is None:
            raise RequestError(
                "this ranker's prompt shows liked and disliked items apart, which a history of items does not tell: call "
                "rank_candidates(liked, candidates, disliked=...), or build and train the ranker with a wording without "
                "{disliked}."
            )

    def _users(self, histories: Sequence[np.ndarray], text_only: bool) -> Tensor | None:
        if self.user_injector is None or text_only:
            return None
        return self.user_vectors(*self.retriever_inputs(histories))

    def _score(
        self,
        histories: Sequence[np.ndarray],
        candidates_BC: np.ndarray,
        user_BU: Tensor | None,
        disliked: Sequence[np.ndarray] | None = None,
        text_only: bool = False,
        first_row: int = 0,
    ) -> Tensor:
        """`rank_candidates` in one or several orders of the lists."""
        rounds, listed = self.config.candidate_permutations, "candidates" in self.config.prompt
        if not rounds or not listed:
            return self._score_shown(histories, candidates_BC, user_BU, disliked, text_only, first_row)
        total = torch.zeros(candidates_BC.shape, device=self.device)
        for number in range(rounds):
            order = np.stack([_permutation(row, number) for row in candidates_BC])
            shuffled = np.take_along_axis(candidates_BC, order, 1)
            scores = self._score_shown(histories, shuffled, user_BU, disliked, text_only, first_row)
            total.scatter_add_(1, torch.from_numpy(order).to(total.device), scores)
        return total / rounds

    def _score_shown(
        self,
        histories: Sequence[np.ndarray],
        candidates_BC: np.ndarray,
        user_BU: Tensor | None,
        disliked: Sequence[np.ndarray] | None,
        text_only: bool,
        first_row: int,
    ) -> Tensor:
        reader, writer, kind = LanguageReader(self.language_model), self.writer, self.config.verbalizer
        count = candidates_BC.shape[1]
        scores = torch.full((len(histories), count), -torch.inf, device=self.device)
        at_once = _ROWS_AT_ONCE if kind in ("letters", "list") else max(1, _ROWS_AT_ONCE // max(1, count))
        for start in range(0, len(histories), at_once):
            rows = range(start, min(start + at_once, len(histories)))
            lists = [candidates_BC[row][candidates_BC[row] >= 0] for row in rows]
            further = [[self._continuation(int(i), text_only) for i in items] for items in lists]
            reserve = [max((len(one.ids) for one in row), default=0) + 1 for row in further]
            if kind == "list":
                reserve = [sum(len(writer.titles[int(i)]) + 1 for i in items) for items in lists]
            prompts = [
                writer.write(
                    histories[row],
                    items,
                    () if disliked is None else disliked[row],
                    text_only=text_only,
                    reserve=room,
                    where=f"row {first_row + row}",
                )
                for row, items, room in zip(rows, lists, reserve, strict=True)
            ]
            users = None if user_BU is None else user_BU[rows.start : rows.stop]
            batch = {name: part.to(self.device) for name, part in padded(prompts, 0, left=True).items()}
            embeds = self.embed(batch["input_ids"], batch["slot_items"], users)
            mask = batch["attention_mask"]
            if kind == "letters":
                last = reader.outputs(embeds, mask)[0][:, -1]
                found = self._letter_scores(reader, last, [len(items) for items in lists])
            elif kind == "list":
                found = self._written_scores(embeds, mask, lists)
            else:
                last, cache = reader.read(embeds, mask)
                found = self._continued_scores(reader, embeds, mask, cache, last, further)
            for place, row in enumerate(rows):
                shown = torch.from_numpy(np.flatnonzero(candidates_BC[row] >= 0)).to(self.device)
                scores[row, shown] = found[place, : len(shown)]
        return scores

    def _continuation(self, item: int, text_only: bool) -> PromptRow:
        """What is read of one candidate behind the prompt."""
        if self.config.verbalizer == "yes_no":
            return self.writer.target(item, text_only)
        return PromptRow(self.writer.answer(item) if self.config.verbalizer == "title" else [])

    def _answers(self) -> Tensor:
        return torch.tensor(list(self.config.answer_tokens), device=self.device)

    def _letter_scores(self, reader: LanguageReader, last_Bx: Tensor, counts: list[int]) -> Tensor:
        logits = reader.logits(last_Bx, self._answers())
        shown = (
            torch.arange(logits.shape[1], device=logits.device) < torch.tensor(counts, device=logits.device)[:, None]
        )
        return logits.masked_fill(~shown, -torch.inf).log_softmax(-1)

    def _written_scores(self, embeds_BTH: Tensor, mask_BT: Tensor, lists: Sequence[np.ndarray]) -> Tensor:
        """Scores (B, C) by the place in the list that the model writes, the likeliest token at each step."""
        between, end = (int(token) for token in self.config.answer_end)
        texts = [[tuple(self.writer.titles[int(item)]) for item in items] for items in lists]
        scores = torch.full((len(lists), max(map(len, lists), default=0)), -torch.inf)
        rows = [row for row, named in enumerate(texts) if named]  # a request without candidates asks nothing
        if rows:
            processor = CandidateListProcessor(
                [texts[row] for row in rows], 0, separator_token_id=between, eos_token_id=end
            )
            written = self.language_model.generate(
                inputs_embeds=embeds_BTH[rows],
                attention_mask=mask_BT[rows],
                max_new_tokens=max(sum(len(text) + 1 for text in set(texts[row])) for row in rows),
                do_sample=False,
                **{"num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": end},
                eos_token_id=end,
                logits_processor=[processor],
            ).tolist()
            for row, answer in zip(rows, written, strict=True):
                parts = split_list(answer[: answer.index(end)], between)
                # candidates of equal texts follow one another
                order = [place for part in parts for place, text in enumerate(texts[row]) if text == part]
                scores[row, : len(order)] = torch.from_numpy(round_scores(order, len(texts[row]))).float()
        return scores.to(self.device)

    def _continued_scores(
        self,
        reader: LanguageReader,
        embeds_BTH: Tensor,
        mask_BT: Tensor,
        cache: Any,
        last_Bx: Tensor,
        further: list[list[PromptRow]],
    ) -> Tensor:
        """Scores (B, C) of continuations behind the prompts; lists shorter than C are filled up with nonsense."""
        count = max((len(row) for row in further), default=0)
        if not count:
            return last_Bx.new_zeros(len(further), 0)
        filled = [[*row, *[PromptRow([0])] * (count - len(row))] for row in further]
        flat = padded([one for row in filled for one in row], 0, left=False)
        batch = {name: part.to(self.device) for name, part in flat.items()}
        ids, mask = (batch[name].unflatten(0, (len(further), count)) for name in ("input_ids", "attention_mask"))
        embeds = self.embed(batch["input_ids"], batch["slot_items"]).unflatten(0, (len(further), count))
        output = reader.read_on(embeds_BTH, mask_BT, cache, embeds, mask)
        if self.config.verbalizer == "yes_no":
            end = (mask.sum(-1) - 1).clamp(min=0)
            chosen = output.gather(2, end[..., None, None].expand(-1, -1, 1, output.shape[-1])).squeeze(2).flatten(0, 1)
            logits = reader.logits(chosen, self._answers())
            bce = self.config.answer_loss == "yes_bce"
            scores = F.logsigmoid(logits[:, 0]) if bce else logits.log_softmax(-1)[:, 0]
            return scores.unflatten(0, (len(further), count))
        # token q of a title is predicted from the token before it, the first one from the prompt
        first = last_Bx[:, None, None].expand(-1, count, 1, -1)
        before = torch.cat([first, output[:, :, :-1]], dim=2)
        real = mask.bool()
        logp = torch.zeros(ids.shape, device=self.device)
        logits = reader.logits(before[real])
        logp[real] = logits.gather(1, ids[real][:, None]).squeeze(1) - logits.logsumexp(-1)
        return logp.sum(-1)

    @torch.no_grad()
    def generate_answers(
        self,
        histories: Sequence[Any],
        candidates: Any,
        *,
        disliked: Sequence[Any] | None = None,
        text_only: bool | None = None,
        **generate: Any,
    ) -> list[list[int]]:
        """The language model's free answers to the prompts, greedy unless told otherwise: token ids without the prompt.

        Decode them with the language model's tokenizer and match them by `closed_set_answers`; nothing here keeps an answer
        to the candidates, so this is what a valid-answer rate is measured on.

        Args:
            histories, candidates, disliked, text_only: as in `rank_candidates`.
            generate: options of `generate` (`max_new_tokens`, default the longest title and its end).
        """
        text_only = self.text_only if text_only is None else text_only
        self._check_disliked(disliked)
        table = np.asarray(candidates, np.int64)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max(map(len, self.writer.titles)) + 8}
        if self.config.answer_end:
            options |= {
                "eos_token_id": int(self.config.answer_end[-1]),
                "pad_token_id": int(self.config.answer_end[-1]),
            }
        options |= generate
        answers: list[list[int]] = []
        with evaluating(self):
            for start in range(0, len(histories), _ROWS_AT_ONCE):
                rows = range(start, min(start + _ROWS_AT_ONCE, len(histories)))
                own = [np.asarray(histories[row], np.int64) for row in rows]
                prompts = [
                    self.writer.write(
                        own[place],
                        table[row][table[row] >= 0],
                        () if disliked is None else disliked[row],
                        text_only=text_only,
                        reserve=int(options["max_new_tokens"]),
                        where=f"row {row}",
                    )
                    for place, row in enumerate(rows)
                ]
                users = self._users(own, text_only)
                batch = {name: part.to(self.device) for name, part in padded(prompts, 0, left=True).items()}
                embeds = self.embed(batch["input_ids"], batch["slot_items"], users)
                written = self.language_model.generate(
                    inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options
                )
                answers += [[int(token) for token in row] for row in written]
        return answers


def _least(items: np.ndarray) -> int:
    return int(items.min()) if len(items) else 0


def _permutation(items: np.ndarray, number: int) -> np.ndarray:
    """A random order of a list that depends on its members and the round alone, not on how the list came in."""
    there = np.flatnonzero(items >= 0)
    place = there[np.argsort(items[there], kind="stable")]
    generator = np.random.default_rng([number, *items[place].tolist()])
    return np.concatenate([place[generator.permutation(len(place))], np.flatnonzero(items < 0)])
