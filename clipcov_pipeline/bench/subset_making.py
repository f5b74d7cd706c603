"""What ten subsets of a pool take, as indexes over its tars and as tars of their own: seconds and bytes."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from clipcov_pipeline.bench.loader_pool import TarPool, write_index, write_pool, write_tars
from clipcov_pipeline.bench.measuring import Say
from clipcov_pipeline.subsets.files import write_datacomp_npy
from clipcov_pipeline.subsets.index import subset_index

METHODS = 5
FRACTIONS = (0.1, 0.5)
SAMPLES_PER_SHARD = 1000


def bench_subsets(samples: int, size: int, folder: Path | None, say: Say) -> dict[str, Any]:
    """Make `METHODS` random rankings' subsets of `FRACTIONS` in turn in both ways.

    All that is written is removed. samples: of the synthetic pool; size: width and height of an image,
    pixels; folder: scratch, the system's temporary folder when None.

    Returns:
        JSON-able: samples, pool_bytes, and for ``index``, ``training index`` (what a training reads, written
        for each) and ``tars`` the seconds and bytes of all subsets, the disk's writing included.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="clipcov-bench-", dir=folder) as room:
        scratch = Path(room)
        pool = write_pool(scratch / "pool", samples, size, SAMPLES_PER_SHARD)
        pool_bytes = sum(Path(shard.url).stat().st_size for shard in pool.shards)
        say(f"pool: {len(pool):,} samples in {len(pool.shards)} tars, {pool_bytes / 1e9:.2f} GB")
        seconds = {"index": 0.0, "training index": 0.0, "tars": 0.0}
        sizes = dict.fromkeys(seconds, 0)
        for method in range(METHODS):
            order = np.random.default_rng(method).permutation(len(pool))
            for fraction in FRACTIONS:
                chosen = _chosen(pool, order[: round(fraction * len(pool))])
                for way, make in _ways(pool, chosen).items():
                    out = scratch / f"{way}-{method}-{fraction:g}"
                    out.mkdir()
                    began = time.perf_counter()
                    make(out)
                    _to_disk(out)
                    seconds[way] += time.perf_counter() - began
                    sizes[way] += sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            say(f"method {method + 1} of {METHODS} is done")
    return {"samples": samples, "size": size, "pool_bytes": pool_bytes, "seconds": seconds, "bytes": sizes}


def _chosen(pool: TarPool, rows: np.ndarray) -> pl.DataFrame:
    frame = pool.members[rows].select("uid").with_row_index("rank")
    return frame.with_columns(
        gain=pl.lit(np.random.default_rng(0).random(len(rows))), latent_class=pl.lit(0, pl.Int32)
    )


def _ways(pool: TarPool, chosen: pl.DataFrame) -> dict[str, Callable[[Path], object]]:
    def index(out: Path) -> None:
        subset_index(chosen, pool.members, pool.places).write_parquet(
            out / "subset.parquet", compression="zstd"
        )
        write_datacomp_npy(out / "subset.npy", chosen["uid"].to_list())

    def training_index(out: Path) -> None:
        rows = subset_index(chosen, pool.members, pool.places)
        write_index(out / "training.parquet", rows, pool.shards)

    def tars(out: Path) -> None:
        chosen.write_parquet(out / "subset.parquet", compression="zstd")
        write_datacomp_npy(out / "subset.npy", chosen["uid"].to_list())
        rows = chosen.join(pool.places.select("uid", "shard", "key"), on="uid")
        write_tars(out / "shards", rows, pool.shards)

    return {"index": index, "training index": training_index, "tars": tars}


def _to_disk(folder: Path) -> None:
    """Wait until the disk has a folder's files: what is left to the system costs the next one."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
