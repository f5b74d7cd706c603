"""The content-addressed store: what was built, from what, and with which result.

An entry lies at ``STORE/STAGE/PARTITION/FINGERPRINT/``: its files, and ``record.json`` written last, so
that an entry without a record is no entry. ``STORE/STAGE/PARTITION/current`` names the entry that stands
for the partition now; an earlier one is found again by its fingerprint (a parameter there and back).
"""

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from clipcov_pipeline.errors import InputError

WHOLE = "_"  # the partition of a stage that has none
RECORD = "record.json"
CURRENT = "current"
SEAL = "seal"  # a record's own digest: a flipped byte in it must not name another output


def digest_of(value: Any) -> str:
    """Return the sha256 (hex) of a JSON-able value; keys are sorted, tuples count as lists."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Record:
    """What is known of one finished entry.

    ``digests`` names the entry's outputs: one digest for each; a consumer's fingerprint covers the digest of
    the output that it reads, not the fingerprint that made it, so an identical re-run stops there.
    """

    stage: str
    partition: str
    fingerprint: str
    code_version: str
    params: Mapping[str, Any]
    """The configuration that went into the fingerprint, by section and key."""
    sources: Mapping[str, str]
    """Change tokens of what was read from outside, by name."""
    inputs: Mapping[str, str]
    """``STAGE/PARTITION#OUTPUT`` -> digest of what was read from the store."""
    digests: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    """Path within the entry -> sha256."""
    stats: Mapping[str, Any] = field(default_factory=dict)
    """Counts, seconds and pins (such as the LanceDB version); never part of a digest."""
    seconds: float = 0.0
    finished: float = 0.0

    @property
    def name(self) -> str:
        """``STAGE/PARTITION``, the key by which consumers name it."""
        return node_name(self.stage, self.partition)


def node_name(stage: str, partition: str) -> str:
    """Return ``STAGE/PARTITION``, or the stage alone where it has no partitions."""
    return stage if partition == WHOLE else f"{stage}/{partition}"


class Entry:
    """An entry being written: put files under :attr:`folder`, then set digests and stats."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self.stats: dict[str, Any] = {}


class Store:
    """Finds and writes entries below one folder; safe for several processes that build different entries."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _partition(self, stage: str, partition: str) -> Path:
        return self.root / stage / partition

    def folder(self, record: Record) -> Path:
        """Return the folder that holds a record's files."""
        return self._partition(record.stage, record.partition) / record.fingerprint[:24]

    def find(self, stage: str, partition: str, fingerprint: str) -> Record | None:
        """Return the finished entry with this fingerprint, or None."""
        record = _read_record(self._partition(stage, partition) / fingerprint[:24] / RECORD)
        return record if record is not None and record.fingerprint == fingerprint else None

    def current_fingerprint(self, stage: str, partition: str) -> str | None:
        """Return the fingerprint that stands for the partition now, or None."""
        try:
            return (self._partition(stage, partition) / CURRENT).read_text().strip() or None
        except (FileNotFoundError, UnicodeDecodeError):  # none yet, or damaged
            return None

    def current(self, stage: str, partition: str) -> Record | None:
        """Return the entry that stands for the partition now, or None."""
        fingerprint = self.current_fingerprint(stage, partition)
        return self.find(stage, partition, fingerprint) if fingerprint else None

    def set_current(self, record: Record) -> None:
        """Let a finished entry stand for its partition."""
        _write_atomically(
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
        home = self._partition(stage, partition)
        scratch = home / f".tmp-{uuid4().hex}"
        scratch.mkdir(parents=True)
        started = time.monotonic()
        try:
            entry = Entry(scratch)
            yield entry
            files = {
                str(p.relative_to(scratch)): digest_of_file(p)
                for p in sorted(scratch.rglob("*"))
                if p.is_file()
            }
            digests = entry.digests or {"": digest_of(files)}
            record = Record(
                stage=stage,
                partition=partition,
                fingerprint=fingerprint,
                code_version=code_version,
                params=params,
                sources=sources,
                inputs=inputs,
                digests=digests,
                files=files,
                stats=entry.stats,
                seconds=round(time.monotonic() - started, 3),
                finished=time.time(),
            )
            _write_record(scratch / RECORD, record)
            _put(scratch, self.folder(record))
            self.set_current(record)
        finally:
            for rest in [scratch, *home.glob(".old-*")]:
                shutil.rmtree(rest, ignore_errors=True)

    def records(self) -> Iterator[Record]:
        """Yield every finished entry."""
        for path in sorted(self.root.glob(f"*/*/*/{RECORD}")):
            # a writer that was killed leaves its scratch folder, whose name starts with a dot
            record = None if path.parent.name.startswith(".") else _read_record(path)
            if record is not None:
                yield record

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

    def discard(self, record: Record) -> None:
        """Remove an entry; its record goes first, so that a half-removed entry is no entry."""
        (self.folder(record) / RECORD).unlink(missing_ok=True)
        shutil.rmtree(self.folder(record), ignore_errors=True)


def _read_record(path: Path) -> Record | None:
    """Return the record; None where there is none or it is damaged, so that the entry is built again."""
    try:
        values = json.loads(path.read_text())
        seal = values.pop(SEAL)
        return Record(**values) if seal == _seal(values) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write_record(path: Path, record: Record) -> None:
    values = json.loads(json.dumps(asdict(record)))  # as they will be read: keys are strings
    _write_atomically(path, json.dumps({**values, SEAL: _seal(values)}, indent=1, sort_keys=True))


def _seal(values: Mapping[str, Any]) -> str:
    # unlike `digest_of`, a NaN may be in it: the last loss of a training that diverged is a statistic too
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{uuid4().hex}")
    scratch.write_text(text)
    scratch.replace(path)


def require(record: Record | None, name: str) -> Record:
    """Return the record, or raise InputError naming what has to be materialized first."""
    if record is None:
        raise InputError(f"{name} is not built yet, expected a finished entry: materialize it first")
    return record
