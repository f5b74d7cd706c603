"""The controlled benchmark: its tables by hand, and one small real run from photos to the printed result."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import psutil
import pytest
from click.testing import CliRunner

from clipcov_pipeline.bench.quality import (
    MATRIX,
    PRIMARY,
    covariance_and_accuracy,
    matrix_methods,
    rank_correlations,
)
from clipcov_pipeline.bench.quality_tables import plot_covariance, summary, to_text
from clipcov_pipeline.cli import cli
from clipcov_pipeline.errors import InputError
from clipcov_pipeline.experiment.config.load import load_config
from clipcov_pipeline.experiment.project import Project
from lab import still_there
from make_benchmark import write_photos


def _scores(rows: list[tuple[str, float, int, int, float]]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=["method", "fraction", "seed", "draw", "value"], orient="row")
    return frame.with_columns(metric=pl.lit(PRIMARY))


def test_summary_against_a_hand_worked_table():
    scores = _scores(
        [
            ("full", 1.0, 0, 0, 0.30), ("full", 1.0, 1, 0, 0.34),
            ("clipcov", 0.1, 0, 0, 0.40), ("clipcov", 0.1, 1, 0, 0.44),
            ("random", 0.1, 0, 0, 0.20), ("random", 0.1, 1, 0, 0.22),
            ("clip_score", 0.1, 0, 0, 0.28), ("clip_score", 0.1, 1, 0, 0.32),
            ("clip_score_per_class", 0.1, 0, 0, 0.50),
        ]
    )  # fmt: skip
    board = {(r["method"], r["fraction"]): r for r in summary(scores).iter_rows(named=True)}
    ours = board["clipcov", 0.1]
    assert ours["mean"] == pytest.approx(42.0)
    assert ours["std"] == pytest.approx(2.8284, abs=1e-4)
    assert ours["runs"] == 2
    # the best of the paper's baselines is CLIP score; the per-class one is not among them
    assert ours["to_best_baseline"] == pytest.approx(42 / 30)
    assert ours["to_full"] == pytest.approx(42 / 32)
    assert board["clip_score_per_class", 0.1]["std"] is None


def _truth(rows: list[tuple[str, float, int, float | None, float | None]]) -> pl.DataFrame:
    frame = pl.DataFrame(
        rows, schema=["method", "fraction", "draw", "alignment", "scale"], orient="row", strict=False
    )
    return frame.with_columns(precision=pl.lit(0.9), class_balance=pl.lit(0.8), distinct_sources=pl.lit(0.7))


SECONDS = pl.DataFrame(
    [("a", 0.1, 0, 0.5, 60.0, 9.0, 3.0, 540.0), ("a", 0.1, 1, 0.5, 70.0, 11.0, 5.0, 630.0)],
    schema=["method", "fraction", "seed", "selection", "training", "overhead", "scoring", "saved"],
    orient="row",
)


def test_without_baselines_and_full_pool_there_is_no_ratio():
    scores = _scores([("clipcov", 0.1, 0, 0, 0.4)])
    row = summary(scores).row(0, named=True)
    assert row["to_best_baseline"] is None
    assert row["to_full"] is None
    assert "40.0 (1)" in to_text(scores, _truth([("clipcov", 0.1, 0, 0.8, 3.0)]), SECONDS)


def test_accuracy_beside_the_cross_covariance_against_a_hand_worked_table(tmp_path: Path):
    scores = _scores(
        [
            ("full", 1.0, 0, 0, 0.3),
            ("a", 0.1, 0, 0, 0.10), ("a", 0.1, 1, 0, 0.20), ("b", 0.1, 0, 0, 0.30), ("c", 0.1, 0, 0, 0.40),
            ("a", 0.1, 0, 1, 0.30), ("b", 0.1, 0, 1, 0.20), ("c", 0.1, 0, 1, 0.10),
            ("unseen", 0.1, 0, 0, 0.9),
        ]
    )  # fmt: skip
    truth = _truth(
        [
            ("full", 1.0, 0, 1.0, 1.0), ("unseen", 0.1, 0, None, None),
            ("a", 0.1, 0, 0.5, 3.0), ("b", 0.1, 0, 0.6, 2.0), ("c", 0.1, 0, 0.7, 4.0),
            ("a", 0.1, 1, 0.5, 3.0), ("b", 0.1, 1, 0.6, 2.0), ("c", 0.1, 1, 0.7, 4.0),
        ]
    )  # fmt: skip
    found = covariance_and_accuracy(scores, truth)
    assert found.select("draw", "method").rows() == [
        (0, "a"),
        (0, "b"),
        (0, "c"),
        (1, "a"),
        (1, "b"),
        (1, "c"),
    ]
    assert found["accuracy"].to_list() == pytest.approx([15, 30, 40, 30, 20, 10])
    assert found["product"].to_list() == pytest.approx([1.5, 1.2, 2.8] * 2)
    [row] = rank_correlations(found).to_dicts()
    # ranks of draw 0: accuracy 1 2 3, alignment 1 2 3, scale and product 2 1 3; draw 1 the other way round
    assert row == pytest.approx(
        {"fraction": 0.1, "subsets": 6, "alignment": 0.0, "scale": (0.5 - 0.5) / 2, "product": 0.0}, abs=1e-9
    )
    [one] = rank_correlations(found.filter(draw=0)).to_dicts()
    assert (one["alignment"], one["scale"]) == pytest.approx((1.0, 0.5))
    text = to_text(scores, truth, SECONDS)
    assert "a                           10 %       0.5      65.0      10.0       4.0     585.0" in text
    assert "unseen                      10 %   0.900    0.800     0.700          -      -" in text
    plot_covariance(scores, truth, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_methods_are_the_matrix_or_those_asked_for():
    assert matrix_methods(()) == MATRIX
    assert list(matrix_methods(("random", "clipcov-no_self"))) == ["random", "clipcov-no_self"]
    with pytest.raises(InputError, match="--methods: found 'rnd', expected any of clipcov, "):
        matrix_methods(("rnd",))


def test_c_rho_needs_a_proxy_that_is_trained_here():
    assert list(matrix_methods((), early_proxy=False)) == [name for name in MATRIX if name != "c_rho"]
    with pytest.raises(
        InputError, match="--methods: found c_rho, expected another beside --proxy-pretrained"
    ):
        matrix_methods(("c_rho",), early_proxy=False)


def test_fine_tuning_starts_every_arm_from_the_same_weights(tmp_path: Path):
    write_photos(tmp_path / "photos", {"cat": 20, "dog": 20})
    (tmp_path / "full.pt").write_bytes(b"weights")
    command = ["bench", "quality", "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    command += ["--prepare", "--largest", "16", "--pretrained", str(tmp_path / "full.pt"), "--jobs", "2"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    config = load_config(str(tmp_path / "out" / "draw0" / "experiment.yaml"))
    assert config.train.pretrained == str(tmp_path / "full.pt")
    assert config.proxy.pretrained is None
    assert (config.automation.pools["gpu"], config.train.workers) == (2, 0)


def test_a_second_round_selects_by_the_given_proxy(tmp_path: Path):
    write_photos(tmp_path / "photos", {"cat": 20, "dog": 20})
    (tmp_path / "arm.pt").write_bytes(b"weights")
    command = ["bench", "quality", "--images", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    command += ["--prepare", "--largest", "16", "--methods", "clipcov"]
    command += ["--proxy-pretrained", str(tmp_path / "arm.pt")]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    config = load_config(str(tmp_path / "out" / "draw0" / "experiment.yaml"))
    assert (config.proxy.pretrained, config.proxy.train) == (str(tmp_path / "arm.pt"), None)
    assert config.train.pretrained is None
    result = CliRunner().invoke(cli, [*command, "--draws", "0,1"])
    assert result.exit_code != 0
    assert "--proxy-pretrained: found 1 files, expected 2, one a draw" in str(result.exception)


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_benchmark_leaves_no_run_at_work(tmp_path: Path):
    """Else the next one on the same folder would meet it."""
    photos = write_photos(tmp_path / "photos", {"cat": 60, "dog": 60, "owl": 60})
    command = [sys.executable, "-m", "clipcov_pipeline.cli", "bench", "quality", "--images", str(photos)]
    command += ["--out", str(tmp_path / "out"), "--largest", "60", "--methods", "random", "--seeds", "0"]
    command += ["--fractions", "0.5", "--batch-size", "32", "--proxy-batch-size", "32"]
    command += ["--proxy-samples-seen", "10000000"]  # hours
    bench = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert bench.stderr is not None
    line = next(line for line in bench.stderr if "  step " in line)  # the run is at work
    (run,) = psutil.Process(bench.pid).children()
    bench.send_signal(signal.SIGKILL)
    bench.wait()
    assert still_there([run]) == [], line


@pytest.mark.slow
@pytest.mark.long
def test_from_photos_to_the_printed_result(tmp_path: Path):
    photos = tmp_path / "photos"
    write_photos(photos / "train", {"cat": 60, "dog": 60, "owl": 60})
    write_photos(photos / "test", {"cat": 8, "dog": 8, "owl": 8})
    command = [sys.executable, "-m", "clipcov_pipeline.cli", "bench", "quality", "--images", str(photos)]
    command += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "q.json"), "--batch-size", "32"]
    command += ["--methods", "clipcov,random,oracle", "--fractions", "0.5", "--seeds", "0", "--largest", "60"]
    command += ["--samples-seen", "96", "--proxy-samples-seen", "256", "--proxy-batch-size", "32"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"{PRIMARY} (percent" in result.stdout
    assert "draw0  Executed " in result.stderr
    found = json.loads((tmp_path / "q.json").read_text())
    truth = {row["method"]: row for row in found["truth"]}
    assert truth["full"]["samples"] == pl.read_parquet(tmp_path / "out" / "draw0" / "truth.parquet").height
    assert truth["oracle"]["precision"] > truth["full"]["precision"]
    store = Project.open(str(tmp_path / "out" / "draw0" / "experiment.yaml")).store
    for method in ("clipcov", "random", "oracle"):
        diagnosed = store.current("subset_diagnostics", f"{method}-f0.5")
        assert diagnosed is not None
        assert -1 <= truth[method]["alignment"] == diagnosed.stats["alignment"] <= 1
    assert (tmp_path / "out" / "covariance.png").exists()
    arms = {(row["method"], row["fraction"]): row for row in found["seconds"]}
    assert set(arms) == {("full", 1.0), ("clipcov", 0.5), ("random", 0.5), ("oracle", 0.5)}
    for row in arms.values():
        assert min(row["training"], row["overhead"], row["scoring"]) > 0
        assert row["saved"] == pytest.approx(row["training"] * (1 / row["fraction"] - 1))
    assert {row["metric"] for row in found["summary"]} >= {PRIMARY, "photos/lp_acc1", "photos/knn_acc1"}
