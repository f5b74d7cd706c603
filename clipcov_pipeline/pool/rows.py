"""Rows of a table with an image and a caption each: what a shard is made of that is no tar."""

import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.pixels import IMAGE_EXTENSIONS

CAPTION_NAMES = ("caption", "text", "txt")

_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\x00": "tif",
    b"MM\x00*": "tif",
}


class Row(NamedTuple):
    """One image-caption pair as it stands in a table.

    key: its name in the table, of any characters. where: its place, for people ("row 12"). image: the file as
    stored; caption: its bytes. meta: the other columns. problem: (status, reason) of a row that is of no use.
    """

    key: str
    where: str
    image: bytes | None = None
    image_ext: str = "jpg"
    caption: bytes | None = None
    meta: dict[str, Any] | None = None
    problem: tuple[str, str] | None = None


class Names(NamedTuple):
    """Columns as the YAML names them, None where they are to be found; txt: whether captions need one."""

    image: str | None = None
    caption: str | None = None
    txt: bool = True


class UnreadableRowsError(ValueError):
    """The file that the rows come from is of no use as a whole."""


class RowSource(Protocol):
    """What gives the rows of one shard."""

    @property
    def uid_name(self) -> str:
        """Stands for the shard's name in the hash that is the uid of a row without one."""
        ...

    def rows(self, storage_options: dict | None) -> Iterator[Row]:
        """Yield the rows in their order; raises UnreadableRowsError, and OSError where a store is down."""
        ...

    def count(self) -> int | None:
        """Return the number of rows; None where that takes reading a file that is not on this machine."""
        ...

    def size(self) -> int | None:
        """Return the bytes that the rows take, about; None as `count`."""
        ...


def choose_column(what: str, found: Iterable[str], given: str | None, columns: Collection[str]) -> str:
    """Return the column that holds images or captions (``what``: "image" or "caption").

    Args:
        found: candidates, by name and type.
        given: what `shards.WHAT_column` says.
        columns: all of the table's.

    Raises:
        InputError: the column given is not there; none or several are found.
    """
    names = list(found)
    setting, there = f"shards.{what}_column", ", ".join(columns)
    if given is not None:
        if given in columns:
            return given
        raise InputError(f"{setting}: found no column {given!r}, expected one of: {there}")
    if len(names) == 1:
        return names[0]
    if names:
        raise InputError(f"{setting}: found {len(names)} {what} columns ({', '.join(names)}): name one")
    other = "; texts in a list: shards.caption: json:COLUMN" if what == "caption" else ""
    raise InputError(f"{setting}: found no {what} column, expected it named: one of {there}{other}")


def choose_caption(found: Iterable[str], names: Names, columns: Collection[str]) -> str | None:
    """Return the column of captions as `choose_column`, None where none is needed nor named."""
    if names.caption is None and not names.txt:
        return None
    return choose_column("caption", found, names.caption, columns)


def image_extension(data: bytes, name: str = "") -> str:
    """Return an image's extension: that of its file name where it is an image's, else by its first bytes."""
    extension = name.rpartition(".")[2].lower()
    if extension in IMAGE_EXTENSIONS:
        return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((found for magic, found in _MAGIC.items() if data.startswith(magic)), "jpg")


def json_bytes(meta: dict[str, Any]) -> bytes:
    """Return columns as the bytes of a json member; a value json does not have (a date) as text."""
    text = json.dumps(_without_bytes(meta), ensure_ascii=False, default=str, allow_nan=True)
    return text.encode("utf-8", "backslashreplace")


def _without_bytes(value: Any) -> Any:
    """Leave out what is no text: images, vectors in bytes. A NaN is no JSON: null."""
    if isinstance(value, dict):
        return {key: _without_bytes(item) for key, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list):
        return [_without_bytes(item) for item in value if not isinstance(item, bytes)]
    return None if isinstance(value, float) and value - value != 0 else value
