"""One training run in the terms of open_clip_train, its steps, and the names of the files that it leaves."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from clipcov_pipeline.errors import InputError
from clipcov_pipeline.pool.captions import CaptionRule

Precision = Literal["fp32", "amp", "amp_bf16", "bf16", "fp16", "pure_bf16", "pure_fp16"]

Scheduler = Literal["cosine", "const"]

CHECKPOINT = "open_clip_pytorch_model.bin"

EARLY_CHECKPOINT = "early_pytorch_model.bin"  # the weights after the first virtual epoch

RECORD = "training.json"

EVALUATIONS = 10  # of a training, on its held-out pairs


# steps an epoch are rounded up to a multiple of this where that adds less than a tenth, so that 2, 4 or 8
# workers can share them equally: the number of steps must not depend on the number of workers
STEP_MULTIPLE = 8


# what changes speed or place only: a run may be continued under other values
FREE_TO_CHANGE = {
    "index",
    "cache",
    "storage_options",
    "val_data",
    "keep_early",
    "grad_checkpointing",
    "workers",
    "device",
    "log_dir",
    "name",
}


@dataclass(frozen=True)
class TrainSpec:
    """One training run.

    Attributes:
        model: open_clip architecture.
        pretrained: weights to start from (open_clip tag or checkpoint file), None to start from scratch.
        index: what is trained on, a `training_index`.
        n_samples: draws of a pass over it.
        batch_size: samples a step, over all GPUs and all parts (`accum_freq`) together.
        lr, wd, beta1, beta2, eps: AdamW's settings.
        warmup: steps of linear warm-up.
        lr_scheduler: ``cosine`` (to 0) or ``const``.
        precision: open_clip_train's ``--precision``.
        workers: data-loading processes a GPU (0: decode in the training process).
        seed: of the weights, of the order of samples and of how images are varied.
        device: torch device or ``auto``.
        samples_seen: samples in all, the same for subsets of any size; exactly one of this and `epochs`.
        epochs: passes over the subset.
        num_checkpoints: virtual epochs that samples_seen are cut into (an epoch is one under `epochs`).
        log_dir, name: open_clip_train's ``--logs`` and ``--name``: the run lives in ``log_dir/name``.
        aug_cfg: how training images are varied, by the names of ``open_clip.AugmentationCfg``; None: its
            default.
        val_data: an index of held-out pairs: retrieval among them is measured after a virtual epoch, at most
            about `EVALUATIONS` times, and decides nothing. None: not measured.
        keep_early: also keep the weights after the first virtual epoch, if there are several.
        accum_freq: parts that a GPU cuts its share of the batch into; the loss is over the whole batch, and
            BatchNorm over a part.
        grad_checkpointing: compute activations again in the backward pass, where the model can.
        quota: samples of each class that every pass draws anew.
        cache, storage_options: folder for what is fetched of remote shards, fsspec's options.
        caption: ``shards.caption``, as `CaptionRule.written` has it.
        extra: further arguments of open_clip_train, passed as they are.
    """

    model: str
    index: str
    n_samples: int
    batch_size: int
    lr: float
    warmup: int
    log_dir: str
    name: str
    pretrained: str | None = None
    samples_seen: int | None = None
    epochs: int | None = None
    wd: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    lr_scheduler: Scheduler = "cosine"
    precision: Precision = "fp32"
    workers: int = 1
    seed: int = 0
    device: str = "auto"
    num_checkpoints: int = 4
    aug_cfg: Mapping[str, Any] | None = None
    val_data: str | None = None
    keep_early: bool = False
    accum_freq: int = 1
    grad_checkpointing: bool = False
    quota: tuple[int, ...] | None = None
    cache: str = ""
    storage_options: Mapping[str, Any] | None = None
    caption: str | Mapping[str, Any] = "txt"
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.samples_seen is None) == (self.epochs is None):
            raise InputError(
                f"train: samples_seen is {self.samples_seen} and epochs is {self.epochs}; give exactly one"
            )
        for name in ("n_samples", "batch_size", "accum_freq", "num_checkpoints", "samples_seen", "epochs"):
            _check_at_least_one(name, getattr(self, name))

    @property
    def captions(self) -> CaptionRule:
        """Where captions are, and which one counts."""
        return CaptionRule.of(self.caption)

    @property
    def folder(self) -> Path:
        """Where open_clip_train writes its log and checkpoints."""
        return Path(self.log_dir) / self.name


def _check_at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise InputError(f"train.{name}: {value} is too small; give 1 or more")


class Length(Protocol):
    """What the number of steps follows from, beside the samples; `TrainSpec` says what each one is."""

    @property
    def batch_size(self) -> int: ...

    @property
    def samples_seen(self) -> int | None: ...

    @property
    def epochs(self) -> int | None: ...

    @property
    def num_checkpoints(self) -> int: ...


@dataclass(frozen=True)
class StepPlan:
    """How a run is cut: ``total_steps = virtual_epochs * steps_per_epoch`` steps of one batch each."""

    virtual_epochs: int
    samples_per_epoch: int
    steps_per_epoch: int
    total_steps: int


def steps(spec: TrainSpec) -> StepPlan:
    """Number of steps of a run, as `steps_of`."""
    return steps_of(spec, spec.n_samples)


def steps_of(length: Length, n_samples: int) -> StepPlan:
    """Number of steps of a run on so many samples, with exactly one of samples_seen and epochs.

    Under samples_seen it depends on nothing but that and batch_size.

    Raises:
        InputError: fewer samples than one batch.
    """
    _check_at_least_one("n_samples", n_samples)
    if n_samples < length.batch_size:
        raise InputError(
            f"train.batch_size: {length.batch_size} is more than the {n_samples} samples to train on;"
            f" give at most {n_samples}, or a larger fraction"
        )
    if length.samples_seen is not None:
        in_all = math.ceil(length.samples_seen / length.batch_size)
        epochs = min(length.num_checkpoints, in_all)
        per_epoch = math.ceil(in_all / epochs)
    else:
        assert length.epochs is not None
        epochs = length.epochs
        per_epoch = math.ceil(n_samples / length.batch_size)
    if per_epoch >= 10 * STEP_MULTIPLE:
        per_epoch = math.ceil(per_epoch / STEP_MULTIPLE) * STEP_MULTIPLE
    return StepPlan(epochs, per_epoch * length.batch_size, per_epoch, epochs * per_epoch)


def to_json(spec: TrainSpec) -> str:
    """A spec as JSON, for `from_json` in the training process."""
    return json.dumps(dataclasses.asdict(spec))


def from_json(text: str) -> TrainSpec:
    """The spec that `to_json` wrote."""
    fields = json.loads(text)
    quota = tuple(fields["quota"]) if fields.get("quota") is not None else None
    return TrainSpec(**{**fields, "extra": tuple(fields.get("extra", ())), "quota": quota})
