"""A pool of parquet files through the real graph: after the packing, everything is as with tars."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.pool.listing import Shard
from clipcov_pipeline.pool.tars import iter_groups
from clipcov_pipeline.pool.uids import uid_of
from lab import SELECTION, Lab, record_of
from make_tables import Pair, write_img2dataset

pytestmark = pytest.mark.slow


def pairs_of(lab: Lab, index: int) -> list[Pair]:
    found = []
    for group in iter_groups(Shard("x", str(lab.shard(index)), ""), None):
        image, caption = group.image(), group.get("txt")
        assert image is not None
        assert caption is not None
        found.append((group.key, image[1], caption.decode(), uid_of(f"{index:05d}", group.key, group.meta())))
    return found


def as_parquet(lab: Lab) -> list[Path]:
    """Give the same pool as parquet files."""
    files = [write_img2dataset(lab.folder / "hf" / f"{n:05d}.parquet", pairs_of(lab, n)) for n in range(3)]
    lab.edit(lambda settings: settings["shards"].update(source="hf/*.parquet"))
    return files


def test_the_same_pairs_in_parquet_give_the_same_selection_training_and_pictures(lab: Lab) -> None:
    arm, selected = "checkpoints/clipcov-f0.5-s0", "pseudo_labels"
    before = {record.name: record.digests for record in lab.project().store.records()}
    as_parquet(lab)
    executed = lab.run()
    # the places are others; what lies there is not
    assert not executed.keys() & {"proxy_model", "rankings", "checkpoints", "scores", "leaderboard"}
    assert executed["raw_shards"] == 3
    for name in ("embeddings/00000", selected, "rankings/clipcov", arm):
        digests = dict(record_of(lab, name).digests)
        assert {**digests, "pool": ""} == {**before[name], "pool": ""}, name
    project = lab.project()
    project.store.discard(record_of(lab, arm))
    assert lab.run()["checkpoints"] == 1
    assert record_of(lab, arm).digests == before[arm]  # trained from the packed tars: the same weights
    assert set(project.tars) == {"00000", "00001", "00002"}
    gallery = project.store.folder(record_of(lab, "subset_galleries/clipcov-f0.5")) / "gallery.json"
    assert "cannot be read" not in gallery.read_text()
    export = ["export", "clipcov-f0.5", "--format", "tars", "--out", str(lab.folder / "out")]
    done = CliRunner().invoke(cli, [*export, "--config", str(lab.yaml)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert list((lab.folder / "out").rglob("*.tar"))


def test_a_changed_parquet_file_is_packed_and_embedded_alone(lab: Lab) -> None:
    files = as_parquet(lab)
    lab.run(only=SELECTION)
    write_img2dataset(files[1], pairs_of(lab, 1)[:-3])
    executed = lab.run(only=SELECTION)
    assert executed["raw_shards"] == executed["embeddings"] == 1
    assert (
        record_of(lab, "raw_shards/00001").stats["ok"] == record_of(lab, "raw_shards/00000").stats["ok"] - 3
    )
    touched = files[2].read_bytes()
    files[2].write_bytes(touched)  # another time, the same rows
    assert lab.run(only=SELECTION) == {"raw_shards": 1}
