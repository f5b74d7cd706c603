"""Read a pool from a LanceDB table, a batch at a time, into rows sorted by class."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.selection.columns import (
    FOR_FILTERS,
    OPTIONAL_COLUMNS,
    Blocks,
    called,
    caption_columns,
    check_classes,
    check_similarity,
)
from clipcov_pipeline.selection.methods import Captions
from clipcov_pipeline.selection.uids import uid_bytes

_BATCH_ROWS = 16384
# pools smaller than this lie in memory
_MEMORY_BYTES = 256 << 20
# columns that labels may have; the text of captions is read where it is asked for
_OWN_COLUMNS = [name for name in OPTIONAL_COLUMNS if name != "caption"]


class Labelled(NamedTuple):
    """A table being read: what ``Pool.from_blocks`` takes, and where its rows are to lie."""

    blocks: Blocks
    dim: int
    latent_class: np.ndarray
    label_similarity: np.ndarray
    columns: dict[str, Any]
    folder: str | None


@contextmanager
def read_table(
    table: Any,
    labels: Any,
    version: int | None,
    shards: Sequence[str] | None,
    *,
    n_classes: int | None,
    captions: Captions,
    progress: Callable[[int], None] | None,
) -> Iterator[Labelled]:
    """The labelled rows of a table as of a version; to be taken inside the block. See ``Pool.from_lance``."""
    import polars as pl

    with _at_version(table, version):
        names = {"uid", "image_embedding", "text_embedding"}
        own = called(["caption", *FOR_FILTERS] if captions else FOR_FILTERS, table.schema.names)
        if captions and "caption" not in own:
            names.add("caption")
        _require(set(table.schema.names), names, "table")
        where = _where(shards)
        frame = _labels(table, labels, where)
        columns, latent_class, similarity = _columns(frame, n_classes)
        # where labels say it: another shard may have a sample of the same uid, which they leave out
        says_shard = "shard" in table.schema.names and frame.schema.get("shard") == pl.String
        shard = frame["shard"] if says_shard else None
        del frame
        n = len(latent_class)
        if captions:
            columns |= _room_for_captions(n, captions)
        own = {name: there for name, there in own.items() if name == "caption" or name not in columns}
        columns |= {name: np.full(n, np.nan) for name in own if name != "caption"}
        d = table.schema.field("image_embedding").type.list_size
        blocks = _blocks(table, columns, shard, where, own, progress)
        yield Labelled(blocks, d, latent_class, similarity, columns, scratch_folder(4 * n * d))


def _room_for_captions(n: int, captions: Captions) -> dict[str, np.ndarray]:
    numbers = ("caption_length", "caption_words")
    room = {"caption_hash": np.zeros(n, np.uint64), **{name: np.zeros(n, np.int32) for name in numbers}}
    return room | ({"caption": np.empty(n, object)} if captions == "text" else {})


def scratch_folder(size: int) -> str | None:
    """The system's temporary folder for rows of ``size`` bytes, or None when they fit in memory easily."""
    return tempfile.gettempdir() if size > _MEMORY_BYTES else None


