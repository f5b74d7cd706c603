"""Asset: pictures of what a subset holds and leaves out."""

import dagster as dg
import polars as pl

from assets.partitions import partitions_of, same_key
from assets.resources import Experiment
from assets.steps.galleries import gallery_done, show_gallery
from assets.steps.labelled_pool import LabelledPool
from assets.steps.materialize import Events, materialize_partitions
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.recipes import recipes
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.experiment.world import latent_class_names
from clipcov_pipeline.report.gallery import Gallery, with_captions, with_pictures
from clipcov_pipeline.report.subset_gallery import subset_gallery


@dg.asset(
    partitions_def=partitions_of("subset_galleries"),
    deps=[same_key("subsets"), "pseudo_labels"],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="selection",
    kinds={"html"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["subset_galleries"],
)
def subset_galleries(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """A subset's samples with the highest and lowest gain, by class, and against what it leaves out."""
    labelled = LabelledPool()

    def build(task: Task) -> None:
        recipe = next(r for r in recipes(task.config) if r.subset == task.partition)
        pool, members = labelled.of(task)
        gallery = subset_gallery(
            task.partition,
            pl.read_parquet(task.path("rankings", recipe.method, "ranking.parquet")),
            task.record("subsets", task.partition).stats["samples"],
            members,
            pool,
            latent_class_names(task.config),
        )
        gallery_done(task, _filled(task, gallery), samples=len({tile.uid for tile in gallery.tiles}))

    yield from materialize_partitions(context, experiment, build, show=show_gallery)


def _filled(task: Task, gallery: Gallery) -> Gallery:
    """Add captions, from the embeddings' table, and pictures, from the shards."""
    uids = sorted({tile.uid for tile in gallery.tiles})
    columns = ("shard", "key", "caption", "image_sha256")
    labels = task.record("pseudo_labels").stats
    rows = task.project.vectors.samples(labels["table"], labels["version"], uids, columns).to_pylist()
    captions = {(row["shard"], row["key"]): row["caption"] for row in rows}
    sha256 = {(row["shard"], row["key"]): row["image_sha256"] for row in rows}
    options = dict(task.config.shards.storage_options)
    return with_pictures(with_captions(gallery, captions), task.project.tars, sha256, options)
