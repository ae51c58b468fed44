"""Results for readers: an aligned text table, plain sentences on where ours wins and loses, Markdown, and a picture.

Every function takes reports of `evaluate` (or summaries of `aggregate_seeds`), or the blocks that their `to_dict()`
wrote to a metrics file, as a mapping `name -> report or block`. The setting (seen items removed or kept) is always
printed: a figure without it can be off by half.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_genrec.errors import GenRecError, RequestError
from hf_genrec.evaluation.bootstrap import PairedDifference
from hf_genrec.evaluation.evaluation_report import KEPT, REMOVED, EvaluationReport

LABELS = {"recall": "HR", "ndcg": "NDCG", "mrr": "MRR", "coverage": "coverage"}
DEFAULT_METRICS = ("recall@10", "ndcg@10", "mrr@10", "coverage@10")
Reports = Sequence[EvaluationReport] | Mapping[str, Any]


def _blocks(reports: Reports) -> dict[str, dict[str, Any]]:
    if isinstance(reports, Mapping):
        pairs = list(reports.items())
    else:
        pairs = [(report.name, report) for report in reports]
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise RequestError(f"two reports share a name ({', '.join(names)}): pass evaluate(..., name=...)")
    if not pairs:
        raise RequestError("no reports to show")
    return {name: report.to_dict() if hasattr(report, "to_dict") else dict(report) for name, report in pairs}


def _settings(blocks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Settings that any block holds, the headline first."""
    headline = next(iter(blocks.values())).get("seen_items", REMOVED)
    order = [headline, KEPT if headline == REMOVED else REMOVED]
    return [s for s in order if any(_block(block, s) is not None for block in blocks.values())]


def _block(block: Mapping[str, Any], setting: str) -> Mapping[str, Any] | None:
    found = block.get(f"seen_{setting}")
    if found is None and block.get("seen_items", REMOVED) == setting:
        return block
    return found


def metric_label(metric: str) -> str:
    """`"recall@10"` -> `"HR@10"` (with one target per row, recall is the hit rate)."""
    name, at, k = metric.partition("@")
    return f"{LABELS.get(name, name)}{at}{k}"


def _cell(block: Mapping[str, Any] | None, metric: str, intervals: bool) -> str:
    if block is None or metric not in block:
        return "-"
    low_high = (block.get("intervals") or {}).get(metric)
    text = f"{block[metric]:.4f}"
    return f"{text} [{low_high[0]:.3f}, {low_high[1]:.3f}]" if intervals and low_high else text


def _rows(
    blocks: Mapping[str, Mapping[str, Any]], metrics: Iterable[str], intervals: bool, mark: str = "*"
) -> tuple[list[str], list[list[str]]]:
    metrics = list(metrics)
    settings = _settings(blocks)
    header = ["model", "seen items", *map(metric_label, metrics)]
    rows = []
    for setting in settings:
        for name, block in blocks.items():
            found = _block(block, setting)
            if found is not None:
                is_headline = setting == block.get("seen_items")
                label = f"{setting} {mark}" if is_headline else setting
                rows.append([name, label, *(_cell(found, metric, intervals) for metric in metrics)])
    return header, rows


def _caption(blocks: Mapping[str, Mapping[str, Any]], mark: str = "*") -> str:
    first = next(iter(blocks.values()))
    parts = ["full ranking, item level"]
    if "items" in first:
        parts.insert(0, f"{first.get('rows', first.get('users', 0)):,} test rows, {first['items']:,} items")
    headline = first.get("seen_items")
    if headline:
        parts.append(f"headline ({mark}): seen items {headline}")
    bootstrap = first.get("bootstrap") or {}
    if bootstrap.get("resamples"):
        over = bootstrap.get("pooled", "users")
        parts.append(f"[{bootstrap.get('level', 0.95):.0%} bootstrap over {over}]")
    return "; ".join(parts)


def results_table(
    reports: Reports, metrics: Iterable[str] = DEFAULT_METRICS, *, intervals: bool = True, buckets: bool = False
) -> str:
    """Aligned text table, one line per model and setting, headline setting first.

    Args:
        reports: Reports, or name -> report or metrics block.
        metrics: Columns.
        intervals: Show bootstrap intervals beside the values.
        buckets: Add a table of the head / tail / cold targets in the headline setting.
    """
    blocks = _blocks(reports)
    header, rows = _rows(blocks, metrics, intervals)
    text = _caption(blocks) + "\n" + _aligned(header, rows)
    return f"{text}\n\n{buckets_table(reports)}" if buckets else text


