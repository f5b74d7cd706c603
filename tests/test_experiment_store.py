"""The store: nothing half-written is ever seen, nothing damaged is ever served."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment import store as experiment_store
from clipcov_pipeline.experiment.digests import digest_of, digest_of_file, fingerprint_from
from clipcov_pipeline.experiment.records import RECORD, WHOLE, Record, node_name
from clipcov_pipeline.experiment.store import CURRENT, Store, require

ABOUT: dict[str, Any] = {"code_version": "1", "params": {"train": {"lr": 0.1}}, "sources": {}, "inputs": {}}
FIRST, SECOND = digest_of("first"), digest_of("second")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, fingerprint: str, text: str = "text", partition: str = "p", **stats: Any) -> Record:
    """Write an entry with two files and return its record."""
    with store.write("stage", partition, fingerprint, **ABOUT) as entry:
        (entry.folder / "a.txt").write_text(text)
        (entry.folder / "deep").mkdir()
        (entry.folder / "deep" / "b.bin").write_bytes(bytes(1000))
        entry.digests["out"] = digest_of(text)
        entry.stats.update(stats)
    record = store.find("stage", partition, fingerprint)
    assert record is not None
    return record


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- digests ----------------------------------------------------------------------------------------


def test_digest_is_sha256_of_canonical_json():
    expected = hashlib.sha256(b'{"a":[1,2.5],"b":null}').hexdigest()
    assert digest_of({"b": None, "a": (1, 2.5)}) == expected
    assert digest_of({"a": [1, 2.5], "b": None}) == expected
    assert digest_of({"a": [2.5, 1], "b": None}) != expected


def test_digest_of_file_is_sha256_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert digest_of_file(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_fingerprint_covers_every_part_of_what_an_entry_is_made_of():
    parts: dict[str, Any] = {**ABOUT, "stage": "stage"}
    expected = hashlib.sha256(
        b'{"code_version":"1","inputs":{},"params":{"train":{"lr":0.1}},"sources":{},"stage":"stage"}'
    ).hexdigest()
    assert fingerprint_from(**parts) == expected
    for name, value in {
        "stage": "other",
        "code_version": "2",
        "params": {"train": {"lr": 0.2}},
        "sources": {"shard": "a@1"},
        "inputs": {"raw_shards/a#manifest": "0"},
    }.items():
        assert fingerprint_from(**{**parts, name: value}) != expected


def test_node_name_leaves_out_the_partition_of_a_stage_without_any():
    assert node_name("scores", "a@b") == "scores/a@b"
    assert node_name("leaderboard", WHOLE) == "leaderboard"


# --- writing and finding ----------------------------------------------------------------------------


def test_what_is_written_is_found_with_all_that_is_known_of_it(store):
    before = time.time()
    put(store, FIRST, "hello", rows=3)
    record = store.find("stage", "p", FIRST)
    assert record is not None
    assert record == store.current("stage", "p")
    assert (record.stage, record.partition, record.fingerprint) == ("stage", "p", FIRST)
    assert record.name == "stage/p"
    assert {key: getattr(record, key) for key in ABOUT} == ABOUT
    assert record.digests == {"out": digest_of("hello")}
    assert record.stats == {"rows": 3}
    assert record.files == {
        "a.txt": hashlib.sha256(b"hello").hexdigest(),
        "deep/b.bin": hashlib.sha256(bytes(1000)).hexdigest(),
    }
    assert before <= record.finished <= time.time()
    assert 0 <= record.seconds < 5
    assert (store.folder(record) / "a.txt").read_text() == "hello"
    assert [found.fingerprint for found in store.records()] == [FIRST]


def test_an_entry_without_named_outputs_has_one_digest_of_all_its_files(store):
    digests = []
    for fingerprint, text in ((FIRST, "same"), (SECOND, "same"), (digest_of("third"), "other")):
        with store.write("stage", "p", fingerprint, **ABOUT) as entry:
            (entry.folder / "f").write_text(text)
        record = store.current("stage", "p")
        assert record is not None
        digests.append(record.digests[""])
    assert digests[0] == digests[1] != digests[2]


def test_what_was_never_written_is_not_there(store):
    assert store.find("stage", "p", FIRST) is None
    assert store.current("stage", "p") is None
    assert store.current_fingerprint("stage", "p") is None
    assert list(store.records()) == []
    with pytest.raises(InputError, match="stage/p is not built yet, expected a finished entry: materialize"):
        require(store.current("stage", "p"), "stage/p")
    assert not store.root.exists()


def test_an_earlier_entry_is_found_by_its_fingerprint_and_stands_again(store):
    first = put(store, FIRST, "1")
    put(store, SECOND, "2")
    assert store.current_fingerprint("stage", "p") == SECOND
    assert store.find("stage", "p", FIRST) == first
    store.set_current(first)
    assert store.current("stage", "p") == first
    assert store.find("stage", "p", SECOND) is not None


def test_clearing_leaves_the_entry_but_lets_none_stand(store):
    record = put(store, FIRST)
    store.clear_current("stage", "p")
    store.clear_current("stage", "p")
    assert store.current("stage", "p") is None
    assert store.find("stage", "p", FIRST) == record


def test_a_fingerprint_is_matched_whole(store):
    """Folders carry its first 24 digits only."""
    put(store, FIRST)
    assert store.find("stage", "p", FIRST[:-1] + ("0" if FIRST[-1] != "0" else "1")) is None


def test_writing_a_fingerprint_again_replaces_the_entry(store):
    put(store, FIRST, "old")
    record = put(store, FIRST, "new")
    assert record.digests == {"out": digest_of("new")}
    assert (store.folder(record) / "a.txt").read_text() == "new"
    assert store.damage(record) == []
    assert everything(store.root / "stage" / "p") == {
        CURRENT,
        *(f"{FIRST[:24]}{rest}" for rest in ("", "/a.txt", "/deep", "/deep/b.bin", f"/{RECORD}")),
    }


def test_discard_removes_the_entry(store):
    put(store, FIRST)
    record = put(store, SECOND)
    store.discard(record)
    assert store.current("stage", "p") is None
    assert not store.folder(record).exists()
    assert store.find("stage", "p", FIRST) is not None


def test_the_work_folder_can_be_moved(store, tmp_path):
    record = put(store, FIRST)
    shutil.move(store.root, tmp_path / "elsewhere")
    moved = Store(tmp_path / "elsewhere")
    assert moved.current("stage", "p") == record
    assert moved.damage(record) == []


def test_a_record_names_the_commit_and_keeps_the_yaml(tmp_path):
    store = Store(tmp_path / "store", "name: one  # ü\n")
    first, second = put(store, FIRST), put(Store(tmp_path / "store", "name: two\n"), SECOND)
    for record, text in ((first, "name: one  # ü\n"), (second, "name: two\n")):
        assert record.config == hashlib.sha256(text.encode()).hexdigest()
        kept = store.config(record)
        assert kept is not None
        assert kept.read_text(encoding="utf-8") == text
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?|unknown", record.commit)
    assert {record.fingerprint for record in store.records()} == {FIRST, SECOND}
    assert Store(tmp_path / "other").config(first) is None


def test_a_record_without_a_yaml_has_none(store):
    record = put(store, FIRST)
    assert record.config == ""
    assert store.config(record) is None


def test_a_moved_pin_changes_the_version_alone(store):
    record = put(store, FIRST, version=3, rows=5)
    store.move_pin(record, 8)
    moved = store.current("stage", "p")
    assert moved == replace(record, stats={"version": 8, "rows": 5})


def test_statistics_may_hold_what_json_has_no_word_for(store):
    """The loss of a training that diverged must not cost the checkpoint; keys come back as text."""
    record = put(store, FIRST, last_loss=math.nan, worst=math.inf, classes={10: 1, 9: 2})
    assert math.isnan(record.stats["last_loss"])
    assert record.stats["worst"] == math.inf
    assert record.stats["classes"] == {"10": 1, "9": 2}


# --- killed and failed writers ----------------------------------------------------------------------


@pytest.mark.parametrize("previous", [False, True])
def test_a_failure_inside_leaves_nothing_behind(store, previous):
    if previous:
        put(store, FIRST)
    before = everything(store.root) if previous else {"stage", "stage/p"}

    def fail() -> None:
        with store.write("stage", "p", SECOND, **ABOUT) as entry:
            (entry.folder / "half").write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert store.find("stage", "p", SECOND) is None
    assert store.current_fingerprint("stage", "p") == (FIRST if previous else None)
    assert everything(store.root) == before


def test_nothing_is_visible_while_it_is_written(store):
    put(store, FIRST)
    with store.write("stage", "p", SECOND, **ABOUT) as entry:
        (entry.folder / "a.txt").write_text("done in full, but not finished")
        assert store.find("stage", "p", SECOND) is None
        assert store.current_fingerprint("stage", "p") == FIRST
        assert [record.fingerprint for record in store.records()] == [FIRST]
    assert store.current_fingerprint("stage", "p") == SECOND


KILLED = """
import os, signal, sys
from pathlib import Path
from clipcov_pipeline.experiment.store import Store

