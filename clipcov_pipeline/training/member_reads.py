"""Positioned reads of image and caption from local tars: no tar is walked, no file stays open a sample.

Nothing is trained on that is not what was recorded: a shard's token is compared at every use of it, and a
member's tar header and digests when it is first read in a process.
"""

import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.captions import NoCaptionError, caption_digest
from clipcov_pipeline.pool.places import short_hash
from clipcov_pipeline.training.training_index import TrainingIndex

HEADER = 512  # bytes of a tar header, right before its member's content
MOST_OPEN = 64  # shards that a process keeps open; a file descriptor each
# image and caption of a sample lie side by side, but for a small json: one read takes both
_SPAN_GAP = 1 << 14
_NAME_FIELD = 100  # bytes; of a longer name the header holds the first ones only
Pair = tuple[bytes, tuple[str, ...]]


class MemberReads:
    """Reads samples of an index from local files.

    index: what is read; files: local path of each shard where it is not the shard itself (sparse copies of
    remote ones, whose tokens were compared when they were fetched).
    """

    def __init__(self, index: TrainingIndex, files: Sequence[str] | None = None) -> None:
        self._index, self._files = index, files
        self._open: OrderedDict[int, int] = OrderedDict()
        self._checked = np.zeros(len(index), bool)

    def __getstate__(self) -> dict[str, object]:
        """Another process opens its own files."""
        return {**self.__dict__, "_open": OrderedDict()}

    def expect(self, rows: npt.NDArray[np.int64]) -> None:
        """Have the system read rows ahead, all at once, while the first of them are worked on.

        On a cold disk each would be waited for in turn.

        Raises:
            InputError: as `read`.
        """
        if hasattr(os, "posix_fadvise"):
            for row in rows.tolist():
                at = Places(self._index, row)
                os.posix_fadvise(self._file(at.shard), at.first, at.span, os.POSIX_FADV_WILLNEED)

    def read(self, row: int) -> Pair:
        """(image file, the captions that may count) of a row; the image's bytes as stored.

        Raises:
            InputError: the shard is gone or is not what it was when its places were recorded.
        """
        at = Places(self._index, row)
        file = self._file(at.shard)
        if at.span <= at.wanted + _SPAN_GAP:
            parts = at.cut(self._exactly(file, at.first, at.span, at))
        else:
            parts = [self._exactly(file, start - HEADER, HEADER + size, at) for start, size in at.members]
        texts = {suffix: part[HEADER:] for suffix, part in zip(at.suffixes[1:], parts[1:], strict=True)}
        try:
            captions = self._index.rule.captions(texts.get)
        except NoCaptionError as error:
            raise self._changed(at.shard, str(error)) from None
        if not self._checked[row]:
            self._check(at, parts, captions)
            self._checked[row] = True
        return parts[0][HEADER:], captions

    def _exactly(self, file: int, offset: int, size: int, at: "Places") -> bytes:
        data = os.pread(file, size, offset)
        while 0 < len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
            data += more
        if len(data) != size:
            raise self._changed(at.shard, f"it ends before byte {offset + size}")
        return data

    def _file(self, shard: int) -> int:
        """File descriptor of a shard, which is as recorded."""
        file = self._open.get(shard)
        if file is None:
            if len(self._open) >= MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
            file = self._open[shard] = self._opened(shard)
        else:
            self._open.move_to_end(shard)
        if self._files is None:
            stat = os.fstat(file)
            token = f"{stat.st_size}-{stat.st_mtime_ns}"
            if token != self._index.versions[shard]:
                raise changed(self._index, shard, token)
        return file

    def _opened(self, shard: int) -> int:
        path = self._index.shards[shard] if self._files is None else self._files[shard]
        try:
            return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise gone(self._index, shard) from None

    def _check(self, at: "Places", parts: Sequence[bytes], captions: Sequence[str]) -> None:
        """Compare headers and digests with what was recorded."""
        index, row = self._index, at.row
        for part, suffix in zip(parts, at.suffixes, strict=True):
            if problem := _header_problem(part[:HEADER], suffix, len(part) - HEADER):
                raise self._changed(at.shard, problem)
        if index.image_hash is not None and _hash(parts[0][HEADER:]) != index.image_hash[row]:
            raise self._changed(at.shard, f"the image at byte {at.members[0][0]} is another")
        if index.caption_hash is not None and short_hash(caption_digest(captions)) != index.caption_hash[row]:
            raise self._changed(at.shard, f"the caption at byte {at.members[1][0]} is another")

    def _changed(self, shard: int, found: str) -> InputError:
        where = self._index.shards[shard] if self._files is None else self._files[shard]
        try:
            stat = Path(where).stat()
            token = f"{stat.st_size}-{stat.st_mtime_ns}"
        except OSError:
            token = "none"
        return changed(
            self._index, shard, token if self._files is None else self._index.versions[shard], found
        )