def _aligned(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    table = [header, ["-" * width for width in widths], *rows]
    # Left-aligned throughout: values have the same number of digits, so their points line up beside intervals.
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def markdown_table(reports: Reports, metrics: Iterable[str] = DEFAULT_METRICS, *, intervals: bool = True) -> str:
    """The same table in Markdown, with the caption under it, for model cards and READMEs."""
    blocks = _blocks(reports)
    header, rows = _rows(blocks, metrics, intervals, mark="★")
    body = [[cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    lines = ["| " + " | ".join(row) + " |" for row in [header, rule, *body]]
    return "\n".join([*lines, "", _caption(blocks, mark="★")])


def buckets_table(reports: Reports, metric: str = "recall@10") -> str:
    """Text table of one metric by popularity of the target (head / tail / cold), headline setting."""
    blocks = _blocks(reports)
    with_buckets = {name: block["buckets"] for name, block in blocks.items() if block.get("buckets")}
    if not with_buckets:
        return "no popularity buckets: pass train_counts to evaluate"
    first = next(iter(with_buckets.values()))
    header = ["model", *(f"{bucket} ({first[bucket]['targets']:,} targets)" for bucket in first)]
    rows = [
        [name, *(f"{found[bucket][metric]:.4f}" if metric in found[bucket] else "-" for bucket in first)]
        for name, found in with_buckets.items()
    ]
    sizes = ", ".join(f"{bucket} {first[bucket]['items']:,} items" for bucket in first)
    title = f"{metric_label(metric)} by training popularity of the target ({sizes})"
    return title + "\n" + _aligned(header, rows)


# ------------------------------------------------------------------------------------------------ ours against others


def differences(
    ours: EvaluationReport,
    others: Iterable[EvaluationReport],
    metrics: Iterable[str] = ("recall@10", "ndcg@10"),
    *,
    setting: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, PairedDifference]]:
    """Paired ours - other: `{other name: {metric: PairedDifference}}`, in one setting (headline by default)."""
    metrics = list(metrics)
    return {
        other.name: {
            metric: ours.compare(other, metric, setting=setting, resamples=resamples, seed=seed) for metric in metrics
        }
        for other in others
    }


def comparison_table(
    ours: EvaluationReport,
    others: Sequence[EvaluationReport],
    metrics: Iterable[str] = ("recall@10", "ndcg@10"),
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> str:
    """Ours beside every other, in every setting both have, and sentences that say where ours wins, ties and loses.

    "Better" and "worse" need a paired bootstrap interval that excludes 0; everything else is called no clear
    difference, with the sign of the point estimate.
    """
    metrics = list(metrics)
    header = ["metric", "seen items", "against", ours.name, "other", "difference [interval]", "p", "verdict"]
    rows: list[list[str]] = []
    wins: list[str] = []
    losses: list[str] = []
    unclear: list[str] = []
    order = [ours.headline, *(setting for setting in ours.results if setting != ours.headline)]
    for setting in order:
        for other in others:
            if setting not in other.results:
                continue
            for metric, found in differences(ours, [other], metrics, setting=setting, resamples=resamples, seed=seed)[
                other.name
            ].items():
                rows.append(
                    [
                        metric_label(metric),
                        setting + (" *" if setting == ours.headline else ""),
                        other.name,
                        f"{ours.setting(setting)[metric]:.4f}",
                        f"{other.setting(setting)[metric]:.4f}",
                        f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]",
                        f"{found.p_value:.3f}",
                        found.verdict,
                    ]
                )
                place = f"{other.name} on {metric_label(metric)}, seen {setting} ({found.difference:+.4f})"
                {"better": wins, "worse": losses}.get(found.verdict, unclear).append(place)
    lines = [_aligned(header, rows), ""]
    lines.append(f"{ours.name} beats: " + ("; ".join(wins) if wins else "nothing here") + ".")
    lines.append(f"{ours.name} LOSES to: " + ("; ".join(losses) if losses else "nothing here") + ".")
    if unclear:
        lines.append("No clear difference: " + "; ".join(unclear) + ".")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ picture


def plot_results(
    reports: Reports, path: str | Path, metrics: Sequence[str] = ("recall@10", "ndcg@10"), *, required: bool = True
) -> Path | None:
    """Bar chart with intervals, one panel per metric, seen removed and kept side by side; written as PNG.

    Args:
        path: Of the picture; its folder must exist.
        required: Raise when matplotlib is missing; otherwise warn and return None.

    Raises:
        GenRecError: matplotlib is not installed and `required`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "no picture: matplotlib is not installed; pip install 'hf_genrec[viz]'"
        if required:
            raise GenRecError(message) from error
        warnings.warn(message, stacklevel=2)
        return None
    blocks = _blocks(reports)
    settings = _settings(blocks)
    # Figure without pyplot: no global state, no display, safe in threads.
    figure = Figure(figsize=(1.5 + 3.6 * len(metrics), 1.2 + 0.5 * len(blocks)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    colours = {REMOVED: "#3b6ea5", KEPT: "#d08c3f"}
    height = 0.8 / len(settings)
    for axis, metric in zip(axes, metrics):
        for s, setting in enumerate(settings):
            for place, block in enumerate(blocks.values()):
                found = _block(block, setting)
                if found is None or metric not in found:
                    continue
                value = found[metric]
                low, high = (found.get("intervals") or {}).get(metric, (value, value))
                axis.barh(
                    place + (s - (len(settings) - 1) / 2) * height,
                    value,
                    height=height * 0.92,
                    color=colours[setting],
                    label=f"seen items {setting}" if place == 0 else None,
                    xerr=[[max(value - low, 0.0)], [max(high - value, 0.0)]],
                    error_kw={"elinewidth": 1.0, "capsize": 2.0, "ecolor": "#333333"},
                )
        axis.set_title(metric_label(metric), fontsize=10)
        axis.set_yticks(range(len(blocks)), [name.replace("$", r"\$") for name in blocks], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=8, frameon=False)
    figure.supxlabel(_caption(blocks), fontsize=7)
    path = Path(path)
    figure.savefig(path, format="png")
    return path
