"""What `clipcov bench loader` prints."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from clipcov_pipeline.bench.loader_speed import INDEX, TARS

Cells = Sequence[str]


def speed_table(found: dict[str, Any]) -> str:
    """The measurements of `loader_speed.bench_loader`."""
    settings = found["settings"]
    n = settings["samples"]
    head = (
        f"{n:,} samples of {settings['size']} px, {found['pool_bytes'] / n / 1000:.1f} KB of tar each,"
        f" {found['used_bytes'] / n / 1000:.1f} KB of them image and caption; {settings['model']}, batches of"
        f" {settings['batch_size']}, {settings['workers']} data-loading processes\n"
        "tars: the subset's own, by open_clip_train's reader; index: over the pool's tars, in exact random"
        " order\n"
        "samples/s: median (least to most); ratio: index to tars, of each pair of runs; a first pass includes"
        " the start of the processes\n"
        f"bytes: read from the disk or fetched over HTTP ({settings['latency'] * 1000:.0f} ms before each"
        " answer), for each byte of the subset's images and captions"
    )
    ways = ("tars samples/s", "index samples/s", "ratio", "tars bytes", "index bytes")
    title = ("", "density", "samples", "runs", *ways, "")
    return head + "\n\n" + _aligned([title, *(_speed_cells(row) for row in found["rows"])])


def subsets_table(found: dict[str, Any]) -> str:
    """The measurements of `subset_making.bench_subsets`."""
    seconds, size = found["seconds"], found["bytes"]
    title = ("", "seconds", "MB", "tars' seconds to these", "tars' bytes to these")
    rows = [
        (
            way,
            f"{seconds[way]:.2f}",
            f"{size[way] / 1e6:.1f}",
            f"{seconds['tars'] / seconds[way]:.0f}",
            f"{size['tars'] / size[way]:.0f}",
        )
        for way in seconds
    ]
    head = (
        f"10 subsets (5 rankings x 10 and 50 %) of {found['samples']:,} samples of {found['size']} px,"
        f" {found['pool_bytes'] / 1e9:.2f} GB of tars; seconds until the disk has them\n"
        "index: subset.parquet and subset.npy; training index: what a training reads, written when it begins;"
        " tars: with subset.parquet and subset.npy"
    )
    return head + "\n\n" + _aligned([title, *rows])


def start_table(found: dict[str, Any]) -> str:
    """The measurements of `loader_start.bench_start`."""
    starts = found["starts"]
    seconds = {
        "seconds to the first batch": [run["seconds"] for run in starts],
        "  of them, to the index read and checked": [run["read_seconds"] for run in starts],
    }
    memory = {
        "MB, training process after its imports": [run["before"] for run in starts],
        "MB, training process at the first batch": [run["training"] for run in starts],
        "MB, largest data-loading process": [max(run["workers"]) for run in starts],
        "  of them, above the training process after its imports": [
            max(run["workers"]) - run["before"] for run in starts
        ],
        "  of them, not shared with the training process": [max(run["own"]) for run in starts],
    }
    rows = [(name, _spread(values, ",.2f"), "") for name, values in seconds.items()]
    rows += [(name, _spread([v / 1e6 for v in values], ",.0f"), "") for name, values in memory.items()]
    head = (
        f"index of {found['rows']:,} samples in {found['shards']:,} tars,"
        f" {found['index_bytes'] / 1e6:.0f} MB; {found['workers']} data-loading processes;"
        f" {len(starts)} starts, each in a fresh"
        " process, whose imports are done\nmedian (least to most); MB: anonymous memory, resident (RssAnon)"
    )
    return head + "\n\n" + _aligned(rows)


def _speed_cells(row: dict[str, Any]) -> Cells:
    tars, index = row["rates"][TARS], row["rates"][INDEX]
    ratios = [ours / theirs for ours, theirs in zip(index, tars, strict=False)]
    used = [
        f"{row['bytes_per_used'][way]:.2f}" if way in row["bytes_per_used"] else "" for way in (TARS, INDEX)
    ]
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
