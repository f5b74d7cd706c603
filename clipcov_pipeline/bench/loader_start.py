"""How long a training's data takes to start on a large index, and how much memory its processes have.

The index has as many rows as asked for, in 1,000 tars. These are sparse files: only the samples of the first
batches are written, at their places.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipcov_pipeline.bench.loader_pool import random_caption, random_image
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.places import short_hash
from clipcov_pipeline.selection.measure import anonymous_bytes
from clipcov_pipeline.training.draws import EachOnce
from clipcov_pipeline.training.member_reads import HEADER
from clipcov_pipeline.training.order import Order
from clipcov_pipeline.training.training_index import write_training_index

SHARDS = 1000
STEPS = 12  # batches that are there: one is waited for, others are made ahead
_ROOM = 8192  # bytes of a tar for a sample
_CAPTION = 6144  # where the caption's content begins in them


def bench_start(
    rows: int, workers: int, batch_size: int, model: str, folder: Path | None, repeat: int = 3
) -> dict[str, Any]:
    """Start a training's data in a fresh process, `repeat` times; removes all that it writes.

    rows: of the index; folder: scratch, the system's temporary folder when None.

    Returns:
        JSON-able: rows, shards, index_bytes, and a dict for each start, as `start`.

    Raises:
        InputError: fewer rows than the batches that are looked at.
    """
    if rows < SHARDS or rows < batch_size * STEPS:
        raise InputError(
            f"bench loader: --start {rows} rows, expected at least {max(SHARDS, batch_size * STEPS)};"
            " give more"
        )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="clipcov-bench-", dir=folder) as room:
        index = write_large_index(Path(room), rows, batch_size)
        command = [
            sys.executable,
            "-m",
            __name__,
            str(index),
            str(rows),
            str(workers),
            str(batch_size),
            model,
        ]
        starts = []
        for _ in range(repeat):
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            starts.append(json.loads(run.stdout.splitlines()[-1]))
        size = index.stat().st_size
    return {"rows": rows, "shards": SHARDS, "index_bytes": size, "workers": workers, "starts": starts}


def write_large_index(folder: Path, rows: int, batch_size: int) -> Path:
    """Write an index and the first batches' samples; seed 0. The index's path."""
    rng = np.random.default_rng(0)
    per_shard = -(-rows // SHARDS)
    number, within = np.divmod(np.arange(rows), per_shard)
    hashes = {name: rng.integers(-(2**63), 2**63, rows) for name in ("caption_hash", "image_hash")}
    sizes = {name: np.full(rows, 1, np.int64) for name in ("image_size", "caption_size")}
    # the order depends on which hashes are equal; none is, nor will be
    order = Order(rows, EachOnce(rows, 0), batch_size, [])
    tars = [folder / f"{shard:05d}.tar" for shard in range(SHARDS)]
    for tar in tars:
        with tar.open("wb") as file:
            file.truncate(per_shard * _ROOM)
    for row in np.unique(order.places(0, STEPS * batch_size)).tolist():
        with tars[number[row]].open("r+b") as file:
            data = _write_sample(file, int(within[row]) * _ROOM, f"{row:09d}", rng)
        for name, part in zip(("image", "caption"), data, strict=True):
            sizes[f"{name}_size"][row] = len(part)
            hashes[f"{name}_hash"][row] = _hash(part)
    versions = [f"{tar.stat().st_size}-{tar.stat().st_mtime_ns}" for tar in tars]
    codes = pa.array(number.astype(np.int32))
    path = folder / "index.parquet"
    write_training_index(
        path,
        {
            "uid": _random_uids(rng, rows),
            "shard": pa.DictionaryArray.from_arrays(codes, pa.array([str(tar) for tar in tars])),
            "shard_version": pa.DictionaryArray.from_arrays(codes, pa.array(versions)),
            "image_ext": pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["jpg"])),
            "image_offset": within * _ROOM + HEADER,
            "caption_offset": within * _ROOM + _CAPTION,
            **sizes,
            **hashes,
        },
    )
    return path


def start(index: str, rows: int, workers: int, batch_size: int, model: str) -> dict[str, Any]:
    """Start a training's data in this process, imports done before.

    Returns:
        seconds: until the first batch is there; read_seconds: of them until the index is read and checked;
        before: anonymous memory (bytes, resident) of this process after the imports, training: afterwards;
        workers: of each data-loading process (``RssAnon``: what it shares with this one is counted in full);
        own: what each does not share.
    """
    import psutil

    from clipcov_pipeline.bench.loader_speed import Feeds, Loading

    with tempfile.TemporaryDirectory() as logs:
        loading = Loading(rows, 64, 1, (1.0,), 1, workers, batch_size, 0.0, model)
        feeds = Feeds(loading, Path(logs))
        feeds.imported()
        before = anonymous_bytes()
        began = time.perf_counter()
        info = feeds.index(Path(index), STEPS * batch_size, 0)
        read_seconds = time.perf_counter() - began
        batches = iter(info.dataloader)
        next(batches)
        seconds = time.perf_counter() - began
        children = [child.pid for child in psutil.Process().children()]
        found = {
            "seconds": seconds,
            "read_seconds": read_seconds,
            "before": before,
            "training": anonymous_bytes(),
            "workers": [_proc_bytes(f"/proc/{pid}/status", "RssAnon:") for pid in children],
            "own": [_proc_bytes(f"/proc/{pid}/smaps_rollup", "Private_Dirty:") for pid in children],
        }
        for _ in batches:
            pass
    return found


def _proc_bytes(path: str, name: str) -> int:
    """A line of a file of /proc, in bytes; 0 where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _write_sample(file: Any, offset: int, key: str, rng: np.random.Generator) -> tuple[bytes, bytes]:
    data = random_image(rng, 64), random_caption(rng, key).encode()
    for name, part, at in zip(("jpg", "txt"), data, (HEADER, _CAPTION), strict=True):
        member = tarfile.TarInfo(f"{key}.{name}")
        member.size = len(part)
        file.seek(offset + at - HEADER)
        file.write(member.tobuf() + part)
    return data


def _hash(data: bytes) -> int:
    import hashlib

    return short_hash(hashlib.sha256(data).hexdigest())


def _random_uids(rng: np.random.Generator, n: int) -> Any:
    """n x 32 hex digits, as an arrow column."""
    text = rng.bytes(16 * n).hex().encode()
    ends = pa.py_buffer(np.arange(0, 32 * n + 1, 32, dtype=np.int32).tobytes())
    return pa.StringArray.from_buffers(n, ends, pa.py_buffer(text))


if __name__ == "__main__":
    path, n, processes, batch, name = sys.argv[1:]
    print(json.dumps(start(path, int(n), int(processes), int(batch), name)))  # noqa: T201
