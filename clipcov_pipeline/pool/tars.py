"""Reads the members of a tar in one forward pass and puts them together to samples."""

import hashlib
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, TypeVar

from clipcov_pipeline.pool.captions import parse_meta
from clipcov_pipeline.pool.listing import COMPRESSIONS, Shard, open_shard
from clipcov_pipeline.pool.pixels import IMAGE_EXTENSIONS

# WebDataset's rule: the key ends at the first dot of the base name, folders belong to the key.
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")

_META_MEMBER = re.compile(r"__[^/]*__($|/)")

_T = TypeVar("_T")


# tarfile copies what is left of its buffer at every header: larger is slower.
_READ_BYTES = 1 << 16


@dataclass
class Group:
    """The members of one sample, in the tar's order: (suffix as stored, bytes).

    places: (offset of its bytes in the tar, size) of each member by its suffix in lower case; a member that
    is stored sparse has none.
    """

    key: str
    members: list[tuple[str, bytes]] = field(default_factory=list)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
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
        return self.read_meta()[0]

    def read_meta(self) -> tuple[dict[str, Any] | None, str | None]:
        """The json as a dict, and why there is a json but no dict."""
        return parse_meta(self.get("json"))


def iter_groups(
    shard: Shard, keys: Container[str] | None, storage_options: dict | None = None
) -> Iterator[Group]:
    """Yield samples as `samples.iter_samples` does, with all members of each as they are stored."""
    with open_shard(shard.url, storage_options) as file:
        for group in read_groups(_Reader(file), load=lambda key, _: keys is None or key in keys):
            if group.first and group.damage is None and (keys is None or group.key in keys):
                yield group


def iter_all_groups(shard: Shard, suffixes: Container[str]) -> Iterator[Group]:
    """Yield every sample of a shard with its members of these suffixes, damaged and repeated ones included.

    Raises:
        NotATarError: the file is no tar.
        OSError: it cannot be read.
    """
    with open_shard(shard.url, None) as file:
        yield from read_groups(_Reader(file), load=lambda _, suffix: suffix in suffixes)


class NotATarError(ValueError):
    """The file does not begin with a tar header."""


class StrictTarInfo(tarfile.TarInfo):
    """Reports a damaged header; tarfile itself takes one after the first member for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictTarInfo":
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


class DigestReader(_Reader):
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


def read_groups(reader: _Reader, load: Callable[[str, str], bool]) -> Iterator[Group]:
    """Group a tar's members to samples by WebDataset's rule.

    As in open_clip_train's reader, a new sample begins where the key changes or a suffix comes again: members
    of one sample that are not neighbours make two samples, of which the second has `first=False`. Where the
    tar breaks off, the sample in hand has `damage` set (whether it was complete cannot be known) and is the
    last.

    Args:
        reader: of the whole file.
        load: (key, suffix) -> whether this member's bytes are wanted.

    Raises:
        NotATarError: the file is no tar.
    """
    stream: Any = reader  # tarfile needs no more than read() of it
    try:
        tar: Any = tarfile.open(fileobj=stream, mode="r|", bufsize=_READ_BYTES, tarinfo=StrictTarInfo)  # noqa: SIM115
    except tarfile.TarError as error:
        raise NotATarError(why_no_tar(reader.head, error)) from None
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
            if not member.issparse():
                group.places[suffix.lower()] = member.offset_data, member.size
            if load(key, suffix.lower()):
                data = tar.extractfile(member)
                group.members.append((suffix, data.read() if data else b""))
    except tarfile.ReadError as error:
        group = group or Group(key="")
        group.damage = f"the tar breaks off: {error}"
    if group is not None:
        yield group


def key_and_suffix(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """Return a member's key and suffix by WebDataset's rule; key None where it belongs to no sample."""
    if not member.isreg() or _META_MEMBER.match(member.name):
        return None, ""
    # tarfile carries bytes that are no UTF-8 as lone surrogates, which no table can store
    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    match = _KEY_AND_SUFFIX.match(name)
    return (match[1], match[2]) if match else (None, "")


def why_no_tar(head: bytes, error: Exception) -> str:
    """Say what a file is by its first 8 bytes, or what tarfile says of it."""
    if not head:
        return "not a tar: the file is empty"
    for magic, kind in COMPRESSIONS.items():
        if head.startswith(magic):
            return f"not a plain tar: the file is compressed with {kind}; shards are uncompressed"
    return f"not a tar: {error}"


def map_in_order(
    function: Callable[[Group], _T], groups: Iterator[Group], workers: int | None = None
) -> Iterator[_T]:
    """Map in threads, in order, with a bounded number of groups in memory; Pillow decodes without the GIL."""
    workers = workers or min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(function, group) for group in islice(groups, 4 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, group) for group in islice(groups, 1))
