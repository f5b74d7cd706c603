"""WebDataset shards in the img2dataset layout: find them, check every sample, read samples back.

A shard is one uncompressed tar; a sample is the run of neighbouring members that share a key
(`KEY.jpg`, `KEY.txt`, `KEY.json`). Everything is one forward pass over the tar, so a shard may be larger than
memory and may lie on any file system that fsspec reads. Nothing that is wrong inside a shard stops the
reading: each sample gets a status with a reason (issue 2, item 5).
"""

import hashlib
import io
import json
import os
import re
import tarfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import polars as pl

from clipcov_pipeline.errors import InputError

# In open_clip_train's order of preference, for a sample that has several.
IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp")
# What may be inside a file with one of these extensions: crawlers often keep the address's extension.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

MANIFEST_SCHEMA = {
    "uid": pl.String,
    "key": pl.String,
    "shard": pl.String,
    "caption": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "status": pl.String,
    "reason": pl.String,
    "image_ext": pl.String,
    "image_sha256": pl.String,
}

# WebDataset's rule: the key ends at the first dot of the base name, folders belong to the key.
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META_MEMBER = re.compile(r"__[^/]*__($|/)")
_UID = re.compile(r"[0-9a-fA-F]{32}")
_CHANGE_TOKENS = (
    ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "checksum", "generation"),
    ("LastModified", "Last-Modified", "last_modified", "mtime", "updated", "modified", "created"),
)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_PARALLEL_LOOKUPS = 16
_T = TypeVar("_T")
# tarfile copies what is left of its buffer at every header: larger is slower.
_READ_BYTES = 1 << 16


class SampleStatus(StrEnum):
    """Why a sample is or is not usable; where several hold, the first below (after `ok`) is given."""

    ok = "ok"
    truncated = "truncated"
    duplicate_key = "duplicate_key"
    missing_image = "missing_image"
    missing_caption = "missing_caption"
    non_utf8_caption = "non_utf8_caption"
    empty_caption = "empty_caption"
    too_many_pixels = "too_many_pixels"
    undecodable_image = "undecodable_image"
    duplicate_uid = "duplicate_uid"


@dataclass(frozen=True)
class Shard:
    """One tar of a pool.

    name: partition key, unique in the pool, of `[A-Za-z0-9._-]`: the path below the source's root without
    `.tar`, with `/` written as `__`. url: local path or fsspec URL. version: a token from the file system's
    listing that changes when the file does (size and time of change, or the store's ETag); not a digest.
    """

    name: str
    url: str
    version: str


@dataclass(frozen=True)
class ShardReport:
    """What `read_shard` found.

    manifest: one row a sample, in the tar's order, columns as `MANIFEST_SCHEMA`; `status` is a
    `SampleStatus`, `reason` is null where it is `ok`, `uid` is unique among the rows that are `ok`.
    sha256: of the whole file, hex.
    quarantined: why the file is not a tar at all (the manifest is then empty), else None.
    """

    manifest: pl.DataFrame
    sha256: str
    quarantined: str | None


@dataclass(frozen=True)
class Sample:
    """One image-caption pair; `image` is the file as stored (not decoded), `caption` is stripped."""

    key: str
    image: bytes
    image_ext: str
    caption: str
    meta: dict[str, Any] | None


@dataclass
class Group:
    """The members of one sample, in the tar's order: (suffix as stored, bytes)."""

    key: str
    members: list[tuple[str, bytes]] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)
    first: bool = True
    damage: str | None = None

    def get(self, suffix: str) -> bytes | None:
        """Bytes of the member with this suffix, in any case of letters."""
        return next((data for name, data in self.members if name.lower() == suffix), None)

    def image(self) -> tuple[str, bytes] | None:
        """(extension, bytes) of the image, None where there is none."""
        for extension in IMAGE_EXTENSIONS:
            if (data := self.get(extension)) is not None:
                return extension, data
        return None

    def meta(self) -> dict[str, Any] | None:
        """The json as a dict; None where there is none or it is broken, which is no reason to lose a pair."""
        try:
            meta = json.loads(self.get("json") or b"")
        except (ValueError, RecursionError):
            return None
        return meta if isinstance(meta, dict) else None


