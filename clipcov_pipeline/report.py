"""The leaderboard: every arm's scores side by side, as a table, as text and as a plot.

Scores are shares between 0 and 1 in files, as CLIP_benchmark has them, and percent where people read them.
"""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from clipcov_pipeline.config import FULL, Suite
from clipcov_pipeline.plan import Plan, Recipe, evaluation_sets, recipes, subset_key
from clipcov_pipeline.project import Project

CHANCE = "chance"
CLIPCOV = "clipcov"
RANDOM = "random"
NOT_BASELINES = {CLIPCOV, "oracle", "external"}  # methods: the one that is judged, and what knows the truth
SCORE_SCHEMA = {
    "arm": pl.String,
    "method": pl.String,
    "fraction": pl.Float64,
    "protocol": pl.String,
    "seed": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
    "chance": pl.Float64,
    "n_samples": pl.Int64,
}
GROUP = ["method", "fraction", "protocol"]  # a row of the leaderboard: the arms that differ in the seed
DRAWS = 10_000  # of the bootstrap
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


def collect_scores(files: Iterable[tuple[Recipe, str, Path]]) -> pl.DataFrame:
    """Read score records into one tidy table (`SCORE_SCHEMA`): one row an arm and metric.

    Args:
        files: (arm, evaluation set, path of its ``scores.json``).
    """
    rows: list[dict[str, Any]] = []
    for recipe, name, path in files:
        for record in json.loads(path.read_text()):
            for metric, value in record["metrics"].items():
                rows.append(
                    {
                        "arm": recipe.key,
                        "method": recipe.method,
                        "fraction": recipe.fraction,
                        "protocol": recipe.protocol,
                        "seed": recipe.seed,
                        "metric": f"{name}/{metric}",
                        "value": value,
                        "chance": record["chance"][metric],
                        "n_samples": record["n_samples"],
                    }
                )
    return pl.DataFrame(rows, schema=SCORE_SCHEMA)


def with_suites(
    scores: pl.DataFrame, suites: Mapping[str, Suite], absent: Container[str] = ()
) -> pl.DataFrame:
    """Put a metric ``SUITE/METRIC`` before the others: the mean over the suite's sets that are there.

    An arm that lacks the score of one of them has no average, so that all averages are over the same sets.
    ``chance`` is averaged too, ``n_samples`` added up.

    Args:
        scores: `collect_scores`'s table.
        suites: label -> suite.
        absent: evaluation sets without a folder: in no average.
    """
    keys = [name for name in scores.columns if name not in ("metric", "value", "chance", "n_samples")]
    parts = []
    for name, suite in suites.items():
        members = [f"{member}/{suite.metric}" for member in suite.sets if member not in absent]
        mean = (
            scores.filter(pl.col("metric").is_in(members))
            .group_by(keys, maintain_order=True)
            .agg(
                pl.len(),
                pl.lit(f"{name}/{suite.metric}").alias("metric"),
                pl.col("value").mean(),
                pl.col("chance").mean(),
                pl.col("n_samples").sum(),
            )
        )
        parts.append(mean.filter(pl.col("len") == len(members)).select(scores.columns))
    return pl.concat([*parts, scores])


def suite_notes(suites: Mapping[str, Suite], absent: Container[str] = ()) -> list[str]:
    """Return a line a suite that names the sets it is the mean of, and those it is not."""
    lines = []
    for name, suite in suites.items():
        found = [member for member in suite.sets if member not in absent]
        left_out = [member for member in suite.sets if member in absent]
        text = f"mean of {len(found)} of its {len(suite.sets)} sets ({', '.join(found)})"
        text = text if found else f"not defined, none of its {len(suite.sets)} sets has a folder"
        rest = f"; left out, folder absent: {', '.join(left_out)}" if left_out else ""
        lines.append(f"{name}/{suite.metric}: {text}{rest}")
    return lines


def missing_sets(project: Project) -> list[str]:
    """Return lines on what each suite is the mean of, and on the sets that are left out."""
    world = project.world
    return [*suite_notes(project.config.evaluate.suites, world.absent), *world.warnings()]


def scores_so_far(project: Project) -> tuple[pl.DataFrame, list[str]]:
    """Return the scores of the arms that are up to date, and the names of those that are missing."""
    plan, store, files, missing = project.plan(), project.store, [], []
    absent = project.world.absent
    for arm in recipes(project.config):
        for name in evaluation_sets(project.config, absent):
            step = plan.by_name[f"scores/{arm.key}@{name}"]
            if step.record is None:
                missing.append(step.node.partition)
            else:
                files.append((arm, name, store.folder(step.record) / "scores.json"))
    return with_suites(collect_scores(files), project.config.evaluate.suites, absent), missing


