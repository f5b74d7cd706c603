"""Writes a subset in FiftyOne's own format on disk, for people who review images there.

The format is that of `fiftyone.types.FiftyOneDataset`: ``metadata.json`` (the dataset and its fields),
``samples.json`` and ``data/``. It is plain JSON, so that FiftyOne, with its MongoDB, need not be installed
here; ``fiftyone.Dataset.from_dir(dataset_dir=..., dataset_type=fiftyone.types.FiftyOneDataset)`` reads it.
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.manifest import keys_by_shard
from clipcov_pipeline.pool.samples import Sample, image_digest, iter_samples
from clipcov_pipeline.pool.spread import evenly
from clipcov_pipeline.pool.tars import NotATarError
from clipcov_pipeline.proxy.prompts import name_of
from clipcov_pipeline.report.search import Searcher, subsets_of

# FiftyOne brings what is older up to date when it loads it, and refuses what is newer than itself.
FORMAT_VERSION = "1.0.0"

FIELD, LABEL = "fiftyone.core.fields", "fiftyone.core.labels.Classification"

FIELDS = {
    "uid": "StringField",
    "shard": "StringField",
    "key": "StringField",
    "caption": "StringField",
    "chosen": "BooleanField",
    "rank": "IntField",
    "gain": "FloatField",
    "margin": "FloatField",
}


@dataclass(frozen=True)
class Exported:
    """What was written, and how many images could not be, by the reason."""

    samples: int
    missing: Mapping[str, int]


def export_fiftyone(
    searcher: Searcher,
    subset: str,
    out: Path,
    *,
    rejected: int = 0,
    class_names: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Exported:
    """Write a subset, and so many of what it leaves out, evenly spread over the pool, as a FiftyOne dataset.

    Every sample has its uid, shard, key, caption, latent class (a Classification), rank, gain and margin, and
    the names of all subsets that it is chosen in as tags. A sample whose image is gone is left out, counted.

    Args:
        out: a folder that does not exist yet or is empty; nothing is left there when the export fails.

    Raises:
        InputError: an unknown subset, a folder that holds something.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: found something there, expected a new or empty folder")
    subsets = searcher.subsets()
    if subset not in subsets:
        known = ", ".join(sorted(subsets)) or "none is built"
        raise InputError(f"subset: found {subset!r}, expected one of: {known}")
    frame = _samples(searcher, subsets[subset], rejected)
    scratch = out.with_name(f".{out.name}-{uuid4().hex}")
    try:
        exported = _write(searcher, subset, frame, subsets, scratch, class_names, progress)
        if out.exists():
            out.rmdir()
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return exported


def _samples(searcher: Searcher, file: Path, rejected: int) -> pl.DataFrame:
    """Return what is exported: uid, shard, key, image_sha256, latent_class, margin, chosen, rank, gain."""
    labels = pl.read_parquet(searcher.project.store.checked(searcher.labels, "labels.parquet"))
    ranks = pl.read_parquet(file, columns=["uid", "rank", "gain"])
    labels = labels.with_columns(chosen=pl.col("uid").is_in(ranks["uid"].implode()))
    inside, outside = labels.filter(pl.col("chosen")), labels.filter(~pl.col("chosen"))
    found = pl.concat([inside, outside[evenly(outside.height, rejected)]])
    return found.join(ranks, on="uid", how="left", maintain_order="left")


def _write(
    searcher: Searcher,
    subset: str,
    frame: pl.DataFrame,
    subsets: Mapping[str, Path],
    folder: Path,
    class_names: Sequence[str] | None,
    progress: Callable[[int], object] | None,
) -> Exported:
    (folder / "data").mkdir(parents=True)
    rows = {(row["shard"], row["key"]): row for row in frame.iter_rows(named=True)}
    captions, chosen_in = _captions(searcher, rows), subsets_of(frame["uid"], subsets)
    missing: Counter[str] = Counter()
    now, written = int(time.time() * 1000), 0
    with (folder / "samples.json").open("w", encoding="utf-8") as file:
        file.write('{"samples": [')
        for place, sample in _images(searcher, frame, missing):
            row = rows[place]
            if image_digest(sample.image) != row["image_sha256"]:
                missing["the image was replaced since it was read"] += 1
                continue
            path = Path("data") / f"{row['uid']}.{sample.image_ext}"
            (folder / path).write_bytes(sample.image)
            tags = chosen_in.get(row["uid"], ())
            values = {**row, "caption": captions.get(place, sample.caption)}
            document = _document(values, path, tags, class_names, now)
            file.write((",\n" if written else "\n") + json.dumps(document))
            written += 1
            if progress is not None:
                progress(1)
        file.write("\n]}\n")
    (folder / "metadata.json").write_text(json.dumps(_metadata(subset, searcher, now), indent=1))
    return Exported(written, dict(missing))


