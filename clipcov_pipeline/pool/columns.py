"""Columns joined to tables of samples, and the samples of a table by shard."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.holdout import split_holdout
from clipcov_pipeline.pool.samples import SampleStatus


def good_samples(manifest: Path) -> pl.DataFrame:
    """Return the usable rows of a shard's manifest, in the tar's order."""
    return pl.read_parquet(manifest).filter(pl.col("status") == SampleStatus.ok)


def with_image_hash(members: pl.DataFrame) -> pl.DataFrame:
    """Add ``image_hash`` (uint64), equal where the images' bytes are; ``image_sha256`` is read."""
    return members.with_columns(image_hash=pl.col("image_sha256").hash(seed=0))


def with_early_similarity(members: pl.DataFrame, files: Mapping[str, Path]) -> pl.DataFrame:
    """Add ``early_similarity`` (float32) from each shard's file of ``uid`` and ``early_similarity``.

    Raises:
        InputError: the early proxy gave a sample of the pool no embedding.
    """
    parts = [
        pl.read_parquet(path).with_columns(shard=pl.lit(shard, pl.String)) for shard, path in files.items()
    ]
    joined = members.join(pl.concat(parts), on=("shard", "uid"), how="left", maintain_order="left")
    lost = joined.filter(pl.col("early_similarity").is_null())
    if lost.height:
        raise InputError(
            f"early_similarity: found none for {lost.height} samples, first uid {lost['uid'][0]}, expected"
            " one each: the early proxy gives them no finite embedding; use another as proxy.early"
        )
    return joined


def keys_by_shard(samples: pl.DataFrame) -> Mapping[str, set[str]]:
    """Return the keys of these samples for each shard; columns ``shard`` and ``key`` are read."""
    grouped = samples.group_by("shard", maintain_order=True).agg("key")
    return {shard: set(keys) for shard, keys in grouped.iter_rows()}


def pool_keys(manifests: Iterable[Path], holdout_fraction: float) -> Mapping[str, set[str]]:
    """Return the keys of the pool's samples for each shard, straight from the manifests."""
    keys: dict[str, set[str]] = {}
    for manifest in manifests:
        keys |= keys_by_shard(split_holdout(good_samples(manifest), holdout_fraction)[0])
    return keys


def evenly(total: int, count: int) -> list[int]:
    """Return up to ``count`` places of ``total``, evenly spread, the first and last among them."""
    if total <= count or count <= 1:
        return list(range(min(total, count)))
    return [round(index * (total - 1) / (count - 1)) for index in range(count)]
