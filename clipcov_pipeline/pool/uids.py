"""A sample's uid: what its json says where that is a UUID, else a hash; another id is kept beside it."""

import hashlib
import json
from typing import Any

from clipcov_pipeline.uuids import hex_of


def uid_of(shard_name: str, key: str, meta: dict[str, Any] | None) -> str:
    """Return a sample's uid, 32 lower-case hex digits.

    The json's `uid` if that is a UUID, with dashes or without; else the first 32 digits of the sha256 of
    `SHARD/KEY`.
    """
    given = (meta or {}).get("uid")
    if isinstance(given, str) and (digits := hex_of(given)) is not None:
        return digits
    return hashlib.sha256(f"{shard_name}/{key}".encode()).hexdigest()[:32]


def source_id_of(meta: dict[str, Any] | None) -> str | None:
    """The json's `uid` as text where it is an id of another kind (64 hex digits, a number); or None."""
    given = (meta or {}).get("uid")
    if given is None or given == "" or (isinstance(given, str) and hex_of(given) is not None):
        return None
    return given if isinstance(given, str) else json.dumps(given)
