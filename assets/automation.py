"""Unattended rebuilds: a sensor that requests what the plan says, and a schedule that rescans the shards.

Both read the YAML at every tick and are off until someone switches them on in the UI. The sensor asks for
everything that can be built now, the schedule for the manifests of new and changed shards, with which the
chain begins. A request's run key is made of what it would build and what stands there: a second tick starts
nothing twice, and what has failed, or was killed alone, is left alone until something about it changes. A run
that was killed with the UI or the machine has not failed: it is closed and asked for again.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg

from assets.display.asset_checks import report_checks
from assets.display.staleness import report_staleness
from assets.partitions import chunks, range_tags, sync_partitions
from assets.resources import Experiment
from assets.steps.orphans import close_orphans, times_closed
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.batches import check_batches
from clipcov_pipeline.experiment.config.automation import Automation
from clipcov_pipeline.experiment.config.load import load_config
from clipcov_pipeline.experiment.digests import digest_of
from clipcov_pipeline.experiment.plan import Plan, Status, Step
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import STAGES
from clipcov_pipeline.experiment.store import Store

STAGE_TAG = "clipcov/stage"
ACTIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def _settings() -> Automation:
    """The intervals are fixed when the code location loads; a broken YAML must not keep it from loading."""
    try:
        return load_config().automation
    except InputError:
        return Automation()


SETTINGS = _settings()
# a job a stage, because assets with different partitions cannot share one
JOBS = {
    stage: dg.define_asset_job(
        f"build_{stage}",
        selection=[stage],
        tags={STAGE_TAG: stage},
        op_retry_policy=dg.RetryPolicy(
            max_retries=SETTINGS.max_retries, delay=SETTINGS.retry_seconds, backoff=dg.Backoff.EXPONENTIAL
        ),
    )
    for stage in STAGES
}


def run_requests(
    instance: dg.DagsterInstance, project: Project, plan: Plan, busy: set[str], stages: Sequence[str] = STAGES
) -> Iterator[dg.RunRequest]:
    """Yield a request for all that can be built or restored now, stage by stage, but for ``busy`` stages.

    ``busy``: those that were at work before the plan was made. A run that ends in between would otherwise
    be asked for once more, by a plan that does not know what it built.
    """
    for stage in stages:
        ready = [s for s in plan.of(stage) if s.status in (Status.BUILD, Status.RESTORE)]
        if busy:  # a part that waits may be waiting for a run at work: then both parts are asked for at once
            waiting = {s.key for s in plan.of(stage) if s.status is Status.WAIT}
            ready = [s for s in ready if s.key not in waiting]
        if not ready or stage in busy:
            continue
        states: dict[str, list[object]] = {}
        for step in ready:
            states.setdefault(step.key, []).append(_state(project.store, step))
        for keys in chunks(instance, stage, list(states)):
            tags = {STAGE_TAG: stage, **range_tags(stage, keys)}
            state = [states[key] for key in keys]
            if lost := times_closed(instance, tags):
                state.append([lost])
            run_key = f"{stage}-{digest_of(state)[:24]}"
            yield dg.RunRequest(run_key=run_key, job_name=JOBS[stage].name, tags=tags)


def _state(store: Store, step: Step) -> list[str | int | None]:
    """What a request is for: the fingerprint, and what stood there and what it reads since when.

    Without the times a setting changed there, back and there again, or a damaged entry, would be asked for by
    a key that Dagster has seen. A failed build changes none of them.
    """
    read = [store.current_since(item.stage, item.partition) for item in step.node.inputs]
    return [step.fingerprint, store.current_since(step.node.stage, step.node.partition), max(read, default=0)]


def stages_at_work(instance: dg.DagsterInstance) -> set[str]:
    """Return the stages that an unfinished run, whoever started it, is building."""
    runs = instance.get_runs(filters=dg.RunsFilter(statuses=ACTIVE))
    return {stage for run in runs for stage in _stages_of(run)}


def _stages_of(run: dg.DagsterRun) -> list[str]:
    named = [run.tags[STAGE_TAG]] if STAGE_TAG in run.tags else []
    return list(dict.fromkeys([*named, *(key.path[-1] for key in run.asset_selection or ())]))


def _waits_for(instance: dg.DagsterInstance) -> str:
    """Say which runs are at work, and since when."""
    found = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=ACTIVE), ascending=True):
        run, since = record.dagster_run, record.create_timestamp.astimezone()
        stages = ", ".join(_stages_of(run)) or run.job_name
        found.append(f"{stages} (run {run.run_id[:8]}, {run.status.value}, since {since:%Y-%m-%d %H:%M:%S})")
    return "; ".join(found) or "no run is at work"


def _still_written(project: Project) -> list[str]:
    """Return the names of local shards that were written to a moment ago."""
    since = time.time() - project.config.automation.settle_seconds
    paths = {shard.name: Path(shard.url) for shard in project.world.shards}
    return [name for name, path in paths.items() if path.is_file() and path.stat().st_mtime > since]


def _tick(
    instance: dg.DagsterInstance, experiment: Experiment, stages: Sequence[str]
) -> dg.SensorResult | dg.SkipReason:
    """Read the YAML, list the shards and request what is out of date; skip with the reason in words."""
    try:
        project = experiment.open()
        close_orphans(instance, project.config)
        busy = stages_at_work(instance)
        plan = project.plan()
        check_batches(project, plan)
    except InputError as error:
        return dg.SkipReason(str(error))
    if growing := _still_written(project):
        return dg.SkipReason(f"waiting for shards that are still being written: {', '.join(growing)}")
    sync_partitions(instance, plan)
    report_staleness(instance, plan)
    report_checks(instance, project.config, plan)
    requests = list(run_requests(instance, project, plan, busy, stages))
    if requests:
        return dg.SensorResult(run_requests=requests)
    if not plan.todo:
        return dg.SkipReason(f"nothing to do: all {len(plan.steps)} entries are up to date")
    if blocked := [step for step in plan.steps if step.status is Status.BLOCKED]:
        rest = f" and {len(blocked) - 1} more" if len(blocked) > 1 else ""
        return dg.SkipReason(f"{blocked[0].node.name}{rest} {'; '.join(blocked[0].why)}")
    return dg.SkipReason(f"waiting: {len(plan.todo)} entries out of date; at work: {_waits_for(instance)}")


@dg.sensor(
    jobs=list(JOBS.values()),
    minimum_interval_seconds=SETTINGS.sensor_seconds,
    default_status=dg.DefaultSensorStatus.STOPPED,
)
def rebuild(context: dg.SensorEvaluationContext, experiment: Experiment) -> dg.SensorResult | dg.SkipReason:
    """Request runs for everything that is out of date."""
    return _tick(context.instance, experiment, STAGES)


@dg.schedule(
    job=JOBS["raw_shards"],
    cron_schedule=SETTINGS.cron,
    default_status=dg.DefaultScheduleStatus.STOPPED,
)
def rescan(
    context: dg.ScheduleEvaluationContext, experiment: Experiment
) -> list[dg.RunRequest] | dg.SkipReason:
    """List the shard source again and request the manifests of new and changed shards."""
    result = _tick(context.instance, experiment, ("raw_shards",))
    return result if isinstance(result, dg.SkipReason) else list(result.run_requests or ())
