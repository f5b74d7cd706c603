"""Finding shards: in folders, by patterns and on other file systems, and when one has changed."""

import io
import os
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
from PIL import Image

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.pool.samples import iter_samples, read_images
from make_shards import MAX_PIXELS, sample_members, tar_bytes, write_pool, write_tar


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def names(shards: list[Shard]) -> list[str]:
    return [shard.name for shard in shards]


def test_scan_folder_at_all_levels_without_unfinished_and_hidden_files(tmp_path):
    good = tar_bytes([])
    for name in ("b.tar", "a/00000.tar", "a/x y.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(good)
    for name in ("c.tar.part", "d.tar.tmp", ".e.tar", "f.part.tar", ".g/h.tar", "i.tmp/j.tar", "readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(good)
    shards = scan(str(tmp_path))
    assert names(shards) == ["a__00000", "a__x_y", "b"]
    assert shards[0].url == str(tmp_path / "a/00000.tar")
    assert names(scan(str(tmp_path) + "/")) == names(shards)
    assert scan(f"file://{tmp_path}") == shards


def test_scan_brace_pattern_and_single_file_give_the_folder_s_names(tmp_path):
    write_pool(tmp_path, n_shards=4)
    whole = scan(str(tmp_path))
    assert scan(str(tmp_path / "{00000..00003}.tar")) == whole
    assert scan(str(tmp_path / "0000{1,3}.tar")) == [whole[1], whole[3]]
    assert scan(str(tmp_path / "00002.tar")) == [whole[2]]


def test_scan_brace_pattern_over_folders_names_them(tmp_path):
    for folder in "ab":
        write_pool(tmp_path / folder, n_shards=2)
    assert names(scan(str(tmp_path / "{a,b}/{00000..00001}.tar"))) == names(scan(str(tmp_path)))


def test_relative_source(tmp_path, monkeypatch):
    write_pool(tmp_path / "pool")
    monkeypatch.chdir(tmp_path)
    assert scan("pool") == scan("pool/{00000..00001}.tar") == scan(str(tmp_path / "pool"))
    monkeypatch.chdir(tmp_path / "pool")
    assert scan("{00000..00001}.tar") == scan(str(tmp_path / "pool"))


def test_version_changes_with_the_file_and_only_then(tmp_path):
    path = write_tar(tmp_path / "s.tar", sample_members("a", "x"))
    before = scan(str(path))
    assert scan(str(path)) == before
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    touched = scan(str(path))
    assert touched[0].version != before[0].version
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert scan(str(path))[0].version != touched[0].version


def test_shard_that_may_still_be_written_waits_for_the_next_scan(tmp_path):
    write_pool(tmp_path, n_shards=2)
    old = time.time() - 100
    os.utime(tmp_path / "00000.tar", (old, old))
    assert names(scan(str(tmp_path), settle_seconds=30)) == ["00000"]
    assert names(scan(str(tmp_path), settle_seconds=200)) == []
    assert names(scan(str(tmp_path))) == ["00000", "00001"]


def test_symbolic_links_to_shards(tmp_path):
    write_pool(tmp_path / "store", n_shards=1)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "x.tar").symlink_to(tmp_path / "store" / "00000.tar")
    assert names(scan(str(tmp_path / "pool"))) == ["x"]


def test_folders_reached_through_links(tmp_path):
    write_pool(tmp_path / "elsewhere" / "deep", n_shards=2)
    write_pool(tmp_path / "pool" / "own", n_shards=1)
    pool = tmp_path / "pool"
    (pool / "linked").symlink_to(tmp_path / "elsewhere")
    (pool / "again").symlink_to(pool / "own")  # a part of the pool by another name: its samples come once
    (tmp_path / "elsewhere" / "circle").symlink_to(pool)
    (pool / "broken").symlink_to(tmp_path / "gone")
    expected = ["linked__deep__00000", "linked__deep__00001", "own__00000"]
    assert names(scan(str(pool))) == expected
    (tmp_path / "front").symlink_to(pool)
    assert names(scan(str(tmp_path / "front"))) == expected


@pytest.mark.parametrize("pattern", ["*.tar", "0000?.tar", "*"])
def test_a_star_is_told_what_to_write(tmp_path, pattern):
    write_pool(tmp_path, n_shards=1)
    with pytest.raises(InputError) as error:
        scan(f"{tmp_path}/{pattern}")
    assert f"write {tmp_path} for all shards in it, or {tmp_path}/{{00000..00012}}.tar" in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "nowhere", "no such folder"),
        (lambda p: p / "nowhere.tar", "no such file"),
        (lambda p: p, "no .tar shard in it (1 other files)"),
        (lambda p: p / "{00000..00002}.tar", "3 of the 3 shards it names are not there"),
        (lambda p: p / "{00000..00002.tar", "braces do not match"),
        (lambda _: "gopher://pool", "Protocol not known"),
        (lambda _: "simplecache::memory://pool", "chained"),
    ],
)
def test_bad_source_is_one_clear_line(tmp_path, make, words):
    (tmp_path / "notes.txt").write_text("x")
    source = str(make(tmp_path))
    with pytest.raises(InputError) as error:
        scan(source)
    assert words in str(error.value)
    assert source in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_driver_names_the_extra():
    known = {"s3": "s3fs", "gs": "gcsfs"}
    missing = [protocol for protocol, module in known.items() if not _has(module)]
    if not missing:
        pytest.skip("the cloud extra is installed")
    for protocol in missing:
        with pytest.raises(InputError, match=r"clipcov-pipeline\[cloud\]"):
            scan(f"{protocol}://bucket/pool")


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def test_pattern_with_some_absent_shards_names_the_first(tmp_path):
    write_pool(tmp_path, n_shards=2)
    with pytest.raises(InputError, match=r"2 of the 4 shards .* first .*00002\.tar"):
        scan(str(tmp_path / "{00000..00003}.tar"))


