"""Fetches what a subset needs of remote shards, each shard once, into sparse local files.

A training reads a shard's samples in random order, pass after pass: so all that it wants of a shard is
fetched when the first of it is asked for, and lies on the local disk at the same offsets from then on,
for every data-loading process. (Cutting subsets took at least that much disk.)

The rule: the wanted ranges of a shard, joined across gaps of up to `GAP_BYTES`, are asked for as ranges
(fsspec's ``cat_ranges``) while they are less than `READ_THROUGH` of its bytes; else, and where a server
ignores ranges, the shard is read through.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.files import write_text_at_once
from clipcov_pipeline.training.member_reads import HEADER, MemberReads, Pair, changed, gone
from clipcov_pipeline.training.training_index import TrainingIndex

GAP_BYTES = 1 << 15  # a request costs more than these bytes do
READ_THROUGH = 0.5  # of a shard's bytes
_REQUEST_BYTES = 1 << 26  # asked for at once, and so held in memory
_COPY_BYTES = 1 << 22
_PARALLEL_SHARDS = 8
Ranges = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fetched:
    """Bytes of one shard: fetched over the network, used of them (images and captions), and in how many
    requests; ``how`` is ``ranges`` or ``through``."""

    shard: str
    fetched: int
    used: int
    requests: int
    how: str


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL, not a path of this machine."""
    return "://" in shard


class RemoteReads:
    """As `MemberReads`, of shards that fsspec reads. folder: as `fetched_into`; made if it is not there."""

    def __init__(
        self, index: TrainingIndex, folder: str | Path, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self._index, self._folder, self._options = index, Path(folder), dict(storage_options or {})
        self._files = [str(self._folder / f"{number:06d}.sparse") for number in range(len(index.shards))]
        self._there: set[int] = set()
        self._local = MemberReads(index, self._files)
        _import_clients(index.shards)

    def prepare(self, rows: npt.NDArray[np.int64]) -> None:
        """Fetch what is not here yet of the shards of these rows, several shards at once.

        Raises:
            InputError: as `fetch_shard`.
        """
        missing = [s for s in np.unique(self._index.shard[rows]).tolist() if s not in self._there]
        if not missing:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_PARALLEL_SHARDS) as pool:
            list(pool.map(self._fetch_once, missing))
        self._there.update(missing)

    def read(self, row: int) -> Pair:
        """As `MemberReads.read`, after `prepare`."""
        return self._local.read(row)

    def _fetch_once(self, shard: int) -> None:
        """Fetch a shard unless another process has, or wait for it."""
        from filelock import FileLock

        file = Path(self._files[shard])
        with FileLock(file.with_suffix(".lock")):
            if file.exists():
                return
            part = file.with_suffix(".part")
            fetched = fetch_shard(self._index, shard, part, self._options)
            write_text_at_once(file.with_suffix(".json"), json.dumps(asdict(fetched)))
            part.replace(file)


def _import_clients(shards: Iterable[str]) -> None:
    """Import what reads these URLs before data-loading processes are forked: each would wait for it."""
    from fsspec import get_filesystem_class

    for protocol in {shard.partition("://")[0] for shard in shards if is_remote(shard)}:
        with suppress(ImportError, ValueError):  # said when a shard is fetched
            get_filesystem_class(protocol)


def fetched_into(index: TrainingIndex, cache: str | Path) -> Path:
    """The folder below ``cache`` for what this index wants: files of another hold other ranges."""
    digest = hashlib.sha256("\n".join((*index.shards, *index.versions)).encode())
    offsets, sizes = zip(*index.members, strict=True)
    for column in (index.shard, *offsets, *sizes):
        digest.update(column.tobytes())
    return Path(cache) / digest.hexdigest()[:16]


def bytes_fetched(folder: str | Path) -> list[Fetched]:
    """What was fetched into a folder, a shard each."""
    return [Fetched(**json.loads(path.read_text())) for path in sorted(Path(folder).glob("*.json"))]


