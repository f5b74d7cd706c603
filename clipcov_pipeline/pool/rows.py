"""Pairs of a shard that is no tar: rows of a parquet file, lines of a table beside a folder of images."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.image_folder import FILE_NAME, Table, is_inside, parse_table
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.opening import open_beside, open_shard
from clipcov_pipeline.pool.pixels import IMAGE_EXTENSIONS

CAPTIONS = ("caption", "text", "txt")  # in this order, where no column is named
KEYS = ("key", "__key__")
_IMAGES = ("image", "img", *IMAGE_EXTENSIONS)
_BATCH_ROWS = 64  # images of a parquet file in memory

_BEGINNINGS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


class Columns(NamedTuple):
    """Columns of image and caption, None to find them: `shards.image_column`, `shards.caption_column`."""

    image: str | None = None
    caption: str | None = None


class Row(NamedTuple):
    """One pair as its source has it.

    Attributes:
        key: unique in the shard, without a dot.
        image: (extension, bytes as stored), None where there are none.
        caption: None where there is none.
        meta: what else the row says, JSON-able.
        problem: why image or caption are missing.
    """

    key: str
    image: tuple[str, bytes] | None
    caption: str | None
    meta: Mapping[str, Any]
    problem: str | None = None


class UnreadableShardError(ValueError):
    """The file as a whole cannot be read; the message says why."""


def rows_of(shard: Shard, columns: Columns, storage_options: dict | None) -> Iterator[Row]:
    """Yield the pairs of a parquet file or of some lines of a folder's table, in their order.

    Raises:
        InputError: no column of images or captions, or several that could be.
        UnreadableShardError: the file is damaged.
        OSError: it cannot be read.
    """
    found = (
        _lines(shard, columns, storage_options) if shard.lines else _parquet(shard, columns, storage_options)
    )
    used: dict[str, int] = {}
    for row in found:
        # a picture with several captions has a row for each
        used[row.key] = number = used.get(row.key, 0) + 1
        yield row if number == 1 else row._replace(key=f"{row.key}-{number}")


def _parquet(shard: Shard, columns: Columns, storage_options: dict | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_shard(shard.url, storage_options, seekable=True) as file:
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UnreadableShardError(f"not a parquet file: {_one_line(error)}") from None
        schema = table.schema_arrow
        image = columns.image or _image_column(shard.url, schema)
        caption = _caption_column(shard.url, schema.names, columns.caption)
        if image not in schema.names:
            raise InputError(_no_column(shard.url, "image", image, schema.names))
        number = 0
        try:
            for batch in table.iter_batches(_BATCH_ROWS):
                for values in batch.to_pylist():
                    yield _row_of_values(values, image, caption, number)
                    number += 1
        except (pa.ArrowInvalid, OSError) as error:
            raise UnreadableShardError(f"damaged after row {number}: {_one_line(error)}") from None


def _image_column(url: str, schema: Any) -> str:
    """The one column of images: Hugging Face's struct of bytes and path, or bytes under a known name."""
    import pyarrow.types as types

    def is_image(field: Any) -> bool:
        if types.is_struct(field.type):
            return "bytes" in {inner.name for inner in field.type}
        return field.name.lower() in _IMAGES and (
            types.is_binary(field.type) or types.is_large_binary(field.type)
        )

    names = [field.name for field in schema if is_image(field)]
    if len(names) == 1:
        return names[0]
    found = f"{len(names)} columns of images, {', '.join(names)}" if names else "no column of images"
    raise InputError(
        f"{url}: found {found} (columns: {', '.join(schema.names)}), expected one with image bytes; name it"
        " in shards.image_column"
    )


def _caption_column(url: str, names: Sequence[str], given: str | None) -> str:
    if given is not None:
        if given not in names:
            raise InputError(_no_column(url, "caption", given, names))
        return given
    for name in CAPTIONS:
        if name in names:
            return name
    raise InputError(
        f"{url}: found no column {', '.join(CAPTIONS)} (columns: {', '.join(names)}), expected captions; name"
        " their column in shards.caption_column"
    )


