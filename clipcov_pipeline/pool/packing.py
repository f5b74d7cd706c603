"""Packs rows of a table into a plain tar, so that all that follows reads every pool alike, by offset."""

import io
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from clipcov_pipeline.pool.captions import NO_TXT
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.manifest import ShardReport, read_shard
from clipcov_pipeline.pool.rows import Row, RowSource, UnreadableRowsError, json_bytes
from clipcov_pipeline.pool.samples import SampleStatus
from clipcov_pipeline.redaction import redacted

PACKED = "packed.tar"  # beside the manifest

Problem = tuple[str, str] | None


def read_packed(
    shard: Shard, target: Path, storage_options: dict | None = None, **checks: Any
) -> ShardReport:
    """Pack a shard's rows into the tar ``target``, and check that as `read_shard` does.

    The manifest has a row for each row of the table, in its order; the reasons of those that are of no use
    name their place in the table. sha256 is the tar's, which is the same wherever the same rows come from.

    Args:
        shard: one with ``rows``.
        target: the tar to write: key, image as stored, caption, and the other columns as json.
        storage_options: fsspec's.
        checks: the other arguments of `read_shard`.

    Raises:
        OSError: the rows, or their images, cannot be read.
    """
    assert shard.rows is not None
    problems, quarantined = _pack(shard.rows, target, storage_options)
    report = read_shard(Shard(shard.rows.uid_name, str(target), shard.version), **checks)
    manifest = report.manifest.with_columns(shard=pl.lit(shard.name))
    return replace(report, manifest=_with_problems(manifest, problems), quarantined=quarantined)


def _pack(source: RowSource, target: Path, storage_options: dict | None) -> tuple[list[Problem], str | None]:
    """Write the tar; return each row's problem, and why the rest could not be read."""
    problems: list[Problem] = []
    taken: dict[str, str] = {}
    with tarfile.open(target, "w") as tar:
        try:
            for row in source.rows(storage_options):
                key = _tar_key(row.key, len(problems))
                if taken.get(key, row.key) != row.key:
                    key = f"{key}-{len(problems)}"
                elif key in taken and row.problem is None:
                    row = row._replace(image=None, problem=_repeated(row))
                taken.setdefault(key, row.key)
                _add(tar, key, row)
                problems.append(row.problem)
        except UnreadableRowsError as error:
            return problems, redacted(str(error))
    return problems, None


def _repeated(row: Row) -> tuple[str, str]:
    return SampleStatus.duplicate_key, f"{row.where}: an earlier row is also named {row.key!r}"


def _tar_key(key: str, number: int) -> str:
    """A key as WebDataset reads it back: no dot in the last part, no step upwards, no name of its own use."""
    parts = [
        part
        for part in re.sub(r"[\x00-\x1f\ud800-\udfff]", "_", key).split("/")
        if part not in ("", ".", "..")
    ]
    if not parts or any(re.fullmatch("__.*__", part) for part in parts):
        return f"{number:08d}"
    return "/".join([*parts[:-1], parts[-1].replace(".", "_")])


def _add(tar: tarfile.TarFile, key: str, row: Row) -> None:
    # the json first, as every row has one: where it comes again a new sample begins, also under one key
    members = [("json", json_bytes(row.meta or {})), (row.image_ext, row.image), ("txt", row.caption)]
    for suffix, data in members:
        if data is not None:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _with_problems(manifest: pl.DataFrame, problems: list[Problem]) -> pl.DataFrame:
    """Put what the table is to blame for in place of what the tar looks like.

    A row without a caption in its column is none the worse where `shards.caption` finds one elsewhere.
    """
    given = pl.DataFrame(
        [problem or (None, None) for problem in problems],
        schema={"given": pl.String, "why": pl.String},
        orient="row",
    )
    found = manifest.hstack(given)
    no_caption = pl.col("given") == SampleStatus.missing_caption
    elsewhere = no_caption & (pl.col("status") != SampleStatus.missing_caption)
    sources = no_caption & ~pl.col("reason").str.starts_with(f"{NO_TXT} (")  # has more to say than that
    reason = (
        pl.when(pl.col("given").is_null() | elsewhere)
        .then("reason")
        .when(sources)
        .then(pl.format("{}; {}", "why", "reason"))
        .otherwise("why")
    )
    status = pl.when(elsewhere).then("status").otherwise(pl.coalesce("given", "status"))
    return found.with_columns(status=status, reason=reason).drop("given", "why")