def fetch_shard(index: TrainingIndex, shard: int, file: Path, storage_options: Mapping[str, Any]) -> Fetched:
    """Write what an index wants of a shard to a sparse file, at the shard's own offsets.

    Raises:
        InputError: the shard is gone or has another token than recorded; a range came back short.
    """
    from fsspec.core import url_to_fs

    from clipcov_pipeline.pool.listing import change_token

    url = index.shards[shard]
    filesystem, path = url_to_fs(url, **storage_options)
    try:
        filesystem.invalidate_cache()
        info = filesystem.info(path)
    except FileNotFoundError:
        raise gone(index, shard) from None
    if (token := change_token(info)) != index.versions[shard]:
        raise changed(index, shard, token)
    ranges, used = wanted_ranges(index, shard)
    size = info.get("size") or int(ranges[-1, 1])
    requests = None
    if (ranges[:, 1] - ranges[:, 0]).sum() < READ_THROUGH * size:
        requests = _fetch_ranges(filesystem, path, ranges, file, (index, shard, token))
    if requests is not None:
        total = int((ranges[:, 1] - ranges[:, 0]).sum())
        return Fetched(url, total, used, requests, "ranges")
    return Fetched(url, _read_through(filesystem, path, ranges, file), used, 1, "through")


def wanted_ranges(index: TrainingIndex, shard: int) -> tuple[Ranges, int]:
    """(start and end of what is wanted of a shard, int64 [ranges, 2], ascending; bytes of the members).

    Members have their tar headers before them; gaps of up to `GAP_BYTES` are wanted, too.
    """
    rows = np.flatnonzero(index.shard == shard)
    starts = np.concatenate([offset[rows] for offset, _ in index.members])
    sizes = np.concatenate([size[rows] for _, size in index.members]).astype(np.int64)
    there = starts > 0  # all but a json that a sample has not
    starts, sizes = starts[there], sizes[there]
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order] - HEADER, (starts + sizes)[order]
    furthest = np.maximum.accumulate(ends)
    new = np.flatnonzero(starts[1:] > furthest[:-1] + GAP_BYTES) + 1
    first = np.concatenate([[0], new])
    last = np.concatenate([new, [len(starts)]]) - 1
    return np.stack([starts[first], furthest[last]], axis=1), int(sizes.sum())


def _fetch_ranges(
    filesystem: Any, path: str, ranges: Ranges, file: Path, shard: tuple[TrainingIndex, int, str]
) -> int | None:
    """Number of requests; None where the server answers with more than it was asked for."""
    with file.open("wb") as out:
        for part in _portions(ranges):
            starts, ends = part[:, 0].tolist(), part[:, 1].tolist()
            # no range is joined by fsspec again
            answers = filesystem.cat_ranges([path] * len(part), starts, ends, on_error="raise")
            for start, end, data in zip(starts, ends, answers, strict=True):
                if len(data) > end - start:
                    return None
                if len(data) < end - start:
                    found = f"bytes {start} to {end} came back with {len(data)}, expected {end - start}"
                    raise changed(*shard, found)
                out.seek(start)
                out.write(data)
    return len(ranges)


def _portions(ranges: Ranges) -> Iterable[Ranges]:
    """Ranges in portions of about `_REQUEST_BYTES`."""
    portion = np.cumsum(ranges[:, 1] - ranges[:, 0]) // _REQUEST_BYTES
    return np.split(ranges, np.flatnonzero(np.diff(portion)) + 1)


def _read_through(filesystem: Any, path: str, ranges: Ranges, file: Path) -> int:
    """Copy a whole shard and keep the ranges of it; bytes that were fetched."""
    whole = file.with_suffix(".whole")
    try:
        filesystem.get_file(path, str(whole))
        with whole.open("rb") as source, file.open("wb") as out:
            for start, end in ranges.tolist():
                _copy(source, out, start, end)
        return whole.stat().st_size
    finally:
        whole.unlink(missing_ok=True)


def _copy(source: BinaryIO, out: BinaryIO, start: int, end: int) -> None:
    """Copy bytes ``start`` to ``end``, as far as there are any: a short member is found when it is read."""
    source.seek(start)
    out.seek(start)
    while start < end and (data := source.read(min(_COPY_BYTES, end - start))):
        out.write(data)
        start += len(data)


def free_bytes(folder: Path) -> int:
    """Bytes that can be written below a folder that is there or will be made."""
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def check_room(index: TrainingIndex, folder: str | Path) -> None:
    """Raise InputError where the disk has no room for what is wanted of remote shards."""
    wanted = sum(int(size.sum(dtype=np.int64)) for _, size in index.members)
    if wanted > (free := free_bytes(Path(folder))):
        raise InputError(
            f"train: the subset's samples take {wanted:,} bytes, {folder} has {free:,} free; make room or"
            " choose a smaller fraction"
        )
