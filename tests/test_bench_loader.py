"""``clipcov bench loader`` on a tiny pool, as a user calls it, and its parts."""

import json
import urllib.request

import pytest
from click.testing import CliRunner

from clipcov_pipeline.bench.loader_pool import bytes_used, subset_rows, write_pool
from clipcov_pipeline.bench.loader_speed import COLD, CONDITIONS, FIRST, HTTP, HTTP_NEXT, drop_cached
from clipcov_pipeline.bench.loader_start import bench_start
from clipcov_pipeline.bench.loader_tables import start_table
from clipcov_pipeline.bench.range_server import range_server
from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError


def run(*arguments):
    result = CliRunner().invoke(cli, ["bench", "loader", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.long
def test_samples_a_second_of_tars_and_index(tmp_path):
    report = tmp_path / "bench.json"
    scratch = tmp_path / "scratch"
    output = run(
        "--samples", 240, "--image-size", 32, "--samples-per-shard", 80, "--densities", "0.1,1",
        "--repeat", 2, "--batch-size", 16, "--latency", 0.001, "--scratch-dir", scratch, "--json", report,
    )  # fmt: skip
    assert list(scratch.iterdir()) == []
    found = json.loads(report.read_text())
    rows = {(row["condition"], row["density"]): row for row in found["rows"]}
    assert {condition for condition, _ in rows} == set(CONDITIONS)
    assert [rows[FIRST, density]["samples"] for density in (0.1, 1)] == [16, 240]
    assert [len(rows[FIRST, density]["rates"]["index"]) for density in (0.1, 1)] == [4, 2]
    assert all(rate > 0 for row in rows.values() for rates in row["rates"].values() for rate in rates)
    assert all(condition in output for condition in CONDITIONS)
    # the whole pool: the index's shards are read through, its next pass fetches nothing, the tars' does again
    whole = rows[HTTP, 1]
    assert whole["note"] == "3 read through"
    assert whole["bytes_per_used"]["index"] == pytest.approx(found["pool_bytes"] / found["used_bytes"])
    again = rows[HTTP_NEXT, 1]["bytes_per_used"]
    assert again["index"] == 0
    assert again.get("tars", 2) > 1


def test_a_subset_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"5% of --samples 200 are 10, expected at least a batch of 32; give"
    ):
        run("--samples", 200, "--scratch-dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ten_subsets_as_index_and_as_tars(tmp_path):
    report = tmp_path / "bench.json"
    output = run("--subsets", 60, "--image-size", 32, "--json", report)
    found = json.loads(report.read_text())
    assert found["bytes"]["tars"] > found["bytes"]["index"] > 0
    assert all(way in output and seconds > 0 for way, seconds in found["seconds"].items())


@pytest.mark.slow
@pytest.mark.long
def test_start_on_a_large_index(tmp_path):
    found = bench_start(2000, 1, 16, "clipcov-tiny-RN", tmp_path, repeat=1)
    (one,) = found["starts"]
    assert one["seconds"] > one["read_seconds"] > 0
    assert one["workers"][0] > one["own"][0]
    assert "seconds to the first batch" in start_table(found)
    assert list(tmp_path.iterdir()) == []


def test_start_on_too_few_rows(tmp_path):
    with pytest.raises(InputError, match="--start 1000 rows, expected at least 3072; give more"):
        bench_start(1000, 1, 256, "clipcov-tiny-RN", tmp_path)


def test_the_pool_is_read_as_the_pipeline_reads_one(tmp_path):
    pool = write_pool(tmp_path, 25, 16, 10)
    assert [shard.name for shard in pool.shards] == ["00000", "00001", "00002"]
    for column in ("uid", "image_hash", "caption_hash"):
        assert pool.places[column].n_unique() == 25
    assert subset_rows(pool, 0.2, seed=0).height == 5
    assert 0 < bytes_used(pool.places) < sum(path.stat().st_size for path in tmp_path.iterdir())


def test_the_server_answers_ranges_and_counts(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with range_server(tmp_path, 0.0) as server:
        asked = urllib.request.Request(f"{server.address}/a", headers={"Range": "bytes=10-19"})
        with urllib.request.urlopen(asked) as answer:
            assert (answer.status, answer.read()) == (206, bytes(range(10, 20)))
        with urllib.request.urlopen(f"{server.address}/a") as answer:
            assert len(answer.read()) == 100
        assert server.sent() == (2, 110)


def test_dropped_files_are_as_they_were(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    drop_cached([tmp_path / "a"])
    assert (tmp_path / "a").read_bytes() == b"x" * 10_000
    assert COLD in CONDITIONS
