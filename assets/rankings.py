"""Asset: the whole pool in the order in which a method takes it."""

import time
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import numpy.typing as npt
import polars as pl

from assets.display.preview import table_metadata
from assets.partitions import every_key, partitions_of
from assets.resources import Experiment
from assets.steps.materialize import Events, Metadata, materialize_partitions
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.pool.manifest import with_image_hash, with_image_size
from clipcov_pipeline.proxy.embeddings import with_early_similarity
from clipcov_pipeline.selection import (
    Pool,
    budget_count,
    columns_read,
    rank,
    reads_captions,
    with_files_at,
)
from clipcov_pipeline.selection.external import listed
from clipcov_pipeline.selection.methods import SIZE


@dg.asset(
    partitions_def=partitions_of("rankings"),
    deps=[
        "pseudo_labels",
        every_key("raw_shards"),
        every_key("embeddings"),
        every_key("early_similarities"),
    ],
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
        cpu = time.process_time()
        method, params = task.config.select.method_of(task.partition)
        stats: dict[str, Any] = {}
        params = with_files_at(method, params, task.config.resolve)
        labels, read = task.record("pseudo_labels"), columns_read(method, params)
        members = _members(task, read)
        if method != "external":  # by which a list may name samples
            members = members.drop("source_id", strict=False)
        table = task.project.vectors.open(labels.stats["table"], labels.stats["version"])
        captions = reads_captions(method, params)
        pool = Pool.from_lance(table, members, captions=captions, scratch_dir=task.project.scratch)
        weight = np.ones(len(pool))
        if method == "external":
            stats, weight = _listed(context, pool, params["uids"])
            if params.get("fill") is None:
                _check_fractions(task, stats["listed"], len(pool))
        ranking = rank(pool, method=method, threads=task.config.select.threads, **params)
        if ranking.passed:
            stats["passed_filters"] = dict(ranking.passed)
        frame = members[ranking.rows].select("uid", "latent_class").with_row_index("rank", offset=1)
        path = task.entry.folder / "ranking.parquet"
        frame = frame.with_columns(pl.Series("gain", ranking.gains))
        if np.ptp(weight):  # the subset's samples are drawn unequally
            frame = frame.with_columns(pl.Series("weight", weight[ranking.rows]))
        frame.write_parquet(path)
        stats["cpu_seconds"] = round(time.process_time() - cpu, 3)
        digests = {"ranking": digest_of_file(path)}
        task.done(digests, method=method, ranked=frame.height, pool=members.height, **stats)

    yield from materialize_partitions(context, experiment, build, show=show)


def _members(task: Task, read: set[str]) -> pl.DataFrame:
    """Return the pool's samples, with those of these columns that do not come from the table."""
    members = pl.read_parquet(task.path("pseudo_labels", file="labels.parquet"))
    if "image_hash" in read:
        members = with_image_hash(members)
    if SIZE & read:
        manifests = [task.path("raw_shards", shard, "manifest.parquet") for shard in task.project.shards]
        members = with_image_size(members, manifests)
    if "early_similarity" in read:
        stage, file = "early_similarities", "similarities.parquet"
        files = {shard: task.path(stage, shard, file) for shard in task.project.shards}
        members = with_early_similarity(members, files)
    return members


def _listed(
    context: dg.AssetExecutionContext, pool: Pool, path: str
) -> tuple[dict[str, int], npt.NDArray[np.float64]]:
    """Count the uids of a list that the pool has and has not, and say how many it has not.

    Return the counts, and every sample's weight, float64 [N]: as the list has it, else the list's mean.
    """
    found = listed(pool, path)
    if found.missing:
        context.log.warning(f"{found.missing} rows of {path} have no uid: left out")
    if found.unknown:
        context.log.warning(
            f"{found.unknown} uids of {path} are not in the pool: held out, kept aside, or of other shards"
        )
    if len(found.never_drawn):
        context.log.warning(f"{len(found.never_drawn)} samples of {path} have the weight 0: left out")
    weight = np.full(len(pool), found.weight.mean())
    weight[found.rows] = found.weight
    counts = {
        "listed": len(found.rows),
        "unknown_uids": found.unknown,
        "rows_without_uid": found.missing,
        "of_weight_0": len(found.never_drawn),
    }
    return counts, weight


def _check_fractions(task: Task, n_listed: int, n_pool: int) -> None:
    """Refuse a list that is too short for a fraction: nothing is filled up that was not asked for."""
    largest = max(task.config.select.fractions)
    if (count := budget_count(largest, n_pool)) > n_listed:
        raise InputError(
            f"select.methods.{task.partition}.uids: found {n_listed} samples of the pool, expected at least"
            f" {count} for the fraction {largest:g}; lower it, or have the rest drawn (fill: random)"
        )


def show(folder: Path) -> Metadata:
    """Return the samples that the method takes first."""
    return table_metadata(pl.scan_parquet(folder / "ranking.parquet"))
