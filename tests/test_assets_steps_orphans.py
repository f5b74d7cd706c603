"""A killed ``clipcov run``: its training ends with it, and the next run goes on at once."""

import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable

import dagster as dg
import psutil
import pytest

from assets.mlflow_runs.tracking import Tracking
from assets.running.ui import claim_ui
from assets.steps.orphans import LAUNCHED_TAG, PROCESS_TAG, close_orphans, process_tag, times_closed
from lab import Lab

pytestmark = pytest.mark.slow


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_the_next_run_after_a_kill_goes_on_at_once(lab: Lab) -> None:
    command = [sys.executable, "-m", "assets.running.run", "--config", str(lab.yaml)]
    lab.edit(lambda s: s["train"].update(samples_seen=1_000_000))  # hours
    log = lab.folder / "killed.log"
    with log.open("wb") as output:
        killed = subprocess.Popen(command, stdout=output, stderr=output)
    wait_until(lambda: killed.poll() is not None or b"step 1/" in log.read_bytes(), 120)
    assert killed.poll() is None, log.read_text()[-3000:]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not lab.trains(), 30)
    lab.edit(lambda s: s["train"].update(samples_seen=192))
    lab.edit(lambda s: s["train"].update(lr=0.002))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "its process was killed. What it finished is kept." in done.stderr
    assert "3 checkpoints" in done.stdout
    assert not lab.plan().todo
    with lab.instance() as instance:
        assert instance.get_runs_count(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])) == 0
        assert not instance.event_log_storage.get_concurrency_run_ids()
    tracking = Tracking(lab.project().config)
    runs = tracking.client().search_runs([tracking.experiment_id()])
    assert Counter(run.info.status for run in runs) == {"FINISHED": 3 + 3 + 1, "KILLED": 1}


def test_only_runs_of_processes_that_are_gone_are_closed(lab: Lab) -> None:
    """Of this machine; what another process, machine or Dagster's daemon executes is left alone."""
    host, boot, pid, start, _ = process_tag("")[PROCESS_TAG].split(":")
    ours = {
        "alive": f"{host}:{boot}:{pid}:{start}:RUN",
        "pid was given again": f"{host}:{boot}:{pid}:{float(start) - 30}:RUN",  # by a container
        "of before the machine's restart": f"{host}:before:{pid}:{start}:RUN",
        "tagged by an earlier version": f"{host}:{2**22 + 1}:1.0:RUN",
        "gone": f"{host}:{boot}:{2**22 + 1}:1.0:RUN",
        "gone, of the run that this one repeats": f"{host}:{boot}:{2**22 + 1}:1.0:{uuid.uuid4()}",
        "elsewhere": f"not-{host}:{boot}:{2**22 + 1}:1.0:RUN",
        "no tag": None,
    }
    started = dg.DagsterRunStatus.STARTED
    with lab.instance() as instance:
        storage = instance.event_log_storage
        names = {}
        for name, process in ours.items():
            run_id = str(uuid.uuid4())
            tags = {PROCESS_TAG: process.replace("RUN", run_id)} if process else {}
            instance.add_run(dg.DagsterRun(job_name="x", run_id=run_id, status=started, tags=tags))
            names[run_id] = name
        held = next(run_id for run_id, name in names.items() if name == "gone")
        assert storage.claim_concurrency_slot("gpu", held, "checkpoints").is_claimed
        config = lab.project().config
        closed = {names[run_id] for run_id in close_orphans(instance, config)}
        left_alone = {"alive", "gone, of the run that this one repeats", "elsewhere", "no tag"}
        assert closed == set(ours) - left_alone
        left = {run.run_id for run in instance.get_runs(dg.RunsFilter(statuses=[started]))}
        assert {names[run_id] for run_id in left} == set(ours) - closed
        assert storage.get_concurrency_info("gpu").active_slot_count == 0
        assert close_orphans(instance, config) == []


