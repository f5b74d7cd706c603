"""Which held-out pairs are taken: of real manifests, against what they hold."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import polars as pl
import pytest

from assets.steps.validation import held_out_rows
from clipcov_pipeline.experiment.project import Task
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from make_shards import write_pool

SHARDS, SAMPLES = 12, 6


class Pool:
    """Twelve shards of six samples, the last three of each held out, as far as a task tells of them."""

    def __init__(self, folder: Path) -> None:
        shards = scan(str(write_pool(folder / "pool", SHARDS, SAMPLES)))
        self.folder, self.project = folder, SimpleNamespace(shards={shard.name: shard for shard in shards})
        self.held_out = {shard.name: [f"{shard.name}{at:04d}" for at in (3, 4, 5)] for shard in shards}
        for shard in shards:
            read_shard(shard, max_pixels=10_000).manifest.write_parquet(folder / f"{shard.name}.parquet")
        places = [(name, key) for name, keys in reversed(self.held_out.items()) for key in keys]
        pl.DataFrame(places, schema=["shard", "key"], orient="row").write_parquet(folder / "holdout.parquet")

    def path(self, stage: str, partition: str = "", file: str = "") -> Path:
        return self.folder / (f"{partition}.parquet" if stage == "raw_shards" else file)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    return Pool(tmp_path_factory.mktemp("held_out"))


def taken(pool: Any, count: int) -> list[tuple[str, str]]:
    return held_out_rows(cast(Task, pool), count).select("shard", "key").rows()


@pytest.mark.parametrize("count", [9, 36, 1000])
def test_all_are_taken_where_they_are_no_more_than_four_times_as_many(pool, count):
    assert taken(pool, count) == [(name, key) for name, keys in pool.held_out.items() for key in keys]


@pytest.mark.parametrize(("count", "numbers"), [(1, (0, 6)), (3, (0, 3, 6, 9)), (5, (0, 1, 3, 5, 6, 8, 10))])
def test_of_many_those_of_some_shards_from_all_over_the_pool(pool, count, numbers):
    found = taken(pool, count)
    assert found == [(name, key) for name in [f"{n:05d}" for n in numbers] for key in pool.held_out[name]]
