"""The parts of the model card that are computed from `metrics.json`: results, comparison, protocol, identifiers, data.

Every sentence about quality is derived from the numbers: where a baseline is above the model, the card says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .data_terms import DATA_TERMS
from .markdown import code, inline, table
from .metrics_file import SEEN_ITEMS, metric_names, seeds_of

Block = Mapping[str, Any]

BASELINE_NAMES = {
    "popularity": "Popularity",
    "item_graph": "Item graph (forward co-occurrence)",
    "sasrec_ce": "SASRec, full cross-entropy",
    "sasrec": "SASRec",
}
METRIC_NAMES = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR", "coverage": "Coverage", "hit_rate": "Hit rate"}
_COLUMNS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "mrr@10", "coverage@10")
_COMPARED = ("ndcg@10", "recall@10")
_PROTOCOLS = {
    "leave_one_out": "leave-one-out: the last item of each user is the test target, the last but one the validation "
    "target; the test history holds everything before the target",
    "global_time": "global time split: everything after one moment is test, so no model saw the future of any user",
}


def metric_label(name: str) -> str:
    """`"ndcg@10"` as `"NDCG@10"`."""
    stem, _, cut = name.partition("@")
    return f"{METRIC_NAMES.get(stem, stem)}@{cut}"


def baseline_label(name: str) -> str:
    """Display name of a baseline, safe in Markdown."""
    return BASELINE_NAMES.get(name) or inline(name, 60)


def summary(metrics: Mapping[str, Any]) -> str:
    """The headline numbers in one sentence, and in the same breath the baselines that are above them."""
    test, known = metrics["test"], DATA_TERMS.get(metrics["dataset"])
    names = [name for name in _COMPARED if name in test] or metric_names(test)[:1]
    seen = f", seen items {test['seen_items']}" if test.get("seen_items") else ""
    numbers = " and ".join(f"{metric_label(name)} {test[name]:.4f}" for name in names)
    above = [
        baseline_label(baseline)
        for baseline, block in metrics["baselines"].items()
        if any(block.get(name, -1.0) > test[name] for name in names)
    ]
    if not metrics["baselines"]:
        verdict = "No baseline was evaluated beside it."
    elif above:
        verdict = f"**Above it on at least one of these: {', '.join(above)}.**"
    else:
        verdict = f"No baseline of the table is above it ({len(metrics['baselines'])} compared)."
    where = known.title if known else inline(metrics["dataset"])
    return f"On {where} ({inline(metrics['protocol'], 60)}{seen}): {numbers}. {verdict}"


def results(metrics: Mapping[str, Any], model_label: str) -> str:
    """Tables of the model beside the baselines (headline setting first), then the comparison in words."""
    parts = []
    for setting, test, baselines, variants in _settings(metrics):
        columns = _columns(test)
        heading = {
            "removed": "Seen items removed from the ranking",
            "kept": "Seen items kept in the ranking",
            None: "Ranking over the whole catalogue",
        }[setting]
        headline = " (headline)" if setting is not None and setting == metrics["test"].get("seen_items") else ""
        rows = [[f"**{model_label}**", *(_cell(test, name, bold=True) for name in columns)]]
        rows += [[inline(name, 60), *(_cell(block, metric) for metric in columns)] for name, block in variants.items()]
        rows += [[baseline_label(name), *(_cell(block, name) for name in columns)] for name, block in baselines.items()]
        parts += [f"### {heading}{headline}", table(["", *map(metric_label, columns)], rows)]
        parts.append("\n".join(f"- {line}" for line in comparison(test, baselines, _differences(metrics, setting))))
    return "\n\n".join([_intervals_and_seeds(metrics), *parts])


def _settings(metrics: Mapping[str, Any]) -> list[tuple[str | None, Block, dict[str, Block], dict[str, Block]]]:
    """`(setting, test block, baseline blocks, variant blocks)` of each way to treat seen items, headline first."""
    test, baselines, variants = metrics["test"], metrics["baselines"], metrics.get("variants") or {}
    headline = test.get("seen_items")
    found = [(headline, test, dict(baselines), dict(variants))]
    for setting in SEEN_ITEMS:
        key = f"seen_{setting}"
        if setting != headline and key in test:
            found.append(
                (
                    setting,
                    test[key],
                    *(
                        {name: block[key] for name, block in blocks.items() if key in block}
                        for blocks in (baselines, variants)
                    ),
                )
            )
    return found


def _differences(metrics: Mapping[str, Any], setting: str | None) -> Mapping[str, Any]:
    # Paired differences are recorded for the headline only.
    return metrics.get("differences") or {} if setting == metrics["test"].get("seen_items") else {}


def _columns(block: Block) -> list[str]:
    names = metric_names(block)
    return [name for name in _COLUMNS if name in names] or names[:5]


def _cell(block: Block, name: str, bold: bool = False) -> str:
    if name not in block:
        return "not measured"
    value = f"**{block[name]:.4f}**" if bold else f"{block[name]:.4f}"
    bounds = (block.get("intervals") or {}).get(name)
    return f"{value} [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else value


def _intervals_and_seeds(metrics: Mapping[str, Any]) -> str:
    test, seeds = metrics["test"], seeds_of(metrics)
    lines = []
    if test.get("intervals"):
        level = (test.get("bootstrap") or {}).get("level", 0.95)
        lines.append(f"Brackets are {level:.0%} bootstrap intervals over users.")
    else:
        lines.append("No intervals were computed: small differences mean nothing.")
    if len(seeds) == 1:
        lines.append(
            f"One seed ({seeds[0]}): the spread between seeds is not measured and adds to whatever interval is shown."
        )
    else:
        lines.append(f"Numbers are means over the seeds {', '.join(map(str, seeds))}.")
        for name in _COMPARED:
            values = (test.get("seed_values") or {}).get(name)
            if isinstance(values, list) and all(isinstance(value, int | float) for value in values):
                lines.append(f"{metric_label(name)} of each seed: {', '.join(f'{v:.4f}' for v in values)}.")
    lines.append("Every metric at every cut-off is in `metrics.json`.")
    return " ".join(lines)


def comparison(test: Block, baselines: Mapping[str, Block], differences: Mapping[str, Any] | None = None) -> list[str]:
    """Sentences that say where the model loses, is level, and wins, derived from the numbers alone.

    Example:
        >>> comparison({"ndcg@10": 0.10}, {"popularity": {"ndcg@10": 0.05}, "sasrec_ce": {"ndcg@10": 0.12}})[0]
        '**Below SASRec, full cross-entropy** on NDCG@10: 0.1000 against 0.1200 (no interval: may be noise).'
    """
    names = [name for name in _COMPARED if name in test] or metric_names(test)[:1]
    losses, wins, absent = [], [], []
    for metric in names:
        for baseline, block in baselines.items():
            if metric not in block:
                continue
            ours, theirs = test[metric], block[metric]
            doubt = _doubt(metric, test, block, (differences or {}).get(baseline, {}).get(metric))
            numbers = f"on {metric_label(metric)}: {ours:.4f} against {theirs:.4f} ({doubt})"
            if theirs > ours:
                losses.append(f"**Below {baseline_label(baseline)}** {numbers}.")
            elif theirs == ours:
                wins.append(f"Equal to {baseline_label(baseline)} {numbers}.")
            else:
                wins.append(f"Above {baseline_label(baseline)} {numbers}.")
    for baseline, name in (("item_graph", "the item graph heuristic"), ("sasrec_ce", "SASRec with full cross-entropy")):
        if baseline not in baselines:
            absent.append(name)
    sentences = losses + wins
    if not sentences:
        sentences = [
            "No baseline was evaluated in this setting: the numbers alone do not say whether the model is any good."
        ]
    elif not losses:
        sentences.insert(
            0, f"Above or equal to every baseline of this table on {' and '.join(map(metric_label, names))}."
        )
    if absent and len(absent) < 2:
        sentences.append(f"Not compared with {absent[0]}.")
    elif absent and baselines:
        sentences.append(f"Not compared with {' nor '.join(absent)}, the strongest simple peers.")
    return sentences


def _doubt(metric: str, test: Block, block: Block, paired: Mapping[str, Any] | None) -> str:
    if paired:
        low, high = paired["low"], paired["high"]
        verdict = "a clear difference" if low > 0 or high < 0 else "no clear difference"
        return f"paired difference {paired['difference']:+.4f} [{low:+.4f}, {high:+.4f}], {verdict}"
    ours, theirs = ((b.get("intervals") or {}).get(metric) for b in (test, block))
    if ours and theirs:
        apart = ours[0] > theirs[1] or ours[1] < theirs[0]
        return "intervals do not overlap" if apart else "intervals overlap: no clear difference"
    return "no interval: may be noise"


def protocol(metrics: Mapping[str, Any]) -> str:
    """How the numbers were made: split, ranking, seen items, ties."""
    test, data = metrics["test"], metrics.get("data") or {}
    name = metrics["protocol"]
    lines = [f"Split: {_PROTOCOLS.get(name) or inline(name)}."]
    rows, items = test.get("rows") or test.get("users"), test.get("items") or data.get("items")
    of_items = f" of {_count(items)} items" if items is not None else ""
    lines.append(
        f"Ranking: the whole catalogue{of_items}, no sampled negatives, item level (a shared code is no free hit)."
    )
    if rows is not None:
        lines.append(f"Evaluated rows: {_count(rows)}.")
    seen = test.get("seen_items")
    if seen == "removed":
        lines.append("Headline: items that the user already had are removed from the ranking.")
    elif seen == "kept":
        lines.append(
            "Headline: items that the user already had stay in the ranking, because this data holds repeat consumption."
        )
    else:
        lines.append("Whether seen items were removed or kept is not recorded; the choice can move Recall@10 by half.")
    if test.get("targets_seen"):
        lines.append(
            f"Targets that the user already had: {_count(test['targets_seen'])} (out of reach when seen items are "
            "removed)."
        )
    ties = metrics.get("ties") or {}
    policy, tied = data.get("tie_policy") or ties.get("policy"), data.get("ties_last_two") or ties.get("users_last_two")
    if data and data.get("ties_rows") is None:
        lines.append("Order: the data have no timestamps, their input order is taken as the order in time.")
    elif policy:
        note = f"; the held-out item of {_count(tied)} users depends on it" if tied else ""
        lines.append(f"Order of interactions with equal timestamps: {inline(policy)}{note}.")
    else:
        lines.append("Order of interactions with equal timestamps: not recorded.")
    return "\n".join(f"- {line}" for line in lines)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else inline(value, 40)


def identifier_health(identifiers: Mapping[str, Any]) -> str:
    """Table of the identifier health report; nested tables are flattened with dots, `before_policy` is a column."""
    values, before = dict(identifiers), identifiers.get("before_policy")
    header, earlier = ["Measure", "Value"], {}
    if isinstance(before, Mapping):
        del values["before_policy"]
        header, earlier = [*header, "Before the collision policy"], dict(_flat(before))
    rows = [
        [code(key, 60, in_table=True), text, *([earlier.get(key, "")] if len(header) > 2 else [])]
        for key, text in _flat(values)
    ]
    return table(header, rows) if rows else "Not measured."


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}.")
        elif isinstance(value, list):
            shown = ", ".join(_number(entry) for entry in value[:12])
            rows.append((name, shown + (", …" if len(value) > 12 else "") or "none"))
        else:
            rows.append((name, _number(value)))
    return rows


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "not measured" if value is None else _count(value)


def data_statement(metrics: Mapping[str, Any] | None, card_data: Mapping[str, Any]) -> str:
    """Which data, under which terms, how much of it, and what was dropped."""
    metrics = metrics or {}
    name, data = metrics.get("dataset"), metrics.get("data") or {}
    known = DATA_TERMS.get(name) if name else None
    title = known.title if known else inline(name or "not recorded")
    lines = [f"Data set: {title}" + (f" ({code(name)})." if known else ".")]
    terms = card_data.get("data_terms")
    if terms:
        lines.append(f"Terms: {inline(terms, 500)}")
    elif known:
        lines.append(f"Terms: {known.terms} Publisher: <{known.url}>")
    else:
        lines.append("Terms: not recorded. Whoever publishes this model must know what the owner of the data allows.")
    if data.get("users") is not None:
        lines.append(
            f"After filtering: {_count(data['users'])} users, {_count(data.get('items'))} items, "
            f"{_count(data.get('interactions'))} interactions"
            + (f" (density {data['density']:.3%})." if isinstance(data.get("density"), int | float) else ".")
        )
    if data.get("rows_read") is not None:
        bounds = (
            f"; bounds: at least {_count(data.get('min_user', 0))} per user, {_count(data.get('min_item', 0))} per item"
        )
        lines.append(f"Rows read: {_count(data['rows_read'])}{bounds}.")
        dropped = {reason: count for reason, count in (data.get("dropped") or {}).items() if count}
        lines.append(
            "Dropped: " + ("; ".join(f"{_count(c)} {inline(r)}" for r, c in dropped.items()) or "nothing") + "."
        )
    else:
        lines.append("What was dropped on the way from the log to the training data is not recorded.")
    if data.get("texts_capped"):
        lines.append(f"Item texts capped in length: {_count(data['texts_capped'])}.")
    lines += [inline(note, 300) for note in data.get("notes") or []]
    return "\n".join(f"- {line}" for line in lines)
