"""What a training was given, counted as it is given: samples, distinct ones, and repeats in a batch.

Each process writes one small file for each virtual epoch that it trained to the end, so that an epoch that
was repeated after a break counts once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcov_pipeline.files import written_at_once

SEEN = "seen"  # folder in the run's own


@dataclass(frozen=True)
class Seen:
    """samples: yielded in all; distinct: rows of the index among them; rows: rows of the index; repeated: in
    all batches, samples that were like an earlier one of their batch; most: draws of the row with most."""

    samples: int
    distinct: int
    rows: int
    repeated: int
    most: int


def write_seen(
    folder: str | Path, epoch: int, rank: int, counts: npt.NDArray[np.int32], repeated: int
) -> None:
    """Write one process's counts of one virtual epoch. counts: int32 [rows], how often each was yielded."""
    rows = np.flatnonzero(counts)
    with written_at_once(Path(folder) / f"{epoch:06d}-{rank}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, rows=rows, counts=counts[rows], n_rows=np.int64(len(counts)), repeated=np.int64(repeated)
        )


def seen_counts(folder: str | Path) -> tuple[npt.NDArray[np.int64], int]:
    """(how often each row of the index was yielded over all epochs and processes, int64 [rows]; repeats).

    Raises:
        RuntimeError: nothing was counted.
    """
    files = sorted(Path(folder).glob("[0-9]*.npz"))
    if not files:
        raise RuntimeError(f"{folder}: no counts of a training; it yielded no whole virtual epoch")
    counts, repeated = np.zeros(0, np.int64), 0
    for file in files:
        with np.load(file) as part:
            if not len(counts):
                counts = np.zeros(int(part["n_rows"]), np.int64)
            counts[part["rows"]] += part["counts"]
            repeated += int(part["repeated"])
    return counts, repeated


def summary(folder: str | Path) -> Seen:
    """Return the counts of a training in one line."""
    counts, repeated = seen_counts(folder)
    return Seen(
        int(counts.sum()), int(np.count_nonzero(counts)), len(counts), repeated, int(counts.max(initial=0))
    )


def write_seen_table(path: str | Path, folder: str | Path, uids: Sequence[str]) -> dict[str, Any]:
    """Write uid and times (int64), a row for each sample that was yielded; return `summary` as a dict."""
    import polars as pl

    counts, _ = seen_counts(folder)
    rows = np.flatnonzero(counts)
    pl.DataFrame({"uid": np.asarray(uids)[rows], "times": counts[rows]}).write_parquet(path)
    return asdict(summary(folder))
