"""Asset: one trained CLIP model an arm of the experiment."""

import shutil
from typing import Any

import dagster as dg

from assets.materialize import Events, materialize_partitions
from assets.partitions import every_key, partitions_of
from assets.resources import Experiment
from assets.tracking import Tracking, dagster_run_url, tracking_uri
from assets.training import train, train_spec
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.plan import CODE_VERSIONS, Recipe, checkpoint_path, recipes
from clipcov_pipeline.project import Task
from clipcov_pipeline.store import digest_of_file
from clipcov_pipeline.train import CHECKPOINT, RECORD


@dg.asset(
    partitions_def=partitions_of("checkpoints"),
    deps=[every_key("subsets")],
    backfill_policy=dg.BackfillPolicy.single_run(),
    output_required=False,
    group_name="training",
    kinds={"pytorch", "mlflow"},
    owners=["team:training"],
    code_version=CODE_VERSIONS["checkpoints"],
    pool="gpu",
)
def checkpoints(
    context: dg.AssetExecutionContext, experiment: Experiment, pipes: dg.PipesSubprocessClient
) -> Events:
    """A model trained on one subset by open_clip_train; every arm sees the same number of samples."""

    def build(task: Task) -> dict[str, Any]:
        recipe = next(r for r in recipes(task.config) if r.key == task.partition)
        settings, subset = task.config.train, task.record("subsets", recipe.subset)
        n_samples = subset.stats["samples"]
        if n_samples < settings.batch_size:
            raise InputError(
                f"train.batch_size: found {settings.batch_size}, expected at most the {n_samples} samples"
                f" of {recipe.subset}: lower it or raise the fraction"
            )
        spec = train_spec(
            settings,
            model=settings.model,
            pretrained=checkpoint_path(task.config, settings.pretrained),
            seed=recipe.seed,
            tars=sorted(task.path("subsets", recipe.subset, "shards").glob("*.tar")),
            n_samples=n_samples,
            scratch=task.scratch,
        )
        tracking = Tracking(task.config)
        run_id = _start_run(context, tracking, task, recipe)
        mlflow = {"tracking_uri": tracking_uri(task.config.work), "run_id": run_id}
        try:
            record = train(context, pipes, spec, task.entry.folder, gpus=settings.gpus, mlflow=mlflow)
        except BaseException:
            tracking.finish(run_id, "FAILED")
            raise
        shutil.rmtree(task.scratch)
        kept = (
            "steps",
            "samples_seen",
            "passes",
            "training_seconds",
            "first_loss",
            "last_loss",
            "parameters",
        )
        stats = {name: record[name] for name in kept}
        tracking.log_metrics(
            run_id, {f"train/{name}": value for name, value in stats.items()}, step=record["steps"]
        )
        tracking.log_artifact(run_id, task.path("subsets", recipe.subset, "subset.parquet"), "subset")
        tracking.log_artifact(run_id, task.entry.folder / RECORD)
        if task.config.path is not None:
            tracking.log_artifact(run_id, task.config.path, "config")
        tracking.finish(run_id)
        task.done(
            {"weights": digest_of_file(task.entry.folder / CHECKPOINT)},
            model=settings.model,
            subset=recipe.subset,
            mlflow_run_id=run_id,
            **stats,
        )
        return {"mlflow_run": dg.MetadataValue.url(tracking.url(run_id))}

    yield from materialize_partitions(context, experiment, build)


def _start_run(context: dg.AssetExecutionContext, tracking: Tracking, task: Task, recipe: Recipe) -> str:
    """Open the recipe's MLflow run with all of the configuration that made it."""
    step, config = task.step, task.config
    assert step.fingerprint is not None
    selection = config.select.methods.get(recipe.method, {})
    params: dict[str, Any] = {
        "method": recipe.method,
        "fraction": recipe.fraction,
        "seed": recipe.seed,
        **{f"select.{name}": value for name, value in selection.items()},
        **{f"train.{name}": value for name, value in config.train.semantic().items() if name != "seeds"},
        **{f"labels.{name}": value for name, value in config.labels.semantic().items()},
        **_flat_proxy(config.proxy.semantic()),
        "shards.source": config.shards.source,
        "evaluate.holdout_fraction": config.evaluate.holdout_fraction,
    }
    tags = {
        "clipcov.recipe": recipe.key,
        "clipcov.subset_digest": task.record("subsets", recipe.subset).digests["samples"],
        "clipcov.subset_fingerprint": task.record("subsets", recipe.subset).fingerprint,
        "clipcov.labels_fingerprint": task.record("pseudo_labels").fingerprint,
        "clipcov.proxy_fingerprint": task.record("proxy_model").fingerprint,
        "dagster.asset": "checkpoints",
        "dagster.partition": recipe.key,
        "dagster.run_id": context.run.run_id,
        "dagster.run_url": dagster_run_url(config, context.run.run_id),
    }
    return tracking.start(recipe.key, step.fingerprint, params, tags)


def _flat_proxy(proxy: dict[str, Any]) -> dict[str, Any]:
    train_settings = proxy.pop("train", None) or {}
    return {f"proxy.{key}": value for key, value in proxy.items()} | {
        f"proxy.train.{key}": value for key, value in train_settings.items()
    }