def champion(scores: pl.DataFrame, primary: str) -> str | None:
    """Return the best arm: of the row with the best mean of ``primary`` the seed that is best.

    The row is chosen by its mean, so that one lucky seed does not win; None without scores of ``primary``.
    """
    arms = scores.filter(pl.col("metric") == primary)
    means = arms.with_columns(mean=pl.col("value").mean().over(GROUP))
    best = means.sort("mean", "value", *GROUP, "seed", descending=[True, True, False, False, False, False])
    return best["arm"].first() if best.height else None  # type: ignore[return-value]


def subset_sizes(plan: Plan) -> dict[str, int]:
    """Return the number of samples of every subset that is up to date, by its partition."""
    steps = plan.of("subsets")
    return {step.node.partition: step.record.stats["samples"] for step in steps if step.record is not None}


# ---------------------------------------------------------------- statistics


def leaderboard(scores: pl.DataFrame, methods: Mapping[str, str] | None = None) -> pl.DataFrame:
    """Return one row a method, fraction, protocol and metric.

    Columns: mean, std (ddof 1, null for one seed), seeds, chance, n_samples; the paired differences to the
    random subset of the same fraction (``random_*``) and to the full pool (``full_*``), as `differences`
    gives them; and for ClipCov's rows ``best_baseline``, the best other method at the same fraction (random
    and heuristics; nothing that is told the truth), and ``baseline_ratio``, mean / mean of that method. A
    figure that is not defined (nothing to compare with, one seed, a baseline of 0) is null.

    Args:
        scores: `collect_scores`'s table.
        methods: label -> name of the method behind it; a label that is missing is its own method.
    """
    grouped = scores.group_by(*GROUP, "metric", maintain_order=True)
    board = grouped.agg(
        mean=pl.col("value").mean(),
        std=pl.col("value").std(),
        seeds=pl.len(),
        chance=pl.col("chance").first(),
        n_samples=pl.col("n_samples").first(),
    )
    labels: list[str] = scores["method"].unique(maintain_order=True).to_list()
    kind = {label: (methods or {}).get(label, label) for label in labels}
    at_random = next((label for label, method in kind.items() if method == RANDOM), None)

    def of_method(label: str | None) -> pl.DataFrame:
        return scores.clear() if label is None else scores.filter(pl.col("method") == label)

    for name, reference, on in (
        (RANDOM, at_random, ["fraction", "protocol", "seed", "metric"]),
        (FULL, FULL, ["protocol", "seed", "metric"]),
    ):
        pairs = differences(scores, of_method(reference), on, name)
        board = board.join(pairs, on=[*GROUP, "metric"], how="left", maintain_order="left")
    return _with_best_baseline(board, kind)


def differences(scores: pl.DataFrame, reference: pl.DataFrame, on: Sequence[str], name: str) -> pl.DataFrame:
    """Return the mean difference to ``reference``, its arms paired with each row's by ``on`` (seed included).

    One row a method, fraction, protocol and metric: ``NAME_difference`` (mean over the pairs), ``NAME_pairs``
    (how many seeds have both), and ``NAME_low`` and ``NAME_high``, the 95 % interval of `bootstrap_interval`
    over the pairs: null for one pair. The interval is about the seeds, that is about initial weights and
    order of samples; it does not cover the choice of the evaluation samples or of the pool.
    """
    other = reference.select(*on, other="value", theirs="method")
    pairs = scores.join(other, on=list(on), maintain_order="left").filter(
        pl.col("method") != pl.col("theirs")
    )
    rows = []
    for key, group in pairs.group_by(*GROUP, "metric", maintain_order=True):
        values = (group["value"] - group["other"]).to_numpy()
        rows.append((*key, values.mean(), *(bootstrap_interval(values) or (None, None)), len(values)))
    schema = {name: scores.schema[name] for name in (*GROUP, "metric")}
    figures = {f"{name}_{part}": pl.Float64 for part in ("difference", "low", "high")}
    return pl.DataFrame(rows, schema={**schema, **figures, f"{name}_pairs": pl.Int64}, orient="row")


