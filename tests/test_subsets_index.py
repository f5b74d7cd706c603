"""Places of samples in their tars, and subsets as an index of them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import Shard, scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.subsets.cut import Choice, cut_ranking, whole_pool, write_subset
from clipcov_pipeline.subsets.export import export_subset
from clipcov_pipeline.subsets.index import (
    INDEX_SCHEMA,
    most_alike,
    samples_digest,
    subset_index,
    training_rows,
)
from make_shards import sample_members, write_pool, write_tar

LONG = "a/" + "long" * 40  # over 100 characters: a PAX header lies before the member's own


def places_by_shard(shards: list[Shard]) -> pl.DataFrame:
    found = [read_shard(s, max_pixels=10**6).places.with_columns(shard=pl.lit(s.name)) for s in shards]
    return pl.concat(found)


@pytest.fixture
def pool(tmp_path: Path) -> list[Shard]:
    return scan(str(write_pool(tmp_path / "pool", n_shards=3, samples_per_shard=10)))


@pytest.fixture
def index(pool: list[Shard]) -> pl.DataFrame:
    places = places_by_shard(pool)
    chosen = places.select("uid").gather_every(4).with_row_index("rank")
    chosen = chosen.with_columns(gain=1.0 - pl.col("rank") / 100, latent_class=pl.col("rank") % 3)
    return subset_index(chosen, places.select("uid", "shard"), places)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_place_holds_the_members_bytes(tmp_path: Path, form: int) -> None:
    keys = ["0", "b/1", "ü", *([] if form == tarfile.USTAR_FORMAT else [LONG])]
    members = [m for n, key in enumerate(keys) for m in sample_members(key, f"caption {n} é", seed=n)]
    with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (shard,) = scan(str(tmp_path))
    report = read_shard(shard, max_pixels=10**6)
    data, expected = Path(shard.url).read_bytes(), dict(members)
    assert report.places["key"].to_list() == keys
    assert report.places["uid"].to_list() == report.manifest["uid"].to_list()
    for row in report.places.iter_rows(named=True):
        for member, suffix in (("image", "png"), ("caption", "txt"), ("json", "json")):
            start = row[f"{member}_offset"]
            assert data[start : start + row[f"{member}_size"]] == expected[f"{row['key']}.{suffix}"]


def test_bad_samples_have_no_place_and_equal_bytes_have_equal_hashes(tmp_path: Path) -> None:
    good, twin = sample_members("a", "one", seed=1), sample_members("b", " one\n", seed=1)
    write_tar(tmp_path / "0.tar", [*good, ("x.txt", b"no image"), *twin, *sample_members("c", "two", seed=2)])
    places = read_shard(scan(str(tmp_path))[0], max_pixels=10**6).places
    assert places["key"].to_list() == ["a", "b", "c"]
    for column in ("image_hash", "caption_hash"):
        assert places[column][0] == places[column][1] != places[column][2]


def test_a_sample_stored_in_pieces_is_kept_aside(tmp_path: Path) -> None:
    """GNU tar's sparse members: a hole in the image, as `tar --sparse` writes them."""
    import subprocess

    folder = tmp_path / "files"
    folder.mkdir()
    for name, data in sample_members("0", "caption"):
        (folder / name).write_bytes(data)
    with (folder / "0.png").open("r+b") as file:
        file.truncate(2**20)  # Pillow reads a PNG to its end mark; what follows is a hole
    tar = ["tar", "--sparse", "--sort=name", "-C", str(folder), "-cf", str(tmp_path / "0.tar")]
    subprocess.run([*tar, "0.json", "0.png", "0.txt"], check=True)
    (shard,) = scan(str(tmp_path / "0.tar"))
    report = read_shard(shard, max_pixels=10**6)
    assert report.manifest["status"].to_list() == ["stored_sparse"]
    assert (
        report.manifest["reason"][0] == "its image or caption lies in pieces: write the tar without --sparse"
    )
    assert report.places.is_empty()


def test_the_index_keeps_the_ranks_and_weighs_all_alike(index: pl.DataFrame) -> None:
    assert dict(index.schema) == INDEX_SCHEMA
    assert index["rank"].to_list() == list(range(8))
    assert index["weight"].to_list() == [1.0] * 8
    assert index["shard"].unique().sort().to_list() == ["00000", "00001", "00002"]


def test_a_ranking_is_cut_at_its_fraction_or_at_the_share_that_is_drawn_from() -> None:
    ranking = pl.DataFrame({"uid": list("abcdef"), "latent_class": [0, 2, 2, 0, 1, 2]})
    assert cut_ranking(ranking, 10, 0.3, None).rows["uid"].to_list() == ["a", "b", "c"]
    anew = cut_ranking(ranking, 10, 0.3, 0.5)
    assert (anew.rows["uid"].to_list(), anew.quota) == (list("abcde"), [1, 0, 2])
    for fraction, share in ((0.7, None), (0.3, 0.7)):
        with pytest.raises(InputError, match="found 6 ranked samples, expected at least 7"):
            cut_ranking(ranking, 10, fraction, share)


