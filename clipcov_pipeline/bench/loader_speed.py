"""Samples a second of two ways to feed open_clip_train with a subset: tars of its own, or an index.

The tars go through open_clip_train's own reader (webdataset), the index through `training.index_loader`. Both
decode, vary and tokenize, and are measured in turn.
"""

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from clipcov_pipeline.bench.loader_pool import (
    TarPool,
    bytes_used,
    subset_rows,
    write_index,
    write_pool,
    write_tars,
)
from clipcov_pipeline.bench.measuring import Say, drop_cached
from clipcov_pipeline.bench.range_server import RangeServer, range_server
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.training import command
from clipcov_pipeline.training.index_loader import IndexData, train_data
from clipcov_pipeline.training.remote_reads import bytes_fetched, fetched_into
from clipcov_pipeline.training.spec import TrainSpec
from clipcov_pipeline.training.training_index import read_training_index

FIRST, NEXT = "warm disk, first pass", "warm disk, next pass"
COLD, HTTP, HTTP_NEXT = "cold disk, first pass", "HTTP, first pass", "HTTP, next pass"
CONDITIONS = (FIRST, NEXT, COLD, HTTP, HTTP_NEXT)
TARS, INDEX = "tars", "index"
MOST_REPEATS = 3  # times the repeats of all: what is short is measured more often


@dataclass(frozen=True)
class Loading:
    """What is measured.

    samples, samples_per_shard: of the pool; size: width and height of an image, pixels; densities: shares
    of the pool; latency: of the web server, seconds; workers: data-loading processes; model: by open_clip's
    name.
    """

    samples: int
    size: int
    samples_per_shard: int
    densities: tuple[float, ...]
    repeat: int
    workers: int
    batch_size: int
    latency: float
    model: str


@dataclass
class Row:
    """What was found under one condition at one density.

    samples: of a pass; rates: samples a second of each run; bytes_per_used: bytes read or fetched in a pass,
    for each byte of the subset's images and captions; both by way.
    """

    condition: str
    density: float
    samples: int
    rates: dict[str, list[float]] = field(default_factory=lambda: {TARS: [], INDEX: []})
    bytes_per_used: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Subset:
    """A subset in both forms, on disk and at the web server. used: bytes of images and captions."""

    density: float
    samples: int
    used: int
    tars: list[Path]
    index: Path
    tar_urls: list[str]
    http_index: Path


