"""Parquet files and folders of images as shards: the same pairs as in tars, and what is wrong with some."""

import csv
import io
import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.manifest import ShardReport, read_shard
from clipcov_pipeline.pool.packing import explained, pack_shard, unreadable
from clipcov_pipeline.pool.rows import Columns, rows_of
from clipcov_pipeline.pool.samples import iter_samples
from make_shards import MAX_PIXELS, image_bytes, write_tar
from range_server import serve

N = 7
UIDS = [f"{number:032x}" for number in range(N)]
CAPTIONS = [f'caption, with "quotes" {number} 你好' for number in range(N)]
IMAGES = [image_bytes(number, kind="PNG" if number % 2 else "JPEG") for number in range(N)]
SUFFIX = ["png" if number % 2 else "jpg" for number in range(N)]
HF = {
    "huggingface": json.dumps(
        {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    )
}


def tars(folder: Path) -> Path:
    members = []
    for number in range(N):
        members += [
            (f"{number:09d}.{SUFFIX[number]}", IMAGES[number]),
            (f"{number:09d}.txt", CAPTIONS[number].encode()),
            (f"{number:09d}.json", json.dumps({"uid": UIDS[number]}).encode()),
        ]
    write_tar(folder / "00000.tar", members)
    return folder


def hugging_face(folder: Path, images: list | None = None, captions: list | None = None) -> Path:
    """As `datasets` writes a data set with embedded images."""
    folder.mkdir(parents=True)
    held = images or [{"bytes": data, "path": None} for data in IMAGES]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"image": pa.array(held, kind), "text": pa.array(captions or CAPTIONS), "uid": UIDS[: len(held)]}
    ).replace_schema_metadata(HF)
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=3)
    return folder


def img2dataset(folder: Path) -> Path:
    """As img2dataset writes with ``--output_format parquet``: all it knows, and the image as jpg."""
    folder.mkdir(parents=True)
    rows = [
        {"caption": CAPTIONS[number], "uid": UIDS[number], "key": f"{number:09d}", "status": "success"}
        | {"error_message": None, "width": 24, "height": 16, "jpg": IMAGES[number]}
        for number in range(N)
    ]
    failed = {"caption": "gone", "key": f"{N:09d}", "status": "failed_to_download", "error_message": "404"}
    pq.write_table(pa.Table.from_pylist([*rows, failed]), folder / "00000.parquet")
    return folder


def image_folder(folder: Path, kind: str = "csv") -> Path:
    """As Hugging Face's imagefolder has it."""
    (folder / "sub").mkdir(parents=True)
    rows = []
    for number in range(N):
        name = f"{'sub/' if number > 3 else ''}{number:09d}.{SUFFIX[number]}"
        (folder / name).write_bytes(IMAGES[number])
        rows.append({"file_name": name, "text": CAPTIONS[number], "uid": UIDS[number]})
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        (folder / "metadata.csv").write_text(text.getvalue())
    return folder


def report_of(shard: Shard, folder: Path, **rules: int) -> tuple[ShardReport, Shard]:
    """What `raw_shards` records of a shard, and the tar that it is read from."""
    rules = {"max_pixels": MAX_PIXELS, **rules}
    if shard.is_tar:
        return read_shard(shard, **rules), shard
    folder.mkdir(exist_ok=True)
    packed = pack_shard(shard, Columns(), folder)
    if packed.tar is None:
        return unreadable(packed.quarantined or ""), shard
    return explained(read_shard(packed.tar, **rules), packed), packed.tar


