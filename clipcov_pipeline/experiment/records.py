"""A record: what is known of one finished entry, and the text that it is kept as."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WHOLE = "_"  # the partition of a stage that has none

RECORD = "record.json"

SEAL = "seal"  # a record's own digest: a flipped byte in it must not name another output


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
    stamps: Mapping[str, str] = field(default_factory=dict)
    """Path within the entry -> size and time as written; a file is looked into where they differ."""
    commit: str = ""
    """The git commit of the code that built it."""
    config: str = ""
    """The sha256 of the YAML that it was built under; :meth:`Store.config` has the text."""

    @property
    def name(self) -> str:
        """``STAGE/PARTITION``, the key by which consumers name it."""
        return node_name(self.stage, self.partition)


def node_name(stage: str, partition: str) -> str:
    """Return ``STAGE/PARTITION``, or the stage alone where it has no partitions."""
    return stage if partition == WHOLE else f"{stage}/{partition}"


def read_record(path: Path) -> Record | None:
    """Return the record; None where there is none or it is damaged, so that the entry is built again."""
    try:
        values = sealed_values(path.read_text())
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return None if values is None else Record(**values)


def sealed_values(text: str) -> dict[str, Any] | None:
    """Return what a record's text holds; None where it is damaged."""
    try:
        values = json.loads(text)
        seal = values.pop(SEAL)
        Record(**values)
        return values if seal == _seal(values) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def record_text(record: Record) -> str:
    """Return the text that a record is kept as."""
    values = json.loads(json.dumps(asdict(record)))  # as they will be read: keys are strings
    return json.dumps({**values, SEAL: _seal(values)}, indent=1, sort_keys=True)


def _seal(values: Mapping[str, Any]) -> str:
    # unlike `digest_of`, a NaN may be in it: the last loss of a training that diverged is a statistic too
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
