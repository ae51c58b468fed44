"""Pictures of identifiers for the card: how codebooks are used, the prefix tree, a map of the items.

matplotlib is optional (`pip install 'hf_genrec[viz]'`): without it there are no pictures, and a warning says so. Figures are
made without pyplot: no global state, no display, safe in threads.

Shape legend: N items, L levels, C codes of a level, E width of item vectors.
"""

from __future__ import annotations

import colorsys
import io
import logging
from typing import Any

import numpy as np

from hf_genrec.errors import GenRecError

logger = logging.getLogger(__name__)

USAGE, TREE, MAP = "codebook usage", "prefix tree", "item map"
_MOST_LEVELS = 8  # panels of the usage picture, and rings of the tree
_LABELLED = 14  # codes named on the map
_INK, _FAINT, _UNUSED = "#2b2b2b", "#8a8a8a", "#c0392b"


def identifier_pictures(
    tokenizer: Any, vectors_NE: np.ndarray | None = None, *, required: bool = False
) -> dict[str, bytes]:
    """PNG pictures by caption, as `save_artifact(plots=...)` takes them.

    Args:
        tokenizer: with a catalogue. Identifiers of one code per item, and texts, have nothing to show: no pictures.
        vectors_NE: item vectors for the map, (N, E); by default the codes themselves, each as one of C directions.
        required: raise where matplotlib is missing; otherwise warn and give none.

    Raises:
        GenRecError: matplotlib is not installed and `required`.
    """
    codes_NL, sizes = _codes_of(tokenizer)
    if codes_NL is None:
        return {}
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        message = "no pictures: matplotlib is not installed; pip install 'hf_genrec[viz]'"
        if required:
            raise GenRecError(message) from error
        logger.warning(message)
        return {}
    colours = code_colours(codes_NL, sizes, vectors_NE)
    return {
        USAGE: _png(usage_figure(codes_NL, sizes)),
        TREE: _png(tree_figure(codes_NL, colours)),
        MAP: _png(map_figure(codes_NL, sizes, colours, vectors_NE)),
    }


def _codes_of(tokenizer: Any) -> tuple[np.ndarray | None, tuple[int, ...]]:
    """Codes (N, L) and codebook sizes; feature sets for tokenizers that have them; None where nothing can be shown."""
    if hasattr(tokenizer, "feature_sizes"):
        return np.asarray(tokenizer.features), tuple(tokenizer.feature_sizes)
    if not hasattr(tokenizer, "codes") or hasattr(tokenizer, "item_end_token") or tokenizer.num_levels < 2:
        return None, ()
    return np.asarray(tokenizer.codes), tuple(tokenizer.codebook_sizes)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same picture has the same bytes
    return buffer.getvalue()


def _letter(level: int) -> str:
    from hf_genrec.identifiers.catalogue import level_name

    return level_name(level)


# --------------------------------------------------------------------------------------------------------------- usage


