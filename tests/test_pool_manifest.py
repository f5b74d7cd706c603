"""Finding shards, checking every sample, reading samples back: against tars broken on purpose."""

import gzip
import hashlib
import io
import os
import random
import struct
import tarfile
import threading
import time
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import polars as pl
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.manifest import MANIFEST_SCHEMA, read_shard, uid_of
from clipcov_pipeline.pool.samples import SampleStatus, iter_samples
from clipcov_pipeline.pool.tars import NotATarError, iter_all_groups, iter_groups
from make_shards import image_bytes, sample_members, tar_bytes, write_pool, write_tar

MAX_PIXELS = 10_000


def read(path: Path, max_pixels: int = MAX_PIXELS):
    (shard,) = scan(str(path))
    return read_shard(shard, max_pixels=max_pixels)


def statuses(report) -> list[tuple[str, str]]:
    return list(report.manifest.select("key", "status").iter_rows())


def one_bad(tmp_path: Path, members) -> dict:
    """Manifest row of sample `bad` between two good ones, which must stay good."""
    path = write_tar(
        tmp_path / "s.tar", [*sample_members("a", "first", 1), *members, *sample_members("z", "last", 2)]
    )
    rows = {row["key"]: row for row in read(path).manifest.iter_rows(named=True)}
    assert rows["a"]["status"] == rows["z"]["status"] == "ok"
    assert set(rows) == {"a", "bad", "z"}
    return rows["bad"]


