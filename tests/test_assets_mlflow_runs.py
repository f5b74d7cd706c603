"""MLflow's side of a built experiment, by its own client: runs, data, curves, models and the champion."""

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import polars as pl
import pytest

from assets.mlflow_runs.registry import CHAMPION, register, set_champion, versions_of
from assets.mlflow_runs.tracking import Tracking, local_path, mlflow_run_url, mlflow_runs_url
from assets.training.process_metrics import ProcessMeter, logged_process_metrics
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.project import Project
from clipcov_pipeline.experiment.records import Record
from clipcov_pipeline.experiment.stages import CODE_VERSIONS
from clipcov_pipeline.pool.samples import iter_samples
from clipcov_pipeline.report.leaderboard import champion
from lab import Lab

ARMS = ("full-f1-s0", "clipcov-f0.5-s0", "random-f0.5-s0")
PRIMARY = "vendor/text_retrieval_recall@5"


def checkpoint(project: Project, arm: str) -> Record:
    record = project.plan().by_name[f"checkpoints/{arm}"].record
    assert record is not None
    return record


def runs(tracking: Tracking) -> list[Any]:
    return list(tracking.client().search_runs([tracking.experiment_id()]))


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_are_grouped_below_the_experiments_own(built_lab: Lab) -> None:
    tracking = Tracking(built_lab.project().config)
    found = {run.info.run_name: run for run in runs(tracking)}
    assert set(found) == {"lab", *ARMS}  # one each
    assert all(run.info.status == "FINISHED" for run in found.values())
    parent = found.pop("lab")
    assert tracking.parent() == parent.info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert "mlflow.parentRunId" not in parent.data.tags
    names = {item.path for item in tracking.client().list_artifacts(parent.info.run_id, "leaderboard")}
    assert {Path(name).suffix for name in names} == {".csv", ".txt", ".png"}
    # so that the page opens on the runs and not on traces of language models
    experiment = tracking.client().get_experiment(tracking.experiment_id())
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.slow
def test_links_open_among_the_trainings_and_the_best_run_first(built_lab: Lab) -> None:
    project = built_lab.project()
    tracking, run_id = Tracking(project.config), checkpoint(project, ARMS[0]).stats["mlflow_run_id"]
    number = tracking.experiment_id()
    assert mlflow_run_url(project.config, run_id).endswith(
        f":5000/#/experiments/{number}/runs/{run_id}?workflowType=machine_learning"
    )
    assert mlflow_run_url(project.config, "gone").endswith(":5000/#/runs/gone")
    table = mlflow_runs_url(project.config)
    assert f"/experiments/{number}/runs?workflowType=machine_learning" in table
    assert unquote(table).endswith("orderByKey=metrics.`vendor/text_retrieval_recall_at_5`&orderByAsc=false")


@pytest.mark.slow
def test_runs_can_be_compared_by_their_parameters(built_lab: Lab) -> None:
    found = {run.info.run_name: run.data.params for run in runs(Tracking(built_lab.project().config))}
    assert {name: found[name].get("method") for name in ARMS} == {
        "full-f1-s0": "full", "clipcov-f0.5-s0": "clipcov", "random-f0.5-s0": "random",
    }  # fmt: skip
    assert {found[name]["protocol"] for name in ARMS} == {"samples_seen"}
    assert found["clipcov-f0.5-s0"]["select.mode"]  # a default, that the YAML does not name
    assert found["clipcov-f0.5-s0"]["select.weights.self"] == "2.0"


@pytest.mark.slow
def test_the_run_names_the_data_that_it_trained_on(built_lab: Lab) -> None:
    import mlflow.data

    project = built_lab.project()
    subset = project.plan().by_name["subsets/clipcov-f0.5"].record
    [run] = [run for run in runs(Tracking(project.config)) if run.info.run_name == "clipcov-f0.5-s0"]
    [given] = run.inputs.dataset_inputs
    assert given.dataset.name == "clipcov-f0.5"
    assert len(given.dataset.digest) == 16
    assert subset.digests["samples"].startswith(given.dataset.digest)
    assert run.data.tags["clipcov.subset_digest"] == subset.digests["samples"]
    assert json.loads(given.dataset.profile) == {"num_rows": subset.stats["samples"]}
    folder = Path(mlflow.data.get_source(given).load())
    assert pl.read_parquet(folder / "subset.parquet").height == subset.stats["samples"]


