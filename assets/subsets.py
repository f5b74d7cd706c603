"""Asset: the first share of a ranking, as an index over the pool."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.display.preview import table_metadata
from assets.partitions import every_key, partitions_of
from assets.resources import Experiment
from assets.steps.materialize import Events, Metadata, materialize_partitions
from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.pool.manifest import keys_by_shard
from clipcov_pipeline.progress import Progress
from clipcov_pipeline.subsets.cut import PARQUET, TARS, Choice, cut_ranking, whole_pool, write_subset
from clipcov_pipeline.subsets.files import Members, write_subset_tars
from clipcov_pipeline.subsets.index import draws_of_pass, most_alike


@dg.asset(
    partitions_def=partitions_of("subsets"),
    deps=[every_key("rankings"), "pseudo_labels", "sample_index"],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="selection",
    kinds={"parquet"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["subsets"],
)
def subsets(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """The chosen samples as an index over the pool's shards (parquet), and as DataComp's ``.npy``."""

    def build(task: Task) -> None:
        labels = pl.read_parquet(task.path("pseudo_labels", file="labels.parquet"))
        places = task.path("sample_index", file="index.parquet")
        choice = chosen(task, labels)
        index, digests = write_subset(task.entry.folder, choice, labels, places)
        stats: dict[str, Any] = {"classes": index["latent_class"].n_unique()}
        if choice.quota is None:
            stats |= {"draws": draws_of_pass(index["weight"].to_numpy()), "most_alike": most_alike(index)}
        else:
            stats |= {"draws": sum(choice.quota), "quota": choice.quota}
        if task.config.select.write_tars:
            stats["bytes"] = _write_tars(context, task, index)
        task.done(digests, samples=index.height, pool=labels.height, **stats)

    yield from materialize_partitions(context, experiment, build, show=show)


def _write_tars(context: dg.AssetExecutionContext, task: Task, index: pl.DataFrame) -> int:
    """Copy the samples into tars of the subset's own; return their bytes."""
    progress = Progress(context.log.info, index.height, f"samples of {task.partition}")
    tars = write_subset_tars(
        list(task.project.tars.values()),
        keys_by_shard(index),
        task.entry.folder / TARS,
        samples_per_shard=task.config.select.samples_per_shard,
        min_shards=max(task.config.train.workers, 1) * task.config.train.gpus,
        storage_options=dict(task.config.shards.storage_options),
        members=Members(task.config.shards.caption),
        progress=progress.add,
    )
    return sum(tar.stat().st_size for tar in tars)


def show(folder: Path) -> Metadata:
    """Return the subset's columns and first samples."""
    return table_metadata(pl.scan_parquet(folder / PARQUET))


def chosen(task: Task, labels: pl.DataFrame) -> Choice:
    """Return what the subset holds: the first part of a ranking, or the whole pool."""
    recipe = next(r for r in recipes(task.config) if r.subset == task.partition)
    if recipe.method == FULL:
        return whole_pool(labels)
    ranking = pl.read_parquet(task.path("rankings", recipe.method, "ranking.parquet"))
    share = task.config.select.draw_from(recipe.method)
    return cut_ranking(ranking, labels.height, recipe.fraction, share)