def scan(source: str, storage_options: dict | None = None, *, settle_seconds: float = 0) -> list[Shard]:
    """The shards of a source, sorted by name.

    source: a folder (searched through all its levels), one tar, or a brace pattern
    (`pool/{00000..00012}.tar`), each a local path or an fsspec URL. Hidden names and names that end in
    `.part` or `.tmp` are left out. A local shard changed less than `settle_seconds` ago may still be being
    written: it is left for the next scan.

    Raises InputError: nothing there, no `.tar` in the folder, a pattern that names absent shards, an unknown
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


def read_shard(
    shard: Shard,
    *,
    max_pixels: int,
    storage_options: dict | None = None,
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> ShardReport:
    """Check every sample of a shard and give it a status; one pass, which also takes the file's sha256.

    Every image is decoded to RGB, after its header has shown at most `max_pixels` pixels (width x height).
    The report is a function of the file's bytes and `max_pixels` alone. `progress` is called with the number
    of further samples done, as tqdm's `update` is. workers: threads that decode; one a core, at most 16, by
    default. Raises OSError where the file cannot be read.
    """
    rows: list[dict] = []
    seen_uids: set[str] = set()
    quarantined = None
    check = partial(_check, shard_name=shard.name, max_pixels=max_pixels)
    with _open(shard.url, storage_options) as file, warnings.catch_warnings():
        # what Pillow warns of (large images, damaged EXIF, odd palettes) is either checked here or harmless
        warnings.simplefilter("ignore")
        reader = _DigestReader(file)
        try:
            for row in map_in_order(check, _read_groups(reader, load=_is_checked), workers):
                if row["status"] == SampleStatus.ok:
                    if row["uid"] in seen_uids:
                        row["status"] = SampleStatus.duplicate_uid
                        row["reason"] = "an earlier sample of this shard has the same uid"
                    seen_uids.add(row["uid"])
                rows.append(row)
                if progress is not None:
                    progress(1)
        except NotATarError as error:
            quarantined = str(error)
        digest = reader.finish()
    manifest = pl.DataFrame([{**row, "status": str(row["status"])} for row in rows], schema=MANIFEST_SCHEMA)
    return ShardReport(manifest=manifest, sha256=digest, quarantined=quarantined)


def iter_samples(
    shard: Shard, keys: Container[str] | None, storage_options: dict | None = None
) -> Iterator[Sample]:
    """The samples of a shard with these keys (as in the manifest), in the tar's order, streaming.

    `keys=None` gives every sample that has an image and a readable caption. Images are not decoded here: take
    the keys from the manifest's `ok` rows. Of several samples with one key the first counts, as there.
    Raises NotATarError for a file that is no tar.
    """
    for group in iter_groups(shard, keys, storage_options):
        image, (caption, status) = group.image(), _caption(group)
        if image is None or caption is None or status is not SampleStatus.ok:
            continue
        extension, data = image
        yield Sample(key=group.key, image=data, image_ext=extension, caption=caption, meta=group.meta())


def iter_groups(
    shard: Shard, keys: Container[str] | None, storage_options: dict | None = None
) -> Iterator[Group]:
    """As `iter_samples`, but all members of each sample as they are stored."""
    with _open(shard.url, storage_options) as file:
        for group in _read_groups(_Reader(file), load=lambda key, _: keys is None or key in keys):
            if group.first and group.damage is None and (keys is None or group.key in keys):
                yield group


def iter_all_groups(shard: Shard, suffixes: Container[str]) -> Iterator[Group]:
    """Every sample of a shard with its members of these suffixes, damaged and repeated samples included.

    Raises NotATarError for a file that is no tar, OSError where it cannot be read.
    """
    with _open(shard.url, None) as file:
        yield from _read_groups(_Reader(file), load=lambda _, suffix: suffix in suffixes)


def read_images(
    shard: Shard, keys: Collection[str], storage_options: dict | None = None
) -> Iterator[tuple[str, bytes]]:
    """(key, image as stored) of these keys, as far as the shard still holds them; for looking at a few.

    Headers and these images are read, nothing else; the headers once a process. Images are not checked.
    Raises OSError where the file cannot be read and NotATarError for a file that is no tar.
    """
    places = _image_places(shard.url, shard.version, json.dumps(storage_options or {}, sort_keys=True))
    wanted = places.filter(pl.col("key").is_in(list(keys)))
    if wanted.height:
        with _open(shard.url, storage_options) as file:
            for key, offset, size in wanted.iter_rows():
                file.seek(offset)
                yield key, file.read(size)


@cache  # every gallery looks into every shard; a table takes a few dozen bytes a sample
def _image_places(url: str, version: str, storage_options: str) -> pl.DataFrame:  # noqa: ARG001 (a changed shard has another version)
    """key, offset and size of the image of each key's first sample, in the tar's order."""
    places: dict[str, dict[str, tuple[int, int]]] = {}
    current = None
    with _open(url, json.loads(storage_options)) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:", tarinfo=_StrictTarInfo)  # noqa: SIM115
        except tarfile.TarError as error:
            file.seek(0)
            raise NotATarError(_why_no_tar(file.read(8), error)) from None
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
                key, suffix = key_and_suffix(member)
                if key is None or (key != current and key in places):
                    continue
                current = key
                places.setdefault(key, {}).setdefault(suffix.lower(), (member.offset_data, member.size))
        except tarfile.TarError:
            pass  # it breaks off: what came before can be read
    found = [
        (key, *next(by_suffix[suffix] for suffix in IMAGE_EXTENSIONS if suffix in by_suffix))
        for key, by_suffix in places.items()
        if not by_suffix.keys().isdisjoint(IMAGE_EXTENSIONS)
    ]
    schema = {"key": pl.String, "offset": pl.Int64, "size": pl.Int64}
    return pl.DataFrame(found, schema=schema, orient="row")


def uid_of(shard_name: str, key: str, meta: dict | None) -> str:
    """A sample's uid, 32 lower-case hex digits: the json's `uid` if it is one, else sha256 of `shard/key`."""
    given = (meta or {}).get("uid")
    if isinstance(given, str) and _UID.fullmatch(given):
        return given.lower()
    return hashlib.sha256(f"{shard_name}/{key}".encode()).hexdigest()[:32]


# --- inside a tar ---------------------------------------------------------------------------------


class NotATarError(ValueError):
    """The file does not begin with a tar header."""


class _StrictTarInfo(tarfile.TarInfo):
    """Reports a damaged header; tarfile itself takes one after the first member for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EmptyHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError("the file ends without the end-of-archive mark") from None
        except tarfile.TruncatedHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError("the file ends inside a member's header") from None
        except tarfile.InvalidHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError("a member's header is damaged") from None


