"""A few held-out pairs for the retrieval curve of a training; they decide nothing."""

from pathlib import Path

import polars as pl

from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.train_spec import write_rows
from clipcov_pipeline.pool.manifest import good_samples
from clipcov_pipeline.subsets.index import whole_index

SAMPLES = 256

SPREAD = 4  # shards are read that hold about this many times the pairs, so that they come from all over


def held_out_index(task: Task, path: Path) -> Path | None:
    """Write an index of up to 256 pairs of the held-out share; return its path, None where there are none.

    Captions and images that come twice are taken once: they have no single right answer.
    """
    rows = held_out_rows(task, SAMPLES)
    if rows.is_empty():
        return None
    for column in ("caption", "image_sha256"):
        rows = rows.unique(column, keep="first", maintain_order=True)
    rows = rows.gather_every(max(1, rows.height // SAMPLES)).head(SAMPLES)
    places = pl.scan_parquet(task.path("sample_index", file="index.parquet"))
    of_rows = places.join(rows.lazy().select("shard", "uid"), on=["shard", "uid"], how="semi").collect()
    write_rows(path, whole_index(of_rows), task.project.tars.values())
    return path


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
