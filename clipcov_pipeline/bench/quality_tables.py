"""What `clipcov bench quality` prints and draws."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from clipcov_pipeline.bench.quality import (
    PAPER_BASELINES,
    PRIMARY,
    covariance_and_accuracy,
    rank_correlations,
    seconds_of_arms,
    truth_of_subsets,
)
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import WHOLE


def collect(paths: Iterable[Path]) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return (scores of all arms, truth of all subsets, seconds of all arms), each with a column ``draw``.

    Raises:
        InputError: an experiment without a leaderboard.
    """
    scores, truth, seconds = [], [], []
    for path in paths:
        project = Project.open(str(path))
        record = project.store.current("leaderboard", WHOLE)
        if record is None:
            raise InputError(f"{path}: has no leaderboard yet, run it first: clipcov run --config {path}")
        draw = pl.lit(json.loads((path.parent / "testbed.json").read_text())["draw"]).alias("draw")
        scores.append(pl.read_parquet(project.store.folder(record) / "scores.parquet").with_columns(draw))
        truth.append(truth_of_subsets(project).with_columns(draw))
        seconds.append(seconds_of_arms(project).with_columns(draw))
    return pl.concat(scores), pl.concat(truth), pl.concat(seconds)


def summary(scores: pl.DataFrame, metric: str = PRIMARY) -> pl.DataFrame:
    """Return one row a method and fraction over all seeds and draws.

    Returns:
        mean and std of the metric in percent, runs, and the ratios of the mean to the best of the paper's
        baselines at that fraction and to the full pool (null where there is none).
    """
    rows = scores.filter(pl.col("metric") == metric)
    board = rows.group_by("method", "fraction", maintain_order=True).agg(
        mean=pl.col("value").mean() * 100, std=pl.col("value").std() * 100, runs=pl.len()
    )
    full = board.filter(pl.col("method") == FULL)["mean"]
    best = (
        board.filter(pl.col("method").is_in(PAPER_BASELINES))
        .group_by("fraction")
        .agg(best_baseline=pl.col("mean").max())
    )
    return board.join(best, on="fraction", how="left", maintain_order="left").with_columns(
        to_best_baseline=pl.col("mean") / pl.col("best_baseline"),
        to_full=pl.col("mean") / (full[0] if len(full) else None),
    )


def to_text(scores: pl.DataFrame, truth: pl.DataFrame, seconds: pl.DataFrame) -> str:
    """Return the result as plain text: every metric's table, the truth of the subsets, and what it all took.

    Args:
        scores, truth, seconds: as `collect` returns them.
    """
    metrics = [
        PRIMARY,
        "shifted/acc1",
        "photos/lp_acc1",
        "photos/knn_acc1",
        "captions/text_retrieval_recall@5",
    ]
    present = set(scores["metric"])
    parts = [_table(scores, metric) for metric in metrics if metric in present]
    board = summary(scores)
    ratios = board.filter(pl.col("method").str.starts_with("clipcov"))
    compared = [name for name in PAPER_BASELINES if name in set(board["method"])]
    lines = [f"{PRIMARY}: ratio to the best of {', '.join(compared) or 'no baseline'} and to the full pool"]
    for row in ratios.sort("fraction", "method").iter_rows(named=True):
        other, full = (
            f"{row[k]:.2f}" if row[k] is not None else "-" for k in ("to_best_baseline", "to_full")
        )
        lines.append(f"  {row['method']:24} {100 * row['fraction']:4g} %  {other:>6} {full:>6}")
    correlations = rank_correlations(covariance_and_accuracy(scores, truth))
    tables = [_truth_table(truth), _correlation_table(correlations), _seconds_table(seconds)]
    return "\n\n".join([*parts, "\n".join(lines), *tables])


def _table(scores: pl.DataFrame, metric: str) -> str:
    board = summary(scores, metric)
    fractions = sorted(f for f in board["fraction"].unique() if f < 1)
    cells = {(r["method"], r["fraction"]): r for r in board.iter_rows(named=True)}
    full = cells.get((FULL, 1.0))
    heads = [f"{100 * fraction:g} %" for fraction in fractions]
    lines = [
        f"{metric} (percent; mean ± standard deviation over seeds and pool draws, runs in brackets)",
        f"{'':24}" + "".join(f"{head:>20}" for head in heads),
    ]
    if full is not None:
        lines.append(f"{FULL:24}{_cell(full):>20}")
    methods = board.filter(pl.col("method") != FULL)["method"].unique(maintain_order=True)
    order = sorted(methods, key=lambda m: -cells.get((m, fractions[0]), {"mean": -1})["mean"])
    lines += [
        f"{method:24}" + "".join(f"{_cell(cells.get((method, fraction))):>20}" for fraction in fractions)
        for method in order
    ]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = f" ± {row['std']:.1f}" if row["std"] is not None else ""
    return f"{row['mean']:.1f}{spread} ({row['runs']})"


