"""Rows of a parquet file with image bytes: as Hugging Face's `datasets` and img2dataset write them."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.pixels import IMAGE_EXTENSIONS
from clipcov_pipeline.pool.rows import (
    CAPTION_NAMES,
    Names,
    Row,
    UnreadableRowsError,
    choose_caption,
    choose_column,
    image_extension,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

IMAGE_NAMES = ("image", "img", "image_bytes", *IMAGE_EXTENSIONS)
KEY_NAMES = ("key", "__key__")
BATCH = 32  # rows in memory at once


class Columns(NamedTuple):
    """Names of a file's columns; caption: None where none is needed; key: where rows go by their number."""

    image: str
    caption: str | None
    key: str | None


@dataclass(frozen=True)
class ParquetRows:
    """The rows of one parquet file."""

    uid_name: str
    url: str
    names: Names

    def rows(self, storage_options: dict | None) -> Iterator[Row]:
        """Yield the file's rows in their order; those of a damaged row group have that problem.

        Raises:
            UnreadableRowsError: no parquet file, or without such columns.
            OSError: it cannot be read.
        """
        with _local(self.url, storage_options) as path:
            try:
                file = _open(path)
                columns = columns_of(file.schema_arrow, self.names)
            except InputError as error:
                raise UnreadableRowsError(str(error)) from None
            with file:
                yield from _rows(file, columns)

    def count(self) -> int | None:
        """Return the rows that the file's footer names; None of a remote or unreadable file."""
        if "://" in self.url:
            return None
        try:
            with _open(self.url) as file:
                return file.metadata.num_rows
        except UnreadableRowsError:
            return None

    def size(self) -> int | None:
        """Return the file's bytes; None of a remote one."""
        return None if "://" in self.url else Path(self.url).stat().st_size


def check_columns(url: str, version: str, storage_options: dict | None, names: Names) -> bool:
    """Look whether a file has the columns that are needed; return False where it is no readable parquet file.

    Raises:
        InputError: it has not, or several of which the YAML names none.
    """
    schema = _schema(url, version, json.dumps(storage_options or {}, sort_keys=True))
    if schema is not None:
        try:
            columns_of(schema, names)
        except InputError as error:
            raise InputError(f"{error} ({url})") from None
    return schema is not None


@lru_cache(maxsize=1024)  # every plan looks at the same first file
def _schema(url: str, version: str, storage_options: str) -> "pa.Schema | None":  # noqa: ARG001 (a changed file has another version)
    from clipcov_pipeline.pool.listing import open_shard

    with open_shard(url, json.loads(storage_options), seekable=True) as file:
        try:
            return _open(file).schema_arrow
        except UnreadableRowsError:
            return None


def columns_of(schema: "pa.Schema", names: Names) -> Columns:
    """Return which columns hold images, captions and keys.

    An image column is one that Hugging Face's metadata calls an image, a struct with ``bytes``, or binary
    and named as one of `IMAGE_NAMES`; a caption column holds text and is named as one of `CAPTION_NAMES`.

    Args:
        schema: the file's.
        names: those that the YAML gives.

    Raises:
        InputError: as `rows.choose_column`.
    """
    import pyarrow.types as types

    text = [field.name for field in schema if _is_text(field.type)]
    declared = _declared_images(schema)
    images = declared or [
        field.name
        for field in schema
        if (types.is_struct(field.type) and any(part.name == "bytes" for part in field.type))
        or (_is_binary(field.type) and field.name.lower() in IMAGE_NAMES)
    ]
    captions = [name for name in text if name.lower() in CAPTION_NAMES]
    return Columns(
        choose_column("image", images, names.image, schema.names),
        choose_caption(captions, names, schema.names),
        next((name for name in KEY_NAMES if name in text), None),
    )


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _declared_images(schema: "pa.Schema") -> list[str]:
    """Columns that Hugging Face's own metadata says are images: sound has the same struct."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


def _rows(file: "pq.ParquetFile", columns: Columns) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    for group in range(file.num_row_groups):
        end = number + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=BATCH, row_groups=[group]):
                for values in _values(batch):
                    yield _row(values, columns, number)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the machine's, not the file's
            text = " ".join(str(error).split())
            for lost in range(number, end):
                problem = "unreadable_row", f"row {lost}: row group {group} is damaged: {text}"
                yield Row(f"{lost:08d}", f"row {lost}", problem=problem)
        number = end


def _values(batch: "pa.RecordBatch") -> list[dict[str, Any]]:
    """Each row's values by column; bytes that are no UTF-8 are kept, as lone surrogates."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # one value of one column is enough
        columns = {name: _column(batch.column(name)) for name in batch.schema.names}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _column(values: "pa.Array") -> list[Any]:
    """A column's values, where some may be none that Python has."""
    import pyarrow as pa
    import pyarrow.types as types

    try:
        return values.to_pylist()
    except (ValueError, OverflowError):
        if types.is_temporal(values.type):  # years after 9999
            return values.cast(pa.string()).to_pylist()
        if _is_text(values.type):
            binary = values.cast(pa.large_binary()).to_pylist()
            return [
                value.decode("utf-8", "surrogateescape") if value is not None else None for value in binary
            ]
        return [_value(value) for value in values]