def bench_loader(loading: Loading, folder: Path | None, say: Say) -> dict[str, Any]:
    """Measure on a synthetic pool; removes all that it writes.

    folder: scratch; the system's temporary folder when None.

    Returns:
        JSON-able: settings, bytes of the pool, rows as `Row`.

    Raises:
        InputError: a subset that is smaller than a batch.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    least = round(min(loading.densities) * loading.samples)
    if least < loading.batch_size:
        raise InputError(
            f"bench loader: {min(loading.densities):.0%} of --samples {loading.samples} are {least}, expected"
            f" at least a batch of {loading.batch_size}; give more samples"
        )
    with tempfile.TemporaryDirectory(prefix="clipcov-bench-", dir=folder) as room:
        scratch = Path(room)
        pool = write_pool(scratch / "pool", loading.samples, loading.size, loading.samples_per_shard)
        say(f"pool: {len(pool):,} samples in {len(pool.shards)} tars")
        with range_server(scratch, loading.latency) as server:
            subsets = [
                _subset(pool, density, scratch, server, loading.workers) for density in loading.densities
            ]
            rows = _Contest(loading, scratch, server).run(subsets, say)
        size = sum(Path(shard.url).stat().st_size for shard in pool.shards)
    return {
        "settings": {**vars(loading), "densities": list(loading.densities)},
        "pool_bytes": size,
        "used_bytes": bytes_used(pool.places),
        "rows": [vars(row) for row in rows],
    }


def _subset(pool: TarPool, density: float, scratch: Path, server: RangeServer, workers: int) -> Subset:
    name = f"subset-{density:g}"
    rows: pl.DataFrame = subset_rows(pool, density, seed=0)
    tars = write_tars(scratch / name, rows, pool.shards, fewest=max(workers, 1))
    pattern = f"{server.address}/pool/{{00000..{len(pool.shards) - 1:05d}}}.tar"
    remote = scan(pattern) if len(pool.shards) > 1 else scan(f"{server.address}/pool/00000.tar")
    return Subset(
        density=density,
        samples=rows.height,
        used=bytes_used(rows),
        tars=tars,
        index=write_index(scratch / f"{name}.parquet", rows, pool.shards),
        tar_urls=[f"{server.address}/{name}/{tar.name}" for tar in tars] if shutil.which("curl") else [],
        http_index=write_index(scratch / f"{name}-http.parquet", rows, remote),
    )


class _Contest:
    """Both ways in turn, over and over; `rows` grows."""

    def __init__(self, loading: Loading, scratch: Path, server: RangeServer) -> None:
        self._loading, self._scratch, self._server = loading, scratch, server
        self._feeds = Feeds(loading, scratch)
        self._rows: dict[tuple[str, float], Row] = {}
        self._caches = 0

    def run(self, subsets: Sequence[Subset], say: Say) -> list[Row]:
        for repeat in range(self._loading.repeat):
            for subset in subsets:
                for again in range(_times(subset.density)):
                    self._round(subset, turned=(repeat + again) % 2 == 1)
            say(f"round {repeat + 1} of {self._loading.repeat} is done")
        return [self._rows[c, s.density] for c in CONDITIONS for s in subsets if (c, s.density) in self._rows]

    def _round(self, subset: Subset, turned: bool) -> None:
        feeds, n = self._feeds, subset.samples
        turns: list[Callable[[], None]] = [
            lambda: self._warm(subset, TARS, feeds.tars(subset.tars, n)),
            lambda: self._warm(subset, INDEX, feeds.index(subset.index, n, 0)),
            lambda: self._cold(subset, TARS),
            lambda: self._cold(subset, INDEX),
            lambda: self._http(subset, TARS),
            lambda: self._http(subset, INDEX),
        ]  # fmt: skip
        for one, other in zip(turns[::2], turns[1::2], strict=True):
            for turn in (other, one) if turned else (one, other):
                turn()
                gc.collect()  # the data-loading processes of the one are gone before the other is measured

    def _warm(self, subset: Subset, way: str, info: Any) -> None:
        for condition, rate in zip((FIRST, NEXT), passes(info, 2), strict=True):
            self._row(condition, subset).rates[way].append(rate)

    def _cold(self, subset: Subset, way: str) -> None:
        files = subset.tars if way == TARS else list((self._scratch / "pool").glob("*.tar"))
        if not drop_cached(files):
            return
        feeds, n = self._feeds, subset.samples
        info = feeds.tars(subset.tars, n) if way == TARS else feeds.index(subset.index, n, 0)
        row = self._row(COLD, subset)
        row.rates[way].append(next(passes(info, 1)))
        if (read := _read_by_children({self._server.pid})) is not None:
            row.bytes_per_used[way] = read / subset.used

    def _http(self, subset: Subset, way: str) -> None:
        if way == TARS and not subset.tar_urls:
            return
        feeds, n, cache = self._feeds, subset.samples, ""
        if way == TARS:
            info = feeds.tars(subset.tar_urls, n)
        else:
            self._caches += 1
            cache = str(self._scratch / f"cache-{self._caches}")
            info = feeds.index(subset.http_index, n, 0, cache)
        before = self._server.sent()
        for condition, rate in zip((HTTP, HTTP_NEXT), passes(info, 2), strict=True):
            after = self._server.sent()
            row = self._row(condition, subset)
            row.rates[way].append(rate)
            row.bytes_per_used[way] = (after[1] - before[1]) / subset.used
            if way == INDEX and condition == HTTP:
                row.note = _how(subset.http_index, cache)
            before = after
        if cache:
            shutil.rmtree(cache)

    def _row(self, condition: str, subset: Subset) -> Row:
        key = condition, subset.density
        return self._rows.setdefault(key, Row(condition, subset.density, self._feeds.seen(subset.samples)))


class Feeds:
    """Makes open_clip_train's training data of a subset, as a training would."""

    def __init__(self, loading: Loading, scratch: Path) -> None:
        from open_clip import create_model_and_transforms, get_tokenizer

        from clipcov_pipeline.proxy.models import register_model_configs

        register_model_configs()
        self._loading, self._scratch = loading, scratch
        self._preprocess: Any = create_model_and_transforms(loading.model)[1]
        self._tokenizer = get_tokenizer(loading.model)

    def seen(self, samples: int) -> int:
        """Samples of a pass: full batches, so that nothing is read a second time."""
        return samples // self._loading.batch_size * self._loading.batch_size

    def imported(self) -> None:
        """Import what making the data does."""
        import open_clip_train.main  # noqa: F401

        self._arguments(self._loading.batch_size, "none")

    def tars(self, tars: Sequence[Path | str], samples: int) -> Any:
        """open_clip_train's own data."""
        from open_clip_train import main

        args = self._arguments(samples, "::".join(map(str, tars)))
        both = self._preprocess, self._preprocess
        return main.get_data(args, both, epoch=0, tokenizer=self._tokenizer)["train"]

    def index(self, index: Path, samples: int, kept_bytes: int, cache: str = "") -> Any:
        """The data of `training.index_loader`; kept_bytes: of decoded samples, in each process."""
        settings = IndexData(str(index), self._loading.batch_size, 0, cache=cache, kept_bytes=kept_bytes)
        args = self._arguments(samples, str(index))
        return train_data(settings, args, self._preprocess, 0, self._tokenizer)

    def _arguments(self, samples: int, train_data: str) -> Any:
        from open_clip_train.params import parse_args

        loading, seen = self._loading, self.seen(samples)
        spec = TrainSpec(
            model=loading.model, index=train_data, n_samples=samples, samples_seen=seen,
            batch_size=loading.batch_size, num_checkpoints=1, workers=loading.workers, lr=1e-3, warmup=0,
            device="cpu", log_dir=str(self._scratch), name="run",
        )  # fmt: skip
        args: Any = parse_args(command.arguments(spec))
        args.rank, args.world_size = 0, 1
        args.train_num_samples = seen  # not rounded: a pass is one pass
        return args


