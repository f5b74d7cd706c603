"""Asset: one trained CLIP model an arm of the experiment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.display.asset_checks import check_specs
from assets.display.preview import image
from assets.mlflow_runs.registry import register
from assets.mlflow_runs.tracking import Tracking, dagster_run_url, tracking_uri
from assets.partitions import every_key, partitions_of
from assets.resources import Experiment
from assets.steps.materialize import Events, Metadata, materialize_partitions
from assets.steps.validation import held_out_index
from assets.training.pipes import train
from clipcov_pipeline.experiment.batches import repeats_in_batches
from clipcov_pipeline.experiment.config.base import FULL
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.reasons import flat
from clipcov_pipeline.experiment.recipes import Recipe, recipes
from clipcov_pipeline.experiment.records import node_name
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.experiment.train_spec import train_spec, training_data
from clipcov_pipeline.experiment.world import checkpoint_path
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.redaction import public_address
from clipcov_pipeline.report.plots import plot_learning_curve
from clipcov_pipeline.subsets.cut import PARQUET
from clipcov_pipeline.training.spec import RECORD, TrainSpec

CURVE = "learning_curve.png"
KEPT = (
    "steps",
    "samples_seen",
    "passes",
    "training_seconds",
    "first_loss",
    "last_loss",
    "parameters",
    "bytes_fetched",
    "bytes_used",
)


@dg.asset(
    partitions_def=partitions_of("checkpoints"),
    deps=[every_key("subsets"), every_key("subset_diagnostics")],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="training",
    kinds={"pytorch", "mlflow"},
    owners=["team:training"],
    code_version=CODE_VERSIONS["checkpoints"],
    check_specs=check_specs("checkpoints"),
    pool="gpu",
)
def checkpoints(
    context: dg.AssetExecutionContext, experiment: Experiment, pipes: dg.PipesSubprocessClient
) -> Events:
    """A model trained on one subset by open_clip_train; every arm sees the same number of samples."""

    def build(task: Task) -> None:
        recipe = next(r for r in recipes(task.config) if r.key == task.partition)
        settings = task.config.train.under(recipe.protocol)
        index = pl.read_parquet(task.path("subsets", recipe.subset, PARQUET))
        data = training_data(index, task.project.tars.values(), task.scratch, task.config.shards)
        stats = task.record("subsets", recipe.subset).stats
        if (quota := stats.get("quota")) is not None:
            data = data._replace(draws=sum(quota), quota=tuple(quota))
        spec = train_spec(
            settings,
            ModelSpec(settings.model, checkpoint_path(task.config, settings.pretrained)),
            data,
            seed=recipe.seed,
            scratch=task.scratch,
            held_out=held_out_index(task, task.scratch / "held_out.parquet"),
        )
        if text := repeats_in_batches(stats.get("most_alike", 0), data.draws, settings.batch_size):
            context.log.warning(f"{recipe.subset}: {text}")
        digest, stats = _trained(context, pipes, task, recipe, spec, index)
        task.done({"weights": digest}, model=settings.model, subset=recipe.subset, **stats)

    yield from materialize_partitions(context, experiment, build, show=show)


def _trained(
    context: dg.AssetExecutionContext,
    pipes: dg.PipesSubprocessClient,
    task: Task,
    recipe: Recipe,
    spec: TrainSpec,
    index: pl.DataFrame,
) -> tuple[str, dict[str, Any]]:
    """Train an arm in an MLflow run of its own, which ends as the training does.

    Return the digest of the weights, and what is recorded of the training.
    """
    tracking, folder = Tracking(task.config), task.entry.folder
    run_id = _start_run(context, tracking, task, recipe)
    mlflow = {"tracking_uri": tracking_uri(task.config.work), "run_id": run_id}
    try:
        gpus = task.config.train.gpus
        record = train(context, pipes, spec, folder, arm=recipe.key, gpus=gpus, mlflow=mlflow)
        plot_learning_curve(record["learning_curve"], folder / CURVE)
        stats = {name: record[name] for name in KEPT}
        stats |= _given(record, index, anew=spec.quota is not None)
        digest = record["weights_digest"]
        register(tracking, run_id, folder, digest, {"clipcov.recipe": recipe.key})
        _finish_run(tracking, run_id, task, recipe, stats)
    except BaseException as error:
        tracking.finish(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    return digest, {"mlflow_run_id": run_id, **stats}


def _given(record: Mapping[str, Any], index: pl.DataFrame, *, anew: bool) -> dict[str, Any]:
    """Return what the training was given, and the distinct samples that were due to it."""
    seen = {f"seen_{name}": count for name, count in record["seen"].items()}
    if anew:
        return {**seen, "due_undefined": "every pass draws anew"}
    if index["weight"].n_unique() > 1:
        return {**seen, "due_undefined": "samples are drawn by unequal weights"}
    return {**seen, "due": min(index.height, record["samples_seen"])}


def show(folder: Path) -> Metadata:
    """Return the learning curve."""
    return {"learning_curve": image(folder / CURVE)}


def _finish_run(tracking: Tracking, run_id: str, task: Task, recipe: Recipe, stats: dict[str, Any]) -> None:
    """Log what the training ended with and what made it, then close the MLflow run."""
    numbers = {f"train/{name}": value for name, value in stats.items() if not isinstance(value, str)}
    tracking.log_metrics(run_id, numbers, step=int(stats["steps"]))
    tracking.log_artifact(run_id, task.path("subsets", recipe.subset, PARQUET), "subset")
    tracking.log_artifact(run_id, task.entry.folder / RECORD)
    tracking.log_artifact(run_id, task.entry.folder / CURVE, "plots")
    if recipe.method != FULL:
        diagnosed = task.record("subset_diagnostics", recipe.subset)
        numbers = {k: v for k, v in diagnosed.stats.items() if isinstance(v, int | float)}
        tracking.log_metrics(run_id, {f"subset/{name}": value for name, value in numbers.items()})
        for plot in sorted(task.project.store.folder(diagnosed).glob("*.png")):
            tracking.log_artifact(run_id, plot, "diagnostics")
    tracking.log_config(run_id, task.project)
    tracking.finish(run_id)


def _start_run(context: dg.AssetExecutionContext, tracking: Tracking, task: Task, recipe: Recipe) -> str:
    """Open the recipe's MLflow run with all of the configuration that made it."""
    step, config = task.step, task.config
    training = config.train.under(recipe.protocol).semantic()
    assert step.fingerprint is not None
    params: dict[str, Any] = {
        "method": recipe.method,
        "fraction": recipe.fraction,
        "seed": recipe.seed,
        "protocol": recipe.protocol,
        **{f"select.{name}": value for name, value in _selection(task, recipe).items()},
        **{f"train.{name}": value for name, value in training.items() if name != "seeds"},
        **{f"labels.{name}": value for name, value in config.labels.semantic().items()},
        **_flat_proxy(config.proxy.semantic()),
        "shards.source": public_address(config.shards.source),
        "evaluate.holdout_fraction": config.evaluate.holdout_fraction,
    }
    run_url = dagster_run_url(config, context.run.run_id)
    tags = {
        "clipcov.recipe": recipe.key,
        "clipcov.subset_digest": task.record("subsets", recipe.subset).digests["samples"],
        "clipcov.subset_fingerprint": task.record("subsets", recipe.subset).fingerprint,
        "clipcov.labels_fingerprint": task.record("pseudo_labels").fingerprint,
        "clipcov.proxy_fingerprint": task.record("proxy_model").fingerprint,
        "dagster.asset": "checkpoints",
        "dagster.partition": recipe.key,
        "dagster.run_id": context.run.run_id,
        "dagster.run_url": run_url,
        # the description is the one place of the run's page where an address is a link
        "mlflow.note.content": f"Trained by [Dagster run {context.run.run_id[:8]}]({run_url}).",
    }
    run_id = tracking.start(recipe.key, step.fingerprint, params, tags)
    subset = task.record("subsets", recipe.subset)
    folder = task.project.store.folder(subset)
    tracking.log_dataset(run_id, recipe.subset, subset.digests["samples"], folder, subset.stats["samples"])
    return run_id


def _selection(task: Task, recipe: Recipe) -> dict[str, Any]:
    """Return all parameters of the recipe's method, defaults included, so that runs can be compared."""
    if recipe.method == FULL:
        return {}
    params = task.plan.by_name[node_name("rankings", recipe.method)].node.params
    return flat(params["select"]["methods"][recipe.method])


def _flat_proxy(proxy: dict[str, Any]) -> dict[str, Any]:
    train_settings = proxy.pop("train", None) or {}
    return {f"proxy.{key}": value for key, value in proxy.items()} | {
        f"proxy.train.{key}": value for key, value in train_settings.items()
    }
