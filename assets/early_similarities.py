"""Asset: how similar image and caption were to an early proxy, for the method ``c_rho``."""

from pathlib import Path

import dagster as dg
import polars as pl

from assets.display.preview import table_metadata
from assets.partitions import partitions_of, same_key
from assets.resources import Experiment
from assets.steps.materialize import Events, Metadata, materialize_partitions
from assets.steps.proxy_encoders import early_encoder, embed_shard
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.proxy.embeddings import pair_similarities

FILE = "similarities.parquet"


@dg.asset(
    partitions_def=partitions_of("early_similarities"),
    deps=[same_key("raw_shards"), "proxy_model"],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="pool",
    kinds={"pytorch", "parquet"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["early_similarities"],
    pool="embed",
)
def early_similarities(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """Similarity of image and caption by an early proxy, a row a sample; only where a method is c_rho."""

    def build(task: Task) -> None:
        embedded = embed_shard(context, task, early_encoder).embedded
        path = task.entry.folder / FILE
        columns = {"uid": embedded.uids, "early_similarity": pair_similarities(embedded)}
        pl.DataFrame(columns, {"uid": pl.String, "early_similarity": pl.Float32}).write_parquet(path)
        task.done(
            {"similarities": digest_of_file(path)}, rows=len(embedded.uids), refused=len(embedded.refused)
        )

    yield from materialize_partitions(context, experiment, build, show=show)


def show(folder: Path) -> Metadata:
    """Return the columns and the first samples."""
    return table_metadata(pl.scan_parquet(folder / FILE))
