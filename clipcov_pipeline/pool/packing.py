"""Packs a shard that is no tar into one: what comes after `raw_shards` reads tars, by offset."""

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import polars as pl

from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.manifest import MANIFEST_SCHEMA, ShardReport
from clipcov_pipeline.pool.places import PLACES_SCHEMA
from clipcov_pipeline.pool.rows import Columns, Row, UnreadableShardError, rows_of

PACKED = "packed.tar"


class Packed(NamedTuple):
    """tar: the shard as a tar, None where its file cannot be read; problems: by key, why something is
    missing; quarantined: why the whole file is of no use."""

    tar: Shard | None
    problems: dict[str, str]
    quarantined: str | None


def pack_shard(
    shard: Shard,
    columns: Columns,
    folder: Path,
    storage_options: dict | None = None,
    *,
    limit: int | None = None,
) -> Packed:
    """Write a shard's pairs to ``FOLDER/packed.tar``: image as stored, caption, other columns as json.

    The same rows give the same bytes.

    Args:
        shard: of a parquet file, or of lines of a folder's table.
        columns: where images and captions are.
        folder: there already.
        storage_options: fsspec's.
        limit: the first so many pairs only.

    Raises:
        InputError, OSError: as `rows_of`.
    """
    path = folder / PACKED
    try:
        problems = _write(path, islice(rows_of(shard, columns, storage_options), limit))
    except UnreadableShardError as error:
        path.unlink(missing_ok=True)
        return Packed(None, {}, str(error))
    return Packed(tar_at(shard, path), problems, None)


def tar_at(shard: Shard, path: Path) -> Shard:
    """A shard as the tar that it was packed into; one that could not be packed has none, and no samples."""
    status = path.stat() if path.exists() else None
    version = f"{status.st_size}-{status.st_mtime_ns}" if status else "none"
    return Shard(shard.name, str(path), version)


def _write(path: Path, rows: Iterable[Row]) -> dict[str, str]:
    problems = {}
    with tarfile.open(path, "w") as tar:
        for row in rows:
            if row.problem is not None:
                problems[row.key] = row.problem
            for suffix, data in _members(row):
                member = tarfile.TarInfo(f"{row.key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return problems


def _members(row: Row) -> list[tuple[str, bytes]]:
    caption = [] if row.caption is None else [("txt", row.caption.encode())]
    meta = json.dumps(row.meta, default=str, sort_keys=True).encode()
    return [*([row.image] if row.image else []), *caption, ("json", meta)]


def explained(report: ShardReport, packed: Packed) -> ShardReport:
    """A report of the packed tar, with the source's own reasons for what is missing."""
    if not packed.problems:
        return report
    said = pl.DataFrame({"key": list(packed.problems), "said": list(packed.problems.values())})
    manifest = report.manifest.join(said, on="key", how="left", maintain_order="left")
    missing = pl.col("status").is_in(["missing_image", "missing_caption"])
    reason = pl.when(missing).then(pl.coalesce("said", "reason")).otherwise("reason")
    return replace(report, manifest=manifest.with_columns(reason=reason).drop("said"))


def unreadable(why: str) -> ShardReport:
    """The report of a file that could not be packed."""
    return ShardReport(pl.DataFrame(schema=MANIFEST_SCHEMA), pl.DataFrame(schema=PLACES_SCHEMA), "", why)
