"""Checks everything stored against its record: fingerprints, files, digests, LanceDB rows and tags."""

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.select import DRAW_FROM
from clipcov_pipeline.experiment.digests import digest_of_file, fingerprint_from
from clipcov_pipeline.experiment.index import PLACES, POOL, Index
from clipcov_pipeline.experiment.plan import Status
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import Record, node_name
from clipcov_pipeline.experiment.stages import (
    EMBEDDINGS,
    PSEUDO_LABELS,
    RANKINGS,
    SAMPLE_INDEX,
    SUBSETS,
    TABLE,
    derived_digests,
)
from clipcov_pipeline.pool.manifest import keys_by_shard
from clipcov_pipeline.proxy.vectors import digest_of_rows, label_tag
from clipcov_pipeline.subsets.cut import TARS, cut_ranking, whole_pool, write_subset
from clipcov_pipeline.subsets.files import Members, write_subset_tars


@dataclass
class Report:
    """What was checked, and what is wrong: (the entry, in words)."""

    checked: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[Record, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return a line a problem, each of which names its entry."""
        return [f"{record.name} {record.fingerprint[:12]}: {text}" for record, text in self.problems]


def verify(project: Project, *, deep: bool = False) -> Report:
    """Recompute all that can be recomputed; changes nothing.

    deep: also cut every subset of the current plan from its ranking again and compare the bytes.
    """
    report = Report()
    records = list(project.store.records())
    index = Index(records)
    current = {step.node.name: step.record for step in project.plan().steps if step.status is Status.CURRENT}
    standing = [record for record in records if current.get(record.name) == record]
    for record in records:
        report.checked["entries"] += 1
        report.checked["files"] += len(record.files)
    rows_problems = _rows_problems(project, standing, report)
    for record in records:
        problems = [*_entry_problems(project, record)]
        if current.get(record.name) == record:
            problems += index.missing_inputs(record)
            problems += rows_problems.get(record.name, [])
        problems += _pin_problems(project, record, report)
        report.problems += [(record, text) for text in problems]
    if deep:
        late = sum(s.node.stage == SUBSETS and s.status is not Status.CURRENT for s in project.plan().steps)
        if late:
            report.checked["subsets that are out of date and not cut again"] = late
        for record in current.values():
            if record is not None and record.stage == SUBSETS:
                report.checked["subsets cut again"] += 1
                report.problems += [(record, text) for text in _rebuilt_problems(project, record, index)]
    return report


def _entry_problems(project: Project, record: Record) -> Iterator[str]:
    recomputed = fingerprint_from(
        stage=record.stage,
        code_version=record.code_version,
        params=record.params,
        sources=record.sources,
        inputs=record.inputs,
    )
    if recomputed != record.fingerprint:
        yield f"its contents have fingerprint {recomputed[:12]}, expected {record.fingerprint[:12]}"
    yield from project.store.damage(record)
    for output, digest in derived_digests(record).items():
        found = record.digests.get(output, "none")
        if found != digest:
            yield f"digest of {output} is {found[:12]}, expected {digest[:12]} by its files"


def _rows_problems(project: Project, records: list[Record], report: Report) -> dict[str, list[str]]:
    """Compare the rows of every shard with their digest; what is wrong, by the entry's name.

    The version in use is read, once for all shards. Only a shard whose rows are not right there is looked up
    in the version that it was written in, too: no version changes, so right rows are still those.
    """
    by_table: dict[str, list[Record]] = {}
    for record in records:
        if record.stage == EMBEDDINGS:
            by_table.setdefault(record.stats["table"], []).append(record)
    problems: dict[str, list[str]] = {}
    for name, written in by_table.items():
        try:
            table = project.vectors.open(name)
        except InputError as error:
            problems |= {record.name: [str(error)] for record in written}
            continue
        latest, kept = table.version, {version["version"] for version in table.list_versions()}
        sizes = {record.partition: record.stats["rows"] for record in written}
        digests = project.vectors.digests(name, latest, sizes)
        for record in written:
            rows, found = digests[record.partition]
            report.checked["LanceDB rows"] += rows
            if found != record.digests["rows"]:
                earlier = {record.stats["version"]} & (kept - {latest})
                problems[record.name] = list(_wrong_rows(project, record, {*earlier, latest}))
    return problems


def _wrong_rows(project: Project, record: Record, versions: set[int]) -> Iterator[str]:
    table, expected = record.stats["table"], record.digests["rows"]
    for version in sorted(versions):
        rows = project.vectors.shard_rows(table, record.partition, version)
        if (found := digest_of_rows(rows)) != expected:
            yield (
                f"{rows.num_rows} rows in version {version} of {table} have digest {found[:12]},"
                f" expected {expected[:12]}"
            )


def _pin_problems(project: Project, record: Record, report: Report) -> Iterator[str]:
    if record.stage != PSEUDO_LABELS:
        return
    table, version, tag = record.stats["table"], record.stats["version"], label_tag(record.fingerprint)
    report.checked["LanceDB tags"] += 1
    try:
        tags = project.vectors.open(table).tags.list()
        project.vectors.open(table, version)
    except InputError as error:
        yield str(error)
        return
    found = tags[tag]["version"] if tag in tags else "none"
    if found != version:
        yield f"tag {tag} of {table} is on version {found}, expected {version}"


def _rebuilt_problems(project: Project, record: Record, index: Index) -> list[str]:
    scratch = project.scratch / f"verify-{record.fingerprint[:16]}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        digests = _cut_again(project, record, index, scratch)
        found = {name: _digest_or_none(scratch / name) for name in record.files} | digests
        expected = dict(record.files) | dict(record.digests)
        return [
            f"cut again, {name} has sha256 {found[name][:12]}, expected {digest[:12]}"
            for name, digest in expected.items()
            if found[name] != digest
        ]
    except (InputError, OSError) as error:
        return [f"cannot be cut again: {error}"]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest_or_none(path: Path) -> str:
    return digest_of_file(path) if path.is_file() else "none"


def _cut_again(project: Project, record: Record, entries: Index, folder: Path) -> dict[str, str]:
    """Write a subset's files from its ranking and the shards, as the stage does; return its digests."""
    sources = entries.sources(record)
    ranked = next((name for name in sources if name.startswith(f"{RANKINGS}/")), None)
    pool, places, ranking = sources[POOL], sources[PLACES], sources[ranked] if ranked else None
    if pool is None or places is None or (ranked and ranking is None):
        raise InputError(f"what {node_name(record.stage, record.partition)} was cut from is not in the store")
    labels = pl.read_parquet(_output(project, pool, PSEUDO_LABELS, "labels"))
    settings = record.params["select"]
    if ranking is None:
        subset = whole_pool(labels)
    else:
        frame = pl.read_parquet(_output(project, ranking, RANKINGS, "ranking"))
        subset = cut_ranking(frame, labels.height, settings["fraction"], settings.get(DRAW_FROM))
    index, digests = write_subset(folder, subset, labels, _output(project, places, SAMPLE_INDEX, "index"))
    if settings.get("write_tars"):
        write_subset_tars(
            list(project.tars.values()),
            keys_by_shard(index),
            folder / TARS,
            samples_per_shard=settings["samples_per_shard"],
            # how many it was spread over follows from knobs of the training
            min_shards=sum(name.endswith(".tar") for name in record.files),
            storage_options=dict(project.config.shards.storage_options),
            # code before this setting copied everything
            members=Members(project.config.shards.caption, everything="members" not in settings),
        )
    return digests


def _output(project: Project, record: Record, stage: str, output: str) -> Path:
    """The file of an entry that is an output of its stage."""
    return project.store.folder(record) / TABLE[stage].files[output]
