"""Brings partitions of a stage up to date: builds, restores or finds them, each with its own data version.

Dagster asks a stage for one partition or for many in one run; what needs no work costs a look into the store.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from assets.display.asset_checks import check_results
from assets.display.preview import COLUMN_SCHEMA, ROW_COUNT
from assets.mlflow_runs.tracking import mlflow_run_url
from assets.resources import Experiment
from assets.steps.cancellation import cancellable
from assets.steps.orphans import tag_with_process
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.plan import Plan, Status, Step
from clipcov_pipeline.experiment.project import Project, Task
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.redaction import redacted

Metadata = Mapping[str, Any]

Build = Callable[[Task], None]
"""Fills ``task.entry``."""

Show = Callable[[Path], Metadata]
"""Returns an entry's tables, plots and links from its folder, whether it was built just now or long ago."""

Restore = Callable[[Project, Record], None]
"""Brings back what an earlier entry keeps outside the store; InputError where that is gone."""

Events = Iterator[dg.AssetMaterialization | dg.AssetCheckResult]


# Dagster's own tags, which it writes for a MaterializeResult but not for an AssetMaterialization
DATA_VERSION_TAG = "dagster/data_version"

CODE_VERSION_TAG = "dagster/code_version"

INPUT_VERSION_TAG = "dagster/input_data_version"

INPUT_EVENT_TAG = "dagster/input_event_pointer"

NOTHING = "NULL"


def materialize_partitions(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    build: Build,
    *,
    show: Show | None = None,
    restore: Restore | None = None,
) -> Events:
    """Bring every partition of the run up to date and yield one event for each.

    A partition that fails does not stop the others; the run fails at the end and names it.
    """
    tag_with_process(context)
    read = input_tags(context)
    work, keys = _open(context, experiment, build, show, restore), context.partition_keys
    failures: dict[str, str] = {}
    with cancellable(context):
        for key in keys:
            try:
                metadata, version = work.bring_up_to_date(key)
            except Exception as error:
                if len(keys) == 1:
                    raise _shown(error) from error
                context.log.error(
                    f"{work.stage}/{key} failed: {redacted(str(error))}", exc_info=not _is_plain(error)
                )
                failures[key] = redacted(str(error))
                continue
            tags = {DATA_VERSION_TAG: version, CODE_VERSION_TAG: CODE_VERSIONS[work.stage], **read}
            yield dg.AssetMaterialization(context.asset_key, partition=key, metadata=metadata, tags=tags)
    yield from check_results(work.stage, experiment.open())
    if failures:
        lines = "; ".join(f"{work.stage}/{key}: {text}" for key, text in failures.items())
        raise dg.Failure(f"{len(failures)} of {len(keys)} partitions failed: {lines}")


def input_tags(context: dg.AssetExecutionContext) -> dict[str, str]:
    """Say what was the newest of every asset that is read: without it Dagster calls a partition unsynced.

    Dagster looks for other data versions among what was materialized after that event.
    """
    tags = {}
    for read in context.assets_def.asset_deps[context.asset_key]:
        newest = next(iter(context.instance.fetch_materializations(read, limit=1).records), None)
        made = newest.asset_materialization if newest is not None else None
        version = (made.tags or {}).get(DATA_VERSION_TAG, NOTHING) if made is not None else NOTHING
        tags[f"{INPUT_VERSION_TAG}/{read.to_user_string()}"] = version
        tags[f"{INPUT_EVENT_TAG}/{read.to_user_string()}"] = (
            str(newest.storage_id) if newest is not None else NOTHING
        )
    return tags


def materialize_whole(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    build: Build,
    *,
    show: Show | None = None,
    restore: Restore | None = None,
) -> dg.MaterializeResult:
    """Bring a stage without partitions up to date."""
    tag_with_process(context)
    work = _open(context, experiment, build, show, restore)
    try:
        with cancellable(context):
            metadata, version = work.bring_up_to_date(None)
    except InputError as error:
        raise _shown(error) from error
    return dg.MaterializeResult(
        metadata=metadata,
        data_version=dg.DataVersion(version),
        check_results=list(check_results(work.stage, experiment.open())),
    )


def _is_plain(error: Exception) -> bool:
    return isinstance(error, (InputError, dg.Failure))


def _shown(error: Exception) -> Exception:
    """Show a user's mistake as one line; anything else keeps its traceback."""
    return dg.Failure(str(error), allow_retries=False) if isinstance(error, InputError) else error


