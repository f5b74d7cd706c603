"""Asset: the first share of a ranking, in the forms that other tools read."""

from pathlib import Path

import dagster as dg
import polars as pl

from assets.display.preview import table_metadata
from assets.partitions import every_key, partitions_of
from assets.resources import Experiment
from assets.steps.materialize import Events, Metadata, materialize_partitions
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.digests import digest_of, digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.pool.manifest import keys_by_shard, with_source_id
from clipcov_pipeline.progress import Progress
from clipcov_pipeline.selection import budget_count
from clipcov_pipeline.subsets.files import (
    whole_pool,
    write_datacomp_npy,
    write_subset_parquet,
    write_subset_tars,
)


@dg.asset(
    partitions_def=partitions_of("subsets"),
    deps=[every_key("rankings"), "pseudo_labels", every_key("raw_shards")],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="selection",
    kinds={"parquet", "webdataset"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["subsets"],
)
def subsets(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """The chosen samples: parquet (uid, rank, gain, latent_class), DataComp ``.npy``, WebDataset tars."""

    def build(task: Task) -> None:
        labels = pl.read_parquet(task.path("pseudo_labels", file="labels.parquet"))
        subset = chosen(task, labels)
        folder = task.entry.folder
        write_subset_parquet(folder / "subset.parquet", with_source_id(subset, labels))
        write_datacomp_npy(folder / "subset.npy", subset["uid"].to_list())
        progress = Progress(context.log.info, subset.height, f"samples of {task.partition}")
        tars = write_subset_tars(
            list(task.project.shards.values()),
            keys_by_shard(labels.filter(pl.col("uid").is_in(subset["uid"].implode()))),
            folder / "shards",
            samples_per_shard=task.config.select.samples_per_shard,
            min_shards=max(task.config.train.workers, 1) * task.config.train.gpus,
            storage_options=dict(task.config.shards.storage_options),
            progress=progress.add,
        )
        task.done(
            {
                "samples": digest_of([digest_of_file(tar) for tar in tars]),
                "subset": digest_of_file(folder / "subset.parquet"),
            },
            samples=subset.height,
            pool=labels.height,
            classes=subset["latent_class"].n_unique(),
            bytes=sum(tar.stat().st_size for tar in tars),
        )

    yield from materialize_partitions(context, experiment, build, show=show)


def show(folder: Path) -> Metadata:
    """Return the subset's columns and first samples."""
    return table_metadata(pl.scan_parquet(folder / "subset.parquet"))


def chosen(task: Task, labels: pl.DataFrame) -> pl.DataFrame:
    """Return the subset's rows: the ranking's first ``round(fraction * N)``, or the whole pool."""
    recipe = next(r for r in recipes(task.config) if r.subset == task.partition)
    if recipe.method == FULL:
        return whole_pool(labels)
    ranking = pl.read_parquet(task.path("rankings", recipe.method, "ranking.parquet"))
    count = budget_count(recipe.fraction, labels.height)
    if ranking.height < count:
        raise InputError(
            f"subsets/{task.partition}: found {ranking.height} ranked samples, expected at least {count}:"
            f" the filters of {recipe.method} leave too few, lower the fraction or loosen them"
        )
    return ranking.head(count)
