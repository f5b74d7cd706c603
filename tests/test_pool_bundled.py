"""The packaged sample: unpacking, its contents, its class names."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import polars as pl
import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool import bundled
from clipcov_pipeline.pool.bundled import collect_class_names, sample_class_names, unpack_sample
from clipcov_pipeline.pool.listing import scan
from clipcov_pipeline.pool.manifest import read_shard


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> tuple[Path, Path]:
    return unpack_sample(tmp_path_factory.mktemp("sample"))


def manifest(folder: Path) -> pl.DataFrame:
    return pl.concat(read_shard(shard, max_pixels=1_000_000).manifest for shard in scan(str(folder)))


def test_all_pairs_are_good_but_for_blank_drawings(unpacked):
    train, heldout = unpacked
    for folder, n_shards, n_pairs, n_blank in ((train, 13, 12_382, 125), (heldout, 2, 1_870, 0)):
        rows = manifest(folder)
        assert len(scan(str(folder))) == n_shards
        assert rows.height == rows["uid"].n_unique() == n_pairs
        blank = rows.filter(pl.col("status") != "ok")
        assert blank["status"].to_list() == ["one_colour"] * n_blank


def test_unpacking_again_is_no_change(unpacked, tmp_path):
    for ours, theirs in zip(unpacked, unpack_sample(tmp_path / "elsewhere"), strict=True):
        assert [(s.name, s.version) for s in scan(str(ours))] == [
            (s.name, s.version) for s in scan(str(theirs))
        ]


def test_second_call_leaves_the_user_s_changes(tmp_path):
    train, _ = unpack_sample(tmp_path)
    (train / "00003.tar").unlink()
    inode = train.stat().st_ino
    unpack_sample(tmp_path)
    assert train.stat().st_ino == inode
    assert len(scan(str(train))) == 12
    assert {path.name for path in tmp_path.iterdir()} == {"clipart-train", "clipart-heldout-vendor"}


def test_interrupted_unpacking_leaves_nothing_that_counts(tmp_path, monkeypatch):
    real = bundled._extract

    def stop_half_way(archive, folder):
        real(archive, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "_extract", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        unpack_sample(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(scan(str(unpack_sample(tmp_path)[0]))) == 13


def test_two_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        results = set(pool.map(lambda _: unpack_sample(tmp_path), range(4)))
    ((train, heldout),) = results
    assert (len(scan(str(train))), len(scan(str(heldout)))) == (13, 2)
    assert {path.name for path in tmp_path.iterdir()} == {train.name, heldout.name}


def test_an_older_package_s_sample_is_replaced(tmp_path):
    train, _ = unpack_sample(tmp_path)
    (train / ".unpacked").write_text("0" * 64 + "\n")
    (train / "99999.tar").write_bytes(b"")
    unpack_sample(tmp_path)
    assert len(scan(str(train))) == 13


def test_something_else_in_the_way_is_left_untouched(tmp_path):
    (tmp_path / "clipart-train").mkdir()
    (tmp_path / "clipart-train" / "mine.tar").write_bytes(b"mine")
    with pytest.raises(InputError, match="was not unpacked from this package"):
        unpack_sample(tmp_path)
    assert [path.name for path in (tmp_path / "clipart-train").iterdir()] == ["mine.tar"]


def test_damaged_archive(tmp_path, monkeypatch):
    monkeypatch.setitem(bundled.ARCHIVE_SHA256, "clipart-train", "f" * 64)
    with pytest.raises(
        InputError, match=r"clipart-train.tar.xz has sha256 ca03c6e822a6.*install the package again"
    ):
        unpack_sample(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_class_names_are_those_of_the_shards(unpacked):
    names = sample_class_names()
    assert names == collect_class_names(unpacked[0])
    assert len(names) == len(set(names)) == 197
    assert all(name == name.strip() and name for name in names)


def test_class_names_command_writes_the_file(unpacked):
    written = subprocess.run(
        [sys.executable, "-m", "clipcov_pipeline.pool.bundled", str(unpacked[0])],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    ).stdout
    assert (
        written == (resources.files("clipcov_pipeline.pool") / "sample_data" / "class_names.txt").read_bytes()
    )


def test_licences_name_every_source(unpacked):
    from clipcov_pipeline.pool.samples import iter_samples

    text = (resources.files("clipcov_pipeline.pool") / "sample_data" / "LICENSES.md").read_text(
        encoding="utf-8"
    )
    sources = {
        sample.meta["source"]
        for folder in unpacked
        for shard in scan(str(folder))
        for sample in iter_samples(shard, None)
        if sample.meta
    }
    named = {
        "openclipart": "Open Clip Art Library",
        "emoji_openmoji": "OpenMoji",
        "emoji_noto": "Noto Emoji",
        "emoji_twitter": "Twemoji",
    }
    assert sources == set(named)
    assert all(
        name in text for name in [*named.values(), "CC BY-SA 4.0", "CC BY 4.0", "Open Font License", "CLDR"]
    )