def _open(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    build: Build,
    show: Show | None,
    restore: Restore | None = None,
) -> "_Work":
    try:
        project = experiment.open()
    except InputError as error:
        raise _shown(error) from error
    return _Work(context, project, project.plan(), build, show, restore)


@dataclass(frozen=True)
class _Work:
    """One Dagster step's work on a stage, under the plan that was made when it began."""

    context: dg.AssetExecutionContext
    project: Project
    plan: Plan
    build: Build
    show: Show | None
    restore: Restore | None

    @property
    def stage(self) -> str:
        return self.context.asset_key.path[-1]

    def bring_up_to_date(self, key: str | None) -> tuple[dict[str, Any], str]:
        """Return the metadata and the data version of a Dagster partition, which may have several parts."""
        steps = self.plan.of(self.stage, key)
        if not steps:
            raise InputError(
                f"{self.stage}/{key} is not in the experiment {self.project.config.name}: check the YAML and"
                " the shards"
            )
        metadata: dict[str, Any] = {}
        fingerprints = []
        for step in steps:
            if step.status is Status.WAIT and any(other.status is not Status.WAIT for other in steps):
                # its other parts need not
                self.context.log.warning(f"{step.node.name} {'; '.join(step.why)}")
                continue
            record, outcome = self._one(step)
            fingerprints.append(record.fingerprint[:16])
            part = step.node.partition.partition("@")[2]
            prefix = f"{part}/" if part else ""
            for name, value in self._describe(step, record, outcome).items():
                if name == ROW_COUNT:
                    metadata[name] = metadata.get(name, 0) + value
                else:  # Dagster looks for the columns of the whole under their own name
                    metadata[name if name == COLUMN_SCHEMA else f"{prefix}{name}"] = value
            why = f" ({'; '.join(step.why)})" if step.why else ""
            self.context.log.info(f"{step.node.name}: {outcome}{why}")
        return metadata, "-".join(fingerprints)

    def _one(self, step: Step) -> tuple[Record, str]:
        if step.status is Status.WAIT:
            raise InputError(f"{step.node.name} {'; '.join(step.why)}: materialize that first")
        if step.status is Status.BLOCKED:
            raise InputError(f"{step.node.name} is {'; '.join(step.why)}")
        if step.status is Status.CURRENT:
            assert step.record is not None
            return step.record, "cached"
        if step.status is Status.RESTORE and self._restored(step):
            assert step.record is not None
            return step.record, "restored"
        record = self._built(step)
        return record, f"built in {record.seconds:,.1f} s"

    def _restored(self, step: Step) -> bool:
        assert step.record is not None
        try:
            if self.restore is not None:
                self.restore(self.project, step.record)
        except InputError as error:
            self.context.log.warning(f"{step.node.name} cannot be restored and is built again: {error}")
            return False
        self.project.store.set_current(step.record)
        return True

    def _built(self, step: Step) -> Record:
        node, store = step.node, self.project.store
        assert step.fingerprint is not None
        with store.write(
            node.stage,
            node.partition,
            step.fingerprint,
            code_version=CODE_VERSIONS[node.stage],
            params=node.params,
            sources=node.sources,
            inputs=step.inputs,
        ) as entry:
            task = Task(self.project, self.plan, step, entry)
            self.build(task)
        shutil.rmtree(task.scratch, ignore_errors=True)  # not before its result is in the store
        record = store.current(node.stage, node.partition)
        assert record is not None
        return record

    def _describe(self, step: Step, record: Record, outcome: str) -> dict[str, Any]:
        """Return metadata: what happened and why, the recorded statistics, tables and plots, the folder."""
        folder = self.project.store.folder(record)
        metadata: dict[str, Any] = {"outcome": outcome, "seconds": record.seconds}
        if step.why:
            metadata["why"] = "; ".join(step.why)
        metadata |= self.show(folder) if self.show is not None else {}
        metadata |= {name: _shown_value(v) for name, v in record.stats.items() if v not in ("", None)}
        if "rows" in record.stats:
            metadata[ROW_COUNT] = record.stats["rows"]
        if "mlflow_run_id" in record.stats:
            url = mlflow_run_url(self.project.config, record.stats["mlflow_run_id"])
            metadata["mlflow_run"] = dg.MetadataValue.url(url)
        metadata["fingerprint"] = record.fingerprint[:16]
        metadata["folder"] = dg.MetadataValue.path(str(folder))
        return metadata


def _shown_value(value: Any) -> Any:
    """Make addresses links, and leave digits out that mean nothing."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case str() if value.startswith(("http://", "https://")):
            return dg.MetadataValue.url(value)
        case dict() | list():
            return dg.MetadataValue.json(value)
        case _:
            return value