def png_of_declared_size(width: int, height: int) -> bytes:
    """A PNG whose header declares a size and whose data is for one pixel: a decompression bomb's outside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
        + chunk(b"IEND", b"")
    )


# --- a good shard -----------------------------------------------------------------------------------


def test_manifest_of_a_good_shard(tmp_path):
    members = sample_members("000", " a caption \n", 5)
    path = write_tar(tmp_path / "00000.tar", members)
    report = read(path)
    assert dict(report.manifest.schema) == MANIFEST_SCHEMA
    assert report.quarantined is None
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.manifest.row(0, named=True) == {
        "uid": hashlib.sha256(b"00000/000").hexdigest()[:32],
        "key": "000",
        "shard": "00000",
        "caption": "a caption",
        "width": 24,
        "height": 16,
        "status": "ok",
        "reason": None,
        "image_ext": "png",
        "image_sha256": hashlib.sha256(members[0][1]).hexdigest(),
    }


@pytest.mark.parametrize(
    ("extension", "kind"),
    [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("JPG", "JPEG")],
)
def test_image_formats(tmp_path, extension, kind):
    path = write_tar(tmp_path / "s.tar", [(f"k.{extension}", image_bytes(kind=kind)), ("k.TXT", b"words")])
    row = read(path).manifest.row(0, named=True)
    assert (row["status"], row["image_ext"], row["caption"]) == ("ok", extension.lower(), "words")


def test_an_empty_tar_is_a_tar_without_samples(tmp_path):
    report = read(write_tar(tmp_path / "s.tar", []))
    assert report.quarantined is None
    assert report.manifest.height == 0
    assert dict(report.manifest.schema) == MANIFEST_SCHEMA


def test_report_depends_on_bytes_only(tmp_path):
    members = [*sample_members("a", "x"), ("bad.png", b"no image"), ("bad.txt", b"y")]
    first = read(write_tar(tmp_path / "one" / "s.tar", members))
    second = read(write_tar(tmp_path / "two" / "s.tar", members))
    assert first.manifest.equals(second.manifest)
    assert first.sha256 == second.sha256


def test_report_does_not_depend_on_the_number_of_threads(tmp_path):
    members = [m for i in range(50) for m in sample_members(f"{i:03d}", "x", i, uid=f"{i % 40:032x}")]
    members[30:30] = [("bad.png", b"no image"), ("bad.txt", b"y")]
    (shard,) = scan(str(write_tar(tmp_path / "s.tar", members)))
    one, many = (read_shard(shard, max_pixels=MAX_PIXELS, workers=workers) for workers in (1, 8))
    assert one.manifest.equals(many.manifest)
    assert one.manifest["status"].value_counts(sort=True).rows() == [
        ("ok", 40),
        ("duplicate_uid", 10),
        ("undecodable_image", 1),
    ]


def test_progress_counts_every_sample(tmp_path):
    (shard,) = scan(str(write_pool(tmp_path, n_shards=1, samples_per_shard=7)))
    steps: list[int] = []
    read_shard(shard, max_pixels=MAX_PIXELS, progress=steps.append)
    assert sum(steps) == 7


def test_uid_is_the_json_s_where_it_is_one():
    given = "0123456789ABCDEF0123456789abcdef"
    assert uid_of("s", "k", {"uid": given}) == given.lower()
    hashed = hashlib.sha256(b"s/k").hexdigest()[:32]
    for meta in (None, {}, {"uid": "12"}, {"uid": 7}, {"uid": given + "0"}, {"uid": "g" * 32}):
        assert uid_of("s", "k", meta) == hashed


# --- one status after another -------------------------------------------------------------------------


def test_undecodable_image(tmp_path):
    row = one_bad(tmp_path, [("bad.jpg", b"<html>404</html>"), ("bad.txt", b"words")])
    assert row["status"] == SampleStatus.undecodable_image
    assert (row["width"], row["caption"]) == (None, "words")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_image_cut_short_has_a_good_header_but_is_undecodable(tmp_path, kind):
    whole = image_bytes(size=(64, 64), kind=kind)
    row = one_bad(tmp_path, [(f"bad.{kind.lower()}", whole[: len(whole) // 2]), ("bad.txt", b"words")])
    assert row["status"] == SampleStatus.undecodable_image
    assert row["reason"]
    assert "0x7" not in row["reason"]


def test_missing_image(tmp_path):
    row = one_bad(tmp_path, [("bad.txt", b"words"), ("bad.json", b"{}")])
    assert row["status"] == SampleStatus.missing_image
    assert ".json, .txt" in row["reason"]


def test_missing_caption(tmp_path):
    row = one_bad(tmp_path, [("bad.png", image_bytes()), ("bad.json", b'{"caption": "not taken"}')])
    assert (row["status"], row["caption"]) == (SampleStatus.missing_caption, None)


@pytest.mark.parametrize("caption", [b"", b" \n\t", "\u3000".encode()])
def test_empty_caption(tmp_path, caption):
    row = one_bad(tmp_path, [("bad.png", image_bytes()), ("bad.txt", caption)])
    assert (row["status"], row["caption"]) == (SampleStatus.empty_caption, None)


def test_non_utf8_caption(tmp_path):
    row = one_bad(tmp_path, [("bad.png", image_bytes()), ("bad.txt", "caf\u00e9".encode("latin-1"))])
    assert (row["status"], row["caption"]) == (SampleStatus.non_utf8_caption, None)


def test_pixel_bound_is_inclusive(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("k.png", image_bytes(size=(10, 7))), ("k.txt", b"words")])
    assert statuses(read(path, max_pixels=70)) == [("k", "ok")]
    assert statuses(read(path, max_pixels=69)) == [("k", "too_many_pixels")]


def test_pixels_are_bounded_before_decoding(tmp_path):
    # decoding this image would fail: the status shows that only its header was read
    row = one_bad(tmp_path, [("bad.png", png_of_declared_size(12_000, 12_000)), ("bad.txt", b"words")])
    assert row["status"] == SampleStatus.too_many_pixels
    assert (row["width"], row["height"]) == (12_000, 12_000)


def test_image_over_pillow_s_own_bound(tmp_path):
    path = write_tar(
        tmp_path / "s.tar", [("k.png", png_of_declared_size(60_000, 60_000)), ("k.txt", b"words")]
    )
    assert statuses(read(path, max_pixels=10**12)) == [("k", "too_many_pixels")]


@pytest.mark.parametrize("broken", [b"{", b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b""])
def test_broken_json_does_not_cost_the_pair(tmp_path, broken):
    members = [("k.png", image_bytes()), ("k.txt", b"words"), ("k.json", broken)]
    report = read(write_tar(tmp_path / "s.tar", members))
    assert statuses(report) == [("k", "ok")]
    assert report.manifest["uid"][0] == uid_of("s", "k", None)


def test_duplicate_uid_keeps_the_first_good_sample(tmp_path):
    uid = "ab" * 16
    undecodable = [("a.png", b"x"), ("a.txt", b"x"), ("a.json", f'{{"uid": "{uid}"}}'.encode())]
    path = write_tar(
        tmp_path / "s.tar",
        [*undecodable, *sample_members("b", "x", uid=uid), *sample_members("c", "x", uid=uid.upper())],
    )
    assert [status for _, status in statuses(read(path))] == ["undecodable_image", "ok", "duplicate_uid"]


def test_members_of_a_sample_must_be_neighbours(tmp_path):
    png = image_bytes()
    path = write_tar(tmp_path / "s.tar", [("a.png", png), ("b.png", png), ("a.txt", b"x"), ("b.txt", b"y")])
    assert statuses(read(path)) == [
        ("a", "missing_caption"),
        ("b", "missing_caption"),
        ("a", "duplicate_key"),
        ("b", "duplicate_key"),
    ]


def test_a_key_that_comes_again_is_set_aside(tmp_path):
    path = write_tar(tmp_path / "s.tar", [*sample_members("a", "one", 1), *sample_members("a", "two", 2)])
    assert statuses(read(path)) == [("a", "ok"), ("a", "duplicate_key")]
    (shard,) = scan(str(path))
    assert [sample.caption for sample in iter_samples(shard, {"a"})] == ["one"]


def test_grouping_agrees_with_webdataset(tmp_path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    png = image_bytes()
    names = ["d.e/a.png", "d.e/a.txt", "./b.png", "b.png", "c.seg.png", "c.PNG", "c.txt", ".hidden", "noext"]
    names += ["._c.png", "__meta__/x.txt", "long/" * 30 + "k.png", "caf\u00e9.txt", "a b.txt"]
    path = write_tar(tmp_path / "s.tar", [(name, png) for name in names])
    with path.open("rb") as stream:
        expected = [
            (sample["__key__"], {name for name in sample if not name.startswith("__")})
            for sample in group_by_keys(tar_file_expander([{"url": "s.tar", "stream": stream}]))
        ]
    assert [key for key, _ in statuses(read(path))] == [key for key, _ in expected]
    assert ("c", {"seg.png", "png", "txt"}) in expected
    assert dict(statuses(read(path)))["c"] == "non_utf8_caption"  # its image is .PNG, not .seg.png


def test_member_name_that_is_no_utf8(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (("caf\u00e9.png", image_bytes()), ("caf\u00e9.txt", b"words")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (shard,) = scan(str(tmp_path))
    manifest = read_shard(shard, max_pixels=MAX_PIXELS).manifest
    assert manifest["status"].to_list() == ["ok"]
    assert len(list(iter_samples(shard, set(manifest["key"])))) == 1


# --- damaged tars ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_samples() -> tuple[bytes, list[tuple[int, int, str]]]:
    """(tar, (first byte of the header, first byte after the data, name) of its nine members)."""
    data = tar_bytes(member for key in "abc" for member in sample_members(key, key))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data, [(info.offset, info.offset_data + info.size, info.name) for info in tar]


@pytest.mark.parametrize("member", range(1, 9))
@pytest.mark.parametrize("where", ["header", "data"])
def test_cut_anywhere_keeps_what_came_before(tmp_path, three_samples, member, where):
    data, members = three_samples
    start, end, name = members[member]
    cut = start + 100 if where == "header" else end - 1
    path = tmp_path / "s.tar"
    path.write_bytes(data[:cut])
    report = read(path)
    # a header that cannot be read does not say whose it is: the sample before it may lack a member
    cut_key = name[0] if where == "data" else members[member - 1][2][0]
    whole = "abc"[: "abc".index(cut_key)]
    assert statuses(report) == [*((key, "ok") for key in whole), (cut_key, "truncated")]
    assert report.quarantined is None
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (shard,) = scan(str(path))
    assert [sample.key for sample in iter_samples(shard, None)] == list(whole)


def test_tar_without_its_end_mark_is_truncated(tmp_path, three_samples):
    data, members = three_samples
    end = -(-members[-1][1] // 512) * 512
    (tmp_path / "s.tar").write_bytes(data[:end])
    report = read(tmp_path / "s.tar")
    assert [status for _, status in statuses(report)] == ["ok", "ok", "truncated"]
    assert "end-of-archive" in report.manifest["reason"][2]


def test_overwritten_header_in_the_middle_is_not_the_end(tmp_path, three_samples):
    data, members = three_samples
    start = members[5][0]
    (tmp_path / "s.tar").write_bytes(data[:start] + b"\xa5" * 512 + data[start + 512 :])
    assert statuses(read(tmp_path / "s.tar")) == [("a", "ok"), ("b", "truncated")]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not a tar"),
        (random.Random(0).randbytes(5000), "not a tar"),
        (gzip.compress(tar_bytes(sample_members("a", "x"))), "gzip"),
        (tar_bytes(sample_members("a", "x"))[:300], "not a tar"),
    ],
    ids=["empty", "page", "noise", "gzip", "cut"],
)
def test_file_that_is_no_tar_is_quarantined(tmp_path, content, word):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    report = read(path)
    assert report.quarantined is not None
    assert word in report.quarantined
    assert report.manifest.height == 0
    assert dict(report.manifest.schema) == MANIFEST_SCHEMA
    assert report.sha256 == hashlib.sha256(content).hexdigest()
    (shard,) = scan(str(path))
    with pytest.raises(NotATarError):
        list(iter_samples(shard, None))


# --- reading samples back ---------------------------------------------------------------------------------


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


def test_server_that_does_not_answer():
    pytest.importorskip("aiohttp")
    with pytest.raises(InputError, match="cannot be listed"):
        scan("http://127.0.0.1:9/pool/{0..1}.tar")
