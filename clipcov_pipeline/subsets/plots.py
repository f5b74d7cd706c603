"""Draws diagnostics as PNG files.

Each says under it what is good. They are drawn on white, so that they read the same on a dark page.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from clipcov_pipeline.subsets.covariance import QUANTITIES
from clipcov_pipeline.subsets.diagnosis import RARE, Diagnosis

SUBSET, RANDOM, POOL = "#c2410c", "#64748b", "#1d4ed8"

TERM_COLOURS = {
    "class": "#1d4ed8",
    "self": "#0891b2",
    "label": "#65a30d",
    "inter": "#a855f7",
    "redundancy": "#c2410c",
}

_ANNOTATED = 12  # a matrix of more methods has no room for numbers


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")


def _save(figure: Any, caption: str, path: Path) -> None:
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path)


def _overall(table: pl.DataFrame) -> dict[str, dict[str, Any]]:
    rows = table.filter(pl.col("scope") == "overall").iter_rows(named=True)
    return {row["quantity"]: row for row in rows}


def _say(axes: Any, why: str) -> None:
    """Write why there is nothing to draw."""
    axes.text(0.5, 0.5, "\n".join(_wrapped(why)), ha="center", va="center", fontsize=8)
    axes.set_axis_off()


def _wrapped(text: str, width: int = 48) -> list[str]:
    from textwrap import wrap

    return wrap(text, width)


def plot_covariance(found: Diagnosis, path: Path) -> None:
    """Draw how well the cross-covariance is kept: overall, and alignment by class over the class's size."""
    figure = _figure(9.6, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _draw_overall(left, _overall(found.table))
    _draw_by_class(right, found)
    caption = (
        "Alignment and subspace overlap near 1 are good: judge by alignment. Errors are least for random"
        " subsets by construction;\nscale above 1: the kept pairs agree more clearly than the pool's."
    )
    _save(figure, caption, path)


def _draw_overall(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    names = [name for name in QUANTITIES if rows[name]["value"] is not None]
    for at, name in enumerate(names):
        row = rows[name]
        if row["random_mean"] is not None:
            axes.errorbar(
                row["random_mean"],
                at,
                xerr=row["random_std"] or 0,
                fmt="s",
                color=RANDOM,
                capsize=3,
                label="random subsets" if at == 0 else None,
            )
        axes.plot(row["value"], at, "o", color=SUBSET, label="this subset" if at == 0 else None)
    if names:
        axes.set_yticks(range(len(names)), [name.replace("_", " ").replace("frob", "Frob") for name in names])
        lowest = min(0.0, *(rows[name]["value"] for name in names))
        axes.set(xlim=(1.1 * lowest, None), ylim=(len(names) - 0.4, -0.6))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.set_title("cross-covariance of the whole pool", fontsize=9)
    else:
        _say(axes, rows["alignment"]["note"])


def _draw_by_class(axes: Any, found: Diagnosis) -> None:
    from matplotlib.ticker import NullFormatter

    sizes, own = found.sizes.pool, found.alignments[0]
    drawn = found.alignments[1:]
    some = np.isfinite(drawn).any(axis=0)
    if some.any() or np.isfinite(own).any():
        mean = np.array([np.nanmean(drawn[:, c]) for c in np.flatnonzero(some)])
        axes.plot(sizes[some], mean, "s", color=RANDOM, markersize=3, alpha=0.6, label="random subsets, mean")
        axes.plot(sizes, own, "o", color=SUBSET, markersize=3, alpha=0.8, label="this subset")
        axes.set(
            xscale="log", xlabel="samples of the class in the pool", ylabel="alignment", ylim=(None, 1.02)
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.set_title("alignment by latent class", fontsize=9)
    else:
        _say(axes, "not defined, because no latent class has a cross-covariance in pool and subset")


def plot_classes(found: Diagnosis, path: Path) -> None:
    """Draw class sizes in pool and subset, the largest class first."""
    figure = _figure(9.6, 3.4)
    axes = figure.subplots()
    pool, subset = found.sizes.pool, found.sizes.subset
    order = np.argsort(-pool, kind="stable")
    order = order[pool[order] > 0]
    place = np.arange(1, len(order) + 1)
    share = subset.sum() / pool.sum()
    axes.step(place, pool[order], where="mid", color=POOL, label="pool")
    axes.step(
        place,
        pool[order] * share,
        where="mid",
        color=RANDOM,
        linestyle="--",
        label="pool x share kept: what random keeps on average",
    )
    kept = subset[order]
    axes.plot(place[kept > 0], kept[kept > 0], "o", color=SUBSET, markersize=3, label="this subset")
    empty = place[kept == 0]
    axes.set_yscale("symlog", linthresh=1)
    axes.plot(empty, np.zeros(len(empty)), "x", color=SUBSET, label=f"left empty: {len(empty):,} classes")
    axes.axhspan(0, RARE - 0.5, color="grey", alpha=0.08, linewidth=0)
    axes.set(xlabel="latent classes, the largest first", ylabel="samples", ylim=(-0.3, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    _save(
        figure,
        f"Good: points along the dashed line or flatter, no cross. Grey band: rare classes (under {RARE}).",
        path,
    )


def plot_similarities(found: Diagnosis, path: Path) -> None:
    """Draw mean similarities within and between classes, all on one scale."""
    figure = _figure(9.6, 3.2)
    axes = figure.subplots()
    rows = _overall(found.table)
    names = [f"{side}_{kind}" for side in ("image", "caption", "cross") for kind in ("within", "between")]
    marks = (
        ("pool", "D", POOL, "pool"),
        ("random_mean", "s", RANDOM, "random subsets"),
        ("value", "o", SUBSET, "this subset"),
    )
    for shift, (column, mark, colour, label) in enumerate(marks):
        at = [
            place + (shift - 1) * 0.15 for place, name in enumerate(names) if rows[name][column] is not None
        ]
        values = [rows[name][column] for name in names if rows[name][column] is not None]
        axes.plot(values, at, mark, color=colour, markersize=5, label=label)
    words = {"image": "images", "caption": "captions", "cross": "image to caption"}
    labels = [f"{words[name.partition('_')[0]]}, {name.partition('_')[2]} classes" for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlabel="mean cosine", ylim=(len(names) - 0.5, -0.5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    missing = next((rows[n]["note"] for n in names if rows[n]["value"] is None), "")
    text = "Good: a wide gap between within and between, no narrower than the pool's."
    _save(figure, f"{text}\n{missing}" if missing else text, path)


def plot_terms(found: Diagnosis, path: Path) -> None:
    """Draw the share of each term of F along the ranking."""
    figure = _figure(9.6, 3.0)
    axes = figure.subplots()
    rows = found.table.filter((pl.col("scope") == "ranking") & pl.col("value").is_not_null())
    if rows.is_empty():
        _say(axes, "not defined, because all terms of F are 0")
    else:
        shares = rows.pivot(on="quantity", index="samples", values="value").sort("samples")
        layers = [shares[f"term_{name}"].to_numpy() for name in TERM_COLOURS]
        colours = list(TERM_COLOURS.values())
        axes.stackplot(shares["samples"], *layers, labels=list(TERM_COLOURS), colors=colours, alpha=0.85)
        first, last = shares["samples"][0], shares["samples"][-1]
        axes.set(xlabel="first so many samples of the ranking", ylabel="share", ylim=(0, 1))
        axes.set_xlim((first, last) if last > first else (0, last + 1))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, reverse=True)
    caption = (
        "Share of each term in the sum of their absolute values. Good: no term has it all; redundancy grows"
        " as the subset fills up."
    )
    _save(figure, caption, path)


def plot_map(frame: pl.DataFrame, path: Path, chosen: np.ndarray | None = None, why: str = "") -> None:
    """Draw the pool's map, and beside it which of its samples are in the subset.

    Args:
        frame: as `pool_map` gives it, and why there is none.
        chosen: bool, for every row of the frame; without it only classes are drawn.
    """
    panels = 1 if chosen is None else 2
    figure = _figure(4.8 * panels + (0 if chosen is not None else 1.2), 4.6)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if why or frame["x"].null_count():
        for panel in axes:
            _say(panel, f"not defined, because {why or 'the pool has no map'}")
        _save(figure, "", path)
        return
    x, y = frame["x"].to_numpy(), frame["y"].to_numpy()
    for panel in axes:
        panel.set(xticks=[], yticks=[], aspect="equal", xlim=_limits(x), ylim=_limits(y))
    if chosen is not None:
        rest = ~chosen
        axes[0].scatter(
            x[rest], y[rest], s=5, color=RANDOM, alpha=0.35, linewidths=0, label=f"left out ({rest.sum():,})"
        )
        axes[0].scatter(
            x[chosen],
            y[chosen],
            s=7,
            color=SUBSET,
            alpha=0.9,
            linewidths=0,
            label=f"chosen ({chosen.sum():,})",
        )
        axes[0].legend(fontsize=8, loc="lower left", markerscale=2)
        axes[0].set_title("chosen against left out", fontsize=9)
    shown = np.ones(len(x), np.bool_) if chosen is None else chosen
    _draw_classes(axes[-1], x, y, frame["latent_class"].to_numpy(), shown)
    which = "all samples" if chosen is None else "chosen samples"
    axes[-1].set_title(f"{which} by latent class", fontsize=9)
    text = (
        "t-SNE of a random sample of the pool, image and caption together. Good: clumps of one colour."
        if chosen is None
        else "t-SNE of a random sample of the pool. Good: every clump has chosen samples; a bare clump is a"
        " kind of pair that the subset lost."
    )
    _save(figure, text, path)


def _limits(values: np.ndarray) -> tuple[float, float]:
    margin = 0.03 * float(np.ptp(values)) + 1e-6
    return float(values.min()) - margin, float(values.max()) + margin


def _draw_classes(axes: Any, x: np.ndarray, y: np.ndarray, of_class: np.ndarray, shown: np.ndarray) -> None:
    from matplotlib.colors import hsv_to_rgb

    # steps of the golden ratio: classes with near numbers are far apart in hue, however many there are
    hue = of_class * 0.618034 % 1
    value = 0.55 + 0.35 * (of_class * 0.414214 % 1)
    colours = hsv_to_rgb(np.stack([hue, np.full(len(hue), 0.8), value], axis=1))
    axes.scatter(x[shown], y[shown], s=7, color=colours[shown], linewidths=0)


def plot_overlap(table: pl.DataFrame, methods: Sequence[str], own: str, expected: float, path: Path) -> None:
    """Draw the Jaccard index of every two methods' subsets of one fraction.

    Args:
        table: as `overlap` gives it; methods: all of them, in order; own: the one whose page it is on.
        expected: of two independent random subsets.
    """
    figure = _figure(2.6 + 0.75 * len(methods), 1.8 + 0.5 * len(methods))
    axes = figure.subplots()
    if len(methods) < 2:
        _say(axes, "not defined, because the experiment has one method")
        _save(figure, "", path)
        return
    cells: Mapping[tuple[str, str], float] = {
        (one, other): value for one, other, value in table.select("method", "other", "jaccard").iter_rows()
    }
    matrix = np.array([[cells.get((one, other), 1.0) for other in methods] for one in methods])
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    for label, name in zip(axes.get_yticklabels(), methods, strict=True):
        label.set_fontweight("bold" if name == own else "normal")
    if len(methods) <= _ANNOTATED:
        for (i, j), value in np.ndenumerate(matrix):
            axes.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value > 0.55 else "black",
            )
    _save(
        figure,
        f"Jaccard index: shared samples over all of both.\nTwo random subsets: {expected:.2f}; 1: the same.",
        path,
    )


def plot_all(found: Diagnosis, folder: Path) -> None:
    """Draw everything that is of one subset alone."""
    plot_covariance(found, folder / "covariance.png")
    plot_classes(found, folder / "classes.png")
    plot_similarities(found, folder / "similarities.png")
    plot_terms(found, folder / "terms.png")
