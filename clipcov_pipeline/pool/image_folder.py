"""The table beside images, as Hugging Face's imagefolder has it: ``metadata.csv`` or ``metadata.jsonl``."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from clipcov_pipeline.errors import InputError

TABLES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
LINES = 1000  # of a shard: lines that are added to a table leave earlier shards as they are


class Table(NamedTuple):
    """A table beside images: its columns, and each line as it is written with its values, None if damaged."""

    names: list[str]
    lines: list[tuple[str, dict[str, Any] | None]]


def parse_table(url: str, data: bytes) -> Table:
    """Read the content of a `metadata.csv` or `metadata.jsonl`.

    Raises:
        InputError: no text, or no column `file_name`.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{url}: found {error}, expected UTF-8") from None
    table = _of_csv(text) if url.endswith(".csv") else _of_jsonl(text)
    if FILE_NAME not in table.names:
        raise InputError(
            f"{url}: found the columns {', '.join(table.names) or 'none'}, expected {FILE_NAME} and captions,"
            " as Hugging Face's imagefolder has them"
        )
    return table


def _of_csv(text: str) -> Table:
    reader = csv.reader(io.StringIO(text))
    names = next(reader, [])
    lines = [
        (",".join(line), dict(zip(names, line, strict=False)) if len(line) == len(names) else None)
        for line in reader
        if line
    ]
    return Table(names, lines)


def _of_jsonl(text: str) -> Table:
    lines = [(line, _object(line)) for line in text.splitlines() if line.strip()]
    names = dict.fromkeys(name for _, values in lines if values for name in values)
    return Table(list(names), lines)


def _object(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def token_of_lines(lines: Sequence[tuple[str, Any]], images: Mapping[str, str]) -> str:
    """What changes when one of these lines, or the image that it names, does; images: token by file name."""
    names = [(values or {}).get(FILE_NAME) for _, values in lines]
    said = [
        (line, images.get(name, "") if isinstance(name, str) else "")
        for (line, _), name in zip(lines, names, strict=True)
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def is_inside(name: str) -> bool:
    """Whether a relative path stays below the folder that it is relative to."""
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]
