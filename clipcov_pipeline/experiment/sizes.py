"""Sizes of files, for people."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def human(size: float) -> str:
    """Return a size in bytes with a unit: ``1.5 GiB``."""
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError


def size_of(path: Path) -> int:
    """Return the bytes of the files at and below a path; a run at work may take some away meanwhile."""
    return sum(status.st_size for status in statuses_of(path) if S_ISREG(status.st_mode))


def statuses_of(path: Path) -> Iterator[os.stat_result]:
    below = (Path(folder, name) for folder, folders, files in os.walk(path) for name in [*folders, *files])
    for found in (path, *below):
        with suppress(FileNotFoundError):
            yield found.lstat()