def _truth_table(truth: pl.DataFrame) -> str:
    grouped = truth.group_by("method", "fraction", maintain_order=True).agg(
        pl.col("precision", "class_balance", "distinct_sources", "alignment", "scale").mean()
    )
    lines = [
        "the planted truth of the subsets: captions that name the right class, balance of the classes (1 is"
        " uniform), distinct photos; their cross-covariance beside the pool's: cosine and ratio of the norms",
        f"{'':24} {'share':>7} {'right':>7} {'balance':>8} {'distinct':>9} {'alignment':>10} {'scale':>6}",
    ]
    lines += [
        f"{row['method']:24} {100 * row['fraction']:5g} % {row['precision']:7.3f}"
        f" {row['class_balance']:8.3f} {row['distinct_sources']:9.3f}"
        f" {_number(row['alignment'], 10, 3)} {_number(row['scale'], 6, 2)}"
        for row in grouped.sort("fraction", "method").iter_rows(named=True)
    ]
    return "\n".join(lines)


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _correlation_table(correlations: pl.DataFrame) -> str:
    lines = [
        f"does the cross-covariance predict {PRIMARY}? Spearman correlation over the subsets of a draw,"
        " mean over draws",
        f"{'':8} {'subsets':>8} {'alignment':>10} {'scale':>7} {'alignment x scale':>18}",
    ]
    lines += [
        f"{100 * row['fraction']:6g} % {row['subsets']:>8} {row['alignment']:10.2f} {row['scale']:7.2f}"
        f" {row['product']:18.2f}"
        for row in correlations.iter_rows(named=True)
    ]
    return "\n".join(lines)


def _seconds_table(seconds: pl.DataFrame) -> str:
    names = ("selection", "training", "overhead", "scoring", "saved")
    medians = seconds.group_by("method", "fraction").agg(pl.col(name).median() for name in names)
    lines = [
        "seconds, medians: a method's ranking (one for all its arms), an arm's training, its start and"
        " tracking, its scores; saved: what as many passes over the full pool would take longer",
        f"{'':24} {'share':>7}" + "".join(f"{name:>10}" for name in names),
    ]
    lines += [
        f"{row['method']:24} {100 * row['fraction']:5g} %" + "".join(f"{row[name]:10.1f}" for name in names)
        for row in medians.sort("fraction", "method").iter_rows(named=True)
    ]
    return "\n".join(lines)


def plot_covariance(scores: pl.DataFrame, truth: pl.DataFrame, path: Path) -> None:
    """Draw every subset's primary metric over its alignment, its scale, and their product."""
    from matplotlib.figure import Figure

    subsets = covariance_and_accuracy(scores, truth)
    figure = Figure(figsize=(13, 4.5), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots(1, 3, sharey=True)
    markers = dict(zip(sorted(set(subsets["fraction"])), "os^Dv<>p", strict=False))
    colours = {method: f"C{i % 10}" for i, method in enumerate(dict.fromkeys(subsets["method"]))}
    for row in subsets.iter_rows(named=True):
        for axis, name in zip(axes, ("alignment", "scale", "product"), strict=True):
            marker = markers.get(row["fraction"], "x")
            axis.plot(row[name], row["accuracy"], marker, color=colours[row["method"]], alpha=0.8)
    axes[0].set(xlabel="alignment: cosine to the pool's cross-covariance", ylabel=f"{PRIMARY} (percent)")
    axes[1].set(xlabel="scale: norm over the pool's")
    axes[2].set(xlabel="alignment x scale")
    colour_keys = [("o", {"color": colour, "label": name}) for name, colour in colours.items()]
    empty = {"mfc": "none", "mec": "black"}
    marker_keys = [(marker, {**empty, "label": f"{100 * share:g} %"}) for share, marker in markers.items()]
    handles = [axes[0].plot([], [], marker, **look)[0] for marker, look in colour_keys + marker_keys]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.savefig(path)
