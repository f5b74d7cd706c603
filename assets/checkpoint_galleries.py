"""Asset: what every model finds nearest to fixed queries, beside the full-pool model."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from assets.partitions import every_key, partitions_of
from assets.resources import Experiment
from assets.steps.materialize import Events, Metadata, materialize_partitions
from assets.steps.preview import image
from clipcov_pipeline.experiment.config.base import FULL, HOLDOUT
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.recipes import gallery_set, recipes
from clipcov_pipeline.experiment.stages import CODE_VERSIONS, GALLERY
from clipcov_pipeline.report.checkpoint_gallery import checkpoint_gallery, shared_neighbours
from clipcov_pipeline.report.drawing import PAGE, SHEET, write_page, write_sheet
from clipcov_pipeline.report.gallery import with_pictures, write_gallery


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
        found = [n for q in own + (full or []) for n in (q, *q["image_to_image"], *q["caption_to_image"])]
        sha256 = {(n["shard"], n["key"]): n["image_sha256"] for n in found}
        shards = task.project.world.shards if name == HOLDOUT else task.project.world.evaluation_shards[name]
        source = task.config.shards if name == HOLDOUT else task.config.evaluate.sets[name]
        gallery = with_pictures(
            checkpoint_gallery(task.partition, own, full),
            {shard.name: shard for shard in shards},
            sha256,
            dict(source.storage_options),
        )
        folder = task.entry.folder
        write_gallery(gallery, folder / GALLERY)
        write_page(gallery, folder / PAGE)
        write_sheet(gallery, folder / SHEET)
        shared = {f"shared_{kind}": shared_neighbours(own, full or [], kind) for kind in KINDS}
        task.done(
            {"gallery": digest_of_file(folder / GALLERY)},
            evaluation_set=name,
            queries=len(own),
            pictures_missing=gallery.missing,
            **shared,
        )

    yield from materialize_partitions(context, experiment, build, show=show)


KINDS = ("image_to_image", "caption_to_image")


def show(folder: Path) -> Metadata:
    """Return the contact sheet, and where the page is."""
    return {"gallery": image(folder / SHEET), "page": dg.MetadataValue.path(str(folder / PAGE))}


def _neighbours(task: Task, arm: str, name: str) -> list[dict[str, Any]]:
    return json.loads(task.path("scores", f"{arm}@{name}", "neighbours.json").read_text())
