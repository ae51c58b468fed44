"""From codes to readable tags: the classifiers of HiD-VAE's tag supervision applied to codes (arXiv 2508.04618).

Shape suffixes: N items, L codes, T tag levels, P dimensions of a codebook, C codes of a level, l levels so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import IncompatibleComponentsError
from .quantizers.quantizer_file import read_quantizer, write_quantizer
from .tags import UNKNOWN

TAG_PATHS_FILE = "tag_paths.safetensors"  # in the artefact's quantizer folder
_FORM = "hf_genrec.tag_path.1"


class TagPathReader:
    """Reads a tag path off an item's codes: tag l from the first l codes, without the item (HiD-VAE, arXiv 2508.04618).

    Args:
        codebooks: L tensors (C_l, P).
        weights, biases: of T linear classifiers, (number of tags, l * P) and (number of tags,).
        names: of the tags, T sequences.

    Raises:
        IncompatibleComponentsError: classifiers that do not fit the codebooks or the names.

    Example:
        >>> book = torch.tensor([[1.0], [-1.0]])
        >>> reader = TagPathReader([book], [torch.tensor([[1.0], [-1.0]])], [torch.zeros(2)], [("film", "book")])
        >>> reader.path([[0], [1]])
        [['film'], ['book']]
    """

    def __init__(
        self,
        codebooks: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        names: Sequence[Sequence[str]],
    ) -> None:
        self.codebooks = [book.detach().cpu().float() for book in codebooks]
        self.weights = [weight.detach().cpu().float() for weight in weights]
        self.biases = [bias.detach().cpu().float() for bias in biases]
        self.names = tuple(tuple(level) for level in names)
        widths = np.cumsum([book.shape[1] for book in self.codebooks]).tolist()[: len(self.names)]
        wanted = [(len(level), width) for level, width in zip(self.names, widths)]
        if [tuple(weight.shape) for weight in self.weights] != wanted or len(wanted) != len(self.names):
            raise IncompatibleComponentsError(
                f"classifiers of shapes {[tuple(weight.shape) for weight in self.weights]} do not fit codebooks and tags: "
                f"{wanted} wanted"
            )

    @classmethod
    def from_term(cls, quantizer: Any, term: Any) -> TagPathReader:
        """Of a trained quantizer and the `TagClassification` term it was trained with."""
        heads = list(term.heads)
        return cls(
            quantizer.codebooks, [head.weight for head in heads], [head.bias for head in heads], term.table.names
        )

    @torch.no_grad()
    def probabilities(self, codes_NL: np.ndarray | Tensor | Sequence[Sequence[int]]) -> list[Tensor]:
        """For every tag level the probabilities (N, number of tags). Further codes (a counter) are not read.

        Raises:
            IncompatibleComponentsError: fewer codes than tag levels, or a code outside its codebook.
        """
        codes_NL = torch.as_tensor(codes_NL).long()
        levels = len(self.names)
        if codes_NL.dim() != 2 or codes_NL.shape[1] < levels:
            raise IncompatibleComponentsError(
                f"codes must be (items, {levels} or more levels), got {tuple(codes_NL.shape)}"
            )
        found, first = [], []
        for level in range(levels):
            book_CP, codes_N = self.codebooks[level], codes_NL[:, level]
            if bool(((codes_N < 0) | (codes_N >= len(book_CP))).any()):
                raise IncompatibleComponentsError(f"level {level}: a code is outside 0..{len(book_CP) - 1}")
            first.append(book_CP[codes_N])
            found.append((torch.cat(first, 1) @ self.weights[level].t() + self.biases[level]).softmax(1))
        return found

    def path(self, codes_NL: np.ndarray | Tensor | Sequence[Sequence[int]]) -> list[list[str]]:
        """The most likely tag of every level, by name."""
        best = [probability.argmax(1).tolist() for probability in self.probabilities(codes_NL)]
        return [[self.names[level][tag] for level, tag in enumerate(row)] for row in zip(*best)]

    def accuracy(self, codes_NL: np.ndarray | Tensor, tags_NT: np.ndarray) -> list[float]:
        """Per level the share of the items with a known tag whose tag is read right."""
        shares = []
        for level, probability in enumerate(self.probabilities(codes_NL)):
            known_N = tags_NT[:, level] != UNKNOWN
            shares.append(float((probability.argmax(1).numpy() == tags_NT[:, level])[known_N].mean()))
        return shares

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that `load` reads."""
        tensors = {f"codebook_{level}": book for level, book in enumerate(self.codebooks)}
        tensors |= {f"weight_{level}": weight for level, weight in enumerate(self.weights)}
        tensors |= {f"bias_{level}": bias for level, bias in enumerate(self.biases)}
        write_quantizer(path, _FORM, {"names": self.names, "levels": len(self.codebooks)}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> TagPathReader:
        """Read what `save` wrote.

        Raises:
            ArtifactError: another kind of file.
        """
        settings, tensors = read_quantizer(path, _FORM, "tag path reader")
        tags = range(len(settings["names"]))
        return cls(
            [tensors[f"codebook_{level}"] for level in range(settings["levels"])],
            [tensors[f"weight_{level}"] for level in tags],
            [tensors[f"bias_{level}"] for level in tags],
            settings["names"],
        )
