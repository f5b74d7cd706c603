"""Arms side by side: `clipcov run` with several places in the pool ``gpu``."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.mlflow_runs.tracking import ARM_RUN, EXPERIMENT_RUN, KIND_TAG, Tracking
from assets.running.execution import deal, own_gpu, visible_gpus
from clipcov_pipeline.experiment.plan import Status
from clipcov_pipeline.experiment.rebuild import differences, rebuild
from clipcov_pipeline.experiment.stages import ONE_AT_A_TIME
from lab import Lab, still_there


@settings(deadline=None)
@given(st.sampled_from(["checkpoints", "scores"]), st.integers(1, 40), st.integers(1, 8))
def test_every_key_is_dealt_once_and_the_shares_are_alike(stage: str, count: int, places: int) -> None:
    keys = [f"{index:02d}" for index in range(count)]
    shares = deal(stage, keys, places)
    assert sorted(key for share in shares for key in share) == keys
    assert len(shares) <= places
    assert all(shares)
    if stage in ONE_AT_A_TIME:
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    else:  # a range is one Dagster run
        assert [key for share in shares for key in share] == keys


@pytest.mark.parametrize(
    ("gpus", "shares", "expected"),
    [
        ([], 2, [None, None]),
        (["0"], 2, [None, None]),  # they share it
        (["0", "1"], 2, ["0", "1"]),
        (["0", "1", "2"], 2, ["0", "1"]),
        (["2", "GPU-5f", "3"], 5, ["2", "GPU-5f", "3", "2", "GPU-5f"]),
    ],
)
def test_several_gpus_are_dealt_out_in_turns(
    gpus: list[str], shares: int, expected: list[str | None]
) -> None:
    environments = [own_gpu(gpus, place) for place in range(shares)]
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in environments] == expected
    assert all(set(environment) <= {"CUDA_VISIBLE_DEVICES"} for environment in environments)


def test_the_gpus_are_those_that_the_user_names_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5f")
    assert visible_gpus() == ["2", "GPU-5f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # none: there is nothing to deal out
    assert own_gpu(visible_gpus(), 0) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert len(visible_gpus()) == torch.cuda.device_count()


def side_by_side(settings: dict[str, Any]) -> None:
    settings["train"]["lr"] = 0.002  # three arms to train again
    settings["automation"] = {"pools": {"gpu": 2}}


@pytest.mark.long
def test_two_places_train_two_arms_at_a_time(lab: Lab) -> None:
    lab.edit(
        lambda s: (side_by_side(s), s.update(name="afresh"))
    )  # what MLflow makes on first use is not there
    started = time.time()
    executed = lab.run()
    assert (executed["checkpoints"], executed["scores"]) == (3, 3)
    assert {step.status for step in lab.plan().steps} == {Status.CURRENT}
    with lab.instance() as instance:
        records = [
            record
            for record in instance.get_run_records()
            if record.start_time and record.start_time > started
            and record.dagster_run.asset_selection == {dg.AssetKey("checkpoints")}
        ]  # fmt: skip
    assert {record.dagster_run.status for record in records} == {dg.DagsterRunStatus.SUCCESS}
    spans = sorted((record.start_time or 0.0, record.end_time or 0.0) for record in records)
    assert len(spans) == 3
    assert any(begin < end_before for (_, end_before), (begin, _) in pairwise(spans))

    tracking = Tracking(lab.project().config)
    client = tracking.client()
    runs = client.search_runs([tracking.experiment_id()])
    assert sorted(run.data.tags[KIND_TAG] for run in runs) == [ARM_RUN] * 3 + [EXPERIMENT_RUN]
    assert len(client.search_model_versions("name = 'afresh'")) == 3

    # alone it comes out as beside others: with as many threads
    record, again = rebuild(lab.project(), str(lab.yaml), "checkpoints/random-f0.5-s0")
    assert differences(record, again) == []


SHARES = """
import sys
from assets.running.execution import execute_side_by_side
sys.executable = sys.argv[1]
execute_side_by_side(None, "checkpoints", [["a"], ["b"]], 2)
"""


def test_an_interruption_reaches_the_shares_at_once(tmp_path: Path) -> None:
    """From a process that has executed nothing itself: Dagster would have set its handlers."""
    share = tmp_path / "share"
    share.write_text("#!/bin/sh\necho at work\nexec sleep 600\n")
    share.chmod(0o755)
    run = subprocess.Popen([sys.executable, "-c", SHARES, str(share)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert [run.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
    children = psutil.Process(run.pid).children()
    time.sleep(1)  # it waits for them
    run.send_signal(signal.SIGINT)
    left = still_there([*children, psutil.Process(run.pid)])
    for process in left:
        process.kill()
    assert left == []
    assert run.wait() == -signal.SIGINT  # as by a KeyboardInterrupt that nobody catches


def test_an_interruption_ends_every_arm(lab: Lab) -> None:
    def longer(settings: dict[str, Any]) -> None:
        side_by_side(settings)
        settings["train"]["samples_seen"] = 1_000_000  # hours

    lab.edit(longer)
    command = [sys.executable, "-m", "assets.running.run", "--config", str(lab.yaml)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    run = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.stdout is not None
    seen = set()
    for line in run.stdout:  # both arms are at work
        seen |= {
            key for key in ("full-f1-s0", "clipcov-f0.5-s0") if f"  {key}" in line and "samples/s" in line
        }
        if len(seen) == 2:
            break
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) >= 4  # two shares, and the training of each
    own = psutil.Process(run.pid).children()
    shares = [child for child in own if "assets.running.execution" in child.cmdline()]
    assert sorted(share.environ()["CUDA_VISIBLE_DEVICES"] for share in shares) == ["0", "1"]
    run.send_signal(signal.SIGINT)
    rest = run.stdout.read()
    assert run.wait(timeout=60) == 130, rest
    assert "Interrupted. What is finished is kept" in rest
    assert still_there(children) == []
    with lab.instance() as instance:
        active = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING]
        assert not instance.get_runs(dg.RunsFilter(statuses=active))
