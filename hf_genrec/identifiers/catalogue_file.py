"""The catalogue as arrays and as one file: item ids and their codes, `item_codes.safetensors`.

A catalogue is what turns item ids into tokens, so it travels inside the tokenizer's own files. The file holds arrays
only (safetensors; no pickle, no code), and equal catalogues give equal bytes.

Shape legend: N items, L levels (codes per item), n queries.

File layout (safetensors, metadata `format = hf_genrec.item_codes/1`):

- `codes` int32 (N, L): code of every item at every level, -1 behind the end of a shorter one
- `codebook_sizes` int32 (L,): number of codes of every level
- `item_id_bytes` uint8 (bytes,): UTF-8 of all item ids, one after the other
- `item_id_offsets` int64 (N + 1,): where each id starts in `item_id_bytes`
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import ArtifactError, ItemTableError, UnknownItemError

FILE_NAME = "item_codes.safetensors"
FORMAT = "hf_genrec.item_codes/1"
_DTYPES = {"codes": np.int32, "codebook_sizes": np.int32, "item_id_bytes": np.uint8, "item_id_offsets": np.int64}
_MAX_CODES = 2**31 - 1
_MAX_LEVELS = 702  # level names of one or two letters


class Catalogue:
    """Item ids with their codes: validated once, then read-only.

    Args:
        item_ids: N distinct strings, any Unicode without lone surrogates.
        codes: (N, L) integers, `0 <= codes[:, l] < codebook_sizes[l]`. Several items may share one row. A code of fewer
            than L levels is filled up with -1.
        codebook_sizes: L positive integers; default: the largest code of each level plus one.

    Raises:
        ItemTableError: ids that are not distinct strings, codes of a wrong shape, type or range.

    Example:

        >>> catalogue = Catalogue(["shoe", "sock"], [[0, 1], [0, 2]])
        >>> catalogue.codebook_sizes, catalogue.codes_to_items([0, 2])
        ((1, 3), [['sock']])
    """

    def __init__(self, item_ids: Iterable[str], codes, codebook_sizes: Sequence[int] | None = None):
        self.item_ids: list[str] = _checked_ids(item_ids)
        self.codes, self.codebook_sizes = _checked_codes(codes, codebook_sizes, self.item_ids)
        self.codes.setflags(write=False)

    @property
    def num_items(self) -> int:
        return self.codes.shape[0]

    @property
    def num_levels(self) -> int:
        return self.codes.shape[1]

    @cached_property
    def code_lengths(self) -> np.ndarray | None:
        """Levels of each item's code, int64 (N,); None where all items have L."""
        lengths_N = (self.codes >= 0).sum(axis=1)
        return None if (lengths_N == self.num_levels).all() else lengths_N

    def __getstate__(self) -> dict:
        return {"item_ids": self.item_ids, "codes": self.codes, "codebook_sizes": self.codebook_sizes}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.codes.setflags(write=False)

    def __deepcopy__(self, memo) -> Catalogue:
        return self  # read-only, so copies of a tokenizer share it

    def __eq__(self, other) -> bool:
        return isinstance(other, Catalogue) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def index_of(self) -> dict[str, int]:
        return {item_id: index for index, item_id in enumerate(self.item_ids)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over ids, codes and codebook sizes: equal exactly when the catalogues are equal."""
        digest = hashlib.sha256(FORMAT.encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    @cached_property
    def _sorted_keys(self) -> tuple[np.ndarray, np.ndarray]:
        keys_N = self._keys(self.codes)
        order_N = np.argsort(keys_N, kind="stable")  # stable: items of one code stay in catalogue order
        return keys_N[order_N], order_N

    def _keys(self, codes_nL: np.ndarray) -> np.ndarray:
        """One sortable key per code tuple: a mixed-radix integer, or big-endian bytes where that overflows."""
        shorter = self.code_lengths is not None  # then -1 is one more digit
        total = 1
        for size in self.codebook_sizes:
            total *= size + shorter
        if total < 2**62:
            key_n = np.zeros(len(codes_nL), np.int64)
            for level, size in enumerate(self.codebook_sizes):
                key_n = key_n * (size + shorter) + codes_nL[:, level] + shorter
            return key_n
        return np.ascontiguousarray(codes_nL, dtype=">i4").view(f"S{4 * self.num_levels}")[:, 0]

    def item_groups(self, codes_nL: np.ndarray) -> list[np.ndarray]:
        """Item indices (ascending) of every queried code tuple; an empty array where no item has it."""
        lowest = 0 if self.code_lengths is None else -1
        inside_n = np.all((codes_nL >= lowest) & (codes_nL < np.asarray(self.codebook_sizes)), axis=1)
        sorted_N, order_N = self._sorted_keys
        keys_n = self._keys(np.where(inside_n[:, None], codes_nL, 0))
        first_n = np.searchsorted(sorted_N, keys_n, side="left")
        last_n = np.where(inside_n, np.searchsorted(sorted_N, keys_n, side="right"), first_n)
        return [order_N[a:b] for a, b in zip(first_n.tolist(), last_n.tolist())]

    def codes_to_items(self, codes) -> list[list[str]]:
        """Ids of all items with the given codes, (L,) or (n, L) -> n lists (empty where no item has the tuple)."""
        codes_nL = np.asarray(codes)
        if codes_nL.ndim == 1:
            codes_nL = codes_nL[None] if codes_nL.size else codes_nL.reshape(0, self.num_levels)
        if codes_nL.ndim != 2 or codes_nL.shape[1] != self.num_levels or codes_nL.dtype.kind not in "iu":
            raise ItemTableError(
                f"codes of shape {np.shape(codes)} and type {codes_nL.dtype} cannot be looked up: "
                f"give integers of shape ({self.num_levels},) or (n, {self.num_levels})"
            )
        groups = self.item_groups(codes_nL.astype(np.int64))
        return [[self.item_ids[index] for index in group.tolist()] for group in groups]

    def item_index(self, ids: Sequence[str]) -> np.ndarray:
        """Row of every id in the catalogue, int64 (n,); -1 where the id is unknown."""
        get = self.index_of.get
        return np.fromiter((get(item_id, -1) for item_id in ids), np.int64, len(ids))

    def index_of_one(self, item_id: str) -> int:
        """Row of one id. Raises UnknownItemError."""
        try:
            return self.index_of[item_id]
        except (KeyError, TypeError):
            raise UnknownItemError(
                f"item {item_id!r} is not in this catalogue of {self.num_items} items: check the id, "
                "or rebuild the identifiers with the item included"
            ) from None

    def _arrays(self) -> dict[str, np.ndarray]:
        encoded = [item_id.encode("utf-8") for item_id in self.item_ids]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
        return {
            "codes": np.ascontiguousarray(self.codes),
            "codebook_sizes": np.asarray(self.codebook_sizes, np.int32),
            "item_id_bytes": np.frombuffer(b"".join(encoded), np.uint8),
            "item_id_offsets": offsets,
        }

    def write(self, path: str | os.PathLike) -> None:
        """Write the catalogue file. Equal catalogues give equal bytes."""
        # one metadata key only: the writer does not promise an order for several
        data = save(self._arrays(), metadata={"format": FORMAT})
        with open(path, "wb") as file:
            file.write(data)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Catalogue:
        """Read a catalogue file and check all of it. Raises ArtifactError naming the file and the field."""
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ArtifactError(
                        f"{path}: not a catalogue file (metadata 'format' is not {FORMAT!r}): save it again"
                    )
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path}: cannot be read as safetensors ({error}): copy or save it again") from error
        try:
            return cls(*_decoded(arrays, path))
        except ItemTableError as error:
            raise ArtifactError(f"{path}: {error}") from error


def _decoded(arrays: dict[str, np.ndarray], path) -> tuple[list[str], np.ndarray, list[int]]:
    for name, dtype in _DTYPES.items():
        if name not in arrays or arrays[name].dtype != dtype:
            found = arrays[name].dtype if name in arrays else "missing"
            raise ArtifactError(
                f"{path}: field {name!r} is {found}, not {np.dtype(dtype).name}: save the tokenizer again"
            )
    blob, offsets = arrays["item_id_bytes"].tobytes(), arrays["item_id_offsets"]
    if (
        offsets.ndim != 1
        or len(offsets) < 1
        or offsets[0] != 0
        or offsets[-1] != len(blob)
        or (np.diff(offsets) < 0).any()
    ):
        raise ArtifactError(f"{path}: field 'item_id_offsets' does not fit 'item_id_bytes': save the tokenizer again")
    bounds = offsets.tolist()
    try:
        ids = [blob[a:b].decode("utf-8") for a, b in pairwise(bounds)]
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path}: field 'item_id_bytes' is not UTF-8 ({error}): save the tokenizer again"
        ) from error
    return ids, arrays["codes"], arrays["codebook_sizes"].tolist()


def _checked_ids(item_ids: Iterable[str]) -> list[str]:
    if isinstance(item_ids, str):
        raise ItemTableError("item_ids is one string: give a list of item ids")
    for method in ("to_pylist", "tolist"):  # arrow, numpy and pandas columns
        if hasattr(item_ids, method):
            item_ids = getattr(item_ids, method)()
            break
    ids = list(item_ids)
    if not ids:
        raise ItemTableError("item_ids is empty: a catalogue needs at least one item")
    for row, item_id in enumerate(ids):
        if not isinstance(item_id, str):
            raise ItemTableError(
                f"item_ids row {row}: {item_id!r} is a {type(item_id).__name__}, not a string: convert ids with str()"
            )
    ids = [item_id if type(item_id) is str else str(item_id) for item_id in ids]  # numpy strings become plain ones
    if len(set(ids)) != len(ids):
        first: dict[str, int] = {}
        for row, item_id in enumerate(ids):
            if first.setdefault(item_id, row) != row:
                raise ItemTableError(
                    f"item_ids row {row}: {item_id!r} is already row {first[item_id]}: keep one of them"
                )
    try:
        "".join(ids).encode("utf-8")
    except UnicodeEncodeError:
        row = next(row for row, item_id in enumerate(ids) if any("\ud800" <= char <= "\udfff" for char in item_id))
        raise ItemTableError(
            f"item_ids row {row}: {ids[row]!r} holds a lone surrogate, which is not valid Unicode: "
            "read the source again as UTF-8"
        ) from None
    return ids


def _checked_codes(codes, codebook_sizes, ids: list[str]) -> tuple[np.ndarray, tuple[int, ...]]:
    if hasattr(codes, "detach"):
        codes = codes.detach().cpu().numpy()
    try:
        codes_NL = np.asarray(codes)
    except ValueError as error:
        raise ItemTableError(f"codes: rows of different lengths ({error}): every item needs L codes") from None
    if codes_NL.ndim != 2 or codes_NL.shape[0] != len(ids) or codes_NL.shape[1] == 0:
        raise ItemTableError(
            f"codes have shape {codes_NL.shape}, not ({len(ids)}, L): give one row of L >= 1 codes per item id"
        )
    if codes_NL.shape[1] > _MAX_LEVELS:
        raise ItemTableError(
            f"codes have {codes_NL.shape[1]} levels, more than {_MAX_LEVELS}: is the array transposed?"
        )
    if codes_NL.dtype.kind not in "iu":
        raise ItemTableError(f"codes are {codes_NL.dtype}, not integers: convert them with .astype(int)")
    if codebook_sizes is None:
        sizes = [max(int(largest), 0) + 1 for largest in codes_NL.max(axis=0)]
    else:
        given = codebook_sizes.tolist() if hasattr(codebook_sizes, "tolist") else codebook_sizes
        sizes = [given] if isinstance(given, int) else list(given)
        if len(sizes) != codes_NL.shape[1] or not all(
            isinstance(size, (int, np.integer)) and size > 0 for size in sizes
        ):
            raise ItemTableError(
                f"codebook_sizes are {given}: give {codes_NL.shape[1]} positive integers, one per level of the codes"
            )
    if sum(sizes) > _MAX_CODES:
        raise ItemTableError(f"codebook_sizes sum to {sum(sizes)}, more than {_MAX_CODES}: use smaller codebooks")
    ended_NL = np.logical_and.accumulate(codes_NL[:, ::-1] == -1, axis=1)[:, ::-1]  # -1 up to the last level
    ended_NL[:, 0] = False  # an item has at least one code
    outside_NL = ((codes_NL < 0) | (codes_NL >= np.asarray(sizes, dtype=np.int64))) & ~ended_NL
    if outside_NL.any():
        row, level = (int(where[0]) for where in np.nonzero(outside_NL))
        code = int(codes_NL[row, level])
        problem = (
            "is negative: codes count from 0, and -1 may only fill up the end of a shorter code"
            if code < 0
            else f"is outside 0..{sizes[level] - 1}: fix the code"
        )
        fix = "" if code < 0 else f" or raise codebook_sizes[{level}]"
        raise ItemTableError(f"codes row {row} (item {ids[row]!r}), level {level}: code {code} {problem}{fix}")
    return np.array(codes_NL, dtype=np.int32, order="C"), tuple(int(size) for size in sizes)
