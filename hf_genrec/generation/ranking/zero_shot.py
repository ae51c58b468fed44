"""Zero-shot ranking: a frozen chat model orders the candidates of a retriever (LLMRank, arXiv 2305.08845).

The chat model is any function from conversations to answers: `ChatModel` (transformers), `ChatEndpoint` (a server), or one
of your own. Each user is asked `rounds` times, every time with the candidates in another order of its own, and the scores
of the answers are summed. Candidates that no answer names follow at the end in the retriever's order; nothing is dropped,
and what the right answer is plays no part anywhere.

Relations: `rounds=1, shuffle=False` is one question in the retriever's order. `constrained=True` lets the model write nothing
but the candidates (`ChatModel.complete_lists`), so that every answer is a complete ranking.

Shape legend: M users, C candidates, N items, k items returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...errors import IncompatibleComponentsError, RequestError
from .bootstrap import draw_permutation, request_keys, summed_scores
from .parse import ParsedRanking, RankingParser
from .prompts import Message, RankingPrompt, written_title

Chat = Callable[[list[list[Message]]], list[str]]
_QUESTIONS_AT_ONCE = 256  # what is handed to the chat function; it batches by itself


@dataclass
class AnswerCounts:
    """What a ranker's answers were like, summed up over its calls. All-valid answers have `named == asked`.

    Attributes:
        answers: answers read (further attempts too).
        unreadable: answers that name no candidate.
        repaired: answers that name some, but not all candidates once and nothing else: what is missing was put at the end,
            lines that name none and repeats were passed over.
        asked, named: candidates that stood in the prompts, and those that the answers named.
        unknown_lines: lines that name no candidate.
    """

    answers: int = 0
    unreadable: int = 0
    repaired: int = 0
    asked: int = 0
    named: int = 0
    unknown_lines: int = 0

    def to_dict(self) -> dict[str, float]:
        """The counts, and shares of the answers (`unreadable`, `repaired`) and of the candidates (`named`)."""
        shares = {
            "unreadable_share": self.unreadable / max(self.answers, 1),
            "repaired_share": self.repaired / max(self.answers, 1),
            "named_share": self.named / max(self.asked, 1),
        }
        return asdict(self) | {name: round(share, 4) for name, share in shares.items()}


class ZeroShotRanker:
    """Scores candidates by asking a chat model.

    Args:
        chat: from a list of conversations to as many answers.
        titles: N item titles, by item index.
        prompt: how the question is written.
        rounds: how often each user is asked (authors: 3).
        shuffle: draw a permutation of the candidates for each user and round; False asks in the given order.
        seed: of the permutations.
        constrained: only candidates can be written; needs a `chat` with `complete_lists`.
        retries: further attempts for an answer that names no candidate, each with a new permutation.
        missing_score: of a candidate that an answer does not name, against C, C - 1, ... of the named ones. 0 forgives an
            omission in one of several rounds; the authors' -1e4 does not.

    Raises:
        RequestError: a number out of range.
        IncompatibleComponentsError: `constrained` without `complete_lists`; when called, a chat function that does not
            return one string per conversation.

    Example:
        >>> def by_name(conversations):
        ...     lists = [c[0]["content"].split("next:")[1].split("Rank all")[0] for c in conversations]
        ...     return ["\\n".join(sorted(part.strip().splitlines(), key=lambda line: line.split(". ")[1])) for part in lists]
        >>> ZeroShotRanker(by_name, ["Up", "Heat", "Alien"], rounds=2).rank([[1]], [[0, 2, 1]]).tolist()
        [[2.0, 6.0, 4.0]]
    """

    def __init__(
        self,
        chat: Chat,
        titles: Sequence[str],
        *,
        prompt: RankingPrompt | None = None,
        rounds: int = 3,
        shuffle: bool = True,
        seed: int = 0,
        constrained: bool = False,
        retries: int = 0,
        missing_score: float = 0.0,
    ):
        if rounds < 1 or retries < 0 or seed < 0:
            raise RequestError(f"rounds must be at least 1, retries and seed at least 0: {rounds}, {retries}, {seed}.")
        if not missing_score < 1:
            raise RequestError(f"missing_score must be below 1, the score of the last named item; got {missing_score}.")
        if constrained and not hasattr(chat, "complete_lists"):
            raise IncompatibleComponentsError(
                f"{type(chat).__name__} has no complete_lists, which constrained answers need; use ChatModel, or "
                "constrained=False."
            )
        self.chat, self.titles, self.prompt = chat, list(titles), prompt or RankingPrompt()
        self.rounds, self.shuffle, self.seed = rounds, shuffle, seed
        self.constrained, self.retries, self.missing_score = constrained, retries, float(missing_score)
        self.counts = AnswerCounts()

    def rank(self, histories: Sequence[Any], candidates: Any) -> np.ndarray:
        """Scores of the candidates, higher is better.

        Args:
            histories: M rows of item indices, oldest first (lists, arrays, `Sequences`).
            candidates: (M, C) item indices, -1 = none; or M lists.

        Returns:
            (M, C) float64, -inf where there is no candidate.

        Raises:
            RequestError: rows without candidates or with a candidate twice, an index outside the catalogue (row named).
        """
        rows = self._checked(histories, candidates)
        read = [np.asarray(histories[row], dtype=np.int64).reshape(-1) for row in range(len(rows))]
        keys = request_keys(read, rows)
        orders: list[list[np.ndarray]] = [[] for _ in rows]
        open_questions = [(row, number) for row in range(len(rows)) for number in range(self.rounds)]
        for attempt in range(self.retries + 1):
            unread = []
            for start in range(0, len(open_questions), _QUESTIONS_AT_ONCE):
                part = open_questions[start : start + _QUESTIONS_AT_ONCE]
                for (row, number), order in zip(part, self._ask(part, attempt, read, rows, keys)):
                    if len(order) or attempt == self.retries:
                        orders[row].append(order)
                    else:
                        unread.append((row, number))
            open_questions = unread
        scores_MC = np.full((len(rows), max((len(row) for row in rows), default=0)), -np.inf)
        for row, items in enumerate(rows):
            scores_MC[row, : len(items)] = summed_scores(orders[row], len(items), missing=self.missing_score)
        return scores_MC

    def _ask(
        self,
        questions: list[tuple[int, int]],
        attempt: int,
        histories: list[np.ndarray],
        rows: list[np.ndarray],
        keys: list[int],
    ) -> list[np.ndarray]:
        """Per question the candidates (places in their row) in the order that the answer names them."""
        shown, lists, conversations = [], [], []
        for row, number in questions:
            items = rows[row]
            places = np.arange(len(items))
            if self.shuffle or attempt:
                places = draw_permutation(
                    len(items), seed=self.seed, key=keys[row], round_number=number, attempt=attempt
                )
            shown.append(places)
            lists.append([self.titles[item] for item in items[places]])
            history = [self.titles[int(item)] for item in histories[row]]
            conversations.append(self.prompt.messages(history, lists[-1]))
        if self.constrained:
            written = [[written_title(title) for title in titles] for titles in lists]
            answers = self.chat.complete_lists(conversations, written)  # type: ignore[attr-defined]
        else:
            answers = self.chat(conversations)
        if len(answers) != len(conversations) or not all(isinstance(answer, str) for answer in answers):
            raise IncompatibleComponentsError(
                f"the chat function gave {len(answers)} answers to {len(conversations)} conversations, or something that "
                "is no string; it must return one string for each."
            )
        orders = []
        for number, (places, titles, answer) in enumerate(zip(shown, lists, answers)):
            parsed = _read_lines(answer, written[number]) if self.constrained else RankingParser(titles).parse(answer)
            orders.append(places[list(parsed.order)])
            self.counts.answers += 1
            self.counts.unreadable += not parsed.order
            complete = len(parsed.order) == len(titles) and not parsed.unknown and not parsed.repeats
            self.counts.repaired += bool(parsed.order) and not complete
            self.counts.asked += len(titles)
            self.counts.named += len(parsed.order)
            self.counts.unknown_lines += len(parsed.unknown)
        return orders

    def _checked(self, histories: Sequence[Any], candidates: Any) -> list[np.ndarray]:
        if len(candidates) != len(histories):
            raise RequestError(
                f"{len(candidates)} candidate lists for {len(histories)} histories; give one per history."
            )
        rows = []
        for row, (history, items) in enumerate(zip(histories, candidates)):
            items = np.asarray(items, dtype=np.int64).reshape(-1)
            kept = items[items >= 0]
            if not len(kept) or (items[: len(kept)] < 0).any():
                raise RequestError(f"row {row} has no candidates, or gaps between them; -1 may only stand at the end.")
            if len(np.unique(kept)) < len(kept):
                raise RequestError(f"row {row} lists a candidate twice; give each once.")
            read = np.asarray(history, dtype=np.int64).reshape(-1)
            for index in (kept, read):
                if len(index) and (int(index.max()) >= len(self.titles) or int(index.min()) < 0):
                    raise RequestError(f"row {row} holds an item outside the {len(self.titles)} titles.")
            rows.append(kept)
        return rows


def _read_lines(answer: str, choices: Sequence[str]) -> ParsedRanking:
    """An answer whose lines are choices, letter by letter; equal choices follow one another."""
    places: dict[str, list[int]] = {}
    for place, text in enumerate(choices):
        places.setdefault(text, []).append(place)
    lines = answer.split("\n")
    order = [place for line in dict.fromkeys(lines) for place in places.get(line, [])]
    return ParsedRanking(tuple(order), tuple(line for line in lines if line not in places))


class ZeroShotRecommender:
    """A retriever's best items, put in order by a ranker. What the retriever misses counts as missed.

    Behind the ranked candidates the retriever's own order goes on, for lists longer than `num_candidates`.

    Args:
        ranker: has `rank(histories, candidates) -> scores`.
        retriever: has `recommend_topk(histories, k, exclude_seen) -> (M, k) item indices`.
        num_candidates: items that are ranked anew (authors: 20).

    Raises:
        RequestError: `num_candidates` below 1.
    """

    def __init__(self, ranker: Any, retriever: Any, num_candidates: int = 20):
        if num_candidates < 1:
            raise RequestError(f"num_candidates must be at least 1, got {num_candidates}.")
        self.ranker, self.retriever, self.num_candidates = ranker, retriever, num_candidates
        self.needs_users = bool(getattr(retriever, "needs_users", False))
        if hasattr(retriever, "num_items"):
            self.num_items = int(retriever.num_items)

    def recommend_topk(self, histories: Any, k: int, exclude_seen: bool, users: np.ndarray | None = None) -> np.ndarray:
        """Top-k item indices (M, k), -1 padded."""
        options = {"users": users} if self.needs_users else {}
        found_MX = np.asarray(
            self.retriever.recommend_topk(histories, max(k, self.num_candidates), exclude_seen, **options)
        )
        items_MX = found_MX.copy()
        head_MC = found_MX[:, : self.num_candidates]
        rows = np.flatnonzero(
            (head_MC >= 0).any(axis=1)
        )  # a user to whom nothing may be recommended is not asked about
        if len(rows):
            asked = [histories[int(row)] for row in rows]
            scores = np.asarray(self.ranker.rank(asked, head_MC[rows]))
            order = np.argsort(-scores, axis=1, kind="stable")  # ties stay in the retriever's order, padding at the end
            width = scores.shape[1]
            items_MX[rows[:, None], np.arange(width)] = np.take_along_axis(head_MC[rows][:, :width], order, axis=1)
        return items_MX[:, :k]
