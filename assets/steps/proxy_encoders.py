"""The proxy's encoders for the assets that embed, loaded once a process, and a shard embedded by one."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import dagster as dg
import polars as pl

from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.experiment.world import checkpoint_path
from clipcov_pipeline.pool.manifest import good_samples
from clipcov_pipeline.pool.samples import iter_samples
from clipcov_pipeline.progress import Progress
from clipcov_pipeline.proxy.embeddings import Embedded, embed_samples
from clipcov_pipeline.proxy.encoder import Encoder, load_encoder
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.training.spec import CHECKPOINT, EARLY_CHECKPOINT


def proxy_encoder(task: Task) -> Encoder:
    """Return the encoder of the proxy model that the plan names."""
    return _encoder(task, task.config.proxy.pretrained, "weights", CHECKPOINT)


def early_encoder(task: Task) -> Encoder:
    """Return the encoder of the early proxy: that of the YAML, or the trained proxy after its first part."""
    return _encoder(task, task.config.proxy.early, "early", EARLY_CHECKPOINT)


def _encoder(task: Task, named: str | None, output: str, file: str) -> Encoder:
    pretrained = checkpoint_path(task.config, named) or str(task.path("proxy_model", file=file))
    digest, settings = task.record("proxy_model").digests[output], task.config.embed
    model = task.config.proxy.model
    return _load(model, pretrained, digest, settings.device, settings.batch_size, settings.workers)


@lru_cache(maxsize=1)
def _load(model: str, pretrained: str, _digest: str, device: str, batch_size: int, workers: int) -> Encoder:
    return load_encoder(
        ModelSpec(model, pretrained), device=device, batch_size=batch_size, workers=workers or None
    )


class EmbeddedShard(NamedTuple):
    """The good samples of a shard, as its manifest has them, and their embeddings by a proxy."""

    manifest: pl.DataFrame
    embedded: Embedded
    progress: Progress
    """Counts images since before the model was loaded."""


def embed_shard(
    context: dg.AssetExecutionContext, task: Task, encoder: Callable[[Task], Encoder]
) -> EmbeddedShard:
    """Read the shard that the task's partition names, and embed its good samples."""
    shard = task.project.tars[task.partition]
    manifest = good_samples(task.path("raw_shards", shard.name, "manifest.parquet"))
    progress = Progress(context.log.info, manifest.height, f"images of {shard.name}")
    keys, pool = set(manifest["key"]), task.config.shards
    samples = (
        iter_samples(shard, keys, dict(pool.storage_options), pool.caption) if keys else ()
    )  # a quarantined shard is not opened
    embedded = embed_samples(encoder(task), samples, manifest["uid"].to_list(), progress=progress.to)
    return EmbeddedShard(manifest, embedded, progress)