def _images(
    searcher: Searcher, frame: pl.DataFrame, missing: Counter[str]
) -> Iterator[tuple[tuple[str, str], Sample]]:
    pool = searcher.project.config.shards
    options = dict(pool.storage_options)
    for name, keys in keys_by_shard(frame).items():
        shard: Shard | None = searcher.project.tars.get(name)
        left = set(keys)
        reason = f"no longer in shard {name}"
        if shard is None:
            reason = f"shard {name} is gone"
        else:
            try:
                for sample in iter_samples(shard, keys, options, pool.caption):
                    left.discard(sample.key)
                    yield (name, sample.key), sample
            except (OSError, NotATarError) as error:
                reason = f"shard {name} cannot be read ({type(error).__name__})"
        if left:
            missing[reason] += len(left)


def _captions(searcher: Searcher, places: Collection[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return captions by (shard, key), as they were embedded; the table is looked through once."""
    vectors, stats = searcher.project.vectors, searcher.labels.stats
    shards, columns = sorted({shard for shard, _ in places}), ("shard", "key", "caption")
    found: dict[tuple[str, str], str] = {}
    for batch in vectors.batches(stats["table"], stats["version"], shards, columns):
        for shard, key, caption in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
            if (shard, key) in places:
                found[shard, key] = caption
    return found


def _document(
    row: Mapping[str, Any],
    path: Path,
    tags: Sequence[str],
    class_names: Sequence[str] | None,
    now: int,
) -> dict[str, Any]:
    number = row["latent_class"]
    name = name_of(class_names, number)
    return {
        "_id": _object_id("sample", row["uid"]),
        "filepath": path.as_posix(),
        "tags": list(tags),
        "metadata": None,
        "_media_type": "image",
        "_rand": int(hashlib.sha256(row["uid"].encode()).hexdigest()[:8], 16) / 2**32,
        "created_at": {"$date": now},
        "last_modified_at": {"$date": now},
        "latent_class": {
            "_id": _object_id("label", row["uid"]),
            "_cls": "Classification",
            "tags": [],
            "label": f"class {number}" if name is None else name,
            "confidence": row["label_similarity"],
        },
        **{name: row[name] for name in FIELDS},
    }


def _metadata(subset: str, searcher: Searcher, now: int) -> dict[str, Any]:
    """Return the dataset's own document: what it is of, and the type of every field."""
    name = searcher.project.config.name
    return {
        "name": f"{name}-{subset}",
        "version": FORMAT_VERSION,
        "media_type": "image",
        "created_at": {"$date": now},
        "sample_fields": _sample_fields(now),
        "frame_fields": [],
        "info": {"experiment": name, "subset": subset, "labels": searcher.labels.fingerprint},
        "tags": [],
        "classes": {},
        "default_classes": [],
        "mask_targets": {},
        "default_mask_targets": {},
        "skeletons": {},
        "group_media_types": {},
        "saved_views": [],
        "workspaces": [],
        "annotation_runs": {},
        "brain_methods": {},
        "evaluations": {},
        "runs": {},
    }


def _sample_fields(now: int) -> list[dict[str, Any]]:
    """Return the fields that every dataset of FiftyOne has, and ours."""
    size = {"size_bytes": "IntField", "mime_type": "StringField"}
    size |= dict.fromkeys(("width", "height", "num_channels"), "IntField")
    label = {"label": "StringField", "confidence": "FloatField", "logits": "VectorField"}
    identity = _field("id", "ObjectIdField", now, db_field="_id")
    tags = _field("tags", "ListField", now, subfield="StringField")
    return [
        identity,
        _field("filepath", "StringField", now),
        tags,
        _document_field("metadata", "fiftyone.core.metadata.ImageMetadata", _fields(size, now), now),
        _field("_media_type", "StringField", now),
        _field("_rand", "FloatField", now),
        _field("_dataset_id", "ObjectIdField", now),
        _field("created_at", "DateTimeField", now, read_only=True),
        _field("last_modified_at", "DateTimeField", now, read_only=True),
        _document_field("latent_class", LABEL, [identity, tags, *_fields(label, now)], now),
        *_fields(FIELDS, now),
    ]


def _fields(kinds: Mapping[str, str], now: int) -> list[dict[str, Any]]:
    return [_field(name, kind, now) for name, kind in kinds.items()]


def _document_field(name: str, document: str, fields: list[dict[str, Any]], now: int) -> dict[str, Any]:
    field = _field(name, "EmbeddedDocumentField", now)
    return {**field, "embedded_doc_type": document, "fields": fields}


def _field(
    name: str,
    kind: str,
    now: int,
    *,
    db_field: str | None = None,
    subfield: str | None = None,
    read_only: bool = False,
) -> dict[str, Any]:
    return {
        "name": name,
        "ftype": f"{FIELD}.{kind}",
        "embedded_doc_type": None,
        "subfield": f"{FIELD}.{subfield}" if subfield else None,
        "fields": [],
        "db_field": db_field or name,
        "description": None,
        "info": None,
        "read_only": read_only,
        "created_at": {"$date": now},
    }


def _object_id(kind: str, uid: str) -> dict[str, str]:
    """Return a MongoDB id, the same for the same sample."""
    return {"$oid": hashlib.sha256(f"{kind}/{uid}".encode()).hexdigest()[:24]}