def test_two_files_of_one_name(tmp_path):
    write_tar(tmp_path / "a" / "b.tar", [])
    write_tar(tmp_path / "a__b.tar", [])
    with pytest.raises(InputError, match="'a__b'; rename one"):
        scan(str(tmp_path))


# --- other file systems -------------------------------------------------------------------------------


# --- other file systems -----------------------------------------------------------------------------


@pytest.fixture
def memory_pool(tmp_path):
    write_pool(tmp_path, n_shards=3)
    files = fsspec.filesystem("memory")
    for path in tmp_path.glob("*.tar"):
        files.pipe_file(f"/pool/{path.name}", path.read_bytes())
    yield tmp_path
    files.rm("/pool", recursive=True)


def test_memory_file_system_reads_as_a_local_folder_does(memory_pool):
    remote, local = scan("memory://pool"), scan(str(memory_pool))
    assert names(remote) == names(local)
    assert scan("memory://pool/{00000..00002}.tar") == remote
    assert scan("memory://pool/00001.tar") == [remote[1]]
    for there, here in zip(remote, local, strict=True):
        ours = read_shard(there, max_pixels=MAX_PIXELS)
        assert ours.manifest.equals(read_shard(here, max_pixels=MAX_PIXELS).manifest)
        assert [s.key for s in iter_samples(there, None)] == ours.manifest["key"].to_list()


@pytest.mark.usefixtures("memory_pool")
def test_memory_file_system_version():
    before = scan("memory://pool")
    assert scan("memory://pool") == before
    fsspec.filesystem("memory").pipe_file("/pool/00001.tar", tar_bytes([]))
    after = scan("memory://pool")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


@pytest.fixture
def web_server(tmp_path):
    pytest.importorskip("aiohttp")
    write_pool(tmp_path / "pool", n_shards=2)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", tmp_path
    server.shutdown()
    server.server_close()


def test_web_server(web_server):
    address, folder = web_server
    shards = scan(f"{address}/pool/{{00000..00001}}.tar")
    assert names(shards) == ["00000", "00001"]
    assert shards[0].version.startswith(str((folder / "pool" / "00000.tar").stat().st_size))
    assert scan(f"{address}/pool/") == shards
    (local, _) = scan(str(folder / "pool"))
    report = read_shard(shards[0], max_pixels=MAX_PIXELS)
    assert report.sha256 == read_shard(local, max_pixels=MAX_PIXELS).sha256
    assert report.manifest["status"].to_list() == ["ok"] * 3
    with pytest.raises(InputError, match="1 of the 2 shards"):
        scan(f"{address}/pool/{{00001..00002}}.tar")


def test_a_large_shard_of_a_server_without_ranges_is_read_in_one_pass_and_looked_into(web_server):
    """fsspec asks for ranges above 5 MiB, and refuses a server that answers with all of the file."""
    address, folder = web_server
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
    members = [m for n in range(6) for m in ((f"{n}.png", png(noise)), (f"{n}.txt", f"{n}".encode()))]
    path = write_tar(folder / "pool" / "00002.tar", members)
    assert path.stat().st_size > 5 * 2**20
    shard, (local,) = scan(f"{address}/pool/")[2], scan(str(path))
    found = [read_shard(one, max_pixels=600 * 600) for one in (shard, local)]
    assert found[0].manifest["status"].to_list() == ["ok"] * 6
    assert found[0].sha256 == found[1].sha256
    assert dict(read_images(shard, ["1", "5"])) == dict.fromkeys(["1", "5"], png(noise))
    assert [sample.key for sample in iter_samples(shard, {"4"}, None)] == ["4"]


def test_server_that_does_not_answer():
    pytest.importorskip("aiohttp")
    with pytest.raises(InputError, match="cannot be listed"):
        scan("http://127.0.0.1:9/pool/{0..1}.tar")
