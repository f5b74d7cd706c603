"""Asset: the model whose embeddings selection works on."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.display.preview import image
from assets.partitions import every_key
from assets.resources import Experiment
from assets.steps.materialize import Metadata, materialize_whole
from assets.training.pipes import train
from clipcov_pipeline.experiment.digests import digest_of, digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.experiment.train_spec import (
    RUN,
    TrainingData,
    train_spec,
    training_data,
    written_before,
)
from clipcov_pipeline.experiment.world import checkpoint_path
from clipcov_pipeline.pool.holdout import split_holdout
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.report.plots import plot_learning_curve
from clipcov_pipeline.subsets.index import whole_index
from clipcov_pipeline.training.spec import CHECKPOINT, EARLY_CHECKPOINT

CURVE = "learning_curve.png"


@dg.asset(
    deps=[every_key("raw_shards")],
    group_name="pool",
    kinds={"pytorch"},
    owners=["team:data"],
    code_version=CODE_VERSIONS["proxy_model"],
    pool="gpu",
)
def proxy_model(
    context: dg.AssetExecutionContext, experiment: Experiment, pipes: dg.PipesSubprocessClient
) -> dg.MaterializeResult:
    """The embedding model: an open_clip pretrained tag, a local checkpoint, or one trained on the pool."""

    def build(task: Task) -> None:
        proxy = task.config.proxy
        if proxy.train is None:
            _named(task)
            return
        data = _training_data(context, task)
        spec = train_spec(
            proxy.train,
            ModelSpec(proxy.model),
            data,
            seed=proxy.seed,
            scratch=task.scratch,
            keep_early=True,
        )
        record = train(context, pipes, spec, task.entry.folder, arm="proxy_model", gpus=proxy.train.gpus)
        plot_learning_curve(record["learning_curve"], task.entry.folder / CURVE)
        _trained(task, record, data.draws)

    return materialize_whole(context, experiment, build, show=show)


def _named(task: Task) -> None:
    """Take the weights that the YAML names, for the whole training and for its first part."""
    proxy = task.config.proxy
    source, early = (checkpoint_path(task.config, name) for name in (proxy.pretrained, proxy.early))
    digests = {"weights": _digest(proxy.model, source)}
    if early is not None:
        digests["early"] = _digest(proxy.model, early)
    task.done(digests, model=proxy.model, pretrained=source, early=early, trained_on="")


def _trained(task: Task, record: Mapping[str, Any], n_samples: int) -> None:
    """Take the weights that a training on so many samples has left in the entry's folder."""
    names = {"weights": CHECKPOINT, "early": EARLY_CHECKPOINT}
    files = {output: task.entry.folder / name for output, name in names.items()}
    task.done(
        {output: digest_of_file(path) for output, path in files.items() if path.exists()},
        model=task.config.proxy.model,
        pretrained=CHECKPOINT,
        trained_on=f"{n_samples:,} samples of the pool",
        samples_seen=record["samples_seen"],
        last_loss=record["last_loss"],
    )


def _digest(model: str, source: str | None) -> str:
    is_file = source is not None and Path(source).is_file()
    return digest_of_file(Path(str(source))) if is_file else digest_of([model, source])


def show(folder: Path) -> Metadata:
    """Return the learning curve of a proxy that was trained here."""
    curve = folder / CURVE
    return {"learning_curve": image(curve)} if curve.exists() else {}


def _training_data(context: dg.AssetExecutionContext, task: Task) -> TrainingData:
    """Write the index of the pool, without its held-out share, for the proxy's training.

    A training that was stopped goes on with the samples that it began with, whatever became of the pool
    since, while their shards are as they were; else, or where it was stopped before its first checkpoint, it
    begins anew, with the pool of today.
    """
    pool = task.config.shards
    if any((task.scratch / RUN / "checkpoints").glob("*.pt")):
        if (data := written_before(task.scratch, task.project.tars.values(), pool)) is not None:
            context.log.info("the training goes on, with the samples that it began with")
            return data
        context.log.warning("the training begins anew: shards that it read have changed or are gone")
    shutil.rmtree(task.scratch, ignore_errors=True)
    parts = []
    for name in task.project.shards:
        places = pl.read_parquet(task.path("raw_shards", name, "places.parquet"))
        kept, _ = split_holdout(places, task.config.evaluate.holdout_fraction)
        parts.append(kept.with_columns(shard=pl.lit(name)))
    return training_data(whole_index(pl.concat(parts)), task.project.tars.values(), task.scratch, pool)
