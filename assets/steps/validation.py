"""A few held-out pairs for the retrieval curve of a training; they decide nothing."""

from pathlib import Path

import polars as pl

from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.pool.manifest import good_samples, keys_by_shard
from clipcov_pipeline.subsets.files import write_subset_tars

SAMPLES = 256

SPREAD = 4  # shards are read that hold about this many times the pairs, so that they come from all over


def held_out_tars(task: Task, folder: Path) -> tuple[list[Path], int]:
    """Write up to 256 pairs of the held-out share as tars (once); return the tars and the number of pairs.

    Captions and images that come twice are taken once: they have no single right answer. Without a held-out
    share there are none.
    """
    rows = held_out_rows(task, SAMPLES)
    if rows.is_empty():
        return [], 0
    for column in ("caption", "image_sha256"):
        rows = rows.unique(column, keep="first", maintain_order=True)
    rows = rows.gather_every(max(1, rows.height // SAMPLES)).head(SAMPLES)
    if not (folder / "sizes.json").exists():  # written last: a killed run left incomplete tars
        for left in folder.glob("*.tar"):
            left.unlink()
        write_subset_tars(
            list(task.project.shards.values()),
            keys_by_shard(rows),
            folder,
            samples_per_shard=SAMPLES,
            pairs_only=True,
            storage_options=dict(task.config.shards.storage_options),
        )
    return sorted(folder.glob("*.tar")), rows.height


def held_out_rows(task: Task, count: int) -> pl.DataFrame:
    """Return the manifests' rows of the held-out pairs of some shards: about four times ``count``, or all.

    The shards are evenly spread over the pool, and the same ones for every arm. The others need not be
    opened, and nothing is lost by that: a crawl's shards are alike.
    """
    held_out = pl.read_parquet(task.path("pseudo_labels", file="holdout.parquet"))
    if held_out.is_empty():
        return held_out
    sizes = dict(held_out["shard"].value_counts().iter_rows())
    names = [name for name in task.project.shards if name in sizes]
    wanted = min(len(names), -(-SPREAD * count * len(names) // held_out.height))
    some = [names[index * len(names) // wanted] for index in range(wanted)]
    manifests = [good_samples(task.path("raw_shards", name, "manifest.parquet")) for name in some]
    place = ["shard", "key"]
    return pl.concat(manifests).join(held_out.select(place), on=place, maintain_order="left")
