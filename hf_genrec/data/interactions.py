"""From any interaction log to `RecommendationData`: checked, filtered, ordered, counted.

Shapes: n interactions, U users, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_genrec.data.columns import extra_values, id_codes, time_ticks
from hf_genrec.data.filtering import core_filter, sort_by_user_and_time
from hf_genrec.data.items import MAX_TEXT_LENGTH, ItemTable
from hf_genrec.data.named import canonical_name, read_named, unknown_name
from hf_genrec.data.readers import format_of
from hf_genrec.data.report import DataReport
from hf_genrec.data.sequences import Sequences, offsets_from_lengths
from hf_genrec.data.sources import LogSource, open_items, open_log
from hf_genrec.errors import InteractionTableError, ItemTableError


@dataclass(frozen=True, eq=False)
class RecommendationData:
    """A data set ready for splits, identifiers and models.

    Args:
        name: of the data set.
        item_ids: N ids in catalogue order, which tokenizer, features and models share.
        user_ids: U ids.
        sequences: U rows of item indices, each sorted by (time, input order).
        items: item table aligned to `item_ids`, or None.
        repeats: does any user consume an item twice? If so, the headline ranking keeps seen items.
        report: counts of everything that was read, dropped and tied.
        tied: (nnz,) bool, the interaction has the same time as the one before it in its row, at the resolution of the
            source; None when the order came without times.
        extra: further columns of the log by name (`extra_columns` of `load_data`), aligned to `sequences.items`: (nnz,)
            float64 with NaN for no value, or (nnz,) strings with "" for none.
    """

    name: str
    item_ids: list[str]
    user_ids: list[str]
    sequences: Sequences
    items: ItemTable | None
    repeats: bool
    report: DataReport
    tied: np.ndarray | None = field(default=None, repr=False)
    extra: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        """U."""
        return len(self.user_ids)

    def __repr__(self) -> str:
        return (
            f"RecommendationData({self.name!r}, users={self.num_users}, items={self.num_items}, "
            f"interactions={self.sequences.num_items})"
        )


def load_data(
    source: Any,
    *,
    items: Any = None,
    data_dir: str | Path | None = None,
    name: str | None = None,
    min_user: int | None = None,
    min_item: int | None = None,
    shuffle_ties: int | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str | None = "timestamp",
    rating_column: str = "rating",
    min_rating: float | None = None,
    require_text: bool = False,
    time_unit: str | None = None,
    keep_duplicates: bool = False,
    encoding: str | None = None,
    max_text_length: int = MAX_TEXT_LENGTH,
    extra_columns: Sequence[str] = (),
) -> RecommendationData:
    """Read an interaction log and its item table.

    Items keep the order of the item table, or of their ids; users the order of their ids: the order of the rows in the
    file decides nothing but ties.

    Args:
        source: name of a data set (`data/named.py`), file, MovieLens or RecBole folder, `datasets.Dataset`, pandas or
            polars frame, `pyarrow.Table`.
        items: item table, any such source; a known folder brings its own.
        data_dir: folder of the named data sets, by default `$HF_GENREC_DATA`.
        name: what to call the data.
        min_user, min_item: least interactions of a user and of an item, applied until nothing changes. By default 5 and
            5; a named data set brings its own (MovieLens-100K and the published Amazon cuts: 0). With `min_item` 0 the
            items of the table that nobody consumed stay in the catalogue.
        shuffle_ties: seed that puts interactions of one user at one time into random order; None keeps the input order.
        user_column, item_column, timestamp_column, rating_column: names in the source. `timestamp_column=None`: the
            rows are in time order already.
        min_rating: keep interactions rated at least so.
        require_text: raise when an item has no text.
        time_unit: "s", "ms", "us" or "ns" when the size of the numbers does not tell.
        keep_duplicates: keep rows equal to another in user, item and timestamp. They are events logged twice, so by
            default the first one stays and the report counts the others. Without timestamps all rows stay.
        encoding: of text files, UTF-8 by default.
        max_text_length: characters kept of an item text; longer ones are capped with a warning.
        extra_columns: columns to keep beside the interactions where the source has them (ratings, reviews); what it has
            not is noted in the report.

    Raises:
        InteractionTableError, ItemTableError: the message names the file, row or field and the fix.

    Example:
        >>> log = {"user_id": ["u", "u", "v"], "item_id": ["b", "a", "a"], "timestamp": [2, 1, 1]}
        >>> data = load_data(log, min_user=0, min_item=0)
        >>> data.item_ids, data.user_ids, [row.tolist() for row in data.sequences]
        (['a', 'b'], ['u', 'v'], [[0, 1], [0]])
    """
    named = canonical_name(source) if isinstance(source, str) else None
    if named is not None and not Path(source).is_file():
        log = read_named(named, data_dir, max_text_length)
    elif isinstance(source, str) and not Path(source).expanduser().exists() and not format_of(Path(source)):
        raise unknown_name(source)
    else:
        log = open_log(
            source,
            user_column=user_column,
            item_column=item_column,
            timestamp_column=timestamp_column,
            rating_column=None if min_rating is None else rating_column,
            encoding=encoding,
            max_text_length=max_text_length,
            all_columns=bool(extra_columns),
        )
    log = log.checked()
    table = log.items if items is None else open_items(items, item_column, encoding, max_text_length)
    report = DataReport(
        name=name or log.name,
        source=Path(log.where).name,  # the report travels with models: no path of this machine
        rows_read=log.interactions.num_rows,
        min_user=log.min_user if min_user is None else int(min_user),
        min_item=log.min_item if min_item is None else int(min_item),
        notes=list(log.notes),
    )
    rows, user_ids, item_ids = _rows(log, time_unit, report, extra_columns)
    keep = log.rated(rating_column, min_rating)
    if keep is not None and not keep.all():
        report.dropped[f"rated below {min_rating:g}"] = int((~keep).sum())
        rows = rows.take(keep)
    rows = _in_order(rows, log.where, shuffle_ties, report)
    rows = _without_duplicates(rows, keep_duplicates, report)
    rows = _filtered(rows, len(user_ids), len(item_ids), log.where, report)
    return _assembled(rows, user_ids, item_ids, table, log.where, require_text, report)


@dataclass(frozen=True)
class _Rows:
    """Parallel arrays (n,): user codes, item codes, ticks that order them, unix seconds (the last two may be None), and
    further columns.
    """

    users: np.ndarray
    items: np.ndarray
    ticks: np.ndarray | None
    seconds: np.ndarray | None
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> _Rows:
        """The rows of a mask or an index array."""
        ticks = None if self.ticks is None else self.ticks[rows]
        seconds = None if self.seconds is None else self.seconds[rows]
        extra = {name: values[rows] for name, values in self.extra.items()}
        return _Rows(self.users[rows], self.items[rows], ticks, seconds, extra)

    def tied(self) -> np.ndarray:
        """(n,) bool of sorted rows: same user and same time as the row before."""
        assert self.ticks is not None
        tied = np.zeros(len(self.users), bool)
        tied[1:] = (self.users[1:] == self.users[:-1]) & (self.ticks[1:] == self.ticks[:-1])
        return tied


def _rows(
    log: LogSource, time_unit: str | None, report: DataReport, extra_columns: Sequence[str]
) -> tuple[_Rows, pa.Array, pa.Array]:
    table = log.interactions
    users, user_ids = id_codes(table[log.user_column], log.user_column, log.where)
    items, item_ids = id_codes(table[log.item_column], log.item_column, log.where)
    ticks = seconds = None
    if log.order_column is not None:
        ticks = table[log.order_column].to_numpy()
        report.time_unit = "order only"
    elif log.timestamp_column is not None:
        time = table[log.timestamp_column]
        ticks, seconds, report.time_unit = time_ticks(time, log.timestamp_column, log.where, time_unit)
    extra = {name: extra_values(table[name]) for name in extra_columns if name in table.column_names}
    report.notes += [f"no column {name!r} in the log" for name in extra_columns if name not in extra]
    return _Rows(users, items, ticks, seconds, extra), user_ids, item_ids


def _in_order(rows: _Rows, where: str, shuffle_ties: int | None, report: DataReport) -> _Rows:
    if shuffle_ties is None:
        return rows.take(sort_by_user_and_time(rows.users, rows.ticks))
    if rows.ticks is None:
        raise InteractionTableError(
            f"{where}: shuffle_ties={shuffle_ties} needs timestamps, and this data has none. Leave it out, or name the "
            "time column with timestamp_column=."
        )
    report.tie_policy = f"shuffled (seed {shuffle_ties})"
    rows = rows.take(np.random.default_rng(shuffle_ties).permutation(len(rows.users)))
    return rows.take(sort_by_user_and_time(rows.users, rows.ticks))


def _without_duplicates(rows: _Rows, keep_all: bool, report: DataReport) -> _Rows:
    """Count rows equal to an earlier one in user, item and time, and drop them unless all are kept."""
    if rows.ticks is None:
        return rows
    tied = rows.tied()
    member = np.flatnonzero(tied | np.append(tied[1:], False))
    moment = np.cumsum(~tied)[member]  # number of the (user, time) pair
    by_item = np.lexsort((rows.items[member], moment))
    order, moment = member[by_item], moment[by_item]
    again = np.zeros(len(order), bool)
    again[1:] = (rows.items[order][1:] == rows.items[order][:-1]) & (moment[1:] == moment[:-1])
    report.exact_duplicates = int(again.sum())
    if keep_all or not report.exact_duplicates:
        return rows
    report.dropped["exact duplicate (user, item, timestamp)"] = report.exact_duplicates
    keep = np.ones(len(rows.users), bool)
    keep[order[again]] = False
    return rows.take(keep)


def _filtered(rows: _Rows, num_users: int, num_items: int, where: str, report: DataReport) -> _Rows:
    least_user, least_item = report.min_user, report.min_item
    keep = core_filter(rows.users, rows.items, num_users, num_items, min_user=least_user, min_item=least_item)
    if not keep.any():
        raise InteractionTableError(
            f"{where}: no interaction survives min_user={least_user} and min_item={least_item} ({len(keep):,} "
            f"interactions of {num_users:,} users with {num_items:,} items). Lower them."
        )
    if keep.all():
        return rows
    # at the fixed point every dropped row has an item, or else a user, that lost all its rows
    item_gone = np.bincount(rows.items[keep], minlength=num_items)[rows.items[~keep]] == 0
    for count, reason in (
        (int(item_gone.sum()), f"item with fewer than {least_item} interactions"),
        (int((~item_gone).sum()), f"user with fewer than {least_user} interactions"),
    ):
        if count:
            report.dropped[reason] = count
    return rows.take(keep)


def _assembled(
    rows: _Rows,
    user_ids: pa.Array,
    item_ids: pa.Array,
    table: ItemTable | None,
    where: str,
    require_text: bool,
    report: DataReport,
) -> RecommendationData:
    """Dense indices, catalogue order, item table, and the figures of the report."""
    user_counts = np.bincount(rows.users, minlength=len(user_ids))
    present = np.flatnonzero(user_counts)
    consumed = np.bincount(rows.items, minlength=len(item_ids)) > 0
    catalogue, rank = _catalogue(item_ids, consumed, table, keep_unseen=report.min_item == 0)
    sequences = Sequences(offsets_from_lengths(user_counts[present]), rank[rows.items], rows.seconds)
    report.users, report.items, report.interactions = len(present), len(catalogue), len(rows.items)
    report.users_dropped, report.items_dropped = len(user_ids) - len(present), int((~consumed).sum())
    report.items_without_interactions = len(catalogue) - int(consumed.sum())
    tied = None
    if rows.ticks is not None:
        tied = rows.tied()
        _count_ties(tied, sequences, report)
    if rows.seconds is not None:
        report.first_time, report.last_time = int(rows.seconds.min()), int(rows.seconds.max())
    report.repeated_interactions = _repeats(sequences, len(catalogue))
    aligned = None
    if table is not None:
        aligned = table.align(catalogue)
        report.items_not_in_table = aligned.unlisted
        report.items_without_text = int((~aligned.has_text()).sum())
        report.texts_capped = table.texts_capped
        if require_text:
            aligned.require_text()
    elif require_text:
        raise ItemTableError(f"{where}: text is needed and there is no item table. Pass items= (item_id, title, ...).")
    return RecommendationData(
        name=report.name,
        item_ids=catalogue,
        user_ids=user_ids.take(pa.array(present)).to_pylist(),
        sequences=sequences,
        items=aligned,
        repeats=report.repeated_interactions > 0,
        report=report,
        tied=tied,
        extra=rows.extra,
    )


def _catalogue(
    item_ids: pa.Array, consumed: np.ndarray, table: ItemTable | None, keep_unseen: bool
) -> tuple[list[str], np.ndarray]:
    """The ids of the catalogue, and for each code its place in it (-1: dropped).

    First the item table in its order, then ids it lacks in theirs.
    """
    rank = np.full(len(item_ids), -1, np.int32)
    listed = pa.array([], pa.string()) if table is None else table.table["item_id"].combine_chunks()
    codes = pc.fill_null(pc.index_in(listed, value_set=item_ids), -1).to_numpy(zero_copy_only=False)
    known = codes >= 0
    known[known] = consumed[codes[known]]
    rows = np.arange(len(listed)) if keep_unseen else np.flatnonzero(known)
    places = np.flatnonzero(known[rows])
    rank[codes[rows[places]]] = places
    extra = np.flatnonzero(consumed & (rank < 0))
    rank[extra] = len(rows) + np.arange(len(extra), dtype=np.int32)
    return listed.take(pa.array(rows)).to_pylist() + item_ids.take(pa.array(extra)).to_pylist(), rank


def _repeats(sequences: Sequences, num_items: int) -> int:
    """Interactions with an item that the user already had."""
    pairs = sequences.row_index() * num_items + sequences.items
    pairs.sort()
    return int((pairs[1:] == pairs[:-1]).sum())


def _count_ties(tied: np.ndarray, sequences: Sequences, report: DataReport) -> None:
    member = tied | np.append(tied[1:], False)
    report.ties_rows, report.ties_beyond_first = int(member.sum()), int(tied.sum())
    report.ties_users = len(np.unique(sequences.row_index()[member]))
    report.ties_largest = int(np.bincount(np.cumsum(~tied)).max()) if report.ties_rows else 0
    report.ties_last_two = int(tied[sequences.offsets[1:] - 1].sum())