def _columns(frame: Any, n_classes: int | None) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Columns of the pool, latent classes and label similarities; the frame is not held on to."""
    columns: dict[str, Any] = {"uid": uid_bytes(frame["uid"].to_arrow(), "labels: uid")}
    if "source_id" in frame.columns:  # as text, else a missing one makes floats of numbers
        frame = frame.with_columns(source_id=frame["source_id"].cast(frame["uid"].dtype))
    columns |= {name: frame[name].to_numpy() for name in _OWN_COLUMNS if name in frame.columns}
    latent_class = check_classes(frame["latent_class"].to_numpy(), len(frame), n_classes)
    return columns, latent_class, check_similarity(frame["label_similarity"].to_numpy().copy(), len(frame))


def _labels(table: Any, labels: Any, where: str | None) -> Any:
    """Frame with uid, latent_class, label_similarity in pool order; the uids are distinct."""
    import polars as pl

    names = ["uid", "latent_class", "label_similarity"]
    if labels is None:
        _require(set(table.schema.names), set(names), "table (it has no labels of its own, so give labels)")
        wanted = names + [name for name in _OWN_COLUMNS if name in table.schema.names]
        frame = pl.from_arrow(_scan(table, wanted, where).read_all()).sort("uid")  # type: ignore[union-attr]
    else:
        frame = labels if isinstance(labels, pl.DataFrame) else pl.read_parquet(labels)
        _require(set(frame.columns), set(names), "labels")
    if len(frame) == 0:
        raise InputError("pool: found 0 labelled pairs, expected at least 1")
    if missing := [name for name in names if frame[name].null_count()]:
        raise InputError(
            f"labels: found missing values in {', '.join(missing)}, expected a value for every uid"
        )
    uid = uid_bytes(frame["uid"].to_arrow(), "labels: uid")
    keys = np.sort(_keys(uid, uid.dtype))
    # names with keys of their own are distinct; others have to be looked at
    if (keys[1:] == keys[:-1]).any() and frame["uid"].n_unique() < len(frame):
        twice = frame["uid"].filter(frame["uid"].is_duplicated())[0]
        raise InputError(f"labels: found uid {twice} more than once, expected distinct uids")
    return frame


def _blocks(
    table: Any,
    pool_columns: dict[str, Any],
    shard: Any,
    where: str | None,
    own: dict[str, str],
    progress: Any,
) -> Blocks:
    """The table's labelled rows, in whatever order the table gives them; fills in the pool's columns that
    the table has of its ``own``, by what they are called there."""
    import polars as pl

    uid = pool_columns["uid"]
    find = _Finder(uid)
    met = np.zeros(len(uid), np.bool_)
    columns = ["uid", "image_embedding", "text_embedding", *own.values()]
    columns += ["shard"] if shard is not None else []
    for batch in _scan(table, columns, where):
        found = uid_bytes(batch.column("uid"), "table: uid")
        rows, here = find(found)
        if shard is not None:
            here &= pl.Series(batch.column("shard")).eq_missing(shard.gather(rows)).to_numpy()
        rows = rows[here]
        ascending = bool((rows[1:] > rows[:-1]).all())
        if met[rows].any() or (not ascending and len(np.unique(rows)) < len(rows)):
            raise InputError(
                f"table: found a uid more than once ({_twice(found[here], rows, met)}), expected one row each"
            )
        met[rows] = True
        sides = [_matrix(batch, name, here) for name in columns[1:3]]
        for name, there in own.items():
            values = pl.Series(pl.from_arrow(batch.column(there)))
            _fill(pool_columns, name, rows, values.filter(pl.Series(here)))
        yield rows, sides[0], sides[1]
        if progress is not None:
            progress(len(rows))
    if not met.all():
        missing = np.flatnonzero(~met)
        some = ", ".join(name.decode() for name in uid[missing[:3]].tolist())
        of = "" if shard is None else " in the shard that the labels name"
        raise InputError(
            f"table: found no row for {len(missing)} of {len(uid)} labelled uids{of} "
            f"({some}{', ...' if len(missing) > 3 else ''}), expected one each; embed them, or label again"
        )


class _Finder:
    """Tells the pool rows of names that come in blocks."""

    def __init__(self, uid: np.ndarray) -> None:
        self._uid, self._next = uid, 0
        keys = _keys(uid, uid.dtype)
        self._by_key = np.argsort(keys, kind="stable")
        self._ordered = keys[self._by_key]
        self._shared = bool((self._ordered[1:] == self._ordered[:-1]).any())
        if self._shared:
            # next to impossible for uids, but then the names themselves have to do
            self._by_key = np.argsort(uid, kind="stable")
            self._ordered = uid[self._by_key]

    def __call__(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows (int64 [b]) and whether the name is that of the row (bool [b])."""
        uid, stop = self._uid, self._next + len(found)
        if stop <= len(uid) and np.array_equal(_words(uid[self._next : stop]), _words(found)):
            # labels in the order of the table: nothing to look up
            rows, here = np.arange(self._next, stop), np.ones(len(found), np.bool_)
        else:
            sought = found if self._shared else _keys(found, uid.dtype)
            # in order, so that one search finds in the cache what the one before has read
            by = np.argsort(sought)
            rows = np.empty(len(found), np.int64)
            places = np.searchsorted(self._ordered, sought[by])
            rows[by] = self._by_key[np.minimum(places, len(uid) - 1)]
            here = uid[rows] == found
        self._next = int(rows[-1]) + 1 if len(rows) else self._next
        return rows, here


def _words(names: np.ndarray) -> np.ndarray:
    """Bytes as 64-bit words where they can be: many times faster to compare."""
    return np.ascontiguousarray(names).view(np.uint64) if names.dtype.itemsize % 8 == 0 else names


def _keys(names: np.ndarray, kind: np.dtype) -> np.ndarray:
    """64-bit keys of bytes, uint64 [n]: many times faster to look up than the names, which are then compared.

    ``kind`` is the bytes type of the pool's uids: a longer name is cut to it, and cannot be one of them.
    """
    words = -(-kind.itemsize // 8)
    parts = np.ascontiguousarray(names.astype(f"S{8 * words}")).view(np.uint64).reshape(len(names), words)
    odd = np.random.default_rng(0).integers(0, 2**63, words, np.uint64) * np.uint64(2) + np.uint64(1)
    return parts @ odd


def _matrix(batch: Any, name: str, here: np.ndarray) -> np.ndarray:
    column = batch.column(name)
    if column.null_count:
        raise InputError(
            f"table: found {column.null_count} missing values in {name}, expected an embedding in every row"
        )
    matrix = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return matrix if here.all() else matrix[here]


def _fill(columns: dict[str, Any], name: str, rows: np.ndarray, values: Any) -> None:
    """Put values of a table's column at their rows; in place of captions, what is asked for of them."""
    if name != "caption":
        columns[name][rows] = values.to_numpy()
        return
    text = values.fill_null("")
    for made, numbers in caption_columns(text).items():
        columns[made][rows] = numbers
    if "caption" in columns:
        columns["caption"][rows] = text.to_numpy()


def _twice(found: np.ndarray, rows: np.ndarray, met: np.ndarray) -> str:
    values, counts = np.unique(found, return_counts=True)
    return (values[counts > 1] if (counts > 1).any() else found[met[rows]])[0].decode()


def _scan(table: Any, columns: list[str], where: str | None) -> Any:
    query = table.search().select(columns)
    if where is not None:
        query = query.where(where)
    return query.to_batches(_BATCH_ROWS)


def _where(shards: Sequence[str] | None) -> str | None:
    if shards is None:
        return None
    if not shards:
        raise InputError("shards: found none, expected at least one, or no list to read them all")
    quoted = ", ".join("'" + shard.replace("'", "''") + "'" for shard in shards)
    return f"shard IN ({quoted})"


def _require(have: set[str], need: set[str], what: str) -> None:
    if missing := sorted(need - have):
        raise InputError(f"{what}: missing column {', '.join(missing)}; found {', '.join(sorted(have))}")


@contextmanager
def _at_version(table: Any, version: int | None) -> Iterator[None]:
    """The table as it was at a version; the handle is put back where it was."""
    before = table.version
    if version is None or version == before:
        yield
        return
    latest = max(entry["version"] for entry in table.list_versions())
    table.checkout(version)
    try:
        yield
    finally:
        if before == latest:
            table.checkout_latest()
        else:
            table.checkout(before)
