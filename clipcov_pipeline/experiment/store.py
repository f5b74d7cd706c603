"""The content-addressed store: what was built, from what, and with which result.

An entry lies at ``STORE/STAGE/PARTITION/FINGERPRINT/``: its files, and ``record.json`` written last, so
that an entry without a record is no entry. ``STORE/STAGE/PARTITION/current`` names the entry that stands
for the partition now; an earlier one is found again by its fingerprint (a parameter there and back).
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.digests import digest_of, digest_of_file, git_commit
from clipcov_pipeline.experiment.records import (
    RECORD,
    Record,
    read_record,
    record_text,
    sealed_values,
)
from clipcov_pipeline.experiment.small_files import SmallFiles, Stamp
from clipcov_pipeline.files import write_text_at_once

CURRENT = "current"

CONFIGS = "configs"


class Entry:
    """An entry being written: put files under :attr:`folder`, then set digests and stats."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self.stats: dict[str, Any] = {}


class Store:
    """Finds and writes entries below one folder; safe for several processes that build different entries."""

    def __init__(self, root: Path, config_text: str | None = None) -> None:
        """``config_text``: the YAML that entries are built under; a copy is kept beside them."""
        self.root = root
        self.config_text = config_text
        self._files = SmallFiles(root)
        self._known: dict[str, tuple[Stamp, Record]] = {}

    def _partition(self, stage: str, partition: str) -> Path:
        return self.root / stage / partition

    def folder(self, record: Record) -> Path:
        """Return the folder that holds a record's files."""
        return self._partition(record.stage, record.partition) / record.fingerprint[:24]

    def find(self, stage: str, partition: str, fingerprint: str) -> Record | None:
        """Return the finished entry with this fingerprint, or None."""
        record = self._record(f"{stage}/{partition}/{fingerprint[:24]}/{RECORD}")
        return record if record is not None and record.fingerprint == fingerprint else None

    def _record(self, name: str) -> Record | None:
        """Return the record in a file below the root, read once a process while the file stays as it is."""
        stamp = self._files.stamp(name)
        if stamp is None:
            return None
        known = self._known.get(name)
        if known is not None and known[0] == stamp:
            return known[1]
        copy = self._files.copied(name, stamp)
        record = self._read_anew(name, stamp) if copy is None else Record(**json.loads(copy))
        if record is not None:
            self._known[name] = stamp, record
            self._files.forget(name)
        return record

    def _read_anew(self, name: str, stamp: Stamp) -> Record | None:
        text = self._files.read(name)
        values = sealed_values(text or "")
        if text is None or values is None:
            return None
        self._files.add(name, stamp, json.dumps(values))
        return Record(**values)

    def current_since(self, stage: str, partition: str) -> int:
        """Return when the entry that stands for the partition was put there (ns); 0 when none was."""
        try:
            return (self._partition(stage, partition) / CURRENT).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def current_fingerprint(self, stage: str, partition: str) -> str | None:
        """Return the fingerprint that stands for the partition now, or None."""
        name = f"{stage}/{partition}/{CURRENT}"
        stamp = self._files.stamp(name)
        if stamp is None:
            return None
        text = self._files.copied(name, stamp)
        if text is None and (text := self._files.read(name)) is not None:
            self._files.add(name, stamp, text)
        return (text or "").strip() or None

    @contextmanager
    def many_reads(self) -> Iterator[None]:
        """Within it small files are read from their copies; those without are copied at the end."""
        self._files.load()
        yield
        self._files.keep()

    def current(self, stage: str, partition: str) -> Record | None:
        """Return the entry that stands for the partition now, or None."""
        fingerprint = self.current_fingerprint(stage, partition)
        return self.find(stage, partition, fingerprint) if fingerprint else None

    def set_current(self, record: Record) -> None:
        """Let a finished entry stand for its partition."""
        write_text_at_once(
            self._partition(record.stage, record.partition) / CURRENT, record.fingerprint + "\n"
        )

    def clear_current(self, stage: str, partition: str) -> None:
        """Let no entry stand for the partition (before its place outside the store is overwritten)."""
        (self._partition(stage, partition) / CURRENT).unlink(missing_ok=True)

    @contextmanager
    def write(
        self,
        stage: str,
        partition: str,
        fingerprint: str,
        *,
        code_version: str,
        params: Mapping[str, Any],
        sources: Mapping[str, str],
        inputs: Mapping[str, str],
    ) -> Iterator[Entry]:
        """Write an entry: yields the place to fill, then hashes, renames and makes it current.

        Nothing is visible before the end, and a failure inside leaves nothing behind.
        """
        started, commit = time.monotonic(), git_commit()
        with _scratch_folder(self._partition(stage, partition)) as scratch:
            entry = Entry(scratch)
            yield entry
            files, stamps = _files_below(scratch)
            record = Record(
                stage=stage,
                partition=partition,
                fingerprint=fingerprint,
                code_version=code_version,
                params=params,
                sources=sources,
                inputs=inputs,
                digests=entry.digests or {"": digest_of(files)},
                files=files,
                stats=entry.stats,
                seconds=round(time.monotonic() - started, 3),
                finished=time.time(),
                stamps=stamps,
                commit=commit,
                config=self._keep_config(),
            )
            write_text_at_once(scratch / RECORD, record_text(record))
            _put(scratch, self.folder(record))
            self.set_current(record)

    def records(self) -> Iterator[Record]:
        """Yield every finished entry."""
        for path in sorted(self.root.glob(f"*/*/*/{RECORD}")):
            # a writer that was killed leaves its scratch folder, whose name starts with a dot
            record = None if path.parent.name.startswith(".") else read_record(path)
            if record is not None:
                yield record

    def _keep_config(self) -> str:
        """Keep a copy of the YAML that entries are built under; return its digest."""
        if self.config_text is None:
            return ""
        digest = hashlib.sha256(self.config_text.encode()).hexdigest()
        kept = self._config_path(digest)
        if not kept.exists():
            write_text_at_once(kept, self.config_text)
        return digest

    def _config_path(self, digest: str) -> Path:
        return self.root / CONFIGS / f"{digest[:24]}.yaml"

    def config(self, record: Record) -> Path | None:
        """Return the copy of the YAML that an entry was built under; None where none was kept."""
        path = self._config_path(record.config)
        return path if record.config and path.is_file() else None

    def glance(self, record: Record) -> str | None:
        """Return what is wrong with an entry's files, by their sizes and times; None when nothing is.

        A file whose time differs is read. It gets its time back when its content is right, so that a copy
        of the work folder that lost the times is read once.
        """
        folder = f"{self.root}/{record.stage}/{record.partition}/{record.fingerprint[:24]}"
        for name, expected in record.files.items():
            path, stamp = f"{folder}/{name}", record.stamps.get(name)
            try:
                status = os.stat(path)  # noqa: PTH116 (of every file, in every plan: a Path takes longer to make)
            except (FileNotFoundError, NotADirectoryError):
                return f"{name} missing"
            if stamp is None or stamp == _stamp(status):
                continue
            size, _, seconds = stamp.partition("@")
            if status.st_size != int(size):
                return f"{name} has {status.st_size} bytes, expected {size}"
            if (found := digest_of_file(Path(path))) != expected:
                return f"{name} has sha256 {found[:12]}, expected {expected[:12]}"
            with suppress(OSError):  # a store that may only be read
                os.utime(path, (int(seconds), int(seconds)))
        return None

    def checked(self, record: Record, file: str = "") -> Path:
        """Return the path of a file or folder of an entry, its content checked (once a process).

        Raises:
            InputError: it is damaged. The entry is removed, so that the next run builds it again.
        """
        place = self.folder(record) / file
        for name, expected in record.files.items():
            path = self.folder(record) / name
            if path != place and place not in path.parents:
                continue
            try:
                status = path.stat()
                found = _digest_at(path, status.st_size, status.st_mtime_ns)
            except (FileNotFoundError, NotADirectoryError):
                found = "no file"
            if found != expected:
                self.discard(record)
                raise InputError(
                    f"{record.name} is damaged: {name}: found {found[:12]}, expected sha256 {expected[:12]};"
                    " it is removed, run again to build it again"
                )
        return place

    def damage(self, record: Record) -> list[str]:
        """Return what of an entry's files is missing or differs from its record, in words."""
        folder, problems = self.folder(record), []
        for name, expected in record.files.items():
            path = folder / name
            if not path.is_file():
                problems.append(f"{path}: missing")
            elif (found := digest_of_file(path)) != expected:
                problems.append(f"{path}: sha256 {found[:12]}, expected {expected[:12]}")
        return problems

    def move_pin(self, record: Record, version: int) -> None:
        """Note another LanceDB version of the same rows, after compaction; nothing else changes."""
        moved = replace(record, stats={**record.stats, "version": version})
        write_text_at_once(self.folder(record) / RECORD, record_text(moved))

    def discard(self, record: Record) -> None:
        """Remove an entry; its record goes first, so that a half-removed entry is no entry."""
        (self.folder(record) / RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.folder(record), ignore_errors=True)


