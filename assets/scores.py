"""Asset: benchmark scores of every checkpoint."""

import json
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from assets.display.asset_checks import check_specs
from assets.display.preview import table_metadata
from assets.mlflow_runs.tracking import Tracking
from assets.partitions import partitions_of, same_key
from assets.resources import Experiment
from assets.steps.materialize import Events, Metadata, materialize_partitions
from assets.steps.validation import held_out_rows
from clipcov_pipeline.evaluation.folder_scores import FolderSet, evaluate_folder
from clipcov_pipeline.evaluation.neighbours import nearest
from clipcov_pipeline.evaluation.pairs import Counting, EmbeddedPairs, embed_pairs, evaluate_pairs
from clipcov_pipeline.evaluation.splits import DecodedImages, kept_bytes
from clipcov_pipeline.experiment.config.base import HOLDOUT
from clipcov_pipeline.experiment.config.evaluate import EvaluationSet
from clipcov_pipeline.experiment.digests import digest_of_file
from clipcov_pipeline.experiment.project import Project, Task
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.pool.pixels import ImageRules
from clipcov_pipeline.pool.spread import evenly
from clipcov_pipeline.proxy.encoder import Encoder, load_encoder
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.proxy.prompts import class_embeddings
from clipcov_pipeline.training.spec import CHECKPOINT

HOLDOUT_PAIRS = 10_000  # of a larger hold-out so many are scored: the recalls take time by its square


@dg.asset(
    partitions_def=partitions_of("scores"),
    deps=[same_key("checkpoints")],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="training",
    kinds={"pytorch", "json"},
    owners=["team:training"],
    code_version=CODE_VERSIONS["scores"],
    check_specs=check_specs("scores"),
    pool="gpu",
)
def scores(context: dg.AssetExecutionContext, experiment: Experiment) -> Events:
    """Scores of a checkpoint on every evaluation set, as CLIP_benchmark's JSON records."""

    def build(task: Task) -> None:
        recipe, _, name = task.partition.partition("@")
        checkpoint = task.record("checkpoints", recipe)
        path, neighbours = task.entry.folder / "scores.json", task.entry.folder / "neighbours.json"

        def keep_neighbours(pairs: EmbeddedPairs) -> None:
            neighbours.write_text(json.dumps(nearest(pairs), indent=1))

        records = _evaluate(task, recipe, name, checkpoint.stats["model"], keep_neighbours)
        path.write_text(json.dumps(records, indent=1))
        if some := records[0].get("damaged"):
            n_damaged = records[0]["n_damaged"]
            context.log.warning(f"{name}: {n_damaged} unreadable samples are in no score: {'; '.join(some)}")
        run_id = checkpoint.stats["mlflow_run_id"]
        if not _log(Tracking(task.config), run_id, name, path):
            context.log.warning(
                f"MLflow run {run_id} of {recipe} is gone: these scores are in the store only"
            )
        values = {metric: value for record in records for metric, value in record["metrics"].items()}
        task.done(
            {file.stem: digest_of_file(file) for file in (path, neighbours) if file.exists()},
            **values,
            chance={metric: level for record in records for metric, level in record["chance"].items()},
            n_scored={metric: record["n_samples"] for record in records for metric in record["metrics"]},
            mlflow_run_id=run_id,
        )

    yield from materialize_partitions(context, experiment, build, show=show, restore=restore)


def restore(project: Project, record: Record) -> None:
    """Let MLflow show the scores of an earlier entry that stands again."""
    name, path = record.partition.partition("@")[2], project.store.checked(record, "scores.json")
    _log(Tracking(project.config), record.stats["mlflow_run_id"], name, path)


def _log(tracking: Tracking, run_id: str, name: str, path: Path) -> bool:
    """Log the scores on one set to the arm's MLflow run; return whether that run is there."""
    if not tracking.is_there(run_id):
        return False
    records = json.loads(path.read_text())
    metrics = {f"{name}/{metric}": value for record in records for metric, value in record["metrics"].items()}
    tracking.log_metrics(run_id, metrics)
    tracking.log_artifact(run_id, path, f"scores/{name}")
    return True


