"""The planted pool: its rule, its truth and its evaluation sets, counted by hand from the written files."""

import io
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from clipcov_pipeline.bench.testbed import class_sizes, plan_samples, plant
from clipcov_pipeline.bench.testbed_rule import SHIFTS, Rule
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard
from clipcov_pipeline.pool.samples import iter_samples
from make_benchmark import write_photos

RULE = Rule(
    largest=40, imbalance=4.0, test_per_class=3, train_per_class=2, shifted_per_class=2, retrieval_pairs=5
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "train", {"cat": 50, "big_dog": 50, "owl": 50})
    write_photos(folder / "test", {"cat": 8, "big_dog": 8, "owl": 8})
    return folder


@pytest.fixture(scope="module")
def planted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planted") / "draw0"
    plant(photos, None, out, RULE)
    return out


def test_sizes_follow_the_rule():
    sizes = class_sizes(dict.fromkeys("abcdefghij", 5000), Rule(), np.random.default_rng(0))
    assert sorted(sizes.values(), reverse=True) == [round(5000 * 10 ** (-r / 9)) for r in range(10)]
    assert class_sizes({"a": 7, "b": 9}, Rule(), np.random.default_rng(0)) == {"a": 7, "b": 9}


def test_shares_of_captions_and_duplicates():
    samples = plan_samples(dict.fromkeys("abcde", 2000), Rule(largest=2000), np.random.default_rng(1))
    originals = [s for s in samples if not s["is_duplicate"]]
    kinds = Counter(s["kind"] for s in originals)
    assert kinds["faithful"] / len(originals) == pytest.approx(0.5, abs=0.03)
    assert kinds["mismatched"] / len(originals) == pytest.approx(0.3, abs=0.03)
    assert len(samples) - len(originals) == round(0.25 * len(originals))
    by_source = {s["source"]: s for s in originals}
    fresh = [s["caption"] != by_source[s["source"]]["caption"] for s in samples if s["is_duplicate"]]
    assert np.mean(fresh) == pytest.approx(0.5, abs=0.1)
    assert all(s["caption_class"] == s["class_name"] for s in samples if s["kind"] == "faithful")
    assert all(s["caption_class"] is None for s in samples if s["kind"] == "generic")


def test_the_shards_hold_what_the_truth_says(planted: Path):
    truth = {row["key"]: row for row in pl.read_parquet(planted / "truth.parquet").iter_rows(named=True)}
    seen = [sample for shard in scan(str(planted / "pool")) for sample in iter_samples(shard, None)]
    assert len(seen) == len(truth)
    for sample in seen:
        row = truth[sample.key]
        assert sample.meta is not None
        assert sample.caption == row["caption"]
        assert sample.meta["uid"] == row["uid"]
        assert sample.meta["truth"]["source"] == row["source"]
        assert row["right_class"] == (row["caption_class"] == row["class_name"])
    right = {row["uid"] for row in truth.values() if row["right_class"]}
    assert set(pl.read_parquet(planted / "oracle.parquet")["uid"]) == right


def test_evaluation_sets_are_in_clip_benchmarks_layout(planted: Path):
    photos = planted / "eval" / "photos"
    assert (photos / "classnames.txt").read_text().split("\n") == ["big dog", "cat", "owl", ""]
    assert "{c}" in (photos / "zeroshot_classification_templates.txt").read_text()
    assert (photos / "test" / "nshards.txt").read_text().strip() == "1"
    with tarfile.open(photos / "test" / "0.tar") as tar:
        labels = [tar.extractfile(m).read() for m in tar if m.name.endswith(".cls")]  # type: ignore[union-attr]
    assert Counter(labels) == {b"0": 3, b"1": 3, b"2": 3}
    for shift in SHIFTS:
        with tarfile.open(planted / "eval" / shift / "test" / "0.tar") as tar:
            images = [tar.extractfile(m).read() for m in tar if m.name.endswith(".png")]  # type: ignore[union-attr]
        assert [Image.open(io.BytesIO(data)).size for data in images] == [(16, 16)] * 6


def test_the_same_rule_gives_the_same_pool_and_another_is_refused(
    photos: Path, planted: Path, tmp_path: Path
):
    again = tmp_path / "again"
    plant(photos, None, again, RULE)
    for tar in (planted / "pool").iterdir():
        assert tar.read_bytes() == (again / "pool" / tar.name).read_bytes()
    with pytest.raises(InputError, match=r"planted with noise=0.5, not 0.7: choose another --out"):
        plant(photos, None, again, replace(RULE, noise=0.7))


def test_unusable_photos_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="is not a folder"):
        plant(tmp_path / "none", None, tmp_path / "out", RULE)
    write_photos(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(InputError, match=r"class folder .*empty has no image"):
        plant(tmp_path / "train", None, tmp_path / "out", RULE)
    (tmp_path / "train" / "empty").rmdir()
    write_photos(tmp_path / "test", {"cat": 2, "dog": 2, "yak": 2})
    with pytest.raises(InputError, match="test class 'yak' is not among the pool's classes cat, dog"):
        plant(tmp_path, None, tmp_path / "out", RULE)
    write_photos(tmp_path / "few", {"cat": 4, "dog": 4})
    with pytest.raises(InputError, match="found one test photo in each class, expected at least 2"):
        plant(tmp_path / "few", None, tmp_path / "out", RULE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".bmp", ".AVIF", ".gif", ".tif"])
def test_photos_of_all_formats_are_planted_as_what_every_tool_reads(suffix, tmp_path):
    photos = write_photos(tmp_path / "photos", {"cat": 24, "owl": 24})
    for path in photos.rglob("*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(suffix))
        path.unlink()
    plant(photos, None, tmp_path / "out", RULE)
    for tars in ("out/pool", "out/eval/photos/test", "out/eval/captions"):
        for tar in (tmp_path / tars).glob("*.tar"):
            with tarfile.open(tar) as opened:
                assert {Path(name).suffix for name in opened.getnames()} <= {".png", ".txt", ".json", ".cls"}
    shards = scan(str(tmp_path / "out" / "pool"))
    found = pl.concat(read_shard(shard, max_pixels=10**6).manifest for shard in shards)
    assert set(found["status"]) == {"ok"}


def test_a_damaged_photo_is_named(tmp_path):
    photos = write_photos(tmp_path / "photos", {"cat": 24, "owl": 24})
    for path in photos.rglob("*.png"):
        path.write_bytes(b"<html>404</html>")
    with pytest.raises(
        InputError, match=r"images: .*\.png is not usable \(undecodable_image: not an image of"
    ):
        plant(photos, None, tmp_path / "out", RULE)
