"""Copies of a store's small files in one SQLite file: a plan opens that one, not one or two an entry.

The folder is the truth. A copy counts only while its file has the size, inode and time of change that it had
when it was read, and files that are younger than the clocks of file systems are precise are not copied. The
copies may be removed at any time: the next plan makes them anew, and works without where it cannot write.
"""

import os
import sqlite3
import time
import zlib
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

COPIES = "copies.sqlite"

SETTLED_NS = 2 * 10**9  # age of a file whose next change cannot have the same time

# no database, a broken one, or one with other tables
_DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)

_COLUMNS = "name, size, time, inode, checksum, text"

_WAIT = 2.0  # seconds for another process that writes


Stamp = tuple[int, int, int]  # size, time of change (ns), inode


class _Copy(NamedTuple):
    stamp: Stamp
    text: str


class SmallFiles:
    """Reads small text files below a folder, from their copies where these are as the files are now."""

    def __init__(self, root: Path) -> None:
        self._root, self._path = str(root), root / COPIES
        self._copies: dict[str, _Copy] = {}
        self._loaded = False
        self._new: dict[str, _Copy] = {}

    def stamp(self, name: str) -> Stamp | None:
        """Return what changes when a file does, None where there is none."""
        try:
            status = os.stat(f"{self._root}/{name}")  # noqa: PTH116 (a Path takes longer to make than a file to look up)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # no name of a file
            return None
        return status.st_size, status.st_mtime_ns, status.st_ino

    def load(self) -> None:
        """Have all copies at hand, for who will read most of the files (once a process)."""
        if not self._loaded:
            self._loaded, self._copies = True, {**_load(self._path), **self._copies}

    def copied(self, name: str, stamp: Stamp) -> str | None:
        """Return the copy of a file that is as it was when copied, else None; stamp: of the file now."""
        copy = self._copies.get(name)
        return copy.text if copy is not None and copy.stamp == stamp else None

    def read(self, name: str) -> str | None:
        """Return a file's text as it is now; None where it is gone or is no text."""
        try:
            return Path(self._root, name).read_text()
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None

    def add(self, name: str, stamp: Stamp, text: str) -> None:
        """Have a file copied, of which ``read`` gave this text; stamp: from before that."""
        if self.stamp(name) == stamp and time.time_ns() - stamp[1] > SETTLED_NS:
            self._copies[name] = self._new[name] = _Copy(stamp, text)

    def forget(self, name: str) -> None:
        """Free the memory of a copy that will not be asked for again."""
        self._copies.pop(name, None)

    def keep(self) -> None:
        """Write what was read anew to the copies; does nothing where that cannot be."""
        if self._new:
            new, self._new = self._new, {}
            _save(self._path, new)


def _load(path: Path) -> dict[str, _Copy]:
    if not path.is_file():
        return {}
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_WAIT)) as database:
            rows = database.execute(f"SELECT {_COLUMNS} FROM copy")
            return {
                name: _Copy((size, when, inode), text)
                for name, size, when, inode, checksum, text in rows
                if checksum == _checksum(text)
            }
    except sqlite3.Error:  # damaged, or locked for long
        return {}


def _save(path: Path, new: dict[str, _Copy]) -> None:
    rows = [(name, *stamp, _checksum(text), text) for name, (stamp, text) in new.items()]
    try:
        _insert(path, rows)
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF in _DAMAGED:
            with suppress(OSError, sqlite3.Error):
                path.unlink(missing_ok=True)
                _insert(path, rows)
        # else it is locked, full, or not to be written to


def _insert(path: Path, rows: list[tuple[str, int, int, int, int, str]]) -> None:
    with closing(sqlite3.connect(path, timeout=_WAIT)) as database, database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS copy"
            " (name TEXT PRIMARY KEY, size INTEGER, time INTEGER, inode INTEGER, checksum INTEGER, text TEXT)"
        )
        database.executemany(f"INSERT OR REPLACE INTO copy ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", rows)


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())
