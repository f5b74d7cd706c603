"""What a killed process leaves in Dagster: runs that never end and hold a place in a pool for ever.

Dagster's own run launcher does not look after the processes that it has started. So a run carries its process
in a tag, from when its step begins (one that `clipcov run` executes, from its own beginning), and
``clipcov run``, ``clipcov ui`` and the `rebuild` sensor close those whose process is gone.
"""

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg
import psutil

from assets.mlflow_runs.tracking import Tracking
from clipcov_pipeline.experiment.config.experiment import Config

PROCESS_TAG = "clipcov/process"

CLOSED_TAG = "clipcov/closed"

LAUNCHED_TAG = ".dagster/grpc_info"  # Dagster's own: a code server was asked to start the run's process

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


# a start is told from the machine's: the clock may be set meanwhile, and a container gives pids again
START_SECONDS = 1.5  # the machine's own is known to a second

_ACTIVE = (
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)

UNBEGUN_SECONDS = 600  # whoever creates a run starts or queues it at once


def process_tag(run_id: str) -> dict[str, str]:
    """Return the tag of a run that this process executes, ``HOST:BOOT:PID:START:RUN``.

    It names the run, because a run that is executed again inherits the tags of the first.
    """
    process = psutil.Process()
    parts = (socket.gethostname(), _boot(), process.pid, f"{_start(process):.1f}", run_id)
    return {PROCESS_TAG: ":".join(map(str, parts))}


def tag_with_process(context: dg.AssetExecutionContext) -> None:
    """Note that this process executes the run (which has one step, executed in the run's own process)."""
    tag = process_tag(context.run.run_id)
    if not tag.items() <= context.run.tags.items():  # `clipcov run` has given it with the run
        context.instance.add_run_tags(context.run.run_id, tag)


def close_orphans(instance: dg.DagsterInstance, config: Config, *, launched: bool = False) -> list[str]:
    """Close the runs whose process on this machine is gone; return their ids.

    What they, or runs that have ended since, held of a pool is given back: nobody else does while no daemon
    runs, and the next run would wait for it for ever. What they trained is shown as killed in MLflow.

    Args:
        launched: also those that a UI created or launched and that had not come to tag themselves: no UI is
            there now. Else those that were created and not even queued are closed after `UNBEGUN_SECONDS`.
    """
    closed = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=list(_ACTIVE))):
        run = record.dagster_run
        if _is_gone(run) or _never_began(record, launched):
            # the tag first: should this process be killed in between, the run is met again
            instance.add_run_tags(run.run_id, {CLOSED_TAG: run.run_id})
            instance.report_run_failed(run, "The process that executed this run is gone.")
            closed.append(run.run_id)
    storage = instance.event_log_storage
    for run_id in storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            storage.free_concurrency_slots_for_run(run_id)
    tracking = Tracking(config)
    for mlflow_run, run_id in tracking.unfinished():
        run = instance.get_run_by_id(run_id)
        if run is not None and run.is_finished:
            tracking.finish(mlflow_run, "KILLED")
    return closed


def notices(closed: Sequence[str]) -> list[str]:
    """Return a line for a person about each run that was closed."""
    text = "its process was killed. What it finished is kept."
    return [f"Closed Dagster run {run_id[:8]}: {text}" for run_id in closed]


def times_closed(instance: dg.DagsterInstance, tags: Mapping[str, str]) -> int:
    """Return how many runs with these tags were closed: nothing was wrong with what they were to build."""
    runs = instance.get_runs(dg.RunsFilter(tags=dict(tags)))
    return sum(run.tags.get(CLOSED_TAG) == run.run_id for run in runs)


def _is_gone(run: dg.DagsterRun) -> bool:
    """Whether the process of this machine that executed a run has ended; of any other, nobody knows."""
    if not _has_tag(run):
        return False
    # an earlier version's tag has no boot, and so is of another
    host, boot, pid, started = run.tags[PROCESS_TAG].split(":")[:4]
    if host != socket.gethostname():
        return False
    if boot != _boot():
        return True
    try:
        return abs(_start(psutil.Process(int(pid))) - float(started)) > START_SECONDS
    except psutil.NoSuchProcess:
        return True


def _never_began(record: dg.RunRecord, launched: bool) -> bool:
    """Whether whoever created a run, or asked for its process, is gone; its own process never tagged it."""
    run = record.dagster_run
    if _has_tag(run):
        return False
    if run.status is dg.DagsterRunStatus.NOT_STARTED:
        return launched or time.time() - record.create_timestamp.timestamp() > UNBEGUN_SECONDS
    return launched and LAUNCHED_TAG in run.tags


def _has_tag(run: dg.DagsterRun) -> bool:
    """Whether the run's process has tagged it."""
    return run.tags.get(PROCESS_TAG, "").endswith(f":{run.run_id}")


def _start(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's."""
    return process.create_time() - psutil.boot_time()


def _boot() -> str:
    """What names the machine's present run, where the kernel does (Linux)."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
