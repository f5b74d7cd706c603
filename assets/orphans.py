"""What a killed ``clipcov run`` leaves in Dagster: runs that never end and hold a place in a pool for ever.

Dagster's daemon looks after runs that it launched; those that ``clipcov run`` executes in its own process
carry that process in a tag, and the next ``clipcov run`` closes them once it is gone.
"""

import os
import socket

import dagster as dg
import psutil

PROCESS_TAG = "clipcov/process"
_ACTIVE = (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING)


def this_process() -> str:
    """Return ``HOST:PID:START``, which no later process has."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def close_orphans(instance: dg.DagsterInstance) -> list[str]:
    """Close the runs whose process on this machine is gone; return their ids.

    What they, or runs that have ended since, held of a pool is given back: nobody else does while no daemon
    runs, and the next run would wait for it for ever.
    """
    closed = []
    for run in instance.get_runs(dg.RunsFilter(statuses=list(_ACTIVE))):
        if _is_gone(run.tags.get(PROCESS_TAG, "")):
            instance.report_run_failed(run, "The process that executed this run is gone.")
            closed.append(run.run_id)
    storage = instance.event_log_storage
    for run_id in storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            storage.free_concurrency_slots_for_run(run_id)
    return closed


def _is_gone(process: str) -> bool:
    """Whether a process of this machine has ended; of another one, or without a tag, nobody knows."""
    host, _, rest = process.partition(":")
    pid, _, started = rest.partition(":")
    return host == socket.gethostname() and _started(int(pid)) != started


def _started(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).create_time():.1f}"
    except psutil.NoSuchProcess:
        return ""
