"""Executes partitions of a stage in Dagster runs: in this process, or dealt out to several.

``python -m assets.running.execution STAGE KEY...`` executes one share. Dagster's daemon does the same with
the runs of a backfill: both keep to the places of the pool ``gpu``.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from uuid import uuid4

import click
import dagster as dg

from assets.definitions import defs
from assets.partitions import chunks, range_tags, sync_partitions
from assets.running.instance import project_instance
from assets.steps.orphans import process_tag
from clipcov_pipeline.experiment.plan import Plan
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.stages import ONE_AT_A_TIME
from clipcov_pipeline.training.parent import PARENT_VARIABLE, end_with_parent

TERMINAL = {"loggers": {"terminal": {}}}

GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"

LOOK_UP_SECONDS = 0.2


def execute_all(instance: dg.DagsterInstance, plan: Plan, stage: str, keys: Sequence[str]) -> None:
    """Execute partitions of a stage, in as many Dagster runs as `chunks` asks for.

    The partitions are set again before each run: a training takes long, and what opens another YAML with the
    same work folder meanwhile (a user interface, the sensor) sets that YAML's.
    """
    left = list(keys)
    while left:
        sync_partitions(instance, plan)
        chunk = next(chunks(instance, stage, left))
        execute(instance, stage, chunk)
        done = set(chunk)
        left = [key for key in left if key not in done]


def execute(instance: dg.DagsterInstance, stage: str, keys: Sequence[str]) -> None:
    """Execute one Dagster run: a stage, and of a partitioned one the keys from the first to the last.

    Raises:
        KeyboardInterrupt: the run was interrupted; Dagster itself only notes a failed run.
    """
    job, run_id = defs.resolve_implicit_global_asset_job_def(), str(uuid4())
    result = job.execute_in_process(
        instance=instance,
        run_id=run_id,
        asset_selection=[dg.AssetKey(stage)],
        tags={**range_tags(stage, keys), **process_tag(run_id)},
        run_config=TERMINAL,
        raise_on_error=False,
    )
    if any(map(_is_interruption, result.all_events)):
        raise KeyboardInterrupt


def _is_interruption(event: dg.DagsterEvent) -> bool:
    if event.event_type is dg.DagsterEventType.PIPELINE_CANCELED:
        return True
    if event.event_type is not dg.DagsterEventType.PIPELINE_FAILURE:
        return False
    error = event.job_failure_data.error
    return error is not None and error.cls_name == "DagsterExecutionInterruptedError"


def deal(stage: str, keys: Sequence[str], places: int) -> list[list[str]]:
    """Cut keys into at most ``places`` shares: trainings in turns, as their length may follow the fraction;
    what Dagster runs in ranges, in ranges."""
    if stage in ONE_AT_A_TIME:
        shares = [list(keys[place::places]) for place in range(places)]
    else:
        size = math.ceil(len(keys) / places)
        shares = [list(keys[start : start + size]) for start in range(0, len(keys), size)]
    return [share for share in shares if share]


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; as given, where it is set."""
    if GPUS_VARIABLE in os.environ:
        return [gpu.strip() for gpu in os.environ[GPUS_VARIABLE].split(",")]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]  # which takes no memory of a GPU


def own_gpu(gpus: Sequence[str], place: int) -> dict[str, str]:
    """Environment of the share at a place: one GPU, in turns, where there are several to deal out."""
    return {GPUS_VARIABLE: gpus[place % len(gpus)]} if len(gpus) > 1 else {}


def execute_side_by_side(
    config: str | None, stage: str, shares: Sequence[Sequence[str]], places: int, gpus: Sequence[str] = ()
) -> None:
    """Execute each share in a process of its own; return when all have ended.

    The CPU's cores are divided by ``places``, however few shares there are (another number of threads gives
    other roundings), unless ``OMP_NUM_THREADS`` says otherwise, and ``gpus`` are dealt out, one a share;
    without any, each sees what this process sees.

    Raises:
        KeyboardInterrupt: after every share has ended, too.
    """
    threads = max(1, (os.cpu_count() or 1) // places)
    env = {"OMP_NUM_THREADS": str(threads), **os.environ, PARENT_VARIABLE: str(os.getpid())}
    command = [
        sys.executable,
        "-m",
        "assets.running.execution",
        *(("--config", config) if config else ()),
        stage,
    ]
    # a session each: an interruption from the terminal reaches them once, through this process
    processes = [
        subprocess.Popen([*command, *share], env={**env, **own_gpu(gpus, place)}, start_new_session=True)
        for place, share in enumerate(shares)
    ]
    try:
        _wait(processes)
    except BaseException:
        for process in processes:
            process.send_signal(signal.SIGINT)
        _wait(processes)
        raise


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Return when all have ended.

    Polars has system calls begun anew after a signal: no interruption would end ``Popen.wait``.
    """
    while any(process.poll() is None for process in processes):
        time.sleep(LOOK_UP_SECONDS)


@click.command()
@click.option("--config")
@click.argument("stage")
@click.argument("keys", nargs=-1)
def main(config: str | None, stage: str, keys: tuple[str, ...]) -> None:
    """Execute one share; what failed is seen in the store."""
    end_with_parent()
    project = Project.open(config)
    with project_instance(project.config) as instance:
        try:
            execute_all(instance, project.plan(), stage, keys)
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