def test_a_process_is_known_by_its_tag_after_the_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before, system = process_tag("x"), psutil._psplatform
    started = system.boot_time()
    monkeypatch.setattr(system, "boot_time", lambda: started + 3600)  # what psutil reads the clock for
    assert process_tag("x") == before


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
def test_what_a_ui_launched_and_did_not_live_to_see_begin(lab: Lab, status: dg.DagsterRunStatus) -> None:
    """The run's process is killed before its step, which would have tagged it."""
    run_id, tags = str(uuid.uuid4()), {LAUNCHED_TAG: "{}", "asked": "once"}
    config = lab.project().config
    with lab.instance() as instance:
        instance.add_run(dg.DagsterRun(job_name="x", run_id=run_id, status=status, tags=tags))
        here = {**tags, **process_tag(run_id)}
        mine = instance.add_run(dg.DagsterRun(job_name="x", run_id=run_id[::-1], status=status, tags=here))
        instance.add_run_tags(mine.run_id, process_tag(mine.run_id))
        assert close_orphans(instance, config) == []
        assert close_orphans(instance, config, launched=True) == [run_id]
        assert times_closed(instance, {"asked": "once"}) == 1


def test_only_one_ui_at_a_time_takes_what_was_launched_for_lost(lab: Lab) -> None:
    config = lab.project().config
    first = claim_ui(config)
    assert (first.is_locked, claim_ui(config).is_locked) == (True, False)
    first.release()
    assert claim_ui(config).is_locked


def test_mlflow_shows_as_killed_what_a_run_that_is_over_was_training(lab: Lab) -> None:
    """Also of another experiment of the work folder, and of runs that Dagster itself has closed."""
    tracking = Tracking(lab.project().config)
    runs = {}
    with lab.instance() as instance:
        for status in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.STARTED):
            run_id = str(uuid.uuid4())
            instance.add_run(dg.DagsterRun(job_name="x", run_id=run_id, status=status))
            runs[status] = tracking.start(status.value, run_id, {}, {"dagster.run_id": run_id})
        lab.edit(lambda s: s.update(name="another"))
        close_orphans(instance, lab.project().config)
    shown = [tracking.client().get_run(run_id).info.status for run_id in runs.values()]
    assert shown == ["KILLED", "RUNNING"]


def test_a_run_carries_the_process_that_executes_it_whoever_asked_for_it(lab: Lab) -> None:
    from assets.definitions import defs

    job = defs.resolve_implicit_global_asset_job_def()
    with lab.instance() as instance:
        result = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("pseudo_labels")])
        run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert {PROCESS_TAG: run.tags[PROCESS_TAG]} == process_tag(run.run_id)


KILLED_BEFORE_ITS_START = """
import os, signal, sys
import dagster as dg
from assets.running.execution import execute
from assets.running.instance import project_instance
from clipcov_pipeline.experiment.config.load import load_config
dg.DagsterInstance.handle_new_event = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
with project_instance(load_config(sys.argv[1])) as instance:
    execute(instance, "leaderboard", ["_"])
"""


def test_a_run_that_was_created_and_never_started_is_closed(lab: Lab) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_ITS_START, str(lab.yaml)], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    waiting = dg.RunsFilter(statuses=[dg.DagsterRunStatus.NOT_STARTED])
    with lab.instance() as instance:
        (run,) = instance.get_runs(waiting)
        assert close_orphans(instance, lab.project().config) == [run.run_id]
        assert not instance.get_runs(waiting)


def test_a_run_that_nobody_began_is_closed_where_no_ui_is_or_after_a_while(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Created by a daemon or a UI that was killed before it queued or launched it: no process tagged it."""
    config = lab.project().config
    with lab.instance() as instance:
        for run_id in ("first", "second"):
            status = dg.DagsterRunStatus.NOT_STARTED
            instance.add_run(dg.DagsterRun(job_name="x", run_id=run_id, status=status))
            assert close_orphans(instance, config) == []
            if run_id == "first":
                assert close_orphans(instance, config, launched=True) == [run_id]
        later = time.time() + 3600
        monkeypatch.setattr(time, "time", lambda: later)
        assert close_orphans(instance, config) == ["second"]
