"""Digests of values and files, and the fingerprint that is made of them."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

# made once: a plan has a digest for every entry
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the sha256 (hex) of a JSON-able value; keys are sorted, tuples count as lists."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_from(
    *,
    stage: str,
    code_version: str,
    params: Mapping[str, Any],
    sources: Mapping[str, str],
    inputs: Mapping[str, str],
) -> str:
    """Return the fingerprint (64 hex) of an entry: what it is made of, by the names that a record has."""
    return digest_of(
        {
            "stage": stage,
            "code_version": code_version,
            "params": params,
            "sources": sources,
            "inputs": inputs,
        }
    )


@lru_cache(maxsize=1)
def git_commit() -> str:
    """Return the commit of the checkout that the code runs from, with ``-dirty`` where files differ from it.

    ``unknown`` where the code is installed outside a checkout.
    """
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # a virtual environment may lie in the checkout of something else
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