def _value(value: "pa.Scalar") -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:
        return _Unreadable(error)


class _Unreadable(str):
    """Why a list or a struct has no value: text in it that is no UTF-8, a date after the year 9999."""


def _row(values: dict[str, Any], columns: Columns, number: int) -> Row:
    stored = values.pop(columns.image)
    caption = values.pop(columns.caption) if columns.caption else None
    key = values.get(columns.key) if columns.key else None
    if isinstance(values.get("uid"), bytes) and len(values["uid"]) == 16:
        values["uid"] = values["uid"].hex()
    image, path = (stored.get("bytes"), stored.get("path")) if isinstance(stored, dict) else (stored, None)
    row = Row(key or f"{number:08d}", f"row {number}", meta=values)
    if bad := next((name for name, value in values.items() if isinstance(value, _Unreadable)), None):
        return row._replace(problem=("unreadable_row", f"row {number}: {bad}: {values[bad]}"))
    if isinstance(caption, str):
        row = row._replace(caption=caption.encode("utf-8", "surrogateescape"))
    if not isinstance(image, bytes) or not image:
        return row._replace(
            problem=("missing_image", f"row {number}: {_why_none(image, path, columns, values)}")
        )
    if row.caption is None and columns.caption:
        found = "null" if caption is None else f"{type(caption).__name__}, expected text"
        row = row._replace(problem=("missing_caption", f"row {number}: {columns.caption} is {found}"))
    name = path or (f".{columns.image}" if columns.image.lower() in IMAGE_EXTENSIONS else "")
    return row._replace(image=image, image_ext=image_extension(image, name))


def _why_none(image: Any, path: str | None, columns: Columns, values: dict[str, Any]) -> str:
    """Say why a row has no image."""
    if path:
        return f"{columns.image} has no bytes, its image lies elsewhere: {path}"
    if values.get("status") not in (None, "success"):  # img2dataset's
        return " ".join(f"{values['status']}: {values.get('error_message') or 'no message'}".split())
    if image is None or image == b"":
        return f"{columns.image} is {'null' if image is None else 'empty'}"
    return f"{columns.image} holds {type(image).__name__}, expected bytes"


def _open(path: Any) -> "pq.ParquetFile":
    """Raises UnreadableRowsError where this is no parquet file, OSError where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        text = " ".join(str(error).split())
        raise UnreadableRowsError(f"not a whole parquet file: {text}") from None


@contextmanager
def _local(url: str, storage_options: dict | None) -> Iterator[str]:
    """The path of a file; a remote one is fetched whole, as all of it is read."""
    if "://" not in url:
        yield url
        return
    from clipcov_pipeline.pool.listing import open_shard

    with open_shard(url, storage_options) as source, tempfile.NamedTemporaryFile(suffix=".parquet") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        yield copy.name
