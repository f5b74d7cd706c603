"""Where an entry comes from: a tree up to the shards' sha256, the proxy, the settings and the git commit."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.index import Index
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.reasons import flat
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import PER_SHARD, STAGES
from clipcov_pipeline.experiment.store import Store
from clipcov_pipeline.proxy.vectors import label_tag
from clipcov_pipeline.report.diff import find_record

COLLAPSE = 4  # more entries of a shard stage than this are shown as one line


@dataclass(frozen=True)
class Lineage:
    """The entry asked for and everything that it was made from.

    ``missing``: inputs (``STAGE/PARTITION#OUTPUT`` and digest) whose entry was removed from the store.
    """

    root: Record
    entries: dict[str, Record]
    """By ``STAGE/PARTITION@FINGERPRINT``, each after what it reads."""
    sources: dict[str, list[str]]
    """Keys of the entries that an entry reads."""
    missing: dict[str, str]


def key_of(record: Record) -> str:
    """Return ``STAGE/PARTITION@FINGERPRINT``, the fingerprint's first 12 digits."""
    return f"{record.name}@{record.fingerprint[:12]}"


def combined_digest(records: Sequence[Record]) -> str:
    """Return one digest of all that these entries hold."""
    return digest_of([[r.name, dict(r.digests)] for r in records])


def find(store: Store, name: str) -> Record:
    """Return the entry of a name, or of an MLflow run's id.

    Raises:
        InputError: there is none.
    """
    try:
        return find_record(store, name)
    except InputError:
        for record in store.records():
            if record.stats.get("mlflow_run_id") == name:
                return record
        raise


def trace(project: Project, name: str) -> Lineage:
    """Follow an entry's inputs up, by their digests.

    Raises:
        InputError: no such entry.
    """
    root = find(project.store, name)
    index = Index(list(project.store.records()))
    entries: dict[str, Record] = {}
    sources: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    waiting = [root]
    while waiting:
        record = waiting.pop()
        key = key_of(record)
        if key in entries:
            continue
        entries[key], found = record, {}
        for output, source in index.sources(record).items():
            if source is None:
                missing[output] = record.inputs[output]
            else:
                found[key_of(source)] = source
        sources[key] = list(found)
        waiting += found.values()
    order = sorted(entries, key=lambda key: (STAGES.index(entries[key].stage), entries[key].partition))
    return Lineage(root, {key: entries[key] for key in order}, sources, missing)


def as_json(project: Project, lineage: Lineage) -> dict[str, Any]:
    """Return everything as JSON-able values: no entry is collapsed."""
    entries = {
        key: {
            **asdict(record),
            "reads": lineage.sources[key],
            "config_file": _config_file(project, record),
            "folder": str(project.store.folder(record)),
        }
        for key, record in lineage.entries.items()
    }
    return {"root": key_of(lineage.root), "entries": entries, "missing": lineage.missing}


def as_text(project: Project, lineage: Lineage) -> str:
    """Return the tree as lines; what was shown above is not repeated, many shards are one line."""
    lines = list(_tree(lineage, [key_of(lineage.root)], "", set()))
    lines.insert(1, f"    in {project.store.folder(lineage.root)}")
    lines += [f"removed from the store: {name} {digest[:12]}" for name, digest in lineage.missing.items()]
    return "\n".join([*lines, "", *_made_by(project, lineage)])


def _tree(lineage: Lineage, keys: Sequence[str], indent: str, shown: set[str]) -> Iterator[str]:
    for group in _groups(lineage, keys):
        first = lineage.entries[group[0]]
        if len(group) > 1:
            text, details = _group_text(lineage, group)
        else:
            text, details = _entry_text(first), list(_details(first))
        if shown.issuperset(group):
            yield f"{indent}{text.partition('  ')[0]}  (above)"
            continue
        shown.update(group)
        yield f"{indent}{text}"
        yield from (f"{indent}    {detail}" for detail in details)
        above = list(dict.fromkeys(source for key in group for source in lineage.sources[key]))
        yield from _tree(lineage, above, f"{indent}  ", shown)


def _groups(lineage: Lineage, keys: Sequence[str]) -> list[list[str]]:
    """Put many entries of a shard stage into one group, and any other into a group of its own."""
    by_stage: dict[str, list[str]] = {}
    for key in keys:
        by_stage.setdefault(lineage.entries[key].stage, []).append(key)
    groups = []
    for stage, found in by_stage.items():
        if stage in PER_SHARD and len(found) > COLLAPSE:
            groups.append(sorted(found))
        else:
            groups += [[key] for key in found]
    return groups


def _entry_text(record: Record) -> str:
    digests = " ".join(f"{name} {digest[:12]}" for name, digest in record.digests.items())
    when = datetime.fromtimestamp(record.finished).isoformat(" ", "seconds")
    return f"{key_of(record)}  {digests}  {record.seconds:,.1f} s, {when}"


def _group_text(lineage: Lineage, keys: Sequence[str]) -> tuple[str, list[str]]:
    records = [lineage.entries[key] for key in keys]
    combined = combined_digest(records)
    stage, seconds = records[0].stage, sum(record.seconds for record in records)
    text = f"{stage}: {len(records):,} entries  combined {combined[:12]}  {seconds:,.1f} s"
    details = []
    if stage == "raw_shards":
        shards = digest_of([[r.partition, r.stats["sha256"]] for r in records])
        details = [
            f"sha256 of all shards' sha256 {shards}",
            f"{records[0].stats['url']} ... {records[-1].stats['url']}",
        ]
    elif stage == "embeddings":
        tables = sorted({r.stats["table"] for r in records})
        details = [f"LanceDB {', '.join(tables)}, {sum(r.stats['rows'] for r in records):,} rows"]
    return text, details


def _details(record: Record) -> Iterator[str]:
    stats = record.stats
    settings = [f"{key}={value}" for key, value in flat(record.params).items() if value is not None]
    if settings:
        yield " ".join(settings)
    if record.stage == "raw_shards":
        yield f"sha256 {stats['sha256']}  {stats['url']}"
    if record.stage == "proxy_model":
        yield f"weights sha256 {record.digests['weights']}"
    if "table" in stats:
        tag = f" tag {label_tag(record.fingerprint)}" if record.stage == "pseudo_labels" else ""
        yield f"LanceDB {stats['table']} version {stats['version']}{tag}"
    if "seen_samples" in stats:
        yield (
            f"given {stats['seen_samples']:,} samples, {stats['seen_distinct']:,} distinct ones of"
            f" {stats['seen_rows']:,}, one at most {stats['seen_most']:,} times, {stats['seen_repeated']:,}"
            " beside their like in a batch: seen.parquet"
        )
    if "mlflow_run_id" in stats:
        yield f"MLflow run {stats['mlflow_run_id']}"
    if record.sources and record.stage not in PER_SHARD:
        yield "reads " + " ".join(f"{name}={token[:40]}" for name, token in record.sources.items())


def _made_by(project: Project, lineage: Lineage) -> Iterator[str]:
    """Say which commits and which YAMLs made the entries."""
    records = lineage.entries.values()
    for commit, count in Counter(record.commit or "not recorded" for record in records).most_common():
        yield f"git commit {commit}: {count:,} entries"
    for digest, count in Counter(record.config for record in records).most_common():
        record = next(r for r in records if r.config == digest)
        place = _config_file(project, record) or "not kept"
        yield f"config sha256 {digest[:12] or 'not recorded'}: {count:,} entries  {place}"


def _config_file(project: Project, record: Record) -> str | None:
    path = project.store.config(record)
    return str(path) if path else None
