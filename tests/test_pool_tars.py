"""Reading tars: members grouped as webdataset groups them, and tars cut and overwritten anywhere."""

import gzip
import hashlib
import io
import random
import tarfile

import pytest

from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import MANIFEST_SCHEMA, read_shard
from clipcov_pipeline.pool.samples import iter_samples
from clipcov_pipeline.pool.tars import NotATarError
from make_shards import MAX_PIXELS, image_bytes, read, sample_members, statuses, tar_bytes, write_tar


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


# --- damaged tars -----------------------------------------------------------------------------------


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
