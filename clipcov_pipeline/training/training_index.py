"""The table that a training reads: where each of its samples lies, and how often it is drawn.

One parquet file, a row a sample, so that no image is copied to train on a subset. `write_training_index`
makes it, `read_training_index` reads it into numpy columns of fixed width: some 50 bytes a sample, which
data-loading processes share with the process that forked them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.files import written_at_once
from clipcov_pipeline.pool.captions import TXT, CaptionRule
from clipcov_pipeline.pool.places import MEMBERS
from clipcov_pipeline.redaction import redacted
from clipcov_pipeline.subsets.index import check_weights
from clipcov_pipeline.training.caption_draws import Captions

# parquet column -> numpy dtype in memory; strings are kept as codes of a short list
PLACES = {
    f"{member}_{what}": dtype
    for member in MEMBERS
    if member != "json"
    for what, dtype in (("offset", np.int64), ("size", np.int32))
}
# read where captions are in the `.txt` and in the `.json`; 0 of a sample without a `.json`
JSON_PLACES = {"json_offset": np.int64, "json_size": np.int32}
CHOICES = "caption_hashes"  # a list for each sample, read where a training draws one of its captions
HASHES = {"caption_hash": np.int64, "image_hash": np.int64}
CODED = ("shard", "image_ext")
REQUIRED = ("uid", "shard", "shard_version", "image_ext", *PLACES)


@dataclass(frozen=True)
class TrainingIndex:
    """The samples of a training, ``n`` of them, and the ``s`` shards that they lie in.

    Attributes:
        path: the parquet file, from which `uids` reads what no data-loading process needs.
        shards, versions: ``s`` paths or URLs, and the token of each when its places were recorded.
        shard: int32 [n], which of `shards`.
        extensions: suffixes of images without the dot; image_ext: int8 [n], which of them.
        image_offset, caption_offset: int64 [n], bytes from the shard's start to the member's content; the
            caption's may be the json.
        image_size, caption_size: int32 [n], bytes.
        caption_hash, image_hash: int64 [n], `places.short_hash` of the captions and of the image file; None
            where the file has no such column.
        weight: float64 [n], how often a sample is drawn relative to others; None: all alike.
        latent_class: int32 [n], for fresh draws; None where the file has none.
        json_offset, json_size: as those of the caption, 0 where there is no json; None where captions are in
            one kind of member.
        captions: those that a training draws from; None where it does not draw.
        rule: how a caption is read from the members.
    """

    path: str
    shards: tuple[str, ...]
    versions: tuple[str, ...]
    shard: npt.NDArray[np.int32]
    extensions: tuple[str, ...]
    image_ext: npt.NDArray[np.int8]
    image_offset: npt.NDArray[np.int64]
    image_size: npt.NDArray[np.int32]
    caption_offset: npt.NDArray[np.int64]
    caption_size: npt.NDArray[np.int32]
    caption_hash: npt.NDArray[np.int64] | None = None
    image_hash: npt.NDArray[np.int64] | None = None
    weight: npt.NDArray[np.float64] | None = None
    latent_class: npt.NDArray[np.int32] | None = None
    json_offset: npt.NDArray[np.int64] | None = None
    json_size: npt.NDArray[np.int32] | None = None
    captions: Captions | None = None
    rule: CaptionRule = TXT

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def content_hashes(self) -> list[npt.NDArray[np.int64]]:
        """The hashes that there are: rows equal in one of them may not share a batch."""
        return [column for column in (self.caption_hash, self.image_hash) if column is not None]

    @cached_property  # asked for each sample that is read
    def members(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
        """(offset, size) of each kind of member that is read: image, caption and, where need be, json."""
        found = [(self.image_offset, self.image_size), (self.caption_offset, self.caption_size)]
        if self.json_offset is not None and self.json_size is not None:
            found.append((self.json_offset, self.json_size))
        return found

    def uids(self) -> np.ndarray:
        """uid of each row, object [n]."""
        import pyarrow.parquet as pq

        return pq.read_table(self.path, columns=["uid"])["uid"].to_numpy()


def write_training_index(path: str | Path, columns: Mapping[str, Any]) -> None:
    """Write an index; rows in the order given, which a training's order does not depend on but for its seed.

    columns: name -> ``n`` values. `REQUIRED`, and where known ``caption_hash``, ``image_hash`` (int64,
    `places.short_hash`), ``weight`` (float) and ``latent_class`` (integer); ``shard`` is a path or URL,
    ``shard_version`` its `Shard.version`. Others are written as they are.

    Raises:
        InputError: as `read_training_index`; a uid comes twice (write its number as ``weight``).
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    _check_columns(path, list(columns))
    table = pa.table(dict(columns))
    distinct = pc.count_distinct(table["uid"]).as_py()  # pyright: ignore[reportAttributeAccessIssue]
    if distinct != table.num_rows:
        raise InputError(
            f"training index {path}: {table.num_rows} rows have {distinct} distinct uids; give each uid one"
            " row, and as its weight how often it is drawn"
        )
    if "weight" in columns:
        check_weights(np.asarray(table["weight"].to_numpy(), np.float64), f"training index {path}")
    coded: Any = ["shard", "shard_version", "image_ext"]  # declared a bool
    with written_at_once(Path(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=coded)


def read_training_index(path: str | Path, rule: CaptionRule = TXT) -> TrainingIndex:
    """Read an index, and what the rule for captions needs of it; no string of a sample is kept.

    Raises:
        InputError: no such file, no parquet, a column is missing, no rows, a negative place, weights that
            are negative, not finite or all zero, or one shard with two versions.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # not mapped: pages of a mapped file count for each process
        file = pq.ParquetFile(path, read_dictionary=["shard", "shard_version", "image_ext"])
    except (OSError, pa.ArrowInvalid) as error:
        text = redacted(" ".join(str(error).split()))
        raise InputError(f"training index {path}: cannot be read ({text}); write it again") from None
    with file:
        names = file.schema_arrow.names
        _check_columns(path, names, rule)
        if not file.metadata.num_rows:
            raise InputError(f"training index {path}: it has no rows; choose a larger subset")
        columns = _numeric_columns(file, names)
        if len(rule.members) > 1:
            columns |= {name: _numbers(file, name, np.dtype(kind), 0) for name, kind in JSON_PLACES.items()}
        captions = _captions(file) if rule.draws else None
        shards, shard = _coded(file, "shard", np.int32)
        versions = _version_of_each(path, file, shard, len(shards))
        extensions, image_ext = _coded(file, "image_ext", np.int8)
    pa.default_memory_pool().release_unused()
    _check_places(path, columns)
    if columns.get("weight") is not None:
        check_weights(columns["weight"], f"training index {path}")
    return TrainingIndex(
        str(path), shards, versions, shard, extensions, image_ext, **columns, captions=captions, rule=rule
    )


def digest_of_index(path: str | Path, *, classes: bool = False) -> str:
    """Return a sha256 (hex) of what an index trains on: uids, weights and, where asked, classes in order."""
    import pyarrow.parquet as pq

    digest = hashlib.sha256()
    with pq.ParquetFile(path) as file:
        wanted = ("uid", "weight", *(["latent_class"] if classes else []))
        names = [name for name in wanted if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=names):
            digest.update("\n".join(batch["uid"].to_pylist()).encode())
            for name in names[1:]:
                digest.update(np.asarray(batch[name].to_numpy(), np.float64).tobytes())
    return digest.hexdigest()


def _check_columns(path: str | Path, names: Sequence[str], rule: CaptionRule = TXT) -> None:
    more = (*(JSON_PLACES if len(rule.members) > 1 else ()), *((CHOICES, *HASHES) if rule.draws else ()))
    if missing := [name for name in (*REQUIRED, *more) if name not in names]:
        raise InputError(
            f"training index {path}: no column {', '.join(missing)} (found {', '.join(names)}); run the"
            " pipeline again, so that the places of samples are recorded"
        )


def _check_places(path: str | Path, columns: Mapping[str, npt.NDArray[Any]]) -> None:
    for name in PLACES:
        # a member's content begins after its header of 512 bytes
        least = 512 if name.endswith("_offset") else 0
        if (lowest := int(columns[name].min())) < least:
            row = int(columns[name].argmin())
            raise InputError(
                f"training index {path}: {name} of row {row} is {lowest}, expected at least {least}; write"
                " the index again"
            )


def _numeric_columns(file: Any, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """The columns of numbers that the file has, one after the other: little more than the result is held."""
    wanted = {**PLACES, **HASHES, "weight": np.float64, "latent_class": np.int32}
    return {name: _numbers(file, name, np.dtype(dtype)) for name, dtype in wanted.items() if name in names}


def _captions(file: Any) -> Captions:
    """The hashes of all captions to draw from, and how many each row has."""
    lists = [file.read_row_group(group, columns=[CHOICES])[CHOICES] for group in range(file.num_row_groups)]
    chunks = [chunk for column in lists for chunk in column.chunks]
    counts = [np.asarray(chunk.value_lengths().fill_null(0)) for chunk in chunks]
    first = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    if not np.diff(first).all():
        raise InputError(f"training index: a sample has no {CHOICES}; write the index again")
    return Captions(first, np.concatenate([np.asarray(chunk.flatten()) for chunk in chunks]))


def _numbers(file: Any, name: str, dtype: np.dtype[Any], missing: int | None = None) -> npt.NDArray[Any]:
    """One column as ``dtype`` [n]; missing: what stands for a value that is not there.

    Raises:
        InputError: a value is missing, or does not fit.
    """
    values = np.empty(file.metadata.num_rows, dtype)
    start = 0
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=[name])[name]
        if missing is not None:
            column = column.fill_null(missing)
        if column.null_count:
            raise InputError(
                f"training index: {column.null_count} values of {name} are missing; write the index again"
            )
        values[start : start + len(column)] = column.to_numpy()
        start += len(column)
    return values


def _coded(file: Any, name: str, dtype: type) -> tuple[tuple[str, ...], npt.NDArray[Any]]:
    """(distinct values in order of appearance, code of each row) of a column of strings."""
    codes = np.empty(file.metadata.num_rows, dtype)
    known: dict[str, int] = {}
    start = 0
    for group in range(file.num_row_groups):
        for chunk in file.read_row_group(group, columns=[name])[name].chunks:
            translate = [known.setdefault(value, len(known)) for value in chunk.dictionary.to_pylist()]
            own = np.asarray(translate, dtype)
            codes[start : start + len(chunk)] = own[chunk.indices.to_numpy()]
            start += len(chunk)
    return tuple(known), codes


def _version_of_each(
    path: str | Path, file: Any, shard: npt.NDArray[np.int32], n_shards: int
) -> tuple[str, ...]:
    """The version of each shard, which all of its rows must agree on."""
    versions, code = _coded(file, "shard_version", np.int32)
    of_shard = np.zeros(n_shards, np.int32)
    of_shard[shard] = code
    if (differs := of_shard[shard] != code).any():
        row = int(differs.argmax())
        raise InputError(
            f"training index {path}: row {row} has version {versions[code[row]]} of its shard, another row"
            f" {versions[of_shard[shard[row]]]}; run the pipeline again"
        )
    return tuple(versions[code] for code in of_shard)
