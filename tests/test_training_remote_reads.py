"""Training on shards behind a web server: what is fetched, how, and what happens when it changed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool import listing
from clipcov_pipeline.training import remote_reads
from clipcov_pipeline.training.launch import launch
from clipcov_pipeline.training.remote_reads import bytes_fetched, fetched_into, wanted_ranges
from clipcov_pipeline.training.training_index import read_training_index
from index_of import Data, columns_of, index_spec, same, write_index
from make_training import write_shards
from range_server import serve


@pytest.fixture
def pool(tmp_path) -> Path:
    (tmp_path / "pool").mkdir()
    write_shards(tmp_path / "pool", [100, 100], side=48)
    return tmp_path / "pool"


def remote_columns(pool, url):
    """An index of the pool behind a web server, with the tokens that `listing.scan` gives."""
    tars = sorted(pool.glob("*.tar"))
    found = listing.scan(f"{url}/{{00000..{len(tars) - 1:05d}}}.tar")
    versions = {shard.url.rpartition("/")[2]: shard.version for shard in found}
    return columns_of(tars, versions, url + "/{}")


@pytest.mark.parametrize(
    ("ranges", "step", "how"), [(True, 20, "ranges"), (True, 1, "through"), (False, 20, "through")]
)
def test_each_shard_is_fetched_once_by_the_rule_and_its_bytes_counted(
    tmp_path, pool, monkeypatch, ranges, step, how
):
    monkeypatch.setattr(remote_reads, "GAP_BYTES", 1000)
    rows = range(0, 200, step)
    with serve(pool, ranges=ranges) as (url, sent):
        index = write_index(tmp_path / "index.parquet", remote_columns(pool, url), rows)
        spec = index_spec(
            tmp_path, index, n_samples=len(rows), batch_size=5, samples_seen=30, workers=2,
            cache=str(tmp_path / "cache"),
        )  # fmt: skip
        local = write_index(tmp_path / "local.parquet", columns_of(sorted(pool.glob("*.tar"))), rows)
        before = sent.bytes
        data, plain = Data(spec), Data(dataclasses.replace(spec, index=local, cache=""))
        for epoch in range(2):
            same(data.epoch(epoch), plain.epoch(epoch))
        fetched = bytes_fetched(fetched_into(read_training_index(index), tmp_path / "cache"))
        assert {shard.how for shard in fetched} == {how}
        total = sum(shard.fetched for shard in fetched)
        # what a server that ignores ranges sent before it was found out is its own
        assert total == sent.bytes - before or not ranges
    used = sum(shard.used for shard in fetched)
    index = read_training_index(index)
    assert used == index.image_size.sum() + index.caption_size.sum()
    if how == "ranges":
        assert total < 1.0 * used + 3000 * len(rows)
    assert {path.suffix for path in (tmp_path / "cache").glob("*/*")} == {".sparse", ".json", ".lock"}


def test_ranges_are_joined_across_small_gaps_and_hold_every_member(tmp_path, pool, monkeypatch):
    index = read_training_index(
        write_index(tmp_path / "i.parquet", columns_of(sorted(pool.glob("*.tar"))), range(0, 200, 7))
    )
    for gap in (0, 600, 10**6):
        monkeypatch.setattr(remote_reads, "GAP_BYTES", gap)
        ranges, used = wanted_ranges(index, 0)
        rows = np.flatnonzero(index.shard == 0)
        assert used == int(index.image_size[rows].sum() + index.caption_size[rows].sum())
        assert (ranges[1:, 0] > ranges[:-1, 1] + gap).all()
        for offsets, sizes in (
            (index.image_offset, index.image_size),
            (index.caption_offset, index.caption_size),
        ):
            for row in rows:
                at = np.searchsorted(ranges[:, 0], offsets[row] - 512, side="right") - 1
                assert ranges[at, 1] >= offsets[row] + sizes[row]
    assert len(ranges) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda tar, _: tar.write_bytes(tar.read_bytes() + bytes(512)),
            r"found token \d+-\d+-\d+, expected \d+-",
        ),
        (lambda tar, _: tar.unlink(), "is gone: found no file, expected token"),
        (
            lambda _, sent: setattr(sent, "short", True),
            r"is not as recorded: .* came back with \d+, expected \d+, while",
        ),
    ],
)
def test_a_changed_remote_shard_ends_the_training(tmp_path, pool, monkeypatch, workers, change, says):
    monkeypatch.setattr(remote_reads, "GAP_BYTES", 0)
    with serve(pool) as (url, sent):
        index = write_index(tmp_path / "index.parquet", remote_columns(pool, url), range(0, 200, 10))
        spec = index_spec(
            tmp_path, index, n_samples=20, batch_size=10, samples_seen=20, cache=str(tmp_path / "cache"),
            workers=workers,
        )  # fmt: skip
        change(pool / "00001.tar", sent)
        with pytest.raises(InputError, match=rf"shard {url}/0000[01]\.tar .*{says}"):
            launch(spec)


def test_a_remote_shard_needs_a_folder_with_room(tmp_path, pool):
    with serve(pool) as (url, _):
        columns = remote_columns(pool, url)
        spec = index_spec(tmp_path, write_index(tmp_path / "index.parquet", columns), n_samples=200)
        with pytest.raises(InputError, match=r"00000\.tar is remote; give a cache folder"):
            Data(spec)
        columns["image_size"] = [2**31 - 1] * 200
        huge = write_index(tmp_path / "huge.parquet", columns)
        with pytest.raises(InputError, match=r"samples take [\d,]{14,} bytes, .* free; make room"):
            Data(dataclasses.replace(spec, index=huge, cache=str(tmp_path / "cache")))
