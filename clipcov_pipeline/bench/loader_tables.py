"""What `clipcov bench loader` prints."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from clipcov_pipeline.bench.loader_speed import INDEX, TARS

Cells = Sequence[str]


def speed_table(found: dict[str, Any]) -> str:
    """The measurements of `loader_speed.bench_loader`: medians, least and most, and the ratio of index to tars."""
    settings = found["settings"]
    n = settings["samples"]
    head = (
        f"{n:,} samples of {settings['size']} px, {found['pool_bytes'] / n / 1000:.1f} KB of tar each,"
        f" {found['used_bytes'] / n / 1000:.1f} KB of them image and caption; {settings['model']}, batches of"
        f" {settings['batch_size']}, {settings['workers']} data-loading processes\n"
        "tars: the subset's own, by open_clip_train's reader; index: over the pool's tars, in exact random order\n"
        "samples/s: median (least to most); ratio: index to tars, of each pair of runs; a first pass includes the"
        " start of the processes\n"
        f"bytes: read from the disk or fetched over HTTP ({settings['latency'] * 1000:.0f} ms before each"
        " answer), for each byte of the subset's images and captions"
    )
    title = (
        "", "density", "samples", "runs", "tars samples/s", "index samples/s", "ratio", "tars bytes", "index bytes", "",
    )  # fmt: skip
    return head + "\n\n" + _aligned([title, *(_speed_cells(row) for row in found["rows"])])


def _speed_cells(row: dict[str, Any]) -> Cells:
    tars, index = row["rates"][TARS], row["rates"][INDEX]
    ratios = [ours / theirs for ours, theirs in zip(index, tars, strict=False)]
    used = [f"{row['bytes_per_used'][way]:.2f}" if way in row["bytes_per_used"] else "" for way in (TARS, INDEX)]
    return (
        row["condition"],
        f"{row['density']:.0%}",
        f"{row['samples']:,}",
        str(len(index)),
        _spread(tars, ",.0f"),
        _spread(index, ",.0f"),
        _spread(ratios, ".2f"),
        *used,
        row["note"],
    )


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "no curl"
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _aligned(rows: Sequence[Cells]) -> str:
    """Columns side by side, the first and the last to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
