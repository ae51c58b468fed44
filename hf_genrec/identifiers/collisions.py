"""What happens to items that share a full code: `COLLISION_POLICIES` names the ways, `resolve_collisions` applies one.

Shape suffixes: N items, L levels, C codes of a level, P dimensions of the codebook space.

Two items *collide* when all their codes are equal. A generative model cannot tell them apart: a shared code is either
made unique here or expanded (and ranked) at recommendation time. Texts as identifiers are made unique by
`collision_texts.pick_unique`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np

from ..errors import IncompatibleComponentsError
from .collision_groups import append_digit, as_array, check_codes, code_groups, colliding_groups, rank_in_group
from .collision_sinkhorn import sinkhorn
from .collision_tails import extra_id, next_nearest, next_tail, random_tail

_INPUTS = ("codebooks", "features", "priority", "seed")  # what the caller has; everything else is an option


def counter(
    codes_NL: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    priority: np.ndarray | None = None,
    only_where_needed: bool = False,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Extra digit with a running number among the items of one code (TIGER, arXiv 2305.05065).

    Guarantee: no two items share a full code; the given digits are unchanged; every item gets one digit more, whose
    codebook is as large as the largest group (1 when nothing collides). Number 0 goes to the item with the largest
    `priority` (its popularity, as in MMGRec, arXiv 2404.16555), by default to the one first in the catalogue.

    Args:
        only_where_needed: number only the items whose code another item has too (GNPR-SID, arXiv 2506.01375): codes of
            several lengths, -1 behind the end; all items of a shared code are numbered, so no code of an item becomes
            the beginning of another's. Without collisions nothing changes.

    Relations: the digits of the colliding items are the same with and without `only_where_needed`.
    """
    digit_N = rank_in_group(codes_NL, codebook_sizes, priority)
    if only_where_needed:
        group_N, size_G = code_groups(codes_NL, codebook_sizes)
        digit_N = np.where(size_G[group_N] > 1, digit_N, -1)
    return append_digit(codes_NL, codebook_sizes, digit_N)


def keep(codes_NL: np.ndarray, codebook_sizes: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes stay as they are.

    Guarantee: nothing changes; items may share a full code, and recommending must expand a code into its items. Also the
    policy of quantizers that train collisions apart themselves (the hinge `losses_codebook.uniqueness` of HiD-VAE, arXiv
    2508.04618, for one): what is left of them shows in the health report.
    """
    return codes_NL, codebook_sizes


def require_unique(codes_NL: np.ndarray, codebook_sizes: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Check of codes that are unique by construction: leaves of a tree (SEATER, arXiv 2309.13375).

    Guarantee: nothing changes, and no two items share a full code.

    Raises:
        IncompatibleComponentsError: two items share one (names both rows and the code).
    """
    groups = colliding_groups(codes_NL, codebook_sizes)
    if groups:
        first, second = groups[0][:2].tolist()
        raise IncompatibleComponentsError(
            f"item rows {first} and {second} share the code {codes_NL[first].tolist()} ({sum(map(len, groups))} items "
            "share theirs): the policy 'require_unique' is for codes that are unique by construction; use 'counter'"
        )
    return codes_NL, codebook_sizes


COLLISION_POLICIES: dict[str, Callable[..., tuple[np.ndarray, tuple[int, ...]]]] = {
    "counter": counter,
    "extra_id": extra_id,
    "keep": keep,
    "next_nearest": next_nearest,
    "next_tail": next_tail,
    "random_tail": random_tail,
    "require_unique": require_unique,
    "sinkhorn": sinkhorn,
}


def collision_options(policy: str) -> dict[str, Any]:
    """Names and types of a policy's own options, as `identifiers.collision_options` of a recipe may set them.

    Raises:
        IncompatibleComponentsError: unknown policy (names the nearest).
    """
    if policy not in COLLISION_POLICIES:
        near = difflib.get_close_matches(policy, COLLISION_POLICIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise IncompatibleComponentsError(
            f"unknown collision policy {policy!r}: use one of {sorted(COLLISION_POLICIES)}{hint}"
        )
    function = COLLISION_POLICIES[policy]
    keywords = [name for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY]
    hints = get_type_hints(function)
    return {name: hints[name] for name in keywords if name not in _INPUTS}


def check_collision_options(policy: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a policy does not have, before any data is read.

    Raises:
        IncompatibleComponentsError: unknown policy or option (names the nearest), or a value of another type.
    """
    known = collision_options(policy)
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ", it has none"
            raise IncompatibleComponentsError(f"unknown option {name!r} of the collision policy {policy!r}{hint}")
        kind = (int, float) if known[name] is float else known[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and known[name] is not bool):
            raise IncompatibleComponentsError(
                f"option {name!r} of the collision policy {policy!r} must be {known[name].__name__}, got {value!r}"
            )


def resolve_collisions(
    codes_NL: Any,
    codebook_sizes: Sequence[int],
    policy: str = "counter",
    *,
    codebooks: Sequence[Any] | None = None,
    features: Any = None,
    priority: Any = None,
    seed: int = 0,
    **options: Any,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Apply a collision policy: `(codes (N, L') int64, codebook sizes)`. The guarantees stand with each policy.

    Args:
        codes_NL: integer codes, array or tensor; -1 behind the end of a code of fewer levels.
        codebook_sizes: L sizes; every code of level l is below `codebook_sizes[l]`.
        policy: a key of `COLLISION_POLICIES`.
        codebooks, features: for `"next_nearest"`, `"next_tail"`, `"sinkhorn"`: `quantizer.codebooks` and
            `quantizer.transform(x)`, of which the sum over the levels of the codes' vectors is an approximation.
        priority: (N,) for `"counter"`: larger gets the smaller number.
        seed: for `"random_tail"`.
        options: the policy's own, see `collision_options`.

    Raises:
        IncompatibleComponentsError: unknown policy or option, codes outside their codebooks (names the row), missing
            inputs, and what the policy itself raises.

    Example:
        >>> codes, sizes = resolve_collisions([[0, 1], [0, 1], [1, 0]], (2, 2), "counter")
        >>> codes.tolist(), sizes
        ([[0, 1, 0], [0, 1, 1], [1, 0, 0]], (2, 2, 2))
        >>> resolve_collisions([[0, 1], [0, 1], [1, 0]], (2, 2), "counter", only_where_needed=True)[0].tolist()
        [[0, 1, 0], [0, 1, 1], [1, 0, -1]]
    """
    check_collision_options(policy, options)
    codes_NL, sizes = check_codes(codes_NL, codebook_sizes)
    function = COLLISION_POLICIES[policy]
    wanted = inspect.signature(function).parameters
    given: dict[str, Any] = dict(options)
    if "codebooks" in wanted:
        if codebooks is None or features is None:
            raise IncompatibleComponentsError(
                f"policy {policy!r} needs codebooks=quantizer.codebooks and features=quantizer.transform(x)"
            )
        given |= {"codebooks": codebooks, "features": features}
    if "priority" in wanted and priority is not None:
        given["priority"] = as_array(priority)
        if given["priority"].shape != (len(codes_NL),):
            raise IncompatibleComponentsError(f"priority must hold one number per item, got {given['priority'].shape}")
    if "seed" in wanted:
        given["seed"] = seed
    return function(codes_NL, sizes, **given)


__all__ = [
    "COLLISION_POLICIES",
    "as_array",
    "check_codes",
    "check_collision_options",
    "code_groups",
    "collision_options",
    "resolve_collisions",
]