class _Reader:
    """Reads a file forward and remembers its first bytes."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.head = b""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if len(self.head) < 8:
            self.head += data[:8]
        return data


class _DigestReader(_Reader):
    """Takes the file's sha256 on the way, which can cost more than the reading."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self._sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self._sha256.update(data)
        return data

    def finish(self) -> str:
        """Read what is left; the digest of the whole file in hex."""
        while self.read(1 << 20):
            pass
        return self._sha256.hexdigest()


def _read_groups(reader: _Reader, load: Callable[[str, str], bool]) -> Iterator[Group]:
    """Group a tar's members to samples by WebDataset's rule.

    load(key, suffix): whether this member's bytes are wanted. As in open_clip_train's reader, a new sample
    begins where the key changes or a suffix comes again: members of one sample that are not neighbours make
    two samples, of which the second has `first=False`. Where the tar breaks off, the sample in hand has
    `damage` set (whether it was complete cannot be known) and is the last. Raises NotATarError.
    """
    stream: Any = reader  # tarfile needs no more than read() of it
    try:
        tar: Any = tarfile.open(fileobj=stream, mode="r|", bufsize=_READ_BYTES, tarinfo=_StrictTarInfo)  # noqa: SIM115
    except tarfile.TarError as error:
        raise NotATarError(_why_no_tar(reader.head, error)) from None
    seen: set[str] = set()
    group: Group | None = None
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # else tarfile keeps every header of the archive
            key, suffix = key_and_suffix(member)
            if key is None:
                continue
            if group is None or key != group.key or suffix.lower() in group.suffixes:
                if group is not None:
                    yield group
                group = Group(key=key, first=key not in seen)
                seen.add(key)
            group.suffixes.add(suffix.lower())
            if load(key, suffix.lower()):
                data = tar.extractfile(member)
                group.members.append((suffix, data.read() if data else b""))
    except tarfile.ReadError as error:
        group = group or Group(key="")
        group.damage = f"the tar breaks off: {error}"
    if group is not None:
        yield group


def key_and_suffix(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """A member's key and suffix by WebDataset's rule; key None where it belongs to no sample."""
    if not member.isreg() or _META_MEMBER.match(member.name):
        return None, ""
    # tarfile carries bytes that are no UTF-8 as lone surrogates, which no table can store
    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    match = _KEY_AND_SUFFIX.match(name)
    return (match[1], match[2]) if match else (None, "")


def _why_no_tar(head: bytes, error: Exception) -> str:
    if not head:
        return "not a tar: the file is empty"
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            return f"not a plain tar: the file is compressed with {kind}; shards are uncompressed"
    return f"not a tar: {error}"


# --- one sample -----------------------------------------------------------------------------------


def _is_checked(_key: str, suffix: str) -> bool:
    return suffix in IMAGE_EXTENSIONS or suffix in ("txt", "json")


def map_in_order(
    function: Callable[[Group], _T], groups: Iterator[Group], workers: int | None = None
) -> Iterator[_T]:
    """As `map`, in threads, with a bounded number of groups in memory; Pillow decodes without the GIL."""
    workers = workers or min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(function, group) for group in islice(groups, 4 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, group) for group in islice(groups, 1))


def _check(group: Group, shard_name: str, max_pixels: int) -> dict:
    """The manifest's row of one sample."""
    row: dict[str, Any] = dict.fromkeys(MANIFEST_SCHEMA)
    row.update(uid=uid_of(shard_name, group.key, group.meta()), key=group.key, shard=shard_name)
    row["status"], row["reason"] = _status(group, max_pixels, row)
    return row


