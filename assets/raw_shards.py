"""Asset: every shard's manifest, with a status for every sample."""

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
from clipcov_pipeline.pool.manifest import kept_aside, read_shard
from clipcov_pipeline.progress import Progress


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
    """WebDataset shards of image-caption pairs: sha256, and a manifest with a status for every sample.

    A bad sample is kept aside with a typed reason and counted; a file that is no tar is quarantined whole.
    """

    def build(task: Task) -> None:
        shard, settings = task.project.shards[task.partition], task.config.shards
        progress = Progress(context.log.info, None, f"samples of {shard.name}")
        pixels, options = settings.max_image_pixels, dict(settings.storage_options)
        report = read_shard(shard, max_pixels=pixels, storage_options=options, progress=progress.add)
        path = task.entry.folder / "manifest.parquet"
        report.manifest.write_parquet(path)
        aside = kept_aside(report.manifest)
        bad = sum(aside.values())
        ok = report.manifest.height - bad
        source_ids = report.manifest["source_id"].count()
        problems = report.manifest["json_problem"].drop_nulls().value_counts(sort=True)
        if report.quarantined:
            context.log.warning(f"shard {shard.name} is quarantined: {report.quarantined}")
        if bad:
            context.log.warning(f"shard {shard.name}: {bad} samples kept aside: {aside}")
        if problems.height:
            counts = ", ".join(f"{count}: {text}" for text, count in problems.iter_rows())
            context.log.warning(f"shard {shard.name}: json of no use, its samples are kept ({counts})")
        if source_ids:
            context.log.info(
                f"shard {shard.name}: {source_ids} samples have an id that is no UUID: kept as source_id"
            )
        task.done(
            {
                "manifest": digest_of([digest_of_file(path), report.sha256]),
                "source_ids": digest_of(
                    report.manifest.select("key", "source_id").drop_nulls("source_id").rows()
                ),
            },
            sha256=report.sha256,
            url=shard.url,
            samples=report.manifest.height,
            ok=ok,
            kept_aside=bad,
            quarantined=report.quarantined or "",
            statuses={"ok": ok, **aside} if ok else aside,
            source_ids=source_ids,
            json_problems=dict(problems.iter_rows()),
        )

    yield from materialize_partitions(context, experiment, build, show=show)


def show(folder: Path) -> Metadata:
    """Return the manifest's columns and first samples."""
    return table_metadata(pl.scan_parquet(folder / "manifest.parquet"))
