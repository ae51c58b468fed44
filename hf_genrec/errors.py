"""The typed errors of the library: one small tree, every message names the file, row or field and the fix.

All are `ValueError`s, so `except ValueError` keeps working for callers that do not know this package.
"""

from __future__ import annotations


class GenRecError(ValueError):
    """Base of every error that hf_genrec raises for bad input. The message says what is wrong, where, and the fix."""


class InteractionTableError(GenRecError):
    """An interaction log cannot be used: missing column, empty file, NaN, mixed time units, bad encoding."""


class ItemTableError(GenRecError):
    """An item table cannot be used: duplicate item ids, missing text, bad encoding."""


class UnknownItemError(GenRecError):
    """An item id is not in the catalogue of this tokenizer."""


class RequestError(GenRecError):
    """A request for recommendations cannot be served: k of 0, beams of 0, an allow-list that leaves nothing."""


class RecipeError(GenRecError):
    """A recipe does not resolve: unknown key, wrong type, unknown component; names the nearest valid choice."""


class IncompatibleComponentsError(GenRecError):
    """Two components do not fit: model and tokenizer of different catalogues, a stage without what it needs."""


class TrainingError(GenRecError):
    """Training cannot go on: the loss is NaN or infinite, or nothing is left to train on."""


class ArtifactError(GenRecError):
    """An artefact folder is missing, incomplete or does not match its manifest."""


class UnsafeArtifactError(ArtifactError):
    """An artefact holds something that could run code (pickle, Python file, symbolic link) and is refused."""
