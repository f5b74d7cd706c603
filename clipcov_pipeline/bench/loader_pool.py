"""A synthetic pool of tars as img2dataset writes them; subsets of it as indexes and as tars of their own."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.selection.parallel import thread_count
from clipcov_pipeline.subsets.export import uids_by_key
from clipcov_pipeline.subsets.files import write_subset_tars
from clipcov_pipeline.subsets.index import subset_index, training_rows
from clipcov_pipeline.training.training_index import write_training_index

QUALITY = 95  # img2dataset's
_GRAIN = 10.0  # of 255: photos at this size have some 2 to 3 KB at 64 px
_WORDS = (
    "red",
    "blue",
    "old",
    "small",
    "bird",
    "boat",
    "house",
    "tree",
    "street",
    "of",
    "on",
    "with",
    "a",
    "the",
)


@dataclass(frozen=True)
class TarPool:
    """shards: of the pool; members: uid, shard; places: shard and `PLACES_SCHEMA`; both a row a sample."""

    shards: list[Shard]
    members: pl.DataFrame
    places: pl.DataFrame

    def __len__(self) -> int:
        return self.members.height


def write_pool(folder: Path, samples: int, size: int, samples_per_shard: int, seed: int = 0) -> TarPool:
    """Write a pool below an empty or new folder and read it as the pipeline does.

    samples: in all; size: width and height of an image, pixels. No image and no caption comes twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, samples, samples_per_shard)):
        rng = np.random.default_rng([seed, number])
        path = folder / f"{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for index in range(min(samples_per_shard, samples - first)):
                _add_sample(tar, f"{number:05d}{index:04d}", rng, size)
    return _read_pool(scan(str(folder)), size)


def random_image(rng: np.random.Generator, size: int) -> bytes:
    """A JPEG of smooth colour and some grain, ``size`` x ``size`` pixels."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    smooth = smooth + rng.standard_normal((size, size, 1), np.float32) * _GRAIN
    file = io.BytesIO()
    Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def random_caption(rng: np.random.Generator, key: str) -> str:
    """Some ten words, the last of which no other sample has."""
    words = rng.integers(0, len(_WORDS), rng.integers(5, 14))
    return " ".join([*(_WORDS[word] for word in words), key])


def subset_rows(pool: TarPool, fraction: float, seed: int) -> pl.DataFrame:
    """A random subset of a pool as `subset_index` gives it."""
    chosen = np.random.default_rng(seed).permutation(len(pool))[: round(fraction * len(pool))]
    frame = pool.members[chosen].select("uid").with_row_index("rank")
    frame = frame.with_columns(gain=pl.lit(0.0), latent_class=pl.lit(0, pl.Int32))
    return subset_index(frame, pool.members, pool.places)


def write_index(path: Path, rows: pl.DataFrame, shards: Sequence[Shard]) -> Path:
    """Write what a training reads of a subset (`subset_rows`) over these shards; the path."""
    table = training_rows(rows, shards)
    write_training_index(path, {name: table[name].to_arrow() for name in table.columns})
    return path


def write_tars(folder: Path, rows: pl.DataFrame, shards: Sequence[Shard], fewest: int = 1) -> list[Path]:
    """Cut a subset into tars of its own, at least ``fewest``; their paths."""
    return write_subset_tars(shards, uids_by_key(rows), folder, min_shards=fewest)


def bytes_used(rows: pl.DataFrame) -> int:
    """Bytes of images and captions."""
    return sum(int(rows[name].sum()) for name in ("image_size", "caption_size"))


def _read_pool(shards: list[Shard], size: int) -> TarPool:
    members, places = [], []
    for shard in shards:
        report = read_shard(shard, max_pixels=size * size, workers=thread_count(None))
        members.append(report.manifest.select("uid", "shard"))
        places.append(report.places.with_columns(shard=pl.lit(shard.name)))
    return TarPool(shards, pl.concat(members), pl.concat(places))


def _add_sample(tar: tarfile.TarFile, key: str, rng: np.random.Generator, size: int) -> None:
    image, caption = random_image(rng, size), random_caption(rng, key)
    meta: dict[str, Any] = {
        "caption": caption,
        "url": f"https://images.example.org/{key}/{rng.integers(2**63)}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": size,
        "height": size,
        "original_width": 640,
        "original_height": 480,
        "exif": "{}",
        "sha256": hashlib.sha256(image).hexdigest(),
    }
    for suffix, data in (("jpg", image), ("json", json.dumps(meta).encode()), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
