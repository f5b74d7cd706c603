"""The LanceDB side: one table of embeddings a proxy model, one atomic version a shard replacement.

A table is named by the digest of the proxy's weights, so that rows of two proxies can never mix. Rows of a
shard are replaced as a whole; what was read is pinned by version number and kept alive by a tag.
"""

import fcntl
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcov_pipeline.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from lancedb.table import Table

VECTORS = ("image_embedding", "text_embedding")

HELD_ROWS = 65_536  # of several shards, in memory at once


def table_name(proxy_digest: str) -> str:
    """Return the name of the table that holds the embeddings of this proxy."""
    return f"embeddings_{proxy_digest[:12]}"


def label_tag(fingerprint: str) -> str:
    """Return the tag that keeps the LanceDB version which an entry of pseudo_labels has read."""
    return f"pseudo_labels-{fingerprint[:16]}"


def table_schema(dim: int) -> "pa.Schema":
    """Return the table's columns; embeddings are fixed-size lists of ``dim`` float16 with unit norm."""
    import pyarrow as pa

    text = [pa.field(name, pa.string()) for name in ("uid", "shard", "key", "caption", "image_sha256")]
    return pa.schema([*text, *(pa.field(name, pa.list_(pa.float16(), dim)) for name in VECTORS)])


def make_rows(
    *,
    uids: Sequence[str],
    shard: str,
    keys: Sequence[str],
    captions: Sequence[str],
    image_sha256: Sequence[str],
    image_embedding: "np.ndarray",
    text_embedding: "np.ndarray",
) -> "pa.Table":
    """Return the rows of one shard; embeddings are float16 arrays of shape [n, d]."""
    import numpy as np
    import pyarrow as pa

    dim = image_embedding.shape[1]
    vectors = [
        pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values, np.float16).ravel()), dim)
        for values in (image_embedding, text_embedding)
    ]
    text = [
        pa.array(values, pa.string()) for values in (uids, [shard] * len(uids), keys, captions, image_sha256)
    ]
    return pa.Table.from_arrays([*text, *vectors], schema=table_schema(dim))


def digest_of_rows(rows: "pa.Table") -> str:
    """Return the sha256 of the rows' values in order of uid, whatever fragments they are stored in."""
    rows = rows.sort_by("uid").combine_chunks()
    digest = hashlib.sha256()
    for name in ("uid", "key", "caption", "image_sha256"):
        for value in rows.column(name).to_pylist():
            digest.update(f"{len(value)}:{value}".encode())
    for name in VECTORS:
        digest.update(vectors_of(rows, name).tobytes())
    return digest.hexdigest()


def vectors_of(rows: "pa.Table | pa.RecordBatch", name: str) -> "np.ndarray":
    """Return a vector column as a float16 array of shape [n, d] (no copy where the rows are one chunk)."""
    import pyarrow as pa

    column: Any = rows.column(name)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    dim = column.type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


