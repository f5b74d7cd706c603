"""Asset: the whole pool in the order in which a method takes it."""

from pathlib import Path

import dagster as dg
import polars as pl

from assets.materialize import Events, Metadata, materialize_partitions
from assets.partitions import every_key, partitions_of
from assets.preview import table_metadata
from assets.resources import Experiment
from clipcov_pipeline.plan import CODE_VERSIONS
from clipcov_pipeline.project import Task
from clipcov_pipeline.selection import Pool, rank
from clipcov_pipeline.store import digest_of_file


@dg.asset(
    partitions_def=partitions_of("rankings"),
    deps=["pseudo_labels", every_key("embeddings")],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="selection",
    kinds={"python", "parquet"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["rankings"],
)
def rankings(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """All uids of the pool in the order the method takes them, each with its gain: fractions nest in it."""

    def build(task: Task) -> None:
        params = dict(task.config.select.methods[task.partition])
        method = params.pop("method", task.partition)
        labels = task.record("pseudo_labels")
        members = pl.read_parquet(task.path("pseudo_labels", file="labels.parquet"))
        table = task.project.vectors.open(labels.stats["table"], labels.stats["version"])
        pool = Pool.from_lance(table, members, scratch_dir=task.project.scratch)
        ranking = rank(pool, method=method, threads=task.config.select.threads, **params)
        frame = members[ranking.rows].select("uid", "latent_class").with_row_index("rank")
        path = task.entry.folder / "ranking.parquet"
        frame.with_columns(pl.Series("gain", ranking.gains)).write_parquet(path)
        task.done({"ranking": digest_of_file(path)}, method=method, ranked=frame.height, pool=members.height)

    yield from materialize_partitions(context, experiment, build, show=show)


def show(folder: Path) -> Metadata:
    """Return the samples that the method takes first."""
    return table_metadata(pl.scan_parquet(folder / "ranking.parquet"))
