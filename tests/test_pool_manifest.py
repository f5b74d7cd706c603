"""The manifest of a shard: every sample has its status, against samples broken on purpose."""

import hashlib
import struct
import uuid
import zlib
from pathlib import Path

import pytest

from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import MANIFEST_SCHEMA, kept_aside, read_shard
from clipcov_pipeline.pool.samples import SampleStatus, iter_samples
from clipcov_pipeline.pool.uids import source_id_of, uid_of
from make_shards import MAX_PIXELS, image_bytes, read, sample_members, statuses, write_pool, write_tar


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
        "source_id": None,
        "json_problem": None,
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
    assert kept_aside(one.manifest) == {"duplicate_uid": 10, "undecodable_image": 1}  # not what is ok
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
    dashed = str(uuid.UUID(given)).upper()
    assert uid_of("s", "k", {"uid": dashed}) == given.lower()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("0" * 64, "0" * 64),  # a sha256
        (12, "12"),
        (0, "0"),
        ("img-7", "img-7"),
        ("0" * 32, None),
        (str(uuid.UUID(int=5)), None),
        (None, None),
        ("", None),
    ],
)
def test_an_id_that_is_no_uuid_is_kept_beside_the_uid(given, kept, tmp_path):
    members = [*sample_members("a", "x", 1, uid=given), *sample_members("b", "y", 2)]
    rows = read(write_tar(tmp_path / "s.tar", members)).manifest
    assert rows["source_id"].to_list() == [kept, None]
    assert source_id_of({"uid": given}) == kept
    hashed = hashlib.sha256(b"s/a").hexdigest()[:32]
    as_uid = f"{uuid.UUID(given).int:032x}" if kept is None and given else hashed
    assert rows["uid"][0] == as_uid


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "the .json member does not parse"),
        (b"", "the .json member is empty"),
        (b"[1, 2]", "the .json member is no object"),
        ('{"uid": "é"}'.encode("latin-1"), "the .json member is not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "the .json member does not parse"),
        (b'\xef\xbb\xbf{"uid": "7"}', None),
    ],
)
def test_a_json_of_no_use_loses_no_pair_and_is_counted(data, problem, tmp_path):
    members = [*sample_members("a", "x", 1)[:2], ("a.json", data), *sample_members("b", "y", 2)]
    rows = read(write_tar(tmp_path / "s.tar", members)).manifest
    assert rows["status"].to_list() == ["ok", "ok"]
    assert rows["json_problem"].to_list() == [problem, None]
    assert rows["source_id"][0] == ("7" if problem is None else None)


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    """Else equal captions differ: for every reader, the manifest, the places and a training."""
    texts = [b"a red bird", b"\xef\xbb\xbfa red bird", b"\xef\xbb\xbf  a red bird\r\n", b"\xef\xbb\xbf"]
    members = [m for i, text in enumerate(texts) for m in ((f"{i}.png", image_bytes(i)), (f"{i}.txt", text))]
    path = write_tar(tmp_path / "s.tar", members)
    report = read(path)
    assert report.manifest["caption"].to_list()[:3] == ["a red bird"] * 3
    assert report.manifest["status"].to_list() == ["ok", "ok", "ok", "empty_caption"]
    assert report.places["caption_hash"].n_unique() == 1
    (shard,) = scan(str(path))
    assert [sample.caption for sample in iter_samples(shard, None)] == ["a red bird"] * 3


# --- one status after another -------------------------------------------------------------------------


# --- one status after another -----------------------------------------------------------------------


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


def test_over_pillow_s_own_bound_the_size_is_known_too(tmp_path):
    row = one_bad(tmp_path, [("bad.png", png_of_declared_size(60_000, 60_000)), ("bad.txt", b"words")])
    assert row["reason"] == f"60000 x 60000 = 3600000000 pixels, over the bound of {MAX_PIXELS}"


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
