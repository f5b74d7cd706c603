"""Draws the leaderboard, and the learning curve of one training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.report.leaderboard import CHANCE
from clipcov_pipeline.report.tables import PROTOCOL_NAMES, short_name


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