def usage_figure(codes_NL: np.ndarray, sizes: tuple[int, ...]) -> Any:
    """Per level the number of items of every code, most used first, beside an even use of the codebook."""
    levels = min(len(sizes), _MOST_LEVELS)
    columns = min(levels, 4)
    rows = -(-levels // columns)
    figure = _figure(1.0 + 2.5 * columns, 0.9 + 2.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for level, axis in enumerate(axes[:levels]):
        codes_n = codes_NL[:, level][codes_NL[:, level] >= 0]
        count_C = np.sort(np.bincount(codes_n, minlength=sizes[level]))[::-1]
        unused = int((count_C == 0).sum())
        edges = np.arange(len(count_C) + 1)
        axis.stairs(count_C, edges, fill=True, color="#3b6ea5")
        axis.axhline(len(codes_n) / sizes[level], color="#d08c3f", linewidth=1.2, linestyle="--")
        if unused:
            axis.axvspan(len(count_C) - unused, len(count_C), color=_UNUSED, alpha=0.3, linewidth=0)
        axis.set_xlim(0, len(count_C))
        axis.set_ylim(0, max(count_C.max() * 1.05, 1))
        state = "all used" if not unused else f"{unused} unused"
        axis.set_title(f"level {_letter(level)}: {sizes[level]} codes, {state}", fontsize=9, color=_INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    for axis in axes[levels:]:
        axis.set_visible(False)
    figure.suptitle("Items per code (most used first; dashed: an even use; red: unused codes)", fontsize=9, color=_INK)
    if levels < len(sizes):
        figure.supxlabel(f"the first {levels} of {len(sizes)} levels", fontsize=8, color=_FAINT)
    return figure


# -------------------------------------------------------------------------------------------------------------- colours


def flat_map(vectors_NE: np.ndarray) -> np.ndarray:
    """Vectors on their two leading principal components, (N, 2), signs fixed."""
    x_NE = np.asarray(vectors_NE, np.float64)
    x_NE = x_NE - x_NE.mean(0)
    _, vectors_EE = np.linalg.eigh(x_NE.T @ x_NE)
    axes_E2 = vectors_EE[:, ::-1][:, :2]
    if axes_E2.shape[1] < 2:
        axes_E2 = np.pad(axes_E2, ((0, 0), (0, 1)))
    peak_2 = np.abs(axes_E2).argmax(0)
    axes_E2 = axes_E2 * np.where(axes_E2[peak_2, np.arange(2)] < 0, -1.0, 1.0)
    return x_NE @ axes_E2


def _one_hot(codes_NL: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Codes as vectors: every level a block of C directions, earlier levels longer ones."""
    offsets_L = np.cumsum((0, *sizes[:-1]))
    vectors = np.zeros((len(codes_NL), sum(sizes)), np.float32)
    for level, offset in enumerate(offsets_L):
        known = np.flatnonzero(codes_NL[:, level] >= 0)
        vectors[known, offset + codes_NL[known, level]] = 0.5**level
    return vectors


def _map_points(codes_NL: np.ndarray, sizes: tuple[int, ...], vectors_NE: np.ndarray | None) -> np.ndarray:
    if vectors_NE is None and sum(sizes) > 4096:  # a table of so many directions is too large for what it shows
        codes_NL, sizes = codes_NL[:, :1], sizes[:1]
    return flat_map(_one_hot(codes_NL, sizes) if vectors_NE is None else vectors_NE)


def code_colours(codes_NL: np.ndarray, sizes: tuple[int, ...], vectors_NE: np.ndarray | None = None) -> np.ndarray:
    """A colour (C, 3) for every code of the first level: hue by where its items lie on the map, three lightnesses in turn.

    Neighbouring codes get neighbouring hues, and the lightness keeps neighbours apart.
    """
    points_N2 = _spread(_map_points(codes_NL, sizes, vectors_NE))
    first_N = codes_NL[:, 0]
    count_C = np.maximum(np.bincount(first_N, minlength=sizes[0]), 1)
    centre_C2 = np.stack([np.bincount(first_N, points_N2[:, axis], sizes[0]) / count_C for axis in (0, 1)], axis=1)
    order_C = np.argsort(np.arctan2(centre_C2[:, 1], centre_C2[:, 0]), kind="stable")
    colours = np.zeros((sizes[0], 3))
    for place, code in enumerate(order_C.tolist()):
        colours[code] = colorsys.hls_to_rgb(
            place / sizes[0], (0.42, 0.60, 0.50)[place % 3], (0.70, 0.62, 0.85)[place % 3]
        )
    return colours


# ----------------------------------------------------------------------------------------------------------------- tree


def tree_figure(codes_NL: np.ndarray, colours_C3: np.ndarray) -> Any:
    """The prefix tree as an icicle: a row per level, a box per prefix, as wide as it has items; colour = first code."""
    from matplotlib.collections import PolyCollection

    levels = min(codes_NL.shape[1], _MOST_LEVELS)
    order_N = np.lexsort(codes_NL.T[::-1])
    first_C = np.bincount(codes_NL[:, 0], minlength=len(colours_C3))
    # the largest branches stand on the left
    rank_C = np.empty(len(first_C), np.int64)
    rank_C[np.argsort(-first_C, kind="stable")] = np.arange(len(first_C))
    order_N = order_N[np.argsort(rank_C[codes_NL[order_N, 0]], kind="stable")]
    sorted_NL, total = codes_NL[order_N], len(codes_NL)
    figure = _figure(10.5, 1.1 + 0.62 * (levels + 1))
    axis = figure.subplots()
    axis.add_collection(
        PolyCollection([[(0, -0.94), (total, -0.94), (total, 0), (0, 0)]], facecolors="#dddddd", edgecolors="none")
    )
    starts_n = np.zeros(1, np.int64)
    names = ["root"]
    for level in range(levels):
        opens_N = np.zeros(total, bool)
        opens_N[0] = True
        opens_N[1:] = (sorted_NL[1:, : level + 1] != sorted_NL[:-1, : level + 1]).any(axis=1)
        starts_n = np.flatnonzero(opens_N)
        ends_n = np.append(starts_n[1:], total)
        there_n = sorted_NL[starts_n, level] >= 0
        top, bottom = level + 1.0, level + 1.94
        base_n3 = colours_C3[sorted_NL[starts_n, 0]]
        fade = 0.55 * level / max(levels - 1, 1)
        seen_n = ends_n - starts_n > total / 500  # stripes of boxes thinner than two pixels would be noise
        parity_n1 = np.where(seen_n & (level > 0), np.arange(len(starts_n)) % 2 * 0.16, 0.08 * (level > 0))[:, None]
        shade_n3 = base_n3 + (1 - base_n3) * np.minimum(fade + parity_n1, 0.85)
        boxes = [
            [(a, top - 1), (b, top - 1), (b, bottom - 1), (a, bottom - 1)]
            for a, b in zip(starts_n[there_n].tolist(), ends_n[there_n].tolist())
        ]
        wide = len(boxes) < 150  # lines around thousands of boxes would hide them
        axis.add_collection(
            PolyCollection(boxes, facecolors=shade_n3[there_n], edgecolors="white" if wide else "none", linewidths=0.5)
        )
        if level == 0:
            for a, b, code in zip(starts_n.tolist(), ends_n.tolist(), sorted_NL[starts_n, 0].tolist()):
                if (b - a) / total > 0.028:
                    label = f"{_letter(0)}{code}"
                    axis.text(
                        (a + b) / 2, (top + bottom) / 2 - 1, label, ha="center", va="center", fontsize=7, color="white"
                    )
        names.append(f"{_letter(level)}: {len(boxes):,} prefixes")
    axis.set_xlim(0, total)
    axis.set_ylim(levels, -1)
    axis.set_yticks([place - 0.53 for place in range(levels + 1)], names, fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel(f"items (of {total:,}), those of one prefix side by side", fontsize=8)
    axis.set_title("Prefix tree: a box is a prefix, as wide as it has items; colour by the first code", fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------------------------------ map


def _spread(points_N2: np.ndarray) -> np.ndarray:
    """Both axes centred at the median and drawn in by asinh: crowded middles open up, far items stay in the picture."""
    centred = points_N2 - np.median(points_N2, axis=0)
    scale_2 = np.median(np.abs(centred), axis=0)
    scale_2 = np.where(scale_2 > 0, scale_2, np.abs(centred).max(axis=0, initial=0.0))
    return np.arcsinh(centred / np.where(scale_2 > 0, scale_2, 1.0))


def _labels(points_N2: np.ndarray, first_N: np.ndarray, count_C: np.ndarray) -> dict[int, tuple[float, float]]:
    """Where the largest codes are named: at the median of their items, left out where another name stands already."""
    room_2 = np.maximum(np.ptp(points_N2, axis=0), 1e-9) * np.array([0.055, 0.035])
    placed: dict[int, tuple[float, float]] = {}
    for code in np.argsort(-count_C, kind="stable").tolist():
        if not count_C[code] or len(placed) == _LABELLED:
            break
        x, y = np.median(points_N2[first_N == code], axis=0).tolist()
        if all(abs(x - a) > room_2[0] or abs(y - b) > room_2[1] for a, b in placed.values()):
            placed[code] = (x, y)
    return placed


def map_figure(
    codes_NL: np.ndarray, sizes: tuple[int, ...], colours_C3: np.ndarray, vectors_NE: np.ndarray | None
) -> Any:
    """Items on two principal components of their vectors, coloured by the first code; the largest codes are named."""
    points_N2 = _spread(_map_points(codes_NL, sizes, vectors_NE))
    first_N = codes_NL[:, 0]
    figure = _figure(7.2, 6.2)
    axis = figure.subplots()
    size = float(np.clip(14_000 / len(points_N2), 1.5, 26))
    shuffled = np.random.default_rng(0).permutation(len(points_N2))  # no code is always on top
    axis.scatter(
        points_N2[shuffled, 0],
        points_N2[shuffled, 1],
        s=size,
        c=colours_C3[first_N[shuffled]],
        linewidths=0,
        alpha=0.8,
    )
    count_C = np.bincount(first_N, minlength=sizes[0])
    shown = _labels(points_N2, first_N, count_C)
    for code, (x, y) in shown.items():
        frame = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colours_C3[code], "alpha": 0.85}
        axis.text(x, y, f"{_letter(0)}{code}", fontsize=8, ha="center", va="center", color=_INK, bbox=frame)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("principal component 1 (far items drawn in)", fontsize=8, color=_FAINT)
    axis.set_ylabel("principal component 2 (far items drawn in)", fontsize=8, color=_FAINT)
    what = "their vectors" if vectors_NE is not None else "their codes"
    axis.set_title(
        f"Items by {what}, coloured by the first code ({len(shown)} large ones of {sizes[0]} are named)", fontsize=9
    )
    return figure