@contextmanager
def _scratch_folder(home: Path) -> Iterator[Path]:
    """Yield a new folder beside a partition's entries, locked for as long as it is filled."""
    scratch = home / f".tmp-{uuid4().hex}"
    scratch.mkdir(parents=True)
    handle = os.open(scratch, os.O_RDONLY)
    with suppress(OSError):  # some network file systems lock no folder
        fcntl.flock(handle, fcntl.LOCK_EX)  # for `is_being_written`; given back when this process ends
    try:
        yield scratch
    finally:
        os.close(handle)
        for rest in [scratch, *home.glob(".old-*")]:
            shutil.rmtree(rest, ignore_errors=True)


def _files_below(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digest of every file below a folder, and its stamp, by its path there."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    digests = {name: digest_of_file(path) for name, path in paths.items()}
    return digests, {name: _stamp(path.stat()) for name, path in paths.items()}


def _stamp(status: os.stat_result) -> str:
    # whole seconds: archives and copies keep no more
    return f"{status.st_size}@{status.st_mtime_ns // 10**9}"


@lru_cache(maxsize=65_536)
def _digest_at(path: Path, size: int, time_ns: int) -> str:  # noqa: ARG001 (size and time are the cache's key)
    return digest_of_file(path)


def _put(scratch: Path, target: Path) -> None:
    """Rename a folder to its place; what lies there is damaged, or another process was faster."""
    while True:
        try:
            scratch.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            with suppress(FileNotFoundError):
                target.rename(target.with_name(f".old-{uuid4().hex}"))


def is_being_written(scratch: Path) -> bool:
    """Return whether a process of this machine is at work on an unfinished entry's folder."""
    try:
        handle = os.open(scratch, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network file systems lock no folder
        return False
    finally:
        os.close(handle)
    return False


def require(record: Record | None, name: str) -> Record:
    """Return the record, or raise InputError naming what has to be materialized first."""
    if record is None:
        raise InputError(f"{name} is not built yet, expected a finished entry: materialize it first")
    return record