def _no_column(url: str, what: str, name: str, names: Sequence[str]) -> str:
    return f"shards.{what}_column: found {name}, expected a column of {url}: {', '.join(names)}"


def _row_of_values(values: dict[str, Any], image: str, caption: str, number: int) -> Row:
    held, text = values.pop(image), values.pop(caption)
    data, path = (held.get("bytes"), held.get("path")) if isinstance(held, dict) else (held, None)
    named = next((values[name] for name in KEYS if isinstance(values.get(name), str)), None)
    key = _clean(named) if named else f"{number:09d}"
    meta = {name: value for name, value in values.items() if not isinstance(value, bytes | dict)}
    if not isinstance(text, str):
        meta[caption] = text  # a list of captions, say
    if not data:
        return Row(key, None, _text(text), meta, _no_image(path, values))
    return Row(
        key, (_extension(path or "", data), data), _text(text), meta, _no_caption(text, caption)
    )


def _no_image(path: str | None, values: Mapping[str, Any]) -> str:
    if (error := values.get("error_message")) or values.get("status") not in (None, "success"):
        return f"the row has no image: {values.get('status')}{f', {error}' if error else ''}"
    return f"the row has no image bytes, only the path {path}" if path else "the row has no image bytes"


def _no_caption(text: Any, column: str) -> str | None:
    if isinstance(text, str):
        return None
    return f"column {column} is {'null' if text is None else type(text).__name__}, expected text"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _lines(shard: Shard, columns: Columns, storage_options: dict | None) -> Iterator[Row]:
    table = _read_table(shard.url, storage_options)
    caption = _caption_column(shard.url, table.names, columns.caption)
    start, stop = shard.lines or (0, len(table.lines))
    for number, (line, values) in enumerate(table.lines[start:stop], start):
        if values is None:
            yield Row(f"line-{number:09d}", None, None, {}, f"line {number + 1} does not parse: {line[:80]}")
            continue
        name, text = values.pop(FILE_NAME, None), values.pop(caption, None)
        if not isinstance(name, str) or not name:
            yield Row(
                f"line-{number:09d}", None, _text(text), values, f"line {number + 1} has no {FILE_NAME}"
            )
            continue
        image, problem = _image_beside(shard.url, name, storage_options)
        yield Row(
            _clean(name),
            image,
            _text(text),
            {FILE_NAME: name, **values},
            problem or _no_caption(text, caption),
        )


def _read_table(url: str, storage_options: dict | None) -> Table:
    with open_shard(url, storage_options) as file:
        return parse_table(url, file.read())


def _image_beside(
    url: str, name: str, storage_options: dict | None
) -> tuple[tuple[str, bytes] | None, str | None]:
    """An image by its name relative to a table, or why it cannot be read."""
    if not is_inside(name):
        return None, f"{FILE_NAME} {name} leads out of the folder"
    try:
        with open_beside(url, name, storage_options) as file:
            data = file.read()
    except FileNotFoundError:
        return None, f"no file {name}"
    except OSError as error:
        return None, f"{name} cannot be read: {_one_line(error)}"
    return (_extension(name, data), data), None


def _extension(name: str, data: bytes) -> str:
    """The extension to store an image under: its name's, or else what its first bytes say."""
    given = PurePosixPath(name).suffix.removeprefix(".").lower()
    if given in IMAGE_EXTENSIONS:
        return given
    if data[:4] == b"RIFF":
        return "webp"
    if data[4:8] == b"ftyp":
        return "avif"
    return next((suffix for start, suffix in _BEGINNINGS.items() if data.startswith(start)), "jpg")


def _clean(name: str) -> str:
    """A key: WebDataset's ends at the first dot of the base name."""
    path = PurePosixPath(name.replace("\\", "/"))
    stem = path.stem if path.suffix.removeprefix(".").lower() in IMAGE_EXTENSIONS else path.name
    folder = "/".join(part for part in path.parts[:-1] if part not in ("/", "..", "."))
    return f"{folder}/{stem.replace('.', '_')}".lstrip("/")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
