"""Real WebDataset shards for the tests, whole and broken."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import ShardReport, read_shard

Member = tuple[str, bytes]
MAX_PIXELS = 10_000


def image_bytes(seed: int = 0, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    """An encoded random image; `size` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def sample_members(key: str, caption: str, seed: int = 0, **meta: object) -> list[Member]:
    """The members of one good sample: png, txt, json."""
    return [
        (f"{key}.png", image_bytes(seed)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps({"key": key, "caption": caption, **meta}).encode()),
    ]


def tar_bytes(members: Iterable[Member]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def write_pool(folder: Path, n_shards: int = 2, samples_per_shard: int = 3) -> Path:
    """A folder of good shards `00000.tar`, ...; keys are unique in the pool, as img2dataset makes them."""
    for shard in range(n_shards):
        members = [
            member
            for index in range(samples_per_shard)
            for member in sample_members(
                f"{shard:05d}{index:04d}",
                f"caption {index} of shard {shard}",
                seed=shard * samples_per_shard + index,
            )
        ]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


def read(path: Path, max_pixels: int = MAX_PIXELS) -> ShardReport:
    """What the package says of one tar."""
    (shard,) = scan(str(path))
    return read_shard(shard, max_pixels=max_pixels)


def statuses(report: ShardReport) -> list[tuple[str, str]]:
    """(key, status) of every sample."""
    return list(report.manifest.select("key", "status").iter_rows())
