"""Rows of a folder of images with `metadata.csv` or `metadata.jsonl`: Hugging Face's `imagefolder`."""

import codecs
import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard, open_shard, shard_name
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
from clipcov_pipeline.redaction import public_address

METADATA = ("metadata.csv", "metadata.jsonl")
ROWS_PER_SHARD = 1000
READERS = 16

Files = Mapping[str, tuple[str, str]]
"""Path below the source -> (path or URL, change token)."""


class Line(NamedTuple):
    """One line of a metadata file: its columns, or the problem with it."""

    where: str
    fields: dict[str, Any]
    problem: tuple[str, str] | None = None


class Image(NamedTuple):
    """A line with the image that it names: its key, its path or URL (None: not there) and change token."""

    line: Line
    key: str
    url: str | None = None
    version: str = ""


@dataclass(frozen=True)
class FolderRows:
    """Some lines of one metadata file, with their images."""

    uid_name: str
    images: tuple[Image, ...]
    image_column: str
    caption_column: str | None
    unreadable: str | None = None

    def rows(self, storage_options: dict | None) -> Iterator[Row]:
        """Yield a row a line, in the file's order.

        Raises:
            UnreadableRowsError: the metadata file is of no use.
            OSError: an image that is there cannot be read.
        """
        if self.unreadable is not None:
            raise UnreadableRowsError(self.unreadable)
        with ThreadPoolExecutor(READERS) as pool:  # a store answers many at once
            for start in range(0, len(self.images), 4 * READERS):
                some = self.images[start : start + 4 * READERS]
                yield from pool.map(partial(self._row, storage_options=storage_options), some)

    def count(self) -> int | None:
        """Return the number of lines."""
        return len(self.images)

    def size(self) -> int | None:
        """Return the bytes of the images; None of remote ones."""
        urls = [image.url for image in self.images if image.url is not None]
        if any("://" in url for url in urls):
            return None
        return sum(Path(url).stat().st_size for url in urls)

    def _row(self, image: Image, storage_options: dict | None) -> Row:
        line = image.line
        meta = {name: value for name, value in line.fields.items() if name != self.caption_column}
        caption = line.fields.get(self.caption_column) if self.caption_column else None
        row = Row(image.key, line.where, meta=meta, problem=line.problem)
        if isinstance(caption, str):
            row = row._replace(caption=caption.encode("utf-8", "surrogateescape"))
        elif row.problem is None and self.caption_column:
            found = "not there" if caption is None else f"a {type(caption).__name__}, expected text"
            problem = "missing_caption", f"{line.where}: {self.caption_column} is {found}"
            row = row._replace(problem=problem)
        if image.url is None:
            return row
        try:
            with open_shard(image.url, storage_options) as file:
                data = file.read()
        except FileNotFoundError:
            missing = f"{line.where}: no file {public_address(image.url)}"
            return row._replace(problem=("missing_image", missing))
        return row._replace(image=data, image_ext=image_extension(data, image.url))


def folder_shards(
    source: str,
    files: Files,
    storage_options: dict | None,
    columns: Names,
) -> list[Shard]:
    """Return the images of a folder as shards of about `ROWS_PER_SHARD` lines; none without a metadata file.

    A line's shard goes by the hash of its file name: another line, wherever it is put, changes one shard.
    (All are cut anew each time that the number of lines passes 1,000, 2,000, 4,000, ...)

    Args:
        source: the folder, for messages.
        files: all that is in and below it; a metadata file names images beside and below itself.
        storage_options: fsspec's.
        columns: as the YAML names them; None: ``file_name``, and as `CAPTION_NAMES`.

    Raises:
        InputError: no metadata file can be used; two lie in one folder.
    """
    tables = [path for path in files if PurePosixPath(path).name in METADATA]
    if both := [
        path for path, count in Counter(str(PurePosixPath(t).parent) for t in tables).items() if count > 1
    ]:
        raise InputError(
            f"data source {source}: found {' and '.join(METADATA)} in {both[0]}, expected one of them:"
            " move one away, or give its path"
        )
    shards: list[Shard] = []
    for table, below in _images_below(files, tables).items():
        shards += _of_table(table, files, below, storage_options, columns)
    broken = [shard.rows.unreadable for shard in shards if isinstance(shard.rows, FolderRows)]
    if shards and None not in broken:
        raise InputError(f"data source {source}: {broken[0]}")
    return sorted(shards, key=lambda shard: shard.name)


def _images_below(files: Files, tables: list[str]) -> dict[str, list[str]]:
    """The images of each metadata file: each belongs to the nearest one above it."""
    by_folder = {PurePosixPath(table).parent: table for table in tables}
    below: dict[str, list[str]] = {table: [] for table in tables}
    for path in files:
        if path.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
            table = next(
                (by_folder[above] for above in PurePosixPath(path).parents if above in by_folder), None
            )
            if table is not None:
                below[table].append(path)
    return below


