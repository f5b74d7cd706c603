"""Finds and removes what no current plan needs: old entries, unfinished work, LanceDB tables and versions."""

import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.plan import Plan, Status
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.sizes import size_of, statuses_of
from clipcov_pipeline.experiment.stages import PSEUDO_LABELS
from clipcov_pipeline.experiment.store import CONFIGS, is_being_written
from clipcov_pipeline.proxy.vectors import label_tag

Kind = Literal["entry", "unfinished", "config", "table", "tag", "versions"]


@dataclass(frozen=True)
class Item:
    """Something that is not needed; ``size`` in bytes, an upper bound for the versions of a table."""

    kind: Kind
    name: str
    size: int
    path: Path | None = None
    record: Record | None = None


def find(project: Project, *, keep: int = 1, idle_hours: float = 1.0) -> list[Item]:
    """List what may go; changes nothing.

    keep: newest earlier entries of each partition that stay, so that a parameter there and back stays cheap.
        This is about files: rows in LanceDB that only earlier entries read go.
    idle_hours: unfinished work that was written to within this time may belong to a run, and stays.
    """
    plan = project.plan()
    kept, gone = _entries(project, plan, keep)
    return [
        *(Item("entry", _title(r), size_of(project.store.folder(r)), record=r) for r in gone),
        *_unfinished(project, idle_hours),
        *_configs(project, kept),
        *_lance(project, plan, kept),
    ]


def delete(project: Project, items: list[Item], *, idle_hours: float = 1.0) -> int:
    """Remove what `find` has listed; return the bytes that this freed.

    Raises:
        InputError: a run seems to be at work.
    """
    for path in project.store.root.glob("*/*/.tmp-*"):
        if is_being_written(path):
            raise InputError(f"{path} is being written, expected no run at work: wait for it or stop it")
        if _last_write(path) >= time.time() - idle_hours * 3600:
            raise InputError(
                f"{path} was written to within {idle_hours:g} hours, expected no run at work: wait for it, or"
                " give --idle-hours 0 when there is none"
            )
    before = _in_use(project)
    for item in items:
        if item.record is not None:
            _delete_entry(project, item.record)
        elif item.path is not None:
            shutil.rmtree(item.path) if item.path.is_dir() else item.path.unlink(missing_ok=True)
        elif item.kind == "tag":
            table, _, tag = item.name.partition(" ")
            project.vectors.open(table).tags.delete(tag)
    for item in items:  # when the tags are gone
        if item.kind == "versions":
            _compact(project, item.name)
    return before - _in_use(project)


def _in_use(project: Project) -> int:
    return sum(size_of(path) for path in (project.store.root, project.vectors.folder, project.scratch))


def _title(record: Record) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.finished))
    return f"{record.name} {record.fingerprint[:12]} of {when}"


def _entries(project: Project, plan: Plan, keep: int) -> tuple[list[Record], list[Record]]:
    """Return (needed or kept, not needed)."""
    needed = {step.record.fingerprint for step in plan.steps if step.record is not None}
    needed |= _standing(project, plan)
    partitions: dict[str, list[Record]] = {}
    for record in project.store.records():
        partitions.setdefault(record.name, []).append(record)
    kept, gone = [], []
    for name, records in partitions.items():
        must = [r for r in records if r.fingerprint in needed]
        rows = {_rows(r) for r in must}
        earlier = sorted((r for r in records if r.fingerprint not in needed), key=lambda r: -r.finished)
        # a partition that the experiment no longer has is no parameter on its way back
        n_kept = keep if name in plan.by_name else 0
        spared = [r for r in earlier if _rows(r) is None or _rows(r) in rows][:n_kept]
        kept += [*must, *spared]
        gone += [r for r in earlier if r not in spared]
    return kept, gone


def _rows(record: Record) -> tuple[str, int] | None:
    """Return the LanceDB table and version that an entry needs, None where it needs none."""
    return (record.stats["table"], record.stats["version"]) if "table" in record.stats else None


def _standing(project: Project, plan: Plan) -> set[str]:
    """What stands for a partition that is out of date: a run that is to come may start from it."""
    found = (project.store.current_fingerprint(s.node.stage, s.node.partition) for s in plan.todo)
    return {fingerprint for fingerprint in found if fingerprint}


def _delete_entry(project: Project, record: Record) -> None:
    store = project.store
    if store.current_fingerprint(record.stage, record.partition) == record.fingerprint:
        store.clear_current(record.stage, record.partition)
    store.discard(record)
    home = store.folder(record).parent
    if not any(home.iterdir()):
        home.rmdir()


def _unfinished(project: Project, idle_hours: float) -> Iterator[Item]:
    """Folders that a killed writer left, and scratch of runs that are over."""
    root = project.store.root
    left = [path for path in root.glob("*/*/.*") if path.name.startswith((".tmp-", ".old-", ".current-"))]
    scratch = sorted(project.scratch.iterdir()) if project.scratch.is_dir() else []
    before = time.time() - idle_hours * 3600
    for path in [*sorted(left), *scratch]:
        if _last_write(path) < before and not is_being_written(path):
            yield Item("unfinished", str(path.relative_to(project.config.work)), size_of(path), path)


def _last_write(path: Path) -> float:
    return max((status.st_mtime for status in statuses_of(path)), default=0.0)


def _configs(project: Project, kept: list[Record]) -> Iterator[Item]:
    used = {project.store.config(record) for record in kept}
    for path in sorted((project.store.root / CONFIGS).glob("*.yaml")):
        if path not in used:
            yield Item("config", path.name, size_of(path), path)


def _lance(project: Project, plan: Plan, kept: list[Record]) -> Iterator[Item]:
    """Tables and tags of no kept entry, and versions that are neither the newest nor tagged."""
    tables = {record.stats["table"] for record in kept if "table" in record.stats}
    labels = [record for record in kept if record.stage == PSEUDO_LABELS]
    tags = {label_tag(record.fingerprint) for record in labels}
    current = plan.by_name[PSEUDO_LABELS]
    for path in sorted(project.vectors.folder.glob("*.lance")):
        name = path.stem
        if name not in tables:
            yield Item("table", f"LanceDB {name}", size_of(path), path)
            continue
        table = project.vectors.open(name)
        yield from (Item("tag", f"{name} {tag}", 0) for tag in sorted(table.tags.list()) if tag not in tags)
        # only while the newest rows are those that the labels have read, compaction keeps one copy of them
        if current.status is Status.CURRENT and len(table.list_versions()) > 1:
            stats: Any = table.stats()
            size = size_of(path / "data") - stats["total_bytes"]
            yield Item("versions", name, max(size, 0))


def _compact(project: Project, name: str) -> None:
    """Merge small files, let the labels' tags name the merged version, and drop every other version."""
    table = project.vectors.open(name)
    table.optimize()
    table.checkout_latest()
    for record in [r for r in project.store.records() if r.stage == PSEUDO_LABELS]:
        if record.stats["table"] == name and record.stats["version"] != table.version:
            project.store.move_pin(record, table.version)
            project.vectors.pin(name, table.version, label_tag(record.fingerprint))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "optimize")  # of concurrent readers: `delete` has looked for runs
        table.optimize(cleanup_older_than=timedelta(0))
