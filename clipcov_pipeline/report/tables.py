"""The leaderboard as people read it: headings and rows, as text for a terminal or as Markdown, and its notes.

Scores are shares between 0 and 1 in files, as CLIP_benchmark has them, and percent where people read them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.recipes import subset_key
from clipcov_pipeline.report.leaderboard import CHANCE, GROUP, RANDOM

COLUMNS = 120  # of a terminal

PROTOCOL_NAMES = {"samples_seen": "samples", "epochs": "epochs"}

SHORT = (
    ("text_retrieval_recall@", "i2t R@"),
    ("image_retrieval_recall@", "t2i R@"),
    ("mean_per_class_recall", "mpcr"),
    ("lp_", "probe "),
    ("knn_", "k-NN "),
)

Row = tuple[str, float, str]
"""(method, fraction, protocol)"""


def ordered(board: pl.DataFrame, primary: str) -> list[Row]:
    """Return the rows: by protocol, the full pool, then by fraction, best by ``primary`` first."""
    rows = board.select(GROUP).unique(maintain_order=True).with_row_index("place")
    first = rows.group_by("protocol").agg(block=pl.col("place").min())
    best = board.filter(pl.col("metric") == primary).select(*GROUP, "mean")
    found = rows.join(first, on="protocol").join(best, on=GROUP, how="left")
    by = ["block", pl.col("method") != FULL, "fraction", "mean", "method"]
    return list(
        found.sort(by, descending=[False, False, False, True, False], nulls_last=True)
        .select(GROUP)
        .iter_rows()
    )


def metrics_of(board: pl.DataFrame, primary: str) -> list[str]:
    """Return all metrics, the primary one first."""
    found = board["metric"].unique(maintain_order=True).to_list()
    return [primary, *(metric for metric in found if metric != primary)]


def shown(metrics: list[str], primary: str) -> list[str]:
    """Return the metrics that fit on a terminal: recall at 10 and per-class recall stay in the files."""
    return [m for m in metrics if m == primary or not m.endswith(("@10", "mean_per_class_recall"))]


def short_name(metric: str) -> str:
    """Return a metric's name for a heading: ``heldout_vendor/text_retrieval_recall@5`` -> ``i2t R@5``."""
    name = metric.partition("/")[2]
    for long, short in SHORT:
        name = name.replace(long, short)
    return name


def cells(board: pl.DataFrame) -> Mapping[tuple[Row, str], str]:
    """Return every score in percent, with its spread over the seeds where there are several."""
    table = {}
    for row in board.iter_rows(named=True):
        spread = f" ±{100 * row['std']:.1f}" if row["std"] is not None else ""
        arm = row["method"], row["fraction"], row["protocol"]
        table[arm, row["metric"]] = f"{100 * row['mean']:.1f}{spread}"
    return table


