"""Times, memory and the rows of a benchmark."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcov_pipeline.selection.measure import Phases
from clipcov_pipeline.selection.pool import Pool

Say = Callable[[str], None]


class Bench:
    """One run; ``rows`` collects a line for each measurement.

    Attributes:
        rows: dicts with what, pairs, seconds (median of ``repeat``), cpu_seconds, anonymous_gb, note.
    """

    def __init__(self, folder: Path, repeat: int, threads: int | None, say: Say) -> None:
        self.folder, self.repeat, self.threads, self.say = folder, repeat, threads, say
        self.rows: list[dict[str, Any]] = []

    def measure(
        self, what: str, pairs: int, work: Callable[[], Any], note: str = "", repeat: int | None = None
    ) -> Any:
        """Run ``work`` several times, record the median, return what the last one gave."""
        runs, result = [], None
        for _ in range(repeat or self.repeat):
            phases = Phases()
            with phases("run"):
                result = work()
            runs.append((phases.seconds["run"], phases.cpu_seconds["run"], phases.anonymous_bytes["run"]))
        seconds, cpu, anonymous = np.median(runs, axis=0)
        self.add(what, pairs, float(seconds), float(cpu), float(anonymous) / 1e9, note)
        return result

    def add(
        self, what: str, pairs: int, seconds: float, cpu: float | None = None,
        anonymous_gb: float | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """Record a line."""
        row = {
            "what": what,
            "pairs": pairs,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "anonymous_gb": anonymous_gb,
        }
        self.rows.append({**row, "note": note})
        self.say(f"{what}: {seconds:.2f} s {note}")

    def row(self, what: str) -> dict[str, Any]:
        """The line of a measurement."""
        return next(row for row in self.rows if row["what"] == what)


def fresh_pool(pool: Pool) -> Pool:
    """The pool as if just opened: nothing of it read yet."""
    path = getattr(pool.pairs, "filename", None)
    pairs = pool.pairs if path is None else np.memmap(path, pool.pairs.dtype, "r+", shape=pool.pairs.shape)
    return Pool(pairs, pool.order, pool.starts, pool.latent_class, pool.label_similarity, {})


def drop_cached(files: Sequence[Path]) -> bool:
    """Write files to the disk and drop them from the page cache; whether this system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True
