"""Reads the curve of a training, and its evaluations, from the lines that open_clip_train logs."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clipcov_pipeline.training.folder import keep_early
from clipcov_pipeline.training.spec import TrainSpec, steps

Point = dict[str, float]
"""One place on a training's curve: ``step`` and what was logged there, by name."""


# e.g. "Train Epoch: 0 [  512/2048 (25%)] Data (t): 0.01 Batch (t): 0.05, 5120/s, 5120/s/gpu LR: 0.000500
# Logit Scale: 14.286 Contrastive_loss: 5.5413 (5.5413) Loss: 5.5413 (5.5413)"
TRAIN_LINE = re.compile(
    r"Train Epoch: (?P<epoch>\d+) \[\s*(?P<samples>\d+)/.*"
    r"Batch \(t\): (?P<batch_seconds>[\d.]+),.*"
    r"LR: (?P<lr>[\d.e+-]+) Logit Scale: (?P<logit_scale>[\d.]+).* Loss: (?P<loss>[\d.naife+-]+)"
)


# logged when the checkpoint of the first epoch lies there whole, by a resumed run too
SECOND_EPOCH = "Start epoch 1"


def parse_line(line: str, spec: TrainSpec) -> Point | None:
    """Return what a line of open_clip_train's log tells of the training; None for another line."""
    found = TRAIN_LINE.search(line)
    if not found:
        return None
    plan = steps(spec)
    epoch, seconds = int(found["epoch"]), float(found["batch_seconds"])
    step = epoch * plan.steps_per_epoch + int(found["samples"]) // spec.batch_size
    return {
        "step": step,
        "total_steps": plan.total_steps,
        "epoch": epoch,
        "loss": float(found["loss"]),
        "lr": float(found["lr"]),
        "logit_scale": float(found["logit_scale"]),
        "samples_per_second": spec.batch_size / seconds if seconds else math.inf,
        "eta_seconds": (plan.total_steps - step) * seconds,
    }


# e.g. "Eval Epoch: 1 image_to_text_mean_rank: 12.2461\timage_to_text_median_rank: 4.0000\t..."
EVALUATION_LINE = re.compile(r"Eval Epoch: (?P<epoch>\d+) (?P<metrics>image_to_text_.*)")

EVALUATION_NAMES = {
    "clip_val_loss": "loss",
    **{f"image_to_text_R@{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_R@{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)},
}


def parse_evaluation(line: str, spec: TrainSpec) -> Point | None:
    """Return what a line of open_clip_train's log tells of an evaluation; None for another line."""
    found = EVALUATION_LINE.search(line)
    if not found:
        return None
    values = dict(item.split(": ") for item in found["metrics"].split("\t"))
    named = {EVALUATION_NAMES[name]: float(values[name]) for name in values if name in EVALUATION_NAMES}
    return {"step": int(found["epoch"]) * steps(spec).steps_per_epoch, **named}


@contextmanager
def progress_of(
    spec: TrainSpec,
    on_progress: Callable[[Point], None] | None,
    on_evaluation: Callable[[Point], None] | None,
) -> Iterator[None]:
    """Hand each line that reaches the root logger to whom it concerns; tidy the logger up after."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if spec.keep_early and record.getMessage() == SECOND_EPOCH:
                keep_early(spec)
            point = parse_line(record.getMessage(), spec)
            if point and on_progress:
                on_progress(point)
            evaluation = parse_evaluation(record.getMessage(), spec) if on_evaluation else None
            if evaluation and on_evaluation:
                on_evaluation(evaluation)

    root = logging.getLogger()
    level, before = root.level, root.handlers[:]
    root.addHandler(Listener())
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in root.handlers[:]:
            if handler not in before:
                root.removeHandler(handler)
                handler.close()
