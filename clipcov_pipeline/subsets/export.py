"""Hands a subset on: as WebDataset tars, DataComp's `.npy`, parquet, csv, or as Hugging Face reads images."""

import json
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.places import CHOICES_SCHEMA
from clipcov_pipeline.pool.samples import Sample, iter_samples
from clipcov_pipeline.subsets.files import (
    PAIR,
    Members,
    check_known,
    check_none_missing,
    write_datacomp_npy,
    write_subset_tars,
)
from clipcov_pipeline.subsets.index import times_listed

Format = Literal["tars", "npy", "parquet", "csv", "hf"]
FORMATS: tuple[str, ...] = get_args(Format)
Read = Callable[[Shard, Container[str]], Iterator[Sample]]  # the samples of a shard with these keys
ROW_GROUP = 100  # samples: what a reader of pictures has in memory at once
FEATURES: dict[str, dict[str, str]] = {
    "image": {"_type": "Image"},
    "caption": {"dtype": "string", "_type": "Value"},
    "uid": {"dtype": "string", "_type": "Value"},
    "rank": {"dtype": "int64", "_type": "Value"},
    "gain": {"dtype": "float64", "_type": "Value"},
    "latent_class": {"dtype": "int32", "_type": "Value"},
    "weight": {"dtype": "float64", "_type": "Value"},
    "source_id": {"dtype": "string", "_type": "Value"},
}


def export_subset(
    index: pl.DataFrame,
    shards: Sequence[Shard],
    out: Path,
    form: Format,
    *,
    samples_per_shard: int = 1000,
    storage_options: dict[str, Any] | None = None,
    members: Members = PAIR,
    progress: Callable[[int], Any] | None = None,
) -> list[Path]:
    """Write a subset to an empty or new folder; return the files.

    Args:
        index: uid, rank, gain, latent_class, shard and key of the chosen samples; other columns are kept.
        shards: the pool's; read for ``tars`` and ``hf`` only.
        form: ``tars`` (image, caption and json of each sample as they are, the uid written into the json),
            ``npy`` (DataComp's), ``parquet`` and ``csv`` (the index), ``hf`` (parquet with ``image`` as
            Hugging Face ``datasets`` reads it).
        members: what leaves in tars; ``hf`` has the caption by its rule.

    Raises:
        InputError: the folder is not empty, or a shard no longer holds a sample.
    """
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out: found files in {out}, expected an empty or a new folder")
    out.mkdir(parents=True, exist_ok=True)
    if form == "tars":
        return write_subset_tars(
            shards,
            uids_by_key(index),
            out,
            samples_per_shard=samples_per_shard,
            storage_options=storage_options,
            members=members,
            progress=progress,
        )
    if form == "hf":
        read = partial(iter_samples, storage_options=storage_options, captions=members.captions)
        return _write_hf(index, shards, out, read, progress)
    path = out / f"subset.{form}"
    if form == "npy":
        times = times_listed(index) if "weight" in index.columns else None
        write_datacomp_npy(path, index["uid"].to_list(), times)
    elif form == "parquet":
        index.write_parquet(path, compression="zstd")
    else:
        index.drop(CHOICES_SCHEMA, strict=False).write_csv(path)  # a list has no place in a csv
    return [path]


def uids_by_key(index: pl.DataFrame) -> dict[str, dict[str, str]]:
    """Return key -> uid of the chosen samples of each shard."""
    parts = index.group_by("shard", maintain_order=True)
    return {str(name): dict(rows.select("key", "uid").iter_rows()) for (name,), rows in parts}


def _write_hf(
    index: pl.DataFrame,
    shards: Sequence[Shard],
    out: Path,
    read: Read,
    progress: Callable[[int], Any] | None,
) -> list[Path]:
    """One parquet file a shard, `train-00000-of-00003.parquet`, as the hub names them."""
    import pyarrow.parquet as pq

    schema, used = _hf_schema(index.columns), set(index["shard"])
    check_known(shards, used)
    wanted = [shard for shard in shards if shard.name in used]
    paths = [out / f"train-{i:05d}-of-{len(wanted):05d}.parquet" for i in range(len(wanted))]
    for path, shard in zip(paths, wanted, strict=True):
        rows = index.filter(pl.col("shard") == shard.name)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in _batches(rows, shard, schema, read):
                writer.write_batch(batch)
                if progress is not None:
                    progress(batch.num_rows)
    return paths


def _hf_schema(columns: Sequence[str]) -> Any:
    """What there is of `FEATURES`, with the note by which `datasets` knows its types."""
    import pyarrow as pa

    image = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    types = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "int32": pa.int32()}
    features = {k: of for k, of in FEATURES.items() if k in columns or k in ("image", "caption")}
    fields = [(name, types[of["dtype"]] if "dtype" in of else image) for name, of in features.items()]
    info = json.dumps({"info": {"features": features}})
    return pa.schema(fields, metadata={"huggingface": info})


def _batches(rows: pl.DataFrame, shard: Shard, schema: Any, read: Read) -> Iterator[Any]:
    """Record batches of a shard's chosen samples, in the tar's order."""
    import pyarrow as pa

    by_key = {row["key"]: row for row in rows.iter_rows(named=True)}
    batch: list[dict[str, Any]] = []
    left = set(by_key)
    for sample in read(shard, frozenset(by_key)):
        row = by_key[sample.key]
        left.discard(sample.key)
        image = {"bytes": sample.image, "path": f"{sample.key}.{sample.image_ext}"}
        rest = {name: row[name] for name in FEATURES if name in row}
        batch.append({"image": image, "caption": sample.caption, **rest})
        if len(batch) == ROW_GROUP:
            yield pa.RecordBatch.from_pylist(batch, schema=schema)
            batch = []
    check_none_missing(shard, left)
    if batch:
        yield pa.RecordBatch.from_pylist(batch, schema=schema)
