"""Parquet files and folders of images as a pool: the same samples as in tars, bad rows with a reason."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.captions import CaptionRule
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import ShardReport, read_shard
from clipcov_pipeline.pool.packing import read_packed
from clipcov_pipeline.pool.samples import iter_samples
from clipcov_pipeline.pool.sources import find_shards, unread_parquet
from make_shards import image_bytes, write_pool
from make_tables import Pair, write_folder, write_hf, write_img2dataset, write_table, write_tars
from range_server import serve

PIXELS = 10_000
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CAPTIONS = ("a cat, sleeping", 'she said "no"', "Ein Bär\nim Wald", "  spaces  ")


def pairs(count: int = 4, start: int = 0) -> list[Pair]:
    numbers = range(start, start + count)
    captions = [f"{CAPTIONS[n % 4]} {n}" if n >= 4 else CAPTIONS[n] for n in numbers]
    return [
        (f"{n:09d}", image_bytes(n), caption, f"{n + 1:032x}")
        for n, caption in zip(numbers, captions, strict=True)
    ]


def reports(source: Path | str, folder: Path, **columns: Any) -> dict[str, ShardReport]:
    """What the package says of every shard of a source, packed into ``folder``."""
    found = {}
    for shard in find_shards(str(source), **columns):
        if shard.rows is None:
            found[shard.name] = read_shard(shard, max_pixels=PIXELS)
        else:
            folder.mkdir(exist_ok=True)
            found[shard.name] = read_packed(shard, folder / f"{shard.name}.tar", max_pixels=PIXELS)
    return found


def one(source: Path | str, folder: Path, **columns: Any) -> ShardReport:
    (report,) = reports(source, folder, **columns).values()
    return report


def problems(report: ShardReport) -> list[tuple[str, str | None]]:
    return list(report.manifest.select("status", "reason").iter_rows())


@pytest.mark.parametrize("layout", ["hf", "img2dataset", "csv", "jsonl"])
def test_the_same_pairs_give_the_same_samples_in_every_layout(tmp_path, layout):
    given = pairs()
    match layout:
        case "hf":
            write_hf(tmp_path / "pool" / "train-0.parquet", given)
        case "img2dataset":
            write_img2dataset(tmp_path / "pool" / "00000.parquet", given)
        case kind:
            write_folder(tmp_path / "pool", given, kind)
    report = one(tmp_path / "pool", tmp_path / "packed")
    tars = one(write_tars(tmp_path / "tars" / "00000.tar", given), tmp_path)
    compared = ["uid", "caption", "width", "height", "status", "image_ext", "image_sha256"]
    assert report.manifest.select(compared).equals(tars.manifest.select(compared))
    assert report.manifest["image_sha256"].to_list() == [hashlib.sha256(p[1]).hexdigest() for p in given]
    assert report.manifest["caption"].to_list() == [caption.strip() for caption in CAPTIONS]
    hashes = ["uid", "image_hash", "caption_hash"]
    assert report.places.select(hashes).equals(tars.places.select(hashes))


def test_places_lead_to_the_bytes_as_stored_and_the_other_columns_are_in_the_json(tmp_path):
    write_img2dataset(tmp_path / "00000.parquet", pairs())
    report = one(tmp_path / "00000.parquet", tmp_path / "packed")
    (tar,) = (tmp_path / "packed").iterdir()
    data = tar.read_bytes()
    for place, (key, image, caption, uid) in zip(report.places.to_dicts(), pairs(), strict=True):
        image_at, caption_at = place["image_offset"], place["caption_offset"]
        assert data[image_at : image_at + place["image_size"]] == image
        assert data[caption_at : caption_at + place["caption_size"]] == caption.encode()
        meta = json.loads(data[place["json_offset"] : place["json_offset"] + place["json_size"]])
        assert (meta["key"], meta["uid"], meta["width"]) == (key, uid, 24)
        assert "png" not in meta
    assert hashlib.sha256(data).hexdigest() == report.sha256
    (shard,) = scan(str(tar))
    assert [sample.key for sample in iter_samples(shard, None)] == [p[0] for p in pairs()]


def test_a_table_without_uids_has_those_of_the_tar_that_img2dataset_would_have_written(tmp_path):
    given = pairs()
    write_img2dataset(tmp_path / "pool" / "00000.parquet", given, uid=pa.nulls(len(given), pa.string()))
    report = one(tmp_path / "pool", tmp_path / "packed")
    expected = [hashlib.sha256(f"00000/{key}".encode()).hexdigest()[:32] for key, *_ in given]
    assert report.manifest["uid"].to_list() == expected


def test_bad_rows_of_a_parquet_file_are_kept_aside_with_their_reasons(tmp_path):
    good = image_bytes(1)
    images = [
        {"bytes": good, "path": None},
        None,
        {"bytes": None, "path": "elsewhere/cat.png"},
        {"bytes": b"", "path": None},
        {"bytes": image_bytes(2), "path": "x.png"},
        {"bytes": image_bytes(3), "path": None},
        {"bytes": b"no image", "path": None},
        {"bytes": image_bytes(4), "path": None},
    ]
    table = pa.table(
        {
            "image": pa.array(images, STRUCT),
            "text": ["good", "a", "b", "c", None, " ", "d", "again"],
            "key": ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k0"],
        }
    )
    report = one(write_table(tmp_path / "x.parquet", table), tmp_path / "packed")
    found = problems(report)
    assert [status for status, _ in found] == [
        "ok",
        "missing_image",
        "missing_image",
        "missing_image",
        "missing_caption",
        "empty_caption",
        "undecodable_image",
        "duplicate_key",
    ]
    assert [reason for _, reason in found][:5] == [
        None,
        "row 1: image is null",
        "row 2: image has no bytes, its image lies elsewhere: elsewhere/cat.png",
        "row 3: image is empty",
        "row 4: text is null",
    ]
    assert found[7][1] == "row 7: an earlier row is also named 'k0'"
    assert report.places["uid"].to_list() == [report.manifest["uid"][0]]


def test_img2dataset_failures_have_its_own_words(tmp_path):
    given = pairs(2)
    write_img2dataset(
        tmp_path / "00000.parquet",
        given,
        status=["success", "failed_to_download"],
        error_message=[None, "HTTP Error 404: Not Found"],
        png=[given[0][1], None],
    )
    report = one(tmp_path / "00000.parquet", tmp_path / "packed")
    assert problems(report)[1] == ("missing_image", "row 1: failed_to_download: HTTP Error 404: Not Found")


def test_a_caption_that_is_no_utf8_costs_its_own_row(tmp_path):
    given = pairs(3)
    captions = pa.array([b"a", b"caf\xe9", None], pa.binary()).view(pa.string())
    table = pa.table({"png": [p[1] for p in given], "caption": captions})
    report = one(write_table(tmp_path / "x.parquet", table), tmp_path / "packed")
    assert report.manifest["status"].to_list() == ["ok", "non_utf8_caption", "missing_caption"]


def test_values_that_python_does_not_have_cost_a_row_at_most(tmp_path):
    given = pairs(2)
    texts = pa.array([b"re", b"caf\xe9"], pa.binary()).view(pa.string())
    table = pa.table(
        {
            "png": [pair[1] for pair in given],
            "caption": [pair[2] for pair in given],
            "texts": pa.ListArray.from_arrays([0, 1, 2], texts),
        }
    )
    report = one(write_table(tmp_path / "x.parquet", table), tmp_path / "packed")
    assert report.manifest["status"].to_list() == ["ok", "unreadable_row"]
    assert report.manifest["reason"][1].startswith("row 1: texts: ")
    late = table.drop_columns("texts").append_column("when", pa.array([0, 2**40 * 1000], pa.timestamp("ms")))
    report = one(write_table(tmp_path / "y.parquet", late), tmp_path / "packed")
    assert report.manifest["status"].to_list() == ["ok", "ok"]


@pytest.mark.parametrize("layout", ["parquet", "folder"])
def test_captions_of_a_rule_without_txt_need_no_column_of_their_own(tmp_path, layout):
    given, texts = pairs(2), [["one", "uno"], ["two"]]
    if layout == "parquet":
        table = pa.table({"png": [pair[1] for pair in given], "texts": texts})
        source = write_table(tmp_path / "x.parquet", table)
    else:
        source = write_folder(tmp_path / "pool", given, "jsonl")
        rows = [
            {"file_name": f"{pair[0]}.png", "texts": text} for pair, text in zip(given, texts, strict=True)
        ]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="texts in a list"):
        find_shards(str(source))
    (shard,) = find_shards(str(source), captions=CaptionRule.of("json:texts"))
    report = read_packed(shard, tmp_path / "x.tar", max_pixels=PIXELS, captions=CaptionRule.of("json:texts"))
    assert report.manifest["status"].to_list() == ["ok", "ok"]
    assert report.manifest["caption"].to_list() == ["one", "two"]


def test_a_row_without_a_caption_in_its_column_has_that_of_another_source(tmp_path):
    given = pairs(3)
    table = pa.table(
        {
            "png": [pair[1] for pair in given],
            "caption": [None, "txt", None],
            "re": ["json", None, None],
        }
    )
    rule = CaptionRule.of(["txt", "json:re"])
    (shard,) = find_shards(str(write_table(tmp_path / "x.parquet", table)), captions=rule)
    report = read_packed(shard, tmp_path / "x.tar", max_pixels=PIXELS, captions=rule)
    assert report.manifest["caption"].to_list() == ["json", "txt", None]
    assert report.manifest["status"].to_list() == ["ok", "ok", "missing_caption"]
    assert report.manifest["reason"][2].startswith("row 2: caption is null; no .txt member; key 're'")


def test_metadata_that_was_written_a_moment_ago_is_left_for_the_next_scan(tmp_path):
    write_folder(tmp_path / "a", pairs(2))
    old = write_folder(tmp_path / "b", pairs(2))
    os.utime(old, (1e9, 1e9))
    assert [shard.name for shard in find_shards(str(tmp_path), settle_seconds=60)] == ["b__metadata-00000"]


def test_a_truncated_parquet_file_is_quarantined_and_the_others_are_read(tmp_path):
    whole = write_hf(tmp_path / "pool" / "b.parquet", pairs())
    (tmp_path / "pool" / "a.parquet").write_bytes(whole.read_bytes()[:-40])
    found = reports(tmp_path / "pool", tmp_path / "packed")
    assert found["a"].quarantined
    assert "not a whole parquet file" in found["a"].quarantined
    assert found["a"].manifest.is_empty()
    assert found["b"].quarantined is None
    assert found["b"].places.height == 4


def test_a_damaged_row_group_loses_its_own_rows_only(tmp_path):
    given = pairs(6)
    table = pa.table({"png": [p[1] for p in given], "caption": [p[2] for p in given]})
    path = write_table(tmp_path / "x.parquet", table, rows=2)
    data = bytearray(path.read_bytes())
    at = data.index(given[2][1][100:116])  # inside the second group's first image: its page is compressed
    data[at - 120 : at] = b"\xff" * 120
    path.write_bytes(data)
    report = one(path, tmp_path / "packed")
    assert report.manifest["status"].to_list() == ["ok", "ok", "unreadable_row", "unreadable_row", "ok", "ok"]
    assert "row 2: row group 1 is damaged" in report.manifest["reason"][2]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("image", "jpg", "caption"), "shards.image_column: found 2 image columns (image, jpg): name one"),
        (
            ("image", "caption", "text"),
            "shards.caption_column: found 2 caption columns (caption, text): name one",
        ),
        (
            ("vector", "caption"),
            "shards.image_column: found no image column, expected it named: one of vector, caption",
        ),
    ],
)
def test_columns_that_cannot_be_told_are_named(tmp_path, names, said):
    columns = {
        name: pa.array([b"x"], pa.binary()) if name in ("image", "jpg", "vector") else ["x"] for name in names
    }
    path = write_table(tmp_path / "x.parquet", pa.table(columns))
    with pytest.raises(InputError) as error:
        find_shards(str(path))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_the_columns_that_the_yaml_names_are_read(tmp_path):
    first, second = image_bytes(1), image_bytes(2)
    table = pa.table({"image": [first], "photo": [second], "text": ["one"], "German": ["zwei"]})
    path = write_table(tmp_path / "x.parquet", table)
    report = one(path, tmp_path / "packed", image_column="photo", caption_column="German")
    assert report.manifest["caption"].to_list() == ["zwei"]
    assert report.manifest["image_sha256"].to_list() == [hashlib.sha256(second).hexdigest()]
    with pytest.raises(
        InputError, match="found no column 'Foto', expected one of: image, photo, text, German"
    ):
        find_shards(str(path), image_column="Foto")


@pytest.mark.parametrize("pattern", ["p/{0..1}.parquet", "p/*.parquet", "p", "p/?.parquet"])
def test_parquet_files_by_folder_braces_and_glob(tmp_path, pattern):
    for number in range(2):
        write_hf(tmp_path / "p" / f"{number}.parquet", pairs(2, 2 * number))
    (tmp_path / "p" / "README.md").write_text("x")
    assert [shard.name for shard in find_shards(str(tmp_path / pattern))] == ["0", "1"]


def test_parquet_from_a_remote_store(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    path = write_hf(tmp_path / "a.parquet", pairs())
    memory.pipe("/hf/a.parquet", path.read_bytes())
    write_folder(tmp_path / "pool", pairs())
    for file in (tmp_path / "pool").iterdir():
        memory.pipe(f"/folder/{file.name}", file.read_bytes())
    try:
        (of_parquet,) = reports("memory://hf", tmp_path / "one").values()
        (of_folder,) = reports("memory://folder", tmp_path / "two").values()
    finally:
        memory.rm("/hf", recursive=True)
        memory.rm("/folder", recursive=True)
    assert of_parquet.places["uid"].to_list() == of_folder.places["uid"].to_list() == [p[3] for p in pairs()]


def test_tars_with_metadata_beside_them_are_read_as_tars(tmp_path):
    write_pool(tmp_path / "pool", 2)
    for number in range(2):
        write_table(tmp_path / "pool" / f"{number:05d}.parquet", pa.table({"url": ["x"], "caption": ["y"]}))
    shards = find_shards(str(tmp_path / "pool"))
    assert shards == scan(str(tmp_path / "pool"))
    assert unread_parquet(str(tmp_path / "pool"), shards) == 0
    write_hf(tmp_path / "pool" / "more.parquet", pairs())
    assert find_shards(str(tmp_path / "pool")) == shards
    assert unread_parquet(str(tmp_path / "pool"), shards) == 1
    with pytest.raises(InputError, match=r"found the column 'jpg', but .* holds tars"):
        find_shards(str(tmp_path / "pool"), image_column="jpg")


def test_parquet_and_metadata_in_one_folder_is_one_line(tmp_path):
    write_folder(tmp_path / "pool" / "images", pairs())
    write_hf(tmp_path / "pool" / "a.parquet", pairs())
    with pytest.raises(InputError, match=r"found 1 parquet files and images/metadata.csv, expected one kind"):
        find_shards(str(tmp_path / "pool"))
    assert len(find_shards(str(tmp_path / "pool" / "images" / "metadata.csv"))) == 1


def test_bad_lines_of_metadata_are_kept_aside_with_their_reasons(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(image_bytes(9))
    for number in range(8):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
    (folder / "metadata.csv").write_bytes(
        b"\xef\xbb\xbffile_name,text\n"
        b"0.png,good\n"
        b"gone.png,not there\n"
        b"../outside.png,climbs\n"
        b"1.png,first\n"
        b"1.png,second\n"
        b"2.png,a cat, sleeping\n"
        b"3.png,\n"
        b"4.png,caf\xe9\n"
        b",no name\n"
        b'5.png,"not closed\n6.png,swallowed\n'
    )
    report = one(folder, tmp_path / "packed")
    found = {reason: status for status, reason in problems(report)}
    assert report.places["key"].to_list() == ["0", "1"]
    assert found["line 3: no file gone.png"] == "missing_image"
    assert found["line 4: ../outside.png leads out of the folder"] == "missing_image"
    assert found["line 6: an earlier row is also named '1'"] == "duplicate_key"
    assert found["line 7 has 3 fields, the first line 2: quote text with commas"] == "unreadable_row"
    assert found["line 10: no file name"] == "missing_image"
    assert found["line 11 does not parse: unexpected end of data"] == "unreadable_row"
    assert found["7.png: no line of metadata.csv names it"] == "missing_caption"
    counts = report.manifest["status"].value_counts()
    assert dict(counts.iter_rows())["empty_caption"] == dict(counts.iter_rows())["non_utf8_caption"] == 1


def test_a_csv_without_a_header_is_one_line_or_quarantined_beside_others(tmp_path):
    folder = tmp_path / "pool"
    bad = write_folder(folder / "bad", pairs(2))
    bad.write_text("000000000.png,a cat\n000000001.png,a dog\n")
    with pytest.raises(
        InputError, match=r"metadata.csv: found the columns 000000000.png, a cat, expected file_name"
    ):
        find_shards(str(folder))
    write_folder(folder / "good", pairs(2, 2), "jsonl")
    found = reports(folder, tmp_path / "packed")
    assert list(found) == ["bad__metadata", "good__metadata-00000"]
    assert "expected file_name" in (found["bad__metadata"].quarantined or "")
    assert found["good__metadata-00000"].places.height == 2


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_metadata_in_utf_16_is_one_line(tmp_path, encoding):
    table = write_folder(tmp_path / "pool", pairs(1))
    table.write_bytes(("\ufeff" + table.read_text()).encode(encoding))
    with pytest.raises(InputError, match=r"metadata.csv: found UTF-16, expected UTF-8: save it as that$"):
        find_shards(str(tmp_path / "pool"))


def test_lines_of_json_that_are_none_are_kept_aside(tmp_path):
    table = write_folder(tmp_path / "pool", pairs(2), "jsonl")
    lines = table.read_text().splitlines()
    table.write_text(
        "\n".join([lines[0], '{"file_name": ', "[1]", lines[1].replace('"she said \\"no\\""', "7")])
    )
    report = one(tmp_path / "pool", tmp_path / "packed")
    assert problems(report) == [
        ("ok", None),
        ("unreadable_row", "line 2 is no JSON object"),
        ("unreadable_row", "line 3 is no JSON object"),
        ("missing_caption", "line 4: text is a int, expected text"),
    ]


def test_names_that_no_tar_can_have_become_keys_of_their_own(tmp_path):
    names = ["a.b", "a_b", "deep/er/c.1", "__x__", "same", "Bär", "n" * 200]
    given = [(name, image_bytes(n), f"caption {n}", f"{n + 1:032x}") for n, name in enumerate(names)]
    write_folder(tmp_path / "pool", given)
    (tmp_path / "pool" / "same.jpg").write_bytes(image_bytes(40, kind="JPEG"))
    with (tmp_path / "pool" / "metadata.csv").open("a") as file:
        file.write(f"same.jpg,another,{99:032x}\n")
    report = one(tmp_path / "pool", tmp_path / "packed")
    assert set(report.manifest["status"]) == {"ok"}
    keys = report.manifest["key"].to_list()
    assert keys == ["a_b", "a_b-1", "deep/er/c_1", "00000003", "same_png", "Bär", "n" * 200, "same_jpg"]
    assert report.manifest["caption"].to_list() == [*(f"caption {n}" for n in range(7)), "another"]


def test_another_image_or_line_changes_one_shard_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("clipcov_pipeline.pool.image_folder.ROWS_PER_SHARD", 10)
    given = [(*pair[:3], "") for pair in pairs(35)]  # their uids are hashes
    write_folder(tmp_path, given)

    def seen() -> tuple[dict[str, str], dict[str, str]]:
        """Versions of the shards, and uids by caption."""
        versions = {shard.name: shard.version for shard in find_shards(str(tmp_path))}
        found = reports(tmp_path, tmp_path / ".packed").values()
        return versions, dict(
            row for report in found for row in report.manifest.select("caption", "uid").rows()
        )

    before, uids = seen()
    assert list(before) == [f"metadata-{number:05d}" for number in range(4)]
    assert len(uids) == len(set(uids.values())) == 35
    write_folder(tmp_path, [*given[:10], (*pairs(1, 35)[0][:3], ""), *given[10:]])
    after, known = seen()
    (touched,) = {name for name, version in after.items() if before[name] != version}
    assert before.keys() == after.keys()
    assert uids.items() <= known.items()
    assert len(known) == 36
    own = next(
        name
        for name, report in reports(tmp_path, tmp_path / ".packed").items()
        if "000000035" in set(report.manifest["key"])
    )
    assert touched == own
    (tmp_path / "000000007.png").write_bytes(image_bytes(70, (9, 9)))
    last, _ = seen()
    assert sum(after[name] != version for name, version in last.items()) == 1


def test_packing_is_the_same_bytes_each_time_and_wherever_the_rows_come_from(tmp_path):
    write_img2dataset(tmp_path / "a" / "00000.parquet", pairs())
    write_img2dataset(tmp_path / "b" / "00000.parquet", pairs())
    first = one(tmp_path / "a", tmp_path / "one")
    second = one(tmp_path / "b", tmp_path / "two")
    assert first.sha256 == second.sha256
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "one" / "00000.tar").read_bytes())) as tar:
        assert {member.mtime for member in tar} == {0}


def test_a_folder_of_nothing_says_what_may_be_in_it(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(InputError, match=r"no .tar shard in it .* parquet files .* metadata.csv"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize("ranges", [True, False])
def test_parquet_from_a_web_server_with_ranges_and_without(tmp_path, ranges):
    folder = tmp_path / "served"
    for number in range(2):
        write_hf(folder / f"{number}.parquet", pairs(2, 2 * number))
    with serve(folder, ranges=ranges) as (address, _):
        found = reports(f"{address}/{{0..1}}.parquet", tmp_path / "packed")
    uids = [uid for report in found.values() for uid in report.places["uid"]]
    assert uids == [uid for *_, uid in pairs(4)]
