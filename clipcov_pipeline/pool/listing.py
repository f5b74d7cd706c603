"""Finds the shards of a source: a folder, a brace pattern, an fsspec URL. A token tells when one changes."""

import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.rows import RowSource
from clipcov_pipeline.redaction import without_query

_CHANGE_TOKENS = (
    ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "checksum", "generation"),
    ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "modified", "created"),
)

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}

_PARALLEL_LOOKUPS = 16


@dataclass(frozen=True)
class Shard:
    """One tar of a pool, or rows of a table that are packed into one first.

    name: partition key, unique in the pool, of `[A-Za-z0-9._-]`: the path below the source's root without
    `.tar`, with `/` written as `__`. url: local path or fsspec URL. version: a token from the file system's
    listing that changes when the file does (size and time of change, or the store's ETag); not a digest.
    rows: what is in it where it is no tar (`pool/sources.py`); `url` is then the file they come from.
    """

    name: str
    url: str
    version: str
    rows: RowSource | None = field(default=None, compare=False, repr=False)


class NoShardsError(InputError):
    """The folder is there and has no shard in it."""


def scan(
    source: str, storage_options: dict | None = None, *, settle_seconds: float = 0, suffix: str = ".tar"
) -> list[Shard]:
    """Return the shards of a source, sorted by name; hidden names and `.part`, `.tmp` are left out.

    Args:
        source: a folder (searched through all its levels), one tar, or a brace pattern
            (`pool/{00000..00012}.tar`), each a local path or an fsspec URL.
        storage_options: fsspec's.
        settle_seconds: a local shard changed less than so long ago may still be being written: it is left
            for the next scan.
        suffix: what a shard's name ends with; of others than tars, a pattern may also have `*` and `?`.

    Raises:
        NoShardsError: no `.tar` in the folder.
        InputError: nothing there, a pattern that names absent shards, an unknown
            protocol or one whose driver is not installed, two shards that would get one name.
    """
    filesystem, path = _filesystem(source, storage_options)
    filesystem.invalidate_cache()  # fsspec keeps listings for the life of the process
    with _remote_errors(source, filesystem):
        if _is_pattern(filesystem, source, path):
            root, entries = _list_pattern(filesystem, source)
        else:
            root, entries = _list(filesystem, source, path, suffix)
    shards: dict[str, Shard] = {}
    for path, info in sorted(entries.items()):
        name = shard_name(without_query(path).removeprefix(root).lstrip("/"), suffix)
        shard = _shard(filesystem, name, path, info, settle_seconds)
        if shard is None:
            continue
        if name in shards:
            raise InputError(
                f"data source {source}: {shards[name].url} and {shard.url} both get the shard name "
                f"{name!r}; rename one of them"
            )
        shards[name] = shard
    return [shards[name] for name in sorted(shards)]


def _filesystem(source: str, storage_options: dict | None) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a source."""
    from fsspec.core import url_to_fs

    if "::" in source:
        raise InputError(
            f"data source {source}: chained addresses (::) are not taken; give a folder or pattern"
        )
    local = "://" not in source
    try:
        return url_to_fs(str(Path(source).expanduser()) if local else source, **(storage_options or {}))
    except ImportError as error:
        raise InputError(
            f"data source {source}: the driver for {source.split('://')[0]}:// is not installed ({error}); "
            "install it with: pip install 'clipcov-pipeline[cloud]'"
        ) from None
    except ValueError as error:
        raise InputError(
            f"data source {source}: {error}; expected a local path or an fsspec URL such as s3://, gs://, https://"
        ) from None


@contextmanager
def _remote_errors(source: str, filesystem: Any) -> Iterator[None]:
    """Name the source where a store refuses: each has exceptions of its own for credentials and addresses."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if _is_local(filesystem):
            raise
        text = " ".join(str(error).split())
        raise InputError(
            f"data source {source}: cannot be listed ({type(error).__name__}: {text}); "
            "check the address, the credentials and storage_options"
        ) from None