def bootstrap_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean [n] -> (low, high); None for n < 2.

    The percentile interval is too narrow for a handful of values (with 3 of them it covers about 75 %, with
    5 about 83 %): it shows the spread of the seeds and is no test. The draws are the same in every call.
    """
    if len(values) < 2:
        return None
    low, high = np.percentile(values[_draws(len(values))].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@lru_cache
def _draws(n: int) -> np.ndarray:
    """Rows [DRAWS, n] that the bootstrap draws with replacement."""
    return np.random.default_rng(0).integers(n, size=(DRAWS, n))


def _with_best_baseline(board: pl.DataFrame, kind: Mapping[str, str]) -> pl.DataFrame:
    place = ["fraction", "protocol", "metric"]
    baselines = [label for label, method in kind.items() if method not in NOT_BASELINES and label != FULL]
    best = (
        board.filter(pl.col("method").is_in(baselines))
        .sort("mean", "method", descending=[True, False])
        .group_by(place, maintain_order=True)
        .agg(best_baseline=pl.col("method").first(), best_mean=pl.col("mean").first())
    )
    judged = pl.col("method").is_in([label for label, method in kind.items() if method == CLIPCOV])
    ratio = pl.when(judged & (pl.col("best_mean") > 0)).then(pl.col("mean") / pl.col("best_mean"))
    return (
        board.join(best, on=place, how="left", maintain_order="left")
        .with_columns(best_baseline=pl.when(judged).then("best_baseline"), baseline_ratio=ratio)
        .drop("best_mean")
    )


# ---------------------------------------------------------------- the table that people read


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


def plot(board: pl.DataFrame, primary: str, path: Path) -> None:
    """Draw the primary metric over the fraction, the full pool and chance as levels; write a PNG.

    One panel a protocol.
    """
    from matplotlib.figure import Figure

    scores = board.filter(pl.col("metric") == primary).with_columns(
        pl.col("mean") * 100, pl.col("std").fill_null(0) * 100
    )
    protocols = scores["protocol"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(6.4 * len(protocols), 4.0), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
    for axes, protocol in zip(panels, protocols, strict=True):
        _plot_panel(axes, scores.filter(pl.col("protocol") == protocol))
        if len(protocols) > 1:
            axes.set_title(f"every arm trains for the same number of {PROTOCOL_NAMES[protocol]}", fontsize=9)
    bars = "; bars and band: one standard deviation over the seeds" if scores["std"].max() else ""
    figure.supxlabel(f"Higher is better{bars}", fontsize=8)
    highest = [(scores["mean"] + scores["std"]).max(), 100 * (scores["chance"].max() or 0)]  # type: ignore[operator]
    top = 1.08 * max(float(value) for value in highest if value is not None) or None  # type: ignore[arg-type]
    set_name, _, _ = primary.partition("/")
    panels[0].set(ylabel=f"{set_name}: {short_name(primary)} (%)", ylim=(0, top))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path)


def _plot_panel(axes: Any, scores: pl.DataFrame) -> None:
    """Draw the rows of one protocol (percent)."""
    markers = "osDv^<>PX*"
    methods = [method for method in scores["method"].unique(maintain_order=True) if method != FULL]
    shares = scores.filter(pl.col("method") != FULL)["fraction"].unique().sort() * 100
    # side by side, so that no bar hides another
    step = 0.1 * float(shares.diff().min() or 10) / max(len(methods), 1)  # type: ignore[arg-type]
    for index, method in enumerate(methods):
        line = scores.filter(pl.col("method") == method).sort("fraction")
        share = line["fraction"] * 100 + (index - (len(methods) - 1) / 2) * step
        marker = markers[index % len(markers)]
        axes.errorbar(share, line["mean"], line["std"], marker=marker, label=method, capsize=3, markersize=5)
    full = scores.filter(pl.col("method") == FULL)
    if full.height:
        level, spread = full["mean"][0], full["std"][0]
        axes.axhline(level, color="black", linestyle="--", linewidth=1, label="full pool")
        if spread:
            axes.axhspan(level - spread, level + spread, color="black", alpha=0.08, linewidth=0)
    axes.axhline(100 * scores["chance"][0], color="grey", linestyle=":", linewidth=1, label=CHANCE)
    axes.set(xlabel="share of the pool trained on (%)")
    if shares.len():
        axes.set_xticks(shares.to_list())
        room = float(shares.diff().min() or 10) / 5  # type: ignore[arg-type]
        axes.set_xlim(shares[0] - room, shares[-1] + room)
    axes.grid(alpha=0.3)


def plot_learning_curve(curve: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw a training's loss over its steps, and the learning rate beside it; write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in curve]
    axes.plot(steps, [point["loss"] for point in curve], label="loss (left)")
    axes.set(xlabel="step", ylabel="contrastive loss", ylim=(0, None))
    rate = axes.twinx()
    rates = [point["lr"] for point in curve]
    rate.plot(steps, rates, color="grey", linestyle=":", label="learning rate (right)")
    rate.set(ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path)
