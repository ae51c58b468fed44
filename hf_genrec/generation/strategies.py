"""The closed table of searches: how a scored trie becomes a ranked list of items.

A strategy is one function in one file of generation/decoding/, with the signature

    function(decoder, state, trie, config, item_filter, *, batch_size, **options) -> (items_BX, scores_BX)

that returns distinct legal items, best first (-1 and -inf where a user has fewer), at most `config.search_width` of them,
the same for a user alone and in a batch. Adding one = its file and one line here.

Shape legend: B users, X items returned.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import IncompatibleComponentsError, RequestError
from .configuration_recommendation import RecommendationConfig

_DECODING = "hf_genrec.generation.decoding."


@dataclass(frozen=True)
class Strategy:
    """One line of the table.

    Attributes:
        target: file and function.
        needs: methods a decoder must have; one of the names where an entry lists several with "|".
        options: accepted `decoding_options` and their defaults.
        lossless: returns the exact best items of the model under `config`, not an approximation.
        seeded: random; the option `seed` becomes `seeds`, one per user: seed + the user's row in the whole request.
    """

    target: str
    needs: tuple[str, ...] = ("start_decoding", "score_codes")
    options: dict[str, Any] = field(default_factory=dict)
    lossless: bool = False
    seeded: bool = False

    def load(self) -> Callable[..., Any]:
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(_DECODING + module), function)


DECODING_STRATEGIES: dict[str, Strategy] = {
    "beam": Strategy("beam:beam"),
    "sample": Strategy("sampling:sample", options={"temperature": 1.0, "seed": 0}, seeded=True),
    "diverse_beam": Strategy("diverse_beam:diverse_beam", options={"num_groups": 2, "diversity_penalty": 0.5}),
    "exhaustive": Strategy("exhaustive:exhaustive", lossless=True),
    "certified": Strategy("certified:certified", options={"max_beams": None}, lossless=True),
    "parallel": Strategy("parallel:parallel", needs=("start_decoding", "score_digits"), lossless=True),
    "graph": Strategy(
        "parallel:graph",
        needs=("start_decoding", "score_digits", "digit_vectors"),
        options={"num_neighbours": 50, "num_steps": 3, "seed": 0},
    ),
    "dense": Strategy("dense:dense", needs=("start_decoding", "score_dense"), lossless=True),
    "generate_then_dense": Strategy(
        "generate_then_dense:generate_then_dense",
        needs=("start_decoding", "score_codes", "score_dense"),
        options={"num_candidates": None, "cold_items": None},
    ),
    "prefix_marginal": Strategy(
        "prefix_marginal:prefix_marginal",
        needs=("start_decoding", "score_codes", "score_dense"),
        options={"alpha": 0.5},
    ),
    "ngram_grounding": Strategy(
        "ngram_grounding:ngram_grounding",
        needs=("start_decoding", "text_facets", "start_facet", "facet_index"),
        options={
            "max_tokens": 8,
            "facet_weights": None,
            "biases": None,
            "alpha": 2.0,
            "beta": 0.8,
            "gamma": 1.0,
        },
    ),
    "segmentation_ensemble": Strategy("segmentation_ensemble:segmentation_ensemble"),
    "speculative": Strategy(
        "speculative:speculative",
        needs=("start_decoding", "score_codes", "draft_scores|score_dense"),
        options={"num_drafts": 20, "threshold": -1.8, "cold_items": None, "drop_last_code": True},
    ),
    "two_stream": Strategy(
        "two_stream:two_stream",
        needs=("start_decoding", "score_stream", "stream_levels"),
        options={"streams": None},
    ),
    "masked_diffusion": Strategy(
        "masked_diffusion:masked_diffusion",
        needs=("start_decoding", "score_positions"),
        options={"num_steps": None, "order": "confidence", "valid_only": True},
    ),
}


def resolve_strategy(decoder: Any, config: RecommendationConfig) -> Callable[..., Any]:
    """The function of `config.decoding`, with `config.decoding_options` checked and bound as keyword arguments.

    Raises:
        RequestError: an unknown search or option (nearest name given).
        IncompatibleComponentsError: the model lacks a method the search needs.
    """
    name = config.decoding
    if name not in DECODING_STRATEGIES:
        near = difflib.get_close_matches(name, DECODING_STRATEGIES, n=1, cutoff=0.0)[0]
        raise RequestError(
            f"unknown decoding {name!r}; did you mean {near!r}? Searches: {', '.join(DECODING_STRATEGIES)}."
        )
    strategy = DECODING_STRATEGIES[name]
    for option in config.decoding_options:
        if option not in strategy.options:
            raise RequestError(
                f"decoding {name!r} has no option {option!r}; it takes "
                + (", ".join(strategy.options) or "no options")
                + "."
            )
    for methods in strategy.needs:
        if not any(hasattr(decoder, method) for method in methods.split("|")):
            raise IncompatibleComponentsError(
                f"{type(decoder).__name__} has no {methods.replace('|', ' or ')}, which decoding {name!r} needs; use "
                "decoding='beam' or a model made for this search."
            )
    function, options = strategy.load(), dict(strategy.options) | config.decoding_options

    seed = options.pop("seed") if strategy.seeded else 0
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise RequestError(f"decoding_options seed must be a whole number, got {seed!r}.")

    def search(*args: Any, batch_size: int, first_row: int = 0) -> Any:
        seeds = {"seeds": range(seed + first_row, seed + first_row + batch_size)} if strategy.seeded else {}
        return function(*args, batch_size=batch_size, **options, **seeds)

    return search