class Vectors:
    """The tables below one LanceDB folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[int, frozenset[str]]] = {}
        """Which shards have rows in a table, and in which version of it that is so."""

    def open(self, name: str, version: int | None = None) -> "Table":
        """Open a table, at a version where one is given.

        Raises:
            InputError: no such table or version.
        """
        import lancedb

        try:
            table = lancedb.connect(self.folder).open_table(name)
            if version is not None:
                table.checkout(version)
        except (ValueError, FileNotFoundError) as error:
            wanted = f"version {version} of table {name}" if version is not None else f"table {name}"
            reason = str(error).split("\n", 1)[0].rstrip(".")
            raise InputError(
                f"LanceDB {self.folder}: no {wanted} ({reason}), expected one: materialize embeddings again"
            ) from error
        return table

    def exists(self, name: str) -> bool:
        """Return whether there is a table of this name."""
        return (self.folder / f"{name}.lance").is_dir()

    def replace_shard(self, name: str, shard: str, rows: "pa.Table") -> int:
        """Let ``rows`` be all rows of a shard, in one atomic version; return that version's number.

        Raises:
            ValueError: an embedding that is not finite: LanceDB refuses these in ``add`` but takes them in
                ``merge_insert``, and a filter on them keeps them.
        """
        _check_finite(shard, rows)
        table = self._open_or_create(name, rows.schema)
        before, shards = table.version, self._shards_of(name, table)
        if shard in shards:
            where = f"shard = {_quoted(shard)}"
            merge = (
                table.merge_insert(["shard", "uid"]).when_matched_update_all().when_not_matched_insert_all()
            )
            after = merge.when_not_matched_by_source_delete(where).execute(rows).version
        elif rows.num_rows:
            after = table.add(rows).version
        else:
            return before
        if after == before + 1:  # nobody wrote in between
            self._known[name] = after, shards | {shard} if rows.num_rows else shards - {shard}
        return after

    def _shards_of(self, name: str, table: "Table") -> frozenset[str]:
        """Return which shards have rows; a table that somebody else has written to is looked through."""
        version, shards = self._known.get(name, (0, frozenset()))
        return shards if version == table.version else frozenset(_shards_in(table))

    def _open_or_create(self, name: str, schema: "pa.Schema") -> "Table":
        import lancedb

        self.folder.mkdir(parents=True, exist_ok=True)
        # one at a time: LanceDB's create overwrites a table that another process made in the same moment
        with (self.folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return lancedb.connect(self.folder).create_table(name, schema=schema, exist_ok=True)

    def remove_shards(self, name: str, shards: Collection[str]) -> None:
        """Delete the rows of these shards; no shards make no new version."""
        if shards:
            self.open(name).delete(_one_of(shards))

    def shards(self, name: str) -> set[str]:
        """Return the names of the shards that have rows in a table."""
        return _shards_in(self.open(name))

    def shard_rows(self, name: str, shard: str, version: int) -> "pa.Table":
        """Return all rows of a shard as they were in a version."""
        return self.open(name, version).search().where(f"shard = {_quoted(shard)}").to_arrow()

    def digests(self, name: str, version: int, sizes: Mapping[str, int]) -> dict[str, tuple[int, str]]:
        """Return, for each of these shards, how many rows it has in a version, and their digest.

        Shards are read many at a time: a question for each would look through all of the table every time.

        Args:
            sizes: the shards, and about how many rows each has: `HELD_ROWS` are held at once.
        """
        import pyarrow.compute as pc

        table = self.open(name, version)
        found: dict[str, tuple[int, str]] = {}
        for group in _groups(sizes):
            rows = table.search().where(_one_of(group)).to_arrow()
            for shard in group:
                own = rows.filter(pc.field("shard") == shard)
                found[shard] = own.num_rows, digest_of_rows(own)
        return found

    def samples(self, name: str, version: int, uids: Sequence[str], columns: Sequence[str]) -> "pa.Table":
        """Return these columns of the rows with these uids, as they were in a version, in any order."""
        where = f"uid IN ({', '.join(_quoted(uid) for uid in uids)})" if uids else "false"
        return self.open(name, version).search().where(where).select(list(columns)).to_arrow()

    def batches(
        self, name: str, version: int, shards: Sequence[str], columns: Sequence[str], size: int = 8192
    ) -> "Iterator[pa.RecordBatch]":
        """Stream the rows of these shards as they were in a version."""
        query = self.open(name, version).search().where(_one_of(shards)).select(list(columns))
        yield from query.to_batches(size)

    def pin(self, name: str, version: int, tag: str) -> None:
        """Keep a version alive under a tag; clean-up cannot take it until the tag is removed."""
        tags = self.open(name).tags
        if tag in tags.list():
            tags.update(tag, version)
        else:
            tags.create(tag, version)


def _check_finite(shard: str, rows: "pa.Table") -> None:
    import numpy as np

    for name in VECTORS:
        bad = ~np.isfinite(vectors_of(rows, name)).all(axis=1)
        if bad.any():
            uid = rows.column("uid")[int(bad.argmax())].as_py()
            raise ValueError(
                f"{name} of shard {shard}: found {int(bad.sum())} rows that are not finite, first uid {uid},"
                " expected none: the proxy gives no embedding of them, leave them out"
            )


def _shards_in(table: "Table") -> set[str]:
    found: set[str] = set()
    for batch in table.search().select(["shard"]).to_batches(65_536):
        found.update(batch.column("shard").unique().to_pylist())
    return found


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield shards in groups of `HELD_ROWS` rows, or of one shard that has more."""
    group, held = [], 0
    for shard, size in sizes.items():
        if group and held + size > HELD_ROWS:
            yield group
            group, held = [], 0
        group.append(shard)
        held += size
    if group:
        yield group


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _one_of(names: Iterable[str]) -> str:
    return f"shard IN ({', '.join(_quoted(name) for name in names)})"
