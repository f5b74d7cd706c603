"""Damage is found, reported and rebuilt, never served; a work folder that moved still works."""

import hashlib
import json
import os
import shutil
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.digests import digest_of, git_commit
from clipcov_pipeline.experiment.plan import Status
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.experiment.verify import Report, _rows_problems, verify
from clipcov_pipeline.proxy.vectors import Vectors, digest_of_rows, make_rows
from clipcov_pipeline.report.lineage import trace
from lab import SELECTION, Lab, record_of

ABOUT: dict[str, Any] = {"code_version": "1", "params": {}, "sources": {}, "inputs": {}}


def flip(path: Path, *, keep_time: bool = False) -> None:
    """Change one byte in the middle of a file."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    # a minute later than it was built; or a disk that changed a byte by itself
    later = 0 if keep_time else 60 * 10**9
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + later))


def run_command(lab: Lab, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [*arguments, "--config", str(lab.yaml)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def folder_of(lab: Lab, name: str) -> Path:
    return lab.project().store.folder(record_of(lab, name))


# ---------------------------------------------------------------- the store


@pytest.fixture
def entry(tmp_path: Path) -> tuple[Store, Record]:
    store = Store(tmp_path / "store")
    with store.write("stage", "p", digest_of(1), **ABOUT) as writing:
        (writing.folder / "deep").mkdir()
        (writing.folder / "a").write_bytes(b"a" * 100)
        (writing.folder / "deep" / "b").write_bytes(b"b" * 100)
    record = store.current("stage", "p")
    assert record is not None
    return store, record


def test_a_glance_sees_what_is_missing_shorter_or_written_to(entry: tuple[Store, Record]) -> None:
    store, record = entry
    assert store.glance(record) is None
    flip(store.folder(record) / "a")
    assert str(store.glance(record)).startswith("a has sha256 ")
    (store.folder(record) / "a").write_bytes(b"a" * 99)
    assert store.glance(record) == "a has 99 bytes, expected 100"
    (store.folder(record) / "a").unlink()
    assert store.glance(record) == "a missing"


def test_a_copy_that_lost_its_times_is_read_once(entry: tuple[Store, Record]) -> None:
    store, record = entry
    path = store.folder(record) / "deep" / "b"
    seconds = int(path.stat().st_mtime)
    os.utime(path, (5, 5))
    assert store.glance(record) is None
    assert path.stat().st_mtime == seconds


def test_a_checked_file_is_handed_out_only_with_its_content(entry: tuple[Store, Record]) -> None:
    store, record = entry
    folder = store.folder(record)
    flip(folder / "deep" / "b", keep_time=True)  # no glance can see it
    assert store.glance(record) is None
    assert store.checked(record, "a") == folder / "a"
    with pytest.raises(InputError, match=r"stage/p is damaged: deep/b: found .*, run again"):
        store.checked(record, "deep")
    assert store.find("stage", "p", record.fingerprint) is None


def test_a_record_of_earlier_code_is_still_read(entry: tuple[Store, Record]) -> None:
    store, record = entry
    path = store.folder(record) / "record.json"
    values = json.loads(path.read_text())
    for name in ("stamps", "commit", "config", "seal"):
        del values[name]
    seal = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**values, "seal": seal}))
    old = store.current("stage", "p")
    assert old is not None
    assert (old.stamps, old.commit, old.config) == ({}, "", "")
    assert store.glance(old) is None
    (store.folder(old) / "a").unlink()
    assert store.glance(old) == "a missing"


def test_a_record_names_the_commit_and_keeps_the_yaml(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", "name: one\n")
    with store.write("stage", "p", digest_of(1), **ABOUT):
        pass
    record = store.current("stage", "p")
    assert record is not None
    assert record.commit == git_commit() != ""
    kept = store.config(record)
    assert kept is not None
    assert kept.read_text() == "name: one\n"


# ---------------------------------------------------------------- LanceDB


class Tables:
    """A project of which there are the LanceDB tables only."""

    def __init__(self, folder: Path) -> None:
        self.vectors = Vectors(folder)


def rows_of(shard: str, n: int, seed: int = 0) -> Any:
    values = np.random.default_rng([seed, *shard.encode()]).standard_normal((n, 4))
    names = [f"{shard} {i}" for i in range(n)]
    return make_rows(
        uids=names,
        shard=shard,
        keys=names,
        captions=names,
        image_sha256=names,
        image_embedding=values,
        text_embedding=-values,
    )


def asked_one_by_one(vectors: Vectors, records: list[Record]) -> dict[str, list[str]]:
    """Every shard looked up by itself, in both of its versions."""
    found: dict[str, list[str]] = {}
    for record in records:
        name, written = record.stats["table"], record.stats["version"]
        try:
            table = vectors.open(name)
        except InputError as error:
            found[record.name] = [str(error)]
            continue
        for version in sorted({written, table.version} & {v["version"] for v in table.list_versions()}):
            rows = vectors.shard_rows(name, record.partition, version)
            digest, expected = digest_of_rows(rows), record.digests["rows"]
            if digest != expected:
                text = f"{rows.num_rows} rows in version {version} of {name} have digest {digest[:12]}"
                found.setdefault(record.name, []).append(f"{text}, expected {expected[:12]}")
    return found


@pytest.mark.parametrize("cleaned", [False, True])
def test_rows_that_differ_are_found_as_by_looking_up_every_shard(tmp_path: Path, cleaned: bool) -> None:
    project: Any = Tables(tmp_path / "lancedb")
    vectors, about, records = project.vectors, {**ABOUT, "finished": 1.0}, []

    def write(shard: str, n: int, *, table: str = "t", digest: str = "") -> None:
        rows = rows_of(shard, n)
        version = vectors.replace_shard(table, shard, rows) if table == "t" else 1
        digests, stats = {"rows": digest or digest_of_rows(rows)}, {"table": table, "version": version}
        stats["rows"] = n
        record = Record("embeddings", shard, digest_of(shard), **about, digests=digests, stats=stats)
        records.append(record)

    for shard, n in (("right", 5), ("changed", 6), ("gone", 3), ("replaced", 4), ("empty", 0), ("more", 4)):
        write(shard, n)
    write("never right", 3, digest="0" * 64)
    write("no table", 3, table="absent")
    vectors.open("t").update(where="shard = 'changed'", values={"caption": "another"})
    vectors.remove_shards("t", ["gone"])
    vectors.replace_shard("t", "replaced", rows_of("replaced", 4, seed=1))
    vectors.open("t").add(rows_of("more", 2, seed=1))
    vectors.replace_shard("t", "right", rows_of("right", 2))
    vectors.replace_shard("t", "right", rows_of("right", 5))  # there and back
    if cleaned:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vectors.open("t").optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
        assert len(vectors.open("t").list_versions()) == 1
    report = Report()
    found = _rows_problems(project, records, report)
    assert found == asked_one_by_one(vectors, records)
    assert set(found) == {
        f"embeddings/{shard}" for shard in ("changed", "gone", "replaced", "more", "never right", "no table")
    }
    assert len(found["embeddings/never right"]) == (1 if cleaned else 2)
    assert report.checked["LanceDB rows"] == vectors.open("t").count_rows()


# ---------------------------------------------------------------- the whole graph


@pytest.mark.slow
def test_what_was_built_verifies(built_lab: Lab) -> None:
    report = verify(built_lab.project(), deep=True)
    assert report.lines() == []
    assert report.checked["entries"] == 35
    assert report.checked["LanceDB rows"] >= 238
    assert report.checked["LanceDB tags"] == 1
    assert report.checked["subsets cut again"] == 3
    code, text = run_command(built_lab, "verify")
    assert code == 0
    assert text.startswith("0 problems; checked 35 entries")


@pytest.mark.slow
def test_of_several_labels_of_one_pool_those_that_a_subset_was_cut_by_are_meant(lab: Lab) -> None:
    before = record_of(lab, "subsets/clipcov-f0.5")
    for clusters in (6, 5):
        lab.edit(lambda s, k=clusters: s["labels"].update(n_clusters=k))
        lab.run(SELECTION)
        if clusters == 6:
            names = f"clipcov-f0.5@{before.fingerprint[:12]}", "clipcov-f0.5"
            code, text = run_command(lab, "diff", *names)
            assert code == 0
            assert "labels.n_clusters" in text
    assert record_of(lab, "subsets/clipcov-f0.5").fingerprint == before.fingerprint
    assert verify(lab.project(), deep=True).lines() == []
    lineage = trace(lab.project(), "subsets/clipcov-f0.5")
    labels = [record for record in lineage.entries.values() if record.stage == "pseudo_labels"]
    assert labels == [record_of(lab, "pseudo_labels")]


@pytest.mark.slow
def test_everything_damaged_is_reported_and_rebuilt(lab: Lab) -> None:
    before = {step.node.name: step.record for step in lab.plan().steps}
    flip(folder_of(lab, "rankings/clipcov") / "ranking.parquet")
    flip(folder_of(lab, "subsets/full-f1") / "subset.npy")
    flip(folder_of(lab, "checkpoints/random-f0.5-s0") / "open_clip_pytorch_model.bin")
    (folder_of(lab, "raw_shards/00001") / "manifest.parquet").unlink()
    assert len(verify(lab.project()).lines()) == 4
    assert run_command(lab, "verify")[0] == 1
    damaged = lab.plan().by_name["raw_shards/00001"]
    assert (damaged.status, damaged.why) == (Status.BUILD, ("damaged: manifest.parquet missing",))
    executed = lab.run()
    expected = {"raw_shards": 1, "rankings": 1, "subsets": 1, "checkpoints": 1}
    assert {stage: executed[stage] for stage in expected} == expected
    assert executed["embeddings"] == executed["pseudo_labels"] == 0  # built again as it was: cut off
    assert not lab.plan().todo
    assert verify(lab.project(), deep=True).lines() == []
    for name in ("rankings/clipcov", "subsets/full-f1", "raw_shards/00001", "checkpoints/random-f0.5-s0"):
        old, new = before[name], record_of(lab, name)
        assert old is not None
        assert new.digests == old.digests


@pytest.mark.slow
def test_damage_that_no_time_shows_is_found_at_use_and_mended_in_the_same_run(lab: Lab) -> None:
    path = folder_of(lab, "rankings/random") / "ranking.parquet"
    intact = path.read_bytes()
    flip(path, keep_time=True)
    assert not lab.plan().todo
    assert any("rankings/random" in line for line in verify(lab.project()).lines())
    lab.edit(lambda s: s["select"].update(fractions=[0.5, 0.25]))
    executed = lab.run(only=("rankings", "subsets"))
    assert dict(executed) == {"rankings": 1, "subsets": 2}
    assert path.read_bytes() == intact
    assert verify(lab.project(), deep=True).lines() == []


@pytest.mark.slow
def test_verify_sees_other_rows_a_lost_tag_and_another_record(lab: Lab) -> None:
    project = lab.project()
    labels, embedded = record_of(lab, "pseudo_labels"), record_of(lab, "embeddings/00001")
    table = project.vectors.open(labels.stats["table"])
    table.update(where="shard = '00001'", values={"caption": "another caption"})
    table.tags.delete(next(iter(table.tags.list())))
    text = "\n".join(verify(project).lines())
    assert f"embeddings/00001 {embedded.fingerprint[:12]}: 80 rows in version" in text
    assert "is on version none, expected" in text
    code, output = run_command(lab, "verify", "--discard")
    assert code == 1
    assert "removed 2 entries" in output
    assert lab.run(only=("embeddings", "pseudo_labels")) == {"embeddings": 1, "pseudo_labels": 1}
    assert verify(lab.project()).lines() == []
    assert not lab.plan().todo


@pytest.mark.slow
def test_a_work_folder_that_moved_still_works(lab: Lab, tmp_path: Path) -> None:
    from assets.mlflow_runs.tracking import Tracking

    moved = lab.copy(tmp_path / "elsewhere")
    shutil.rmtree(lab.folder)
    assert dict(moved.run()) == {}
    assert verify(moved.project(), deep=True).lines() == []
    moved.edit(lambda s: s["select"]["methods"].update(random={"seed": 1}))
    executed = moved.run()
    assert executed["checkpoints"] == 1
    assert not lab.folder.exists()
    tracking = Tracking(moved.project().config)
    for arm in ("full-f1-s0", "random-f0.5-s0"):  # of before and after
        run_id = record_of(moved, f"checkpoints/{arm}").stats["mlflow_run_id"]
        run = tracking.client().get_run(run_id)
        assert run.info.artifact_uri is not None
        assert run.info.artifact_uri.startswith((moved.folder / "work" / "mlflow" / "artifacts").as_uri())
        path = tracking.client().download_artifacts(run_id, "training.json", str(tmp_path))
        assert json.loads(Path(path).read_text())["samples_seen"] == 192
