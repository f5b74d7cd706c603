"""What a killed process leaves in Dagster: runs that never end and hold a place in a pool for ever.

Dagster's own run launcher does not look after the processes that it has started. So a run carries its process
in a tag, from when its step begins (one that `clipcov run` executes, from its own beginning), and
``clipcov run``, ``clipcov ui`` and the `rebuild` sensor close those whose process is gone.
"""

import socket
from collections.abc import Mapping, Sequence

import dagster as dg
import psutil

from assets.tracking import Tracking
from clipcov_pipeline.config import Config

PROCESS_TAG = "clipcov/process"
CLOSED_TAG = "clipcov/closed"
CLOCK_SECONDS = 60.0  # a process's start is told by the clock, which may be set meanwhile
_ACTIVE = (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)


def process_tag(run_id: str) -> dict[str, str]:
    """Return the tag of a run that this process executes, ``HOST:PID:START:RUN``.

    It names the run, because a run that is executed again inherits the tags of the first.
    """
    process = psutil.Process()
    return {PROCESS_TAG: f"{socket.gethostname()}:{process.pid}:{process.create_time():.1f}:{run_id}"}


def tag_with_process(context: dg.AssetExecutionContext) -> None:
    """Note that this process executes the run (which has one step, executed in the run's own process)."""
    tag = process_tag(context.run.run_id)
    if not tag.items() <= context.run.tags.items():  # `clipcov run` has given it with the run
        context.instance.add_run_tags(context.run.run_id, tag)


def close_orphans(instance: dg.DagsterInstance, config: Config) -> list[str]:
    """Close the runs whose process on this machine is gone, in MLflow, too; return their ids.

    What they, or runs that have ended since, held of a pool is given back: nobody else does while no daemon
    runs, and the next run would wait for it for ever.
    """
    closed = []
    for run in instance.get_runs(dg.RunsFilter(statuses=list(_ACTIVE))):
        if _is_gone(run):
            instance.report_run_failed(run, "The process that executed this run is gone.")
            instance.add_run_tags(run.run_id, {CLOSED_TAG: run.run_id})
            closed.append(run.run_id)
    storage = instance.event_log_storage
    for run_id in storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            storage.free_concurrency_slots_for_run(run_id)
    if closed:
        Tracking(config).close_trainings_of(closed)
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
    host, pid, started, run_id = (run.tags.get(PROCESS_TAG, "").split(":") + [""] * 4)[:4]
    if run_id != run.run_id or host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True