SOURCES = {
    "hugging_face": hugging_face,
    "img2dataset": img2dataset,
    "csv": image_folder,
    "jsonl": lambda folder: image_folder(folder, "jsonl"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_pairs_as_in_tars(tmp_path, kind):
    (tar,) = scan(str(tars(tmp_path / "tars")))
    (shard,) = scan(str(SOURCES[kind](tmp_path / kind)))
    expected, _ = report_of(tar, tmp_path)
    found, packed = report_of(shard, tmp_path / "packed")
    columns = ["uid", "caption", "width", "height", "status", "image_sha256"]
    ok = found.manifest.filter(status="ok")
    assert ok.select(columns).equals(expected.manifest.select(columns))
    assert ok["image_ext"].to_list() == SUFFIX
    pairs = list(iter_samples(packed, set(ok["key"])))
    assert [pair.image for pair in pairs] == IMAGES
    assert [pair.caption for pair in pairs] == CAPTIONS
    with Path(packed.url).open("rb") as file:  # where the places say
        for place, image in zip(found.places.iter_rows(named=True), IMAGES, strict=True):
            file.seek(place["image_offset"])
            assert file.read(place["image_size"]) == image


def test_a_failed_download_says_so(tmp_path):
    (shard,) = scan(str(img2dataset(tmp_path / "pool")))
    report, _ = report_of(shard, tmp_path / "packed")
    bad = report.manifest.filter(pl.col("status") != "ok")
    assert bad.select("key", "status", "reason").rows() == [
        ("000000007", "missing_image", "the row has no image: failed_to_download, 404")
    ]


def test_rows_of_no_use_are_kept_aside_with_their_reason(tmp_path):
    images = [
        {"bytes": IMAGES[0], "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None,
        {"bytes": b"no image", "path": None}, {"bytes": IMAGES[1], "path": None},
    ]  # fmt: skip
    (shard,) = scan(str(hugging_face(tmp_path / "pool", images, [*CAPTIONS[:4], None])))
    report, _ = report_of(shard, tmp_path / "packed")
    assert report.manifest.select("status", "reason").rows() == [
        ("ok", None),
        ("missing_image", "the row has no image bytes, only the path b.jpg"),
        ("missing_image", "the row has no image bytes"),
        ("undecodable_image", "not an image of the formats JPEG, PNG, WEBP, AVIF, GIF, BMP, TIFF"),
        ("missing_caption", "column text is null, expected text"),
    ]
    assert report.manifest["key"].to_list() == [f"{number:09d}" for number in range(5)]


def test_lines_of_no_use_are_kept_aside_with_their_reason(tmp_path):
    image_folder(tmp_path / "pool", "jsonl")
    (tmp_path / "outside.jpg").write_bytes(IMAGES[0])
    lines = [
        json.dumps({"file_name": "gone.jpg", "text": "a"}),
        json.dumps({"file_name": "../outside.jpg", "text": "a"}),
        "{broken",
        json.dumps({"text": "a"}),
        json.dumps({"file_name": "000000000.jpg", "text": "another caption of the first"}),
        json.dumps({"file_name": "000000000.jpg"}),
    ]
    with (tmp_path / "pool" / "metadata.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    (shard,) = scan(str(tmp_path / "pool"))
    report, _ = report_of(shard, tmp_path / "packed")
    assert report.manifest[N:].select("key", "status", "reason").rows() == [
        ("gone", "missing_image", "no file gone.jpg"),
        ("outside", "missing_image", "file_name ../outside.jpg leads out of the folder"),
        ("line-000000009", "missing_image", "line 10 does not parse: {broken"),
        ("line-000000010", "missing_image", "line 11 has no file_name"),
        ("000000000-2", "ok", None),
        ("000000000-3", "missing_caption", "column text is null, expected text"),
    ]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: b"PAR1" + data[4:2000], lambda _: b""]
)
def test_a_damaged_parquet_file_is_quarantined(tmp_path, damage):
    pool = hugging_face(tmp_path / "pool")
    (file,) = pool.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    (shard,) = scan(str(pool))
    report, _ = report_of(shard, tmp_path / "packed")
    assert report.manifest.is_empty()
    assert report.quarantined.startswith("not a parquet file: ")


def test_columns_are_found_or_asked_for(tmp_path):
    tmp = tmp_path / "pool"
    tmp.mkdir()
    table = {"photo": IMAGES, "thumb": IMAGES, "alt": CAPTIONS, "jpg": IMAGES, "png": IMAGES}
    pq.write_table(pa.table(table), tmp / "a.parquet")
    (shard,) = scan(str(tmp))

    def keys(**columns: str) -> list[str]:
        return [row.caption for row in rows_of(shard, Columns(**columns), None)]

    with pytest.raises(
        InputError, match=r"found 2 columns of images, jpg, png .*name it in shards.image_column"
    ):
        keys()
    with pytest.raises(InputError, match=r"found no column caption, text, txt .*shards.caption_column"):
        keys(image="photo")
    with pytest.raises(
        InputError, match=r"shards.image_column: found fotos, expected a column of .*: photo, thumb"
    ):
        keys(image="fotos", caption="alt")
    with pytest.raises(InputError, match=r"shards.caption_column: found alto, expected a column"):
        keys(image="photo", caption="alto")
    assert keys(image="photo", caption="alt") == CAPTIONS


def test_tables_without_file_names_are_one_clear_line(tmp_path):
    image_folder(tmp_path / "pool")
    (tmp_path / "pool" / "metadata.csv").write_text("000000000.jpg,a cat\n")
    with pytest.raises(
        InputError, match=r"found the columns 000000000.jpg, a cat, expected file_name and captions"
    ):
        scan(str(tmp_path / "pool"))


# ---- what is a shard, and when it changes


def test_tars_come_first_then_a_table_then_parquet(tmp_path):
    pool = tmp_path / "pool"
    image_folder(pool)
    hugging_face(tmp_path / "hf")
    shutil.copy(next((tmp_path / "hf").iterdir()), pool / "a.parquet")
    assert [shard.name for shard in scan(str(pool))] == ["metadata-00000"]
    (pool / "metadata.csv").unlink()
    assert [shard.name for shard in scan(str(pool))] == ["a"]
    tars(pool)  # beside which img2dataset writes a parquet file without images
    assert [shard.name for shard in scan(str(pool))] == ["00000"]
    assert [shard.name for shard in scan(str(pool / "*.parquet"))] == ["a"]
    shutil.copy(pool / "a.parquet", pool / "b.parquet")
    assert [shard.name for shard in scan(f"{pool}/{{a,b}}.parquet")] == ["a", "b"]


def test_only_the_shard_of_a_changed_image_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("clipcov_pipeline.pool.listing.LINES", 3)
    pool = image_folder(tmp_path / "pool")
    before = {shard.name: shard for shard in scan(str(pool))}
    assert [shard.lines for shard in before.values()] == [(0, 3), (3, 6), (6, 7)]
    (pool / f"sub/{4:09d}.jpg").write_bytes(IMAGES[0] + b" ")
    with (pool / "metadata.csv").open("a") as file:
        file.write("sub/000000004.jpg,once more,\n")
    after = {shard.name: shard for shard in scan(str(pool))}
    changed = [name for name in before if before[name].version != after[name].version]
    assert changed == ["metadata-00001", "metadata-00002"]
    texts = [
        row
        for shard in after.values()
        for row in report_of(shard, tmp_path / "packed")[0].manifest["caption"]
    ]
    assert texts == [*CAPTIONS, "once more"]


def test_from_a_web_server(tmp_path):
    hugging_face(tmp_path / "pool" / "hf")
    image_folder(tmp_path / "pool" / "images")
    with serve(tmp_path / "pool") as (address, _):
        sources = [f"{address}/hf/train-00000-of-00001.parquet", f"{address}/images/metadata.csv"]
        for source in sources:
            (shard,) = scan(source)
            report, _ = report_of(shard, tmp_path / "packed")
            assert report.manifest["caption"].to_list() == CAPTIONS, source
            assert set(report.manifest["status"]) == {"ok"}, source


def test_packing_again_gives_the_same_bytes(tmp_path):
    (shard,) = scan(str(hugging_face(tmp_path / "pool")))
    both = []
    for name in ("one", "two"):
        report, tar = report_of(shard, tmp_path / name)
        both.append((Path(tar.url).read_bytes(), report.sha256))
    assert both[0] == both[1]
