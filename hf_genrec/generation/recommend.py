"""From a history to ranked items: `RecommendationMixin` for models of this library, `recommend` for any Hugging Face
model.

A model says how codes are scored (two methods); everything between that and a list of distinct catalogue items is
here, as GenerationMixin does for text. Search: `trie_beam_search` (TIGER, arXiv 2305.05065).

Shape legend: B users, N items, L levels, K beams or candidates, k items returned, C codes of a level, T tokens, l
codes so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import RequestError
from .configuration_recommendation import RecommendationConfig
from .decoding.exhaustive import score_all_leaves
from .item_filter import ItemFilter
from .requests import check_fingerprint, check_histories, check_k
from .scorers import scorer_for
from .search import (
    Recommendation,
    encoded_batches,
    evaluating,
    recommend_histories,
    recommend_prompts,
    search_items,
    search_with_repeats,
)
from .trie import ItemTrie

__all__ = ["Recommendation", "RecommendationConfig", "RecommendationMixin", "recommend", "scorer_for"]

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class RecommendationMixin:
    """Gives a model `recommend`, `recommend_indices` and `score_all`. Put it BEFORE PreTrainedModel among the bases.

    A model implements `start_decoding` (encoder or timeline, once per user) and `score_codes` (log-probabilities of
    the next code); `rescore_items` and `score_dense` are optional. Items and scores of a batch equal those of each
    user alone.

        class MyModel(RecommendationMixin, MyPreTrainedModel): ...
    """

    # ------------------------------------------------------------- what a model implements

    def start_decoding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
        """Read the histories (B, T) once; returns a state of B rows for `score_codes`."""
        raise NotImplementedError(f"{type(self).__name__} must implement start_decoding(input_ids, attention_mask).")

    def score_codes(self, state: Any, prefix_BKl: torch.Tensor, level: int) -> torch.Tensor:
        """Log-probabilities (B, K, C) over the level's code block after the partial codes `prefix_BKl` (codes, not
        token ids).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement score_codes(state, prefix_BKl, level).")

    def rescore_items(
        self, state: Any, items_BK: torch.Tensor, scores_BK: torch.Tensor, config: RecommendationConfig
    ) -> torch.Tensor:
        """New scores (B, K) of the candidates found by the search; item -1 is padding. Default: unchanged."""
        return scores_BK

    def score_dense(self, state: Any) -> torch.Tensor | None:
        """Scores of the whole catalogue (B, N) from a dense head, or None where the model has none."""
        return None

    # ------------------------------------------------------------- configuration

    @property
    def recommendation_config(self) -> RecommendationConfig:
        """Defaults of `recommend`; saved and loaded with the model."""
        config = self.__dict__.get("_recommendation_config")
        if config is None:
            config = self.__dict__["_recommendation_config"] = RecommendationConfig()
        return config

    @recommendation_config.setter
    def recommendation_config(self, config: RecommendationConfig) -> None:
        self.__dict__["_recommendation_config"] = config

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> Any:
        """As in transformers, plus `recommendation_config.json`."""
        result = super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        if is_main_process:
            self.recommendation_config.save_pretrained(save_directory)
        return result

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        # save_pretrained(push_to_hub=True) uploads before it returns: the file must be there by then
        self.recommendation_config.save_pretrained(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, plus `recommendation_config.json` where the folder or repository has one."""
        hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model.recommendation_config = RecommendationConfig.from_pretrained(
                pretrained_model_name_or_path, **hub_options
            )
        return loaded

    # ------------------------------------------------------------- what it gives

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        *,
        tokenizer: Any,
        k: int | None = None,
        num_beams: int | None = None,
        exclude_seen: bool | None = None,
        allowed_items: Sequence[str] | Sequence[Sequence[str]] | None = None,
        user_ids: Sequence[str] | None = None,
        **overrides: Any,
    ) -> list[list[Recommendation]]:
        """At most k distinct catalogue items per history, best first.

        Args:
            histories: item ids per user, oldest first.
            tokenizer: carries the catalogue the model was made for.
            k, num_beams, exclude_seen: override `recommendation_config`; num_beams below k is widened to k.
            allowed_items: only these may be returned: one list for all users, or one list per user.
            user_ids: for tokenizers with user tokens.
            overrides: other fields of RecommendationConfig (`max_history`, `dense_weight`, `renormalize`, `batch_size`,
                `decoding`, `decoding_options`).

        Returns:
            One list per history; shorter than k only where fewer items may be returned.

        Raises:
            RequestError: k or num_beams below 1, k above the number of items, an unknown option or search, an allow-list
                that leaves nothing (row named).
            UnknownItemError: an id of `allowed_items` that is not in the catalogue.
            IncompatibleComponentsError: the tokenizer carries another catalogue than the model was made for.
        """
        check_fingerprint(self, tokenizer)
        check_k(k, tokenizer)
        config = self.recommendation_config.merged(k=k, num_beams=num_beams, exclude_seen=exclude_seen, **overrides)
        return recommend_histories(self, histories, tokenizer, config, allowed_items=allowed_items, user_ids=user_ids)

    def recommend_indices(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        trie: ItemTrie,
        k: int | None = None,
        num_beams: int | None = None,
        seen: Sequence[np.ndarray] | None = None,
        repeats: Sequence[np.ndarray] | None = None,
        allowed_BN: torch.Tensor | None = None,
        config: RecommendationConfig | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor path of evaluators and trainers.

        Args:
            input_ids, attention_mask: (B, T), on the model's device.
            trie: of the model's catalogue.
            seen: item indices to leave out, per user; None leaves out nothing (`config.exclude_seen` is not read here).
            repeats: item indices that stay, with `config.repeat_weight` added to their scores, per user.
            allowed_BN: bool table of items that may be returned.

        Returns:
            items_Bk (int64, -1 padded where fewer exist) and scores_Bk (-inf there).
        """
        config = (config or self.recommendation_config).merged(k=k, num_beams=num_beams)
        return search_indices(
            self, input_ids, attention_mask, trie, config, seen=seen, repeats=repeats, allowed_BN=allowed_BN
        )

    def score_all(
        self,
        histories: Sequence[Sequence[str]] | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        tokenizer: Any = None,
        trie: ItemTrie | None = None,
        user_ids: Sequence[str] | None = None,
        renormalize: bool | None = None,
    ) -> torch.Tensor:
        """Exact log-probability of every catalogue item: (B, N) float32, column = item index.

        Give `histories` and `tokenizer`, or `input_ids` (with `attention_mask`) and `trie` or `tokenizer`. Items that
        share a code have the same score. Seen items are scored too, and no dense head is mixed in: this is what the
        beam searches.
        """
        config = self.recommendation_config.merged(renormalize=renormalize)
        if tokenizer is not None:
            check_fingerprint(self, tokenizer)
        if trie is None:
            if tokenizer is None:
                raise RequestError("score_all needs the catalogue: pass tokenizer=... or trie=....")
            trie = ItemTrie.from_tokenizer(tokenizer)
        if (histories is None) == (input_ids is None):
            raise RequestError("score_all needs either histories (with a tokenizer) or input_ids, and not both.")
        batches: list[tuple[torch.Tensor, torch.Tensor | None]]
        if input_ids is not None:
            batches = [(input_ids, attention_mask)]
        else:
            if tokenizer is None:
                raise RequestError("score_all(histories) needs tokenizer=... to read them.")
            rows = check_histories(histories)
            batches = [batch for _, batch in encoded_batches(self, rows, tokenizer, config, user_ids)]
        scores = []
        with evaluating(self):
            for ids, mask in batches:
                state = self.start_decoding(ids, mask)
                there = trie.to(ids.device)
                leaves = score_all_leaves(self, state, there, batch_size=ids.shape[0], renormalize=config.renormalize)
                scores.append(leaves[:, there.item_leaf_N])
        return torch.cat(scores) if scores else torch.zeros(0, trie.num_items)


ItemRows = Sequence[np.ndarray]  # item indices per user


def search_indices(
    decoder: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    trie: ItemTrie,
    config: RecommendationConfig,
    *,
    seen: ItemRows | None = None,
    repeats: ItemRows | None = None,
    allowed_BN: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`RecommendationMixin.recommend_indices` for any decoder, one of `scorer_for` around a stock model for instance."""
    return search_each(decoder, input_ids, attention_mask, trie, config, [(seen, repeats)], allowed_BN=allowed_BN)[0]


def search_each(
    decoder: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    trie: ItemTrie,
    config: RecommendationConfig,
    known: Sequence[tuple[ItemRows | None, ItemRows | None]],
    *,
    allowed_BN: torch.Tensor | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`search_indices` for each of several pairs of `seen` and `repeats`, the prompts read once.

    For decoders whose state serves any number of searches, as those of `scorer_for` around stock models do.
    """
    trie = trie.to(input_ids.device)
    size = input_ids.shape[0]

    def keep(left_out: ItemRows | None) -> ItemFilter | None:
        if allowed_BN is None:
            return ItemFilter.from_rows(trie, left_out)
        return ItemFilter.from_mask(trie, allowed_BN, left_out)

    model = decoder if hasattr(decoder, "modules") else getattr(decoder, "model", decoder)
    found = []
    with evaluating(model):
        state = decoder.start_decoding(input_ids, attention_mask)
        for seen, repeats in known:
            if repeats is None or not config.repeat_weight:
                found.append(search_items(decoder, state, trie, config, keep(seen), batch_size=size))
                continue
            new = repeats if seen is None else [np.concatenate(both) for both in zip(seen, repeats, strict=True)]
            again = list(repeats)
            if allowed_BN is not None:
                again = [row[allowed.cpu().numpy()[row]] for row, allowed in zip(repeats, allowed_BN, strict=True)]
            filters = keep(new), ItemFilter.from_rows(trie, seen, again)
            found.append(search_with_repeats(decoder, state, trie, config, *filters, batch_size=size))
    return found


def recommendation_config_of(model: Any) -> RecommendationConfig:
    """The defaults that a model brings along: its own, else those in the folder it was loaded from, else the library's.

    Stock models of transformers do not load `recommendation_config.json`, so it is looked for here: in a local folder, or
    among the downloaded files of a Hub repository; nothing is fetched.
    """
    own = getattr(model, "recommendation_config", None)
    if own is not None:
        return own
    folder = getattr(getattr(model, "config", None), "_name_or_path", None)
    return RecommendationConfig.from_pretrained(folder, local_files_only=True) if folder else RecommendationConfig()


def recommend(
    model: Any,
    histories: Sequence[Sequence[str]] | None = None,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    tokenizer: Any,
    k: int | None = None,
    num_beams: int | None = None,
    exclude_seen: bool | None = None,
    allowed_items: Sequence[str] | Sequence[Sequence[str]] | None = None,
    user_ids: Sequence[str] | None = None,
    restrict_to_level: bool | None = None,
    recommendation_config: RecommendationConfig | None = None,
    **options: Any,
) -> list[list[Recommendation]]:
    """At most k distinct catalogue items per request from any Hugging Face causal LM or encoder-decoder.

    Args:
        model: its vocabulary must hold the tokenizer's item tokens.
        histories: item ids per user, oldest first. The prompt is `tokenizer.encode_histories(histories)`, unless
            `input_ids` gives another one (text and items mixed, say); then histories only say what was seen.
        input_ids, attention_mask: prompts (B, T), tensors or nested lists; padding on either side. Without histories,
            the items spelled out in a prompt are the seen ones (all items of a shared code).
        tokenizer: an ItemTokenizer or an extended text tokenizer.
        k, num_beams, exclude_seen, allowed_items: as in `RecommendationMixin.recommend`; defaults 10, 50, True.
        restrict_to_level: take log-probabilities over the codes of each level only, for models that were trained so, or
            for speed: the head then multiplies only those rows. None: as configured.
        recommendation_config: the defaults; None: see `recommendation_config_of`.
        options: other fields of RecommendationConfig (`renormalize`, `batch_size`, `max_history`, `decoding` ...).

    Returns:
        One list per request, best first; scores are log-probabilities of the item's tokens (full-vocabulary softmax),
        equal to those of `generate` with ItemTrieLogitsProcessor and length_penalty=0.

    Raises:
        RequestError, UnknownItemError, IncompatibleComponentsError: as in `RecommendationMixin.recommend`.
    """
    check_fingerprint(model, tokenizer)
    check_k(k, tokenizer)
    defaults = recommendation_config if recommendation_config is not None else recommendation_config_of(model)
    options["restrict_to_level"] = restrict_to_level
    config = defaults.merged(k=k, num_beams=num_beams, exclude_seen=exclude_seen, **options)
    decoder = scorer_for(model, tokenizer, restrict_to_level=config.restrict_to_level)
    with evaluating(model):
        if input_ids is None:
            if histories is None:
                raise RequestError("recommend needs histories or input_ids.")
            return recommend_histories(
                decoder, histories, tokenizer, config, allowed_items=allowed_items, user_ids=user_ids
            )
        prompts = torch.as_tensor(input_ids).to(decoder.device)
        mask = (
            torch.ones_like(prompts) if attention_mask is None else torch.as_tensor(attention_mask).to(prompts.device)
        )
        return recommend_prompts(decoder, prompts, mask, histories, tokenizer, config, allowed_items)
