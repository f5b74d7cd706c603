"""Reading samples back: those that were asked for, in the tar's order, in little memory."""

import hashlib
import os

import polars as pl

from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.pool.samples import iter_samples
from clipcov_pipeline.pool.tars import iter_all_groups, iter_groups
from make_shards import MAX_PIXELS, image_bytes, sample_members, write_pool, write_tar


def test_iter_samples_gives_just_the_keys_in_the_tar_s_order(tmp_path):
    members = [
        *sample_members("c", " third ", 3, n=3),
        *sample_members("a", "first", 1),
        *sample_members("b", "x"),
    ]
    (shard,) = scan(str(write_tar(tmp_path / "s.tar", members)))
    samples = list(iter_samples(shard, {"a", "c", "absent"}))
    assert [(s.key, s.caption, s.image_ext) for s in samples] == [
        ("c", "third", "png"),
        ("a", "first", "png"),
    ]
    assert samples[0].image == image_bytes(3)
    assert samples[0].meta == {"key": "c", "caption": " third ", "n": 3}
    assert [s.key for s in iter_samples(shard, None)] == ["c", "a", "b"]


def test_reading_samples_back_takes_no_digest(tmp_path, monkeypatch):
    (shard,) = scan(str(write_pool(tmp_path, 1, 3)))
    monkeypatch.setattr("clipcov_pipeline.pool.samples.hashlib", None)
    assert [group.get("png") for group in iter_groups(shard, None)] == [image_bytes(i) for i in range(3)]
    assert [group.members for group in iter_all_groups(shard, {"png"})] == [
        [("png", image_bytes(i))] for i in range(3)
    ]


def test_every_ok_row_can_be_read_back(tmp_path):
    members = [*sample_members("a", "x"), ("b.png", b"x"), ("c.txt", b"x"), *sample_members("d", "y")]
    (shard,) = scan(str(write_tar(tmp_path / "s.tar", members)))
    manifest = read_shard(shard, max_pixels=MAX_PIXELS).manifest
    good = manifest.filter(pl.col("status") == "ok")
    samples = list(iter_samples(shard, set(good["key"])))
    assert [s.caption for s in samples] == good["caption"].to_list()
    assert [hashlib.sha256(s.image).hexdigest() for s in samples] == good["image_sha256"].to_list()


def test_large_shard_is_read_in_little_memory(tmp_path):
    import tracemalloc

    filler = os.urandom(1 << 20)
    members = (m for i in range(60) for m in [*sample_members(f"{i:03d}", "x"), (f"{i:03d}.npy", filler)])
    (shard,) = scan(str(write_tar(tmp_path / "s.tar", members)))
    del filler
    tracemalloc.start()
    manifest = read_shard(shard, max_pixels=MAX_PIXELS).manifest
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert manifest.height == 60
    assert peak < 8 << 20  # the tar has 60 MB


# --- finding shards -----------------------------------------------------------------------------------