moment, root, fingerprint = sys.argv[1:]

def stop(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "before the record":
    import clipcov_pipeline.experiment.store as module
    module.write_text_at_once = stop
if moment == "before the rename":
    Path.rename = stop
if moment == "before it stands":
    Store.set_current = stop
about = {"code_version": "1", "params": {}, "sources": {}, "inputs": {}}
with Store(Path(root)).write("stage", "p", fingerprint, **about) as entry:
    (entry.folder / "a.txt").write_text("a")
    if moment == "inside":
        stop()
    (entry.folder / "b.txt").write_text("b")
    entry.digests["out"] = "new"
print("not killed")
"""


@pytest.mark.parametrize("moment", ["inside", "before the record", "before the rename", "before it stands"])
def test_a_writer_that_is_killed_leaves_nothing_visible(store, moment):
    put(store, FIRST)
    done = subprocess.run([sys.executable, "-c", KILLED, moment, str(store.root), SECOND], check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.current_fingerprint("stage", "p") == FIRST
    finished = moment == "before it stands"
    assert (store.find("stage", "p", SECOND) is not None) == finished
    visible = {record.fingerprint for record in store.records()}
    assert visible == ({FIRST, SECOND} if finished else {FIRST})
    assert all(store.damage(record) == [] for record in store.records())
    # and the next writer is not in its way
    assert put(store, SECOND).digests == {"out": digest_of("text")}
    assert store.current_fingerprint("stage", "p") == SECOND


def test_an_entry_that_loses_its_record_is_no_entry(store):
    record = put(store, FIRST)
    (store.folder(record) / RECORD).unlink()
    assert store.find("stage", "p", FIRST) is None
    assert store.current("stage", "p") is None
    assert list(store.records()) == []


# --- damage -----------------------------------------------------------------------------------------


def test_damage_finds_a_flipped_byte_and_a_missing_file(store):
    record = put(store, FIRST)
    assert store.damage(record) == []
    folder = store.folder(record)
    data = bytearray((folder / "deep" / "b.bin").read_bytes())
    data[617] ^= 1
    (folder / "deep" / "b.bin").write_bytes(data)
    found = hashlib.sha256(data).hexdigest()
    expected = hashlib.sha256(bytes(1000)).hexdigest()
    assert store.damage(record) == [
        f"{folder / 'deep' / 'b.bin'}: sha256 {found[:12]}, expected {expected[:12]}"
    ]
    (folder / "a.txt").unlink()
    assert store.damage(record)[0] == f"{folder / 'a.txt'}: missing"
    assert len(store.damage(record)) == 2
    assert store.damage(put(store, FIRST)) == []  # building again mends it


def flip(path: Path, at: int, when: int | None = None) -> str:
    """Flip a bit of a file, with another time of change or (as a disk does) the same; return its sha256."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, (status.st_atime, status.st_mtime) if when is None else (when, when))
    return hashlib.sha256(data).hexdigest()


def test_a_glance_finds_what_is_missing_short_or_changed(store):
    record = put(store, FIRST)
    file = store.folder(record) / "deep" / "b.bin"
    assert store.glance(record) is None
    flipped = flip(file, 617, when=1_000_000)
    expected = hashlib.sha256(bytes(1000)).hexdigest()
    assert store.glance(record) == f"deep/b.bin has sha256 {flipped[:12]}, expected {expected[:12]}"
    file.write_bytes(bytes(999))
    assert store.glance(record) == "deep/b.bin has 999 bytes, expected 1000"
    file.unlink()
    assert store.glance(record) == "deep/b.bin missing"
    shutil.rmtree(store.folder(record))
    assert store.glance(record) == "a.txt missing"


def test_a_glance_reads_a_copy_that_lost_its_times_once(store, monkeypatch):
    record = put(store, FIRST)
    for name in record.files:
        os.utime(store.folder(record) / name, (1_000_000, 1_000_000))
    read = []
    monkeypatch.setattr(
        experiment_store, "digest_of_file", lambda path: read.append(path) or digest_of_file(path)
    )
    assert store.glance(record) is None
    assert sorted(path.name for path in read) == ["a.txt", "b.bin"]
    assert store.glance(record) is None
    assert len(read) == 2


def test_damage_that_left_size_and_time_alone_is_found_at_use(store):
    record = put(store, FIRST)
    file = store.folder(record) / "deep" / "b.bin"
    found = flip(file, 3)
    assert store.glance(record) is None  # that is what a glance cannot see
    assert store.checked(record, "a.txt") == store.folder(record) / "a.txt"  # nor does another file matter
    with pytest.raises(InputError) as caught:
        store.checked(record, "deep/b.bin")
    expected = hashlib.sha256(bytes(1000)).hexdigest()
    assert str(caught.value) == (
        f"stage/p is damaged: deep/b.bin: found {found[:12]}, expected sha256 {expected[:12]};"
        " it is removed, run again to build it again"
    )
    assert store.find("stage", "p", FIRST) is None
    assert store.current("stage", "p") is None


@pytest.mark.parametrize("place", ["", "deep", "deep/b.bin"])
def test_a_folder_is_checked_with_all_that_is_in_it(store, place):
    record = put(store, FIRST)
    assert store.checked(record, place) == store.folder(record) / place
    (store.folder(record) / "deep" / "b.bin").unlink()
    with pytest.raises(InputError, match=r"stage/p is damaged: deep/b\.bin: found no file, expected"):
        store.checked(record, place)


def test_a_file_that_is_replaced_after_it_was_checked_is_checked_again(store):
    record = put(store, FIRST)
    assert store.checked(record).is_dir()
    flip(store.folder(record) / "a.txt", 0, when=2_000_000)
    with pytest.raises(InputError, match=r"stage/p is damaged: a\.txt"):
        store.checked(record)


def damaged_records(text: str) -> Iterator[str]:
    values = json.loads(text)
    yield from ("", "{", "null", "[]", "3", text[: len(text) // 2], text + "x", "\x00" * len(text))
    yield json.dumps({key: value for key, value in values.items() if key != "digests"})
    yield json.dumps({**values, "digests": {"out": digest_of("forged")}})
    yield json.dumps({**values, "fingerprint": SECOND})
    yield json.dumps({**values, "unknown": 1})


def test_a_damaged_record_is_no_record(store):
    record = put(store, FIRST)
    path = store.folder(record) / RECORD
    text = path.read_text()
    for damaged in damaged_records(text):
        path.write_text(damaged)
        assert store.find("stage", "p", FIRST) is None, damaged[:60]
        assert store.current("stage", "p") is None
        assert list(store.records()) == []
    path.write_bytes(b"\xff\xfe" + text.encode())
    assert store.find("stage", "p", FIRST) is None
    path.write_text(text)
    assert store.find("stage", "p", FIRST) == record


def test_no_flipped_bit_of_a_record_is_served(store):
    record = put(store, FIRST, rows=3, rate=1.5)
    path = store.folder(record) / RECORD
    data = path.read_bytes()
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        found = store.find("stage", "p", FIRST)
        # white space may change without changing a value
        assert found is None or found == record, data[at - 20 : at + 20]


@pytest.mark.parametrize("text", [b"", b"\n", b"\xff\xfe\xfa", b"0" * 64, b"no/such/place", b"a\x00b"])
def test_a_damaged_current_file_lets_no_entry_stand(store, text):
    record = put(store, FIRST)
    (store.root / "stage" / "p" / CURRENT).write_bytes(text)
    assert store.current("stage", "p") is None
    assert store.find("stage", "p", FIRST) == record
    store.set_current(record)
    assert store.current("stage", "p") == record


# --- several writers --------------------------------------------------------------------------------


def test_two_writers_of_one_fingerprint_leave_one_whole_entry(store):
    with store.write("stage", "p", FIRST, **ABOUT) as slow:
        (slow.folder / "a.txt").write_text("slow")
        with store.write("stage", "p", FIRST, **ABOUT) as fast:
            assert fast.folder != slow.folder
            (fast.folder / "a.txt").write_text("fast")
            (fast.folder / "only-fast.txt").write_text("fast")
        first = store.current("stage", "p")
        assert first is not None
        assert store.damage(first) == []
    record = store.current("stage", "p")
    assert record is not None
    assert record.files == {"a.txt": hashlib.sha256(b"slow").hexdigest()}
    assert store.damage(record) == []
    assert not (store.folder(record) / "only-fast.txt").exists()
    assert [found.fingerprint for found in store.records()] == [FIRST]


def in_threads(*work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(work)) as threads:
        for result in [threads.submit(one) for one in work]:
            result.result()


def test_many_writers_of_one_fingerprint_never_stumble(store):
    def writer(name: str) -> Callable[[], None]:
        def write() -> None:
            for turn in range(25):
                with store.write("stage", "p", FIRST, **ABOUT) as entry:
                    (entry.folder / "a.txt").write_text(f"{name} {turn}")

        return write

    in_threads(*(writer(name) for name in "abcd"))
    record = store.current("stage", "p")
    assert record is not None
    assert store.damage(record) == []
    assert everything(store.root / "stage" / "p") == {
        CURRENT,
        FIRST[:24],
        f"{FIRST[:24]}/a.txt",
        f"{FIRST[:24]}/{RECORD}",
    }


def test_a_reader_never_sees_half_an_entry(store):
    """New fingerprints one after the other, while another thread reads what stands."""
    finished = threading.Event()
    seen = set()

    def write() -> None:
        try:
            for turn in range(100):
                put(store, digest_of(turn), text=f"turn {turn}")
        finally:
            finished.set()

    def read() -> None:
        while not finished.is_set():
            record = store.current("stage", "p")
            if record is None:
                assert not seen  # once there is an entry, there always is one
                continue
            seen.add(record.fingerprint)
            assert store.damage(record) == []
            assert set(record.files) == {"a.txt", "deep/b.bin"}

    in_threads(write, read)
    assert len(seen) > 1
    assert len(list(store.records())) == 100


def test_writers_of_different_partitions_do_not_meet(store):
    def writer(partition: str) -> Callable[[], None]:
        def write() -> None:
            for turn in range(10):
                put(store, digest_of(turn), partition=partition)

        return write

    in_threads(*(writer(name) for name in "abcd"))
    assert len(list(store.records())) == 40
    assert {record.partition for record in store.records()} == set("abcd")
    assert [path.name for path in store.root.iterdir()] == ["stage"]
