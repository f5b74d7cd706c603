"""Evaluation folders and suites in the whole graph: scored, averaged, left out loudly."""

import json
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.records import WHOLE
from lab import Lab
from make_benchmark import write_classification

pytestmark = pytest.mark.slow
NAMES = ["star", "wheel", "castle"]


def with_folders(settings: dict[str, Any]) -> None:
    evaluate = settings["evaluate"]
    every = ["zeroshot_classification", "linear_probe", "knn"]
    evaluate["sets"] |= {
        "icons": {"benchmark": "eval/icons", "tasks": every},
        "sketches": {"benchmark": "eval/sketches", "tasks": ["zeroshot_classification"]},
        "gone": {"benchmark": "eval/gone", "tasks": ["zeroshot_classification"]},
    }
    evaluate["suites"] = {"shifts": {"sets": ["icons", "sketches", "gone"], "metric": "acc1"}}
    evaluate["primary_metric"] = "shifts/acc1"


def test_folders_are_scored_averaged_and_left_out_by_name(lab: Lab):
    write_classification(lab.folder / "eval" / "icons", NAMES, {"test": 6, "train": 8})
    write_classification(lab.folder / "eval" / "sketches", NAMES, {"test": 4})
    lab.edit(with_folders)
    planned = CliRunner().invoke(cli, ["plan", "--config", str(lab.yaml)])
    assert "WARNING: evaluation set gone: no folder" in planned.output
    assert not any("gone" in step.node.name for step in lab.plan().steps)

    executed = lab.run()
    assert set(executed) == {"scores", "leaderboard", "report"}

    project = lab.project()
    board = project.store.current("leaderboard", WHOLE)
    assert board is not None
    folder = project.store.folder(board)
    scores = pl.read_parquet(folder / "scores.parquet")
    for (arm,), rows in scores.group_by("arm"):
        value = dict(zip(rows["metric"], rows["value"], strict=True))
        assert value["shifts/acc1"] == pytest.approx((value["icons/acc1"] + value["sketches/acc1"]) / 2), arm
        assert {"icons/lp_acc1", "icons/knn_acc1", "icons/lp_mean_per_class_recall"} <= set(value)
    text = (folder / "leaderboard.txt").read_text()
    assert "shifts/acc1: mean of 2 of its 3 sets (icons, sketches); left out, folder absent: gone" in text

    record = project.store.current("scores", "full-f1-s0@icons")
    assert record is not None
    tasks = json.loads((project.store.folder(record) / "scores.json").read_text())
    assert [task["task"] for task in tasks] == ["zeroshot_classification", "linear_probe", "knn"]
    assert [task["n_samples"] for task in tasks] == [18, 18, 18]

    # a new class name concerns this set's scores only; a folder that appears is scored, nothing else
    (lab.folder / "eval" / "sketches" / "classnames.txt").write_text("sun\nwheel\ncastle\n")
    write_classification(lab.folder / "eval" / "gone", NAMES, {"test": 4})
    todo = {step.node.name.partition("@")[2] for step in lab.plan().todo if step.node.stage == "scores"}
    assert todo == {"sketches", "gone"}


def test_a_primary_metric_without_any_folder_stops_everything(lab: Lab):
    lab.edit(with_folders)
    with pytest.raises(InputError, match=r"evaluate.primary_metric: found 'shifts/acc1', but there is no"):
        lab.plan()
