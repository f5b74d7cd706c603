"""Asset: every shard's manifest, with a status for every sample."""

from collections.abc import Mapping
from pathlib import Path

import dagster as dg
import polars as pl

from assets.display.asset_checks import check_specs
from assets.display.preview import table_metadata
from assets.partitions import partitions_of
from assets.resources import Experiment
from assets.steps.materialize import Events, Metadata, materialize_partitions
from clipcov_pipeline.experiment.digests import digest_of, digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.pool.manifest import ShardReport, kept_aside, read_shard
from clipcov_pipeline.pool.packing import PACKED, read_packed
from clipcov_pipeline.progress import Progress
from clipcov_pipeline.redaction import public_address


@dg.asset(
    partitions_def=partitions_of("raw_shards"),
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="pool",
    kinds={"webdataset", "polars"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["raw_shards"],
    check_specs=check_specs("raw_shards"),
)
def raw_shards(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """Shards of image-caption pairs: sha256, a status for every sample, and where it lies.

    A bad sample is kept aside with a typed reason and counted; an unreadable file is quarantined whole.
    Rows of parquet files and of image folders are packed into a tar first, which all later stages read.
    """

    def build(task: Task) -> None:
        shard, settings = task.project.shards[task.partition], task.config.shards
        progress = Progress(context.log.info, None, f"samples of {shard.name}")
        rules, options = settings.image_rules._asdict(), dict(settings.storage_options)
        rules |= {"captions": settings.caption}
        if shard.rows is None:
            report = read_shard(shard, **rules, storage_options=options, progress=progress.add)
        else:
            packed = task.entry.folder / PACKED
            report = read_packed(shard, packed, options, **rules, progress=progress.add)
        digests, aside = _write(task.entry.folder, report), kept_aside(report.manifest)
        bad = sum(aside.values())
        ok = report.manifest.height - bad
        problems = dict(report.manifest["json_problem"].drop_nulls().value_counts(sort=True).iter_rows())
        source_ids = report.manifest["source_id"].count()
        _say(context, shard.name, report, aside, problems, source_ids)
        task.done(
            digests,
            sha256=report.sha256,
            url=public_address(shard.url),
            samples=report.manifest.height,
            ok=ok,
            kept_aside=bad,
            quarantined=report.quarantined or "",
            statuses={"ok": ok, **aside} if ok else aside,
            source_ids=source_ids,
            json_problems=problems,
        )

    yield from materialize_partitions(context, experiment, build, show=show)


def _write(folder: Path, report: ShardReport) -> dict[str, str]:
    """Write the manifest and the places; return the digests of what others read of them."""
    manifest, places = folder / "manifest.parquet", folder / "places.parquet"
    report.manifest.write_parquet(manifest)
    report.places.write_parquet(places, compression="zstd")
    ids = report.manifest.select("key", "source_id").drop_nulls("source_id")
    return {
        "manifest": digest_of([digest_of_file(manifest), report.sha256]),
        "places": digest_of_file(places),
        "source_ids": digest_of(ids.rows()),
    }


def _say(
    context: dg.AssetExecutionContext,
    name: str,
    report: ShardReport,
    aside: Mapping[str, int],
    problems: Mapping[str, int],
    source_ids: int,
) -> None:
    """Log what somebody who owns the shard should know of it."""
    shard = f"shard {name}"
    if report.quarantined:
        context.log.warning(f"{shard} is quarantined: {report.quarantined}")
    if aside:
        context.log.warning(f"{shard}: {sum(aside.values())} samples kept aside: {dict(aside)}")
    if problems:
        counts = ", ".join(f"{count}: {text}" for text, count in problems.items())
        context.log.warning(f"{shard}: json of no use, its samples are kept ({counts})")
    if source_ids:
        context.log.info(f"{shard}: {source_ids} samples have an id that is no UUID: kept as source_id")


def show(folder: Path) -> Metadata:
    """Return the manifest's columns and first samples."""
    return table_metadata(pl.scan_parquet(folder / "manifest.parquet"))
