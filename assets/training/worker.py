"""The training subprocess: open_clip_train on one side, Dagster Pipes and MLflow on the other.

Forked by :mod:`assets.training.server`; for several GPUs run by torchrun as
``python -m assets.training.worker``.
"""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from dagster_pipes import PipesContext, open_dagster_pipes

from assets.mlflow_runs.tracking import metric_name
from assets.training.process_metrics import Log, logged_process_metrics
from clipcov_pipeline.progress import EMPTY_BLOCK, FULL_BLOCK, WIDTH
from clipcov_pipeline.training.launch import launch
from clipcov_pipeline.training.parent import end_with_parent
from clipcov_pipeline.training.result import finish
from clipcov_pipeline.training.spec import from_json

LOG_SECONDS = 5.0

CURVES = ("loss", "lr", "samples_per_second", "logit_scale")

SPEC_VARIABLE = "CLIPCOV_TRAIN_SPEC"  # names the file with the run: Pipes serves one process of several


def main() -> None:
    """Train; only the first process of several reports."""
    end_with_parent()
    spec = from_json(Path(os.environ[SPEC_VARIABLE]).read_text())
    if int(os.environ.get("RANK", 0)) != 0:
        launch(spec)
        return
    with open_dagster_pipes() as pipes:
        _send_output_to(Path(pipes.get_extra("log")))
        log = _mlflow_log(pipes.get_extra("mlflow"))
        watched = logged_process_metrics(log) if log else nullcontext()
        with watched:
            launch(spec, _reporter(pipes, log, pipes.get_extra("arm")), _evaluation_reporter(pipes, log))
        finish(spec, pipes.get_extra("out_dir"))


def _send_output_to(log: Path) -> None:
    """open_clip_train prints the whole model and every parameter: keep that out of the terminal."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _reporter(pipes: PipesContext, log: Log | None, arm: str) -> Callable[[dict[str, float]], None]:
    """Return a callback that writes a line to Dagster's log now and then, and every point to MLflow."""
    last = 0.0

    def report(progress: dict[str, float]) -> None:
        nonlocal last
        if log is not None:
            log({f"train/{name}": progress[name] for name in CURVES}, int(progress["step"]))
        now = time.monotonic()
        if now - last >= LOG_SECONDS or progress["step"] == progress["total_steps"]:
            last = now
            pipes.log.info(f"{progress_line(progress)}  {arm}")

    return report


def _evaluation_reporter(pipes: PipesContext, log: Log | None) -> Callable[[dict[str, float]], None]:
    """Return a callback that writes the retrieval among the held-out pairs to Dagster's log and to MLflow."""

    def report(evaluation: dict[str, float]) -> None:
        scores = {name: value for name, value in evaluation.items() if name != "step"}
        if log is not None:
            log({f"val/{name}": value for name, value in scores.items()}, int(evaluation["step"]))
        recalls = ("text_retrieval_recall@5", "image_retrieval_recall@5")
        both = "  ".join(f"{name} {100 * scores[name]:.1f}%" for name in recalls)
        pipes.log.info(f"held-out pairs at step {evaluation['step']:,.0f}: {both}")

    return report


def progress_line(progress: dict[str, float]) -> str:
    """Return one line: bar, step, loss, learning rate, rate and time left."""
    share = progress["step"] / progress["total_steps"]
    full = int(share * WIDTH)
    bar = FULL_BLOCK * full + EMPTY_BLOCK * (WIDTH - full)
    return (
        f"{bar} {share:4.0%}  step {progress['step']:,.0f}/{progress['total_steps']:,.0f}"
        f"  loss {progress['loss']:.3f}  lr {progress['lr']:.2e}"
        f"  {progress['samples_per_second']:,.0f} samples/s  {progress['eta_seconds']:,.0f} s left"
    )


def _mlflow_log(mlflow: dict[str, str]) -> Log | None:
    """Return a function that logs metrics of a step to the training's MLflow run; None without a run."""
    if not mlflow:
        return None
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(mlflow["tracking_uri"])

    def log(metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        values = [Metric(metric_name(name), value, now, step) for name, value in metrics.items()]
        client.log_batch(mlflow["run_id"], metrics=values)

    return log


if __name__ == "__main__":
    main()