def show(folder: Path) -> Metadata:
    """Return the scores as a table with chance level beside them."""
    rows = [
        {
            "task": record["task"],
            "metric": metric,
            "value": value,
            "chance": record["chance"][metric],
            "n_samples": record["n_samples"],
        }
        for record in json.loads((folder / "scores.json").read_text())
        for metric, value in record["metrics"].items()
    ]
    return table_metadata(pl.DataFrame(rows), "scores", rows=len(rows))


def _evaluate(
    task: Task, recipe: str, name: str, model: str, on_pairs: Callable[[EmbeddedPairs], None]
) -> list[dict[str, Any]]:
    settings = task.config.evaluate
    weights = str(task.path("checkpoints", recipe, CHECKPOINT))
    encoder = _encoder(model, weights, settings.device, settings.batch_size)
    if name == HOLDOUT:
        pairs = _held_out(task, encoder)
        on_pairs(pairs)
        # boilerplate captions and copied images have no single right answer
        return evaluate_pairs(
            encoder,
            pairs,
            dataset=HOLDOUT,
            model=model,
            pretrained=recipe,
            counting=Counting(True, settings.ties),
        )
    chosen = settings.sets[name]
    shards = list(task.project.world.evaluation_shards[name])
    if chosen.benchmark is not None:
        settings_json = chosen.model_dump_json(exclude_unset=True)
        files = tuple(sorted(task.step.node.sources.items()))
        folder_set = _folder_set(
            name, task.config.resolve(chosen.benchmark), settings_json, tuple(shards), files
        )
        decoded = _decoded(task.config.automation.pools.get("gpu", 1))
        return evaluate_folder(
            encoder, folder_set, model=model, pretrained=recipe, decoded=decoded,
            rules=task.config.shards.image_rules,
            classifier=lambda names, templates: _classifier(encoder, tuple(names), tuple(templates)),
            ties=settings.ties,
        )  # fmt: skip
    options = json.dumps(dict(chosen.storage_options))
    manifest = pl.concat([_manifest(s, task.config.shards.image_rules, options) for s in shards])
    pairs = embed_pairs(encoder, shards, manifest, storage_options=dict(chosen.storage_options))
    on_pairs(pairs)
    return evaluate_pairs(
        encoder,
        pairs,
        dataset=name,
        model=model,
        pretrained=recipe,
        tasks=chosen.tasks,
        templates=chosen.templates or ("{}",),
        counting=Counting(ties=settings.ties),
    )


def _held_out(task: Task, encoder: Encoder) -> EmbeddedPairs:
    """Embed pairs of the pool that no arm trains on, with their captions by the pool's rule."""
    held_out, pool = held_out_rows(task, HOLDOUT_PAIRS), task.config.shards
    return embed_pairs(
        encoder,
        list(task.project.tars.values()),
        held_out[evenly(held_out.height, HOLDOUT_PAIRS)],
        storage_options=dict(pool.storage_options),
        captions=pool.caption,
    )


@lru_cache(maxsize=1)
def _encoder(model: str, weights: str, device: str, batch_size: int) -> Encoder:
    return load_encoder(ModelSpec(model, weights), device=device, batch_size=batch_size)


@cache
def _manifest(shard: Shard, rules: ImageRules, storage_options: str) -> pl.DataFrame:
    """Every arm is scored on the same shards: check their samples once a process."""
    return read_shard(shard, **rules._asdict(), storage_options=json.loads(storage_options)).manifest


@lru_cache(maxsize=64)
def _folder_set(
    name: str, folder: Path, settings: str, shards: tuple[Shard, ...], files: tuple[tuple[str, str], ...]
) -> FolderSet:
    """The small files, and the draw of train samples, once a process for the same files."""
    del files
    return FolderSet.open(name, folder, EvaluationSet.model_validate_json(settings), shards)


@lru_cache(maxsize=1)
def _decoded(processes: int) -> DecodedImages:
    return DecodedImages(kept_bytes(processes))


@lru_cache(maxsize=1)
def _classifier(encoder: Encoder, names: tuple[str, ...], templates: tuple[str, ...]) -> np.ndarray:
    """Shifted versions of a set have its class names: their prompts are embedded once a checkpoint."""
    return class_embeddings(encoder, names, templates)
