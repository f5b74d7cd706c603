"""Rebuilds without anyone: the sensor and the schedule, by calling them and with the real daemon."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.mlflow_runs.tracking import Tracking
from assets.steps.orphans import PROCESS_TAG, process_tag
from clipcov_pipeline.experiment.plan import Step
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import WHOLE
from lab import SELECTION, Lab, copy_samples, free_ports

REPO = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
# runs one after another through the daemon: on a slow machine each takes minutes
DAEMON_SECONDS, WATCHED_SECONDS = 1800, 2400


def tick(lab: Lab, instance: dg.DagsterInstance) -> Any:
    """Evaluate the sensor once."""
    from assets.automation import rebuild
    from assets.resources import Experiment

    context = dg.build_sensor_context(
        instance=instance, resources={"experiment": Experiment(config=str(lab.yaml))}
    )
    return rebuild(context)


def requests(result: Any) -> list[tuple[str, str]]:
    """Return (stage, run key) of a tick's requests."""
    return [(request.tags["clipcov/stage"], request.run_key) for request in result.run_requests]


def test_a_tick_with_nothing_to_do_skips_and_says_so(lab: Lab) -> None:
    with lab.instance() as instance:
        result = tick(lab, instance)
    assert isinstance(result, dg.SkipReason)
    assert "up to date" in str(result.skip_message)


def test_a_tick_names_what_it_waits_for_and_since_when(lab: Lab) -> None:
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    with lab.instance() as instance:
        run_id = str(uuid.uuid4())
        tags = {"clipcov/stage": "rankings", **process_tag(run_id)}
        started = dg.DagsterRunStatus.STARTED
        instance.add_run(dg.DagsterRun(job_name="x", run_id=run_id, status=started, tags=tags))
        said = str(tick(lab, instance).skip_message)
    today = time.strftime("%Y-%m-%d")
    assert f"at work: rankings (run {run_id[:8]}, STARTED, since {today} " in said


def test_two_ticks_in_a_row_ask_for_the_same_runs_by_the_same_keys(lab: Lab) -> None:
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    with lab.instance() as instance:
        first, second = tick(lab, instance), tick(lab, instance)
        assert [stage for stage, _ in requests(first)] == ["rankings"]
        assert requests(first) == requests(second)  # Dagster starts a run key once
        lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 1.0}}))
        assert requests(tick(lab, instance)) != requests(first)


def test_a_setting_changed_there_and_back_and_there_again_is_asked_for_each_time(lab: Lab) -> None:
    keys = []
    with lab.instance() as instance:
        for weight in (0.0, 2.0, 0.0):
            lab.edit(lambda s, w=weight: s["select"]["methods"].update(clipcov={"weights": {"self": w}}))
            keys += [key for stage, key in requests(tick(lab, instance)) if stage == "rankings"]
            lab.run(only=SELECTION)
    assert len(set(keys)) == 3


def test_a_damaged_entry_is_asked_for_again(lab: Lab) -> None:
    with lab.instance() as instance:
        lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
        [(stage, first)] = requests(tick(lab, instance))
        assert stage == "rankings"
        lab.run(only=SELECTION)
        project = lab.project()
        (project.store.folder(project.plan().by_name["rankings/clipcov"].record) / "ranking.parquet").unlink()
        again = dict(requests(tick(lab, instance)))
    assert again["rankings"] != first


def test_a_run_whose_process_was_killed_is_closed_and_asked_for_again(lab: Lab) -> None:
    """What has failed by itself is not: Dagster has seen its run key."""
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    with lab.instance() as instance:
        [request] = tick(lab, instance).run_requests
        host, boot, *_ = process_tag("")[PROCESS_TAG].split(":")
        dead = f"{host}:{boot}:{2**22 + 1}:1.0"
        for killed in (False, True):
            run_id = str(uuid.uuid4())
            tags = {**request.tags, **({PROCESS_TAG: f"{dead}:{run_id}"} if killed else {})}
            run = dg.DagsterRun("build_rankings", run_id, tags=tags, status=dg.DagsterRunStatus.STARTED)
            instance.add_run(run)
            if not killed:
                assert isinstance(tick(lab, instance), dg.SkipReason)  # it is at work
                instance.report_run_failed(run)
            [(_, key)] = requests(tick(lab, instance))
            assert (key != request.run_key) is killed
            closed = instance.get_run_by_id(run.run_id)
            assert closed is not None
            assert closed.status is dg.DagsterRunStatus.FAILURE
        assert requests(tick(lab, instance)) == [("rankings", key)]


