"""RecommendationConfig: how a model turns histories into items, saved as `recommendation_config.json`.

It stands beside `generation_config.json` in a model folder and plays the same part for `recommend` as that file does
for `generate`: defaults that travel with the model, each of them overridable per call.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RequestError

RECOMMENDATION_CONFIG_NAME = "recommendation_config.json"


@dataclass
class RecommendationConfig:
    """Defaults of `recommend`.

    Args:
        k: items to return per user (>= 1).
        num_beams: width of the search (>= 1); widened to `k` where it is smaller, because k items need k beams.
        exclude_seen: never return an item of the user's own history.
        repeat_weight: where seen items stay (`exclude_seen=False`), added to the score of each: below 0 for users who rarely
            take an item twice, above for those who return to it. Recipes can choose it on the validation part.
        max_history: newest items of a history that the model reads; None = as many as the tokenizer keeps.
        dense_weight: weight of a model's dense head in the final score; 0 = generation alone. Models without a dense
            head ignore it.
        renormalize: renormalise log-probabilities over the legal codes at each level (see `decoding.kernel`).
        restrict_to_level: stock language models only: log-probabilities over the codes of each level instead of the whole
            vocabulary, for models trained with such a softmax (`ItemSFTConfig.item_head`). Our own models ignore it.
        decoding: name of the search, of `search.DECODING_STRATEGIES`: "beam" unless the model needs another.
        decoding_options: options of that search (its table line lists them), e.g. `{"seed": 1}` for "sample".
        batch_size: users scored together by `recommend` (>= 1); changes speed and memory, not results.

    Raises:
        RequestError: a value is out of range or of the wrong type (field named), at construction.

    Example:
        >>> RecommendationConfig(k=5).merged(num_beams=20).num_beams
        20
    """

    k: int = 10
    num_beams: int = 50
    exclude_seen: bool = True
    repeat_weight: float = 0.0
    max_history: int | None = None
    dense_weight: float = 0.0
    renormalize: bool = False
    restrict_to_level: bool = False
    batch_size: int = 64
    decoding: str = "beam"
    decoding_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        for name in ("k", "num_beams", "batch_size"):
            _require_positive(name, getattr(self, name))
        if self.max_history is not None:
            _require_positive("max_history", self.max_history)
        for name in ("exclude_seen", "renormalize", "restrict_to_level"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        for name, least in (("dense_weight", 0.0), ("repeat_weight", -math.inf)):
            weight = getattr(self, name)
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight < least:
                above = "" if least else " >= 0"
                raise RequestError(f"{name} must be a finite number{above}, got {weight!r}.")
        if not isinstance(self.decoding, str) or not self.decoding:
            raise RequestError(f"decoding must be the name of a search, got {self.decoding!r}.")
        if not isinstance(self.decoding_options, dict) or not all(
            isinstance(key, str) for key in self.decoding_options
        ):
            raise RequestError(f"decoding_options must map names to values, got {self.decoding_options!r}.")

    @property
    def search_width(self) -> int:
        """Beams actually used: `num_beams`, but at least `k`."""
        return max(self.num_beams, self.k)

    def merged(self, **overrides: Any) -> RecommendationConfig:
        """A copy with the given fields replaced; None leaves a field as it is. Another `decoding` drops the options
        of the one before it.
        """
        if overrides.get("decoding") not in (None, self.decoding) and overrides.get("decoding_options") is None:
            overrides["decoding_options"] = {}
        return self.from_dict({**self.to_dict(), **{k: v for k, v in overrides.items() if v is not None}})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RecommendationConfig:
        """Raises RequestError for an unknown key, naming the nearest one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise RequestError(
                    f"unknown recommendation option {key!r}; did you mean {near!r}? Options: {', '.join(known)}."
                )
        return cls(**values)

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `recommendation_config.json` into a folder (made if needed)."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / RECOMMENDATION_CONFIG_NAME
        file.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return file

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub_options: Any) -> RecommendationConfig:
        """Read from a local folder or a Hub repository; the defaults where it has no such file or cannot be reached.

        Args:
            hub_options: `cache_dir`, `revision`, `token`, `subfolder`, `local_files_only` ... as in transformers.

        Raises:
            RequestError: the file is there but is no valid configuration (file and field named).
        """
        from transformers.utils import cached_file

        file = cached_file(
            str(name_or_path),
            RECOMMENDATION_CONFIG_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub_options,
        )
        if file is None:
            return cls()
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise RequestError("it must hold one JSON object.")
            return cls.from_dict(values)
        except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
            raise RequestError(f"{file}: {error} Fix or delete the file.") from error


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"{name} must be a whole number >= 1, got {value!r}.")