@pytest.mark.slow
def test_curves_of_the_training_and_its_retrieval_and_use_of_the_machine(built_lab: Lab) -> None:
    project = built_lab.project()
    tracking = Tracking(project.config)
    for arm in ARMS:
        record = checkpoint(project, arm)
        run = tracking.find(record.fingerprint)
        assert run is not None
        history = tracking.client().get_metric_history
        for name in ("loss", "lr", "samples_per_second"):
            assert len(history(run.info.run_id, f"train/{name}")) >= 2
        # 6 steps in 2 virtual epochs
        curve = history(run.info.run_id, "val/text_retrieval_recall_at_5")
        assert [point.step for point in curve] == [3, 6]
        assert all(0 <= point.value <= 1 for point in curve)
        kept = json.loads((project.store.folder(record) / "training.json").read_text())["held_out_retrieval"]
        assert [(p["step"], p["text_retrieval_recall@5"]) for p in kept] == [(p.step, p.value) for p in curve]
        # the last point may be of a moment in which the training waits
        assert max(point.value for point in history(run.info.run_id, "system/training_cpu_percentage")) > 1
        assert 100 < run.data.metrics["system/training_memory_megabytes"] < 100_000
        assert run.data.metrics["system/training_processes"] >= 1


@pytest.mark.slow
def test_nothing_to_do_adds_nothing_to_mlflow(lab: Lab) -> None:
    tracking = Tracking(lab.project().config)
    before = len(runs(tracking)), len(tracking.client().search_model_versions())
    assert lab.run() == {}
    assert (len(runs(tracking)), len(tracking.client().search_model_versions())) == before == (4, 3)


@pytest.mark.slow
def test_what_stands_again_is_what_mlflow_shows(lab: Lab) -> None:
    """A setting there and back builds nothing, and leaves no numbers of the other setting behind."""
    tracking, arm = Tracking(lab.project().config), checkpoint(lab.project(), ARMS[1]).stats["mlflow_run_id"]

    def shown() -> dict[str, Any]:
        metrics = tracking.client().get_run(arm).data.metrics
        scores = tracking.client().download_artifacts(arm, "scores/vendor/scores.json")
        board = tracking.client().download_artifacts(tracking.parent(), "leaderboard/leaderboard.txt")
        report = tracking.client().download_artifacts(tracking.parent(), "report.html")
        files = {Path(path).name: Path(path).read_bytes() for path in (scores, board, report)}
        return {"metrics": {k: v for k, v in metrics.items() if k.startswith("vendor/")}, **files}

    before = shown()
    tasks = lab.project().config.evaluate.sets["vendor"].tasks
    lab.edit(lambda s: s["evaluate"]["sets"]["vendor"].update(tasks=["retrieval"]))
    lab.run()
    other = shown()
    assert {name for name in before if other[name] != before[name]} >= {"scores.json", "report.html"}
    tracking.log_metrics(arm, {"vendor/acc1": 0.123})  # as by another setting
    lab.edit(lambda s: s["evaluate"]["sets"]["vendor"].update(tasks=list(tasks)))
    lab.run()
    after = shown()
    assert [name for name in before if after[name] != before[name]] == []


@pytest.mark.slow
def test_the_scores_of_an_arm_whose_run_was_deleted_are_kept(lab: Lab) -> None:
    tracking, arm = Tracking(lab.project().config), checkpoint(lab.project(), ARMS[1]).stats["mlflow_run_id"]
    tracking.client().delete_run(arm)
    lab.edit(lambda s: s["evaluate"]["sets"].update(again={"shards": "vendor", "tasks": ["retrieval"]}))
    assert lab.run()["scores"] == 3
    assert not lab.plan().todo
    assert tracking.client().get_run(arm).info.lifecycle_stage == "deleted"