def test_a_subset_keeps_source_ids_and_counts_ranks_from_one(pool: list[Shard]) -> None:
    places = places_by_shard(pool)
    labels = places.select("uid", "shard", latent_class=pl.lit(0))
    ids = pl.Series([None, "7", *[None] * (labels.height - 2)], dtype=pl.String)
    index = subset_index(whole_pool(labels).rows.reverse(), labels.with_columns(source_id=ids), places)
    assert index["rank"].to_list() == list(range(1, labels.height + 1))
    assert index["source_id"].to_list() == ids.to_list()
    assert index.columns == [*INDEX_SCHEMA, "source_id"]
    assert "source_id" not in training_rows(index, pool).columns
    assert "source_id" not in subset_index(whole_pool(labels).rows, labels, places).columns


def test_another_quota_is_another_subset(pool: list[Shard], tmp_path: Path) -> None:
    places = places_by_shard(pool)
    places.write_parquet(tmp_path / "places.parquet")
    chosen = places.select("uid").with_row_index("rank").with_columns(gain=0.0, latent_class=0)
    found = [
        write_subset(tmp_path / str(n), Choice(chosen, quota), places, tmp_path / "places.parquet")[1]
        for n, quota in enumerate((None, [4], [5], [5]))
    ]
    assert len({digests["samples"] for digests in found}) == len({d["subset"] for d in found}) == 3


def test_how_often_one_image_or_caption_comes_in_a_pass(index: pl.DataFrame) -> None:
    assert most_alike(index) == 1
    assert most_alike(index.with_columns(caption_hash=pl.Series([1, 1, 1, 2, 3, 4, 5, 6]))) == 3
    weight = pl.Series([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0])
    assert most_alike(index.with_columns(weight=weight)) == 4
    assert most_alike(index.with_columns(weight=weight, image_hash=pl.Series([1] * 7 + [0]))) == 8
    halves = pl.Series([0.5, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert most_alike(index.with_columns(weight=halves * 1.001)) == 2


@pytest.mark.parametrize("column", ["uid", "rank"])
def test_what_is_chosen_twice_is_refused(pool: list[Shard], column: str) -> None:
    places = places_by_shard(pool).head(3)
    chosen = places.select("uid").with_row_index("rank").with_columns(gain=0.0, latent_class=0)
    chosen = chosen.with_columns(pl.lit(chosen[column][0]).alias(column))
    with pytest.raises(ValueError, match=f"2 values of {column} come twice"):
        subset_index(chosen, places.select("uid", "shard"), places)


def test_a_subset_is_written_as_an_index_and_as_datacomps_list(pool: list[Shard], tmp_path: Path) -> None:
    places = places_by_shard(pool)
    places.write_parquet(tmp_path / "places.parquet")
    chosen = places.select("uid")[[7, 2, 5]].with_row_index("rank")
    chosen = chosen.with_columns(gain=0.0, latent_class=0, weight=pl.Series([2.0, 1.0, 0.0]))
    index, digests = write_subset(tmp_path / "out", Choice(chosen), places, tmp_path / "places.parquet")
    assert pl.read_parquet(tmp_path / "out" / "subset.parquet").equals(index)
    assert index["uid"].to_list() == chosen["uid"].to_list()
    listed = [f"{high:016x}{low:016x}" for high, low in np.load(tmp_path / "out" / "subset.npy").tolist()]
    assert listed == sorted([chosen["uid"][0], chosen["uid"][0], chosen["uid"][1]])
    moved = places.with_columns(pl.col("image_offset") + 512)
    moved.write_parquet(tmp_path / "places.parquet")
    _, again = write_subset(tmp_path / "moved", Choice(chosen), places, tmp_path / "places.parquet")
    assert again == digests  # its samples lie elsewhere: nothing is to be trained again
    even = chosen.with_columns(weight=1.0)
    _, other = write_subset(tmp_path / "even", Choice(even), places, tmp_path / "places.parquet")
    assert not set(other.values()) & set(digests.values())


def test_of_two_shards_with_one_uid_the_labelled_one_is_taken(pool: list[Shard]) -> None:
    places = places_by_shard(pool)
    twins = places.with_columns(shard=pl.lit("00009"), image_offset=pl.lit(7, pl.Int64))
    chosen = places.select("uid").with_row_index("rank").with_columns(gain=0.0, latent_class=0)
    index = subset_index(chosen, places.select("uid", "shard"), pl.concat([twins, places]))
    assert index.height == places.height
    assert index["image_offset"].to_list() == places["image_offset"].to_list()


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        ([1.0, -1.0], r"subset: found the weight -1 in row 1 \(1 such rows\), expected finite numbers"),
        ([float("nan"), 1.0], "found the weight nan in row 0"),
        ([float("inf"), 1.0], "found the weight inf"),
        ([None, 1.0], "found the weight nan in row 0"),
        ([0.0, 0.0], "subset: found 2 weights of 0, expected at least one above"),
    ],
)
def test_weights_that_nobody_can_draw_by(pool: list[Shard], weight: list[float], says: str) -> None:
    places = places_by_shard(pool).head(2)
    chosen = places.select("uid").with_row_index("rank")
    chosen = chosen.with_columns(gain=0.0, latent_class=0, weight=pl.Series(weight, dtype=pl.Float64))
    with pytest.raises(InputError, match=says):
        subset_index(chosen, places.select("uid", "shard"), places)


