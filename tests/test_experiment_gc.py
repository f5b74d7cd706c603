"""What no plan needs is listed with its size, removed only when told, and nothing else."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment import gc, sizes
from clipcov_pipeline.experiment.store import Store, is_being_written
from clipcov_pipeline.experiment.verify import verify
from clipcov_pipeline.proxy.vectors import Vectors, make_rows
from lab import SELECTION, Lab, copy_samples, record_of


def all_items(lab: Lab, keep: int) -> list[gc.Item]:
    """Everything, whatever its age."""
    return gc.find(lab.project(), keep=keep, idle_hours=0)


def test_sizes_in_human_units() -> None:
    assert [sizes.human(n) for n in (0, 1023, 1024, 1536, 5 * 2**30, 3 * 2**60)] == [
        "0 B",
        "1,023 B",
        "1.0 KiB",
        "1.5 KiB",
        "5.0 GiB",
        "3,072.0 PiB",
    ]


def test_embeddings_take_little_more_than_their_raw_bytes(tmp_path: Path) -> None:
    """A hundredth of a million rows of d=64 in 50 shards; by hand, a million of d=512 took 0.95x."""
    vectors, rng, raw = Vectors(tmp_path), np.random.default_rng(0), 0
    for shard in range(50):
        uids = [hashlib.md5(f"{shard}/{i}".encode()).hexdigest() for i in range(200)]
        rows = make_rows(
            uids=uids,
            shard=f"{shard:05d}",
            keys=[f"{i:09d}" for i in range(200)],
            captions=[f"a photo of {i}" for i in range(200)],
            image_sha256=[uid * 2 for uid in uids],
            image_embedding=rng.standard_normal((200, 64)).astype(np.float16),
            text_embedding=rng.standard_normal((200, 64)).astype(np.float16),
        )
        raw += rows.nbytes
        vectors.replace_shard("t", f"{shard:05d}", rows)
    assert sizes.size_of(tmp_path / "t.lance" / "data") <= 1.2 * raw
    vectors.open("t").optimize()
    assert vectors.open("t").count_rows() == 10_000


# ---------------------------------------------------------------- the whole graph


def test_an_entry_that_is_being_written_stays(tmp_path: Path) -> None:
    """However long ago its folder was written to: a training writes elsewhere for hours."""
    store = Store(tmp_path)
    settings = {"code_version": "1", "params": {}, "sources": {}, "inputs": {}}
    with store.write("checkpoints", "a", "f" * 64, **settings) as entry:
        assert is_being_written(entry.folder)
        (entry.folder / "file").write_bytes(b"x")
        code = (
            "import pathlib, sys; from clipcov_pipeline.experiment.store import is_being_written as written"
        )
        code += "; print(written(pathlib.Path(sys.argv[1])))"
        command = [sys.executable, "-c", code, str(entry.folder)]
        seen = subprocess.run(command, capture_output=True, text=True, check=True)
        assert seen.stdout.strip() == "True"
    assert not entry.folder.exists()
    assert not is_being_written(entry.folder)
    left = tmp_path / "left"
    left.mkdir()
    assert not is_being_written(left)


@pytest.mark.slow
def test_nothing_is_removed_while_an_entry_is_being_written(lab: Lab) -> None:
    store = lab.project().store
    settings = {"code_version": "1", "params": {}, "sources": {}, "inputs": {}}
    with store.write("rankings", "clipcov", "f" * 64, **settings) as entry:
        os.utime(entry.folder, (time.time() - 7200,) * 2)
        assert not [item for item in gc.find(lab.project()) if item.kind == "unfinished"]
        with pytest.raises(InputError, match="is being written, expected no run at work"):
            gc.delete(lab.project(), [], idle_hours=0)
    gc.delete(lab.project(), [], idle_hours=0)


@pytest.mark.slow
def test_a_fresh_experiment_has_nothing_but_old_versions(lab: Lab) -> None:
    assert {item.kind for item in all_items(lab, keep=0)} <= {"versions"}
    gc.delete(lab.project(), all_items(lab, keep=0))
    assert all_items(lab, keep=0) == []
    assert verify(lab.project(), deep=True).lines() == []
    assert not lab.plan().todo


@pytest.mark.slow
def test_earlier_entries_are_kept_in_number_and_removed_when_told(lab: Lab) -> None:
    for weight in (0.0, 1.0, 3.0):
        lab.edit(lambda s, w=weight: s["select"]["methods"].update(clipcov={"weights": {"self": w}}))
        lab.run(only=("rankings", "subsets"))
    earlier = [item for item in all_items(lab, keep=1) if item.kind == "entry"]
    # three earlier rankings and subsets each; the arm's old checkpoint stands until its new one is there
    assert sorted(item.name.partition(" ")[0] for item in earlier) == [
        "rankings/clipcov",
        "rankings/clipcov",
        "subsets/clipcov-f0.5",
        "subsets/clipcov-f0.5",
    ]
    before = {r.fingerprint for r in lab.project().store.records()}
    text = CliRunner().invoke(cli, ["gc", "--config", str(lab.yaml)]).output
    assert "`clipcov gc --delete` removes them" in text
    assert {r.fingerprint for r in lab.project().store.records()} == before
    result = CliRunner().invoke(cli, ["gc", "--delete", "--config", str(lab.yaml)])
    assert result.exit_code == 0
    removed = before - {r.fingerprint for r in lab.project().store.records()}
    assert removed == {item.record.fingerprint for item in earlier if item.record}
    assert verify(lab.project()).lines() == []
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 1.0}}))  # what was kept
    assert {s.status for s in lab.plan().todo if s.node.stage in ("rankings", "subsets")} == {"restore"}
    lab.run(only=("rankings", "subsets"))
    gone = [item for item in all_items(lab, keep=0) if item.kind == "entry"]
    assert {item.name.partition(" ")[0] for item in gone} == {"rankings/clipcov", "subsets/clipcov-f0.5"}


@pytest.mark.slow
def test_rows_of_an_earlier_shard_go_and_are_embedded_again(lab: Lab) -> None:
    shutil.copy(lab.shard(1), lab.folder / "kept.tar")
    copy_samples(lab.shard(0), lab.shard(1), 10, 30)
    lab.run(only=SELECTION)
    labels = record_of(lab, "pseudo_labels")
    kinds = [item.kind for item in all_items(lab, keep=1)]
    assert kinds.count("tag") == 1  # that of the earlier labels
    project = lab.project()
    before = sizes.size_of(project.vectors.folder)
    gc.delete(project, all_items(lab, keep=1), idle_hours=0)
    assert verify(lab.project(), deep=True).lines() == []
    table = lab.project().vectors.open(labels.stats["table"])
    assert set(table.tags.list()) == {f"pseudo_labels-{labels.fingerprint[:16]}"}
    assert record_of(lab, "pseudo_labels").stats["version"] == table.version
    assert sizes.size_of(project.vectors.folder) < before
    # compacted rows are those that the rankings read
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    assert lab.run(only=("rankings",)) == {"rankings": 1}
    shutil.copy(lab.folder / "kept.tar", lab.shard(1))
    executed = lab.run(only=("raw_shards", "embeddings"))
    assert executed == {"raw_shards": 1, "embeddings": 1}
    assert record_of(lab, "embeddings/00001").stats["rows"] == 80


@pytest.mark.slow
def test_an_embedding_whose_old_version_is_gone_is_built_again(lab: Lab) -> None:
    from datetime import timedelta

    first = record_of(lab, "embeddings/00001")
    shutil.copy(lab.shard(1), lab.folder / "kept.tar")
    copy_samples(lab.shard(0), lab.shard(1), 10, 30)
    lab.run(only=SELECTION)
    table = lab.project().vectors.open(first.stats["table"])
    for tag in table.tags.list():
        table.tags.delete(tag)
    with pytest.warns(UserWarning, match="optimize"):
        table.optimize(cleanup_older_than=timedelta(0))
    shutil.copy(lab.folder / "kept.tar", lab.shard(1))
    assert lab.run(only=("raw_shards", "embeddings")) == {"raw_shards": 1, "embeddings": 1}
    again = record_of(lab, "embeddings/00001")
    assert (again.fingerprint, again.digests) == (first.fingerprint, first.digests)
    assert again.finished > first.finished


@pytest.mark.slow
def test_what_killed_runs_and_other_proxies_left(lab: Lab) -> None:
    project = lab.project()
    left = project.store.root / "rankings" / "clipcov" / ".tmp-1"
    scratch = project.scratch / "checkpoints-abc"
    for folder in (left, scratch):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 5000)
    table = record_of(lab, "pseudo_labels").stats["table"]
    other = project.vectors.folder / "embeddings_000000000000.lance"
    shutil.copytree(project.vectors.folder / f"{table}.lance", other)
    lately = gc.find(project)
    assert not [item for item in lately if item.kind == "unfinished"]  # a run may be at work on it
    with pytest.raises(InputError, match="expected no run at work"):
        gc.delete(project, lately)
    assert other.exists()
    for path in (left, left / "file", scratch, scratch / "file"):
        os.utime(path, (time.time() - 7200,) * 2)
    items = {item.name: item.size for item in gc.find(project)}
    assert items["store/rankings/clipcov/.tmp-1"] == items["scratch/checkpoints-abc"] == 5000
    assert items["LanceDB embeddings_000000000000"] == sizes.size_of(other)
    freed = gc.delete(project, gc.find(project))
    assert freed >= 10_000
    assert not left.exists()
    assert not scratch.exists()
    assert not other.exists()
    assert not lab.plan().todo
