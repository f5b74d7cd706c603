"""Asset: the model whose embeddings selection works on."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.display.preview import image
from assets.partitions import every_key
from assets.resources import Experiment
from assets.steps.materialize import Metadata, materialize_whole
from assets.training.pipes import RUN, train, train_spec
from clipcov_pipeline.experiment.digests import digest_of, digest_of_file
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.experiment.world import checkpoint_path
from clipcov_pipeline.pool.manifest import pool_keys
from clipcov_pipeline.progress import Progress
from clipcov_pipeline.report.plots import plot_learning_curve
from clipcov_pipeline.subsets.files import write_subset_tars
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
        tars, n_samples = _training_tars(context, task)
        spec = train_spec(
            proxy.train,
            model=proxy.model,
            pretrained=None,
            seed=proxy.seed,
            tars=tars,
            n_samples=n_samples,
            scratch=task.scratch,
            keep_early=True,
        )
        record = train(context, pipes, spec, task.entry.folder, arm="proxy_model", gpus=proxy.train.gpus)
        plot_learning_curve(record["learning_curve"], task.entry.folder / CURVE)
        _trained(task, record, n_samples)

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


def _training_tars(context: dg.AssetExecutionContext, task: Task) -> tuple[list[Path], int]:
    """Write the pool, without its held-out share, as tars for the proxy's training; count their samples.

    A training that was stopped goes on with the tars that it began with, whatever became of the pool since;
    one that was stopped before its first checkpoint begins anew, with the pool of today.
    """
    folder = task.scratch / "tars"
    sizes = folder / "sizes.json"
    # sizes.json is written last: without it a killed run left incomplete tars
    if sizes.exists() and any((task.scratch / RUN / "checkpoints").glob("*.pt")):
        context.log.info("the training goes on, with the samples that it began with")
    else:
        shutil.rmtree(task.scratch / RUN, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        manifests = [task.path("raw_shards", name, "manifest.parquet") for name in task.project.shards]
        keys = pool_keys(manifests, task.config.evaluate.holdout_fraction)
        total = sum(len(some) for some in keys.values())
        progress = Progress(context.log.info, total, "samples for the proxy")
        options = dict(task.config.shards.storage_options)
        write_subset_tars(
            list(task.project.shards.values()), keys, folder, storage_options=options, progress=progress.add
        )
    return sorted(folder.glob("*.tar")), sum(json.loads(sizes.read_text()).values())
