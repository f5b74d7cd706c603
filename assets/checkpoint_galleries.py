"""Asset: what every model finds nearest to fixed queries, beside the full-pool model."""

import json
from typing import Any

import dagster as dg

from assets.partitions import every_key, partitions_of
from assets.resources import Experiment
from assets.steps.galleries import gallery_done, show_gallery
from assets.steps.materialize import Events, materialize_partitions
from clipcov_pipeline.experiment.config.base import FULL, HOLDOUT
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.recipes import gallery_set, recipes
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.report.checkpoint_gallery import checkpoint_gallery, shared_neighbours
from clipcov_pipeline.report.gallery import Gallery, with_pictures

KINDS = ("image_to_image", "caption_to_image")


@dg.asset(
    partitions_def=partitions_of("checkpoint_galleries"),
    deps=[every_key("scores")],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="training",
    kinds={"html"},
    owners=["team:training"],
    code_version=CODE_VERSIONS["checkpoint_galleries"],
)
def checkpoint_galleries(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """The held-out images nearest to 12 fixed images and captions, beside what the full-pool model finds."""

    def build(task: Task) -> None:
        arm = next(r for r in recipes(task.config) if r.key == task.partition)
        name = gallery_set(task.config)
        assert name is not None  # there is no node otherwise
        own = _neighbours(task, arm.key, name)
        beside = arm._replace(method=FULL, fraction=1.0)
        full = None if arm.method == FULL else _neighbours(task, beside.key, name)
        gallery = _filled(task, checkpoint_gallery(task.partition, own, full), name, own + (full or []))
        shared = {f"shared_{kind}": shared_neighbours(own, full or [], kind) for kind in KINDS}
        gallery_done(task, gallery, evaluation_set=name, queries=len(own), **shared)

    yield from materialize_partitions(context, experiment, build, show=show_gallery)


def _neighbours(task: Task, arm: str, name: str) -> list[dict[str, Any]]:
    return json.loads(task.path("scores", f"{arm}@{name}", "neighbours.json").read_text())


def _filled(task: Task, gallery: Gallery, name: str, queries: list[dict[str, Any]]) -> Gallery:
    """Add pictures, from the shards of the evaluation set."""
    found = [n for q in queries for n in (q, *(near for kind in KINDS for near in q[kind]))]
    sha256 = {(n["shard"], n["key"]): n["image_sha256"] for n in found}
    own = name == HOLDOUT
    project = task.project
    shards = project.tars.values() if own else project.world.evaluation_shards[name]
    source = task.config.shards if own else task.config.evaluate.sets[name]
    by_name = {shard.name: shard for shard in shards}
    return with_pictures(gallery, by_name, sha256, dict(source.storage_options))