def test_a_run_that_ends_while_the_plan_is_made_is_not_asked_for_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.edit(lambda s: s["select"]["methods"].update(clipcov={"weights": {"self": 0.0}}))
    with lab.instance() as instance:
        [(stage, _)] = requests(tick(lab, instance))
        run = dg.DagsterRun(
            "build_rankings", tags={"clipcov/stage": stage}, status=dg.DagsterRunStatus.STARTED
        )
        instance.add_run(run)
        make_plan = Project.plan

        def plan_and_meanwhile(project: Project) -> Any:
            plan = make_plan(project)
            monkeypatch.undo()
            lab.run(only=SELECTION)
            instance.report_run_canceled(run)
            return plan

        monkeypatch.setattr(Project, "plan", plan_and_meanwhile)
        assert isinstance(tick(lab, instance), dg.SkipReason)


def test_a_half_written_yaml_skips_the_tick_and_the_next_valid_one_goes_on(lab: Lab) -> None:
    whole = lab.yaml.read_text()
    lab.edit(lambda s: s["select"].update(fractions=[0.25, 0.5]))
    changed = lab.yaml.read_text()
    with lab.instance() as instance:
        lab.yaml.write_text(whole[: len(whole) // 2])
        result = tick(lab, instance)
        assert isinstance(result, dg.SkipReason)
        assert "experiment.yaml" in str(result.skip_message)
        lab.yaml.write_text(changed)
        assert [stage for stage, _ in requests(tick(lab, instance))] == ["subsets"]


def test_a_shard_being_written_is_left_for_the_next_scan(lab: Lab) -> None:
    lab.edit(lambda s: s["shards"].update(settle_seconds=3600))
    os.utime(lab.shard(0), (1_700_000_000, 1_700_000_000))
    (lab.folder / "pool" / "00009.tar.part").write_bytes(b"half")
    assert [shard.name for shard in lab.project().world.shards] == ["00000"]


def times_materialized(instance: dg.DagsterInstance, step: Step) -> int:
    """Return how often Dagster saw the entry that stands for a step now being made."""
    partitions = None if step.node.partition == WHOLE else [step.key]
    filters = dg.AssetRecordsFilter(asset_key=dg.AssetKey(step.node.stage), asset_partitions=partitions)
    assert step.fingerprint is not None
    return sum(
        step.fingerprint[:16] in (record.asset_materialization.tags or {})["dagster/data_version"]
        for record in instance.fetch_materializations(filters, limit=50).records
        if record.asset_materialization is not None
    )


def test_a_tick_waits_for_a_shard_that_is_still_growing(lab: Lab) -> None:
    with lab.instance() as instance:
        lab.shard(3).write_bytes(lab.shard(0).read_bytes()[:20_000])
        later = time.time() + 600  # written a moment ago, however long the tick takes to look
        os.utime(lab.shard(3), (later, later))
        result = tick(lab, instance)
        assert isinstance(result, dg.SkipReason)
        assert "still being written: 00003" in str(result.skip_message)
        shutil.copy2(lab.shard(0), lab.shard(3))  # whole now, and written a while ago
        assert [stage for stage, _ in requests(tick(lab, instance))] == ["raw_shards"]


def test_the_schedule_asks_for_new_and_changed_shards_only(lab: Lab) -> None:
    from assets.automation import rescan
    from assets.resources import Experiment

    shutil.copy2(lab.shard(0), lab.shard(3))
    lab.edit(lambda s: s["select"].update(fractions=[0.25]))
    with lab.instance() as instance:
        resources = {"experiment": Experiment(config=str(lab.yaml))}
        found = rescan(dg.build_schedule_context(instance=instance, resources=resources))
    assert isinstance(found, list)
    [request] = found
    assert request.tags["clipcov/stage"] == "raw_shards"
    assert request.tags["dagster/asset_partition_range_start"] == "00003"


@contextmanager
def daemon(lab: Lab) -> Iterator[dg.DagsterInstance]:
    """Run `dagster dev` (web server and daemon) on the lab, with the sensor switched on."""
    instance = lab.instance()  # also sets DAGSTER_HOME and the config for the children
    dagster = str(Path(sys.executable).parent / "dagster")
    workspace = ["-w", str(REPO / "workspace.yaml")]
    port = lab.project().config.ui.dagster_port
    command = [dagster, "dev", *workspace, "-h", "127.0.0.1", "-p", str(port)]
    log = (lab.folder / "daemon.log").open("w")
    process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log, start_new_session=True)
    try:
        subprocess.run(
            [dagster, "sensor", "start", *workspace, "rebuild"], cwd=REPO, check=True, capture_output=True
        )
        yield instance
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


@pytest.fixture(scope="module")
def watched(
    built_lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Lab, dg.DagsterInstance]]:
    """A lab of two arms, up to date, with the daemon looking after it."""
    lab = built_lab.copy(tmp_path_factory.mktemp("watched") / "lab")

    def small(settings: dict[str, Any]) -> None:
        settings["select"]["methods"] = {"random": {}}
        settings["automation"] = {"sensor_seconds": 5, "max_retries": 1, "retry_seconds": 1}

    lab.edit(small)
    lab.run()
    [port] = free_ports(1)  # only now: during the run, another process could take it
    lab.edit(lambda s: s.update(ui={"dagster_port": port}))
    with daemon(lab) as instance:
        yield lab, instance