def _of_table(
    table: str,
    files: Files,
    below: list[str],
    storage_options: dict | None,
    columns: Names,
) -> list[Shard]:
    """The shards of one metadata file."""
    url, version = files[table]
    name = shard_name(str(PurePosixPath(table).with_suffix("")), "")
    try:
        lines = _lines(url, version, json.dumps(storage_options or {}, sort_keys=True))
        image, caption = _columns(lines, columns)
    except (UnreadableRowsError, InputError) as error:
        return [Shard(name, url, version, FolderRows(name, (), "", None, f"{table}: {error}"))]
    images = _with_images(lines, image, PurePosixPath(table), files, below)
    parts = 1 << max(0, -(-len(images) // ROWS_PER_SHARD) - 1).bit_length()
    cut: list[list[Image]] = [[] for _ in range(parts)]
    for each in images:
        cut[int(hashlib.sha256(each.key.encode("utf-8", "replace")).hexdigest()[:8], 16) % parts].append(each)
    return [
        Shard(f"{name}-{number:05d}", url, _version(part), FolderRows(name, tuple(part), image, caption))
        for number, part in enumerate(cut)
        if part
    ]


def _columns(lines: list[Line], given: Names) -> tuple[str, str | None]:
    names = list(dict.fromkeys(name for line in lines for name in line.fields))
    if given.image is None and "file_name" not in names:
        raise UnreadableRowsError(
            f"found the columns {', '.join(names) or 'none'}, expected file_name among them (in a csv, the"
            " first line names them)"
        )
    captions = [name for name in names if name.lower() in CAPTION_NAMES]
    image = choose_column("image", ["file_name"], given.image, names)
    return image, choose_caption(captions, given, names)


def _with_images(
    lines: list[Line], column: str, table: PurePosixPath, files: Files, below: list[str]
) -> list[Image]:
    """Each line with its image; then the images that no line names."""
    named = [str(line.fields.get(column) or "") for line in lines]
    paths = [str(table.parent / name) for name in named]
    stems = Counter(_stem(name) for name in set(named))
    found: list[Image] = []
    for line, name, path in zip(lines, named, paths, strict=True):
        key = (_stem(name) if stems[_stem(name)] == 1 else name) if name else line.where
        problem = line.problem or _problem(line.where, name, path in files)
        url, version = files.get(path, (None, "")) if problem is None else (None, "")
        found.append(Image(line._replace(problem=problem), key, url, version))
    for path in sorted(set(below) - set(paths)):
        name = str(PurePosixPath(path).relative_to(table.parent))
        problem = "missing_caption", f"{name}: no line of {table.name} names it"
        found.append(Image(Line(name, {column: name}, problem), name, *files[path]))
    return found


def _problem(where: str, name: str, there: bool) -> tuple[str, str] | None:
    if not name:
        return "missing_image", f"{where}: no file name"
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return "missing_image", f"{where}: {name} leads out of the folder"
    return None if there else ("missing_image", f"{where}: no file {name}")


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")) if name else ""


def _version(images: list[Image]) -> str:
    """Changes when what a line says or an image does, not when other lines come before it."""
    parts = [
        (image.line.fields, (image.line.problem or [""])[0], image.key, image.version) for image in images
    ]
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


@lru_cache(maxsize=64)  # every plan looks into it
def _lines(url: str, version: str, storage_options: str) -> list[Line]:  # noqa: ARG001 (a changed file has another version)
    with open_shard(url, json.loads(storage_options)) as file:
        data = file.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # PowerShell's, Excel's "Unicode text"
        raise UnreadableRowsError("found UTF-16, expected UTF-8: save it as that")
    # a byte that is no UTF-8 is kept as it is, and its caption is kept aside
    text = data.decode("utf-8-sig", "surrogateescape")
    return list(_of_csv(text) if url.endswith(".csv") else _of_json_lines(text))


def _of_csv(text: str) -> Iterator[Line]:
    # strict: else a quote that is not closed takes in all that follows
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"line {reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            yield Line(where, {}, ("unreadable_row", f"{where} does not parse: {error}"))
            continue
        if values is None:
            return
        if header is None:
            header = values
        elif len(values) == len(header):
            yield Line(where, dict(zip(header, values, strict=True)))
        elif values:
            text = f"{where} has {len(values)} fields, the first line {len(header)}: quote text with commas"
            yield Line(where, dict(zip(header, values, strict=False)), ("unreadable_row", text))


def _of_json_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict):
            yield Line(where, fields)
        else:
            yield Line(where, {}, ("unreadable_row", f"{where} is no JSON object"))
