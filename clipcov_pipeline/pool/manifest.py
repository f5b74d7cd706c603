"""A shard's manifest: every sample is checked and given a row, and what is read off such rows later."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from clipcov_pipeline.pool.captions import TXT, CaptionRule
from clipcov_pipeline.pool.listing import Shard, open_shard
from clipcov_pipeline.pool.pixels import MAX_PIXELS, HighBitDepth, ImageRules
from clipcov_pipeline.pool.places import places_of, places_schema
from clipcov_pipeline.pool.samples import SampleStatus, check_sample, is_checked
from clipcov_pipeline.pool.tars import DigestReader, Group, NotATarError, map_in_order, read_groups
from clipcov_pipeline.pool.uids import source_id_of, uid_of
from clipcov_pipeline.redaction import redacted

MANIFEST_SCHEMA = {
    "uid": pl.String,
    "key": pl.String,
    "shard": pl.String,
    "caption": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "status": pl.String,
    "reason": pl.String,
    "image_ext": pl.String,
    "image_sha256": pl.String,
    "source_id": pl.String,
    "json_problem": pl.String,
}

_SAME_UID = "an earlier sample of this shard has the same uid"


@dataclass(frozen=True)
class ShardReport:
    """What `read_shard` found.

    manifest: one row a sample, in the tar's order, columns as `MANIFEST_SCHEMA`; `status` is a
    `SampleStatus`, `reason` is null where it is `ok`, `uid` is unique among the rows that are `ok`;
    `source_id` is the json's `uid` where that is no UUID, `json_problem` why a json is of no use (the pair is
    still good: only what the json says is lost).
    places: one row a sample that is ok, in the same order, columns as `places_schema`.
    sha256: of the whole file, hex.
    quarantined: why the file is not a tar at all (the manifest is then empty), else None.
    """

    manifest: pl.DataFrame
    places: pl.DataFrame
    sha256: str
    quarantined: str | None


def read_shard(
    shard: Shard,
    *,
    max_pixels: int,
    max_resized_pixels: int = MAX_PIXELS,
    high_bit_depth: HighBitDepth = "refuse",
    captions: CaptionRule = TXT,
    storage_options: dict | None = None,
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> ShardReport:
    """Check every sample of a shard and give it a status; one pass, which also takes the file's sha256.

    The report is a function of the file's bytes and the rules for images and captions alone.

    Args:
        shard: the shard.
        max_pixels, max_resized_pixels, high_bit_depth: `ImageRules`; only what they take is decoded.
        captions: where captions are, and which one counts.
        storage_options: fsspec's.
        progress: called with the number of further samples done, as tqdm's `update` is.
        workers: threads that decode; by default one a core, at most 16.

    Raises:
        OSError: the file cannot be read.
    """
    rows, places = list[dict](), list[dict]()
    seen_uids, quarantined = set[str](), None
    rules = ImageRules(max_pixels, max_resized_pixels, high_bit_depth)
    check = partial(_check, shard.name, rules, captions)
    with open_shard(shard.url, storage_options) as file, warnings.catch_warnings():
        # what Pillow warns of (large images, damaged EXIF, odd palettes) is either checked here or harmless
        warnings.simplefilter("ignore")
        reader = DigestReader(file)
        try:
            for row, place in map_in_order(check, read_groups(reader, load=is_checked), workers):
                if row["status"] == SampleStatus.ok:
                    if row["uid"] in seen_uids:
                        row |= {"status": SampleStatus.duplicate_uid, "reason": _SAME_UID}
                    else:
                        places.append(place)
                    seen_uids.add(row["uid"])
                rows.append(row)
                if progress is not None:
                    progress(1)
        except NotATarError as error:
            quarantined = redacted(str(error))
        digest = reader.finish()
    manifest = pl.DataFrame([{**row, "status": str(row["status"])} for row in rows], schema=MANIFEST_SCHEMA)
    return ShardReport(manifest, pl.DataFrame(places, schema=places_schema(captions)), digest, quarantined)


def _check(shard_name: str, rules: ImageRules, captions: CaptionRule, group: Group) -> tuple[dict, dict]:
    """The manifest's row of one sample, and where a good one lies."""
    row: dict[str, Any] = dict.fromkeys(MANIFEST_SCHEMA)
    meta, problem = group.read_meta()
    row.update(uid=uid_of(shard_name, group.key, meta), key=group.key, shard=shard_name)
    row.update(source_id=source_id_of(meta), json_problem=problem)
    row["status"], row["reason"] = check_sample(group, row, rules, captions)
    if row["status"] != SampleStatus.ok:
        return row, {}
    place = places_of(group, row, captions)
    texts = [suffix for suffix in captions.members if suffix in group.suffixes]
    if place["image_offset"] is None or any(suffix not in group.places for suffix in texts):
        row["status"] = SampleStatus.stored_sparse
        row["reason"] = "its image or caption lies in pieces: write the tar without --sparse"
    return row, place


def good_samples(manifest: Path) -> pl.DataFrame:
    """Return the usable rows of a shard's manifest, in the tar's order."""
    return pl.read_parquet(manifest).filter(pl.col("status") == SampleStatus.ok)


def kept_aside(manifest: pl.DataFrame) -> dict[str, int]:
    """Return how many samples of a manifest are not usable, by their status, the most first."""
    bad = manifest.filter(pl.col("status") != SampleStatus.ok)["status"].value_counts(sort=True)
    return dict(bad.sort("count", "status", descending=[True, False]).iter_rows())


def with_image_hash(members: pl.DataFrame) -> pl.DataFrame:
    """Add ``image_hash`` (uint64), equal where the images' bytes are; ``image_sha256`` is read."""
    return members.with_columns(image_hash=pl.col("image_sha256").hash(seed=0))


def with_image_size(members: pl.DataFrame, manifests: Iterable[Path]) -> pl.DataFrame:
    """Add ``width`` and ``height`` of the stored image, in pixels, from the shards' manifests.

    Columns ``shard`` and ``uid`` are read.
    """
    good = [good_samples(path).select("shard", "uid", "width", "height") for path in manifests]
    return members.join(pl.concat(good), on=("shard", "uid"), how="left", maintain_order="left")


def keys_by_shard(samples: pl.DataFrame) -> Mapping[str, set[str]]:
    """Return the keys of these samples for each shard; columns ``shard`` and ``key`` are read."""
    grouped = samples.group_by("shard", maintain_order=True).agg("key")
    return {shard: set(keys) for shard, keys in grouped.iter_rows()}


def with_source_id(samples: pl.DataFrame, named: pl.DataFrame) -> pl.DataFrame:
    """Add ``source_id`` from a frame with ``uid`` and, where any sample has one, ``source_id``."""
    if "source_id" not in named.columns:
        return samples
    return samples.join(named.select("uid", "source_id"), on="uid", how="left", maintain_order="left")
