"""Copies of small files: what a plan reads is what the files hold now."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from clipcov_pipeline.experiment.small_files import COPIES, SETTLED_NS, SmallFiles
from clipcov_pipeline.experiment.store import Store
from simulation import Simulation


def planned(simulation: Simulation) -> dict[str, str]:
    """The plan of a process of its own, as `Project.plan` makes it."""
    simulation.store = Store(simulation.folder / "store")
    with simulation.store.many_reads():
        plan = simulation.plan()
    return {step.node.name: step.status.value for step in plan.todo}


@pytest.fixture
def copied(built: Simulation) -> Simulation:
    """A simulated experiment of which a plan has copied all records."""
    settled_records(built)
    assert planned(built) == {}
    assert (built.folder / "store" / COPIES).is_file()
    return built


def settled_records(simulation: Simulation) -> None:
    """Only records and what stands: the other files' times are in the records."""
    for pattern in ("*/*/*/record.json", "*/*/current"):
        for path in simulation.store.root.glob(pattern):
            earlier = path.stat().st_mtime_ns - 10 * SETTLED_NS
            os.utime(path, ns=(earlier, earlier))


def test_the_next_process_opens_no_record(copied: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files_read(copied, monkeypatch) == []


def files_read(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a plan reads one by one."""
    opened: list[str] = []
    read = SmallFiles.read
    monkeypatch.setattr(SmallFiles, "read", lambda self, name: opened.append(name) or read(self, name))
    assert planned(simulation) == {}
    return opened


def test_young_files_are_not_copied(built: Simulation) -> None:
    for path in built.store.root.glob("*/*/**/*"):
        os.utime(path)
    assert planned(built) == {}
    assert not (built.folder / "store" / COPIES).exists()


def flip(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"seconds": 0.', '"seconds": 1.'))


@pytest.mark.parametrize("change", [flip, Path.unlink], ids=["flipped", "gone"])
def test_a_record_that_changed_is_seen(copied: Simulation, change: Callable[[Path], object]) -> None:
    change(next(copied.store.root.glob("raw_shards/a/*/record.json")))
    assert planned(copied)["raw_shards/a"] == "build"


def test_another_entry_that_stands_is_seen(copied: Simulation) -> None:
    (copied.store.root / "rankings" / "clipcov" / "current").write_text("0" * 64 + "\n")
    assert planned(copied) == {"rankings/clipcov": "restore"}


def test_a_damaged_record_is_never_copied(built: Simulation) -> None:
    flip(next(built.store.root.glob("raw_shards/a/*/record.json")))
    settled_records(built)
    assert planned(built)["raw_shards/a"] == "build"
    assert planned(built)["raw_shards/a"] == "build"  # the copies are there now


def test_a_damaged_copy_is_read_from_the_file_again(copied: Simulation) -> None:
    with sqlite3.connect(copied.store.root / COPIES) as database:
        database.execute("UPDATE copy SET text = replace(text, 'raw_shards', 'raw_sharks')")
    assert planned(copied) == {}


def overwritten(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def another_schema(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE copy (other TEXT)")


@pytest.mark.parametrize("damage", [overwritten, another_schema, Path.unlink])
def test_the_copies_can_be_lost(
    copied: Simulation, damage: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(copied.store.root / COPIES)
    assert planned(copied) == {}
    assert files_read(copied, monkeypatch) == []


def test_a_store_that_was_copied_is_read_anew(copied: Simulation, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(copied.folder / "store", folder / "store")
    elsewhere = Simulation(folder)
    assert planned(elsewhere) == {}


def test_a_locked_database_stops_nothing(copied: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipcov_pipeline.experiment.small_files._WAIT", 0.01)
    with sqlite3.connect(copied.store.root / COPIES, isolation_level="EXCLUSIVE") as database:
        database.execute("BEGIN EXCLUSIVE")
        assert planned(copied) == {}