def test_the_digest_is_of_pairs_and_weights_not_of_ranks_and_places(index: pl.DataFrame) -> None:
    moved = index.with_columns(rank=7 - pl.col("rank"), image_offset=pl.col("image_offset") + 512, gain=0.0)
    assert samples_digest(moved.sort("rank")) == samples_digest(index)
    for column, value in (("weight", 2.0), ("caption_hash", 1), ("image_hash", 1)):
        dtype = INDEX_SCHEMA[column]
        changed = index.with_columns(
            pl.when(pl.col("rank") == 3).then(pl.lit(value, dtype)).otherwise(pl.col(column)).alias(column)
        )
        assert samples_digest(changed) != samples_digest(index)


def test_a_training_reads_files_and_their_tokens(index: pl.DataFrame, pool: list[Shard]) -> None:
    rows = training_rows(index, pool)
    assert rows["uid"].to_list() == sorted(index["uid"])
    tokens = {shard.url: shard.version for shard in pool}
    assert dict(rows.select("shard", "shard_version").iter_rows()) == tokens
    with pytest.raises(InputError, match="found shard '00002' of 3 samples gone from the pool"):
        training_rows(index, pool[:2])


# --- exports --------------------------------------------------------------------------------------------


def test_tars_carry_the_uid_where_datacomps_resharder_looks(index, pool, tmp_path) -> None:
    paths = export_subset(index, pool, tmp_path / "out", "tars", samples_per_shard=5)
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    meta = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    found[meta["uid"]] = meta
    assert set(found) == set(index["uid"])
    assert all(meta["caption"].startswith("caption ") for meta in found.values())  # and all else is kept


def test_a_json_that_is_no_object_is_kept_beside_the_uid(tmp_path: Path) -> None:
    members = [m for m in sample_members("0", "caption") if not m[0].endswith("json")]
    write_tar(tmp_path / "pool" / "0.tar", [*members, ("0.json", b"[1, 2")])
    shards = scan(str(tmp_path / "pool"))
    places = places_by_shard(shards)
    chosen = places.select("uid").with_row_index("rank").with_columns(gain=0.0, latent_class=0)
    index = subset_index(chosen, places.select("uid", "shard"), places)
    (path,) = export_subset(index, shards, tmp_path / "out", "tars")
    with tarfile.open(path) as tar:
        meta = json.loads(tar.extractfile("0.json").read())  # type: ignore[union-attr]
    assert meta == {"original_json": "[1, 2", "uid": index["uid"][0]}


def test_hugging_face_parquet_holds_the_images_as_they_are(index, pool, tmp_path) -> None:
    import pyarrow.parquet as pq

    paths = export_subset(index, pool, tmp_path / "out", "hf")
    assert [path.name for path in paths] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    features = json.loads(pq.read_schema(paths[0]).metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    rows = pl.concat([pl.read_parquet(path) for path in paths])
    assert list(features) == rows.columns
    assert set(rows["uid"]) == set(index["uid"])
    places = {row["uid"]: row for row in index.iter_rows(named=True)}
    files = {shard.name: Path(shard.url).read_bytes() for shard in pool}
    for row in rows.iter_rows(named=True):
        place = places[row["uid"]]
        start = place["image_offset"]
        assert row["image"]["bytes"] == files[place["shard"]][start : start + place["image_size"]]
        assert row["image"]["path"] == f"{place['key']}.png"


@pytest.mark.parametrize("form", ["parquet", "csv", "npy"])
def test_an_index_needs_no_shard(index: pl.DataFrame, tmp_path: Path, form) -> None:
    (path,) = export_subset(index, [], tmp_path / "out", form)
    assert path.name == f"subset.{form}"
    if form == "parquet":
        assert pl.read_parquet(path).equals(index)


def test_a_folder_with_files_is_not_written_to(
    index: pl.DataFrame, pool: list[Shard], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected an empty or a new folder"):
        export_subset(index, pool, tmp_path, "csv")


@given(st.permutations(range(8)))
@settings(max_examples=20, deadline=None)
def test_the_digest_is_the_same_in_any_order(order: list[int]) -> None:
    uids = [f"{n:032x}" for n in range(8)]
    rows = pl.DataFrame({"uid": uids, "image_hash": range(8), "caption_hash": range(8), "weight": [1.0] * 8})
    assert samples_digest(rows[order]) == samples_digest(rows)
