"""The leaderboard: every arm's scores side by side, as a table, as text and as a plot.

Scores are shares between 0 and 1 in files, as CLIP_benchmark has them, and percent where people read them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from clipcov_pipeline.config import FULL
from clipcov_pipeline.plan import Recipe

CHANCE = "chance"
SCORE_SCHEMA = {
    "method": pl.String,
    "fraction": pl.Float64,
    "seed": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
    "chance": pl.Float64,
    "n_samples": pl.Int64,
}
SHORT = (
    ("text_retrieval_recall@", "i2t R@"),
    ("image_retrieval_recall@", "t2i R@"),
    ("mean_per_class_recall", "mpcr"),
)


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
                        "method": recipe.method,
                        "fraction": recipe.fraction,
                        "seed": recipe.seed,
                        "metric": f"{name}/{metric}",
                        "value": value,
                        "chance": record["chance"][metric],
                        "n_samples": record["n_samples"],
                    }
                )
    return pl.DataFrame(rows, schema=SCORE_SCHEMA)


def leaderboard(scores: pl.DataFrame) -> pl.DataFrame:
    """Return one row a method, fraction and metric: mean, std (ddof 1, null for one seed), seeds."""
    grouped = scores.group_by("method", "fraction", "metric", maintain_order=True)
    return grouped.agg(
        mean=pl.col("value").mean(),
        std=pl.col("value").std(),
        seeds=pl.len(),
        chance=pl.col("chance").first(),
        n_samples=pl.col("n_samples").first(),
    )


def ordered(board: pl.DataFrame, primary: str) -> list[tuple[str, float]]:
    """Return the (method, fraction) rows: the full pool, then by fraction, best by ``primary`` first."""
    best = board.filter(pl.col("metric") == primary).sort(
        [pl.col("method") != FULL, "fraction", "mean", "method"], descending=[False, False, True, False]
    )
    return list(best.select("method", "fraction").iter_rows())


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


def cells(board: pl.DataFrame) -> Mapping[tuple[str, float, str], str]:
    """Return every score in percent, with its spread over the seeds where there are several."""
    table = {}
    for row in board.iter_rows(named=True):
        spread = f" ±{100 * row['std']:.1f}" if row["std"] is not None else ""
        table[row["method"], row["fraction"], row["metric"]] = f"{100 * row['mean']:.1f}{spread}"
    return table


def to_rows(
    board: pl.DataFrame, primary: str, sizes: Mapping[tuple[str, float], int]
) -> tuple[list[str], list[list[str]]]:
    """Return (headings, rows) of the table that people read; the last row is chance level."""
    metrics = shown(metrics_of(board, primary), primary)
    values = cells(board)
    seeds = int(board["seeds"].max() or 0)  # type: ignore[arg-type]
    headings = ["method", "fraction", "samples", "seeds"]
    headings += [
        f"{metric.partition('/')[0]} {short_name(metric)}{'*' if metric == primary else ''}"
        for metric in metrics
    ]
    rows = [
        [method, f"{100 * fraction:g}%", f"{sizes.get((method, fraction), 0):,}", str(seeds)]
        + [values.get((method, fraction, metric), "") for metric in metrics]
        for method, fraction in ordered(board, primary)
    ]
    chance = dict(board.select("metric", "chance").unique(maintain_order=True).iter_rows())
    rows.append([CHANCE, "", "", "", *(f"{100 * chance[metric]:.1f}" for metric in metrics)])
    return headings, rows


def to_text(headings: list[str], rows: list[list[str]]) -> str:
    """Return an aligned table; long headings take two lines."""
    heads = [heading.partition(" ") for heading in headings]
    lines = [[top for top, _, _ in heads], [rest for _, _, rest in heads], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    text = []
    for line in lines:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(padded).rstrip())
    rule = "-" * sum(widths, 2 * (len(widths) - 1))
    return "\n".join([*text[:2], rule, *text[2:]])


def to_markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Return the table as GitHub-flavoured Markdown."""
    align = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, align, *rows])


def plot(board: pl.DataFrame, primary: str, path: Path) -> None:
    """Draw the primary metric over the fraction, the full pool and chance as levels; write a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axes = figure.subplots()
    scores = board.filter(pl.col("metric") == primary).with_columns(
        pl.col("mean") * 100, pl.col("std").fill_null(0) * 100
    )
    markers = "osDv^<>PX*"
    for index, method in enumerate(m for m in scores["method"].unique(maintain_order=True) if m != FULL):
        line = scores.filter(pl.col("method") == method).sort("fraction")
        marker = markers[index % len(markers)]
        share = line["fraction"] * 100
        axes.errorbar(share, line["mean"], line["std"], marker=marker, label=method, capsize=3)
    full = scores.filter(pl.col("method") == FULL)
    if full.height:
        axes.axhline(full["mean"][0], color="black", linestyle="--", linewidth=1, label="full pool")
    axes.axhline(100 * scores["chance"][0], color="grey", linestyle=":", linewidth=1, label=CHANCE)
    name, _, _ = primary.partition("/")
    axes.set(
        xlabel="share of the pool trained on (%)", ylabel=f"{name}: {short_name(primary)} (%)", ylim=(0, None)
    )
    axes.set_title("Higher is better; bars are one standard deviation over the seeds", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path)


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