def wait_until(lab: Lab, what: Callable[[], bool], seconds: float = DAEMON_SECONDS) -> None:
    """Wait for something that the daemon brings about; fail with the end of its log."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, (lab.folder / "daemon.log").read_text()[-3000:]
        time.sleep(2)


def training_runs(instance: dg.DagsterInstance, *statuses: dg.DagsterRunStatus) -> list[dg.DagsterRun]:
    filters = dg.RunsFilter(tags={"clipcov/stage": "checkpoints"}, statuses=list(statuses) or None)
    return list(instance.get_runs(filters))


def slots_taken(instance: dg.DagsterInstance, pool: str) -> int:
    return instance.event_log_storage.get_concurrency_info(pool).active_slot_count


@pytest.mark.timeout(WATCHED_SECONDS)
def test_a_dropped_shard_reaches_the_leaderboard_through_the_real_daemon(
    watched: tuple[Lab, dg.DagsterInstance], sample_shards: Path
) -> None:
    lab, instance = watched
    before = lab.plan().by_name["leaderboard"].record
    assert before is not None
    copy_samples(sample_shards / "00005.tar", lab.shard(3), 0, 40)
    wait_until(lab, lambda: not lab.plan().todo)
    stages = [run.tags.get("clipcov/stage") for run in instance.get_runs()]
    for step in lab.plan().steps:
        assert times_materialized(instance, step) == 1, step.node.name  # no tick started anything twice
    after = lab.plan().by_name["leaderboard"].record
    assert after is not None
    assert after.fingerprint != before.fingerprint
    assert stages.count("raw_shards") == stages.count("embeddings") == stages.count("rankings") == 1
    assert stages.count("checkpoints") == 2  # a run each


@pytest.mark.timeout(WATCHED_SECONDS)
def test_a_failing_training_is_tried_again_and_then_left_alone(
    watched: tuple[Lab, dg.DagsterInstance],
) -> None:
    lab, instance = watched
    (lab.folder / "broken.pt").write_bytes(b"no checkpoint")
    lab.edit(lambda s: s["train"].update(pretrained="./broken.pt"))
    wait_until(lab, lambda: len(training_runs(instance, dg.DagsterRunStatus.FAILURE)) == 2)
    for run in training_runs(instance, dg.DagsterRunStatus.FAILURE):
        restarts = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_RESTARTED)
        assert len(restarts) == 1
    started = len(training_runs(instance))
    time.sleep(20)  # several ticks
    assert len(training_runs(instance)) == started
    assert slots_taken(instance, "gpu") == 0
    lab.edit(lambda s: s["train"].pop("pretrained"))
    wait_until(lab, lambda: not lab.plan().todo)


@pytest.mark.timeout(WATCHED_SECONDS)
def test_a_cancelled_training_frees_its_slot_and_one_trains_at_a_time(
    watched: tuple[Lab, dg.DagsterInstance],
) -> None:
    lab, instance = watched
    lab.edit(lambda s: s["train"].update(samples_seen=1_000_000))
    started, queued = dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.QUEUED
    wait_until(lab, lambda: len(training_runs(instance, started)) == 1 and slots_taken(instance, "gpu") == 1)
    wait_until(lab, lab.trains)  # interrupted before, the step has not begun
    assert len(training_runs(instance, queued)) == 1
    for run in training_runs(instance, queued) + training_runs(instance, started):
        terminate(lab, run.run_id)
    wait_until(lab, lambda: len(training_runs(instance, dg.DagsterRunStatus.CANCELED)) == 2)
    wait_until(lab, lambda: slots_taken(instance, "gpu") == 0)
    wait_until(lab, lambda: not lab.trains(), seconds=60)  # an orphan would train for twenty minutes
    restarted = dg.DagsterEventType.STEP_RESTARTED
    for run in training_runs(instance, dg.DagsterRunStatus.CANCELED):
        assert not instance.all_logs(run.run_id, of_type=restarted)  # nor is it tried again as a failure is
    tracking = Tracking(lab.project().config)
    killed = tracking.client().search_runs([tracking.experiment_id()], "attributes.status = 'KILLED'")
    assert len(killed) == 1


def terminate(lab: Lab, run_id: str) -> None:
    """Cancel a run as the UI's button does."""
    query = "mutation Stop($id: String!) { terminateRun(runId: $id) { __typename } }"
    body = json.dumps({"query": query, "variables": {"id": run_id}}).encode()
    port = lab.project().config.ui.dagster_port
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["data"]["terminateRun"]["__typename"] == "TerminateRunSuccess"