def test_only_a_run_that_is_not_there_is_taken_for_deleted(tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException

    tracking = Tracking(SimpleNamespace(name="none", work=tmp_path))  # type: ignore[arg-type]
    assert tracking.is_there(tracking.parent())
    assert not tracking.is_there("0" * 32)
    with pytest.raises(MlflowException):
        tracking.is_there("no / id")


@pytest.mark.slow
def test_the_same_run_starts_again_below_the_same_parent_with_the_same_data(lab: Lab) -> None:
    """A retry: the process was killed before the entry was complete."""
    project = lab.project()
    tracking, record = Tracking(project.config), checkpoint(project, "clipcov-f0.5-s0")
    [before] = tracking.find(record.fingerprint).inputs.dataset_inputs
    for _ in range(2):
        run_id = tracking.start("clipcov-f0.5-s0", record.fingerprint, {"method": "other"}, {})
        tracking.log_dataset(run_id, "clipcov-f0.5", before.dataset.digest, lab.folder, 1)
    run = tracking.find(record.fingerprint)
    assert run.info.run_id == run_id == record.stats["mlflow_run_id"]
    assert run.data.params["method"] == "clipcov"
    assert len(run.inputs.dataset_inputs) == 1
    assert len(runs(tracking)) == 4


# --- the registry -----------------------------------------------------------------------------------


def load(tracking: Tracking, uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a model as its users do."""
    import mlflow

    from assets.mlflow_runs.tracking import tracking_uri

    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(tracking.config.work))
    mlflow.set_tracking_uri(tracking_uri(tracking.config.work))
    try:
        return mlflow.pyfunc.load_model(uri)
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.slow
def test_the_champion_classifies_images_from_paths(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a work folder that was moved (the fixture copies it), against open_clip alone."""
    import open_clip
    import torch
    from PIL import Image

    from clipcov_pipeline.proxy.models import register_model_configs

    project = lab.project()
    tracking = Tracking(project.config)
    version = tracking.client().get_model_version_by_alias("lab", CHAMPION)
    arm = version.tags["clipcov.recipe"]
    board = pl.read_parquet(
        project.store.folder(project.plan().by_name["leaderboard"].record) / "leaderboard.parquet"
    )
    best = board.filter(metric=PRIMARY).sort("mean", descending=True)["mean"][0]
    [row] = board.filter(metric=PRIMARY, method=arm.partition("-")[0]).iter_rows(named=True)
    assert row["mean"] == best
    model = load(tracking, f"models:/lab@{CHAMPION}", monkeypatch)
    assert str(lab.folder) in version.source

    paths, names = [], []
    for sample in list(iter_samples(project.shards["00000"], None, None))[:5]:
        paths.append(str(tmp_path / f"{len(paths)}.img"))
        Path(paths[-1]).write_bytes(sample.image)
        names.append(f"{sample.caption} number {len(paths)}")
    found = model.predict(
        pd.DataFrame({"image": paths}), params={"class_names": names, "templates": ["{}", "a picture of {}"]}
    )
    assert list(found.columns) == ["image", "class", "probability"]
    assert list(found["image"]) == paths

    register_model_configs()
    weights = project.store.folder(checkpoint(project, arm)) / "open_clip_pytorch_model.bin"
    net, _, preprocess = open_clip.create_model_and_transforms("clipcov-tiny-RN", pretrained=str(weights))
    tokenizer = open_clip.get_tokenizer("clipcov-tiny-RN")
    net.eval()
    with torch.no_grad():
        images = net.encode_image(
            torch.stack([preprocess(Image.open(path)) for path in paths]), normalize=True
        )
        texts = [net.encode_text(tokenizer([n, f"a picture of {n}"]), normalize=True).mean(0) for n in names]
        classes = torch.nn.functional.normalize(torch.stack(texts), dim=1)
        expected = (net.logit_scale.exp() * images @ classes.T).softmax(dim=1).numpy()
    assert list(found["class"]) == [names[i] for i in expected.argmax(axis=1)]
    assert np.allclose(found["probability"], expected.max(axis=1), atol=1e-4)

    with pytest.raises(InputError, match="class_names: found none"):
        model.predict(pd.DataFrame({"image": paths}))
    with pytest.raises(InputError, match=r"no file at '/nowhere\.png'"):
        model.predict(pd.DataFrame({"image": ["/nowhere.png"]}), params={"class_names": ["a", "b"]})
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        model.predict(pd.DataFrame({"image": [str(broken)]}), params={"class_names": ["a", "b"]})


@pytest.mark.slow
def test_every_arm_is_one_version_and_its_weights_are_there_once(built_lab: Lab) -> None:
    project = built_lab.project()
    tracking = Tracking(project.config)
    for arm in ARMS:
        record = checkpoint(project, arm)
        [version] = versions_of(tracking, record.stats["mlflow_run_id"])
        assert version.tags["clipcov.recipe"] == arm
        folder = local_path(version.source)
        weights = list(folder.rglob("open_clip_pytorch_model.bin"))
        assert len(weights) == 1
        original = project.store.folder(record) / "open_clip_pytorch_model.bin"
        assert weights[0].read_bytes() == original.read_bytes()
        assert not weights[0].is_symlink()
        assert "clipcov-pipeline==" in (folder / "requirements.txt").read_text()
        [output] = tracking.client().get_run(record.stats["mlflow_run_id"]).outputs.model_outputs
        assert output.model_id in version.source


@pytest.mark.slow
def test_a_version_is_made_once_and_new_weights_replace_it(lab: Lab) -> None:
    project = lab.project()
    tracking, record = Tracking(project.config), checkpoint(project, "random-f0.5-s0")
    run_id, folder = record.stats["mlflow_run_id"], project.store.folder(record)
    [before] = versions_of(tracking, run_id)
    again = register(tracking, run_id, folder, record.digests["weights"], {})
    assert again.version == before.version
    new = register(tracking, run_id, folder, "another digest", {"clipcov.recipe": "random-f0.5-s0"})
    assert [version.version for version in versions_of(tracking, run_id)] == [new.version]
    assert new.version != before.version
    assert len(tracking.client().search_model_versions("name = 'lab'")) == 3
    models = tracking.client().search_logged_models([tracking.experiment_id()])
    assert len(models) == 3


@pytest.mark.slow
def test_the_champion_is_no_other_than_the_best_arm_whose_run_was_deleted(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is kept; when that is deleted as well, there is no champion."""
    project = lab.project()
    tracking, best = Tracking(project.config), project.plan().by_name["leaderboard"].record.stats["champion"]
    client, run_id = tracking.client(), checkpoint(project, best).stats["mlflow_run_id"]
    other = next(arm for arm in ARMS if arm != best)
    client.delete_run(run_id)
    set_champion(tracking, checkpoint(project, other).stats["mlflow_run_id"])
    monkeypatch.setitem(CODE_VERSIONS, "leaderboard", "next")
    lab.run(("leaderboard",))
    [version] = versions_of(tracking, run_id)
    assert client.get_model_version_by_alias("lab", CHAMPION).version == version.version
    client.delete_model_version("lab", version.version)
    set_champion(tracking, checkpoint(project, other).stats["mlflow_run_id"])
    monkeypatch.setitem(CODE_VERSIONS, "leaderboard", "the one after")
    lab.run(("leaderboard",))
    assert client.get_registered_model("lab").aliases == {}


@pytest.mark.slow
def test_the_alias_follows_the_best_arm_and_comes_back_with_an_earlier_leaderboard(lab: Lab) -> None:
    project = lab.project()
    tracking = Tracking(project.config)

    def named() -> str:
        return tracking.client().get_model_version_by_alias("lab", CHAMPION).tags["clipcov.recipe"]

    first = named()
    other = next(arm for arm in ARMS if arm != first)
    assert set_champion(tracking, checkpoint(project, other).stats["mlflow_run_id"]) is not None
    assert named() == other  # moved: an alias names one version
    # a leaderboard without the champion names another; the earlier one, restored, names its own again
    method = first.partition("-")[0]
    if method == "full":
        lab.edit(lambda s: s["evaluate"].update(primary_metric="vendor/acc1"))
    else:
        lab.edit(lambda s: s["select"]["methods"].pop(method))
    executed = lab.run()
    assert (executed["leaderboard"], executed["checkpoints"]) == (1, 0)
    second = named()
    record = lab.plan().by_name["leaderboard"].record
    assert record.stats["champion"] == second
    if method == "full":
        lab.edit(lambda s: s["evaluate"].update(primary_metric=PRIMARY))
    else:
        assert second != first
        lab.edit(lambda s: s["select"]["methods"].update({method: {}}))
    set_champion(tracking, checkpoint(project, other).stats["mlflow_run_id"])
    executed = lab.run()
    assert (executed["leaderboard"], executed["checkpoints"]) == (1, 0)
    assert lab.plan().by_name["leaderboard"].record.stats["champion"] == first == named()


def test_a_run_without_a_version_is_no_champion(tmp_path: Path) -> None:
    tracking = Tracking(SimpleNamespace(name="none", work=tmp_path))  # type: ignore[arg-type]
    assert set_champion(tracking, tracking.parent()) is None
    assert tracking.parent() == tracking.parent()


def test_the_champion_is_the_best_seed_of_the_best_mean() -> None:
    rows = [
        ("a-s0", "a", 0.1, "epochs", 0, PRIMARY, 0.9), ("a-s1", "a", 0.1, "epochs", 1, PRIMARY, 0.1),
        ("b-s0", "b", 0.1, "epochs", 0, PRIMARY, 0.6), ("b-s1", "b", 0.1, "epochs", 1, PRIMARY, 0.7),
        ("c-s0", "c", 0.1, "epochs", 0, "vendor/acc1", 1.0),
    ]  # fmt: skip
    columns = ["arm", "method", "fraction", "protocol", "seed", "metric", "value"]
    scores = pl.DataFrame(rows, schema=columns, orient="row")
    assert champion(scores, PRIMARY) == "b-s1"  # mean 0.65 against 0.5, though a-s0 is the best single arm
    assert champion(scores, "vendor/acc1") == "c-s0"
    assert champion(scores, "vendor/acc5") is None


# --- use of the machine -----------------------------------------------------------------------------


def test_the_meter_reads_what_the_process_uses() -> None:
    meter = ProcessMeter()

    def cpu_seconds(work: Callable[[], None]) -> float:
        began = time.monotonic()
        meter.read()
        work()
        return meter.read()["system/training_cpu_percentage"] / 100 * (time.monotonic() - began)

    def burn() -> None:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass

    assert cpu_seconds(burn) >= 0.9 * 0.3
    assert cpu_seconds(lambda: time.sleep(0.3)) < 0.15
    before = meter.read()["system/training_memory_megabytes"]
    memory = np.ones(20_000_000)  # 160 MB
    assert meter.read()["system/training_memory_megabytes"] > before + 120
    del memory


def test_points_come_at_intervals_and_at_the_end_and_a_failure_to_log_costs_nothing() -> None:
    seen: list[tuple[int, float]] = []

    def log(_metrics: dict[str, float], number: int) -> None:
        seen.append((number, time.monotonic()))
        if number == 1:
            raise OSError("database is locked")

    def wait_until(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with logged_process_metrics(log, seconds=0.1):
        wait_until(lambda: len(seen) >= 3)
        ended = time.monotonic()
    wait_until(lambda: seen[-1][1] >= ended)  # on a machine that is busy, after the block
    assert [number for number, _ in seen] == list(range(len(seen)))
    gaps = [late - early for (_, early), (_, late) in pairwise(seen) if late < ended]
    assert 0.095 < min(gaps) < 5
    only: list[int] = []
    started = time.perf_counter()
    with logged_process_metrics(lambda _, number: only.append(number), seconds=60):
        pass
    assert time.perf_counter() - started < 30
    assert only == [0]
