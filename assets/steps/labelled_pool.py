"""The labelled pool for the assets that look at all of it."""

import polars as pl

from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.pool.manifest import with_image_hash
from clipcov_pipeline.selection import Pool


class LabelledPool:
    """Reads the pool once for all partitions of a run; its scratch file goes with it."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Pool, pl.DataFrame]] = {}

    def of(self, task: Task) -> tuple[Pool, pl.DataFrame]:
        """Return the pool with its duplicates' hashes, and its rows of ``labels.parquet``, in one order."""
        labels = task.record("pseudo_labels")
        if labels.fingerprint not in self._read:
            members = pl.read_parquet(task.path("pseudo_labels", file="labels.parquet"))
            table = task.project.vectors.open(labels.stats["table"], labels.stats["version"])
            pool = Pool.from_lance(
                table, with_image_hash(members), captions=True, scratch_dir=task.project.scratch
            )
            self._read = {labels.fingerprint: (pool, members)}
        return self._read[labels.fingerprint]
