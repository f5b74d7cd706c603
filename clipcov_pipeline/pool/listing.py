"""Finds the shards of a source: a folder, a pattern, an fsspec URL. A token tells when one changes."""

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.image_folder import (
    FILE_NAME,
    LINES,
    TABLES,
    is_inside,
    parse_table,
    token_of_lines,
)
from clipcov_pipeline.pool.opening import open_shard

_CHANGE_TOKENS = (
    ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "checksum", "generation"),
    ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "modified", "created"),
)


PARQUET = ".parquet"
_SUFFIXES = (".tar", PARQUET)
_SUFFIX = re.compile(r"\.(tar|parquet|csv|jsonl)$")

_PARALLEL_LOOKUPS = 16


@dataclass(frozen=True)
class Shard:
    """One tar of a pool, or a part of it that `raw_shards` packs into one.

    name: partition key, unique in the pool, of `[A-Za-z0-9._-]`: the path below the source's root without
    its suffix, with `/` written as `__`. url: local path or fsspec URL. version: a token from the file
    system's listing that changes when the file does (size and time of change, or the store's ETag); not a
    digest. lines: from and to of a table beside images, whose ``url`` it then is.
    """

    name: str
    url: str
    version: str
    lines: tuple[int, int] | None = None

    @property
    def is_tar(self) -> bool:
        """Whether it can be read as it is."""
        return self.lines is None and not self.url.endswith(PARQUET)


def scan(source: str, storage_options: dict | None = None, *, settle_seconds: float = 0) -> list[Shard]:
    """Return the shards of a source, sorted by name; hidden names and `.part`, `.tmp` are left out.

    Args:
        source: a folder (searched through all its levels), one file, a brace pattern
            (`pool/{00000..00012}.tar`) or one with * and ?, each a local path or an fsspec URL. Of a folder
            its tars are taken; where it has none, its images by ``metadata.csv`` or ``.jsonl``, or else its
            parquet files.
        storage_options: fsspec's.
        settle_seconds: a local shard changed less than so long ago may still be being written: it is left
            for the next scan.

    Raises:
        InputError: nothing there, no shard in the folder, a pattern that names absent shards, an unknown
            protocol or one whose driver is not installed, two shards that would get one name.
    """
    filesystem, path = _filesystem(source, storage_options)
    filesystem.invalidate_cache()  # fsspec keeps listings for the life of the process
    with _remote_errors(source, filesystem):
        if _is_pattern(filesystem, source, path):
            root, entries = _list_pattern(filesystem, source)
        else:
            root, entries = _list(filesystem, source, path)
    shards: dict[str, Shard] = {}
    for path, info in sorted(entries.items()):
        name = _shard_name(path.removeprefix(root).lstrip("/"))
        for shard in _shards_at(filesystem, name, path, info, settle_seconds, storage_options):
            if shard.name in shards:
                raise InputError(
                    f"data source {source}: {shards[shard.name].url} and {shard.url} both get the shard name "
                    f"{shard.name!r}; rename one of them"
                )
            shards[shard.name] = shard
    return [shards[name] for name in sorted(shards)]


def _shards_at(
    filesystem: Any, name: str, path: str, info: dict, settle_seconds: float, storage_options: dict | None
) -> list[Shard]:
    """What a file of the listing is: one shard, several lines each of a table, none while it is written."""
    shard = _shard(filesystem, name, path, info, settle_seconds)
    if shard is None:
        return []
    return [shard] if not _is_table(path) else _of_table(filesystem, shard, path, storage_options)


def _of_table(filesystem: Any, table: Shard, path: str, storage_options: dict | None) -> list[Shard]:
    """The lines of a table beside images, `LINES` a shard, whose token changes with its images', too."""
    with open_shard(table.url, storage_options) as file:
        lines = parse_table(table.url, file.read()).lines
    folder = path.rpartition("/")[0]
    images = _image_tokens(filesystem, folder, [values.get(FILE_NAME) for _, values in lines if values])
    starts = range(0, len(lines), LINES)
    return [
        Shard(
            f"{table.name}-{start // LINES:05d}",
            table.url,
            token_of_lines(part, images),
            (start, start + len(part)),
        )
        for start in starts
        if (part := lines[start : start + LINES])
    ]


def _image_tokens(filesystem: Any, folder: str, names: list[Any]) -> dict[str, str]:
    """The tokens of the images that are there, by their names below a folder."""
    inside = [name for name in names if isinstance(name, str) and name and is_inside(name)]
    if not _is_local(filesystem):
        found = filesystem.find(folder, detail=True)
        paths = {name: f"{folder}/{name}" for name in inside}
        return {name: change_token(found[path]) for name, path in paths.items() if path in found}
    tokens = {}
    for name in inside:
        with suppress(OSError):
            status = Path(folder, name).stat()
            tokens[name] = f"{status.st_size}-{status.st_mtime_ns}"
    return tokens


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
        ) from error


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


def _list(filesystem: Any, source: str, path: str) -> tuple[str, dict[str, dict]]:
    """(root, path -> listing entry) of one tar or of a folder's tars."""
    if any(letter in path for letter in "*?") and not filesystem.exists(path):
        return _glob(filesystem, source, path)
    path = path.rstrip("/") or path
    if path.endswith(_SUFFIXES) or _is_table(path):
        entry = _info(filesystem, path)
        if entry is None:
            raise InputError(f"data source {source}: no such file; give a folder of .tar shards or a pattern")
        if entry["type"] == "file":
            return path.rpartition("/")[0], {path: entry}
    try:
        entries = _walk(path) if _is_local(filesystem) else filesystem.find(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        entries = {}
    if not entries and not filesystem.exists(path):
        raise InputError(
            f"data source {source}: no such folder; give a folder of .tar shards or a brace pattern"
        )
    found = {
        name: entry for name, entry in entries.items() if _is_finished(name.removeprefix(path).lstrip("/"))
    }
    for is_kind in (_is_tar, _is_table, _is_parquet):
        if kind := {name: entry for name, entry in found.items() if is_kind(name)}:
            return path, kind
    raise InputError(
        f"data source {source}: no .tar shard in it ({len(entries)} other files), no metadata.csv or"
        " metadata.jsonl, no .parquet; expected WebDataset shards in the img2dataset layout, or one of these"
    )


def _glob(filesystem: Any, source: str, path: str) -> tuple[str, dict[str, dict]]:
    """(root, path -> listing entry) of a pattern with * and ?; root: the last folder before them."""
    found = {
        name: info for name, info in filesystem.glob(path, detail=True).items() if name.endswith(_SUFFIXES)
    }
    if not found:
        raise InputError(
            f"data source {source}: found no .tar or .parquet by this pattern; give a folder, or a pattern"
            " that names shards"
        )
    return re.split(r"[*?]", path)[0].rpartition("/")[0], found


def _is_tar(path: str) -> bool:
    return path.endswith(".tar")


def _is_parquet(path: str) -> bool:
    return path.endswith(PARQUET)


def _is_table(path: str) -> bool:
    return path.rpartition("/")[2] in TABLES


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


def _is_finished(relative: str) -> bool:
    """Whether no part of a path below the root is hidden or says that it is being written."""
    parts = _SUFFIX.sub("", relative).split("/")
    return not any(part.startswith(".") or part.endswith((".part", ".tmp")) or not part for part in parts)


def _shard_name(relative: str) -> str:
    name = _SUFFIX.sub("", relative).replace("/", "__")
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