def passes(info: Any, count: int) -> Iterator[float]:
    """Samples a second of so many passes; the first includes the start of the data-loading processes."""
    for epoch in range(count):
        info.set_epoch(epoch)
        began = time.perf_counter()
        samples = sum(len(batch[0]) for batch in info.dataloader)
        yield samples / (time.perf_counter() - began)


def _times(density: float) -> int:
    return max(1, min(MOST_REPEATS, round(0.25 / density)))


def _read_by_children(others: set[int]) -> int | None:
    """Bytes that the disk gave to this process's children but for some; None where that is not told."""
    import psutil

    read = 0
    for child in psutil.Process().children():
        if child.pid in others:
            continue
        try:
            read += child.io_counters().read_bytes  # pyright: ignore[reportAttributeAccessIssue]
        except (AttributeError, psutil.Error):
            return None
    return read


def _how(index: Path, cache: str) -> str:
    """Which way the density rule chose for each shard."""
    found = bytes_fetched(fetched_into(read_training_index(index), cache))
    ranges = [one for one in found if one.how == "ranges"]
    requests = sum(one.requests for one in ranges)
    parts = [f"{len(ranges)} shards by {requests} ranges"] if ranges else []
    if through := len(found) - len(ranges):
        parts.append(f"{through} read through")
    return ", ".join(parts)
