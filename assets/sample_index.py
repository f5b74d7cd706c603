"""Asset: where every good sample of the pool lies in its shard, in one table."""

from pathlib import Path

import dagster as dg
import polars as pl

from assets.display.preview import table_metadata
from assets.partitions import every_key
from assets.resources import Experiment
from assets.steps.materialize import Metadata, materialize_whole
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.pool.places import gather_places

FILE = "index.parquet"


@dg.asset(
    deps=[every_key("raw_shards")],
    group_name="pool",
    kinds={"parquet", "polars"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["sample_index"],
)
def sample_index(context: dg.AssetExecutionContext, experiment: Experiment) -> dg.MaterializeResult:
    """Offset and size of image, caption and json of every good sample: what subsets are an index of."""

    def build(task: Task) -> None:
        files = {name: task.path("raw_shards", name, "places.parquet") for name in task.project.shards}
        index = gather_places(files)
        index.write_parquet(task.entry.folder / FILE, compression="zstd")
        task.done({"index": digest_of_file(task.entry.folder / FILE)}, samples=index.height)

    return materialize_whole(context, experiment, build, show=show)


def show(folder: Path) -> Metadata:
    """Return the table's columns and first samples."""
    return table_metadata(pl.scan_parquet(folder / FILE))