class Places:
    """Where the members of one row lie that are read: the image, then those that its caption is in.

    members: (offset, size) of each in bytes; suffixes: of each. first, span: of the piece that holds all of
    them; wanted: bytes that are read of it.
    """

    __slots__ = ("first", "members", "row", "shard", "span", "suffixes", "wanted")

    def __init__(self, index: TrainingIndex, row: int) -> None:
        self.row, self.shard = row, int(index.shard[row])
        places = [(int(offset[row]), int(size[row])) for offset, size in index.members]
        image, caption, *json = places
        # a sample without one of the two kinds: the caption's place is the other's, see `places_of`
        json = [place for place in json if place[0] and place != caption]
        self.members = [image, caption, *json]
        is_json = index.rule.members == ("json",) or (len(places) > 2 and places[2] == caption)
        texts = ("json",) if is_json else ("txt", "json")[: 1 + len(json)]
        self.suffixes = (index.extensions[index.image_ext[row]], *texts)
        self.first = min(offset for offset, _ in self.members) - HEADER
        self.span = max(offset + size for offset, size in self.members) - self.first
        self.wanted = sum(size + HEADER for _, size in self.members)

    def cut(self, data: bytes) -> list[bytes]:
        """Header and content of each member, from the bytes of the whole span."""
        starts = [(offset - self.first, size) for offset, size in self.members]
        return [data[start - HEADER : start + size] for start, size in starts]


def changed(index: TrainingIndex, shard: int, token: str, found: str = "") -> InputError:
    """The error of a shard that is not what its places were recorded of; found: what its bytes say."""
    name, expected = index.shards[shard], index.versions[shard]
    if token == expected:
        return InputError(
            f"shard {name} is not as recorded: {found}, while its token is, {token}: it was changed in place,"
            " or what serves it gives other bytes; try again, or run the pipeline again"
        )
    what = f" ({found})" if found else ""
    return InputError(
        f"shard {name} changed since its places were recorded{what}: found token {token}, expected"
        f" {expected}; put the shard back or run the pipeline again"
    )


def gone(index: TrainingIndex, shard: int) -> InputError:
    """The error of a shard that is not there."""
    samples = int(np.count_nonzero(index.shard == shard))
    return InputError(
        f"shard {index.shards[shard]} is gone: found no file, expected token {index.versions[shard]};"
        f" {samples} samples of the subset lie in it: put it back or run the pipeline again"
    )


def _hash(data: bytes) -> int:
    return short_hash(hashlib.sha256(data).hexdigest())


def _header_problem(header: bytes, suffix: str, size: int) -> str | None:
    """What is wrong with a member's header, None where it is the expected one."""
    if _plainly_right(header, suffix, size):
        return None
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:  # pyright: ignore[reportAttributeAccessIssue]
        return f"no tar header where .{suffix} of {size} bytes was: {error}"
    found = member.name.rpartition("/")[2].partition(".")[2].lower()
    long_name = len(member.name.encode("utf-8", "surrogateescape")) >= _NAME_FIELD
    if member.size != size or (found != suffix and not long_name):
        return f"{member.name!r} of {member.size} bytes where .{suffix} of {size} bytes was"
    return None


def _plainly_right(header: bytes, suffix: str, size: int) -> bool:
    """Whether a header is the expected one and of the common kind: a short name, its size in octal digits.

    Of these it is as good as tarfile's reading, in a quarter of the time.
    """
    if len(header) != HEADER or header[257:262] != b"ustar" or header[156:157] not in (b"0", b"\0"):
        return False
    name = header[:_NAME_FIELD].partition(b"\0")[0].rpartition(b"/")[2]
    if len(name) >= _NAME_FIELD or name.partition(b".")[2].lower() != suffix.encode():
        return False
    size_digits, sum_digits = header[124:136].strip(b" \0"), header[148:156].strip(b" \0")
    if not (size_digits.isdigit() and sum_digits.isdigit()) or b"8" in sum_digits or b"9" in sum_digits:
        return False
    # the checksum counts its own eight bytes as blanks
    checksum = sum(header) - sum(header[148:156]) + 8 * 32
    return size_digits.lstrip(b"0") == b"%o" % size and int(sum_digits, 8) == checksum
