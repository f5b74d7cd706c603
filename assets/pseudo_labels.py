"""Asset: the pool's samples with their latent classes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.display.asset_checks import check_specs
from assets.display.preview import markdown, table_metadata
from assets.partitions import every_key
from assets.resources import Experiment
from assets.steps.materialize import Metadata, materialize_whole
from assets.steps.proxy_encoders import proxy_encoder
from clipcov_pipeline.experiment.digests import digest_of, digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.experiment.world import class_names
from clipcov_pipeline.pool.manifest import good_samples
from clipcov_pipeline.proxy.labels import label_by_clusters, label_by_prompts, label_pool, members
from clipcov_pipeline.proxy.vectors import label_tag, table_name


@dg.asset(
    deps=[every_key("embeddings"), "proxy_model", every_key("raw_shards")],
    group_name="selection",
    kinds={"polars", "parquet"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["pseudo_labels"],
    check_specs=check_specs("pseudo_labels"),
)
def pseudo_labels(context: dg.AssetExecutionContext, experiment: Experiment) -> dg.MaterializeResult:
    """Latent class, margin and label similarity of every pool sample, by class prompts or by clusters."""

    def build(task: Task) -> None:
        table, version = _pin(task)
        shards, vectors = list(task.project.shards), task.project.vectors
        found = members(vectors, table, version, shards, task.config.evaluate.holdout_fraction)
        if found.repeated:
            context.log.warning(f"{found.repeated} samples left out: an earlier sample has the same uid")
        stats: dict[str, Any] = {}
        labels = label_pool(vectors, table, version, shards, found.pool, _labeller(task, stats))
        path, holdout = task.entry.folder / "labels.parquet", task.entry.folder / "holdout.parquet"
        labels = _with_source_ids(task, labels.drop("caption"))
        labels.write_parquet(path)
        found.holdout.write_parquet(holdout)
        sizes = labels["latent_class"].value_counts(sort=True)
        task.done(
            {
                "labels": digest_of_file(path),
                "holdout": digest_of_file(holdout),
                "pool": digest_of(dict(task.step.inputs)),
            },
            pool=labels.height,
            held_out=found.holdout.height,
            repeated_uids=found.repeated,
            source_ids=labels["source_id"].count() if "source_id" in labels.columns else 0,
            classes=sizes.height,
            largest_class=int(sizes["count"][0]),
            mean_margin=float(labels["margin"].mean()),  # type: ignore[arg-type]
            table=table,
            version=version,
            **stats,
        )

    return materialize_whole(context, experiment, build, show=show)


def _with_source_ids(task: Task, labels: pl.DataFrame) -> pl.DataFrame:
    """Add ``source_id`` from the manifests of those shards that have any."""
    shards = [shard for shard in task.project.shards if task.record("raw_shards", shard).stats["source_ids"]]
    if not shards:
        return labels
    place = ["shard", "key", "uid"]
    manifests = [good_samples(task.path("raw_shards", shard, "manifest.parquet")) for shard in shards]
    named = pl.concat(frame.select(*place, "source_id") for frame in manifests)
    return labels.join(named, on=place, how="left", maintain_order="left")


def _pin(task: Task) -> tuple[str, int]:
    """Drop rows of shards that are gone, then tag the version that all of selection reads."""
    assert task.step.fingerprint is not None
    table, vectors = table_name(task.record("proxy_model").digests["weights"]), task.project.vectors
    for shard in (gone := sorted(vectors.shards(table) - set(task.project.shards))):
        task.project.store.clear_current("embeddings", shard)  # first: no entry may stand without its rows
    vectors.remove_shards(table, gone)
    version = vectors.open(table).version
    vectors.pin(table, version, label_tag(task.step.fingerprint))
    return table, version


def _labeller(task: Task, stats: dict[str, Any]) -> Callable[[pl.DataFrame, Iterator[Any]], pl.DataFrame]:
    settings = task.config.labels
    if settings.latent_classes == "clusters":
        scratch = task.project.scratch
        return lambda pool, batches: label_by_clusters(
            pool, batches, settings.n_clusters, settings.seed, scratch, stats
        )
    from clipcov_pipeline.proxy.prompts import class_embeddings, imagenet_class_names, imagenet_templates

    names = class_names(task.config)
    names = imagenet_class_names() if isinstance(names, str) else names
    templates = imagenet_templates() if isinstance(settings.templates, str) else list(settings.templates)
    embedded = class_embeddings(proxy_encoder(task), names, templates)
    return lambda pool, batches: label_by_prompts(pool, batches, embedded)


def show(folder: Path) -> Metadata:
    """Return the labels' columns and first samples, and the largest classes."""
    labels = pl.scan_parquet(folder / "labels.parquet")
    sizes = labels.group_by("latent_class").agg(samples=pl.len()).sort("samples", "latent_class").tail(10)
    largest = markdown(sizes.collect().reverse())
    return {**table_metadata(labels), "largest_classes": dg.MetadataValue.md(largest)}
