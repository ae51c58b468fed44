"""Several quantizers, their codes side by side: one part per modality, or a tail on what the first part left over.

    identifiers:
      quantizer: joined
      parts:
        - {quantizer: residual_kmeans, features: [text], codebook_sizes: [64, 64]}
        - {quantizer: residual_kmeans, features: [cooccurrence], codebook_sizes: [64, 64]}

Shape suffixes: N items, L levels of all parts, l levels of one, E width of item vectors, C codes, P width of a codebook space.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_genrec.errors import IncompatibleComponentsError, RecipeError
from hf_genrec.identifiers.collision_groups import as_array
from hf_genrec.recipes.components import QUANTIZERS, Component
from hf_genrec.recipes.stages.context import Quantized, StageContext

OWN_KEYS = {"quantizer": str, "features": list, "residual": bool}


def _nearest(name: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(choices)}"


def joinable() -> list[str]:
    """Quantizers that can be a part: those that make codes from the catalogue or from item vectors."""
    return sorted(name for name, one in QUANTIZERS.items() if "tokenizer" not in one.gives and name != "joined")


def check_parts(parts: Any, features: Sequence[str] | None = None) -> None:
    """Check the `parts` of a recipe before any data is read.

    Args:
        features: names of the recipe's feature blocks; None = not checked.

    Raises:
        RecipeError: no list of mappings, an unknown quantizer, option or block (names the nearest), a wrong type, a part
            without the item vectors it needs, or a first part on a residual.
    """
    if not isinstance(parts, list) or not parts:
        raise RecipeError("identifiers.parts must be a list of mappings, one per quantizer, and not empty.")
    for number, part in enumerate(parts):
        where = f"identifiers.parts[{number}]"
        if not isinstance(part, dict):
            raise RecipeError(f"{where} must be a mapping with a quantizer and its options, got {part!r}.")
        name = part.get("quantizer")
        if name not in joinable():
            raise RecipeError(f"{where}.quantizer: unknown choice {name!r}: {_nearest(name, joinable())}")
        component = QUANTIZERS[name]
        _check_options(where, part, component)
        for block in part.get("features") or []:
            if features is not None and block not in features:
                raise RecipeError(f"{where}.features: unknown block {block!r}: {_nearest(block, list(features))}")
        if part.get("residual") and number == 0:
            raise RecipeError(f"{where}.residual: there is no part before the first one to take a residual of.")
        if "item_vectors" in component.needs and not part.get("features") and not part.get("residual"):
            raise RecipeError(f"{where}: quantizer {name!r} needs item vectors; name blocks in its features.")


def _check_options(where: str, part: dict[str, Any], component: Component) -> None:
    allowed: dict[str, Any] = OWN_KEYS | component.options
    for key, value in part.items():
        if key not in allowed:
            raise RecipeError(f"unknown key {where}.{key}: {_nearest(key, sorted(allowed))}")
        kinds = allowed[key] if isinstance(allowed[key], tuple) else (allowed[key],)
        if float in kinds:
            kinds = (*kinds, int)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise RecipeError(f"{where}.{key} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r}.")


def joined_codes(context: StageContext, vectors: np.ndarray | None, *, parts: list[dict[str, Any]]) -> Quantized:
    """Codes of every part, one after the other (EAGER, arXiv 2406.14017; PSRQ, 2508.20359; OneSearch, 2509.03236).

    Args:
        parts: mappings with `quantizer`, its own options, and `features` (names of the blocks it reads). `residual: true`
            quantizes what the part before left over, its vectors minus their decoded codes, instead of `features`.

    Returns:
        The concatenated codes. The quantizer is the list of the parts' quantizers, and `record["parts"]` says for each
        which levels are its own. Codebooks and features are given where all parts have them, each part in dimensions of
        its own, so that policies which move items weigh all parts.

    Raises:
        RecipeError: see `check_parts`.
        IncompatibleComponentsError: codes that end early in a part that is not the last, or a residual of a quantizer
            that cannot decode.

    Relations: one part is that quantizer alone.
    """
    check_parts(parts)
    made: list[Quantized] = []
    records: list[dict[str, Any]] = []
    vectors_NE: np.ndarray | None = None
    for number, part in enumerate(parts):
        if part.get("residual"):
            vectors_NE = _residual(made[-1], vectors_NE, number)
        else:
            vectors_NE = context.vectors(part["features"]) if part.get("features") else vectors
        options = {key: value for key, value in part.items() if key not in OWN_KEYS}
        one: Quantized = QUANTIZERS[part["quantizer"]].load()(context, vectors_NE, **options)
        if number + 1 < len(parts) and (np.asarray(one.codes_NL)[:, -1] < 0).any():
            raise IncompatibleComponentsError(
                f"identifiers.parts[{number}]: codes of {part['quantizer']!r} end before their last level, so no other part "
                "can follow; make it the last part, or give it codes of one length."
            )
        first = sum(len(done.codebook_sizes) for done in made)
        levels = list(range(first, first + len(one.codebook_sizes)))
        records.append(
            {"quantizer": part["quantizer"], "features": list(part.get("features") or []), "levels": levels}
            | one.record
        )
        made.append(one)
    codebooks, features = _joint_space(made)
    return Quantized(
        np.concatenate([np.asarray(one.codes_NL) for one in made], axis=1),
        tuple(size for one in made for size in one.codebook_sizes),
        codebooks,
        features,
        [one.quantizer for one in made],
        {"parts": records},
    )


def _residual(before: Quantized, vectors_NE: np.ndarray | None, number: int) -> np.ndarray:
    if vectors_NE is None or not hasattr(before.quantizer, "decode"):
        raise IncompatibleComponentsError(
            f"identifiers.parts[{number}].residual: the part before it cannot say what its codes stand for; put it behind a "
            "quantizer of item vectors such as 'residual_kmeans' or 'opq'."
        )
    return (vectors_NE - as_array(before.quantizer.decode(before.codes_NL))).astype(np.float32)


def _joint_space(made: list[Quantized]) -> tuple[list[np.ndarray] | None, np.ndarray | None]:
    """Codebooks (C, P of all parts), zero outside the part's own dimensions, and the features side by side."""
    if any(one.codebooks is None or one.features is None for one in made):
        return None, None
    features = [as_array(one.features) for one in made]
    widths = [block.shape[1] for block in features]
    codebooks, start = [], 0
    for one, width in zip(made, widths, strict=True):
        for book in one.codebooks:
            codebooks.append(np.pad(as_array(book), ((0, 0), (start, sum(widths) - start - width))))
        start += width
    return codebooks, np.concatenate(features, axis=1)