def to_rows(board: pl.DataFrame, primary: str, sizes: Mapping[str, int]) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of the table that people read; the last row is chance level.

    The columns that say which arm, the primary metric and its comparisons, then the other metrics. Columns
    that would say the same in every row (the protocol) or nothing (a comparison) are left out.

    Args:
        board: `leaderboard`'s table.
        primary: the metric that the rows are sorted by.
        sizes: samples of each subset (`subset_sizes`).
    """
    metrics = shown(metrics_of(board, primary), primary)
    values, arms = cells(board), ordered(board, primary)
    main = {
        (row["method"], row["fraction"], row["protocol"]): row
        for row in board.filter(pl.col("metric") == primary).iter_rows(named=True)
    }
    protocols = board["protocol"].n_unique() > 1
    columns = [
        ("method", [method for method, _, _ in arms]),
        *([("protocol", [protocol for _, _, protocol in arms])] if protocols else []),
        ("fraction", [f"{100 * fraction:g}%" for _, fraction, _ in arms]),
        ("samples", [f"{sizes.get(subset_key(method, fraction), 0):,}" for method, fraction, _ in arms]),
        ("seeds", [str(main[arm]["seeds"]) if arm in main else "0" for arm in arms]),
    ]
    chance = {"method": CHANCE}
    for name, value in board.select("metric", "chance").unique(maintain_order=True).iter_rows():
        chance[_heading(name, primary)] = f"{100 * value:.1f}"
    scores = [
        (_heading(name, primary), [values.get((arm, name), "missing") for arm in arms]) for name in metrics
    ]
    compared = [
        (f"difference to {RANDOM}", [_difference(main.get(arm), RANDOM) for arm in arms]),
        (f"difference to {FULL}", [_difference(main.get(arm), FULL) for arm in arms]),
        ("ratio to next", [_ratio(main.get(arm)) for arm in arms]),
    ]
    columns += [scores[0], *(column for column in compared if any(column[1])), *scores[1:]]
    last = [chance.get(heading, "") for heading, _ in columns]
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    return [heading for heading, _ in columns], [*rows, last]


def as_text(
    board: pl.DataFrame,
    primary: str,
    sizes: Mapping[str, int],
    missing: Sequence[str] = (),
    more: Sequence[str] = (),
) -> str:
    """Return the table for a terminal with its notes; arms of no score at all are among ``missing`` only.

    ``more``: further notes (`suite_notes`, sets that are left out).
    """
    headings, rows = to_rows(board, primary, sizes)
    return "\n".join([to_text(headings, rows, COLUMNS), *notes(board, primary, missing), *more]) + "\n"


def _heading(metric: str, primary: str) -> str:
    return f"{metric.partition('/')[0]} {short_name(metric)}{'*' if metric == primary else ''}"


def _difference(row: Mapping[str, Any] | None, name: str) -> str:
    """Return a difference in points, with its interval where there are several seeds."""
    if row is None or row[f"{name}_difference"] is None:
        return ""
    value, low, high = (row[f"{name}_{part}"] for part in ("difference", "low", "high"))
    return f"{100 * value:+.1f}" + ("" if low is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]")


def _ratio(row: Mapping[str, Any] | None) -> str:
    return "" if row is None or row["baseline_ratio"] is None else f"{row['baseline_ratio']:.2f}"


def notes(board: pl.DataFrame, primary: str, missing: Sequence[str] = ()) -> list[str]:
    """Return what the table does not say by itself, a line each; ``missing`` names scores that lack."""
    lines = [f"* {primary}, the primary metric (percent, higher is better)"]
    main = board.filter(pl.col("metric") == primary)
    if main[f"{RANDOM}_pairs"].max() or main[f"{FULL}_pairs"].max():
        several = main[f"{FULL}_low"].count() or main[f"{RANDOM}_low"].count()
        interval = "[95 % bootstrap interval over the seeds]" if several else "one seed has no interval"
        at = f", to {RANDOM} at the same fraction" if main[f"{RANDOM}_pairs"].max() else ""
        lines.append(f"difference: of *, in points, paired by seed{at}; {interval}")
    best = main.drop_nulls("baseline_ratio").select("fraction", "protocol", "best_baseline")
    if best.height:
        both = best["protocol"].n_unique() > 1
        at = ", ".join(
            f"{name} at {100 * fraction:g}%{f' {protocol}' if both else ''}"
            for fraction, protocol, name in best.unique(maintain_order=True).sort("fraction").iter_rows()
        )
        lines.append(f"ratio: of * to the best method that is not ClipCov ({at})")
    if missing:
        lines.append(f"missing, in no mean above: {', '.join(missing)}")
    return lines


def to_text(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Return an aligned table; headings take two lines, and neighbours share the first one's word.

    ``width``: most characters a line; columns at the end that do not fit are left out, and a line says so.
    """
    heads = [(top, rest) for top, _, rest in (heading.partition(" ") for heading in headings)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(heads))]
    kept = len(heads)
    while True:
        line_widths = _wide_enough(heads[:kept], widths)
        rule = "-" * sum(line_widths, 2 * (kept - 1))
        if width is None or len(rule) <= width or kept == 1:
            break
        kept -= 1
    lines = [_words([top for top, _ in heads[:kept]], line_widths)]
    for cells in ([rest for _, rest in heads[:kept]], *(row[:kept] for row in rows)):
        first, *others = zip(cells, line_widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(wide) for cell, wide in others)]
        lines.append("  ".join(padded).rstrip())
    more = [f"and {len(heads) - kept} more columns in leaderboard.csv"] if kept < len(heads) else []
    return "\n".join([*lines[:2], rule, *lines[2:], *more])


def _wide_enough(heads: Sequence[tuple[str, str]], widths: Sequence[int]) -> list[int]:
    """Widen columns to their headings; a word over several columns asks for the width of all together."""
    wide = [max(w, len(rest)) for w, (_, rest) in zip(widths, heads, strict=False)]
    for start, stop in _spans([top for top, _ in heads]):
        lacking = len(heads[start][0]) - sum(wide[start:stop], 2 * (stop - start - 1))
        wide[stop - 1] += max(0, lacking)
    return wide


def _words(tops: Sequence[str], widths: Sequence[int]) -> str:
    """Return the first line of the headings, each word once over the columns that share it."""
    words = []
    for start, stop in _spans(tops):
        span = sum(widths[start:stop], 2 * (stop - start - 1))
        words.append(tops[start].ljust(span) if start == 0 else tops[start].rjust(span))
    return "  ".join(words).rstrip()


def _spans(tops: Sequence[str]) -> list[tuple[int, int]]:
    """Return (start, stop) of runs of equal words."""
    starts = [i for i, top in enumerate(tops) if i == 0 or top != tops[i - 1]]
    return list(zip(starts, [*starts[1:], len(tops)], strict=True))


def to_markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Return the table as GitHub-flavoured Markdown."""
    align = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, align, *rows])
