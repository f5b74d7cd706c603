"""The pool: the good samples of all shards, less a share by a hash of the uid that no arm trains on."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.shards import SampleStatus


def is_held_out(uid: str, fraction: float) -> bool:
    """Return whether a sample belongs to the held-out share; depends on its uid alone.

    The uid is hashed again, because a json's own uid need not be uniform.
    """
    return int(hashlib.sha256(uid.encode()).hexdigest()[:8], 16) < fraction * 2**32


def good_samples(manifest: Path) -> pl.DataFrame:
    """Return the usable rows of a shard's manifest, in the tar's order."""
    return pl.read_parquet(manifest).filter(pl.col("status") == SampleStatus.ok)


def split_holdout(samples: pl.DataFrame, fraction: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return (pool, held out) by uid."""
    mask = pl.Series([is_held_out(uid, fraction) for uid in samples["uid"]], dtype=pl.Boolean)
    return samples.filter(~mask), samples.filter(mask)


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
