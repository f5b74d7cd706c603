"""From the training settings of the YAML to one run of open_clip_train."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from clipcov_pipeline.experiment.config.shards import Shards
from clipcov_pipeline.experiment.config.training import Training
from clipcov_pipeline.pool.captions import TXT, CaptionRule
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.proxy.models import ModelSpec
from clipcov_pipeline.subsets.index import draws_of_pass, training_rows
from clipcov_pipeline.training.spec import TrainSpec
from clipcov_pipeline.training.training_index import write_training_index

RUN = "run"  # the training's own folder below its scratch folder
INDEX = "index.parquet"  # beside it
CACHE = "fetched"

# a setting and the field of `TrainSpec` that takes it have one name; the GPUs are the launcher's
SETTINGS = Training.model_fields.keys() - {"gpus"}


class TrainingData(NamedTuple):
    """What is trained on: the path of a `training_index`, the draws of a pass over it, how it is read."""

    index: Path
    draws: int
    cache: str = ""
    storage_options: Mapping[str, Any] | None = None
    quota: tuple[int, ...] | None = None
    captions: CaptionRule = TXT


def write_rows(path: Path, index: pl.DataFrame, shards: Iterable[Shard]) -> pl.DataFrame:
    """Write what a training reads of an index to a file; return the rows. Raises as `training_rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = training_rows(index, shards)
    write_training_index(path, {column.name: column.to_arrow() for column in rows})
    return rows


def training_data(
    index: pl.DataFrame, shards: Iterable[Shard], scratch: Path, settings: Shards
) -> TrainingData:
    """Write what a training reads to ``scratch/index.parquet``.

    Args:
        index: the samples, columns as `subsets.index.INDEX_SCHEMA`.
        shards: the pool's, as they are now.
        scratch: the training's folder; what is fetched of remote shards goes below it.
        settings: of the pool.

    Raises:
        InputError: as `training_rows`.
    """
    path = scratch / INDEX
    return _data(path, write_rows(path, index, shards), settings)


def written_before(scratch: Path, shards: Iterable[Shard], settings: Shards) -> TrainingData | None:
    """Return what `training_data` wrote earlier, None where there is nothing or a shard is not as it was."""
    path = scratch / INDEX
    if not path.exists():
        return None
    rows = pl.read_parquet(path, columns=["shard", "shard_version", "weight"])
    read = set(rows.select("shard", "shard_version").unique().iter_rows())
    if not read <= {(shard.url, shard.version) for shard in shards}:
        return None
    return _data(path, rows, settings)


def _data(path: Path, rows: pl.DataFrame, settings: Shards) -> TrainingData:
    cache, options = str(path.parent / CACHE), settings.storage_options
    draws = draws_of_pass(rows["weight"].to_numpy())
    return TrainingData(path, draws, cache, options, captions=settings.caption)


def train_spec(
    settings: Training,
    model: ModelSpec,
    data: TrainingData,
    *,
    seed: int,
    scratch: Path,
    held_out: Path | None = None,
    keep_early: bool = False,
) -> TrainSpec:
    """Return the training run that the settings ask for.

    Args:
        settings: how to train, of exactly one length (``samples_seen`` or ``epochs``).
        model: architecture, and the weights to start from, a path already absolute.
        data: what is trained on.
        seed: of the weights, of the order of samples and of how images are varied.
        scratch: the folder for the run's own one.
        held_out: index of the held-out pairs of the retrieval curve; None, no curve.
        keep_early: also keep the weights after the first virtual epoch.

    Raises:
        InputError: no samples.
    """
    given = {name: getattr(settings, name) for name in SETTINGS}
    given["aug_cfg"] = settings.aug_cfg.semantic() if settings.aug_cfg is not None else None
    return TrainSpec(
        **given,
        model=model.model,
        pretrained=model.pretrained,
        index=str(data.index),
        n_samples=data.draws,
        quota=data.quota,
        cache=data.cache,
        storage_options=data.storage_options,
        caption=data.captions.written,
        seed=seed,
        val_data=str(held_out) if held_out is not None else None,
        keep_early=keep_early,
        log_dir=str(scratch),
        name=RUN,
    )