def _status(group: Group, max_pixels: int, row: dict) -> tuple[SampleStatus, str | None]:
    """Status and reason; fills in the caption and what is known of the image on the way."""
    if group.damage is not None:
        return SampleStatus.truncated, group.damage
    image, (caption, caption_status) = group.image(), _caption(group)
    row["caption"] = caption
    if image is not None:
        row["image_ext"], row["image_sha256"] = image[0], hashlib.sha256(image[1]).hexdigest()
    found = ", ".join(f".{suffix}" for suffix in sorted(group.suffixes))
    if not group.first:
        return (
            SampleStatus.duplicate_key,
            f"an earlier sample of this shard has the same key (here: {found}); "
            "the members of a sample must be neighbours in the tar",
        )
    if image is None:
        return SampleStatus.missing_image, f"no .jpg, .jpeg, .png or .webp member (there: {found})"
    if caption_status is SampleStatus.missing_caption:
        return caption_status, f"no .txt member (there: {found})"
    if caption_status is SampleStatus.non_utf8_caption:
        return caption_status, "the .txt member is not UTF-8"
    if caption_status is SampleStatus.empty_caption:
        return caption_status, "the .txt member has nothing but white space"
    return _check_image(image[1], max_pixels, row)


def _caption(group: Group) -> tuple[str | None, SampleStatus]:
    data = group.get("txt")
    if data is None:
        return None, SampleStatus.missing_caption
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return None, SampleStatus.non_utf8_caption
    return (caption, SampleStatus.ok) if caption else (None, SampleStatus.empty_caption)


def _check_image(data: bytes, max_pixels: int, row: dict) -> tuple[SampleStatus, str | None]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            row["width"], row["height"] = image.size
            if image.width * image.height > max_pixels:
                return (
                    SampleStatus.too_many_pixels,
                    f"{image.width} x {image.height} = {image.width * image.height} pixels, "
                    f"over the bound of {max_pixels}",
                )
            image.convert("RGB")
    except Image.DecompressionBombError as error:
        return SampleStatus.too_many_pixels, str(error)
    except UnidentifiedImageError:
        return SampleStatus.undecodable_image, f"not an image of the formats {', '.join(IMAGE_FORMATS)}"
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise all sorts
        # an address in the text would make the manifest differ from one run to the next
        text = re.sub(r"0x[0-9a-fA-F]+", "0x...", str(error)) or type(error).__name__
        return SampleStatus.undecodable_image, text
    return SampleStatus.ok, None


# --- finding shards -------------------------------------------------------------------------------


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
    path = path.rstrip("/") or path
    if path.endswith(".tar"):
        entry = _info(filesystem, path)
        if entry is None:
            raise InputError(f"data source {source}: no such file; give a folder of .tar shards or a pattern")
        if entry["type"] == "file":
            return path.rpartition("/")[0], {path: entry}
    try:
        entries = filesystem.find(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        entries = {}
    if not entries and not filesystem.exists(path):
        raise InputError(
            f"data source {source}: no such folder; give a folder of .tar shards or a brace pattern"
        )
    found = {name: entry for name, entry in entries.items() if _is_shard(name.removeprefix(path).lstrip("/"))}
    if not found:
        raise InputError(
            f"data source {source}: no .tar shard in it ({len(entries)} other files); "
            "expected WebDataset shards in the img2dataset layout"
        )
    return path, found


def _is_shard(relative: str) -> bool:
    """Whether a path below the root names a finished shard."""
    parts = relative.removesuffix(".tar").split("/")
    return relative.endswith(".tar") and not any(
        part.startswith(".") or part.endswith((".part", ".tmp")) or not part for part in parts
    )


def _shard_name(relative: str) -> str:
    name = relative.removesuffix(".tar").replace("/", "__")
    # Dagster takes "..." in a partition key for a range
    return re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]", "_", name))


def _shard(filesystem: Any, name: str, path: str, info: dict, settle_seconds: float) -> Shard | None:
    """The shard at a path, None where it is gone or may still be being written."""
    if not _is_local(filesystem):
        if info.get("size") is None:
            info = filesystem.info(path)  # a web server's index page tells no sizes
        return Shard(name=name, url=filesystem.unstrip_protocol(path), version=_change_token(info))
    try:
        stat = Path(path).stat()
    except FileNotFoundError:
        return None
    if abs(time.time() - stat.st_mtime) < settle_seconds:
        return None
    return Shard(name=name, url=path, version=f"{stat.st_size}-{stat.st_mtime_ns}")


def _change_token(info: dict) -> str:
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


def _open(url: str, storage_options: dict | None) -> Any:
    """Context manager of a file opened for reading bytes."""
    if "://" not in url:
        return Path(url).open("rb")
    import fsspec

    return fsspec.open(url, "rb", **(storage_options or {}))