def _is_local(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _is_pattern(filesystem: Any, source: str, path: str) -> bool:
    return "{" in source and not (_is_local(filesystem) and Path(path).exists())


def _list_pattern(filesystem: Any, source: str) -> tuple[str, dict[str, dict]]:
    """(root, path -> listing entry) of a brace pattern; root: the last folder before the first brace."""
    import braceexpand

    pattern = str(Path(source).expanduser()) if "://" not in source else source
    try:
        urls = list(dict.fromkeys(braceexpand.braceexpand(pattern)))
    except braceexpand.UnbalancedBracesError:  # pyright: ignore[reportAttributeAccessIssue]
        raise InputError(
            f"data source {source}: braces do not match; expected a pattern such as pool/{{00000..00012}}.tar"
        ) from None
    root, slash, _ = pattern[: pattern.index("{")].rpartition("/")
    root = filesystem._strip_protocol(root if slash else ".")
    return root, _look_up(filesystem, [filesystem._strip_protocol(url) for url in urls], source)


def _info(filesystem: Any, path: str) -> dict | None:
    """Listing entry of one path, None where there is no such file."""
    try:
        return filesystem.info(path)
    except FileNotFoundError as error:
        # fsspec's http raises this for every failure and hangs the real one on it
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            return None
        raise cause from None


def _look_up(filesystem: Any, paths: list[str], source: str) -> dict[str, dict]:
    """Path -> listing entry of paths that must all be there."""
    with ThreadPoolExecutor(_PARALLEL_LOOKUPS) as pool:
        entries = list(pool.map(partial(_info, filesystem), paths))
    absent = [path for path, entry in zip(paths, entries, strict=True) if entry is None]
    if absent:
        raise InputError(
            f"data source {source}: {len(absent)} of the {len(paths)} shards it names are not there, "
            f"first {absent[0]}; mend the pattern or give the folder"
        )
    return {path: entry for path, entry in zip(paths, entries, strict=True) if entry is not None}


def _list(filesystem: Any, source: str, path: str, suffix: str) -> tuple[str, dict[str, dict]]:
    """(root, path -> listing entry) of one shard or of a folder's shards."""
    if any(letter in without_query(path) for letter in "*?") and not filesystem.exists(path):
        if suffix != ".tar":
            return _list_glob(filesystem, source, path, suffix)
        folder = source.rpartition("/")[0] or "."
        raise InputError(
            f"data source {source}: found a pattern with * or ?, expected a folder or braces: write {folder}"
            f" for all shards in it, or {folder}/{{00000..00012}}.tar"
        )
    path = path.rstrip("/") or path
    if without_query(path).endswith(suffix):
        entry = _info(filesystem, path)
        if entry is None:
            raise InputError(
                f"data source {source}: no such file; give a folder of {suffix} shards or a pattern"
            )
        if entry["type"] == "file":
            return without_query(path).rpartition("/")[0], {path: entry}
    entries = _files_below(filesystem, path)
    if not entries and not filesystem.exists(path):
        raise InputError(
            f"data source {source}: no such folder; give a folder of {suffix} shards or a brace pattern"
        )
    found = _finished(entries, path, suffix)
    if not found:
        raise NoShardsError(
            f"data source {source}: no {suffix} shard in it ({len(entries)} other files); "
            "expected WebDataset shards in the img2dataset layout"
        )
    return path, found


def _list_glob(filesystem: Any, source: str, path: str, suffix: str) -> tuple[str, dict[str, dict]]:
    """(root, path -> listing entry) of a pattern with * or ?; root: the last folder before the first."""
    root = path[: re.search(r"[*?]", path).start()].rpartition("/")[0]  # pyright: ignore[reportOptionalMemberAccess]
    found = _finished(filesystem.glob(path, detail=True), root, suffix)
    if not found:
        raise InputError(f"data source {source}: no file fits this pattern")
    return root, found


def _files_below(filesystem: Any, folder: str) -> dict[str, dict]:
    try:
        return _walk(folder) if _is_local(filesystem) else filesystem.find(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def list_files(source: str, storage_options: dict | None = None) -> dict[str, tuple[str, str]]:
    """Return every file below a folder: its path there -> (path or URL, change token).

    Hidden names are left out. Raises InputError as `scan`.
    """
    filesystem, folder = _filesystem(source, storage_options)
    filesystem.invalidate_cache()
    folder = folder.rstrip("/") or folder
    with _remote_errors(source, filesystem):
        entries = _files_below(filesystem, folder)
        found: dict[str, tuple[str, str]] = {}
        for path, info in sorted(entries.items()):
            relative = path.removeprefix(folder).lstrip("/")
            if any(part.startswith(".") for part in relative.split("/")):
                continue
            shard = _shard(filesystem, "", path, info, settle_seconds=0)
            if shard is not None:
                found[relative] = shard.url, shard.version
    return found


def settled(path: str, seconds: float) -> bool:
    """Return whether a local file was last changed so many seconds ago, or lies elsewhere."""
    return "://" in path or abs(time.time() - Path(path).stat().st_mtime) >= seconds


def _finished(entries: dict[str, dict], root: str, suffix: str) -> dict[str, dict]:
    """Those of some files that are finished shards."""
    return {
        path: entry
        for path, entry in entries.items()
        if _is_shard(without_query(path).removeprefix(root).lstrip("/"), suffix)
    }


def _walk(folder: str) -> dict[str, dict]:
    """Every file below a local folder, also behind links to folders.

    Each folder is read once, by its own name where it lies inside: a link may lead in a circle, or to a part
    of the pool.
    """
    found: dict[str, dict] = {}
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        links: list[str] = []
        for root, folders, files in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(root)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            links += [f"{root}/{name}" for name in folders if Path(root, name).is_symlink()]
            found |= {f"{root}/{name}": {"type": "file"} for name in files}
        waiting += links
    return found


def _is_shard(relative: str, suffix: str) -> bool:
    """Whether a path below the root names a finished shard."""
    parts = relative.removesuffix(suffix).split("/")
    return relative.endswith(suffix) and not any(
        part.startswith(".") or part.endswith((".part", ".tmp")) or not part for part in parts
    )


def shard_name(relative: str, suffix: str) -> str:
    """Return the name of the shard at a path below the source's root."""
    name = relative.removesuffix(suffix).replace("/", "__")
    # Dagster takes "..." in a partition key for a range
    return re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]", "_", name))


def _shard(filesystem: Any, name: str, path: str, info: dict, settle_seconds: float) -> Shard | None:
    """The shard at a path, None where it is gone or may still be being written."""
    if not _is_local(filesystem):
        if info.get("size") is None:
            info = filesystem.info(path)  # a web server's index page tells no sizes
        return Shard(name=name, url=filesystem.unstrip_protocol(path), version=change_token(info))
    try:
        stat = Path(path).stat()
    except FileNotFoundError:
        return None
    if abs(time.time() - stat.st_mtime) < settle_seconds:
        return None
    return Shard(name=name, url=path, version=f"{stat.st_size}-{stat.st_mtime_ns}")


def change_token(info: dict) -> str:
    """Size, and the store's checksum or else its time of change."""
    for fields in _CHANGE_TOKENS:
        values = [info[name] for name in fields if info.get(name)]
        if values:
            return "-".join(str(_plain(value)) for value in (info.get("size"), *values))
    return str(info.get("size"))


def _plain(value: Any) -> Any:
    """A listing gives quoted and bare ETags, times as datetime and as number; one way to write each."""
    value = value.timestamp() if isinstance(value, datetime) else value
    return value.strip('"') if isinstance(value, str) else round(value, 6)


def open_shard(url: str, storage_options: dict | None, *, seekable: bool = False) -> Any:
    """Return a context manager of a shard opened for reading bytes from front to back; raises OSError.

    seekable: for reading here and there; a shard of a web server without ranges is then copied first.
    """
    if "://" not in url:
        return Path(url).open("rb")
    import fsspec

    options = storage_options or {}
    if not url.startswith(("http://", "https://")) or _answers_ranges(url):
        return fsspec.open(url, "rb", **options)
    from aiohttp import ClientTimeout

    # as one answer, however long it takes, as long as bytes come
    whole = {"block_size": 0, "client_kwargs": {"timeout": ClientTimeout(total=None, sock_read=300)}}
    stream = fsspec.open(url, "rb", **{**whole, **options})
    return _copied(stream) if seekable else stream


@contextmanager
def _copied(stream: Any) -> Iterator[Any]:
    with stream as source, tempfile.TemporaryFile() as copy:
        while data := source.read(1 << 20):
            copy.write(data)
        copy.seek(0)
        yield copy


_RANGES: dict[str, bool] = {}  # by server


def _answers_ranges(url: str) -> bool:
    """Whether a web server says that it answers range requests, or does not let itself be asked."""
    server = "/".join(url.split("/")[:3])
    if server not in _RANGES:
        try:
            with urlopen(Request(url, method="HEAD"), timeout=30) as answer:
                _RANGES[server] = answer.headers.get("Accept-Ranges") == "bytes"
        except (OSError, HTTPException):  # the latter: user:password@ without a port
            return True
    return _RANGES[server]
